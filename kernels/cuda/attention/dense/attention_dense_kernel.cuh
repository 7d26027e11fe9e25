// The bf16 kernels of the dense form that read k and v twice. See attention_dense_runs.cuh for the order of the work.
#ifndef TS_CUDA_ATTENTION_DENSE_KERNEL_CUH
#define TS_CUDA_ATTENTION_DENSE_KERNEL_CUH

#include "kernels/cuda/attention/dense/attention_dense_state.cuh"

namespace ts {

// What a block works on at a time. Tokens are counted from the first chunk's begin, a multiple of kChunk.
struct Segment {
    int64_t row; // of token 0 in the batch; negative where the span begins inside its first chunk
    int head;
    int n_chunks;
    int begin, end;    // the span's tokens
    int closing_chunk; // the span's last whole one, whose state goes to the cache; -1 when that is elsewhere
};

// Segment that begins `first_chunk` chunks into the run.
template <int D>
__device__ __forceinline__ Segment segment_of(const DenseArgs &a, const Run &run, int first_chunk, int n_run_chunks) {
    const int64_t position = run.span.position, span_end = position + run.span.n_tokens;
    const int n_chunks = min(DenseShape<D>::segment / kChunk, n_run_chunks - first_chunk);
    const int64_t first = (position / kChunk + (int64_t)run.index * run.cut.run_chunks + first_chunk) * kChunk,
                  end = min(first + n_chunks * kChunk, span_end);
    const int64_t open_start = span_end / kChunk * kChunk;
    Segment s;
    s.row = run.span.row + first - position;
    s.head = run.head;
    s.n_chunks = n_chunks;
    s.begin = (int)max(position - first, (int64_t)0);
    s.end = (int)(end - first);
    s.closing_chunk = -1;
    if (open_start > position && open_start > first && open_start <= end)
        s.closing_chunk = (int)((open_start - first) / kChunk) - 1;
    return s;
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
        const DecaySums c = sum_decays(decay);
        const int at = chunk * kChunk + 2 * lane;
        *reinterpret_cast<float2 *>(&shared.log_decay[at]) = c.to;
        if (outputs) { // k^ in shared memory has its gate already
            *reinterpret_cast<uint32_t *>(&shared.key_gate[at]) = pack_bf16(gate[0], gate[1]);
            gate[0] = gate[1] = 1.0f;
        }
        *reinterpret_cast<uint32_t *>(&shared.to_end[at]) =
            pack_bf16(gate[0] * exp2_fast(c.all - c.to.x), gate[1] * exp2_fast(c.all - c.to.y));
    }
}

// Features of the rows that this thread copied, in place: q becomes q^, k with its gates k^, eqs. (1) to (4).
template <int D, bool gated>
__device__ __forceinline__ void map_rows(DenseShared<D> &shared, uint32_t rows, uint32_t offset, int gates) {
    using Copy = RowCopy<D>;
    const unsigned short *gate =
        reinterpret_cast<const unsigned short *>(shared.key_gate) + gates + threadIdx.x / Copy::units;
#pragma unroll
    for (int i = 0; i < kChunk / Copy::rows_at_once; i++) {
        const uint32_t at = rows + offset + i * Copy::rows_at_once * kPanelRowBytes;
        uint4 x = load_shared16(at);
        x.x = feature_map(x.x), x.y = feature_map(x.y), x.z = feature_map(x.z), x.w = feature_map(x.w);
        if (gated) {
            const uint32_t g = gate[i * Copy::rows_at_once] * 0x10001u;
            x.x = multiply_bf16(x.x, g), x.y = multiply_bf16(x.y, g);
            x.z = multiply_bf16(x.z, g), x.w = multiply_bf16(x.w, g);
        }
        store_shared16(at, x);
    }
}

// Of two warpgroups, this one is done with what the other will overwrite; and the other half of that.
__device__ __forceinline__ void tell_other_group(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory");
}

__device__ __forceinline__ void wait_for_other_group(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}

// Fragments of e^{c_last - c_m} k^_m, transposed: [the warpgroup's 64 features, 64 tokens], per k16 step of tokens; z
// takes their sum. The panel holds k^, or k where `map` is set.
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

