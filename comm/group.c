// Groups: arguments are checked here, the work is done by the backend's tables.
#include "comm/backend.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct ts_group {
    int rank, size;
    const ts_comm_host_ops *host;
    void *host_state;
    const ts_comm_data_ops *data;
    void *data_state; // host_state until ts_group_set_data
    bool is_world;
    ts_comm_world world;
};

ts_status ts_group_create(const ts_comm_host_ops *host, const ts_comm_data_ops *data, void *state, int rank, int size,
                          const ts_comm_world *world, ts_group **out) {
    ts_group *group = malloc(sizeof *group);
    if (group == NULL)
        return TS_FAIL(TS_ERR_MEMORY, "comm: no memory for a group of %d ranks", size);
    *group = (ts_group){
        .rank = rank,
        .size = size,
        .host = host,
        .host_state = state,
        .data = data,
        .data_state = state,
        .is_world = world != NULL,
    };
    if (world != NULL)
        group->world = *world;
    *out = group;
    return TS_OK;
}

void ts_group_set_data(ts_group *group, const ts_comm_data_ops *data, void *state) {
    if (group->data->free != NULL)
        group->data->free(group->data_state);
    group->data = data;
    group->data_state = state;
}

static void group_release(ts_group *group) {
    if (group->data->free != NULL)
        group->data->free(group->data_state);
    group->host->free(group->host_state);
    free(group);
}

void ts_group_free(ts_group *group) {
    if (group == NULL)
        return;
    assert(!group->is_world && "a world is freed by ts_world_free");
    group_release(group);
}

void ts_world_free(ts_group *world) {
    if (world == NULL)
        return;
    assert(world->is_world);
    void (*finish)(void) = world->world.finish;
    group_release(world);
    if (finish != NULL)
        finish();
}

void ts_world_abort(ts_group *world, int exit_code) {
    assert(world->is_world);
    world->world.abort(exit_code);
}

int ts_world_local_size(const ts_group *world) {
    assert(world->is_world);
    return world->world.local_size;
}

int ts_world_local_rank(const ts_group *world) {
    assert(world->is_world);
    return world->world.local_rank;
}

int ts_group_rank(const ts_group *group) {
    return group->rank;
}

int ts_group_size(const ts_group *group) {
    return group->size;
}

ts_status ts_group_split(ts_group *parent, int color, int key, ts_group **out) {
    return parent->host->split(parent->host_state, color, key, out);
}

static ts_status check_rank(const ts_group *group, const char *call, const char *what, int rank) {
    if (rank < 0 || rank >= group->size)
        return TS_FAIL(TS_ERR_INVALID, "comm: %s: %s %d is not in the group; 0 to %d are", call, what, rank,
                       group->size - 1);
    return TS_OK;
}

ts_status ts_group_all_reduce_sum(ts_group *group, void *data, size_t n, ts_dtype dtype) {
    ts_status status = TS_OK;
    size_t n_bytes;
    TS_CHECK((unsigned)dtype < TS_N_DTYPES && ts_size_mul(n, ts_dtype_bytes(dtype), &n_bytes), TS_ERR_INVALID,
             "comm: all_reduce_sum: %zu elements of dtype %d are no array", n, (int)dtype);
    TS_CHECK(group->data->all_reduce_sum != NULL, TS_ERR_UNSUPPORTED, "comm: backend %s has no all_reduce_sum",
             group->data->name);
    if (n > 0)
        TS_TRY(group->data->all_reduce_sum(group->data_state, data, n, dtype));
done:
    return status;
}

ts_status ts_group_all_gather(ts_group *group, const void *mine, size_t bytes_per_rank, void *all) {
    ts_status status = TS_OK;
    size_t n_bytes;
    TS_CHECK(ts_size_mul(bytes_per_rank, (size_t)group->size, &n_bytes), TS_ERR_INVALID,
             "comm: all_gather: %zu bytes from each of %d ranks do not fit in memory", bytes_per_rank, group->size);
    TS_CHECK(group->data->all_gather != NULL, TS_ERR_UNSUPPORTED, "comm: backend %s has no all_gather",
             group->data->name);
    if (bytes_per_rank > 0)
        TS_TRY(group->data->all_gather(group->data_state, mine, bytes_per_rank, all));
done:
    return status;
}

