// Reading a shard of the weights out of a model's safetensors.
#ifndef TS_WEIGHTS_H
#define TS_WEIGHTS_H

#include "runtime/model.h"
#include "runtime/safetensors.h"

// Device memory of the weights, owned.
typedef struct ts_weight_store {
    ts_device *device;
    void **blocks;
    size_t n_blocks, capacity, n_bytes;
} ts_weight_store;

// Fills *weights with rank `tp_rank`'s shard. *store owns the memory also when the call fails.
ts_status ts_weights_load(ts_device *device, const ts_config *config, const ts_safetensors *files, int tp_rank,
                          int tp_size, ts_weight_store *store, ts_weights *weights);

// Frees what the store owns, and the layer table of weights.
void ts_weights_release(ts_weight_store *store, ts_weights *weights);

#endif
