// Eq. (8) for the events of one wave of groups, by the lists of tile_choose.cu; where attention_groups.cu does not do
// that along with the outputs.
//
// S^ of a group's events is a weighted sum over the list, each state read once for all of them. Bound by reading states
// from L2. BF16 states under BF16 activations go through the matrix units, events by tiles by elements, with weights
// rounded to BF16; else it is f32 arithmetic.
//
// In dense form eq. (8) is a recurrence over the events of a span, one thread for four elements of the state.
#include "kernels/cuda/attention/attention.cuh"
#include "kernels/cuda/primitives/warp_matrix.cuh"

#include <type_traits>

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGroup = TS_CUDA_GROUP;
constexpr int kHalf = kGroup / 2; // events of a thread of sum_kernel

// Eight elements of a state from `index` on, to shared memory as BF16: on their way, or there, when it returns.
template <typename S, int D>
__device__ __forceinline__ void fetch8(ts::bf16 *to, const void *states, const float *scales, int64_t at, int index) {
    if constexpr (std::is_same<S, ts::fp8>::value) {
        float x[8];
        ts::unpack(__ldg((const uint2 *)((const ts::fp8 *)states + at * D * D + index)),
                   __ldg(scales + at * D + index / D), x);
        ts::store_packed(to, x);
    } else {
        ts::copy_async(to, (const S *)states + at * D * D + index);
    }
}

template <typename A, typename S, int D>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    constexpr int kChunk = 64; // list entries staged at a time
    __shared__ float weights[kChunk][kHalf];
    __shared__ int64_t places[kChunk];
    const int tid = threadIdx.x, j = blockIdx.z, n_kv = a.cache.n_kv_heads, g0 = blockIdx.x % 2 * kHalf;
    const int64_t in_wave = a.n_wave_groups - 1 - blockIdx.y;
    const ts_cuda_list head = a.lists[in_wave * n_kv + j];
    if (g0 >= head.n_events)
        return;
    const int64_t list = (in_wave * n_kv + j) * a.list_stride;
    const int n = head.length;
    const int column = 4 * ((int)blockIdx.x / 2 * kThreads + tid);
    const bool sums_mass = blockIdx.x / 2 == 0 && tid < D;
    float acc[kHalf][4] = {}, mass[kHalf] = {};
    for (int first = 0; first < n; first += kChunk) {
        const int n_here = min(kChunk, n - first);
        __syncthreads();
        for (int i = tid; i < n_here * kHalf / 4; i += kThreads) {
            const int k = i / (kHalf / 4), g = i % (kHalf / 4) * 4;
            ts::store4(&weights[k][g], ts::load4(a.list_weights + (list + first + k) * kGroup + g0 + g));
        }
        if (tid < n_here)
            places[tid] = a.list_at[list + first + tid];
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < n_here; k++) {
            const int64_t at = places[k];
            const float4 x = at >= 0 ? ts::state4<S, D>(a.cache.slot_state, a.cache.slot_scale, at, column)
                                     : ts::state4<S, D>(a.tile_states, a.tile_scales, ~at, column);
#pragma unroll
            for (int g = 0; g < kHalf; g++) {
                const float w = weights[k][g];
                acc[g][0] += w * x.x, acc[g][1] += w * x.y, acc[g][2] += w * x.z, acc[g][3] += w * x.w;
            }
            if (sums_mass) {
                const float z = at >= 0 ? a.cache.slot_mass[at * D + tid] : a.tile_masses[~at * D + tid];
#pragma unroll
                for (int g = 0; g < kHalf; g++)
                    mass[g] += weights[k][g] * z;
            }
        }
    }
#pragma unroll
    for (int g = 0; g < kHalf; g++) {
        if (g0 + g >= head.n_events)
            continue;
        const int64_t out = (head.first_closed + g0 + g) * n_kv + j;
        ts::store4((A *)a.next_states + out * D * D + column, make_float4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]));
        if (sums_mass)
            a.next_masses[out * D + tid] = mass[g];
    }
}

constexpr int kTiles = 16;   // states multiplied at a time
constexpr int kWide = 512;   // elements of each that a block takes
constexpr int kListed = 128; // entries of the list in shared memory
constexpr int kStages = 4;   // steps under way
constexpr int kWidePitch = kWide + 8, kWeightPitch = kGroup + 8;
constexpr int kMatrixBytes =
    (kStages * kTiles * kWidePitch + kListed * kWeightPitch) * (int)sizeof(ts::bf16) + kListed * (int)sizeof(int64_t);

