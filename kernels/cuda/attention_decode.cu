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

// Keys and values are of the activations' dtype, as in the cache (ops.h): k^ in F32, its projection in BF16.
template <typename A, int D, int T> struct tile_in_shared {
    static constexpr int kVector = 16 / (int)sizeof(A);
    static constexpr int kSharers = kThreadsOf<D> / T; // threads that share a key, 16 bytes of it in turn
    float state[kHoldsState<D, T> ? D : 1][D];
    A keys[T][D + kVector * kSharers]; // 8 threads that read 16 bytes each share no bank
    A values[T][D];
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
template <int D> __device__ __forceinline__ void add_row(float *acc, float weight, const ts::bf16 *row, int lane) {
    if constexpr (D == 64) {
        const float2 x = __bfloat1622float2(*(const __nv_bfloat162 *)(row + 2 * lane));
        acc[0] += weight * x.x, acc[1] += weight * x.y;
    } else {
        const float4 x = ts::load4(row + 4 * lane);
        acc[0] += weight * x.x, acc[1] += weight * x.y, acc[2] += weight * x.z, acc[3] += weight * x.w;
    }
}

// phi of a key's elements; its gate is in its weight.
__device__ __forceinline__ float feature(float k) {
    return k;
}
__device__ __forceinline__ float feature(ts::bf16 k) {
    return ts::elu1_fast(ts::load(&k));
}
__device__ __forceinline__ float dot_16_bytes(const float *query, const float *key) {
    const float4 q = ts::load4(query), k = ts::load4(key);
    return q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
}
__device__ __forceinline__ float dot_16_bytes(const float *query, const ts::bf16 *key) {
    float k[8], sum = 0;
    ts::unpack(*(const uint4 *)key, k);
#pragma unroll
    for (int e = 0; e < 8; e += 4) {
        const float4 q = ts::load4(query + e);
        sum += q.x * ts::elu1_fast(k[e]) + q.y * ts::elu1_fast(k[e + 1]) + q.z * ts::elu1_fast(k[e + 2]) +
               q.w * ts::elu1_fast(k[e + 3]);
    }
    return sum;
}

// Row 0 of S^, where this block reads it.
template <typename A, int D, int T>
__device__ __forceinline__ const float *state_of(const tile_in_shared<A, D, T> &s, const float *in_cache) {
    if constexpr (kHoldsState<D, T>)
        return s.state[0];
    else
        return in_cache;
}

// S^ and z^ of the tile that follows.
template <typename A, int D, int T>
__device__ void close_tile(const ts_cuda_attention &a, tile_in_shared<A, D, T> &s, int64_t head, int64_t tile) {
    constexpr int kColumns = D / 32;
    const int tid = threadIdx.x, lane = tid % 32, first = tid / 32 * kFeatures;
    const float reach = ts::reach_of(s.c_now);
    __syncthreads();
    if (tid < T)
        s.weights[tid] = ts::reach_of(s.c_now - a.cache.open_c[head * T + tid]) *
                         (sizeof(A) < 4 ? a.cache.open_gate[head * T + tid] : 1.0f);
    __syncthreads();
    float *state = a.cache.state + head * D * D;
    const float *before = state_of<A, D, T>(s, state);
    float acc[kFeatures][kColumns] = {};
#pragma unroll
    for (int i = 0; i < kFeatures; i++)
        add_row<D>(acc[i], reach, before + (first + i) * D, lane);
    for (int m = 0; m < T; m += 2) { // a lane forms one of the warp's features of two keys
        const int at = m + lane / kFeatures;
        const float k = s.weights[at] * feature(s.keys[at][first + lane % kFeatures]);
#pragma unroll
        for (int i = 0; i < kFeatures; i++) {
            add_row<D>(acc[i], __shfl_sync(~0u, k, i), s.values[m], lane);
            add_row<D>(acc[i], __shfl_sync(~0u, k, kFeatures + i), s.values[m + 1], lane);
        }
    }
#pragma unroll
    for (int i = 0; i < kFeatures; i++)
#pragma unroll
        for (int k = 0; k < kColumns; k++)
            state[(first + i) * D + kColumns * lane + k] = acc[i][k];
    if (tid < D) {
        float mass = reach * s.mass[tid];
        for (int m = 0; m < T; m++)
            mass += s.weights[m] * feature(s.keys[m][tid]);
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
    constexpr int kThreads = kThreadsOf<D>, kWarps = kThreads / 32, kColumns = D / 32;
    constexpr int kSharers = tile_in_shared<A, D, T>::kSharers, kVector = tile_in_shared<A, D, T>::kVector;
    constexpr int kVectors = D / kVector; // of a key
    static_assert(kThreads >= T && kThreads >= D, "a thread for every token and every feature");
    extern __shared__ float4 stage[];
    auto &s = *(tile_in_shared<A, D, T> *)stage;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int j = blockIdx.y, group = a.cache.n_heads / a.cache.n_kv_heads;
    const ts_span span = a.spans[blockIdx.x];
    const int64_t head = ts::head_of(a, span.sequence, j);
    const int n = (int)(span.position % T);
    A *open_k = (A *)a.cache.open_k + head * T * D, *open_v = (A *)a.cache.open_v + head * T * D;
    double *open_c = a.cache.open_c + head * T;
    const float *state = a.cache.state + head * D * D;
    if constexpr (kHoldsState<D, T>)
#pragma unroll
        for (int i = tid; i < D * D / 4; i += kThreads)
            ts::copy_async(&s.state[0][0] + 4 * i, state + 4 * i);
    state = state_of<A, D, T>(s, state);
    for (int i = tid; i < n * kVectors; i += kThreads) {
        const int m = i / kVectors, e = i % kVectors * kVector;
        ts::copy_async(&s.keys[m][e], open_k + m * D + e);
        ts::copy_async(&s.values[m][e], open_v + m * D + e);
    }
    ts::copy_commit();
    const ts::token_row<A> row = ts::row_of<A, D>(a, span.row);
    const int key = tid / kSharers, share = tid % kSharers;
    const double c_of_key = key < n ? open_c[key] : 0.0;
    const float gate_of_key = sizeof(A) < 4 && key < n ? a.cache.open_gate[head * T + key] : 1.0f;
    A raw_q, raw_k, value; // raw_q: of the next query head
    if (tid < D)
        raw_q = row.q[j * group * D + tid], raw_k = row.k[j * D + tid], value = row.v[j * D + tid];
    const float mass = tid < D ? a.cache.mass[head * D + tid] : 0.0f;
    float query_sum = tid < D && n > 0 ? a.cache.query_sum[head * D + tid] : 0.0f;
    if (tid == 0) {
        const double c = (n > 0 ? open_c[n - 1] : 0.0) + ts::log_decay(row.decay_gate + j, a.decay_temperature);
        s.c_now = c;
        open_c[n] = c;
    } else if (tid == 32) {
        s.gate = ts::key_gate(row.key_gate + j);
        if (sizeof(A) < 4)
            a.cache.open_gate[head * T + n] = s.gate;
    }
    __syncthreads();
    const double c_now = s.c_now;
    const float reach = ts::reach_of(c_now);
    if (tid < D) {
        const A k = ts::open_key(&raw_k, s.gate);
        s.keys[n][tid] = k;
        s.values[n][tid] = value;
        s.mass[tid] = mass;
        open_k[n * D + tid] = k;
        open_v[n * D + tid] = value;
    }
    const float scale_of_key = key < n    ? gate_of_key * ts::reach_of(c_now - c_of_key)
                               : key == n ? (sizeof(A) < 4 ? s.gate : 1.0f)
                                          : 0.0f;
    for (int h = j * group; h < (j + 1) * group; h++) {
        float below = 0;
        if (tid < D) {
            const float q = ts::elu1(ts::load(&raw_q));
            if (h + 1 < (j + 1) * group)
                raw_q = row.q[(h + 1) * D + tid];
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
            for (int e = kVector * share; e < D; e += kVector * kSharers)
                dot += dot_16_bytes(s.query + e, &s.keys[key][e]);
#pragma unroll
        for (int step = kSharers / 2; step > 0; step /= 2)
            dot += __shfl_xor_sync(~0u, dot, step);
        const float weight = key <= n ? dot * scale_of_key : 0.0f;
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
        close_tile<A, D, T>(a, s, head, span.position / T);
}

template <typename A, int D, int T> void launch_tile(cudaStream_t stream, const ts_cuda_attention *a) {
    constexpr int bytes = (int)sizeof(tile_in_shared<A, D, T>);
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
