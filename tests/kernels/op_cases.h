// One list of op cases for every backend: shapes and seeds, each run on a device and compared with an evaluation of the
// op's equation in float64, written here and not taken from any backend.
//
//     int n_failed = op_cases_run(device, TS_F32, TS_F32, stdout);
//     n_failed += attention_cases_run(device, TS_F32, TS_F32, INT_MAX, stdout);
//
// The error of a case is the largest over rows of |out - expected| / |expected|, in the Euclidean norm; the expected
// values come from the inputs as rounded to the dtype the op is given. Outputs are filled with NaN before each run.
#ifndef TS_TESTS_OP_CASES_H
#define TS_TESTS_OP_CASES_H

#include "kernels/ops.h"

#include <stdio.h>

// Runs the cases of all ops but attention, with activations of this dtype. Prints a line a failure, and one a group
// with the worst error. Returns the failures.
int op_cases_run(ts_device *device, ts_dtype activation, FILE *report);

// The attention cases of up to most_tokens tokens in all and, with them, importance and pruning; tile states of
// slot_dtype.
int attention_cases_run(ts_device *device, ts_dtype activation, ts_dtype slot_dtype, int most_tokens, FILE *report);

// A part of the first that ends soon under a tool that slows kernels down a thousand times: of products, at most those
// of decode, since the kernels of the others are another's.
int op_cases_run_small(ts_device *device, ts_dtype activation, bool with_decode_products, FILE *report);

// RMSNorms fused into products, where the device does that.
int fused_norm_cases_run(ts_device *device, ts_dtype activation, FILE *report);

// For the case lists themselves.

// What a group of cases has shown so far.
typedef struct case_group {
    const char *name;
    FILE *report;
    int n_cases, n_failed;
    double worst, bound;
} case_group;

// Counts a case; it fails where the error is not within the bound (NaN never is).
void case_result(case_group *group, double error, double bound, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
// Fails the case when status is not TS_OK. Returns whether it was.
bool case_ok(case_group *group, ts_status status, const char *what);
int case_group_end(case_group *group);

// Deterministic values: uniform in [-1, 1).
double case_uniform(uint64_t *seed);
// n values about `centre`, spread by `spread`, rounded to dtype. Returns them as f32; free them.
float *case_values(uint64_t seed, int64_t n, double centre, double spread, ts_dtype dtype);
// Device memory with these values in dtype, rows `stride` elements apart. NULL values: all bytes 0xff, NaN in any
// dtype.
ts_status case_upload(ts_device *device, const float *values, int64_t rows, int64_t cols, int64_t stride,
                      ts_dtype dtype, ts_tensor *out);
// A weight matrix in the device's own layout.
ts_status case_upload_weight(ts_device *device, const float *values, int64_t rows, int64_t cols, ts_dtype dtype,
                             ts_tensor *out);
// Its values as f32, rows without gaps; free them.
float *case_download(ts_device *device, const ts_tensor *tensor);
// The largest relative error of a row.
double case_error(const float *out, const double *expected, int64_t rows, int64_t cols);

#endif
