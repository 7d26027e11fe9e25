#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd.h"

ts_status TS_ISA(swiglu)(ts_device *device, const ts_swiglu_args *args) {
    const int n_threads = ts_cpu_device_of(device)->n_threads;
    const ts_tensor *in = &args->gate_up, *y = &args->y;
#pragma omp parallel for num_threads(n_threads) if (in->rows * in->cols > 65536)
    for (int64_t row = 0; row < y->rows; row++) {
        const float *gate = (const float *)in->data + row * in->stride, *up = gate + y->cols;
        float *out = (float *)y->data + row * y->stride;
#pragma omp simd
        for (int64_t i = 0; i < y->cols; i++)
            out[i] = gate[i] * ts_sigmoid(gate[i]) * up[i];
    }
    return TS_OK;
}
