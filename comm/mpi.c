// The backend on MPI, for host buffers, and the world that MPI launches.
//
// Sums do not use MPI_Allreduce, which leaves the order of additions to the library and hence promises neither the same
// bits on every rank nor the same bits for every message size. Here each element is added up in rank order by one loop:
// on every rank for small messages, and for large ones on the rank that owns the element's slice, which then sends it
// to all. The bytes sent are those of a ring, 2 (size - 1) / size of the message, without its size - 1 steps of
// latency.
#include "comm/backend.h"

#include "comm/inbox.h"

#include <mpi.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// Tags of posted messages, on a communicator of their own: a message is any number of "more" parts and a "last" one.
enum { TAG_LAST = 0, TAG_MORE = 1 };
// Tags on the collectives' communicator.
enum { TAG_SLICE = 0, TAG_SUM = 1, TAG_GATHER = 2, TAG_ALL_GATHER = 3 };

typedef struct outgoing {
    MPI_Request request;
    void *data;
} outgoing;

typedef struct mpi_group {
    MPI_Comm comm; // collectives
    MPI_Comm mail; // posted messages
    int rank, size;
    unsigned char *scratch; // [size * TS_COMM_SMALL_BYTES, or TS_COMM_BLOCK_BYTES + slack for uneven slices]
    MPI_Request *requests;  // [2 * size]
    // Posted parts that may not have left yet, in no order.
    outgoing *sent;
    size_t n_sent, sent_capacity, sent_cursor;
    // The message that is arriving. One at a time: a receive, once begun, must not block a poll.
    ts_message incoming;
    int incoming_from;
    bool incoming_begun, incoming_is_last;
    size_t incoming_part_bytes;
    MPI_Request incoming_part; // MPI_REQUEST_NULL between parts
    ts_inbox inbox;            // complete messages that a flush had to take in
} mpi_group;

static ts_status mpi_status(int code, const char *call) {
    if (code == MPI_SUCCESS)
        return TS_OK;
    char text[MPI_MAX_ERROR_STRING] = "unknown error";
    int length;
    MPI_Error_string(code, text, &length);
    return TS_FAIL(TS_ERR_COMM, "comm: %.*s failed: %s", (int)strcspn(call, "("), call, text);
}

// An MPI call as a ts_status.
#define MPI_STATUS(call) mpi_status((call), #call)

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

#define DEFINE_SUM(name, type)                                                                                         \
    /* out[i] = ((parts_0[i] + parts_1[i]) + parts_2[i]) + ...; rank r's part begins at parts + r * stride. */         \
    static void name(void *out_, const unsigned char *parts, size_t stride, int size, size_t n) {                      \
        type *restrict out = out_;                                                                                     \
        const type *restrict a = (const type *)parts, *restrict b = (const type *)(parts + stride);                    \
        for (size_t i = 0; i < n; i++)                                                                                 \
            out[i] = a[i] + b[i];                                                                                      \
        for (int r = 2; r < size; r++) {                                                                               \
            b = (const type *)(parts + (size_t)r * stride);                                                            \
            for (size_t i = 0; i < n; i++)                                                                             \
                out[i] += b[i];                                                                                        \
        }                                                                                                              \
    }

DEFINE_SUM(sum_f32, float)
DEFINE_SUM(sum_f64, double)
DEFINE_SUM(sum_i64, uint64_t) // unsigned: wraps around

static void sum_in_rank_order(ts_dtype dtype, void *out, const unsigned char *parts, size_t stride, int size,
                              size_t n) {
    if (dtype == TS_F32)
        sum_f32(out, parts, stride, size, n);
    else if (dtype == TS_F64)
        sum_f64(out, parts, stride, size, n);
    else
        sum_i64(out, parts, stride, size, n);
}

static ts_status all_reduce_small(mpi_group *group, void *data, size_t n, ts_dtype dtype) {
    ts_status status = TS_OK;
    const size_t n_bytes = n * ts_dtype_bytes(dtype);
    TS_TRY(
        MPI_STATUS(MPI_Allgather(data, (int)n_bytes, MPI_BYTE, group->scratch, (int)n_bytes, MPI_BYTE, group->comm)));
    sum_in_rank_order(dtype, data, group->scratch, n_bytes, group->size, n);
done:
    return status;
}

// Slice r of n elements is [r * n / size, (r + 1) * n / size).
static size_t slice_begin(size_t n, int size, int r) {
    return n * (size_t)r / (size_t)size;
}

