#include "kernels/base/log.h"
#include "launcher/commands.h"
#include "launcher/progress.h"
#include "runtime/job.h"
#include "runtime/memory_plan.h"

#include <stdio.h>
#include <stdlib.h>

static const char usage[] =
    "usage: tessera run --model DIR --input FILE|- --output FILE|- [OPTIONS]\n\n"
    "Generates for every request of an OpenAI batch file (/v1/completions, one JSON object a line) and writes one "
    "record\n"
    "a line, in the order in which they finish. A bad request gets a record with status 400; the rest runs on.\n\n"
    "  --input FILE         requests; - is standard input\n"
    "  --output FILE        records, overwritten; - is standard output\n"
    "  --dp N               replicas of the model, which share the requests (default: what --tp leaves)\n"
    "  --max-batch N        sequences that run together in a replica (default 16)\n"
    "  --cache-memory SIZE  most memory of the tile cache of each rank, e.g. 4G (default: half of what is free, "
    "shared\n"
    "                       by the ranks of the node)\n" TS_LAUNCH_HELP "\nexample:\n"
    "  mpirun -n 2 tessera run --model configs/models/demo --input configs/demo/requests.jsonl --output "
    "results.jsonl\n";

enum { OPTION_INPUT = TS_OPTION_OWN, OPTION_OUTPUT, OPTION_MAX_BATCH, OPTION_CACHE_MEMORY };

typedef struct run_options {
    const char *input, *output;
    int64_t max_batch, cache_bytes;
} run_options;

static ts_status parse_own(void *context, int option, const char *value) {
    run_options *options = context;
    switch (option) {
    case OPTION_INPUT:
        options->input = value;
        return TS_OK;
    case OPTION_OUTPUT:
        options->output = value;
        return TS_OK;
    case OPTION_MAX_BATCH:
        return ts_launch_parse_number("max-batch", value, 1, 65536, false, &options->max_batch);
    default:
        return ts_launch_parse_number("cache-memory", value, 1, INT64_MAX, true, &options->cache_bytes);
    }
}

// This rank's plan, before anything of it is allocated.
static ts_status plan_memory(ts_launch *launch, size_t cache_bytes, const ts_replica_options *limits,
                             ts_memory_plan *plan) {
    ts_status status = TS_OK;
    const int tp = ts_grid_extent(launch->grid).tp;
    const ts_tile_cache_shape shape = ts_replica_cache_shape(launch->device, tp, launch->model, limits);
    size_t free_bytes, total_bytes;
    TS_TRY(ts_device_memory(launch->device, &free_bytes, &total_bytes));
    free_bytes /= (size_t)launch->n_sharing;
    TS_TRY(ts_memory_plan_make(&shape, limits->max_sequences, cache_bytes ? cache_bytes : free_bytes / 2, plan));
    ts_replica_options planned = *limits;
    planned.n_pages = plan->n_pages;
    TS_TRY(ts_memory_plan_check(plan, launch->device->backend->name,
                                ts_replica_bytes(launch->device, tp, launch->model, &planned),
                                ts_memory_plan_usable(launch->device, free_bytes)));
done:
    return status;
}

// The same number of pages on every rank, because rank 0 plans with one: what the poorest of them can hold.
static ts_status plan_cache(ts_launch *launch, size_t cache_bytes, ts_replica_options *limits) {
    ts_status status = TS_OK;
    ts_memory_plan plan;
    int64_t *all = malloc((size_t)ts_group_size(launch->world) * sizeof *all);
    TS_TRY(ts_launch_agree(launch, all ? plan_memory(launch, cache_bytes, limits, &plan)
                                       : TS_FAIL(TS_ERR_MEMORY, "out of memory")));
    TS_TRY(ts_group_all_gather(launch->world, &plan.n_pages, sizeof plan.n_pages, all));
    limits->n_pages = plan.n_pages;
    for (int r = 0; r < ts_group_size(launch->world); r++)
        limits->n_pages = all[r] < limits->n_pages ? all[r] : limits->n_pages;
done:
    free(all);
    return status;
}

