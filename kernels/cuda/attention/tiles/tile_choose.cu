// Rule 3 for every event of a batch, in groups of neighbouring events of a span, since those hold and select mostly the
// same tiles. A call works on one wave of groups, whose lists fit the workspace.
//
// One block a group and KV head: scores of the tiles held at any event of the group, and the weights of those that any
// event selects, in a list. Candidates come in ranges of 32. A tile's score is at most e^E max(q) sum(z), which its key
// holds already, so the tiles of a range are not scored one by one where the largest key shows that no event can select
// any. Such a range counts in the sum of scores by its tiles' decayed mass or, where all ranges alike would together
// add less than 2^-24, not at all. Scores decide, so they are to have f32's precision: on the matrix units, z and mean
// queries as sums of three BF16 numbers each. Bound by latency.
#include "kernels/cuda/attention/attention.cuh"
#include "kernels/cuda/primitives/warp_matrix.cuh"

namespace {

constexpr int kGroup = TS_CUDA_GROUP, kRange = TS_CUDA_GROUP;
constexpr int kEvents = 8, kShares = kGroup / kEvents; // events of a thread, and threads of a candidate
constexpr int kOfWarp = 32 / kShares;                  // candidates of a warp
constexpr int kNewest = 4;                             // ranges scored first
constexpr int kParts = 3;                              // BF16 numbers that add up to one of f32
constexpr int kScorePitch = kGroup + 4;                // floats: keeps rows aligned to 16 bytes and apart in banks
template <int D> constexpr int kQueryPitch = D + 8;

// Which block size a call gets depends on the batch, but no bit of a selection may (I3). So every size looks at kFewest
// ranges at a time and adds up as the smallest block does, whose threads each add their candidates one after the other:
// in a larger block the first kFewest threads add what the others hand them, in that order.
constexpr int kFewest = 256;

// Of a block of kThreads.
template <int kThreads_> struct block_shape {
    static constexpr int kThreads = kThreads_, kWarps = kThreads / 32, kAtOnce = kThreads / kShares; // candidates
    static constexpr int kHanded = (kThreads - kFewest) * kEvents; // terms handed over at a time
    static_assert(kThreads == kFewest || kThreads == 2 * kFewest, "one thread hands its terms to another, or none");
    template <int D>
    static constexpr int
        kSharedBytes = kAtOnce *kScorePitch *(int)sizeof(float) +
                       kParts *kGroup *kQueryPitch<D> *(int)sizeof(ts::bf16) + kHanded *(int)sizeof(double);
};

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
    out.held_at = ts::held_at(a, low, j);
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
        death = ts::death_at(a.held_deaths, group.held_at + id);
        if (death > first) {
            out.at = ts::page_of(a, group.sequence, j, id);
            out.tile = a.cache.slot_tile[out.at];
            out.end = a.cache.slot_decay_end[out.at];
        }
    } else {
        born = ~id;
        if (n == 0 || born >= first + n) // with n, tiles up to there complete
            return out;
        const int64_t closed = group.first_closed + born, by_head = j * a.pieces.n_closed + closed;
        death = ts::death_at(a.tile_deaths, by_head);
        // As tile_place says, but without asking for n_held again.
        out.at = a.all_in_slots ? ts::page_of(a, group.sequence, j, group.n_held + born)
                                : ts::tile_place(a, group.span, group.sequence, closed, j);
        out.tile = group.first_tile + born;
        out.end = a.tile_ends[by_head];
    }
    const int64_t begin = max((int64_t)0, born - first), end = min((int64_t)n, death - first);
    if (begin < end)
        out.held = (1u << end) - (1u << begin);
    return out;
}

// log(x) within 1e-4 of it, or -infinity: one warp works it out while all others wait.
__device__ __forceinline__ double about_log(double x) {
    if (!(x >= DBL_MIN))
        return -INFINITY;
    const int64_t bits = __double_as_longlong(x), fraction = (1ll << 52) - 1;
    const double mantissa = __longlong_as_double((bits & fraction) | __double_as_longlong(1.0));
    return 0.6931471805599453 * ((double)((int)(bits >> 52) - 1023) + (double)__log2f((float)mantissa));
}

