// The ops of `tessera bench kernel` that know sequences: rule 1 over a prompt; attention's prefill of one sequence in
// dense and in sparse form, its decode of many, and the step of that which closes tiles.
#include "launcher/bench_kernel.h"
#include "runtime/batch.h"
#include "runtime/tile_cache.h"

#include <stdio.h>
#include <stdlib.h>

static const double normalizer_eps = 1e-3, decay_temperature = 16;
static const ts_sparsity sparsity = {
    .skip_share = 1e-3, .cache_tiles = 512, .cache_lanes = 8, .recent_tiles = 2, .sink_tiles = 1};

typedef struct attention_case {
    ts_tile_cache *cache;
    ts_batch_buffer **buffers; // [n_buffers]
    const ts_batch **batches;  // [n_buffers]
    int n_buffers;
    int64_t position;   // decode: of the sequence in row 0
    double *importance; // rule 1: [tiles completed, KV] device
    ts_tensor qkvg, y;
} attention_case;

static ts_status attention_case_create(ts_kernel_bench *b, int64_t max_rows, int32_t n_sequences, int n_buffers,
                                       int64_t rows_of_a_batch, const ts_tile_cache_shape *shape, int64_t n_tokens,
                                       float decay_bias, attention_case *c) {
    ts_status status = TS_OK;
    const ts_bench_options *s = &b->shape;
    const int64_t n_heads_all = s->heads + 2 * s->kv_heads;
    *c = (attention_case){.n_buffers = n_buffers};
    c->buffers = calloc((size_t)n_buffers, sizeof *c->buffers);
    c->batches = calloc((size_t)n_buffers, sizeof *c->batches);
    TS_CHECK(c->buffers && c->batches, TS_ERR_MEMORY, "bench kernel: out of memory");
    for (int i = 0; i < n_buffers; i++)
        TS_TRY(ts_batch_buffer_create(b->device, rows_of_a_batch, &c->buffers[i]));
    TS_TRY(ts_tile_cache_create(b->device, shape, n_sequences, n_sequences * ts_tile_cache_pages_for(shape, n_tokens),
                                &c->cache));
    // Key gates share the decay's mean: they scale numerator and denominator alike.
    TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, max_rows, n_heads_all * s->head_dim + 2 * s->kv_heads,
                                     2 * s->kv_heads, decay_bias, &c->qkvg));
    TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, max_rows, s->heads * s->head_dim, 0, 0, &c->y));
done:
    return status;
}

static void attention_case_free(attention_case *c) {
    for (int i = 0; c->buffers && i < c->n_buffers; i++)
        ts_batch_buffer_free(c->buffers[i]);
    free(c->buffers);
    free(c->batches);
    ts_tile_cache_free(c->cache);
}

static ts_status run_attention(ts_kernel_bench *b, void *context, int64_t i) {
    const attention_case *c = context;
    const ts_batch *batch = c->batches[i % c->n_buffers];
    return ts_op_attention(b->device, &(ts_attention_args){batch, ts_tensor_rows(c->qkvg, 0, batch->n_rows),
                                                           ts_tile_cache_layer_at(c->cache, 0), decay_temperature,
                                                           normalizer_eps, ts_tensor_rows(c->y, 0, batch->n_rows)});
}

static ts_tile_cache_shape cache_shape(const ts_kernel_bench *b, bool is_sparse) {
    return (ts_tile_cache_shape){
        .n_layers = 1,
        .n_heads = (int32_t)b->shape.heads,
        .n_kv_heads = (int32_t)b->shape.kv_heads,
        .head_dim = (int32_t)b->shape.head_dim,
        .tile_size = 64,
        .is_sparse = is_sparse,
        .sparsity = is_sparse ? sparsity : (ts_sparsity){0},
        .open_dtype = b->dtype,
        .slot_dtype = b->dtype,
    };
}

static ts_status reopen(ts_kernel_bench *b, void *context) {
    attention_case *c = context;
    ts_tile_cache_close(c->cache, 0);
    return ts_tile_cache_open(c->cache, 0, b->shape.tokens);
}

