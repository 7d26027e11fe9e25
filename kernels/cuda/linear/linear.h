// Inside the CUDA backend only: the choice of cuBLASLt's algorithms per product, and the elementwise work around it.
#ifndef TS_CUDA_LINEAR_H
#define TS_CUDA_LINEAR_H

#include "kernels/cuda/device.h"

#ifdef __cplusplus
extern "C" {
#endif

// Rows that a product of decode has at most, and the classes of row counts that algorithms are chosen for.
enum { TS_CUDA_LINEAR_FEW_ROWS = 256, TS_CUDA_LINEAR_N_CLASSES = 5 };

// Columns of y that the kernel for few rows is for: more are so many blocks that it has no advantage.
enum { TS_CUDA_LINEAR_FEW_COLUMNS = 8192 };

// y = epilogue(x w^T + bias), as cuBLASLt is to have it: w of x's dtype.
typedef struct ts_cuda_linear_operands {
    ts_tensor x, w, y;
    const void *bias; // of y's dtype; NULL without
    cublasLtEpilogue_t epilogue;
} ts_cuda_linear_operands;

// What a plan is chosen by. The number of rows is not part of it.
typedef struct ts_cuda_linear_key {
    int64_t n, k, x_stride, w_stride, y_stride;
    int32_t w_dtype, y_dtype, epilogue;
    int32_t few_rows;  // of decode
    int32_t alignment; // of every operand, bytes, at most 16
    int32_t unused;    // zero: keys are compared as bytes
} ts_cuda_linear_key;

struct ts_cuda_linear_plan {
    ts_cuda_linear_key key;
    bool exists; // false: cuBLASLt has no algorithm for the key
    cublasLtMatmulAlgo_t reference;
    // In decode one for each class of row counts. All give a row the reference's bits (I3).
    cublasLtMatmulAlgo_t algorithms[TS_CUDA_LINEAR_N_CLASSES];
};

// The plan for this product, chosen at its first use and kept. Valid until the next call. few_rows: of decode, with at
// most TS_CUDA_LINEAR_FEW_ROWS rows at a time, whose first use takes some memory and milliseconds.
ts_status ts_cuda_linear_find_plan(ts_cuda_device *device, const ts_cuda_linear_operands *in, bool few_rows,
                                   const ts_cuda_linear_plan **out);

// Enqueues the product; at most TS_CUDA_LINEAR_FEW_ROWS rows where the plan is of decode.
ts_status ts_cuda_linear_multiply(ts_cuda_device *device, const ts_cuda_linear_operands *in,
                                  const ts_cuda_linear_plan *plan);

// Whether the kernel for few rows takes the product: on Hopper, row invariant, everything BF16 (w is args->w or what it
// has been converted to) with rows that begin at multiples of 16 bytes. The number of rows is not asked.
bool ts_cuda_linear_few_applies(const ts_cuda_device *device, const ts_linear_args *args, const ts_tensor *w);

// The product by that kernel. early: w is not written by the kernel in front on the stream.
ts_status ts_cuda_linear_few(ts_cuda_device *device, const ts_linear_args *args, const ts_tensor *w, bool early);

// y = activation(y + bias), elementwise. bias, of y's dtype, may be NULL.
ts_status ts_cuda_linear_finish(cudaStream_t stream, const ts_tensor *y, const ts_tensor *bias,
                                ts_activation activation);

// to[i] = from[i] in another dtype: F32, BF16 or F16 to F32 or BF16, matrix [rows, cols]; `to` without gaps.
ts_status ts_cuda_linear_convert(cudaStream_t stream, const ts_tensor *from, void *to, ts_dtype dtype);

// Fills a BF16 matrix with drawn numbers of both signs and eight magnitudes. Column k repeats in column k + cols / 2,
// with the other sign where `cancels` is set; the last column of an odd number is zero.
ts_status ts_cuda_linear_draw(cudaStream_t stream, const ts_tensor *out, bool cancels);

// *n (device): elements of a whose bits are not those of the same element of b. a's rows and columns count.
ts_status ts_cuda_linear_count_different(cudaStream_t stream, const ts_tensor *a, const ts_tensor *b, uint32_t *n);

#ifdef __cplusplus
}
#endif
#endif
