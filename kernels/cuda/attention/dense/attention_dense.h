// Prefill attention in dense form on CUDA: eqs. (1) to (7), the recurrence of (8), and (9), from projections to
// outputs.
//
//     ts_cuda_attention_dense_plan plan;
//     TS_TRY(ts_cuda_attention_dense_plan_create(&plan));               // once per device; waits for nothing
//     size_t n_bytes = ts_cuda_attention_dense_workspace(&args, &plan); // grows with the batch up to a bound
//     TS_TRY(ts_cuda_attention_dense(&args, &plan, workspace, n_bytes, stream));
//
// args->qkvg and args->y are BF16. Rows must begin at multiples of 16 bytes. Of the cache it reads and advances open_k,
// open_v, open_gate, open_c, decay_end, state, state_rest, mass and pairs; query_sum and everything of the sparse form
// are left alone. Head size 64 or 128.
//
// A row's value depends on its own sequence and on the position where the span begins, never on the rest of the batch.
#ifndef TS_CUDA_ATTENTION_DENSE_H
#define TS_CUDA_ATTENTION_DENSE_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ts_cuda_attention_dense_plan {
    int n_multiprocessors;   // of the device
    int capability;          // 90 or 80; 80 on a Hopper device forces the path that an A100 takes
    int n_clusters;          // clusters that run at a time, where the capability is 90, at head size 64
    int n_wide_clusters;     // the same at head size 128
    void *tensor_map_encode; // the driver's function, where the capability is 90
} ts_cuda_attention_dense_plan;

// What fits the current device.
ts_status ts_cuda_attention_dense_plan_create(ts_cuda_attention_dense_plan *plan);

// Bytes of device memory that a call with these arguments needs.
size_t ts_cuda_attention_dense_workspace(const ts_attention_args *args, const ts_cuda_attention_dense_plan *plan);

// Bytes that no call within the limits needs more of.
size_t ts_cuda_attention_dense_most_workspace(const ts_run_limits *limits, const ts_cuda_attention_dense_plan *plan);

// `workspace` is aligned to 256 bytes and free again once the stream has passed this call. `stream` is a cudaStream_t.
ts_status ts_cuda_attention_dense(const ts_attention_args *args, const ts_cuda_attention_dense_plan *plan,
                                  void *workspace, size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif
#endif
