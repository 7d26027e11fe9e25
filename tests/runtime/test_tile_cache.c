// The tile cache as a keeper of memory: who owns which page, what a copy holds, what a reused row remembers, and the
// plan that sizes it. What ops write there is theirs; here bytes stand for it.
#include "kernels/cpu/cpu.h"
#include "runtime/memory_plan.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static ts_device *device;

static void create_device(void) {
    cr_assert_eq(ts_cpu_device_create(1, &device), TS_OK);
}

static void free_device(void) {
    ts_device_free(device);
}

TestSuite(tile_cache, .init = create_device, .fini = free_device);

static const ts_tile_cache_shape dense = {
    .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 64, .tile_size = 64};

static ts_tile_cache_shape sparse_shape(int64_t cache_tiles, int32_t lanes, int32_t recent, int32_t sink) {
    ts_tile_cache_shape shape = dense;
    shape.is_sparse = true;
    shape.sparsity = (ts_sparsity){0.25, 0.001, cache_tiles, lanes, recent, sink};
    return shape;
}

static ts_tile_cache *create(const ts_tile_cache_shape *shape, int32_t max_sequences, int64_t n_pages) {
    ts_tile_cache *cache = NULL;
    cr_assert_eq(ts_tile_cache_create(device, shape, max_sequences, n_pages, &cache), TS_OK, "%s", ts_status_message());
    return cache;
}

#define OPEN(cache, sequence, n_tokens)                                                                                \
    cr_assert_eq(ts_tile_cache_open(cache, sequence, n_tokens), TS_OK, "%s", ts_status_message())

// ---- Pages

Test(tile_cache, a_dense_sequence_needs_no_page) {
    cr_assert_eq(ts_tile_cache_pages_for(&dense, 1), 0);
    cr_assert_eq(ts_tile_cache_pages_for(&dense, INT64_MAX), 0);
    cr_assert_eq(ts_tile_cache_page_bytes(&dense), 0);
    ts_tile_cache *cache = create(&dense, 2, 0);
    OPEN(cache, 0, INT64_C(1) << 40);
    OPEN(cache, 1, 1);
    ts_tile_cache_close(cache, 0);
    OPEN(cache, 0, 5);
    ts_tile_cache_free(cache);
}

Test(tile_cache, a_page_is_as_large_as_its_states) {
    const size_t heads = 2 * 2, rest = 64 * 4 + 8 + 8 + 8; // layers times KV heads; z, E, key, t
    ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    cr_assert_eq(ts_tile_cache_page_bytes(&shape), heads * (64 * 64 * 4 + rest));
    shape.slot_dtype = TS_BF16;
    cr_assert_eq(ts_tile_cache_page_bytes(&shape), heads * (64 * 64 * 2 + rest));
    shape.slot_dtype = TS_FP8_E4M3; // and the scale of each row
    cr_assert_eq(ts_tile_cache_page_bytes(&shape), heads * (64 * 64 + 64 * 4 + rest));
}

Test(tile_cache, without_a_budget_every_complete_tile_needs_a_page) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    cr_assert_eq(ts_tile_cache_pages_for(&shape, 1), 0);
    cr_assert_eq(ts_tile_cache_pages_for(&shape, 63), 0);
    cr_assert_eq(ts_tile_cache_pages_for(&shape, 64), 1);
    cr_assert_eq(ts_tile_cache_pages_for(&shape, 127), 1);
    cr_assert_eq(ts_tile_cache_pages_for(&shape, 64 * 1000), 1000);
}

