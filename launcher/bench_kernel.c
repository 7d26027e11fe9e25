// `tessera bench kernel`: every op alone, at given shapes, on the device's own clock. Inputs are random, and where they
// are small one call takes others than the call before it, so that no cache has them already.
#include "launcher/bench.h"
#include "launcher/devices.h"
#include "runtime/batch.h"
#include "runtime/weight_source.h"

#include <stdio.h>
#include <stdlib.h>

enum { MAX_SETS = 64, MAX_BLOCKS = 4096 };
static const int64_t cold_bytes = INT64_C(256) << 20; // a few times the largest cache
static const double least_sample_seconds = 2e-3;      // of a row of calls that are timed together
static const double eps = 1e-6, normalizer_eps = 1e-3, decay_temperature = 16;
static const ts_sparsity sparsity = {
    .skip_share = 1e-3, .cache_tiles = 512, .cache_lanes = 8, .recent_tiles = 2, .sink_tiles = 1};

typedef struct kernel_bench {
    ts_device *device;
    ts_bench_options shape; // complete
    ts_dtype dtype;         // of activations and weights
    double copy_rate;       // bytes read and written a second
    uint64_t n_drawn;       // buffers filled so far: each has numbers of its own
    json_t *results;
    double *samples; // [repeat]
    void *blocks[MAX_BLOCKS];
    int n_blocks; // device memory of the op that is timed now
} kernel_bench;

// One way to call an op. `prepare` comes before every row of calls and is not timed.
typedef struct kernel_call {
    ts_status (*prepare)(kernel_bench *b, void *context);
    ts_status (*run)(kernel_bench *b, void *context, int64_t i);
    void *context;
    int64_t n_calls; // of a row; 0: as many as take a while
} kernel_call;

static ts_status take(kernel_bench *b, int64_t n_bytes, void **out) {
    ts_status status = TS_OK;
    TS_CHECK(b->n_blocks < MAX_BLOCKS, TS_ERR_INVALID, "bench kernel: more than %d buffers for one op", MAX_BLOCKS);
    TS_TRY(ts_device_alloc(b->device, (size_t)n_bytes, "benchmark", out));
    b->blocks[b->n_blocks++] = *out;
done:
    return status;
}

static void release_all(kernel_bench *b) {
    while (b->n_blocks > 0)
        ts_device_release(b->device, b->blocks[--b->n_blocks]);
}

// Near normal numbers, from element to element.
static ts_weight_tensor draw(kernel_bench *b, int64_t n, float mean, float spread) {
    return (ts_weight_tensor){TS_F32, 1, n, NULL, 0x5851f42d4c957f2dull * ++b->n_drawn, mean, spread};
}

// Rows that lie one behind the other, whose first columns are drawn about 0 and whose last `n_last` about `last_mean`.
// Past some millions of elements they repeat.
static ts_status take_rows(kernel_bench *b, ts_dtype dtype, int64_t rows, int64_t cols, int64_t n_last, float last_mean,
                           ts_tensor *out) {
    ts_status status = TS_OK;
    const int64_t stride = (cols + 7) / 8 * 8, row_bytes = stride * (int64_t)ts_dtype_bytes(dtype);
    int64_t done = (INT64_C(1) << 22) / stride + 1;
    void *data;
    char *host = NULL;
    done = done < rows ? done : rows;
    TS_TRY(take(b, rows * row_bytes, &data));
    host = calloc((size_t)done, (size_t)row_bytes);
    TS_CHECK(host, TS_ERR_MEMORY, "bench kernel: out of memory");
    const ts_weight_tensor first = draw(b, done * cols, 0, 1), last = draw(b, done * cols, last_mean, 1);
    for (int64_t r = 0; r < done; r++) {
        char *row = host + r * row_bytes;
        ts_weight_tensor_read(&first, 0, r * cols, cols - n_last, dtype, row);
        ts_weight_tensor_read(&last, 0, r * cols, n_last, dtype,
                              row + (cols - n_last) * (int64_t)ts_dtype_bytes(dtype));
    }
    TS_TRY(ts_device_upload(b->device, data, host, (size_t)(done * row_bytes)));
    for (int64_t n; done < rows; done += n) {
        n = done < rows - done ? done : rows - done;
        TS_TRY(ts_device_copy(b->device, (char *)data + done * row_bytes, data, (size_t)(n * row_bytes)));
    }
    *out = (ts_tensor){data, dtype, rows, cols, stride};
done:
    free(host);
    return status;
}

