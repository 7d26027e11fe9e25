// What a communication backend gives to group.c. Internal to this folder (and to its tests).
//
// A group has two tables. The host table does everything that is control: it exists from creation on, on host memory.
// The data table does the collectives on tensors: at first it is the host backend's own, and ts_group_set_data replaces
// it by one on device memory. group.c checks arguments and dispatches; a backend sees only valid ones.
#ifndef TS_COMM_BACKEND_H
#define TS_COMM_BACKEND_H

#include "comm/comm.h"

// The sizes at which the mpi backend changes its ways, here so that tests can stand on both sides of them.
enum {
    // all_reduce_sum: up to here every rank gathers and sums everything; above, each sums one slice of it.
    TS_COMM_SMALL_BYTES = 32 << 10,
    // Longest single transfer; longer ones go in blocks (MPI counts are int, and the scratch of a group is one block).
    TS_COMM_BLOCK_BYTES = 1 << 20,
    // broadcast_message: what fits travels in one broadcast, together with its size.
    TS_COMM_HEAD_BYTES = 2048,
};

// A function may be NULL: the call is then TS_ERR_UNSUPPORTED, naming the backend and the call.
typedef struct ts_comm_data_ops {
    const char *name;
    ts_status (*all_reduce_sum)(void *state, void *data, size_t n, ts_dtype dtype);           // n > 0
    ts_status (*all_gather)(void *state, const void *mine, size_t bytes_per_rank, void *all); // bytes_per_rank > 0
    void (*free)(void *state); // collective; NULL where the state is the host table's
} ts_comm_data_ops;

// As in comm.h, and all of them present.
typedef struct ts_comm_host_ops {
    const char *name;
    // *out = NULL for color < 0; otherwise a complete group.
    ts_status (*split)(void *state, int color, int key, ts_group **out);
    void (*free)(void *state); // collective
    ts_status (*gather)(void *state, int root, const void *mine, size_t n_bytes, ts_message *all, size_t *n_bytes_of);
    ts_status (*broadcast)(void *state, int root, void *data, size_t n_bytes); // n_bytes > 0
    ts_status (*barrier)(void *state);
    ts_status (*min)(void *state, int *value); // *value becomes the least of all ranks
    ts_status (*post)(void *state, int to, const void *data, size_t n_bytes);
    ts_status (*poll)(void *state, int *from, ts_message *message, bool *got);
    ts_status (*wait)(void *state, int *from, ts_message *message);
    ts_status (*flush)(void *state);
} ts_comm_host_ops;

// What only the world has.
typedef struct ts_comm_world {
    int local_rank, local_size;
    void (*finish)(void); // after the group's own free; NULL: nothing to do
    void (*abort)(int exit_code) __attribute__((noreturn));
} ts_comm_world;

// Makes a group that owns `state` from now on; on failure the caller still owns it. `world` is copied, NULL for others.
ts_status ts_group_create(const ts_comm_host_ops *host, const ts_comm_data_ops *data, void *state, int rank, int size,
                          const ts_comm_world *world, ts_group **out);

// Gives the group another data table, with a state of its own which the group owns from now on. Collective.
void ts_group_set_data(ts_group *group, const ts_comm_data_ops *data, void *state);

// A group of this rank alone: what every backend's split uses where one rank is left, so that such groups cost nothing.
ts_status ts_group_create_alone(const ts_comm_world *world, ts_group **out);

#endif
