// y = activation(x w^T + bias) for few rows of x, on sm_90a: weights are the rows of a product, tokens its columns, so
// that 8 tokens or 128 are one instruction each and every row's terms are added in the same order.
//
// K is cut into 1 or 4 parts of their own sums, which are added as (0 + 1) + (2 + 3) whoever has them. A block has 64
// rows of w, a tile of tokens and kOwn neighbouring parts; the others are with other blocks of its cluster, which
// exchange their sums. One warp asks for w, which no kernel before writes, before the kernel in front has ended, and
// has the weights of the next product brought into L2, since memory is idle while products read L2; another warp asks
// for x, once the kernel in front has ended.
//
// Bound by what L2 gives a multiprocessor: a block reads its rows of w and of x, for its parts.
#ifndef TS_CUDA_LINEAR_FEW_KERNEL_CUH
#define TS_CUDA_LINEAR_FEW_KERNEL_CUH

#include "kernels/cuda/primitives/activation.cuh"
#include "kernels/cuda/primitives/dependent_launch.cuh"
#include "kernels/cuda/primitives/tensor_copy.cuh"

namespace ts {

constexpr int kFewRows = 64;   // of w, a block
constexpr int kFewDepth = 128; // of K, a step: two panels
constexpr int kFewStages = 16; // at most, of w and of x
constexpr int kFewWarps = 4;   // that multiply; and one each for w and x
constexpr int kFewThreads = 32 * (kFewWarps + 2);
constexpr int kFewMostParts = 4;
constexpr int kFewWeightBytes = kFewRows * 2 * kPanelRowBytes; // of a stage
constexpr int kFewBarrierBytes = 1024;                         // before the stages

struct FewMaps {
    CUtensorMap w, x, y;
};

struct FewArgs {
    const bf16 *bias; // [n] or NULL
    int n, n_steps;   // rows of w; steps of K
    int n_parts;      // of K
    int cluster_size; // n_parts / kOwn
    int w_stages, x_stages;
    bool gelu;
    const unsigned char *next_w; // to be brought into L2
    uint32_t next_bytes;         // of it, at every step: a multiple of 16
    int64_t next_total;
};

__host__ __device__ constexpr int few_token_bytes(int tokens) {
    return tokens * 2 * kPanelRowBytes;
}

__device__ __forceinline__ void cluster_sync_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Into L2 alone.
__device__ __forceinline__ void prefetch_bulk(const void *from, uint32_t n_bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(n_bytes) : "memory");
}

#define TS_FEW_4(c, j)  "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define TS_FEW_16(c, j) TS_FEW_4(c, j), TS_FEW_4(c, j + 1), TS_FEW_4(c, j + 2), TS_FEW_4(c, j + 3)

// c [64, tokens] += w x^T for 16 of K: both panels as they lie.
template <int kTokens> struct few_product;
template <> struct few_product<8> {
    static __device__ __forceinline__ void add(float (&c)[1][4], uint64_t w, uint64_t x, int accumulate) {
#if TS_HAS_WGMMA
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n}\n"
                     : TS_FEW_4(c, 0)
                     : "l"(w), "l"(x), "r"(accumulate));
#endif
    }
};
template <> struct few_product<16> {
    static __device__ __forceinline__ void add(float (&c)[2][4], uint64_t w, uint64_t x, int accumulate) {
#if TS_HAS_WGMMA
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, "
                     "p, 1, 1, 0, 0;\n}\n"
                     : TS_FEW_4(c, 0), TS_FEW_4(c, 1)
                     : "l"(w), "l"(x), "r"(accumulate));
#endif
    }
};
template <> struct few_product<32> {
    static __device__ __forceinline__ void add(float (&c)[4][4], uint64_t w, uint64_t x, int accumulate) {
#if TS_HAS_WGMMA
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
                     "%10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}\n"
                     : TS_FEW_16(c, 0)
                     : "l"(w), "l"(x), "r"(accumulate));
#endif
    }
};
template <> struct few_product<64> {
    static __device__ __forceinline__ void add(float (&c)[8][4], uint64_t w, uint64_t x, int accumulate) {
#if TS_HAS_WGMMA
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
                     "%10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, "
                     "%29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}\n"
                     : TS_FEW_16(c, 0), TS_FEW_16(c, 4)
                     : "l"(w), "l"(x), "r"(accumulate));
#endif
    }
};
template <> struct few_product<128> {
    static __device__ __forceinline__ void add(float (&c)[16][4], uint64_t w, uint64_t x, int accumulate) {
#if TS_HAS_WGMMA
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
                     "%10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, "
                     "%29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, "
                     "1, 1, 0, 0;\n}\n"
                     : TS_FEW_16(c, 0), TS_FEW_16(c, 4), TS_FEW_16(c, 8), TS_FEW_16(c, 12)
                     : "l"(w), "l"(x), "r"(accumulate));
#endif
    }
};

__device__ __forceinline__ float4 as_floats(uint4 u) {
    return make_float4(__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), __uint_as_float(u.w));
}

