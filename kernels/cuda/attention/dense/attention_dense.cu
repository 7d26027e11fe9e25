// Dense-form prefill attention. On Hopper it goes in clusters and reads k and v once (attention_dense_cluster.cuh at
// head size 64, attention_dense_wide.cuh at 128); elsewhere it reads them twice, once for the states and once for the
// outputs (attention_dense_runs.cuh). docs/kernels.md says what each costs and what bounds it.
//
// Tokens are taken in chunks of 64 or 128. With c counted from the chunk's start, S^ and z^ the state there, and n, m
// in the chunk,
//     y_n = (e^{c_n} q^_n S^ + sum_{m <= n} e^{c_n - c_m} (q^_n . k^_m) v_m) / (the same with z^ and 1 + eps),
//     S^' = e^{c_last} S^ + sum_m e^{c_last - c_m} k^_m v_m.
// Every exponent is a difference that is <= 0, so nothing overflows, and what underflows is less than e^-87 of the
// mass.
#include "kernels/cuda/attention/dense/attention_dense.h"
#include "kernels/cuda/attention/dense/attention_dense_cluster.cuh"
#include "kernels/cuda/attention/dense/attention_dense_ends.cuh"
#include "kernels/cuda/attention/dense/attention_dense_kernel.cuh"
#include "kernels/cuda/attention/dense/attention_dense_wide.cuh"

namespace ts {

// --- launcher ---

struct RunsLayout {
    int wanted, n_runs, n_state_runs;
    size_t n_bytes;
};

static size_t aligned(size_t n) {
    return (n + 255) / 256 * 256;
}

// Runs that a long span is cut into.
static int wanted_runs(const ts_tile_cache_layer *cache, const ts_cuda_attention_dense_plan *plan) {
    const int blocks =
        cache->head_dim == 64 ? DenseShape<64>::blocks_per_multiprocessor : DenseShape<128>::blocks_per_multiprocessor;
    return max(min(plan->n_multiprocessors * blocks / cache->n_kv_heads, kMostRuns), 1);
}

static size_t slot_bytes(const ts_tile_cache_layer *cache, size_t n_slots) {
    return aligned(n_slots * (size_t)(cache->n_kv_heads * slot_floats(cache->head_dim)) * sizeof(float));
}

static RunsLayout runs_layout_of(const ts_attention_args *args, const ts_cuda_attention_dense_plan *plan) {
    const ts_batch *batch = args->batch;
    RunsLayout l = {};
    l.wanted = wanted_runs(args->cache, plan);
    size_t n_slots = 0;
    for (int i = 0; i < batch->n_spans; i++) {
        const SpanRuns cut = span_runs(batch->spans[i], l.wanted);
        l.n_runs += cut.n_runs;
        n_slots += (size_t)cut.n_slots;
    }
    l.n_state_runs = l.n_runs - batch->n_spans;
    l.n_bytes = slot_bytes(args->cache, n_slots);
    return l;
}

static ts_status launch_status(const char *what) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess
               ? TS_OK
               : TS_FAIL(TS_ERR_DEVICE, "attention: %s could not be started: %s", what, cudaGetErrorString(error));
}

template <int D, bool outputs> static ts_status launch_runs(const DenseArgs &a, int n_runs, cudaStream_t stream) {
    ts_status status = TS_OK;
    const size_t shared = sizeof(DenseShared<D>);
    const cudaError_t error =
        cudaFuncSetAttribute(dense_runs<D, outputs>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: %zu bytes of shared memory refused: %s", shared,
             cudaGetErrorString(error));
    if (n_runs > 0)
        dense_runs<D, outputs><<<n_runs * a.n_kv_heads, DenseShape<D>::threads, shared, stream>>>(a);
    TS_TRY(launch_status(outputs ? "the outputs" : "the states"));
done:
    return status;
}

template <int D> static ts_status launch_both(const DenseArgs &a, const RunsLayout &l, cudaStream_t stream) {
    ts_status status = TS_OK;
    TS_TRY((launch_runs<D, false>(a, l.n_state_runs, stream)));
    TS_TRY((launch_runs<D, true>(a, l.n_runs, stream)));
done:
    return status;
}

constexpr int kClearThreads = 256, kClearedBytes = 16 * kClearThreads; // of a block

// What pieces of a span hand on begins with no piece's number. n_bytes: a multiple of 16.
__global__ void __launch_bounds__(kClearThreads) clear_carries(unsigned char *carry, size_t n_bytes) {
    follow_front();
    const size_t at = ((size_t)blockIdx.x * kClearThreads + threadIdx.x) * 16;
    if (at < n_bytes)
        *(uint4 *)(carry + at) = make_uint4(0, 0, 0, 0);
}

