// The tile cache: for every sequence, layer and KV head of this rank the open tile, the selected state and the held
// tiles.
//
//     ts_tile_cache_shape shape = ts_tile_cache_shape_of(&config, tp_size);
//     TS_TRY(ts_tile_cache_create(device, &shape, max_sequences, n_pages, &cache));
//     TS_TRY(ts_tile_cache_open(cache, 3, n_tokens));     // sequence row 3 borrows pages for n_tokens positions
//     ... ts_model_forward ...                            // ops read and advance it
//     ts_tile_cache_close(cache, 3);                      // gives the pages back
//
// A page is one tile slot in every layer and KV head. The pool is taken once, at create (what rule 1 has to remember, 9
// bytes a tile, when a sequence opens); a sequence borrows the most pages it can ever hold when it opens, so that
// running out is a decision of the scheduler before it starts, never a failure in the middle. A dense model needs no
// page: its sequences are constant in size.
#ifndef TS_TILE_CACHE_H
#define TS_TILE_CACHE_H

#include "kernels/ops.h"
#include "runtime/config.h"

typedef struct ts_tile_cache ts_tile_cache;

// What one rank holds: heads are those of its tensor-parallel shard.
typedef struct ts_tile_cache_shape {
    int32_t n_layers, n_heads, n_kv_heads, head_dim, tile_size;
    bool is_sparse;
    ts_sparsity sparsity;
    ts_dtype open_dtype; // of the open tile and S^: the device's compute_dtype
    ts_dtype slot_dtype; // of held tile states: F32, BF16 or FP8_E4M3
} ts_tile_cache_shape;

// With open tiles and slots of F32.
ts_tile_cache_shape ts_tile_cache_shape_of(const ts_config *config, int tp_size);

// Tiles that a KV head of a sequence of n_tokens can hold at once: pages to borrow. 0 in dense form.
int64_t ts_tile_cache_pages_for(const ts_tile_cache_shape *shape, int64_t n_tokens);

// Bytes of one page, and of one sequence besides its pages.
size_t ts_tile_cache_page_bytes(const ts_tile_cache_shape *shape);
size_t ts_tile_cache_sequence_bytes(const ts_tile_cache_shape *shape);

// The numbers of a layer of such a cache, without its arrays: what ops are asked about before there is one.
ts_tile_cache_layer ts_tile_cache_layer_of(const ts_tile_cache_shape *shape, int64_t n_pages);

// `device` is borrowed until free.
ts_status ts_tile_cache_create(ts_device *device, const ts_tile_cache_shape *shape, int32_t max_sequences,
                               int64_t n_pages, ts_tile_cache **out);
void ts_tile_cache_free(ts_tile_cache *cache);

int64_t ts_tile_cache_free_pages(const ts_tile_cache *cache);

// Makes row `sequence` an empty sequence of at most n_tokens positions. TS_ERR_MEMORY when too few pages are free.
ts_status ts_tile_cache_open(ts_tile_cache *cache, int32_t sequence, int64_t n_tokens);
void ts_tile_cache_close(ts_tile_cache *cache, int32_t sequence);

// Makes `to`, just opened for as many tokens, an exact copy of `from` at n_positions.
ts_status ts_tile_cache_fork(ts_tile_cache *cache, int32_t from, int32_t to, int64_t n_positions);

const ts_tile_cache_layer *ts_tile_cache_layer_at(const ts_tile_cache *cache, int32_t layer);
const ts_tile_history *ts_tile_cache_history(const ts_tile_cache *cache);

// Tile pairs (query tile, earlier tile) available and selected so far, over this rank's layers and KV heads.
ts_status ts_tile_cache_pairs(ts_tile_cache *cache, int32_t sequence, int64_t *available, int64_t *selected);

#endif
