// What a rank's memory will hold, worked out before anything is allocated.
#ifndef TS_MEMORY_PLAN_H
#define TS_MEMORY_PLAN_H

#include "runtime/tile_cache.h"

typedef struct ts_memory_plan {
    size_t page_bytes;          // one tile slot in every layer and KV head of this rank
    size_t sequence_bytes;      // one sequence besides its pages
    int64_t pages_per_sequence; // the most one sequence can hold; INT64_MAX / tile_size where no budget bounds it
    int64_t n_pages;            // of the pool
    size_t cache_bytes;         // n_pages pages and max_sequences sequences
} ts_memory_plan;

// Sizes the tile cache of one rank: pages for max_sequences of the longest sequences, or as many as cache_bytes hold.
// TS_ERR_MEMORY when not even the sequences themselves fit; the sentence says how many would.
ts_status ts_memory_plan_make(const ts_tile_cache_shape *shape, int32_t max_sequences, size_t cache_bytes,
                              ts_memory_plan *out);

// TS_ERR_MEMORY unless the planned cache and `other_bytes` (ts_replica_bytes) fit into usable_bytes of `device`. The
// sentence says what is needed, what there is and what to lower.
ts_status ts_memory_plan_check(const ts_memory_plan *plan, const char *device, size_t other_bytes, size_t usable_bytes);

// Of free_bytes what a plan may use. Where the device knows the scratch of its ops, which is planned then, a
// thirty-second is left for what its driver takes for code and graphs, and for the penalties of many tokens; where it
// does not, an eighth.
size_t ts_memory_plan_usable(const ts_device *device, size_t free_bytes);

#endif
