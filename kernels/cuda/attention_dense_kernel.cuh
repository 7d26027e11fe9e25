// The bf16 kernel of the dense form. See attention_dense_plan.cuh for the order of the work.
#ifndef TS_CUDA_ATTENTION_DENSE_KERNEL_CUH
#define TS_CUDA_ATTENTION_DENSE_KERNEL_CUH

#include "kernels/cuda/attention_dense_plan.cuh"
#include "kernels/cuda/matrix.cuh"

namespace ts {

struct DenseArgs {
    const __nv_bfloat16 *qkvg;
    __nv_bfloat16 *y;
    int64_t stride, y_stride;
    const ts_span *spans;
    int n_spans, n_heads, n_kv_heads, tile_size;
    float decay_scale; // log2(e) / decay_temperature
    float normalizer_eps;
    float *open_k, *open_v, *state, *mass;
    double *open_c, *decay_end;
    int64_t *pairs;
    int *ticket;
    int *counters; // [rows, KV] each: states done, composed, outputs done
    PlanItem *items;
    PlanRow *rows;
    float *ring;
    int n_items, n_rows, ring_rows;
};

template <int D> struct DenseShape {
    static constexpr int panels = D / kPanelCols; // of a row of q, k or v; also warpgroups, and m64 blocks of the state
    static constexpr int threads = 128 * panels;
    static constexpr int blocks_per_multiprocessor = D == 64 ? 3 : 1;
    static constexpr int panel_bytes = kChunk * kPanelRowBytes;
};

template <int D> struct DenseShared {
    unsigned char q[2][DenseShape<D>::panels * DenseShape<D>::panel_bytes];
    unsigned char k[2][DenseShape<D>::panels * DenseShape<D>::panel_bytes];
    unsigned char v[2][DenseShape<D>::panels * DenseShape<D>::panel_bytes];
    unsigned char state[DenseShape<D>::panels * D * kPanelRowBytes]; // panel p: columns 64 p ..., row = feature
    float log_decay[kSegment]; // c of eq. (5) from the chunk's start, in powers of 2
    __nv_bfloat16 key_gate[kSegment];
    __nv_bfloat16 to_end[kSegment]; // e^{c_last - c_m}, in a state item times the key gate
    __nv_bfloat16 mass[D];
    PlanItem item[2];
    int is_composer;
};

// What a block works on. Tokens are counted from the first chunk's begin, a multiple of kChunk.
struct Segment {
    int64_t row;   // of token 0 in the batch; negative where the span begins inside its first chunk
    int64_t cache; // index of (sequence, KV head) in the cache
    int head;
    int n_chunks;
    int begin, end;    // the span's tokens
    int closing_chunk; // at whose end the tile begins that is open after this span; -1 when that is elsewhere
    int n_open;        // tokens of the open tile before the span
};

__device__ __forceinline__ Segment segment_of(const DenseArgs &a, const PlanRow &row, const PlanItem &item) {
    const ts_span span = a.spans[row.span];
    const int64_t span_end = span.position + span.n_tokens, tile = span_end / a.tile_size;
    const int64_t from = (int64_t)(row.first_segment + item.segment) * kSegment;
    const int64_t first = max(from, span.position / kChunk * kChunk), end = min(from + kSegment, span_end);
    Segment s;
    s.row = span.row + first - span.position;
    s.cache = (int64_t)span.sequence * a.n_kv_heads + item.head;
    s.head = item.head;
    s.n_chunks = (int)((end - first + kChunk - 1) / kChunk);
    s.begin = (int)max(span.position - first, (int64_t)0);
    s.end = (int)(end - first);
    const int64_t open_start = tile * a.tile_size;
    s.closing_chunk = -1;
    if (tile > span.position / a.tile_size && open_start > first && open_start <= end)
        s.closing_chunk = (int)((open_start - first) / kChunk) - 1;
    s.n_open = (int)(span.position % a.tile_size);
    return s;
}

__device__ __forceinline__ float log_sigmoid(float x) {
    return fminf(x, 0.0f) - log1pf(__expf(-fabsf(x)));
}

// Where a thread copies rows of D columns from and to: its unit of rows r, r + rows_at_once, ...
template <int D> struct RowCopy {
    static constexpr int units = D / 8, rows_at_once = DenseShape<D>::threads / units;
    const __nv_bfloat16 *from; // of the first chunk
    uint32_t to;               // offset in a stage
};

template <int D> __device__ __forceinline__ RowCopy<D> row_copy(const DenseArgs &a, const Segment &s, int64_t column) {
    using Copy = RowCopy<D>;
    const int unit = threadIdx.x % Copy::units, row = threadIdx.x / Copy::units;
    Copy c;
    c.from = a.qkvg + (s.row + row) * a.stride + column + 8 * unit;
    c.to = unit / 8 * DenseShape<D>::panel_bytes + row * kPanelRowBytes + (((unit & 7) ^ (row & 7)) << 4);
    return c;
}

// The chunk `chunk` into a stage; rows outside the span become 0.
template <int D>
__device__ __forceinline__ void copy_rows(const DenseArgs &a, const Segment &s, const RowCopy<D> &c, int chunk,
                                          bool is_whole, uint32_t stage) {
    using Copy = RowCopy<D>;
    const __nv_bfloat16 *from = c.from + (int64_t)chunk * kChunk * a.stride;
    const uint32_t to = stage + c.to;
    const int64_t step = (int64_t)Copy::rows_at_once * a.stride;
    if (is_whole) {
#pragma unroll
        for (int i = 0; i < kChunk / Copy::rows_at_once; i++) {
            copy_async(to + i * Copy::rows_at_once * kPanelRowBytes, from);
            from += step;
        }
    } else {
        int n = chunk * kChunk + threadIdx.x / Copy::units;
#pragma unroll 1
        for (int i = 0; i < kChunk / Copy::rows_at_once; i++) {
            const bool valid = n >= s.begin && n < s.end;
            copy_async(to + i * Copy::rows_at_once * kPanelRowBytes, valid ? from : a.qkvg, valid);
            from += step;
            n += Copy::rows_at_once;
        }
    }
}

// Gates of the segment's tokens, eqs. (2), (3), (5), per chunk; 1 and 0 decay and key gate outside the span.
template <int D, bool outputs>
__device__ __forceinline__ void load_gates(const DenseArgs &a, const Segment &s, DenseShared<D> &shared) {
    const int lane = threadIdx.x & 31;
    const int64_t column = (int64_t)(a.n_heads + 2 * a.n_kv_heads) * D + s.head;
    for (int chunk = threadIdx.x / 32; chunk < s.n_chunks; chunk += DenseShape<D>::threads / 32) {
        float gate[2], decay[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int n = chunk * kChunk + 2 * lane + i;
            gate[i] = decay[i] = 0.0f;
            if (n >= s.begin && n < s.end) {
                const __nv_bfloat16 *from = a.qkvg + (s.row + n) * a.stride + column;
                gate[i] = 1.0f / (1.0f + __expf(-__bfloat162float(from[0])));
                decay[i] = log_sigmoid(__bfloat162float(from[a.n_kv_heads])) * a.decay_scale;
            }
        }
        float sum = decay[0] + decay[1];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step)
                sum += other;
        }
        float before = __shfl_up_sync(~0u, sum, 1);
        if (lane == 0)
            before = 0.0f;
        const float last = __shfl_sync(~0u, sum, 31), c0 = before + decay[0];
        const int at = chunk * kChunk + 2 * lane;
        *reinterpret_cast<float2 *>(&shared.log_decay[at]) = make_float2(c0, sum);
        if (outputs) { // k^ in shared memory has its gate already
            *reinterpret_cast<uint32_t *>(&shared.key_gate[at]) = pack_bf16(gate[0], gate[1]);
            gate[0] = gate[1] = 1.0f;
        }
        *reinterpret_cast<uint32_t *>(&shared.to_end[at]) =
            pack_bf16(gate[0] * exp2_fast(last - c0), gate[1] * exp2_fast(last - sum));
    }
}

