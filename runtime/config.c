#include "runtime/config.h"

#include <errno.h>
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "runtime/json_strict.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static ts_status read_model_type(const ts_json_view *view) {
    static const char *const names[] = {"tessera"};
    size_t i;
    return ts_json_has(view, "model_type") ? ts_json_get_choice(view, "model_type", names, COUNT(names), &i) : TS_OK;
}

static ts_status read_sizes(const ts_json_view *view, ts_config *c) {
    ts_status status = TS_OK;
    TS_TRY(ts_json_get_int32(view, "vocab_size", 1, TS_CONFIG_MAX_VOCAB, &c->vocab_size));
    TS_TRY(ts_json_get_int32(view, "hidden_size", 1, TS_CONFIG_MAX_HIDDEN, &c->hidden_size));
    TS_TRY(ts_json_get_int32(view, "num_hidden_layers", 1, TS_CONFIG_MAX_LAYERS, &c->n_layers));
    TS_TRY(ts_json_get_int32(view, "num_attention_heads", 1, TS_CONFIG_MAX_HEADS, &c->n_heads));
    TS_TRY(ts_json_get_int32(view, "num_key_value_heads", 1, c->n_heads, &c->n_kv_heads));
    if (c->n_heads % c->n_kv_heads != 0)
        TS_TRY(ts_json_refuse(view, "num_key_value_heads", "a divisor of num_attention_heads, which is %d",
                              (int)c->n_heads));
    TS_TRY(ts_json_get_int32(view, "intermediate_size", 1, TS_CONFIG_MAX_INTERMEDIATE, &c->intermediate_size));
    if (ts_json_get_int32(view, "head_dim", 64, 128, &c->head_dim) != TS_OK || c->head_dim % 64 != 0)
        TS_TRY(ts_json_refuse(view, "head_dim", "64 or 128"));
    if (ts_json_get_int32(view, "tile_size", 64, c->head_dim, &c->tile_size) != TS_OK || c->tile_size % 64 != 0)
        TS_TRY(ts_json_refuse(view, "tile_size", "%s",
                              c->head_dim == 128 ? "64 or 128" : "64 (128 needs a head_dim of 128)"));
done:
    return status;
}

// A number > 0 with which float32 code neither divides by zero nor overflows.
static ts_status read_positive(const ts_json_view *view, const char *key, double *out) {
    double value = 0;
    if (ts_json_get_real(view, key, FLT_MIN, FLT_MAX, &value) != TS_OK)
        return ts_json_refuse(view, key, "a number > 0, from %.3g to %.3g", (double)FLT_MIN, (double)FLT_MAX);
    *out = value;
    return TS_OK;
}

static ts_status read_arithmetic(const ts_json_view *view, ts_config *c) {
    static const char *const mlps[] = {[TS_MLP_GELU_TANH] = "gelu_tanh", [TS_MLP_SWIGLU] = "swiglu"};
    ts_status status = TS_OK;
    size_t mlp = 0;
    TS_TRY(ts_json_get_choice(view, "hidden_act", mlps, COUNT(mlps), &mlp));
    c->mlp = (ts_mlp_kind)mlp;
    TS_TRY(read_positive(view, "rms_norm_eps", &c->rms_norm_eps));
    TS_TRY(read_positive(view, "normalizer_eps", &c->normalizer_eps));
    TS_TRY(read_positive(view, "decay_temperature", &c->decay_temperature));
    TS_TRY(ts_json_get_bool(view, "tie_word_embeddings", &c->tie_word_embeddings));
done:
    return status;
}