Test(tile_cache, a_budget_bounds_the_pages) {
    const ts_tile_cache_shape shape = sparse_shape(16, 4, 2, 1);
    cr_assert_eq(ts_tile_cache_pages_for(&shape, 64 * 5), 5);
    cr_assert_eq(ts_tile_cache_pages_for(&shape, 64 * 19), 19);
    cr_assert_eq(ts_tile_cache_pages_for(&shape, 64 * 20), 19); // 16 old ones, 2 recent, 1 sink
    cr_assert_eq(ts_tile_cache_pages_for(&shape, INT64_MAX), 19);
    const ts_tile_cache_shape uneven = sparse_shape(18, 4, 2, 1); // lanes hold 4 each, rounded down
    cr_assert_eq(ts_tile_cache_pages_for(&uneven, INT64_MAX), 19);
    const ts_tile_cache_shape no_recent = sparse_shape(16, 4, 0, 0); // the tile just completed stands beside the old
    cr_assert_eq(ts_tile_cache_pages_for(&no_recent, INT64_MAX), 17);
}

Test(tile_cache, pages_are_borrowed_and_given_back) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    ts_tile_cache *cache = create(&shape, 3, 10);
    cr_assert_eq(ts_tile_cache_free_pages(cache), 10);
    OPEN(cache, 0, 64 * 4);
    OPEN(cache, 2, 64 * 5 + 63);
    cr_assert_eq(ts_tile_cache_free_pages(cache), 1);
    OPEN(cache, 1, 63); // none
    cr_assert_eq(ts_tile_cache_free_pages(cache), 1);
    ts_tile_cache_close(cache, 2);
    cr_assert_eq(ts_tile_cache_free_pages(cache), 6);
    ts_tile_cache_close(cache, 0);
    ts_tile_cache_close(cache, 1);
    cr_assert_eq(ts_tile_cache_free_pages(cache), 10);
    ts_tile_cache_free(cache);
}

// After much opening and closing, the pages of open sequences are still different pages of the pool.
Test(tile_cache, no_page_has_two_owners) {
    enum { ROWS = 5, PAGES = 23 };
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    ts_tile_cache *cache = create(&shape, ROWS, PAGES);
    int64_t n_pages_of[ROWS];
    uint64_t random = 12345;
    for (int r = 0; r < ROWS; r++)
        n_pages_of[r] = -1;
    for (int i = 0; i < 2000; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        const int32_t row = (int32_t)(random >> 33) % ROWS;
        const int64_t n = (int64_t)(random >> 40) % 9;
        if (n_pages_of[row] >= 0) {
            ts_tile_cache_close(cache, row);
            n_pages_of[row] = -1;
        } else if (n <= ts_tile_cache_free_pages(cache)) {
            OPEN(cache, row, 64 * n + 10);
            n_pages_of[row] = n;
        }
        const ts_tile_cache_layer *layer = ts_tile_cache_layer_at(cache, 1);
        bool taken[PAGES] = {false};
        int64_t n_taken = 0;
        for (int r = 0; r < ROWS; r++)
            for (int64_t p = 0; p < n_pages_of[r]; p++, n_taken++) {
                const int32_t page = layer->page_table[r * layer->page_table_stride + p];
                cr_assert(page >= 0 && page < PAGES && !taken[page], "page %d", page);
                taken[page] = true;
            }
        cr_assert_eq(ts_tile_cache_free_pages(cache), PAGES - n_taken);
    }
    ts_tile_cache_free(cache);
}

Test(tile_cache, open_without_enough_pages_takes_nothing) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    ts_tile_cache *cache = create(&shape, 2, 4);
    OPEN(cache, 0, 64 * 3);
    cr_assert_eq(ts_tile_cache_open(cache, 1, 64 * 2), TS_ERR_MEMORY);
    cr_assert_str_eq(ts_status_message(), "tile cache: 128 tokens need 2 pages; 1 of 4 are free");
    cr_assert_eq(ts_tile_cache_free_pages(cache), 1);
    OPEN(cache, 1, 64); // the row is still closed, and can be opened for less
    cr_assert_eq(ts_tile_cache_free_pages(cache), 0);
    ts_tile_cache_free(cache);
}

// ---- Contents

