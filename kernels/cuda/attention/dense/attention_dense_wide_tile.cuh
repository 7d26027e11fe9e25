// What a block of the dense form's kernel for head size 128 (attention_dense_wide.cuh) does with one tile: its gates,
// k^, S_t and z_t, weights, and outputs.
#ifndef TS_CUDA_ATTENTION_DENSE_WIDE_TILE_CUH
#define TS_CUDA_ATTENTION_DENSE_WIDE_TILE_CUH

#include "kernels/cuda/attention/dense/attention_dense_wide_recurrence.cuh"

namespace ts {

constexpr float kWideMostDecay = 64.0f; // in powers of 2, of a tile; see Gates::is_strong at head size 64

// Rows first, first + step, ... of 128 columns of a tile that is not the span's from end to end; the others become 0.
__device__ __noinline__ void copy_wide_part(const DenseArgs &a, int tile_row, int tokens, int column, uint32_t panels,
                                            int first, int step, int unit) {
    const int begin = tokens & 0xffff, end = tokens >> 16;
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        const int row = first + i * step;
        const bool valid = row >= begin && row < end;
        const __nv_bfloat16 *from = valid ? a.qkvg + ((int64_t)tile_row + row) * a.stride + column + 8 * unit : a.qkvg;
        copy_async(panel_unit(panels, row, unit), from, valid);
        copy_async(panel_unit(panels + kWidePanelBytes, row, unit), valid ? from + 64 : from, valid);
    }
    copy_commit();
}

// Gate logits of a lane's four tokens; key gate and decay are 0 outside the span.
struct WideLogits {
    __nv_bfloat16 key[4], decay[4];
    int valid;
};

__device__ __forceinline__ WideLogits load_wide_logits(const DenseArgs &a, const WideTask &task) {
    const int first = 4 * (threadIdx.x & 31), begin = task.tokens & 0xffff, end = task.tokens >> 16;
    const int64_t column = (int64_t)(a.n_heads + 2 * a.n_kv_heads) * 128 + task.head;
    WideLogits g;
    g.valid = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool valid = first + i >= begin && first + i < end;
        const __nv_bfloat16 *from = valid ? a.qkvg + ((int64_t)task.row + first + i) * a.stride + column : a.qkvg;
        g.valid |= valid << i;
        g.key[i] = from[0];
        g.decay[i] = from[valid ? a.n_kv_heads : 0];
    }
    return g;
}

// Eqs. (2), (3), (5) for a tile, by one warp.
__device__ __forceinline__ void store_wide_gates(const DenseArgs &a, const WideLogits &g, WideGates &gates) {
    const int lane = threadIdx.x & 31;
    float c[4], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum += g.valid >> i & 1 ? log_sigmoid(__bfloat162float(g.decay[i])) * a.decay_scale : 0.0f;
        c[i] = sum;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? other : 0.0f;
    }
    const float all = __shfl_sync(~0u, sum, 31), up = __shfl_up_sync(~0u, sum, 1), before = lane == 0 ? 0.0f : up;
    const bool is_strong = all < -kWideMostDecay;
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        c[i] += before;
        const float log_gate = -__log2f(1.0f + __expf(-__bfloat162float(g.key[i])));
        scale[i] = g.valid >> i & 1 ? exp2_fast(log_gate - (is_strong ? 0.0f : c[i])) : 0.0f;
    }
    *reinterpret_cast<float4 *>(&gates.log_decay[4 * lane]) = make_float4(c[0], c[1], c[2], c[3]);
    *reinterpret_cast<uint2 *>(&gates.key_scale[4 * lane]) =
        make_uint2(pack_bf16(scale[0], scale[1]), pack_bf16(scale[2], scale[3]));
    if (lane == 0) {
        gates.decay = exp2_fast(all);
        gates.state_scale = is_strong ? 1.0f : exp2_fast(all);
        gates.is_strong = is_strong;
    }
}

// k becomes k^ in place, eq. (4), with its part of the decay or, to_end, all of it up to the tile's end; thread 0 ...
// 255 has the units that it copies.
__device__ __forceinline__ void map_wide_keys(const WideGates &gates, uint32_t k, int thread, bool to_end) {
    const int row = thread / 8;
    const uint32_t at = panel_unit(k, row, thread & 7);
    const float last = gates.log_decay[kWideTile - 1];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float gate = high_of((uint32_t) reinterpret_cast<const unsigned short *>(gates.key_scale)[row + 32 * i]
                                   << 16),
                    by = to_end ? gate * exp2_fast(last - gates.log_decay[row + 32 * i]) : gate, log_by = __log2f(by);
        const uint32_t scale = pack_bf16(by, by);
        uint4 x[2];
#pragma unroll
        for (int p = 0; p < 2; p++)
            x[p] = load_shared16(at + p * kWidePanelBytes + i * 32 * kPanelRowBytes);
#pragma unroll
        for (int p = 0; p < 2; p++) {
            x[p].x = feature_map(x[p].x, log_by, scale);
            x[p].y = feature_map(x[p].y, log_by, scale);
            x[p].z = feature_map(x[p].z, log_by, scale);
            x[p].w = feature_map(x[p].w, log_by, scale);
            store_shared16(at + p * kWidePanelBytes + i * 32 * kPanelRowBytes, x[p]);
        }
    }
}

// A warp's 16 rows of S_t in bf16 and of z_t: as lane / 4 and 8 further have them, by panel and half of it.
struct WideTileState {
    uint32_t s[2][2][2][4];
    float z[2], log_decay;
    bool is_strong;
};

