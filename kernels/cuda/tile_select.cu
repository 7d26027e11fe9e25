// Rule 3 and eq. (8) for every event of a batch, in groups of neighbouring events of a span, since those hold and
// select mostly the same tiles.
//
// choose_kernel, one block a group and KV head: scores of the tiles held at any event of the group, 256 candidates at a
// time, and the weights of those that any event selects, in a list. Candidates are never all kept, so their scores are
// computed twice: once for their sum, once to compare. Bound by f32 arithmetic.
//
// sum_kernel: S^ of a group's events as weighted sums over the list, each state read once for all of them. Bound by
// reading states from L2. BF16 states under BF16 activations go through the matrix units, events by tiles by elements,
// with weights rounded to BF16; else it is f32 arithmetic.
//
// In dense form eq. (8) is a recurrence over the events of a span, one thread for four elements of the state.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/warp_matrix.cuh"

#include <type_traits>

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGroup = TS_CUDA_GROUP;

struct event_group {
    int span, n_events, n_held;
    int64_t first, first_closed, first_tile; // its first event within the span; event 0 of the span; its tile
    int32_t sequence;
    int64_t held_at; // of held_deaths
};

__device__ event_group group_of(const ts_cuda_attention &a, int64_t group, int j) {
    int low = 0, high = a.pieces.n_spans;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (a.pieces.group_begin[middle] <= group)
            low = middle;
        else
            high = middle;
    }
    event_group out;
    out.span = low;
    out.first = (group - a.pieces.group_begin[low]) * kGroup;
    out.first_closed = a.pieces.closed_begin[low];
    const int64_t left = a.pieces.closed_begin[low + 1] - out.first_closed - out.first;
    out.n_events = (int)(left < kGroup ? left : kGroup);
    out.first_tile = ts::first_tile_of(a, low);
    out.sequence = a.spans[low].sequence;
    out.n_held = a.cache.n_held[ts::head_of(a, out.sequence, j)];
    out.held_at = ((int64_t)low * a.cache.n_kv_heads + j) * a.cache.page_table_stride;
    return out;
}

// This thread's rank among those of the block with `mine`, and their number.
__device__ int rank_in_block(bool mine, int *counts, int *total) {
    const unsigned votes = __ballot_sync(~0u, mine);
    const int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        counts[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << (threadIdx.x % 32)) - 1)), sum = 0;
    for (int i = 0; i < kWarps; i++) {
        before += i < warp ? counts[i] : 0;
        sum += counts[i];
    }
    *total = sum;
    return before;
}

// A candidate of a group: where it lies, and the events at which it is held.
struct candidate {
    int64_t at, tile; // at: page, or ~index of a tile of the batch
    double end;
    unsigned held; // bit g: event g of the group
};

__device__ candidate candidate_of(const ts_cuda_attention &a, const event_group &group, int j, int64_t i) {
    candidate out = {0, 0, 0, 0};
    int64_t born = 0, death;
    if (i < group.n_held) {
        death = a.held_deaths[group.held_at + i];
        if (death > group.first) {
            out.at = ts::page_of(a, group.sequence, j, i);
            out.tile = a.cache.slot_tile[out.at];
            out.end = a.cache.slot_decay_end[out.at];
        }
    } else {
        born = i - group.n_held;
        if (born >= group.first + group.n_events)
            return out;
        const int64_t closed = group.first_closed + born, by_head = j * a.pieces.n_closed + closed;
        death = a.tile_deaths[by_head];
        out.at = ~closed;
        out.tile = group.first_tile + born;
        out.end = a.tile_ends[by_head];
    }
    for (int g = 0; g < group.n_events; g++)
        out.held |= (born <= group.first + g && group.first + g < death ? 1u : 0u) << g;
    return out;
}

// Whether candidate i is held at any event of the group.
__device__ bool is_held(const ts_cuda_attention &a, const event_group &group, int j, int64_t i) {
    if (i < group.n_held)
        return a.held_deaths[group.held_at + i] > group.first;
    const int64_t born = i - group.n_held, from = born > group.first ? born : group.first;
    return a.tile_deaths[j * a.pieces.n_closed + group.first_closed + born] > from;
}

