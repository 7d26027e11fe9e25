// I3: the batch a sequence runs in does not change a bit. I6: dense form = tile form without pruning, skipping, budget.
#include "golden_case.h"

#include "runtime/batch.h"
#include "runtime/tile_cache.h"

#include <math.h>
#include <stdlib.h>

// One sequence of the batch: prompt of n_prompt tokens from `offset` on, then decoded along the golden tokens.
typedef struct member {
    int64_t offset, n_prompt;
} member;

enum { N_DECODED = 150, MAX_MEMBERS = 21 };

// Runs the members together and gives the logits of member `watched` after its prompt and every decoded token.
static void run_together(golden_case *golden, const member *members, int n_members, int watched, float *out) {
    const ts_tile_cache_shape shape = ts_tile_cache_shape_of(ts_model_config(golden->model), 1);
    ts_tile_cache *cache;
    ts_batch_buffer *buffer;
    const ts_batch *batch;
    ts_tensor logits;
    int64_t n_pages = 0;
    for (int i = 0; i < n_members; i++)
        n_pages += ts_tile_cache_pages_for(&shape, members[i].n_prompt + N_DECODED);
    MUST(ts_tile_cache_create(golden->device, &shape, n_members, n_pages, &cache));
    MUST(ts_model_reserve(golden->model, 256));
    MUST(ts_batch_buffer_create(golden->device, 256, &buffer));
    for (int i = 0; i < n_members; i++) {
        MUST(ts_tile_cache_open(cache, i, members[i].n_prompt + N_DECODED));
        for (int64_t first = 0; first < members[i].n_prompt; first += 256) {
            const int64_t left = members[i].n_prompt - first, n = left < 256 ? left : 256;
            ts_batch_buffer_clear(buffer, false);
            MUST(ts_batch_buffer_add(buffer, i, first, golden->tokens + members[i].offset + first, (int32_t)n));
            MUST(ts_batch_buffer_upload(buffer, &batch));
            MUST(ts_model_forward(golden->model, cache, batch));
            if (i == watched && n == left) {
                MUST(ts_model_logits(golden->model, (const int64_t[]){n - 1}, 1, true, &logits));
                memcpy(out, logits.data, (size_t)golden->vocab_size * sizeof *out);
            }
        }
    }
    for (int64_t step = 0; step < N_DECODED; step++) {
        ts_batch_buffer_clear(buffer, true);
        for (int i = 0; i < n_members; i++) {
            const int64_t position = members[i].n_prompt + step;
            MUST(ts_batch_buffer_add(buffer, i, position, golden->tokens + members[i].offset + position, 1));
        }
        MUST(ts_batch_buffer_upload(buffer, &batch));
        MUST(ts_model_forward(golden->model, cache, batch));
        MUST(ts_model_logits(golden->model, NULL, n_members, true, &logits));
        memcpy(out + (step + 1) * golden->vocab_size, (const float *)logits.data + watched * logits.stride,
               (size_t)golden->vocab_size * sizeof *out);
    }
    ts_batch_buffer_free(buffer);
    ts_tile_cache_free(cache);
}

static void check_batch_does_not_matter(const char *directory) {
    golden_case golden = golden_open(directory, 2);
    const size_t n_values = (size_t)((N_DECODED + 1) * golden.vocab_size);
    float *alone = calloc(n_values, sizeof *alone), *together = calloc(n_values, sizeof *together);
    member members[MAX_MEMBERS];
    for (int i = 0; i < MAX_MEMBERS; i++)
        members[i] = (member){.offset = 7 * i, .n_prompt = 1 + 29 * i % 300};
    run_together(&golden, &members[5], 1, 0, alone);
    // Every remainder of the blocks of rows that the kernels take: 2 to 21 sequences.
    for (int n = 2; n <= MAX_MEMBERS; n += n < 8 ? 1 : 5) {
        // The watched sequence stands first, in the middle and last.
        for (int place = 0; place < 3; place++) {
            member order[MAX_MEMBERS];
            const int watched = place == 0 ? 0 : place == 1 ? n / 2 : n - 1;
            for (int i = 0, other = 6; i < n; i++)
                order[i] = i == watched ? members[5] : members[other++ % MAX_MEMBERS];
            memset(together, 0xff, n_values * sizeof *together);
            run_together(&golden, order, n, watched, together);
            cr_expect_arr_eq(alone, together, n_values * sizeof *alone,
                             "%s: logits of a sequence differ between alone and in a batch of %d at %d", directory, n,
                             watched);
        }
    }
    free(alone);
    free(together);
    golden_close(&golden);
}

Test(invariants, batch_does_not_matter_mlp_gelu) {
    check_batch_does_not_matter(TS_SOURCE_DIR "/tests/golden/tiny_budget");
}

Test(invariants, batch_does_not_matter_swiglu_uneven_vocabulary) {
    check_batch_does_not_matter(TS_SOURCE_DIR "/tests/golden/gqa_swiglu_tied");
}

