// The products of decode on Hopper, in BF16 (linear_few_kernel.cuh): which ones, in what shape, and their launch.
#include "kernels/cuda/linear/linear.h"
#include "kernels/cuda/linear/linear_few_kernel.cuh"

namespace {

// How a product is cut. n_parts depends on w alone, so that a row's bits do not depend on the number of rows.
struct few_shape {
    int n_parts;
    int tokens, own; // of a block: tokens and parts
    int w_stages, x_stages;
    bool alone; // one block a multiprocessor: else clusters that begin early crowd on those that are free first
};

constexpr int kAloneBytes = 116 << 10;   // of shared memory, which two blocks of a multiprocessor cannot have
constexpr int64_t kNextBytes = 16 << 20; // of the next weights: more would drive out of L2 what was brought there

// Enough blocks for few tokens, whatever device this is.
int parts_of(int64_t n, int64_t k) {
    return n <= 33 * ts::kFewRows && k >= 4 * ts::kFewDepth ? ts::kFewMostParts : 1;
}

// What measured fastest for D 1024 on an H100 (docs/kernels.md).
few_shape shape_of(int64_t n, int64_t k, int64_t rows) {
    const int parts = parts_of(n, k);
    few_shape s = {parts, 8, 1, parts == 1 ? 6 : 4, 8, false};
    while (s.tokens < rows && s.tokens < 64)
        s.tokens *= 2;
    if (s.tokens == 64)
        s.x_stages = 6;
    if (rows > 64 && s.n_parts > 1) // more blocks for a longer sum: the exchange takes its time
        s = {s.n_parts, 64, rows > 128 && k <= 8 * ts::kFewDepth ? 4 : 2, 4, 8, true};
    else if (rows > 128)
        s = {1, 128, 1, 3, 5, true};
    return s;
}

template <int kTokens, int kOwn, bool kBehind>
cudaError_t launch(const few_shape &s, const ts::FewMaps &maps, ts::FewArgs a, int64_t rows, bool early,
                   cudaStream_t stream) {
    const int needed = ts::kFewBarrierBytes + a.w_stages * ts::kFewWeightBytes +
                       a.x_stages * ts::few_token_bytes(kTokens) +
                       (kBehind ? ts::few_stream_bytes(kTokens, ts::kFewRows / a.cluster_size) : 0);
    const int bytes = s.alone && needed < kAloneBytes ? kAloneBytes : needed;
    const dim3 grid((unsigned)((a.n + ts::kFewRows - 1) / ts::kFewRows * a.cluster_size),
                    (unsigned)((rows + kTokens - 1) / kTokens));
    const int64_t n_pieces = (int64_t)grid.x * grid.y * (a.n_steps / a.cluster_size);
    a.next_bytes = (uint32_t)((a.next_total + 16 * n_pieces - 1) / (16 * n_pieces) * 16);
    ts::launch_config l(grid, ts::kFewThreads, (size_t)bytes, stream);
    if (early)
        l.begin_early();
    l.in_clusters((unsigned)a.cluster_size);
    const cudaError_t error = cudaFuncSetAttribute(ts::linear_few<kTokens, kOwn, kBehind>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return error != cudaSuccess ? error
                                : cudaLaunchKernelEx(&l.config, ts::linear_few<kTokens, kOwn, kBehind>, maps, a);
}

template <bool kBehind> decltype(&launch<8, 1, kBehind>) launch_of(const few_shape &s) {
    if (s.own > 1)
        return s.own == 2 ? launch<64, 2, kBehind> : launch<64, 4, kBehind>;
    return s.tokens == 8    ? launch<8, 1, kBehind>
           : s.tokens == 16 ? launch<16, 1, kBehind>
           : s.tokens == 32 ? launch<32, 1, kBehind>
           : s.tokens == 64 ? launch<64, 1, kBehind>
                            : launch<128, 1, kBehind>;
}

// Whole units of 16 bytes, none beyond the last element.
int64_t bytes_brought(const ts_tensor *w) {
    const int64_t all = ((w->rows - 1) * w->stride + w->cols) * (int64_t)ts_dtype_bytes(w->dtype) / 16 * 16;
    return all < kNextBytes ? all : kNextBytes;
}

ts::FewNorm norm_of(const ts_fused_norm &norm) {
    return {
        .stream = (float *)norm.stream.data,
        .stream_stride = norm.stream.stride,
        .weight = (const float *)norm.weight.data,
        .sums = (float *)norm.sums.data,
        .sums_stride = norm.sums.stride,
        .n_sums = (int)norm.sums.cols,
        .columns = (float)norm.stream.cols,
        .eps = (float)norm.eps,
    };
}

// Of some rows.
ts_fused_norm norm_rows(const ts_fused_norm &norm, int64_t first, int64_t n_rows) {
    ts_fused_norm out = norm;
    out.stream = ts_tensor_rows(norm.stream, first, n_rows);
    out.sums = ts_tensor_rows(norm.sums, first, n_rows);
    return out;
}

ts_status multiply(ts_cuda_device *device, const few_shape &s, const ts_linear_args *args, const ts_tensor &w,
                   bool early) {
    ts_status status = TS_OK;
    void *encode = device->dense_plan.tensor_map_encode;
    const ts_tensor *next = args->next_w && (uintptr_t)args->next_w->data % 16 == 0 ? args->next_w : NULL;
    const ts_tensor &x = args->x, &y = args->y;
    ts::FewMaps maps;
    const ts::FewArgs a = {
        .bias = args->bias ? (const ts::bf16 *)args->bias->data : NULL,
        .n = (int)w.rows,
        .n_steps = (int)((w.cols + ts::kFewDepth - 1) / ts::kFewDepth),
        .n_parts = s.n_parts,
        .cluster_size = s.n_parts / s.own,
        .w_stages = s.w_stages,
        .x_stages = args->norm_behind && s.tokens == 128 ? s.x_stages - 1 : s.x_stages, // a tile of the stream, too
        .gelu = args->activation == TS_ACTIVATION_GELU_TANH,
        .next_w = next ? (const unsigned char *)next->data : NULL,
        .next_bytes = 0,
        .next_total = next ? bytes_brought(next) : 0,
        .n_tokens = (int)x.rows,
        .behind = args->norm_behind ? norm_of(*args->norm_behind) : ts::FewNorm{},
        .in_front = args->norm_in_front ? norm_of(*args->norm_in_front) : ts::FewNorm{},
    };
    TS_CHECK(ts::tensor_map_create(&maps.w, encode, w.data, w.rows, w.cols, w.stride, ts::kFewRows) &&
                 ts::tensor_map_create(&maps.x, encode, x.data, x.rows, x.cols, x.stride, s.tokens) &&
                 ts::tensor_map_create(&maps.y, encode, y.data, y.rows, y.cols, y.stride, s.tokens,
                                       ts::kFewRows / a.cluster_size),
             TS_ERR_DEVICE, "cuda: linear: the driver takes no map of x [%lld, %lld], w [%lld, %lld] or y",
             (long long)x.rows, (long long)x.cols, (long long)w.rows, (long long)w.cols);
    TS_CUDA_TRY(
        (args->norm_behind ? launch_of<true>(s) : launch_of<false>(s))(s, maps, a, x.rows, early, device->stream));
    device->cache_is_settled = true;
done:
    return status;
}

bool is_aligned(const ts_tensor &t) {
    return t.dtype == TS_BF16 && (uintptr_t)t.data % 16 == 0 && t.stride % 8 == 0;
}

bool is_aligned(const ts_fused_norm *norm) {
    const auto rows = [](const ts_tensor &t) { return (uintptr_t)t.data % 16 == 0 && t.stride % 4 == 0; };
    return !norm || (rows(norm->stream) && rows(norm->sums) && (uintptr_t)norm->weight.data % 16 == 0 &&
                     norm->sums.cols % 4 == 0);
}

bool takes(const ts_cuda_device *device, const ts_tensor &w) {
    return device->dense_plan.capability == 90 && is_aligned(w) && w.rows <= TS_CUDA_LINEAR_FEW_COLUMNS && w.cols > 0;
}

} // namespace

bool ts_cuda_linear_few_applies(const ts_cuda_device *device, const ts_linear_args *args, const ts_tensor *w) {
    return takes(device, *w) && args->row_invariant && is_aligned(args->x) && is_aligned(args->y) &&
           is_aligned(args->norm_behind) && is_aligned(args->norm_in_front);
}

bool ts_cuda_linear_fuses_norm(const ts_device *base, const ts_tensor *front_w, const ts_tensor *behind_w) {
    const ts_cuda_device *device = (const ts_cuda_device *)base;
    return base->compute_dtype == TS_BF16 && takes(device, *front_w) && takes(device, *behind_w) &&
           front_w->rows % (4 * TS_NORM_COLUMNS) == 0;
}

ts_status ts_cuda_linear_few(ts_cuda_device *device, const ts_linear_args *args, const ts_tensor *w, bool early) {
    ts_status status = TS_OK;
    for (int64_t first = 0; first < args->x.rows; first += TS_CUDA_LINEAR_FEW_ROWS) {
        const int64_t left = args->x.rows - first;
        ts_linear_args part = *args;
        part.x = ts_tensor_rows(args->x, first, left < TS_CUDA_LINEAR_FEW_ROWS ? left : TS_CUDA_LINEAR_FEW_ROWS);
        part.y = ts_tensor_rows(args->y, first, part.x.rows);
        ts_fused_norm behind, in_front;
        if (args->norm_behind)
            behind = norm_rows(*args->norm_behind, first, part.x.rows), part.norm_behind = &behind;
        if (args->norm_in_front)
            in_front = norm_rows(*args->norm_in_front, first, part.x.rows), part.norm_in_front = &in_front;
        TS_TRY(multiply(device, shape_of(w->rows, w->cols, part.x.rows), &part, *w, early));
    }
done:
    return status;
}