template <int D>
__global__ void __launch_bounds__(kThreads, 2) choose_kernel(const __grid_constant__ ts_cuda_attention a) {
    __shared__ float queries[D][kGroup]; // mean queries, transposed: a thread reads all events of one element
    __shared__ double ends[kGroup], sums[kWarps][kGroup], thresholds[kGroup];
    __shared__ int counts[kWarps], n_chosen[kGroup];
    const int tid = threadIdx.x, j = blockIdx.y, n_kv = a.cache.n_kv_heads;
    const int64_t group_at = a.pieces.n_groups - 1 - blockIdx.x; // the latest first: they have most candidates
    const event_group group = group_of(a, group_at, j);
    const ts_sparsity &rules = a.cache.sparsity;
    for (int i = tid; i < kGroup * D; i += kThreads) {
        const int g = i / D, e = i % D;
        float q = 0;
        if (g < group.n_events) {
            const int64_t piece = a.pieces.closed_pieces[group.first_closed + group.first + g];
            q = a.query_sums[(piece * n_kv + j) * D + e];
        }
        queries[e][g] = q;
    }
    if (tid < kGroup) {
        ends[tid] =
            tid < group.n_events ? a.tile_ends[j * a.pieces.n_closed + group.first_closed + group.first + tid] : 0.0;
        n_chosen[tid] = 0;
    }
    __syncthreads();
    const int64_t n_candidates = group.n_held + group.first + group.n_events;
    const int64_t list = (group_at * n_kv + j) * a.list_stride;
    // The list first holds the candidates that any event holds, by number; the second pass writes over what it has
    // read.
    int n_held = 0;
    for (int64_t first = 0; first < n_candidates; first += kThreads) {
        const int64_t i = first + tid;
        const bool held = i < n_candidates && is_held(a, group, j, i);
        int n;
        const int rank = n_held + rank_in_block(held, counts, &n);
        if (held)
            a.list_at[list + rank] = i;
        n_held += n;
    }
    __syncthreads();
    double totals[kGroup] = {};
    int n_listed = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int first = 0; first < n_held; first += kThreads) {
            candidate c = {0, 0, 0, 0};
            if (first + tid < n_held)
                c = candidate_of(a, group, j, a.list_at[list + first + tid]);
            float dots[kGroup] = {}, reach[kGroup];
            if (c.held) {
                const float *mass = c.at >= 0 ? a.cache.slot_mass + c.at * D : a.tile_masses + (~c.at * n_kv + j) * D;
                constexpr int kAhead = 8; // loads under way together
                for (int e0 = 0; e0 < D; e0 += 4 * kAhead) {
                    float4 z[kAhead];
#pragma unroll
                    for (int k = 0; k < kAhead; k++)
                        z[k] = ts::load4(mass + e0 + 4 * k);
#pragma unroll
                    for (int k = 0; k < 4 * kAhead; k++) {
                        const float x = k % 4 == 0   ? z[k / 4].x
                                        : k % 4 == 1 ? z[k / 4].y
                                        : k % 4 == 2 ? z[k / 4].z
                                                     : z[k / 4].w;
#pragma unroll
                        for (int g = 0; g < kGroup; g += 4) {
                            const float4 q = ts::load4(&queries[e0 + k][g]);
                            dots[g] += x * q.x, dots[g + 1] += x * q.y, dots[g + 2] += x * q.z, dots[g + 3] += x * q.w;
                        }
                    }
                }
            }
            unsigned chosen = 0;
#pragma unroll
            for (int g = 0; g < kGroup; g++) {
                const bool held = c.held >> g & 1u;
                reach[g] = held ? ts::reach_of(ends[g] - c.end) : 0.0f;
                const double score = (double)reach[g] * (double)dots[g];
                if (pass == 0) {
                    totals[g] += score;
                } else if (held) {
                    const int64_t next = group.first_tile + group.first + g + 1;
                    const bool selected =
                        next - c.tile <= rules.recent_tiles || c.tile < rules.sink_tiles || !(score < thresholds[g]);
                    chosen |= (selected ? 1u : 0u) << g;
                }
            }
            if (pass == 0)
                continue;
            bool reaches = false;
#pragma unroll
            for (int g = 0; g < kGroup; g++) {
                if (!(chosen >> g & 1u))
                    reach[g] = 0.0f;
                reaches = reaches || reach[g] > 0.0f;
                const unsigned votes = __ballot_sync(~0u, chosen >> g & 1u);
                if (tid % 32 == 0 && votes)
                    atomicAdd(&n_chosen[g], __popc(votes));
            }
            int n;
            const int rank = n_listed + rank_in_block(reaches, counts, &n);
            if (reaches) {
                a.list_at[list + rank] = c.at;
#pragma unroll
                for (int g = 0; g < kGroup; g += 4)
                    ts::store4(a.list_weights + (list + rank) * kGroup + g,
                               make_float4(reach[g], reach[g + 1], reach[g + 2], reach[g + 3]));
            }
            n_listed += n;
        }
        if (pass == 0) {
#pragma unroll
            for (int g = 0; g < kGroup; g++) {
                totals[g] = ts::warp_sum(totals[g]);
                if (tid % 32 == 0)
                    sums[tid / 32][g] = totals[g];
            }
            __syncthreads();
            if (tid < kGroup) {
                double total = 0;
                for (int i = 0; i < kWarps; i++)
                    total += sums[i][tid];
                thresholds[tid] = rules.skip_share * total;
            }
            __syncthreads();
        }
    }
    __syncthreads();
    if (tid == 0) {
        a.list_lengths[group_at * n_kv + j] = n_listed;
        unsigned long long available = 0, selected = 0;
        for (int g = 0; g < group.n_events; g++) {
            available += (unsigned long long)(group.first_tile + group.first + g + 1);
            selected += (unsigned long long)n_chosen[g];
        }
        // Integers: the order in which blocks add does not matter.
        unsigned long long *pairs = (unsigned long long *)a.cache.pairs + 2 * ts::head_of(a, group.sequence, j);
        atomicAdd(pairs, available);
        atomicAdd(pairs + 1, selected);
    }
}

