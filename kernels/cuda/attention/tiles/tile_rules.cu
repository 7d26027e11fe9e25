// Rules 1 and 2 for all events of a batch at once, and what follows from them: which tile goes to which slot.
//
// A tile joins the old ones of its lane at event (tile + recent_tiles), counted in tiles, and must leave at the event
// where the number of better old tiles of its lane reaches the lane's room. Keys never change and a tile that left is
// worse than as many tiles as the lane has room for, so counting every tile of the lane that has joined, held or not,
// gives the same event as keeping the list step by step. That makes each tile's end independent of the others' and the
// whole a parallel pass over a few numbers a tile.
#include "kernels/cuda/attention/attention.cuh"

#include <limits.h>

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWide = 1024;           // threads of the kernels that have one block a span and KV head
constexpr int64_t kManyBlocks = 8192; // more than the device runs at a time

__device__ double *joining_of(const ts_cuda_attention &a, int s, int j) {
    const int64_t per_head = a.pieces.n_closed + (int64_t)a.pieces.n_spans * a.n_lead;
    return a.joining_keys + j * per_head + a.pieces.closed_begin[s] + (int64_t)s * a.n_lead;
}

__device__ bool may_compete(const ts_cuda_attention &a, int32_t sequence, int64_t tile) {
    return tile >= a.cache.sparsity.sink_tiles && !a.cache.pruned[sequence][tile];
}

// E and keys, one block a span and KV head.
__global__ void __launch_bounds__(kWide) ends_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    constexpr int kAhead = 8; // sums that one thread reads and writes together
    __shared__ alignas(16) double decays[kWide + kAhead];
    const int s = blockIdx.x, j = blockIdx.y, tid = threadIdx.x;
    const int64_t begin = a.pieces.closed_begin[s], n = a.pieces.closed_begin[s + 1] - begin;
    if (n == 0)
        return;
    const int32_t sequence = a.spans[s].sequence;
    const int64_t head = ts::head_of(a, sequence, j), base = j * a.pieces.n_closed + begin;
    const int64_t first_tile = ts::first_tile_of(a, s);
    double *joining = a.cache.is_sparse ? joining_of(a, s, j) : NULL;
    double end = a.cache.decay_end[head];
    for (int64_t i = a.pieces.group_begin[s] + tid; joining && i < a.pieces.group_begin[s + 1]; i += kWide)
        a.listed[i * a.cache.n_kv_heads + j] = 0;
    for (int64_t i0 = 0; i0 < n; i0 += kWide) {
        const int64_t i = i0 + tid;
        const bool there = i < n;
        __syncthreads(); // the sums before have been read
        decays[tid] = there ? a.tile_decays[base + i] : 0.0;
        // What the key needs beside E comes meanwhile.
        double log_sum = 0;
        int64_t place = -1;
        bool competes = false;
        if (there && joining) {
            log_sum = log(a.tile_sums[base + i]);
            place = ts::tile_place(a, s, sequence, begin + i, j);
            competes = may_compete(a, sequence, first_tile + i);
        }
        __syncthreads();
        if (tid == 0) { // one after the other: what E is does not depend on where a span begins
            double x[kAhead], y[kAhead];
            const auto load = [&](double(&to)[kAhead], int at) {
#pragma unroll
                for (int k = 0; k < kAhead; k++)
                    to[k] = decays[at + k];
            };
            const auto add = [&](const double(&from)[kAhead], int at) {
#pragma unroll
                for (int k = 0; k < kAhead; k++)
                    decays[at + k] = end += from[k];
            };
            const int n_here = (int)min(n - i0, (int64_t)kWide);
            load(x, 0);
            for (int at = 0; at < n_here; at += 2 * kAhead) {
                load(y, at + kAhead);
                add(x, at);
                load(x, at + 2 * kAhead); // beyond the end: not used
                add(y, at + kAhead);
            }
        }
        __syncthreads();
        if (there) {
            const double end_of = decays[tid], key = log_sum - end_of;
            a.tile_ends[base + i] = end_of;
            if (joining) {
                a.tile_keys[base + i] = key;
                joining[a.n_lead + i] = competes ? key : NAN;
            }
            if (place >= 0) {
                a.cache.slot_decay_end[place] = end_of;
                a.cache.slot_key[place] = key;
                a.cache.slot_tile[place] = first_tile + i;
            }
        }
    }
    if (!joining)
        return;
    for (int i = tid; i < a.n_lead; i += kWide)
        joining[i] = NAN; // better than no key
    __syncthreads();
    const bool has_budget = a.cache.sparsity.cache_tiles > 0;
    for (int i = tid; has_budget && i < a.cache.n_held[head]; i += kWide) {
        const int64_t page = ts::page_of(a, sequence, j, i), tile = a.cache.slot_tile[page];
        if (tile >= first_tile - a.n_lead && may_compete(a, sequence, tile))
            joining[tile - first_tile + a.n_lead] = a.cache.slot_key[page];
    }
}

