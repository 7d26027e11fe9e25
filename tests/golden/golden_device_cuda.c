// Where no GPU is visible the program says so and is counted as skipped.
#include "golden_device.h"
#include "kernels/cuda/cuda.h"

#include <criterion/criterion.h>
#include <stdio.h>

enum { SKIPPED = 77 };

const ts_dtype golden_dtypes[] = {TS_F32, TS_BF16};
const int golden_n_dtypes = 2;

ts_status golden_device_create(ts_dtype dtype, int n_threads, ts_device **out) {
    (void)n_threads;
    return ts_cuda_device_create(0, dtype, 0, out);
}

int main(int argc, char **argv) {
    if (ts_cuda_device_count() == 0) {
        puts("SKIP: no GPU is visible");
        return SKIPPED;
    }
    struct criterion_test_set *tests = criterion_initialize();
    const int proceed = criterion_handle_args(argc, argv, true);
    const int failed = proceed && !criterion_run_all_tests(tests);
    criterion_finalize(tests);
    return failed;
}
