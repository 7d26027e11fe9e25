// I3: the batch a sequence runs in does not change a bit. I6: dense form = tile form without pruning, skipping, budget.
#include "golden_case.h"

#include "runtime/decode_graphs.h"
#include "runtime/tile_cache.h"

// One sequence of the batch: prompt of n_prompt tokens from `offset` on, then decoded along the golden tokens.
typedef struct member {
    int64_t offset, n_prompt;
} member;

enum { N_DECODED = 150, MAX_MEMBERS = 21 };

// How the decoded tokens are read: op by op, or as a run does, where the backend can in graphs of few sizes.
typedef enum decode_steps { OP_BY_OP, IN_GRAPHS } decode_steps;

// Runs the members together and gives the logits of member `watched` after its prompt and every decoded token.
static void run_together(golden_case *golden, const member *members, int n_members, int watched, decode_steps steps,
                         float *out) {
    ts_tile_cache_shape shape = ts_tile_cache_shape_of(ts_model_config(golden->model), 1);
    shape.open_dtype = golden->device->compute_dtype;
    shape.slot_dtype = golden->device->slot_dtype;
    ts_tile_cache *cache;
    ts_batch_buffer *buffer;
    ts_decode_graphs *graphs;
    const ts_batch *batch;
    ts_tensor logits;
    float *all = malloc((size_t)(n_members * golden->vocab_size) * sizeof *all);
    int64_t n_pages = 0;
    for (int i = 0; i < n_members; i++)
        n_pages += ts_tile_cache_pages_for(&shape, members[i].n_prompt + N_DECODED);
    MUST(ts_tile_cache_create(golden->device, &shape, n_members, n_pages, &cache));
    MUST(ts_model_reserve(golden->model, 256));
    MUST(ts_batch_buffer_create(golden->device, 256, &buffer));
    MUST(ts_decode_graphs_create(golden->device, golden->self, golden->model, cache, NULL, 256, &graphs));
    for (int i = 0; i < n_members; i++) {
        MUST(ts_tile_cache_open(cache, i, members[i].n_prompt + N_DECODED));
        for (int64_t first = 0; first < members[i].n_prompt; first += 256) {
            const int64_t left = members[i].n_prompt - first, n = left < 256 ? left : 256;
            ts_batch_buffer_clear(buffer, false);
            MUST(ts_batch_buffer_add(buffer, i, first, golden->tokens + members[i].offset + first, (int32_t)n));
            MUST(ts_batch_buffer_upload(buffer, &batch));
            MUST(ts_model_forward(golden->model, cache, batch));
            if (i == watched && n == left)
                MUST(golden_logits(golden, n - 1, 1, true, out));
        }
    }
    for (int64_t step = 0; step < N_DECODED; step++) {
        ts_batch_buffer_clear(buffer, true);
        for (int i = 0; i < n_members; i++) {
            const int64_t position = members[i].n_prompt + step;
            MUST(ts_batch_buffer_add(buffer, i, position, golden->tokens + members[i].offset + position, 1));
        }
        if (steps == IN_GRAPHS) {
            MUST(ts_decode_graphs_run(graphs, buffer, NULL, &logits));
        } else {
            MUST(ts_batch_buffer_upload(buffer, &batch));
            MUST(ts_model_forward(golden->model, cache, batch));
            MUST(ts_model_logits(golden->model, NULL, n_members, true, &logits));
        }
        MUST(ts_device_download(golden->device, all, logits.data,
                                (size_t)(n_members * golden->vocab_size) * sizeof *all));
        memcpy(out + (step + 1) * golden->vocab_size, all + watched * golden->vocab_size,
               (size_t)golden->vocab_size * sizeof *out);
    }
    free(all);
    ts_decode_graphs_free(graphs);
    ts_batch_buffer_free(buffer);
    ts_tile_cache_free(cache);
}

