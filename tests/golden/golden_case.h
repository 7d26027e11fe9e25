// A golden model: a directory with a model and the float64 reference's logits for some tokens (make_golden.py).
#ifndef TS_TESTS_GOLDEN_CASE_H
#define TS_TESTS_GOLDEN_CASE_H

#include "kernels/cpu/cpu.h"
#include "runtime/feed.h"
#include "runtime/safetensors.h"

#include <criterion/criterion.h>
#include <stdio.h>

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

static inline golden_case golden_open(const char *directory, int n_threads) {
    golden_case c = {0};
    char path[1024];
    MUST(ts_cpu_device_create(n_threads, &c.device));
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

#endif
