// What every subcommand needs before it can begin: the ranks of the launch, options, a device, a model on a grid.
#ifndef TS_LAUNCH_H
#define TS_LAUNCH_H

#include "comm/grid.h"
#include "runtime/model.h"
#include "runtime/tokenizer.h"

#include <getopt.h>

// Options that several subcommands share.
typedef struct ts_launch_options {
    const char *model;       // directory
    const char *device;      // "cpu", "cuda" or "auto": cuda where a GPU is visible
    const char *dtype;       // "f32", "bf16" or NULL: what suits the device
    ts_dtype cache_dtype;    // of held tile states; TS_N_DTYPES: the arithmetic's
    int cuda_capability;     // of the kernels that a GPU runs: 0 its own, 80 those of an A100
    int tp, dp;              // 0: what the number of ranks leaves
    int n_threads;           // 0: this rank's share of the processors
    int64_t prefill_chunk;   // 0 until a device is there
    bool has_random_weights; // drawn from the seed; `model` needs only its config.json
    uint64_t random_seed;
    bool help;
} ts_launch_options;

typedef struct ts_launch {
    ts_group *world;
    bool agreed; // the failure now on its way up is known to all ranks, which end together
    ts_device *device;
    int n_sharing; // ranks that share the memory of this rank's device
    ts_grid *grid;
    ts_model *model;
} ts_launch;

// The entries of a getopt_long table for the shared options; their values begin where a subcommand's letters cannot be.
enum {
    TS_OPTION_MODEL = 256,
    TS_OPTION_DEVICE,
    TS_OPTION_DTYPE,
    TS_OPTION_CUDA_KERNELS,
    TS_OPTION_CACHE_DTYPE,
    TS_OPTION_TP,
    TS_OPTION_DP,
    TS_OPTION_THREADS,
    TS_OPTION_PREFILL_CHUNK,
    TS_OPTION_HELP,
    TS_OPTION_OWN
};
#define TS_LAUNCH_OPTIONS                                                                                              \
    {"model", required_argument, NULL, TS_OPTION_MODEL}, {"device", required_argument, NULL, TS_OPTION_DEVICE},        \
        {"cache-dtype", required_argument, NULL, TS_OPTION_CACHE_DTYPE},                                               \
        {"dtype", required_argument, NULL, TS_OPTION_DTYPE},                                                           \
        {"cuda-kernels", required_argument, NULL, TS_OPTION_CUDA_KERNELS},                                             \
        {"tp", required_argument, NULL, TS_OPTION_TP}, {"dp", required_argument, NULL, TS_OPTION_DP},                  \
        {"threads", required_argument, NULL, TS_OPTION_THREADS},                                                       \
        {"prefill-chunk", required_argument, NULL, TS_OPTION_PREFILL_CHUNK}, {                                         \
        "help", no_argument, NULL, TS_OPTION_HELP                                                                      \
    }

// What --help says of them.
#define TS_LAUNCH_HELP                                                                                                 \
    "  --model DIR          directory with config.json and model.safetensors (or its index)\n"                         \
    "  --tp N               ranks that share a model: heads, mlp, vocabulary (default: as many as can)\n"              \
    "  --threads N          threads of each rank (default: its share of the processors)\n"                             \
    "  --prefill-chunk N    prompt tokens read in one step (default 1024, on cuda 8192)\n"                             \
    "  --device NAME        cpu, cuda, or auto: cuda where a GPU is visible (default auto)\n"                          \
    "  --dtype NAME         arithmetic: f32, on cuda also bf16 (default: f32 on cpu, bf16 on cuda)\n"                  \
    "  --cuda-kernels NAME  own: those made for the GPU; sm_80: those of an A100, on any (default own)\n"              \
    "  --cache-dtype NAME   states of held tiles: f32, bf16 or fp8 (default: as the arithmetic)\n"

// A whole number from low to high, with K, M or G (powers of 1024) after it where `allow_suffix`.
ts_status ts_launch_parse_number(const char *option, const char *text, int64_t low, int64_t high, bool allow_suffix,
                                 int64_t *out);

// Parses argv for a subcommand. Shared options go to *out; others to `own(context, option, value)`. With --help, prints
// `usage` on rank 0 and sets out->help.
ts_status ts_launch_parse(ts_launch *launch, int argc, char **argv, const struct option *table, const char *usage,
                          ts_launch_options *out, ts_status (*own)(void *context, int option, const char *value),
                          void *context);

// Turns one rank's status into everybody's. Collective over the world; `launch->agreed` says that all know.
ts_status ts_launch_agree(ts_launch *launch, ts_status mine);

// A device for a rank that needs no model; sets options->prefill_chunk where it is 0. Not collective.
ts_status ts_launch_device(ts_launch *launch, ts_launch_options *options);

// Device, grid and model, agreed upon; sets options->prefill_chunk where it is 0. Replicas (dp) only where `allow_dp`.
// Collective over the world.
ts_status ts_launch_model(ts_launch *launch, ts_launch_options *options, bool allow_dp);
void ts_launch_end(ts_launch *launch);

// Seconds on a clock that only goes forward.
double ts_launch_seconds(void);

#endif
