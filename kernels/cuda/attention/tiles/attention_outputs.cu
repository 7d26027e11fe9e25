// Eq. (9) for every piece: y = (e^c q^ S^ + P V) / (e^c q^ z^ + P 1 + eps), P[n, m] = e^{c_n - c_m} q^_n . k^_m for
// m <= n. One block a piece and KV head; rows of 64 queries, and matrices staged in chunks of 64 rows. BF16 activations
// go through the matrix units: q^, k^, S^ and P are rounded to BF16, sums, decay and the denominator are f32. F32
// activations are multiplied in f32.
#include "kernels/cuda/attention/attention.cuh"
#include "kernels/cuda/primitives/warp_matrix.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64; // queries and keys at a time
constexpr int kPad = 4;   // floats: keeps rows aligned to 16 bytes and apart in banks

// With only_first the kernel in front is choose, which began when all that is read here was there, and the one behind
// writes none of it before it waits.
__device__ __forceinline__ void begin_pass(bool only_first) {
    only_first ? ts::let_next_begin() : ts::follow_front();
}
__device__ __forceinline__ void end_pass(bool only_first) {
    if (only_first)
        ts::wait_for_front();
}

template <int D> constexpr int shared_bytes() {
    return (2 * kRows * (D + kPad) + kRows * (kRows + kPad)) * (int)sizeof(float);
}

