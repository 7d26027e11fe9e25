#include "kernels/cpu/cpu.h"
#include "launcher/commands.h"
#include "runtime/batch.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

static const char usage[] =
    "usage: tessera bench --model DIR [OPTIONS]\n\n"
    "Times prefill and decode of a model, and prints medians over repeats: tokens/s, the arithmetic rate of prefill "
    "beside\n"
    "that of one large OpenBLAS product in the same run, and what a batch gains over one sequence.\n\n"
    "  --tokens N           tokens of a prefill (default 16384)\n"
    "  --batch N            sequences that decode together, beside one alone (default 16)\n"
    "  --steps N            decode steps of a repeat (default 256)\n"
    "  --repeat N           repeats (default 5)\n"
    "  --json               one JSON object\n" TS_LAUNCH_HELP "\nexample:\n"
    "  tessera bench --model configs/models/demo --tokens 16384 --batch 16\n";

enum { OPTION_TOKENS = TS_OPTION_OWN, OPTION_BATCH, OPTION_STEPS, OPTION_REPEAT, OPTION_JSON };

typedef struct bench_options {
    int64_t tokens, batch, steps, repeat;
    bool as_json;
} bench_options;

static ts_status parse_own(void *context, int option, const char *value) {
    bench_options *options = context;
    switch (option) {
    case OPTION_TOKENS:
        return ts_launch_parse_number("tokens", value, 1, INT64_MAX / 2, true, &options->tokens);
    case OPTION_BATCH:
        return ts_launch_parse_number("batch", value, 1, 65536, false, &options->batch);
    case OPTION_STEPS:
        return ts_launch_parse_number("steps", value, 1, 1 << 20, false, &options->steps);
    case OPTION_REPEAT:
        return ts_launch_parse_number("repeat", value, 1, 1000, false, &options->repeat);
    default:
        options->as_json = true;
        return TS_OK;
    }
}

// Floating-point operations of one token in this model (all ranks): projections, and the attention of a full tile with
// its state in [d, d]; not the output layer, which prefill needs once a sequence.
static double flops_per_token(const ts_config *c) {
    const double D = c->hidden_size, H = c->n_heads, KV = c->n_kv_heads, d = c->head_dim, T = c->tile_size;
    const double mlp = (c->mlp == TS_MLP_SWIGLU ? 3.0 : 2.0) * D * c->intermediate_size;
    const double projections = D * ((2 * H + 2 * KV) * d + 2 * KV) + mlp;
    const double attention = H * (d * d + T * d) + KV * d * d; // q^ S^; half of q^ k^T and of its product with v; k^T v
    return 2 * c->n_layers * (projections + attention);
}

typedef struct sample_set {
    double *values;
    int64_t n;
} sample_set;

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(sample_set *s) {
    qsort(s->values, (size_t)s->n, sizeof *s->values, by_value);
    return s->n % 2 ? s->values[s->n / 2] : (s->values[s->n / 2 - 1] + s->values[s->n / 2]) / 2;
}

typedef struct bench {
    ts_launch *launch;
    const bench_options *options;
    int64_t chunk;
    ts_tile_cache *cache;
    ts_batch_buffer *buffer;
    int32_t *tokens; // [chunk or batch]
} bench;

static int32_t token_at(const bench *b, int64_t i) {
    return (int32_t)((uint64_t)i * 2654435761u % (uint64_t)ts_model_config(b->launch->model)->vocab_size);
}

// Reads n tokens into row 0 and returns the seconds it took.
static ts_status prefill(bench *b, int64_t n, double *seconds) {
    ts_status status = TS_OK;
    TS_TRY(ts_tile_cache_open(b->cache, 0, n));
    TS_TRY(ts_group_barrier(b->launch->world));
    const double start = ts_launch_seconds();
    for (int64_t first = 0; first < n; first += b->chunk) {
        const int64_t size = n - first < b->chunk ? n - first : b->chunk;
        const ts_batch *batch;
        for (int64_t i = 0; i < size; i++)
            b->tokens[i] = token_at(b, first + i);
        ts_batch_buffer_clear(b->buffer, false);
        TS_TRY(ts_batch_buffer_add(b->buffer, 0, first, b->tokens, (int32_t)size));
        TS_TRY(ts_batch_buffer_upload(b->buffer, &batch));
        TS_TRY(ts_model_forward(b->launch->model, b->cache, batch));
    }
    TS_TRY(ts_device_synchronize(b->launch->device));
    *seconds = ts_launch_seconds() - start;
    ts_tile_cache_close(b->cache, 0);
done:
    return status;
}