ts_status ts_group_gather(ts_group *group, int root, const void *mine, size_t n_bytes, ts_message *all,
                          size_t *n_bytes_of) {
    ts_status status = TS_OK;
    TS_TRY(check_rank(group, "gather", "root", root));
    TS_TRY(group->host->gather(group->host_state, root, mine, n_bytes, all, n_bytes_of));
done:
    return status;
}

ts_status ts_group_broadcast(ts_group *group, int root, void *data, size_t n_bytes) {
    ts_status status = TS_OK;
    TS_TRY(check_rank(group, "broadcast", "root", root));
    if (n_bytes > 0)
        TS_TRY(group->host->broadcast(group->host_state, root, data, n_bytes));
done:
    return status;
}

ts_status ts_group_broadcast_message(ts_group *group, int root, ts_message *message) {
    ts_status status = TS_OK;
    struct {
        uint64_t n_bytes;
        unsigned char bytes[TS_COMM_HEAD_BYTES - sizeof(uint64_t)];
    } head;
    const bool is_root = group->rank == root;
    TS_TRY(check_rank(group, "broadcast_message", "root", root));
    if (group->size == 1)
        goto done;
    memset(&head, 0, sizeof head);
    if (is_root) {
        head.n_bytes = message->n_bytes;
        const size_t n_head = message->n_bytes < sizeof head.bytes ? message->n_bytes : sizeof head.bytes;
        if (n_head > 0)
            memcpy(head.bytes, message->data, n_head);
    }
    TS_TRY(group->host->broadcast(group->host_state, root, &head, sizeof head));
    const size_t n_bytes = (size_t)head.n_bytes;
    const size_t n_head = n_bytes < sizeof head.bytes ? n_bytes : sizeof head.bytes;
    if (!is_root)
        TS_TRY(ts_message_set(message, head.bytes, n_head));
    if (n_bytes > n_head) {
        TS_TRY(ts_message_reserve(message, n_bytes));
        TS_TRY(group->host->broadcast(group->host_state, root, message->data + n_head, n_bytes - n_head));
        message->n_bytes = n_bytes;
    }
done:
    return status;
}

ts_status ts_group_barrier(ts_group *group) {
    return group->host->barrier(group->host_state);
}

ts_status ts_group_agree(ts_group *group, ts_status mine) {
    ts_status status = TS_OK;
    struct {
        int32_t code;
        char sentence[2044];
    } failure;
    if (group->size == 1)
        return mine;
    int failing = mine == TS_OK ? group->size : group->rank;
    memset(&failure, 0, sizeof failure);
    if (mine != TS_OK) {
        // Kept before the exchange, which may store a sentence of its own.
        failure.code = mine;
        strncpy(failure.sentence, ts_status_message(), sizeof failure.sentence - 1);
    }
    TS_TRY(group->host->min(group->host_state, &failing));
    if (failing == group->size)
        goto done;
    TS_TRY(group->host->broadcast(group->host_state, failing, &failure, sizeof failure));
    status = TS_FAIL((ts_status)failure.code, "rank %d: %s", failing, failure.sentence);
done:
    return status;
}

ts_status ts_group_post(ts_group *group, int to, const void *data, size_t n_bytes) {
    ts_status status = TS_OK;
    TS_TRY(check_rank(group, "post", "receiver", to));
    TS_TRY(group->host->post(group->host_state, to, data, n_bytes));
done:
    return status;
}

ts_status ts_group_poll(ts_group *group, int *from, ts_message *message, bool *got) {
    return group->host->poll(group->host_state, from, message, got);
}

ts_status ts_group_wait(ts_group *group, int *from, ts_message *message) {
    return group->host->wait(group->host_state, from, message);
}

ts_status ts_group_flush(ts_group *group) {
    return group->host->flush(group->host_state);
}
