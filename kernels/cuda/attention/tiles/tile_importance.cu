// Rule 1: how much a tile says in layer 0, and whether that is too little to keep it. Sums are f64 in one fixed order.
#include "kernels/cuda/attention/pieces.h"
#include "kernels/cuda/primitives/warp_matrix.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kSumThreads = 256;
constexpr int kHeads = 4;        // of a block
constexpr int kRowsAhead = 8;    // asked for together by a thread
constexpr int kMostTokens = 128; // of a piece
constexpr int kLeastLanes = 8;   // that have one row of a head

// The sum of k^ over 16 bytes of a row. Rounded to f32 one by one, numbers of about the same size add up in f64 without
// rounding, so tiles of the same tokens tie in whatever order they are summed.
__device__ double key_sum(const uint4 &raw, float gate, const float *) {
    double sum = 0;
    for (uint32_t bits : {raw.x, raw.y, raw.z, raw.w})
        sum += (double)(gate * ts::elu1(__uint_as_float(bits)));
    return sum;
}
__device__ double key_sum(const uint4 &raw, float gate, const ts::bf16 *) {
    float x[8];
    double sum = 0;
    ts::unpack(raw, x);
#pragma unroll
    for (int e = 0; e < 8; e++)
        sum += (double)(gate * ts::elu1_fast(x[e]));
    return sum;
}

// The sum of k^ over a piece, for kHeads heads: neighbouring threads have neighbouring 16 bytes of a row, then of the
// next rows. A tile that completes gets its importance; one that stays open leaves its sum in open [n_spans, KV], since
// other blocks may still read the history's. Bound by reading k.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    importance_kernel(const T *qkvg, int64_t stride, int n_heads, int d, ts_tile_history history, ts_cuda_pieces pieces,
                      double *importance, double *open) {
    constexpr int kVector = 16 / (int)sizeof(T);
    __shared__ double sums[kSumThreads / kLeastLanes];
    __shared__ float gates[kMostTokens][kHeads];
    const ts_cuda_piece piece = pieces.at[blockIdx.x];
    if (piece.sequence == TS_PADDING)
        return;
    const int n_kv = history.n_kv_heads, j0 = blockIdx.y * kHeads, n_here = min(kHeads, n_kv - j0), tid = threadIdx.x;
    const int lanes = d / kVector, together = lanes * kHeads; // threads of a row of one head, and of all
    const int column = tid % together * kVector, head = column / d, row0 = tid / together,
              rows = kSumThreads / together;
    const T *first = qkvg + piece.row * stride, *k = first + (int64_t)(n_heads + j0) * d + column;
    double sum = 0;
    for (int i0 = row0; i0 < kMostTokens; i0 += kRowsAhead * rows) {
        uint4 raw[kRowsAhead];
#pragma unroll
        for (int i = 0; i < kRowsAhead; i++)
            if (head < n_here && i0 + i * rows < piece.n_tokens)
                raw[i] = __ldg((const uint4 *)(k + (i0 + i * rows) * stride));
        if (i0 == row0) {
            for (int i = tid; i < piece.n_tokens * kHeads; i += kSumThreads)
                if (i % kHeads < n_here)
                    gates[i / kHeads][i % kHeads] =
                        ts::key_gate(first + i / kHeads * stride + (int64_t)(n_heads + 2 * n_kv) * d + j0 + i % kHeads);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kRowsAhead; i++)
            if (head < n_here && i0 + i * rows < piece.n_tokens)
                sum += key_sum(raw[i], gates[i0 + i * rows][head], (const T *)NULL);
    }
    for (int step = lanes / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(~0u, sum, step);
    if (tid % lanes == 0)
        sums[tid / lanes] = sum;
    __syncthreads();
    if (tid >= n_here)
        return;
    sum = 0;
    for (int row = 0; row < rows; row++)
        sum += sums[row * kHeads + tid];
    const int j = j0 + tid;
    if (piece.begins_span)
        sum += history.open_mass[(int64_t)piece.sequence * n_kv + j];
    if (piece.closed >= 0)
        importance[piece.closed * n_kv + j] = sum;
    if (piece.ends_span)
        open[(int64_t)piece.span * n_kv + j] = piece.closed >= 0 ? 0.0 : sum;
}

__global__ void keep_open_kernel(const ts_span *spans, int n_spans, ts_tile_history history, const double *open) {
    const int i = blockIdx.x * kThreads + threadIdx.x, n_kv = history.n_kv_heads;
    if (i < n_spans * n_kv && spans[i / n_kv].sequence != TS_PADDING)
        history.open_mass[(int64_t)spans[i / n_kv].sequence * n_kv + i % n_kv] = open[i];
}

__global__ void sum_heads_kernel(const double *importance, int n_ranks, ts_tile_history history,
                                 ts_cuda_pieces pieces) {
    const int64_t tile = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    const int64_t n_tiles = pieces.closed_begin[pieces.n_spans];
    if (tile >= n_tiles)
        return;
    double sum = 0;
    for (int rank = 0; rank < n_ranks; rank++)
        for (int j = 0; j < history.n_kv_heads; j++)
            sum += importance[(rank * n_tiles + tile) * history.n_kv_heads + j];
    const ts_cuda_piece piece = pieces.at[pieces.closed_pieces[tile]];
    history.importance[piece.sequence][piece.tile] = sum;
}

__global__ void prune_kernel(ts_tile_history history, ts_cuda_pieces pieces) {
    __shared__ int parts[kThreads / 32];
    if (blockIdx.x >= pieces.closed_begin[pieces.n_spans])
        return;
    const ts_cuda_piece piece = pieces.at[pieces.closed_pieces[blockIdx.x]];
    const double *known = history.importance[piece.sequence];
    const double mine = known[piece.tile];
    int below = 0;
    for (int64_t u = threadIdx.x; u < piece.tile; u += kThreads)
        below += known[u] < mine;
    below = ts::block_sum(below, parts);
    if (threadIdx.x == 0)
        history.pruned[piece.sequence][piece.tile] =
            piece.tile >= history.sink_tiles && (double)below < history.prune_ratio * (double)piece.tile;
}

} // namespace

