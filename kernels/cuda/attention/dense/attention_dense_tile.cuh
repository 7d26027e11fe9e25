// What the kernel in clusters at head size 64 does with one tile (attention_dense_cluster.cuh): part of it copied in or
// out, its gates, its keys mapped, its state formed and sent to the blocks of the cluster, its weights masked.
#ifndef TS_CUDA_ATTENTION_DENSE_TILE_CUH
#define TS_CUDA_ATTENTION_DENSE_TILE_CUH

#include "kernels/cuda/attention/dense/attention_dense_recurrence.cuh"

namespace ts {

__device__ __forceinline__ void worker_sync(int worker) {
    asm volatile("bar.sync %0, 128;" ::"r"(worker + 1) : "memory");
}

// The rows of 64 columns of a tile that is not the span's from end to end into a panel; the others become 0.
__device__ __noinline__ void copy_part(const DenseArgs &a, const Wave &w, int rank, int column, uint32_t panel) {
    const int unit = threadIdx.x & 7;
#pragma unroll 1
    for (int row = threadIdx.x % 128 / 8; row < 64; row += 16) {
        const int n = rank * 64 + row;
        const bool valid = n >= w.begin && n < w.end;
        copy_async(panel_unit(panel, row, unit), valid ? a.qkvg + (w.row + n) * a.stride + column + 8 * unit : a.qkvg,
                   valid);
    }
    copy_commit();
}

// A warp's 16 rows of y, as the span has them.
__device__ __noinline__ void store_part(const DenseArgs &a, const Wave &w, int first, int column, uint32_t rows) {
    const int unit = threadIdx.x & 7;
#pragma unroll 1
    for (int row = (threadIdx.x & 31) / 8; row < 16; row += 4) {
        const int n = first + row;
        if (n >= w.begin && n < w.end)
            *reinterpret_cast<uint4 *>(a.y + (w.row + n) * a.y_stride + column + 8 * unit) =
                load_shared16(panel_unit(rows, row, unit));
    }
}

// Gate logits of a lane's two tokens of tile `rank` of the wave: key, decay, key, decay; key gate and decay 0 outside
// the span.
struct GateLogits {
    __nv_bfloat16 key[2], decay[2];
    bool valid[2];
};

__device__ __forceinline__ GateLogits load_logits(const DenseArgs &a, const Wave &w, int rank) {
    const int lane = threadIdx.x & 31;
    const int64_t column = (int64_t)(a.n_heads + 2 * a.n_kv_heads) * 64 + w.head;
    GateLogits g;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int n = rank * 64 + 2 * lane + i;
        g.valid[i] = n >= w.begin && n < w.end;
        const __nv_bfloat16 *from = g.valid[i] ? a.qkvg + (w.row + n) * a.stride + column : a.qkvg;
        g.key[i] = from[0];
        g.decay[i] = from[g.valid[i] ? a.n_kv_heads : 0];
    }
    return g;
}

// Eqs. (2), (3), (5) for a tile, by one warp.
__device__ __forceinline__ void store_gates(const DenseArgs &a, const GateLogits &g, Gates &gates) {
    const int lane = threadIdx.x & 31;
    float log_gate[2], decay[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        log_gate[i] = g.valid[i] ? -__log2f(1.0f + __expf(-__bfloat162float(g.key[i]))) : -INFINITY;
        decay[i] = g.valid[i] ? log_sigmoid(__bfloat162float(g.decay[i])) * a.decay_scale : 0.0f;
    }
    const DecaySums c = sum_decays(decay);
    const bool is_strong = c.all < -kMostDecay;
    *reinterpret_cast<float2 *>(&gates.log_decay[2 * lane]) = c.to;
    *reinterpret_cast<float2 *>(&gates.log_key[2 * lane]) =
        make_float2(log_gate[0] - (is_strong ? 0.0f : c.to.x), log_gate[1] - (is_strong ? 0.0f : c.to.y));
    if (lane == 0) {
        gates.decay = exp2_fast(c.all);
        gates.state_scale = is_strong ? 1.0f : exp2_fast(c.all);
        gates.is_strong = is_strong;
    }
}

// k becomes k^ in place, eq. (4), with its part of the decay.
__device__ __forceinline__ void map_tile_keys(const Gates &gates, uint32_t k, int lane, int warp) {
    const int row = 4 * warp + lane / 8;
    const uint32_t at = panel_unit(k, row, lane & 7);
    uint4 x[4];
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = load_shared16(at + i * 16 * kPanelRowBytes);
        scale[i] = gates.log_key[row + 16 * i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float by = exp2_fast(scale[i]);
        const uint32_t both = pack_bf16(by, by);
        x[i].x = feature_map(x[i].x, scale[i], both);
        x[i].y = feature_map(x[i].y, scale[i], both);
        x[i].z = feature_map(x[i].z, scale[i], both);
        x[i].w = feature_map(x[i].w, scale[i], both);
        store_shared16(at + i * 16 * kPanelRowBytes, x[i]);
    }
}

