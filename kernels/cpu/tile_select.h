// What happens in one KV head of one sequence when a tile completes (eqs. 6 to 8, rules 1 to 4).
#ifndef TS_CPU_TILE_SELECT_H
#define TS_CPU_TILE_SELECT_H

#include "kernels/cpu/isa.h"

// A tile that has just completed.
typedef struct ts_closed_tile {
    int64_t tile;            // its index t
    const float *state;      // [d, d] S_t
    const float *mass;       // [d] z_t
    double decay;            // c_last
    const float *mean_query; // [d] r of the next tile: the mean of q^ over this one
} ts_closed_tile;

// Stores the tile, drops what rules 1 and 2 drop, selects for tile t + 1 and writes its S^ [d, d] and z^ [d] to state
// and mass, which hold tile t's on entry (used by the dense form) and must not overlap closed.state. Advances E and the
// pair counts. `scores` is scratch for one double per slot of the sequence, plus one.
void TS_ISA(tile_close)(const ts_tile_cache_layer *cache, int32_t sequence, int32_t kv_head,
                        const ts_closed_tile *closed, double *scores, float *state, float *mass);

#endif
