// The world of one process, and how a group takes another data table.
#include "comm/backend.h"

#include <criterion/criterion.h>
#include <string.h>

static ts_group *self_world(void) {
    ts_group *world = NULL;
    cr_assert_eq(ts_world_create_self(&world), TS_OK);
    return world;
}

Test(self, is_rank_0_of_1) {
    ts_group *world = self_world();
    cr_assert_eq(ts_group_rank(world), 0);
    cr_assert_eq(ts_group_size(world), 1);
    cr_assert_eq(ts_world_local_rank(world), 0);
    cr_assert_eq(ts_world_local_size(world), 1);
    ts_world_free(world);
}

Test(self, collectives_give_back_its_own) {
    ts_group *world = self_world();
    float x[3] = {1, -2, 0.5f};
    char all[4] = "";
    size_t n_bytes = 0;
    ts_message message = {0};
    cr_assert_eq(ts_group_all_reduce_sum(world, x, 3, TS_F32), TS_OK);
    cr_assert(x[0] == 1 && x[1] == -2 && x[2] == 0.5f);
    cr_assert_eq(ts_group_all_gather(world, "abc", 3, all), TS_OK);
    cr_assert_str_eq(all, "abc");
    cr_assert_eq(ts_group_gather(world, 0, "wxyz", 4, &message, &n_bytes), TS_OK);
    cr_assert(n_bytes == 4 && message.n_bytes == 4 && memcmp(message.data, "wxyz", 4) == 0);
    cr_assert_eq(ts_group_broadcast_message(world, 0, &message), TS_OK);
    cr_assert(message.n_bytes == 4 && memcmp(message.data, "wxyz", 4) == 0);
    cr_assert_eq(ts_group_broadcast(world, 0, all, 3), TS_OK);
    cr_assert_eq(ts_group_barrier(world), TS_OK);
    ts_message_free(&message);
    ts_world_free(world);
}

Test(self, refuses_what_cannot_be) {
    ts_group *world = self_world();
    char byte = 0;
    cr_assert_eq(ts_group_broadcast(world, 1, &byte, 1), TS_ERR_INVALID);
    cr_assert_not_null(strstr(ts_status_message(), "root 1 is not in the group; 0 to 0 are"), "%s",
                       ts_status_message());
    cr_assert_eq(ts_group_post(world, -1, &byte, 1), TS_ERR_INVALID);
    cr_assert_eq(ts_group_all_reduce_sum(world, &byte, 1, TS_U8), TS_ERR_UNSUPPORTED);
    cr_assert_eq(ts_group_all_reduce_sum(world, &byte, SIZE_MAX / 2, TS_F32), TS_ERR_INVALID, "the size wraps around");
    ts_world_free(world);
}

Test(self, agree_keeps_code_and_sentence) {
    ts_group *world = self_world();
    cr_assert_eq(ts_group_agree(world, TS_OK), TS_OK);
    cr_assert_eq(ts_group_agree(world, TS_FAIL(TS_ERR_IO, "disk full")), TS_ERR_IO);
    cr_assert_str_eq(ts_status_message(), "disk full");
    ts_world_free(world);
}

Test(self, messages_come_in_order) {
    ts_group *world = self_world();
    ts_message message = {0};
    int from = -1;
    bool got = true;
    cr_assert_eq(ts_group_poll(world, &from, &message, &got), TS_OK);
    cr_assert_not(got);
    cr_assert_eq(ts_group_wait(world, &from, &message), TS_ERR_INVALID, "nobody could end this wait");
    for (int round = 0; round < 2; round++) {
        cr_assert_eq(ts_group_post(world, 0, "first", 5), TS_OK);
        cr_assert_eq(ts_group_post(world, 0, NULL, 0), TS_OK);
        cr_assert_eq(ts_group_post(world, 0, "third", 5), TS_OK);
        cr_assert_eq(ts_group_flush(world), TS_OK);
        cr_assert_eq(ts_group_poll(world, &from, &message, &got), TS_OK);
        cr_assert(got && from == 0 && message.n_bytes == 5 && memcmp(message.data, "first", 5) == 0);
        cr_assert_eq(ts_group_wait(world, &from, &message), TS_OK);
        cr_assert_eq(message.n_bytes, 0);
        cr_assert_eq(ts_group_wait(world, &from, &message), TS_OK);
        cr_assert(message.n_bytes == 5 && memcmp(message.data, "third", 5) == 0);
    }
    cr_assert_eq(ts_group_post(world, 0, "left behind", 11), TS_OK);
    ts_message_free(&message);
    ts_world_free(world);
}

Test(self, split_gives_a_group_or_none) {
    ts_group *world = self_world(), *part = NULL;
    cr_assert_eq(ts_group_split(world, 7, 0, &part), TS_OK);
    cr_assert_eq(ts_group_size(part), 1);
    ts_group_free(part);
    part = world;
    cr_assert_eq(ts_group_split(world, -1, 0, &part), TS_OK);
    cr_assert_null(part);
    ts_world_free(world);
}

typedef struct recorder {
    size_t n_reduced;
    int n_freed;
} recorder;

static ts_status record_all_reduce(void *state, void *data, size_t n, ts_dtype dtype) {
    ((recorder *)state)->n_reduced += n;
    return TS_OK;
}

static void record_free(void *state) {
    ((recorder *)state)->n_freed++;
}

Test(self, another_data_table_takes_over_data_and_nothing_else) {
    static const ts_comm_data_ops ops = {.name = "recorder", .all_reduce_sum = record_all_reduce, .free = record_free};
    recorder first = {0}, second = {0};
    ts_group *world = self_world();
    char all[2] = "";
    size_t n_bytes = 0;
    ts_message message = {0};
    ts_group_set_data(world, &ops, &first);
    cr_assert_eq(ts_group_all_reduce_sum(world, all, 5, TS_BF16), TS_OK,
                 "which dtypes are summed is the table's affair");
    cr_assert_eq(first.n_reduced, 5);
    cr_assert_eq(ts_group_all_gather(world, "a", 1, all), TS_ERR_UNSUPPORTED);
    cr_assert_not_null(strstr(ts_status_message(), "backend recorder has no all_gather"), "%s", ts_status_message());
    cr_assert_eq(ts_group_gather(world, 0, "a", 1, &message, &n_bytes), TS_OK);
    ts_group_set_data(world, &ops, &second);
    cr_assert(first.n_freed == 1 && second.n_freed == 0);
    ts_world_free(world);
    cr_assert(first.n_freed == 1 && second.n_freed == 1);
    ts_message_free(&message);
}
