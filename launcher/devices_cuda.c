// Devices of a build with CUDA.
#include "kernels/cuda/cuda.h"
#include "kernels/ops.h"
#include "launcher/devices.h"

#include <string.h>

const char *ts_devices_names(void) {
    return "cpu, cuda";
}

int ts_devices_cuda_count(void) {
    return ts_cuda_device_count();
}

const char *ts_devices_describe(const ts_device *device) {
    return strcmp(device->backend->name, "cuda") == 0 ? ts_cuda_device_name(device) : device->ops->name;
}

ts_status ts_devices_create_cuda(int ordinal, ts_dtype compute_dtype, int capability, ts_device **out) {
    return ts_cuda_device_create(ordinal, compute_dtype, capability, out);
}
