#include "kernels/cuda/device.h"

const ts_ops ts_cuda_ops = {
    .name = "cuda",
    .embed = ts_cuda_embed,
    .rms_norm = ts_cuda_rms_norm,
    .linear = ts_cuda_linear,
    .swiglu = ts_cuda_swiglu,
    .gather_rows = ts_cuda_gather_rows,
    .tile_importance = ts_cuda_tile_importance,
    .tile_prune = ts_cuda_tile_prune,
    .attention = ts_cuda_attention_forward,
    .cross_entropy = ts_cuda_cross_entropy,
    .sample = ts_cuda_sample,
};
