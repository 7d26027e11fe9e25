// Rule 1: how much a tile says in layer 0, and whether that is too little to keep it. Sums are f64 in one fixed order.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/pieces.h"

namespace {

constexpr int kThreads = 128;

// The sum of k^ over a piece and head. A tile that completes gets its importance; one that stays open leaves its sum
// in open [n_spans, KV], since other blocks may still read the history's.
template <typename T>
__global__ void importance_kernel(const T *qkvg, int64_t stride, int n_heads, int d, ts_tile_history history,
                                  ts_cuda_pieces pieces, double *importance, double *open) {
    __shared__ double parts[kThreads / 32];
    const ts_cuda_piece piece = pieces.at[blockIdx.x];
    if (piece.sequence == TS_PADDING)
        return;
    const int j = blockIdx.y, n_kv = history.n_kv_heads;
    const int64_t k = (int64_t)(n_heads + j) * d, gate = (int64_t)(n_heads + 2 * n_kv) * d + j;
    double sum = 0;
    for (int i = threadIdx.x / 32; i < piece.n_tokens; i += kThreads / 32) {
        const T *row = qkvg + (piece.row + i) * stride;
        const float g = ts::key_gate(row + gate);
        for (int e = threadIdx.x % 32; e < d; e += 32)
            sum += (double)(g * ts::elu1(ts::load(row + k + e)));
    }
    sum = ts::block_sum(sum, parts);
    if (threadIdx.x != 0)
        return;
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
    ts_cuda_pieces_count(args->batch, history.tile_size, &pieces);
    n_bytes = ts_cuda_pieces_bytes(&pieces);
    TS_TRY(ts_cuda_device_scratch(device, n_bytes + (size_t)n_open * sizeof(double), &scratch));
    open = (double *)((char *)scratch + n_bytes);
    TS_TRY(ts_cuda_pieces_make(stream, args->batch, history.tile_size, scratch, &pieces));
    if (args->qkvg.dtype == TS_F32)
        importance_kernel<<<dim3((unsigned)pieces.n_pieces, n_kv), kThreads, 0, stream>>>(
            (const float *)args->qkvg.data, args->qkvg.stride, args->n_heads, args->head_dim, history, pieces,
            args->importance, open);
    else
        importance_kernel<<<dim3((unsigned)pieces.n_pieces, n_kv), kThreads, 0, stream>>>(
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
    ts_cuda_pieces_count(args->batch, history.tile_size, &pieces);
    if (pieces.n_closed == 0)
        goto done;
    TS_TRY(ts_cuda_device_scratch(device, ts_cuda_pieces_bytes(&pieces), &scratch));
    TS_TRY(ts_cuda_pieces_make(stream, args->batch, history.tile_size, scratch, &pieces));
    sum_heads_kernel<<<(unsigned)((pieces.n_closed + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        args->importance, args->n_ranks, history, pieces);
    prune_kernel<<<(unsigned)pieces.n_closed, kThreads, 0, stream>>>(history, pieces);
    TS_CUDA_TRY(cudaGetLastError());
done:
    return status;
}
