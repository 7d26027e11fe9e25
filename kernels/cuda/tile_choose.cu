// Rule 3 for every event of a batch, in groups of neighbouring events of a span, since those hold and select mostly the
// same tiles. A call works on one wave of groups, whose lists fit the workspace.
//
// One block a group and KV head: scores of the tiles held at any event of the group, and the weights of those that any
// event selects, in a list. Candidates come in ranges of 32. A tile's score is at most e^E max(q) sum(z), which its key
// holds already, so the tiles of a range are not scored one by one where the largest key shows that no event can select
// any. Such a range counts in the sum of scores by its tiles' decayed mass or, where all ranges alike would together
// add less than 2^-24, not at all. Bound by latency and f32 arithmetic.
#include "kernels/cuda/attention.cuh"

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kGroup = TS_CUDA_GROUP, kRange = TS_CUDA_GROUP;
constexpr int kEvents = 8, kShares = kGroup / kEvents; // events of a thread, and threads of a candidate
constexpr int kAtOnce = kThreads / kShares;            // candidates
constexpr int kQueryPitch = kGroup + 4;
template <int D> constexpr int kMassPitch = D + 4; // floats: keeps rows aligned to 16 bytes and apart in banks
template <int D> constexpr int kMassBytes = kAtOnce * kMassPitch<D> * (int)sizeof(float);

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
    out.held_at = ((int64_t)low * a.cache.n_kv_heads + j) * a.held_stride;
    return out;
}

// A candidate: where it lies, and at which of `n` events from `first` on it is held.
struct candidate {
    int64_t at, tile; // at: page, or ~index in tile_states
    double end;
    unsigned held; // bit g: event first + g
};

// id: a slot, or ~event of the span.
__device__ candidate candidate_of(const ts_cuda_attention &a, const event_group &group, int j, int64_t id,
                                  int64_t first, int n) {
    candidate out = {0, 0, 0, 0};
    int64_t born = 0, death;
    if (id >= 0) {
        if (id >= group.n_held)
            return out;
        death = a.held_deaths[group.held_at + id];
        if (death > first) {
            out.at = ts::page_of(a, group.sequence, j, id);
            out.tile = a.cache.slot_tile[out.at];
            out.end = a.cache.slot_decay_end[out.at];
        }
    } else {
        born = ~id;
        if (born >= first + n)
            return out;
        const int64_t closed = group.first_closed + born, by_head = j * a.pieces.n_closed + closed;
        death = a.tile_deaths[by_head];
        out.at = ts::tile_place(a, closed, j);
        out.tile = group.first_tile + born;
        out.end = a.tile_ends[by_head];
    }
    const int64_t begin = max((int64_t)0, born - first), end = min((int64_t)n, death - first);
    if (begin < end)
        out.held = (1u << end) - (1u << begin);
    return out;
}

// Mass of queries[., g0 .. g0 + kEvents) on a tile.
template <int D>
__device__ __forceinline__ void dots_of(const float *mass, const float (*queries)[kQueryPitch], int g0,
                                        float (&dots)[kEvents]) {
#pragma unroll 4
    for (int e = 0; e < D; e += 4) {
        const float4 z = ts::load4(mass + e);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float x = k == 0 ? z.x : k == 1 ? z.y : k == 2 ? z.z : z.w;
#pragma unroll
            for (int g = 0; g < kEvents; g += 4) {
                const float4 q = ts::load4(&queries[e + k][g0 + g]);
                dots[g] += x * q.x, dots[g + 1] += x * q.y, dots[g + 2] += x * q.z, dots[g + 3] += x * q.w;
            }
        }
    }
}

