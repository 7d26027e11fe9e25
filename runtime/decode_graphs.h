// Decode steps as graphs: the whole step, from embedding to the sampled tokens, is recorded once for each of a small
// set of batch sizes and launched with one call from then on. A batch is filled up to the next size with rows of
// padding, which cost their part of the products alone.
//
//     TS_TRY(ts_decode_graphs_create(device, tp, model, cache, sampler, max_rows, &graphs));
//     TS_TRY(ts_decode_graphs_warm_up(graphs, buffer));
//     ts_batch_buffer_clear(buffer, true); // and a token for every sequence
//     TS_TRY(ts_decode_graphs_run(graphs, buffer, sampled, &logits));
//     TS_TRY(ts_device_sampler_collect(sampler, sampled, n, choices));
//     ts_decode_graphs_free(graphs);
//
// The first step of every size but the largest, which is warmed up, runs op by op. All do where the device records no
// graphs and where ranks share the model (their sums go through the host); batches are then not filled up. In sparse
// form the steps in which a tile completes have graphs of their own, so that the others need not launch what closes
// tiles.
#ifndef TS_DECODE_GRAPHS_H
#define TS_DECODE_GRAPHS_H

#include "runtime/batch.h"
#include "runtime/device_sampler.h"
#include "runtime/model.h"

typedef struct ts_decode_graphs ts_decode_graphs;

// For batches of up to max_rows sequences, for which model, sampler and the batch buffer must have room. All are
// borrowed until free. Without a sampler (NULL) a step ends with its logits.
ts_status ts_decode_graphs_create(ts_device *device, ts_group *tp, ts_model *model, ts_tile_cache *cache,
                                  ts_device_sampler *sampler, int32_t max_rows, ts_decode_graphs **out);
void ts_decode_graphs_free(ts_decode_graphs *graphs);

// Runs a step of padding alone, where steps are recorded: kernels are loaded, products choose their algorithms and what
// both take of the device's memory is taken before the first token. Leaves the buffer empty. Not collective.
ts_status ts_decode_graphs_warm_up(ts_decode_graphs *graphs, ts_batch_buffer *buffer);

// Uploads the decode batch in `buffer`, the same buffer in every run, and enqueues ts_model_forward and ts_model_logits
// of its rows and, with a sampler, the sampling of their next tokens: sampled[i] is the sequence of row i. Collective
// over the tensor-parallel group. *logits, [n, V] of the rows that were added, which the sampler may have changed, are
// borrowed until the model is next used.
ts_status ts_decode_graphs_run(ts_decode_graphs *graphs, ts_batch_buffer *buffer, const ts_sampler_row *const *sampled,
                               ts_tensor *logits);

#endif