Test(invariants, batch_does_not_matter_dense) {
    check_batch_does_not_matter(TS_SOURCE_DIR "/tests/golden/dense");
}

typedef struct logit_store {
    golden_case *golden;
    float *logits;
} logit_store;

static ts_status keep(void *context, int64_t first, int64_t n) {
    logit_store *store = context;
    ts_tensor logits;
    const ts_status status = ts_model_logits(store->golden->model, NULL, n, false, &logits);
    if (status == TS_OK)
        memcpy(store->logits + first * store->golden->vocab_size, logits.data,
               (size_t)(n * store->golden->vocab_size) * sizeof(float));
    return status;
}

// All logits of `n` tokens on a device of n_threads.
static float *logits_of(const char *directory, int n_threads, const int32_t *tokens, int64_t n, ts_feed_options options,
                        int64_t *vocab_size, ts_feed_counts *counts) {
    golden_case golden = golden_open(directory, n_threads);
    *vocab_size = golden.vocab_size;
    logit_store store = {&golden, malloc((size_t)(n * golden.vocab_size) * sizeof(float))};
    MUST(ts_feed_tokens(golden.device, golden.self, golden.model, tokens ? tokens : golden.tokens, n, options, keep,
                        &store, counts));
    golden_close(&golden);
    return store.logits;
}

Test(invariants, threads_do_not_matter) {
    const char *directory = TS_SOURCE_DIR "/tests/golden/gqa_swiglu_tied";
    enum { N = 700 };
    int64_t V;
    ts_feed_counts counts;
    float *one = logits_of(directory, 1, NULL, N, (ts_feed_options){600, false}, &V, &counts);
    for (int n_threads = 2; n_threads <= 5; n_threads++) {
        float *more = logits_of(directory, n_threads, NULL, N, (ts_feed_options){600, false}, &V, &counts);
        cr_expect_arr_eq(one, more, (size_t)(N * V) * sizeof *one, "logits of 1 and %d threads differ", n_threads);
        free(more);
    }
    free(one);
}

// A text that repeats itself has tiles of equal importance. Rule 1 counts the strictly smaller, so they must tie
// exactly in every form, or rounding would choose among them.
Test(invariants, tiles_of_the_same_tokens_tie) {
    const char *directory = TS_SOURCE_DIR "/tests/golden/edge_sparsity";
    enum { N = 1500, PERIOD = 3 * 64 };
    static const ts_feed_options runs[] = {{1 << 20, false}, {100, false}, {37, false}, {1, true}};
    int32_t tokens[N];
    int64_t V;
    ts_feed_counts first_counts, counts;
    for (int i = 0; i < N; i++)
        tokens[i] = (i % PERIOD * 7 + 3) % 83;
    float *first = logits_of(directory, 2, tokens, N, runs[0], &V, &first_counts);
    for (size_t r = 1; r < sizeof runs / sizeof *runs; r++) {
        float *other = logits_of(directory, 2, tokens, N, runs[r], &V, &counts);
        double error = 0, norm = 0;
        for (int64_t i = 0; i < N * V; i++) {
            error += pow((double)first[i] - (double)other[i], 2);
            norm += pow((double)first[i], 2);
        }
        cr_expect(sqrt(error / norm) <= 1e-5, "chunk %lld: relative difference %.2e", (long long)runs[r].chunk,
                  sqrt(error / norm));
        cr_expect_eq(counts.pairs_selected, first_counts.pairs_selected);
        free(other);
    }
    free(first);
}

Test(invariants, tile_form_without_sparsity_is_the_dense_form) {
    golden_case tiles = golden_open(TS_SOURCE_DIR "/tests/golden/weak_decay_no_skip", 2);
    golden_case dense = golden_open(TS_SOURCE_DIR "/tests/golden/weak_decay_dense", 2);
    cr_assert(ts_model_config(tiles.model)->is_sparse && !ts_model_config(dense.model)->is_sparse);
    const size_t n = (size_t)(tiles.n_tokens * tiles.vocab_size);
    logit_store a = {&tiles, malloc(n * sizeof(float))}, b = {&dense, malloc(n * sizeof(float))};
    MUST(ts_feed_tokens(tiles.device, tiles.self, tiles.model, tiles.tokens, tiles.n_tokens,
                        (ts_feed_options){256, false}, keep, &a, NULL));
    MUST(ts_feed_tokens(dense.device, dense.self, dense.model, tiles.tokens, tiles.n_tokens,
                        (ts_feed_options){256, false}, keep, &b, NULL));
    double error = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        error += pow((double)a.logits[i] - (double)b.logits[i], 2);
        norm += pow((double)b.logits[i], 2);
    }
    // Two orders of the same float32 sums.
    cr_expect(sqrt(error / norm) <= 2e-6, "relative difference %.2e", sqrt(error / norm));
    free(a.logits);
    free(b.logits);
    golden_close(&tiles);
    golden_close(&dense);
}
