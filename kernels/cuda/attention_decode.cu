// One token of every sequence: appended to the open tile, then eq. (9) against that tile and S^, z^. One block a
// sequence and KV head, so that nothing depends on the batch.
//
// Bound by reading S^ and the open tile once. They go to shared memory as asynchronous copies, which take no registers,
// so that several blocks share a multiprocessor and some always wait for memory while others compute. A warp owns 16
// features of S^ and its share of the tile's tokens, for all columns of v.
//
// In dense form a token that completes its tile closes it here, eqs. (6) to (8), from what the block holds.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/warp_matrix.cuh"

namespace {

constexpr int kFeatures = 16; // of a warp

template <int D> constexpr int kThreadsOf = 32 * D / kFeatures;

// Large tiles leave no room for S^ in the shared memory of an A100: it is read where it lies.
template <int D, int T> constexpr bool kHoldsState = T < 128;

template <int D, int T> struct tile_in_shared {
    static constexpr int kSharers = kThreadsOf<D> / T; // threads that share a key, 4 elements of it in turn
    float state[kHoldsState<D, T> ? D : 1][D];
    float keys[T][D + 4 * kSharers]; // 8 threads that read 16 bytes each share no bank
    float values[T][D];
    float query[D], mass[D], weights[T];
    float sums[D / kFeatures][D];
    float below[kThreadsOf<D> / 32];
    float gate;
    double c_now;
};

// Columns lane * D / 32 ... of a row.
template <int D> __device__ __forceinline__ void add_row(float *acc, float weight, const float *row, int lane) {
    if constexpr (D == 64) {
        const float2 x = *(const float2 *)(row + 2 * lane);
        acc[0] += weight * x.x, acc[1] += weight * x.y;
    } else {
        const float4 x = ts::load4(row + 4 * lane);
        acc[0] += weight * x.x, acc[1] += weight * x.y, acc[2] += weight * x.z, acc[3] += weight * x.w;
    }
}

// Row 0 of S^, where this block reads it.
template <int D, int T>
__device__ __forceinline__ const float *state_of(const tile_in_shared<D, T> &s, const float *in_cache) {
    if constexpr (kHoldsState<D, T>)
        return s.state[0];
    else
        return in_cache;
}

// S^ and z^ of the tile that follows.
template <int D, int T>
__device__ void close_tile(const ts_cuda_attention &a, tile_in_shared<D, T> &s, int64_t head, int64_t tile) {
    constexpr int kColumns = D / 32;
    const int tid = threadIdx.x, lane = tid % 32, first = tid / 32 * kFeatures;
    const float reach = ts::reach_of(s.c_now);
    __syncthreads();
    if (tid < T)
        s.weights[tid] = ts::reach_of(s.c_now - a.cache.open_c[head * T + tid]);
    __syncthreads();
    float *state = a.cache.state + head * D * D;
    const float *before = state_of<D, T>(s, state);
    float acc[kFeatures][kColumns] = {};
#pragma unroll
    for (int i = 0; i < kFeatures; i++)
        add_row<D>(acc[i], reach, before + (first + i) * D, lane);
    for (int m = 0; m < T; m++) {
        const float weight = s.weights[m];
#pragma unroll
        for (int i = 0; i < kFeatures; i++)
            add_row<D>(acc[i], weight * s.keys[m][first + i], s.values[m], lane);
    }
#pragma unroll
    for (int i = 0; i < kFeatures; i++)
#pragma unroll
        for (int k = 0; k < kColumns; k++)
            state[(first + i) * D + kColumns * lane + k] = acc[i][k];
    if (tid < D) {
        float mass = reach * s.mass[tid];
        for (int m = 0; m < T; m++)
            mass += s.weights[m] * s.keys[m][tid];
        a.cache.mass[head * D + tid] = mass;
    }
    if (tid == 0) {
        a.cache.decay_end[head] += s.c_now;
        a.cache.pairs[2 * head] += tile + 1;
        a.cache.pairs[2 * head + 1] += tile + 1;
    }
}

template <typename A, int D, int T>
__global__ void __launch_bounds__(kThreadsOf<D>) decode_kernel(const __grid_constant__ ts_cuda_attention a) {
    constexpr int kThreads = kThreadsOf<D>, kWarps = kThreads / 32, kColumns = D / 32, kVectors = D / 4;
    constexpr int kSharers = tile_in_shared<D, T>::kSharers;
    static_assert(kThreads >= T && kThreads >= D, "a thread for every token and every feature");
    extern __shared__ float4 stage[];
    auto &s = *(tile_in_shared<D, T> *)stage;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int j = blockIdx.y, group = a.cache.n_heads / a.cache.n_kv_heads;
    const ts_span span = a.spans[blockIdx.x];
    const int64_t head = ts::head_of(a, span.sequence, j);
    const int n = (int)(span.position % T);
    float *open_k = a.cache.open_k + head * T * D, *open_v = a.cache.open_v + head * T * D;
    double *open_c = a.cache.open_c + head * T;
    const float *state = a.cache.state + head * D * D;
    if constexpr (kHoldsState<D, T>)
#pragma unroll
        for (int i = tid; i < D * kVectors; i += kThreads)
            ts::copy_async(&s.state[0][0] + 4 * i, state + 4 * i);
    state = state_of<D, T>(s, state);
    for (int i = tid; i < n * kVectors; i += kThreads) {
        const int m = i / kVectors, e = i % kVectors * 4;
        ts::copy_async(&s.keys[m][e], open_k + m * D + e);
        ts::copy_async(&s.values[m][e], open_v + m * D + e);
    }
    ts::copy_commit();
    const ts::token_row<A> row = ts::row_of<A, D>(a, span.row);
    const int key = tid / kSharers, share = tid % kSharers;
    const double c_of_key = key < n ? open_c[key] : 0.0;
    const float raw_k = tid < D ? ts::load(row.k + j * D + tid) : 0.0f;
    const float value = tid < D ? ts::load(row.v + j * D + tid) : 0.0f;
    const float mass = tid < D ? a.cache.mass[head * D + tid] : 0.0f;
    float query_sum = tid < D && n > 0 ? a.cache.query_sum[head * D + tid] : 0.0f;
    if (tid == 0) {
        const double c = (n > 0 ? open_c[n - 1] : 0.0) + ts::log_decay(row.decay_gate + j, a.decay_temperature);
        s.c_now = c;
        open_c[n] = c;
    } else if (tid == 32) {
        s.gate = ts::key_gate(row.key_gate + j);
    }
    __syncthreads();
    const double c_now = s.c_now;
    const float reach = ts::reach_of(c_now);
    if (tid < D) {
        const float k = s.gate * ts::elu1(raw_k);
        s.keys[n][tid] = k;
        s.values[n][tid] = value;
        s.mass[tid] = mass;
        open_k[n * D + tid] = k;
        open_v[n * D + tid] = value;
    }
    const float reach_of_key = key < n ? ts::reach_of(c_now - c_of_key) : key == n ? 1.0f : 0.0f;
    for (int h = j * group; h < (j + 1) * group; h++) {
        float below = 0;
        if (tid < D) {
            const float q = ts::elu1(ts::load(row.q + h * D + tid));
            s.query[tid] = q;
            query_sum += q;
            below = reach * q * mass;
        }
        if (h == j * group)
            ts::copy_wait<0>();
        __syncthreads();
        float dot = 0;
        if (key <= n)
#pragma unroll
            for (int e = 4 * share; e < D; e += 4 * kSharers) {
                const float4 q = ts::load4(s.query + e), k = ts::load4(&s.keys[key][e]);
                dot += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
            }
#pragma unroll
        for (int step = kSharers / 2; step > 0; step /= 2)
            dot += __shfl_xor_sync(~0u, dot, step);
        const float weight = key <= n ? dot * reach_of_key : 0.0f;
        if (share == 0) {
            s.weights[key] = weight;
            below += weight;
        }
        below = ts::warp_sum(below);
        if (lane == 0)
            s.below[warp] = below;
        float acc[kColumns] = {};
#pragma unroll
        for (int i = 0; i < kFeatures; i++)
            add_row<D>(acc, reach * s.query[warp * kFeatures + i], state + (warp * kFeatures + i) * D, lane);
        __syncthreads();
        for (int m = warp; m <= n; m += kWarps)
            add_row<D>(acc, s.weights[m], s.values[m], lane);
#pragma unroll
        for (int k = 0; k < kColumns; k++)
            s.sums[warp][kColumns * lane + k] = acc[k];
        __syncthreads();
        if (tid < D) {
            float y = 0, mass_below = a.normalizer_eps;
#pragma unroll
            for (int i = 0; i < kWarps; i++) {
                y += s.sums[i][tid];
                mass_below += s.below[i];
            }
            ts::store((A *)a.y.data + span.row * a.y.stride + h * D + tid, y / mass_below);
        }
    }
    if (tid < D)
        a.cache.query_sum[head * D + tid] = query_sum;
    if (!a.cache.is_sparse && n == T - 1)
        close_tile<D, T>(a, s, head, span.position / T);
}

template <typename A, int D, int T> void launch_tile(cudaStream_t stream, const ts_cuda_attention *a) {
    constexpr int bytes = (int)sizeof(tile_in_shared<D, T>);
    const dim3 grid((unsigned)a->pieces.n_spans, (unsigned)a->cache.n_kv_heads);
    static_assert(bytes <= 163 << 10, "what a block may have on an A100");
    (void)cudaFuncSetAttribute(decode_kernel<A, D, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    decode_kernel<A, D, T><<<grid, kThreadsOf<D>, bytes, stream>>>(*a);
}

template <typename A> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    if (a->cache.head_dim == 64)
        launch_tile<A, 64, 64>(stream, a);
    else if (a->cache.tile_size == 64)
        launch_tile<A, 128, 64>(stream, a);
    else
        launch_tile<A, 128, 128>(stream, a);
}

} // namespace

ts_status ts_cuda_attention_decode(cudaStream_t stream, const ts_cuda_attention *a) {
    a->qkvg.dtype == TS_F32 ? launch<float>(stream, a) : launch<ts::bf16>(stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: decode");
}
