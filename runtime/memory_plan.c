#include "runtime/memory_plan.h"

ts_status ts_memory_plan_make(const ts_tile_cache_shape *shape, int32_t max_sequences, size_t cache_bytes,
                              ts_memory_plan *out) {
    ts_status status = TS_OK;
    ts_memory_plan plan = {
        .page_bytes = ts_tile_cache_page_bytes(shape),
        .sequence_bytes = ts_tile_cache_sequence_bytes(shape),
        .pages_per_sequence = ts_tile_cache_pages_for(shape, INT64_MAX),
    };
    const size_t n = (size_t)max_sequences;
    TS_CHECK(
        cache_bytes / n >= plan.sequence_bytes + plan.page_bytes, TS_ERR_MEMORY,
        "the tile cache may take %zu bytes; %d sequences (--max-batch) need at least %zu, at most %zu sequences fit: "
        "give it more (--cache-memory) or run fewer together (--max-batch)",
        cache_bytes, max_sequences, n * (plan.sequence_bytes + plan.page_bytes),
        cache_bytes / (plan.sequence_bytes + plan.page_bytes));
    if (shape->is_sparse) {
        plan.n_pages = (int64_t)((cache_bytes - n * plan.sequence_bytes) / plan.page_bytes);
        if (plan.n_pages / max_sequences >= plan.pages_per_sequence)
            plan.n_pages = plan.pages_per_sequence * max_sequences;
        if (plan.n_pages > INT32_MAX) // pages are numbered in 32 bits
            plan.n_pages = INT32_MAX;
    }
    plan.cache_bytes = n * plan.sequence_bytes + (size_t)plan.n_pages * plan.page_bytes;
    *out = plan;
done:
    return status;
}

size_t ts_memory_plan_usable(const ts_device *device, size_t free_bytes) {
    return free_bytes - free_bytes / (device->ops->scratch_bytes ? 32 : 8);
}

ts_status ts_memory_plan_check(const ts_memory_plan *plan, const char *device, size_t other_bytes,
                               size_t usable_bytes) {
    if (other_bytes <= usable_bytes && plan->cache_bytes <= usable_bytes - other_bytes)
        return TS_OK;
    return TS_FAIL(TS_ERR_MEMORY,
                   "%s: this run needs %zu bytes of tile cache and %zu of activations, logits, sampling and scratch; "
                   "of what is free for a rank %zu may be planned: lower --cache-memory, --max-batch or "
                   "--prefill-chunk",
                   device, plan->cache_bytes, other_bytes, usable_bytes);
}