static ts_status all_reduce_sliced(mpi_group *group, unsigned char *data, size_t n, ts_dtype dtype) {
    ts_status status = TS_OK;
    const size_t width = ts_dtype_bytes(dtype);
    const int rank = group->rank, size = group->size;
    const size_t begin = slice_begin(n, size, rank), n_mine = slice_begin(n, size, rank + 1) - begin;
    const size_t mine_bytes = n_mine * width;
    int n_requests = 0;
    // Everyone's part of my slice to me, my part of everyone's slice to them.
    for (int step = 1; step < size; step++) {
        const int r = (rank + step) % size;
        TS_TRY(MPI_STATUS(MPI_Irecv(group->scratch + (size_t)r * mine_bytes, (int)mine_bytes, MPI_BYTE, r, TAG_SLICE,
                                    group->comm, &group->requests[n_requests++])));
    }
    for (int step = 1; step < size; step++) {
        const int r = (rank + step) % size;
        const size_t theirs = slice_begin(n, size, r), n_theirs = slice_begin(n, size, r + 1) - theirs;
        TS_TRY(MPI_STATUS(MPI_Isend(data + theirs * width, (int)(n_theirs * width), MPI_BYTE, r, TAG_SLICE, group->comm,
                                    &group->requests[n_requests++])));
    }
    memcpy(group->scratch + (size_t)rank * mine_bytes, data + begin * width, mine_bytes);
    TS_TRY(MPI_STATUS(MPI_Waitall(n_requests, group->requests, MPI_STATUSES_IGNORE)));
    sum_in_rank_order(dtype, data + begin * width, group->scratch, mine_bytes, size, n_mine);
    // The finished slices, each from its owner.
    n_requests = 0;
    for (int step = 1; step < size; step++) {
        const int r = (rank + step) % size;
        const size_t theirs = slice_begin(n, size, r), n_theirs = slice_begin(n, size, r + 1) - theirs;
        TS_TRY(MPI_STATUS(MPI_Irecv(data + theirs * width, (int)(n_theirs * width), MPI_BYTE, r, TAG_SUM, group->comm,
                                    &group->requests[n_requests++])));
    }
    for (int step = 1; step < size; step++) {
        const int r = (rank + step) % size;
        TS_TRY(MPI_STATUS(MPI_Isend(data + begin * width, (int)mine_bytes, MPI_BYTE, r, TAG_SUM, group->comm,
                                    &group->requests[n_requests++])));
    }
    TS_TRY(MPI_STATUS(MPI_Waitall(n_requests, group->requests, MPI_STATUSES_IGNORE)));
done:
    return status;
}

static ts_status mpi_all_reduce_sum(void *state, void *data, size_t n, ts_dtype dtype) {
    ts_status status = TS_OK;
    TS_CHECK(dtype == TS_F32 || dtype == TS_F64 || dtype == TS_I64, TS_ERR_UNSUPPORTED,
             "comm: mpi: all_reduce_sum of %s; F32, F64 and I64 are summed", ts_dtype_name(dtype));
    const size_t width = ts_dtype_bytes(dtype);
    for (size_t i = 0; i < n;) {
        const size_t n_block = min_size(n - i, TS_COMM_BLOCK_BYTES / width);
        unsigned char *block = (unsigned char *)data + i * width;
        if (n_block * width <= TS_COMM_SMALL_BYTES)
            TS_TRY(all_reduce_small(state, block, n_block, dtype));
        else
            TS_TRY(all_reduce_sliced(state, block, n_block, dtype));
        i += n_block;
    }
done:
    return status;
}

// ---- Other collectives ---------------------------------------------------------------------------------------------

