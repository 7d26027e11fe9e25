// The CPU backend: host memory, OpenMP threads, OpenBLAS for large products.
#ifndef TS_CPU_H
#define TS_CPU_H

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

// A device of n_threads (>= 1) OpenMP threads. Picks the widest instruction set that both the build and this CPU have.
ts_status ts_cpu_device_create(int n_threads, ts_device **out);

// The rate of one large OpenBLAS sgemm [n, n, n] with the device's threads, in FLOP/s: the yardstick of `tessera
// bench`.
ts_status ts_cpu_sgemm_rate(ts_device *device, int n, double *flops_per_second);

#ifdef __cplusplus
}
#endif
#endif
