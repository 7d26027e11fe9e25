// y = silu(gate) * up: elementwise, bound by memory.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/device.h"

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void swiglu_kernel(const T *gate_up, int64_t stride, int64_t cols, T *y, int64_t y_stride) {
    const T *gate = gate_up + blockIdx.x * stride, *up = gate + cols;
    for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < cols; i += gridDim.y * kThreads) {
        const float g = ts::load(gate + i);
        ts::store(y + blockIdx.x * y_stride + i, g * ts::sigmoid(g) * ts::load(up + i));
    }
}

} // namespace

ts_status ts_cuda_swiglu(ts_device *device, const ts_swiglu_args *args) {
    ts_status status = TS_OK;
    const ts_tensor &in = args->gate_up, &y = args->y;
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    const dim3 grid((unsigned)y.rows, (unsigned)((y.cols + 4 * kThreads - 1) / (4 * kThreads)));
    TS_TRY(ts_cuda_check_activation(&in, "swiglu: gate_up"));
    TS_CHECK(in.dtype == y.dtype, TS_ERR_INVALID, "cuda: swiglu: gate_up and y must have one dtype");
    if (y.rows == 0)
        goto done;
    if (y.dtype == TS_F32)
        swiglu_kernel<<<grid, kThreads, 0, stream>>>((const float *)in.data, in.stride, y.cols, (float *)y.data,
                                                     y.stride);
    else
        swiglu_kernel<<<grid, kThreads, 0, stream>>>((const ts::bf16 *)in.data, in.stride, y.cols, (ts::bf16 *)y.data,
                                                     y.stride);
    TS_CUDA_TRY(cudaGetLastError());
done:
    return status;
}
