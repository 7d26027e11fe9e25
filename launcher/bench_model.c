// `tessera bench prefill` and `tessera bench decode`: a whole model, timed from the host as a run of it would be.
#include "kernels/cpu/cpu.h"
#include "launcher/bench.h"
#include "launcher/devices.h"
#include "runtime/batch.h"
#include "runtime/decode_graphs.h"
#include "runtime/device_sampler.h"

#include <stdio.h>
#include <stdlib.h>

// Floating-point operations of one token in this model (all ranks): projections, and the attention of a full tile with
// its state in [d, d]; not the output layer, which prefill needs once a sequence.
static double flops_per_token(const ts_config *c) {
    const double D = c->hidden_size, H = c->n_heads, KV = c->n_kv_heads, d = c->head_dim, T = c->tile_size;
    const double mlp = (c->mlp == TS_MLP_SWIGLU ? 3.0 : 2.0) * D * c->intermediate_size;
    const double projections = D * ((2 * H + 2 * KV) * d + 2 * KV) + mlp;
    const double attention = H * (d * d + T * d) + KV * d * d; // q^ S^; half of q^ k^T and of its product with v; k^T v
    return 2 * c->n_layers * (projections + attention);
}

typedef struct model_bench {
    ts_launch *launch;
    int64_t chunk;
    ts_tile_cache *cache;
    ts_batch_buffer *buffer;
    ts_decode_graphs *graphs;
    ts_device_sampler *sampler;     // NULL where the device has none: a step then ends with its logits
    int32_t *tokens;                // [chunk]
    double *values[2];              // [repeats] each
    ts_sampler_row row;             // of every sequence: greedy
    const ts_sampler_row **sampled; // [rows]
    ts_next_token *next;            // [rows]
} model_bench;

static void model_bench_free(model_bench *b) {
    free(b->tokens);
    free(b->values[0]);
    free(b->sampled);
    free(b->next);
    ts_device_sampler_free(b->sampler);
    ts_decode_graphs_free(b->graphs);
    ts_batch_buffer_free(b->buffer);
    ts_tile_cache_free(b->cache);
}

// Rows of the tile cache for n_sequences of n_tokens, and batches of `rows` rows besides those of a chunk.
static ts_status model_bench_create(ts_launch *launch, int64_t chunk, int64_t rows, int64_t n_sequences,
                                    int64_t n_tokens, int64_t repeat, model_bench *b) {
    ts_status status = TS_OK;
    ts_tile_cache_shape shape = ts_tile_cache_shape_of(ts_model_config(launch->model), ts_group_size(launch->world));
    const int64_t max_rows = chunk > rows ? chunk : rows;
    shape.open_dtype = launch->device->compute_dtype;
    shape.slot_dtype = launch->device->slot_dtype;
    *b = (model_bench){.launch = launch, .chunk = chunk, .row = {.params = ts_sampling_params_default()}};
    b->row.params.temperature = 0;
    b->sampled = malloc((size_t)rows * sizeof *b->sampled);
    b->next = malloc((size_t)rows * sizeof *b->next);
    b->tokens = malloc((size_t)chunk * sizeof *b->tokens);
    b->values[0] = malloc(2 * (size_t)repeat * sizeof **b->values);
    TS_CHECK(b->tokens && b->values[0] && b->sampled && b->next, TS_ERR_MEMORY, "bench: out of memory");
    for (int64_t i = 0; i < rows; i++)
        b->sampled[i] = &b->row;
    b->values[1] = b->values[0] + repeat;
    TS_TRY(ts_tile_cache_create(launch->device, &shape, (int32_t)n_sequences,
                                n_sequences * ts_tile_cache_pages_for(&shape, n_tokens), &b->cache));
    TS_TRY(ts_batch_buffer_create(launch->device, max_rows, &b->buffer));
    TS_TRY(ts_model_reserve(launch->model, max_rows));
    TS_TRY(ts_model_reserve_logits(launch->model, rows));
    TS_TRY(ts_device_reserve_scratch(
        launch->device,
        ts_model_scratch_bytes(launch->model, ts_tile_cache_layer_at(b->cache, 0), max_rows, (int32_t)n_sequences)));
    ts_group *tp = ts_grid_tp(launch->grid);
    if (ts_device_sampler_is_possible(launch->device, tp))
        TS_TRY(ts_device_sampler_create(launch->device, (int32_t)rows, &b->sampler));
    TS_TRY(ts_decode_graphs_create(launch->device, tp, launch->model, b->cache, b->sampler, (int32_t)rows, &b->graphs));
    TS_TRY(ts_decode_graphs_warm_up(b->graphs, b->buffer));
done:
    return status;
}

static int32_t token_at(const model_bench *b, int64_t i) {
    return (int32_t)((uint64_t)i * 2654435761u % (uint64_t)ts_model_config(b->launch->model)->vocab_size);
}

// Reads tokens [0, n) into row 0, which is open and empty.
static ts_status read_tokens(model_bench *b, int64_t n) {
    ts_status status = TS_OK;
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
done:
    return status;
}