static ts_status mpi_all_gather(void *state, const void *mine, size_t bytes_per_rank, void *all) {
    mpi_group *group = state;
    ts_status status = TS_OK;
    unsigned char *base = all, *own = base + (size_t)group->rank * bytes_per_rank;
    if (bytes_per_rank <= TS_COMM_BLOCK_BYTES) {
        const int n = (int)bytes_per_rank;
        TS_TRY(
            MPI_STATUS(MPI_Allgather(mine == own ? MPI_IN_PLACE : mine, n, MPI_BYTE, all, n, MPI_BYTE, group->comm)));
        goto done;
    }
    if (mine != own)
        memcpy(own, mine, bytes_per_rank);
    for (size_t i = 0; i < bytes_per_rank; i += TS_COMM_BLOCK_BYTES) {
        const int n = (int)min_size(bytes_per_rank - i, TS_COMM_BLOCK_BYTES);
        int n_requests = 0;
        for (int step = 1; step < group->size; step++) {
            const int r = (group->rank + step) % group->size;
            TS_TRY(MPI_STATUS(MPI_Irecv(base + (size_t)r * bytes_per_rank + i, n, MPI_BYTE, r, TAG_ALL_GATHER,
                                        group->comm, &group->requests[n_requests++])));
        }
        for (int step = 1; step < group->size; step++) {
            const int r = (group->rank + step) % group->size;
            TS_TRY(MPI_STATUS(
                MPI_Isend(own + i, n, MPI_BYTE, r, TAG_ALL_GATHER, group->comm, &group->requests[n_requests++])));
        }
        TS_TRY(MPI_STATUS(MPI_Waitall(n_requests, group->requests, MPI_STATUSES_IGNORE)));
    }
done:
    return status;
}

static ts_status mpi_gather(void *state, int root, const void *mine, size_t n_bytes, ts_message *all,
                            size_t *n_bytes_of) {
    mpi_group *group = state;
    ts_status status = TS_OK;
    _Static_assert(sizeof(size_t) == sizeof(uint64_t), "sizes travel as size_t");
    TS_TRY(MPI_STATUS(MPI_Gather(&n_bytes, 1, MPI_UINT64_T, n_bytes_of, 1, MPI_UINT64_T, root, group->comm)));
    if (group->rank != root) {
        for (size_t i = 0; i < n_bytes; i += TS_COMM_BLOCK_BYTES)
            TS_TRY(MPI_STATUS(MPI_Send((const unsigned char *)mine + i, (int)min_size(n_bytes - i, TS_COMM_BLOCK_BYTES),
                                       MPI_BYTE, root, TAG_GATHER, group->comm)));
        goto done;
    }
    size_t total = 0;
    for (int r = 0; r < group->size; r++)
        TS_CHECK(ts_size_add(total, n_bytes_of[r], &total), TS_ERR_MEMORY,
                 "comm: gather: what %d ranks send does not fit in memory", group->size);
    all->n_bytes = 0;
    TS_TRY(ts_message_reserve(all, total));
    for (int r = 0; r < group->size; r++) {
        if (r == root) {
            TS_TRY(ts_message_append(all, mine, n_bytes));
            continue;
        }
        for (size_t i = 0; i < n_bytes_of[r]; i += TS_COMM_BLOCK_BYTES) {
            const size_t n = min_size(n_bytes_of[r] - i, TS_COMM_BLOCK_BYTES);
            TS_TRY(MPI_STATUS(
                MPI_Recv(all->data + all->n_bytes, (int)n, MPI_BYTE, r, TAG_GATHER, group->comm, MPI_STATUS_IGNORE)));
            all->n_bytes += n;
        }
    }
done:
    return status;
}

static ts_status mpi_broadcast(void *state, int root, void *data, size_t n_bytes) {
    mpi_group *group = state;
    ts_status status = TS_OK;
    for (size_t i = 0; i < n_bytes; i += TS_COMM_BLOCK_BYTES)
        TS_TRY(MPI_STATUS(MPI_Bcast((unsigned char *)data + i, (int)min_size(n_bytes - i, TS_COMM_BLOCK_BYTES),
                                    MPI_BYTE, root, group->comm)));
done:
    return status;
}

static ts_status mpi_barrier(void *state) {
    mpi_group *group = state;
    return MPI_STATUS(MPI_Barrier(group->comm));
}

static ts_status mpi_min(void *state, int *value) {
    mpi_group *group = state;
    return MPI_STATUS(MPI_Allreduce(MPI_IN_PLACE, value, 1, MPI_INT, MPI_MIN, group->comm));
}

// ---- Messages ------------------------------------------------------------------------------------------------------

// Looks at no more than `n_looks` posted parts, going round, and releases those that have left.
static ts_status reclaim_sent(mpi_group *group, size_t n_looks) {
    ts_status status = TS_OK;
    for (n_looks = min_size(n_looks, group->n_sent); n_looks > 0; n_looks--) {
        if (group->sent_cursor >= group->n_sent)
            group->sent_cursor = 0;
        outgoing *part = &group->sent[group->sent_cursor];
        int has_left;
        TS_TRY(MPI_STATUS(MPI_Test(&part->request, &has_left, MPI_STATUS_IGNORE)));
        if (has_left) {
            free(part->data);
            *part = group->sent[--group->n_sent];
        } else {
            group->sent_cursor++;
        }
    }
done:
    return status;
}

