// First pass of prefill, one block a piece and KV head: what depends on the piece's own tokens alone. Decay is summed
// in f64; the state of a tile that completes is a [d, T] by [T, d] product accumulated in f32.
#include "kernels/cuda/attention.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 64; // keys staged in shared memory at a time
constexpr int kMaxTile = 128;

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

template <typename A, typename S, int D>
__global__ void __launch_bounds__(kThreads) tiles_kernel(const __grid_constant__ ts_cuda_attention a) {
    extern __shared__ float4 stage[];
    float *keys = (float *)stage, *values = keys + kChunk * D; // [kChunk, D] each
    __shared__ double c_of[kMaxTile], totals[kThreads / 32];
    __shared__ float gate_of[kMaxTile];
    __shared__ float query_parts[kThreads];
    const int tid = threadIdx.x, j = blockIdx.y, n_kv = a.cache.n_kv_heads, T = a.cache.tile_size;
    const ts_cuda_piece piece = a.pieces.at[blockIdx.x];
    const int64_t head = ts::head_of(a, piece.sequence, j), open = head * T;
    const int group = a.cache.n_heads / n_kv;
    const bool closes = piece.closed >= 0;
    const float mean = closes ? 1.0f / (float)(T * group) : 1.0f;
    float *query_sum = a.query_sums + ((int64_t)blockIdx.x * n_kv + j) * D;

    if (a.is_appended) {
        if (tid < D)
            query_sum[tid] = mean * a.cache.query_sum[head * D + tid];
    } else {
        const bool mine = tid < piece.n_tokens;
        double decay = 0;
        if (mine) {
            const ts::token_row<A> row = ts::row_of<A, D>(a, piece.row + tid);
            decay = ts::log_decay(ts::load(row.decay_gate + j), a.decay_temperature);
            gate_of[tid] = ts::key_gate(ts::load(row.key_gate + j));
        }
        double c = scan_tile(decay, totals);
        if (mine) {
            if (piece.first > 0)
                c += a.cache.open_c[open + piece.first - 1];
            c_of[tid] = c;
            a.c[j * a.n_rows + piece.row + tid] = c;
            a.gate[j * a.n_rows + piece.row + tid] = gate_of[tid];
        }
        float sum = 0;
        for (int i = tid / D; i < piece.n_tokens; i += kThreads / D) {
            const A *q = ts::row_of<A, D>(a, piece.row + i).q + j * group * D + tid % D;
            for (int h = 0; h < group; h++)
                sum += ts::elu1(ts::load(q + h * D));
        }
        query_parts[tid] = sum;
        __syncthreads();
        if (tid < D) {
            for (int part = 1; part < kThreads / D; part++)
                sum += query_parts[part * D + tid];
            if (piece.first > 0)
                sum += a.cache.query_sum[head * D + tid];
            query_sum[tid] = mean * sum;
        }
        if (piece.first > 0) {
            for (int i = tid; i < piece.n_tokens * D; i += kThreads) {
                const int m = i / D, e = i % D;
                const ts::token_row<A> row = ts::row_of<A, D>(a, piece.row + m);
                a.cache.open_k[(open + piece.first + m) * D + e] = gate_of[m] * ts::elu1(ts::load(row.k + j * D + e));
                a.cache.open_v[(open + piece.first + m) * D + e] = ts::load(row.v + j * D + e);
            }
            if (mine)
                a.cache.open_c[open + piece.first + tid] = c_of[tid];
        }
        __syncthreads();
    }
    if (!closes)
        return;

    const ts::tile_keys<A, D> tile(a, piece, j);
    const double c_last = tile.c[T - 1];
    constexpr int R = D / 64; // a thread's 4 x 4 blocks lie 64 rows and columns apart
    const int ty = tid / 16 * 4, tx = tid % 16 * 4;
    float acc[R][R][4][4] = {};
    double mass = 0;
    for (int m0 = 0; m0 < T; m0 += kChunk) {
        __syncthreads();
        for (int i = tid; i < kChunk * D / 4; i += kThreads) {
            const int m = i / (D / 4), e = i % (D / 4) * 4;
            const float reach = ts::reach_of(c_last - tile.c[m0 + m]);
            float4 k = tile.key(m0 + m, e);
            k.x *= reach, k.y *= reach, k.z *= reach, k.w *= reach;
            ts::store4(keys + m * D + e, k);
            ts::store4(values + m * D + e, tile.value(m0 + m, e));
        }
        __syncthreads();
        if (tid < D)
            for (int m = 0; m < kChunk; m++)
                mass += (double)keys[m * D + tid];
        for (int m = 0; m < kChunk; m++) {
            float4 k[R], v[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                k[r] = ts::load4(keys + m * D + r * 64 + ty);
                v[r] = ts::load4(values + m * D + r * 64 + tx);
            }
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int q = 0; q < R; q++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float x = i == 0 ? k[r].x : i == 1 ? k[r].y : i == 2 ? k[r].z : k[r].w;
                        acc[r][q][i][0] += x * v[q].x;
                        acc[r][q][i][1] += x * v[q].y;
                        acc[r][q][i][2] += x * v[q].z;
                        acc[r][q][i][3] += x * v[q].w;
                    }
        }
    }
    const int64_t at = piece.closed * n_kv + j;
    S *state = (S *)a.tile_states + at * D * D;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int q = 0; q < R; q++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                ts::store4(state + (r * 64 + ty + i) * D + q * 64 + tx,
                           make_float4(acc[r][q][i][0], acc[r][q][i][1], acc[r][q][i][2], acc[r][q][i][3]));
    if (tid < D)
        a.tile_masses[at * D + tid] = (float)mass;
    const double sum = ts::block_sum(tid < D ? (double)(float)mass : 0.0, totals);
    if (tid == 0) {
        a.tile_sums[j * a.pieces.n_closed + piece.closed] = sum;
        a.tile_decays[j * a.pieces.n_closed + piece.closed] = c_last;
    }
}

template <typename A, typename S, int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    const int bytes = 2 * kChunk * D * (int)sizeof(float);
    (void)cudaFuncSetAttribute(tiles_kernel<A, S, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    tiles_kernel<A, S, D>
        <<<dim3((unsigned)a->pieces.n_pieces, (unsigned)a->cache.n_kv_heads), kThreads, bytes, stream>>>(*a);
}

} // namespace

ts_status ts_cuda_attention_tiles(cudaStream_t stream, const ts_cuda_attention *a) {
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: states of tiles");
}
