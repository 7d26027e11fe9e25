// Residual add and RMSNorm in one pass over a row: bound by memory.
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd.h"

#include <math.h>

static void norm_row(float *x, const float *residual, const float *weight, double eps, float *h, int64_t n) {
    float sum = 0;
    if (residual) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) {
            const float value = x[i] + residual[i];
            x[i] = value;
            sum += value * value;
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++)
            sum += x[i] * x[i];
    }
    const float scale = (float)(1.0 / sqrt((double)sum / (double)n + eps));
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        h[i] = x[i] * scale * weight[i];
}

ts_status TS_ISA(rms_norm)(ts_device *device, const ts_rms_norm_args *args) {
    const int n_threads = ts_cpu_device_of(device)->n_threads;
    const ts_tensor *x = &args->x, *h = &args->h;
#pragma omp parallel for num_threads(n_threads) if (x->rows * x->cols > 65536)
    for (int64_t i = 0; i < x->rows; i++)
        norm_row((float *)x->data + i * x->stride,
                 args->residual ? (const float *)args->residual->data + i * args->residual->stride : NULL,
                 args->weight.data, args->eps, (float *)h->data + i * h->stride, x->cols);
    return TS_OK;
}
