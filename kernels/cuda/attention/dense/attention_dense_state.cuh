// The state of a run, (S, z), in registers, and where it comes from and goes to.
#ifndef TS_CUDA_ATTENTION_DENSE_STATE_CUH
#define TS_CUDA_ATTENTION_DENSE_STATE_CUH

#include "kernels/cuda/attention/dense/attention_dense_gates.cuh"
#include "kernels/cuda/attention/dense/attention_dense_runs.cuh"

namespace ts {

template <int D> struct DenseShape {
    static constexpr int panels = D / kPanelCols; // of a row of q, k or v; also warpgroups, and m64 blocks of the state
    static constexpr int threads = 128 * panels;
    static constexpr int blocks_per_multiprocessor = D == 64 ? 3 : 1;
    static constexpr int segment = D == 64 ? 1024 : 4096; // tokens whose gates are in shared memory at a time
    static constexpr int panel_bytes = kChunk * kPanelRowBytes;
};

template <int D> struct DenseShared {
    unsigned char q[2][DenseShape<D>::panels * DenseShape<D>::panel_bytes];
    unsigned char k[2][DenseShape<D>::panels * DenseShape<D>::panel_bytes];
    unsigned char v[2][DenseShape<D>::panels * DenseShape<D>::panel_bytes];
    unsigned char state[DenseShape<D>::panels * D * kPanelRowBytes]; // panel p: columns 64 p ..., row = feature
    float log_decay[DenseShape<D>::segment]; // c of eq. (5) from the chunk's start, in powers of 2
    __nv_bfloat16 key_gate[DenseShape<D>::segment];
    __nv_bfloat16 to_end[DenseShape<D>::segment]; // e^{c_last - c_m}, in a state item times the key gate
    __nv_bfloat16 mass[D];
};

// The running state in registers: the warpgroup's 64 features, 16 of each warp, x all columns of v, in blocks of 64.
template <int D> struct RunningState {
    Accumulator s[DenseShape<D>::panels];
    float z[4]; // [0]: feature lane / 4, [2]: 8 further; every column the same
};

// The first feature of this lane.
__device__ __forceinline__ int first_feature() {
    return (int)threadIdx.x / 32 * 16 + (int)(threadIdx.x & 31) / 4;
}

template <int D> __device__ __forceinline__ void state_clear(RunningState<D> &r) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.z[i] = 0.0f;
#pragma unroll
        for (int b = 0; b < DenseShape<D>::panels; b++)
#pragma unroll
            for (int j = 0; j < 8; j++)
                r.s[b][j][i] = 0.0f;
    }
}

template <int D> __device__ __forceinline__ void state_scale(RunningState<D> &r, float by) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.z[i] *= by;
#pragma unroll
        for (int b = 0; b < DenseShape<D>::panels; b++)
#pragma unroll
            for (int j = 0; j < 8; j++)
                r.s[b][j][i] *= by;
    }
}

template <int D> __device__ __forceinline__ void state_load(RunningState<D> &r, const float *slot) {
    const float4 *from = reinterpret_cast<const float4 *>(slot) + threadIdx.x;
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float4 x = __ldcg(from + (b * 8 + j) * DenseShape<D>::threads);
            r.s[b][j][0] = x.x, r.s[b][j][1] = x.y, r.s[b][j][2] = x.z, r.s[b][j][3] = x.w;
        }
    }
    const float *z = slot + D * D + first_feature();
    r.z[0] = r.z[1] = __ldcg(z);
    r.z[2] = r.z[3] = __ldcg(z + 8);
}

template <int D> __device__ __forceinline__ void state_store(const RunningState<D> &r, float *slot) {
    float4 *to = reinterpret_cast<float4 *>(slot) + threadIdx.x;
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            __stcg(to + (b * 8 + j) * DenseShape<D>::threads,
                   make_float4(r.s[b][j][0], r.s[b][j][1], r.s[b][j][2], r.s[b][j][3]));
    }
    if (threadIdx.x % 4 == 0) {
        float *z = slot + D * D + first_feature();
        __stcg(z, r.z[0]);
        __stcg(z + 8, r.z[2]);
    }
}