// A kernel in clusters of kClusterBlocks blocks.
template <typename Kernel> struct ClusterLaunch : launch_config {
    Kernel *kernel;
    size_t n_shared;

    ClusterLaunch(Kernel *kernel, unsigned n_threads, size_t n_shared, int n_clusters, cudaStream_t stream)
        : launch_config(dim3((unsigned)(n_clusters * kClusterBlocks)), n_threads, n_shared, stream), kernel(kernel),
          n_shared(n_shared) {
        in_clusters(kClusterBlocks);
    }
    cudaError_t set_shared() const {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)n_shared);
    }
    template <typename... Args> cudaError_t begin(const Args &...args) {
        const cudaError_t error = set_shared();
        begin_early();
        return error != cudaSuccess ? error : cudaLaunchKernelEx(&config, kernel, args...);
    }
};

struct TileLaunch : ClusterLaunch<decltype(dense_attention_cluster)> {
    TileLaunch(int n_clusters, cudaStream_t stream)
        : ClusterLaunch(dense_attention_cluster, kClusterThreads, sizeof(ClusterShared), n_clusters, stream) {
    }
};

struct WideLaunch : ClusterLaunch<decltype(dense_attention_wide)> {
    WideLaunch(int n_clusters, cudaStream_t stream)
        : ClusterLaunch(dense_attention_wide, kWideThreads, sizeof(WideShared), n_clusters, stream) {
    }
};

// Clusters that run at a time.
template <typename Launch> static cudaError_t count_clusters(int *n_clusters) {
    const Launch launch(1, nullptr);
    cudaError_t error = launch.set_shared();
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveClusters(n_clusters, launch.kernel, &launch.config);
    return error;
}

struct ClusterLayout {
    int n_items, carry_rows;
    size_t n_bytes;
};

template <typename Pieces> static ClusterLayout cluster_layout(const ts_attention_args *args) {
    const ts_batch *batch = args->batch;
    const int heads = args->cache->n_kv_heads;
    ClusterLayout l = {};
    int64_t most = 0;
    for (int i = 0; i < batch->n_spans; i++) {
        const int64_t n_tiles =
            (batch->spans[i].position % kOpenRows + batch->spans[i].n_tokens + Pieces::tile - 1) / Pieces::tile;
        most = n_tiles > most ? n_tiles : most;
    }
    const int64_t n_pieces = (most + Pieces::tiles - 1) / Pieces::tiles;
    l.n_items = (int)(n_pieces * batch->n_spans * heads);
    if (n_pieces > 1) { // only a span of more than one piece needs a place, and those begin at least so many rows apart
        const int64_t by_rows = batch->n_rows / Pieces::least_carried + 1;
        l.carry_rows = by_rows < batch->n_spans ? Pieces::least_carried : 0;
        l.n_bytes = (size_t)((l.carry_rows > 0 ? by_rows : batch->n_spans) * heads) * Pieces::carry_bytes;
    }
    return l;
}

// Bytes that no batch of so many rows and spans needs more of.
template <typename Pieces> static size_t most_carried(int64_t rows, int64_t spans, int heads) {
    return (size_t)(min(rows / Pieces::least_carried + 1, spans) * heads) * Pieces::carry_bytes;
}

static ClusterLayout cluster_layout_of(const ts_attention_args *args) {
    return args->cache->head_dim == 64 ? cluster_layout<TilePieces>(args) : cluster_layout<WidePieces>(args);
}

static ts_status launch_cluster(DenseArgs a, const ts_attention_args *args, const ts_cuda_attention_dense_plan *plan,
                                const ClusterLayout &l, char *workspace, cudaStream_t stream) {
    ts_status status = TS_OK;
    const int64_t rows = args->batch->n_rows;
    const int d = args->cache->head_dim;
    cudaError_t error = cudaSuccess;
    ClusterMaps maps;
    a.n_items = l.n_items;
    a.carry = (unsigned char *)workspace;
    a.carry_rows = l.carry_rows;
    if (l.n_bytes > 0) // a kernel, since behind a memset none begins early
        error = launch_following(true, clear_carries, dim3((unsigned)(l.n_bytes / kClearedBytes + 1)), kClearThreads, 0,
                                 stream, a.carry, l.n_bytes);
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: its workspace could not be cleared: %s",
             cudaGetErrorString(error));
    TS_CHECK(
        tensor_map_create(&maps.qkv, plan->tensor_map_encode, a.qkvg, rows, (a.n_heads + 2 * a.n_kv_heads) * d,
                          a.stride, d == 64 ? 64 : kWideTile) &&
            (d != 64 || tensor_map_create(&maps.y, plan->tensor_map_encode, a.y, rows, a.n_heads * 64, a.y_stride, 16)),
        TS_ERR_DEVICE, "attention: the driver takes no map of %lld rows of %lld and %lld elements", (long long)rows,
        (long long)a.stride, (long long)a.y_stride);
    error = d == 64 ? TileLaunch(min(plan->n_clusters, a.n_items), stream).begin(a, maps)
                    : WideLaunch(min(plan->n_wide_clusters, a.n_items), stream).begin(a, maps.qkv);
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: the dense kernel could not be started: %s",
             cudaGetErrorString(error));
done:
    return status;
}

// Not a property of the batch, so that a row's value is not one either.
static bool use_cluster(const ts_cuda_attention_dense_plan *plan) {
    return plan->capability == 90;
}

} // namespace ts

