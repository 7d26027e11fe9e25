// The open tokens of the dense form folded into the state: with c counted from where S^ and z^ stand,
//     S^ <- e^{c_last} S^ + sum_m e^{c_last - c_m} k^_m v_m,    z^ <- e^{c_last} z^ + sum_m e^{c_last - c_m} k^_m.
// All of it in f32, in one fixed order.
#ifndef TS_CUDA_OPEN_FOLD_CUH
#define TS_CUDA_OPEN_FOLD_CUH

#include "kernels/cuda/primitives/activation.cuh"
#include "kernels/cuda/primitives/split_float.cuh"

namespace ts {

// How kThreads threads share rows of D elements of A: a row lies across kLanes neighbouring threads, 16 bytes each, and
// a thread has every kParts-th row.
template <typename A, int D, int kThreads_> struct row_shares {
    static constexpr int kThreads = kThreads_;
    static constexpr int kVector = 16 / (int)sizeof(A);
    static constexpr int kLanes = D / kVector, kParts = kThreads / kLanes;
    static constexpr int kStateRows = D / kParts; // of a thread
    static __device__ __forceinline__ int first() {
        return threadIdx.x / kLanes;
    }
    static __device__ __forceinline__ int column() {
        return threadIdx.x % kLanes * kVector;
    }
};

__device__ __forceinline__ void unpack(const uint4 &raw, float (&x)[4]) {
    x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}

// Folds n tokens into S^ of (sequence, KV head) `head`, whose row first() + i kParts this thread has in old(i) as it is
// in memory. In shared memory, for all threads to see: keys [n, D], e^{c_last - c_m} k^_m, and values [n, D].
template <typename Shares, typename A, int D, typename Old>
__device__ __forceinline__ void fold_state(A *state, int16_t *state_rest, int64_t head, float carried, int n,
                                           const float *keys, const A *values, Old old) {
    constexpr int kVector = Shares::kVector, kParts = Shares::kParts;
    constexpr int kTogether = Shares::kStateRows < 4 ? Shares::kStateRows : 4;
    const int first = Shares::first(), column = Shares::column();
#pragma unroll
    for (int i0 = 0; i0 < Shares::kStateRows; i0 += kTogether) {
        const int64_t at = (head * D + first + i0 * kParts) * D + column;
        float sums[kTogether][kVector];
        uint4 rest[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; i++)
            if constexpr (sizeof(A) == 2)
                rest[i] = __ldcg((const uint4 *)(state_rest + at + i * kParts * D));
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            if constexpr (sizeof(A) == 2)
                join8(old(i0 + i), rest[i], sums[i]);
            else
                unpack(old(i0 + i), sums[i]);
#pragma unroll
            for (int e = 0; e < kVector; e++)
                sums[i][e] *= carried;
        }
#pragma unroll 4
        for (int m = 0; m < n; m++) {
            float value[kVector];
            unpack(*(const uint4 *)(values + m * D + column), value);
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                const float key = keys[m * D + first + (i0 + i) * kParts];
#pragma unroll
                for (int e = 0; e < kVector; e++)
                    sums[i][e] += key * value[e];
            }
        }
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            if constexpr (sizeof(A) == 2)
                store_split8(state, state_rest, at + i * kParts * D, sums[i]);
            else
                *(float4 *)(state + at + i * kParts * D) = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
        }
    }
}

// z^ of feature threadIdx.x < D.
template <int D> __device__ __forceinline__ float fold_mass(float mass, float carried, int n, const float *keys) {
    float sum = carried * mass;
    for (int m = 0; m < n; m++)
        sum += keys[m * D + threadIdx.x];
    return sum;
}

} // namespace ts
#endif
