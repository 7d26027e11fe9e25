#include "runtime/model.h"

#include "runtime/weights.h"

#include <assert.h>
#include <stdlib.h>

// Activations of one batch, one row a token. F and heads are this rank's share.
typedef struct activations {
    int64_t max_rows;
    void *memory;
    ts_tensor x;     // [M, D] the residual stream, F32; the others are of the device's compute dtype
    ts_tensor h;     // [M, D] normed
    ts_tensor delta; // [M, D] what a mixer or mlp adds to x
    ts_tensor qkvg;  // [M, (H + 2 KV) d + 2 KV]
    ts_tensor y;     // [M, H d]
    ts_tensor up;    // [M, F], swiglu: [M, 2 F]
    ts_tensor gated; // [M, F], swiglu only
} activations;

struct ts_model {
    ts_device *device;
    ts_group *tp;
    ts_config config;
    ts_weight_store store;
    ts_weights weights;
    activations act;
    void *logits, *selected; // [rows, V] and [rows, D], grown to the most rows asked for
    int64_t max_logit_rows;
    double *importance; // [tp, tiles a batch can complete, KV] device
    int64_t max_tiles;
    int64_t n_rows; // of the last batch
};

// With `source` NULL the weights are those in `dir`.
static ts_status create(ts_device *device, ts_group *tp, const char *dir, ts_weight_source *source, ts_model **out) {
    ts_status status = TS_OK;
    ts_weight_source *files = NULL;
    ts_model *model = calloc(1, sizeof *model);
    TS_CHECK(model, TS_ERR_MEMORY, "model: out of memory");
    model->device = device;
    model->tp = tp;
    TS_TRY(ts_config_load(dir, &model->config));
    if (!source)
        TS_TRY(ts_weight_source_open_files(dir, &files));
    TS_TRY(ts_weights_load(device, &model->config, source ? source : files, ts_group_rank(tp), ts_group_size(tp),
                           &model->store, &model->weights));
    *out = model;
    model = NULL;
done:
    ts_weight_source_free(files);
    ts_model_free(model);
    return status;
}

ts_status ts_model_load(ts_device *device, ts_group *tp, const char *dir, ts_model **out) {
    return create(device, tp, dir, NULL, out);
}

ts_status ts_model_create_random(ts_device *device, ts_group *tp, const char *dir, uint64_t seed, ts_model **out) {
    ts_status status = TS_OK;
    ts_weight_source *source = NULL;
    TS_TRY(ts_weight_source_open_random(seed, &source));
    TS_TRY(create(device, tp, dir, source, out));
done:
    ts_weight_source_free(source);
    return status;
}

void ts_model_free(ts_model *model) {
    if (!model)
        return;
    ts_weights_release(&model->store, &model->weights);
    ts_device_release(model->device, model->act.memory);
    ts_device_release(model->device, model->logits);
    ts_device_release(model->device, model->selected);
    ts_device_release(model->device, model->importance);
    free(model);
}

const ts_config *ts_model_config(const ts_model *model) {
    return &model->config;
}

const ts_weights *ts_model_weights(const ts_model *model) {
    return &model->weights;
}

size_t ts_model_weight_bytes(const ts_model *model) {
    return model->store.n_bytes;
}

// Column counts of the activations in the order of the struct; gated is 0 without swiglu. qkvg has gates beside its
// heads, whatever their number: its rows are padded so that each begins at a multiple of 16 bytes in any dtype.
static void activation_columns(const ts_config *config, int tp_size, int64_t columns[7]) {
    const int64_t D = config->hidden_size, F = config->intermediate_size / tp_size, d = config->head_dim;
    const int64_t H = config->n_heads / tp_size, KV = config->n_kv_heads / tp_size;
    const bool is_gated = config->mlp == TS_MLP_SWIGLU;
    columns[0] = columns[1] = columns[2] = D;
    columns[3] = (H + 2 * KV) * d + 2 * KV;
    columns[4] = H * d;
    columns[5] = is_gated ? 2 * F : F;
    columns[6] = is_gated ? F : 0;
}