// Reads n tokens as one prompt, to the logits of the last, and gives the seconds it took.
static ts_status prefill(model_bench *b, int64_t n, double *seconds) {
    ts_status status = TS_OK;
    ts_tensor logits;
    const int64_t last_row = (n - 1) % b->chunk;
    TS_TRY(ts_tile_cache_open(b->cache, 0, n));
    TS_TRY(ts_device_synchronize(b->launch->device));
    TS_TRY(ts_group_barrier(b->launch->world));
    const double start = ts_launch_seconds();
    TS_TRY(read_tokens(b, n));
    TS_TRY(ts_model_logits(b->launch->model, &last_row, 1, false, &logits));
    TS_TRY(ts_device_synchronize(b->launch->device));
    *seconds = ts_launch_seconds() - start;
    ts_tile_cache_close(b->cache, 0);
done:
    return status;
}

// What all results have: the device, ranks, repeats, and the memory of the device that is in use now, by anybody.
static ts_status describe_run(ts_launch *launch, int64_t repeat, json_t *result) {
    ts_status status = TS_OK;
    size_t free_bytes, total_bytes;
    TS_TRY(ts_device_memory(launch->device, &free_bytes, &total_bytes));
    json_object_set_new(result, "device", json_string(ts_devices_describe(launch->device)));
    json_object_set_new(result, "ranks", json_integer(ts_group_size(launch->world)));
    json_object_set_new(result, "repeats", json_integer((json_int_t)repeat));
    json_object_set_new(result, "weight_bytes", json_integer((json_int_t)ts_model_weight_bytes(launch->model)));
    json_object_set_new(result, "device_bytes_used", json_integer((json_int_t)(total_bytes - free_bytes)));
done:
    return status;
}

ts_status ts_bench_prefill(ts_launch *launch, const ts_launch_options *shared, const ts_bench_options *options,
                           json_t **out) {
    ts_status status = TS_OK;
    const int64_t n = ts_bench_default(launch->device, options->tokens, 16384, 131072);
    const int64_t repeat = options->repeat ? options->repeat : 5;
    const bool has_yardstick = strcmp(launch->device->backend->name, "cpu") == 0;
    model_bench b;
    json_t *result = json_object();
    TS_TRY(ts_launch_agree(launch, model_bench_create(launch, shared->prefill_chunk, 1, 1, n, repeat, &b)));
    for (int64_t i = -1; i < repeat; i++) { // the first is a warm-up; prefill and yardstick take turns
        double seconds, rate = 0;
        if (has_yardstick)
            TS_TRY(ts_cpu_sgemm_rate(launch->device, 2048, &rate));
        TS_TRY(prefill(&b, n, &seconds));
        if (i < 0)
            continue;
        b.values[0][i] = seconds;
        b.values[1][i] = rate;
    }
    const ts_bench_spread seconds = ts_bench_spread_of(b.values[0], repeat);
    const double rate = ts_bench_spread_of(b.values[1], repeat).median;
    const double flops =
        flops_per_token(ts_model_config(launch->model)) * (double)n / seconds.median / ts_group_size(launch->world);
    TS_TRY(describe_run(launch, repeat, result));
    json_object_set_new(result, "tokens", json_integer((json_int_t)n));
    json_object_set_new(result, "prefill_chunk", json_integer((json_int_t)b.chunk));
    ts_bench_set_spread(result, "seconds", seconds);
    json_object_set_new(result, "tokens_per_second", json_real((double)n / seconds.median));
    json_object_set_new(result, "tflops_per_rank", json_real(flops * 1e-12));
    if (has_yardstick) {
        json_object_set_new(result, "sgemm_tflops", json_real(rate * 1e-12));
        json_object_set_new(result, "share_of_sgemm", json_real(flops / rate));
    }
    *out = result;
    result = NULL;
done:
    json_decref(result);
    model_bench_free(&b);
    return status;
}

static void print_run(const json_t *result) {
    printf("device                    %s, %.0f rank(s), %.2f GiB of its memory in use\n",
           json_string_value(json_object_get(result, "device")), ts_bench_number(result, "ranks"),
           ts_bench_number(result, "device_bytes_used") / (1 << 30));
}

void ts_bench_prefill_print(const json_t *result) {
    print_run(result);
    printf("prefill of %.0f tokens   %.4f s (%.4f to %.4f), %.0f tokens/s, in steps of %.0f\n",
           ts_bench_number(result, "tokens"), ts_bench_number(result, "seconds"),
           ts_bench_number(result, "seconds_least"), ts_bench_number(result, "seconds_most"),
           ts_bench_number(result, "tokens_per_second"), ts_bench_number(result, "prefill_chunk"));
    printf("arithmetic per rank       %.3f TFLOP/s", ts_bench_number(result, "tflops_per_rank"));
    if (json_object_get(result, "sgemm_tflops"))
        printf("; one large sgemm %.3f: %.0f %%", ts_bench_number(result, "sgemm_tflops"),
               100 * ts_bench_number(result, "share_of_sgemm"));
    printf("\n");
}