__device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// 16-byte unit of a token's row of y: in the swizzle of panels where rows are as long as theirs.
__device__ __forceinline__ uint32_t few_unit(uint32_t out, int row_bytes, int token, int unit) {
    return row_bytes == kPanelRowBytes ? panel_unit(out, token, unit) : out + token * row_bytes + unit * 16;
}

// Of the warps that multiply.
__device__ __forceinline__ void few_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(32 * kFewWarps) : "memory");
}

// What other threads, the copy engine and the cluster's blocks may use once they have met.
__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
}

__device__ __forceinline__ void few_meet(int cluster_size) {
    __syncwarp();
    if (cluster_size > 1)
        cluster_sync();
    else
        __syncthreads();
}

// Where a ring stands.
struct few_place {
    int stage = 0, round = 0;
    __device__ __forceinline__ void next(int n_stages) {
        if (++stage == n_stages)
            stage = 0, round++;
    }
};

// Asks for both panels of a step, of a whole warp, once its stage is free.
__device__ __forceinline__ void few_load(uint32_t panels, uint32_t full, uint32_t empty, few_place at, int n_bytes,
                                         const CUtensorMap &map, int step, int row) {
    if (at.round > 0)
        wait_phase(empty + 8 * at.stage, (at.round - 1) & 1);
    if (elect()) {
        const uint32_t to = panels + at.stage * n_bytes, barrier = full + 8 * at.stage;
        expect_bytes(barrier, n_bytes);
        tensor_load(to, map, step * kFewDepth, row, barrier);
        tensor_load(to + n_bytes / 2, map, step * kFewDepth + kPanelCols, row, barrier);
    }
}

// In BF16's precision.
__device__ __forceinline__ float gelu_tanh_fast(float x) {
    constexpr float c = -1.5957691216057308f * 1.4426950408889634f;
    return __fdividef(x, 1.0f + exp2_fast(x * (c + c * 0.044715f * x * x)));
}

// Two numbers of tokens t and t + 1 for rows r and r + 8 of w, finished, as BF16 to out [tokens, 16 or more rows] in
// shared memory: `to` is this lane's row of a matrix.
__device__ __forceinline__ void few_finish(const FewArgs &a, float4 c, int row, uint32_t to) {
    const int lane = lane_id();
    float b0 = 0, b1 = 0;
    if (a.bias) {
        const int r = row + lane / 4;
        b0 = r < a.n ? load(a.bias + r) : 0.0f;
        b1 = r + 8 < a.n ? load(a.bias + r + 8) : 0.0f;
    }
    c.x += b0, c.y += b0, c.z += b1, c.w += b1;
    if (a.gelu)
        c = make_float4(gelu_tanh_fast(c.x), gelu_tanh_fast(c.y), gelu_tanh_fast(c.z), gelu_tanh_fast(c.w));
#if TS_HAS_WGMMA
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(pack_bf16(c.x, c.y)),
                 "r"(pack_bf16(c.z, c.w))
                 : "memory");
#endif
}

