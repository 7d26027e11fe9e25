#include "runtime/weights.h"

#include <stdio.h>
#include <stdlib.h>

// Part of a tensor of the source: rows [row, row + rows), columns [col, col + cols) of a matrix [all_rows, all_cols].
typedef struct weight_part {
    const char *name; // within the layer's prefix
    int64_t all_rows, all_cols, row, rows, col, cols;
    bool is_vector; // [all_cols] in the source, one row here
} weight_part;

typedef struct loader {
    ts_weight_store *store;
    ts_weight_source *source;
} loader;

static ts_status find_part(loader *load, const char *prefix, const weight_part *part, ts_weight_tensor *out) {
    char name[256];
    snprintf(name, sizeof name, "%s%s", prefix, part->name);
    return ts_weight_source_find(load->source, name, part->is_vector, part->all_rows, part->all_cols, out);
}

static ts_status store_add(ts_weight_store *store, size_t n_bytes, void **out) {
    ts_status status = TS_OK;
    if (store->n_blocks == store->capacity) {
        const size_t capacity = store->capacity ? 2 * store->capacity : 64;
        void **blocks = realloc(store->blocks, capacity * sizeof *blocks);
        TS_CHECK(blocks, TS_ERR_MEMORY, "weights: out of memory");
        store->blocks = blocks;
        store->capacity = capacity;
    }
    TS_TRY(ts_device_alloc(store->device, n_bytes, "weight", out));
    store->blocks[store->n_blocks++] = *out;
    store->n_bytes += n_bytes;
done:
    return status;
}

// Stacks parts row upon row into one matrix on the device: F32 where force_f32 is set, BF16 where the device computes
// in it, else the dtype of the source where all parts agree and F32 where they do not.
static ts_status load_stack(loader *load, const char *prefix, const weight_part *parts, int n_parts, bool force_f32,
                            ts_tensor *out) {
    ts_status status = TS_OK;
    ts_weight_tensor tensors[8];
    char *host = NULL;
    void *data;
    int64_t rows = 0;
    bool agree = true;
    for (int i = 0; i < n_parts; i++) {
        TS_TRY(find_part(load, prefix, &parts[i], &tensors[i]));
        rows += parts[i].rows;
        agree = agree && tensors[i].dtype == tensors[0].dtype;
    }
    const bool narrows = load->store->device->compute_dtype == TS_BF16;
    const ts_dtype dtype = force_f32 ? TS_F32 : narrows ? TS_BF16 : agree ? tensors[0].dtype : TS_F32;
    const size_t row_bytes = (size_t)parts[0].cols * ts_dtype_bytes(dtype);
    host = malloc((size_t)rows * row_bytes);
    TS_CHECK(host, TS_ERR_MEMORY, "weights: out of memory for %zu bytes of \"%s%s\"", (size_t)rows * row_bytes, prefix,
             parts[0].name);
    char *at = host;
    for (int i = 0; i < n_parts; i++)
        for (int64_t r = 0; r < parts[i].rows; r++, at += row_bytes)
            ts_weight_tensor_read(&tensors[i], parts[i].row + r, parts[i].col, parts[i].cols, dtype, at);
    ts_device *device = load->store->device;
    if (parts[0].is_vector) {
        TS_TRY(store_add(load->store, row_bytes, &data));
        TS_TRY(ts_device_upload(device, data, host, row_bytes));
    } else {
        TS_TRY(store_add(load->store, ts_device_weight_bytes(device, rows, parts[0].cols, dtype), &data));
        TS_TRY(ts_device_upload_weight(device, data, host, rows, parts[0].cols, dtype));
    }
    *out = ts_tensor_of(data, dtype, rows, parts[0].cols);
done:
    free(host);
    return status;
}

static ts_status load_vector(loader *load, const char *prefix, const char *name, int64_t n, ts_tensor *out) {
    const weight_part part = {.name = name, .all_rows = 1, .all_cols = n, .rows = 1, .cols = n, .is_vector = true};
    return load_stack(load, prefix, &part, 1, true, out);
}

// Rows of the bias vector that stands under qkvg: zero for q, k, v.
static ts_status load_gate_bias(loader *load, const char *prefix, int64_t n_before, int64_t all_kv, int64_t first_kv,
                                int64_t n_kv, ts_tensor *out) {
    ts_status status = TS_OK;
    static const char *const names[] = {"self_attn.key_gate.bias", "self_attn.decay_gate.bias"};
    void *data;
    const ts_dtype dtype = load->store->device->compute_dtype;
    const size_t element = ts_dtype_bytes(dtype), n_bytes = (size_t)(n_before + 2 * n_kv) * element;
    char *bias = calloc(1, n_bytes);
    TS_CHECK(bias, TS_ERR_MEMORY, "weights: out of memory");
    for (int i = 0; i < 2; i++) {
        const weight_part part = {.name = names[i], .all_rows = 1, .all_cols = all_kv, .is_vector = true};
        ts_weight_tensor tensor;
        TS_TRY(find_part(load, prefix, &part, &tensor));
        ts_weight_tensor_read(&tensor, 0, first_kv, n_kv, dtype, bias + (size_t)(n_before + i * n_kv) * element);
    }
    TS_TRY(store_add(load->store, n_bytes, &data));
    TS_TRY(ts_device_upload(load->store->device, data, bias, n_bytes));
    *out = ts_tensor_of(data, dtype, 1, n_before + 2 * n_kv);
done:
    free(bias);
    return status;
}

