// Eq. (9) for every piece: y = (e^c q^ S^ + P V) / (e^c q^ z^ + P 1 + eps), P[n, m] = e^{c_n - c_m} q^_n . k^_m for
// m <= n. One block a piece and KV head; rows of 64 queries, and matrices staged in chunks of 64 rows.
#include "kernels/cuda/attention.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64; // queries and keys at a time
constexpr int kPad = 4;   // floats: keeps rows aligned to 16 bytes and apart in banks

template <int D> constexpr int shared_bytes() {
    return (2 * kRows * (D + kPad) + kRows * (kRows + kPad)) * (int)sizeof(float);
}

template <typename A, int D>
__global__ void __launch_bounds__(kThreads) outputs_kernel(const __grid_constant__ ts_cuda_attention a) {
    extern __shared__ float4 stage[];
    constexpr int L = D + kPad, P = kRows + kPad, C = D / 16; // C: output columns of a thread
    float *queries = (float *)stage, *staged = queries + kRows * L, *weights = staged + kRows * L;
    __shared__ double c_of[128];
    __shared__ float masses[D];
    const int tid = threadIdx.x, j = blockIdx.y, n_kv = a.cache.n_kv_heads;
    const ts_cuda_piece piece = a.pieces.at[blockIdx.x];
    const int64_t head = ts::head_of(a, piece.sequence, j);
    const ts::tile_keys<A, D> tile(a, piece, j);
    const float *state = a.cache.state + head * D * D, *mass = a.cache.mass + head * D;
    if (!piece.begins_span) {
        const int64_t at = a.pieces.at[blockIdx.x - 1].closed * n_kv + j;
        state = a.next_states + at * D * D;
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
                    ts::store4(staged + r * L + e, ts::load4(state + (k0 + r) * D + e));
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
}

template <typename A, typename S, int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    (void)cudaFuncSetAttribute(outputs_kernel<A, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<D>());
    outputs_kernel<A, D>
        <<<dim3((unsigned)a->pieces.n_pieces, (unsigned)a->cache.n_kv_heads), kThreads, shared_bytes<D>(), stream>>>(
            *a);
}

} // namespace

ts_status ts_cuda_attention_outputs(cudaStream_t stream, const ts_cuda_attention *a) {
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: outputs");
}
