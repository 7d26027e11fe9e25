// The grid under MPI: for every factorisation of the launch, each group holds the right ranks in the right order.
#include "comm/grid.h"
#include "tests/comm/check.h"

// Gathers the world ranks of a group and compares them with first, first + step, ...
static void check_members(checker *c, ts_group *group, const char *name, int n, int first, int step) {
    int mine = ts_group_rank(c->world), members[64];
    CHECK(c, ts_group_size(group) == n, "%s: size %d, not %d", name, ts_group_size(group), n);
    CHECK_OK(c, ts_group_all_gather(group, &mine, sizeof mine, members));
    for (int i = 0; i < n; i++)
        CHECK(c, members[i] == first + i * step, "%s: member %d is world rank %d, not %d", name, i, members[i],
              first + i * step);
}

static void test_shape(checker *c, ts_grid_shape shape) {
    ts_grid *grid = NULL;
    CHECK_OK(c, ts_grid_create(c->world, shape, &grid));
    const ts_grid_place p = ts_grid_place_of(grid);
    const int rank = ts_group_rank(c->world), first = p.dp * shape.cp * shape.tp;
    CHECK(c, ts_grid_world(grid) == c->world, "world");
    CHECK(c,
          ts_grid_extent(grid).dp == shape.dp && ts_grid_extent(grid).cp == shape.cp &&
              ts_grid_extent(grid).tp == shape.tp,
          "extent");
    CHECK(c, (p.dp * shape.cp + p.cp) * shape.tp + p.tp == rank, "%d %d %d", p.dp, p.cp, p.tp);
    CHECK(c, ts_group_rank(ts_grid_tp(grid)) == p.tp, "tp coordinate");
    CHECK(c, ts_group_rank(ts_grid_cp(grid)) == p.cp, "cp coordinate");
    check_members(c, ts_grid_tp(grid), "tp", shape.tp, first + p.cp * shape.tp, 1);
    check_members(c, ts_grid_cp(grid), "cp", shape.cp, first + p.tp, shape.tp);
    check_members(c, ts_grid_replica(grid), "replica", shape.cp * shape.tp, first, 1);
    CHECK(c, (ts_grid_leaders(grid) != NULL) == (rank == first), "leaders");
    if (ts_grid_leaders(grid) != NULL) {
        CHECK(c, ts_group_rank(ts_grid_leaders(grid)) == p.dp, "dp coordinate");
        check_members(c, ts_grid_leaders(grid), "leaders", shape.dp, 0, shape.cp * shape.tp);
    }
    ts_grid_free(grid);
}

int main(int argc, char **argv) {
    checker c = {0};
    if (ts_world_create_mpi(&argc, &argv, &c.world) != TS_OK) {
        fprintf(stderr, "%s\n", ts_status_message());
        return 1;
    }
    const int size = ts_group_size(c.world);
    for (int dp = 1; dp <= size; dp++)
        for (int cp = 1; cp <= size; cp++)
            for (int tp = 1; tp <= size; tp++)
                if (dp * cp * tp == size)
                    test_shape(&c, (ts_grid_shape){dp, cp, tp});
    ts_grid *grid = NULL;
    CHECK(&c, ts_grid_create(c.world, (ts_grid_shape){size, 1, 2}, &grid) == TS_ERR_INVALID && grid == NULL,
          "a grid of twice the ranks");
    check_report(&c, "mpi_grid");
    ts_world_free(c.world);
    return 0;
}