__device__ bool is_better(double key, int64_t tile, double than_key, int64_t than_tile) {
    return key > than_key || (key == than_key && tile > than_tile);
}

// The event at which rule 1 takes a tile; INT_MAX: it does not in this batch.
__device__ int32_t pruned_at(const ts_cuda_attention &a, int s, int32_t sequence, int64_t tile) {
    const int64_t n = a.pieces.closed_begin[s + 1] - a.pieces.closed_begin[s];
    const int64_t event = tile + a.cache.sparsity.recent_tiles - ts::first_tile_of(a, s);
    const bool is_taken =
        tile >= a.cache.sparsity.sink_tiles && event >= 0 && event < n && a.cache.pruned[sequence][tile];
    return is_taken ? (int32_t)event : INT_MAX;
}

// The event at which a tile stops being held, under a budget. A warp works it out together, 32 tiles of the lane at a
// time.
__device__ int32_t death_of(const ts_cuda_attention &a, int s, int j, int32_t sequence, int64_t tile, double key,
                            int n_held) {
    const ts_sparsity &rules = a.cache.sparsity;
    const int64_t first_tile = ts::first_tile_of(a, s);
    const int64_t n = a.pieces.closed_begin[s + 1] - a.pieces.closed_begin[s];
    const int64_t first_joining = first_tile - rules.recent_tiles; // the tile that event 0 makes old
    if (tile < rules.sink_tiles || tile - first_joining >= n)
        return INT_MAX;
    const int32_t pruned = pruned_at(a, s, sequence, tile);
    if (pruned != INT_MAX)
        return pruned;
    const bool joins = tile >= first_joining;
    const int64_t room = rules.cache_tiles / rules.cache_lanes, lanes = rules.cache_lanes;
    const int lane = threadIdx.x % 32;
    int64_t n_better = 0;
    for (int i0 = 0; i0 < n_held; i0 += 32) {
        bool better = false;
        if (i0 + lane < n_held) {
            const int64_t page = ts::page_of(a, sequence, j, i0 + lane), other = a.cache.slot_tile[page];
            better = other < first_joining && other >= rules.sink_tiles && other % lanes == tile % lanes &&
                     is_better(a.cache.slot_key[page], other, key, tile);
        }
        n_better += __popc(__ballot_sync(~0u, better));
    }
    int64_t first = first_joining > 0 ? first_joining : 0;
    first += ((tile - first) % lanes + lanes) % lanes;
    const double *joining = joining_of(a, s, j) + a.n_lead - first_tile; // by tile
    for (; first < first_joining + n; first += 32 * lanes) {
        const int64_t other = first + lane * lanes;
        const bool there = other < first_joining + n;
        const unsigned better = __ballot_sync(~0u, there && is_better(joining[other], other, key, tile));
        const unsigned itself = __ballot_sync(~0u, there && other == tile);
        // Those after which the tile can leave: all, or those that join after it.
        const unsigned later = __ballot_sync(~0u, !joins || other > tile);
        n_better += __popc(better & ~later);
        if (joins && itself && n_better >= room)
            return (int32_t)(tile - first_joining);
        const int n_later = __popc(better & later);
        if (n_better + n_later >= room && n_later > 0) {
            const int at = (int)__fns(better & later, 0, (int)(room - n_better));
            return (int32_t)(first + at * lanes - first_joining);
        }
        n_better += n_later;
    }
    return INT_MAX;
}

