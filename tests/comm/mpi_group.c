// Groups under MPI: every collective at sizes around the thresholds of the backend, on splits, errors carried from rank
// to rank, and message traffic. Data are exactly representable, so that results are compared exactly.
#include "comm/backend.h"
#include "tests/comm/check.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// A value that a wrong rank, element or order of bytes would not reproduce; small enough for exact sums in F32.
static int64_t value_at(int rank, size_t i) {
    return (int64_t)((i * 2654435761u >> 7) % 4096) * (rank + 1) - (int64_t)(i % 5);
}

static unsigned char byte_at(int rank, size_t i) {
    return (unsigned char)((i * 2654435761u >> 11) + (unsigned)rank * 101 + i / 4096);
}

static void fill_bytes(unsigned char *bytes, size_t n, int rank) {
    for (size_t i = 0; i < n; i++)
        bytes[i] = byte_at(rank, i);
}

static bool bytes_are(const unsigned char *bytes, size_t n, int rank) {
    for (size_t i = 0; i < n; i++)
        if (bytes[i] != byte_at(rank, i))
            return false;
    return true;
}

static void *allocate(checker *c, size_t n_bytes) {
    void *p = malloc(n_bytes + 1);
    CHECK(c, p != NULL, "%zu bytes", n_bytes);
    return p;
}

static void store(void *data, size_t i, ts_dtype dtype, int64_t value) {
    if (dtype == TS_F32)
        ((float *)data)[i] = (float)value;
    else if (dtype == TS_F64)
        ((double *)data)[i] = (double)value;
    else
        ((int64_t *)data)[i] = value;
}

static bool holds(const void *data, size_t i, ts_dtype dtype, int64_t value) {
    if (dtype == TS_F32)
        return ((const float *)data)[i] == (float)value;
    if (dtype == TS_F64)
        return ((const double *)data)[i] == (double)value;
    return ((const int64_t *)data)[i] == value;
}

static void test_all_reduce(checker *c, ts_group *group) {
    static const ts_dtype dtypes[] = {TS_F32, TS_F64, TS_I64};
    const int rank = ts_group_rank(group), size = ts_group_size(group);
    for (int d = 0; d < 3; d++) {
        const size_t width = ts_dtype_bytes(dtypes[d]);
        const size_t small = TS_COMM_SMALL_BYTES / width, block = TS_COMM_BLOCK_BYTES / width;
        const size_t counts[] = {
            0,     1,         3,         1000,          small - 1,         small,        small + 1, small + 3,
            block, block - 1, block + 1, block + small, block + small + 1, 2 * block + 5};
        for (size_t k = 0; k < sizeof counts / sizeof counts[0]; k++) {
            const size_t n = counts[k];
            unsigned char *data = allocate(c, n * width + 1);
            for (size_t i = 0; i < n; i++)
                store(data, i, dtypes[d], value_at(rank, i));
            data[n * width] = 0xa5; // just past the end
            CHECK_OK(c, ts_group_all_reduce_sum(group, data, n, dtypes[d]));
            size_t n_wrong = 0;
            for (size_t i = 0; i < n; i++) {
                int64_t expected = 0;
                for (int r = 0; r < size; r++)
                    expected += value_at(r, i);
                n_wrong += !holds(data, i, dtypes[d], expected);
            }
            CHECK(c, n_wrong == 0, "%s x %zu: %zu wrong", ts_dtype_name(dtypes[d]), n, n_wrong);
            CHECK(c, data[n * width] == 0xa5, "%s x %zu: written past the end", ts_dtype_name(dtypes[d]), n);
            free(data);
        }
    }
    uint16_t half = 0;
    CHECK(c, ts_group_all_reduce_sum(group, &half, 1, TS_BF16) == TS_ERR_UNSUPPORTED, "BF16 is not summed");
    CHECK(c, strstr(ts_status_message(), "BF16") != NULL, "%s", ts_status_message());
}