// The arrays of row `s` of a layer, with their sizes.
typedef struct piece {
    char *data;
    size_t n_bytes;
} piece;

static int pieces_of(const ts_tile_cache *cache, const ts_tile_cache_shape *shape, int32_t l, int32_t s,
                     int64_t n_pages, piece out[256]) {
    const ts_tile_cache_layer *layer = ts_tile_cache_layer_at(cache, l);
    const size_t KV = (size_t)shape->n_kv_heads, d = (size_t)shape->head_dim, T = (size_t)shape->tile_size;
    const size_t at = (size_t)s * KV;
    int n = 0;
#define ROW(array, count)                                                                                              \
    out[n++] = (piece) {                                                                                               \
        (char *)(layer->array + at * (count)), KV *(count) * sizeof *layer->array                                      \
    }
    const size_t open_bytes = T * d * sizeof(float);
    out[n++] = (piece){(char *)layer->open_k + at * open_bytes, KV * open_bytes};
    out[n++] = (piece){(char *)layer->open_v + at * open_bytes, KV * open_bytes};
    ROW(open_c, T);
    ROW(query_sum, d);
    ROW(decay_end, 1);
    out[n++] = (piece){(char *)layer->state + at * d * d * sizeof(float), KV * d * d * sizeof(float)};
    ROW(mass, d);
    ROW(pairs, 2);
    ROW(n_held, 1);
    for (size_t j = 0; j < KV; j++)
        for (int64_t p = 0; p < n_pages; p++) {
            const size_t page =
                j * (size_t)layer->n_pages + (size_t)layer->page_table[s * layer->page_table_stride + p];
            out[n++] = (piece){(char *)layer->slot_state + page * d * d * sizeof(float), d * d * sizeof(float)};
            out[n++] = (piece){(char *)(layer->slot_mass + page * d), d * sizeof(float)};
            out[n++] = (piece){(char *)(layer->slot_decay_end + page), sizeof(double)};
            out[n++] = (piece){(char *)(layer->slot_key + page), sizeof(double)};
            out[n++] = (piece){(char *)(layer->slot_tile + page), sizeof(int64_t)};
        }
    return n;
}

static void fill(const ts_tile_cache *cache, const ts_tile_cache_shape *shape, int32_t s, int64_t n_pages, int seed) {
    piece pieces[256];
    for (int32_t l = 0; l < shape->n_layers; l++)
        for (int i = pieces_of(cache, shape, l, s, n_pages, pieces) - 1; i >= 0; i--)
            for (size_t b = 0; b < pieces[i].n_bytes; b++)
                pieces[i].data[b] = (char)(seed * 31 + l * 17 + i * 7 + (int)(b % 251));
}

static void check_filled(const ts_tile_cache *cache, const ts_tile_cache_shape *shape, int32_t s, int64_t n_pages,
                         int seed) {
    piece pieces[256];
    for (int32_t l = 0; l < shape->n_layers; l++)
        for (int i = pieces_of(cache, shape, l, s, n_pages, pieces) - 1; i >= 0; i--)
            for (size_t b = 0; b < pieces[i].n_bytes; b++)
                cr_assert_eq(pieces[i].data[b], (char)(seed * 31 + l * 17 + i * 7 + (int)(b % 251)),
                             "sequence %d, layer %d, array %d, byte %zu", s, l, i, b);
}