// k becomes k^ in place, eq. (4).
template <int D>
__device__ __forceinline__ void map_keys(DenseShared<D> &shared, uint32_t k, uint32_t offset, int gates) {
    using Copy = RowCopy<D>;
    const int row = threadIdx.x / Copy::units;
    const unsigned short *gate = reinterpret_cast<const unsigned short *>(shared.key_gate) + gates + row;
#pragma unroll
    for (int i = 0; i < kChunk / Copy::rows_at_once; i++) {
        const uint32_t at = k + offset + i * Copy::rows_at_once * kPanelRowBytes;
        uint4 x = load_shared16(at);
        const uint32_t g = gate[i * Copy::rows_at_once] * 0x10001u;
        x.x = multiply_bf16(feature_map(x.x), g);
        x.y = multiply_bf16(feature_map(x.y), g);
        x.z = multiply_bf16(feature_map(x.z), g);
        x.w = multiply_bf16(feature_map(x.w), g);
        store_shared16(at, x);
    }
}

// The running state in registers: per m64 block of features, this warp's 16 features x the warpgroup's 64 columns of v.
template <int D> struct RunningState {
    Accumulator s[DenseShape<D>::panels];
    float z[DenseShape<D>::panels][4]; // [0]: feature lane / 4, [2]: 8 further; every column the same
};

