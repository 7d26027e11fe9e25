#include "kernels/cuda/attention/pieces.h"
#include "kernels/cuda/primitives/dependent_launch.cuh"

#include <algorithm>

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 64;

__host__ __device__ int64_t pieces_of(const ts_span &span, int64_t T) {
    return (span.position + span.n_tokens + T - 1) / T - span.position / T;
}

__host__ __device__ int64_t closed_of(const ts_span &span, int64_t T) {
    return (span.position + span.n_tokens) / T - span.position / T;
}

__host__ __device__ int64_t groups_of(int64_t n_closed) {
    return (n_closed + TS_CUDA_GROUP - 1) / TS_CUDA_GROUP;
}

__host__ __device__ int64_t held_of(const ts_span &span, int64_t T, int64_t most_slots) {
    return span.position / T < most_slots ? span.position / T : most_slots;
}

__host__ __device__ bool has_few_spans(const ts_cuda_pieces &pieces) {
    return pieces.n_spans < kThreads / 32;
}

// Sum over the block's threads up to and without this one, and over all.
__device__ int64_t scan_block(int64_t x, int64_t *totals, int64_t *sum) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t inclusive = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int64_t y = __shfl_up_sync(~0u, inclusive, step);
        inclusive += lane >= step ? y : 0;
    }
    __syncthreads();
    if (lane == 31)
        totals[warp] = inclusive;
    __syncthreads();
    int64_t before = 0;
    *sum = 0;
    for (int i = 0; i < kThreads / 32; i++) {
        before += i < warp ? totals[i] : 0;
        *sum += totals[i];
    }
    return before + inclusive - x;
}

