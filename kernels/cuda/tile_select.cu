// Rule 3 and eq. (8) for every event of a batch, in groups of neighbouring events of a span, since those hold and
// select mostly the same tiles. A call works on one wave of groups, whose lists fit the workspace.
//
// choose_kernel, one block a group and KV head: scores of the tiles held at any event of the group, and the weights of
// those that any event selects, in a list. Candidates come in ranges of 32. A tile's score is at most e^E max(q)
// sum(z), which its key holds already, so the tiles of a range are not scored one by one where the largest key shows
// that no event can select any. Such a range counts in the sum of scores by its tiles' decayed mass or, where all
// ranges alike would together add less than 2^-24, not at all. Bound by latency and f32 arithmetic.
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
constexpr int kGroup = TS_CUDA_GROUP, kRange = TS_CUDA_GROUP;
constexpr int kHalf = kGroup / 2; // events of a thread

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

// A candidate: where it lies, and at which of `n` events from `first` on it is held.
struct candidate {
    int64_t at, tile; // at: page, or ~index of a tile of the batch
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
        if (n == 0 || born >= first + n)
            return out;
        const int64_t closed = group.first_closed + born, by_head = j * a.pieces.n_closed + closed;
        death = a.tile_deaths[by_head];
        out.at = ~closed;
        out.tile = group.first_tile + born;
        out.end = a.tile_ends[by_head];
    }
    for (int g = 0; g < n; g++)
        out.held |= (born <= first + g && first + g < death ? 1u : 0u) << g;
    return out;
}

// Mass of queries[., g0 .. g0 + kHalf) on a tile.
template <int D>
__device__ __forceinline__ void dots_of(const float *mass, const float (*queries)[kGroup], int g0,
                                        float (&dots)[kHalf]) {
    constexpr int kAhead = 8; // loads under way together
    for (int e0 = 0; e0 < D; e0 += 4 * kAhead) {
        float4 z[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; k++)
            z[k] = ts::load4(mass + e0 + 4 * k);
#pragma unroll
        for (int k = 0; k < 4 * kAhead; k++) {
            const float x = k % 4 == 0 ? z[k / 4].x : k % 4 == 1 ? z[k / 4].y : k % 4 == 2 ? z[k / 4].z : z[k / 4].w;
#pragma unroll
            for (int g = 0; g < kHalf; g += 4) {
                const float4 q = ts::load4(&queries[e0 + k][g0 + g]);
                dots[g] += x * q.x, dots[g + 1] += x * q.y, dots[g + 2] += x * q.z, dots[g + 3] += x * q.w;
            }
        }
    }
}

