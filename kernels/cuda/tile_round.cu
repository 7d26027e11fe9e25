// FP8 tile states (attention.cuh, fp8_row). What a call selects from its own tiles is then what a later call would read
// from their slots, so the chunk size of a prefill does not matter (I2). A few threads a row, eight elements each.
// Bound by memory: reads d^2 activations a tile, writes d^2 bytes.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/warp_matrix.cuh"

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
    float x[8];
    load8((const A *)a.tile_states + at, x);
    const ts::fp8_row<8, kTogether> row(x);
    *(uint2 *)((ts::fp8 *)a.stored_states + at) = make_uint2(row.bits(x, 0), row.bits(x, 4));
    if (threadIdx.x % kTogether == 0)
        a.stored_scales[at / D] = row.scale;
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