// Values whose sum depends on the order of additions: the order must be that of the ranks, in every algorithm.
static float rough_at(int rank, size_t i) {
    return ldexpf(1.0f + (float)((i * 40503u + (unsigned)rank * 977u) % 8191) / 8191.0f,
                  (int)((i + (size_t)rank * 7) % 23)) *
           (rank % 2 == 0 ? 1.0f : -1.0f);
}

static void test_all_reduce_order(checker *c, ts_group *group) {
    const int rank = ts_group_rank(group), size = ts_group_size(group);
    const size_t counts[] = {1000, TS_COMM_SMALL_BYTES / 4 + 77, TS_COMM_BLOCK_BYTES / 4 + 1234};
    for (int k = 0; k < 3; k++) {
        const size_t n = counts[k];
        float *data = allocate(c, n * sizeof *data);
        for (size_t i = 0; i < n; i++)
            data[i] = rough_at(rank, i);
        CHECK_OK(c, ts_group_all_reduce_sum(group, data, n, TS_F32));
        size_t n_wrong = 0;
        for (size_t i = 0; i < n; i++) {
            float expected = rough_at(0, i);
            for (int r = 1; r < size; r++)
                expected += rough_at(r, i);
            n_wrong += memcmp(&expected, &data[i], sizeof expected) != 0;
        }
        CHECK(c, n_wrong == 0, "%zu of %zu sums are not in rank order", n_wrong, n);
        free(data);
    }
}

static void test_all_gather(checker *c, ts_group *group) {
    const int rank = ts_group_rank(group), size = ts_group_size(group);
    const size_t counts[] = {
        0, 1, 4095, 70001, TS_COMM_BLOCK_BYTES, TS_COMM_BLOCK_BYTES + 1, 2 * TS_COMM_BLOCK_BYTES + 3};
    for (size_t k = 0; k < sizeof counts / sizeof counts[0]; k++) {
        const size_t n = counts[k];
        for (int in_place = 0; in_place < 2; in_place++) {
            unsigned char *all = allocate(c, n * (size_t)size), *mine = allocate(c, n);
            unsigned char *source = in_place ? all + n * (size_t)rank : mine;
            memset(all, 0, n * (size_t)size);
            fill_bytes(source, n, rank);
            CHECK_OK(c, ts_group_all_gather(group, source, n, all));
            for (int r = 0; r < size; r++)
                CHECK(c, bytes_are(all + n * (size_t)r, n, r), "%zu bytes from rank %d", n, r);
            free(all);
            free(mine);
        }
    }
}

static void test_gather(checker *c, ts_group *group) {
    const int rank = ts_group_rank(group), size = ts_group_size(group);
    ts_message all = {0};
    size_t n_bytes_of[64];
    // Each rank's length, one of them nothing, one longer than a block.
    const size_t lengths[] = {0, 5, TS_COMM_BLOCK_BYTES + 11, 1000, 70000};
    for (int round = 0; round < 5; round++) {
        const int root = round % size;
        const size_t n = lengths[(rank + round) % 5];
        unsigned char *mine = allocate(c, n);
        fill_bytes(mine, n, rank);
        if (rank != root) {
            CHECK_OK(c, ts_group_gather(group, root, n == 0 ? NULL : mine, n, NULL, NULL));
        } else {
            CHECK_OK(c, ts_group_gather(group, root, mine, n, &all, n_bytes_of));
            size_t at = 0;
            for (int r = 0; r < size; r++) {
                const size_t expected = lengths[(r + round) % 5];
                CHECK(c, n_bytes_of[r] == expected, "rank %d: %zu bytes, not %zu", r, n_bytes_of[r], expected);
                CHECK(c, bytes_are(all.data + at, expected, r), "round %d, rank %d", round, r);
                at += expected;
            }
            CHECK(c, all.n_bytes == at, "%zu bytes, not %zu", all.n_bytes, at);
        }
        free(mine);
    }
    ts_message_free(&all);
    CHECK(c, ts_group_gather(group, size, NULL, 0, NULL, NULL) == TS_ERR_INVALID, "root %d", size);
    CHECK(c, ts_group_gather(group, -1, NULL, 0, NULL, NULL) == TS_ERR_INVALID, "root -1");
}