template <int D> __device__ __forceinline__ void state_clear(RunningState<D> &r) {
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                r.s[b][j][i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++)
            r.z[b][i] = 0.0f;
    }
}

template <int D> __device__ __forceinline__ void state_scale(RunningState<D> &r, float by) {
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                r.s[b][j][i] *= by;
        r.z[b][0] *= by;
        r.z[b][1] *= by;
        r.z[b][2] *= by;
        r.z[b][3] *= by;
    }
}

template <int D> __device__ __forceinline__ void state_load(RunningState<D> &r, const float *slot) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    const float4 *from = reinterpret_cast<const float4 *>(slot) + threadIdx.x;
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float4 x = __ldcg(from + (b * 8 + j) * DenseShape<D>::threads);
            r.s[b][j][0] = x.x, r.s[b][j][1] = x.y, r.s[b][j][2] = x.z, r.s[b][j][3] = x.w;
        }
        const float *z = slot + D * D + b * 64 + warp * 16 + lane / 4;
        r.z[b][0] = r.z[b][1] = __ldcg(z);
        r.z[b][2] = r.z[b][3] = __ldcg(z + 8);
    }
}

template <int D> __device__ __forceinline__ void state_store(const RunningState<D> &r, float *slot) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    float4 *to = reinterpret_cast<float4 *>(slot) + threadIdx.x;
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            __stcg(to + (b * 8 + j) * DenseShape<D>::threads,
                   make_float4(r.s[b][j][0], r.s[b][j][1], r.s[b][j][2], r.s[b][j][3]));
        if (threadIdx.x < 128 && lane % 4 == 0) {
            float *z = slot + D * D + b * 64 + warp * 16 + lane / 4;
            __stcg(z, r.z[b][0]);
            __stcg(z + 8, r.z[b][2]);
        }
    }
}

// The cache's state, with the tokens of the open tile folded in, into a slot: the state that the span begins with.
template <int D> __device__ __noinline__ void state_begin(const DenseArgs &a, const Segment &s, float *slot) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const int64_t at = s.cache;
    const int n_open = s.n_open;
    const float *open_k = a.open_k + at * a.tile_size * D, *open_v = a.open_v + at * a.tile_size * D;
    const double *open_c = a.open_c + at * a.tile_size;
    const double c_last = n_open > 0 ? open_c[n_open - 1] : 0.0;
    const float carried = (float)exp(c_last);
