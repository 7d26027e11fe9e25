// The sampling chain of runtime/sampler.h where the whole vocabulary is on one device that has the op `sample`: no
// logits are copied to the host.
//
//     if (ts_device_sampler_is_possible(device, tp))
//         TS_TRY(ts_device_sampler_create(device, max_rows, &sampler));
//     TS_TRY(ts_device_sampler_choose(sampler, logits, rows, n, choices));
//
// or in three parts, of which the second only enqueues and can be recorded in a graph (runtime/decode_graphs.h):
//
//     TS_TRY(ts_device_sampler_prepare(sampler, rows, n, n_rows));
//     TS_TRY(ts_device_sampler_enqueue(sampler, logits));
//     TS_TRY(ts_device_sampler_collect(sampler, rows, n, choices));
//
// It chooses the token that the host's sampler would, but where a draw or a threshold falls within rounding (2^-23 of
// a token's mass) of a boundary between two.
#ifndef TS_DEVICE_SAMPLER_H
#define TS_DEVICE_SAMPLER_H

#include "kernels/ops.h"
#include "runtime/sampler.h"

typedef struct ts_device_sampler ts_device_sampler;

bool ts_device_sampler_is_possible(const ts_device *device, const ts_group *tp);

// For up to max_rows rows at once. `device` is borrowed until free.
ts_status ts_device_sampler_create(ts_device *device, int32_t max_rows, ts_device_sampler **out);
void ts_device_sampler_free(ts_device_sampler *sampler);

// Bytes of device memory that a sampler for max_rows rows takes.
size_t ts_device_sampler_bytes(int32_t max_rows);

// logits: [n, V] f32 on the device, overwritten. rows[i] is the sequence of row i. TS_ERR_INTERNAL as for
// ts_sampler_choose. Penalties and biases of more tokens than ever before grow the memory they pass through.
ts_status ts_device_sampler_choose(ts_device_sampler *sampler, ts_tensor logits, const ts_sampler_row *const *rows,
                                   int32_t n, ts_next_token *choices);

// n_rows: of the logits that enqueue will be given, n or more; those after the first n are sampled greedily, and nobody
// asks for their tokens.
ts_status ts_device_sampler_prepare(ts_device_sampler *sampler, const ts_sampler_row *const *rows, int32_t n,
                                    int32_t n_rows);
ts_status ts_device_sampler_enqueue(ts_device_sampler *sampler, ts_tensor logits);
ts_status ts_device_sampler_collect(ts_device_sampler *sampler, const ts_sampler_row *const *rows, int32_t n,
                                    ts_next_token *choices);

// How often the memory has moved that enqueue reads and writes: what was recorded before is void.
int64_t ts_device_sampler_moves(const ts_device_sampler *sampler);

#endif
