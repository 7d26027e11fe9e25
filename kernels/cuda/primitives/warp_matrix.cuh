// Products of 16 rows a warp on the matrix units, for sm_80 and newer: mma.m16n8k16, BF16 operands in shared memory,
// f32 sums. Matrices in shared memory have rows of `stride` elements, a multiple of 8 and 8 more than a multiple of 64,
// so that the eight rows a load touches lie in different banks.
//
// A thread (lane) holds of a [16, 8 n] result: sums[i] = {row lane / 4, columns 8 i + 2 (lane % 4) + {0, 1}; row
// lane / 4 + 8, the same columns}.
#ifndef TS_CUDA_WARP_MATRIX_CUH
#define TS_CUDA_WARP_MATRIX_CUH

#include "kernels/cuda/primitives/activation.cuh"
#include "kernels/cuda/primitives/matrix.cuh"

namespace ts {

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

template <bool kTransposed> __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const bf16 *row) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    if (kTransposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A: rows [row, row + 16), columns [k, k + 16) of a matrix stored by rows.
__device__ __forceinline__ void load_a(uint32_t (&r)[4], const bf16 *m, int stride, int row, int k) {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(r, m + (row + lane % 16) * stride + k + lane / 16 * 8);
}

// A: the same of the transpose of a matrix stored by rows: rows [k, k + 16), columns [row, row + 16) of it.
__device__ __forceinline__ void load_a_transposed(uint32_t (&r)[4], const bf16 *m, int stride, int row, int k) {
    const int lane = threadIdx.x % 32;
    load_matrices<true>(r, m + (k + lane % 8 + lane / 16 * 8) * stride + row + lane / 8 % 2 * 8);
}

// B, two blocks of 8 columns: rows [k, k + 16), columns [n, n + 16) of a matrix stored by rows. r[0], r[1] and r[2],
// r[3] are the blocks' operands.
__device__ __forceinline__ void load_b(uint32_t (&r)[4], const bf16 *m, int stride, int k, int n) {
    const int lane = threadIdx.x % 32;
    load_matrices<true>(r, m + (k + lane % 16) * stride + n + lane / 16 * 8);
}

// B: the same of the transpose: rows [n, n + 16), columns [k, k + 16) of the matrix as stored.
__device__ __forceinline__ void load_b_transposed(uint32_t (&r)[4], const bf16 *m, int stride, int k, int n) {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(r, m + (n + lane % 8 + lane / 16 * 8) * stride + k + lane / 8 % 2 * 8);
}

// Eight neighbours as they stand in memory.
__device__ __forceinline__ uint4 load_raw(const bf16 *p) {
    return __ldg(reinterpret_cast<const uint4 *>(p));
}

__device__ __forceinline__ void store_packed(bf16 *p, const float (&x)[8]) {
    *reinterpret_cast<uint4 *>(p) = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

constexpr float kLog2E = 1.44269504088896341f;

// Eq. (1), to f32 rounding of the exponent: for results that are rounded to BF16.
__device__ __forceinline__ float elu1_fast(float x) {
    return x > 0.0f ? x + 1.0f : exp2_fast(x * kLog2E);
}

// 16 bytes from device to shared memory, without a register between.
__device__ __forceinline__ void copy_async(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from)
                 : "memory");
}

// The same; n_bytes of 16, zero after them.
__device__ __forceinline__ void copy_async(void *to, const void *from, int n_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(n_bytes)
                 : "memory");
}

} // namespace ts
#endif
