// Dense-form prefill attention. Head size 64 on Hopper goes in clusters and reads k and v once
// (attention_dense_cluster.cuh); everything else reads them twice, once for the states and once for the outputs
// (attention_dense_plan.cuh). docs/kernels.md says what each costs and what bounds it.
//
// Tokens are taken in chunks of 64. With c counted from the chunk's start, S^ and z^ the state there, and n, m in the
// chunk,
//     y_n = (e^{c_n} q^_n S^ + sum_{m <= n} e^{c_n - c_m} (q^_n . k^_m) v_m) / (the same with z^ and 1 + eps),
//     S^' = e^{c_last} S^ + sum_m e^{c_last - c_m} k^_m v_m.
// Every exponent is a difference that is <= 0, so nothing overflows, and what underflows is less than e^-87 of the
// mass.
#include "kernels/cuda/attention_dense.h"
#include "kernels/cuda/attention_dense_cluster.cuh"
#include "kernels/cuda/attention_dense_kernel.cuh"

namespace ts {

constexpr int kPlanThreads = 256;

// --- the plan ---

// Rows, segments and ends of spans before each of four rows of the plan, and the span that row 0 of the four lies in.
struct PlanSums {
    int segments[4], ends[4];
    int span, rows_before;
};

__device__ PlanSums plan_sums(const ts_span *spans, int n_spans, const int (&rows)[4]) {
    __shared__ PlanSums sums;
    __shared__ int partial[kPlanThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0)
        sums = {};
    int before = 0; // rows of the spans of earlier rounds
    for (int first = 0; first < n_spans; first += kPlanThreads) {
        const int i = first + threadIdx.x;
        SpanShape shape = {0, 0, 0};
        if (i < n_spans)
            shape = span_shape(spans[i].position, spans[i].n_tokens);
        int sum = shape.n_rows;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step)
                sum += other;
        }
        __syncthreads();
        if (lane == 31)
            partial[warp] = sum;
        __syncthreads();
        int mine = before + sum - shape.n_rows;
        for (int w = 0; w < kPlanThreads / 32; w++) {
            if (w < warp)
                mine += partial[w];
            before += partial[w];
        }
        for (int q = 0; q < 4; q++) {
            const int n = min(max(rows[q] - mine, 0), shape.n_rows);
            if (n > 0) {
                atomicAdd(&sums.segments[q], span_segments_in(shape, n));
                atomicAdd(&sums.ends[q], n == shape.n_rows);
            }
        }
        if (shape.n_rows > 0 && mine <= rows[0] && rows[0] < mine + shape.n_rows) {
            sums.span = i;
            sums.rows_before = mine;
        }
    }
    __syncthreads();
    return sums;
}

// One block per row: writes the row, its items at their tickets, and clears its counters.
__global__ void __launch_bounds__(kPlanThreads) plan_rows(const DenseArgs a, int lag) {
    const int row = blockIdx.x;
    const PlanSums sums = plan_sums(a.spans, a.n_spans, {row, max(row - lag, 0), min(row + lag + 1, a.n_rows), row});
    const ts_span span = a.spans[sums.span];
    const SpanShape shape = span_shape(span.position, span.n_tokens);
    const int in_span = row - sums.rows_before;
    PlanRow r;
    r.span = sums.span;
    const int skipped = span_segments_in(shape, in_span);
    r.first_segment = shape.first_segment + skipped;
    r.n_segments = span_segments_in(shape, in_span + 1) - skipped;
    r.is_first = in_span == 0;
    r.is_last = in_span == shape.n_rows - 1;
    const int heads = a.n_kv_heads, n_states = r.n_segments - r.is_last;
    auto states_before = [&](int q) { return (sums.segments[q] - sums.ends[q]) * heads; };
    PlanItem *states = a.items + states_before(0) + sums.segments[1] * heads;
    PlanItem *outputs = a.items + states_before(2) + sums.segments[3] * heads;
    for (int i = threadIdx.x; i < r.n_segments * heads; i += kPlanThreads) {
        outputs[i] = {row, i % heads, i / heads, 1};
        if (i < n_states * heads)
            states[i] = {row, i % heads, i / heads, 0};
    }
    for (int i = threadIdx.x; i < 3 * heads; i += kPlanThreads)
        a.counters[(int64_t)(i / heads) * a.n_rows * heads + (int64_t)row * heads + i % heads] = 0;
    if (threadIdx.x == 0) {
        a.rows[row] = r;
        if (row == 0)
            *a.ticket = 0;
    }
}

