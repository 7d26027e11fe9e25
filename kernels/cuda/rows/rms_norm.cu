// Residual add and RMSNorm in one pass over a row: bound by memory. A block holds a row in registers between the sum
// and the scaling, so x is read once; rows too long or too ragged for that are read again.
#include "kernels/cuda/device.h"
#include "kernels/cuda/primitives/activation.cuh"
#include "kernels/cuda/primitives/dependent_launch.cuh"

namespace {

constexpr int kMaxItems = 4; // vectors of four a thread holds

// Exactly where h is F32, for validation.
template <typename H> __device__ __forceinline__ float scale_of(float mean_square, double eps) {
    if (sizeof(H) == 4)
        return (float)(1.0 / sqrt((double)mean_square + eps));
    return rsqrtf(mean_square + (float)eps);
}

template <typename R, typename H, int kThreads>
__global__ void __launch_bounds__(kThreads)
    norm_vectors(float *x, int64_t x_stride, const R *residual, int64_t residual_stride, const float *weight, int n,
                 double eps, H *h, int64_t h_stride) {
    __shared__ float parts[32];
    float *row = x + blockIdx.x * x_stride;
    float4 v[kMaxItems], w[kMaxItems];
    float sum = 0;
#pragma unroll
    for (int item = 0; item < kMaxItems; item++) {
        const int i = 4 * ((int)threadIdx.x + item * kThreads);
        if (i < n)
            w[item] = ts::load4(weight + i);
    }
    ts::follow_front();
#pragma unroll
    for (int item = 0; item < kMaxItems; item++) {
        const int i = 4 * ((int)threadIdx.x + item * kThreads);
        if (i >= n)
            continue;
        v[item] = ts::load4(row + i);
        if (residual) {
            const float4 r = ts::load4(residual + blockIdx.x * residual_stride + i);
            v[item].x += r.x, v[item].y += r.y, v[item].z += r.z, v[item].w += r.w;
            ts::store4(row + i, v[item]);
        }
        sum += v[item].x * v[item].x + v[item].y * v[item].y + v[item].z * v[item].z + v[item].w * v[item].w;
    }
    const float scale = scale_of<H>(ts::block_sum(sum, parts) / (float)n, eps);
#pragma unroll
    for (int item = 0; item < kMaxItems; item++) {
        const int i = 4 * ((int)threadIdx.x + item * kThreads);
        if (i >= n)
            continue;
        ts::store4(h + blockIdx.x * h_stride + i,
                   make_float4(v[item].x * scale * w[item].x, v[item].y * scale * w[item].y,
                               v[item].z * scale * w[item].z, v[item].w * scale * w[item].w));
    }
}

template <typename R, typename H>
__global__ void norm_any(float *x, int64_t x_stride, const R *residual, int64_t residual_stride, const float *weight,
                         int n, double eps, H *h, int64_t h_stride) {
    __shared__ float parts[32];
    float *row = x + blockIdx.x * x_stride;
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = row[i];
        if (residual)
            row[i] = v += ts::load(residual + blockIdx.x * residual_stride + i);
        sum += v * v;
    }
    const float scale = scale_of<H>(ts::block_sum(sum, parts) / (float)n, eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        ts::store(h + blockIdx.x * h_stride + i, row[i] * scale * weight[i]);
}

template <typename R, typename H, int kThreads>
cudaError_t launch_vectors(unsigned rows, const ts_cuda_device *device, float *x, int64_t x_stride, const R *residual,
                           int64_t residual_stride, const float *weight, int n, double eps, H *h, int64_t h_stride) {
    return ts::launch_following(device->dense_plan.capability == 90, norm_vectors<R, H, kThreads>, rows, kThreads, 0,
                                device->stream, x, x_stride, residual, residual_stride, weight, n, eps, h, h_stride);
}

template <typename R, typename H> cudaError_t launch(const ts_rms_norm_args *args, const ts_cuda_device *device) {
    const ts_tensor *r = args->residual;
    const int n = (int)args->x.cols;
    const unsigned rows = (unsigned)args->x.rows;
    float *x = (float *)args->x.data;
    const R *residual = r ? (const R *)r->data : NULL;
    const float *weight = (const float *)args->weight.data;
    H *h = (H *)args->h.data;
    const int64_t xs = args->x.stride, rs = r ? r->stride : 0, hs = args->h.stride;
    const bool vectors = n % 4 == 0 && xs % 4 == 0 && rs % 4 == 0 && hs % 4 == 0 && (uintptr_t)x % 16 == 0 &&
                         (uintptr_t)residual % 16 == 0 && (uintptr_t)h % 16 == 0;
    if (vectors && n <= 4 * 64)
        return launch_vectors<R, H, 64>(rows, device, x, xs, residual, rs, weight, n, args->eps, h, hs);
    if (vectors && n <= 4 * 256 * kMaxItems)
        return launch_vectors<R, H, 256>(rows, device, x, xs, residual, rs, weight, n, args->eps, h, hs);
    norm_any<<<rows, 256, 0, device->stream>>>(x, xs, residual, rs, weight, n, args->eps, h, hs);
    return cudaGetLastError();
}

} // namespace

ts_status ts_cuda_rms_norm(ts_device *device, const ts_rms_norm_args *args) {
    ts_status status = TS_OK;
    const ts_cuda_device *cuda = ts_cuda_device_of(device);
    const bool wide_residual = !args->residual || args->residual->dtype == TS_F32;
    TS_CHECK(args->x.dtype == TS_F32, TS_ERR_UNSUPPORTED, "cuda: rms_norm: x is %s; the residual stream must be F32",
             ts_dtype_name(args->x.dtype));
    TS_TRY(ts_cuda_check_activation(&args->h, "rms_norm: h"));
    if (args->residual)
        TS_TRY(ts_cuda_check_activation(args->residual, "rms_norm: residual"));
    if (args->x.rows == 0)
        goto done;
    if (args->h.dtype == TS_F32)
        TS_CUDA_TRY((wide_residual ? launch<float, float>(args, cuda) : launch<ts::bf16, float>(args, cuda)));
    else
        TS_CUDA_TRY((wide_residual ? launch<float, ts::bf16>(args, cuda) : launch<ts::bf16, ts::bf16>(args, cuda)));
done:
    return status;
}