// Neighbouring threads have one candidate and a share of the events each: four ranges at a time, their z staged in
// shared memory. Pass 1 keeps the dots in the list; pass 2 decides and writes the list over what it has read.
template <int D>
__global__ void __launch_bounds__(kThreads, 2) choose_kernel(const __grid_constant__ ts_cuda_attention a, bool as_bf16) {
    extern __shared__ float4 memory[];
    float *const masses = (float *)memory; // [kAtOnce, kMassPitch]
    __shared__ alignas(16) float queries[D][kQueryPitch]; // mean queries, transposed: a thread reads all its events
    __shared__ double ends[kGroup], sums[kWarps][kGroup], thresholds[kGroup];
    __shared__ double lowest[2]; // keys below which no event selects a tile, and below which tiles do not count
    __shared__ unsigned largest[kGroup]; // bits of the largest element, which is positive, of each query
    __shared__ int counts[kWarps], n_chosen[kGroup];
    __shared__ int64_t ranges[kThreads], sums_only[kThreads]; // of slots, or ~range of events
    __shared__ const float *mass_of[kAtOnce];
    const int tid = threadIdx.x, j = blockIdx.y, n_kv = a.cache.n_kv_heads;
    const int share = tid % kShares, g0 = share * kEvents, place = tid / kShares;
    const unsigned alike = 0x11111111u << share; // lanes with the same share
    static_assert(kShares == 4, "what `alike` stands for");
    const int64_t in_wave = a.n_wave_groups - 1 - blockIdx.x; // the latest first: they have most candidates
    const event_group group = group_of(a, a.first_group + in_wave, j);
    const ts_sparsity &rules = a.cache.sparsity;
    if (tid < kGroup) {
        ends[tid] =
            tid < group.n_events ? a.tile_ends[j * a.pieces.n_closed + group.first_closed + group.first + tid] : 0.0;
        n_chosen[tid] = 0;
        largest[tid] = 0;
    }
    if (tid < 2)
        lowest[tid] = -INFINITY;
    __syncthreads();
#pragma unroll
    for (int i = tid; i < kGroup * D; i += kThreads) {
        const int g = i / D, e = i % D;
        float q = 0;
        if (g < group.n_events) {
            const int64_t piece = a.pieces.closed_pieces[group.first_closed + group.first + g];
            q = a.query_sums[(piece * n_kv + j) * D + e];
        }
        queries[e][g] = q;
        const unsigned of_warp = __reduce_max_sync(~0u, __float_as_uint(q));
        if (tid % 32 == 0)
            atomicMax(&largest[g], of_warp);
    }
    __syncthreads();
    const int64_t first = group.first + g0; // this thread's first event
    const int n_events = max(0, min(kEvents, group.n_events - g0));
    const int64_t list = (in_wave * n_kv + j) * a.list_stride;
    const int64_t n_held_ranges = (group.n_held + kRange - 1) / kRange, own = group.first / kRange;
    const int64_t held_at = ((int64_t)group.span * n_kv + j) * a.held_ranges_stride;
    const int64_t tiles_at = j * a.pieces.n_groups + a.pieces.group_begin[group.span];
    const ts_cuda_range *held_ranges = a.held_ranges + held_at, *tile_ranges = a.tile_ranges + tiles_at;

    int64_t n_kept = 0;
    double totals[kEvents] = {};
    // Dots with the masses at mass_of, NULL: none.
    const auto dots_at = [&](float (&dots)[kEvents]) {
        __syncthreads();
#pragma unroll
        for (int i = tid; i < kAtOnce * (D / 4); i += kThreads) {
            const float *mass = mass_of[i / (D / 4)];
            if (mass)
                ts::store4(masses + i / (D / 4) * kMassPitch<D> + i % (D / 4) * 4, ts::load4(mass + i % (D / 4) * 4));
        }
        __syncthreads();
        if (mass_of[place])
            dots_of<D>(masses + place * kMassPitch<D>, queries, g0, dots);
    };
    const auto score = [&](int n_ranges) {
        for (int r0 = 0; r0 < n_ranges; r0 += kAtOnce / kRange) {
            const int r = r0 + place / kRange;
            const bool there = r < n_ranges;
            const int64_t range = ranges[there ? r : 0], at = list + n_kept + r * kRange + place % kRange;
            const int64_t id = range >= 0 ? range * kRange + place % kRange : ~(~range * kRange + place % kRange);
            candidate c = {0, 0, 0, 0};
            if (there)
                c = candidate_of(a, group, j, id, first, n_events);
            const unsigned held = __ballot_sync(~0u, c.held != 0) >> (tid % 32 / kShares * kShares);
            __syncthreads(); // masses have been read
            if (share == 0) // any share's
                mass_of[place] = (held & (1u << kShares) - 1) == 0 ? NULL
                                 : id >= 0 ? a.cache.slot_mass + ts::page_of(a, group.sequence, j, id) * D
                                           : a.tile_masses + ((group.first_closed + ~id) * n_kv + j) * D;
            float dots[kEvents] = {};
            dots_at(dots);
#pragma unroll
            for (int g = 0; g < kEvents; g++)
                if (c.held >> g & 1u)
                    totals[g] += (double)ts::reach_of(ends[g0 + g] - c.end) * (double)dots[g];
            if (!there)
                continue;
            if (share == 0)
                a.list_at[at] = id;
#pragma unroll
            for (int g = 0; g < kEvents; g += 4)
                ts::store4(a.list_weights + at * kGroup + g0 + g,
                           make_float4(dots[g], dots[g + 1], dots[g + 2], dots[g + 3]));
        }
        n_kept += n_ranges * kRange;
    };
    // Sums so far, to `thresholds`.
    const auto total = [&]() {
#pragma unroll
        for (int g = 0; g < kEvents; g++) {
            double sum = totals[g];
#pragma unroll
            for (int step = kShares; step < 32; step *= 2)
                sum += __shfl_xor_sync(~0u, sum, step);
            if (tid % 32 < kShares)
                sums[tid / 32][g0 + g] = sum;
        }
        __syncthreads();
        if (tid < kGroup) {
            double sum = 0;
            for (int i = 0; i < kWarps; i++)
                sum += sums[i][tid];
            thresholds[tid] = sum;
        }
        __syncthreads();
    };

    // The newest ranges, whose sums bound the totals from below.
    const int n_newest = (int)min((int64_t)(kAtOnce / kRange), own + 1);
    if (tid < n_newest)
        ranges[tid] = ~(own - tid);
    __syncthreads();
    score(n_newest);
    total();
    if (tid < kGroup && rules.skip_share > 0) {
        const double n_candidates = (double)(n_held_ranges + own + 1) * kRange;
        // 1e-3: more than the rounding of the scores, which are sums of f32 products.
        double unit = log(thresholds[tid]) - ends[tid] - log((double)__uint_as_float(largest[tid])) - 1e-3;
        unit = tid >= group.n_events ? INFINITY : isnan(unit) ? -INFINITY : unit;
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            unit = fmin(unit, __shfl_xor_sync(~0u, unit, step));
        if (tid == 0) {
            lowest[0] = unit + log(rules.skip_share);
            lowest[1] = unit + fmin(log(rules.skip_share), log(0x1p-24 / n_candidates));
        }
    }
    __syncthreads();
    const double lowest_selected = lowest[0], lowest_counted = lowest[1];
    const int64_t first_recent = group.first_tile + group.first + 1 - rules.recent_tiles; // tile, at the first event
    const int64_t n_others = n_held_ranges + own + 1 - n_newest;
    for (int64_t i0 = 0; i0 < n_others; i0 += kThreads) {
        const int64_t i = i0 + tid;
        bool needed = false, counts_whole = false;
        int64_t range = 0;
        if (i < n_others) {
            const bool is_held = i < n_held_ranges;
            range = is_held ? i : ~(i - n_held_ranges);
            const ts_cuda_range bounds = is_held ? held_ranges[i] : tile_ranges[i - n_held_ranges];
            // Whether its decayed mass is that of the tiles held throughout the group (ranges_kernel).
            const bool is_whole = (is_held || ~range + 2 <= own) && bounds.first_death >= group.first + group.n_events;
            needed = bounds.newest >= first_recent ||
                     !(bounds.largest_key < (is_whole ? lowest_selected : lowest_counted));
            needed = needed && bounds.last_death > group.first;
            counts_whole = is_whole && !needed && !(bounds.largest_key < lowest_counted);
        }
        int n, n_whole;
        const int rank = ts::rank_in_block<kWarps>(needed, counts, &n);
        if (needed)
            ranges[rank] = range;
        const int rank_whole = ts::rank_in_block<kWarps>(counts_whole, counts, &n_whole);
        if (counts_whole)
            sums_only[rank_whole] = range;
        __syncthreads();
        score(n);
        for (int r0 = 0; r0 < n_whole; r0 += kAtOnce) {
            const bool there = r0 + place < n_whole;
            const int64_t whole = sums_only[there ? r0 + place : 0];
            const double end = there ? (whole >= 0 ? held_ranges + whole : tile_ranges + ~whole)->end : 0.0;
            __syncthreads(); // masses have been read
            if (share == 0)
                mass_of[place] = !there ? NULL
                                 : whole >= 0 ? a.held_range_masses + (held_at + whole) * D
                                              : a.tile_range_masses + (tiles_at + ~whole) * D;
            float dots[kEvents] = {};
            dots_at(dots);
#pragma unroll
            for (int g = 0; g < kEvents; g++)
                if (there && g < n_events)
                    totals[g] += (double)ts::reach_of(ends[g0 + g] - end) * (double)dots[g];
        }
    }
    total();
    if (tid < kGroup)
        thresholds[tid] *= rules.skip_share;
    __syncthreads();

    int n_listed = 0;
    for (int64_t k0 = 0; k0 < n_kept; k0 += kAtOnce) {
        candidate c = {0, 0, 0, 0};
        float dots[kEvents] = {}, reach[kEvents];
        if (k0 + place < n_kept) {
            const int64_t at = list + k0 + place;
            c = candidate_of(a, group, j, a.list_at[at], first, n_events);
#pragma unroll
            for (int g = 0; g < kEvents; g += 4) {
                const float4 x = ts::load4(a.list_weights + at * kGroup + g0 + g);
                dots[g] = x.x, dots[g + 1] = x.y, dots[g + 2] = x.z, dots[g + 3] = x.w;
            }
        }
        bool any = false;
#pragma unroll
        for (int g = 0; g < kEvents; g++) {
            const bool held = c.held >> g & 1u;
            reach[g] = held ? ts::reach_of(ends[g0 + g] - c.end) : 0.0f;
            const double score_of = (double)reach[g] * (double)dots[g];
            const bool selected = held && (group.first_tile + first + g + 1 - c.tile <= rules.recent_tiles ||
                                           c.tile < rules.sink_tiles || !(score_of < thresholds[g0 + g]));
            if (!selected)
                reach[g] = 0.0f;
            any = any || reach[g] > 0.0f;
            const unsigned votes = __ballot_sync(~0u, selected);
            if (tid % 32 < kShares && (votes & alike))
                atomicAdd(&n_chosen[g0 + g], __popc(votes & alike));
        }
        const bool listed = (__ballot_sync(~0u, any) >> (tid % 32 / kShares * kShares) & (1u << kShares) - 1) != 0;
        int n;
        const int rank = ts::rank_in_block<kWarps>(listed && share == 0, counts, &n); // all have read the list
        const int64_t at = list + n_listed + __shfl_sync(~0u, rank, tid % 32 / kShares * kShares);
        if (listed) {
            if (any)
                a.list_at[at] = c.at;
            if (as_bf16)
                ts::store_packed((ts::bf16 *)(a.list_weights + at * kGroup) + g0, reach);
            else
#pragma unroll
                for (int g = 0; g < kEvents; g += 4)
                    ts::store4(a.list_weights + at * kGroup + g0 + g,
                               make_float4(reach[g], reach[g + 1], reach[g + 2], reach[g + 3]));
        }
        n_listed += n;
    }
    __syncthreads();
    if (tid == 0) {
        const ts_span span = a.spans[group.span];
        const int64_t T = a.cache.tile_size, row = span.row - span.position + (group.first_tile + group.first + 1) * T;
        const int64_t n_rows = min(span.row + span.n_tokens - row, kGroup * T);
        a.lists[in_wave * n_kv + j] = {
            group.first_closed + group.first, row, (int)n_rows, n_listed, group.n_events, group.sequence};
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

template <int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    (void)cudaFuncSetAttribute(choose_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMassBytes<D>);
    choose_kernel<D><<<dim3((unsigned)a->n_wave_groups, (unsigned)a->cache.n_kv_heads), kThreads, kMassBytes<D>,
                       stream>>>(*a, ts_cuda_attention_sums_bf16(a));
}

} // namespace

ts_status ts_cuda_tile_choose(cudaStream_t stream, const ts_cuda_attention *a) {
    a->cache.head_dim == 64 ? launch<64>(stream, a) : launch<128>(stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: choice of tiles");
}
