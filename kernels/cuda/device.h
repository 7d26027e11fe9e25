// Inside the CUDA backend only: the device, its stream and scratch, and how CUDA's errors become ours.
#ifndef TS_CUDA_DEVICE_H
#define TS_CUDA_DEVICE_H

#include "kernels/cuda/attention/dense/attention_dense.h"
#include "kernels/cuda/cuda.h"
#include "kernels/ops.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

// Pinned buffers that uploads and downloads pass through, one chunk each, in turn.
enum { TS_CUDA_N_STAGES = 8, TS_CUDA_STAGE_BYTES = 1 << 20, TS_CUDA_BLAS_BYTES = 32 << 20 };

typedef struct ts_cuda_linear_plan ts_cuda_linear_plan;

typedef struct ts_cuda_device {
    ts_device base;
    int ordinal;
    ts_cuda_attention_dense_plan dense_plan; // with the capability that kernels are chosen by
    char name[256];
    cudaStream_t stream;
    char *stages;                               // [N_STAGES, STAGE_BYTES] pinned
    cudaEvent_t stage_events[TS_CUDA_N_STAGES]; // passed when the stage may be written again
    int next_stage;
    cudaEvent_t marks[2]; // of the timer
    void *scratch;
    cublasLtHandle_t blas;
    void *blas_workspace; // [BLAS_BYTES]
    ts_cuda_linear_plan *linear_plans;
    int n_linear_plans, linear_plan_capacity;
    // Since the last attention op a kernel was enqueued that ends only when all before it have.
    bool cache_is_settled;
} ts_cuda_device;

static inline ts_cuda_device *ts_cuda_device_of(ts_device *device) {
    return (ts_cuda_device *)device;
}

// TS_OK, TS_ERR_MEMORY or TS_ERR_DEVICE with a sentence that says what was being done.
ts_status ts_cuda_status(cudaError_t error, const char *what);
ts_status ts_cuda_blas_status(cublasStatus_t error, const char *what);

#define TS_CUDA_TRY(expression) TS_TRY(ts_cuda_status((expression), #expression))
#define TS_BLAS_TRY(expression) TS_TRY(ts_cuda_blas_status((expression), #expression))

// At least n_bytes of device memory, aligned to 256 bytes, valid until the op that asks returns: the next op's work
// comes after it on the stream. Contents undefined.
ts_status ts_cuda_device_scratch(ts_device *device, size_t n_bytes, void **out);

// TS_OK where the tensor is BF16 or F32; else a sentence naming `what`.
ts_status ts_cuda_check_activation(const ts_tensor *tensor, const char *what);

extern const ts_ops ts_cuda_ops;

ts_status ts_cuda_embed(ts_device *device, const ts_embed_args *args);
ts_status ts_cuda_rms_norm(ts_device *device, const ts_rms_norm_args *args);
ts_status ts_cuda_linear(ts_device *device, const ts_linear_args *args);
bool ts_cuda_linear_fuses_norm(const ts_device *device, const ts_tensor *front_w, const ts_tensor *behind_w);
ts_status ts_cuda_swiglu(ts_device *device, const ts_swiglu_args *args);
ts_status ts_cuda_gather_rows(ts_device *device, const ts_gather_rows_args *args);
ts_status ts_cuda_tile_importance(ts_device *device, const ts_tile_importance_args *args);
ts_status ts_cuda_tile_prune(ts_device *device, const ts_tile_prune_args *args);
ts_status ts_cuda_attention_forward(ts_device *device, const ts_attention_args *args);
ts_status ts_cuda_cross_entropy(ts_device *device, const ts_cross_entropy_args *args);
ts_status ts_cuda_sample(ts_device *device, const ts_sample_args *args);

#ifdef __cplusplus
}
#endif
#endif
