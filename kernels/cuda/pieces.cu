#include "kernels/cuda/pieces.h"

namespace {

constexpr int kThreads = 256;

__host__ __device__ int64_t pieces_of(const ts_span &span, int64_t T, bool only_closing) {
    if (only_closing)
        return (span.position + span.n_tokens) % T == 0;
    return (span.position + span.n_tokens + T - 1) / T - span.position / T;
}

__host__ __device__ int64_t closed_of(const ts_span &span, int64_t T) {
    return (span.position + span.n_tokens) / T - span.position / T;
}

__global__ void pieces_kernel(const ts_span *spans, int T, bool only_closing, ts_cuda_pieces out) {
    if (threadIdx.x == 0) {
        int64_t pieces = 0, closed = 0;
        for (int32_t s = 0; s < out.n_spans; s++) {
            out.begin[s] = pieces;
            out.closed_begin[s] = closed;
            pieces += pieces_of(spans[s], T, only_closing);
            closed += closed_of(spans[s], T);
        }
        out.begin[out.n_spans] = pieces;
        out.closed_begin[out.n_spans] = closed;
    }
    __syncthreads();
    // A warp a span, its lanes over the span's pieces.
    for (int32_t s = threadIdx.x / 32; s < out.n_spans; s += kThreads / 32) {
        const ts_span span = spans[s];
        const int64_t n = out.begin[s + 1] - out.begin[s];
        for (int64_t i = threadIdx.x % 32; i < n; i += 32) {
            const int64_t tile = span.position / T + i;
            const int64_t from = i == 0 ? span.position : tile * T;
            const int64_t all = span.position + span.n_tokens;
            const int64_t to = (tile + 1) * T < all ? (tile + 1) * T : all;
            const bool closes = to == (tile + 1) * T;
            const int64_t closed = out.closed_begin[s] + i;
            ts_cuda_piece piece;
            piece.span = s;
            piece.sequence = span.sequence;
            piece.n_tokens = (int32_t)(to - from);
            piece.first = (int32_t)(from % T);
            piece.row = span.row + from - span.position;
            piece.tile = tile;
            piece.closed = closes ? closed : -1;
            piece.begins_span = i == 0;
            piece.ends_span = i == n - 1;
            out.at[out.begin[s] + i] = piece;
            if (closes)
                out.closed_pieces[closed] = out.begin[s] + i;
        }
    }
}

size_t aligned(size_t n_bytes) {
    return (n_bytes + 255) / 256 * 256;
}

} // namespace

void ts_cuda_pieces_count(const ts_batch *batch, int32_t tile_size, bool only_closing, ts_cuda_pieces *out) {
    memset(out, 0, sizeof *out);
    out->n_spans = batch->n_spans;
    for (int32_t s = 0; s < batch->n_spans; s++) {
        out->n_pieces += pieces_of(batch->spans[s], tile_size, only_closing);
        out->n_closed += closed_of(batch->spans[s], tile_size);
    }
}

size_t ts_cuda_pieces_bytes(const ts_cuda_pieces *pieces) {
    return aligned((size_t)pieces->n_pieces * sizeof(ts_cuda_piece)) +
           2 * aligned(((size_t)pieces->n_spans + 1) * sizeof(int64_t)) +
           aligned((size_t)pieces->n_closed * sizeof(int64_t));
}

ts_status ts_cuda_pieces_make(cudaStream_t stream, const ts_batch *batch, int32_t tile_size, bool only_closing,
                              void *memory, ts_cuda_pieces *pieces) {
    char *at = (char *)memory;
    pieces->at = (ts_cuda_piece *)at;
    at += aligned((size_t)pieces->n_pieces * sizeof(ts_cuda_piece));
    pieces->begin = (int64_t *)at;
    at += aligned(((size_t)pieces->n_spans + 1) * sizeof(int64_t));
    pieces->closed_begin = (int64_t *)at;
    at += aligned(((size_t)pieces->n_spans + 1) * sizeof(int64_t));
    pieces->closed_pieces = (int64_t *)at;
    pieces_kernel<<<1, kThreads, 0, stream>>>(batch->device_spans, tile_size, only_closing, *pieces);
    return ts_cuda_status(cudaGetLastError(), "pieces of a batch");
}