__global__ void deaths_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    const int s = blockIdx.y, j = blockIdx.z;
    const int64_t begin = a.pieces.closed_begin[s], n = a.pieces.closed_begin[s + 1] - begin;
    if (n == 0)
        return;
    const int32_t sequence = a.spans[s].sequence;
    const int n_held = a.cache.n_held[ts::head_of(a, sequence, j)];
    const bool leads = threadIdx.x % 32 == 0;
    for (int64_t i = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32; i < n_held + n;
         i += (int64_t)gridDim.x * kWarps) {
        if (i < n_held) {
            const int64_t page = ts::page_of(a, sequence, j, i);
            const int32_t death = death_of(a, s, j, sequence, a.cache.slot_tile[page], a.cache.slot_key[page], n_held);
            if (leads)
                a.held_deaths[ts::held_at(a, s, j) + i] = death;
        } else {
            const int64_t event = i - n_held, at = j * a.pieces.n_closed + begin + event;
            const int32_t death = death_of(a, s, j, sequence, ts::first_tile_of(a, s) + event, a.tile_keys[at], n_held);
            if (leads)
                a.tile_deaths[at] = death;
        }
    }
}

// What bounds the scores of the tiles of every range, and their decayed mass: for tile_choose.cu. A warp a range, a
// lane a tile, then a lane a few elements. Sinks, which are always selected, have the largest of keys. Mass and
// first_death leave out tiles that no event counts that may ask: those gone when the batch begins, and of the batch's
// own tiles those gone two ranges later (which pruning removes).
template <int D> __global__ void ranges_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    static_assert(TS_CUDA_GROUP == 32, "a lane for each tile of a range");
    constexpr int kElements = D / 32;
    const int s = blockIdx.y, j = blockIdx.z, lane = threadIdx.x % 32, n_kv = a.cache.n_kv_heads;
    const int64_t begin = a.pieces.closed_begin[s], n = a.pieces.closed_begin[s + 1] - begin;
    if (n == 0)
        return;
    const int32_t sequence = a.spans[s].sequence;
    const int n_held = a.cache.n_held[ts::head_of(a, sequence, j)];
    const int64_t n_held_ranges = (n_held + 31) / 32, n_ranges = n_held_ranges + (n + 31) / 32;
    for (int64_t i = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32; i < n_ranges; i += (int64_t)gridDim.x * kWarps) {
        const bool is_held = i < n_held_ranges;
        double key = -INFINITY, end = 0;
        int64_t tile = -1;
        int32_t death = 0;
        const float *mass = NULL; // NULL: no such tile
        int64_t gone = 0;         // a tile that dies by then does not count
        if (is_held) {
            const int64_t slot = i * 32 + lane;
            if (slot < n_held) {
                const int64_t page = ts::page_of(a, sequence, j, slot);
                tile = a.cache.slot_tile[page];
                key = a.cache.slot_key[page];
                end = a.cache.slot_decay_end[page];
                death = ts::death_at(a.held_deaths, ts::held_at(a, s, j) + slot);
                mass = a.cache.slot_mass + page * D;
            }
        } else {
            const int64_t event = (i - n_held_ranges) * 32 + lane, at = j * a.pieces.n_closed + begin + event;
            gone = (i - n_held_ranges + 2) * 32;
            if (event < n) {
                tile = ts::first_tile_of(a, s) + event;
                key = a.tile_keys[at];
                end = a.tile_ends[at];
                death = ts::death_at(a.tile_deaths, at);
                mass = a.tile_masses + ((begin + event) * n_kv + j) * D;
            }
        }
        if (mass && tile < a.cache.sparsity.sink_tiles)
            key = INFINITY;
        const bool counts = mass && death > gone;
        ts_cuda_range range = {key, mass ? end : 0.0, tile, counts ? death : INT_MAX, death};
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            range.largest_key = fmax(range.largest_key, __shfl_xor_sync(~0u, range.largest_key, step));
            range.end = fmin(range.end, __shfl_xor_sync(~0u, range.end, step));
            range.newest = max(range.newest, __shfl_xor_sync(~0u, range.newest, step));
            range.first_death = min(range.first_death, __shfl_xor_sync(~0u, range.first_death, step));
            range.last_death = max(range.last_death, __shfl_xor_sync(~0u, range.last_death, step));
        }
        const float weight = counts ? ts::reach_of(range.end - end) : 0.0f;
        float sums[kElements] = {};
        // Where there is no tile, the range's first with no weight: no load waits for a branch.
        const unsigned long long first = __shfl_sync(~0u, (unsigned long long)mass, 0);
        const unsigned long long from = mass ? (unsigned long long)mass : first;
        constexpr int kAhead = 16;