template <int kTokens, int kOwn>
__global__ void __launch_bounds__(kFewThreads, 1) linear_few(const __grid_constant__ FewMaps maps, const FewArgs a) {
#if TS_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char few_shared[];
    constexpr int kBlocks = kTokens / 8; // of 8 tokens
    constexpr int kTokenBytes = few_token_bytes(kTokens);
    const uint32_t shared = shared_address(few_shared);
    const uint32_t w_full = shared, w_empty = w_full + 8 * kFewStages, x_full = w_empty + 8 * kFewStages,
                   x_empty = x_full + 8 * kFewStages, all_sums = x_empty + 8 * kFewStages;
    const uint32_t w_panels = shared + kFewBarrierBytes, x_panels = w_panels + a.w_stages * kFewWeightBytes;
    const int warp = threadIdx.x / 32, lane = lane_id();
    const int rank = a.cluster_size > 1 ? cluster_rank() : 0;
    const int first_row = (int)blockIdx.x / a.cluster_size * kFewRows;
    const int first_token = blockIdx.y * kTokens;
    const int first_step = rank * kOwn * a.n_steps / a.n_parts;
    const int n_steps = (rank + 1) * kOwn * a.n_steps / a.n_parts - first_step;
    if (warp == kFewWarps) {
        // Its barriers are this warp's own: the first weights are asked for before the blocks have met.
        if (lane < a.w_stages) {
            init_barrier(w_full + 8 * lane, 1);
            init_barrier(w_empty + 8 * lane, kFewWarps);
        }
        barriers_made();
        few_place at;
        for (int i = 0; i < n_steps; i++, at.next(a.w_stages)) {
            if (i == a.w_stages)
                few_meet(a.cluster_size);
            const int64_t next = ((blockIdx.y * gridDim.x + blockIdx.x) * (int64_t)n_steps + i) * a.next_bytes;
            if (next < a.next_total && elect())
                prefetch_bulk(a.next_w + next, (uint32_t)min((int64_t)a.next_bytes, a.next_total - next));
            few_load(w_panels, w_full, w_empty, at, kFewWeightBytes, maps.w, first_step + i, first_row);
        }
        if (n_steps <= a.w_stages)
            few_meet(a.cluster_size);
    } else if (warp == kFewWarps + 1) {
        if (lane < a.x_stages) {
            init_barrier(x_full + 8 * lane, 1);
            init_barrier(x_empty + 8 * lane, kFewWarps);
        }
        if (lane == 0)
            init_barrier(all_sums, 1);
        barriers_made();
        if (lane == 0)
            prefetch_map(maps.x);
        else if (lane == 1)
            prefetch_map(maps.y);
        few_meet(a.cluster_size);
        if (lane == 0)
            expect_bytes(all_sums, kTokens * 256);
        follow_front();
        few_place at;
        for (int i = 0; i < n_steps; i++, at.next(a.x_stages))
            few_load(x_panels, x_full, x_empty, at, kTokenBytes, maps.x, first_step + i, first_token);
    } else {
        float c[kBlocks][4], pair[kBlocks][4], sum[kBlocks][4]; // of a part, of two, of those before
        few_place w_at, x_at;
        int i = 0, last_w = 0, last_x = 0;
        few_meet(a.cluster_size);
#    pragma unroll
        for (int q = 0; q < kOwn; q++) {
            const int end = (rank * kOwn + q + 1) * a.n_steps / a.n_parts - first_step;
            for (int continues = 0; i < end; i++, continues = 1) {
                wait_phase(w_full + 8 * w_at.stage, w_at.round & 1);
                wait_phase(x_full + 8 * x_at.stage, x_at.round & 1);
                const uint64_t w = panel_descriptor(w_panels + w_at.stage * kFewWeightBytes);
                const uint64_t x = panel_descriptor(x_panels + x_at.stage * kTokenBytes);
                group_begin();
#    pragma unroll
                for (int k = 0; k < kFewDepth / 16; k++)
                    few_product<kTokens>::add(c, panel_further(w, k / 4 * kFewWeightBytes / 2 + k % 4 * 32),
                                              panel_further(x, k / 4 * kTokenBytes / 2 + k % 4 * 32), continues + k);
                group_commit();
                // The products before these have read their stages.
                group_wait<1>();
                if (i > 0 && lane == 0) {
                    arrive(w_empty + 8 * last_w);
                    arrive(x_empty + 8 * last_x);
                }
                last_w = w_at.stage, last_x = x_at.stage;
                w_at.next(a.w_stages), x_at.next(a.x_stages);
            }
            group_wait<0>();
#    pragma unroll
            for (int j = 0; j < kBlocks; j++) {
                group_hold(c[j]);
#    pragma unroll
                for (int e = 0; e < 4; e++) {
                    pair[j][e] = q % 2 ? pair[j][e] + c[j][e] : c[j][e];
                    if (q % 2 || q + 1 == kOwn)
                        sum[j][e] = q > 1 ? sum[j][e] + pair[j][e] : pair[j][e];
                }
            }
        }
        // Everything that was asked for has come and been read: the stages hold sums and y now.
        const int own_warps = kFewWarps / a.cluster_size;
        const int row_bytes = 32 * own_warps; // of y
        uint32_t out = x_panels;
        if (a.cluster_size == 1) {
            few_sync();
#    pragma unroll
            for (int j = 0; j < kBlocks; j++)
                few_finish(a, make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]), first_row + 16 * warp,
                           few_unit(out, row_bytes, 8 * j + lane % 8, 2 * warp + lane / 8 % 2));
        } else {
            // The sums of rows 16 * warp ... go to the block that finishes those.
            const int owner = warp / own_warps;
            const uint32_t at = w_panels + ((rank * own_warps + warp % own_warps) * kBlocks * 32 + lane) * 16;
            const uint32_t to = in_block(at, owner), counter = in_block(all_sums, owner);
            cluster_sync_relaxed(); // the loading warps have ended: those that multiply are all that are left
#    pragma unroll
            for (int j = 0; j < kBlocks; j++)
                send(to + j * 512, __float_as_uint(sum[j][0]), __float_as_uint(sum[j][1]), __float_as_uint(sum[j][2]),
                     __float_as_uint(sum[j][3]), counter);
            out = w_panels + kTokens * 256;
            wait_phase(all_sums, 0);
            for (int item = warp; item < own_warps * kBlocks; item += kFewWarps) {
                float4 parts[kFewMostParts] = {};
#    pragma unroll
                for (int p = 0; p < kFewMostParts; p++)
                    if (p < a.cluster_size)
                        parts[p] =
                            as_floats(load_shared16(w_panels + ((p * own_warps * kBlocks + item) * 32 + lane) * 16));
                float4 total = plus(parts[0], parts[1]);
                if (a.cluster_size == kFewMostParts)
                    total = plus(total, plus(parts[2], parts[3]));
                const int group = item / kBlocks, token = item % kBlocks * 8 + lane % 8;
                few_finish(a, total, first_row + 16 * (rank * own_warps + group),
                           few_unit(out, row_bytes, token, 2 * group + lane / 8 % 2));
            }
        }
        publish_to_wgmma();
        few_sync();
        if (threadIdx.x == 0) {
            tensor_store(maps.y, first_row + 16 * rank * own_warps, first_token, out);
            tensor_store_wait();
        }
    }
#endif
}

} // namespace ts
#endif
