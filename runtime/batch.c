#include "runtime/batch.h"

#include <stdlib.h>

struct ts_batch_buffer {
    ts_device *device;
    int64_t max_rows;
    ts_span *spans;
    int32_t *tokens;
    void *device_spans, *device_tokens;
    ts_batch batch;
};

ts_status ts_batch_buffer_create(ts_device *device, int64_t max_rows, ts_batch_buffer **out) {
    ts_status status = TS_OK;
    ts_batch_buffer *buffer = calloc(1, sizeof *buffer);
    TS_CHECK(buffer, TS_ERR_MEMORY, "batch: out of memory");
    buffer->device = device;
    buffer->max_rows = max_rows;
    buffer->spans = malloc((size_t)max_rows * sizeof *buffer->spans);
    buffer->tokens = malloc((size_t)max_rows * sizeof *buffer->tokens);
    TS_CHECK(buffer->spans && buffer->tokens, TS_ERR_MEMORY, "batch: out of memory for %lld rows", (long long)max_rows);
    TS_TRY(ts_device_alloc(device, (size_t)max_rows * sizeof(ts_span), "batch", &buffer->device_spans));
    TS_TRY(ts_device_alloc(device, (size_t)max_rows * sizeof(int32_t), "batch", &buffer->device_tokens));
    *out = buffer;
    buffer = NULL;
done:
    ts_batch_buffer_free(buffer);
    return status;
}

void ts_batch_buffer_free(ts_batch_buffer *buffer) {
    if (!buffer)
        return;
    ts_device_release(buffer->device, buffer->device_spans);
    ts_device_release(buffer->device, buffer->device_tokens);
    free(buffer->spans);
    free(buffer->tokens);
    free(buffer);
}

void ts_batch_buffer_clear(ts_batch_buffer *buffer, bool decode) {
    buffer->batch = (ts_batch){
        .decode = decode,
        .spans = buffer->spans,
        .device_spans = buffer->device_spans,
        .tokens = buffer->device_tokens,
    };
}

ts_status ts_batch_buffer_add(ts_batch_buffer *buffer, int32_t sequence, int64_t position, const int32_t *tokens,
                              int32_t n_tokens) {
    ts_status status = TS_OK;
    ts_batch *batch = &buffer->batch;
    TS_CHECK(n_tokens > 0 && n_tokens <= buffer->max_rows - batch->n_rows, TS_ERR_INVALID,
             "batch: %d tokens do not fit beside %lld of %lld rows", n_tokens, (long long)batch->n_rows,
             (long long)buffer->max_rows);
    memcpy(buffer->tokens + batch->n_rows, tokens, (size_t)n_tokens * sizeof *tokens);
    buffer->spans[batch->n_spans++] = (ts_span){sequence, n_tokens, batch->n_rows, position};
    batch->n_rows += n_tokens;
done:
    return status;
}

int64_t ts_batch_buffer_rows(const ts_batch_buffer *buffer) {
    return buffer->batch.n_rows;
}

ts_status ts_batch_buffer_pad(ts_batch_buffer *buffer, int64_t n_rows) {
    ts_status status = TS_OK;
    static const int32_t token = 0;
    while (buffer->batch.n_rows < n_rows)
        TS_TRY(ts_batch_buffer_add(buffer, TS_PADDING, 0, &token, 1));
done:
    return status;
}

ts_status ts_batch_buffer_upload(ts_batch_buffer *buffer, const ts_batch **out) {
    ts_status status = TS_OK;
    const ts_batch *batch = &buffer->batch;
    TS_TRY(ts_device_upload(buffer->device, buffer->device_spans, buffer->spans,
                            (size_t)batch->n_spans * sizeof *buffer->spans));
    TS_TRY(ts_device_upload(buffer->device, buffer->device_tokens, buffer->tokens,
                            (size_t)batch->n_rows * sizeof *buffer->tokens));
    *out = batch;
done:
    return status;
}
