// Inside the CUDA backend only: the choice of a cuBLASLt algorithm per product, and the elementwise work around it.
#ifndef TS_CUDA_LINEAR_H
#define TS_CUDA_LINEAR_H

#include "kernels/cuda/device.h"

#ifdef __cplusplus
extern "C" {
#endif

// What an algorithm is chosen by. The number of rows is not part of it: one algorithm whatever the batch, with one way
// of splitting K, so that a row is summed in one order in every batch (I3).
typedef struct ts_cuda_linear_key {
    int64_t n, k, x_stride, w_stride, y_stride;
    int32_t x_dtype, y_dtype, epilogue;
    int32_t few_rows;  // chosen for decode
    int32_t alignment; // of every operand, bytes
    int32_t unused;    // zero: keys are compared as bytes
} ts_cuda_linear_key;

struct ts_cuda_linear_plan {
    ts_cuda_linear_key key;
    cublasLtMatmulAlgo_t algorithm;
    bool exists; // false: cuBLASLt has no algorithm for the key
};

// y = activation(y + bias), elementwise. bias may be NULL.
ts_status ts_cuda_linear_finish(cudaStream_t stream, const ts_tensor *y, const ts_tensor *bias,
                                ts_activation activation);

// to[i] = from[i] in another dtype: F32, BF16 or F16 to F32 or BF16, matrix [rows, cols]; `to` without gaps.
ts_status ts_cuda_linear_convert(cudaStream_t stream, const ts_tensor *from, void *to, ts_dtype dtype);

#ifdef __cplusplus
}
#endif
#endif
