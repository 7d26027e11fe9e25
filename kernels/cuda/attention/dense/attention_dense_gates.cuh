// What the bf16 kernels of the dense form share: arguments, gates, and what the tokens of a chunk give each other.
#ifndef TS_CUDA_ATTENTION_DENSE_GATES_CUH
#define TS_CUDA_ATTENTION_DENSE_GATES_CUH

#include "kernels/cuda/primitives/matrix.cuh"
#include "kernels/cuda/primitives/split_float.cuh"
#include "kernels/ops.h"

namespace ts {

// k^ of a key of the open tile.
__device__ __forceinline__ float open_feature(__nv_bfloat16 k, float gate) {
    const float x = __bfloat162float(k);
    return gate * (x > 0.0f ? x + 1.0f : expf(x));
}

// Tokens are counted from the sequence's first open token, so that chunks need not begin where tiles do.
constexpr int kOpenRows = TS_FOLD_TOKENS;

struct DenseArgs {
    const __nv_bfloat16 *qkvg;
    __nv_bfloat16 *y;
    int64_t stride, y_stride;
    const ts_span *spans;
    int n_spans, n_heads, n_kv_heads;
    float decay_scale; // log2(e) / decay_temperature
    float normalizer_eps;
    __nv_bfloat16 *open_k, *open_v; // as in ts_tile_cache_layer
    float *open_gate, *mass;
    void *state;
    int16_t *state_rest;
    double *open_c, *decay_end;
    int64_t *pairs;
    float *slots;         // of runs
    int wanted_runs;      // of a long span
    int n_items;          // in clusters: pieces
    unsigned char *carry; // in clusters: what a piece leaves to the next, for each span or, where carry_rows > 0, for
    int carry_rows;       // so many rows of the batch
};

__device__ __forceinline__ float log_sigmoid(float x) {
    return fminf(x, 0.0f) - log1pf(__expf(-fabsf(x)));
}

// Sums over a warp's 64 tokens, two a lane: up to each of the lane's own, and of all.
struct DecaySums {
    float2 to;
    float all;
};

__device__ __forceinline__ DecaySums sum_decays(const float (&decay)[2]) {
    const int lane = threadIdx.x & 31;
    float sum = decay[0] + decay[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step)
            sum += other;
    }
    const float before = __shfl_up_sync(~0u, sum, 1);
    return {make_float2((lane == 0 ? 0.0f : before) + decay[0], sum), __shfl_sync(~0u, sum, 31)};
}

// Fragments of e^{c_n - c_m} (q^_n . k^_m), m <= n, else 0: n are the warp's 16 tokens of the chunk, m all 64.
// log_decay: c of the chunk; c0 and c1 those of this lane's rows.
__device__ __forceinline__ void decay_weights(uint32_t (&f)[4][4], Accumulator &weights, const float *log_decay,
                                              float c0, float c1) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, n0 = 16 * warp + lane / 4;
#pragma unroll
    for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int m = 16 * t + 8 * h + 2 * (lane % 4);
            float *x = weights[2 * t + h];
            if (t <= warp) {
                const float2 c = *reinterpret_cast<const float2 *>(log_decay + m);
                x[0] *= exp2_fast(c0 - c.x);
                x[1] *= exp2_fast(c0 - c.y);
                x[2] *= exp2_fast(c1 - c.x);
                x[3] *= exp2_fast(c1 - c.y);
                if (t == warp) {
                    x[0] = m <= n0 ? x[0] : 0.0f;
                    x[1] = m + 1 <= n0 ? x[1] : 0.0f;
                    x[2] = m <= n0 + 8 ? x[2] : 0.0f;
                    x[3] = m + 1 <= n0 + 8 ? x[3] : 0.0f;
                }
                f[t][2 * h] = pack_bf16(x[0], x[1]);
                f[t][2 * h + 1] = pack_bf16(x[2], x[3]);
            } else {
                f[t][2 * h] = f[t][2 * h + 1] = 0;
            }
        }
    }
}

// Fragments of the weights of 64 keys, which have their decay: those later than the warp's 16 queries become 0. Queries
// are the keys' rows 16 warp ..., all later where warp is 4, all earlier where it is -1.
__device__ __forceinline__ void mask_weights(uint32_t (*f)[4], const Accumulator &weights, int lane, int warp) {
    const int row = lane / 4, column = 2 * (lane % 4);
    const uint32_t diagonal = (column <= row ? 0xffffu : 0) | (column < row ? 0xffff0000u : 0);
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const uint32_t whole = t <= warp ? ~0u : 0, before = t < warp ? ~0u : 0, own = before | (diagonal & whole);
        const float(*x)[4] = &weights[2 * t];
        f[t][0] = pack_bf16(x[0][0], x[0][1]) & own;
        f[t][1] = pack_bf16(x[0][2], x[0][3]) & whole;
        f[t][2] = pack_bf16(x[1][0], x[1][1]) & before;
        f[t][3] = pack_bf16(x[1][2], x[1][3]) & own;
    }
}

} // namespace ts
#endif
