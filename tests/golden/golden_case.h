// A golden model: a directory with a model and the float64 reference's logits for some tokens (make_golden.py).
#ifndef TS_TESTS_GOLDEN_CASE_H
#define TS_TESTS_GOLDEN_CASE_H

#include "golden_device.h"
#include "runtime/feed.h"
#include "runtime/safetensors.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct golden_case {
    ts_device *device;
    ts_group *self;
    ts_model *model;
    ts_safetensors *file;
    const int32_t *tokens;
    int64_t n_tokens, vocab_size;
    const float *logits;       // [n_tokens, vocab_size]
    const int64_t *tile_pairs; // [2] available, selected; NULL where the file has none
} golden_case;

#define MUST(expression) cr_assert_eq((expression), TS_OK, "%s", ts_status_message())

static inline golden_case golden_open(const char *directory, ts_dtype dtype, int n_threads) {
    golden_case c = {0};
    char path[1024];
    MUST(golden_device_create(dtype, n_threads, &c.device));
    MUST(ts_world_create_self(&c.self));
    MUST(ts_model_load(c.device, c.self, directory, &c.model));
    snprintf(path, sizeof path, "%s/golden.safetensors", directory);
    MUST(ts_safetensors_open_file(path, &c.file));
    const ts_safetensor *tokens = ts_safetensors_find(c.file, "tokens");
    const ts_safetensor *logits = ts_safetensors_find(c.file, "logits");
    const ts_safetensor *pairs = ts_safetensors_find(c.file, "tile_pairs");
    cr_assert(tokens && logits, "%s holds no tokens or logits", path);
    c.tokens = tokens->data;
    c.n_tokens = tokens->shape[0];
    c.logits = logits->data;
    c.vocab_size = logits->shape[1];
    c.tile_pairs = pairs ? pairs->data : NULL;
    return c;
}

static inline void golden_close(golden_case *c) {
    ts_safetensors_free(c->file);
    ts_model_free(c->model);
    ts_device_free(c->device);
    ts_world_free(c->self);
}

// Logits of rows 0 to n - 1 of the last batch, or of the one `row` where it is not negative, in host memory.
static inline ts_status golden_logits(golden_case *c, int64_t row, int64_t n, bool decode, float *out) {
    ts_tensor logits;
    ts_status status = ts_model_logits(c->model, row < 0 ? NULL : &row, n, decode, &logits);
    if (status == TS_OK)
        status = ts_device_download(c->device, out, logits.data, (size_t)(n * c->vocab_size) * sizeof *out);
    return status;
}

typedef struct golden_store {
    golden_case *golden;
    float *logits;
} golden_store;

// A ts_feed_visitor: keeps all logits.
static inline ts_status golden_keep(void *context, int64_t first, int64_t n) {
    golden_store *store = context;
    return golden_logits(store->golden, -1, n, false, store->logits + first * store->golden->vocab_size);
}

// All logits of `n` tokens, the golden ones where `tokens` is NULL. To be freed.
static inline float *golden_logits_of(const char *directory, ts_dtype dtype, int n_threads, const int32_t *tokens,
                                      int64_t n, ts_feed_options options, int64_t *vocab_size, ts_feed_counts *counts) {
    golden_case golden = golden_open(directory, dtype, n_threads);
    *vocab_size = golden.vocab_size;
    golden_store store = {&golden, malloc((size_t)(n * golden.vocab_size) * sizeof(float))};
    MUST(ts_feed_tokens(golden.device, golden.self, golden.model, tokens ? tokens : golden.tokens, n, options,
                        golden_keep, &store, counts));
    golden_close(&golden);
    return store.logits;
}

static inline double golden_difference(const float *a, const float *b, int64_t n) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        const double difference = (double)a[i] - (double)b[i];
        error += difference * difference;
        norm += (double)b[i] * (double)b[i];
    }
    return sqrt(error / norm); // NaN where any value is
}

#endif