static weight_part rows_of(const char *name, int64_t all_rows, int64_t cols, int rank, int size) {
    return (weight_part){name, all_rows, cols, all_rows / size * rank, all_rows / size, 0, cols, false};
}

static weight_part columns_of(const char *name, int64_t rows, int64_t all_cols, int rank, int size) {
    return (weight_part){name, rows, all_cols, 0, rows, all_cols / size * rank, all_cols / size, false};
}

static ts_status load_layer(loader *load, const ts_config *config, int32_t l, int rank, int size,
                            ts_layer_weights *layer) {
    ts_status status = TS_OK;
    const int64_t D = config->hidden_size, F = config->intermediate_size, d = config->head_dim;
    const int64_t H = config->n_heads, KV = config->n_kv_heads;
    char prefix[64];
    snprintf(prefix, sizeof prefix, "model.layers.%d.", l);
    const weight_part qkvg[] = {
        rows_of("self_attn.q_proj.weight", H * d, D, rank, size),
        rows_of("self_attn.k_proj.weight", KV * d, D, rank, size),
        rows_of("self_attn.v_proj.weight", KV * d, D, rank, size),
        rows_of("self_attn.key_gate.weight", KV, D, rank, size),
        rows_of("self_attn.decay_gate.weight", KV, D, rank, size),
    };
    const weight_part o = columns_of("self_attn.o_proj.weight", D, H * d, rank, size);
    const weight_part gate_up[] = {
        rows_of("mlp.gate_proj.weight", F, D, rank, size),
        rows_of("mlp.up_proj.weight", F, D, rank, size),
    };
    const weight_part down = columns_of("mlp.down_proj.weight", D, F, rank, size);
    const bool gated = config->mlp == TS_MLP_SWIGLU;
    layer->mixer = TS_MIXER_TILE_ATTENTION;
    TS_TRY(load_vector(load, prefix, "input_layernorm.weight", D, &layer->input_norm));
    TS_TRY(load_stack(load, prefix, qkvg, 5, false, &layer->qkvg));
    TS_TRY(load_gate_bias(load, prefix, (H + 2 * KV) / size * d, KV, KV / size * rank, KV / size, &layer->qkvg_bias));
    TS_TRY(load_stack(load, prefix, &o, 1, false, &layer->o));
    TS_TRY(load_vector(load, prefix, "post_attention_layernorm.weight", D, &layer->post_norm));
    TS_TRY(load_stack(load, prefix, gated ? gate_up : gate_up + 1, gated ? 2 : 1, false, &layer->up));
    TS_TRY(load_stack(load, prefix, &down, 1, false, &layer->down));
done:
    return status;
}

ts_status ts_weights_load(ts_device *device, const ts_config *config, ts_weight_source *source, int tp_rank,
                          int tp_size, ts_weight_store *store, ts_weights *weights) {
    ts_status status = TS_OK;
    const int64_t V = config->vocab_size, D = config->hidden_size;
    const int64_t begin = ts_vocabulary_begin(V, tp_rank, tp_size), end = ts_vocabulary_begin(V, tp_rank + 1, tp_size);
    const weight_part embedding = {"model.embed_tokens.weight", V, D, begin, end - begin, 0, D, false};
    const weight_part head = {"lm_head.weight", V, D, begin, end - begin, 0, D, false};
    loader load = {store, source};
    *weights = (ts_weights){.first_token = begin};
    store->device = device;
    weights->layers = calloc((size_t)config->n_layers, sizeof *weights->layers);
    TS_CHECK(weights->layers, TS_ERR_MEMORY, "weights: out of memory");
    TS_TRY(load_stack(&load, "", &embedding, 1, false, &weights->embedding));
    for (int32_t l = 0; l < config->n_layers; l++)
        TS_TRY(load_layer(&load, config, l, tp_rank, tp_size, &weights->layers[l]));
    TS_TRY(load_vector(&load, "", "model.norm.weight", D, &weights->final_norm));
    weights->head = weights->embedding;
    if (!config->tie_word_embeddings)
        TS_TRY(load_stack(&load, "", &head, 1, false, &weights->head));
    TS_TRY(ts_weight_source_finish(source));
done:
    return status;
}

void ts_weights_release(ts_weight_store *store, ts_weights *weights) {
    for (size_t i = 0; i < store->n_blocks; i++)
        ts_device_release(store->device, store->blocks[i]);
    free(store->blocks);
    free(weights->layers);
}
