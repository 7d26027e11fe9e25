// Warp and warpgroup matrix products over shared-memory panels, for sm_80 (mma.sync) and sm_90a (wgmma).
//
// A panel holds rows of 64 bf16 (128 bytes) in the 128-byte swizzle: 16-byte unit u of row r lies at unit u ^ (r % 8).
// It starts at a multiple of 1024 bytes. Fragments are those of mma.m16n8k16; a wgmma accumulator holds the same values
// per warp.
#ifndef TS_CUDA_MATRIX_CUH
#define TS_CUDA_MATRIX_CUH

#include <cuda_bf16.h>
#include <stdint.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#    define TS_HAS_WGMMA 1
#else
#    define TS_HAS_WGMMA 0
#endif

namespace ts {

constexpr int kPanelCols = 64;
constexpr int kPanelRowBytes = 128;
constexpr uint32_t kOnes = 0x3f803f80u; // bf16x2 {1, 1}

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// Address of 16-byte unit `unit` of row `row`.
__device__ __forceinline__ uint32_t panel_unit(uint32_t panel, int row, int unit) {
    return panel + row * kPanelRowBytes + ((unit ^ (row & 7)) << 4);
}

// 16 bytes to shared memory; zeros where !valid.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_async(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Ordinary shared-memory writes of this thread become visible to wgmma and the copy engine, after the next barrier.
__device__ __forceinline__ void publish_to_wgmma() {
#if TS_HAS_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ uint4 load_shared16(uint32_t from) {
    uint4 r;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(from)
                 : "memory");
    return r;
}

__device__ __forceinline__ uint32_t load_shared4(uint32_t from) {
    uint32_t r;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(from) : "memory");
    return r;
}

__device__ __forceinline__ void store_shared16(uint32_t to, uint4 r) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r.x), "r"(r.y), "r"(r.z), "r"(r.w)
                 : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

// Four 8 x 8 matrices, the counterpart of load_matrices.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
#if TS_HAS_WGMMA
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
#else
    const uint32_t r[4] = {r0, r1, r2, r3};
    const int lane = threadIdx.x & 31;
#    pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t row = __shfl_sync(~0u, to, 8 * i + lane / 4);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + 4 * (lane % 4)), "r"(r[i]) : "memory");
    }
#endif
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ float low_of(uint32_t pair) {
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float high_of(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
    __nv_bfloat162 r = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&a), *reinterpret_cast<__nv_bfloat162 *>(&b));
    return *reinterpret_cast<uint32_t *>(&r);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// phi(x) = x + 1 where x > 0, else e^x; both at once as max(x + 1, e^min(x, 0)), for two bf16.
__device__ __forceinline__ uint32_t feature_map(uint32_t pair) {
    constexpr float log2_e = 1.4426950408889634f;
    const __nv_bfloat162 x = *reinterpret_cast<__nv_bfloat162 *>(&pair);
    const __nv_bfloat162 zero = __nv_bfloat162{__ushort_as_bfloat16(0), __ushort_as_bfloat16(0)};
    const __nv_bfloat162 one = __nv_bfloat162{__ushort_as_bfloat16(0x3f80), __ushort_as_bfloat16(0x3f80)};
    __nv_bfloat162 below = __hmin2(x, zero), above = __hadd2(x, one);
    const uint32_t b = *reinterpret_cast<uint32_t *>(&below);
    uint32_t e = pack_bf16(exp2_fast(low_of(b) * log2_e), exp2_fast(high_of(b) * log2_e));
    const __nv_bfloat162 r = __hmax2_nan(above, *reinterpret_cast<__nv_bfloat162 *>(&e));
    return *reinterpret_cast<const uint32_t *>(&r);
}

// The same times 2^log_scale; scale is that number in bf16, twice.
__device__ __forceinline__ uint32_t feature_map(uint32_t pair, float log_scale, uint32_t scale) {
    constexpr float log2_e = 1.4426950408889634f;
    const __nv_bfloat162 x = *reinterpret_cast<__nv_bfloat162 *>(&pair);
    const __nv_bfloat162 zero = __nv_bfloat162{__ushort_as_bfloat16(0), __ushort_as_bfloat16(0)};
    const __nv_bfloat162 by = *reinterpret_cast<__nv_bfloat162 *>(&scale);
    __nv_bfloat162 below = __hmin2(x, zero), above = __hfma2(x, by, by);
    const uint32_t b = *reinterpret_cast<uint32_t *>(&below);
    uint32_t e = pack_bf16(exp2_fast(low_of(b) * log2_e + log_scale), exp2_fast(high_of(b) * log2_e + log_scale));
    const __nv_bfloat162 r = __hmax2_nan(above, *reinterpret_cast<__nv_bfloat162 *>(&e));
    return *reinterpret_cast<const uint32_t *>(&r);
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An m16 (of the warp) x n64 accumulator: [n8 block][fragment].
using Accumulator = float[8][4];

// c += a b^T for one k16 step: the warp's a [16, 16] against rows 0 .. 8 * n_blocks of the panel, columns 16 * step ...
__device__ __forceinline__ void warp_product_rows(Accumulator &c, const uint32_t (&a)[4], uint32_t panel, int step,
                                                  int n_blocks) {
    const int lane = threadIdx.x & 31;
    const int row = (lane & 7) + ((lane >> 4) << 3), unit = 2 * step + ((lane >> 3) & 1);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        if (j < n_blocks) {
            uint32_t b[4];
            load_matrices(b, panel_unit(panel, 8 * j + row, unit));
            mma(c[j], a, b[0], b[1]);
            mma(c[j + 1], a, b[2], b[3]);
        }
    }
}

