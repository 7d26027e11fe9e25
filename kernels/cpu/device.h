// Inside the CPU backend only: the device and the tables of ops, one per instruction set the build compiled for.
#ifndef TS_CPU_DEVICE_H
#define TS_CPU_DEVICE_H

#include "kernels/cpu/cpu.h"
#include "kernels/ops.h"

typedef struct ts_cpu_device {
    ts_device base;
    int n_threads;
    void *scratch;
    double marks[2]; // of the timer
} ts_cpu_device;

static inline ts_cpu_device *ts_cpu_device_of(ts_device *device) {
    return (ts_cpu_device *)device;
}

// At least n_bytes of 64-byte aligned scratch, valid until the op returns; contents undefined. Grows to the largest
// asked.
ts_status ts_cpu_device_scratch(ts_device *device, size_t n_bytes, void **out);

extern const ts_ops ts_cpu_ops_baseline;
extern const ts_ops ts_cpu_ops_v3;
extern const ts_ops ts_cpu_ops_v4;

#endif
