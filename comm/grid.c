#include "comm/grid.h"

#include <assert.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct ts_grid {
    ts_grid_shape shape;
    ts_grid_place place;
    ts_group *world; // borrowed
    ts_group *tp, *cp, *replica, *leaders;
};

ts_status ts_grid_resolve(ts_grid_shape shape, int n_ranks, ts_grid_shape *out) {
    ts_status status = TS_OK;
    TS_CHECK(shape.cp > 0 && shape.tp > 0, TS_ERR_INVALID,
             "grid: cp = %d, tp = %d: both must be at least 1; only dp may be left out", shape.cp, shape.tp);
    if (shape.dp <= 0) {
        const int64_t per_replica = (int64_t)shape.cp * shape.tp;
        TS_CHECK(n_ranks > 0 && n_ranks % per_replica == 0, TS_ERR_INVALID,
                 "grid: cp x tp = %d x %d does not divide %d ranks; start a multiple of %lld ranks", shape.cp, shape.tp,
                 n_ranks, (long long)per_replica);
        shape.dp = (int)(n_ranks / per_replica);
    }
    *out = shape;
done:
    return status;
}

static bool shape_covers(ts_grid_shape shape, int n_ranks) {
    return shape.dp > 0 && shape.cp > 0 && shape.tp > 0 &&
           // Each factor is at most n_ranks before the next is multiplied in: no overflow in 64 bits.
           (int64_t)shape.dp * shape.cp <= n_ranks && (int64_t)shape.dp * shape.cp * shape.tp == n_ranks;
}

static bool tp_fits(int tp, ts_grid_limits limits) {
    return limits.n_kv_heads % tp == 0 && limits.intermediate_size % tp == 0 &&
           (limits.vocab_size == 0 || tp <= limits.vocab_size);
}

static bool cp_fits(int cp, ts_grid_limits limits) {
    return (limits.max_cp == 0 || cp <= limits.max_cp) && limits.cache_lanes % cp == 0;
}

// Writes "dp x cp x tp" of every grid that fits, as many as there is room for.
static void list_grids(int n_ranks, ts_grid_limits limits, char *text, size_t capacity) {
    size_t length = 0;
    text[0] = '\0';
    for (int cp = 1; cp <= n_ranks; cp++) {
        if (n_ranks % cp != 0 || !cp_fits(cp, limits))
            continue;
        for (int tp = 1; tp <= n_ranks / cp; tp++) {
            if (n_ranks / cp % tp != 0 || !tp_fits(tp, limits) ||
                (limits.max_dp != 0 && n_ranks / cp / tp > limits.max_dp))
                continue;
            if (capacity - length < 48) {
                snprintf(text + length, capacity - length, ", ...");
                return;
            }
            length += (size_t)snprintf(text + length, capacity - length, "%s%d x %d x %d", length > 0 ? ", " : "",
                                       n_ranks / cp / tp, cp, tp);
        }
    }
}

ts_status ts_grid_check(ts_grid_shape shape, int n_ranks, ts_grid_limits limits) {
    char rule[160] = "", fitting[1024];
    assert(n_ranks > 0 && limits.n_kv_heads > 0 && limits.intermediate_size > 0);
    assert(limits.cache_lanes >= 0 && limits.max_cp >= 0);
    if (!shape_covers(shape, n_ranks))
        snprintf(rule, sizeof rule, "the product must be the number of ranks, %d", n_ranks);
    else if (limits.n_kv_heads % shape.tp != 0)
        snprintf(rule, sizeof rule, "tp must divide the %d KV heads", limits.n_kv_heads);
    else if (limits.intermediate_size % shape.tp != 0)
        snprintf(rule, sizeof rule, "tp must divide intermediate_size %d", limits.intermediate_size);
    else if (limits.vocab_size != 0 && shape.tp > limits.vocab_size)
        snprintf(rule, sizeof rule, "tp can be at most the %d tokens of the vocabulary", limits.vocab_size);
    else if (limits.max_dp != 0 && shape.dp > limits.max_dp)
        snprintf(rule, sizeof rule, "dp can be at most %d", limits.max_dp);
    else if (limits.max_cp != 0 && shape.cp > limits.max_cp)
        snprintf(rule, sizeof rule, "cp can be at most %d", limits.max_cp);
    else if (limits.cache_lanes % shape.cp != 0)
        snprintf(rule, sizeof rule, "cp must divide cache_lanes %d", limits.cache_lanes);
    else
        return TS_OK;
    list_grids(n_ranks, limits, fitting, sizeof fitting);
    if (!fitting[0])
        snprintf(fitting, sizeof fitting, "none: take another number of ranks");
    return TS_FAIL(TS_ERR_INVALID, "grid: dp x cp x tp = %d x %d x %d: %s; the grids of %d ranks that fit are %s",
                   shape.dp, shape.cp, shape.tp, rule, n_ranks, fitting);
}

ts_grid_place ts_grid_locate(ts_grid_shape shape, int world_rank) {
    return (ts_grid_place){
        .dp = world_rank / shape.tp / shape.cp,
        .cp = world_rank / shape.tp % shape.cp,
        .tp = world_rank % shape.tp,
    };
}

ts_status ts_grid_create(ts_group *world, ts_grid_shape shape, ts_grid **out) {
    ts_status status = TS_OK;
    const int rank = ts_group_rank(world), size = ts_group_size(world);
    ts_grid *grid = calloc(1, sizeof *grid);
    TS_CHECK(grid != NULL, TS_ERR_MEMORY, "grid: no memory");
    TS_CHECK(shape_covers(shape, size), TS_ERR_INVALID,
             "grid: dp x cp x tp = %d x %d x %d must be the number of ranks, %d", shape.dp, shape.cp, shape.tp, size);
    const ts_grid_place place = ts_grid_locate(shape, rank);
    grid->shape = shape;
    grid->place = place;
    grid->world = world;
    TS_TRY(ts_group_split(world, place.dp * shape.cp + place.cp, rank, &grid->tp));
    TS_TRY(ts_group_split(world, place.dp * shape.tp + place.tp, rank, &grid->cp));
    TS_TRY(ts_group_split(world, place.dp, rank, &grid->replica));
    TS_TRY(ts_group_split(world, place.cp == 0 && place.tp == 0 ? 0 : -1, rank, &grid->leaders));
    *out = grid;
    grid = NULL;
done:
    ts_grid_free(grid);
    return status;
}

void ts_grid_free(ts_grid *grid) {
    if (grid == NULL)
        return;
    ts_group_free(grid->leaders);
    ts_group_free(grid->replica);
    ts_group_free(grid->cp);
    ts_group_free(grid->tp);
    free(grid);
}

ts_grid_shape ts_grid_extent(const ts_grid *grid) {
    return grid->shape;
}

ts_grid_place ts_grid_place_of(const ts_grid *grid) {
    return grid->place;
}

ts_group *ts_grid_world(const ts_grid *grid) {
    return grid->world;
}

ts_group *ts_grid_tp(const ts_grid *grid) {
    return grid->tp;
}

ts_group *ts_grid_cp(const ts_grid *grid) {
    return grid->cp;
}

ts_group *ts_grid_replica(const ts_grid *grid) {
    return grid->replica;
}

ts_group *ts_grid_leaders(const ts_grid *grid) {
    return grid->leaders;
}