// --- what a span leaves ---

template <typename T> __device__ __forceinline__ float element(const T *p);
template <> __device__ __forceinline__ float element(const float *p) {
    return *p;
}
template <> __device__ __forceinline__ float element(const __nv_bfloat16 *p) {
    return __bfloat162float(*p);
}

__device__ __forceinline__ float feature_map_exact(float x) {
    return x > 0.0f ? x + 1.0f : expf(x);
}

__device__ __forceinline__ double log_sigmoid_exact(float x) {
    return fmin((double)x, 0.0) - log1p(exp(-fabs((double)x)));
}

// What a span leaves: k^, v and c of the tokens of its last, incomplete tile, eqs. (3) to (5), and the tile pairs that
// its complete tiles stand for, all selected. One block per (span, KV head).
template <typename T>
__global__ void leave_span(const T *qkvg, int64_t stride, const DenseArgs a, int head_dim, double decay_temperature) {
    const ts_span span = a.spans[blockIdx.x];
    const int head = blockIdx.y, tile = a.tile_size;
    const int64_t at = (int64_t)span.sequence * a.n_kv_heads + head, end = span.position + span.n_tokens;
    const int64_t tile_start = end / tile * tile, begin = span.position > tile_start ? span.position : tile_start;
    const int n = (int)(end - begin), first = (int)(begin - tile_start);
    const T *from = qkvg + (span.row + begin - span.position) * stride;
    const int64_t k_column = (int64_t)(a.n_heads + head) * head_dim,
                  v_column = k_column + (int64_t)a.n_kv_heads * head_dim,
                  gate_column = (int64_t)(a.n_heads + 2 * a.n_kv_heads) * head_dim + head;
    for (int i = threadIdx.x; i < n * head_dim; i += blockDim.x) {
        const T *row = from + i / head_dim * stride;
        const float gate = 1.0f / (1.0f + expf(-element(row + gate_column)));
        const int64_t to = (at * tile + first) * head_dim + i;
        a.open_k[to] = gate * feature_map_exact(element(row + k_column + i % head_dim));
        a.open_v[to] = element(row + v_column + i % head_dim);
    }
    if (threadIdx.x == 32) {
        const int64_t tiles = end / tile, before = span.position / tile; // the sum of before + 1 ... tiles
        const int64_t pairs = (tiles * (tiles + 1) - before * (before + 1)) / 2;
        a.pairs[2 * at] += pairs;
        a.pairs[2 * at + 1] += pairs;
    }
    if (threadIdx.x == 0) {
        double c = first > 0 ? a.open_c[at * tile + first - 1] : 0.0;
        for (int m = 0; m < n; m++) {
            c += log_sigmoid_exact(element(from + m * stride + gate_column + a.n_kv_heads)) / decay_temperature;
            a.open_c[at * tile + first + m] = c;
        }
    }
}

// --- f32 ---

