#include "runtime/tile_cache.h"

#include <assert.h>
#include <stdlib.h>

// Device memory of one sequence's history, kept for the next sequence of the row when it is large enough.
typedef struct history_row {
    double *importance;
    uint8_t *pruned;
    int64_t n_tiles;
} history_row;

struct ts_tile_cache {
    ts_device *device;
    ts_tile_cache_shape shape;
    int32_t max_sequences;
    int64_t n_pages, page_table_stride;
    ts_tile_cache_layer *layers; // [n_layers]
    void **layer_memory;         // [n_layers]
    ts_tile_history history;
    history_row *rows;   // [max_sequences]
    int32_t *page_table; // device
    int32_t *pages;      // host copy of page_table
    int64_t *n_pages_of; // [max_sequences], -1: the row is closed
    int32_t *free_pages; // stack
    int64_t n_free_pages;
};

// The arrays of one layer, in this order in its memory. Element counts are per (sequence, head) or per (head, page).
typedef struct layer_array {
    size_t offset_of_pointer, bytes;
    bool per_page;
} layer_array;

enum { MAX_ARRAYS = 17 };

static size_t aligned(size_t n_bytes) {
    return (n_bytes + 255) / 256 * 256;
}

// Of state_rest, for a KV head.
static size_t rest_bytes(const ts_tile_cache_shape *shape) {
    const bool has_rest = shape->open_dtype == TS_BF16 && !shape->is_sparse;
    return has_rest ? (size_t)shape->head_dim * (size_t)shape->head_dim * sizeof(int16_t) : 0;
}

static int layer_arrays(const ts_tile_cache_shape *shape, layer_array arrays[MAX_ARRAYS]) {
    const size_t d = (size_t)shape->head_dim;
    const size_t R = (size_t)ts_open_rows(shape->is_sparse, shape->open_dtype, shape->tile_size);
    const size_t open_bytes = R * d * ts_dtype_bytes(shape->open_dtype);
    const size_t state_bytes = d * d * ts_dtype_bytes(shape->open_dtype);
    const bool is_fp8 = shape->slot_dtype == TS_FP8_E4M3;
    const layer_array all[] = {
        {offsetof(ts_tile_cache_layer, open_k), open_bytes, false},
        {offsetof(ts_tile_cache_layer, open_v), open_bytes, false},
        {offsetof(ts_tile_cache_layer, open_gate), shape->open_dtype == TS_F32 ? 0 : R * sizeof(float), false},
        {offsetof(ts_tile_cache_layer, open_c), R * sizeof(double), false},
        {offsetof(ts_tile_cache_layer, query_sum), d * sizeof(float), false},
        {offsetof(ts_tile_cache_layer, decay_end), sizeof(double), false},
        {offsetof(ts_tile_cache_layer, state), state_bytes, false},
        {offsetof(ts_tile_cache_layer, state_rest), rest_bytes(shape), false},
        {offsetof(ts_tile_cache_layer, mass), d * sizeof(float), false},
        {offsetof(ts_tile_cache_layer, pairs), 2 * sizeof(int64_t), false},
        {offsetof(ts_tile_cache_layer, n_held), sizeof(int32_t), false},
        {offsetof(ts_tile_cache_layer, slot_state), d * d * ts_dtype_bytes(shape->slot_dtype), true},
        {offsetof(ts_tile_cache_layer, slot_scale), is_fp8 ? d * sizeof(float) : 0, true},
        {offsetof(ts_tile_cache_layer, slot_mass), d * sizeof(float), true},
        {offsetof(ts_tile_cache_layer, slot_decay_end), sizeof(double), true},
        {offsetof(ts_tile_cache_layer, slot_key), sizeof(double), true},
        {offsetof(ts_tile_cache_layer, slot_tile), sizeof(int64_t), true},
    };
    static_assert(sizeof all / sizeof *all == MAX_ARRAYS, "layer_array table");
    int n = 0;
    for (int i = 0; i < MAX_ARRAYS; i++)
        if (all[i].bytes > 0 && (!all[i].per_page || shape->is_sparse))
            arrays[n++] = all[i];
    return n;
}

