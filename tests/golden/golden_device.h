// The device that the golden tests run on: the same tests are linked once for every backend.
#ifndef TS_TESTS_GOLDEN_DEVICE_H
#define TS_TESTS_GOLDEN_DEVICE_H

#include "kernels/device.h"

// What the backend computes in; BF16 beside F32 where it has it.
extern const ts_dtype golden_dtypes[];
extern const int golden_n_dtypes;

ts_status golden_device_create(ts_dtype dtype, int n_threads, ts_device **out);

#endif
