#include "launcher/bench.h"
#include "launcher/commands.h"

#include <stdio.h>
#include <stdlib.h>

static const char usage[] =
    "usage: tessera bench prefill|decode|kernel [OPTIONS]\n\n"
    "Times a model or its kernels on this machine: medians of repeats, with the least and the most.\n\n"
    "  prefill   reads --tokens in steps of --prefill-chunk: tokens/s, and the memory it takes in all\n"
    "  decode    --steps tokens of --batch sequences together, and of one alone: tokens/s, logits included\n"
    "  kernel    every op at the given shapes: bytes, GB/s, TFLOP/s, and the share of what a copy reaches; bytes "
    "count\n"
    "            each input read once and each output written once\n\n"
    "  --config DIR         directory with a config.json, for weights that are drawn instead of read; not with "
    "--model\n"
    "  --random-weights N   the seed that they are drawn from\n"
    "  --tokens N           tokens of a prefill (default 16384, kernel 4096; on cuda 131072)\n"
    "  --batch N            sequences that decode together (default 16; on cuda 256)\n"
    "  --steps N            decode steps of a repeat (default 256)\n"
    "  --context N          tokens that every sequence has before it decodes (default 0)\n"
    "  --repeat N           repeats (default 5; kernel 20)\n"
    "  --op NAME            kernel: only this op, as in the table that it prints\n"
    "  --hidden N           kernel: hidden size (default 256; on cuda 1024)\n"
    "  --intermediate N     kernel: width of the mlp (default 4 times the hidden size)\n"
    "  --vocabulary N       kernel: rows of embedding and output (default 4096; on cuda 50304)\n"
    "  --heads N            kernel: query heads (default 4; on cuda 16)\n"
    "  --kv-heads N         kernel: key/value heads (default as many as --heads)\n"
    "  --head-dim N         kernel: 64 or 128 (default 64)\n"
    "  --json               one JSON object\n" TS_LAUNCH_HELP "\nexample:\n"
    "  tessera bench prefill --model configs/models/demo --tokens 16384\n"
    "  tessera bench decode --config configs/models/tessera-354m --random-weights 1 --batch 256\n"
    "  tessera bench kernel --op attention --tokens 128K --heads 16\n";

enum {
    OPTION_CONFIG = TS_OPTION_OWN,
    OPTION_RANDOM_WEIGHTS,
    OPTION_TOKENS,
    OPTION_BATCH,
    OPTION_STEPS,
    OPTION_CONTEXT,
    OPTION_REPEAT,
    OPTION_OP,
    OPTION_HIDDEN,
    OPTION_INTERMEDIATE,
    OPTION_VOCABULARY,
    OPTION_HEADS,
    OPTION_KV_HEADS,
    OPTION_HEAD_DIM,
    OPTION_JSON
};

typedef struct bench_mode {
    const char *name;
    bool needs_model;
    ts_status (*measure)(ts_launch *launch, const ts_launch_options *shared, const ts_bench_options *options,
                         json_t **out);
    void (*print)(const json_t *result);
} bench_mode;

static const bench_mode modes[] = {
    {"prefill", true, ts_bench_prefill, ts_bench_prefill_print},
    {"decode", true, ts_bench_decode, ts_bench_decode_print},
    {"kernel", false, ts_bench_kernel, ts_bench_kernel_print},
};