static size_t bytes_of(const ts_tile_cache_shape *shape, bool per_page) {
    layer_array arrays[MAX_ARRAYS];
    size_t bytes = 0;
    for (int i = 0, n = layer_arrays(shape, arrays); i < n; i++)
        bytes += arrays[i].per_page == per_page ? arrays[i].bytes : 0;
    return bytes * (size_t)shape->n_kv_heads * (size_t)shape->n_layers;
}

ts_tile_cache_shape ts_tile_cache_shape_of(const ts_config *config, int tp_size) {
    return (ts_tile_cache_shape){
        .n_layers = config->n_layers,
        .n_heads = config->n_heads / tp_size,
        .n_kv_heads = config->n_kv_heads / tp_size,
        .head_dim = config->head_dim,
        .tile_size = config->tile_size,
        .is_sparse = config->is_sparse,
        .sparsity = config->sparsity,
        .open_dtype = TS_F32,
        .slot_dtype = TS_F32,
    };
}

int64_t ts_tile_cache_pages_for(const ts_tile_cache_shape *shape, int64_t n_tokens) {
    if (!shape->is_sparse)
        return 0;
    const ts_sparsity *rules = &shape->sparsity;
    const int64_t n_tiles = n_tokens / shape->tile_size;
    if (rules->cache_tiles == 0)
        return n_tiles;
    // Even where no tile is recent, the one that has just completed stands beside the old ones until one is dropped.
    const int64_t recent = rules->recent_tiles > 0 ? rules->recent_tiles : 1;
    const int64_t most = rules->cache_tiles / rules->cache_lanes * rules->cache_lanes + rules->sink_tiles + recent;
    return n_tiles < most ? n_tiles : most;
}

size_t ts_tile_cache_page_bytes(const ts_tile_cache_shape *shape) {
    return bytes_of(shape, true);
}

size_t ts_tile_cache_sequence_bytes(const ts_tile_cache_shape *shape) {
    return bytes_of(shape, false);
}

ts_tile_cache_layer ts_tile_cache_layer_of(const ts_tile_cache_shape *shape, int64_t n_pages) {
    // The largest share of the pool that one sequence may own.
    const int64_t most = ts_tile_cache_pages_for(shape, INT64_MAX);
    const int64_t n = shape->is_sparse ? n_pages : 0;
    return (ts_tile_cache_layer){
        .n_heads = shape->n_heads,
        .n_kv_heads = shape->n_kv_heads,
        .head_dim = shape->head_dim,
        .tile_size = shape->tile_size,
        .is_sparse = shape->is_sparse,
        .sparsity = shape->sparsity,
        .n_pages = n,
        .page_table_stride = most < n ? most : n,
        .open_dtype = shape->open_dtype,
        .slot_dtype = shape->slot_dtype,
    };
}

static ts_status create_layer(ts_tile_cache *cache, int32_t l) {
    ts_status status = TS_OK;
    const ts_tile_cache_shape *shape = &cache->shape;
    ts_tile_cache_layer *layer = &cache->layers[l];
    layer_array arrays[MAX_ARRAYS];
    const int n_arrays = layer_arrays(shape, arrays);
    size_t total = 0;
    for (int i = 0; i < n_arrays; i++) {
        const size_t rows = arrays[i].per_page ? (size_t)cache->n_pages : (size_t)cache->max_sequences;
        size_t bytes;
        TS_CHECK(ts_size_mul(arrays[i].bytes * (size_t)shape->n_kv_heads, rows, &bytes) &&
                     ts_size_add(total, aligned(bytes), &total),
                 TS_ERR_MEMORY, "tile cache: %lld pages for %d sequences exceed the address space",
                 (long long)cache->n_pages, cache->max_sequences);
        arrays[i].bytes = bytes;
    }
    TS_TRY(ts_device_alloc(cache->device, total, "tile cache", &cache->layer_memory[l]));
    *layer = ts_tile_cache_layer_of(shape, cache->n_pages);
    layer->page_table = cache->page_table;
    layer->pruned = (const uint8_t *const *)cache->history.pruned;
    char *at = cache->layer_memory[l];
    for (int i = 0; i < n_arrays; i++) {
        memcpy((char *)layer + arrays[i].offset_of_pointer, &at, sizeof at);
        at += aligned(arrays[i].bytes);
    }
done:
    return status;
}

