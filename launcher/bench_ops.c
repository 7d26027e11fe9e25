// The ops of `tessera bench kernel` that know no sequences.
#include "launcher/bench_kernel.h"

#include <stdio.h>
#include <stdlib.h>

static const double eps = 1e-6;

// Buffers of the ops that know no sequences. Which are used is the op's business.
typedef struct row_case {
    int n_sets;
    const int32_t *tokens;
    const int64_t *rows; // host
    double *parts;
    const ts_sample_row *samplings;
    ts_sample_result *results;
    ts_tensor norm_weight;
    ts_tensor x[TS_KERNEL_BENCH_MAX_SETS], residual[TS_KERNEL_BENCH_MAX_SETS], w[TS_KERNEL_BENCH_MAX_SETS],
        y[TS_KERNEL_BENCH_MAX_SETS];
    ts_activation activation;
    bool row_invariant;
} row_case;

static ts_status run_embed(ts_kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    return ts_op_embed(b->device, &(ts_embed_args){c->tokens, 0, c->w[i % c->n_sets], c->y[i % c->n_sets]});
}

ts_status ts_bench_embed(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.tokens, D = b->shape.hidden, V = b->shape.vocabulary;
    const int64_t bytes = M * D * (int64_t)(ts_dtype_bytes(b->dtype) + sizeof(float)) + M * 4;
    row_case c = {.n_sets = ts_kernel_bench_sets_for(bytes)};
    int32_t *tokens = malloc((size_t)M * sizeof *tokens);
    void *data;
    json_t *result;
    char shape[64];
    TS_CHECK(tokens, TS_ERR_MEMORY, "bench kernel: out of memory");
    for (int64_t i = 0; i < M; i++)
        tokens[i] = (int32_t)((uint64_t)i * 2654435761u % (uint64_t)V);
    TS_TRY(ts_kernel_bench_take(b, M * (int64_t)sizeof *tokens, &data));
    TS_TRY(ts_device_upload(b->device, data, tokens, (size_t)M * sizeof *tokens));
    c.tokens = data;
    TS_TRY(ts_kernel_bench_take_weights(b, V, D, c.n_sets, c.w));
    for (int i = 0; i < c.n_sets; i++)
        TS_TRY(ts_kernel_bench_take_rows(b, TS_F32, M, D, 0, 0, &c.y[i]));
    snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)M, (long long)D);
    const ts_kernel_call call = {.run = run_embed, .context = &c};
    TS_TRY(ts_kernel_bench_time(b, "embed", shape, (double)bytes, 0, &call, &result));
done:
    free(tokens);
    return status;
}

static ts_status run_rms_norm(ts_kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    const int64_t set = i % c->n_sets;
    return ts_op_rms_norm(b->device, &(ts_rms_norm_args){c->x[set], &c->residual[set], c->norm_weight, eps, c->y[set]});
}

ts_status ts_bench_rms_norm(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.tokens, D = b->shape.hidden;
    const int64_t bytes = M * D * (int64_t)(2 * ts_dtype_bytes(b->dtype) + 2 * sizeof(float));
    row_case c = {.n_sets = ts_kernel_bench_sets_for(bytes)};
    json_t *result;
    char shape[64];
    TS_TRY(ts_kernel_bench_take_rows(b, TS_F32, 1, D, 0, 0, &c.norm_weight));
    for (int i = 0; i < c.n_sets; i++) {
        TS_TRY(ts_kernel_bench_take_rows(b, TS_F32, M, D, 0, 0, &c.x[i]));
        TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, M, D, 0, 0, &c.residual[i]));
        TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, M, D, 0, 0, &c.y[i]));
    }
    snprintf(shape, sizeof shape, "[%lld, %lld] with residual", (long long)M, (long long)D);
    const ts_kernel_call call = {.run = run_rms_norm, .context = &c};
    TS_TRY(ts_kernel_bench_time(b, "rms_norm", shape, (double)bytes, 0, &call, &result));
done:
    return status;
}

