// Element types of tensors and files, and checked size arithmetic.
#ifndef TS_BASE_DTYPE_H
#define TS_BASE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ts_dtype { TS_F32, TS_BF16, TS_F16, TS_F64, TS_I32, TS_I64, TS_U8, TS_FP8_E4M3, TS_N_DTYPES } ts_dtype;

size_t ts_dtype_bytes(ts_dtype dtype);

// The safetensors spelling: "F32", "BF16", "F16", "F64", "I32", "I64", "U8", "F8_E4M3".
const char *ts_dtype_name(ts_dtype dtype);

// Reads that spelling. Returns false and leaves *out alone when it is none of them.
bool ts_dtype_parse(const char *name, size_t name_length, ts_dtype *out);

// a * b and a + b; false (and *out left alone) when the result does not fit.
static inline bool ts_size_mul(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_mul_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

static inline bool ts_size_add(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_add_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

static inline float ts_bf16_to_f32(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// IEEE binary16 to binary32, subnormals, infinities and NaN included.
static inline float ts_f16_to_f32(uint16_t x) {
    const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    uint32_t bits;
    float f;
    if (magnitude >= 0x7c00u) { // infinity or NaN
        bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + 0x38000000u);
    } else { // zero or subnormal: magnitude * 2^-24 is exact in float
        f = (float)magnitude * 0x1p-24f;
        memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    memcpy(&f, &bits, sizeof f);
    return f;
}

// Rounds to nearest, ties to even.
static inline uint16_t ts_bf16_from_f32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#define TS_FP8_E4M3_MAX 448.0f

// FP8 e4m3: sign, four bits of exponent with bias 7, three of mantissa; no infinity, NaN is 0x7f.
static inline float ts_fp8_to_f32(uint8_t x) {
    const uint32_t magnitude = (uint32_t)(x & 0x7f) << 20, sign = (uint32_t)(x & 0x80) << 24;
    uint32_t bits;
    float f;
    memcpy(&f, &magnitude, sizeof f);
    f *= 0x1p120f; // subnormals included
    memcpy(&bits, &f, sizeof bits);
    bits |= (x & 0x7f) == 0x7f ? sign | 0x7fc00000u : sign;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// Rounds to nearest, ties to even; beyond the largest, the largest.
static inline uint8_t ts_fp8_from_f32(float x) {
    uint32_t bits, magnitude;
    memcpy(&bits, &x, sizeof bits);
    magnitude = bits & 0x7fffffffu;
    const uint8_t sign = (uint8_t)(bits >> 24 & 0x80u);
    if (magnitude > 0x7f800000u)
        return sign | 0x7f;
    if (magnitude < 0x3c800000u) { // below 2^-6: in units of 2^-9, which adding 1.5 * 2^14 leaves in the low bits
        float f;
        memcpy(&f, &magnitude, sizeof f);
        f += 24576.0f;
        memcpy(&magnitude, &f, sizeof magnitude);
        return sign | (uint8_t)(magnitude - 0x46c00000u);
    }
    magnitude = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    magnitude = magnitude > 960 + 0x7e ? 960 + 0x7e : magnitude; // 960: the exponents' biases differ by 120
    return sign | (uint8_t)(magnitude - 960);
}

#ifdef __cplusplus
}
#endif
#endif