template <typename A, typename S, int D>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ ts_cuda_attention a) {
    constexpr int kChunk = 64; // list entries staged at a time
    __shared__ float weights[kChunk][kGroup];
    __shared__ int64_t places[kChunk];
    const int tid = threadIdx.x, j = blockIdx.z, n_kv = a.cache.n_kv_heads;
    const int64_t group_at = a.pieces.n_groups - 1 - blockIdx.y;
    const event_group group = group_of(a, group_at, j);
    const int64_t list = (group_at * n_kv + j) * a.list_stride;
    const int n = a.list_lengths[group_at * n_kv + j];
    const int column = 4 * ((int)blockIdx.x * kThreads + tid);
    const bool sums_mass = blockIdx.x == 0 && tid < D;
    float acc[kGroup][4] = {}, mass[kGroup] = {};
    for (int first = 0; first < n; first += kChunk) {
        const int n_here = min(kChunk, n - first);
        __syncthreads();
        for (int i = tid; i < n_here * kGroup / 4; i += kThreads)
            ts::store4(&weights[0][0] + 4 * i, ts::load4(a.list_weights + (list + first) * kGroup + 4 * i));
        if (tid < n_here)
            places[tid] = a.list_at[list + first + tid];
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < n_here; k++) {
            const int64_t at = places[k], in_batch = ~at * n_kv + j;
            const S *in =
                at >= 0 ? (const S *)a.cache.slot_state + at * D * D : (const S *)a.tile_states + in_batch * D * D;
            const float4 x = ts::load4(in + column);
#pragma unroll
            for (int g = 0; g < kGroup; g += 4) {
                const float4 w = ts::load4(&weights[k][g]);
                acc[g][0] += w.x * x.x, acc[g][1] += w.x * x.y, acc[g][2] += w.x * x.z, acc[g][3] += w.x * x.w;
                acc[g + 1][0] += w.y * x.x, acc[g + 1][1] += w.y * x.y, acc[g + 1][2] += w.y * x.z,
                    acc[g + 1][3] += w.y * x.w;
                acc[g + 2][0] += w.z * x.x, acc[g + 2][1] += w.z * x.y, acc[g + 2][2] += w.z * x.z,
                    acc[g + 2][3] += w.z * x.w;
                acc[g + 3][0] += w.w * x.x, acc[g + 3][1] += w.w * x.y, acc[g + 3][2] += w.w * x.z,
                    acc[g + 3][3] += w.w * x.w;
            }
            if (sums_mass) {
                const float z = at >= 0 ? a.cache.slot_mass[at * D + tid] : a.tile_masses[in_batch * D + tid];
#pragma unroll
                for (int g = 0; g < kGroup; g++)
                    mass[g] += weights[k][g] * z;
            }
        }
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
        if (g >= group.n_events)
            continue;
        const int64_t out = (group.first_closed + group.first + g) * n_kv + j;
        ts::store4((A *)a.next_states + out * D * D + column, make_float4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]));
        if (sums_mass)
            a.next_masses[out * D + tid] = mass[g];
    }
}

