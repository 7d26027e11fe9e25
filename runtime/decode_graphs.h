// Decode steps as graphs: the whole step, from embedding to the sampled tokens, is recorded for a number of sequences
// once that number has come several times in a row, and launched with one call from then on.
//
//     TS_TRY(ts_decode_graphs_create(device, tp, model, cache, sampler, &graphs));
//     TS_TRY(ts_device_sampler_prepare(sampler, rows, n));
//     TS_TRY(ts_decode_graphs_run(graphs, batch, &logits)); // a decode batch; logits of all its rows
//     TS_TRY(ts_device_sampler_collect(sampler, rows, n, choices));
//     ts_decode_graphs_free(graphs);
//
// A step runs op by op where the device records no graphs, where ranks share the model (their sums go through the
// host), and where a tile completes under rule 1, whose kernels depend on how many do. In sparse form the steps in
// which a tile completes have a graph of their own, so that the others need not launch what closes tiles.
#ifndef TS_DECODE_GRAPHS_H
#define TS_DECODE_GRAPHS_H

#include "runtime/device_sampler.h"
#include "runtime/model.h"

typedef struct ts_decode_graphs ts_decode_graphs;

// All are borrowed until free. Without a sampler (NULL) a step ends with its logits. `batch` of every run must lie in
// one ts_batch_buffer.
ts_status ts_decode_graphs_create(ts_device *device, ts_group *tp, ts_model *model, ts_tile_cache *cache,
                                  ts_device_sampler *sampler, ts_decode_graphs **out);
void ts_decode_graphs_free(ts_decode_graphs *graphs);

// ts_model_forward and ts_model_logits of all rows and, with a sampler, ts_device_sampler_enqueue. Collective over the
// tensor-parallel group. *logits, which the sampler may have changed, is borrowed until the model is next used.
ts_status ts_decode_graphs_run(ts_decode_graphs *graphs, const ts_batch *batch, ts_tensor *logits);

#endif