static ts_status read_sparsity(const ts_json_view *view, ts_config *c) {
    static const char *const keys[] = {"prune_ratio", "skip_share",   "cache_tiles",
                                       "cache_lanes", "recent_tiles", "sink_tiles"};
    ts_status status = TS_OK;
    ts_sparsity *s = &c->sparsity;
    if (!ts_json_has(view, "tile_sparsity"))
        return TS_OK;
    const ts_json_view inner = {json_object_get(view->object, "tile_sparsity"), view->path, "tile_sparsity."};
    TS_TRY(ts_json_check_object(&inner));
    TS_TRY(ts_json_check_keys(&inner, keys, COUNT(keys)));
    TS_TRY(ts_json_get_real(&inner, "prune_ratio", 0, 1, &s->prune_ratio));
    TS_TRY(ts_json_get_real(&inner, "skip_share", 0, 1, &s->skip_share));
    TS_TRY(ts_json_get_int(&inner, "cache_tiles", 0, TS_CONFIG_MAX_CACHE_TILES, &s->cache_tiles));
    TS_TRY(ts_json_get_int32(&inner, "cache_lanes", 1, TS_CONFIG_MAX_TILES, &s->cache_lanes));
    TS_TRY(ts_json_get_int32(&inner, "recent_tiles", 0, TS_CONFIG_MAX_TILES, &s->recent_tiles));
    TS_TRY(ts_json_get_int32(&inner, "sink_tiles", 0, TS_CONFIG_MAX_TILES, &s->sink_tiles));
    c->is_sparse = true;
done:
    return status;
}

static bool read_id(const json_t *value, int32_t vocab_size, int32_t *out) {
    const json_int_t id = json_integer_value(value);
    if (!json_is_integer(value) || id < 0 || id >= vocab_size)
        return false;
    *out = (int32_t)id;
    return true;
}

// An id or an array of ids. Needs vocab_size.
static ts_status read_eos(const ts_json_view *view, ts_config *c) {
    if (!ts_json_has(view, "eos_token_id"))
        return TS_OK;
    const json_t *value = json_object_get(view->object, "eos_token_id");
    const bool is_array = json_is_array(value);
    const size_t n = is_array ? json_array_size(value) : 1;
    bool allowed = n <= TS_CONFIG_MAX_EOS;
    for (size_t i = 0; i < n && allowed; i++)
        allowed = read_id(is_array ? json_array_get(value, i) : value, c->vocab_size, &c->eos_token_ids[i]);
    if (!allowed)
        return ts_json_refuse(view, "eos_token_id", "an integer from 0 to %d, an array of at most %d of them, or null",
                              (int)c->vocab_size - 1, TS_CONFIG_MAX_EOS);
    c->n_eos = (int32_t)n;
    return TS_OK;
}

// Needs vocab_size.
static ts_status read_bos(const ts_json_view *view, ts_config *c) {
    c->bos_token_id = -1;
    if (ts_json_has(view, "bos_token_id") &&
        !read_id(json_object_get(view->object, "bos_token_id"), c->vocab_size, &c->bos_token_id))
        return ts_json_refuse(view, "bos_token_id", "an integer from 0 to %d, or null", (int)c->vocab_size - 1);
    return TS_OK;
}

static ts_status read_tokenizer(const ts_json_view *view, ts_config *c) {
    const char *name = "";
    if (!ts_json_has(view, "tokenizer"))
        return TS_OK;
    if (ts_json_get_string(view, "tokenizer", sizeof c->tokenizer - 1, &name) != TS_OK || name[0] == '\0')
        return ts_json_refuse(view, "tokenizer", "a string of 1 to %zu bytes, or null", sizeof c->tokenizer - 1);
    strcpy(c->tokenizer, name);
    return TS_OK;
}

ts_status ts_config_load(const char *dir_or_file, ts_config *out) {
    ts_status status = TS_OK;
    ts_config config = {0};
    json_t *root = NULL;
    char *path = NULL;
    struct stat info;
    TS_CHECK(stat(dir_or_file, &info) == 0, TS_ERR_IO, "%s: cannot open: %s; the directory of a model is needed",
             dir_or_file, strerror(errno));
    if (asprintf(&path, "%s%s", dir_or_file, S_ISDIR(info.st_mode) ? "/config.json" : "") < 0) {
        path = NULL;
        TS_TRY(TS_FAIL(TS_ERR_MEMORY, "%s: no memory left for a path", dir_or_file));
    }
    TS_TRY(ts_json_load(path, TS_CONFIG_MAX_BYTES, &root));
    const ts_json_view view = {root, path, ""};
    TS_TRY(ts_json_check_object(&view));
    TS_TRY(read_model_type(&view));
    TS_TRY(read_sizes(&view, &config));
    TS_TRY(read_arithmetic(&view, &config));
    TS_TRY(read_sparsity(&view, &config));
    TS_TRY(read_eos(&view, &config));
    TS_TRY(read_bos(&view, &config));
    TS_TRY(read_tokenizer(&view, &config));
    *out = config;
done:
    json_decref(root);
    free(path);
    return status;
}
