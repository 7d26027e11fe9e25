// First pass of prefill, one block a piece and KV head: what depends on the piece's own tokens alone. Decay is summed
// in f64; the state of a tile that completes is a [d, T] by [T, d] product accumulated in f32, of BF16 operands where
// the activations are BF16. z is summed from k^ before that rounding.
#include "kernels/cuda/attention/tiles/tile_state.cuh"

#include <type_traits>

namespace {

using ts::kChunk, ts::kThreads;

constexpr int kBlocksAhead = 128; // how far ahead of itself a block asks for rows in L2
constexpr int kMaxTile = 128, kWarps = kThreads / 32;

// Inclusive sums over kMaxTile threads; the rest pass through.
__device__ double scan_tile(double x, double *totals) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const double y = __shfl_up_sync(~0u, x, step);
        if (lane >= step)
            x += y;
    }
    if (lane == 31)
        totals[warp] = x;
    __syncthreads();
    for (int i = 0; i < warp && warp < kMaxTile / 32; i++)
        x += totals[i];
    return x;
}

// Rows of a state staged in shared memory.
template <typename W, int D> constexpr int kStatePitch = D + 16 / (int)sizeof(W);

// Adds up over the lanes that hold the same columns; the first of them write the warp's share of [kWarps, D].
template <int D> __device__ void share_columns(float (&x)[8], float *shares) {
    constexpr int kVectors = D / 8;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = kVectors; step < 32; step *= 2)
#pragma unroll
        for (int e = 0; e < 8; e++)
            x[e] += __shfl_xor_sync(~0u, x[e], step);
    if (lane < kVectors) {
        float *to = shares + threadIdx.x / 32 * D + 8 * lane;
        ts::store4(to, make_float4(x[0], x[1], x[2], x[3]));
        ts::store4(to + 4, make_float4(x[4], x[5], x[6], x[7]));
    }
}

template <int D> __device__ float column_sum(const float *shares, int column) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; i++)
        sum += shares[i * D + column];
    return sum;
}

// A whole tile of kChunk tokens in BF16, which is nearly every piece of a long prompt: all loads are on their way
// before the first is needed, and nothing is read twice.
template <typename S, int D>
__device__ void whole_tile(const ts_cuda_attention &a, const ts_cuda_piece &piece, int64_t of_piece, int j,
                           float4 *stage, float *scale_of, double *totals) {
    using W = typename ts::raw_state<ts::bf16, S>::type;
    constexpr int L = D + 8, kVectors = D / 8, kRows = kThreads / kVectors, kItems = kChunk / kRows;
    constexpr int kSplit = kWarps / (D / 16), kColumns = D / kSplit, kPitch = kStatePitch<W, D>;
    static_assert(kThreads >= 2 * D, "one thread for each column of two sums");
    ts::bf16 *keys = (ts::bf16 *)stage, *values = keys + kChunk * L;
    float *query_shares = (float *)(values + kChunk * L), *mass_shares = query_shares + kWarps * D;
    W *staged = (W *)(mass_shares + kWarps * D);
    const int tid = threadIdx.x, n_kv = a.cache.n_kv_heads, group = a.cache.n_heads / n_kv;
    const int r0 = tid / kVectors, column = tid % kVectors * 8;
    const int64_t stride = a.qkvg.stride, place = ts::tile_place(a, piece.span, piece.sequence, piece.closed, j);
    const ts::token_row<ts::bf16> first = ts::row_of<ts::bf16, D>(a, piece.row);
    const int64_t row_ahead = piece.row + (kBlocksAhead / n_kv + 1) * kChunk + tid % kChunk;
    if (tid < 3 * kChunk && row_ahead < a.n_rows) {
        const ts::bf16 *row = (tid < kChunk       ? first.k
                               : tid < 2 * kChunk ? first.v
                                                  : first.q + j * (group - 1) * D) +
                              j * D;
#pragma unroll
        for (int e = 0; e < D; e += 64)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(row + (row_ahead - piece.row) * stride + e));
    }
    uint4 raw_k[kItems], raw_v[kItems], raw_q[kItems];
#pragma unroll
    for (int i = 0; i < kItems; i++) {
        const int64_t at = (r0 + i * kRows) * stride + j * D + column;
        raw_k[i] = ts::load_raw(first.k + at);
        raw_v[i] = ts::load_raw(first.v + at);
        raw_q[i] = ts::load_raw(first.q + at + j * (group - 1) * D);
    }
    double decay = 0;
    float gate = 0;
    if (tid < kChunk) {
        decay = ts::log_decay(first.decay_gate + tid * stride + j, a.decay_temperature);
        gate = ts::key_gate(first.key_gate + tid * stride + j);
    }
    const double c = scan_tile(decay, totals), c_last = totals[0] + totals[1];
    if (tid < kChunk) {
        scale_of[tid] = gate * ts::reach_of(c_last - c);
        a.c[j * a.n_rows + piece.row + tid] = c;
        a.gate[j * a.n_rows + piece.row + tid] = gate;
    }
    float sums[8] = {};
