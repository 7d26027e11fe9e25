// tessera: starts the ranks, finds the subcommand, and is the only place that ends the process.
#include "kernels/base/log.h"
#include "launcher/commands.h"
#include "launcher/thread_waits.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

static const struct {
    const char *name;
    ts_status (*run)(ts_launch *launch, int argc, char **argv);
    const char *summary;
} commands[] = {
    {"run", ts_command_run, "generate for a file of requests (OpenAI batch JSONL)"},
    {"eval", ts_command_eval, "score a text: bits per byte, perplexity"},
    {"logits", ts_command_logits, "write the logits of given tokens to a safetensors file"},
    {"inspect", ts_command_inspect, "show a model's shapes, parameters and memory"},
    {"show", ts_command_show, "print prompts and what was generated for them"},
    {"bench", ts_command_bench, "time prefill and decode of a model on this machine"},
};

enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void print_usage(FILE *out) {
    fputs("usage: tessera COMMAND [OPTIONS]\n\n"
          "Inference for softmax-free, tile-sparse language models, on one process or many:\n"
          "    mpirun -n 4 tessera run --tp 2 --dp 2 ...\n\n",
          out);
    for (size_t i = 0; i < N_COMMANDS; i++)
        fprintf(out, "  %-9s%s\n", commands[i].name, commands[i].summary);
    fputs("\n`tessera COMMAND --help` explains a command and gives an example.\n", out);
}

// MPI is started only where a launcher started us: by Open MPI's mpirun, or by another through PMIx.
static bool launched_by_mpi(void) {
    return getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMIX_RANK") || getenv("PMI_RANK");
}

int main(int argc, char **argv) {
    ts_status status = TS_OK;
    ts_launch launch = {0};
    ts_thread_waits_shorten(argv);
    signal(SIGPIPE, SIG_IGN); // a closed pipe is an error of the write, which says where
    status = launched_by_mpi() ? ts_world_create_mpi(&argc, &argv, &launch.world) : ts_world_create_self(&launch.world);
    if (status != TS_OK) {
        ts_log(TS_LOG_ERROR, "%s", ts_status_message());
        return EXIT_FAILURE;
    }
    const int rank = ts_group_rank(launch.world);
    ts_log_configure(rank, ts_group_size(launch.world), TS_LOG_INFO);

    const char *name = argc > 1 ? argv[1] : "--help";
    size_t found = 0;
    while (found < N_COMMANDS && strcmp(commands[found].name, name) != 0)
        found++;
    if (found < N_COMMANDS) {
        status = commands[found].run(&launch, argc - 1, argv + 1);
    } else if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        if (rank == 0)
            print_usage(stdout);
    } else if (strcmp(name, "--version") == 0) {
        if (rank == 0)
            puts("tessera " TS_VERSION);
    } else {
        status = TS_FAIL(TS_ERR_INVALID,
                         "\"%s\" is not a command; there are run, eval, logits, inspect, show and bench", name);
        launch.agreed = true;
    }
    if (status == TS_OK && fflush(stdout) != 0)
        status = TS_FAIL(TS_ERR_IO, "standard output cannot be written");
    if (status != TS_OK && (rank == 0 || !launch.agreed))
        ts_log(TS_LOG_ERROR, "%s", ts_status_message());
    // The others may be waiting for this rank in the middle of a step: there is no orderly way out.
    if (status != TS_OK && !launch.agreed)
        ts_world_abort(launch.world, EXIT_FAILURE);
    ts_launch_end(&launch);
    ts_world_free(launch.world);
    return status == TS_OK ? EXIT_SUCCESS : EXIT_FAILURE;
}