#pragma unroll 1
    for (int i = 0; i < DenseShape<D>::panels * 8; i++) {
        const int row = i / 8 * 64 + warp * 16 + lane / 4, column = group * 64 + i % 8 * 8 + 2 * (lane % 4);
        const float *state = a.state + (at * D + row) * D + column;
        float4 x =
            make_float4(carried * state[0], carried * state[1], carried * state[8 * D], carried * state[8 * D + 1]);
        for (int m = 0; m < n_open; m++) {
            const float weight = (float)exp(c_last - open_c[m]);
            const float k0 = weight * open_k[m * D + row], k1 = weight * open_k[m * D + row + 8];
            const float v0 = open_v[m * D + column], v1 = open_v[m * D + column + 1];
            x.x += k0 * v0, x.y += k0 * v1, x.z += k1 * v0, x.w += k1 * v1;
        }
        __stcg(reinterpret_cast<float4 *>(slot) + threadIdx.x + i * DenseShape<D>::threads, x);
    }
    for (int row = threadIdx.x; row < D; row += DenseShape<D>::threads) {
        float z = carried * a.mass[at * D + row];
        for (int m = 0; m < n_open; m++)
            z += (float)exp(c_last - open_c[m]) * open_k[m * D + row];
        __stcg(slot + D * D + row, z);
    }
    if (threadIdx.x == 0)
        *reinterpret_cast<double *>(slot + D * D + D) = c_last * 1.4426950408889634;
    __threadfence();
    __syncthreads();
}

// The state that the next open tile begins with goes to the cache.
template <int D>
__device__ __forceinline__ void state_end(const DenseArgs &a, const Segment &s, const RunningState<D> &r,
                                          double log_sum) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const int64_t at = s.cache;
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
        const int row = b * 64 + warp * 16 + lane / 4, column = group * 64 + 2 * (lane % 4);
        float *state = a.state + (at * D + row) * D + column;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            *reinterpret_cast<float2 *>(state + 8 * j) = make_float2(r.s[b][j][0], r.s[b][j][1]);
            *reinterpret_cast<float2 *>(state + 8 * D + 8 * j) = make_float2(r.s[b][j][2], r.s[b][j][3]);
        }
        if (group == 0 && lane % 4 == 0) {
            a.mass[at * D + row] = r.z[b][0];
            a.mass[at * D + row + 8] = r.z[b][2];
        }
    }
    if (threadIdx.x == 0)
        a.decay_end[at] += log_sum;
}

// Ŝ and ẑ in bf16, for the products of eq. (9).
template <int D> __device__ __forceinline__ void state_publish(const RunningState<D> &r, DenseShared<D> &shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const uint32_t panel = shared_address(shared.state) + group * D * kPanelRowBytes;
#pragma unroll
    for (int b = 0; b < DenseShape<D>::panels; b++) {
        const int row = b * 64 + warp * 16 + lane / 4;
        store_accumulator(panel, b * 64 + warp * 16, r.s[b], 1.0f, 1.0f);
        if (group == 0 && lane % 4 == 0) {
            shared.mass[row] = __float2bfloat16(r.z[b][0]);
            shared.mass[row + 8] = __float2bfloat16(r.z[b][2]);
        }
    }
}

// Fragments of e^{c_last - c_m} k^_m, transposed: [64 features of block b, 64 tokens], per k16 step of tokens; z takes
// their sum. The panel holds k^, or k where `map` is set.
template <int D, bool map>
__device__ __forceinline__ void load_keys_transposed(uint32_t (&f)[4][4], float (&z)[4], const DenseShared<D> &shared,
                                                     uint32_t panel, int gates) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    const int row = (lane & 7) + ((lane >> 4) << 3), unit = 2 * warp + ((lane >> 3) & 1);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        load_matrices_transposed(f[step], panel_unit(panel, 16 * step + row, unit));
        const uint32_t *weight = reinterpret_cast<const uint32_t *>(&shared.to_end[gates + 16 * step]) + lane % 4;
        if (map) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                f[step][i] = feature_map(f[step][i]);
        }
        f[step][0] = multiply_bf16(f[step][0], weight[0]);
        f[step][1] = multiply_bf16(f[step][1], weight[0]);
        f[step][2] = multiply_bf16(f[step][2], weight[4]);
        f[step][3] = multiply_bf16(f[step][3], weight[4]);
        mma(z, f[step], kOnes, kOnes);
    }
}

