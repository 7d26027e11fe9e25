// Largest logit, sum of exponentials and the target's logit, one block a row: bound by reading the logits twice, the
// second time from cache.
#include "kernels/cuda/device.h"
#include "kernels/cuda/primitives/activation.cuh"

namespace {

constexpr int kThreads = 256;

__global__ void cross_entropy_kernel(const float *logits, int64_t stride, int64_t cols, const int32_t *targets,
                                     int64_t first_token, double *parts) {
    __shared__ double sums[kThreads / 32];
    __shared__ float largests[kThreads / 32];
    const float *x = logits + blockIdx.x * stride;
    float largest = -INFINITY;
    for (int64_t i = threadIdx.x; i < cols; i += kThreads)
        largest = fmaxf(largest, x[i]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (threadIdx.x % 32 == 0)
        largests[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; i++)
        largest = fmaxf(largest, largests[i]);
    double sum = 0;
    for (int64_t i = threadIdx.x; i < cols; i += kThreads)
        sum += (double)expf(x[i] - largest);
    sum = ts::block_sum(sum, sums);
    if (threadIdx.x == 0) {
        const int64_t target = targets[blockIdx.x] - first_token;
        double *out = parts + 3 * (int64_t)blockIdx.x;
        out[0] = (double)largest;
        out[1] = sum;
        out[2] = target >= 0 && target < cols ? (double)x[target] : -INFINITY;
    }
}

} // namespace

ts_status ts_cuda_cross_entropy(ts_device *device, const ts_cross_entropy_args *args) {
    const ts_tensor &logits = args->logits;
    if (logits.rows == 0)
        return TS_OK;
    cross_entropy_kernel<<<(unsigned)logits.rows, kThreads, 0, ts_cuda_device_of(device)->stream>>>(
        (const float *)logits.data, logits.stride, logits.cols, args->targets, args->first_token, args->parts);
    return ts_cuda_status(cudaGetLastError(), "cross_entropy");
}
