// A view of a matrix somewhere in memory. It owns nothing.
#ifndef TS_BASE_TENSOR_H
#define TS_BASE_TENSOR_H

#include "kernels/base/dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

// Row-major [rows, cols]; row r starts at element r * stride. A vector is one row. Whether `data` is host or device
// memory is the owner's business: an op is given tensors of its own device.
typedef struct ts_tensor {
    void *data;
    ts_dtype dtype;
    int64_t rows, cols, stride;
} ts_tensor;

static inline ts_tensor ts_tensor_of(void *data, ts_dtype dtype, int64_t rows, int64_t cols) {
    return (ts_tensor){data, dtype, rows, cols, cols};
}

// Rows [first, first + rows) of t.
static inline ts_tensor ts_tensor_rows(ts_tensor t, int64_t first, int64_t rows) {
    t.data = (char *)t.data + (size_t)(first * t.stride) * ts_dtype_bytes(t.dtype);
    t.rows = rows;
    return t;
}

#ifdef __cplusplus
}
#endif
#endif