// The recurrence token by token. One block per (span, KV head); thread (part, j) holds features of `part` of column j.
template <int D>
__global__ void __launch_bounds__(256)
    dense_recurrence(const float *qkvg, float *y, const DenseArgs a, double decay_temperature) {
    constexpr int parts = 256 / D, own = D / parts;
    __shared__ float k[D], v[D], q[D], numerators[parts][D], denominators[parts];
    const ts_span span = a.spans[blockIdx.x];
    const int head = blockIdx.y, tile = a.tile_size, group = a.n_heads / a.n_kv_heads;
    const int part = threadIdx.x / D, j = threadIdx.x % D;
    const int64_t at = (int64_t)span.sequence * a.n_kv_heads + head, end = span.position + span.n_tokens;
    const int64_t open_start = end / tile > span.position / tile ? end / tile * tile : -1;
    float s[own], z[own];
    const int n_open = (int)(span.position % tile);
    double log_sum = n_open > 0 ? a.open_c[at * tile + n_open - 1] : 0.0;
    const double opened = log_sum;
#pragma unroll
    for (int i = 0; i < own; i++) {
        const int feature = part * own + i;
        s[i] = (float)exp(opened) * a.state[(at * D + feature) * D + j];
        z[i] = (float)exp(opened) * a.mass[at * D + feature];
        for (int m = 0; m < n_open; m++) {
            const float kw = (float)exp(opened - a.open_c[at * tile + m]) * a.open_k[(at * tile + m) * D + feature];
            s[i] += kw * a.open_v[(at * tile + m) * D + j];
            z[i] += kw;
        }
    }
    for (int n = 0; n < span.n_tokens; n++) {
        const float *row = qkvg + (span.row + n) * a.stride;
        const float *gates = row + (int64_t)(a.n_heads + 2 * a.n_kv_heads) * D + head;
        const float gate = 1.0f / (1.0f + expf(-gates[0]));
        const double log_decay = log_sigmoid_exact(gates[a.n_kv_heads]) / decay_temperature;
        const float decay = (float)exp(log_decay);
        log_sum += log_decay;
        __syncthreads();
        if (part == 0) {
            k[j] = gate * feature_map_exact(row[(int64_t)(a.n_heads + head) * D + j]);
            v[j] = row[(int64_t)(a.n_heads + a.n_kv_heads + head) * D + j];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < own; i++) {
            s[i] = decay * s[i] + k[part * own + i] * v[j];
            z[i] = decay * z[i] + k[part * own + i];
        }
        for (int h = head * group; h < (head + 1) * group; h++) {
            if (part == 0)
                q[j] = feature_map_exact(row[(int64_t)h * D + j]);
            __syncthreads();
            float numerator = 0.0f, denominator = 0.0f;
#pragma unroll
            for (int i = 0; i < own; i++) {
                numerator += q[part * own + i] * s[i];
                denominator += q[part * own + i] * z[i];
            }
            numerators[part][j] = numerator;
            if (j == 0)
                denominators[part] = denominator;
            __syncthreads();
            if (part == 0) {
                denominator = a.normalizer_eps;
                numerator = 0.0f;
                for (int p = 0; p < parts; p++) {
                    numerator += numerators[p][j];
                    denominator += denominators[p];
                }
                y[(span.row + n) * a.y_stride + (int64_t)h * D + j] = numerator / denominator;
            }
            __syncthreads();
        }
        if (span.position + n + 1 == open_start) {
#pragma unroll
            for (int i = 0; i < own; i++) {
                a.state[(at * D + part * own + i) * D + j] = s[i];
                if (j == 0)
                    a.mass[at * D + part * own + i] = z[i];
            }
            if (threadIdx.x == 0)
                a.decay_end[at] += log_sum;
        }
    }
}

// --- launcher ---

struct Layout {
    int n_rows, lag, ring_rows;
    int64_t n_items;
    size_t ticket, counters, rows, items, ring, n_bytes;
};

static size_t aligned(size_t n) {
    return (n + 255) / 256 * 256;
}

