#include "launcher/commands.h"
#include "runtime/safetensors.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

static const char usage[] =
    "usage: tessera inspect --model DIR [--dtype NAME] [--cache-dtype NAME] [--json]\n\n"
    "Shows what a model directory holds: shapes, parameters, bytes, sparsity, and the memory a context takes.\n\n"
    "  --model DIR          directory with config.json and model.safetensors (or its index)\n"
    "  --dtype NAME         arithmetic, by which sequences take their memory: f32 (default) or bf16, as on cuda\n"
    "  --cache-dtype NAME   states of held tiles, whose memory is shown: f32, bf16 or fp8 (default: as the "
    "arithmetic)\n"
    "  --json               one JSON object\n"
    "\nexample:\n"
    "  tessera inspect --model configs/models/demo\n";

enum { OPTION_JSON = TS_OPTION_OWN };

static ts_status parse_own(void *context, int option, const char *value) {
    *(bool *)context = true;
    return TS_OK;
}

// What --json prints, and the table from it; memory as one rank takes it that holds the whole model.
static json_t *describe(const ts_config *config, ts_dtype open_dtype, ts_dtype slot_dtype, int64_t n_parameters,
                        int64_t n_bytes) {
    ts_tile_cache_shape shape = ts_tile_cache_shape_of(config, 1);
    shape.open_dtype = open_dtype;
    shape.slot_dtype = slot_dtype;
    const ts_sparsity *rules = &config->sparsity;
    json_t *object = json_pack(
        "{s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:b, s:i, s:I, s:I}", "vocab_size", config->vocab_size, "hidden_size",
        config->hidden_size, "num_hidden_layers", config->n_layers, "num_attention_heads", config->n_heads,
        "num_key_value_heads", config->n_kv_heads, "head_dim", config->head_dim, "intermediate_size",
        config->intermediate_size, "hidden_act", config->mlp == TS_MLP_SWIGLU ? "swiglu" : "gelu_tanh",
        "tie_word_embeddings", config->tie_word_embeddings, "tile_size", config->tile_size, "parameters",
        (json_int_t)n_parameters, "weight_bytes", (json_int_t)n_bytes);
    json_object_set_new(object, "sequence_bytes", json_integer((json_int_t)ts_tile_cache_sequence_bytes(&shape)));
    if (!config->is_sparse) {
        json_object_set_new(object, "tile_sparsity", json_null());
        json_object_set_new(object, "bytes_per_context_token", json_integer(0));
        return object;
    }
    json_object_set_new(object, "tile_sparsity",
                        json_pack("{s:f, s:f, s:I, s:i, s:i, s:i}", "prune_ratio", rules->prune_ratio, "skip_share",
                                  rules->skip_share, "cache_tiles", (json_int_t)rules->cache_tiles, "cache_lanes",
                                  rules->cache_lanes, "recent_tiles", rules->recent_tiles, "sink_tiles",
                                  rules->sink_tiles));
    const size_t page_bytes = ts_tile_cache_page_bytes(&shape);
    json_object_set_new(object, "bytes_per_context_token", json_real((double)page_bytes / config->tile_size));
    if (rules->cache_tiles > 0) {
        size_t most;
        if (ts_size_mul((size_t)ts_tile_cache_pages_for(&shape, INT64_MAX), page_bytes, &most) && most <= INT64_MAX)
            json_object_set_new(object, "context_bytes_at_most", json_integer((json_int_t)most));
    }
    return object;
}

static void print_table(const char *dir, const ts_config *config, ts_dtype slot_dtype, const json_t *o) {
#define INT(key) ((long long)json_integer_value(json_object_get(o, key)))
    printf("model              %s\n", dir);
    printf("layers             %d of hidden size %d, mlp %s of %d\n", config->n_layers, config->hidden_size,
           config->mlp == TS_MLP_SWIGLU ? "swiglu" : "gelu_tanh", config->intermediate_size);
    printf("heads              %d query, %d key/value, of size %d; tiles of %d tokens\n", config->n_heads,
           config->n_kv_heads, config->head_dim, config->tile_size);
    printf("vocabulary         %d, output %s\n", config->vocab_size,
           config->tie_word_embeddings ? "tied to the embedding" : "of its own");
    printf("parameters         %lld in %lld bytes\n", INT("parameters"), INT("weight_bytes"));
    if (!config->is_sparse) {
        printf("sparsity           none: the dense recurrence, %lld bytes a sequence whatever its length\n",
               INT("sequence_bytes"));
        return;
    }
    const ts_sparsity *rules = &config->sparsity;
    printf("sparsity           prune_ratio %g, skip_share %g, %lld cache tiles in %d lanes, %d recent, %d sink\n",
           rules->prune_ratio, rules->skip_share, (long long)rules->cache_tiles, rules->cache_lanes,
           rules->recent_tiles, rules->sink_tiles);
    printf("cache              %lld bytes a sequence, and %.1f bytes a token of context while tiles are kept (%s)\n",
           INT("sequence_bytes"), json_real_value(json_object_get(o, "bytes_per_context_token")),
           ts_dtype_name(slot_dtype));
    if (json_object_get(o, "context_bytes_at_most"))
        printf("                   at most %lld bytes of tiles, however long the context\n",
               INT("context_bytes_at_most"));
#undef INT
}

ts_status ts_command_inspect(ts_launch *launch, int argc, char **argv) {
    static const struct option table[] = {
        {"model", required_argument, NULL, TS_OPTION_MODEL},
        {"dtype", required_argument, NULL, TS_OPTION_DTYPE},
        {"cache-dtype", required_argument, NULL, TS_OPTION_CACHE_DTYPE},
        {"json", no_argument, NULL, OPTION_JSON},
        {"help", no_argument, NULL, TS_OPTION_HELP},
        {0},
    };
    ts_status status = TS_OK;
    ts_launch_options shared;
    ts_safetensors *files = NULL;
    json_t *object = NULL;
    ts_config config;
    bool as_json = false;
    TS_TRY(ts_launch_parse(launch, argc, argv, table, usage, &shared, parse_own, &as_json));
    if (shared.help || ts_group_rank(launch->world) != 0)
        goto done;
    launch->agreed = true; // nobody waits for rank 0
    TS_CHECK(shared.model, TS_ERR_INVALID, "inspect: --model DIR is missing: a directory with config.json and weights");
    TS_TRY(ts_config_load(shared.model, &config));
    TS_TRY(ts_safetensors_open_model(shared.model, &files));
    int64_t n_parameters = 0, n_bytes = 0;
    for (size_t i = 0; i < ts_safetensors_count(files); i++) {
        const ts_safetensor *tensor = ts_safetensors_at(files, i);
        n_bytes += (int64_t)tensor->n_bytes;
        n_parameters += (int64_t)(tensor->n_bytes / ts_dtype_bytes(tensor->dtype));
    }
    const ts_dtype open_dtype = shared.dtype && strcmp(shared.dtype, "bf16") == 0 ? TS_BF16 : TS_F32;
    const ts_dtype slot_dtype = shared.cache_dtype == TS_N_DTYPES ? open_dtype : shared.cache_dtype;
    object = describe(&config, open_dtype, slot_dtype, n_parameters, n_bytes);
    TS_CHECK(object, TS_ERR_MEMORY, "inspect: out of memory");
    if (as_json) {
        json_dumpf(object, stdout, JSON_INDENT(2));
        putchar('\n');
    } else {
        print_table(shared.model, &config, slot_dtype, object);
    }
done:
    json_decref(object);
    ts_safetensors_free(files);
    return status;
}
