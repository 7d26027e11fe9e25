#include "kernels/cpu/isa.h"

ts_status TS_ISA(gather_rows)(ts_device *device, const ts_gather_rows_args *args) {
    const size_t element = ts_dtype_bytes(args->x.dtype);
    for (int64_t i = 0; i < args->y.rows; i++)
        memcpy((char *)args->y.data + (size_t)(i * args->y.stride) * element,
               (const char *)args->x.data + (size_t)(args->rows[i] * args->x.stride) * element,
               (size_t)args->y.cols * element);
    return TS_OK;
}
