// Devices of a build without CUDA.
#include "launcher/devices.h"

#include "kernels/ops.h"

const char *ts_devices_names(void) {
    return "cpu";
}

int ts_devices_cuda_count(void) {
    return 0;
}

const char *ts_devices_describe(const ts_device *device) {
    return device->ops->name;
}

ts_status ts_devices_create_cuda(int ordinal, ts_dtype compute_dtype, int capability, ts_device **out) {
    (void)ordinal, (void)compute_dtype, (void)capability, (void)out;
    return TS_FAIL(TS_ERR_UNSUPPORTED,
                   "--device is \"cuda\"; this build has: cpu (TS_CUDA was off, or no nvcc was found)");
}
