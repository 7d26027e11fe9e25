#include "launcher/commands.h"
#include "runtime/feed.h"
#include "runtime/json_strict.h"
#include "runtime/safetensors_write.h"

#include <stdio.h>
#include <stdlib.h>

static const char usage[] =
    "usage: tessera logits --model DIR --tokens FILE --output FILE.safetensors [OPTIONS]\n\n"
    "Feeds given tokens to the model and writes its logits after each as the tensor \"logits\", F32 [tokens, "
    "vocabulary].\n"
    "Needs no tokenizer.\n\n"
    "  --tokens FILE        a safetensors file with a tensor \"tokens\" (I32), or a JSON list of token ids\n"
    "  --output FILE        the safetensors file to write\n"
    "  --decode             feed one token at a time, in the one-token form\n" TS_LAUNCH_HELP "\nexample:\n"
    "  tessera logits --model configs/models/demo --tokens configs/models/demo/golden.safetensors --output "
    "logits.safetensors\n";

enum { OPTION_TOKENS = TS_OPTION_OWN, OPTION_OUTPUT, OPTION_DECODE };

typedef struct logits_options {
    const char *tokens, *output;
    bool decode;
} logits_options;

static ts_status parse_own(void *context, int option, const char *value) {
    logits_options *options = context;
    if (option == OPTION_TOKENS)
        options->tokens = value;
    else if (option == OPTION_OUTPUT)
        options->output = value;
    else
        options->decode = true;
    return TS_OK;
}

static ts_status read_safetensors(const char *path, int32_t **tokens, int64_t *n_tokens) {
    ts_status status = TS_OK;
    ts_safetensors *file = NULL;
    TS_TRY(ts_safetensors_open_file(path, &file));
    const ts_safetensor *tensor = ts_safetensors_find(file, "tokens");
    TS_CHECK(tensor, TS_ERR_FORMAT, "%s: there is no tensor \"tokens\"; it must be I32 of one dimension", path);
    TS_CHECK(tensor->dtype == TS_I32 && tensor->n_dims == 1, TS_ERR_FORMAT,
             "%s: tensor \"tokens\" is %s of %d dimensions; it must be I32 of one dimension", path,
             ts_dtype_name(tensor->dtype), tensor->n_dims);
    *tokens = malloc(tensor->n_bytes + 1);
    TS_CHECK(*tokens, TS_ERR_MEMORY, "%s: out of memory for %zu bytes of tokens", path, tensor->n_bytes);
    memcpy(*tokens, tensor->data, tensor->n_bytes);
    *n_tokens = tensor->shape[0];
done:
    ts_safetensors_free(file);
    return status;
}

static ts_status read_json(const char *path, int32_t **tokens, int64_t *n_tokens) {
    ts_status status = TS_OK;
    json_t *root = NULL;
    TS_TRY(ts_json_load(path, (size_t)1 << 30, &root));
    TS_CHECK(json_is_array(root), TS_ERR_FORMAT, "%s: it must be a JSON list of token ids", path);
    const size_t n = json_array_size(root);
    *tokens = malloc(n * sizeof **tokens + 1);
    TS_CHECK(*tokens, TS_ERR_MEMORY, "%s: out of memory for %zu tokens", path, n);
    for (size_t i = 0; i < n; i++) {
        const json_t *entry = json_array_get(root, i);
        const json_int_t id = json_integer_value(entry);
        TS_CHECK(json_is_integer(entry) && id >= 0 && id <= INT32_MAX, TS_ERR_FORMAT,
                 "%s: entry %zu is not a token id; whole numbers from 0 are allowed", path, i);
        (*tokens)[i] = (int32_t)id;
    }
    *n_tokens = (int64_t)n;
done:
    json_decref(root);
    return status;
}

// A JSON list begins with a bracket, after white space; a safetensors file with the length of its header.
static ts_status read_tokens(const char *path, int32_t **tokens, int64_t *n_tokens) {
    FILE *file = fopen(path, "rb");
    int first = ' ';
    while (file && (first == ' ' || first == '\n' || first == '\r' || first == '\t'))
        first = getc(file);
    // A header of 91 (a bracket's code) bytes begins alike, and then with a zero byte.
    const int second = file && first == '[' ? getc(file) : 0;
    if (file)
        fclose(file);
    return first == '[' && second != 0 ? read_json(path, tokens, n_tokens) : read_safetensors(path, tokens, n_tokens);
}

typedef struct collector {
    ts_launch *launch;
    const logits_options *options;
    ts_safetensors_writer *writer; // rank 0
    ts_message all;
    size_t *n_bytes_of;
    float *shard; // host copy
    size_t n_shard;
    float *row; // [vocabulary]
} collector;