// A matrix of the activations, number i of the struct, at `data`. Returns the bytes it takes.
static size_t place_activation(ts_tensor *tensor, int i, char *data, ts_dtype compute_dtype, int64_t max_rows,
                               int64_t columns) {
    *tensor = ts_tensor_of(data, i == 0 ? TS_F32 : compute_dtype, max_rows, columns);
    tensor->stride = (columns + 7) / 8 * 8;
    return ((size_t)(tensor->stride * max_rows) * ts_dtype_bytes(tensor->dtype) + 255) / 256 * 256;
}

size_t ts_model_activation_bytes(const ts_config *config, ts_dtype compute_dtype, int tp_size, int64_t max_rows) {
    int64_t columns[7];
    activation_columns(config, tp_size, columns);
    size_t bytes = 0;
    for (int i = 0; i < 7; i++)
        bytes += place_activation(&(ts_tensor){0}, i, NULL, compute_dtype, max_rows, columns[i]);
    return bytes;
}

ts_status ts_model_reserve(ts_model *model, int64_t max_rows) {
    ts_status status = TS_OK;
    activations *act = &model->act;
    const int tp_size = ts_group_size(model->tp);
    void *memory;
    if (max_rows <= act->max_rows)
        goto done;
    const ts_dtype dtype = model->device->compute_dtype;
    TS_TRY(ts_device_alloc(model->device, ts_model_activation_bytes(&model->config, dtype, tp_size, max_rows),
                           "activation", &memory));
    ts_device_release(model->device, act->memory);
    act->memory = memory;
    act->max_rows = max_rows;
    int64_t columns[7];
    activation_columns(&model->config, tp_size, columns);
    ts_tensor *const tensors[7] = {&act->x, &act->h, &act->delta, &act->qkvg, &act->y, &act->up, &act->gated};
    char *at = memory;
    for (int i = 0; i < 7; i++)
        at += place_activation(tensors[i], i, at, dtype, max_rows, columns[i]);
    // A batch of single tokens can complete a tile a row.
    if (model->config.is_sparse && max_rows > model->max_tiles) {
        const size_t per_tile = (size_t)(model->config.n_kv_heads / tp_size) * sizeof(double);
        TS_TRY(ts_device_alloc(model->device, (size_t)(tp_size * max_rows) * per_tile, "tile importance", &memory));
        ts_device_release(model->device, model->importance);
        model->importance = memory;
        model->max_tiles = max_rows;
    }
done:
    return status;
}

// Elements of the matrix, where products have to convert it.
static int64_t converted_elements(const ts_model *model, const ts_tensor *w) {
    return w->dtype == model->device->compute_dtype ? 0 : w->rows * w->cols;
}

size_t ts_model_scratch_bytes(const ts_model *model, const ts_tile_cache_layer *cache, int64_t max_rows,
                              int32_t max_spans) {
    const ts_ops *ops = model->device->ops;
    ts_run_limits limits = {.cache = cache, .max_rows = max_rows, .max_spans = max_spans};
    if (!ops->scratch_bytes)
        return 0;
    limits.weight_elements = converted_elements(model, &model->weights.head);
    for (int32_t l = 0; l < model->config.n_layers; l++) {
        const ts_layer_weights *layer = &model->weights.layers[l];
        const ts_tensor *const products[] = {&layer->qkvg, &layer->o, &layer->up, &layer->down};
        for (int i = 0; i < 4; i++) {
            const int64_t n = converted_elements(model, products[i]);
            limits.weight_elements = n > limits.weight_elements ? n : limits.weight_elements;
        }
    }
    return ops->scratch_bytes(model->device, &limits);
}

// Sums the ranks' partial products. Rows may be padded: the padding is summed along.
static ts_status reduce(ts_model *model, ts_tensor t) {
    if (ts_group_size(model->tp) == 1)
        return TS_OK;
    return ts_group_all_reduce_sum(model->tp, t.data, (size_t)(t.rows * t.stride), t.dtype);
}

// x += residual; h = norm(x).
static ts_status norm(ts_model *model, ts_tensor x, const ts_tensor *residual, ts_tensor weight, ts_tensor h) {
    return ts_op_rms_norm(model->device, &(ts_rms_norm_args){x, residual, weight, model->config.rms_norm_eps, h});
}

// h as products read it: where the norm that gives it is fused into them, they need to know it.
typedef struct normed {
    ts_tensor h;
    const ts_fused_norm *fused; // or NULL
} normed;

