// Inside the CUDA backend only. A piece is the part of one tile that a span covers; the kernels that work tile by tile
// take one block a piece (and head). The list is made on the device from the batch's spans.
#ifndef TS_CUDA_PIECES_H
#define TS_CUDA_PIECES_H

#include "kernels/cuda/device.h"

#ifdef __cplusplus
extern "C" {
#endif

// Completed tiles of a span that are worked on together.
enum { TS_CUDA_GROUP = 32 };

typedef struct ts_cuda_piece {
    int32_t span, sequence;
    int32_t n_tokens, first; // first: its place in the tile, 0 or the tokens already open
    int64_t row;             // first row of the batch
    int64_t tile;            // index of the tile in its sequence
    int64_t closed;          // index among the completed tiles of the batch; -1 where the tile stays open
    int32_t begins_span, ends_span;
} ts_cuda_piece;

typedef struct ts_cuda_pieces {
    int32_t n_spans;
    // In a decode batch n_closed is the most there can be, one a span, so that what is launched depends on the number
    // of spans alone; how many there are stands on the device, in closed_begin[n_spans]. So with n_groups.
    int64_t n_pieces, n_closed, n_groups;
    // Tiles that the spans may hold before the batch, all of them; of each at most most_slots.
    int64_t n_held, most_slots;
    // Ranges of up to TS_CUDA_GROUP of them: those of span s begin at held_begin[s] / TS_CUDA_GROUP + s.
    int64_t n_held_ranges;
    ts_cuda_piece *at;      // [n_pieces]
    int64_t *begin;         // [n_spans + 1] first piece of each span
    int64_t *closed_begin;  // [n_spans + 1] first completed tile of each span
    int64_t *closed_pieces; // [n_closed] the piece that completes each
    int64_t *group_begin;   // [n_spans + 1] completed tiles of a span in groups of up to TS_CUDA_GROUP: first group
    int64_t *held_begin;    // [n_spans + 1] first of the held tiles of each span
} ts_cuda_pieces;

// Tiles that a span may hold before the batch, where a sequence can hold most_slots.
int64_t ts_cuda_span_held(const ts_span *span, int32_t tile_size, int64_t most_slots);

// Counts the pieces of a batch, on the host. most_slots: tiles that a sequence can hold; 0 where nobody asks for
// n_held.
void ts_cuda_pieces_count(const ts_batch *batch, int32_t tile_size, int64_t most_slots, ts_cuda_pieces *out);

// The most of everything that a batch of up to max_rows rows in max_spans spans can have; all sequences together hold
// at most n_pages tiles.
void ts_cuda_pieces_bound(int64_t max_rows, int32_t max_spans, int32_t tile_size, int64_t most_slots, int64_t n_pages,
                          ts_cuda_pieces *out);

size_t ts_cuda_pieces_bytes(const ts_cuda_pieces *pieces);

// Places the arrays in `memory` (ts_cuda_pieces_bytes, aligned to 256 bytes) and enqueues the kernel that fills them.
// early: on sm_90, before the kernel in front has ended.
ts_status ts_cuda_pieces_make(cudaStream_t stream, bool early, const ts_batch *batch, int32_t tile_size, void *memory,
                              ts_cuda_pieces *pieces);

#ifdef __cplusplus
}
#endif
#endif
