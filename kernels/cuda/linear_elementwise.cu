// What cuBLASLt does not do inside its product: bias and activation where no fused epilogue exists, and weights in a
// dtype other than the activations'. Bound by memory.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/linear.h"

namespace {

constexpr int kThreads = 256;

template <typename T> __global__ void finish_kernel(T *y, int64_t stride, int64_t cols, const float *bias, bool gelu) {
    T *row = y + blockIdx.x * stride;
    for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < cols; i += gridDim.y * kThreads) {
        const float x = ts::load(row + i) + (bias ? bias[i] : 0.0f);
        ts::store(row + i, gelu ? ts::gelu_tanh(x) : x);
    }
}

template <typename A, typename B>
__global__ void convert_kernel(const A *from, int64_t stride, int64_t rows, int64_t cols, B *to) {
    for (int64_t i = blockIdx.x * (int64_t)kThreads + threadIdx.x; i < rows * cols; i += (int64_t)gridDim.x * kThreads)
        ts::store(to + i, ts::load(from + i / cols * stride + i % cols));
}

template <typename A> void convert(cudaStream_t stream, const ts_tensor *from, void *to, ts_dtype dtype) {
    const int64_t blocks = (from->rows * from->cols + kThreads - 1) / kThreads;
    const unsigned grid = (unsigned)(blocks < 4096 ? blocks : 4096);
    if (dtype == TS_F32)
        convert_kernel<<<grid, kThreads, 0, stream>>>((const A *)from->data, from->stride, from->rows, from->cols,
                                                      (float *)to);
    else
        convert_kernel<<<grid, kThreads, 0, stream>>>((const A *)from->data, from->stride, from->rows, from->cols,
                                                      (ts::bf16 *)to);
}

} // namespace

ts_status ts_cuda_linear_finish(cudaStream_t stream, const ts_tensor *y, const ts_tensor *bias,
                                ts_activation activation) {
    const dim3 grid((unsigned)y->rows, (unsigned)((y->cols + 4 * kThreads - 1) / (4 * kThreads)));
    const float *b = bias ? (const float *)bias->data : NULL;
    const bool gelu = activation == TS_ACTIVATION_GELU_TANH;
    if (y->dtype == TS_F32)
        finish_kernel<<<grid, kThreads, 0, stream>>>((float *)y->data, y->stride, y->cols, b, gelu);
    else
        finish_kernel<<<grid, kThreads, 0, stream>>>((ts::bf16 *)y->data, y->stride, y->cols, b, gelu);
    return ts_cuda_status(cudaGetLastError(), "linear: bias and activation");
}

ts_status ts_cuda_linear_convert(cudaStream_t stream, const ts_tensor *from, void *to, ts_dtype dtype) {
    if (from->dtype == TS_F32)
        convert<float>(stream, from, to, dtype);
    else if (from->dtype == TS_BF16)
        convert<ts::bf16>(stream, from, to, dtype);
    else
        convert<__half>(stream, from, to, dtype);
    return ts_cuda_status(cudaGetLastError(), "linear: conversion of weights");
}
