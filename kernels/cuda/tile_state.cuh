// Eq. (7) for one tile by one block: its state, and its mass.
#ifndef TS_CUDA_TILE_STATE_CUH
#define TS_CUDA_TILE_STATE_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/warp_matrix.cuh"

namespace ts {

constexpr int kThreads = 256;
constexpr int kChunk = 64; // keys staged in shared memory at a time

// Shared memory that plain_state (F32) and matrix_state (BF16) stage a tile in.
template <typename A, int D>
constexpr int kStateStage = (std::is_same<A, float>::value ? 4 * D : 2 * (D + 8)) * 2 * kChunk;

// S = sum over keys of reach k^ v^T, both staged as f32; adds the keys that this thread stages to *mass.
template <typename A, typename S, int D>
__device__ void plain_state(const tile_keys<A, D> &tile, int T, const float *reach_of, float *keys, S *state,
                            float4 *mass) {
    float *values = keys + kChunk * D; // [kChunk, D] each
    const int tid = threadIdx.x;
    constexpr int R = D / 64; // a thread's 4 x 4 blocks lie 64 rows and columns apart
    const int ty = tid / 16 * 4, tx = tid % 16 * 4;
    float acc[R][R][4][4] = {};
    for (int m0 = 0; m0 < T; m0 += kChunk) {
        __syncthreads();
        for (int i = tid; i < kChunk * D / 4; i += kThreads) {
            const int m = i / (D / 4), e = i % (D / 4) * 4;
            const float reach = reach_of[m0 + m];
            float4 k = tile.key(m0 + m, e);
            k.x *= reach, k.y *= reach, k.z *= reach, k.w *= reach;
            mass->x += k.x, mass->y += k.y, mass->z += k.z, mass->w += k.w;
            store4(keys + m * D + e, k);
            store4(values + m * D + e, tile.value(m0 + m, e));
        }
        __syncthreads();
        for (int m = 0; m < kChunk; m++) {
            float4 k[R], v[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                k[r] = load4(keys + m * D + r * 64 + ty);
                v[r] = load4(values + m * D + r * 64 + tx);
            }
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int q = 0; q < R; q++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float x = i == 0 ? k[r].x : i == 1 ? k[r].y : i == 2 ? k[r].z : k[r].w;
                        acc[r][q][i][0] += x * v[q].x;
                        acc[r][q][i][1] += x * v[q].y;
                        acc[r][q][i][2] += x * v[q].z;
                        acc[r][q][i][3] += x * v[q].w;
                    }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int q = 0; q < R; q++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                store4(state + (r * 64 + ty + i) * D + q * 64 + tx,
                       make_float4(acc[r][q][i][0], acc[r][q][i][1], acc[r][q][i][2], acc[r][q][i][3]));
}

// The same through the matrix units: a warp computes 16 rows of S and D / kSplit of its columns.
template <typename S, int D>
__device__ void matrix_state(const tile_keys<bf16, D> &tile, int T, const float *reach_of, bf16 *keys, S *state,
                             float4 *mass) {
    constexpr int L = D + 8, kSplit = kThreads / 32 / (D / 16), kColumns = D / kSplit;
    bf16 *values = keys + kChunk * L;
    const int tid = threadIdx.x, lane = tid % 32, row = tid / 32 % (D / 16) * 16,
              column = tid / 32 / (D / 16) * kColumns;
    float acc[kColumns / 8][4] = {};
    for (int m0 = 0; m0 < T; m0 += kChunk) {
        __syncthreads();
#pragma unroll 4
        for (int i = tid; i < kChunk * D / 4; i += kThreads) {
            const int m = i / (D / 4), e = i % (D / 4) * 4;
            const float reach = reach_of[m0 + m];
            float4 k = tile.key(m0 + m, e);
            k.x *= reach, k.y *= reach, k.z *= reach, k.w *= reach;
            mass->x += k.x, mass->y += k.y, mass->z += k.z, mass->w += k.w;
            store4(keys + m * L + e, k);
            store4(values + m * L + e, tile.value(m0 + m, e));
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < kChunk; m += 16) {
            uint32_t k[4];
            load_a_transposed(k, keys, L, row, m);
#pragma unroll
            for (int n = 0; n < kColumns / 16; n++) {
                uint32_t v[4];
                load_b(v, values, L, m, column + 16 * n);
                multiply_add(acc[2 * n], k, v[0], v[1]);
                multiply_add(acc[2 * n + 1], k, v[2], v[3]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; n++) {
        S *out = state + (row + lane / 4) * D + column + 8 * n + lane % 4 * 2;
        store(out, acc[n][0]);
        store(out + 1, acc[n][1]);
        store(out + 8 * D, acc[n][2]);
        store(out + 8 * D + 1, acc[n][3]);
    }
}

// z of feature threadIdx.x, where that is less than D. A thread has staged columns 4 (threadIdx.x % (D / 4)) + {0 .. 3}
// of every kThreads / (D / 4)-th key. `shares` [kThreads] may be what the state was staged in.
template <int D> __device__ float tile_mass(float4 staged, float4 *shares) {
    __syncthreads();
    shares[threadIdx.x] = staged;
    __syncthreads();
    double mass = 0;
    if (threadIdx.x < D)
        for (int i = 0; i < kThreads / (D / 4); i++)
            mass += (double)((const float *)shares)[i * D + threadIdx.x];
    return (float)mass;
}

} // namespace ts
#endif
