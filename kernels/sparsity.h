// The tile-sparsity parameters of a model (docs/model.md, rules 1 to 4).
#ifndef TS_SPARSITY_H
#define TS_SPARSITY_H

#include <stdint.h>

typedef struct ts_sparsity {
    double prune_ratio;   // rule 1: tile t is pruned iff #{s < t : I_s < I_t} < prune_ratio * t, in [0, 1]
    double skip_share;    // rule 3: a held tile is selected iff its score >= skip_share * the sum of scores, in [0, 1]
    int64_t cache_tiles;  // rule 2: old tiles held per KV head over all lanes; 0 = no budget
    int32_t cache_lanes;  // rule 2: tile t is in lane t mod cache_lanes; each lane holds cache_tiles / cache_lanes,
                          // rounded down
    int32_t recent_tiles; // rule 4: the last tiles, always held and selected
    int32_t sink_tiles;   // rule 4: the first tiles, always held and selected
} ts_sparsity;

#endif
