// C (+)= A B for the matrices of one tile (64 or 128 on a side): everything is in L1 or L2, so no packing; B's rows and
// C's rows are contiguous, A is read one element at a time and broadcast, through any two strides (so A may be
// transposed).
#ifndef TS_CPU_SMALL_GEMM_H
#define TS_CPU_SMALL_GEMM_H

#include "kernels/cpu/simd.h"

enum { TS_GEMM_ROWS = 6, TS_GEMM_VECS = TS_LANES == 16 ? 4 : 2 };

// One block of C, n_rows by n_vecs vectors. Both are constants at every call.
TS_INLINE void ts_small_gemm_block(int n_rows, int n_vecs, int64_t K, const float *a, int64_t a_row, int64_t a_col,
                                   const float *b, int64_t b_row, float *c, int64_t c_row, bool accumulate) {
    ts_vec acc[TS_GEMM_ROWS][TS_GEMM_VECS];
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < n_vecs; j++)
            acc[i][j] = accumulate ? ts_vec_load(c + i * c_row + j * TS_LANES) : (ts_vec){0};
    for (int64_t k = 0; k < K; k++) {
        ts_vec bs[TS_GEMM_VECS];
#pragma GCC unroll 4
        for (int j = 0; j < n_vecs; j++)
            bs[j] = ts_vec_load(b + k * b_row + j * TS_LANES);
#pragma GCC unroll 6
        for (int i = 0; i < n_rows; i++) {
            const float as = a[i * a_row + k * a_col];
#pragma GCC unroll 4
            for (int j = 0; j < n_vecs; j++)
                acc[i][j] += as * bs[j];
        }
    }
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < n_vecs; j++)
            ts_vec_store(c + i * c_row + j * TS_LANES, acc[i][j]);
}

// Rows [0, n_rows) of C, n_rows <= TS_GEMM_ROWS, over all of its N columns; N is a multiple of TS_LANES.
TS_INLINE void ts_small_gemm_rows(int n_rows, int64_t N, int64_t K, const float *a, int64_t a_row, int64_t a_col,
                                  const float *b, int64_t b_row, float *c, int64_t c_row, bool accumulate) {
#define TS_GEMM_CASE(R, V)                                                                                             \
case R:                                                                                                                \
    ts_small_gemm_block(R, V, K, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate);                             \
    break
#define TS_GEMM_ROW_CASES(V)                                                                                           \
    switch (n_rows) {                                                                                                  \
        TS_GEMM_CASE(1, V);                                                                                            \
        TS_GEMM_CASE(2, V);                                                                                            \
        TS_GEMM_CASE(3, V);                                                                                            \
        TS_GEMM_CASE(4, V);                                                                                            \
        TS_GEMM_CASE(5, V);                                                                                            \
        TS_GEMM_CASE(6, V);                                                                                            \
    }
    int64_t j = 0;
    for (; j + TS_GEMM_VECS * TS_LANES <= N; j += TS_GEMM_VECS * TS_LANES)
        TS_GEMM_ROW_CASES(TS_GEMM_VECS)
    for (; j < N; j += TS_LANES)
        TS_GEMM_ROW_CASES(1)
#undef TS_GEMM_ROW_CASES
#undef TS_GEMM_CASE
}

static inline void ts_small_gemm(int64_t M, int64_t N, int64_t K, const float *a, int64_t a_row, int64_t a_col,
                                 const float *b, int64_t b_row, float *c, int64_t c_row, bool accumulate) {
    for (int64_t i = 0; i < M; i += TS_GEMM_ROWS)
        ts_small_gemm_rows((int)(M - i < TS_GEMM_ROWS ? M - i : TS_GEMM_ROWS), N, K, a + i * a_row, a_row, a_col, b,
                           b_row, c + i * c_row, c_row, accumulate);
}

#endif
