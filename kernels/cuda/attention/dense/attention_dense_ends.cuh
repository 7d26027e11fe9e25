// What a span of the dense form leaves in the cache beyond the state at its last whole chunk: whole groups of open
// tokens are folded into that state, and the rest stay open.
#ifndef TS_CUDA_ATTENTION_DENSE_ENDS_CUH
#define TS_CUDA_ATTENTION_DENSE_ENDS_CUH

#include "kernels/cuda/attention/dense/attention_dense_runs.cuh"
#include "kernels/cuda/attention/open_fold.cuh"

namespace ts {

__device__ __forceinline__ double log_sigmoid_exact(float x) {
    return fmin((double)x, 0.0) - log1p(exp(-fabs((double)x)));
}

// Tokens are counted from the last whole chunk, or from the first open token where the span completes none; those
// before the span are in the open buffers. Eqs. (2) to (5), and the pairs of the tiles that the span completes. One
// block a (span, KV head).
template <int D, int chunk>
__global__ void __launch_bounds__(2 * D) end_spans(const DenseArgs a, int tile_size, double decay_temperature) {
    using shares = row_shares<bf16, D, 2 * D>;
    __shared__ alignas(16) float keys[kOpenRows][D];
    __shared__ alignas(16) bf16 values[kOpenRows][D];
    __shared__ double c_of[chunk];
    const ts_span span = a.spans[blockIdx.x];
    const int j = blockIdx.y, tid = threadIdx.x, before = (int)(span.position % kOpenRows);
    const int64_t head = (int64_t)span.sequence * a.n_kv_heads + j;
    const int64_t begin = (before + span.n_tokens) / chunk * chunk;
    const int n = (int)(before + span.n_tokens - begin), n_open = begin == 0 ? before : 0;
    const bf16 *rows = a.qkvg + (span.row + begin - before) * a.stride; // of token 0, valid from n_open on
    const int64_t k_column = (int64_t)(a.n_heads + j) * D, v_column = k_column + (int64_t)a.n_kv_heads * D,
                  gate_column = (int64_t)(a.n_heads + 2 * a.n_kv_heads) * D + j;
    bf16 *open_k = a.open_k + head * kOpenRows * D, *open_v = a.open_v + head * kOpenRows * D;
    float *open_gate = a.open_gate + head * kOpenRows;
    double *open_c = a.open_c + head * kOpenRows;
    const auto gate_of = [&](int m) { return sigmoid(__bfloat162float(rows[m * a.stride + gate_column])); };
    if (tid < n && tid >= n_open)
        c_of[tid] =
            log_sigmoid_exact(__bfloat162float(rows[tid * a.stride + gate_column + a.n_kv_heads])) / decay_temperature;
    else if (tid < n)
        c_of[tid] = open_c[tid];
    __syncthreads();
    double all_folded = 0; // log of the decay
    if (tid == 0) {
        double c = 0;
        for (int m = 0; m < n; m++) {
            c = m % kOpenRows == 0 ? 0 : c;
            c = c_of[m] = m < n_open ? c_of[m] : c + c_of[m];
            all_folded += m % kOpenRows == kOpenRows - 1 ? c : 0;
        }
    }
    follow_front(); // what is above, the kernel in front does not write
    if (tid == 0) {
        a.decay_end[head] += all_folded;
        // Every earlier tile is available to the tile after each that completes, and selected.
        const int64_t first_tile = span.position / tile_size;
        const int64_t n_done = (span.position + span.n_tokens) / tile_size - first_tile;
        const int64_t n_pairs = n_done * (first_tile + 1) + n_done * (n_done - 1) / 2;
        a.pairs[2 * head] += n_pairs;
        a.pairs[2 * head + 1] += n_pairs;
    }
    __syncthreads();
    int folded = 0;
    for (; folded + kOpenRows <= n; folded += kOpenRows) {
        const double c_last = c_of[folded + kOpenRows - 1];
        for (int i = tid; i < kOpenRows * D; i += 2 * D) {
            const int m = folded + i / D, e = i % D;
            const bool is_open = m < n_open;
            const bf16 *row = rows + m * a.stride;
            const bf16 k = is_open ? open_k[m * D + e] : row[k_column + e];
            keys[i / D][e] = reach_of(c_last - c_of[m]) * open_feature(k, is_open ? open_gate[m] : gate_of(m));
            values[i / D][e] = is_open ? open_v[m * D + e] : row[v_column + e];
        }
        __syncthreads();
        const float carried = reach_of(c_last);
        fold_state<shares, bf16, D>((bf16 *)a.state, a.state_rest, head, carried, kOpenRows, keys[0], values[0],
                                    [&](int i) {
                                        const int64_t row = head * D + shares::first() + i * shares::kParts;
                                        return *(const uint4 *)((const bf16 *)a.state + row * D + shares::column());
                                    });
        if (tid < D)
            a.mass[head * D + tid] = fold_mass<D>(a.mass[head * D + tid], carried, kOpenRows, keys[0]);
        __syncthreads();
    }
    const int first = folded > n_open ? folded : n_open;
    for (int i = tid; i < (n - first) * D; i += 2 * D) {
        const int m = first + i / D, e = i % D;
        open_k[(m - folded) * D + e] = rows[m * a.stride + k_column + e];
        open_v[(m - folded) * D + e] = rows[m * a.stride + v_column + e];
        if (e == 0) {
            open_gate[m - folded] = gate_of(m);
            open_c[m - folded] = c_of[m];
        }
    }
}

} // namespace ts
#endif
