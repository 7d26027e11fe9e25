// Inside the CUDA backend only: what the passes of the attention op share (attention.c gives their order).
#ifndef TS_CUDA_ATTENTION_H
#define TS_CUDA_ATTENTION_H

#include "kernels/cuda/attention/pieces.h"

#ifdef __cplusplus
extern "C" {
#endif

// Of neighbouring tiles: what bounds their scores (tile_choose.cu).
typedef struct ts_cuda_range {
    double largest_key, end; // end: E of the newest of them
    int64_t newest;          // tile
    int32_t first_death, last_death;
} ts_cuda_range;

// Of the tiles that a group of events selects.
typedef struct ts_cuda_list {
    int64_t first_closed; // the group's first event, among the completed tiles of the batch
    int64_t row;          // of the token after that
    int32_t n_rows;       // that the span has from there on, of as many as the tiles after the events may have
    int32_t length, n_events, sequence;
} ts_cuda_list;

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
    int capability;        // kernels of: 80, 90
    bool cache_is_settled; // the kernel in front does not write the cache, and all before it have ended when it does
    bool all_in_slots; // no budget and no pruning: every tile stays and is made in a new slot, in the order of events

    double *c;           // [KV, n_rows] eq. (5)
    float *gate;         // [KV, n_rows] eq. (2)
    float *query_sums;   // [n_pieces, KV, d]: of q^ over the tile so far; where it completes, the mean
    void *tile_states;   // [n_closed, KV, d, d] S_t of the slots' dtype, f32 in dense form: those of the tiles
                         // that are not made in their slots (tile_places)
    float *tile_scales;  // [n_closed, KV, d] of FP8 states, like slot_scale
    float *tile_masses;  // [n_closed, KV, d] z_t
    double *tile_decays; // [KV, n_closed] c_last
    double *tile_sums;   // [KV, n_closed] sum of z_t
    double *tile_ends;   // [KV, n_closed] E_t
    void *next_states;   // [n_closed, KV, d, d] S^ of the tile that follows, of the activations' dtype
    float *next_masses;  // [n_closed, KV, d], and above: NULL where S^ is used as it is summed
    double *tile_keys;   // [KV, n_closed], and below: sparse form only
    // NULL where all_in_slots, to held_after:
    int32_t *tile_deaths;       // [KV, n_closed] event from which the tile is no longer held; INT32_MAX: it stays
    int32_t *tile_slots;        // [KV, n_closed] slot it is stored in; -1: none
    int32_t *held_deaths;       // [KV, n_held] tile_deaths of the tiles held before the batch, span by span
    int32_t *holes;             // [KV, n_held] slots that those leave
    int64_t *tile_places;       // [KV, n_closed] where S_t is made: page, or ~index in tile_states; NULL: there, or
                                // as all_in_slots says
    int32_t *held_after;        // [n_spans, KV] tiles held after the batch
    double *joining_keys;       // [KV, n_closed + n_spans * n_lead] keys of the tiles that may become old in the batch
    ts_cuda_range *held_ranges; // [KV, n_held_ranges] of TS_CUDA_GROUP slots each
    ts_cuda_range *tile_ranges; // [KV, n_groups] of the tiles that complete at a group's events
    float *held_range_masses, *tile_range_masses; // the same, [d]: sum of e^{end - E_t} z_t
    // Of one wave of groups, first_group .. first_group + n_wave_groups - 1:
    int64_t *list_at;    // [n_wave_groups, KV, list_stride] tiles that a group selects: page, or ~index in tile_states
    float *list_weights; // [n_wave_groups, KV, list_stride, TS_CUDA_GROUP] e^{E - E_t} where an event selects, else 0;
                         // BF16 in the first half of each tile's bytes, where it is to multiply states of at most that
    ts_cuda_list *lists; // [n_wave_groups, KV]
    uint32_t *listed;    // [n_groups, KV], of all waves: 1 where the list is there
    int64_t first_group, n_wave_groups, list_stride;
    size_t n_listed;     // entries of the lists of the largest wave
    int64_t most_held;   // tiles of any span before the batch
    int32_t n_lead;      // of joining_keys, how many of a span precede its first event
    int64_t most_events; // of any span
} ts_cuda_attention;

// Bytes of scratch that no call of the op exceeds within the limits.
size_t ts_cuda_attention_scratch_bytes(const ts_device *device, const ts_run_limits *limits);

// Whether states are multiplied by their weights on the matrix units.
static inline bool ts_cuda_attention_sums_bf16(const ts_cuda_attention *a) {
    return a->cache.is_sparse && a->qkvg.dtype == TS_BF16 && a->cache.slot_dtype != TS_F32;
}

// Slots of the tiles that stay, where tile_places is to be known: where rule 2, which needs all keys, has no say.
ts_status ts_cuda_tile_place(cudaStream_t stream, const ts_cuda_attention *a);
// Features, decay, query sums; tokens that continue an open tile are appended to it; eq. (7) for tiles that complete.
ts_status ts_cuda_attention_tiles(cudaStream_t stream, const ts_cuda_attention *a);
// Eq. (6), keys, when each tile stops being held (rules 1 and 2), and the slots not known before.
ts_status ts_cuda_tile_rules(cudaStream_t stream, const ts_cuda_attention *a);
// Rule 3 for every event of one wave of groups.
ts_status ts_cuda_tile_choose(cudaStream_t stream, const ts_cuda_attention *a);
// Eq. (8) for every event of one wave of groups; in dense form the recurrence.
ts_status ts_cuda_tile_sum(cudaStream_t stream, const ts_cuda_attention *a);
// Eq. (9) for every piece; only_first: for those alone that S^ of the cache belongs to.
ts_status ts_cuda_attention_outputs(cudaStream_t stream, const ts_cuda_attention *a, bool only_first);
// Eq. (8) for every event of one wave of groups, and eq. (9) for the pieces that follow. For which calls:
bool ts_cuda_attention_groups_apply(const ts_cuda_attention *a);
ts_status ts_cuda_attention_groups(cudaStream_t stream, const ts_cuda_attention *a);
// Stores the tiles that are still held and not in their slots, and what the spans leave in the cache: open tile, S^, E.
ts_status ts_cuda_tile_store(cudaStream_t stream, const ts_cuda_attention *a);
// Appends one token a span and gives its output; in dense form closes the tiles that this completes.
ts_status ts_cuda_attention_decode(cudaStream_t stream, const ts_cuda_attention *a);
// Closes those in sparse form. The launch depends on the number of spans alone.
ts_status ts_cuda_attention_close(cudaStream_t stream, const ts_cuda_attention *a);

#ifdef __cplusplus
}
#endif
#endif