#pragma unroll
    for (int i = 0; i < kItems; i++) {
        float x[8];
        ts::unpack(raw_q[i], x);
#pragma unroll
        for (int e = 0; e < 8; e++)
            sums[e] += ts::elu1_fast(x[e]);
        for (int h = 1; h < group; h++) {
            ts::unpack(ts::load_raw(first.q + (r0 + i * kRows) * stride + (j * group + h) * D + column), x);
#pragma unroll
            for (int e = 0; e < 8; e++)
                sums[e] += ts::elu1_fast(x[e]);
        }
    }
    share_columns<D>(sums, query_shares);
    __syncthreads();
    float masses[8] = {};
#pragma unroll
    for (int i = 0; i < kItems; i++) {
        const int m = r0 + i * kRows;
        const float scale = scale_of[m];
        float x[8];
        ts::unpack(raw_k[i], x);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            x[e] = scale * ts::elu1_fast(x[e]);
            masses[e] += x[e];
        }
        ts::store_packed(keys + m * L + column, x);
        *(uint4 *)(values + m * L + column) = raw_v[i];
    }
    share_columns<D>(masses, mass_shares);
    __syncthreads();
    const int64_t at = piece.closed * n_kv + j;
    if (tid < D) {
        const float mass = column_sum<D>(mass_shares, tid);
        a.tile_masses[at * D + tid] = mass;
        if (place >= 0)
            a.cache.slot_mass[place * D + tid] = mass;
        const double share = ts::warp_sum((double)mass);
        if (tid % 32 == 0)
            totals[tid / 32] = share;
    } else if (tid < 2 * D) {
        a.query_sums[(of_piece * n_kv + j) * D + tid - D] =
            column_sum<D>(query_shares, tid - D) / (float)(kChunk * group);
    }
    const int lane = tid % 32, row = tid / 32 % (D / 16) * 16, begin = tid / 32 / (D / 16) * kColumns;
    float acc[kColumns / 8][4] = {};
#pragma unroll
    for (int m = 0; m < kChunk; m += 16) {
        uint32_t k[4];
        ts::load_a_transposed(k, keys, L, row, m);
#pragma unroll
        for (int n = 0; n < kColumns / 16; n++) {
            uint32_t v[4];
            ts::load_b(v, values, L, m, begin + 16 * n);
            ts::multiply_add(acc[2 * n], k, v[0], v[1]);
            ts::multiply_add(acc[2 * n + 1], k, v[2], v[3]);
        }
    }
    W *to = staged + (row + lane / 4) * kPitch + begin + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kColumns / 8; n++) {
        ts::store2(to + 8 * n, acc[n][0], acc[n][1]);
        ts::store2(to + 8 * kPitch + 8 * n, acc[n][2], acc[n][3]);
    }
    __syncthreads();
    if (place >= 0)
        ts::store_state<S, D, kThreads>(staged, kPitch, a.cache.slot_state, a.cache.slot_scale, place);
    else
        ts::store_state<S, D, kThreads>(staged, kPitch, a.tile_states, a.tile_scales, ~place);
    if (tid == 0) {
        double sum = 0;
        for (int i = 0; i < D / 32; i++)
            sum += totals[i];
        a.tile_sums[j * a.pieces.n_closed + piece.closed] = sum;
        a.tile_decays[j * a.pieces.n_closed + piece.closed] = c_last;
    }
}

