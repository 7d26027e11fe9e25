// Rule 3 and eq. (8): for every event of a batch, scores of the held tiles, selection, and the selected state, one
// block an event and KV head. Candidates pass in chunks: nothing that grows with the context is kept, so where there
// are several chunks the scores are computed twice, once for their sum and once to compare. Bound by reading the
// selected states, mostly from L2.
//
// In dense form eq. (8) is a recurrence over the events of a span, one thread for four elements of the state.
#include "kernels/cuda/attention.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A chunk of candidates, packed to those that are held at the event.
struct chunk {
    int64_t at[kThreads]; // page; or ~index of a tile of the batch
    int64_t tile[kThreads];
    float reach[kThreads];
    double score[kThreads];
    int counts[kWarps];
};

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

struct event {
    int span, j, n_held;
    int64_t index, first, first_tile; // event within the span; its span's first completed tile in the batch; its tile
    int64_t held_at;                  // of held_deaths
    int32_t sequence;
    double end; // E
};

// Fills the chunk with the candidates [first, first + kThreads) that are held at the event, and their scores. Returns
// how many. mean_query is in shared memory.
template <int D>
__device__ int score_chunk(const ts_cuda_attention &a, const event &now, int64_t first, const float *mean_query,
                           chunk *out) {
    const int64_t i = first + threadIdx.x;
    int64_t at = 0, tile = 0;
    double end = 0;
    bool held = false;
    if (i < now.n_held) {
        held = a.held_deaths[now.held_at + i] > now.index;
        if (held) {
            at = ts::page_of(a, now.sequence, now.j, i);
            tile = a.cache.slot_tile[at];
            end = a.cache.slot_decay_end[at];
        }
    } else if (i <= now.n_held + now.index) {
        const int64_t closed = now.first + i - now.n_held, by_head = now.j * a.pieces.n_closed + closed;
        held = a.tile_deaths[by_head] > now.index;
        if (held) {
            at = ~closed;
            tile = now.first_tile + i - now.n_held;
            end = a.tile_ends[by_head];
        }
    }
    int n;
    const int rank = rank_in_block(held, out->counts, &n);
    if (held) {
        out->at[rank] = at;
        out->tile[rank] = tile;
        out->reach[rank] = ts::reach_of(now.end - end);
    }
    __syncthreads();
    for (int k = threadIdx.x / 32; k < n; k += kWarps) {
        const float reach = out->reach[k];
        float dot = 0;
        if (reach > 0.0f) {
            const int64_t from = out->at[k];
            const float *mass =
                from >= 0 ? a.cache.slot_mass + from * D : a.tile_masses + (~from * a.cache.n_kv_heads + now.j) * D;
            for (int e = threadIdx.x % 32; e < D; e += 32)
                dot += mean_query[e] * mass[e];
            dot = ts::warp_sum(dot);
        }
        if (threadIdx.x % 32 == 0)
            out->score[k] = (double)reach * (double)dot;
    }
    __syncthreads();
    return n;
}

