// Rows of the embedding table: bound by memory. A block reads four tokens' rows at once, four neighbours a thread.
#include "kernels/cuda/device.h"
#include "kernels/cuda/primitives/activation.cuh"

namespace {

constexpr int kThreads = 256, kTokens = 4;

__device__ __forceinline__ float4 load4(const __half *p) {
    const uint2 u = *reinterpret_cast<const uint2 *>(p);
    const float2 low = __half22float2(*reinterpret_cast<const __half2 *>(&u.x)),
                 high = __half22float2(*reinterpret_cast<const __half2 *>(&u.y));
    return make_float4(low.x, low.y, high.x, high.y);
}
template <typename W> __device__ __forceinline__ float4 load4(const W *p) {
    return ts::load4(p);
}

// By fours: cols and strides are multiples of 4, rows aligned to four elements.
template <typename W, typename X, bool ByFours>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int32_t *tokens, int64_t first_token, const W *table, int64_t rows, int64_t cols, int64_t stride,
                 X *x, int64_t x_stride, int64_t n_tokens) {
    const int64_t first = (int64_t)blockIdx.x * kTokens;
    const int n = (int)min((int64_t)kTokens, n_tokens - first);
    const W *in[kTokens]; // NULL: of another shard
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
        const int64_t row = t < n ? tokens[first + t] - first_token : -1;
        in[t] = row >= 0 && row < rows ? table + row * stride : NULL;
    }
    x += first * x_stride;
    constexpr int kElements = ByFours ? 4 : 1;
    for (int64_t i = threadIdx.x * kElements; i < cols; i += kThreads * kElements) {
        float4 v[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            v[t] = make_float4(0, 0, 0, 0);
            if (!in[t])
                continue;
            if constexpr (ByFours)
                v[t] = load4(in[t] + i);
            else
                v[t].x = ts::load(in[t] + i);
        }
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            if (t >= n)
                break;
            if constexpr (ByFours)
                ts::store4(x + t * x_stride + i, v[t]);
            else
                ts::store(x + t * x_stride + i, v[t].x);
        }
    }
}

template <typename W, typename X> void launch(const ts_embed_args *args, cudaStream_t stream) {
    const ts_tensor &w = args->table, &x = args->x;
    const unsigned n_blocks = (unsigned)((x.rows + kTokens - 1) / kTokens);
    const bool by_fours = (w.cols | w.stride | x.stride) % 4 == 0 && (uintptr_t)w.data % (4 * sizeof(W)) == 0 &&
                          (uintptr_t)x.data % (4 * sizeof(X)) == 0;
    const auto kernel = by_fours ? embed_kernel<W, X, true> : embed_kernel<W, X, false>;
    kernel<<<n_blocks, kThreads, 0, stream>>>(args->tokens, args->first_token, (const W *)w.data, w.rows, w.cols,
                                              w.stride, (X *)x.data, x.stride, x.rows);
}

template <typename W> void launch_as(const ts_embed_args *args, cudaStream_t stream) {
    if (args->x.dtype == TS_F32)
        launch<W, float>(args, stream);
    else
        launch<W, ts::bf16>(args, stream);
}

} // namespace

ts_status ts_cuda_embed(ts_device *device, const ts_embed_args *args) {
    const ts_status status = ts_cuda_check_activation(&args->x, "embed: x");
    if (status != TS_OK || args->x.rows == 0)
        return status;
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    if (args->table.dtype == TS_F32)
        launch_as<float>(args, stream);
    else if (args->table.dtype == TS_BF16)
        launch_as<ts::bf16>(args, stream);
    else
        launch_as<__half>(args, stream);
    return ts_cuda_status(cudaGetLastError(), "embed");
}
