// Ranks, groups of ranks, and what they say to each other: collectives for the forward pass, agreement on errors, and
// messages for job traffic.
//
//     ts_group *world = NULL, *half = NULL;
//     TS_TRY(ts_world_create_mpi(&argc, &argv, &world));        // or ts_world_create_self(&world): one process, no MPI
//     TS_TRY(ts_group_split(world, ts_group_rank(world) % 2, ts_group_rank(world), &half));
//     TS_TRY(ts_group_agree(world, read_something()));          // all go on, or all fail with the same sentence
//     TS_TRY(ts_group_all_reduce_sum(half, partial, n, TS_F32));
//     ts_group_free(half);
//     ts_world_free(world);
//
// "Collective" means: every rank of the group calls it, in the same order as its other collectives on this group, with
// arguments that agree where the docstring says so. "Not collective" means that one rank may call it alone.
// All calls come from the thread that created the world.
//
// Errors. Every function returns TS_ERR_INVALID for a root, rank or size that cannot be, TS_ERR_MEMORY when a buffer
// cannot grow, TS_ERR_COMM when the communication library fails. A collective that fails on one rank may leave its
// peers waiting, and the group must not be used again: the launcher prints the sentence and calls ts_world_abort. What
// may fail on one rank alone (files, memory, devices) is therefore done outside collectives and closed by
// ts_group_agree.
//
// Memory. Buffers are host memory, except that a group may have been given a device backend for the two data
// collectives, ts_group_all_reduce_sum and ts_group_all_gather, which then take device memory; the others never do.
#ifndef TS_COMM_COMM_H
#define TS_COMM_COMM_H

#include "comm/message.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// A fixed set of ranks which call collectives together. Ranks count from 0 inside each group.
typedef struct ts_group ts_group;

// ---- The world: the group of all ranks of the launch ---------------------------------------------------------------

// A world of this one process. Not collective. *out is owned: ts_world_free.
ts_status ts_world_create_self(ts_group **out);

// Starts MPI and makes the world of all its ranks. Collective over the launch; once per process, and MPI must not have
// been started before. `argc` and `argv` are main's, from which MPI may take arguments. *out is owned: ts_world_free.
ts_status ts_world_create_mpi(int *argc, char ***argv, ts_group **out);

// Frees the world and, under MPI, finalizes MPI. Collective. Groups split from it must be freed before. NULL is fine.
void ts_world_free(ts_group *world);

// Ends every process of the launch with `exit_code`, wherever the other ranks are. Does not return. Not collective;
// only for the launcher.
void ts_world_abort(ts_group *world, int exit_code) __attribute__((noreturn));

// How many ranks of the launch run on this node, and which of them this one is (0-based). Not collective.
int ts_world_local_size(const ts_group *world);
int ts_world_local_rank(const ts_group *world);

// ---- Groups --------------------------------------------------------------------------------------------------------

// This process's rank in the group, and the number of ranks. Not collective.
int ts_group_rank(const ts_group *group);
int ts_group_size(const ts_group *group);

// Makes one group of the ranks that give the same `color`, ordered by `key` and, where equal, by rank in `parent`. A
// rank that gives a negative color belongs to none and gets *out = NULL. Collective over `parent`. *out is owned:
// ts_group_free. A device backend of the parent is not inherited.
ts_status ts_group_split(ts_group *parent, int color, int key, ts_group **out);

// Frees a group from ts_group_split. Collective over it. Messages that nobody has received are dropped. NULL is fine.
void ts_group_free(ts_group *group);

// ---- Data collectives ----------------------------------------------------------------------------------------------

// data[i] becomes the sum of data[i] over the ranks, in place. Collective; `n` elements and `dtype` are the same on
// all. dtype: TS_F32, TS_F64, TS_I64 (wraps around); otherwise TS_ERR_UNSUPPORTED.
//
// Host backends add in rank order, ((x_0 + x_1) + x_2) + ..., rounding to dtype after each addition, whatever n is: all
// ranks hold the same bits, and the sum of an element does not depend on the message it travels in.
ts_status ts_group_all_reduce_sum(ts_group *group, void *data, size_t n, ts_dtype dtype);

// all[r * bytes_per_rank ...] becomes rank r's `mine`, on every rank. Collective; `bytes_per_rank` is the same on all.
// `mine` may be this rank's own place in `all`, and otherwise must not overlap it.
ts_status ts_group_all_gather(ts_group *group, const void *mine, size_t bytes_per_rank, void *all);

// ---- Control collectives -------------------------------------------------------------------------------------------

// Collects a run of bytes from every rank at `root`. Collective; `root` is the same on all, `n_bytes` differs freely.
// At the root, *all becomes the runs one after the other in rank order (it grows as needed and is meant to be reused)
// and n_bytes_of[r], [size], their lengths. The other ranks may pass NULL for both.
ts_status ts_group_gather(ts_group *group, int root, const void *mine, size_t n_bytes, ts_message *all,
                          size_t *n_bytes_of);

// data [n_bytes] becomes the root's. Collective; `root` and `n_bytes` are the same on all.
ts_status ts_group_broadcast(ts_group *group, int root, void *data, size_t n_bytes);

// *message becomes the root's, whose size the others need not know. Collective; `root` is the same on all. The
// receivers' messages grow as needed and are meant to be reused.
ts_status ts_group_broadcast_message(ts_group *group, int root, ts_message *message);

// Returns when every rank has called it. Collective.
ts_status ts_group_barrier(ts_group *group);

// Turns "did it work here?" into "did it work everywhere?". Collective. Returns TS_OK iff every rank gives TS_OK.
// Otherwise every rank returns the code of the lowest failing rank, and ts_status_message() is that rank's sentence,
// preceded by "rank R: " when the group has more than one rank. Call it right after the step that may have failed: a
// failing rank's sentence is its ts_status_message().
ts_status ts_group_agree(ts_group *group, ts_status mine);

// ---- Messages between two ranks ------------------------------------------------------------------------------------
// Messages from one rank to another arrive in the order they were posted. None of these is collective.

// Sends a copy of data [n_bytes] to rank `to`, which may be this one, and returns at once. Not collective. The copy is
// held until it has left, and released by later post, poll, wait or flush calls.
ts_status ts_group_post(ts_group *group, int to, const void *data, size_t n_bytes);

// Takes one message if one has arrived completely; never blocks. Not collective. *got says whether; if so, *from is its
// sender and *message its bytes. The storage of *message may be exchanged for another: keep no pointer into it.
ts_status ts_group_poll(ts_group *group, int *from, ts_message *message, bool *got);

// As poll, but waits until a message is there, asleep between looks: for some microseconds at first, and the longer
// nothing comes the longer, up to a millisecond. Not collective. In a group of one rank an empty queue is
// TS_ERR_INVALID, because nobody could end the wait.
ts_status ts_group_wait(ts_group *group, int *from, ts_message *message);

// Waits until everything posted has left this rank. Not collective, but large messages leave only while their receiver
// polls, waits, flushes or frees the group. What arrives meanwhile is kept for later poll and wait calls.
ts_status ts_group_flush(ts_group *group);

#ifdef __cplusplus
}
#endif
#endif
