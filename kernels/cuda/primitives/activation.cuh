// Activations in BF16 or F32, read and written as f32; and the functions of a float that ops need.
#ifndef TS_CUDA_ACTIVATION_CUH
#define TS_CUDA_ACTIVATION_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace ts {

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float load(const float *p) {
    return *p;
}
__device__ __forceinline__ float load(const bf16 *p) {
    return __bfloat162float(*p);
}
__device__ __forceinline__ float load(const __half *p) {
    return __half2float(*p);
}
__device__ __forceinline__ void store(float *p, float x) {
    *p = x;
}
__device__ __forceinline__ void store(bf16 *p, float x) {
    *p = __float2bfloat16_rn(x);
}

// Four neighbours; p is aligned to four elements.
__device__ __forceinline__ float4 load4(const float *p) {
    return *reinterpret_cast<const float4 *>(p);
}
__device__ __forceinline__ float4 load4(const bf16 *p) {
    const uint2 u = *reinterpret_cast<const uint2 *>(p);
    return make_float4(__uint_as_float(u.x << 16), __uint_as_float(u.x & 0xffff0000u), __uint_as_float(u.y << 16),
                       __uint_as_float(u.y & 0xffff0000u));
}
__device__ __forceinline__ void store4(float *p, float4 x) {
    *reinterpret_cast<float4 *>(p) = x;
}
__device__ __forceinline__ void store4(bf16 *p, float4 x) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
    uint2 u;
    u.x = *reinterpret_cast<const uint32_t *>(&low);
    u.y = *reinterpret_cast<const uint32_t *>(&high);
    *reinterpret_cast<uint2 *>(p) = u;
}

__device__ __forceinline__ void unpack(const uint4 &raw, float (&x)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

// Two neighbours; p is aligned to two elements.
__device__ __forceinline__ void store2(float *p, float x, float y) {
    *reinterpret_cast<float2 *>(p) = make_float2(x, y);
}
__device__ __forceinline__ void store2(bf16 *p, float x, float y) {
    *reinterpret_cast<__nv_bfloat162 *>(p) = __floats2bfloat162_rn(x, y);
}

// Eq. (1): ELU(x) + 1.
__device__ __forceinline__ float elu1(float x) {
    return x > 0.0f ? x + 1.0f : expf(x);
}

// Eq. (2), from a logit in the activations' dtype: in f64 for F32, in f32 for BF16, whose logits have eight bits.
__device__ __forceinline__ float key_gate(const float *logit) {
    return (float)(1.0 / (1.0 + exp(-(double)*logit)));
}
__device__ __forceinline__ float key_gate(const bf16 *logit) {
    return 1.0f / (1.0f + expf(-load(logit)));
}

// Eq. (3), likewise.
__device__ __forceinline__ double log_decay(const float *logit, double temperature) {
    const double x = (double)*logit;
    return ((x < 0 ? x : 0) - log1p(exp(-fabs(x)))) / temperature;
}
__device__ __forceinline__ double log_decay(const bf16 *logit, double temperature) {
    const float x = load(logit);
    return (double)((fminf(x, 0.0f) - log1pf(expf(-fabsf(x)))) / (float)temperature);
}

// e^x for x <= 0, and 0 where it would be subnormal: what every backend calls out of reach.
__device__ __forceinline__ float reach_of(double x) {
    return x < -87.3 ? 0.0f : expf((float)x);
}

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float gelu_tanh(float x) {
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

template <typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// The sum over a block in one fixed order, given to every thread. `parts` holds one value a warp.
template <typename T> __device__ __forceinline__ T block_sum(T x, T *parts) {
    x = warp_sum(x);
    __syncthreads(); // parts may still be read from the last sum
    if (threadIdx.x % 32 == 0)
        parts[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
    for (unsigned i = 0; i < blockDim.x / 32; i++)
        sum += parts[i];
    return sum;
}

} // namespace ts
#endif