// How many posted parts a post or a poll looks at: more than it adds, so that the list does not grow for want of
// looking.
enum { N_LOOKS = 4 };

static ts_status post_part(mpi_group *group, int to, int tag, const void *data, size_t n_bytes) {
    ts_status status = TS_OK;
    void *copy = NULL;
    if (group->n_sent == group->sent_capacity) {
        const size_t capacity = group->sent_capacity == 0 ? 16 : 2 * group->sent_capacity;
        outgoing *sent = realloc(group->sent, capacity * sizeof *sent);
        TS_CHECK(sent != NULL, TS_ERR_MEMORY, "comm: no memory to post message number %zu", group->n_sent);
        group->sent = sent;
        group->sent_capacity = capacity;
    }
    if (n_bytes > 0) {
        copy = malloc(n_bytes);
        TS_CHECK(copy != NULL, TS_ERR_MEMORY, "comm: no memory to post %zu bytes", n_bytes);
        memcpy(copy, data, n_bytes);
    }
    outgoing part = {.data = copy};
    TS_TRY(MPI_STATUS(MPI_Isend(copy, (int)n_bytes, MPI_BYTE, to, tag, group->mail, &part.request)));
    group->sent[group->n_sent++] = part;
    copy = NULL;
    TS_TRY(reclaim_sent(group, N_LOOKS));
done:
    free(copy);
    return status;
}

static ts_status mpi_post(void *state, int to, const void *data, size_t n_bytes) {
    ts_status status = TS_OK;
    const unsigned char *bytes = data;
    for (; n_bytes > TS_COMM_BLOCK_BYTES; bytes += TS_COMM_BLOCK_BYTES, n_bytes -= TS_COMM_BLOCK_BYTES)
        TS_TRY(post_part(state, to, TAG_MORE, bytes, TS_COMM_BLOCK_BYTES));
    TS_TRY(post_part(state, to, TAG_LAST, bytes, n_bytes));
done:
    return status;
}

// Takes the arriving message as far as it goes without waiting; *complete when all of it is in group->incoming.
static ts_status receive(mpi_group *group, bool *complete) {
    ts_status status = TS_OK;
    *complete = false;
    while (!*complete) {
        if (group->incoming_part == MPI_REQUEST_NULL) {
            MPI_Message handle;
            MPI_Status envelope;
            int found, n_part;
            TS_TRY(MPI_STATUS(MPI_Improbe(group->incoming_begun ? group->incoming_from : MPI_ANY_SOURCE, MPI_ANY_TAG,
                                          group->mail, &found, &handle, &envelope)));
            if (!found)
                break;
            TS_TRY(MPI_STATUS(MPI_Get_count(&envelope, MPI_BYTE, &n_part)));
            if (!group->incoming_begun)
                group->incoming.n_bytes = 0;
            group->incoming_begun = true;
            group->incoming_from = envelope.MPI_SOURCE;
            group->incoming_is_last = envelope.MPI_TAG == TAG_LAST;
            group->incoming_part_bytes = (size_t)n_part;
            TS_TRY(ts_message_reserve(&group->incoming, group->incoming.n_bytes + group->incoming_part_bytes));
            unsigned char *end = group->incoming.data == NULL ? NULL : group->incoming.data + group->incoming.n_bytes;
            TS_TRY(MPI_STATUS(MPI_Imrecv(end, n_part, MPI_BYTE, &handle, &group->incoming_part)));
        }
        int has_arrived;
        TS_TRY(MPI_STATUS(MPI_Test(&group->incoming_part, &has_arrived, MPI_STATUS_IGNORE)));
        if (!has_arrived)
            break;
        group->incoming.n_bytes += group->incoming_part_bytes;
        if (group->incoming_is_last) {
            group->incoming_begun = false;
            *complete = true;
        }
    }
done:
    return status;
}

static ts_status mpi_poll(void *state, int *from, ts_message *message, bool *got) {
    mpi_group *group = state;
    ts_status status = TS_OK;
    bool complete = false;
    TS_TRY(reclaim_sent(group, N_LOOKS));
    if (ts_inbox_pop(&group->inbox, from, message)) {
        complete = true;
    } else {
        TS_TRY(receive(group, &complete));
        if (complete) {
            const ts_message old = *message;
            *message = group->incoming;
            group->incoming = old;
            *from = group->incoming_from;
        }
    }
    *got = complete;
done:
    return status;
}