// One segment. Outputs: from the state `r` to y, and the cache's new state where a span's last complete tile ends;
// otherwise r becomes the segment's own (S, z). Returns the sum of the log decays, in powers of 2.
template <int D, bool hopper, bool outputs>
__device__ __forceinline__ double run_segment(const DenseArgs &a, const Segment &s, DenseShared<D> &shared,
                                              RunningState<D> &r, double log_sum) {
    using Shape = DenseShape<D>;
    constexpr int blocks = Shape::panels;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const int heads = a.n_heads / a.n_kv_heads;
    const int n_chunks = s.n_chunks, first_whole = s.begin > 0, end_whole = s.end / kChunk;
    const uint32_t q_base = shared_address(shared.q[0]), k_base = shared_address(shared.k[0]),
                   v_base = shared_address(shared.v[0]);
    constexpr uint32_t stage_bytes = Shape::panels * Shape::panel_bytes;

    // A step is a chunk and a head of the group. Loads run two steps ahead.
    const RowCopy<D> copy_q = row_copy<D>(a, s, (int64_t)s.head * heads * D);
    const int64_t k_column = (int64_t)(a.n_heads + s.head - s.head * heads) * D,
                  v_column = k_column + (int64_t)a.n_kv_heads * D;
    int next_chunk = 0, next_head = 0;
    uint32_t next_q = q_base;
    auto load_next = [&] {
        if (next_chunk < n_chunks) {
            const bool is_whole = next_chunk >= first_whole && next_chunk < end_whole;
            RowCopy<D> copy = copy_q;
            if (next_head == 0) {
                const uint32_t stage = (next_chunk & 1) * stage_bytes;
                copy.from = copy_q.from + k_column;
                copy_rows<D>(a, s, copy, next_chunk, is_whole, k_base + stage);
                copy.from = copy_q.from + v_column;
                copy_rows<D>(a, s, copy, next_chunk, is_whole, v_base + stage);
            }
            if (outputs) {
                copy.from = copy_q.from + next_head * D;
                copy_rows<D>(a, s, copy, next_chunk, is_whole, next_q);
                next_q ^= q_base ^ (q_base + stage_bytes);
            }
            if (!outputs || ++next_head == heads)
                next_head = 0, next_chunk++;
        }
        copy_commit();
    };

    double total = log_sum;
    load_next();
    load_next();
    load_gates<D, outputs>(a, s, shared);
    uint32_t q = q_base;
    for (int chunk = 0; chunk < n_chunks; chunk++)
        for (int i = 0; i < (outputs ? heads : 1); i++) {
            const int gates = chunk * kChunk;
            const uint32_t k = k_base + (chunk & 1) * stage_bytes, v = v_base + (chunk & 1) * stage_bytes;
            copy_wait<1>();
            __syncthreads();
            uint32_t fq[4 * blocks][4];
            if (outputs) {
                if (i == 0) {
                    map_keys<D>(shared, k, copy_q.to, gates);
                    state_publish<D>(r, shared);
                }
                const int row = 16 * warp + (lane & 15), unit = lane >> 4;
#pragma unroll
                for (int t = 0; t < 4 * blocks; t++) {
                    load_matrices(fq[t], panel_unit(q + t / 4 * Shape::panel_bytes, row, t % 4 * 2 + unit));
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        fq[t][e] = feature_map(fq[t][e]);
                }
                publish_to_wgmma();
                __syncthreads();
            }

            const float chunk_decay = shared.log_decay[gates + kChunk - 1];
            const bool update =
                !outputs || __any_sync(~0u, i == heads - 1 && (chunk + 1 < n_chunks || chunk == s.closing_chunk));
            Accumulator y, weights;
            float mass[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (outputs) {
                if (hopper) {
                    group_begin();
#pragma unroll
                    for (int t = 0; t < 4 * blocks; t++)
                        group_product<0>(weights, fq[t], panel_descriptor(k + t / 4 * Shape::panel_bytes + t % 4 * 32),
                                         t > 0);
                    const uint32_t state = shared_address(shared.state) + group * D * kPanelRowBytes;
#pragma unroll
                    for (int t = 0; t < 4 * blocks; t++)
                        group_product<1>(y, fq[t], panel_descriptor(state + t * 2048), t > 0);
                    group_commit();
                } else {
#pragma unroll
                    for (int j = 0; j < 8; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            y[j][e] = weights[j][e] = 0.0f;
                    const uint32_t state = shared_address(shared.state) + group * D * kPanelRowBytes;
#pragma unroll
                    for (int t = 0; t < 4 * blocks; t++) {
                        warp_product_rows(weights, fq[t], k + t / 4 * Shape::panel_bytes, t % 4, 2 * warp + 2);
                        warp_product_columns(y, fq[t], state, t);
                    }
                }
#pragma unroll
                for (int t = 0; t < 4 * blocks; t++) {
                    const uint32_t *z = reinterpret_cast<const uint32_t *>(shared.mass) + 8 * t + lane % 4;
                    mma(mass, fq[t], z[0], z[4]);
                }
            }
            uint32_t fk[4][4];
            if (update) {
                state_scale<D>(r, exp2_fast(chunk_decay));
                total += chunk_decay;
            }
            if (outputs) {
                if (hopper) {
                    group_wait<0>();
                    group_hold(weights);
                    group_hold(y);
                }
                const int n0 = 16 * warp + lane / 4;
                const float c0 = shared.log_decay[gates + n0], c1 = shared.log_decay[gates + n0 + 8];
                const float from0 = exp2_fast(c0), from1 = exp2_fast(c1);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    y[j][0] *= from0;
                    y[j][1] *= from0;
                    y[j][2] *= from1;
                    y[j][3] *= from1;
                }
                mass[0] *= from0;
                mass[1] *= from0;
                mass[2] *= from1;
                mass[3] *= from1;
                uint32_t fw[4][4];
#pragma unroll
                for (int t = 0; t < 4; t++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int j = 2 * t + h, m = 8 * j + 2 * (lane % 4);
                        float *w = weights[j];
                        if (t <= warp) {
                            const float2 c = *reinterpret_cast<const float2 *>(&shared.log_decay[gates + m]);
                            w[0] *= exp2_fast(c0 - c.x);
                            w[1] *= exp2_fast(c0 - c.y);
                            w[2] *= exp2_fast(c1 - c.x);
                            w[3] *= exp2_fast(c1 - c.y);
                            if (t == warp) {
                                w[0] = m <= n0 ? w[0] : 0.0f;
                                w[1] = m + 1 <= n0 ? w[1] : 0.0f;
                                w[2] = m <= n0 + 8 ? w[2] : 0.0f;
                                w[3] = m + 1 <= n0 + 8 ? w[3] : 0.0f;
                            }
                        } else {
                            w[0] = w[1] = w[2] = w[3] = 0.0f;
                        }
                        fw[t][2 * h] = pack_bf16(w[0], w[1]);
                        fw[t][2 * h + 1] = pack_bf16(w[2], w[3]);
                    }
                }
                if (hopper) {
                    group_begin();
#pragma unroll
                    for (int t = 0; t < 4; t++)
                        group_product<1>(y, fw[t], panel_descriptor(v + group * Shape::panel_bytes + t * 2048), 1);
                    group_commit();
                } else {
#pragma unroll
                    for (int t = 0; t < 4; t++)
                        if (t <= warp)
                            warp_product_columns(y, fw[t], v + group * Shape::panel_bytes, t);
                }
#pragma unroll
                for (int t = 0; t < 4; t++)
                    mma(mass, fw[t], kOnes, kOnes);
            }
            if (update) {
#pragma unroll
                for (int b = 0; b < blocks; b++) {
                    load_keys_transposed<D, !outputs>(fk, r.z[b], shared, k + b * Shape::panel_bytes, gates);
                    if (hopper) {
                        group_begin();
#pragma unroll
                        for (int t = 0; t < 4; t++)
                            group_product<1>(r.s[b], fk[t], panel_descriptor(v + group * Shape::panel_bytes + t * 2048),
                                             1);
                        group_commit();
                        group_wait<0>();
                        group_hold(r.s[b]);
                    } else {
#pragma unroll
                        for (int t = 0; t < 4; t++)
                            warp_product_columns(r.s[b], fk[t], v + group * Shape::panel_bytes, t);
                    }
                }
            }
            if (outputs) {
                if (hopper) {
                    group_wait<0>();
                    group_hold(y);
                }
                // Through the warp's own rows of q, so that a row of y is written in units of 16 bytes.
                const uint32_t panel = q + group * Shape::panel_bytes;
                store_accumulator(panel, 16 * warp, y, __fdividef(1.0f, mass[0] + a.normalizer_eps),
                                  __fdividef(1.0f, mass[2] + a.normalizer_eps));
                __syncwarp();
                const int first_row = 16 * warp + lane / 8;
                __nv_bfloat16 *to = a.y + (s.row + gates + first_row) * a.y_stride + (int64_t)(s.head * heads + i) * D +
                                    group * 64 + lane % 8 * 8;
                const bool is_whole = chunk >= first_whole && chunk < end_whole;
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    const uint4 x = load_shared16(panel_unit(panel, first_row + 4 * t, lane % 8));
                    const int n = gates + first_row + 4 * t;
                    if (is_whole || (n >= s.begin && n < s.end))
                        __stcs(reinterpret_cast<uint4 *>(to), x);
                    to += 4 * a.y_stride;
                }
                q ^= q_base ^ (q_base + stage_bytes);
                if (update && chunk == s.closing_chunk)
                    state_end<D>(a, s, r, total * 0.6931471805599453);
            }
            __syncthreads();
            load_next();
        }
    return total;
}

