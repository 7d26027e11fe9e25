// The CUDA backend: one GPU, one stream, cuBLASLt for large products and kernels of our own for the rest.
//
//     TS_TRY(ts_cuda_device_create(0, TS_BF16, 0, &device));
//
// Activations of a model are of the device's compute_dtype: BF16 with f32 accumulation, or F32 throughout for
// validation. The residual stream stays F32 in both.
#ifndef TS_CUDA_H
#define TS_CUDA_H

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

// The GPU numbered `ordinal` among those visible. compute_dtype is TS_BF16 or TS_F32. capability chooses the kernels: 0
// those made for this GPU; 80 those that an A100 runs, also on a newer GPU, so that they can be tested there.
// TS_ERR_UNSUPPORTED where no GPU is visible, or where this one is older than compute capability 8.0.
ts_status ts_cuda_device_create(int ordinal, ts_dtype compute_dtype, int capability, ts_device **out);

// Visible GPUs; 0 where there is no driver.
int ts_cuda_device_count(void);

// "NVIDIA H200": borrowed until the device is freed.
const char *ts_cuda_device_name(const ts_device *device);

#ifdef __cplusplus
}
#endif
#endif
