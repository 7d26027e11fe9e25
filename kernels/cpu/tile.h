// The arithmetic of one tile of one head: eq. (7) for its state, eq. (9) for its outputs.
#ifndef TS_CPU_TILE_H
#define TS_CPU_TILE_H

#include "kernels/cpu/simd.h"
#include "kernels/cpu/small_gemm.h"

enum { TS_TILE_MAX = 128, TS_HEAD_MAX = 128 };

// Keys and values of the tile that a block of queries attends to: n rows, k^ already through eqs. (1), (2), (4).
typedef struct ts_tile_keys {
    const float *k, *v;         // rows of d
    int64_t k_stride, v_stride; // elements
    const double *c;            // [n] eq. (5)
    int64_t n;
} ts_tile_keys;

// Eq. (7): state [d, d] and mass [d] of a whole tile.
static inline void ts_tile_state(const ts_tile_keys *keys, int64_t d, float *state, float *mass) {
    float decayed[TS_TILE_MAX * TS_HEAD_MAX];
    memset(mass, 0, (size_t)d * sizeof *mass);
    for (int64_t m = 0; m < keys->n; m++) {
        const float reach = ts_exp((float)(keys->c[keys->n - 1] - keys->c[m]));
        float *row = decayed + m * d;
        for (int64_t i = 0; i < d; i += TS_LANES) {
            const ts_vec k = reach * ts_vec_load(keys->k + m * keys->k_stride + i);
            ts_vec_store(row + i, k);
            ts_vec_store(mass + i, ts_vec_load(mass + i) + k);
        }
    }
    ts_small_gemm(d, d, keys->n, decayed, 1, d, keys->v, keys->v_stride, state, d, false);
}

// k^ transposed to [d, T], zero beyond the n keys, so that q^ k^T is a product of rows.
static inline void ts_tile_transpose(const ts_tile_keys *keys, int64_t d, int64_t T, float *transposed) {
    enum { BLOCK = 16 };
    for (int64_t m0 = 0; m0 < T; m0 += BLOCK)
        for (int64_t i0 = 0; i0 < d; i0 += BLOCK)
            for (int64_t i = i0; i < i0 + BLOCK; i++)
                for (int64_t m = m0; m < m0 + BLOCK; m++)
                    transposed[i * T + m] = m < keys->n ? keys->k[m * keys->k_stride + i] : 0.0f;
}

// Eq. (9) for queries first .. first + n_queries - 1 of a tile (key index = query index within the tile). q^ rows have
// q_stride, y rows y_stride. state and mass are S^ and z^ of the tile.
static inline void ts_tile_output(const float *q, int64_t q_stride, int64_t first, int64_t n_queries,
                                  const ts_tile_keys *keys, const float *transposed, const float *state,
                                  const float *mass, int64_t d, int64_t T, float eps, float *y, int64_t y_stride) {
    enum { ROWS = TS_GEMM_ROWS };
    float weights[ROWS * TS_TILE_MAX], scaled[ROWS * TS_HEAD_MAX], out[ROWS * TS_HEAD_MAX];
    for (int64_t i0 = 0; i0 < n_queries; i0 += ROWS) {
        const int n_rows = (int)(n_queries - i0 < ROWS ? n_queries - i0 : ROWS);
        const int64_t last = first + i0 + n_rows - 1; // the last key that any of these rows sees
        const int64_t n_columns = (last + TS_LANES) / TS_LANES * TS_LANES;
        float denominators[ROWS];
        // From before the tile: e^c q^ S^ and e^c q^ z^.
        for (int i = 0; i < n_rows; i++) {
            const float *row = q + (i0 + i) * q_stride;
            const float reach = ts_exp((float)keys->c[first + i0 + i]);
            ts_vec sum = {0};
            for (int64_t k = 0; k < d; k += TS_LANES) {
                const ts_vec s = reach * ts_vec_load(row + k);
                ts_vec_store(scaled + i * d + k, s);
                sum += s * ts_vec_load(mass + k);
            }
            denominators[i] = ts_vec_sum(sum);
        }
        ts_small_gemm_rows(n_rows, d, d, scaled, d, 1, state, d, out, d, false);
        // From within it: weights e^{c_n - c_m} q^ . k^_m for m <= n.
        ts_small_gemm_rows(n_rows, n_columns, d, q + i0 * q_stride, q_stride, 1, transposed, T, weights, T, false);
        for (int i = 0; i < n_rows; i++) {
            const int64_t n = first + i0 + i;
            const double c = keys->c[n];
            float *row = weights + i * T;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t m = 0; m <= n; m++) {
                row[m] *= ts_exp((float)(c - keys->c[m]));
                sum += row[m];
            }
            for (int64_t m = n + 1; m <= last; m++)
                row[m] = 0.0f;
            denominators[i] += sum;
        }
        ts_small_gemm_rows(n_rows, d, last + 1, weights, T, 1, keys->v, keys->v_stride, out, d, true);
        for (int i = 0; i < n_rows; i++) {
            const float scale = 1.0f / (denominators[i] + eps);
            for (int64_t k = 0; k < d; k += TS_LANES)
                ts_vec_store(y + (i0 + i) * y_stride + k, scale * ts_vec_load(out + i * d + k));
        }
    }
}

#endif