// The same numbers in n_sets places.
static ts_status take_weights(kernel_bench *b, int64_t rows, int64_t cols, int n_sets, ts_tensor *out) {
    ts_status status = TS_OK;
    const ts_weight_tensor drawn = draw(b, rows * cols, 0, 0.03f);
    void *host = malloc((size_t)(rows * cols) * ts_dtype_bytes(b->dtype));
    TS_CHECK(host, TS_ERR_MEMORY, "bench kernel: out of memory");
    ts_weight_tensor_read(&drawn, 0, 0, rows * cols, b->dtype, host);
    for (int i = 0; i < n_sets; i++) {
        void *data;
        TS_TRY(take(b, (int64_t)ts_device_weight_bytes(b->device, rows, cols, b->dtype), &data));
        TS_TRY(ts_device_upload_weight(b->device, data, host, rows, cols, b->dtype));
        out[i] = ts_tensor_of(data, b->dtype, rows, cols);
    }
done:
    free(host);
    return status;
}

// How many sets of buffers keep a call's inputs out of the caches.
static int sets_for(int64_t bytes_of_a_set) {
    const int64_t n = cold_bytes / bytes_of_a_set + 1;
    return n < MAX_SETS ? (int)n : MAX_SETS;
}

static ts_status time_row(kernel_bench *b, const kernel_call *call, int64_t n_calls, int64_t *i, double *seconds) {
    ts_status status = TS_OK;
    if (call->prepare)
        TS_TRY(call->prepare(b, call->context));
    else
        TS_TRY(call->run(b, call->context, (*i)++)); // what follows is enqueued while this runs
    TS_TRY(ts_device_timer_start(b->device));
    for (int64_t c = 0; c < n_calls; c++)
        TS_TRY(call->run(b, call->context, (*i)++));
    TS_TRY(ts_device_timer_stop(b->device, seconds));
done:
    return status;
}

// Times an op and adds it to the results. *out is borrowed from them.
static ts_status time_op(kernel_bench *b, const char *op, const char *shape, double bytes, double flops,
                         const kernel_call *call, json_t **out) {
    ts_status status = TS_OK;
    int64_t i = 0, n_calls = call->n_calls ? call->n_calls : 1;
    double seconds;
    for (int warm = 0; warm < 2; warm++)
        TS_TRY(time_row(b, call, n_calls, &i, &seconds));
    while (!call->n_calls && seconds < least_sample_seconds && n_calls < 4096) {
        n_calls *= 2;
        TS_TRY(time_row(b, call, n_calls, &i, &seconds));
    }
    for (int64_t r = 0; r < b->shape.repeat; r++) {
        TS_TRY(time_row(b, call, n_calls, &i, &seconds));
        b->samples[r] = seconds / (double)n_calls;
    }
    const ts_bench_spread spread = ts_bench_spread_of(b->samples, b->shape.repeat);
    *out = json_pack("{s:s, s:s}", "op", op, "shape", shape);
    TS_CHECK(*out, TS_ERR_MEMORY, "bench kernel: out of memory");
    json_array_append_new(b->results, *out);
    ts_bench_set_spread(*out, "seconds", spread);
    json_object_set_new(*out, "bytes", json_real(bytes));
    json_object_set_new(*out, "gbytes_per_second", json_real(1e-9 * bytes / spread.median));
    json_object_set_new(*out, "tflops", json_real(1e-12 * flops / spread.median));
    json_object_set_new(*out, "share_of_copy", json_real(bytes / spread.median / b->copy_rate));
done:
    return status;
}

typedef struct copy_case {
    void *from, *to;
    size_t n_bytes;
} copy_case;

static ts_status run_copy(kernel_bench *b, void *context, int64_t i) {
    const copy_case *c = context;
    return ts_device_copy(b->device, c->to, c->from, c->n_bytes);
}

// What the other ops are measured against: every byte once read and once written.
static ts_status bench_copy(kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t rows = ts_bench_default(b->device, 0, 1 << 10, 1 << 13), cols = 1 << 15;
    ts_tensor from, to;
    json_t *result;
    char shape[64];
    TS_TRY(take_rows(b, TS_F32, rows, cols, 0, 0, &from));
    TS_TRY(take_rows(b, TS_F32, rows, cols, 0, 0, &to));
    copy_case c = {from.data, to.data, (size_t)(rows * cols) * sizeof(float)};
    const kernel_call call = {.run = run_copy, .context = &c};
    snprintf(shape, sizeof shape, "%zu MiB", c.n_bytes >> 20);
    TS_TRY(time_op(b, "copy", shape, 2 * (double)c.n_bytes, 0, &call, &result));
    b->copy_rate = 1e9 * ts_bench_number(result, "gbytes_per_second");
    json_object_set_new(result, "share_of_copy", json_real(1));
done:
    return status;
}

