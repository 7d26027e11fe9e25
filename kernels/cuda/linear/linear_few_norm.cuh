// RMSNorms between products of few rows (ts_fused_norm): what the product in front does with its sums, and where the
// product behind takes the scales of its rows from.
//
// A block has a tile of the stream, [tokens, columns], in shared memory while it multiplies; below it the norm's weights.
// Squares are added over 16 columns at a time, whatever a block has, and those sums over all columns in one order.
#ifndef TS_CUDA_LINEAR_FEW_NORM_CUH
#define TS_CUDA_LINEAR_FEW_NORM_CUH

#include "kernels/cuda/primitives/cluster.cuh"
#include "kernels/cuda/primitives/matrix.cuh"
#include "kernels/ops.h"

namespace ts {

// ts_fused_norm. sums NULL: there is none.
struct FewNorm {
    float *stream;
    int64_t stream_stride;
    const float *weight;
    float *sums;
    int64_t sums_stride;
    int n_sums; // of a token: a multiple of 4
    float columns, eps;
};

// Of a row of the tile in shared memory, in floats: neighbouring tokens do not meet in a bank.
__host__ __device__ constexpr int few_stream_pitch(int columns) {
    return columns + 4;
}

__host__ __device__ constexpr int few_stream_bytes(int tokens, int columns) {
    return (tokens + 1) * few_stream_pitch(columns) * (int)sizeof(float);
}

struct FewStream {
    const FewNorm &norm;
    float *tile;               // [n_tokens + 1, few_stream_pitch(n_columns)]
    int n_tokens, n_columns;   // of the tile
    int first_token, n_valid;  // of those that are there
    int first_column, n_norm;  // and of all of the norm, a multiple of 16

    __device__ __forceinline__ bool has(int token, int column) const {
        return token < n_valid && first_column + column < n_norm;
    }
    __device__ __forceinline__ float *at(int token, int column) const {
        return norm.stream + (first_token + token) * norm.stream_stride + first_column + column;
    }

    // Asks for the tile, with n_threads threads; zeros where nothing is.
    __device__ __forceinline__ void ask(int thread, int n_threads) const {
        const int units = n_columns / 4, pitch = few_stream_pitch(n_columns);
        for (int i = thread; i < (n_tokens + 1) * units; i += n_threads) {
            const int token = i / units, column = i % units * 4;
            const bool is_weight = token == n_tokens, valid = is_weight ? has(0, column) : has(token, column);
            const float *from = !valid      ? norm.weight
                                : is_weight ? norm.weight + first_column + column
                                            : at(token, column);
            copy_async(shared_address(tile + token * pitch + column), from, valid);
        }
        copy_commit();
    }

    // c, of tokens t and t + 1 and columns r and r + 8 as a lane of a warp has them of 8 tokens from `token` on and 16
    // columns from `column` on, is added to the stream and becomes h.
    __device__ __forceinline__ void finish(float4 &c, int token, int column) const {
        const int lane = lane_id(), pitch = few_stream_pitch(n_columns), t = token + lane % 4 * 2;
        float *x = tile + t * pitch + column + lane / 4;
        const float *weight = tile + n_tokens * pitch + column + lane / 4;
        c.x += x[0], c.z += x[8], c.y += x[pitch], c.w += x[pitch + 8];
        x[0] = c.x, x[8] = c.z, x[pitch] = c.y, x[pitch + 8] = c.w;
        // The compiler is not to choose which product is rounded: it could choose otherwise for other tiles.
        float even = __fmaf_rn(c.x, c.x, __fmul_rn(c.z, c.z)), odd = __fmaf_rn(c.y, c.y, __fmul_rn(c.w, c.w));
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            even += __shfl_xor_sync(~0u, even, step);
            odd += __shfl_xor_sync(~0u, odd, step);
        }
        float *sums = norm.sums + (first_token + t) * norm.sums_stride + (first_column + column) / TS_NORM_COLUMNS;
        if (lane < 4 && has(t, column))
            sums[0] = even;
        if (lane < 4 && has(t + 1, column))
            sums[norm.sums_stride] = odd;
        c.x *= weight[0], c.y *= weight[0], c.z *= weight[8], c.w *= weight[8];
    }

    // Once all of the tile is finished.
    __device__ __forceinline__ void leave(int thread, int n_threads) const {
        const int units = n_columns / 4, pitch = few_stream_pitch(n_columns);
        for (int i = thread; i < n_tokens * units; i += n_threads) {
            const int token = i / units, column = i % units * 4;
            if (has(token, column))
                *(float4 *)at(token, column) = *(const float4 *)(tile + token * pitch + column);
        }
    }
};

// Scales of the rows of kTokens tokens from `first` on, of which n_valid are there, by kWarps warps. Half a warp adds up
// a token's sums.
template <int kTokens, int kWarps>
__device__ __forceinline__ void few_scales(const FewNorm &norm, int warp, int first, int n_valid, float *to) {
    constexpr int kOf = kTokens / (2 * kWarps); // tokens of half a warp
    const int lane = lane_id(), token = (2 * warp + lane / 16) * kOf;
    float sum[kOf] = {};
#pragma unroll 1
    for (int k = lane % 16 * 4; k < norm.n_sums; k += 64) {
        float4 x[kOf];
#pragma unroll
        for (int i = 0; i < kOf; i++) {
            x[i] = make_float4(0, 0, 0, 0);
            if (token + i < n_valid)
                x[i] = *(const float4 *)(norm.sums + (first + token + i) * norm.sums_stride + k);
        }
#pragma unroll
        for (int i = 0; i < kOf; i++)
            sum[i] += x[i].x + x[i].y + (x[i].z + x[i].w);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOf; i++) {
#pragma unroll
        for (int step = 8; step > 0; step /= 2)
            sum[i] += __shfl_xor_sync(~0u, sum[i], step);
        if (lane % 16 == 0)
            to[token + i] = rsqrtf(sum[i] / norm.columns + norm.eps);
    }
}

} // namespace ts
#endif