// Rank 0 puts the shards of every row side by side.
static ts_status collect_block(collector *c, const int64_t *rows, int64_t n) {
    ts_status status = TS_OK;
    ts_group *tp = ts_grid_tp(c->launch->grid);
    const int n_ranks = ts_group_size(tp);
    const int64_t V = ts_model_config(c->launch->model)->vocab_size;
    ts_tensor logits;
    TS_TRY(ts_model_logits(c->launch->model, rows, n, c->options->decode, &logits));
    const size_t n_values = (size_t)(n * logits.cols);
    if (n_values > c->n_shard) {
        float *grown = realloc(c->shard, n_values * sizeof *grown);
        TS_CHECK(grown, TS_ERR_MEMORY, "logits: out of memory");
        c->shard = grown;
        c->n_shard = n_values;
    }
    TS_TRY(ts_device_download(c->launch->device, c->shard, logits.data, n_values * sizeof(float)));
    TS_TRY(ts_group_gather(tp, 0, c->shard, n_values * sizeof(float), &c->all, c->n_bytes_of));
    for (int64_t i = 0; i < n && c->writer; i++) {
        const float *shard = (const float *)(const void *)c->all.data;
        for (int r = 0; r < n_ranks; r++) {
            const int64_t begin = ts_vocabulary_begin(V, r, n_ranks),
                          size = ts_vocabulary_begin(V, r + 1, n_ranks) - begin;
            memcpy(c->row + begin, shard + i * size, (size_t)size * sizeof(float));
            shard += n * size;
        }
        TS_TRY(ts_safetensors_writer_append(c->writer, c->row, (size_t)V * sizeof(float)));
    }
done:
    return status;
}

static ts_status collect_step(void *context, int64_t first, int64_t n) {
    ts_status status = TS_OK;
    enum { BLOCK = 256 };
    int64_t rows[BLOCK];
    for (int64_t done = 0; done < n; done += BLOCK) {
        const int64_t size = n - done < BLOCK ? n - done : BLOCK;
        for (int64_t i = 0; i < size; i++)
            rows[i] = done + i;
        TS_TRY(collect_block(context, rows, size));
    }
done:
    return status;
}

ts_status ts_command_logits(ts_launch *launch, int argc, char **argv) {
    static const struct option table[] = {
        TS_LAUNCH_OPTIONS,
        {"tokens", required_argument, NULL, OPTION_TOKENS},
        {"output", required_argument, NULL, OPTION_OUTPUT},
        {"decode", no_argument, NULL, OPTION_DECODE},
        {0},
    };
    ts_status status = TS_OK;
    ts_launch_options shared;
    logits_options options = {0};
    collector c = {.launch = launch, .options = &options};
    int32_t *tokens = NULL;
    int64_t n_tokens = 0;
    TS_TRY(ts_launch_parse(launch, argc, argv, table, usage, &shared, parse_own, &options));
    if (shared.help)
        goto done;
    launch->agreed = !options.tokens || !options.output;
    TS_CHECK(options.tokens, TS_ERR_INVALID, "logits: --tokens FILE is missing: safetensors or a JSON list");
    TS_CHECK(options.output, TS_ERR_INVALID, "logits: --output FILE is missing: the safetensors file to write");
    TS_TRY(ts_launch_model(launch, &shared, false));
    const int64_t V = ts_model_config(launch->model)->vocab_size;
    ts_status mine = read_tokens(options.tokens, &tokens, &n_tokens);
    if (mine == TS_OK)
        mine = ts_feed_check_tokens(ts_model_config(launch->model), options.tokens, tokens, n_tokens);
    c.row = malloc((size_t)V * sizeof *c.row);
    c.n_bytes_of = malloc((size_t)ts_group_size(launch->world) * sizeof *c.n_bytes_of);
    if (mine == TS_OK && (!c.row || !c.n_bytes_of))
        mine = TS_FAIL(TS_ERR_MEMORY, "logits: out of memory");
    if (mine == TS_OK && ts_group_rank(launch->world) == 0) {
        const ts_tensor_spec spec = {"logits", TS_F32, 2, {n_tokens, V}};
        mine = ts_safetensors_writer_create(options.output, &spec, 1, &c.writer);
    }
    TS_TRY(ts_launch_agree(launch, mine));
    if (n_tokens > 0)
        TS_TRY(ts_feed_tokens(launch->device, ts_grid_tp(launch->grid), launch->model, tokens, n_tokens,
                              (ts_feed_options){shared.prefill_chunk, options.decode}, collect_step, &c, NULL));
    if (c.writer)
        TS_TRY(ts_safetensors_writer_finish(c.writer));
done:
    ts_safetensors_writer_free(c.writer);
    ts_message_free(&c.all);
    free(c.n_bytes_of);
    free(c.shard);
    free(c.row);
    free(tokens);
    return status;
}