// A thread has one candidate and half of the events: four ranges at a time. Pass 1 keeps the dots in the list; pass 2
// decides and writes the list over what it has read.
template <int D>
__global__ void __launch_bounds__(kThreads, 2) choose_kernel(const __grid_constant__ ts_cuda_attention a) {
    constexpr int kAtOnce = kThreads / 2;
    __shared__ float queries[D][kGroup]; // mean queries, transposed: a thread reads all events of one element
    __shared__ double ends[kGroup], sums[kWarps][kHalf], thresholds[kGroup], floors[2][kGroup];
    __shared__ int counts[kWarps], n_chosen[kGroup], ranks[kAtOnce];
    __shared__ int64_t ranges[kThreads], sums_only[kThreads]; // of slots, or ~range of events
    __shared__ unsigned char reaches[kThreads];
    const int tid = threadIdx.x, j = blockIdx.y, n_kv = a.cache.n_kv_heads;
    const int half = tid / kAtOnce, g0 = half * kHalf, place = tid % kAtOnce;
    const int64_t in_wave = a.n_wave_groups - 1 - blockIdx.x; // the latest first: they have most candidates
    const event_group group = group_of(a, a.first_group + in_wave, j);
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
        floors[0][tid] = floors[1][tid] = -INFINITY;
    }
    __syncthreads();
    const int64_t first = group.first + g0; // this thread's first event
    const int n_events = max(0, min(kHalf, group.n_events - g0));
    const int64_t list = (in_wave * n_kv + j) * a.list_stride;
    const int64_t n_held_ranges = (group.n_held + kRange - 1) / kRange, own = group.first / kRange;
    const ts_cuda_range *held_ranges = a.held_ranges + ((int64_t)group.span * n_kv + j) * a.held_ranges_stride;
    const ts_cuda_range *tile_ranges = a.tile_ranges + j * a.pieces.n_groups + a.pieces.group_begin[group.span];

    const float *held_masses = a.held_range_masses + ((int64_t)group.span * n_kv + j) * a.held_ranges_stride * D;
    const float *tile_masses = a.tile_range_masses + (j * a.pieces.n_groups + a.pieces.group_begin[group.span]) * D;

    int64_t n_kept = 0;
    double totals[kHalf] = {};
    const auto score = [&](int n_ranges) {
        for (int r0 = 0; r0 < n_ranges; r0 += kAtOnce / kRange) {
            const int r = r0 + place / kRange;
            if (r >= n_ranges)
                continue;
            const int64_t range = ranges[r], at = list + n_kept + r * kRange + place % kRange;
            const int64_t id = range >= 0 ? range * kRange + place % kRange : ~(~range * kRange + place % kRange);
            const candidate c = candidate_of(a, group, j, id, first, n_events);
            float dots[kHalf] = {};
            if (c.held)
                dots_of<D>(c.at >= 0 ? a.cache.slot_mass + c.at * D : a.tile_masses + (~c.at * n_kv + j) * D, queries,
                           g0, dots);
#pragma unroll
            for (int g = 0; g < kHalf; g++)
                if (c.held >> g & 1u)
                    totals[g] += (double)ts::reach_of(ends[g0 + g] - c.end) * (double)dots[g];
            if (half == 0)
                a.list_at[at] = id;
#pragma unroll
            for (int g = 0; g < kHalf; g += 4)
                ts::store4(a.list_weights + at * kGroup + g0 + g,
                           make_float4(dots[g], dots[g + 1], dots[g + 2], dots[g + 3]));
        }
        n_kept += n_ranges * kRange;
    };
    // Sums so far, to `thresholds`.
    const auto total = [&]() {
#pragma unroll
        for (int g = 0; g < kHalf; g++) {
            const double sum = ts::warp_sum(totals[g]);
            if (tid % 32 == 0)
                sums[tid / 32][g] = sum;
        }
        __syncthreads();
        if (tid < kGroup) {
            double sum = 0;
            for (int i = 0; i < kWarps / 2; i++)
                sum += sums[tid / kHalf * (kWarps / 2) + i][tid % kHalf];
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
    if (tid < group.n_events && rules.skip_share > 0) {
        float largest = 0;
        for (int e = 0; e < D; e++)
            largest = fmaxf(largest, queries[e][tid]);
        const double n_candidates = (double)(n_held_ranges + own + 1) * kRange;
        // 1e-3: more than the rounding of the scores, which are sums of f32 products.
        const double unit = log(thresholds[tid]) - ends[tid] - log((double)largest) - 1e-3;
        floors[0][tid] = unit + log(rules.skip_share);
        floors[1][tid] = unit + fmin(log(rules.skip_share), log(0x1p-24 / n_candidates));
    }
    __syncthreads();
    // Keys below which no event selects a tile, and below which tiles do not count; NaN: none is.
    double lowest_selected = INFINITY, lowest_counted = INFINITY;
    for (int g = 0; g < group.n_events; g++) {
        lowest_selected = floors[0][g] >= lowest_selected ? lowest_selected : floors[0][g];
        lowest_counted = floors[1][g] >= lowest_counted ? lowest_counted : floors[1][g];
    }
    const int64_t first_recent = group.first + 1 - rules.recent_tiles; // event whose tile is recent at the first event
    const int64_t n_others = n_held_ranges + own + 1 - n_newest;
    for (int64_t i0 = 0; i0 < n_others; i0 += kThreads) {
        const int64_t i = i0 + tid;
        bool needed = false, counts_whole = false;
        int64_t range = 0;
        if (i < n_others) {
            const bool is_held = i < n_held_ranges;
            range = is_held ? i : ~(i - n_held_ranges);
            const ts_cuda_range bounds = is_held ? held_ranges[i] : tile_ranges[i - n_held_ranges];
            const bool has_recent = is_held ? first_recent < 0 : (~range + 1) * kRange > first_recent;
            // Whether its decayed mass is that of the tiles held throughout the group (ranges_kernel).
            const bool is_whole = (is_held || ~range + 2 <= own) && bounds.first_death >= group.first + group.n_events;
            needed = has_recent || !(bounds.largest_key < (is_whole ? lowest_selected : lowest_counted));
            needed = needed && bounds.last_death > group.first;
            counts_whole = is_whole && !needed && !(bounds.largest_key < lowest_counted);
        }
        int n, n_whole;
        const int rank = ts::rank_in_block<kThreads / 32>(needed, counts, &n);
        if (needed)
            ranges[rank] = range;
        const int rank_whole = ts::rank_in_block<kThreads / 32>(counts_whole, counts, &n_whole);
        if (counts_whole)
            sums_only[rank_whole] = range;
        __syncthreads();
        score(n);
        for (int r = place; r < n_whole; r += kAtOnce) {
            const int64_t whole = sums_only[r];
            const ts_cuda_range *bounds = whole >= 0 ? held_ranges + whole : tile_ranges + ~whole;
            float dots[kHalf] = {};
            dots_of<D>(whole >= 0 ? held_masses + whole * D : tile_masses + ~whole * D, queries, g0, dots);
#pragma unroll
            for (int g = 0; g < kHalf; g++)
                if (g < n_events)
                    totals[g] += (double)ts::reach_of(ends[g0 + g] - bounds->end) * (double)dots[g];
        }
    }
    total();
    if (tid < kGroup)
        thresholds[tid] *= rules.skip_share;
    __syncthreads();

    int n_listed = 0;
    for (int64_t k0 = 0; k0 < n_kept; k0 += kAtOnce) {
        candidate c = {0, 0, 0, 0};
        float dots[kHalf] = {}, reach[kHalf];
        if (k0 + place < n_kept) {
            const int64_t at = list + k0 + place;
            c = candidate_of(a, group, j, a.list_at[at], first, n_events);
#pragma unroll
            for (int g = 0; g < kHalf; g += 4) {
                const float4 x = ts::load4(a.list_weights + at * kGroup + g0 + g);
                dots[g] = x.x, dots[g + 1] = x.y, dots[g + 2] = x.z, dots[g + 3] = x.w;
            }
        }
        bool any = false;
#pragma unroll
        for (int g = 0; g < kHalf; g++) {
            const bool held = c.held >> g & 1u;
            reach[g] = held ? ts::reach_of(ends[g0 + g] - c.end) : 0.0f;
            const double score_of = (double)reach[g] * (double)dots[g];
            const bool selected = held && (group.first_tile + first + g + 1 - c.tile <= rules.recent_tiles ||
                                           c.tile < rules.sink_tiles || !(score_of < thresholds[g0 + g]));
            if (!selected)
                reach[g] = 0.0f;
            any = any || reach[g] > 0.0f;
            const unsigned votes = __ballot_sync(~0u, selected);
            if (tid % 32 == 0 && votes)
                atomicAdd(&n_chosen[g0 + g], __popc(votes));
        }
        reaches[tid] = any;
        __syncthreads();
        const bool listed = reaches[place] || reaches[place + kAtOnce];
        int n;
        const int rank = ts::rank_in_block<kThreads / 32>(listed && half == 0, counts, &n);
        if (half == 0)
            ranks[place] = n_listed + rank;
        __syncthreads();
        if (listed) {
            const int64_t at = list + ranks[place];
            if (any)
                a.list_at[at] = c.at;
#pragma unroll
            for (int g = 0; g < kHalf; g += 4)
                ts::store4(a.list_weights + at * kGroup + g0 + g,
                           make_float4(reach[g], reach[g + 1], reach[g + 2], reach[g + 3]));
        }
        n_listed += n;
    }
    __syncthreads();
    if (tid == 0) {
        a.lists[in_wave * n_kv + j] = {group.first_closed + group.first, n_listed, group.n_events};
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
            const int64_t at = places[k], in_batch = ~at * n_kv + j;
            const float4 x = at >= 0 ? ts::state4<S, D>(a.cache.slot_state, a.cache.slot_scale, at, column)
                                     : ts::state4<S, D>(a.stored_states, a.stored_scales, in_batch, column);
#pragma unroll
            for (int g = 0; g < kHalf; g++) {
                const float w = weights[k][g];
                acc[g][0] += w * x.x, acc[g][1] += w * x.y, acc[g][2] += w * x.z, acc[g][3] += w * x.w;
            }
            if (sums_mass) {
                const float z = at >= 0 ? a.cache.slot_mass[at * D + tid] : a.tile_masses[in_batch * D + tid];
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
            ts::bf16 *to = states + step % kStages * kTiles * kWidePitch;
            if (step < n_steps)
#pragma unroll
                for (int i = tid; i < kTiles * (kWide / 8); i += kThreads) {
                    const int k = i / (kWide / 8), e = i % (kWide / 8) * 8;
                    const int64_t at = places[step * kTiles + k];
                    fetch8<S, D>(to + k * kWidePitch + e, at >= 0 ? a.cache.slot_state : a.stored_states,
                                 at >= 0 ? a.cache.slot_scale : a.stored_scales, at >= 0 ? at : ~at, column + e);
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
        choose_kernel<D><<<dim3(n_groups, n_kv), kThreads, 0, stream>>>(*a);
        if constexpr (std::is_same<A, ts::bf16>::value && !std::is_same<S, float>::value) {
            (void)cudaFuncSetAttribute(matrix_sum_kernel<S, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kMatrixBytes);
            matrix_sum_kernel<S, D><<<dim3(D * D / kWide, n_groups, n_kv), kThreads, kMatrixBytes, stream>>>(*a);
        } else {
            sum_kernel<A, S, D><<<dim3(2 * D * D / (4 * kThreads), n_groups, n_kv), kThreads, 0, stream>>>(*a);
        }
    } else if constexpr (std::is_same<A, float>::value) {
        recur_kernel<D><<<dim3(D * D / (4 * kThreads), n_kv, (unsigned)a->pieces.n_spans), kThreads, 0, stream>>>(*a);
    }
}

} // namespace

ts_status ts_cuda_tile_select(cudaStream_t stream, const ts_cuda_attention *a) {
    if (a->pieces.n_closed == 0)
        return TS_OK;
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: selected states");
}