static void test_broadcast(checker *c, ts_group *group) {
    const int rank = ts_group_rank(group), size = ts_group_size(group);
    const size_t inside = TS_COMM_HEAD_BYTES - sizeof(uint64_t); // what fits beside the size
    const size_t counts[] = {0,
                             1,
                             inside - 1,
                             inside,
                             inside + 1,
                             100000,
                             TS_COMM_BLOCK_BYTES,
                             TS_COMM_BLOCK_BYTES + 1,
                             TS_COMM_BLOCK_BYTES + inside,
                             TS_COMM_BLOCK_BYTES + inside + 1,
                             3};
    ts_message message = {0};
    for (size_t k = 0; k < sizeof counts / sizeof counts[0]; k++) {
        const size_t n = counts[k];
        for (int root = 0; root < size; root++) {
            unsigned char *data = allocate(c, n);
            fill_bytes(data, n, rank);
            CHECK_OK(c, ts_group_broadcast(group, root, data, n));
            CHECK(c, bytes_are(data, n, root), "%zu bytes from %d", n, root);
            fill_bytes(data, n, rank);
            if (rank == root)
                CHECK_OK(c, ts_message_set(&message, data, n));
            CHECK_OK(c, ts_group_broadcast_message(group, root, &message));
            CHECK(c, message.n_bytes == n, "%zu bytes, not %zu", message.n_bytes, n);
            CHECK(c, bytes_are(message.data, n, root), "message of %zu bytes from %d", n, root);
            free(data);
        }
    }
    ts_message_free(&message);
    CHECK(c, ts_group_broadcast(group, size, NULL, 0) == TS_ERR_INVALID, "root %d", size);
}

static void test_agree(checker *c, ts_group *group) {
    const int rank = ts_group_rank(group), size = ts_group_size(group);
    char expected[128];
    CHECK_OK(c, ts_group_agree(group, TS_OK));
    for (int failing = 0; failing < size; failing++) {
        // One rank fails; then it and all above it do, each in its own way.
        for (int all_above = 0; all_above < 2; all_above++) {
            const bool fails = rank == failing || (all_above && rank > failing);
            const ts_status mine = !fails ? TS_OK
                                          : TS_FAIL(rank == failing ? TS_ERR_FORMAT : TS_ERR_IO,
                                                    "model.safetensors: byte %d: broken on %d", 100 + rank, rank);
            const ts_status agreed = ts_group_agree(group, mine);
            CHECK(c, agreed == TS_ERR_FORMAT, "%s", ts_status_name(agreed));
            char prefix[32] = "";
            if (size > 1)
                snprintf(prefix, sizeof prefix, "rank %d: ", failing);
            snprintf(expected, sizeof expected, "%smodel.safetensors: byte %d: broken on %d", prefix, 100 + failing,
                     failing);
            CHECK(c, strcmp(ts_status_message(), expected) == 0, "\"%s\", not \"%s\"", ts_status_message(), expected);
        }
    }
    CHECK_OK(c, ts_group_agree(group, TS_OK));
}

// Every rank posts many messages to every rank, itself included, of sizes in no order, some longer than a block and so
// more than any transport buffers; all are taken while others are still being posted.
static size_t message_bytes(int from, int to, int i) {
    const unsigned h = (unsigned)(from * 31 + to * 17 + i * 7);
    if (i % 50 == 7)
        return (size_t)1500000 + h;
    if (i == 23)
        return 2 * (size_t)TS_COMM_BLOCK_BYTES + h % 3 - 1;
    if (i % 11 == 0)
        return 0;
    return h * 2654435761u % 9000;
}

// The first bytes of a message say which one it is, where it has room for that.
static void compose(unsigned char *bytes, size_t n, int from, int i) {
    fill_bytes(bytes, n, from + i * 3);
}