ts_status ts_tile_cache_create(ts_device *device, const ts_tile_cache_shape *shape, int32_t max_sequences,
                               int64_t n_pages, ts_tile_cache **out) {
    ts_status status = TS_OK;
    void *data;
    const size_t n = (size_t)max_sequences, n_layers = (size_t)shape->n_layers;
    ts_tile_cache *cache = calloc(1, sizeof *cache);
    TS_CHECK(cache, TS_ERR_MEMORY, "tile cache: out of memory");
    cache->device = device;
    cache->shape = *shape;
    cache->max_sequences = max_sequences;
    const ts_tile_cache_layer numbers = ts_tile_cache_layer_of(shape, n_pages);
    cache->n_pages = numbers.n_pages;
    cache->page_table_stride = numbers.page_table_stride;
    cache->layers = calloc(n_layers, sizeof *cache->layers);
    cache->layer_memory = calloc(n_layers, sizeof *cache->layer_memory);
    cache->rows = calloc(n, sizeof *cache->rows);
    cache->n_pages_of = malloc(n * sizeof *cache->n_pages_of);
    cache->pages = calloc(n * (size_t)cache->page_table_stride + 1, sizeof *cache->pages);
    cache->free_pages = malloc(((size_t)cache->n_pages + 1) * sizeof *cache->free_pages);
    TS_CHECK(cache->layers && cache->layer_memory && cache->rows && cache->n_pages_of && cache->pages &&
                 cache->free_pages,
             TS_ERR_MEMORY, "tile cache: out of memory for the tables of %lld pages", (long long)cache->n_pages);
    for (int32_t s = 0; s < max_sequences; s++)
        cache->n_pages_of[s] = -1;
    cache->n_free_pages = cache->n_pages;
    for (int64_t i = 0; i < cache->n_pages; i++) // lowest page on top
        cache->free_pages[i] = (int32_t)(cache->n_pages - 1 - i);

    TS_TRY(ts_device_alloc(device, n * (size_t)cache->page_table_stride * sizeof(int32_t), "page table", &data));
    cache->page_table = data;
    cache->history = (ts_tile_history){
        .n_kv_heads = shape->n_kv_heads,
        .tile_size = shape->tile_size,
        .sink_tiles = shape->sparsity.sink_tiles,
        .prune_ratio = shape->sparsity.prune_ratio,
    };
    TS_TRY(ts_device_alloc(device, n * (size_t)shape->n_kv_heads * sizeof(double), "tile importance", &data));
    cache->history.open_mass = data;
    TS_TRY(ts_device_alloc(device, n * sizeof(double *), "tile importance", &data));
    cache->history.importance = data;
    TS_TRY(ts_device_alloc(device, n * sizeof(uint8_t *), "tile importance", &data));
    cache->history.pruned = data;
    for (int32_t l = 0; l < shape->n_layers; l++)
        TS_TRY(create_layer(cache, l));
    *out = cache;
    cache = NULL;
done:
    ts_tile_cache_free(cache);
    return status;
}

void ts_tile_cache_free(ts_tile_cache *cache) {
    if (!cache)
        return;
    for (int32_t l = 0; cache->layer_memory && l < cache->shape.n_layers; l++)
        ts_device_release(cache->device, cache->layer_memory[l]);
    for (int32_t s = 0; cache->rows && s < cache->max_sequences; s++) {
        ts_device_release(cache->device, cache->rows[s].importance);
        ts_device_release(cache->device, cache->rows[s].pruned);
    }
    ts_device_release(cache->device, cache->page_table);
    ts_device_release(cache->device, cache->history.open_mass);
    ts_device_release(cache->device, (void *)cache->history.importance);
    ts_device_release(cache->device, (void *)cache->history.pruned);
    free(cache->layers);
    free(cache->layer_memory);
    free(cache->rows);
    free(cache->pages);
    free(cache->n_pages_of);
    free(cache->free_pages);
    free(cache);
}

int64_t ts_tile_cache_free_pages(const ts_tile_cache *cache) {
    return cache->n_free_pages;
}