// x += a w^T, summed over the ranks; h = norm(x), read by the product by next_w, or by none that is known. In decode
// the norm is fused into the two products where the device can and no sum over the ranks lies between them.
static ts_status add_and_norm(ts_model *model, const ts_batch *batch, ts_tensor a, ts_tensor w, ts_tensor norm_weight,
                              const ts_tensor *next_w, ts_fused_norm *norm_memory, normed *out) {
    ts_status status = TS_OK;
    const ts_tensor x = ts_tensor_rows(model->act.x, 0, batch->n_rows);
    const ts_tensor delta = ts_tensor_rows(model->act.delta, 0, batch->n_rows);
    ts_linear_args args = {.x = a, .w = w, .y = delta, .row_invariant = batch->decode, .next_w = next_w};
    out->fused = NULL;
    if (batch->decode && next_w && ts_group_size(model->tp) == 1 && ts_op_fuses_norm(model->device, &w, next_w)) {
        const ts_tensor sums = ts_tensor_of(delta.data, TS_F32, batch->n_rows, x.cols / TS_NORM_COLUMNS);
        *norm_memory = (ts_fused_norm){x, norm_weight, sums, model->config.rms_norm_eps};
        out->fused = args.norm_behind = norm_memory;
        args.y = out->h;
    }
    TS_TRY(ts_op_linear(model->device, &args));
    if (out->fused)
        goto done;
    TS_TRY(reduce(model, delta));
    TS_TRY(norm(model, x, &delta, norm_weight, out->h));
done:
    return status;
}

// Rule 1, decided in layer 0 for every layer: importance of the tiles that end in this batch, and which are pruned.
static ts_status prune_tiles(ts_model *model, ts_tile_cache *cache, const ts_batch *batch, ts_tensor qkvg) {
    ts_status status = TS_OK;
    const ts_config *config = &model->config;
    const ts_tile_history *history = ts_tile_cache_history(cache);
    const int n_ranks = ts_group_size(model->tp), rank = ts_group_rank(model->tp);
    const int64_t n_tiles = ts_batch_tiles_completed(batch, config->tile_size);
    double *mine = model->importance + rank * n_tiles * history->n_kv_heads;
    TS_TRY(ts_op_tile_importance(model->device, &(ts_tile_importance_args){batch, qkvg, config->n_heads / n_ranks,
                                                                           config->head_dim, history, mine}));
    if (n_tiles == 0)
        goto done;
    TS_TRY(ts_group_all_gather(model->tp, mine, (size_t)(n_tiles * history->n_kv_heads) * sizeof *mine,
                               model->importance));
    TS_TRY(ts_op_tile_prune(model->device, &(ts_tile_prune_args){batch, n_ranks, model->importance, history}));
done:
    return status;
}

// y = attention(h): eqs. (1) to (9) with their projections, before o_proj.
static ts_status tile_attention(ts_model *model, ts_tile_cache *cache, const ts_batch *batch, int32_t l, normed in,
                                ts_tensor y) {
    ts_status status = TS_OK;
    const ts_config *config = &model->config;
    const ts_layer_weights *layer = &model->weights.layers[l];
    const ts_tensor qkvg = ts_tensor_rows(model->act.qkvg, 0, batch->n_rows);
    const bool prunes = l == 0 && config->is_sparse && config->sparsity.prune_ratio > 0;
    // Rule 1 counts tiles of strictly smaller importance. Tiles of the same tokens must tie to the last bit, wherever
    // they stand in a batch, or rounding would decide which of them is kept.
    TS_TRY(ts_op_linear(model->device, &(ts_linear_args){.x = in.h,
                                                         .w = layer->qkvg,
                                                         .bias = &layer->qkvg_bias,
                                                         .y = qkvg,
                                                         .row_invariant = batch->decode || prunes,
                                                         .next_w = &layer->o,
                                                         .norm_in_front = in.fused}));
    if (prunes)
        TS_TRY(prune_tiles(model, cache, batch, qkvg));
    TS_TRY(ts_op_attention(model->device, &(ts_attention_args){batch, qkvg, ts_tile_cache_layer_at(cache, l),
                                                               config->decay_temperature, config->normalizer_eps, y}));
done:
    return status;
}

typedef ts_status (*mixer_forward)(ts_model *model, ts_tile_cache *cache, const ts_batch *batch, int32_t l, normed in,
                                   ts_tensor y);