ts_status ts_cuda_tile_importance(ts_device *device, const ts_tile_importance_args *args) {
    ts_status status = TS_OK;
    const ts_tile_history &history = *args->history;
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    const int n_open = args->batch->n_spans * history.n_kv_heads;
    const unsigned n_kv = (unsigned)history.n_kv_heads;
    ts_cuda_pieces pieces;
    void *scratch;
    double *open;
    size_t n_bytes;
    TS_TRY(ts_cuda_check_activation(&args->qkvg, "tile_importance: qkvg"));
    TS_CHECK(
        (args->head_dim == 64 || args->head_dim == 128) && history.tile_size <= kMostTokens &&
            ((uintptr_t)args->qkvg.data | (size_t)args->qkvg.stride * ts_dtype_bytes(args->qkvg.dtype)) % 16 == 0,
        TS_ERR_INVALID,
        "cuda: tile_importance: heads of 64 or 128, tiles of up to %d tokens and rows that begin at multiples of 16 "
        "bytes are allowed",
        kMostTokens);
    ts_cuda_pieces_count(args->batch, history.tile_size, 0, &pieces);
    n_bytes = ts_cuda_pieces_bytes(&pieces);
    TS_TRY(ts_cuda_device_scratch(device, n_bytes + (size_t)n_open * sizeof(double), &scratch));
    open = (double *)((char *)scratch + n_bytes);
    TS_TRY(ts_cuda_pieces_make(stream, false, args->batch, history.tile_size, scratch, &pieces));
    if (args->qkvg.dtype == TS_F32)
        importance_kernel<<<dim3((unsigned)pieces.n_pieces, (n_kv + kHeads - 1) / kHeads), kSumThreads, 0, stream>>>(
            (const float *)args->qkvg.data, args->qkvg.stride, args->n_heads, args->head_dim, history, pieces,
            args->importance, open);
    else
        importance_kernel<<<dim3((unsigned)pieces.n_pieces, (n_kv + kHeads - 1) / kHeads), kSumThreads, 0, stream>>>(
            (const ts::bf16 *)args->qkvg.data, args->qkvg.stride, args->n_heads, args->head_dim, history, pieces,
            args->importance, open);
    keep_open_kernel<<<(unsigned)((n_open + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        args->batch->device_spans, args->batch->n_spans, history, open);
    TS_CUDA_TRY(cudaGetLastError());
done:
    return status;
}

ts_status ts_cuda_tile_prune(ts_device *device, const ts_tile_prune_args *args) {
    ts_status status = TS_OK;
    const ts_tile_history &history = *args->history;
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    ts_cuda_pieces pieces;
    void *scratch;
    ts_cuda_pieces_count(args->batch, history.tile_size, 0, &pieces);
    if (pieces.n_closed == 0)
        goto done;
    TS_TRY(ts_cuda_device_scratch(device, ts_cuda_pieces_bytes(&pieces), &scratch));
    TS_TRY(ts_cuda_pieces_make(stream, false, args->batch, history.tile_size, scratch, &pieces));
    sum_heads_kernel<<<(unsigned)((pieces.n_closed + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        args->importance, args->n_ranks, history, pieces);
    prune_kernel<<<(unsigned)pieces.n_closed, kThreads, 0, stream>>>(history, pieces);
    TS_CUDA_TRY(cudaGetLastError());
done:
    return status;
}
