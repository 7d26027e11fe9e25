// Copies of rows. Their numbers are host memory and travel as kernel arguments, a few at a time, so that no buffer of
// the device has to wait for them.
#include "kernels/cuda/device.h"

namespace {

constexpr int kThreads = 256, kRows = 256;

struct row_numbers {
    int64_t at[kRows];
};

__global__ void gather_kernel(row_numbers rows, const char *x, int64_t x_bytes, char *y, int64_t y_bytes,
                              int64_t row_bytes) {
    const char *from = x + rows.at[blockIdx.x] * x_bytes;
    char *to = y + blockIdx.x * y_bytes;
    if (((uintptr_t)from | (uintptr_t)to | (uintptr_t)row_bytes) % 16 == 0)
        for (int64_t i = threadIdx.x; i < row_bytes / 16; i += kThreads)
            ((uint4 *)to)[i] = ((const uint4 *)from)[i];
    else
        for (int64_t i = threadIdx.x; i < row_bytes; i += kThreads)
            to[i] = from[i];
}

} // namespace

ts_status ts_cuda_gather_rows(ts_device *device, const ts_gather_rows_args *args) {
    const int64_t element = (int64_t)ts_dtype_bytes(args->x.dtype);
    for (int64_t first = 0; first < args->y.rows; first += kRows) {
        row_numbers rows;
        const int64_t n = args->y.rows - first < kRows ? args->y.rows - first : kRows;
        memcpy(rows.at, args->rows + first, (size_t)n * sizeof *rows.at);
        gather_kernel<<<(unsigned)n, kThreads, 0, ts_cuda_device_of(device)->stream>>>(
            rows, (const char *)args->x.data, args->x.stride * element,
            (char *)args->y.data + first * args->y.stride * element, args->y.stride * element, args->y.cols * element);
    }
    return ts_cuda_status(cudaGetLastError(), "gather_rows");
}
