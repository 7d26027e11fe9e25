// The weights of one rank, and bringing them from a source to the device.
#ifndef TS_WEIGHTS_H
#define TS_WEIGHTS_H

#include "kernels/base/tensor.h"
#include "kernels/device.h"
#include "runtime/config.h"
#include "runtime/weight_source.h"

// How the layer mixes tokens. The layer loop calls a mixer by kind, so that others can stand beside this attention.
typedef enum ts_mixer_kind { TS_MIXER_TILE_ATTENTION, TS_N_MIXERS } ts_mixer_kind;

// This rank's part of one layer. H, KV, F are heads, KV heads and intermediate size divided by the number of ranks.
typedef struct ts_layer_weights {
    ts_mixer_kind mixer;
    ts_tensor input_norm; // [1, D]
    ts_tensor qkvg;       // [(H + 2 KV) d + 2 KV, D] rows of q, k, v, key gate, decay gate
    ts_tensor qkvg_bias;  // [1, (H + 2 KV) d + 2 KV] zero but for the gates
    ts_tensor o;          // [D, H d]
    ts_tensor post_norm;  // [1, D]
    ts_tensor up;         // [F, D]; swiglu: [2 F, D] rows of gate, up
    ts_tensor down;       // [D, F]
} ts_layer_weights;

// Rows [first_token, first_token + V) of the vocabulary are this rank's.
typedef struct ts_weights {
    int64_t first_token;
    ts_tensor embedding; // [V, D]
    ts_layer_weights *layers;
    ts_tensor final_norm; // [1, D]
    ts_tensor head;       // [V, D]; the embedding itself when tied
} ts_weights;

// How V rows of vocabulary are split: rank r of n owns [ts_vocabulary_begin(V, r, n), ts_vocabulary_begin(V, r + 1,
// n)).
static inline int64_t ts_vocabulary_begin(int64_t vocab_size, int rank, int n_ranks) {
    return vocab_size * rank / n_ranks;
}

// Device memory of the weights, owned.
typedef struct ts_weight_store {
    ts_device *device;
    void **blocks;
    size_t n_blocks, capacity, n_bytes;
} ts_weight_store;

// Fills *weights with rank `tp_rank`'s shard. *store owns the memory also when the call fails.
ts_status ts_weights_load(ts_device *device, const ts_config *config, ts_weight_source *source, int tp_rank,
                          int tp_size, ts_weight_store *store, ts_weights *weights);

// Frees what the store owns, and the layer table of weights.
void ts_weights_release(ts_weight_store *store, ts_weights *weights);

#endif