extern "C" size_t ts_cuda_attention_dense_workspace(const ts_attention_args *args,
                                                    const ts_cuda_attention_dense_plan *plan) {
    return ts::use_cluster(plan) ? ts::cluster_layout_of(args).n_bytes : ts::runs_layout_of(args, plan).n_bytes;
}

extern "C" size_t ts_cuda_attention_dense_most_workspace(const ts_run_limits *limits,
                                                         const ts_cuda_attention_dense_plan *plan) {
    using namespace ts;
    const ts_tile_cache_layer *cache = limits->cache;
    const int64_t rows = limits->max_rows, spans = limits->max_spans;
    if (use_cluster(plan))
        return cache->head_dim == 64 ? most_carried<TilePieces>(rows, spans, cache->n_kv_heads)
                                     : most_carried<WidePieces>(rows, spans, cache->n_kv_heads);
    // Only spans of more than one run have slots, so many for every kLeastRun chunks begun.
    const int64_t run_rows = (int64_t)kLeastRun * kChunk, cut = min(rows / (run_rows - kChunk) + 1, spans);
    return slot_bytes(cache, (size_t)min(rows / run_rows + 2 * cut, cut * wanted_runs(cache, plan)));
}

extern "C" ts_status ts_cuda_attention_dense_plan_create(ts_cuda_attention_dense_plan *plan) {
    using namespace ts;
    ts_status status = TS_OK;
    int device = 0, major = 0, minor = 0, n_multiprocessors = 0, n_clusters = 0, n_wide_clusters = 0;
    void *encode = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSuccess;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess && major == 9) {
        error = count_clusters<TileLaunch>(&n_clusters);
        if (error == cudaSuccess)
            error = count_clusters<WideLaunch>(&n_wide_clusters);
        if (error == cudaSuccess)
            error =
                cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    }
    TS_CHECK(error == cudaSuccess, TS_ERR_DEVICE, "attention: the device does not tell its size: %s",
             cudaGetErrorString(error));
    plan->n_multiprocessors = n_multiprocessors;
    plan->capability = major == 9 && n_clusters > 0 && n_wide_clusters > 0 && encode != nullptr ? 90 : 80;
    plan->n_clusters = n_clusters;
    plan->n_wide_clusters = n_wide_clusters;
    plan->tensor_map_encode = encode;
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
    const bool in_clusters = use_cluster(plan);
    const ClusterLayout in = in_clusters ? cluster_layout_of(args) : ClusterLayout{};
    const RunsLayout l = in_clusters ? RunsLayout{} : runs_layout_of(args, plan);
    const size_t n_bytes = in_clusters ? in.n_bytes : l.n_bytes;
    char *base = (char *)workspace;
    DenseArgs a = {};
    TS_CHECK(d == 64 || d == 128, TS_ERR_UNSUPPORTED, "attention: head size %d; 64 and 128 are built", d);
    TS_CHECK(args->qkvg.dtype == TS_BF16 && args->y.dtype == TS_BF16, TS_ERR_UNSUPPORTED,
             "attention: projections %s and outputs %s; both BF16 are built", ts_dtype_name(args->qkvg.dtype),
             ts_dtype_name(args->y.dtype));
    TS_CHECK((uintptr_t)args->qkvg.data % 16 == 0 && (uintptr_t)args->y.data % 16 == 0 && args->qkvg.stride % 8 == 0 &&
                 args->y.stride % 8 == 0,
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
    a.decay_scale = (float)(1.4426950408889634 / args->decay_temperature);
    a.normalizer_eps = (float)args->normalizer_eps;
    a.open_k = (__nv_bfloat16 *)cache->open_k;
    a.open_v = (__nv_bfloat16 *)cache->open_v;
    a.open_gate = cache->open_gate;
    a.open_c = cache->open_c;
    a.state = cache->state;
    a.state_rest = cache->state_rest;
    a.mass = cache->mass;
    a.decay_end = cache->decay_end;
    a.pairs = cache->pairs;
    TS_CHECK(workspace_bytes >= n_bytes && (uintptr_t)base % 256 == 0, TS_ERR_INVALID,
             "attention: a workspace of %zu bytes; %zu are needed, aligned to 256", workspace_bytes, n_bytes);
    a.qkvg = (const __nv_bfloat16 *)args->qkvg.data;
    a.y = (__nv_bfloat16 *)args->y.data;
    a.wanted_runs = l.wanted;
    a.slots = (float *)base;
    if (in_clusters) {
        TS_TRY(launch_cluster(a, args, plan, in, base, on));
    } else {
        auto *launch = d == 64 ? launch_both<64> : launch_both<128>;
        TS_TRY(launch(a, l, on));
    }
    (void)launch_following(in_clusters,
                           d == 64       ? end_spans<64, kChunk>
                           : in_clusters ? end_spans<128, kWideTile>
                                         : end_spans<128, kChunk>,
                           heads, 2 * (unsigned)d, 0, on, a, cache->tile_size, args->decay_temperature);
    TS_TRY(launch_status("the store of what spans leave"));
done:
    return status;
}
