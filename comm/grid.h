// The process grid: data x context x tensor parallel coordinates of every rank, and the groups that follow from them.
//
//     ts_grid_shape shape = {.dp = 0, .cp = 1, .tp = 4};            // dp: what is left
//     TS_TRY(ts_grid_resolve(shape, ts_group_size(world), &shape));
//     TS_TRY(ts_grid_check(shape, ts_group_size(world), limits));
//     TS_TRY(ts_grid_create(world, shape, &grid));
//     ... ts_group_all_reduce_sum(ts_grid_tp(grid), ...) ...
//     ts_grid_free(grid);
//
// tp is fastest, so that ranks which talk in every layer are neighbours on a node:
// world rank = (dp_i * cp + cp_i) * tp + tp_i.
#ifndef TS_COMM_GRID_H
#define TS_COMM_GRID_H

#include "comm/comm.h"

#ifdef __cplusplus
extern "C" {
#endif

// Degrees of the three kinds of parallelism.
typedef struct ts_grid_shape {
    int dp, cp, tp;
} ts_grid_shape;

// Coordinates of a rank: 0 <= dp < shape.dp, and so on.
typedef struct ts_grid_place {
    int dp, cp, tp;
} ts_grid_place;

// What the model and the program allow.
typedef struct ts_grid_limits {
    int n_kv_heads, intermediate_size; // of the model; tp divides both
    int vocab_size;                    // of the model; tp is at most this. 0: any
    int max_dp;                        // the largest dp the program offers. 0: any
    int cache_lanes;                   // of a tile-sparse model; cp divides it. 0: dense, any cp
    int max_cp;                        // the largest cp the program offers. 0: any
} ts_grid_limits;

// Replaces dp <= 0 by what is left of n_ranks, n_ranks / (cp * tp); a given dp stays as it is. Not collective.
// TS_ERR_INVALID when cp or tp is not positive or their product does not divide n_ranks; *out is then left alone.
ts_status ts_grid_resolve(ts_grid_shape shape, int n_ranks, ts_grid_shape *out);

// TS_OK iff dp * cp * tp = n_ranks and the limits hold; otherwise TS_ERR_INVALID, and the sentence says which rule is
// broken and lists the grids of n_ranks that fit. Not collective.
ts_status ts_grid_check(ts_grid_shape shape, int n_ranks, ts_grid_limits limits);

// Where a world rank stands, 0 <= world_rank < dp * cp * tp. Not collective.
ts_grid_place ts_grid_locate(ts_grid_shape shape, int world_rank);

typedef struct ts_grid ts_grid;

// Makes the groups of this rank. Collective over `world`, which must stay until the grid is freed; `shape` is the same
// on all ranks and its product is the world's size (otherwise TS_ERR_INVALID). *out is owned: ts_grid_free.
ts_status ts_grid_create(ts_group *world, ts_grid_shape shape, ts_grid **out);

// Frees the grid and its groups. Collective over the world. NULL is fine.
void ts_grid_free(ts_grid *grid);

// Not collective, all of them. Groups are borrowed until ts_grid_free.
ts_grid_shape ts_grid_extent(const ts_grid *grid);
ts_grid_place ts_grid_place_of(const ts_grid *grid);
ts_group *ts_grid_world(const ts_grid *grid);
ts_group *ts_grid_tp(const ts_grid *grid); // same dp and cp as this rank; group rank = tp coordinate
ts_group *ts_grid_cp(const ts_grid *grid); // same dp and tp; group rank = cp coordinate
ts_group *
ts_grid_replica(const ts_grid *grid); // same dp: the ranks that share one batch; group rank = cp_i * tp + tp_i
ts_group *ts_grid_leaders(const ts_grid *grid); // rank 0 of every replica; group rank = dp coordinate. NULL elsewhere

#ifdef __cplusplus
}
#endif
#endif