template <typename A, int D>
__global__ void __launch_bounds__(kThreads)
    outputs_kernel(const __grid_constant__ ts_cuda_attention a, bool only_first) {
    begin_pass(only_first);
    extern __shared__ float4 stage[];
    constexpr int L = D + kPad, P = kRows + kPad, C = D / 16; // C: output columns of a thread
    float *queries = (float *)stage, *staged = queries + kRows * L, *weights = staged + kRows * L;
    __shared__ double c_of[128];
    __shared__ float masses[D];
    const int tid = threadIdx.x, j = blockIdx.y, n_kv = a.cache.n_kv_heads;
    const int64_t number = only_first ? a.pieces.begin[blockIdx.x] : blockIdx.x;
    const ts_cuda_piece piece = a.pieces.at[number];
    const int64_t head = ts::head_of(a, piece.sequence, j);
    const ts::tile_keys<A, D> tile(a, piece, j);
    const A *state = (const A *)a.cache.state + head * D * D;
    const float *mass = a.cache.mass + head * D;
    if (!piece.begins_span) {
        const int64_t at = a.pieces.at[number - 1].closed * n_kv + j;
        state = (const A *)a.next_states + at * D * D;
        mass = a.next_masses + at * D;
    }
    const int n_keys = piece.first + piece.n_tokens, group = a.cache.n_heads / n_kv;
    if (tid < n_keys)
        c_of[tid] = tile.c[tid];
    if (tid < D)
        masses[tid] = mass[tid];
    // This thread's rows ty .. ty + 3 of the queries and columns tx + 16 i.
    const int ty = tid / 16 * 4, tx = tid % 16;
    for (int h = j * group; h < (j + 1) * group; h++)
        for (int q0 = 0; q0 < piece.n_tokens; q0 += kRows) {
            const int n_rows = min(kRows, piece.n_tokens - q0);
            __syncthreads();
            for (int i = tid; i < kRows * (D / 4); i += kThreads) {
                const int r = i / (D / 4), e = i % (D / 4) * 4;
                float4 q = make_float4(0, 0, 0, 0);
                if (r < n_rows) {
                    q = ts::load4(ts::row_of<A, D>(a, piece.row + q0 + r).q + h * D + e);
                    q = make_float4(ts::elu1(q.x), ts::elu1(q.y), ts::elu1(q.z), ts::elu1(q.w));
                }
                ts::store4(queries + r * L + e, q);
            }
            float acc[4][C] = {}, below[4] = {};
            // From before the tile.
            for (int k0 = 0; k0 < D; k0 += kRows) {
                __syncthreads();
                for (int i = tid; i < kRows * (D / 4); i += kThreads) {
                    const int r = i / (D / 4), e = i % (D / 4) * 4;
                    const int at = (k0 + r) * D + e;
                    ts::store4(staged + r * L + e, ts::load4(state + at));
                }
                __syncthreads();
                for (int k = 0; k < kRows; k++) {
                    float q[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        q[r] = queries[(ty + r) * L + k0 + k];
                        below[r] += q[r] * masses[k0 + k];
                    }
#pragma unroll
                    for (int i = 0; i < C; i++) {
                        const float s = staged[k * L + tx + 16 * i];
#pragma unroll
                        for (int r = 0; r < 4; r++)
                            acc[r][i] += q[r] * s;
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int n = piece.first + q0 + ty + r;
                const float reach = ty + r < n_rows ? ts::reach_of(c_of[n]) : 0.0f;
                below[r] *= reach;
#pragma unroll
                for (int i = 0; i < C; i++)
                    acc[r][i] *= reach;
            }
            // From within it.
            const int last = piece.first + q0 + n_rows;
            for (int m0 = 0; m0 < last; m0 += kRows) {
                __syncthreads();
                for (int i = tid; i < kRows * (D / 4); i += kThreads) {
                    const int m = i / (D / 4), e = i % (D / 4) * 4;
                    ts::store4(staged + m * L + e, m0 + m < last ? tile.key(m0 + m, e) : make_float4(0, 0, 0, 0));
                }
                __syncthreads();
                float p[4][4] = {};
                for (int k = 0; k < D; k += 4) {
                    float4 q[4], x[4];
#pragma unroll
                    for (int r = 0; r < 4; r++)
                        q[r] = ts::load4(queries + (ty + r) * L + k);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        x[i] = ts::load4(staged + (tx + 16 * i) * L + k);
#pragma unroll
                    for (int r = 0; r < 4; r++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            p[r][i] += q[r].x * x[i].x + q[r].y * x[i].y + q[r].z * x[i].z + q[r].w * x[i].w;
                }
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const int n = piece.first + q0 + ty + r;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int m = m0 + tx + 16 * i;
                        const bool seen = m <= n && ty + r < n_rows;
                        weights[(ty + r) * P + tx + 16 * i] = seen ? p[r][i] * ts::reach_of(c_of[n] - c_of[m]) : 0.0f;
                    }
                }
                __syncthreads(); // keys are done with, weights are there
                for (int i = tid; i < kRows * (D / 4); i += kThreads) {
                    const int m = i / (D / 4), e = i % (D / 4) * 4;
                    ts::store4(staged + m * L + e, m0 + m < last ? tile.value(m0 + m, e) : make_float4(0, 0, 0, 0));
                }
                __syncthreads();
                for (int m = 0; m < kRows; m++) {
                    float w[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        w[r] = weights[(ty + r) * P + m];
                        below[r] += w[r];
                    }
#pragma unroll
                    for (int i = 0; i < C; i++) {
                        const float v = staged[m * L + tx + 16 * i];
#pragma unroll
                        for (int r = 0; r < 4; r++)
                            acc[r][i] += w[r] * v;
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
                if (ty + r >= n_rows)
                    continue;
                const float scale = 1.0f / (below[r] + a.normalizer_eps);
                A *y = (A *)a.y.data + (piece.row + q0 + ty + r) * a.y.stride + h * D;
#pragma unroll
                for (int i = 0; i < C; i++)
                    ts::store(y + tx + 16 * i, acc[r][i] * scale);
            }
        }
    end_pass(only_first);
}

// A warp for 16 queries and 64 of the output's columns.
template <int D> constexpr int kMatrixThreadsOf = 128 * (D / 64);

template <int D> constexpr int matrix_shared_bytes() {
    return (D + 3 * kRows) * (D + 8) * (int)sizeof(ts::bf16);
}

template <int D>
__global__ void __launch_bounds__(kMatrixThreadsOf<D>, D == 64 ? 5 : 2)
    matrix_outputs_kernel(const __grid_constant__ ts_cuda_attention a, bool only_first) {
    begin_pass(only_first);
    extern __shared__ float4 stage[];
    constexpr int kMatrixThreads = kMatrixThreadsOf<D>, L = D + 8, kSteps = D / 16, kColumns = 64;
    constexpr int kVectors = D / 8, kVectorRows = kMatrixThreads / kVectors, kItems = kRows / kVectorRows;
    ts::bf16 *states = (ts::bf16 *)stage, *queries = states + D * L, *keys = queries + kRows * L,
             *values = keys + kRows * L;
    __shared__ float c_of[128]; // in units of log 2, for exp2
    __shared__ float masses[D];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32 % 4, begin = tid / 128 * kColumns;
    const int j = blockIdx.y, n_kv = a.cache.n_kv_heads;
    const int64_t number = only_first ? a.pieces.begin[blockIdx.x] : blockIdx.x;
    const ts_cuda_piece piece = a.pieces.at[number];
    const int64_t head = ts::head_of(a, piece.sequence, j);
    const ts::tile_keys<ts::bf16, D> tile(a, piece, j);
    const int n_keys = piece.first + piece.n_tokens, group = a.cache.n_heads / n_kv;
    const bool keys_fit = n_keys <= kRows; // then they are staged once for all query heads
    // A whole tile of kRows tokens, nearly every piece of a long prompt: its first loads leave before all others.
    const bool is_whole = piece.first == 0 && piece.n_tokens == kRows;
    uint4 raw_q[kItems], raw_k[kItems], raw_v[kItems];
    if (is_whole) {
        const ts::bf16 *q = ts::row_of<ts::bf16, D>(a, piece.row).q + j * group * D;
#pragma unroll
        for (int i = 0; i < kItems; i++) {
            const int64_t at = (tid / kVectors + i * kVectorRows) * a.qkvg.stride + tid % kVectors * 8;
            raw_q[i] = ts::load_raw(q + at);
            raw_k[i] = ts::load_raw(tile.k + at);
            raw_v[i] = ts::load_raw(tile.v + at);
        }
    }
    const ts::bf16 *state = (const ts::bf16 *)a.cache.state + head * D * D;
    const float *mass = a.cache.mass + head * D;
    if (!piece.begins_span) {
        const int64_t at = a.pieces.at[number - 1].closed * n_kv + j;
        state = (const ts::bf16 *)a.next_states + at * D * D;
        mass = a.next_masses + at * D;
    }
    if (tid < n_keys)
        c_of[tid] = (float)(tile.c[tid] * (double)ts::kLog2E);
    if (tid < D)
        masses[tid] = mass[tid];
#pragma unroll 8
    for (int i = tid; i < D * D / 8; i += kMatrixThreads)
        *(uint4 *)(states + i / (D / 8) * L + i % (D / 8) * 8) = ts::load_raw(state + 8 * i);
    if (is_whole) {
#pragma unroll
        for (int i = 0; i < kItems; i++) {
            const int r = tid / kVectors + i * kVectorRows, at = r * L + tid % kVectors * 8;
            const float gate = tile.gate[r];
            float x[8];
            ts::unpack(raw_q[i], x);
#pragma unroll
            for (int e = 0; e < 8; e++)
                x[e] = ts::elu1_fast(x[e]);
            ts::store_packed(queries + at, x);
            ts::unpack(raw_k[i], x);
#pragma unroll
            for (int e = 0; e < 8; e++)
                x[e] = gate * ts::elu1_fast(x[e]);
            ts::store_packed(keys + at, x);
            *(uint4 *)(values + at) = raw_v[i];
        }
    }
    for (int h = j * group; h < (j + 1) * group; h++)
        for (int q0 = 0; q0 < piece.n_tokens; q0 += kRows) {
            const int n_rows = min(kRows, piece.n_tokens - q0);
            const bool first_round = h == j * group && q0 == 0;
            if (!first_round)
                __syncthreads();
#pragma unroll 4
            for (int i = tid; i < kRows * (D / 4) && !(is_whole && first_round); i += kMatrixThreads) {
                const int r = i / (D / 4), e = i % (D / 4) * 4;
                float4 q = make_float4(0, 0, 0, 0);
                if (r < n_rows) {
                    q = ts::load4(ts::row_of<ts::bf16, D>(a, piece.row + q0 + r).q + h * D + e);
                    q = make_float4(ts::elu1(q.x), ts::elu1(q.y), ts::elu1(q.z), ts::elu1(q.w));
                }
                ts::store4(queries + r * L + e, q);
            }
            const int last = piece.first + q0 + n_rows;
            float acc[kColumns / 8][4] = {}, below[2] = {};
            uint32_t q[kSteps][4];
            // This thread's rows, and their places in the tile.
            const int row[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
            for (int m0 = 0; m0 < last; m0 += kRows) {
                if (m0 > 0)
                    __syncthreads();
                if ((first_round && !is_whole) || !keys_fit) {
#pragma unroll 4
                    for (int i = tid; i < kRows * (D / 4); i += kMatrixThreads) {
                        const int m = i / (D / 4), e = i % (D / 4) * 4;
                        const bool there = m0 + m < last;
                        ts::store4(keys + m * L + e, there ? tile.key(m0 + m, e) : make_float4(0, 0, 0, 0));
                        ts::store4(values + m * L + e, there ? tile.value(m0 + m, e) : make_float4(0, 0, 0, 0));
                    }
                }
                __syncthreads();
                if (m0 == 0) { // from before the tile
#pragma unroll
                    for (int k = 0; k < kSteps; k++) {
                        ts::load_a(q[k], queries, L, warp * 16, 16 * k);
#pragma unroll
                        for (int n = 0; n < kColumns / 16; n++) {
                            uint32_t b[4];
                            ts::load_b(b, states, L, 16 * k, begin + 16 * n);
                            ts::multiply_add(acc[2 * n], q[k], b[0], b[1]);
                            ts::multiply_add(acc[2 * n + 1], q[k], b[2], b[3]);
                        }
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int e = 16 * k + i / 2 * 8 + lane % 4 * 2;
                            below[i % 2] += __uint_as_float(q[k][i] << 16) * masses[e] +
                                            __uint_as_float(q[k][i] & 0xffff0000u) * masses[e + 1];
                        }
                    }
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const float reach = row[r] < n_rows ? ts::exp2_fast(c_of[piece.first + q0 + row[r]]) : 0.0f;
                        below[r] *= reach;
#pragma unroll
                        for (int n = 0; n < kColumns / 8; n++) {
                            acc[n][2 * r] *= reach;
                            acc[n][2 * r + 1] *= reach;
                        }
                    }
                }
                // From within it.
#pragma unroll
                for (int n = 0; n < kRows / 16; n++) {
                    if (m0 + 16 * n >= last || m0 + 16 * n > piece.first + q0 + warp * 16 + 15)
                        continue; // no row of the warp sees these keys
                    float p[2][4] = {};
#pragma unroll
                    for (int k = 0; k < kSteps; k++) {
                        uint32_t b[4];
                        ts::load_b_transposed(b, keys, L, 16 * k, 16 * n);
                        ts::multiply_add(p[0], q[k], b[0], b[1]);
                        ts::multiply_add(p[1], q[k], b[2], b[3]);
                    }
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int k = 0; k < 4; k++) {
                            const int r = k / 2, m = m0 + 16 * n + 8 * i + lane % 4 * 2 + k % 2;
                            const int place = piece.first + q0 + row[r];
                            const bool seen = m <= place && row[r] < n_rows;
                            p[i][k] = seen ? p[i][k] * ts::exp2_fast(c_of[place] - c_of[m]) : 0.0f;
                            below[r] += p[i][k];
                        }
                    const uint32_t weights[4] = {ts::pack(p[0][0], p[0][1]), ts::pack(p[0][2], p[0][3]),
                                                 ts::pack(p[1][0], p[1][1]), ts::pack(p[1][2], p[1][3])};
#pragma unroll
                    for (int e = 0; e < kColumns / 16; e++) {
                        uint32_t b[4];
                        ts::load_b(b, values, L, 16 * n, begin + 16 * e);
                        ts::multiply_add(acc[2 * e], weights, b[0], b[1]);
                        ts::multiply_add(acc[2 * e + 1], weights, b[2], b[3]);
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                below[r] += __shfl_xor_sync(~0u, below[r], 1);
                below[r] += __shfl_xor_sync(~0u, below[r], 2);
                if (row[r] >= n_rows)
                    continue;
                const float scale = 1.0f / (below[r] + a.normalizer_eps);
                ts::bf16 *y =
                    (ts::bf16 *)a.y.data + (piece.row + q0 + row[r]) * a.y.stride + h * D + begin + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < kColumns / 8; n++)
                    *(uint32_t *)(y + 8 * n) = ts::pack(acc[n][2 * r] * scale, acc[n][2 * r + 1] * scale);
            }
        }
    end_pass(only_first);
}

template <int D> void launch_f32(cudaStream_t stream, const ts_cuda_attention *a, bool only_first) {
    const int64_t n = only_first ? a->pieces.n_spans : a->pieces.n_pieces;
    const dim3 grid((unsigned)n, (unsigned)a->cache.n_kv_heads);
    (void)cudaFuncSetAttribute(outputs_kernel<float, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes<D>());
    ts::launch_pass(stream, a, outputs_kernel<float, D>, grid, kThreads, shared_bytes<D>(), only_first);
}

template <int D> void launch_bf16(cudaStream_t stream, const ts_cuda_attention *a, bool only_first) {
    const int64_t n = only_first ? a->pieces.n_spans : a->pieces.n_pieces;
    const dim3 grid((unsigned)n, (unsigned)a->cache.n_kv_heads);
    (void)cudaFuncSetAttribute(matrix_outputs_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               matrix_shared_bytes<D>());
    ts::launch_pass(stream, a, matrix_outputs_kernel<D>, grid, kMatrixThreadsOf<D>, matrix_shared_bytes<D>(),
                    only_first);
}

} // namespace

ts_status ts_cuda_attention_outputs(cudaStream_t stream, const ts_cuda_attention *a, bool only_first) {
    const bool d64 = a->cache.head_dim == 64;
    if (a->qkvg.dtype == TS_F32)
        d64 ? launch_f32<64>(stream, a, only_first) : launch_f32<128>(stream, a, only_first);
    else
        d64 ? launch_bf16<64>(stream, a, only_first) : launch_bf16<128>(stream, a, only_first);
    return ts_cuda_status(cudaGetLastError(), "attention: outputs");
}
