// One token of every sequence: appended to the open tile, then eq. (9) against that tile and S^, z^. One block a
// sequence and KV head, so that nothing depends on the batch. Bound by reading S^ and the open tile once: all of it is
// on its way before the first value is needed, and stays in registers for every query head of the group.
#include "kernels/cuda/attention.cuh"

namespace {

template <int D> constexpr int kThreadsOf = 4 * D;

template <typename A, int D, int T>
__global__ void __launch_bounds__(kThreadsOf<D>, D == 64 ? 3 : 1)
    decode_kernel(const __grid_constant__ ts_cuda_attention a) {
    // A thread: four columns of every kParts-th row of S^, k^ and v.
    constexpr int kThreads = kThreadsOf<D>, kWarps = kThreads / 32, kColumns = D / 4, kParts = kThreads / kColumns;
    constexpr int kStates = D / kParts, kKeys = T / kParts;
    __shared__ float query[D], key[D], value[D];
    __shared__ float4 sums[kThreads];
    __shared__ float below[kParts + kWarps];
    __shared__ float gate;
    __shared__ double c_shared;
    const int tid = threadIdx.x, j = blockIdx.y, group = a.cache.n_heads / a.cache.n_kv_heads;
    const int column = tid % kColumns * 4, part = tid / kColumns;
    const ts_span span = a.spans[blockIdx.x];
    const int64_t head = ts::head_of(a, span.sequence, j);
    const int n = (int)(span.position % T);
    float *open_k = a.cache.open_k + head * T * D, *open_v = a.cache.open_v + head * T * D;
    double *open_c = a.cache.open_c + head * T;
    const float *state_at = a.cache.state + head * D * D;
    const ts::token_row<A> row = ts::row_of<A, D>(a, span.row);
    float4 state[kStates], keys[kKeys], values[kKeys];
    double c[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; i++) {
        const int m = part + i * kParts;
        keys[i] = values[i] = make_float4(0, 0, 0, 0);
        c[i] = 0;
        if (m < n) {
            keys[i] = ts::load4(open_k + m * D + column);
            values[i] = ts::load4(open_v + m * D + column);
            c[i] = open_c[m];
        }
    }
#pragma unroll
    for (int i = 0; i < kStates; i++)
        state[i] = ts::load4(state_at + (part + i * kParts) * D + column);
    const float mass = tid < D ? a.cache.mass[head * D + tid] : 0.0f;
    float query_sum = tid < D && n > 0 ? a.cache.query_sum[head * D + tid] : 0.0f;
    if (tid == 0) {
        c_shared = (n > 0 ? open_c[n - 1] : 0.0) + ts::log_decay(row.decay_gate + j, a.decay_temperature);
        open_c[n] = c_shared;
    } else if (tid == 32) {
        gate = ts::key_gate(row.key_gate + j);
    }
    __syncthreads();
    const double c_now = c_shared;
    const float reach = ts::reach_of(c_now);
    if (tid < D) {
        key[tid] = gate * ts::elu1(ts::load(row.k + j * D + tid));
        value[tid] = ts::load(row.v + j * D + tid);
        open_k[n * D + tid] = key[tid];
        open_v[n * D + tid] = value[tid];
    }
    for (int h = j * group; h < (j + 1) * group; h++) {
        float from_before = 0;
        if (tid < D) {
            const float q = ts::elu1(ts::load(row.q + h * D + tid));
            query[tid] = q;
            query_sum += q;
            from_before = reach * q * mass;
        }
        from_before = ts::warp_sum(from_before);
        __syncthreads();
        const float4 q = ts::load4(query + column);
        float4 acc = make_float4(0, 0, 0, 0);
        float weights = 0;
#pragma unroll
        for (int i = 0; i < kKeys; i++) {
            const int m = part + i * kParts;
            const float4 k = m == n ? ts::load4(key + column) : keys[i];
            const float4 v = m == n ? ts::load4(value + column) : values[i];
            float dot = q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
#pragma unroll
            for (int step = kColumns / 2; step > 0; step /= 2)
                dot += __shfl_xor_sync(~0u, dot, step);
            const float weight = m > n ? 0.0f : m == n ? dot : dot * ts::reach_of(c_now - c[i]);
            weights += weight;
            acc.x += weight * v.x, acc.y += weight * v.y, acc.z += weight * v.z, acc.w += weight * v.w;
        }
#pragma unroll
        for (int i = 0; i < kStates; i++) {
            const float x = reach * query[part + i * kParts];
            acc.x += x * state[i].x, acc.y += x * state[i].y, acc.z += x * state[i].z, acc.w += x * state[i].w;
        }
        sums[tid] = acc;
        if (tid % kColumns == 0)
            below[part] = weights;
        if (tid % 32 == 0)
            below[kParts + tid / 32] = from_before;
        __syncthreads();
        if (tid < D) {
            float y = 0, mass_below = 0;
#pragma unroll
            for (int i = 0; i < kParts; i++) {
                y += ((const float *)sums)[i * D + tid];
                mass_below += below[i];
            }
#pragma unroll
            for (int i = 0; i < kWarps; i++)
                mass_below += below[kParts + i];
            ts::store((A *)a.y.data + span.row * a.y.stride + h * D + tid, y / (mass_below + a.normalizer_eps));
        }
    }
    if (tid < D)
        a.cache.query_sum[head * D + tid] = query_sum;
}

template <typename A, typename S, int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    const dim3 grid((unsigned)a->pieces.n_spans, (unsigned)a->cache.n_kv_heads);
    if (a->cache.tile_size == 64)
        decode_kernel<A, D, 64><<<grid, kThreadsOf<D>, 0, stream>>>(*a);
    else if constexpr (D == 128)
        decode_kernel<A, D, 128><<<grid, kThreadsOf<D>, 0, stream>>>(*a);
}

} // namespace

ts_status ts_cuda_attention_decode(cudaStream_t stream, const ts_cuda_attention *a) {
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: decode");
}
