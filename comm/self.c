// The backend of one rank: no library, no copies beyond what the contract asks for.
#include "comm/backend.h"

#include "comm/inbox.h"

#include <stdlib.h>
#include <string.h>

typedef struct self_group {
    ts_inbox inbox; // messages the rank has posted to itself
} self_group;

static ts_status self_all_reduce_sum(void *state, void *data, size_t n, ts_dtype dtype) {
    if (dtype != TS_F32 && dtype != TS_F64 && dtype != TS_I64)
        return TS_FAIL(TS_ERR_UNSUPPORTED, "comm: self: all_reduce_sum of %s; F32, F64 and I64 are summed",
                       ts_dtype_name(dtype));
    return TS_OK;
}

static ts_status self_all_gather(void *state, const void *mine, size_t bytes_per_rank, void *all) {
    if (mine != all)
        memcpy(all, mine, bytes_per_rank);
    return TS_OK;
}

static ts_status self_split(void *state, int color, int key, ts_group **out) {
    if (color >= 0)
        return ts_group_create_alone(NULL, out);
    *out = NULL;
    return TS_OK;
}

static void self_free(void *state) {
    self_group *group = state;
    ts_inbox_clear(&group->inbox);
    free(group);
}

static ts_status self_gather(void *state, int root, const void *mine, size_t n_bytes, ts_message *all,
                             size_t *n_bytes_of) {
    ts_status status = TS_OK;
    TS_TRY(ts_message_set(all, mine, n_bytes));
    n_bytes_of[0] = n_bytes;
done:
    return status;
}

static ts_status self_broadcast(void *state, int root, void *data, size_t n_bytes) {
    return TS_OK;
}

static ts_status self_barrier(void *state) {
    return TS_OK;
}

static ts_status self_min(void *state, int *value) {
    return TS_OK;
}

static ts_status self_post(void *state, int to, const void *data, size_t n_bytes) {
    self_group *group = state;
    ts_status status = TS_OK;
    ts_message copy = {0};
    TS_TRY(ts_message_set(&copy, data, n_bytes));
    TS_TRY(ts_inbox_push(&group->inbox, 0, &copy));
done:
    ts_message_free(&copy);
    return status;
}

static ts_status self_poll(void *state, int *from, ts_message *message, bool *got) {
    self_group *group = state;
    *got = ts_inbox_pop(&group->inbox, from, message);
    return TS_OK;
}

static ts_status self_wait(void *state, int *from, ts_message *message) {
    self_group *group = state;
    if (!ts_inbox_pop(&group->inbox, from, message))
        return TS_FAIL(TS_ERR_INVALID, "comm: self: waiting for a message that nobody can send; post one first");
    return TS_OK;
}

static ts_status self_flush(void *state) {
    return TS_OK;
}

static const ts_comm_data_ops self_data = {
    .name = "self",
    .all_reduce_sum = self_all_reduce_sum,
    .all_gather = self_all_gather,
};

static const ts_comm_host_ops self_host = {
    .name = "self",
    .split = self_split,
    .free = self_free,
    .gather = self_gather,
    .broadcast = self_broadcast,
    .barrier = self_barrier,
    .min = self_min,
    .post = self_post,
    .poll = self_poll,
    .wait = self_wait,
    .flush = self_flush,
};

ts_status ts_group_create_alone(const ts_comm_world *world, ts_group **out) {
    ts_status status = TS_OK;
    self_group *group = calloc(1, sizeof *group);
    TS_CHECK(group != NULL, TS_ERR_MEMORY, "comm: no memory for a group of one rank");
    TS_TRY(ts_group_create(&self_host, &self_data, group, 0, 1, world, out));
    group = NULL;
done:
    free(group);
    return status;
}

static _Noreturn void self_abort(int exit_code) {
    exit(exit_code);
}

ts_status ts_world_create_self(ts_group **out) {
    const ts_comm_world world = {.local_rank = 0, .local_size = 1, .abort = self_abort};
    return ts_group_create_alone(&world, out);
}