// Decodes `steps` tokens of n sequences from empty states, logits included, and returns the seconds it took.
static ts_status decode(bench *b, int32_t n, double *seconds) {
    ts_status status = TS_OK;
    for (int32_t s = 0; s < n; s++)
        TS_TRY(ts_tile_cache_open(b->cache, s, b->options->steps));
    TS_TRY(ts_group_barrier(b->launch->world));
    const double start = ts_launch_seconds();
    for (int64_t step = 0; step < b->options->steps; step++) {
        const ts_batch *batch;
        ts_tensor logits;
        ts_batch_buffer_clear(b->buffer, true);
        for (int32_t s = 0; s < n; s++) {
            const int32_t token = token_at(b, step * n + s);
            TS_TRY(ts_batch_buffer_add(b->buffer, s, step, &token, 1));
        }
        TS_TRY(ts_batch_buffer_upload(b->buffer, &batch));
        TS_TRY(ts_model_forward(b->launch->model, b->cache, batch));
        TS_TRY(ts_model_logits(b->launch->model, NULL, n, true, &logits));
    }
    TS_TRY(ts_device_synchronize(b->launch->device));
    *seconds = ts_launch_seconds() - start;
    for (int32_t s = 0; s < n; s++)
        ts_tile_cache_close(b->cache, s);
done:
    return status;
}

static ts_status measure(bench *b, json_t **out) {
    ts_status status = TS_OK;
    const bench_options *options = b->options;
    const ts_config *config = ts_model_config(b->launch->model);
    const size_t n = (size_t)options->repeat;
    double *values = malloc(4 * n * sizeof *values);
    TS_CHECK(values, TS_ERR_MEMORY, "bench: out of memory");
    sample_set prefills = {values, 0}, alone = {values + n, 0}, together = {values + 2 * n, 0},
               blas = {values + 3 * n, 0};
    for (int64_t i = -1; i < options->repeat; i++) { // the first is a warm-up; the four take turns
        double seconds[4];
        // The yardstick of arithmetic on a CPU; a GPU has none here.
        seconds[3] = 0;
        if (strcmp(b->launch->device->backend->name, "cpu") == 0)
            TS_TRY(ts_cpu_sgemm_rate(b->launch->device, 2048, &seconds[3]));
        TS_TRY(prefill(b, options->tokens, &seconds[0]));
        TS_TRY(decode(b, 1, &seconds[1]));
        TS_TRY(decode(b, (int32_t)options->batch, &seconds[2]));
        if (i < 0)
            continue;
        prefills.values[prefills.n++] = seconds[0];
        alone.values[alone.n++] = seconds[1];
        together.values[together.n++] = seconds[2];
        blas.values[blas.n++] = seconds[3];
    }
    const double p = median(&prefills), a = median(&alone), t = median(&together), rate = median(&blas);
    const double flops = flops_per_token(config) * (double)options->tokens / p / ts_group_size(b->launch->world);
    const double steps = (double)options->steps;
    *out = json_pack("{s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:f, s:f, s:f, s:I, s:i}", "prefill_tokens",
                     (json_int_t)options->tokens, "prefill_seconds", p, "prefill_seconds_least", prefills.values[0],
                     "prefill_seconds_most", prefills.values[prefills.n - 1], "prefill_tokens_per_second",
                     (double)options->tokens / p, "prefill_gflops_per_rank", flops * 1e-9, "sgemm_gflops", rate * 1e-9,
                     "prefill_share_of_sgemm", rate > 0 ? flops / rate : 0.0, "batch", (json_int_t)options->batch,
                     "decode_tokens_per_second_alone", steps / a, "decode_tokens_per_second_together",
                     steps * (double)options->batch / t, "decode_gain", (double)options->batch * a / t, "repeats",
                     (json_int_t)options->repeat, "ranks", ts_group_size(b->launch->world));
    TS_CHECK(*out, TS_ERR_MEMORY, "bench: out of memory");
done:
    free(values);
    return status;
}