// Room for n_tiles of history in row `sequence`, and its addresses where the ops look for them.
static ts_status reserve_history(ts_tile_cache *cache, int32_t sequence, int64_t n_tiles) {
    ts_status status = TS_OK;
    history_row *row = &cache->rows[sequence];
    void *importance = NULL, *pruned = NULL;
    if (!cache->shape.is_sparse || n_tiles <= row->n_tiles)
        goto done;
    TS_TRY(ts_device_alloc(cache->device, (size_t)n_tiles * sizeof(double), "tile importance", &importance));
    TS_TRY(ts_device_alloc(cache->device, (size_t)n_tiles, "tile importance", &pruned));
    TS_TRY(ts_device_upload(cache->device, (void *)(cache->history.importance + sequence), &importance,
                            sizeof importance));
    TS_TRY(ts_device_upload(cache->device, (void *)(cache->history.pruned + sequence), &pruned, sizeof pruned));
    ts_device_release(cache->device, row->importance);
    ts_device_release(cache->device, row->pruned);
    *row = (history_row){importance, pruned, n_tiles};
    importance = pruned = NULL;
done:
    ts_device_release(cache->device, importance);
    ts_device_release(cache->device, pruned);
    return status;
}

// Zeroes row `sequence` of an array of `bytes` per KV head.
static ts_status zero_row(ts_tile_cache *cache, void *array, int32_t sequence, size_t bytes) {
    const size_t row_bytes = bytes * (size_t)cache->shape.n_kv_heads;
    return ts_device_zero(cache->device, (char *)array + (size_t)sequence * row_bytes, row_bytes);
}

ts_status ts_tile_cache_open(ts_tile_cache *cache, int32_t sequence, int64_t n_tokens) {
    ts_status status = TS_OK;
    assert(sequence >= 0 && sequence < cache->max_sequences && cache->n_pages_of[sequence] < 0);
    const int64_t n_pages = ts_tile_cache_pages_for(&cache->shape, n_tokens);
    const size_t d = (size_t)cache->shape.head_dim;
    TS_CHECK(n_pages <= cache->n_free_pages, TS_ERR_MEMORY,
             "tile cache: %lld tokens need %lld pages; %lld of %lld are free", (long long)n_tokens, (long long)n_pages,
             (long long)cache->n_free_pages, (long long)cache->n_pages);
    TS_TRY(reserve_history(cache, sequence, n_tokens / cache->shape.tile_size));
    int32_t *pages = cache->pages + sequence * cache->page_table_stride;
    for (int64_t i = 0; i < n_pages; i++)
        pages[i] = cache->free_pages[cache->n_free_pages - 1 - i];
    TS_TRY(ts_device_upload(cache->device, cache->page_table + sequence * cache->page_table_stride, pages,
                            (size_t)n_pages * sizeof *pages));
    TS_TRY(zero_row(cache, cache->history.open_mass, sequence, sizeof(double)));
    for (int32_t l = 0; l < cache->shape.n_layers; l++) {
        const ts_tile_cache_layer *layer = &cache->layers[l];
        TS_TRY(zero_row(cache, layer->decay_end, sequence, sizeof(double)));
        TS_TRY(zero_row(cache, layer->state, sequence, d * d * ts_dtype_bytes(layer->open_dtype)));
        if (layer->state_rest)
            TS_TRY(zero_row(cache, layer->state_rest, sequence, rest_bytes(&cache->shape)));
        TS_TRY(zero_row(cache, layer->mass, sequence, d * sizeof(float)));
        TS_TRY(zero_row(cache, layer->pairs, sequence, 2 * sizeof(int64_t)));
        TS_TRY(zero_row(cache, layer->n_held, sequence, sizeof(int32_t)));
    }
    cache->n_free_pages -= n_pages;
    cache->n_pages_of[sequence] = n_pages;
done:
    return status;
}

void ts_tile_cache_close(ts_tile_cache *cache, int32_t sequence) {
    assert(cache->n_pages_of[sequence] >= 0);
    const int32_t *pages = cache->pages + sequence * cache->page_table_stride;
    for (int64_t i = cache->n_pages_of[sequence] - 1; i >= 0; i--)
        cache->free_pages[cache->n_free_pages++] = pages[i];
    cache->n_pages_of[sequence] = -1;
}

