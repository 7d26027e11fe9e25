// Device side of attention.h: where things lie.
#ifndef TS_CUDA_ATTENTION_CUH
#define TS_CUDA_ATTENTION_CUH

#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/primitives/activation.cuh"
#include "kernels/cuda/primitives/dependent_launch.cuh"
#include "kernels/cuda/primitives/warp_matrix.cuh"

#include <cuda_fp8.h>
#include <float.h>
#include <type_traits>

namespace ts {

// A kernel that begins with follow_front, of the batch and what else it takes. An error is left as the last one.
template <typename... P, typename... More>
void launch_pass(cudaStream_t stream, const ts_cuda_attention *a, void (*kernel)(P...), dim3 grid, unsigned threads,
                 size_t shared_bytes, const More &...more) {
    (void)launch_following(a->capability == 90, kernel, grid, threads, shared_bytes, stream, *a, more...);
}

// What FP8 tile states are made of.
struct fp8 {
    __nv_fp8_storage_t bits;
};

__device__ __forceinline__ float from_fp8(__nv_fp8_storage_t bits) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
}

// A row of a tile's state as FP8: in units of its largest magnitude over 448, the largest FP8 number (e4m3). kTogether
// neighbouring threads have n elements each.
template <int n, int kTogether> struct fp8_row {
    float scale, inverse;

    __device__ __forceinline__ explicit fp8_row(const float (&x)[n]) {
        float largest = 0;
#pragma unroll
        for (int i = 0; i < n; i++)
            largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
        for (int step = kTogether / 2; step > 0; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
        scale = largest / TS_FP8_E4M3_MAX;
        inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
    }
    // x[first] .. x[first + 3].
    __device__ __forceinline__ uint32_t bits(const float (&x)[n], int first) const {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
            word |= (uint32_t)__nv_cvt_float_to_fp8(x[first + i] * inverse, __NV_SATFINITE, __NV_E4M3) << 8 * i;
        return word;
    }
};

__device__ __forceinline__ void load8(const float *p, float (&x)[8]) {
    const float4 low = load4(p), high = load4(p + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void load8(const bf16 *p, float (&x)[8]) {
    unpack(*(const uint4 *)p, x);
}

// Four states of a matrix of rows of D, from `index` on.
template <typename S, int D>
__device__ __forceinline__ float4 state4(const void *states, const float *scales, int64_t at, int index) {
    if constexpr (std::is_same<S, fp8>::value) {
        const uchar4 bits = *(const uchar4 *)((const fp8 *)states + at * D * D + index);
        const float scale = scales[at * D + index / D];
        return make_float4(scale * from_fp8(bits.x), scale * from_fp8(bits.y), scale * from_fp8(bits.z),
                           scale * from_fp8(bits.w));
    } else {
        return load4((const S *)states + at * D * D + index);
    }
}

// Eight FP8 states of one row.
__device__ __forceinline__ void unpack(const uint2 &raw, float scale, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = scale * from_fp8((__nv_fp8_storage_t)((i < 4 ? raw.x : raw.y) >> i % 4 * 8));
}

// The dtype in which a tile's state is staged: the slots', but for FP8, to which it is rounded from there.
template <typename A, typename S> struct raw_state { using type = S; };
template <typename A> struct raw_state<A, fp8> { using type = A; };

// Calls launch<A, S, D>(stream, a): A activations, S tile states, D head size.
#define TS_ATTENTION_DISPATCH_SLOTS(launch, A, D, stream, a)                                                           \
    do {                                                                                                               \
        if (!(a)->cache.is_sparse || (a)->cache.slot_dtype == TS_F32)                                                  \
            launch<A, float, D>(stream, a);                                                                            \
        else if ((a)->cache.slot_dtype == TS_BF16)                                                                     \
            launch<A, ts::bf16, D>(stream, a);                                                                         \
        else                                                                                                           \
            launch<A, ts::fp8, D>(stream, a);                                                                          \
    } while (0)
#define TS_ATTENTION_DISPATCH(launch, stream, a)                                                                       \
    do {                                                                                                               \
        const bool d64 = (a)->cache.head_dim == 64;                                                                    \
        if ((a)->qkvg.dtype == TS_F32 && d64)                                                                          \
            TS_ATTENTION_DISPATCH_SLOTS(launch, float, 64, stream, a);                                                 \
        else if ((a)->qkvg.dtype == TS_F32)                                                                            \
            TS_ATTENTION_DISPATCH_SLOTS(launch, float, 128, stream, a);                                                \
        else if (d64)                                                                                                  \
            TS_ATTENTION_DISPATCH_SLOTS(launch, ts::bf16, 64, stream, a);                                              \
        else                                                                                                           \
            TS_ATTENTION_DISPATCH_SLOTS(launch, ts::bf16, 128, stream, a);                                             \
    } while (0)

// Eq. (1) as the activations' precision asks for it.
template <typename A> __device__ __forceinline__ float phi(float x) {
    return sizeof(A) == 4 ? elu1(x) : elu1_fast(x);
}

// One row of qkvg.
template <typename A> struct token_row { const A *q, *k, *v, *key_gate, *decay_gate; };

template <typename A, int D> __device__ __forceinline__ token_row<A> row_of(const ts_cuda_attention &a, int64_t row) {
    const int n_heads = a.cache.n_heads, n_kv = a.cache.n_kv_heads;
    const A *q = (const A *)a.qkvg.data + row * a.qkvg.stride;
    const A *k = q + n_heads * D, *v = k + n_kv * D, *gates = v + n_kv * D;
    return {q, k, v, gates, gates + n_kv};
}

// Index of a KV head of a sequence in the cache's per-sequence arrays.
__device__ __forceinline__ int64_t head_of(const ts_cuda_attention &a, int32_t sequence, int j) {
    return (int64_t)sequence * a.cache.n_kv_heads + j;
}

// Index of a slot in the cache's per-page arrays.
__device__ __forceinline__ int64_t page_of(const ts_cuda_attention &a, int32_t sequence, int j, int64_t slot) {
    return (int64_t)j * a.cache.n_pages + a.cache.page_table[sequence * a.cache.page_table_stride + slot];
}

// Where S_t of a tile that completes in the batch is made: page, or ~index in tile_states.
__device__ __forceinline__ int64_t tile_place(const ts_cuda_attention &a, int32_t span, int32_t sequence,
                                              int64_t closed, int j) {
    if (a.all_in_slots)
        return page_of(a, sequence, j, a.cache.n_held[head_of(a, sequence, j)] + closed - a.pieces.closed_begin[span]);
    return a.tile_places ? a.tile_places[j * a.pieces.n_closed + closed] : ~(closed * a.cache.n_kv_heads + j);
}

// Indices of span s in what is known of the tiles it held before the batch, and of their ranges.
__device__ __forceinline__ int64_t held_at(const ts_cuda_attention &a, int s, int j) {
    return j * a.pieces.n_held + a.pieces.held_begin[s];
}
__device__ __forceinline__ int64_t held_ranges_at(const ts_cuda_attention &a, int s, int j) {
    return j * a.pieces.n_held_ranges + a.pieces.held_begin[s] / TS_CUDA_GROUP + s;
}

// The event from which a tile is no longer held; INT32_MAX: it stays. NULL: all do.
__device__ __forceinline__ int32_t death_at(const int32_t *deaths, int64_t at) {
    return deaths ? deaths[at] : INT32_MAX;
}

// Tile of a span's event 0.
__device__ __forceinline__ int64_t first_tile_of(const ts_cuda_attention &a, int32_t span) {
    return a.spans[span].position / a.cache.tile_size;
}

// Rows of keys and values of the tile a piece belongs to, from its first token: where they were projected, or the open
// buffers, to which the tiles pass has appended the piece.
template <typename A, int D> struct tile_keys {
    const A *k, *v;
    int64_t stride;
    const float *gate;
    const A *open_k, *open_v; // NULL: k and v are meant
    const float *open_gate;   // of BF16
    const double *c;

    __device__ tile_keys(const ts_cuda_attention &a, const ts_cuda_piece &piece, int j) {
        const token_row<A> row = row_of<A, D>(a, piece.row);
        const int64_t at = head_of(a, piece.sequence, j) * a.cache.tile_size;
        const bool is_open = piece.first > 0;
        k = row.k + j * D;
        v = row.v + j * D;
        stride = a.qkvg.stride;
        gate = a.gate + j * a.n_rows + piece.row;
        open_k = is_open ? (const A *)a.cache.open_k + at * D : NULL;
        open_v = is_open ? (const A *)a.cache.open_v + at * D : NULL;
        open_gate = is_open ? a.cache.open_gate + at : NULL;
        c = is_open ? a.cache.open_c + at : a.c + j * a.n_rows + piece.row;
    }
    // k^ at token m, elements e .. e + 3.
    __device__ float4 key(int m, int e) const {
        if (open_k && sizeof(A) == 4)
            return load4(open_k + m * D + e);
        const float4 x = open_k ? load4(open_k + m * D + e) : load4(k + m * stride + e);
        const float g = open_k ? open_gate[m] : gate[m];
        return make_float4(g * phi<A>(x.x), g * phi<A>(x.y), g * phi<A>(x.z), g * phi<A>(x.w));
    }
    __device__ float4 value(int m, int e) const {
        return open_v ? load4(open_v + m * D + e) : load4(v + m * stride + e);
    }
};

// This thread's rank among those of the block with `mine`, and their number.
template <int kWarps> __device__ __forceinline__ int rank_in_block(bool mine, int *counts, int *total) {
    const unsigned votes = __ballot_sync(~0u, mine);
    const int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        counts[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << (threadIdx.x % 32)) - 1)), sum = 0;
    for (int i = 0; i < kWarps; i++) {
        before += i < warp ? counts[i] : 0;
        sum += counts[i];
    }
    *total = sum;
    return before;
}

// What the open tile keeps of a key: k^ in F32, the projection itself in BF16, with its gate beside it (ops.h).
__device__ __forceinline__ float open_key(const float *k, float gate) {
    return gate * elu1(*k);
}
__device__ __forceinline__ bf16 open_key(const bf16 *k, float gate) {
    return *k;
}

} // namespace ts
#endif
