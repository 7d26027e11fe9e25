#include "launcher/commands.h"
#include "runtime/evaluate.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const char usage[] =
    "usage: tessera eval --model DIR --text FILE [OPTIONS]\n\n"
    "Scores a text, every token from those before it, and prints one JSON object: tokens scored, nats, bits_per_byte,\n"
    "perplexity, tile_pairs_available, tile_pairs_selected, seconds.\n\n"
    "  --text FILE          the text; - is standard input\n"
    "  --context N          score in windows of N tokens, each from an empty state (default: one window)\n"
    "  --max-tokens N       stop after the first N tokens of the text\n" TS_LAUNCH_HELP "\nexample:\n"
    "  tessera eval --model configs/models/demo --text book.txt --context 16384 --max-tokens 65536\n";

enum { OPTION_TEXT = TS_OPTION_OWN, OPTION_CONTEXT, OPTION_MAX_TOKENS };

typedef struct eval_options {
    const char *text;
    int64_t context, max_tokens;
} eval_options;

static ts_status parse_own(void *context, int option, const char *value) {
    eval_options *options = context;
    switch (option) {
    case OPTION_TEXT:
        options->text = value;
        return TS_OK;
    case OPTION_CONTEXT:
        return ts_launch_parse_number("context", value, 1, INT64_MAX / 2, true, &options->context);
    default:
        return ts_launch_parse_number("max-tokens", value, 2, INT64_MAX / 2, true, &options->max_tokens);
    }
}

static ts_status read_file(const char *path, char **text, size_t *n_bytes) {
    ts_status status = TS_OK;
    const bool is_stdin = strcmp(path, "-") == 0;
    size_t n = 0, capacity = 1 << 16, got;
    char *data = malloc(capacity);
    FILE *file = is_stdin ? stdin : fopen(path, "rb");
    TS_CHECK(file, TS_ERR_IO, "%s: cannot open the text: %s; give a file, or - for standard input", path,
             strerror(errno));
    TS_CHECK(data, TS_ERR_MEMORY, "%s: out of memory", path);
    while ((got = fread(data + n, 1, capacity - n, file)) > 0) {
        n += got;
        if (n < capacity)
            continue;
        char *grown = realloc(data, capacity *= 2);
        TS_CHECK(grown, TS_ERR_MEMORY, "%s: out of memory after %zu bytes", path, n);
        data = grown;
    }
    TS_CHECK(!ferror(file), TS_ERR_IO, "%s: cannot read at byte %zu: %s", path, n, strerror(errno));
    *text = data;
    *n_bytes = n;
    data = NULL;
done:
    if (file && !is_stdin)
        fclose(file);
    free(data);
    return status;
}

// The text as tokens on every rank; rank 0 reads the file.
static ts_status read_tokens(ts_launch *launch, const char *model, const eval_options *options, int32_t **tokens,
                             int64_t *n_tokens, int64_t *n_scored_bytes) {
    ts_status status = TS_OK, mine = TS_OK;
    const ts_config *config = ts_model_config(launch->model);
    ts_tokenizer *tokenizer = NULL;
    char *text = NULL;
    int32_t *ids = NULL;
    size_t n_bytes = 0, n = 0;
    ts_message message = {0};
    if (ts_group_rank(launch->world) == 0) {
        mine = ts_tokenizer_create(model, config->tokenizer[0] ? config->tokenizer : NULL, &tokenizer);
        if (mine == TS_OK)
            mine = read_file(options->text, &text, &n_bytes);
        if (mine == TS_OK)
            mine = ts_tokenizer_encode(tokenizer, text, n_bytes, false, &ids, &n);
        if (mine == TS_OK && options->max_tokens > 0 && n > (size_t)options->max_tokens)
            n = (size_t)options->max_tokens;
        if (mine == TS_OK)
            mine = ts_message_set(&message, ids, n * sizeof *ids);
        *n_scored_bytes = 0;
        for (size_t i = 1; mine == TS_OK && i < n; i++) {
            size_t length;
            ts_tokenizer_token_bytes(tokenizer, ids[i], &length, NULL);
            *n_scored_bytes += (int64_t)length;
        }
    }
    TS_TRY(ts_launch_agree(launch, mine));
    TS_TRY(ts_group_broadcast_message(launch->world, 0, &message));
    *tokens = malloc(message.n_bytes + 1);
    TS_TRY(ts_launch_agree(
        launch, *tokens ? TS_OK : TS_FAIL(TS_ERR_MEMORY, "out of memory for %zu bytes of tokens", message.n_bytes)));
    if (message.n_bytes > 0)
        memcpy(*tokens, message.data, message.n_bytes);
    *n_tokens = (int64_t)(message.n_bytes / sizeof **tokens);
done:
    ts_message_free(&message);
    free(ids);
    free(text);
    ts_tokenizer_free(tokenizer);
    return status;
}

ts_status ts_command_eval(ts_launch *launch, int argc, char **argv) {
    static const struct option table[] = {
        TS_LAUNCH_OPTIONS,
        {"text", required_argument, NULL, OPTION_TEXT},
        {"context", required_argument, NULL, OPTION_CONTEXT},
        {"max-tokens", required_argument, NULL, OPTION_MAX_TOKENS},
        {0},
    };
    ts_status status = TS_OK;
    ts_launch_options shared;
    eval_options options = {0};
    int32_t *tokens = NULL;
    int64_t n_tokens, n_scored_bytes = 0;
    ts_evaluation result;
    TS_TRY(ts_launch_parse(launch, argc, argv, table, usage, &shared, parse_own, &options));
    if (shared.help)
        goto done;
    launch->agreed = !options.text;
    TS_CHECK(options.text, TS_ERR_INVALID, "eval: --text FILE is missing; - is standard input");
    TS_TRY(ts_launch_model(launch, &shared, false));
    TS_TRY(read_tokens(launch, shared.model, &options, &tokens, &n_tokens, &n_scored_bytes));
    TS_TRY(ts_launch_agree(
        launch, n_tokens >= 2 ? ts_feed_check_tokens(ts_model_config(launch->model), options.text, tokens, n_tokens)
                              : TS_FAIL(TS_ERR_INVALID, "%s: %lld tokens; 2 or more can be scored", options.text,
                                        (long long)n_tokens)));
    const double start = ts_launch_seconds();
    TS_TRY(ts_evaluate(launch->device, ts_grid_tp(launch->grid), launch->model, tokens, n_tokens, options.context,
                       shared.prefill_chunk, &result));
    if (ts_group_rank(launch->world) == 0) {
        json_t *object =
            json_pack("{s:I, s:f, s:f, s:f, s:I, s:I, s:f}", "tokens", (json_int_t)result.n_scored, "nats", result.nats,
                      "bits_per_byte", n_scored_bytes > 0 ? result.nats / log(2.0) / (double)n_scored_bytes : 0.0,
                      "perplexity", exp(result.nats / (double)result.n_scored), "tile_pairs_available",
                      (json_int_t)result.counts.pairs_available, "tile_pairs_selected",
                      (json_int_t)result.counts.pairs_selected, "seconds", ts_launch_seconds() - start);
        TS_CHECK(object, TS_ERR_INTERNAL, "eval: the score %g is not a finite number", result.nats);
        json_dumpf(object, stdout, 0);
        putchar('\n');
        json_decref(object);
    }
done:
    free(tokens);
    return status;
}