static void test_messages(checker *c, ts_group *group, bool flush_first) {
    enum { N_EACH = 120 };
    const int rank = ts_group_rank(group), size = ts_group_size(group);
    int n_from[64] = {0}, n_total = 0;
    ts_message message = {0};
    int from;
    for (int i = 0; i < N_EACH; i++) {
        for (int step = 0; step < size; step++) {
            const int to = (rank + step) % size;
            const size_t n = message_bytes(rank, to, i);
            unsigned char *bytes = allocate(c, n);
            compose(bytes, n, rank, i);
            CHECK_OK(c, ts_group_post(group, to, bytes, n));
            memset(bytes, 0xee, n); // a copy was posted
            free(bytes);
        }
        if (flush_first)
            continue;
        bool got;
        CHECK_OK(c, ts_group_poll(group, &from, &message, &got));
        if (got) {
            const size_t n = message_bytes(from, rank, n_from[from]);
            CHECK(c, message.n_bytes == n, "message %d of rank %d: %zu bytes, not %zu", n_from[from], from,
                  message.n_bytes, n);
            CHECK(c, bytes_are(message.data, n, from + n_from[from] * 3), "message %d of rank %d", n_from[from], from);
            n_from[from]++;
            n_total++;
        }
    }
    if (flush_first)
        CHECK_OK(c, ts_group_flush(group)); // all ranks at once: must not wait for anyone's poll
    for (; n_total < N_EACH * size; n_total++) {
        CHECK_OK(c, ts_group_wait(group, &from, &message));
        CHECK(c, from >= 0 && from < size, "from %d", from);
        const size_t n = message_bytes(from, rank, n_from[from]);
        CHECK(c, message.n_bytes == n, "message %d of rank %d: %zu bytes, not %zu", n_from[from], from, message.n_bytes,
              n);
        CHECK(c, bytes_are(message.data, n, from + n_from[from] * 3), "message %d of rank %d", n_from[from], from);
        n_from[from]++;
    }
    for (int r = 0; r < size; r++)
        CHECK(c, n_from[r] == N_EACH, "%d messages from rank %d", n_from[r], r);
    CHECK_OK(c, ts_group_flush(group));
    CHECK_OK(c, ts_group_barrier(group));
    bool got = true;
    CHECK_OK(c, ts_group_poll(group, &from, &message, &got));
    CHECK(c, !got, "a message of %zu bytes too many", message.n_bytes);
    CHECK_OK(c, ts_group_barrier(group)); // nobody posts for the next test before all have looked
    ts_message_free(&message);
    CHECK(c, ts_group_post(group, size, "x", 1) == TS_ERR_INVALID, "receiver %d", size);
    CHECK(c, ts_group_post(group, -1, "x", 1) == TS_ERR_INVALID, "receiver -1");
}

// Requests out and results back while the group's collectives run, as between a leader and its replicas.
static void test_messages_beside_collectives(checker *c, ts_group *group) {
    enum { N_ROUNDS = 200 };
    const int rank = ts_group_rank(group), size = ts_group_size(group);
    ts_message message = {0};
    int from, n_back = 0;
    bool got;
    for (int i = 0; i < N_ROUNDS; i++) {
        int64_t sum = rank + i;
        if (rank == 0)
            for (int r = 1; r < size; r++)
                CHECK_OK(c, ts_group_post(group, r, &i, sizeof i));
        CHECK_OK(c, ts_group_all_reduce_sum(group, &sum, 1, TS_I64));
        CHECK(c, sum == (int64_t)size * i + size * (size - 1) / 2, "round %d: %lld", i, (long long)sum);
        if (rank > 0) {
            CHECK_OK(c, ts_group_wait(group, &from, &message));
            CHECK(c, from == 0 && message.n_bytes == sizeof i && memcmp(message.data, &i, sizeof i) == 0, "round %d",
                  i);
            CHECK_OK(c, ts_group_post(group, 0, message.data, message.n_bytes));
        } else {
            CHECK_OK(c, ts_group_poll(group, &from, &message, &got));
            n_back += got;
        }
    }
    if (rank == 0)
        for (; n_back < N_ROUNDS * (size - 1); n_back++)
            CHECK_OK(c, ts_group_wait(group, &from, &message));
    CHECK_OK(c, ts_group_barrier(group));
    ts_message_free(&message);
}

