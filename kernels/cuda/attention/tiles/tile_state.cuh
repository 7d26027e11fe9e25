// Eq. (7) for one tile by one block: its state, and its mass.
#ifndef TS_CUDA_TILE_STATE_CUH
#define TS_CUDA_TILE_STATE_CUH

#include "kernels/cuda/attention/attention.cuh"
#include "kernels/cuda/primitives/warp_matrix.cuh"

namespace ts {

constexpr int kThreads = 256;
constexpr int kChunk = 64; // keys staged in shared memory at a time

// Bytes of shared memory that a tile is staged in.
template <typename A, int D>
constexpr int kStateStage = (std::is_same<A, float>::value ? 4 * D : 2 * (D + 8)) * 2 * kChunk;

// Keys m0 .. m0 + kChunk - 1, decayed to the tile's end, and their values: [kChunk, L] each. Adds the keys that this
// thread stages to *mass: columns 4 (threadIdx.x % (D / 4)) + {0 .. 3} of every kBlock / (D / 4)-th.
template <typename A, int D, int L, int kBlock>
__device__ __forceinline__ void stage_chunk(const tile_keys<A, D> &tile, const float *reach_of, int m0, A *keys,
                                            A *values, float4 *mass) {
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < kChunk * D / 4; i += kBlock) {
        const int m = i / (D / 4), e = i % (D / 4) * 4;
        const float reach = reach_of[m0 + m];
        float4 k = tile.key(m0 + m, e);
        k.x *= reach, k.y *= reach, k.z *= reach, k.w *= reach;
        mass->x += k.x, mass->y += k.y, mass->z += k.z, mass->w += k.w;
        store4(keys + m * L + e, k);
        store4(values + m * L + e, tile.value(m0 + m, e));
    }
    __syncthreads();
}

// begin + the sum over keys of reach k^ v^T, in F32 by kThreads threads. begin(row, column) gives a float2, two
// neighbours of the matrix to begin with; emit(row, column, x, y) takes the same two of the result.
template <int D, typename Begin, typename Emit>
__device__ void plain_state(const tile_keys<float, D> &tile, int T, const float *reach_of, float *keys, float4 *mass,
                            Begin begin, Emit emit) {
    float *values = keys + kChunk * D;
    const int tid = threadIdx.x;
    constexpr int R = D / 64; // a thread's 4 x 4 blocks lie 64 rows and columns apart
    const int ty = tid / 16 * 4, tx = tid % 16 * 4;
    float acc[R][R][4][4];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int q = 0; q < R; q++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    const float2 x = begin(r * 64 + ty + i, q * 64 + tx + e);
                    acc[r][q][i][e] = x.x, acc[r][q][i][e + 1] = x.y;
                }
    for (int m0 = 0; m0 < T; m0 += kChunk) {
        stage_chunk<float, D, D, kThreads>(tile, reach_of, m0, keys, values, mass);
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
            for (int i = 0; i < 4; i++) {
                emit(r * 64 + ty + i, q * 64 + tx, acc[r][q][i][0], acc[r][q][i][1]);
                emit(r * 64 + ty + i, q * 64 + tx + 2, acc[r][q][i][2], acc[r][q][i][3]);
            }
}

// The same of BF16 through the matrix units, by kBlock threads: a warp computes 16 rows of S and D / kSplit of its
// columns.
template <int D, int kBlock, typename Begin, typename Emit>
__device__ void matrix_state(const tile_keys<bf16, D> &tile, int T, const float *reach_of, bf16 *keys, float4 *mass,
                             Begin begin, Emit emit) {
    constexpr int L = D + 8, kSplit = kBlock / 32 / (D / 16), kColumns = D / kSplit;
    static_assert(kSplit > 0, "a warp for every 16 rows");
    bf16 *values = keys + kChunk * L;
    const int tid = threadIdx.x, lane = tid % 32, row = tid / 32 % (D / 16) * 16,
              column = tid / 32 / (D / 16) * kColumns;
    float acc[kColumns / 8][4];
#pragma unroll
    for (int n = 0; n < kColumns / 8; n++) {
        const float2 x = begin(row + lane / 4, column + 8 * n + lane % 4 * 2),
                     y = begin(row + lane / 4 + 8, column + 8 * n + lane % 4 * 2);
        acc[n][0] = x.x, acc[n][1] = x.y, acc[n][2] = y.x, acc[n][3] = y.y;
    }
    for (int m0 = 0; m0 < T; m0 += kChunk) {
        stage_chunk<bf16, D, L, kBlock>(tile, reach_of, m0, keys, values, mass);
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
        emit(row + lane / 4, column + 8 * n + lane % 4 * 2, acc[n][0], acc[n][1]);
        emit(row + lane / 4 + 8, column + 8 * n + lane % 4 * 2, acc[n][2], acc[n][3]);
    }
}

// A `begin` for where there is nothing before the tile.
struct from_zero {
    __device__ __forceinline__ float2 operator()(int, int) const {
        return make_float2(0, 0);
    }
};

// Whichever of the two A asks for.
template <typename A, int D, int kBlock, typename Begin, typename Emit>
__device__ __forceinline__ void tile_state(const tile_keys<A, D> &tile, int T, const float *reach_of, void *stage,
                                           float4 *mass, Begin begin, Emit emit) {
    if constexpr (std::is_same<A, float>::value) {
        static_assert(kBlock == kThreads, "what plain_state is written for");
        plain_state<D>(tile, T, reach_of, (float *)stage, mass, begin, emit);
    } else {
        matrix_state<D, kBlock>(tile, T, reach_of, (bf16 *)stage, mass, begin, emit);
    }
}

// A state staged in shared memory, rows `pitch` apart, to the place it is kept in; FP8 in units of each row's largest
// magnitude. What a call selects from its own tiles is so what a later call reads from their slots, and the chunk size
// of a prefill does not matter (I2).
template <typename S, int D, int kBlock, typename W>
__device__ void store_state(const W *state, int pitch, void *states, float *scales, int64_t at) {
    constexpr int kTogether = D / 8; // threads of a row
#pragma unroll
    for (int i = threadIdx.x; i < D * kTogether; i += kBlock) {
        const int row = i / kTogether, column = i % kTogether * 8;
        const W *from = state + row * pitch + column;
        S *to = (S *)states + (at * D + row) * D + column;
        if constexpr (std::is_same<S, fp8>::value) {
            float x[8];
            load8(from, x);
            const fp8_row<8, kTogether> rounded(x);
            *(uint2 *)to = make_uint2(rounded.bits(x, 0), rounded.bits(x, 4));
            if (column == 0)
                scales[at * D + row] = rounded.scale;
        } else {
#pragma unroll
            for (int v = 0; v < 8 * (int)sizeof(S) / 16; v++)
                ((uint4 *)to)[v] = ((const uint4 *)from)[v];
        }
    }
}

// z of feature threadIdx.x, where that is less than D, from what the threads have staged. `shares` [kBlock] may be what
// the state was staged in.
template <int D, int kBlock> __device__ float tile_mass(float4 staged, float4 *shares) {
    __syncthreads();
    shares[threadIdx.x] = staged;
    __syncthreads();
    double mass = 0;
    if (threadIdx.x < D)
        for (int i = 0; i < kBlock / (D / 4); i++)
            mass += (double)((const float *)shares)[i * D + threadIdx.x];
    return (float)mass;
}

} // namespace ts
#endif