template <typename A, typename S, int D>
__global__ void __launch_bounds__(kThreads) select_kernel(const __grid_constant__ ts_cuda_attention a) {
    __shared__ chunk held;
    __shared__ float mean_query[D];
    __shared__ double totals[kWarps];
    __shared__ int counts[kWarps], selected[kThreads];
    const int tid = threadIdx.x, n_kv = a.cache.n_kv_heads;
    // The latest events first: they have most candidates.
    const int64_t closed = a.pieces.n_closed - 1 - blockIdx.x, piece_at = a.pieces.closed_pieces[closed];
    const ts_cuda_piece piece = a.pieces.at[piece_at];
    event now;
    now.span = piece.span;
    now.j = blockIdx.y;
    now.sequence = piece.sequence;
    now.first = a.pieces.closed_begin[piece.span];
    now.index = closed - now.first;
    now.first_tile = piece.tile - now.index;
    now.n_held = a.cache.n_held[ts::head_of(a, piece.sequence, now.j)];
    now.held_at = ((int64_t)piece.span * n_kv + now.j) * a.cache.page_table_stride;
    now.end = a.tile_ends[now.j * a.pieces.n_closed + closed];
    if (tid < D)
        mean_query[tid] = a.query_sums[(piece_at * n_kv + now.j) * D + tid];
    __syncthreads();

    const int64_t n_candidates = now.n_held + now.index + 1, next = piece.tile + 1;
    const ts_sparsity &rules = a.cache.sparsity;
    double total = 0;
    int n = 0;
    for (int64_t first = 0; first < n_candidates; first += kThreads) {
        n = score_chunk<D>(a, now, first, mean_query, &held);
        for (int k = tid; k < n; k += kThreads)
            total += held.score[k];
        __syncthreads();
    }
    const double threshold = rules.skip_share * ts::block_sum(total, totals);

    constexpr int kItems = D * D / (4 * kThreads);
    float4 state[kItems];
#pragma unroll
    for (int item = 0; item < kItems; item++)
        state[item] = make_float4(0, 0, 0, 0);
    float mass = 0;
    int n_selected = 0;
    for (int64_t first = 0; first < n_candidates; first += kThreads) {
        if (n_candidates > kThreads)
            n = score_chunk<D>(a, now, first, mean_query, &held);
        const bool chosen = tid < n && (next - held.tile[tid] <= rules.recent_tiles ||
                                        held.tile[tid] < rules.sink_tiles || !(held.score[tid] < threshold));
        int n_chosen, n_within;
        (void)rank_in_block(chosen, counts, &n_chosen);
        const bool within = chosen && held.reach[tid] > 0.0f;
        const int rank = rank_in_block(within, counts, &n_within);
        if (within)
            selected[rank] = tid;
        n_selected += n_chosen;
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < n_within; k++) {
            const int from = selected[k];
            const float reach = held.reach[from];
            const int64_t at = held.at[from];
            const int64_t in_batch = ~at * n_kv + now.j;
            const S *in =
                at >= 0 ? (const S *)a.cache.slot_state + at * D * D : (const S *)a.tile_states + in_batch * D * D;
#pragma unroll
            for (int item = 0; item < kItems; item++) {
                const float4 x = ts::load4(in + 4 * (tid + item * kThreads));
                state[item].x += reach * x.x, state[item].y += reach * x.y;
                state[item].z += reach * x.z, state[item].w += reach * x.w;
            }
            if (tid < D)
                mass += reach * (at >= 0 ? a.cache.slot_mass[at * D + tid] : a.tile_masses[in_batch * D + tid]);
        }
        __syncthreads();
    }
    const int64_t out = closed * n_kv + now.j;
#pragma unroll
    for (int item = 0; item < kItems; item++)
        ts::store4(a.next_states + out * D * D + 4 * (tid + item * kThreads), state[item]);
    if (tid < D)
        a.next_masses[out * D + tid] = mass;
    if (tid == 0) { // integers: the order in which blocks add does not matter
        unsigned long long *pairs = (unsigned long long *)a.cache.pairs + 2 * ts::head_of(a, piece.sequence, now.j);
        atomicAdd(pairs, (unsigned long long)next);
        atomicAdd(pairs + 1, (unsigned long long)n_selected);
    }
}

template <int D> __global__ void __launch_bounds__(kThreads) recur_kernel(const __grid_constant__ ts_cuda_attention a) {
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
        ts::store4(a.next_states + at, state);
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
    if (a->cache.is_sparse)
        select_kernel<A, S, D><<<dim3((unsigned)a->pieces.n_closed, n_kv), kThreads, 0, stream>>>(*a);
    else
        recur_kernel<D><<<dim3(D * D / (4 * kThreads), n_kv, (unsigned)a->pieces.n_spans), kThreads, 0, stream>>>(*a);
}

} // namespace

ts_status ts_cuda_tile_select(cudaStream_t stream, const ts_cuda_attention *a) {
    if (a->pieces.n_closed == 0)
        return TS_OK;
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: selected states");
}