static void check_batch_in(const char *directory, ts_dtype dtype) {
    golden_case golden = golden_open(directory, dtype, 2);
    const size_t n_values = (size_t)((N_DECODED + 1) * golden.vocab_size);
    float *alone = calloc(n_values, sizeof *alone), *together = calloc(n_values, sizeof *together);
    member members[MAX_MEMBERS];
    for (int i = 0; i < MAX_MEMBERS; i++)
        members[i] = (member){.offset = 7 * i, .n_prompt = 1 + 29 * i % 300};
    run_together(&golden, &members[5], 1, 0, OP_BY_OP, alone);
    // Every remainder of the blocks of rows that the kernels take: 1 to 21 sequences.
    for (int n = 1; n <= MAX_MEMBERS; n += n < 8 ? 1 : 5) {
        // The watched sequence stands first, in the middle and last.
        for (int place = 0; place < 3; place++) {
            member order[MAX_MEMBERS];
            const int watched = place == 0 ? 0 : place == 1 ? n / 2 : n - 1;
            for (int i = 0, other = 6; i < n; i++)
                order[i] = i == watched ? members[5] : members[other++ % MAX_MEMBERS];
            memset(together, 0xff, n_values * sizeof *together);
            run_together(&golden, order, n, watched, place == 0 ? OP_BY_OP : IN_GRAPHS, together);
            cr_expect_arr_eq(alone, together, n_values * sizeof *alone,
                             "%s %s: logits of a sequence differ between alone and in a batch of %d at %d", directory,
                             ts_dtype_name(dtype), n, watched);
        }
    }
    free(alone);
    free(together);
    golden_close(&golden);
}

static void check_batch_does_not_matter(const char *directory) {
    for (int i = 0; i < golden_n_dtypes; i++)
        check_batch_in(directory, golden_dtypes[i]);
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

// A text that repeats itself has tiles of equal importance. Rule 1 counts the strictly smaller, so they must tie
// exactly in every form, or rounding would choose among them.
static void check_ties_in(ts_dtype dtype) {
    const char *directory = TS_SOURCE_DIR "/tests/golden/edge_sparsity";
    enum { N = 1500, PERIOD = 3 * 64 };
    static const ts_feed_options runs[] = {{1 << 20, false}, {100, false}, {37, false}, {1, true}};
    const bool exact = dtype == TS_F32; // BF16 rounds what rules 2 and 3 compare differently in every form
    int32_t tokens[N];
    int64_t V;
    ts_feed_counts first_counts, counts;
    for (int i = 0; i < N; i++)
        tokens[i] = (i % PERIOD * 7 + 3) % 83;
    float *first = golden_logits_of(directory, dtype, 2, tokens, N, runs[0], &V, &first_counts);
    for (size_t r = 1; r < sizeof runs / sizeof *runs; r++) {
        float *other = golden_logits_of(directory, dtype, 2, tokens, N, runs[r], &V, &counts);
        const double difference = golden_difference(first, other, N * V);
        cr_expect(difference <= (exact ? 1e-5 : 2e-2), "%s, chunk %lld: relative difference %.2e", ts_dtype_name(dtype),
                  (long long)runs[r].chunk, difference);
        if (exact)
            cr_expect_eq(counts.pairs_selected, first_counts.pairs_selected);
        free(other);
    }
    free(first);
}

Test(invariants, tiles_of_the_same_tokens_tie) {
    for (int i = 0; i < golden_n_dtypes; i++)
        check_ties_in(golden_dtypes[i]);
}

Test(invariants, tile_form_without_sparsity_is_the_dense_form) {
    const char *tiles = TS_SOURCE_DIR "/tests/golden/weak_decay_no_skip";
    const char *dense = TS_SOURCE_DIR "/tests/golden/weak_decay_dense";
    for (int i = 0; i < golden_n_dtypes; i++) {
        const ts_dtype dtype = golden_dtypes[i];
        golden_case a = golden_open(tiles, dtype, 2), b = golden_open(dense, dtype, 2);
        cr_assert(ts_model_config(a.model)->is_sparse && !ts_model_config(b.model)->is_sparse);
        const int64_t n_tokens = a.n_tokens;
        int32_t *tokens = malloc((size_t)n_tokens * sizeof *tokens);
        memcpy(tokens, a.tokens, (size_t)n_tokens * sizeof *tokens);
        golden_close(&a);
        golden_close(&b);
        int64_t V;
        float *of_tiles = golden_logits_of(tiles, dtype, 2, tokens, n_tokens, (ts_feed_options){256, false}, &V, NULL);
        float *of_dense = golden_logits_of(dense, dtype, 2, tokens, n_tokens, (ts_feed_options){256, false}, &V, NULL);
        // Two orders of the same float32 sums; in BF16 states are rounded where one form rounds them.
        const double difference = golden_difference(of_tiles, of_dense, n_tokens * V);
        cr_expect(difference <= (dtype == TS_F32 ? 2e-6 : 1e-2), "%s: relative difference %.2e", ts_dtype_name(dtype),
                  difference);
        free(of_tiles);
        free(of_dense);
        free(tokens);
    }
}