// dots: mass of this thread's events on its candidate, whose z is at `mass`; NULL: none, and dots are any numbers. By
// the warp for its kOfWarp candidates, which no other warp waits for. scores: [kOfWarp, kScorePitch] of the warp.
template <int D>
__device__ __forceinline__ void dots_with(const float *mass, const float *any, const ts::bf16 *queries, float *scores,
                                          float (&dots)[kEvents]) {
    constexpr int kAhead = 4; // steps whose loads are under way together
    if (!__any_sync(~0u, mass != NULL))
        return;
    const int lane = threadIdx.x % 32;
    const float *z = (mass ? mass : any) + lane % 4 * 2;
    float sums[kGroup / 16][4] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < D; k0 += 16 * kAhead) {
        float2 x[kAhead][2];
#pragma unroll
        for (int k = 0; k < kAhead; k++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                x[k][i] = *(const float2 *)(z + k0 + 16 * k + 8 * i);
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            uint32_t parts[kParts][2];
#pragma unroll
            for (int part = 0; part < kParts; part++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    parts[part][i] = ts::pack(x[k][i].x, x[k][i].y);
                    x[k][i].x -= ts::low_of(parts[part][i]);
                    x[k][i].y -= ts::high_of(parts[part][i]);
                }
#pragma unroll
                for (int m = 0; m < kGroup / 16; m++) {
                    uint32_t q[4];
                    ts::load_a(q, queries + (kParts - 1 - part) * kGroup * kQueryPitch<D>, kQueryPitch<D>, 16 * m,
                               k0 + 16 * k);
#pragma unroll
                    for (int of_z = 0; of_z <= part; of_z++) // with what the queries' part may still change
                        ts::multiply_add(sums[m], q, parts[of_z][0], parts[of_z][1]);
                }
            }
        }
    }
    float *to = scores + lane % 4 * 2 * kScorePitch + lane / 4;
    __syncwarp(); // the scores before have been read
#pragma unroll
    for (int m = 0; m < kGroup / 16; m++) {
        to[16 * m] = sums[m][0];
        to[16 * m + kScorePitch] = sums[m][1];
        to[16 * m + 8] = sums[m][2];
        to[16 * m + 8 + kScorePitch] = sums[m][3];
    }
    __syncwarp();
    const float *from = scores + lane / kShares * kScorePitch + lane % kShares * kEvents;
    const float4 low = ts::load4(from), high = ts::load4(from + 4);
    dots[0] = low.x, dots[1] = low.y, dots[2] = low.z, dots[3] = low.w;
    dots[4] = high.x, dots[5] = high.y, dots[6] = high.z, dots[7] = high.w;
}

