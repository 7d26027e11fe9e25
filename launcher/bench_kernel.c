// `tessera bench kernel`: every op alone, at given shapes, on the device's own clock. Inputs are random, and where they
// are small one call takes others than the call before it, so that no cache has them already.
#include "launcher/bench_kernel.h"
#include "launcher/devices.h"
#include "runtime/weight_source.h"

#include <stdio.h>
#include <stdlib.h>

static const int64_t cold_bytes = INT64_C(256) << 20; // a few times the largest cache
static const double least_sample_seconds = 2e-3;      // of a row of calls that are timed together

ts_status ts_kernel_bench_take(ts_kernel_bench *b, int64_t n_bytes, void **out) {
    ts_status status = TS_OK;
    TS_CHECK(b->n_blocks < TS_KERNEL_BENCH_MAX_BLOCKS, TS_ERR_INVALID, "bench kernel: more than %d buffers for one op",
             TS_KERNEL_BENCH_MAX_BLOCKS);
    TS_TRY(ts_device_alloc(b->device, (size_t)n_bytes, "benchmark", out));
    b->blocks[b->n_blocks++] = *out;
done:
    return status;
}

void ts_kernel_bench_release(ts_kernel_bench *b) {
    while (b->n_blocks > 0)
        ts_device_release(b->device, b->blocks[--b->n_blocks]);
}

// Near normal numbers, from element to element.
static ts_weight_tensor draw(ts_kernel_bench *b, int64_t n, float mean, float spread) {
    return (ts_weight_tensor){TS_F32, 1, n, NULL, 0x5851f42d4c957f2dull * ++b->n_drawn, mean, spread};
}

ts_status ts_kernel_bench_take_rows(ts_kernel_bench *b, ts_dtype dtype, int64_t rows, int64_t cols, int64_t n_last,
                                    float last_mean, ts_tensor *out) {
    ts_status status = TS_OK;
    const int64_t stride = (cols + 7) / 8 * 8, row_bytes = stride * (int64_t)ts_dtype_bytes(dtype);
    int64_t done = (INT64_C(1) << 22) / stride + 1;
    void *data;
    char *host = NULL;
    done = done < rows ? done : rows;
    TS_TRY(ts_kernel_bench_take(b, rows * row_bytes, &data));
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

ts_status ts_kernel_bench_take_weights(ts_kernel_bench *b, int64_t rows, int64_t cols, int n_sets, ts_tensor *out) {
    ts_status status = TS_OK;
    const ts_weight_tensor drawn = draw(b, rows * cols, 0, 0.03f);
    void *host = malloc((size_t)(rows * cols) * ts_dtype_bytes(b->dtype));
    TS_CHECK(host, TS_ERR_MEMORY, "bench kernel: out of memory");
    ts_weight_tensor_read(&drawn, 0, 0, rows * cols, b->dtype, host);
    for (int i = 0; i < n_sets; i++) {
        void *data;
        TS_TRY(ts_kernel_bench_take(b, (int64_t)ts_device_weight_bytes(b->device, rows, cols, b->dtype), &data));
        TS_TRY(ts_device_upload_weight(b->device, data, host, rows, cols, b->dtype));
        out[i] = ts_tensor_of(data, b->dtype, rows, cols);
    }
done:
    free(host);
    return status;
}

int ts_kernel_bench_sets_for(int64_t bytes_of_a_set) {
    const int64_t n = cold_bytes / bytes_of_a_set + 1;
    return n < TS_KERNEL_BENCH_MAX_SETS ? (int)n : TS_KERNEL_BENCH_MAX_SETS;
}

static ts_status time_row(ts_kernel_bench *b, const ts_kernel_call *call, int64_t n_calls, int64_t *i,
                          double *seconds) {
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

ts_status ts_kernel_bench_time(ts_kernel_bench *b, const char *op, const char *shape, double bytes, double flops,
                               const ts_kernel_call *call, json_t **out) {
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

static ts_status run_copy(ts_kernel_bench *b, void *context, int64_t i) {
    const copy_case *c = context;
    return ts_device_copy(b->device, c->to, c->from, c->n_bytes);
}

// What the other ops are measured against: every byte once read and once written.
static ts_status bench_copy(ts_kernel_bench *b) {
    ts_status status = TS_OK;
    const int64_t rows = ts_bench_default(b->device, 0, 1 << 10, 1 << 13), cols = 1 << 15;
    ts_tensor from, to;
    json_t *result;
    char shape[64];
    TS_TRY(ts_kernel_bench_take_rows(b, TS_F32, rows, cols, 0, 0, &from));
    TS_TRY(ts_kernel_bench_take_rows(b, TS_F32, rows, cols, 0, 0, &to));
    copy_case c = {from.data, to.data, (size_t)(rows * cols) * sizeof(float)};
    const ts_kernel_call call = {.run = run_copy, .context = &c};
    snprintf(shape, sizeof shape, "%zu MiB", c.n_bytes >> 20);
    TS_TRY(ts_kernel_bench_time(b, "copy", shape, 2 * (double)c.n_bytes, 0, &call, &result));
    b->copy_rate = 1e9 * ts_bench_number(result, "gbytes_per_second");
    json_object_set_new(result, "share_of_copy", json_real(1));
done:
    return status;
}

static const struct {
    const char *name;
    ts_status (*bench)(ts_kernel_bench *b);
} ops[] = {
    {"embed", ts_bench_embed},
    {"rms_norm", ts_bench_rms_norm},
    {"linear", ts_bench_linear},
    {"swiglu", ts_bench_swiglu},
    {"gather_rows", ts_bench_gather_rows},
    {"tile_importance", ts_bench_tile_importance},
    {"tile_prune", ts_bench_tile_prune},
    {"attention", ts_bench_attention},
    {"cross_entropy", ts_bench_cross_entropy},
    {"sample", ts_bench_sample},
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
    TS_CHECK(is_known, TS_ERR_INVALID,
             "--op is \"%s\"; embed, rms_norm, linear, swiglu, gather_rows, tile_importance, tile_prune, attention, "
             "cross_entropy and sample are allowed",
             options->op);
done:
    launch->agreed = launch->agreed || status != TS_OK; // there is one rank
    return status;
}

ts_status ts_bench_kernel(ts_launch *launch, const ts_launch_options *shared, const ts_bench_options *options,
                          json_t **out) {
    ts_status status = TS_OK;
    ts_kernel_bench b = {.device = launch->device, .dtype = launch->device->compute_dtype, .results = json_array()};
    TS_TRY(complete_shape(launch, options, &b.shape));
    b.samples = malloc((size_t)b.shape.repeat * sizeof *b.samples);
    TS_CHECK(b.samples && b.results, TS_ERR_MEMORY, "bench kernel: out of memory");
    b.copy_rate = 1; // until it is known
    TS_TRY(bench_copy(&b));
    ts_kernel_bench_release(&b);
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        if (options->op && strcmp(options->op, ops[i].name) != 0)
            continue;
        TS_TRY(ops[i].bench(&b));
        ts_kernel_bench_release(&b);
    }
    *out = json_pack("{s:s, s:s, s:I, s:O}", "device", ts_devices_describe(b.device), "dtype", ts_dtype_name(b.dtype),
                     "repeats", (json_int_t)b.shape.repeat, "kernels", b.results);
    TS_CHECK(*out, TS_ERR_MEMORY, "bench kernel: out of memory");
done:
    ts_kernel_bench_release(&b);
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