// Sleeps between looks that found nothing, for a sixteenth of the time slept so far, so that a wait ends little later
// than its message comes, whether that takes microseconds or hours. Two ranks that answer each other cannot drive each
// other's delays up, as they would if a sleep were as long as the wait before it. The limit is a millisecond while
// nothing is there, and less while a transfer is under way, which on some transports advances only when looked at.
enum { NAP_LEAST_NS = 16000, NAP_BUSY_NS = 64000, NAP_IDLE_NS = 1000000 };

static void nap(int64_t *slept_ns, int64_t limit_ns) {
    int64_t ns = *slept_ns / 16;
    if (ns < NAP_LEAST_NS)
        ns = NAP_LEAST_NS;
    if (ns > limit_ns)
        ns = limit_ns;
    nanosleep(&(struct timespec){.tv_nsec = (long)ns}, NULL);
    *slept_ns += ns;
}

static ts_status mpi_wait(void *state, int *from, ts_message *message) {
    mpi_group *group = state;
    ts_status status = TS_OK;
    int64_t slept_ns = 0;
    for (;;) {
        bool got;
        TS_TRY(mpi_poll(group, from, message, &got));
        if (got)
            break;
        nap(&slept_ns, group->incoming_begun || group->n_sent > 0 ? NAP_BUSY_NS : NAP_IDLE_NS);
    }
done:
    return status;
}

// One look at both directions; what arrives is kept. Lets a rank that must wait for its peers not keep them waiting.
static ts_status exchange(mpi_group *group, bool *received) {
    ts_status status = TS_OK;
    TS_TRY(reclaim_sent(group, group->n_sent));
    TS_TRY(receive(group, received));
    if (*received)
        TS_TRY(ts_inbox_push(&group->inbox, group->incoming_from, &group->incoming));
done:
    return status;
}

static ts_status mpi_flush(void *state) {
    mpi_group *group = state;
    ts_status status = TS_OK;
    int64_t slept_ns = 0;
    TS_TRY(reclaim_sent(group, group->n_sent));
    while (group->n_sent > 0) {
        bool received;
        TS_TRY(exchange(group, &received));
        if (!received && group->n_sent > 0)
            nap(&slept_ns, NAP_BUSY_NS);
    }
done:
    return status;
}

// ---- Life ----------------------------------------------------------------------------------------------------------

static void release(mpi_group *group) {
    if (group == NULL)
        return;
    if (group->comm != MPI_COMM_NULL)
        MPI_Comm_free(&group->comm);
    if (group->mail != MPI_COMM_NULL)
        MPI_Comm_free(&group->mail);
    for (size_t i = 0; i < group->n_sent; i++)
        free(group->sent[i].data);
    free(group->sent);
    free(group->scratch);
    free(group->requests);
    ts_message_free(&group->incoming);
    ts_inbox_clear(&group->inbox);
    free(group);
}

// A rank leaves only when all have sent what they posted, and takes in messages until then: nobody is left sending to a
// group that is gone.
static ts_status settle(mpi_group *group) {
    ts_status status = TS_OK;
    MPI_Request barrier;
    int all_flushed = 0;
    int64_t slept_ns = 0;
    TS_TRY(mpi_flush(group));
    TS_TRY(MPI_STATUS(MPI_Ibarrier(group->comm, &barrier)));
    while (!all_flushed) {
        bool received;
        TS_TRY(exchange(group, &received));
        TS_TRY(MPI_STATUS(MPI_Test(&barrier, &all_flushed, MPI_STATUS_IGNORE)));
        if (!received && !all_flushed)
            nap(&slept_ns, NAP_BUSY_NS);
    }
done:
    return status;
}

static void mpi_free(void *state) {
    (void)settle(state); // a group whose peers have failed is released all the same
    release(state);
}

static ts_status mpi_split(void *state, int color, int key, ts_group **out);

static const ts_comm_data_ops mpi_data = {
    .name = "mpi",
    .all_reduce_sum = mpi_all_reduce_sum,
    .all_gather = mpi_all_gather,
};

