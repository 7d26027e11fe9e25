// What `tessera bench kernel` is made of: device memory with random numbers in it, and the time of an op on the
// device's own clock. The ops are in bench_ops.c and bench_attention.c.
#ifndef TS_BENCH_KERNEL_H
#define TS_BENCH_KERNEL_H

#include "kernels/ops.h"
#include "launcher/bench.h"

enum { TS_KERNEL_BENCH_MAX_SETS = 64, TS_KERNEL_BENCH_MAX_BLOCKS = 4096 };

typedef struct ts_kernel_bench {
    ts_device *device;
    ts_bench_options shape; // complete
    ts_dtype dtype;         // of activations and weights
    double copy_rate;       // bytes read and written a second
    uint64_t n_drawn;       // buffers filled so far: each has numbers of its own
    json_t *results;
    double *samples; // [repeat]
    void *blocks[TS_KERNEL_BENCH_MAX_BLOCKS];
    int n_blocks; // device memory of the op that is timed now
} ts_kernel_bench;

// One way to call an op. `prepare` comes before every row of calls and is not timed.
typedef struct ts_kernel_call {
    ts_status (*prepare)(ts_kernel_bench *b, void *context);
    ts_status (*run)(ts_kernel_bench *b, void *context, int64_t i);
    void *context;
    int64_t n_calls; // of a row; 0: as many as take a while
} ts_kernel_call;

// Device memory until ts_kernel_bench_release.
ts_status ts_kernel_bench_take(ts_kernel_bench *b, int64_t n_bytes, void **out);
void ts_kernel_bench_release(ts_kernel_bench *b);

// Rows that lie one behind the other, whose first columns are drawn about 0 and whose last `n_last` about `last_mean`.
// Past some millions of elements they repeat.
ts_status ts_kernel_bench_take_rows(ts_kernel_bench *b, ts_dtype dtype, int64_t rows, int64_t cols, int64_t n_last,
                                    float last_mean, ts_tensor *out);

// The same weight in n_sets places.
ts_status ts_kernel_bench_take_weights(ts_kernel_bench *b, int64_t rows, int64_t cols, int n_sets, ts_tensor *out);

// How many sets of buffers keep a call's inputs out of the caches; at most TS_KERNEL_BENCH_MAX_SETS.
int ts_kernel_bench_sets_for(int64_t bytes_of_a_set);

// Times an op and adds it to the results. *out is borrowed from them. `bytes`: every input read once and every output
// written once.
ts_status ts_kernel_bench_time(ts_kernel_bench *b, const char *op, const char *shape, double bytes, double flops,
                               const ts_kernel_call *call, json_t **out);

// Each times its op, in the forms a model uses, at b->shape.
ts_status ts_bench_embed(ts_kernel_bench *b);
ts_status ts_bench_rms_norm(ts_kernel_bench *b);
ts_status ts_bench_linear(ts_kernel_bench *b);
ts_status ts_bench_swiglu(ts_kernel_bench *b);
ts_status ts_bench_gather_rows(ts_kernel_bench *b);
ts_status ts_bench_cross_entropy(ts_kernel_bench *b);
ts_status ts_bench_sample(ts_kernel_bench *b);
ts_status ts_bench_tile_importance(ts_kernel_bench *b);
ts_status ts_bench_tile_prune(ts_kernel_bench *b);
ts_status ts_bench_attention(ts_kernel_bench *b);

#endif