Test(tile_cache, a_fork_is_an_exact_copy_and_touches_nobody_else) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    enum { TILES = 3, TOKENS = 64 * TILES + 17 };
    ts_tile_cache *cache = create(&shape, 4, 4 * TILES);
    for (int32_t s = 0; s < 4; s++)
        OPEN(cache, s, TOKENS);
    for (int32_t s = 0; s < 4; s++)
        fill(cache, &shape, s, TILES, s);
    const ts_tile_history *history = ts_tile_cache_history(cache);
    for (int t = 0; t < TILES; t++) {
        history->importance[1][t] = 1.5 * t + 1;
        history->pruned[1][t] = t == 1;
        history->importance[2][t] = -1;
        history->pruned[2][t] = 7;
    }
    for (int j = 0; j < shape.n_kv_heads; j++)
        history->open_mass[1 * shape.n_kv_heads + j] = 10 + j;
    cr_assert_eq(ts_tile_cache_fork(cache, 1, 3, TOKENS), TS_OK);
    check_filled(cache, &shape, 0, TILES, 0);
    check_filled(cache, &shape, 1, TILES, 1);
    check_filled(cache, &shape, 2, TILES, 2);
    check_filled(cache, &shape, 3, TILES, 1);
    for (int t = 0; t < TILES; t++) {
        cr_assert_eq(history->importance[3][t], 1.5 * t + 1);
        cr_assert_eq(history->pruned[3][t], t == 1);
        cr_assert(history->importance[2][t] == -1 && history->pruned[2][t] == 7);
    }
    for (int j = 0; j < shape.n_kv_heads; j++)
        cr_assert_eq(history->open_mass[3 * shape.n_kv_heads + j], 10 + j);
    // What the copy does from now on is its own.
    fill(cache, &shape, 3, TILES, 9);
    check_filled(cache, &shape, 1, TILES, 1);
    ts_tile_cache_free(cache);
}

Test(tile_cache, a_fork_before_the_first_tile_is_complete) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    ts_tile_cache *cache = create(&shape, 2, 4);
    OPEN(cache, 0, 30);
    OPEN(cache, 1, 100); // room for more than it copies
    fill(cache, &shape, 0, 0, 5);
    cr_assert_eq(ts_tile_cache_fork(cache, 0, 1, 20), TS_OK);
    check_filled(cache, &shape, 1, 0, 5);
    ts_tile_cache_free(cache);
}

Test(tile_cache, a_reused_row_begins_from_zero) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    ts_tile_cache *cache = create(&shape, 2, 8);
    const ts_tile_history *history = ts_tile_cache_history(cache);
    OPEN(cache, 0, 64 * 2);
    OPEN(cache, 1, 64 * 2);
    fill(cache, &shape, 0, 2, 3);
    fill(cache, &shape, 1, 2, 4);
    for (int j = 0; j < shape.n_kv_heads; j++)
        history->open_mass[1 * shape.n_kv_heads + j] = 5;
    ts_tile_cache_close(cache, 1);
    OPEN(cache, 1, 64 * 5); // longer than before: the history must grow
    for (int32_t l = 0; l < shape.n_layers; l++) {
        const ts_tile_cache_layer *layer = ts_tile_cache_layer_at(cache, l);
        for (int32_t j = 0; j < shape.n_kv_heads; j++) {
            const int32_t at = shape.n_kv_heads + j;
            cr_assert_eq(layer->decay_end[at], 0);
            cr_assert_eq(layer->n_held[at], 0);
            cr_assert(layer->pairs[2 * at] == 0 && layer->pairs[2 * at + 1] == 0);
            for (int32_t i = 0; i < 64 * 64; i++)
                cr_assert_eq(((float *)layer->state)[at * 64 * 64 + i], 0);
            for (int32_t i = 0; i < 64; i++)
                cr_assert_eq(layer->mass[at * 64 + i], 0);
            cr_assert_eq(history->open_mass[at], 0);
        }
    }
    for (int t = 0; t < 5; t++) { // memory of its own, all of it
        history->importance[1][t] = t;
        history->pruned[1][t] = 1;
    }
    check_filled(cache, &shape, 0, 2, 3);
    int64_t available, selected;
    cr_assert_eq(ts_tile_cache_pairs(cache, 1, &available, &selected), TS_OK);
    cr_assert(available == 0 && selected == 0);
    ts_tile_cache_free(cache);
}