// One whole prompt as the batch of an empty sequence 0, which is opened.
static ts_status take_prompt(ts_kernel_bench *b, attention_case *c) {
    ts_status status = TS_OK;
    const int64_t n = b->shape.tokens;
    int32_t *tokens = calloc((size_t)n, sizeof *tokens); // no op here looks at them
    TS_CHECK(tokens, TS_ERR_MEMORY, "bench kernel: out of memory");
    ts_batch_buffer_clear(c->buffers[0], false);
    TS_TRY(ts_batch_buffer_add(c->buffers[0], 0, 0, tokens, (int32_t)n));
    TS_TRY(ts_batch_buffer_upload(c->buffers[0], &c->batches[0]));
    TS_TRY(ts_tile_cache_open(c->cache, 0, n));
done:
    free(tokens);
    return status;
}

static ts_status run_tile_importance(ts_kernel_bench *b, void *context, int64_t i) {
    const attention_case *c = context;
    return ts_op_tile_importance(b->device, &(ts_tile_importance_args){c->batches[0], c->qkvg, (int32_t)b->shape.heads,
                                                                       (int32_t)b->shape.head_dim,
                                                                       ts_tile_cache_history(c->cache), c->importance});
}

static ts_status run_tile_prune(ts_kernel_bench *b, void *context, int64_t i) {
    const attention_case *c = context;
    return ts_op_tile_prune(b->device,
                            &(ts_tile_prune_args){c->batches[0], 1, c->importance, ts_tile_cache_history(c->cache)});
}

// Rule 1 for the tiles of a whole prompt: the importance of each, or which of them it prunes.
static ts_status bench_rule_1(ts_kernel_bench *b, bool prunes) {
    ts_status status = TS_OK;
    const ts_bench_options *s = &b->shape;
    ts_tile_cache_shape shape = cache_shape(b, true);
    shape.sparsity.prune_ratio = 0.25;
    const double n = (double)s->tokens, d = (double)s->head_dim, KV = (double)s->kv_heads;
    const double tiles = (double)(s->tokens / shape.tile_size);
    // Keys and their gates; or what each head says of a tile, and what is remembered of it.
    const double bytes =
        prunes ? tiles * (KV * 8 + 9) : n * KV * (d + 1) * (double)ts_dtype_bytes(b->dtype) + tiles * KV * 8;
    attention_case c;
    void *data;
    json_t *result;
    char text[64];
    TS_TRY(attention_case_create(b, s->tokens, 1, 1, s->tokens, &shape, s->tokens, 4.5f, &c));
    TS_TRY(ts_kernel_bench_take(b, (int64_t)((tiles + 1) * KV * 8), &data)); // not nothing where no tile is complete
    c.importance = data;
    TS_TRY(take_prompt(b, &c));
    TS_TRY(run_tile_importance(b, &c, 0));
    const ts_kernel_call call = {
        .prepare = reopen, .run = prunes ? run_tile_prune : run_tile_importance, .context = &c, .n_calls = 1};
    snprintf(text, sizeof text, "%lld tokens, %lld heads of %lld", (long long)s->tokens, (long long)s->kv_heads,
             (long long)s->head_dim);
    TS_TRY(ts_kernel_bench_time(b, prunes ? "tile_prune" : "tile_importance", text, bytes, 0, &call, &result));
done:
    attention_case_free(&c);
    return status;
}

ts_status ts_bench_tile_importance(ts_kernel_bench *b) {
    return bench_rule_1(b, false);
}

ts_status ts_bench_tile_prune(ts_kernel_bench *b) {
    return bench_rule_1(b, true);
}

