// The devices that this build can compute on. CMake chooses devices_cuda.c or devices_cpu.c beside this.
#ifndef TS_DEVICES_H
#define TS_DEVICES_H

#include "kernels/device.h"

// "cpu", or "cpu, cuda": for messages.
const char *ts_devices_names(void);

// GPUs that are visible; 0 in a build without CUDA.
int ts_devices_cuda_count(void);

// What computes: "NVIDIA H200", or the backend's name and instruction set. Borrowed until the device is freed.
const char *ts_devices_describe(const ts_device *device);

// The GPU numbered `ordinal`, computing in compute_dtype (BF16 or F32) with the kernels of `capability` (0: its own).
// TS_ERR_UNSUPPORTED in a build without CUDA.
ts_status ts_devices_create_cuda(int ordinal, ts_dtype compute_dtype, int capability, ts_device **out);

#endif