static void print_table(const json_t *o) {
#define REAL(key) json_number_value(json_object_get(o, key))
    printf("prefill of %.0f tokens   %.3f s (%.3f to %.3f), %.0f tokens/s\n", REAL("prefill_tokens"),
           REAL("prefill_seconds"), REAL("prefill_seconds_least"), REAL("prefill_seconds_most"),
           REAL("prefill_tokens_per_second"));
    printf("arithmetic per rank       %.1f GFLOP/s", REAL("prefill_gflops_per_rank"));
    if (REAL("sgemm_gflops") > 0)
        printf("; one large sgemm %.1f: %.0f %%", REAL("sgemm_gflops"), 100 * REAL("prefill_share_of_sgemm"));
    printf("\n");
    printf("decode of 1 sequence      %.0f tokens/s\n", REAL("decode_tokens_per_second_alone"));
    printf("decode of %.0f sequences    %.0f tokens/s: %.1f times\n", REAL("batch"),
           REAL("decode_tokens_per_second_together"), REAL("decode_gain"));
#undef REAL
}

ts_status ts_command_bench(ts_launch *launch, int argc, char **argv) {
    static const struct option table[] = {
        TS_LAUNCH_OPTIONS,
        {"tokens", required_argument, NULL, OPTION_TOKENS},
        {"batch", required_argument, NULL, OPTION_BATCH},
        {"steps", required_argument, NULL, OPTION_STEPS},
        {"repeat", required_argument, NULL, OPTION_REPEAT},
        {"json", no_argument, NULL, OPTION_JSON},
        {0},
    };
    ts_status status = TS_OK;
    ts_launch_options shared;
    bench_options options = {.tokens = 16384, .batch = 16, .steps = 256, .repeat = 5};
    bench b = {.launch = launch, .options = &options};
    json_t *result = NULL;
    TS_TRY(ts_launch_parse(launch, argc, argv, table, usage, &shared, parse_own, &options));
    if (shared.help)
        goto done;
    TS_TRY(ts_launch_model(launch, &shared, false));
    ts_tile_cache_shape shape = ts_tile_cache_shape_of(ts_model_config(launch->model), ts_group_size(launch->world));
    shape.slot_dtype = launch->device->slot_dtype;
    const int64_t n_pages[] = {ts_tile_cache_pages_for(&shape, options.tokens),
                               options.batch * ts_tile_cache_pages_for(&shape, options.steps)};
    b.chunk = shared.prefill_chunk;
    const int64_t max_rows = b.chunk > options.batch ? b.chunk : options.batch;
    b.tokens = malloc((size_t)max_rows * sizeof *b.tokens);
    ts_status mine = b.tokens ? TS_OK : TS_FAIL(TS_ERR_MEMORY, "bench: out of memory");
    if (mine == TS_OK)
        mine = ts_tile_cache_create(launch->device, &shape, (int32_t)options.batch,
                                    n_pages[0] > n_pages[1] ? n_pages[0] : n_pages[1], &b.cache);
    if (mine == TS_OK)
        mine = ts_batch_buffer_create(launch->device, max_rows, &b.buffer);
    if (mine == TS_OK)
        mine = ts_model_reserve(launch->model, max_rows);
    TS_TRY(ts_launch_agree(launch, mine));
    TS_TRY(measure(&b, &result));
    if (ts_group_rank(launch->world) == 0) {
        if (options.as_json)
            json_dumpf(result, stdout, JSON_INDENT(2)), putchar('\n');
        else
            print_table(result);
    }
done:
    json_decref(result);
    free(b.tokens);
    ts_batch_buffer_free(b.buffer);
    ts_tile_cache_free(b.cache);
    return status;
}