// Composes the row's slots: slot i, until now what segment i - 1 adds, becomes the state that segment i begins with.
template <int D>
__device__ __forceinline__ void compose_slots(const DenseArgs &a, const Segment &s, const PlanRow &row, float *slots,
                                              const float *slots_before, int n_before, RunningState<D> &r) {
    constexpr int n = slot_floats(D);
    const float *from = row.is_first ? slots : slots_before + (int64_t)n_before * n;
    if (row.is_first)
        state_begin<D>(a, s, slots);
    state_load<D>(r, from);
    double log_sum = __ldcg(reinterpret_cast<const double *>(from + D * D + D));
    if (!row.is_first) {
        state_store<D>(r, slots);
        if (threadIdx.x == 0)
            *reinterpret_cast<double *>(slots + D * D + D) = log_sum;
    }
    const int n_states = row.n_segments - row.is_last;
    RunningState<D> next;
    if (n_states > 0)
        state_load<D>(next, slots + n);
    for (int i = 1; i <= n_states; i++) {
        float *slot = slots + (int64_t)i * n;
        double *log_slot = reinterpret_cast<double *>(slot + D * D + D);
        const double log_decay = __ldcg(log_slot);
        const float decay = exp2_fast((float)log_decay);
#pragma unroll
        for (int b = 0; b < DenseShape<D>::panels; b++) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    r.s[b][j][e] = decay * r.s[b][j][e] + next.s[b][j][e];
            r.z[b][0] = r.z[b][1] = decay * r.z[b][0] + next.z[b][0];
            r.z[b][2] = r.z[b][3] = decay * r.z[b][2] + next.z[b][2];
        }
        log_sum += log_decay;
        if (i < n_states)
            state_load<D>(next, slot + n);
        __syncthreads(); // everybody has read this slot
        state_store<D>(r, slot);
        if (threadIdx.x == 0)
            *log_slot = log_sum;
    }
}