// A whole prompt in one call, from an empty sequence.
static ts_status bench_attention_prefill(ts_kernel_bench *b, bool is_sparse) {
    ts_status status = TS_OK;
    const ts_bench_options *s = &b->shape;
    const ts_tile_cache_shape shape = cache_shape(b, is_sparse);
    const double n = (double)s->tokens, d = (double)s->head_dim, T = shape.tile_size;
    const double H = (double)s->heads, KV = (double)s->kv_heads;
    const double bytes = n * (2 * H * d + 2 * KV * d + 2 * KV) * (double)ts_dtype_bytes(b->dtype);
    double flops = 2 * n * (H * (d * d + T * d) + KV * d * d);
    attention_case c;
    json_t *result;
    int64_t available = 0, selected = 0;
    char text[96];
    // At a decay gate of about 4.5 a head remembers some sixty tiles, six in a hundred of 131,072 tokens' pairs.
    TS_TRY(attention_case_create(b, s->tokens, 1, 1, s->tokens, &shape, s->tokens, is_sparse ? 4.5f : 2.5f, &c));
    TS_TRY(take_prompt(b, &c));
    const ts_kernel_call call = {.prepare = reopen, .run = run_attention, .context = &c, .n_calls = 1};
    if (is_sparse) { // how many states it adds up is known after a call
        TS_TRY(run_attention(b, &c, 0));
        TS_TRY(ts_tile_cache_pairs(c.cache, 0, &available, &selected));
        flops += 2 * (double)selected * d * d;
    }
    snprintf(text, sizeof text, "%lld tokens, %lld of %lld heads of %lld, %s", (long long)s->tokens,
             (long long)s->kv_heads, (long long)s->heads, (long long)s->head_dim, is_sparse ? "sparse" : "dense");
    TS_TRY(ts_kernel_bench_time(b, is_sparse ? "attention prefill sparse" : "attention prefill dense", text, bytes,
                                flops, &call, &result));
    if (is_sparse)
        json_object_set_new(result, "pairs_selected",
                            json_real((double)selected / (double)(available ? available : 1)));
done:
    attention_case_free(&c);
    return status;
}

// The next T steps: sequence s stands s % T tokens further in its tile than sequence 0, so that every step completes a
// tile of some and open tiles, or groups of open tokens, are half full in the mean.
static ts_status prepare_steps(ts_kernel_bench *b, void *context) {
    ts_status status = TS_OK;
    attention_case *c = context;
    const int32_t token = 0;
    for (int i = 0; i < c->n_buffers; i++, c->position++) {
        ts_batch_buffer_clear(c->buffers[i], true);
        for (int32_t s = 0; s < b->shape.batch; s++)
            TS_TRY(ts_batch_buffer_add(c->buffers[i], s, c->position + s % c->n_buffers, &token, 1));
        TS_TRY(ts_batch_buffer_upload(c->buffers[i], &c->batches[i]));
    }
done:
    return status;
}

static ts_status bench_attention_decode(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const ts_bench_options *s = &b->shape;
    const ts_tile_cache_shape shape = cache_shape(b, false);
    const int64_t T = shape.tile_size, n_tokens = (s->repeat + 8) * T;
    const int64_t max_rows = s->batch * T > s->batch ? s->batch * T : s->batch;
    const double n = (double)s->batch, H = (double)s->heads, KV = (double)s->kv_heads, d = (double)s->head_dim;
    // Of a KV head: S^, z^, the mean number of open keys, values, gates and c (f64), and the row that is added. An R-th
    // of the heads fold these into S^: they read what BF16 left out of it, and write it in f32. F32 sums queries, too.
    const double element = (double)ts_dtype_bytes(b->dtype), open_row = 2 * d * element + (element < 4 ? 12 : 8);
    const double R = ts_open_rows(false, b->dtype, (int32_t)T);
    const double token = ((R - 1) / 2 + 1) * open_row + d * d * element + (element < 4 ? 1 : 3) * d * 4;
    const double folding = (d * d * (element < 4 ? 6 : 4) + d * 4) / R;
    const double bytes = n * (KV * (token + folding) + (2 * H * d + 2 * KV * d + 2 * KV) * element);
    const double flops = 2 * n * (H * (d * d + (double)T * d) + KV * d * d);
    attention_case c;
    json_t *result;
    int32_t tokens[128] = {0};
    char text[96];
    TS_TRY(attention_case_create(b, max_rows, (int32_t)s->batch, (int)T, max_rows, &shape, n_tokens, 2.5f, &c));
    ts_batch_buffer_clear(c.buffers[0], false);
    for (int32_t q = 0; q < s->batch; q++) {
        TS_TRY(ts_tile_cache_open(c.cache, q, n_tokens));
        TS_TRY(ts_batch_buffer_add(c.buffers[0], q, 0, tokens, (int32_t)(q % T + 1)));
    }
    TS_TRY(ts_batch_buffer_upload(c.buffers[0], &c.batches[0]));
    TS_TRY(run_attention(b, &c, 0));
    c.position = 1;
    const ts_kernel_call call = {.prepare = prepare_steps, .run = run_attention, .context = &c, .n_calls = T};
    snprintf(text, sizeof text, "%lld sequences, %lld of %lld heads of %lld", (long long)s->batch,
             (long long)s->kv_heads, (long long)s->heads, (long long)s->head_dim);
    TS_TRY(ts_kernel_bench_time(b, "attention decode", text, bytes, flops, &call, &result));
done:
    attention_case_free(&c);
    return status;
}