// Copies every array of one layer that belongs to a sequence; pages one by one, as they lie anywhere.
static ts_status fork_layer(ts_tile_cache *cache, int32_t l, int32_t from, int32_t to, int64_t n_used) {
    ts_status status = TS_OK;
    const ts_tile_cache_shape *shape = &cache->shape;
    layer_array arrays[MAX_ARRAYS];
    const int n_arrays = layer_arrays(shape, arrays);
    const int32_t *from_pages = cache->pages + from * cache->page_table_stride;
    const int32_t *to_pages = cache->pages + to * cache->page_table_stride;
    for (int i = 0; i < n_arrays; i++) {
        char *base;
        memcpy(&base, (char *)&cache->layers[l] + arrays[i].offset_of_pointer, sizeof base);
        const size_t bytes = arrays[i].bytes;
        if (!arrays[i].per_page) {
            const size_t row = bytes * (size_t)shape->n_kv_heads;
            TS_TRY(ts_device_copy(cache->device, base + (size_t)to * row, base + (size_t)from * row, row));
            continue;
        }
        for (int32_t j = 0; j < shape->n_kv_heads; j++)
            for (int64_t p = 0; p < n_used; p++) {
                const size_t head = (size_t)j * (size_t)cache->n_pages;
                TS_TRY(ts_device_copy(cache->device, base + (head + (size_t)to_pages[p]) * bytes,
                                      base + (head + (size_t)from_pages[p]) * bytes, bytes));
            }
    }
done:
    return status;
}

ts_status ts_tile_cache_fork(ts_tile_cache *cache, int32_t from, int32_t to, int64_t n_positions) {
    ts_status status = TS_OK;
    const ts_tile_cache_shape *shape = &cache->shape;
    assert(cache->n_pages_of[from] >= 0 && cache->n_pages_of[to] >= 0);
    const int64_t n_used = ts_tile_cache_pages_for(shape, n_positions);
    assert(n_used <= cache->n_pages_of[to] && n_used <= cache->n_pages_of[from]);
    for (int32_t l = 0; l < shape->n_layers; l++)
        TS_TRY(fork_layer(cache, l, from, to, n_used));
    if (shape->is_sparse) {
        const size_t n_tiles = (size_t)(n_positions / shape->tile_size), n_kv = (size_t)shape->n_kv_heads;
        double *mass = cache->history.open_mass;
        TS_TRY(
            ts_device_copy(cache->device, mass + (size_t)to * n_kv, mass + (size_t)from * n_kv, n_kv * sizeof *mass));
        TS_TRY(ts_device_copy(cache->device, cache->rows[to].importance, cache->rows[from].importance,
                              n_tiles * sizeof(double)));
        TS_TRY(ts_device_copy(cache->device, cache->rows[to].pruned, cache->rows[from].pruned, n_tiles));
    }
done:
    return status;
}

const ts_tile_cache_layer *ts_tile_cache_layer_at(const ts_tile_cache *cache, int32_t layer) {
    return &cache->layers[layer];
}

const ts_tile_history *ts_tile_cache_history(const ts_tile_cache *cache) {
    return &cache->history;
}

ts_status ts_tile_cache_pairs(ts_tile_cache *cache, int32_t sequence, int64_t *available, int64_t *selected) {
    ts_status status = TS_OK;
    const int32_t n_kv_heads = cache->shape.n_kv_heads;
    int64_t sums[2] = {0, 0};
    int64_t *pairs = malloc((size_t)n_kv_heads * 2 * sizeof *pairs);
    TS_CHECK(pairs, TS_ERR_MEMORY, "tile cache: out of memory");
    for (int32_t l = 0; l < cache->shape.n_layers; l++) {
        TS_TRY(ts_device_download(cache->device, pairs, cache->layers[l].pairs + (int64_t)sequence * n_kv_heads * 2,
                                  (size_t)n_kv_heads * 2 * sizeof *pairs));
        for (int32_t j = 0; j < 2 * n_kv_heads; j++)
            sums[j % 2] += pairs[j];
    }
    *available = sums[0];
    *selected = sums[1];
done:
    free(pairs);
    return status;
}