static ts_status parse_own(void *context, int option, const char *value) {
    ts_bench_options *o = context;
    switch (option) {
    case OPTION_CONFIG:
        o->config = value;
        return TS_OK;
    case OPTION_RANDOM_WEIGHTS:
        o->seed = value;
        return TS_OK;
    case OPTION_TOKENS:
        return ts_launch_parse_number("tokens", value, 1, INT64_MAX / 2, true, &o->tokens);
    case OPTION_BATCH:
        return ts_launch_parse_number("batch", value, 1, 65536, false, &o->batch);
    case OPTION_STEPS:
        return ts_launch_parse_number("steps", value, 1, 1 << 20, false, &o->steps);
    case OPTION_CONTEXT:
        return ts_launch_parse_number("context", value, 0, INT64_MAX / 4, true, &o->context);
    case OPTION_REPEAT:
        return ts_launch_parse_number("repeat", value, 1, 1000, false, &o->repeat);
    case OPTION_OP:
        o->op = value;
        return TS_OK;
    case OPTION_HIDDEN:
        return ts_launch_parse_number("hidden", value, 64, 1 << 16, false, &o->hidden);
    case OPTION_INTERMEDIATE:
        return ts_launch_parse_number("intermediate", value, 64, 1 << 18, false, &o->intermediate);
    case OPTION_VOCABULARY:
        return ts_launch_parse_number("vocabulary", value, 1, 1 << 20, false, &o->vocabulary);
    case OPTION_HEADS:
        return ts_launch_parse_number("heads", value, 1, 1024, false, &o->heads);
    case OPTION_KV_HEADS:
        return ts_launch_parse_number("kv-heads", value, 1, 1024, false, &o->kv_heads);
    case OPTION_HEAD_DIM:
        return ts_launch_parse_number("head-dim", value, 64, 128, false, &o->head_dim);
    default:
        o->as_json = true;
        return TS_OK;
    }
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

ts_bench_spread ts_bench_spread_of(double *values, int64_t n) {
    qsort(values, (size_t)n, sizeof *values, by_value);
    const double median = n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
    return (ts_bench_spread){median, values[0], values[n - 1]};
}

void ts_bench_set_spread(json_t *object, const char *name, ts_bench_spread spread) {
    char key[64];
    json_object_set_new(object, name, json_real(spread.median));
    snprintf(key, sizeof key, "%s_least", name);
    json_object_set_new(object, key, json_real(spread.least));
    snprintf(key, sizeof key, "%s_most", name);
    json_object_set_new(object, key, json_real(spread.most));
}

int64_t ts_bench_default(const ts_device *device, int64_t given, int64_t on_cpu, int64_t on_gpu) {
    return given ? given : strcmp(device->backend->name, "cpu") == 0 ? on_cpu : on_gpu;
}

// --config and --random-weights stand for --model.
static ts_status choose_weights(const ts_bench_options *options, ts_launch_options *shared) {
    ts_status status = TS_OK;
    int64_t seed = 0;
    TS_CHECK(!options->config == !options->seed, TS_ERR_INVALID,
             "bench: --config DIR and --random-weights SEED are given together: the shape of a model, and the seed of "
             "its weights");
    TS_CHECK(!options->config || !shared->model, TS_ERR_INVALID,
             "bench: --model reads weights and --config draws them; one of the two is allowed");
    if (!options->config)
        goto done;
    TS_TRY(ts_launch_parse_number("random-weights", options->seed, 0, INT64_MAX, false, &seed));
    shared->model = options->config;
    shared->has_random_weights = true;
    shared->random_seed = (uint64_t)seed;
done:
    return status;
}

ts_status ts_command_bench(ts_launch *launch, int argc, char **argv) {
    static const struct option table[] = {
        TS_LAUNCH_OPTIONS,
        {"config", required_argument, NULL, OPTION_CONFIG},
        {"random-weights", required_argument, NULL, OPTION_RANDOM_WEIGHTS},
        {"tokens", required_argument, NULL, OPTION_TOKENS},
        {"batch", required_argument, NULL, OPTION_BATCH},
        {"steps", required_argument, NULL, OPTION_STEPS},
        {"context", required_argument, NULL, OPTION_CONTEXT},
        {"repeat", required_argument, NULL, OPTION_REPEAT},
        {"op", required_argument, NULL, OPTION_OP},
        {"hidden", required_argument, NULL, OPTION_HIDDEN},
        {"intermediate", required_argument, NULL, OPTION_INTERMEDIATE},
        {"vocabulary", required_argument, NULL, OPTION_VOCABULARY},
        {"heads", required_argument, NULL, OPTION_HEADS},
        {"kv-heads", required_argument, NULL, OPTION_KV_HEADS},
        {"head-dim", required_argument, NULL, OPTION_HEAD_DIM},
        {"json", no_argument, NULL, OPTION_JSON},
        {0},
    };
    ts_status status = TS_OK;
    ts_launch_options shared;
    ts_bench_options options = {0};
    const bench_mode *mode = NULL;
    json_t *result = NULL;
    for (size_t i = 0; i < sizeof modes / sizeof *modes && argc > 1; i++)
        if (strcmp(argv[1], modes[i].name) == 0)
            mode = &modes[i];
    if (mode) { // the rest is options, of a command whose name is still the first argument
        argv[1] = argv[0];
        argv++, argc--;
    }
    TS_TRY(ts_launch_parse(launch, argc, argv, table, usage, &shared, parse_own, &options));
    if (shared.help)
        goto done;
    launch->agreed = true; // all ranks have the same arguments
    TS_CHECK(mode, TS_ERR_INVALID, "bench: what to time is missing: bench prefill, bench decode or bench kernel");
    TS_TRY(choose_weights(&options, &shared));
    TS_CHECK(mode->needs_model || ts_group_size(launch->world) == 1, TS_ERR_INVALID,
             "bench kernel: started on %d ranks; it times the kernels of one device: start it without mpirun, or with "
             "mpirun -n 1",
             ts_group_size(launch->world));
    launch->agreed = false;
    TS_TRY(mode->needs_model ? ts_launch_model(launch, &shared, false) : ts_launch_device(launch, &shared));
    TS_TRY(mode->measure(launch, &shared, &options, &result));
    if (ts_group_rank(launch->world) == 0) {
        if (options.as_json)
            json_dumpf(result, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6)), putchar('\n');
        else
            mode->print(result);
    }
done:
    json_decref(result);
    return status;
}