static Layout layout_of(const ts_attention_args *args) {
    const ts_batch *batch = args->batch;
    const int64_t heads = args->cache->n_kv_heads;
    Layout l = {};
    int64_t n_segments = 0, n_rows = 0;
    for (int i = 0; i < batch->n_spans; i++) {
        const SpanShape s = span_shape(batch->spans[i].position, batch->spans[i].n_tokens);
        n_segments += s.n_segments;
        n_rows += s.n_rows;
    }
    l.n_rows = (int)n_rows;
    l.n_items = (2 * n_segments - batch->n_spans) * heads;
    const int64_t per_row = (n_segments * heads + n_rows - 1) / (n_rows > 0 ? n_rows : 1);
    l.lag = per_row > 0 ? (int)((kItemsAhead + per_row - 1) / per_row) : 1;
    l.ring_rows = l.lag + (int)((kItemsInFlight + per_row - 1) / (per_row > 0 ? per_row : 1)) + 2;
    l.ticket = 0;
    l.counters = 256;
    l.rows = l.counters + aligned((size_t)(3 * n_rows * heads) * sizeof(int));
    l.items = l.rows + aligned((size_t)n_rows * sizeof(PlanRow));
    l.ring = l.items + aligned((size_t)l.n_items * sizeof(PlanItem));
    l.n_bytes =
        l.ring + (size_t)(l.ring_rows * heads * (kGroup + 1)) * slot_floats(args->cache->head_dim) * sizeof(float);
    return l;
}

static ts_status launch_status(const char *what) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess
               ? TS_OK
               : TS_FAIL(TS_ERR_DEVICE, "attention: %s could not be started: %s", what, cudaGetErrorString(error));
}

template <int D, bool hopper>
static ts_status launch_bf16(const DenseArgs &a, int lag, int n_multiprocessors, cudaStream_t stream) {
    ts_status status = TS_OK;
    const size_t shared = sizeof(DenseShared<D>);
    cudaError_t error =
        cudaFuncSetAttribute(dense_attention<D, hopper>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: %zu bytes of shared memory refused: %s", shared,
             cudaGetErrorString(error));
    plan_rows<<<a.n_rows, kPlanThreads, 0, stream>>>(a, lag);
    TS_TRY(launch_status("its plan"));
    dense_attention<D, hopper><<<min(a.n_items, n_multiprocessors * DenseShape<D>::blocks_per_multiprocessor),
                                 DenseShape<D>::threads, shared, stream>>>(a);
    TS_TRY(launch_status("the dense kernel"));
done:
    return status;
}

struct ClusterLaunch {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config;
};

static void set_cluster_launch(ClusterLaunch *launch, int n_clusters, cudaStream_t stream) {
    *launch = {};
    launch->attribute.id = cudaLaunchAttributeClusterDimension;
    launch->attribute.val.clusterDim.x = kClusterBlocks;
    launch->attribute.val.clusterDim.y = launch->attribute.val.clusterDim.z = 1;
    launch->config.gridDim = dim3(n_clusters * kClusterBlocks);
    launch->config.blockDim = dim3(kClusterThreads);
    launch->config.dynamicSmemBytes = sizeof(ClusterShared);
    launch->config.stream = stream;
    launch->config.attrs = &launch->attribute;
    launch->config.numAttrs = 1;
}

struct ClusterLayout {
    int n_items;
    size_t counters_bytes, carry, n_bytes;
};

static ClusterLayout cluster_layout_of(const ts_attention_args *args) {
    const ts_batch *batch = args->batch;
    ClusterLayout l = {};
    int64_t most = 0;
    for (int i = 0; i < batch->n_spans; i++) {
        const int64_t n_tiles = (batch->spans[i].position % 64 + batch->spans[i].n_tokens + 63) / 64;
        most = n_tiles > most ? n_tiles : most;
    }
    const int64_t pairs = (int64_t)batch->n_spans * args->cache->n_kv_heads;
    l.n_items = (int)((most + kPieceTiles - 1) / kPieceTiles * pairs);
    l.counters_bytes = (size_t)(pairs * kClusterBlocks) * sizeof(int);
    l.carry = aligned(l.counters_bytes);
    l.n_bytes = l.carry + (size_t)pairs * kCarryFloats * sizeof(float);
    return l;
}