// Loads of a segment's rows, a step at a time: a step is a chunk and, for outputs, a head of the group.
template <int D, bool outputs> struct Loader {
    static constexpr uint32_t stage_bytes = DenseShape<D>::panels * DenseShape<D>::panel_bytes;
    RowCopy<D> copy;
    int64_t k_column, v_column; // from the column of the group's first head
    uint32_t q, k, v;           // first stages
    int chunk, head, n_heads, first_whole, end_whole, n_chunks;

    __device__ __forceinline__ Loader(const DenseArgs &a, const Segment &s, const DenseShared<D> &shared) {
        n_heads = a.n_heads / a.n_kv_heads;
        copy = row_copy<D>(a, s, (int64_t)s.head * n_heads * D);
        k_column = (int64_t)(a.n_heads + s.head - s.head * n_heads) * D;
        v_column = k_column + (int64_t)a.n_kv_heads * D;
        q = shared_address(shared.q[0]), k = shared_address(shared.k[0]), v = shared_address(shared.v[0]);
        chunk = head = 0;
        first_whole = s.begin > 0, end_whole = s.end / kChunk, n_chunks = s.n_chunks;
    }
    __device__ __forceinline__ uint32_t stage_of(int step) const {
        return (step & 1) * stage_bytes;
    }
    __device__ __forceinline__ bool is_whole(int chunk) const {
        return chunk >= first_whole && chunk < end_whole;
    }
    __device__ __forceinline__ void next(const DenseArgs &a, const Segment &s) {
        if (chunk < n_chunks) {
            RowCopy<D> from = copy;
            if (head == 0) {
                from.from = copy.from + k_column;
                copy_rows<D>(a, s, from, chunk, is_whole(chunk), k + stage_of(chunk));
                from.from = copy.from + v_column;
                copy_rows<D>(a, s, from, chunk, is_whole(chunk), v + stage_of(chunk));
            }
            if (outputs) {
                from.from = copy.from + head * D;
                copy_rows<D>(a, s, from, chunk, is_whole(chunk), q + stage_of(chunk * n_heads + head));
            }
            if (!outputs || ++head == n_heads)
                head = 0, chunk++;
        }
        copy_commit();
    }
};

// r, already scaled, += what the weighted keys f and the chunk's v give.
template <int D> __device__ __forceinline__ void add_keys(RunningState<D> &r, const uint32_t (&f)[4][4], uint32_t v) {
    using Shape = DenseShape<D>;
#pragma unroll
    for (int b = 0; b < Shape::panels; b++)
#pragma unroll
        for (int t = 0; t < 4; t++)
            warp_product_columns(r.s[b], f[t], v + b * Shape::panel_bytes, t);
}

// One segment: r becomes 2^(log decay) r + the segment's own (S, z). Returns log_sum + the sum of the log decays, in
// powers of 2.
template <int D>
__device__ __forceinline__ double run_states(const DenseArgs &a, const Segment &s, DenseShared<D> &shared,
                                             RunningState<D> &r, double log_sum) {
    const int group = threadIdx.x / 128;
    Loader<D, false> loader(a, s, shared);
    loader.next(a, s);
    loader.next(a, s);
    load_gates<D, false>(a, s, shared);
    for (int chunk = 0; chunk < s.n_chunks; chunk++) {
        const uint32_t stage = loader.stage_of(chunk);
        copy_wait<1>();
        __syncthreads();
        const float log_decay = shared.log_decay[chunk * kChunk + kChunk - 1];
        state_scale<D>(r, exp2_fast(log_decay));
        log_sum += log_decay;
        uint32_t f[4][4];
        load_keys_transposed<D, true>(f, r.z, shared, loader.k + stage + group * DenseShape<D>::panel_bytes,
                                      chunk * kChunk);
        add_keys<D>(r, f, loader.v + stage);
        __syncthreads();
        loader.next(a, s);
    }
    return log_sum;
}

