#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd.h"

#include <math.h>

ts_status TS_ISA(cross_entropy)(ts_device *device, const ts_cross_entropy_args *args) {
    const int n_threads = ts_cpu_device_of(device)->n_threads;
    const ts_tensor *logits = &args->logits;
#pragma omp parallel for num_threads(n_threads) if (logits->rows * logits->cols > 65536)
    for (int64_t row = 0; row < logits->rows; row++) {
        const float *x = (const float *)logits->data + row * logits->stride;
        float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < logits->cols; i++)
            largest = x[i] > largest ? x[i] : largest;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < logits->cols; i++)
            sum += (double)ts_exp(x[i] - largest);
        const int64_t target = args->targets[row] - args->first_token;
        double *out = args->parts + 3 * row;
        out[0] = (double)largest;
        out[1] = sum;
        out[2] = target >= 0 && target < logits->cols ? (double)x[target] : -INFINITY;
    }
    return TS_OK;
}