// Buffers of the ops that know no sequences. Which are used is the op's business.
typedef struct row_case {
    int n_sets;
    const int32_t *tokens;
    ts_tensor norm_weight;
    ts_tensor x[MAX_SETS], residual[MAX_SETS], w[MAX_SETS], y[MAX_SETS];
    ts_activation activation;
    bool row_invariant;
} row_case;

static ts_status run_embed(kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    return ts_op_embed(b->device, &(ts_embed_args){c->tokens, 0, c->w[i % c->n_sets], c->y[i % c->n_sets]});
}

static ts_status bench_embed(kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.tokens, D = b->shape.hidden, V = b->shape.vocabulary;
    const int64_t bytes = M * D * (int64_t)(ts_dtype_bytes(b->dtype) + sizeof(float)) + M * 4;
    row_case c = {.n_sets = sets_for(bytes)};
    int32_t *tokens = malloc((size_t)M * sizeof *tokens);
    void *data;
    json_t *result;
    char shape[64];
    TS_CHECK(tokens, TS_ERR_MEMORY, "bench kernel: out of memory");
    for (int64_t i = 0; i < M; i++)
        tokens[i] = (int32_t)((uint64_t)i * 2654435761u % (uint64_t)V);
    TS_TRY(take(b, M * (int64_t)sizeof *tokens, &data));
    TS_TRY(ts_device_upload(b->device, data, tokens, (size_t)M * sizeof *tokens));
    c.tokens = data;
    TS_TRY(take_weights(b, V, D, c.n_sets, c.w));
    for (int i = 0; i < c.n_sets; i++)
        TS_TRY(take_rows(b, TS_F32, M, D, 0, 0, &c.y[i]));
    snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)M, (long long)D);
    const kernel_call call = {.run = run_embed, .context = &c};
    TS_TRY(time_op(b, "embed", shape, (double)bytes, 0, &call, &result));
done:
    free(tokens);
    return status;
}

static ts_status run_rms_norm(kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    const int64_t set = i % c->n_sets;
    return ts_op_rms_norm(b->device, &(ts_rms_norm_args){c->x[set], &c->residual[set], c->norm_weight, eps, c->y[set]});
}

static ts_status bench_rms_norm(kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.tokens, D = b->shape.hidden;
    const int64_t bytes = M * D * (int64_t)(2 * ts_dtype_bytes(b->dtype) + 2 * sizeof(float));
    row_case c = {.n_sets = sets_for(bytes)};
    json_t *result;
    char shape[64];
    TS_TRY(take_rows(b, TS_F32, 1, D, 0, 0, &c.norm_weight));
    for (int i = 0; i < c.n_sets; i++) {
        TS_TRY(take_rows(b, TS_F32, M, D, 0, 0, &c.x[i]));
        TS_TRY(take_rows(b, b->dtype, M, D, 0, 0, &c.residual[i]));
        TS_TRY(take_rows(b, b->dtype, M, D, 0, 0, &c.y[i]));
    }
    snprintf(shape, sizeof shape, "[%lld, %lld] with residual", (long long)M, (long long)D);
    const kernel_call call = {.run = run_rms_norm, .context = &c};
    TS_TRY(time_op(b, "rms_norm", shape, (double)bytes, 0, &call, &result));
done:
    return status;
}

static ts_status run_swiglu(kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    return ts_op_swiglu(b->device, &(ts_swiglu_args){c->x[i % c->n_sets], c->y[i % c->n_sets]});
}

static ts_status bench_swiglu(kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.tokens, F = b->shape.intermediate;
    const int64_t bytes = 3 * M * F * (int64_t)ts_dtype_bytes(b->dtype);
    row_case c = {.n_sets = sets_for(bytes)};
    json_t *result;
    char shape[64];
    for (int i = 0; i < c.n_sets; i++) {
        TS_TRY(take_rows(b, b->dtype, M, 2 * F, 0, 0, &c.x[i]));
        TS_TRY(take_rows(b, b->dtype, M, F, 0, 0, &c.y[i]));
    }
    snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)M, (long long)F);
    const kernel_call call = {.run = run_swiglu, .context = &c};
    TS_TRY(time_op(b, "swiglu", shape, (double)bytes, 0, &call, &result));