// One segment: from the state r to y, and the cache's new state where a span's last complete tile ends. While a step's
// last products run, the next step's rows are mapped, by the threads that copied them.
template <int D>
__device__ __forceinline__ double run_outputs(const DenseArgs &a, const Segment &s, int64_t at, DenseShared<D> &shared,
                                              RunningState<D> &r, double log_sum) {
    using Shape = DenseShape<D>;
    constexpr int blocks = Shape::panels;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    Loader<D, true> loader(a, s, shared);
    const int heads = loader.n_heads;
    const uint32_t state = shared_address(shared.state) + group * D * kPanelRowBytes;
    auto map_step = [&](int chunk, int head) {
        copy_wait<0>();
        if (head == 0)
            map_rows<D, true>(shared, loader.k + loader.stage_of(chunk), loader.copy.to, chunk * kChunk);
        if (blocks > 1) // several warpgroups read the same q
            map_rows<D, false>(shared, loader.q + loader.stage_of(chunk * heads + head), loader.copy.to, 0);
    };
    loader.next(a, s);
    load_gates<D, true>(a, s, shared);
    __syncthreads();
    map_step(0, 0);
    state_publish<D>(r, shared);
    for (int chunk = 0; chunk < s.n_chunks; chunk++)
        for (int i = 0; i < heads; i++) {
            const int gates = chunk * kChunk;
            const uint32_t q = loader.q + loader.stage_of(chunk * heads + i), k = loader.k + loader.stage_of(chunk),
                           v = loader.v + loader.stage_of(chunk);
            __syncthreads();
            loader.next(a, s);
            uint32_t fq[4 * blocks][4];
#pragma unroll
            for (int t = 0; t < 4 * blocks; t++)
                load_matrices(fq[t], panel_unit(q + t / 4 * Shape::panel_bytes, 16 * warp + (lane & 15),
                                                t % 4 * 2 + (lane >> 4)));
            if (blocks == 1) {
#pragma unroll
                for (int t = 0; t < 4; t++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        fq[t][e] = feature_map(fq[t][e]);
            }
            Accumulator y, weights;
            float mass[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    y[j][e] = weights[j][e] = 0.0f;
#pragma unroll
            for (int t = 0; t < 4 * blocks; t++) {
                warp_product_rows(weights, fq[t], k + t / 4 * Shape::panel_bytes, t % 4, 2 * warp + 2);
                warp_product_columns(y, fq[t], state, t);
            }
#pragma unroll
            for (int t = 0; t < 4 * blocks; t++) {
                const uint32_t *z = reinterpret_cast<const uint32_t *>(shared.mass) + 8 * t + lane % 4;
                mma(mass, fq[t], z[0], z[4]);
            }
            if (blocks > 1)
                tell_other_group(group); // done with q^ and S^
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
            decay_weights(fw, weights, shared.log_decay + gates, c0, c1);
#pragma unroll
            for (int t = 0; t < 4; t++)
                if (t <= warp)
                    warp_product_columns(y, fw[t], v + group * Shape::panel_bytes, t);
#pragma unroll
            for (int t = 0; t < 4; t++)
                mma(mass, fw[t], kOnes, kOnes);
            const bool is_last_head = i == heads - 1;
            if (is_last_head) {
                const float log_decay = shared.log_decay[gates + kChunk - 1];
                state_scale<D>(r, exp2_fast(log_decay));
                log_sum += log_decay;
                uint32_t fk[4][4];
                load_keys_transposed<D, false>(fk, r.z, shared, k + group * Shape::panel_bytes, gates);
                add_keys<D>(r, fk, v);
                if (chunk + 1 < s.n_chunks)
                    map_step(chunk + 1, 0);
            } else {
                map_step(chunk, i + 1);
            }
            if (blocks > 1)
                wait_for_other_group(group);
            // Through the warp's own rows of q, so that a row of y is written in units of 16 bytes.
            const uint32_t panel = q + group * Shape::panel_bytes;
            store_accumulator(panel, 16 * warp, y, __fdividef(1.0f, mass[0] + a.normalizer_eps),
                              __fdividef(1.0f, mass[2] + a.normalizer_eps));
            __syncwarp();
            const int first_row = 16 * warp + lane / 8;
            __nv_bfloat16 *to = a.y + (s.row + gates + first_row) * a.y_stride + (int64_t)(s.head * heads + i) * D +
                                group * 64 + lane % 8 * 8;
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const uint4 x = load_shared16(panel_unit(panel, first_row + 4 * t, lane % 8));
                const int n = gates + first_row + 4 * t;
                if (loader.is_whole(chunk) || (n >= s.begin && n < s.end))
                    __stcs(reinterpret_cast<uint4 *>(to), x);
                to += 4 * a.y_stride;
            }
            if (is_last_head) {
                if (blocks == 1)
                    __syncthreads(); // S^ has been read
                state_publish<D>(r, shared);
                if (chunk == s.closing_chunk)
                    state_end<D>(a, at, r, log_sum * 0.6931471805599453);
            }
        }
    __syncthreads();
    return log_sum;
}

// One run: what it adds to the state, or its outputs. blockIdx.x: see find_run.
template <int D, bool outputs>
__global__ void __launch_bounds__(DenseShape<D>::threads, DenseShape<D>::blocks_per_multiprocessor)
    dense_runs(const __grid_constant__ DenseArgs a) {
#if TS_HAS_WGMMA || __CUDA_ARCH__ == 800
    extern __shared__ __align__(1024) unsigned char bytes[];
    DenseShared<D> &shared = *reinterpret_cast<DenseShared<D> *>(bytes);
    const Run run = find_run<outputs>(a.spans, a.n_spans, a.n_kv_heads, a.wanted_runs, blockIdx.x);
    const int64_t at = (int64_t)run.span.sequence * a.n_kv_heads + run.head;
    const int64_t slot_stride = (int64_t)a.n_kv_heads * slot_floats(D);
    float *slot = a.slots + (run.first_slot + run.head) * slot_floats(D);
    const int n_chunks = min(run.cut.run_chunks, run.cut.n_chunks - run.index * run.cut.run_chunks);
    double log_sum = 0.0;
    RunningState<D> r;
    auto keep = [&](float *to) {
        state_store<D>(r, to);
        if (threadIdx.x == 0)
            *reinterpret_cast<double *>(to + D * D + D) = log_sum;
    };
    if (!outputs) {
        if (run.index == 0) {
            log_sum = state_begin<D>(a, run, at, r);
            keep(slot);
        }
        state_clear<D>(r);
        log_sum = 0.0;
    } else if (run.cut.n_runs == 1) {
        log_sum = state_begin<D>(a, run, at, r);
    } else {
        state_clear<D>(r);
        for (int i = 0; i <= run.index; i++)
            log_sum += state_append<D>(r, slot + i * slot_stride);
    }
    for (int first = 0; first < n_chunks; first += DenseShape<D>::segment / kChunk) {
        const Segment s = segment_of<D>(a, run, first, n_chunks);
        log_sum = outputs ? run_outputs<D>(a, s, at, shared, r, log_sum) : run_states<D>(a, s, shared, r, log_sum);
    }
    if (!outputs)
        keep(slot + (run.index + 1) * slot_stride);
#endif
}

} // namespace ts
#endif