Test(tile_cache, pairs_are_summed_over_layers_and_heads) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    ts_tile_cache *cache = create(&shape, 2, 2);
    OPEN(cache, 1, 64);
    for (int32_t l = 0; l < 2; l++)
        for (int32_t j = 0; j < 2; j++) {
            int64_t *pairs = ts_tile_cache_layer_at(cache, l)->pairs + 2 * (2 + j);
            pairs[0] = 100 + 10 * l + j;
            pairs[1] = 1 + l;
        }
    int64_t available, selected;
    cr_assert_eq(ts_tile_cache_pairs(cache, 1, &available, &selected), TS_OK);
    cr_assert_eq(available, 100 + 101 + 110 + 111);
    cr_assert_eq(selected, 1 + 1 + 2 + 2);
    ts_tile_cache_free(cache);
}

Test(tile_cache, shape_of_a_shard) {
    const ts_config config = {.n_layers = 3, .n_heads = 8, .n_kv_heads = 4, .head_dim = 64, .tile_size = 64};
    const ts_tile_cache_shape whole = ts_tile_cache_shape_of(&config, 1), half = ts_tile_cache_shape_of(&config, 2);
    cr_assert(half.n_heads == 4 && half.n_kv_heads == 2 && half.n_layers == 3);
    cr_assert_eq(ts_tile_cache_sequence_bytes(&whole), 2 * ts_tile_cache_sequence_bytes(&half));
}

// ---- The plan

Test(tile_cache, bytes_of_pages_and_sequences) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    // State and mass in f32; decay, key and number of the tile in 8 bytes each; 2 layers of 2 heads.
    cr_assert_eq(ts_tile_cache_page_bytes(&shape), 4 * (64 * 64 * 4 + 64 * 4 + 3 * 8));
    // The open tile, the query sum, the decay, the selected state and mass, the pairs, the number of tiles held.
    cr_assert_eq(ts_tile_cache_sequence_bytes(&shape),
                 4 * (2 * 64 * 64 * 4 + 64 * 8 + 64 * 4 + 8 + 64 * 64 * 4 + 64 * 4 + 16 + 4));
}

// Open rows and S^ in BF16, and a gate a row: those of a tile, or in dense form the 16 after which they are folded into
// S^, beside which stands what BF16 leaves out of it.
Test(tile_cache, bytes_of_bf16_sequences) {
    ts_tile_cache_shape shape = dense, sparse = sparse_shape(0, 1, 2, 1);
    shape.open_dtype = sparse.open_dtype = TS_BF16;
    const size_t row = 2 * 64 * 2 + 4 + 8, rest = 64 * 4 + 8 + 64 * 4 + 16 + 4;
    cr_assert_eq(ts_tile_cache_sequence_bytes(&sparse), 4 * (64 * row + rest + 64 * 64 * 2));
    cr_assert_eq(ts_tile_cache_sequence_bytes(&shape), 4 * (16 * row + rest + 64 * 64 * 4));
}

Test(tile_cache, a_reused_row_of_bf16_begins_from_zero) {
    ts_tile_cache_shape shape = dense;
    shape.open_dtype = TS_BF16;
    ts_tile_cache *cache = create(&shape, 2, 0);
    const ts_tile_cache_layer *layer = ts_tile_cache_layer_at(cache, 1);
    OPEN(cache, 0, 64);
    OPEN(cache, 1, 64);
    const size_t row = (size_t)shape.n_kv_heads * 64 * 64;
    memset(layer->state, 1, 2 * row * sizeof(uint16_t));
    memset(layer->state_rest, 1, 2 * row * sizeof(int16_t));
    ts_tile_cache_close(cache, 1);
    OPEN(cache, 1, 64);
    for (size_t i = 0; i < 2 * row; i++) {
        const uint16_t expected = i < row ? 0x0101 : 0;
        cr_assert_eq(((const uint16_t *)layer->state)[i], expected, "S^ at %zu", i);
        cr_assert_eq(layer->state_rest[i], expected, "the rest of S^ at %zu", i);
    }
    ts_tile_cache_free(cache);
}

