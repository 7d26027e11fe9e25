// Devices of a build with CUDA.
#include "kernels/cuda/cuda.h"
#include "launcher/devices.h"

const char *ts_devices_names(void) {
    return "cpu, cuda";
}

int ts_devices_cuda_count(void) {
    return ts_cuda_device_count();
}

ts_status ts_devices_create_cuda(int ordinal, ts_dtype compute_dtype, int capability, ts_device **out) {
    return ts_cuda_device_create(ordinal, compute_dtype, capability, out);
}