// c += a b for one k16 step: b is rows 16 * step ... of the panel, all 64 columns.
__device__ __forceinline__ void warp_product_columns(Accumulator &c, const uint32_t (&a)[4], uint32_t panel, int step) {
    const int lane = threadIdx.x & 31;
    const int row = 16 * step + (lane & 15), unit = lane >> 4;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, panel_unit(panel, row, j + unit));
        mma(c[j], a, b[0], b[1]);
        mma(c[j + 1], a, b[2], b[3]);
    }
}

__device__ __forceinline__ void group_begin() {
#if TS_HAS_WGMMA
    __syncwarp(); // what follows is executed by whole warps
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void group_commit() {
#if TS_HAS_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int N> __device__ __forceinline__ void group_wait() {
#if TS_HAS_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// Tells the compiler that asynchronous products may write these registers until here.
__device__ __forceinline__ void group_hold(Accumulator &c) {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            asm volatile("" : "+f"(c[j][i])::"memory");
}

__device__ __forceinline__ void group_hold(float (&c)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("" : "+f"(c[i])::"memory");
}

// The warp's [16, 64] accumulator, its rows scaled, as bf16 to rows first_row ... of a panel.
__device__ __forceinline__ void store_accumulator(uint32_t panel, int first_row, const Accumulator &c, float scale0,
                                                  float scale1, int lane = threadIdx.x & 31) {
    const int row = first_row + (lane & 15);
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        store_matrices(panel_unit(panel, row, j + (lane >> 4)), pack_bf16(c[j][0] * scale0, c[j][1] * scale0),
                       pack_bf16(c[j][2] * scale1, c[j][3] * scale1),
                       pack_bf16(c[j + 1][0] * scale0, c[j + 1][1] * scale0),
                       pack_bf16(c[j + 1][2] * scale1, c[j + 1][3] * scale1));
}

// Descriptor of a panel in the 128-byte swizzle, 8-row groups 1024 bytes apart.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t address) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// The descriptor of the panel `bytes` further.
__device__ __forceinline__ uint64_t panel_further(uint64_t descriptor, uint32_t bytes) {
    return descriptor + (bytes >> 4);
}

// The warpgroup's a [64, 16] from registers times a panel; columns = 1: b is [k16, n64] with k along rows, else b^T is
// [n64, k16].
template <int columns>
__device__ __forceinline__ void group_product(Accumulator &c, const uint32_t (&a)[4], uint64_t b, int accumulate) {
#if TS_HAS_WGMMA
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"
                 "}\n"
                 : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
                   "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
                   "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
                   "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
                   "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
                   "+f"(c[7][2]), "+f"(c[7][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(columns));
#endif
}

// Of a panel with k along rows, and eight columns more: those of 16 rows `beside`, at a higher address.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t address, uint32_t beside) {
    return panel_descriptor(address) - ((uint64_t)1 << 16) + ((uint64_t)((beside - address) >> 4) << 16);
}

// The panel 16 * step rows further, the columns more from the same place.
__device__ __forceinline__ uint64_t panel_step(uint64_t descriptor, int step) {
    return descriptor + 128 * step - ((uint64_t)(128 * step) << 16);
}

// group_product<1> with the eight columns more, of which `sums` has the products.
__device__ __forceinline__ void group_product(Accumulator &c, float (&sums)[4], const uint32_t (&a)[4], uint64_t b,
                                              int accumulate) {
#if TS_HAS_WGMMA
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %41, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35}, "
                 "{%36, %37, %38, %39}, %40, p, 1, 1, 1;\n"
                 "}\n"
                 : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
                   "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
                   "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
                   "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
                   "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
                   "+f"(c[7][2]), "+f"(c[7][3]), "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
#endif
}

// Descriptor of a row of 16 bf16 as the first of eight columns of b; the others are what lies behind it in memory.
__device__ __forceinline__ uint64_t column_descriptor(uint32_t address) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)8 << 32;
}

// The warpgroup's a [64, 16] from registers times 8 such columns.
__device__ __forceinline__ void group_product_columns(float (&c)[4], const uint32_t (&a)[4], uint64_t b,
                                                      int accumulate) {
#if TS_HAS_WGMMA
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %9, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0;\n"
                 "}\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
#endif
}

// c += a^T b, both from panels with k along rows: a is [k16, m64], b [k16, n64].
__device__ __forceinline__ void group_product_transposed(Accumulator &c, uint64_t a, uint64_t b, int accumulate) {
#if TS_HAS_WGMMA
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 1, 1;\n"
                 "}\n"
                 : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
                   "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
                   "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
                   "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
                   "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
                   "+f"(c[7][2]), "+f"(c[7][3])
                 : "l"(a), "l"(b), "r"(accumulate));
#endif
}

// The same times 8 columns of column_descriptor.
__device__ __forceinline__ void group_product_transposed(float (&c)[4], uint64_t a, uint64_t b, int accumulate) {
#if TS_HAS_WGMMA
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %6, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 1, 0;\n"
                 "}\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "l"(a), "l"(b), "r"(accumulate));
#endif
}

} // namespace ts
#endif
