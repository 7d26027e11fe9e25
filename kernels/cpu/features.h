// Eqs. (1) to (5): from the projections of a token to q^, k^ and decay.
#ifndef TS_CPU_FEATURES_H
#define TS_CPU_FEATURES_H

#include "kernels/cpu/simd.h"
#include "kernels/ops.h"

#include <math.h>

// Where the parts of a qkvg row begin, in elements.
typedef struct ts_qkvg_layout {
    int64_t k, v, key_gate, decay_gate; // q begins at 0
} ts_qkvg_layout;

TS_INLINE ts_qkvg_layout ts_qkvg_layout_of(int64_t n_heads, int64_t n_kv_heads, int64_t d) {
    return (ts_qkvg_layout){
        .k = n_heads * d,
        .v = (n_heads + n_kv_heads) * d,
        .key_gate = (n_heads + 2 * n_kv_heads) * d,
        .decay_gate = (n_heads + 2 * n_kv_heads) * d + n_kv_heads,
    };
}

// Eq. (2), in double: one value per token and head, and everything else is scaled by it.
TS_INLINE float ts_key_gate(float logit) {
    return (float)(1.0 / (1.0 + exp(-(double)logit)));
}

// Eq. (3).
TS_INLINE double ts_log_decay(float logit, double temperature) {
    const double x = (double)logit;
    return ((x < 0 ? x : 0) - log1p(exp(-fabs(x)))) / temperature;
}

// out = scale * (ELU(in) + 1) over n elements; in may be out.
TS_INLINE void ts_feature_row(float *out, const float *in, float scale, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        out[i] = scale * ts_elu1(in[i]);
}

#endif