#pragma unroll
        for (int t0 = 0; t0 < 32; t0 += kAhead) {
            float z[kAhead][kElements];
#pragma unroll
            for (int t = 0; t < kAhead; t++)
#pragma unroll
                for (int e = 0; e < kElements; e++)
                    z[t][e] = ((const float *)__shfl_sync(~0u, from, t0 + t))[e * 32 + lane];
#pragma unroll
            for (int t = 0; t < kAhead; t++) {
                const float w = __shfl_sync(~0u, weight, t0 + t);
#pragma unroll
                for (int e = 0; e < kElements; e++)
                    sums[e] += w * z[t][e];
            }
        }
        const int64_t at = is_held ? ts::held_ranges_at(a, s, j) + i
                                   : j * a.pieces.n_groups + a.pieces.group_begin[s] + i - n_held_ranges;
        float *sums_at = (is_held ? a.held_range_masses : a.tile_range_masses) + at * D;
#pragma unroll
        for (int e = 0; e < kElements; e++)
            sums_at[e * 32 + lane] = sums[e];
        if (lane == 0)
            (is_held ? a.held_ranges : a.tile_ranges)[at] = range;
    }
}

// Slots of the tiles that stay: first those that dropped tiles leave, then new ones. A sequence never holds fewer tiles
// than before, so no hole remains. Where no budget is kept, this comes before all else and says when tiles stop being
// held, too; and tiles with new slots are made there. A slot that a tile leaves is still read until then.
__global__ void __launch_bounds__(kWide) slots_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    __shared__ int counts[kWide / 32];
    const int s = blockIdx.x, j = blockIdx.y;
    const int64_t begin = a.pieces.closed_begin[s], n = a.pieces.closed_begin[s + 1] - begin;
    if (n == 0)
        return;
    const bool is_first = a.tile_places != NULL;
    const int32_t sequence = a.spans[s].sequence;
    const int64_t held_at = ts::held_at(a, s, j);
    const int n_held = a.cache.n_held[ts::head_of(a, sequence, j)];
    int n_holes = 0, n_stored = 0;
    for (int i0 = 0; i0 < n_held; i0 += kWide) {
        const int i = i0 + (int)threadIdx.x;
        if (is_first && i < n_held)
            a.held_deaths[held_at + i] = pruned_at(a, s, sequence, a.cache.slot_tile[ts::page_of(a, sequence, j, i)]);
        const bool dies = i < n_held && a.held_deaths[held_at + i] != INT_MAX;
        int total;
        const int rank = ts::rank_in_block<kWide / 32>(dies, counts, &total);
        if (dies)
            a.holes[held_at + n_holes + rank] = i;
        n_holes += total;
    }
    __syncthreads();
    for (int64_t i0 = 0; i0 < n; i0 += kWide) {
        const int64_t i = i0 + threadIdx.x, at = j * a.pieces.n_closed + begin + i;
        if (is_first && i < n)
            a.tile_deaths[at] = pruned_at(a, s, sequence, ts::first_tile_of(a, s) + i);
        const bool stays = i < n && a.tile_deaths[at] == INT_MAX;
        int total;
        const int rank = n_stored + ts::rank_in_block<kWide / 32>(stays, counts, &total);
        const int slot = !stays ? -1 : rank < n_holes ? a.holes[held_at + rank] : n_held + rank - n_holes;
        if (i < n)
            a.tile_slots[at] = slot;
        if (is_first && i < n)
            a.tile_places[at] =
                slot >= n_held ? ts::page_of(a, sequence, j, slot) : ~((begin + i) * a.cache.n_kv_heads + j);
        n_stored += total;
    }
    if (threadIdx.x == 0)
        a.held_after[(int64_t)s * a.cache.n_kv_heads + j] = n_held + n_stored - n_holes;
}