Test(tile_cache, plan_of_a_dense_model) {
    ts_memory_plan plan;
    const size_t bytes = ts_tile_cache_sequence_bytes(&dense);
    cr_assert_eq(ts_memory_plan_make(&dense, 7, 7 * bytes, &plan), TS_OK);
    cr_assert(plan.n_pages == 0 && plan.page_bytes == 0 && plan.cache_bytes == 7 * bytes);
    cr_assert_eq(ts_memory_plan_make(&dense, 7, 7 * bytes - 1, &plan), TS_ERR_MEMORY);
    cr_assert_not_null(strstr(ts_status_message(), "at most 6 sequences fit"), "%s", ts_status_message());
}

Test(tile_cache, plan_of_a_budget) {
    const ts_tile_cache_shape shape = sparse_shape(16, 4, 2, 1);
    const size_t page = ts_tile_cache_page_bytes(&shape), sequence = ts_tile_cache_sequence_bytes(&shape);
    ts_memory_plan plan;
    cr_assert_eq(ts_memory_plan_make(&shape, 3, (size_t)1 << 40, &plan), TS_OK);
    cr_assert_eq(plan.pages_per_sequence, 19);
    cr_assert_eq(plan.n_pages, 3 * 19); // no more than can be used
    cr_assert_eq(plan.cache_bytes, 3 * sequence + 57 * page);
    cr_assert_eq(ts_memory_plan_make(&shape, 3, 3 * sequence + 40 * page + page - 1, &plan), TS_OK);
    cr_assert_eq(plan.n_pages, 40);
    cr_assert_leq(plan.cache_bytes, 3 * sequence + 40 * page + page - 1);
    cr_assert_eq(ts_memory_plan_make(&shape, 3, 3 * (sequence + page), &plan), TS_OK);
    cr_assert_eq(ts_memory_plan_make(&shape, 3, 3 * (sequence + page) - 1, &plan), TS_ERR_MEMORY);
    cr_assert_not_null(strstr(ts_status_message(), "at most 2 sequences fit"), "%s", ts_status_message());
    ts_tile_cache *cache = create(&shape, 3, plan.n_pages);
    ts_tile_cache_free(cache);
}

Test(tile_cache, plan_without_a_budget_takes_what_there_is) {
    const ts_tile_cache_shape shape = sparse_shape(0, 1, 2, 1);
    ts_memory_plan plan;
    const size_t page = ts_tile_cache_page_bytes(&shape), sequence = ts_tile_cache_sequence_bytes(&shape);
    cr_assert_eq(ts_memory_plan_make(&shape, 2, 2 * sequence + 1000 * page, &plan), TS_OK);
    cr_assert_eq(plan.n_pages, 1000);
    cr_assert_eq(ts_memory_plan_make(&shape, 1, SIZE_MAX, &plan), TS_OK);
    cr_assert_eq(plan.n_pages, INT32_MAX); // pages are numbered in 32 bits
}

Test(tile_cache, plan_that_memory_cannot_hold) {
    const ts_memory_plan plan = {.cache_bytes = 600};
    cr_assert_eq(ts_memory_plan_check(&plan, "cuda", 100, 700), TS_OK);
    cr_assert_eq(ts_memory_plan_check(&plan, "cuda", 101, 700), TS_ERR_MEMORY);
    cr_assert_not_null(strstr(ts_status_message(), "lower --cache-memory"), "%s", ts_status_message());
    cr_assert_eq(ts_memory_plan_check(&plan, "cuda", SIZE_MAX, 700), TS_ERR_MEMORY);
    cr_assert_eq(ts_memory_plan_check(&(ts_memory_plan){.cache_bytes = SIZE_MAX}, "cuda", 0, 700), TS_ERR_MEMORY);
}