// All but the last token of a tile of every sequence, then the step that completes it.
static ts_status prepare_close(ts_kernel_bench *b, void *context) {
    ts_status status = TS_OK;
    attention_case *c = context;
    const int32_t tokens[128] = {0}, n_before = 63; // attention does not look at them
    for (int i = 0; i < 2; i++) {
        ts_batch_buffer_clear(c->buffers[i], i == 1);
        for (int32_t s = 0; s < b->shape.batch; s++)
            TS_TRY(ts_batch_buffer_add(c->buffers[i], s, c->position, tokens, i == 0 ? n_before : 1));
        TS_TRY(ts_batch_buffer_upload(c->buffers[i], &c->batches[i]));
        c->position += i == 0 ? n_before : 1;
    }
    TS_TRY(run_attention(b, c, 0));
done:
    return status;
}

static ts_status run_close(ts_kernel_bench *b, void *context, int64_t i) {
    return run_attention(b, context, 1);
}

// The step of decode at which every sequence completes a tile, in sparse form.
static ts_status bench_attention_close(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const ts_bench_options *s = &b->shape;
    const ts_tile_cache_shape shape = cache_shape(b, true);
    const int64_t T = shape.tile_size, all = s->tokens / T;
    const int64_t n_tiles = all < shape.sparsity.cache_tiles ? all : shape.sparsity.cache_tiles;
    const int64_t n_tokens = (n_tiles + s->repeat + 8) * T;
    const double n = (double)s->batch, H = (double)s->heads, KV = (double)s->kv_heads, d = (double)s->head_dim;
    const double element = (double)ts_dtype_bytes(b->dtype);
    attention_case c;
    json_t *result;
    int64_t before[2] = {0}, after[2] = {0};
    char text[96];
    TS_TRY(attention_case_create(b, s->batch * T, (int32_t)s->batch, 2, s->batch * T, &shape, n_tokens, 4.5f, &c));
    for (int32_t q = 0; q < s->batch; q++)
        TS_TRY(ts_tile_cache_open(c.cache, q, n_tokens));
    for (int64_t i = 0; i < n_tiles; i++) {
        if (i + 1 == n_tiles)
            TS_TRY(ts_tile_cache_pairs(c.cache, 0, &before[0], &before[1]));
        TS_TRY(prepare_close(b, &c));
        TS_TRY(run_close(b, &c, 0));
    }
    TS_TRY(ts_tile_cache_pairs(c.cache, 0, &after[0], &after[1]));
    // Of a KV head: the open tile, z of the tiles held and the states of those selected; a state is stored, S^ is too.
    const double selected = (double)(after[1] - before[1]) / KV;
    const double bytes =
        n * KV * ((double)T * 2 * d * element + (double)n_tiles * d * 4 + (selected + 2) * d * d * element);
    const double flops = 2 * n * (KV * ((double)T + selected) * d * d + H * (d * d + (double)T * d));
    const ts_kernel_call call = {.prepare = prepare_close, .run = run_close, .context = &c, .n_calls = 1};
    snprintf(text, sizeof text, "%lld sequences, %lld of %lld heads of %lld, %lld tiles held, %.0f selected",
             (long long)s->batch, (long long)s->kv_heads, (long long)s->heads, (long long)s->head_dim,
             (long long)n_tiles, selected);
    TS_TRY(ts_kernel_bench_time(b, "attention decode sparse, closing", text, bytes, flops, &call, &result));
done:
    attention_case_free(&c);
    return status;
}

ts_status ts_bench_attention(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    TS_TRY(bench_attention_prefill(b, false));
    ts_kernel_bench_release(b);
    TS_TRY(bench_attention_prefill(b, true));
    ts_kernel_bench_release(b);
    TS_TRY(bench_attention_decode(b));
    ts_kernel_bench_release(b);
    TS_TRY(bench_attention_close(b));
done:
    return status;
}
