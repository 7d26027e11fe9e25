// What `tessera bench` measures, and how: options that its modes share, and what becomes of repeated times.
#ifndef TS_BENCH_H
#define TS_BENCH_H

#include "launcher/launch.h"

#include <jansson.h>

// Numbers that are 0 take a default that suits the device.
typedef struct ts_bench_options {
    int64_t tokens;  // of a prefill
    int64_t batch;   // sequences that decode together
    int64_t steps;   // of one repeat of a decode
    int64_t context; // tokens of every sequence before it decodes
    int64_t repeat;
    int64_t hidden, intermediate, vocabulary, heads, kv_heads, head_dim; // of the kernels
    const char *op;                                                      // of the kernels only this one; NULL: all
    const char *config, *seed;                                           // as given: NULL where not
    bool as_json;
} ts_bench_options;

typedef struct ts_bench_spread {
    double median, least, most;
} ts_bench_spread;

// Of n >= 1 values, which are put in order.
ts_bench_spread ts_bench_spread_of(double *values, int64_t n);

// Adds NAME, NAME_least and NAME_most to an object.
void ts_bench_set_spread(json_t *object, const char *name, ts_bench_spread spread);

// The value of `given`, or the default of a CPU or of a GPU where it is 0.
int64_t ts_bench_default(const ts_device *device, int64_t given, int64_t on_cpu, int64_t on_gpu);

// A mode: measures, agrees with the other ranks, and gives what it found as an object; printing it for people is beside
// it. launch->model is there for prefill and decode, the device alone for kernels.
ts_status ts_bench_prefill(ts_launch *launch, const ts_launch_options *shared, const ts_bench_options *options,
                           json_t **out);
void ts_bench_prefill_print(const json_t *result);
ts_status ts_bench_decode(ts_launch *launch, const ts_launch_options *shared, const ts_bench_options *options,
                          json_t **out);
void ts_bench_decode_print(const json_t *result);
ts_status ts_bench_kernel(ts_launch *launch, const ts_launch_options *shared, const ts_bench_options *options,
                          json_t **out);
void ts_bench_kernel_print(const json_t *result);

// The number under `key`, 0 where there is none.
static inline double ts_bench_number(const json_t *object, const char *key) {
    return json_number_value(json_object_get(object, key));
}

#endif
