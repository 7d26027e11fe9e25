// Checks for plain MPI programs, where Criterion cannot be used because it forks. A check that fails ends the launch.
#ifndef TESTS_COMM_CHECK_H
#define TESTS_COMM_CHECK_H

#include "comm/comm.h"

#include <stdio.h>

typedef struct checker {
    ts_group *world;
    long n_passed;
} checker;

#define CHECK(checker, condition, ...)                                                                                 \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: rank %d: %s: ", __FILE__, __LINE__, ts_group_rank((checker)->world), #condition);  \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            ts_world_abort((checker)->world, 1);                                                                       \
        }                                                                                                              \
        (checker)->n_passed++;                                                                                         \
    } while (0)

#define CHECK_OK(checker, call) CHECK(checker, (call) == TS_OK, "%s", ts_status_message())

// Prints the sum of all ranks' checks on rank 0.
static inline void check_report(checker *c, const char *name) {
    int64_t total = c->n_passed;
    if (ts_group_all_reduce_sum(c->world, &total, 1, TS_I64) == TS_OK && ts_group_rank(c->world) == 0)
        printf("%s: %lld checks passed on %d ranks\n", name, (long long)total, ts_group_size(c->world));
}

#endif