template <typename A, typename S, int D>
__global__ void __launch_bounds__(kThreads, D == 64 ? 4 : 2) tiles_kernel(const __grid_constant__ ts_cuda_attention a) {
    ts::follow_front();
    extern __shared__ float4 stage[];
    constexpr bool kMatrix = std::is_same<A, ts::bf16>::value;
    __shared__ float reach_of[kMaxTile];
    __shared__ double c_of[kMaxTile], totals[kThreads / 32];
    __shared__ float gate_of[kMaxTile];
    const int tid = threadIdx.x, n_kv = a.cache.n_kv_heads, T = a.cache.tile_size;
    // Heads vary fastest: those of a piece share the sectors that its gates lie in.
    const int64_t of_piece = blockIdx.x / n_kv;
    const int j = blockIdx.x % n_kv;
    const ts_cuda_piece piece = a.pieces.at[of_piece];
    const int64_t head = ts::head_of(a, piece.sequence, j), open = head * T;
    const int group = a.cache.n_heads / n_kv;
    const bool closes = piece.closed >= 0;
    if constexpr (kMatrix)
        if (T == kChunk && piece.n_tokens == kChunk) {
            whole_tile<S, D>(a, piece, of_piece, j, stage, reach_of, totals);
            return;
        }
    const float mean = closes ? 1.0f / (float)(T * group) : 1.0f;
    float *query_sum = a.query_sums + (of_piece * n_kv + j) * D;
    const bool mine = tid < piece.n_tokens;
    double decay = 0;
    if (mine) {
        const ts::token_row<A> row = ts::row_of<A, D>(a, piece.row + tid);
        decay = ts::log_decay(row.decay_gate + j, a.decay_temperature);
        gate_of[tid] = ts::key_gate(row.key_gate + j);
    }
    double c = scan_tile(decay, totals);
    if (mine) {
        if (piece.first > 0)
            c += a.cache.open_c[open + piece.first - 1];
        c_of[tid] = c;
        a.c[j * a.n_rows + piece.row + tid] = c;
        a.gate[j * a.n_rows + piece.row + tid] = gate_of[tid];
    }
    constexpr int kVectors = D / 4, kShares = kThreads / kVectors;
    float4 queries = make_float4(0, 0, 0, 0);
    for (int i = tid / kVectors; i < piece.n_tokens; i += kShares) {
        const A *q = ts::row_of<A, D>(a, piece.row + i).q + j * group * D + tid % kVectors * 4;
        for (int h = 0; h < group; h++) {
            const float4 x = ts::load4(q + h * D);
            queries.x += ts::elu1(x.x), queries.y += ts::elu1(x.y), queries.z += ts::elu1(x.z),
                queries.w += ts::elu1(x.w);
        }
    }
    stage[tid] = queries;
    __syncthreads();
    if (tid < D) {
        float all = 0;
        for (int share = 0; share < kShares; share++)
            all += ((const float *)stage)[share * D + tid];
        if (piece.first > 0)
            all += a.cache.query_sum[head * D + tid];
        query_sum[tid] = mean * all;
    }
    if (piece.first > 0) {
        for (int i = tid; i < piece.n_tokens * D; i += kThreads) {
            const int m = i / D, e = i % D;
            const ts::token_row<A> row = ts::row_of<A, D>(a, piece.row + m);
            const int64_t to = (open + piece.first + m) * D + e;
            ((A *)a.cache.open_k)[to] = ts::open_key(row.k + j * D + e, gate_of[m]);
            ((A *)a.cache.open_v)[to] = row.v[j * D + e];
        }
        if (mine && sizeof(A) < 4)
            a.cache.open_gate[open + piece.first + tid] = gate_of[tid];
        if (mine)
            a.cache.open_c[open + piece.first + tid] = c_of[tid];
    }
    __syncthreads();
    if (!closes)
        return;

    const ts::tile_keys<A, D> tile(a, piece, j);
    const double c_last = tile.c[T - 1];
    if (tid < T)
        reach_of[tid] = ts::reach_of(c_last - tile.c[tid]);
    const int64_t at = piece.closed * n_kv + j, place = ts::tile_place(a, piece.span, piece.sequence, piece.closed, j);
    using W = typename ts::raw_state<A, S>::type;
    constexpr int kPitch = kStatePitch<W, D>;
    W *staged = (W *)((char *)stage + ts::kStateStage<A, D>);
    float4 mass4 = make_float4(0, 0, 0, 0);
    ts::tile_state<A, D, kThreads>(
        tile, T, reach_of, stage, &mass4, ts::from_zero(),
        [&](int row, int column, float x, float y) { ts::store2(staged + row * kPitch + column, x, y); });
    const float mass = ts::tile_mass<D, kThreads>(mass4, stage); // waits for all of the state
    if (place >= 0)
        ts::store_state<S, D, kThreads>(staged, kPitch, a.cache.slot_state, a.cache.slot_scale, place);
    else
        ts::store_state<S, D, kThreads>(staged, kPitch, a.tile_states, a.tile_scales, ~place);
    if (tid < D) {
        a.tile_masses[at * D + tid] = mass;
        if (place >= 0)
            a.cache.slot_mass[place * D + tid] = mass;
    }
    const double sum = ts::block_sum(tid < D ? (double)mass : 0.0, totals);
    if (tid == 0) {
        a.tile_sums[j * a.pieces.n_closed + piece.closed] = sum;
        a.tile_decays[j * a.pieces.n_closed + piece.closed] = c_last;
    }
}

template <typename A, typename S, int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    using W = typename ts::raw_state<A, S>::type;
    const int of_keys = ts::kStateStage<A, D>, of_state = D * kStatePitch<W, D> * (int)sizeof(W);
    const int bytes = of_keys + 2 * kWarps * D * (int)sizeof(float) + of_state;
    (void)cudaFuncSetAttribute(tiles_kernel<A, S, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    ts::launch_pass(stream, a, tiles_kernel<A, S, D>, (unsigned)(a->pieces.n_pieces * a->cache.n_kv_heads), kThreads,
                    bytes);
}

} // namespace

ts_status ts_cuda_attention_tiles(cudaStream_t stream, const ts_cuda_attention *a) {
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: states of tiles");
}