done:
    return status;
}

static ts_status run_linear(kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    const int64_t set = i % c->n_sets;
    return ts_op_linear(b->device,
                        &(ts_linear_args){c->x[set], c->w[set], NULL, c->y[set], c->activation, c->row_invariant});
}

static ts_status bench_one_linear(kernel_bench *b, const char *op, int64_t M, int64_t N, int64_t K,
                                  ts_activation activation, ts_dtype out_dtype, bool row_invariant) {
    ts_status status = TS_OK;
    const int64_t element = (int64_t)ts_dtype_bytes(b->dtype);
    const int64_t bytes = (M * K + N * K) * element + M * N * (int64_t)ts_dtype_bytes(out_dtype);
    row_case c = {.n_sets = sets_for(bytes), .activation = activation, .row_invariant = row_invariant};
    json_t *result;
    char shape[96];
    TS_TRY(take_weights(b, N, K, c.n_sets, c.w));
    for (int i = 0; i < c.n_sets; i++) {
        TS_TRY(take_rows(b, b->dtype, M, K, 0, 0, &c.x[i]));
        TS_TRY(take_rows(b, out_dtype, M, N, 0, 0, &c.y[i]));
    }
    snprintf(shape, sizeof shape, "[%lld, %lld] to %lld%s", (long long)M, (long long)K, (long long)N,
             row_invariant ? ", row invariant" : "");
    const kernel_call call = {.run = run_linear, .context = &c};
    TS_TRY(time_op(b, op, shape, (double)bytes, 2 * (double)M * (double)N * (double)K, &call, &result));
done:
    release_all(b);
    return status;
}

// The products of a layer for a prompt and for a decode step, and those of the output layer, which a prompt needs once.
static ts_status bench_linear(kernel_bench *b) {
    ts_status status = TS_OK;
    const ts_bench_options *s = &b->shape;
    const int64_t D = s->hidden, F = s->intermediate, d = s->head_dim;
    const int64_t n_qkvg = (s->heads + 2 * s->kv_heads) * d + 2 * s->kv_heads;
    const struct {
        const char *op;
        int64_t N, K;
        ts_activation activation;
    } products[] = {
        {"linear qkvg", n_qkvg, D, TS_ACTIVATION_NONE},
        {"linear o", D, s->heads * d, TS_ACTIVATION_NONE},
        {"linear up", F, D, TS_ACTIVATION_GELU_TANH},
        {"linear down", D, F, TS_ACTIVATION_NONE},
    };
    for (int decodes = 0; decodes < 2; decodes++)
        for (size_t i = 0; i < sizeof products / sizeof *products; i++)
            TS_TRY(bench_one_linear(b, products[i].op, decodes ? s->batch : s->tokens, products[i].N, products[i].K,
                                    products[i].activation, b->dtype, decodes));
    TS_TRY(bench_one_linear(b, "linear head", s->batch, s->vocabulary, D, TS_ACTIVATION_NONE, TS_F32, true));
done:
    return status;
}

typedef struct attention_case {
    ts_tile_cache *cache;
    ts_batch_buffer **buffers; // [n_buffers]
    const ts_batch **batches;  // [n_buffers]
    int n_buffers;
    int64_t position; // decode: of the sequence in row 0
    ts_tensor qkvg, y;
} attention_case;

