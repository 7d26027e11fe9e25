#include "comm/grid.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static const ts_grid_limits dense = {.n_kv_heads = 8, .intermediate_size = 2816};

static void expect_refused(ts_grid_shape shape, int n_ranks, ts_grid_limits limits, const char *rule,
                           const char *grids) {
    char ending[512];
    cr_assert_eq(ts_grid_check(shape, n_ranks, limits), TS_ERR_INVALID, "%d x %d x %d was accepted", shape.dp, shape.cp,
                 shape.tp);
    cr_assert_not_null(strstr(ts_status_message(), rule), "\"%s\" is not in: %s", rule, ts_status_message());
    snprintf(ending, sizeof ending, " that fit are %s", grids);
    const char *found = strstr(ts_status_message(), " that fit are ");
    cr_assert_not_null(found, "%s", ts_status_message());
    cr_assert_str_eq(found, ending);
}

Test(grid, accepts_exactly_the_grids_that_fit) {
    const ts_grid_limits limits = {.n_kv_heads = 12, .intermediate_size = 48, .cache_lanes = 4, .max_cp = 2};
    for (int dp = -1; dp <= 25; dp++)
        for (int cp = -1; cp <= 25; cp++)
            for (int tp = -1; tp <= 25; tp++) {
                const bool fits = dp > 0 && cp > 0 && tp > 0 && dp * cp * tp == 24 && 12 % tp == 0 && cp <= 2;
                cr_assert_eq(ts_grid_check((ts_grid_shape){dp, cp, tp}, 24, limits) == TS_OK, fits, "%d x %d x %d", dp,
                             cp, tp);
            }
}

Test(grid, refusal_names_the_rule_and_the_grids_that_fit) {
    ts_grid_limits only_tp = dense, lanes = dense, narrow = dense;
    only_tp.max_cp = 1;
    expect_refused((ts_grid_shape){1, 1, 3}, 4, only_tp, "the number of ranks, 4", "4 x 1 x 1, 2 x 1 x 2, 1 x 1 x 4");
    expect_refused((ts_grid_shape){1, 2, 2}, 4, only_tp, "cp can be at most 1", "4 x 1 x 1, 2 x 1 x 2, 1 x 1 x 4");
    expect_refused((ts_grid_shape){1, 1, 6}, 6, only_tp, "tp must divide the 8 KV heads", "6 x 1 x 1, 3 x 1 x 2");
    lanes.cache_lanes = 2;
    expect_refused((ts_grid_shape){1, 4, 1}, 4, lanes, "cp must divide cache_lanes 2",
                   "4 x 1 x 1, 2 x 1 x 2, 1 x 1 x 4, 2 x 2 x 1, 1 x 2 x 2");
    narrow.intermediate_size = 2;
    narrow.max_cp = 1;
    expect_refused((ts_grid_shape){1, 1, 4}, 4, narrow, "tp must divide intermediate_size 2", "4 x 1 x 1, 2 x 1 x 2");
}

Test(grid, dense_has_no_lane_limit) {
    cr_assert_eq(ts_grid_check((ts_grid_shape){1, 7, 1}, 7, dense), TS_OK);
}

Test(grid, huge_factors_do_not_wrap_around) {
    // 65536 * 65536 * 1 is 2^32, which is 0 in 32 bits; 2^62 * 4 is 0 in 64 bits.
    cr_assert_eq(ts_grid_check((ts_grid_shape){65536, 65536, 1}, 1, dense), TS_ERR_INVALID);
    cr_assert_eq(ts_grid_check((ts_grid_shape){1 << 30, 1 << 30, 16}, 16, dense), TS_ERR_INVALID);
    ts_grid_shape out = {0};
    cr_assert_eq(ts_grid_resolve((ts_grid_shape){0, 65536, 65536}, 8, &out), TS_ERR_INVALID);
}

Test(grid, many_grids_are_listed_as_far_as_there_is_room) {
    const ts_grid_limits roomy = {.n_kv_heads = 1 << 30, .intermediate_size = 1 << 30};
    cr_assert_eq(ts_grid_check((ts_grid_shape){1, 1, 1}, 1 << 20, roomy), TS_ERR_INVALID);
    const size_t length = strlen(ts_status_message());
    cr_assert_str_eq(ts_status_message() + length - 5, ", ...");
}

Test(grid, resolve_gives_dp_what_is_left) {
    ts_grid_shape out = {0};
    cr_assert_eq(ts_grid_resolve((ts_grid_shape){0, 1, 4}, 8, &out), TS_OK);
    cr_assert(out.dp == 2 && out.cp == 1 && out.tp == 4);
    cr_assert_eq(ts_grid_resolve((ts_grid_shape){-1, 2, 2}, 4, &out), TS_OK);
    cr_assert(out.dp == 1 && out.cp == 2 && out.tp == 2);
    cr_assert_eq(ts_grid_resolve((ts_grid_shape){3, 1, 1}, 8, &out), TS_OK, "a given dp is for ts_grid_check to judge");
    cr_assert_eq(out.dp, 3);
}

Test(grid, resolve_refuses_what_does_not_divide) {
    ts_grid_shape out = {5, 6, 7};
    cr_assert_eq(ts_grid_resolve((ts_grid_shape){0, 1, 3}, 8, &out), TS_ERR_INVALID);
    cr_assert_not_null(strstr(ts_status_message(), "a multiple of 3 ranks"), "%s", ts_status_message());
    cr_assert_eq(ts_grid_resolve((ts_grid_shape){0, 0, 1}, 8, &out), TS_ERR_INVALID);
    cr_assert_eq(ts_grid_resolve((ts_grid_shape){1, 1, -2}, 8, &out), TS_ERR_INVALID);
    cr_assert(out.dp == 5 && out.cp == 6 && out.tp == 7, "*out was touched");
}

Test(grid, locate_counts_tp_fastest) {
    const ts_grid_shape shape = {2, 3, 4};
    int rank = 0;
    for (int dp = 0; dp < 2; dp++)
        for (int cp = 0; cp < 3; cp++)
            for (int tp = 0; tp < 4; tp++, rank++) {
                const ts_grid_place p = ts_grid_locate(shape, rank);
                cr_assert(p.dp == dp && p.cp == cp && p.tp == tp, "rank %d", rank);
            }
}

Test(grid, one_process_is_a_grid) {
    ts_group *world = NULL;
    ts_grid *grid = NULL;
    cr_assert_eq(ts_world_create_self(&world), TS_OK);
    cr_assert_eq(ts_grid_create(world, (ts_grid_shape){1, 1, 2}, &grid), TS_ERR_INVALID);
    cr_assert_null(grid);
    cr_assert_eq(ts_grid_create(world, (ts_grid_shape){1, 1, 1}, &grid), TS_OK);
    ts_group *groups[] = {ts_grid_tp(grid), ts_grid_cp(grid), ts_grid_replica(grid), ts_grid_leaders(grid)};
    for (int i = 0; i < 4; i++) {
        cr_assert_not_null(groups[i]);
        cr_assert_eq(ts_group_size(groups[i]), 1);
    }
    cr_assert_eq(ts_grid_world(grid), world);
    ts_grid_free(grid);
    ts_world_free(world);
}
