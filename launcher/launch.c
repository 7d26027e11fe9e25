#include "launcher/launch.h"

#include "kernels/cpu/cpu.h"
#include "launcher/devices.h"

#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

double ts_launch_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

ts_status ts_launch_parse_number(const char *option, const char *text, int64_t low, int64_t high, bool allow_suffix,
                                 int64_t *out) {
    ts_status status = TS_OK;
    char *end;
    int64_t scale = 1, value;
    errno = 0;
    const long long number = strtoll(text, &end, 10);
    const bool has_digits = end != text && errno == 0;
    if (allow_suffix && has_digits && *end && !end[1]) {
        scale = *end == 'K' ? 1 << 10 : *end == 'M' ? 1 << 20 : *end == 'G' ? 1 << 30 : 1;
        end += scale > 1;
    }
    TS_CHECK(has_digits && !*end && !__builtin_mul_overflow((int64_t)number, scale, &value) && value >= low &&
                 value <= high,
             TS_ERR_INVALID, "--%s is \"%s\"; a whole number from %lld to %lld is allowed%s", option, text,
             (long long)low, (long long)high, allow_suffix ? ", also with K, M or G after it" : "");
    *out = value;
done:
    return status;
}

static ts_status parse_shared(int option, const char *value, ts_launch_options *out) {
    ts_status status = TS_OK;
    int64_t number = 0;
    switch (option) {
    case TS_OPTION_MODEL:
        out->model = value;
        break;
    case TS_OPTION_DEVICE:
        TS_CHECK(strcmp(value, "cpu") == 0 || strcmp(value, "cuda") == 0 || strcmp(value, "auto") == 0, TS_ERR_INVALID,
                 "--device is \"%s\"; cpu, cuda or auto are allowed, and this build has: %s", value,
                 ts_devices_names());
        out->device = value;
        break;
    case TS_OPTION_DTYPE:
        TS_CHECK(strcmp(value, "f32") == 0 || strcmp(value, "bf16") == 0, TS_ERR_INVALID,
                 "--dtype is \"%s\"; f32 or, on cuda, bf16 are allowed", value);
        out->dtype = value;
        break;
    case TS_OPTION_CUDA_KERNELS:
        TS_CHECK(strcmp(value, "own") == 0 || strcmp(value, "sm_80") == 0, TS_ERR_INVALID,
                 "--cuda-kernels is \"%s\"; own or sm_80 are allowed", value);
        out->cuda_capability = strcmp(value, "sm_80") == 0 ? 80 : 0;
        break;
    case TS_OPTION_CACHE_DTYPE: {
        static const struct {
            const char *name;
            ts_dtype dtype;
        } names[] = {{"f32", TS_F32}, {"bf16", TS_BF16}, {"fp8", TS_FP8_E4M3}};
        size_t i = 0;
        while (i < sizeof names / sizeof *names && strcmp(value, names[i].name) != 0)
            i++;
        TS_CHECK(i < sizeof names / sizeof *names, TS_ERR_INVALID,
                 "--cache-dtype is \"%s\"; f32, bf16 or fp8 are allowed", value);
        out->cache_dtype = names[i].dtype;
        break;
    }
    case TS_OPTION_TP:
        TS_TRY(ts_launch_parse_number("tp", value, 1, 65536, false, &number));
        out->tp = (int)number;
        break;
    case TS_OPTION_DP:
        TS_TRY(ts_launch_parse_number("dp", value, 1, 65536, false, &number));
        out->dp = (int)number;
        break;
    case TS_OPTION_THREADS:
        TS_TRY(ts_launch_parse_number("threads", value, 1, 4096, false, &number));
        out->n_threads = (int)number;
        break;
    case TS_OPTION_PREFILL_CHUNK:
        TS_TRY(ts_launch_parse_number("prefill-chunk", value, 1, 1 << 20, true, &number));
        out->prefill_chunk = number;
        break;
    default:
        out->help = true;
    }
done:
    return status;
}

