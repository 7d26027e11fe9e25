// Vectors of f32 as wide as the instruction set this file is compiled for, and the functions of a float that ops need.
// Everything here is inlined into ops that are compiled once per instruction set: no symbol leaves a file.
#ifndef TS_CPU_SIMD_H
#define TS_CPU_SIMD_H

#include "kernels/base/dtype.h"

#if defined(__AVX512F__)
#    define TS_LANES 16
#elif defined(__AVX2__)
#    define TS_LANES 8
#else
#    define TS_LANES 4
#endif

// aligned(4): loads and stores through these types may be unaligned.
typedef float ts_vec __attribute__((vector_size(4 * TS_LANES), aligned(4), may_alias));
typedef uint32_t ts_vec_u32 __attribute__((vector_size(4 * TS_LANES)));
typedef uint16_t ts_vec_u16 __attribute__((vector_size(2 * TS_LANES), aligned(2), may_alias));

#define TS_INLINE static inline __attribute__((always_inline))

TS_INLINE ts_vec ts_vec_load(const float *p) {
    return *(const ts_vec *)p;
}

TS_INLINE void ts_vec_store(float *p, ts_vec v) {
    *(ts_vec *)p = v;
}

TS_INLINE ts_vec ts_vec_set(float x) {
    return x - (ts_vec){0};
}

TS_INLINE ts_vec ts_vec_load_bf16(const uint16_t *p) {
    return (ts_vec)(__builtin_convertvector(*(const ts_vec_u16 *)p, ts_vec_u32) << 16);
}

// Exact for every binary16: subnormals through the product, infinities and NaN through the second select.
TS_INLINE ts_vec ts_vec_load_f16(const uint16_t *p) {
    const ts_vec_u32 h = __builtin_convertvector(*(const ts_vec_u16 *)p, ts_vec_u32);
    const ts_vec_u32 magnitude = h & 0x7fff;
    const ts_vec finite = (ts_vec)(magnitude << 13) * 0x1p112f;
    const ts_vec_u32 is_finite = (ts_vec_u32)(magnitude < 0x7c00);
    const ts_vec_u32 bits = ((ts_vec_u32)finite & is_finite) | ((magnitude << 13 | 0x7f800000) & ~is_finite);
    return (ts_vec)(bits | (h & 0x8000) << 16);
}

// The sum of the lanes, halves onto halves.
TS_INLINE float ts_vec_sum(ts_vec v) {
#if TS_LANES == 16
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif TS_LANES == 8
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
    return v[0];
}

// e^x to about 1 ulp for x in [-87.3, 88.7]; 0 below, the largest float's neighbourhood above. Vectorises in loops.
TS_INLINE float ts_exp(float x) {
    const float clamped = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
    const float shifted = clamped * 1.44269504088896341f + 12582912.0f; // rounds to an integer in the low bits
    const float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693145751953125f;
    r -= n * 1.428606765330187e-06f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits, exponent;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    memcpy(&p, &bits, sizeof p);
    return x < -87.3f ? 0.0f : x == x ? p : x; // NaN stays NaN
}

TS_INLINE float ts_sigmoid(float x) {
    return 1.0f / (1.0f + ts_exp(-x));
}

// Eq. (1): ELU(x) + 1.
TS_INLINE float ts_elu1(float x) {
    const float e = ts_exp(x < 0.0f ? x : 0.0f);
    return x > 0.0f ? x + 1.0f : e;
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
TS_INLINE float ts_gelu_tanh(float x) {
    return x * ts_sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

#endif