// Neighbouring threads have one candidate and a share of the events each: kAtOnce candidates at a time. Pass 1 keeps
// the dots in the list; pass 2 decides and writes the list over what it has read.
template <int D, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1024 / Shape::kThreads)
    choose_kernel(const __grid_constant__ ts_cuda_attention a, bool as_bf16) {
    ts::follow_front();
    constexpr int kThreads = Shape::kThreads, kWarps = Shape::kWarps, kAtOnce = Shape::kAtOnce;
    extern __shared__ float4 memory[];
    float *const scores = (float *)memory;
    ts::bf16 *const queries =
        (ts::bf16 *)(scores + kAtOnce * kScorePitch); // [kParts, kGroup, kQueryPitch] mean queries
    double *const handed = (double *)(queries + kParts * kGroup * kQueryPitch<D>); // [kEvents, kThreads - kFewest]
    __shared__ double ends[kGroup], sums[kWarps][kGroup], thresholds[kGroup];
    __shared__ double lowest[2];         // keys below which no event selects a tile, and below which tiles do not count
    __shared__ unsigned largest[kGroup]; // bits of the largest element, which is positive, of each query
    __shared__ int counts[kWarps];
    __shared__ int64_t ranges[kFewest], sums_only[kFewest]; // of slots, or ~range of events
    const int tid = threadIdx.x, j = blockIdx.x, n_kv = a.cache.n_kv_heads;
    const int share = tid % kShares, g0 = share * kEvents, place = tid / kShares;
    const int64_t in_wave = a.n_wave_groups - 1 - blockIdx.y; // the latest first: they have most candidates
    const event_group group = group_of(a, a.first_group + in_wave, j);
    const ts_sparsity &rules = a.cache.sparsity;
    if (tid < kGroup) {
        ends[tid] =
            tid < group.n_events ? a.tile_ends[j * a.pieces.n_closed + group.first_closed + group.first + tid] : 0.0;
        largest[tid] = 0;
    }
    if (tid < 2)
        lowest[tid] = -INFINITY;
    __syncthreads();
    constexpr int kLoads = kGroup * D / kThreads;
    const int64_t first_piece = a.pieces.closed_pieces[group.first_closed + group.first]; // each event's follows
    float loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int g = (tid + i * kThreads) / D, e = tid % D;
        loaded[i] = g < group.n_events ? a.query_sums[((first_piece + g) * n_kv + j) * D + e] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int g = (tid + i * kThreads) / D, e = tid % D;
        const float q = loaded[i];
        float left = q;
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            const ts::bf16 x = __float2bfloat16_rn(left);
            queries[(part * kGroup + g) * kQueryPitch<D> + e] = x;
            left -= __bfloat162float(x);
        }
        const unsigned of_warp = __reduce_max_sync(~0u, __float_as_uint(q));
        if (tid % 32 == 0)
            atomicMax(&largest[g], of_warp);
    }
    __syncthreads();
    const int64_t first = group.first + g0; // this thread's first event
    const int n_events = max(0, min(kEvents, group.n_events - g0));
    const int64_t list = (in_wave * n_kv + j) * a.list_stride;
    const int64_t n_held_ranges = (group.n_held + kRange - 1) / kRange, own = group.first / kRange;
    const int64_t held_ranges_at = ts::held_ranges_at(a, group.span, j);
    const int64_t tiles_at = j * a.pieces.n_groups + a.pieces.group_begin[group.span];
    const ts_cuda_range *held_ranges = a.held_ranges + held_ranges_at, *tile_ranges = a.tile_ranges + tiles_at;

    int64_t n_kept = 0;
    double totals[kEvents] = {};
    float *const of_warp = scores + tid / 32 * kOfWarp * kScorePitch;
    // Adds this thread's terms, those of the events in `which`, to the totals.
    const auto add = [&](unsigned which, double end, const float(&dots)[kEvents]) {
        const auto term = [&](int g) { return (double)ts::reach_of(ends[g0 + g] - end) * (double)dots[g]; };
        if constexpr (kThreads == kFewest) {
#pragma unroll
            for (int g = 0; g < kEvents; g++) { // without branches
                const double x = term(g);
                totals[g] += which >> g & 1u ? x : 0.0;
            }
        } else {
            if (tid >= kFewest)
#pragma unroll
                for (int g = 0; g < kEvents; g++)
                    handed[g * kFewest + tid - kFewest] = which >> g & 1u ? term(g) : 0.0;
            __syncthreads();
            if (tid < kFewest)
#pragma unroll
                for (int g = 0; g < kEvents; g++) {
                    if (which >> g & 1u)
                        totals[g] += term(g);
                    totals[g] += handed[g * kFewest + tid];
                }
            __syncthreads();
        }
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
            const bool is_held = (held & (1u << kShares) - 1) != 0; // at any event
            float dots[kEvents] = {};
            dots_with<D>(!is_held  ? NULL
                         : id >= 0 ? a.cache.slot_mass + ts::page_of(a, group.sequence, j, id) * D
                                   : a.tile_masses + ((group.first_closed + ~id) * n_kv + j) * D,
                         a.tile_masses, queries, of_warp, dots);
            add(c.held, c.end, dots);
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
        double x[kEvents];
#pragma unroll
        for (int g = 0; g < kEvents; g++)
            x[g] = totals[g];
        int event = g0; // the one whose sum over the warp this lane ends with
#pragma unroll
        for (int step = kShares, n = kEvents / 2; step < 32; step *= 2, n /= 2) {
            const bool upper = tid & step;
            event += upper ? n : 0;
#pragma unroll
            for (int g = 0; g < n; g++) { // each of two lanes adds up one half
                const double given = upper ? x[g] : x[g + n];
                x[g] = (upper ? x[g + n] : x[g]) + __shfl_xor_sync(~0u, given, step);
            }
        }
        sums[tid / 32][event] = x[0];
        __syncthreads();
        if (tid < kGroup) {
            double sum = 0;
            for (int i = 0; i < kWarps; i++)
                sum += sums[i][tid];
            thresholds[tid] = sum;
        }
        __syncthreads();
    };

    // First the newest ranges, whose sums bound the totals from below; then, of the others, those that this leaves.
    const int n_newest = (int)min((int64_t)kNewest, own + 1);
    const int64_t first_recent = group.first_tile + group.first + 1 - rules.recent_tiles; // tile, at the first event
    const int64_t n_others = n_held_ranges + own + 1 - n_newest;
    for (int64_t i0 = -kFewest; i0 < n_others; i0 += kFewest) {
        const bool are_newest = i0 < 0;
        const int64_t i = i0 + tid;
        bool needed = are_newest && tid < n_newest, counts_whole = false;
        int64_t range = ~(own - tid);
        if (!are_newest && tid < kFewest && i < n_others) {
            const double lowest_selected = lowest[0], lowest_counted = lowest[1];
            const bool is_held = i < n_held_ranges;
            range = is_held ? i : ~(i - n_held_ranges);
            const ts_cuda_range bounds = is_held ? held_ranges[i] : tile_ranges[i - n_held_ranges];
            // Whether its decayed mass is that of the tiles held throughout the group (ranges_kernel).
            const bool is_whole = (is_held || ~range + 2 <= own) && bounds.first_death >= group.first + group.n_events;
            needed =
                bounds.newest >= first_recent || !(bounds.largest_key < (is_whole ? lowest_selected : lowest_counted));
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
            float dots[kEvents] = {};
            dots_with<D>(!there       ? NULL
                         : whole >= 0 ? a.held_range_masses + (held_ranges_at + whole) * D
                                      : a.tile_range_masses + (tiles_at + ~whole) * D,
                         a.tile_masses, queries, of_warp, dots);
            add(there ? (1u << n_events) - 1 : 0, end, dots);
        }
        if (!are_newest)
            continue;
        total();
        if (tid < kGroup && rules.skip_share > 0) {
            const double n_candidates = (double)(n_held_ranges + own + 1) * kRange;
            // 1e-3: more than the rounding of logarithms and of the scores, which are sums of f32 products.
            double unit = about_log(thresholds[tid]) - ends[tid] - about_log(__uint_as_float(largest[tid])) - 1e-3;
            unit = tid >= group.n_events ? INFINITY : isnan(unit) ? -INFINITY : unit;
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                unit = fmin(unit, __shfl_xor_sync(~0u, unit, step));
            if (tid == 0) {
                lowest[0] = unit + about_log(rules.skip_share);
                lowest[1] = unit + fmin(about_log(rules.skip_share), about_log(0x1p-24 / n_candidates));
            }
        }
        __syncthreads();
    }
    total();
    if (tid < kGroup)
        thresholds[tid] *= rules.skip_share;
    __syncthreads();

    int n_listed = 0, n_selected = 0; // n_selected: by this thread, of all events
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
            const float reach_of = ts::reach_of(ends[g0 + g] - c.end);
            reach[g] = held ? reach_of : 0.0f;
            const double score_of = (double)reach[g] * (double)dots[g];
            const bool selected = held && (group.first_tile + first + g + 1 - c.tile <= rules.recent_tiles ||
                                           c.tile < rules.sink_tiles || !(score_of < thresholds[g0 + g]));
            if (!selected)
                reach[g] = 0.0f;
            any = any || reach[g] > 0.0f;
            n_selected += selected;
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
    const int n_all = ts::block_sum(n_selected, counts);
    if (tid == 0) {
        const ts_span span = a.spans[group.span];
        const int64_t T = a.cache.tile_size, row = span.row - span.position + (group.first_tile + group.first + 1) * T;
        const int64_t n_rows = min(span.row + span.n_tokens - row, kGroup * T);
        a.lists[in_wave * n_kv + j] = {
            group.first_closed + group.first, row, (int)n_rows, n_listed, group.n_events, group.sequence};
        const unsigned long long n = (unsigned long long)group.n_events;
        const unsigned long long available = n * (unsigned long long)(group.first_tile + group.first) + n * (n + 1) / 2;
        ts::raise_flag(a.listed + (a.first_group + in_wave) * n_kv + j);
        // Integers: the order in which blocks add does not matter.
        unsigned long long *pairs = (unsigned long long *)a.cache.pairs + 2 * ts::head_of(a, group.sequence, j);
        atomicAdd(pairs, available);
        atomicAdd(pairs + 1, (unsigned long long)n_all);
    }
}

template <int D, int kThreads> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    using Shape = block_shape<kThreads>;
    constexpr int kBytes = Shape::template kSharedBytes<D>;
    (void)cudaFuncSetAttribute(choose_kernel<D, Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    ts::launch_pass(stream, a, choose_kernel<D, Shape>, dim3((unsigned)a->cache.n_kv_heads, (unsigned)a->n_wave_groups),
                    kThreads, kBytes, ts_cuda_attention_sums_bf16(a));
}

// Small blocks wait less for each other; where groups are few, large ones end sooner.
template <int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    constexpr int64_t kMany = 512; // blocks that the device has room for, about
    if (a->n_wave_groups * a->cache.n_kv_heads >= kMany)
        launch<D, 256>(stream, a);
    else
        launch<D, 512>(stream, a);
}

} // namespace

ts_status ts_cuda_tile_choose(cudaStream_t stream, const ts_cuda_attention *a) {
    a->cache.head_dim == 64 ? launch<64>(stream, a) : launch<128>(stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: choice of tiles");
}
