// A decode step whose token completes its tile, in sparse form: eqs. (6) to (8) and rules 1 to 4, after the decode
// kernel has appended the token. One block a sequence and KV head; it returns at once where no tile completes, so that
// the launch depends on the number of sequences alone and can be part of a graph.
//
// The tile is stored first, in place of the one that it drives out: a tile becomes old at a time, so at most one
// leaves. What is selected is then found among the slots alone, in their order. A thread scores a tile; the threads
// together add up the selected states, each its share of the elements. Bound by reading z of the tiles held and the
// states of those selected. A tile is not scored where its key shows that it cannot be selected nor change the sum of
// scores (tile_choose.cu has the same bound for prefill).
#include "kernels/cuda/attention/tiles/tile_state.cuh"

namespace {

using ts::kThreads;

constexpr int kWarps = kThreads / 32;
constexpr int kKept = 2048; // slots whose scores are kept from pass to pass; those beyond are scored again

template <int D> struct closing {
    double sums[kWarps];
    alignas(16) float query[D]; // read four at a time
    float reach[128];
    float dots[kKept];
    float weights[kThreads];
    int64_t pages[kThreads];
    int counts[kWarps];
};

struct old_tile {
    double key;
    int64_t tile;
    int slot; // -1: none
};

__device__ bool is_worse(const old_tile &x, const old_tile &y) {
    return y.slot < 0 || (x.slot >= 0 && (x.key < y.key || (x.key == y.key && x.tile < y.tile)));
}

// The slot that a tile leaves as tile `t`, with the key given, completes: n_held stands for `t` itself, -1 for none.
// A tile that becomes old now leaves where rule 1 has pruned it; else the worst of its lane does where that is full.
__device__ int dropped_slot(const ts_cuda_attention &a, int32_t sequence, int j, int64_t t, double key, int n_held) {
    __shared__ old_tile worst_of[kWarps];
    __shared__ int joined;
    __shared__ double totals[kWarps];
    const ts_sparsity &rules = a.cache.sparsity;
    const int64_t joiner = t - rules.recent_tiles;
    const int tid = threadIdx.x;
    if (joiner < rules.sink_tiles || joiner < 0)
        return -1;
    const bool is_pruned = a.cache.pruned[sequence][joiner];
    if (!is_pruned && rules.cache_tiles == 0)
        return -1;
    if (tid == 0)
        joined = -1;
    __syncthreads();
    old_tile worst = {0, 0, -1};
    int n_old = 0;
    for (int i = tid; i <= n_held; i += kThreads) {
        const int64_t page = i < n_held ? ts::page_of(a, sequence, j, i) : 0;
        const int64_t tile = i < n_held ? a.cache.slot_tile[page] : t;
        if (tile == joiner)
            joined = i;
        if (is_pruned || tile > joiner || tile < rules.sink_tiles || (joiner - tile) % rules.cache_lanes != 0)
            continue;
        const old_tile mine = {i < n_held ? a.cache.slot_key[page] : key, tile, i};
        n_old++;
        if (is_worse(mine, worst))
            worst = mine;
    }
    const double all_old = ts::block_sum((double)n_old, totals);
    if (is_pruned)
        return joined;
    if (all_old <= (double)(rules.cache_tiles / rules.cache_lanes))
        return -1;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const old_tile other = {__shfl_xor_sync(~0u, worst.key, step), __shfl_xor_sync(~0u, worst.tile, step),
                                __shfl_xor_sync(~0u, worst.slot, step)};
        if (is_worse(other, worst))
            worst = other;
    }
    if (tid % 32 == 0)
        worst_of[tid / 32] = worst;
    __syncthreads();
    for (int i = 0; i < kWarps; i++)
        if (is_worse(worst_of[i], worst))
            worst = worst_of[i];
    return worst.slot;
}

// r z of a tile.
template <int D> __device__ float dot_of(const float *query, const float *mass) {
    float dot = 0;
#pragma unroll
    for (int e0 = 0; e0 < D; e0 += 32) {
        float4 z[8];
#pragma unroll
        for (int k = 0; k < 8; k++)
            z[k] = ts::load4(mass + e0 + 4 * k);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float4 q = ts::load4(query + e0 + 4 * k);
            dot += z[k].x * q.x, dot += z[k].y * q.y, dot += z[k].z * q.z, dot += z[k].w * q.w;
        }
    }
    return dot;
}

