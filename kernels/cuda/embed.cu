// Rows of the embedding table: bound by memory, one block a token.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/device.h"

namespace {

constexpr int kThreads = 256;

template <typename W, typename X>
__global__ void embed_kernel(const int32_t *tokens, int64_t first_token, const W *table, int64_t rows, int64_t cols,
                             int64_t stride, X *x, int64_t x_stride) {
    const int64_t row = tokens[blockIdx.x] - first_token;
    X *out = x + blockIdx.x * x_stride;
    const bool here = row >= 0 && row < rows;
    const W *in = table + (here ? row : 0) * stride;
    for (int64_t i = threadIdx.x; i < cols; i += kThreads)
        ts::store(out + i, here ? ts::load(in + i) : 0.0f);
}

template <typename W> void launch(const ts_embed_args *args, cudaStream_t stream) {
    const ts_tensor &w = args->table, &x = args->x;
    if (x.dtype == TS_F32)
        embed_kernel<<<(unsigned)x.rows, kThreads, 0, stream>>>(args->tokens, args->first_token, (const W *)w.data,
                                                                w.rows, w.cols, w.stride, (float *)x.data, x.stride);
    else
        embed_kernel<<<(unsigned)x.rows, kThreads, 0, stream>>>(args->tokens, args->first_token, (const W *)w.data,
                                                                w.rows, w.cols, w.stride, (ts::bf16 *)x.data, x.stride);
}

} // namespace

ts_status ts_cuda_embed(ts_device *device, const ts_embed_args *args) {
    const ts_status status = ts_cuda_check_activation(&args->x, "embed: x");
    if (status != TS_OK || args->x.rows == 0)
        return status;
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    if (args->table.dtype == TS_F32)
        launch<float>(args, stream);
    else if (args->table.dtype == TS_BF16)
        launch<ts::bf16>(args, stream);
    else
        launch<__half>(args, stream);
    return ts_cuda_status(cudaGetLastError(), "embed");
}
