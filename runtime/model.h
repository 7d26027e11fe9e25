// A model: this rank's shard of the weights, and the forward pass.
//
//     TS_TRY(ts_model_load(device, tp_group, "models/demo", &model));
//     TS_TRY(ts_model_reserve(model, max_rows));
//     TS_TRY(ts_model_forward(model, cache, &batch));                 // leaves normed hidden states
//     TS_TRY(ts_model_logits(model, rows, n_rows, decode, &logits));  // of the rows one asks for
//     ts_model_free(model);
#ifndef TS_MODEL_H
#define TS_MODEL_H

#include "comm/comm.h"
#include "runtime/tile_cache.h"
#include "runtime/weights.h"

typedef struct ts_model ts_model;

// Reads config.json and this rank's shard of the weights in `dir` (docs/model.md, "Files"). Matrices keep the dtype of
// the file, but are rounded to BF16 on a device that computes in BF16; norms become f32. Collective over
// `tp` only in that all ranks must load alike; no communication. `device` and `tp` are borrowed until free. A missing,
// extra or misshapen tensor is an error that names it.
ts_status ts_model_load(ts_device *device, ts_group *tp, const char *dir, ts_model **out);

// A model of the shape that config.json in `dir` says, with weights drawn from a seed (runtime/weight_source.h).
ts_status ts_model_create_random(ts_device *device, ts_group *tp, const char *dir, uint64_t seed, ts_model **out);
void ts_model_free(ts_model *model);

const ts_config *ts_model_config(const ts_model *model);
const ts_weights *ts_model_weights(const ts_model *model);
size_t ts_model_weight_bytes(const ts_model *model); // of this rank

// Activations for batches of up to max_rows rows. Call before the first forward, and again for larger batches.
ts_status ts_model_reserve(ts_model *model, int64_t max_rows);

// Room for the logits of up to max_rows rows. Logits of more rows at once move them.
ts_status ts_model_reserve_logits(ts_model *model, int64_t max_rows);

// Bytes of activations that ts_model_reserve takes for a shard of the model on a device of this compute dtype: for the
// memory plan.
size_t ts_model_activation_bytes(const ts_config *config, ts_dtype compute_dtype, int tp_size, int64_t max_rows);

// Bytes of scratch that no op exceeds in batches of up to max_rows rows and max_spans spans with a cache of these
// numbers (ts_tile_cache_layer_of): for the memory plan and ts_device_reserve_scratch. 0 where the device does not
// know.
size_t ts_model_scratch_bytes(const ts_model *model, const ts_tile_cache_layer *cache, int64_t max_rows,
                              int32_t max_spans);

// One pass over the batch: embeds, runs every layer, advances the cache; keeps the normed hidden states of all rows for
// ts_model_logits. Collective over the tensor-parallel group: all ranks give the same batch.
ts_status ts_model_forward(ts_model *model, ts_tile_cache *cache, const ts_batch *batch);

// Logits of this rank's vocabulary shard for `n_rows` rows of the last batch: those listed in `rows` (host memory), or
// rows 0 .. n_rows - 1 where rows is NULL. *logits is [n_rows, V] f32, borrowed until the next call. Not collective.
ts_status ts_model_logits(ts_model *model, const int64_t *rows, int64_t n_rows, bool row_invariant, ts_tensor *logits);

#endif