template <typename A, typename S, int D>
__global__ void __launch_bounds__(kThreads, D == 64 ? 4 : 2) close_kernel(const __grid_constant__ ts_cuda_attention a) {
    using W = typename ts::raw_state<A, S>::type;
    extern __shared__ float4 stage[];
    __shared__ closing<D> s;
    W *state = (W *)((char *)stage + ts::kStateStage<A, D>);
    const ts_sparsity &rules = a.cache.sparsity;
    const ts_span span = a.spans[blockIdx.x];
    const int tid = threadIdx.x, j = blockIdx.y, T = a.cache.tile_size;
    if ((span.position + 1) % T != 0) // nor does padding, at position 0, complete one
        return;
    const int64_t t = span.position / T, head = ts::head_of(a, span.sequence, j);
    const ts_cuda_piece piece = {.span = (int32_t)blockIdx.x,
                                 .sequence = span.sequence,
                                 .n_tokens = 1,
                                 .first = T - 1,
                                 .row = span.row,
                                 .tile = t};
    const ts::tile_keys<A, D> tile(a, piece, j);
    const double c_last = tile.c[T - 1], end = a.cache.decay_end[head] + c_last;
    const int n_before = a.cache.n_held[head];
    const float mean = 1.0f / (float)(T * (a.cache.n_heads / a.cache.n_kv_heads));
    if (tid < T)
        s.reach[tid] = ts::reach_of(c_last - tile.c[tid]);
    if (tid < D)
        s.query[tid] = mean * a.cache.query_sum[head * D + tid];
    float4 staged = make_float4(0, 0, 0, 0);
    ts::tile_state<A, D, kThreads>(
        tile, T, s.reach, stage, &staged, ts::from_zero(),
        [&](int row, int column, float x, float y) { ts::store2(state + row * D + column, x, y); });
    const float mass = ts::tile_mass<D, kThreads>(staged, stage);
    const double key = log(ts::block_sum(tid < D ? (double)mass : 0.0, s.sums)) - end;

    const int dropped = dropped_slot(a, span.sequence, j, t, key, n_before);
    const bool stays = dropped != n_before;
    const int slot = dropped >= 0 ? dropped : n_before, n_held = dropped >= 0 ? n_before : n_before + 1;
    if (stays) {
        const int64_t page = ts::page_of(a, span.sequence, j, slot);
        ts::store_state<S, D, kThreads>(state, D, a.cache.slot_state, a.cache.slot_scale, page);
        if (tid < D)
            a.cache.slot_mass[page * D + tid] = mass;
        if (tid == 0) {
            a.cache.slot_decay_end[page] = end;
            a.cache.slot_key[page] = key;
            a.cache.slot_tile[page] = t;
        }
    }
    __syncthreads();

    const auto is_always = [&](int64_t u) { return t + 1 - u <= rules.recent_tiles || u < rules.sink_tiles; };
    double threshold = 0;
    double floor = -INFINITY; // of keys: below it tiles are not scored
    if (rules.skip_share > 0) {
        double sums[2] = {}; // of the tiles selected in any case, then of all
        float largest = 0;
        for (int e = 0; e < D; e++)
            largest = fmaxf(largest, s.query[e]);
#pragma unroll
        for (int pass = 0; pass < 2; pass++) {
            double sum = 0;
            for (int i = tid; i < n_held; i += kThreads) {
                const int64_t page = ts::page_of(a, span.sequence, j, i);
                const bool always = is_always(a.cache.slot_tile[page]);
                if (always != (pass == 0) || (!always && a.cache.slot_key[page] < floor))
                    continue;
                const float dot = dot_of<D>(s.query, a.cache.slot_mass + page * D);
                if (i < kKept)
                    s.dots[i] = dot;
                sum += (double)ts::reach_of(end - a.cache.slot_decay_end[page]) * (double)dot;
            }
            sums[pass] = ts::block_sum(sum, s.sums);
            if (pass == 0) // 1e-3: more than the rounding of the scores, which are sums of f32 products
                floor = log(sums[0]) - end - log((double)largest) - 1e-3 +
                        fmin(log(rules.skip_share), log(0x1p-24 / (double)n_held));
        }
        threshold = rules.skip_share * (sums[0] + sums[1]);
    }

    constexpr int kVectors = D * D / 4 / kThreads; // of a thread
    float4 sum[kVectors] = {};
    float mass_sum = 0;
    int n_selected = 0;
    for (int i0 = 0; i0 < n_held; i0 += kThreads) {
        const int i = i0 + tid;
        bool selected = false;
        float reach = 0;
        int64_t page = 0;
        if (i < n_held) {
            page = ts::page_of(a, span.sequence, j, i);
            reach = ts::reach_of(end - a.cache.slot_decay_end[page]);
            selected = is_always(a.cache.slot_tile[page]) || rules.skip_share <= 0;
            if (!selected && !(a.cache.slot_key[page] < floor)) {
                const float dot = i < kKept ? s.dots[i] : dot_of<D>(s.query, a.cache.slot_mass + page * D);
                selected = !((double)reach * (double)dot < threshold);
            }
        }
        n_selected += selected;
        const bool adds = selected && reach > 0.0f;
        int n;
        const int rank =
            ts::rank_in_block<kWarps>(adds, s.counts, &n); // by then the list before this one has been read
        if (adds) {
            s.pages[rank] = page;
            s.weights[rank] = reach;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < n; k++) {
            const float w = s.weights[k];
            const int64_t at = s.pages[k];
#pragma unroll
            for (int v = 0; v < kVectors; v++) {
                const float4 x = ts::state4<S, D>(a.cache.slot_state, a.cache.slot_scale, at, 4 * (v * kThreads + tid));
                sum[v].x += w * x.x, sum[v].y += w * x.y, sum[v].z += w * x.z, sum[v].w += w * x.w;
            }
            if (tid < D)
                mass_sum += w * a.cache.slot_mass[at * D + tid];
        }
    }
#pragma unroll
    for (int v = 0; v < kVectors; v++)
        ts::store4((A *)a.cache.state + head * D * D + 4 * (v * kThreads + tid), sum[v]);
    if (tid < D)
        a.cache.mass[head * D + tid] = mass_sum;
    const double all_selected = ts::block_sum((double)n_selected, s.sums);
    if (tid == 0) {
        a.cache.n_held[head] = n_held;
        a.cache.decay_end[head] = end;
        a.cache.pairs[2 * head] += t + 1;
        a.cache.pairs[2 * head + 1] += (int64_t)all_selected;
    }
}

template <typename A, typename S, int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    using W = typename ts::raw_state<A, S>::type;
    constexpr int bytes = ts::kStateStage<A, D> + D * D * (int)sizeof(W);
    const dim3 grid((unsigned)a->pieces.n_spans, (unsigned)a->cache.n_kv_heads);
    (void)cudaFuncSetAttribute(close_kernel<A, S, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    close_kernel<A, S, D><<<grid, kThreads, bytes, stream>>>(*a);
}

} // namespace

ts_status ts_cuda_attention_close(cudaStream_t stream, const ts_cuda_attention *a) {
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: tiles closed in decode");
}