// Fragments of the keys that S_t is formed of, transposed.
__device__ __forceinline__ void load_tile_keys(uint32_t (&fk)[4][4], const Gates &gates, uint32_t k, int lane, int warp,
                                               bool is_strong) {
    const int row = (lane & 7) + ((lane >> 4) << 3), unit = 2 * warp + ((lane >> 3) & 1);
#pragma unroll
    for (int t = 0; t < 4; t++)
        load_matrices_transposed(fk[t], panel_unit(k, 16 * t + row, unit));
    if (__builtin_expect(is_strong, 0)) {
        const float2 *c = reinterpret_cast<const float2 *>(gates.log_decay) + lane % 4;
        const float last = gates.log_decay[63];
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float2 m = c[8 * t + 4 * h];
                const uint32_t to_end = pack_bf16(exp2_fast(last - m.x), exp2_fast(last - m.y));
                fk[t][2 * h] = multiply_bf16(fk[t][2 * h], to_end);
                fk[t][2 * h + 1] = multiply_bf16(fk[t][2 * h + 1], to_end);
            }
    }
}

// What each worker, with a tile or without, tells every block beside its state: two lanes of each warp, a block each.
__device__ __forceinline__ void send_decay(ClusterShared &shared, int lane, int warp, int worker, int stage, int block,
                                           float log_decay, float decay) {
    if (lane < 2)
        send(in_block(shared_address(&shared.inbox_slices[stage][block * kWorkers + worker]), 2 * warp + lane),
             __float_as_uint(log_decay), __float_as_uint(decay), 0, 0,
             in_block(shared_address(&shared.inbox_full[stage][block]), 2 * warp + lane));
}

// The warp's 16 feature rows of S_t and z_t go to the two blocks that have them.
__device__ __forceinline__ void send_rows(ClusterShared &shared, int lane, int warp, int worker, int stage, int block,
                                          const Accumulator &s, const float (&z)[4], float scale) {
    const int rank = block * kWorkers + worker, row = lane / 4;
    const uint32_t inbox = shared_address(shared.inbox[stage][rank]) + row * kPanelRowBytes,
                   mass = shared_address(&shared.inbox_slices[stage][rank].z[row]),
                   full = shared_address(&shared.inbox_full[stage][block]);
    if (lane % 4 == 0) {
        send(in_block(mass, 2 * warp), __float_as_uint(z[0] * scale), in_block(full, 2 * warp));
        send(in_block(mass, 2 * warp + 1), __float_as_uint(z[2] * scale), in_block(full, 2 * warp + 1));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int to = 2 * warp + i;
        const uint32_t barrier = in_block(full, to);
#pragma unroll
        for (int h = 0; h < 2; h++)
            send(in_block(inbox + inbox_unit(row, h, lane), to),
                 pack_bf16(s[4 * h][2 * i] * scale, s[4 * h][2 * i + 1] * scale),
                 pack_bf16(s[4 * h + 1][2 * i] * scale, s[4 * h + 1][2 * i + 1] * scale),
                 pack_bf16(s[4 * h + 2][2 * i] * scale, s[4 * h + 2][2 * i + 1] * scale),
                 pack_bf16(s[4 * h + 3][2 * i] * scale, s[4 * h + 3][2 * i + 1] * scale), barrier);
    }
}

// Step 1 of a wave: k, already in shared memory, becomes k^, and S_t and z_t leave.
__device__ __forceinline__ void send_tile_state(ClusterShared &shared, int lane, int warp, int worker, int stage,
                                                const Gates &gates, uint32_t k, uint32_t v, int block) {
    const float log_decay = gates.log_decay[63], decay = gates.decay, scale = gates.state_scale;
    const bool is_strong = gates.is_strong;
    map_tile_keys(gates, k, lane, warp);
    publish_to_wgmma();
    worker_sync(worker);
    uint32_t fk[4][4];
    float z[4];
    Accumulator s;
    load_tile_keys(fk, gates, k, lane, warp, is_strong);
    group_begin();
    const uint64_t values = panel_descriptor(v, shared_address(shared.ones));
#pragma unroll
    for (int t = 0; t < 4; t++)
        group_product(s, z, fk[t], panel_step(values, t), t > 0);
    group_commit();
    send_decay(shared, lane, warp, worker, stage, block, log_decay, decay);
    group_wait<0>();
    group_hold(s);
    group_hold(z);
    send_rows(shared, lane, warp, worker, stage, block, s, z, scale);
}

} // namespace ts
#endif