template <typename S, int D>
__global__ void __launch_bounds__(kThreads, 2) matrix_sum_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    extern __shared__ uint4 shared[];
    ts::bf16 *states = (ts::bf16 *)shared, *weights = states + kStages * kTiles * kWidePitch;
    int64_t *places = (int64_t *)(weights + kListed * kWeightPitch);
    constexpr int kColumns = kWide / kWarps; // of a warp
    const int tid = threadIdx.x, lane = tid % 32, j = blockIdx.z, n_kv = a.cache.n_kv_heads;
    const int64_t in_wave = a.n_wave_groups - 1 - blockIdx.y;
    const ts_cuda_list head = a.lists[in_wave * n_kv + j];
    const int64_t list = (in_wave * n_kv + j) * a.list_stride;
    const int n = head.length, column = blockIdx.x * kWide, begin = tid / 32 * kColumns;
    // z^: a block has its share of the events, a thread one element and a share of the tiles.
    constexpr int kEvents = kGroup / (D * D / kWide), kShares = kThreads / D, kMasses = kTiles / kShares;
    const int g0 = blockIdx.x * kEvents, e = tid % D, share = tid / D;
    float mass[kEvents] = {};
    float acc[2][kColumns / 8][4] = {};
    for (int first = 0; first < n; first += kListed) {
        const int n_here = min(kListed, n - first), n_steps = (n_here + kTiles - 1) / kTiles;
        __syncthreads();
        for (int i = tid; i < n_steps * kTiles; i += kThreads) // beyond the list: any state, with no weight
            places[i] = a.list_at[list + first + min(i, n_here - 1)];
        for (int i = tid; i < n_steps * kTiles * (kGroup / 8); i += kThreads) {
            const int k = i / (kGroup / 8), g = i % (kGroup / 8) * 8;
            const ts::bf16 *from = (const ts::bf16 *)(a.list_weights + (list + first + k) * kGroup) + g;
            *(uint4 *)(weights + k * kWeightPitch + g) = k < n_here ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
        const auto fetch = [&](int step) {
            ts::bf16 *to = states + step % kStages * kTiles * kWidePitch;
            if (step < n_steps)
#pragma unroll
                for (int i = tid; i < kTiles * (kWide / 8); i += kThreads) {
                    const int k = i / (kWide / 8), e = i % (kWide / 8) * 8;
                    const int64_t at = places[step * kTiles + k];
                    fetch8<S, D>(to + k * kWidePitch + e, at >= 0 ? a.cache.slot_state : a.tile_states,
                                 at >= 0 ? a.cache.slot_scale : a.tile_scales, at >= 0 ? at : ~at, column + e);
                }
            ts::copy_commit(); // nothing, beyond the last step: the waits below count alike
        };
        float masses[kMasses];
        const auto fetch_masses = [&](int step) {
#pragma unroll
            for (int i = 0; i < kMasses; i++) {
                const int64_t at = places[step * kTiles + i * kShares + share];
                masses[i] = at >= 0 ? a.cache.slot_mass[at * D + e] : a.tile_masses[~at * D + e];
            }
        };
        for (int step = 0; step < kStages - 1; step++)
            fetch(step);
        fetch_masses(0);
        for (int step = 0; step < n_steps; step++) {
            ts::copy_wait<kStages - 2>();
            __syncthreads();
            fetch(step + kStages - 1);
#pragma unroll
            for (int i = 0; i < kMasses; i++)
#pragma unroll
                for (int g = 0; g < kEvents; g++)
                    mass[g] +=
                        __bfloat162float(weights[(step * kTiles + i * kShares + share) * kWeightPitch + g0 + g]) *
                        masses[i];
            if (step + 1 < n_steps)
                fetch_masses(step + 1);
            const ts::bf16 *from = states + step % kStages * kTiles * kWidePitch;
            uint32_t w[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++)
                ts::load_a_transposed(w[h], weights + step * kTiles * kWeightPitch, kWeightPitch, 16 * h, 0);
#pragma unroll
            for (int i = 0; i < kColumns / 16; i++) {
                uint32_t b[4];
                ts::load_b(b, from, kWidePitch, 0, begin + 16 * i);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    ts::multiply_add(acc[h][2 * i], w[h], b[0], b[1]);
                    ts::multiply_add(acc[h][2 * i + 1], w[h], b[2], b[3]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int g = lane / 4 + 8 * r;
        if (g >= head.n_events)
            continue;
        const int64_t out = (head.first_closed + g) * n_kv + j;
        ts::bf16 *state = (ts::bf16 *)a.next_states + out * D * D + column + begin + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kColumns / 8; i++)
            ts::store2(state + 8 * i, acc[r / 2][i][r % 2 * 2], acc[r / 2][i][r % 2 * 2 + 1]);
    }
    float *shares = (float *)states; // [kThreads, kEvents]
    __syncthreads();
#pragma unroll
    for (int g = 0; g < kEvents; g++)
        shares[g * kThreads + tid] = mass[g];
    __syncthreads();
    for (int i = tid; i < kEvents * D; i += kThreads) {
        float sum = 0;
        for (int k = 0; k < kShares; k++)
            sum += shares[i / D * kThreads + k * D + i % D];
        if (g0 + i / D < head.n_events)
            a.next_masses[((head.first_closed + g0 + i / D) * n_kv + j) * D + i % D] = sum;
    }
}

// Dense form of F32; that of BF16 has a kernel of its own (attention_dense.h).
template <int D> __global__ void __launch_bounds__(kThreads) recur_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    const int j = blockIdx.y, s = blockIdx.z, n_kv = a.cache.n_kv_heads, i = 4 * (blockIdx.x * kThreads + threadIdx.x);
    const int64_t begin = a.pieces.closed_begin[s], end = a.pieces.closed_begin[s + 1];
    if (begin == end)
        return;
    const int64_t head = ts::head_of(a, a.spans[s].sequence, j);
    const float *states = (const float *)a.tile_states;
    float4 state = ts::load4((const float *)a.cache.state + head * D * D + i);
#pragma unroll 4
    for (int64_t closed = begin; closed < end; closed++) {
        const int64_t at = (closed * n_kv + j) * D * D + i;
        const float decay = (float)exp(a.tile_decays[j * a.pieces.n_closed + closed]);
        const float4 x = ts::load4(states + at);
        state.x = decay * state.x + x.x, state.y = decay * state.y + x.y;
        state.z = decay * state.z + x.z, state.w = decay * state.w + x.w;
        ts::store4((float *)a.next_states + at, state);
    }
    if (i < D) {
        float4 mass = ts::load4(a.cache.mass + head * D + i);
        for (int64_t closed = begin; closed < end; closed++) {
            const int64_t at = (closed * n_kv + j) * D + i;
            const float decay = (float)exp(a.tile_decays[j * a.pieces.n_closed + closed]);
            const float4 x = ts::load4(a.tile_masses + at);
            mass.x = decay * mass.x + x.x, mass.y = decay * mass.y + x.y;
            mass.z = decay * mass.z + x.z, mass.w = decay * mass.w + x.w;
            ts::store4(a.next_masses + at, mass);
        }
    }
    if (i == 0) {
        const int64_t first = ts::first_tile_of(a, s) + 1, n = end - begin, sum = n * first + n * (n - 1) / 2;
        a.cache.pairs[2 * head] += sum;
        a.cache.pairs[2 * head + 1] += sum;
    }
}

template <typename A, typename S, int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    const unsigned n_kv = (unsigned)a->cache.n_kv_heads;
    if (a->cache.is_sparse) {
        const unsigned n_groups = (unsigned)a->n_wave_groups;
        if constexpr (std::is_same<A, ts::bf16>::value && !std::is_same<S, float>::value) { // as sums_bf16 says
            (void)cudaFuncSetAttribute(matrix_sum_kernel<S, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kMatrixBytes);
            ts::launch_pass(stream, a, matrix_sum_kernel<S, D>, dim3(D * D / kWide, n_groups, n_kv), kThreads,
                            kMatrixBytes);
        } else {
            ts::launch_pass(stream, a, sum_kernel<A, S, D>, dim3(2 * D * D / (4 * kThreads), n_groups, n_kv), kThreads,
                            0);
        }
    } else if constexpr (std::is_same<A, float>::value) {
        ts::launch_pass(stream, a, recur_kernel<D>, dim3(D * D / (4 * kThreads), n_kv, (unsigned)a->pieces.n_spans),
                        kThreads, 0);
    }
}

} // namespace

ts_status ts_cuda_tile_sum(cudaStream_t stream, const ts_cuda_attention *a) {
    if (a->pieces.n_closed == 0)
        return TS_OK;
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: selected states");
}