static ts_status run_swiglu(ts_kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    return ts_op_swiglu(b->device, &(ts_swiglu_args){c->x[i % c->n_sets], c->y[i % c->n_sets]});
}

ts_status ts_bench_swiglu(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.tokens, F = b->shape.intermediate;
    const int64_t bytes = 3 * M * F * (int64_t)ts_dtype_bytes(b->dtype);
    row_case c = {.n_sets = ts_kernel_bench_sets_for(bytes)};
    json_t *result;
    char shape[64];
    for (int i = 0; i < c.n_sets; i++) {
        TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, M, 2 * F, 0, 0, &c.x[i]));
        TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, M, F, 0, 0, &c.y[i]));
    }
    snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)M, (long long)F);
    const ts_kernel_call call = {.run = run_swiglu, .context = &c};
    TS_TRY(ts_kernel_bench_time(b, "swiglu", shape, (double)bytes, 0, &call, &result));
done:
    return status;
}

static ts_status run_linear(ts_kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    const int64_t set = i % c->n_sets;
    return ts_op_linear(b->device, &(ts_linear_args){c->x[set], c->w[set], NULL, c->y[set], c->activation,
                                                     c->row_invariant, NULL, NULL, NULL});
}

static ts_status bench_one_linear(ts_kernel_bench *b, const char *op, int64_t M, int64_t N, int64_t K,
                                  ts_activation activation, ts_dtype out_dtype, bool row_invariant) {
    ts_status status = TS_OK;
    const int64_t element = (int64_t)ts_dtype_bytes(b->dtype);
    const int64_t bytes = (M * K + N * K) * element + M * N * (int64_t)ts_dtype_bytes(out_dtype);
    row_case c = {.n_sets = ts_kernel_bench_sets_for(bytes), .activation = activation, .row_invariant = row_invariant};
    json_t *result;
    char shape[96];
    TS_TRY(ts_kernel_bench_take_weights(b, N, K, c.n_sets, c.w));
    for (int i = 0; i < c.n_sets; i++) {
        TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, M, K, 0, 0, &c.x[i]));
        TS_TRY(ts_kernel_bench_take_rows(b, out_dtype, M, N, 0, 0, &c.y[i]));
    }
    snprintf(shape, sizeof shape, "[%lld, %lld] to %lld%s", (long long)M, (long long)K, (long long)N,
             row_invariant ? ", row invariant" : "");
    const ts_kernel_call call = {.run = run_linear, .context = &c};
    TS_TRY(ts_kernel_bench_time(b, op, shape, (double)bytes, 2 * (double)M * (double)N * (double)K, &call, &result));
done:
    ts_kernel_bench_release(b);
    return status;
}

// The products of a layer for a prompt and for a decode step, and those of the output layer, which a prompt needs once.
ts_status ts_bench_linear(ts_kernel_bench *b) {
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

static ts_status run_gather_rows(ts_kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    return ts_op_gather_rows(b->device, &(ts_gather_rows_args){c->x[i % c->n_sets], c->rows, c->y[i % c->n_sets]});
}

// The last row of every sequence of a packed prefill.
ts_status ts_bench_gather_rows(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.tokens, D = b->shape.hidden, n = b->shape.batch < M ? b->shape.batch : M;
    const int64_t bytes = 2 * n * D * (int64_t)ts_dtype_bytes(b->dtype);
    int64_t *rows = malloc((size_t)n * sizeof *rows);
    row_case c = {.n_sets = 1, .rows = rows};
    json_t *result;
    char shape[64];
    TS_CHECK(rows, TS_ERR_MEMORY, "bench kernel: out of memory");
    for (int64_t i = 0; i < n; i++)
        rows[i] = M / n * (i + 1) - 1;
    TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, M, D, 0, 0, &c.x[0]));
    TS_TRY(ts_kernel_bench_take_rows(b, b->dtype, n, D, 0, 0, &c.y[0]));
    snprintf(shape, sizeof shape, "%lld of %lld rows of %lld", (long long)n, (long long)M, (long long)D);
    const ts_kernel_call call = {.run = run_gather_rows, .context = &c};
    TS_TRY(ts_kernel_bench_time(b, "gather_rows", shape, (double)bytes, 0, &call, &result));