// What getopt_long did not take. `argument` is where it stands, except among several letters after one dash.
static ts_status refuse_option(int option, const char *command, const char *argument) {
    if (option == ':')
        return TS_FAIL(TS_ERR_INVALID, "%s: option \"%s\" needs a value; see tessera %s --help", command, argument,
                       command);
    if (optopt > UCHAR_MAX)
        return TS_FAIL(TS_ERR_INVALID, "%s: \"%s\": the option takes no value; see tessera %s --help", command,
                       argument, command);
    if (optopt > 0)
        return TS_FAIL(TS_ERR_INVALID, "%s: \"-%c\" is not an option; see tessera %s --help", command, optopt, command);
    return TS_FAIL(TS_ERR_INVALID, "%s: \"%s\" is not an option; see tessera %s --help", command, argument, command);
}

ts_status ts_launch_parse(ts_launch *launch, int argc, char **argv, const struct option *table, const char *usage,
                          ts_launch_options *out, ts_status (*own)(void *context, int option, const char *value),
                          void *context) {
    ts_status status = TS_OK;
    *out = (ts_launch_options){.device = "auto", .cache_dtype = TS_N_DTYPES};
    opterr = 0;
    optind = 1;
    for (int option; (option = getopt_long(argc, argv, ":", table, NULL)) != -1;) {
        if (option == '?' || option == ':')
            TS_TRY(refuse_option(option, argv[0], argv[optind - 1]));
        if (option < TS_OPTION_OWN)
            TS_TRY(parse_shared(option, optarg, out));
        else
            TS_TRY(own(context, option, optarg));
    }
    TS_CHECK(optind == argc, TS_ERR_INVALID,
             "%s: \"%s\" stands alone; every argument is an option, see tessera %s --help", argv[0], argv[optind],
             argv[0]);
    if (out->help) {
        if (ts_group_rank(launch->world) == 0)
            fputs(usage, stdout);
        goto done;
    }
done:
    // Every rank has parsed the same arguments and knows the same.
    launch->agreed = launch->agreed || status != TS_OK;
    return status;
}

ts_status ts_launch_agree(ts_launch *launch, ts_status mine) {
    const ts_status all = ts_group_agree(launch->world, mine);
    launch->agreed = launch->agreed || all != TS_OK;
    return all;
}

// The processors this rank may use: all of its affinity mask when the launcher bound it, its share of the node
// otherwise.
static int default_threads(const ts_group *world) {
    cpu_set_t mask;
    const long n_online = sysconf(_SC_NPROCESSORS_ONLN);
    long n = n_online;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0)
        n = CPU_COUNT(&mask);
    if (n >= n_online)
        n = n_online / ts_world_local_size(world);
    return n > 1 ? (int)n : 1;
}

// Without --tp: what --dp leaves or, without that either, the most ranks that can share the model, in replicas.
static int default_tp(const ts_config *config, int n_ranks, int dp) {
    if (dp > 0)
        return n_ranks % dp == 0 ? n_ranks / dp : n_ranks;
    int tp = n_ranks;
    while (n_ranks % tp != 0 || config->n_kv_heads % tp != 0 || config->intermediate_size % tp != 0 ||
           tp > config->vocab_size)
        tp--;
    return tp;
}

// Without --prefill-chunk: rows enough to keep the device busy.
enum { CPU_CHUNK = 1024, GPU_CHUNK = 8192 };

