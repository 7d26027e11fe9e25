// What cuBLASLt does not do inside its product: bias and activation where no fused epilogue exists, and weights in a
// dtype other than the activations'. Bound by memory. And what it takes to tell whether two algorithms give the same
// bits.
#include "kernels/cuda/linear/linear.h"
#include "kernels/cuda/primitives/activation.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T> __global__ void finish_kernel(T *y, int64_t stride, int64_t cols, const T *bias, bool gelu) {
    T *row = y + blockIdx.x * stride;
    for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < cols; i += gridDim.y * kThreads) {
        const float x = ts::load(row + i) + (bias ? ts::load(bias + i) : 0.0f);
        ts::store(row + i, gelu ? ts::gelu_tanh(x) : x);
    }
}

template <typename A, typename B>
__global__ void convert_kernel(const A *from, int64_t stride, int64_t rows, int64_t cols, B *to) {
    for (int64_t i = blockIdx.x * (int64_t)kThreads + threadIdx.x; i < rows * cols; i += (int64_t)gridDim.x * kThreads)
        ts::store(to + i, ts::load(from + i / cols * stride + i % cols));
}

__global__ void draw_kernel(uint16_t *out, int64_t stride, int64_t cols, uint32_t sign_of_repeat) {
    const int64_t half = cols / 2;
    for (int64_t k = threadIdx.x; k < cols; k += kThreads) {
        const bool repeats = k >= half;
        uint32_t bits = (uint32_t)(blockIdx.x * half + (repeats ? k - half : k)) * 2654435769u;
        bits = (bits ^ bits >> 15) * 2246822519u;
        bits = (bits ^ bits >> 13) * 3266489917u;
        bits ^= bits >> 16;
        const uint32_t sign = (bits >> 10 & 1u) ^ (repeats ? sign_of_repeat : 0u), exponent = 127u - (bits >> 7 & 7u);
        out[blockIdx.x * stride + k] = k < 2 * half ? (uint16_t)(sign << 15 | exponent << 7 | (bits & 127u)) : 0;
    }
}

template <typename T>
__global__ void count_kernel(const T *a, int64_t a_stride, const T *b, int64_t b_stride, int64_t cols, uint32_t *n) {
    uint32_t mine = 0;
    for (int64_t i = threadIdx.x; i < cols; i += kThreads)
        mine += a[blockIdx.x * a_stride + i] != b[blockIdx.x * b_stride + i];
    if (mine > 0)
        atomicAdd(n, mine);
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
    const void *b = bias ? bias->data : NULL;
    const bool gelu = activation == TS_ACTIVATION_GELU_TANH;
    if (y->dtype == TS_F32)
        finish_kernel<<<grid, kThreads, 0, stream>>>((float *)y->data, y->stride, y->cols, (const float *)b, gelu);
    else
        finish_kernel<<<grid, kThreads, 0, stream>>>((ts::bf16 *)y->data, y->stride, y->cols, (const ts::bf16 *)b,
                                                     gelu);
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

ts_status ts_cuda_linear_draw(cudaStream_t stream, const ts_tensor *out, bool cancels) {
    draw_kernel<<<(unsigned)out->rows, kThreads, 0, stream>>>((uint16_t *)out->data, out->stride, out->cols, cancels);
    return ts_cuda_status(cudaGetLastError(), "linear: drawn operands");
}

ts_status ts_cuda_linear_count_different(cudaStream_t stream, const ts_tensor *a, const ts_tensor *b, uint32_t *n) {
    const cudaError_t error = cudaMemsetAsync(n, 0, sizeof *n, stream);
    if (error != cudaSuccess)
        return ts_cuda_status(error, "linear: comparison");
    if (a->dtype == TS_F32)
        count_kernel<<<(unsigned)a->rows, kThreads, 0, stream>>>((const uint32_t *)a->data, a->stride,
                                                                 (const uint32_t *)b->data, b->stride, a->cols, n);
    else
        count_kernel<<<(unsigned)a->rows, kThreads, 0, stream>>>((const uint16_t *)a->data, a->stride,
                                                                 (const uint16_t *)b->data, b->stride, a->cols, n);
    return ts_cuda_status(cudaGetLastError(), "linear: comparison");
}