static void test_split(checker *c, ts_group *world) {
    const int rank = ts_group_rank(world), size = ts_group_size(world);
    ts_group *part = NULL;
    // All, in reverse order.
    CHECK_OK(c, ts_group_split(world, 0, -rank, &part));
    CHECK(c, ts_group_rank(part) == size - 1 - rank && ts_group_size(part) == size, "rank %d of %d",
          ts_group_rank(part), ts_group_size(part));
    test_all_gather(c, part);
    test_all_reduce_order(c, part);
    test_agree(c, part);
    ts_group_free(part);
    // Even and odd ranks, each with a split of its own below.
    CHECK_OK(c, ts_group_split(world, rank % 2, rank, &part));
    CHECK(c, ts_group_rank(part) == rank / 2, "rank %d", ts_group_rank(part));
    CHECK(c, ts_group_size(part) == (size + 1 - rank % 2) / 2, "size %d", ts_group_size(part));
    test_all_reduce(c, part);
    test_gather(c, part);
    test_broadcast(c, part);
    test_agree(c, part);
    test_messages(c, part, false);
    ts_group *alone = NULL;
    CHECK_OK(c, ts_group_split(part, ts_group_rank(part), 0, &alone));
    CHECK(c, ts_group_rank(alone) == 0 && ts_group_size(alone) == 1, "size %d", ts_group_size(alone));
    test_all_gather(c, alone);
    test_messages(c, alone, true);
    ts_group_free(alone);
    ts_group_free(part);
    // All but the last rank.
    part = world;
    CHECK_OK(c, ts_group_split(world, rank == size - 1 ? -1 : 3, rank, &part));
    CHECK(c, (part == NULL) == (rank == size - 1), "membership");
    if (part != NULL) {
        CHECK(c, ts_group_size(part) == size - 1, "size %d", ts_group_size(part));
        test_all_reduce(c, part);
        test_messages(c, part, true);
    }
    ts_group_free(part);
    // Posted, never received: freeing the group neither hangs nor loses its way.
    CHECK_OK(c, ts_group_split(world, 0, rank, &part));
    unsigned char *bytes = allocate(c, 3000000);
    fill_bytes(bytes, 3000000, rank);
    for (int r = 0; r < size; r++)
        CHECK_OK(c, ts_group_post(part, r, bytes, 3000000 - (size_t)r));
    free(bytes);
    ts_group_free(part);
}

int main(int argc, char **argv) {
    checker c = {0};
    if (ts_world_create_mpi(&argc, &argv, &c.world) != TS_OK) {
        fprintf(stderr, "%s\n", ts_status_message());
        return 1;
    }
    ts_group *second = NULL;
    CHECK(&c, ts_world_create_mpi(&argc, &argv, &second) == TS_ERR_INVALID && second == NULL, "a second world");
    CHECK(&c, ts_world_local_size(c.world) >= 1 && ts_world_local_size(c.world) <= ts_group_size(c.world),
          "local size %d", ts_world_local_size(c.world));
    CHECK(&c, ts_world_local_rank(c.world) >= 0 && ts_world_local_rank(c.world) < ts_world_local_size(c.world),
          "local rank %d", ts_world_local_rank(c.world));
    CHECK_OK(&c, ts_group_barrier(c.world));
    test_all_reduce(&c, c.world);
    test_all_reduce_order(&c, c.world);
    test_all_gather(&c, c.world);
    test_gather(&c, c.world);
    test_broadcast(&c, c.world);
    test_agree(&c, c.world);
    test_messages(&c, c.world, false);
    test_messages(&c, c.world, true);
    test_messages_beside_collectives(&c, c.world);
    test_split(&c, c.world);
    check_report(&c, "mpi_group");
    ts_world_free(c.world);
    return 0;
}