// One rank's device: with auto a GPU where one is visible, ranks of a node taking them in turn.
static ts_status create_device(ts_launch *launch, ts_launch_options *options, int tp) {
    ts_status status = TS_OK;
    const bool wants_cuda = strcmp(options->device, "cuda") == 0;
    const bool wants_bf16 = options->dtype && strcmp(options->dtype, "bf16") == 0;
    const int n_gpus = strcmp(options->device, "cpu") == 0 ? 0 : ts_devices_cuda_count();
    launch->n_sharing = ts_world_local_size(launch->world);
    // Sums over ranks go through host memory.
    TS_CHECK(!wants_cuda || tp == 1, TS_ERR_UNSUPPORTED,
             "--device cuda with tp %d: a model is not sharded over GPUs yet; --tp 1 with --dp, or --device cpu", tp);
    if (wants_cuda || (n_gpus > 0 && tp == 1)) {
        const int ordinal = n_gpus > 0 ? ts_world_local_rank(launch->world) % n_gpus : 0;
        const bool wants_f32 = options->dtype && !wants_bf16;
        TS_TRY(
            ts_devices_create_cuda(ordinal, wants_f32 ? TS_F32 : TS_BF16, options->cuda_capability, &launch->device));
        launch->n_sharing = (launch->n_sharing + n_gpus - 1) / n_gpus;
    } else {
        TS_CHECK(!wants_bf16, TS_ERR_UNSUPPORTED, "--dtype is \"bf16\"; device cpu computes in: f32");
        TS_CHECK(options->cuda_capability == 0, TS_ERR_UNSUPPORTED,
                 "--cuda-kernels is \"sm_80\"; device cpu has none of those: leave it out, or --device cuda");
        TS_TRY(ts_cpu_device_create(options->n_threads > 0 ? options->n_threads : default_threads(launch->world),
                                    &launch->device));
    }
    if (options->prefill_chunk == 0)
        options->prefill_chunk = strcmp(launch->device->backend->name, "cpu") == 0 ? CPU_CHUNK : GPU_CHUNK;
    if (options->cache_dtype != TS_N_DTYPES)
        launch->device->slot_dtype = options->cache_dtype;
done:
    return status;
}

ts_status ts_launch_device(ts_launch *launch, ts_launch_options *options) {
    return create_device(launch, options, 1);
}

// This rank's part of the model.
static ts_status create_model(ts_launch *launch, const ts_launch_options *options) {
    ts_group *tp = ts_grid_tp(launch->grid);
    if (options->has_random_weights)
        return ts_model_create_random(launch->device, tp, options->model, options->random_seed, &launch->model);
    return ts_model_load(launch->device, tp, options->model, &launch->model);
}

ts_status ts_launch_model(ts_launch *launch, ts_launch_options *options, bool allow_dp) {
    ts_status status = TS_OK;
    launch->agreed = !options->model || (!allow_dp && options->dp > 1);
    TS_CHECK(options->model, TS_ERR_INVALID,
             "--model DIR is missing: a directory with config.json and model.safetensors");
    TS_CHECK(allow_dp || options->dp <= 1, TS_ERR_INVALID,
             "--dp is %d; only tessera run has replicas, all ranks of the other commands share one model", options->dp);
    ts_config config;
    const int n_ranks = ts_group_size(launch->world);
    ts_grid_shape shape = {allow_dp ? options->dp : 1, 1, options->tp};
    TS_TRY(ts_launch_agree(launch, ts_config_load(options->model, &config)));
    if (shape.tp == 0)
        shape.tp = default_tp(&config, n_ranks, shape.dp);
    TS_TRY(ts_launch_agree(launch, ts_grid_resolve(shape, n_ranks, &shape)));
    const ts_grid_limits limits = {
        .n_kv_heads = config.n_kv_heads,
        .intermediate_size = config.intermediate_size,
        .cache_lanes = config.is_sparse ? config.sparsity.cache_lanes : 0,
        .max_cp = 1,
        .vocab_size = config.vocab_size,
        .max_dp = allow_dp ? 0 : 1,
    };
    TS_TRY(ts_launch_agree(launch, ts_grid_check(shape, n_ranks, limits)));
    TS_TRY(ts_grid_create(launch->world, shape, &launch->grid));
    TS_TRY(ts_launch_agree(launch, create_device(launch, options, shape.tp)));
    TS_TRY(ts_launch_agree(launch, create_model(launch, options)));
done:
    return status;
}

void ts_launch_end(ts_launch *launch) {
    ts_model_free(launch->model);
    ts_device_free(launch->device);
    ts_grid_free(launch->grid);
    launch->model = NULL;
    launch->device = NULL;
    launch->grid = NULL;
}