// Thread 0 waits until *counter reaches n; then the block goes on.
__device__ __forceinline__ void wait_for(const int *counter, int n) {
    if (threadIdx.x == 0) {
        while (*reinterpret_cast<const volatile int *>(counter) < n)
            __nanosleep(40);
        __threadfence();
    }
    __syncthreads();
}

// The block's writes come before the count. Returns the count before it, to thread 0.
__device__ __forceinline__ int count_up(int *counter) {
    __threadfence();
    __syncthreads();
    return threadIdx.x == 0 ? atomicAdd(counter, 1) : 0;
}

template <int D, bool hopper>
__global__ void __launch_bounds__(DenseShape<D>::threads, DenseShape<D>::blocks_per_multiprocessor)
    dense_attention(const DenseArgs a) {
#if TS_HAS_WGMMA || __CUDA_ARCH__ == 800
    extern __shared__ __align__(1024) unsigned char bytes[];
    DenseShared<D> &shared = *reinterpret_cast<DenseShared<D> *>(bytes);
    const int64_t slot = slot_floats(D), ring_head = (int64_t)(kGroup + 1) * slot;
    auto take = [&](int to) {
        if (threadIdx.x == 0) {
            const int ticket = atomicAdd(a.ticket, 1);
            PlanItem item = {-1, 0, 0, 0};
            if (ticket < a.n_items)
                item = a.items[ticket];
            shared.item[to] = item;
        }
    };
    auto slots_of = [&](int row, int head) {
        return a.ring + ((int64_t)(row % a.ring_rows) * a.n_kv_heads + head) * ring_head;
    };
    int *states_done = a.counters, *composed = states_done + (int64_t)a.n_rows * a.n_kv_heads,
        *outputs_done = composed + (int64_t)a.n_rows * a.n_kv_heads;
    take(0);
    __syncthreads();
    for (int turn = 0;; turn ^= 1) {
        const PlanItem item = shared.item[turn];
        if (item.row < 0)
            break;
        take(turn ^ 1);
        const PlanRow row = a.rows[item.row];
        const Segment s = segment_of(a, row, item);
        const int64_t at = (int64_t)item.row * a.n_kv_heads + item.head;
        float *slots = slots_of(item.row, item.head);
        // Whatever reads this row's slots is done: the outputs of the row that had them, and what the next row took
        // over.
        auto wait_for_slots = [&] {
            if (item.row >= a.ring_rows) {
                const int64_t back = at - (int64_t)a.ring_rows * a.n_kv_heads;
                wait_for(&outputs_done[back], a.rows[item.row - a.ring_rows].n_segments);
                wait_for(&outputs_done[back + a.n_kv_heads], a.rows[item.row - a.ring_rows + 1].n_segments);
            }
        };
        RunningState<D> r;
        if (!item.is_output) {
            state_clear<D>(r);
            const double log_decay = run_segment<D, hopper, false>(a, s, shared, r, 0.0);
            wait_for_slots();
            float *to = slots + (item.segment + 1) * slot;
            state_store<D>(r, to);
            if (threadIdx.x == 0)
                *reinterpret_cast<double *>(to + D * D + D) = log_decay;
            const int before = count_up(&states_done[at]);
            if (threadIdx.x == 0)
                shared.is_composer = before + 1 == row.n_segments - row.is_last;
            __syncthreads();
            if (shared.is_composer) {
                if (row.is_first)
                    __threadfence();
                else
                    wait_for(&composed[at - a.n_kv_heads], 1);
                const int n_before = row.is_first ? 0 : a.rows[item.row - 1].n_segments;
                compose_slots<D>(a, s, row, slots, row.is_first ? nullptr : slots_of(item.row - 1, item.head), n_before,
                                 r);
                count_up(&composed[at]);
            }
        } else {
            const float *from = slots + item.segment * slot;
            if (row.n_segments == 1 && row.is_last) { // no state item, so nobody composed this row
                if (row.is_first) {
                    wait_for_slots();
                    state_begin<D>(a, s, slots);
                } else {
                    wait_for(&composed[at - a.n_kv_heads], 1);
                    from = slots_of(item.row - 1, item.head) + a.rows[item.row - 1].n_segments * slot;
                }
            } else {
                wait_for(&composed[at], 1);
            }
            state_load<D>(r, from);
            const double log_sum = __ldcg(reinterpret_cast<const double *>(from + D * D + D));
            run_segment<D, hopper, true>(a, s, shared, r, log_sum);
            count_up(&outputs_done[at]);
        }
        __syncthreads();
    }
#endif
}

} // namespace ts
#endif
