#include "kernels/cpu/cpu.h"
#include "op_cases.h"

#include <criterion/criterion.h>
#include <limits.h>

static int failures(int (*run)(ts_device *device)) {
    ts_device *device = NULL;
    cr_assert_eq(ts_cpu_device_create(1, &device), TS_OK);
    const int n_failed = run(device);
    ts_device_free(device);
    return n_failed;
}

static int small_ops(ts_device *device) {
    return op_cases_run(device, TS_F32, stderr);
}

static int attention(ts_device *device) {
    return attention_cases_run(device, TS_F32, TS_F32, INT_MAX, stderr);
}

static int attention_with_rounded_slots(ts_device *device) {
    return attention_cases_run(device, TS_F32, TS_BF16, INT_MAX, stderr) +
           attention_cases_run(device, TS_F32, TS_FP8_E4M3, INT_MAX, stderr);
}

Test(ops_cpu, every_case_of_the_small_ops) {
    cr_assert_eq(failures(small_ops), 0);
}

Test(ops_cpu, every_case_of_attention) {
    cr_assert_eq(failures(attention), 0);
}

Test(ops_cpu, every_case_of_attention_with_rounded_slots) {
    cr_assert_eq(failures(attention_with_rounded_slots), 0);
}
