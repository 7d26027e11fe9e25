// Eqs. (1) to (9) and rules 1 to 4 for one sequence, literally, one token at a time, in float64.
#ifndef TS_TESTS_ATTENTION_REFERENCE_H
#define TS_TESTS_ATTENTION_REFERENCE_H

#include "kernels/sparsity.h"

#include <stdbool.h>

typedef struct attention_shape {
    int n_heads, n_kv_heads, head_dim, tile_size;
    bool is_sparse;
    ts_sparsity sparsity;
    double decay_temperature, normalizer_eps;
} attention_shape;

typedef struct attention_reference {
    double *y;              // [n_tokens, H d]
    double *importance;     // [n_tiles] I_t
    bool *pruned;           // [n_tiles]
    int64_t pairs[2];       // available, selected
    double margin;          // the least relative distance of any decision from the other side
    double least_decay_sum; // the least c of any token, eq. (5)
} attention_reference;

// qkvg is [n_tokens, (H + 2 KV) d + 2 KV]. Free the result.
attention_reference attention_reference_run(const attention_shape *shape, const float *qkvg, int n_tokens);
void attention_reference_free(attention_reference *reference);

#endif
