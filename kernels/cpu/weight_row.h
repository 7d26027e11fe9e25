// Rows of a weight matrix in the dtype of its file, widened to f32 as they are read.
#ifndef TS_CPU_WEIGHT_ROW_H
#define TS_CPU_WEIGHT_ROW_H

#include "kernels/cpu/simd.h"

TS_INLINE ts_vec ts_weight_load(const void *row, int64_t i, ts_dtype dtype) {
    switch (dtype) {
    case TS_BF16:
        return ts_vec_load_bf16((const uint16_t *)row + i);
    case TS_F16:
        return ts_vec_load_f16((const uint16_t *)row + i);
    default:
        return ts_vec_load((const float *)row + i);
    }
}

TS_INLINE float ts_weight_at(const void *row, int64_t i, ts_dtype dtype) {
    switch (dtype) {
    case TS_BF16:
        return ts_bf16_to_f32(((const uint16_t *)row)[i]);
    case TS_F16:
        return ts_f16_to_f32(((const uint16_t *)row)[i]);
    default:
        return ((const float *)row)[i];
    }
}

TS_INLINE void ts_weight_row_widen(float *out, const void *row, int64_t n, ts_dtype dtype) {
    int64_t i = 0;
    for (; i + TS_LANES <= n; i += TS_LANES)
        ts_vec_store(out + i, ts_weight_load(row, i, dtype));
    for (; i < n; i++)
        out[i] = ts_weight_at(row, i, dtype);
}

#endif