static ts_status attention_case_create(kernel_bench *b, int64_t max_rows, int32_t n_sequences, int n_buffers,
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
    TS_TRY(take_rows(b, b->dtype, max_rows, n_heads_all * s->head_dim + 2 * s->kv_heads, 2 * s->kv_heads, decay_bias,
                     &c->qkvg));
    TS_TRY(take_rows(b, b->dtype, max_rows, s->heads * s->head_dim, 0, 0, &c->y));
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

static ts_status run_attention(kernel_bench *b, void *context, int64_t i) {
    const attention_case *c = context;
    const ts_batch *batch = c->batches[i % c->n_buffers];
    return ts_op_attention(b->device, &(ts_attention_args){batch, ts_tensor_rows(c->qkvg, 0, batch->n_rows),
                                                           ts_tile_cache_layer_at(c->cache, 0), decay_temperature,
                                                           normalizer_eps, ts_tensor_rows(c->y, 0, batch->n_rows)});
}

static ts_tile_cache_shape cache_shape(const kernel_bench *b, bool is_sparse) {
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

static ts_status reopen(kernel_bench *b, void *context) {
    attention_case *c = context;
    ts_tile_cache_close(c->cache, 0);
    return ts_tile_cache_open(c->cache, 0, b->shape.tokens);
}

// A whole prompt in one call, from an empty sequence.
static ts_status bench_attention_prefill(kernel_bench *b, bool is_sparse) {
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
    int32_t *tokens = calloc((size_t)s->tokens, sizeof *tokens); // attention does not look at them
    TS_CHECK(tokens, TS_ERR_MEMORY, "bench kernel: out of memory");
    ts_batch_buffer_clear(c.buffers[0], false);
    status = ts_batch_buffer_add(c.buffers[0], 0, 0, tokens, (int32_t)s->tokens);
    free(tokens);
    TS_TRY(status);
    TS_TRY(ts_batch_buffer_upload(c.buffers[0], &c.batches[0]));
    TS_TRY(ts_tile_cache_open(c.cache, 0, s->tokens));
    const kernel_call call = {.prepare = reopen, .run = run_attention, .context = &c, .n_calls = 1};
    if (is_sparse) { // how many states it adds up is known after a call
        TS_TRY(run_attention(b, &c, 0));
        TS_TRY(ts_tile_cache_pairs(c.cache, 0, &available, &selected));
        flops += 2 * (double)selected * d * d;
    }
    snprintf(text, sizeof text, "%lld tokens, %lld of %lld heads of %lld, %s", (long long)s->tokens,
             (long long)s->kv_heads, (long long)s->heads, (long long)s->head_dim, is_sparse ? "sparse" : "dense");
    TS_TRY(time_op(b, is_sparse ? "attention prefill sparse" : "attention prefill dense", text, bytes, flops, &call,
                   &result));
    if (is_sparse)
        json_object_set_new(result, "pairs_selected",
                            json_real((double)selected / (double)(available ? available : 1)));
done:
    attention_case_free(&c);
    return status;
}

// The next T steps: sequence s stands s % T tokens further in its tile than sequence 0, so that every step completes a
// tile of some and open tiles are half full in the mean.
static ts_status prepare_steps(kernel_bench *b, void *context) {
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

static ts_status bench_attention_decode(kernel_bench *b) {
    ts_status status = TS_OK;
    const ts_bench_options *s = &b->shape;
    const ts_tile_cache_shape shape = cache_shape(b, false);
    const int64_t T = shape.tile_size, n_tokens = (s->repeat + 8) * T;
    const int64_t max_rows = s->batch * T > s->batch ? s->batch * T : s->batch;
    const double n = (double)s->batch, H = (double)s->heads, KV = (double)s->kv_heads, d = (double)s->head_dim;
    // Of a KV head: its state, half a tile of keys, values and c (f64), and the row that is added; a T-th of the states
    // is written.
    const double element = (double)ts_dtype_bytes(b->dtype), open_row = 2 * d * element + (element < 4 ? 12 : 8);
    const double open = ((double)T / 2 + 1) * open_row, state = (d * d + d) * 4;
    const double bytes = n * (KV * (open + state * (1 + 1.0 / (double)T)) +
                              (2 * H * d + 2 * KV * d + 2 * KV) * (double)ts_dtype_bytes(b->dtype));
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
    const kernel_call call = {.prepare = prepare_steps, .run = run_attention, .context = &c, .n_calls = T};
    snprintf(text, sizeof text, "%lld sequences, %lld of %lld heads of %lld, open tiles half full", (long long)s->batch,
             (long long)s->kv_heads, (long long)s->heads, (long long)s->head_dim);
    TS_TRY(time_op(b, "attention decode", text, bytes, flops, &call, &result));
done:
    attention_case_free(&c);
    return status;
}

static ts_status bench_attention(kernel_bench *b) {
    ts_status status = TS_OK;
    TS_TRY(bench_attention_prefill(b, false));
    release_all(b);
    TS_TRY(bench_attention_prefill(b, true));
    release_all(b);
    TS_TRY(bench_attention_decode(b));
done:
    return status;
}

static const struct {
    const char *name;
    ts_status (*bench)(kernel_bench *b);
} ops[] = {
    {"embed", bench_embed},   {"rms_norm", bench_rms_norm},   {"linear", bench_linear},
    {"swiglu", bench_swiglu}, {"attention", bench_attention},
};

static ts_status complete_shape(ts_launch *launch, const ts_bench_options *options, ts_bench_options *shape) {
    ts_status status = TS_OK;
    const ts_device *device = launch->device;
    *shape = *options;
    shape->tokens = ts_bench_default(device, options->tokens, 4096, 131072);
    shape->batch = ts_bench_default(device, options->batch, 16, 256);
    shape->hidden = ts_bench_default(device, options->hidden, 256, 1024);
    shape->intermediate = options->intermediate ? options->intermediate : 4 * shape->hidden;
    shape->vocabulary = ts_bench_default(device, options->vocabulary, 4096, 50304);
    shape->heads = ts_bench_default(device, options->heads, 4, 16);
    shape->kv_heads = options->kv_heads ? options->kv_heads : shape->heads;
    shape->head_dim = options->head_dim ? options->head_dim : 64;
    shape->repeat = options->repeat ? options->repeat : 20;
    TS_CHECK(shape->heads % shape->kv_heads == 0, TS_ERR_INVALID,
             "--kv-heads is \"%lld\"; a divisor of --heads, which is %lld, is allowed", (long long)shape->kv_heads,
             (long long)shape->heads);
    TS_CHECK(shape->head_dim % 64 == 0, TS_ERR_INVALID, "--head-dim is \"%lld\"; 64 or 128 are allowed",
             (long long)shape->head_dim);
    TS_CHECK(shape->tokens <= INT32_MAX, TS_ERR_INVALID, "--tokens is %lld; one call takes at most %d",
             (long long)shape->tokens, INT32_MAX);
    bool is_known = !options->op;
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        is_known = is_known || strcmp(options->op, ops[i].name) == 0;
    TS_CHECK(is_known, TS_ERR_INVALID, "--op is \"%s\"; embed, rms_norm, linear, swiglu and attention are allowed",
             options->op);
done:
    launch->agreed = launch->agreed || status != TS_OK; // there is one rank
    return status;
}

ts_status ts_bench_kernel(ts_launch *launch, const ts_launch_options *shared, const ts_bench_options *options,
                          json_t **out) {
    ts_status status = TS_OK;
    kernel_bench b = {.device = launch->device, .dtype = launch->device->compute_dtype, .results = json_array()};
    TS_TRY(complete_shape(launch, options, &b.shape));
    b.samples = malloc((size_t)b.shape.repeat * sizeof *b.samples);
    TS_CHECK(b.samples && b.results, TS_ERR_MEMORY, "bench kernel: out of memory");
    b.copy_rate = 1; // until it is known
    TS_TRY(bench_copy(&b));
    release_all(&b);
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        if (options->op && strcmp(options->op, ops[i].name) != 0)
            continue;
        TS_TRY(ops[i].bench(&b));
        release_all(&b);
    }
    *out = json_pack("{s:s, s:s, s:I, s:O}", "device", ts_devices_describe(b.device), "dtype", ts_dtype_name(b.dtype),
                     "repeats", (json_int_t)b.shape.repeat, "kernels", b.results);
    TS_CHECK(*out, TS_ERR_MEMORY, "bench kernel: out of memory");
done:
    release_all(&b);
    json_decref(b.results);
    free(b.samples);
    return status;
}

void ts_bench_kernel_print(const json_t *result) {
    size_t i;
    json_t *kernel;
    printf("%s, %s, medians of %.0f\n", json_string_value(json_object_get(result, "device")),
           json_string_value(json_object_get(result, "dtype")), ts_bench_number(result, "repeats"));
    printf("%-26s %10s %21s %9s %8s %8s %7s  %s\n", "op", "us", "least to most", "MB", "GB/s", "TFLOP/s", "of copy",
           "shape");
    json_array_foreach(json_object_get(result, "kernels"), i, kernel) {
        printf("%-26s %10.1f %10.1f %10.1f %9.1f %8.0f %8.2f %6.0f%%  %s",
               json_string_value(json_object_get(kernel, "op")), 1e6 * ts_bench_number(kernel, "seconds"),
               1e6 * ts_bench_number(kernel, "seconds_least"), 1e6 * ts_bench_number(kernel, "seconds_most"),
               1e-6 * ts_bench_number(kernel, "bytes"), ts_bench_number(kernel, "gbytes_per_second"),
               ts_bench_number(kernel, "tflops"), 100 * ts_bench_number(kernel, "share_of_copy"),
               json_string_value(json_object_get(kernel, "shape")));
        if (json_object_get(kernel, "pairs_selected"))
            printf(", %.1f %% of pairs selected", 100 * ts_bench_number(kernel, "pairs_selected"));
        printf("\n");
    }
}
