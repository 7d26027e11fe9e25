// How this backend stores a weight matrix [N, K]: panels of 16 rows, each panel column by column, so that 16
// neighbouring outputs stand in one vector and a product walks through memory once, in order. Element (n, k) is at
// ((n / 16) K + k) 16 + n % 16; rows beyond N are zero. Values keep the dtype of the file.
#ifndef TS_CPU_PANELS_H
#define TS_CPU_PANELS_H

#include "kernels/cpu/simd.h"

enum { TS_PANEL = 16 };

TS_INLINE int64_t ts_panel_index(int64_t n, int64_t k, int64_t K) {
    return (n / TS_PANEL * K + k) * TS_PANEL + n % TS_PANEL;
}

static inline int64_t ts_panel_count(int64_t n_rows) {
    return (n_rows + TS_PANEL - 1) / TS_PANEL;
}

// TS_LANES weights from element i on, widened to f32.
TS_INLINE ts_vec ts_weight_load(const void *weights, int64_t i, ts_dtype dtype) {
    switch (dtype) {
    case TS_BF16:
        return ts_vec_load_bf16((const uint16_t *)weights + i);
    case TS_F16:
        return ts_vec_load_f16((const uint16_t *)weights + i);
    default:
        return ts_vec_load((const float *)weights + i);
    }
}

TS_INLINE float ts_weight_at(const void *weights, int64_t i, ts_dtype dtype) {
    switch (dtype) {
    case TS_BF16:
        return ts_bf16_to_f32(((const uint16_t *)weights)[i]);
    case TS_F16:
        return ts_f16_to_f32(((const uint16_t *)weights)[i]);
    default:
        return ((const float *)weights)[i];
    }
}

#endif
