#include "runtime/feed.h"

#include "runtime/batch.h"

ts_status ts_feed_check_tokens(const ts_config *config, const char *where, const int32_t *tokens, int64_t n_tokens) {
    for (int64_t i = 0; i < n_tokens; i++)
        if (tokens[i] < 0 || tokens[i] >= config->vocab_size)
            return TS_FAIL(TS_ERR_INVALID, "%s: token %lld is %d; the model's vocabulary is 0 to %d", where,
                           (long long)i, tokens[i], config->vocab_size - 1);
    return TS_OK;
}

ts_status ts_feed_tokens(ts_device *device, ts_group *tp, ts_model *model, const int32_t *tokens, int64_t n_tokens,
                         ts_feed_options options, ts_feed_visitor visit, void *context, ts_feed_counts *counts) {
    ts_status status = TS_OK;
    ts_tile_cache *cache = NULL;
    ts_batch_buffer *buffer = NULL;
    const ts_config *config = ts_model_config(model);
    ts_tile_cache_shape shape = ts_tile_cache_shape_of(config, ts_group_size(tp));
    const int64_t most = options.chunk < n_tokens ? options.chunk : n_tokens, step = options.decode ? 1 : most;
    TS_CHECK(options.chunk > 0, TS_ERR_INVALID, "prefill chunk is %lld; 1 or more is allowed",
             (long long)options.chunk);
    shape.open_dtype = device->compute_dtype;
    shape.slot_dtype = device->slot_dtype;
    TS_TRY(ts_tile_cache_create(device, &shape, 1, ts_tile_cache_pages_for(&shape, n_tokens), &cache));
    TS_TRY(ts_model_reserve(model, step));
    TS_TRY(ts_device_reserve_scratch(device, ts_model_scratch_bytes(model, ts_tile_cache_layer_at(cache, 0), step, 1)));
    TS_TRY(ts_batch_buffer_create(device, step, &buffer));
    TS_TRY(ts_group_agree(tp, ts_tile_cache_open(cache, 0, n_tokens)));
    for (int64_t first = 0; first < n_tokens; first += step) {
        const int64_t n = n_tokens - first < step ? n_tokens - first : step;
        const ts_batch *batch;
        ts_batch_buffer_clear(buffer, options.decode);
        TS_TRY(ts_batch_buffer_add(buffer, 0, first, tokens + first, (int32_t)n));
        TS_TRY(ts_batch_buffer_upload(buffer, &batch));
        TS_TRY(ts_model_forward(model, cache, batch));
        TS_TRY(visit(context, first, n));
    }
    if (counts) {
        int64_t pairs[2];
        TS_TRY(ts_tile_cache_pairs(cache, 0, &pairs[0], &pairs[1]));
        TS_TRY(ts_group_all_reduce_sum(tp, pairs, 2, TS_I64));
        *counts = (ts_feed_counts){pairs[0], pairs[1]};
    }
done:
    ts_batch_buffer_free(buffer);
    ts_tile_cache_free(cache);
    return status;
}
