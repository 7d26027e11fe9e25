// Decode steps as graphs: the whole step, from embedding to logits, is recorded for a number of sequences once that
// number has come several times in a row, and launched with one call from then on.
//
//     TS_TRY(ts_decode_graphs_create(device, tp, model, cache, &graphs));
//     TS_TRY(ts_decode_graphs_run(graphs, batch, &logits)); // a decode batch; logits of all its rows
//     ts_decode_graphs_free(graphs);
//
// A step runs op by op where the device records no graphs, where ranks share the model (their sums go through the
// host), and where a tile completes in sparse form, whose kernels depend on how many do.
#ifndef TS_DECODE_GRAPHS_H
#define TS_DECODE_GRAPHS_H

#include "runtime/model.h"

typedef struct ts_decode_graphs ts_decode_graphs;

// All are borrowed until free. `batch` of every run must lie in one ts_batch_buffer.
ts_status ts_decode_graphs_create(ts_device *device, ts_group *tp, ts_model *model, ts_tile_cache *cache,
                                  ts_decode_graphs **out);
void ts_decode_graphs_free(ts_decode_graphs *graphs);

// ts_model_forward and ts_model_logits of all rows. Collective over the tensor-parallel group. *logits is borrowed
// until the model is next used.
ts_status ts_decode_graphs_run(ts_decode_graphs *graphs, const ts_batch *batch, ts_tensor *logits);

#endif