static ts_status launch_cluster(DenseArgs a, const ClusterLayout &l, int n_clusters, char *workspace,
                                cudaStream_t stream) {
    ts_status status = TS_OK;
    const size_t shared = sizeof(ClusterShared);
    ClusterLaunch launch;
    a.n_items = l.n_items;
    a.counters = (int *)workspace;
    a.ring = (float *)(workspace + l.carry);
    cudaError_t error =
        cudaFuncSetAttribute(dense_attention_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: %zu bytes of shared memory refused: %s", shared,
             cudaGetErrorString(error));
    error = cudaMemsetAsync(workspace, 0, l.counters_bytes, stream);
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: its counters could not be cleared: %s",
             cudaGetErrorString(error));
    set_cluster_launch(&launch, min(n_clusters, a.n_items), stream);
    error = cudaLaunchKernelEx(&launch.config, dense_attention_cluster, a);
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: the dense kernel could not be started: %s",
             cudaGetErrorString(error));
done:
    return status;
}

// Not a property of the batch, so that a row's value is not one either.
static bool use_cluster(const ts_attention_args *args, const ts_cuda_attention_dense_plan *plan) {
    return plan->capability == 90 && args->cache->head_dim == 64;
}

} // namespace ts

extern "C" size_t ts_cuda_attention_dense_workspace(const ts_attention_args *args,
                                                    const ts_cuda_attention_dense_plan *plan) {
    if (args->qkvg.dtype == TS_F32)
        return 256;
    return ts::use_cluster(args, plan) ? ts::cluster_layout_of(args).n_bytes : ts::layout_of(args).n_bytes;
}

extern "C" ts_status ts_cuda_attention_dense_plan_create(ts_cuda_attention_dense_plan *plan) {
    using namespace ts;
    ts_status status = TS_OK;
    int device = 0, major = 0, minor = 0, n_multiprocessors = 0, n_clusters = 0;
    ClusterLaunch launch;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess && major == 9) {
        set_cluster_launch(&launch, 1, nullptr);
        error = cudaFuncSetAttribute(dense_attention_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)sizeof(ClusterShared));
        if (error == cudaSuccess)
            error = cudaOccupancyMaxActiveClusters(&n_clusters, dense_attention_cluster, &launch.config);
    }
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: the device does not tell its size: %s",
             cudaGetErrorString(error));
    plan->n_multiprocessors = n_multiprocessors;
    plan->capability = major == 9 && n_clusters > 0 ? 90 : 80;
    plan->n_clusters = n_clusters;
done:
    return status;
}

