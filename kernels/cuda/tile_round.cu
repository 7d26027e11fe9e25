// FP8 tile states: each row of S_t in units of its largest magnitude over 448, the largest FP8 number (e4m3). What a
// call selects from its own tiles is then what a later call would read from their slots, so the chunk size of a prefill
// does not matter (I2). A few threads a row, eight elements each. Bound by memory: reads d^2 activations a tile, writes
// d^2 bytes.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/warp_matrix.cuh"

#include <float.h>

namespace {

constexpr int kThreads = 256;

__device__ void load8(const float *p, float (&x)[8]) {
    const float4 low = ts::load4(p), high = ts::load4(p + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ void load8(const ts::bf16 *p, float (&x)[8]) {
    ts::unpack(ts::load_raw(p), x);
}

template <typename A, int D>
__global__ void __launch_bounds__(kThreads) round_kernel(const __grid_constant__ ts_cuda_attention a) {
    constexpr int kTogether = D / 8;
    const int64_t at = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * 8; // D * D is a multiple of what a block takes
    float x[8], largest = 0;
    load8((const A *)a.tile_states + at, x);
#pragma unroll
    for (int i = 0; i < 8; i++)
        largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
    for (int step = kTogether / 2; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float scale = largest / TS_FP8_E4M3_MAX, inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
        words[i / 4] |= (uint32_t)__nv_cvt_float_to_fp8(x[i] * inverse, __NV_SATFINITE, __NV_E4M3) << i % 4 * 8;
    *(uint2 *)((ts::fp8 *)a.stored_states + at) = make_uint2(words[0], words[1]);
    if (threadIdx.x % kTogether == 0)
        a.stored_scales[at / D] = scale;
}

template <typename A, int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    const int64_t n_blocks = a->pieces.n_closed * a->cache.n_kv_heads * (D * D / (8 * kThreads));
    round_kernel<A, D><<<(unsigned)n_blocks, kThreads, 0, stream>>>(*a);
}

} // namespace

ts_status ts_cuda_tile_round(cudaStream_t stream, const ts_cuda_attention *a) {
    if (a->pieces.n_closed == 0 || a->cache.slot_dtype != TS_FP8_E4M3)
        return TS_OK;
    const bool d64 = a->cache.head_dim == 64;
    if (a->qkvg.dtype == TS_F32)
        d64 ? launch<float, 64>(stream, a) : launch<float, 128>(stream, a);
    else
        d64 ? launch<ts::bf16, 64>(stream, a) : launch<ts::bf16, 128>(stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: FP8 states");
}
