// Inside the CUDA backend only: what the passes of the attention op share (attention.c gives their order).
#ifndef TS_CUDA_ATTENTION_H
#define TS_CUDA_ATTENTION_H

#include "kernels/cuda/pieces.h"

#ifdef __cplusplus
extern "C" {
#endif

// One call of the op, passed to kernels by value. All pointers are device memory. Tiles that complete in the batch are
// numbered as in pieces.closed; `s` is a span, `j` a KV head. An event of a span is the completion of one tile; events
// are numbered from 0 within the span.
typedef struct ts_cuda_attention {
    ts_tile_cache_layer cache;
    ts_cuda_pieces pieces;
    const ts_span *spans;
    int64_t n_rows;
    ts_tensor qkvg, y;
    double decay_temperature;
    float normalizer_eps;
    bool is_appended; // the tokens stand in the open tile and in query_sum already (decode)

    double *c;             // [KV, n_rows] eq. (5)
    float *gate;           // [KV, n_rows] eq. (2)
    float *query_sums;     // [n_pieces, KV, d]: of q^ over the tile so far; where it completes, the mean
    void *tile_states;     // [n_closed, KV, d, d] S_t of the slots' dtype; f32 in dense form
    float *tile_masses;    // [n_closed, KV, d] z_t
    double *tile_decays;   // [KV, n_closed] c_last
    double *tile_sums;     // [KV, n_closed] sum of z_t
    double *tile_ends;     // [KV, n_closed] E_t
    void *next_states;     // [n_closed, KV, d, d] S^ of the tile that follows, of the activations' dtype
    float *next_masses;    // [n_closed, KV, d]
    double *tile_keys;     // [KV, n_closed], and below: sparse form only
    int32_t *tile_deaths;  // [KV, n_closed] event from which the tile is no longer held; INT32_MAX: it stays
    int32_t *tile_slots;   // [KV, n_closed] slot it is stored in; -1: none
    int32_t *held_deaths;  // [n_spans, KV, page_table_stride] the same of the tiles held before the batch
    int32_t *holes;        // [n_spans, KV, page_table_stride] slots that those leave
    double *joining_keys;  // [KV, n_closed + n_spans * n_lead] keys of the tiles that may become old in the batch
    int64_t *list_at;      // [n_groups, KV, list_stride] tiles that a group of events selects: page, or ~index
    float *list_weights;   // [n_groups, KV, list_stride, TS_CUDA_GROUP] e^{E - E_t} where the event selects it, else 0
    int32_t *list_lengths; // [n_groups, KV]
    int64_t list_stride;
    int32_t n_lead;      // of joining_keys, how many of a span precede its first event
    int64_t most_events; // of any span
} ts_cuda_attention;

// Features, decay, query sums; tokens that continue an open tile are appended to it; eq. (7) for tiles that complete.
ts_status ts_cuda_attention_tiles(cudaStream_t stream, const ts_cuda_attention *a);
// Eq. (6), keys, and when each tile stops being held: rules 1 and 2.
ts_status ts_cuda_tile_rules(cudaStream_t stream, const ts_cuda_attention *a);
// Eq. (8) and rule 3 for every event; in dense form the recurrence.
ts_status ts_cuda_tile_select(cudaStream_t stream, const ts_cuda_attention *a);
// Eq. (9) for every piece.
ts_status ts_cuda_attention_outputs(cudaStream_t stream, const ts_cuda_attention *a);
// Stores the tiles that are still held, and what the spans leave in the cache: open tile, S^, E.
ts_status ts_cuda_tile_store(cudaStream_t stream, const ts_cuda_attention *a);
// Appends one token a span and gives its output; closes no tile.
ts_status ts_cuda_attention_decode(cudaStream_t stream, const ts_cuda_attention *a);

#ifdef __cplusplus
}
#endif
#endif