template <typename S, int D> __global__ void store_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    const int64_t closed = blockIdx.x, at = blockIdx.y * a.pieces.n_closed + closed;
    const int j = blockIdx.y, slot = a.tile_slots[at];
    const ts_cuda_piece piece = a.pieces.at[a.pieces.closed_pieces[closed]];
    if (slot < 0 || ts::tile_place(a, piece.span, piece.sequence, closed, j) >= 0)
        return;
    const int64_t page = ts::page_of(a, piece.sequence, j, slot), from = closed * a.cache.n_kv_heads + j;
    constexpr int kVectors = D * D * (int)sizeof(S) / 16;
    const uint4 *state = (const uint4 *)((const S *)a.tile_states + from * D * D);
    uint4 *out = (uint4 *)((S *)a.cache.slot_state + page * D * D);
    for (int i = threadIdx.x; i < kVectors; i += kThreads)
        out[i] = state[i];
    if (std::is_same<S, ts::fp8>::value && threadIdx.x < D)
        a.cache.slot_scale[page * D + threadIdx.x] = a.tile_scales[from * D + threadIdx.x];
    if (threadIdx.x < D)
        a.cache.slot_mass[page * D + threadIdx.x] = a.tile_masses[from * D + threadIdx.x];
    if (threadIdx.x == 0) {
        a.cache.slot_decay_end[page] = a.tile_ends[at];
        a.cache.slot_key[page] = a.tile_keys[at];
        a.cache.slot_tile[page] = piece.tile;
    }
}

// What the span leaves behind it.
template <typename A, int D> __global__ void leave_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    const int s = blockIdx.x, j = blockIdx.y, tid = threadIdx.x, n_kv = a.cache.n_kv_heads;
    const int64_t closed_end = a.pieces.closed_begin[s + 1];
    if (a.pieces.begin[s] == a.pieces.begin[s + 1])
        return;
    const int64_t last = a.pieces.begin[s + 1] - 1;
    const ts_cuda_piece piece = a.pieces.at[last];
    const int64_t head = ts::head_of(a, piece.sequence, j);
    if (closed_end > a.pieces.closed_begin[s]) {
        const int64_t from = (closed_end - 1) * n_kv + j;
        for (int i = tid * 4; a.next_states && i < D * D; i += kThreads * 4)
            ts::store4((A *)a.cache.state + head * D * D + i, ts::load4((const A *)a.next_states + from * D * D + i));
        if (a.next_states && tid < D)
            a.cache.mass[head * D + tid] = a.next_masses[from * D + tid];
        if (tid == 0)
            a.cache.decay_end[head] = a.tile_ends[j * a.pieces.n_closed + closed_end - 1];
        if (tid == 0 && a.cache.is_sparse)
            a.cache.n_held[head] = a.all_in_slots ? a.cache.n_held[head] + (int)(closed_end - a.pieces.closed_begin[s])
                                                  : a.held_after[s * n_kv + j];
    }
    if (piece.closed >= 0)
        return;
    if (tid < D)
        a.cache.query_sum[head * D + tid] = a.query_sums[(last * n_kv + j) * D + tid];
    if (piece.first > 0)
        return;
    const ts::tile_keys<A, D> tile(a, piece, j);
    const int64_t open = head * a.cache.tile_size;
    for (int i = tid; i < piece.n_tokens * D; i += kThreads) {
        const int m = i / D, e = i % D;
        ((A *)a.cache.open_k)[(open + m) * D + e] = ts::open_key(tile.k + m * tile.stride + e, tile.gate[m]);
        ((A *)a.cache.open_v)[(open + m) * D + e] = tile.v[m * tile.stride + e];
    }
    if (tid < piece.n_tokens) {
        a.cache.open_c[open + tid] = tile.c[tid];
        if (sizeof(A) < 4)
            a.cache.open_gate[open + tid] = tile.gate[tid];
    }
}

