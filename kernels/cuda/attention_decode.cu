// One token of every sequence: appended to the open tile, then eq. (9) against that tile and S^, z^. One block a
// sequence and KV head, so that nothing depends on the batch. Bound by reading S^ and the open tile once.
#include "kernels/cuda/attention.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <typename A, int D>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ ts_cuda_attention a) {
    constexpr int kColumns = D / 4, kParts = kThreads / kColumns; // a thread: four columns, every kParts-th row
    __shared__ float query[D], weights[128];
    __shared__ float4 sums[kThreads];
    __shared__ float parts[kWarps];
    __shared__ float gate;
    __shared__ double decay;
    const int tid = threadIdx.x, j = blockIdx.y, T = a.cache.tile_size;
    const ts_span span = a.spans[blockIdx.x];
    const int64_t head = ts::head_of(a, span.sequence, j);
    const int n = (int)(span.position % T), group = a.cache.n_heads / a.cache.n_kv_heads;
    float *open_k = a.cache.open_k + head * T * D, *open_v = a.cache.open_v + head * T * D;
    double *c = a.cache.open_c + head * T;
    const float *state = a.cache.state + head * D * D, *mass = a.cache.mass + head * D;
    const ts::token_row<A> row = ts::row_of<A, D>(a, span.row);
    if (tid == 0) {
        gate = ts::key_gate(ts::load(row.key_gate + j));
        decay = (n > 0 ? c[n - 1] : 0.0) + ts::log_decay(ts::load(row.decay_gate + j), a.decay_temperature);
        c[n] = decay;
    }
    __syncthreads();
    if (tid < D) {
        open_k[n * D + tid] = gate * ts::elu1(ts::load(row.k + j * D + tid));
        open_v[n * D + tid] = ts::load(row.v + j * D + tid);
        float sum = n > 0 ? a.cache.query_sum[head * D + tid] : 0.0f;
        for (int h = 0; h < group; h++)
            sum += ts::elu1(ts::load(row.q + (j * group + h) * D + tid));
        a.cache.query_sum[head * D + tid] = sum;
    }
    __syncthreads();
    const double c_now = decay;
    const float reach = ts::reach_of(c_now);
    const int column = tid % kColumns * 4, part = tid / kColumns;
    for (int h = j * group; h < (j + 1) * group; h++) {
        float below = 0;
        if (tid < D) {
            const float q = ts::elu1(ts::load(row.q + h * D + tid));
            query[tid] = q;
            below = reach * q * mass[tid];
        }
        __syncthreads();
        for (int m = tid / 32; m <= n; m += kWarps) {
            float dot = 0;
#pragma unroll
            for (int e = tid % 32; e < D; e += 32)
                dot += query[e] * open_k[m * D + e];
            dot = ts::warp_sum(dot);
            if (tid % 32 == 0) {
                const float weight = dot * ts::reach_of(c_now - c[m]);
                weights[m] = weight;
                below += weight;
            }
        }
        below = ts::block_sum(below, parts); // weights are there too
        float4 acc = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = part; i < D; i += kParts) {
            const float4 s = ts::load4(state + i * D + column);
            const float q = reach * query[i];
            acc.x += q * s.x, acc.y += q * s.y, acc.z += q * s.z, acc.w += q * s.w;
        }
        for (int m = part; m <= n; m += kParts) {
            const float4 v = ts::load4(open_v + m * D + column);
            const float w = weights[m];
            acc.x += w * v.x, acc.y += w * v.y, acc.z += w * v.z, acc.w += w * v.w;
        }
        sums[tid] = acc;
        __syncthreads();
        if (tid < kColumns) {
            for (int i = 1; i < kParts; i++) {
                const float4 x = sums[i * kColumns + tid];
                acc.x += x.x, acc.y += x.y, acc.z += x.z, acc.w += x.w;
            }
            const float scale = 1.0f / (below + a.normalizer_eps);
            A *y = (A *)a.y.data + span.row * a.y.stride + h * D + column;
            ts::store(y, acc.x * scale);
            ts::store(y + 1, acc.y * scale);
            ts::store(y + 2, acc.z * scale);
            ts::store(y + 3, acc.w * scale);
        }
        __syncthreads();
    }
}

template <typename A, typename S, int D> void launch(cudaStream_t stream, const ts_cuda_attention *a) {
    decode_kernel<A, D><<<dim3((unsigned)a->pieces.n_spans, (unsigned)a->cache.n_kv_heads), kThreads, 0, stream>>>(*a);
}

} // namespace

ts_status ts_cuda_attention_decode(cudaStream_t stream, const ts_cuda_attention *a) {
    TS_ATTENTION_DISPATCH(launch, stream, a);
    return ts_cuda_status(cudaGetLastError(), "attention: decode");
}