// Every block finds where spans begin, and writes that like all others; the pieces are shared out.
__global__ void pieces_kernel(const ts_span *spans, int T, ts_cuda_pieces out) {
    ts::follow_front();
    __shared__ int64_t totals[kThreads / 32];
    int64_t pieces = 0, closed = 0, groups = 0, held = 0;
    for (int32_t s0 = 0; s0 <= out.n_spans; s0 += kThreads) { // one more than there are: the ends
        const int32_t s = s0 + (int32_t)threadIdx.x;
        const int64_t n = s < out.n_spans ? pieces_of(spans[s], T) : 0;
        const int64_t n_closed = s < out.n_spans ? closed_of(spans[s], T) : 0;
        const int64_t n_held = s < out.n_spans ? held_of(spans[s], T, out.most_slots) : 0;
        int64_t sums[4];
        const int64_t before[4] = {scan_block(n, totals, &sums[0]), scan_block(n_closed, totals, &sums[1]),
                                   scan_block(groups_of(n_closed), totals, &sums[2]),
                                   scan_block(n_held, totals, &sums[3])};
        if (s <= out.n_spans) {
            out.begin[s] = pieces + before[0];
            out.closed_begin[s] = closed + before[1];
            out.group_begin[s] = groups + before[2];
            out.held_begin[s] = held + before[3];
        }
        pieces += sums[0];
        closed += sums[1];
        groups += sums[2];
        held += sums[3];
    }
    __syncthreads();
    // Few spans: all threads of the grid over the pieces of each in turn. Many: a warp a span.
    const int n_threads = (int)gridDim.x * kThreads, thread = (int)(blockIdx.x * kThreads + threadIdx.x);
    const int together = has_few_spans(out) ? n_threads : 32;
    for (int32_t s = thread / together; s < out.n_spans; s += n_threads / together) {
        const ts_span span = spans[s];
        const int64_t n = out.begin[s + 1] - out.begin[s], first_tile = span.position / T;
        const int64_t all = span.position + span.n_tokens;
        for (int64_t i = thread % together; i < n; i += together) {
            const int64_t tile = first_tile + i, begin = tile * T;
            const int64_t from = i == 0 ? span.position : begin;
            const int64_t to = begin + T < all ? begin + T : all;
            const bool closes = to == begin + T;
            const int64_t closed = out.closed_begin[s] + i;
            ts_cuda_piece piece;
            piece.span = s;
            piece.sequence = span.sequence;
            piece.n_tokens = (int32_t)(to - from);
            piece.first = (int32_t)(from - begin);
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

int64_t ts_cuda_span_held(const ts_span *span, int32_t tile_size, int64_t most_slots) {
    return held_of(*span, tile_size, most_slots);
}

void ts_cuda_pieces_count(const ts_batch *batch, int32_t tile_size, int64_t most_slots, ts_cuda_pieces *out) {
    memset(out, 0, sizeof *out);
    out->n_spans = batch->n_spans;
    out->most_slots = most_slots;
    if (batch->decode) {
        out->n_pieces = out->n_closed = out->n_groups = batch->n_spans;
        return;
    }
    for (int32_t s = 0; s < batch->n_spans; s++) {
        out->n_pieces += pieces_of(batch->spans[s], tile_size);
        const int64_t n_closed = closed_of(batch->spans[s], tile_size);
        out->n_closed += n_closed;
        out->n_groups += groups_of(n_closed);
        out->n_held += held_of(batch->spans[s], tile_size, most_slots);
    }
    out->n_held_ranges = out->n_held / TS_CUDA_GROUP + out->n_spans;
}

void ts_cuda_pieces_bound(int64_t max_rows, int32_t max_spans, int32_t tile_size, int64_t most_slots, int64_t n_pages,
                          ts_cuda_pieces *out) {
    memset(out, 0, sizeof *out);
    out->n_spans = max_spans;
    // A span's tokens begin and end within a tile: one piece more than whole tiles at each end, and one more closed.
    const int64_t n_tiles = max_rows / tile_size;
    out->n_pieces = n_tiles + 2 * max_spans < max_rows ? n_tiles + 2 * max_spans : max_rows;
    out->n_closed = n_tiles + max_spans < max_rows ? n_tiles + max_spans : max_rows;
    out->n_groups = out->n_closed / TS_CUDA_GROUP + max_spans;
    out->most_slots = most_slots;
    out->n_held = n_pages / max_spans < most_slots ? n_pages : most_slots * max_spans;
    out->n_held_ranges = out->n_held / TS_CUDA_GROUP + max_spans;
}

size_t ts_cuda_pieces_bytes(const ts_cuda_pieces *pieces) {
    return aligned((size_t)pieces->n_pieces * sizeof(ts_cuda_piece)) +
           4 * aligned(((size_t)pieces->n_spans + 1) * sizeof(int64_t)) +
           aligned((size_t)pieces->n_closed * sizeof(int64_t));
}

ts_status ts_cuda_pieces_make(cudaStream_t stream, bool early, const ts_batch *batch, int32_t tile_size, void *memory,
                              ts_cuda_pieces *pieces) {
    char *at = (char *)memory;
    pieces->at = (ts_cuda_piece *)at;
    at += aligned((size_t)pieces->n_pieces * sizeof(ts_cuda_piece));
    pieces->begin = (int64_t *)at;
    at += aligned(((size_t)pieces->n_spans + 1) * sizeof(int64_t));
    pieces->closed_begin = (int64_t *)at;
    at += aligned(((size_t)pieces->n_spans + 1) * sizeof(int64_t));
    pieces->group_begin = (int64_t *)at;
    at += aligned(((size_t)pieces->n_spans + 1) * sizeof(int64_t));
    pieces->held_begin = (int64_t *)at;
    at += aligned(((size_t)pieces->n_spans + 1) * sizeof(int64_t));
    pieces->closed_pieces = (int64_t *)at;
    const int64_t n_threads = has_few_spans(*pieces) ? pieces->n_pieces : 32 * (int64_t)pieces->n_spans;
    const int64_t n_blocks = std::clamp((n_threads + kThreads - 1) / kThreads, (int64_t)1, kMostBlocks);
    (void)ts::launch_following(early, pieces_kernel, (unsigned)n_blocks, kThreads, 0, stream, batch->device_spans,
                               tile_size, *pieces);
    return ts_cuda_status(cudaGetLastError(), "pieces of a batch");
}
