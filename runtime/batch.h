// The rows of one step on the device: tokens and spans, filled on the host and uploaded together.
//
//     TS_TRY(ts_batch_buffer_create(device, max_rows, &buffer));
//     ts_batch_buffer_clear(buffer, decode);
//     TS_TRY(ts_batch_buffer_add(buffer, sequence, position, tokens, n_tokens));   // once per sequence
//     TS_TRY(ts_batch_buffer_upload(buffer, &batch));                              // borrowed until the next clear
#ifndef TS_BATCH_H
#define TS_BATCH_H

#include "kernels/ops.h"

typedef struct ts_batch_buffer ts_batch_buffer;

ts_status ts_batch_buffer_create(ts_device *device, int64_t max_rows, ts_batch_buffer **out);
void ts_batch_buffer_free(ts_batch_buffer *buffer);

void ts_batch_buffer_clear(ts_batch_buffer *buffer, bool decode);

// Appends a span of `n_tokens` tokens of row `sequence` of the tile cache. TS_ERR_INVALID beyond max_rows.
ts_status ts_batch_buffer_add(ts_batch_buffer *buffer, int32_t sequence, int64_t position, const int32_t *tokens,
                              int32_t n_tokens);

// Rows added so far.
int64_t ts_batch_buffer_rows(const ts_batch_buffer *buffer);

// Fills a decode batch up to n_rows with spans of TS_PADDING. TS_ERR_INVALID beyond max_rows.
ts_status ts_batch_buffer_pad(ts_batch_buffer *buffer, int64_t n_rows);

ts_status ts_batch_buffer_upload(ts_batch_buffer *buffer, const ts_batch **out);

#endif