// One step of each of n sequences, whose rows begin at `first`, from *position on; logits and, on a GPU, greedy
// sampling included. Gives the seconds that `steps` of them took.
static ts_status decode(model_bench *b, int32_t first, int32_t n, int64_t steps, int64_t *position, double *seconds) {
    ts_status status = TS_OK;
    TS_TRY(ts_device_synchronize(b->launch->device));
    TS_TRY(ts_group_barrier(b->launch->world));
    const double start = ts_launch_seconds();
    for (int64_t step = 0; step < steps; step++, ++*position) {
        ts_tensor logits;
        ts_batch_buffer_clear(b->buffer, true);
        for (int32_t s = 0; s < n; s++) {
            const int32_t token = token_at(b, *position * n + s);
            TS_TRY(ts_batch_buffer_add(b->buffer, first + s, *position, &token, 1));
        }
        TS_TRY(ts_decode_graphs_run(b->graphs, b->buffer, b->sampled, &logits));
        if (b->sampler) // read back, as a run does
            TS_TRY(ts_device_sampler_collect(b->sampler, b->sampled, n, b->next));
    }
    TS_TRY(ts_device_synchronize(b->launch->device));
    *seconds = ts_launch_seconds() - start;
done:
    return status;
}

ts_status ts_bench_decode(ts_launch *launch, const ts_launch_options *shared, const ts_bench_options *options,
                          json_t **out) {
    ts_status status = TS_OK;
    const int64_t batch = ts_bench_default(launch->device, options->batch, 16, 256);
    const int64_t steps = options->steps ? options->steps : 256;
    const int64_t repeat = options->repeat ? options->repeat : 5;
    const int64_t n_tokens = options->context + (repeat + 1) * steps;
    int64_t position_alone = options->context, position = options->context;
    model_bench b;
    json_t *result = json_object();
    // Row 0 decodes alone; the others, which begin as copies of it, together.
    TS_TRY(ts_launch_agree(launch, model_bench_create(launch, options->context ? shared->prefill_chunk : 1, batch,
                                                      batch + 1, n_tokens, repeat, &b)));
    TS_TRY(ts_tile_cache_open(b.cache, 0, n_tokens));
    TS_TRY(read_tokens(&b, options->context));
    for (int32_t s = 1; s <= batch; s++) {
        TS_TRY(ts_tile_cache_open(b.cache, s, n_tokens));
        if (options->context)
            TS_TRY(ts_tile_cache_fork(b.cache, 0, s, options->context));
    }
    for (int64_t i = -1; i < repeat; i++) { // the first is a warm-up; the two take turns
        double alone, together;
        TS_TRY(decode(&b, 0, 1, steps, &position_alone, &alone));
        TS_TRY(decode(&b, 1, (int32_t)batch, steps, &position, &together));
        if (i < 0)
            continue;
        b.values[0][i] = alone;
        b.values[1][i] = together;
    }
    const ts_bench_spread alone = ts_bench_spread_of(b.values[0], repeat);
    const ts_bench_spread together = ts_bench_spread_of(b.values[1], repeat);
    TS_TRY(describe_run(launch, repeat, result));
    json_object_set_new(result, "batch", json_integer((json_int_t)batch));
    json_object_set_new(result, "samples", json_boolean(b.sampler != NULL));
    json_object_set_new(result, "steps", json_integer((json_int_t)steps));
    json_object_set_new(result, "first_position", json_integer((json_int_t)(options->context + steps)));
    json_object_set_new(result, "last_position", json_integer((json_int_t)(position - 1)));
    ts_bench_set_spread(result, "seconds_alone", alone);
    ts_bench_set_spread(result, "seconds", together);
    json_object_set_new(result, "tokens_per_second_alone", json_real((double)steps / alone.median));
    json_object_set_new(result, "tokens_per_second", json_real((double)(steps * batch) / together.median));
    json_object_set_new(result, "gain", json_real((double)batch * alone.median / together.median));
    *out = result;
    result = NULL;
done:
    json_decref(result);
    model_bench_free(&b);
    return status;
}

void ts_bench_decode_print(const json_t *result) {
    const double steps = ts_bench_number(result, "steps");
    print_run(result);
    printf("positions                 %.0f to %.0f of every sequence, %.0f a repeat\n",
           ts_bench_number(result, "first_position"), ts_bench_number(result, "last_position"), steps);
    printf("decode of 1 sequence      %.0f tokens/s, a step %.3f ms (%.3f to %.3f)\n",
           ts_bench_number(result, "tokens_per_second_alone"), 1e3 * ts_bench_number(result, "seconds_alone") / steps,
           1e3 * ts_bench_number(result, "seconds_alone_least") / steps,
           1e3 * ts_bench_number(result, "seconds_alone_most") / steps);
    printf("decode of %.0f sequences   %.0f tokens/s, a step %.3f ms (%.3f to %.3f): %.1f times one alone\n",
           ts_bench_number(result, "batch"), ts_bench_number(result, "tokens_per_second"),
           1e3 * ts_bench_number(result, "seconds") / steps, 1e3 * ts_bench_number(result, "seconds_least") / steps,
           1e3 * ts_bench_number(result, "seconds_most") / steps, ts_bench_number(result, "gain"));
}