// Half the columns of S_t, and z_t with the first half, of the tile whose k^ and v lie there.
template <int half>
__device__ __forceinline__ void begin_wide_state(Accumulator &sums, float (&z)[4], uint32_t k, uint32_t v,
                                                 uint32_t ones, int group) {
    const uint64_t keys = panel_descriptor(k + group * kWidePanelBytes),
                   values = panel_descriptor(v + half * kWidePanelBytes), one = column_descriptor(ones);
    group_begin();
#pragma unroll
    for (int t = 0; t < 8; t++) {
        group_product_transposed(sums, panel_further(keys, t * 2048), panel_further(values, t * 2048), t > 0);
        if (half == 0)
            group_product_transposed(z, panel_further(keys, t * 2048), one, t > 0);
    }
    group_commit();
}

template <int half>
__device__ __forceinline__ void end_wide_state(WideTileState &out, Accumulator &sums, float (&z)[4],
                                               const WideGates &gates) {
    const float scale = gates.state_scale;
    group_hold(sums);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out.s[i][half][h][e] = pack_bf16(sums[4 * h + e][2 * i] * scale, sums[4 * h + e][2 * i + 1] * scale);
    if (half == 0) {
        group_hold(z);
        out.z[0] = z[0] * scale, out.z[1] = z[2] * scale;
        out.log_decay = gates.log_decay[kWideTile - 1];
        out.is_strong = gates.is_strong;
    }
}

// A warp's z_t, where the tile has tokens, and the tile's decay go to the block that has its rows. to_block: what is to
// be added to an address for the same place there.
__device__ __forceinline__ void send_wide_mass(const WideShared &shared, const WideTileState &x, bool is_active,
                                               int lane, uint32_t to_block, int block) {
    const uint32_t slice = shared_address(&shared.slices[block]) + to_block,
                   barrier = shared_address(&shared.inbox_full[block]) + to_block;
    if (is_active && lane % 4 == 0) {
        send(slice + (int)offsetof(WideSlice, z) + lane, __float_as_uint(x.z[0]), barrier);
        send(slice + (int)offsetof(WideSlice, z) + lane + 32, __float_as_uint(x.z[1]), barrier);
    }
    if (lane == 0) {
        const float log_decay = is_active ? x.log_decay : 0.0f;
        send(slice, __float_as_uint(log_decay), __float_as_uint(exp2_fast(log_decay)), 0, 0, barrier);
    }
}

// An eighth of the warp's rows of S_t.
__device__ __forceinline__ void send_wide_rows(const WideShared &shared, const WideTileState &x, int part, bool valid,
                                               int lane, uint32_t to_block, int block) {
    const int i = part / 4, p = part / 2 % 2, h = part % 2;
    send_where(valid,
               shared_address(shared.inbox[block]) + to_block + wide_inbox_unit(lane / 4, lane) + i * 2048 + p * 128 +
                   h * 64,
               x.s[i][p][h], shared_address(&shared.inbox_full[block]) + to_block);
}

// The same of weights without decay; log_decay: c of the keys, c0 and c1 those of this lane's rows.
__device__ __forceinline__ void decay_wide_weights(Accumulator &weights, const float *log_decay, float c0, float c1) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 c = *reinterpret_cast<const float2 *>(log_decay + 8 * j + 2 * (lane % 4));
        // What comes later is masked, and must not be infinite before.
        weights[j][0] *= exp2_fast(fminf(c0 - c.x, 0.0f));
        weights[j][1] *= exp2_fast(fminf(c0 - c.y, 0.0f));
        weights[j][2] *= exp2_fast(fminf(c1 - c.x, 0.0f));
        weights[j][3] *= exp2_fast(fminf(c1 - c.y, 0.0f));
    }
}

// A lane's words of four neighbouring blocks of 8 columns of a row become the four words of one of them.
__device__ __forceinline__ uint4 gather_block(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, int lane) {
    const bool odd = lane & 1, high = lane & 2;
    const uint32_t a = __shfl_xor_sync(~0u, odd ? x0 : x1, 1), b = __shfl_xor_sync(~0u, odd ? x2 : x3, 1);
    const uint32_t y0 = odd ? a : x0, y1 = odd ? x1 : a, y2 = odd ? b : x2, y3 = odd ? x3 : b; // words of a pair
    const uint32_t c = __shfl_xor_sync(~0u, high ? y0 : y2, 2), d = __shfl_xor_sync(~0u, high ? y1 : y3, 2);
    return high ? make_uint4(c, d, y2, y3) : make_uint4(y0, y1, c, d);
}

// Without a branch.
__device__ __forceinline__ void store_where(bool valid, void *to, uint4 x) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
                 "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"((int)valid)
                 : "memory");
}

// Rows row and row + 8 of the tile: y over its mass, as the span has them.
__device__ __forceinline__ void store_wide_outputs(const DenseArgs &a, const WideTask &task, int head,
                                                   const Accumulator (&y)[2], float mass0, float mass1, int row,
                                                   int lane) {
    const int begin = task.tokens & 0xffff, end = task.tokens >> 16;
    __nv_bfloat16 *to = a.y + ((int64_t)task.row + row) * a.y_stride + (int64_t)head * 128 + 8 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // Of the eight columns, the first is z^'s.
        const float scale = __fdividef(1.0f, __shfl_sync(~0u, i == 0 ? mass0 : mass1, lane & ~3) + a.normalizer_eps);
        const bool valid = row + 8 * i >= begin && row + 8 * i < end;
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t x[4];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    x[e] = pack_bf16(y[p][4 * h + e][2 * i] * scale, y[p][4 * h + e][2 * i + 1] * scale);
                store_where(valid, to + 64 * p + 32 * h, gather_block(x[0], x[1], x[2], x[3], lane));
            }
        to += 8 * a.y_stride;
    }
}

} // namespace ts
#endif