static const mixer_forward mixers[TS_N_MIXERS] = {[TS_MIXER_TILE_ATTENTION] = tile_attention};

ts_status ts_model_forward(ts_model *model, ts_tile_cache *cache, const ts_batch *batch) {
    ts_status status = TS_OK;
    const ts_weights *weights = &model->weights;
    const int64_t M = batch->n_rows;
    assert(M <= model->act.max_rows);
    const ts_tensor x = ts_tensor_rows(model->act.x, 0, M);
    const ts_tensor y = ts_tensor_rows(model->act.y, 0, M);
    const ts_tensor up = ts_tensor_rows(model->act.up, 0, M);
    const ts_tensor gated = ts_tensor_rows(model->act.gated, 0, M);
    const bool swiglu = model->config.mlp == TS_MLP_SWIGLU;
    const ts_activation activation = swiglu ? TS_ACTIVATION_NONE : TS_ACTIVATION_GELU_TANH;

    ts_fused_norm input_norm, post_norm;
    normed in = {ts_tensor_rows(model->act.h, 0, M), NULL};

    model->n_rows = M;
    TS_TRY(ts_op_embed(model->device, &(ts_embed_args){batch->tokens, weights->first_token, weights->embedding, x}));
    TS_TRY(reduce(model, x)); // each row stands on one rank, zeros on the others
    TS_TRY(norm(model, x, NULL, weights->layers[0].input_norm, in.h));
    for (int32_t l = 0; l < model->config.n_layers; l++) {
        const ts_layer_weights *layer = &weights->layers[l];
        const ts_layer_weights *next = l + 1 < model->config.n_layers ? layer + 1 : NULL;
        TS_TRY(mixers[layer->mixer](model, cache, batch, l, in, y));
        TS_TRY(add_and_norm(model, batch, y, layer->o, layer->post_norm, &layer->up, &post_norm, &in));
        TS_TRY(ts_op_linear(model->device, &(ts_linear_args){.x = in.h,
                                                             .w = layer->up,
                                                             .y = up,
                                                             .activation = activation,
                                                             .row_invariant = batch->decode,
                                                             .next_w = &layer->down,
                                                             .norm_in_front = in.fused}));
        if (swiglu)
            TS_TRY(ts_op_swiglu(model->device, &(ts_swiglu_args){up, gated}));
        TS_TRY(add_and_norm(model, batch, swiglu ? gated : up, layer->down,
                            next ? next->input_norm : weights->final_norm, next ? &next->qkvg : NULL, &input_norm,
                            &in));
    }
done:
    return status;
}

ts_status ts_model_reserve_logits(ts_model *model, int64_t n_rows) {
    ts_status status = TS_OK;
    void *logits = NULL, *selected = NULL;
    if (n_rows <= model->max_logit_rows)
        goto done;
    TS_TRY(
        ts_device_alloc(model->device, (size_t)(n_rows * model->weights.head.rows) * sizeof(float), "logits", &logits));
    TS_TRY(ts_device_alloc(model->device, (size_t)(n_rows * model->act.h.stride) * ts_dtype_bytes(model->act.h.dtype),
                           "activation", &selected));
    ts_device_release(model->device, model->logits);
    ts_device_release(model->device, model->selected);
    model->logits = logits;
    model->selected = selected;
    model->max_logit_rows = n_rows;
    logits = NULL;
done:
    ts_device_release(model->device, logits);
    return status;
}

ts_status ts_model_logits(ts_model *model, const int64_t *rows, int64_t n_rows, bool row_invariant, ts_tensor *logits) {
    ts_status status = TS_OK;
    ts_tensor h = ts_tensor_rows(model->act.h, 0, rows ? model->n_rows : n_rows);
    TS_TRY(ts_model_reserve_logits(model, n_rows));
    const ts_tensor out = ts_tensor_of(model->logits, TS_F32, n_rows, model->weights.head.rows);
    if (rows) {
        ts_tensor selected = h;
        selected.data = model->selected;
        selected.rows = n_rows;
        TS_TRY(ts_op_gather_rows(model->device, &(ts_gather_rows_args){h, rows, selected}));
        h = selected;
    }
    TS_TRY(ts_op_linear(model->device,
                        &(ts_linear_args){.x = h, .w = model->weights.head, .y = out, .row_invariant = row_invariant}));
    *logits = out;
done:
    return status;
}