template <typename A, typename S, int D> void launch_store(cudaStream_t stream, const ts_cuda_attention *a) {
    const unsigned n_kv = (unsigned)a->cache.n_kv_heads, n_spans = (unsigned)a->pieces.n_spans;
    if (a->cache.is_sparse && a->pieces.n_closed > 0 && !a->all_in_slots)
        ts::launch_pass(stream, a, store_kernel<S, D>, dim3((unsigned)a->pieces.n_closed, n_kv), kThreads, 0);
    ts::launch_pass(stream, a, leave_kernel<A, D>, dim3(n_spans, n_kv), kThreads, 0);
}

} // namespace

ts_status ts_cuda_tile_place(cudaStream_t stream, const ts_cuda_attention *a) {
    if (a->pieces.n_closed == 0 || !a->tile_places)
        return TS_OK;
    ts::launch_pass(stream, a, slots_kernel, dim3((unsigned)a->pieces.n_spans, (unsigned)a->cache.n_kv_heads), kWide,
                    0);
    return ts_cuda_status(cudaGetLastError(), "attention: slots of tiles");
}

ts_status ts_cuda_tile_rules(cudaStream_t stream, const ts_cuda_attention *a) {
    const unsigned n_kv = (unsigned)a->cache.n_kv_heads, n_spans = (unsigned)a->pieces.n_spans;
    if (a->pieces.n_closed == 0)
        return TS_OK;
    ts::launch_pass(stream, a, ends_kernel, dim3(n_spans, n_kv), kWide, 0);
    if (a->cache.is_sparse) {
        // Blocks for the largest span, but in a batch of many spans not for each as many.
        const int64_t most = (a->most_held + a->most_events + kWarps - 1) / kWarps;
        const int64_t share = kManyBlocks / ((int64_t)n_spans * n_kv) + 1;
        if (a->cache.sparsity.cache_tiles > 0) {
            ts::launch_pass(stream, a, deaths_kernel, dim3((unsigned)(most < share ? most : share), n_spans, n_kv),
                            kThreads, 0);
            ts::launch_pass(stream, a, slots_kernel, dim3(n_spans, n_kv), kWide, 0);
        }
        const int64_t n_ranges =
            (a->most_held + TS_CUDA_GROUP - 1) / TS_CUDA_GROUP + (a->most_events + TS_CUDA_GROUP - 1) / TS_CUDA_GROUP;
        const int64_t n_blocks = (n_ranges + kWarps - 1) / kWarps;
        const dim3 grid((unsigned)(n_blocks < share ? n_blocks : share), n_spans, n_kv);
        if (a->cache.head_dim == 64)
            ts::launch_pass(stream, a, ranges_kernel<64>, grid, kThreads, 0);
        else
            ts::launch_pass(stream, a, ranges_kernel<128>, grid, kThreads, 0);
    }
    return ts_cuda_status(cudaGetLastError(), "attention: rules of tiles");
}

ts_status ts_cuda_tile_store(cudaStream_t stream, const ts_cuda_attention *a) {
    TS_ATTENTION_DISPATCH(launch_store, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: store of tiles");
}