extern "C" ts_status ts_cuda_attention_dense(const ts_attention_args *args, const ts_cuda_attention_dense_plan *plan,
                                             void *workspace, size_t workspace_bytes, void *stream) {
    using namespace ts;
    ts_status status = TS_OK;
    const ts_tile_cache_layer *cache = args->cache;
    const ts_batch *batch = args->batch;
    const cudaStream_t on = (cudaStream_t)stream;
    const int d = cache->head_dim;
    const dim3 heads(batch->n_spans, cache->n_kv_heads);
    const size_t element_bytes = ts_dtype_bytes(args->qkvg.dtype);
    const bool hopper = plan->capability == 90;
    DenseArgs a = {};
    TS_CHECK(d == 64 || d == 128, TS_ERR_UNSUPPORTED, "attention: head size %d; 64 and 128 are built", d);
    TS_CHECK(cache->tile_size == 64 || (cache->tile_size == 128 && d == 128), TS_ERR_UNSUPPORTED,
             "attention: tile size %d with head size %d; 64 is built, and 128 for head size 128", cache->tile_size, d);
    TS_CHECK(args->qkvg.dtype == args->y.dtype && (args->y.dtype == TS_BF16 || args->y.dtype == TS_F32),
             TS_ERR_UNSUPPORTED, "attention: projections %s and outputs %s; both BF16 or both F32 are built",
             ts_dtype_name(args->qkvg.dtype), ts_dtype_name(args->y.dtype));
    TS_CHECK((uintptr_t)args->qkvg.data % 16 == 0 && (uintptr_t)args->y.data % 16 == 0 &&
                 (size_t)args->qkvg.stride * element_bytes % 16 == 0 &&
                 (size_t)args->y.stride * element_bytes % 16 == 0,
             TS_ERR_INVALID, "attention: rows of %lld and %lld elements; rows must begin at multiples of 16 bytes",
             (long long)args->qkvg.stride, (long long)args->y.stride);
    if (batch->n_spans == 0)
        goto done;
    a.stride = args->qkvg.stride;
    a.y_stride = args->y.stride;
    a.spans = batch->device_spans;
    a.n_spans = batch->n_spans;
    a.n_heads = cache->n_heads;
    a.n_kv_heads = cache->n_kv_heads;
    a.tile_size = cache->tile_size;
    a.decay_scale = (float)(1.4426950408889634 / args->decay_temperature);
    a.normalizer_eps = (float)args->normalizer_eps;
    a.open_k = cache->open_k;
    a.open_v = cache->open_v;
    a.open_c = cache->open_c;
    a.state = cache->state;
    a.mass = cache->mass;
    a.decay_end = cache->decay_end;
    a.pairs = cache->pairs;
    if (args->y.dtype == TS_F32) {
        const float *qkvg = (const float *)args->qkvg.data;
        if (d == 64)
            dense_recurrence<64><<<heads, 256, 0, on>>>(qkvg, (float *)args->y.data, a, args->decay_temperature);
        else
            dense_recurrence<128><<<heads, 256, 0, on>>>(qkvg, (float *)args->y.data, a, args->decay_temperature);
        TS_TRY(launch_status("the f32 recurrence"));
        leave_span<<<heads, 128, 0, on>>>(qkvg, a.stride, a, d, args->decay_temperature);
    } else {
        const bool in_clusters = use_cluster(args, plan);
        const ClusterLayout in = in_clusters ? cluster_layout_of(args) : ClusterLayout{};
        const Layout l = in_clusters ? Layout{} : layout_of(args);
        const size_t n_bytes = in_clusters ? in.n_bytes : l.n_bytes;
        char *base = (char *)workspace;
        TS_CHECK(workspace_bytes >= n_bytes && (uintptr_t)base % 256 == 0, TS_ERR_INVALID,
                 "attention: a workspace of %zu bytes; %zu are needed, aligned to 256", workspace_bytes, n_bytes);
        a.qkvg = (const __nv_bfloat16 *)args->qkvg.data;
        a.y = (__nv_bfloat16 *)args->y.data;
        a.n_rows = l.n_rows;
        a.n_items = (int)l.n_items;
        a.ring_rows = l.ring_rows;
        a.ticket = (int *)(base + l.ticket);
        a.counters = (int *)(base + l.counters);
        a.rows = (PlanRow *)(base + l.rows);
        a.items = (PlanItem *)(base + l.items);
        a.ring = (float *)(base + l.ring);
        if (in_clusters) {
            TS_TRY(launch_cluster(a, in, plan->n_clusters, base, on));
        } else {
            auto *launch = d == 64 ? (hopper ? launch_bf16<64, true> : launch_bf16<64, false>)
                                   : (hopper ? launch_bf16<128, true> : launch_bf16<128, false>);
            TS_TRY(launch(a, l.lag, plan->n_multiprocessors, on));
        }
        leave_span<<<heads, 128, 0, on>>>(a.qkvg, a.stride, a, d, args->decay_temperature);
    }
    TS_TRY(launch_status("what the spans leave"));
done:
    return status;
}
