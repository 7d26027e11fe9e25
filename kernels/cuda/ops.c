#include "kernels/cuda/attention/attention.h"

// Attention's scratch holds what tile_importance and tile_prune need, too.
static size_t scratch_bytes(const ts_device *device, const ts_run_limits *limits) {
    const size_t attention = ts_cuda_attention_scratch_bytes(device, limits);
    const size_t converted = (size_t)limits->weight_elements * ts_dtype_bytes(device->compute_dtype);
    return attention > converted ? attention : converted;
}

const ts_ops ts_cuda_ops = {
    .name = "cuda",
    .scratch_bytes = scratch_bytes,
    .embed = ts_cuda_embed,
    .rms_norm = ts_cuda_rms_norm,
    .linear = ts_cuda_linear,
    .fuses_norm = ts_cuda_linear_fuses_norm,
    .swiglu = ts_cuda_swiglu,
    .gather_rows = ts_cuda_gather_rows,
    .tile_importance = ts_cuda_tile_importance,
    .tile_prune = ts_cuda_tile_prune,
    .attention = ts_cuda_attention_forward,
    .cross_entropy = ts_cuda_cross_entropy,
    .sample = ts_cuda_sample,
};