// The state that the span begins with: the cache's, with the open tokens folded in. Returns the log of their
// decay, in powers of 2.
template <int D>
__device__ __forceinline__ double state_begin(const DenseArgs &a, const Run &run, int64_t at, RunningState<D> &r) {
    const int n_open = (int)run.span.position;
    const __nv_bfloat16 *open_k = a.open_k + at * kOpenRows * D, *open_v = a.open_v + at * kOpenRows * D;
    const float *open_gate = a.open_gate + at * kOpenRows;
    const double *open_c = a.open_c + at * kOpenRows;
    const double c_last = n_open > 0 ? open_c[n_open - 1] : 0.0;
    const float carried = (float)exp(c_last);
    const int row = first_feature(), first_column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int64_t from = (at * D + row) * D + first_column + 64 * b + 8 * j;
            const float2 x = load_split2(a.state, a.state_rest, from),
                         further = load_split2(a.state, a.state_rest, from + 8 * D);
            r.s[b][j][0] = carried * x.x, r.s[b][j][1] = carried * x.y;
            r.s[b][j][2] = carried * further.x, r.s[b][j][3] = carried * further.y;
        }
    }
    r.z[0] = r.z[1] = carried * a.mass[at * D + row];
    r.z[2] = r.z[3] = carried * a.mass[at * D + row + 8];
#pragma unroll 1
    for (int m = 0; m < n_open; m++) {
        const float weight = (float)exp(c_last - open_c[m]);
        const float k0 = weight * open_feature(open_k[m * D + row], open_gate[m]);
        const float k1 = weight * open_feature(open_k[m * D + row + 8], open_gate[m]);
        r.z[0] += k0, r.z[1] += k0, r.z[2] += k1, r.z[3] += k1;
#pragma unroll
        for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 v = __bfloat1622float2(
                    *reinterpret_cast<const __nv_bfloat162 *>(open_v + m * D + first_column + 64 * b + 8 * j));
                r.s[b][j][0] += k0 * v.x, r.s[b][j][1] += k0 * v.y;
                r.s[b][j][2] += k1 * v.x, r.s[b][j][3] += k1 * v.y;
            }
        }
    }
    return c_last * 1.4426950408889634;
}

// What a run adds comes after the state: r becomes decay * r + the slot. Returns the log of the decay.
template <int D> __device__ __forceinline__ double state_append(RunningState<D> &r, const float *slot) {
    const double log_decay = __ldcg(reinterpret_cast<const double *>(slot + D * D + D));
    RunningState<D> added;
    state_load<D>(added, slot);
    state_scale<D>(r, exp2_fast((float)log_decay));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.z[i] += added.z[i];
#pragma unroll
        for (int b = 0; b < DenseShape<D>::panels; b++)
#pragma unroll
            for (int j = 0; j < 8; j++)
                r.s[b][j][i] += added.s[b][j][i];
    }
    return log_decay;
}

// The state at the span's last whole chunk goes to the cache; end_spans folds what follows.
template <int D>
__device__ __forceinline__ void state_end(const DenseArgs &a, int64_t at, const RunningState<D> &r, double log_sum) {
    const int row = first_feature();
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
        const int64_t to = (at * D + row) * D + b * 64 + 2 * (threadIdx.x % 4);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            store_split2(a.state, a.state_rest, to + 8 * j, r.s[b][j][0], r.s[b][j][1]);
            store_split2(a.state, a.state_rest, to + 8 * D + 8 * j, r.s[b][j][2], r.s[b][j][3]);
        }
    }
    if (threadIdx.x % 4 == 0) {
        a.mass[at * D + row] = r.z[0];
        a.mass[at * D + row + 8] = r.z[2];
    }
    if (threadIdx.x == 0)
        a.decay_end[at] += log_sum;
}

// Ŝ and ẑ in bf16, for the products of eq. (9).
template <int D> __device__ __forceinline__ void state_publish(const RunningState<D> &r, DenseShared<D> &shared) {
    const uint32_t panel = shared_address(shared.state);
    const int row = first_feature();
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++)
        store_accumulator(panel + b * D * kPanelRowBytes, (int)threadIdx.x / 32 * 16, r.s[b], 1.0f, 1.0f);
    if (threadIdx.x % 4 == 0) {
        shared.mass[row] = __float2bfloat16(r.z[0]);
        shared.mass[row + 8] = __float2bfloat16(r.z[2]);
    }
}

} // namespace ts
#endif