// A leader's part: requests in, records out.
static ts_status lead(ts_launch *launch, const run_options *options, const ts_replica_options *limits,
                      const ts_tokenizer *tokenizer, ts_replica *replica, ts_progress *progress,
                      ts_job_progress *outcome) {
    ts_status status = TS_OK;
    ts_group *leaders = ts_grid_leaders(launch->grid);
    ts_engine *engine = NULL;
    ts_job *job = NULL;
    const char *temp_directory = getenv("TMPDIR");
    const ts_job_options job_options = {
        .input = options->input,
        .output = options->output,
        .temp_directory = temp_directory ? temp_directory : "/tmp",
        .window = limits->max_sequences / 4 + 1,
        .context = progress,
        .progress = ts_progress_show,
    };
    ts_status ready =
        ts_engine_create(launch->device, ts_grid_tp(launch->grid), launch->model, tokenizer, replica, limits, &engine);
    if (ready == TS_OK && ts_group_rank(leaders) == 0)
        ready = ts_job_create_root(leaders, &job_options, &job);
    TS_TRY(ts_launch_agree(launch, ready)); // the files are open on rank 0, or nobody begins
    if (ts_group_rank(leaders) != 0)
        TS_TRY(ts_job_create_remote(leaders, &job));
    TS_TRY(ts_engine_run(engine, ts_job_for_engine(job)));
    TS_TRY(ts_job_finish(job));
    *outcome = *ts_job_progress_of(job);
done:
    ts_job_free(job);
    ts_engine_free(engine);
    return status;
}

ts_status ts_command_run(ts_launch *launch, int argc, char **argv) {
    static const struct option table[] = {
        TS_LAUNCH_OPTIONS,
        {"input", required_argument, NULL, OPTION_INPUT},
        {"output", required_argument, NULL, OPTION_OUTPUT},
        {"max-batch", required_argument, NULL, OPTION_MAX_BATCH},
        {"cache-memory", required_argument, NULL, OPTION_CACHE_MEMORY},
        {0},
    };
    ts_status status = TS_OK;
    ts_launch_options shared;
    run_options options = {.max_batch = 16};
    ts_tokenizer *tokenizer = NULL;
    ts_replica *replica = NULL;
    ts_progress progress;
    ts_job_progress outcome = {0};
    TS_TRY(ts_launch_parse(launch, argc, argv, table, usage, &shared, parse_own, &options));
    if (shared.help)
        goto done;
    launch->agreed = !options.input || !options.output;
    TS_CHECK(options.input, TS_ERR_INVALID, "run: --input FILE is missing; - is standard input");
    TS_CHECK(options.output, TS_ERR_INVALID, "run: --output FILE is missing; - is standard output");
    TS_TRY(ts_launch_model(launch, &shared, true));
    const ts_config *config = ts_model_config(launch->model);
    TS_TRY(ts_launch_agree(
        launch, ts_tokenizer_create(shared.model, config->tokenizer[0] ? config->tokenizer : NULL, &tokenizer)));
    ts_replica_options limits = {
        .max_sequences = (int32_t)options.max_batch,
        .slot_dtype = launch->device->slot_dtype,
        .prefill_chunk = shared.prefill_chunk,
    };
    TS_TRY(plan_cache(launch, (size_t)options.cache_bytes, &limits));
    TS_TRY(ts_launch_agree(
        launch, ts_replica_create(launch->device, ts_grid_tp(launch->grid), launch->model, &limits, &replica)));
    ts_progress_begin(&progress);
    if (!ts_grid_leaders(launch->grid)) {
        TS_TRY(ts_launch_agree(launch, TS_OK)); // with the leaders, once rank 0 has opened its files
        TS_TRY(ts_replica_follow(replica));
        goto done;
    }
    status = lead(launch, &options, &limits, tokenizer, replica, &progress, &outcome);
    if (ts_group_rank(launch->world) == 0) {
        const double seconds = ts_launch_seconds() - progress.start;
        ts_progress_end(&progress);
        if (status == TS_OK)
            ts_log(TS_LOG_INFO,
                   "%lld requests done (%lld refused): %lld prompt and %lld generated tokens in %.1f s, %.0f tokens/s; "
                   "results in %s",
                   (long long)outcome.n_done, (long long)outcome.n_failed, (long long)outcome.n_prompt_tokens,
                   (long long)outcome.n_generated, seconds,
                   (double)(outcome.n_prompt_tokens + outcome.n_generated) / seconds, options.output);
    }
done:
    ts_replica_free(replica);
    ts_tokenizer_free(tokenizer);
    return status;
}