done:
    free(rows);
    return status;
}

static ts_status run_cross_entropy(ts_kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    return ts_op_cross_entropy(b->device, &(ts_cross_entropy_args){c->x[i % c->n_sets], c->tokens, 0, c->parts});
}

ts_status ts_bench_cross_entropy(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.batch, V = b->shape.vocabulary, bytes = M * V * (int64_t)sizeof(float);
    row_case c = {.n_sets = ts_kernel_bench_sets_for(bytes)};
    void *data;
    json_t *result;
    char shape[64];
    TS_TRY(ts_kernel_bench_take(b, M * (int64_t)sizeof(int32_t), &data)); // zero-filled: token 0
    c.tokens = data;
    TS_TRY(ts_kernel_bench_take(b, 3 * M * (int64_t)sizeof(double), &data));
    c.parts = data;
    for (int i = 0; i < c.n_sets; i++)
        TS_TRY(ts_kernel_bench_take_rows(b, TS_F32, M, V, 0, 0, &c.x[i]));
    snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)M, (long long)V);
    const ts_kernel_call call = {.run = run_cross_entropy, .context = &c};
    TS_TRY(ts_kernel_bench_time(b, "cross_entropy", shape, (double)bytes, 0, &call, &result));
done:
    return status;
}

static ts_status run_sample(ts_kernel_bench *b, void *context, int64_t i) {
    const row_case *c = context;
    return ts_op_sample(b->device, &(ts_sample_args){c->x[i % c->n_sets], c->samplings, NULL, NULL, c->results});
}

// The next token of every sequence, with several chains of filters; where the backend samples.
ts_status ts_bench_sample(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t M = b->shape.batch, V = b->shape.vocabulary, bytes = M * V * (int64_t)sizeof(float);
    const ts_sample_row plain = {.temperature = 1, .top_p = 1, .n_logprobs = -1, .repetition_penalty = 1};
    struct {
        const char *op;
        ts_sample_row row;
    } chains[] = {{"sample greedy", plain},
                  {"sample temperature", plain},
                  {"sample top_k 50", plain},
                  {"sample top_p 0.9", plain}};
    row_case c = {.n_sets = ts_kernel_bench_sets_for(bytes)};
    void *data;
    json_t *result;
    char shape[64];
    ts_sample_row *rows = malloc((size_t)M * sizeof *rows);
    TS_CHECK(rows, TS_ERR_MEMORY, "bench kernel: out of memory");
    if (!b->device->ops->sample)
        goto done;
    chains[0].row.temperature = 0;
    chains[2].row.top_k = 50;
    chains[3].row.top_p = 0.9f;
    TS_TRY(ts_kernel_bench_take(b, M * (int64_t)sizeof(ts_sample_row), &data));
    c.samplings = data;
    TS_TRY(ts_kernel_bench_take(b, M * (int64_t)sizeof(ts_sample_result), &data));
    c.results = data;
    for (int i = 0; i < c.n_sets; i++)
        TS_TRY(ts_kernel_bench_take_rows(b, TS_F32, M, V, 0, 0, &c.x[i]));
    snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)M, (long long)V);
    for (size_t k = 0; k < sizeof chains / sizeof *chains; k++) {
        for (int64_t i = 0; i < M; i++) {
            rows[i] = chains[k].row;
            rows[i].draw = (double)(i + 1) / (double)(M + 1);
        }
        TS_TRY(ts_device_upload(b->device, (void *)c.samplings, rows, (size_t)M * sizeof *rows));
        const ts_kernel_call call = {.run = run_sample, .context = &c};
        TS_TRY(ts_kernel_bench_time(b, chains[k].op, shape, (double)bytes, 0, &call, &result));
    }
done:
    free(rows);
    return status;
}
