// y = silu(gate) * up: elementwise, bound by memory. Each thread has four reads of 16 bytes in flight.
#include "kernels/cuda/device.h"
#include "kernels/cuda/primitives/activation.cuh"

namespace {

constexpr int kThreads = 256, kUnroll = 2;

// Sizes in V, one or several neighbouring elements T.
template <typename T, typename V>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const V *gate_up, int64_t stride, int64_t cols, V *y, int64_t y_stride) {
    const V *gates = gate_up + blockIdx.x * stride, *ups = gates + cols;
    const int64_t first = (int64_t)blockIdx.y * kThreads * kUnroll + threadIdx.x;
    V gate[kUnroll], up[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; j++)
        if (first + j * kThreads < cols) {
            gate[j] = gates[first + j * kThreads];
            up[j] = ups[first + j * kThreads];
        }
#pragma unroll
    for (int j = 0; j < kUnroll; j++) {
        T *g = (T *)&gate[j];
        const T *u = (const T *)&up[j];
        if (first + j * kThreads >= cols)
            break;
#pragma unroll
        for (int e = 0; e < (int)(sizeof(V) / sizeof(T)); e++) {
            const float x = ts::load(g + e);
            ts::store(g + e, x * ts::sigmoid(x) * ts::load(u + e));
        }
        y[blockIdx.x * y_stride + first + j * kThreads] = gate[j];
    }
}

template <typename T, typename V> void launch(const ts_tensor &in, const ts_tensor &y, cudaStream_t stream) {
    constexpr int kElements = sizeof(V) / sizeof(T);
    const int64_t cols = y.cols / kElements, each = kThreads * kUnroll;
    const dim3 grid((unsigned)y.rows, (unsigned)((cols + each - 1) / each));
    swiglu_kernel<T, V><<<grid, kThreads, 0, stream>>>((const V *)in.data, in.stride / kElements, cols, (V *)y.data,
                                                       y.stride / kElements);
}

template <typename T> void launch_widest(const ts_tensor &in, const ts_tensor &y, cudaStream_t stream) {
    const int64_t bits = in.stride | y.stride | y.cols;
    if (bits % (int64_t)(sizeof(uint4) / sizeof(T)) == 0 && ((uintptr_t)in.data | (uintptr_t)y.data) % 16 == 0)
        launch<T, uint4>(in, y, stream);
    else
        launch<T, T>(in, y, stream);
}

} // namespace

ts_status ts_cuda_swiglu(ts_device *device, const ts_swiglu_args *args) {
    ts_status status = TS_OK;
    const ts_tensor &in = args->gate_up, &y = args->y;
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    TS_TRY(ts_cuda_check_activation(&in, "swiglu: gate_up"));
    TS_CHECK(in.dtype == y.dtype, TS_ERR_INVALID, "cuda: swiglu: gate_up and y must have one dtype");
    if (y.rows == 0)
        goto done;
    if (y.dtype == TS_F32)
        launch_widest<float>(in, y, stream);
    else
        launch_widest<ts::bf16>(in, y, stream);
    TS_CUDA_TRY(cudaGetLastError());
done:
    return status;
}