static const ts_comm_host_ops mpi_host = {
    .name = "mpi",
    .split = mpi_split,
    .free = mpi_free,
    .gather = mpi_gather,
    .broadcast = mpi_broadcast,
    .barrier = mpi_barrier,
    .min = mpi_min,
    .post = mpi_post,
    .poll = mpi_poll,
    .wait = mpi_wait,
    .flush = mpi_flush,
};

// Makes a group of `comm`, which it takes over in every case. A single rank needs no communicator.
static ts_status create(MPI_Comm comm, const ts_comm_world *world, ts_group **out) {
    ts_status status = TS_OK;
    mpi_group *group = NULL;
    int size;
    TS_TRY(MPI_STATUS(MPI_Comm_size(comm, &size)));
    if (size == 1) {
        TS_TRY(ts_group_create_alone(world, out));
        goto done;
    }
    group = calloc(1, sizeof *group);
    TS_CHECK(group != NULL, TS_ERR_MEMORY, "comm: no memory for a group of %d ranks", size);
    group->comm = comm;
    group->mail = MPI_COMM_NULL;
    group->incoming_part = MPI_REQUEST_NULL;
    group->size = size;
    comm = MPI_COMM_NULL;
    TS_TRY(MPI_STATUS(MPI_Comm_set_errhandler(group->comm, MPI_ERRORS_RETURN)));
    TS_TRY(MPI_STATUS(MPI_Comm_rank(group->comm, &group->rank)));
    TS_TRY(MPI_STATUS(MPI_Comm_dup(group->comm, &group->mail)));
    // A slice of a block is at most one element longer than block / size: with size parts of it, size elements more.
    const size_t small = (size_t)size * TS_COMM_SMALL_BYTES, sliced = TS_COMM_BLOCK_BYTES + (size_t)size * 8;
    group->scratch = malloc(small > sliced ? small : sliced);
    group->requests = malloc(2 * (size_t)size * sizeof *group->requests);
    TS_CHECK(group->scratch != NULL && group->requests != NULL, TS_ERR_MEMORY,
             "comm: no memory for a group of %d ranks", size);
    TS_TRY(ts_group_create(&mpi_host, &mpi_data, group, group->rank, size, world, out));
    group = NULL;
done:
    if (comm != MPI_COMM_NULL)
        MPI_Comm_free(&comm);
    release(group);
    return status;
}

static ts_status mpi_split(void *state, int color, int key, ts_group **out) {
    mpi_group *group = state;
    ts_status status = TS_OK;
    MPI_Comm comm;
    TS_TRY(MPI_STATUS(MPI_Comm_split(group->comm, color < 0 ? MPI_UNDEFINED : color, key, &comm)));
    if (comm == MPI_COMM_NULL)
        *out = NULL;
    else
        TS_TRY(create(comm, NULL, out));
done:
    return status;
}

static _Noreturn void mpi_abort(int exit_code) {
    MPI_Abort(MPI_COMM_WORLD, exit_code);
    abort(); // MPI_Abort does not return, but is not declared so
}

static void mpi_finish(void) {
    MPI_Finalize();
}

ts_status ts_world_create_mpi(int *argc, char ***argv, ts_group **out) {
    ts_status status = TS_OK;
    ts_comm_world world = {.finish = mpi_finish, .abort = mpi_abort};
    MPI_Comm node = MPI_COMM_NULL, comm = MPI_COMM_NULL;
    int is_started, threads;
    bool started_here = false;
    TS_TRY(MPI_STATUS(MPI_Initialized(&is_started)));
    TS_CHECK(!is_started, TS_ERR_INVALID, "comm: MPI has been started already; a process has one world");
    TS_TRY(MPI_STATUS(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &threads)));
    started_here = true;
    TS_TRY(MPI_STATUS(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN)));
    TS_CHECK(threads >= MPI_THREAD_FUNNELED, TS_ERR_UNSUPPORTED,
             "comm: this MPI allows no threads beside it; one with MPI_THREAD_FUNNELED is needed");
    TS_TRY(MPI_STATUS(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node)));
    TS_TRY(MPI_STATUS(MPI_Comm_size(node, &world.local_size)));
    TS_TRY(MPI_STATUS(MPI_Comm_rank(node, &world.local_rank)));
    TS_TRY(MPI_STATUS(MPI_Comm_dup(MPI_COMM_WORLD, &comm)));
    TS_TRY(create(comm, &world, out));
done:
    if (node != MPI_COMM_NULL)
        MPI_Comm_free(&node);
    if (status != TS_OK && started_here)
        MPI_Finalize();
    return status;
}