constexpr int kTiles = 16;   // states multiplied at a time
constexpr int kWide = 1024;  // elements of each that a block takes
constexpr int kListed = 256; // entries of the list in shared memory
constexpr int kWidePitch = kWide + 8, kWeightPitch = kGroup + 8;
constexpr int kMatrixBytes =
    (2 * kTiles * kWidePitch + kListed * kWeightPitch) * (int)sizeof(ts::bf16) + kListed * (int)sizeof(int64_t);

template <int D>
__global__ void __launch_bounds__(kThreads) matrix_sum_kernel(const __grid_constant__ ts_cuda_attention a) {
    extern __shared__ uint4 shared[];
    ts::bf16 *states = (ts::bf16 *)shared, *weights = states + 2 * kTiles * kWidePitch;
    int64_t *places = (int64_t *)(weights + kListed * kWeightPitch);
    const int tid = threadIdx.x, lane = tid % 32, j = blockIdx.z, n_kv = a.cache.n_kv_heads;
    const int64_t group_at = a.pieces.n_groups - 1 - blockIdx.y;
    const event_group group = group_of(a, group_at, j);
    const int64_t list = (group_at * n_kv + j) * a.list_stride;
    const int n = a.list_lengths[group_at * n_kv + j], column = blockIdx.x * kWide, begin = tid / 32 * (kWide / kWarps);
    float acc[kWide / kWarps / 8][4] = {};
    for (int first = 0; first < n; first += kListed) {
        const int n_here = min(kListed, n - first), n_steps = (n_here + kTiles - 1) / kTiles;
        __syncthreads();
        for (int i = tid; i < n_steps * kTiles; i += kThreads) {
            // Beyond the list: any state, with no weight.
            const int64_t at = a.list_at[list + first + min(i, n_here - 1)];
            places[i] = at >= 0 ? at : ~(~at * n_kv + j);
        }
        for (int i = tid; i < n_steps * kTiles * (kGroup / 4); i += kThreads) {
            const int k = i / (kGroup / 4), g = i % (kGroup / 4) * 4;
            ts::store4(weights + k * kWeightPitch + g, k < n_here
                                                           ? ts::load4(a.list_weights + (list + first + k) * kGroup + g)
                                                           : make_float4(0, 0, 0, 0));
        }
        __syncthreads();
        const auto fetch = [&](int step) {
            ts::bf16 *to = states + step % 2 * kTiles * kWidePitch;
            for (int i = tid; i < kTiles * (kWide / 8); i += kThreads) {
                const int k = i / (kWide / 8), e = i % (kWide / 8) * 8;
                const int64_t at = places[step * kTiles + k];
                const ts::bf16 *from = at >= 0 ? (const ts::bf16 *)a.cache.slot_state + at * D * D
                                               : (const ts::bf16 *)a.tile_states + ~at * D * D;
                ts::copy_async(to + k * kWidePitch + e, from + column + e);
            }
            ts::copy_commit();
        };
        fetch(0);
        for (int step = 0; step < n_steps; step++) {
            if (step + 1 < n_steps) {
                fetch(step + 1);
                ts::copy_wait<1>();
            } else {
                ts::copy_wait<0>();
            }
            __syncthreads();
            const ts::bf16 *from = states + step % 2 * kTiles * kWidePitch;
            uint32_t w[4];
            ts::load_a_transposed(w, weights + step * kTiles * kWeightPitch, kWeightPitch, 0, 0);
#pragma unroll
            for (int i = 0; i < kWide / kWarps / 16; i++) {
                uint32_t b[4];
                ts::load_b(b, from, kWidePitch, 0, begin + 16 * i);
                ts::multiply_add(acc[2 * i], w, b[0], b[1]);
                ts::multiply_add(acc[2 * i + 1], w, b[2], b[3]);
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int g = lane / 4 + 8 * r;
        if (g >= group.n_events)
            continue;
        const int64_t out = (group.first_closed + group.first + g) * n_kv + j;
        ts::bf16 *state = (ts::bf16 *)a.next_states + out * D * D + column + begin + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kWide / kWarps / 8; i++)
            ts::store2(state + 8 * i, acc[i][2 * r], acc[i][2 * r + 1]);
    }
    if (blockIdx.x > 0 || tid >= D)
        return;
    float mass[kGroup] = {};
#pragma unroll 4
    for (int k = 0; k < n; k++) {
        const int64_t at = a.list_at[list + k];
        const float z = at >= 0 ? a.cache.slot_mass[at * D + tid] : a.tile_masses[(~at * n_kv + j) * D + tid];
#pragma unroll
        for (int g = 0; g < kGroup; g += 4) {
            const float4 w = ts::load4(a.list_weights + (list + k) * kGroup + g);
            mass[g] += w.x * z, mass[g + 1] += w.y * z, mass[g + 2] += w.z * z, mass[g + 3] += w.w * z;
        }
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++)
        if (g < group.n_events)
            a.next_masses[((group.first_closed + group.first + g) * n_kv + j) * D + tid] = mass[g];
}

template <typename A, int D>
__global__ void __launch_bounds__(kThreads) recur_kernel(const __grid_constant__ ts_cuda_attention a) {
    const int j = blockIdx.y, s = blockIdx.z, n_kv = a.cache.n_kv_heads, i = 4 * (blockIdx.x * kThreads + threadIdx.x);
    const int64_t begin = a.pieces.closed_begin[s], end = a.pieces.closed_begin[s + 1];
    if (begin == end)
        return;
    const int64_t head = ts::head_of(a, a.spans[s].sequence, j);
    const float *states = (const float *)a.tile_states;
    float4 state = ts::load4(a.cache.state + head * D * D + i);
#pragma unroll 4
    for (int64_t closed = begin; closed < end; closed++) {
        const int64_t at = (closed * n_kv + j) * D * D + i;
        const float decay = (float)exp(a.tile_decays[j * a.pieces.n_closed + closed]);
        const float4 x = ts::load4(states + at);
        state.x = decay * state.x + x.x, state.y = decay * state.y + x.y;
        state.z = decay * state.z + x.z, state.w = decay * state.w + x.w;
        ts::store4((A *)a.next_states + at, state);
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
        const unsigned n_groups = (unsigned)a->pieces.n_groups;
        choose_kernel<D><<<dim3(n_groups, n_kv), kThreads, 0, stream>>>(*a);
        if (std::is_same<A, ts::bf16>::value && std::is_same<S, ts::bf16>::value) {
            (void)cudaFuncSetAttribute(matrix_sum_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMatrixBytes);
            matrix_sum_kernel<D><<<dim3(D * D / kWide, n_groups, n_kv), kThreads, kMatrixBytes, stream>>>(*a);
        } else {
            sum_kernel<A, S, D><<<dim3(D * D / (4 * kThreads), n_groups, n_kv), kThreads, 0, stream>>>(*a);
        }
    } else
        recur_kernel<A, D>
            <<<dim3(D * D / (4 * kThreads), n_kv, (unsigned)a->pieces.n_spans), kThreads, 0, stream>>>(*a);
}

} // namespace

ts_status ts_cuda_tile_select(cudaStream_t stream, const ts_cuda_attention *a) {
    if (a->pieces.n_closed == 0)
        return TS_OK;
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: selected states");
}
