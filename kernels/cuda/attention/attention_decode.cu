// One token of every sequence: appended to the open tokens, then eq. (9) against those and S^, z^. One block a sequence
// and KV head, so that nothing depends on the batch.
//
// Bound by reading S^ and the open rows once. A thread asks for its 16 bytes of every row it has a part in before it
// waits for any, and no thread reads another's. Where S^ and rows are small (D 64, BF16) they go to shared memory as
// asynchronous copies, which take no registers, so that more blocks share a multiprocessor; else to registers.
//
// Under BF16 activations S^ is read as BF16, as prefill reads it for the same product. In dense form the open tokens
// are folded into S^ here once there are R of them (open_fold.cuh), and there S^ is taken and left in f32
// (split_float.cuh). Under BF16 R is 16: less to read for every token, and S^ written that much more often.
#include "kernels/cuda/attention/attention.cuh"
#include "kernels/cuda/attention/open_fold.cuh"
#include "kernels/cuda/primitives/warp_matrix.cuh"

namespace {

constexpr int kHeadsAtOnce = 8; // query heads whose q^ is in shared memory

// What is computed in f64 and divided exactly under F32, and in f32 under BF16.
template <typename A> struct decode_arithmetic {
    using decay = double;
    static __device__ __forceinline__ float reach_of(double x) {
        return ts::reach_of(x);
    }
    static __device__ __forceinline__ float ratio(float x, float y) {
        return x / y;
    }
};
template <> struct decode_arithmetic<ts::bf16> {
    using decay = float;
    static __device__ __forceinline__ float reach_of(float x) {
        return ts::exp2_fast(x * ts::kLog2E);
    }
    static __device__ __forceinline__ float ratio(float x, float y) {
        return __fdividef(x, y);
    }
};

// R: rows of the open buffers.
template <typename A, int D, int R>
constexpr int kDecodeWarps = sizeof(A) == 4        ? 8
                             : R == TS_FOLD_TOKENS ? D / 32
                                                   : D / 16;

template <typename A, int D, int R>
struct decode_shape : decode_arithmetic<A>, ts::row_shares<A, D, 32 * kDecodeWarps<A, D, R>> {
    using shares = ts::row_shares<A, D, 32 * kDecodeWarps<A, D, R>>;
    using shares::kVector, shares::kLanes, shares::kParts, shares::kThreads, shares::kStateRows;
    static constexpr bool kDense = sizeof(A) == 2 && R == TS_FOLD_TOKENS; // else: in F32 either form, in BF16 sparse
    static constexpr bool kMayFold = kDense || sizeof(A) == 4;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kRows = 32 / kLanes; // that a warp asks for at once
    static constexpr int kOpenRows = R / kParts;
    static constexpr bool kShared = sizeof(A) == 2 && D == 64; // holds its rows in shared memory
    static constexpr int kBlocks = kShared          ? 28 / kWarps - 2 * kDense
                                   : sizeof(A) == 4 ? 1
                                                    : 16 / kWarps; // of a multiprocessor
    static constexpr int kSumBytes = kParts * D * (int)sizeof(float);
    static constexpr int kRowBytes = !kShared ? 0 : (kStateRows + 2 * kOpenRows) * kThreads * 16;
    // Keys and, where they are in registers, values of the tokens to fold.
    static constexpr int kFoldBytes = R * D * (int)(sizeof(float) + (kShared ? 0 : sizeof(A)));
    static_assert(kOpenRows % 2 == 0, "rows are taken two at a time");
    static_assert(kOpenRows * kRows <= 32, "a lane for every token of its warp");
    static_assert(kThreads >= D, "a thread for every feature");
    static_assert(!kShared || !kDense || kFoldBytes <= kSumBytes + kStateRows * kThreads * 16,
                  "keys are staged where S^ was");
};

// A thread's 16 bytes of n rows: in shared memory, where those of one row lie side by side.
template <typename A, int n, int kThreads, bool kShared> struct row_parts {
    uint4 *at;

    __device__ __forceinline__ row_parts(uint4 *shared) : at(shared + threadIdx.x) {
    }
    // Zero where `there` is false.
    __device__ __forceinline__ void ask(int i, const A *from, bool there) {
        ts::copy_async(at + i * kThreads, from, there ? 16 : 0);
    }
    __device__ __forceinline__ uint4 get(int i) const {
        return at[i * kThreads];
    }
    __device__ __forceinline__ void set(int i, const uint4 &x) {
        at[i * kThreads] = x;
    }
    // Of all threads: row after row.
    __device__ __forceinline__ const uint4 *base() const {
        return at - threadIdx.x;
    }
    __device__ __forceinline__ void keep_packed() {
    }
};

// In registers.
template <typename A, int n, int kThreads> struct row_parts<A, n, kThreads, false> {
    uint4 rows[n];

    __device__ __forceinline__ row_parts(uint4 *) {
    }
    __device__ __forceinline__ void ask(int i, const A *from, bool there) {
        rows[i] = make_uint4(0, 0, 0, 0);
        if (there)
            rows[i] = __ldcg((const uint4 *)from);
    }
    __device__ __forceinline__ uint4 get(int i) const {
        return rows[i];
    }
    __device__ __forceinline__ void set(int i, const uint4 &x) {
        rows[i] = x;
    }
    __device__ __forceinline__ const uint4 *base() const {
        return NULL;
    }
    // Keeps the compiler from unpacking rows once for all query heads, for which there are no registers.
    __device__ __forceinline__ void keep_packed() {
#pragma unroll
        for (int i = 0; i < n; i++)
            asm volatile("" : "+r"(rows[i].x), "+r"(rows[i].y), "+r"(rows[i].z), "+r"(rows[i].w));
    }
};

// Part of q^ . k^ but for the key's gate where that is not in k^ (BF16).
__device__ __forceinline__ float part_of_dot(const float (&q)[4], const uint4 &key) {
    float k[4];
    ts::unpack(key, k);
    return q[0] * k[0] + q[1] * k[1] + q[2] * k[2] + q[3] * k[3];
}
__device__ __forceinline__ float part_of_dot(const float (&q)[8], const uint4 &key) {
    float k[8], sum = 0;
    ts::unpack(key, k);
#pragma unroll
    for (int e = 0; e < 8; e++)
        sum += q[e] * ts::elu1_fast(k[e]);
    return sum;
}

// The new token's key as the open tile keeps it.
__device__ __forceinline__ uint4 opened(float gate, const uint4 &raw, const float *) {
    float k[4];
    ts::unpack(raw, k);
#pragma unroll
    for (int e = 0; e < 4; e++)
        k[e] = ts::open_key(&k[e], gate);
    return make_uint4(__float_as_uint(k[0]), __float_as_uint(k[1]), __float_as_uint(k[2]), __float_as_uint(k[3]));
}
__device__ __forceinline__ uint4 opened(float gate, const uint4 &raw, const ts::bf16 *) {
    return raw;
}

template <typename A, int D, int R>
__global__ void __launch_bounds__(decode_shape<A, D, R>::kThreads, decode_shape<A, D, R>::kBlocks)
    decode_kernel(const __grid_constant__ ts_cuda_attention a) {
    using shape = decode_shape<A, D, R>;
    using decay = typename shape::decay;
    constexpr int kVector = shape::kVector, kLanes = shape::kLanes, kRows = shape::kRows, kWarps = shape::kWarps;
    constexpr int kStateRows = shape::kStateRows, kOpenRows = shape::kOpenRows, kParts = shape::kParts;
    extern __shared__ float4 stage[];
    auto &sums = *(float(*)[kParts][D])stage;
    __shared__ float queries[kHeadsAtOnce][D], below_of[kWarps], new_gate;
    __shared__ double new_c;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int first = shape::first(), column = shape::column(); // of this thread's rows, which lie kParts apart
    const int index = blockIdx.x / a.cache.n_kv_heads, j = blockIdx.x - index * a.cache.n_kv_heads;
    const int group = a.cache.n_heads / a.cache.n_kv_heads;
    if (!a.cache_is_settled)
        ts::wait_for_front();
    const ts_span span = a.spans[index];
    if (span.sequence == TS_PADDING) {
        ts::wait_for_front();
        return;
    }
    const int64_t head = ts::head_of(a, span.sequence, j);
    const int n = (int)(span.position % R);
    const bool folds = shape::kMayFold && !a.cache.is_sparse && n == R - 1;
    const A *state_at = (const A *)a.cache.state + head * D * D + first * D + column;
    A *open_k = (A *)a.cache.open_k + head * R * D + first * D + column;
    A *open_v = (A *)a.cache.open_v + head * R * D + first * D + column;
    double *open_c = a.cache.open_c + head * R;
    float *open_gate = sizeof(A) < 4 ? a.cache.open_gate + head * R : NULL;
    const ts::token_row<A> row = ts::row_of<A, D>(a, span.row);
    // Each lane weighs one of its warp's tokens: that of row lane / kRows of lane group lane % kRows.
    const int weighed = warp * kRows + lane % kRows + lane / kRows * kParts;
    const bool is_open = lane < kOpenRows * kRows && weighed < n;
    double c_of_weighed = is_open ? open_c[weighed] : 0.0;
    const float gate_of_weighed = sizeof(A) < 4 && is_open ? open_gate[weighed] : 1.0f;
    uint4 *shared_rows = (uint4 *)((char *)stage + shape::kSumBytes);
    row_parts<A, kStateRows, shape::kThreads, shape::kShared> state(shared_rows);
    row_parts<A, kOpenRows, shape::kThreads, shape::kShared> keys(shared_rows + kStateRows * shape::kThreads);
    row_parts<A, kOpenRows, shape::kThreads, shape::kShared> values(shared_rows +
                                                                    (kStateRows + kOpenRows) * shape::kThreads);
    // The cache first: the kernel in front, which makes the token's row, may still run.
#pragma unroll
    for (int i = 0; i < kStateRows; i++)
        state.ask(i, state_at + i * kParts * D, true);
#pragma unroll
    for (int i = 0; i < kOpenRows; i++) {
        const bool is_there = first + i * kParts < n;
        keys.ask(i, open_k + i * kParts * D, is_there);
        values.ask(i, open_v + i * kParts * D, is_there);
    }
    ts::copy_commit();
    const double c_before = tid == 0 && n > 0 ? open_c[n - 1] : 0.0;
    ts::follow_front();
    const A *queries_at = row.q + j * group * D;
    const A first_query = queries_at[min(tid, group * D - 1)];
    A logit;
    if (tid == 0)
        logit = row.decay_gate[j];
    else if (tid == 32)
        logit = row.key_gate[j];
    const uint4 new_key = __ldcg((const uint4 *)(row.k + j * D + column));
    const uint4 new_value = __ldcg((const uint4 *)(row.v + j * D + column));
    if (shape::kDense && folds) { // asked for at last, and not to be waited for then
#pragma unroll
        for (int i = 0; i < kStateRows; i++)
            asm volatile(
                "prefetch.global.L2 [%0];" ::"l"(a.cache.state_rest + (head * D + first + i * kParts) * D + column));
    }
    const float mass = tid < D ? a.cache.mass[head * D + tid] : 0.0f;
    float query_sum = !shape::kDense && tid < D && n > 0 ? a.cache.query_sum[head * D + tid] : 0.0f;
    const auto take_queries = [&](int h0) {
        const int n_queries = min(kHeadsAtOnce, group - h0) * D;
#pragma unroll 1
        for (int i = tid; i < n_queries; i += shape::kThreads)
            queries[0][i] = ts::elu1(ts::load(i < shape::kThreads && h0 == 0 ? &first_query : queries_at + h0 * D + i));
    };
    take_queries(0);
    if (tid == 0) {
        new_c = c_before + ts::log_decay(&logit, a.decay_temperature);
        open_c[n] = new_c;
    } else if (tid == 32) {
        new_gate = ts::key_gate(&logit);
        if (sizeof(A) < 4)
            open_gate[n] = new_gate;
    }
    __syncthreads();
    asm volatile("" : "+d"(c_of_weighed)); // not to be waited for before the barrier
    const double c_now = new_c;
    const float reach = ts::reach_of(c_now);
    const float weigh = is_open        ? gate_of_weighed * shape::reach_of((decay)c_now - (decay)c_of_weighed)
                        : weighed == n ? (sizeof(A) < 4 ? new_gate : 1.0f)
                                       : 0.0f;
    float scale_of[kOpenRows];
    ts::copy_wait<0>();
#pragma unroll
    for (int i = 0; i < kOpenRows; i++) {
        scale_of[i] = __shfl_sync(~0u, weigh, i * kRows + lane / kLanes);
        if (first + i * kParts == n) {
            keys.set(i, opened(new_gate, new_key, (const A *)NULL));
            values.set(i, new_value);
            *(uint4 *)(open_k + i * kParts * D) = keys.get(i);
            *(uint4 *)(open_v + i * kParts * D) = values.get(i);
        }
    }
#pragma unroll 1
    for (int h = 0; h < group; h++) {
        if (h > 0) {
            __syncthreads(); // the sums have been read
            if (h % kHeadsAtOnce == 0) {
                take_queries(h);
                __syncthreads();
            }
        }
        const float *query = queries[h % kHeadsAtOnce];
        state.keep_packed(), keys.keep_packed(), values.keep_packed();
        float acc[kVector] = {}, x[kVector], below = 0;
#pragma unroll
        for (int i = 0; i < kStateRows; i++) {
            const float weight = reach * query[first + i * kParts];
            ts::unpack(state.get(i), x);
#pragma unroll
            for (int e = 0; e < kVector; e++)
                acc[e] += weight * x[e];
        }
        if (tid < D) {
            query_sum += query[tid];
            below = reach * query[tid] * mass;
        }
        float q[kVector];
#pragma unroll
        for (int e = 0; e < kVector; e += 4) {
            const float4 four = ts::load4(query + column + e);
            q[e] = four.x, q[e + 1] = four.y, q[e + 2] = four.z, q[e + 3] = four.w;
        }
        // Two rows at a time, whose sums over lanes do not wait for each other.
#pragma unroll
        for (int i = 0; i < kOpenRows; i += 2) {
            if (warp * kRows + i * kParts > n) // no token in the whole warp
                break;
            float dots[2] = {part_of_dot(q, keys.get(i)), part_of_dot(q, keys.get(i + 1))};
#pragma unroll
            for (int step = kLanes / 2; step > 0; step /= 2)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    dots[r] += __shfl_xor_sync(~0u, dots[r], step);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float weight = dots[r] * scale_of[i + r];
                below += column == 0 ? weight : 0.0f;
                ts::unpack(values.get(i + r), x);
#pragma unroll
                for (int e = 0; e < kVector; e++)
                    acc[e] += weight * x[e];
            }
        }
        below = ts::warp_sum(below);
        if (lane == 0)
            below_of[warp] = below;
#pragma unroll
        for (int e = 0; e < kVector; e += 4)
            ts::store4(&sums[first][column + e], make_float4(acc[e], acc[e + 1], acc[e + 2], acc[e + 3]));
        __syncthreads();
        if (tid < D) {
            float y = 0, mass_below = a.normalizer_eps;
#pragma unroll
            for (int i = 0; i < kParts; i++)
                y += sums[i][tid];
#pragma unroll
            for (int i = 0; i < kWarps; i++)
                mass_below += below_of[i];
            ts::store((A *)a.y.data + span.row * a.y.stride + (j * group + h) * D + tid, shape::ratio(y, mass_below));
        }
    }
    if (!shape::kDense && tid < D)
        a.cache.query_sum[head * D + tid] = query_sum;
    if constexpr (shape::kMayFold) {
        if (!folds)
            return;
        uint4 old[kStateRows];
#pragma unroll
        for (int i = 0; i < kStateRows; i++)
            old[i] = state.get(i);
        float *fold_keys = (float *)stage;
        A *fold_values = shape::kShared ? (A *)values.base() : (A *)(fold_keys + R * D);
        __syncthreads(); // the sums have been read, and S^ taken from where the keys go
#pragma unroll
        for (int i = 0; i < kOpenRows; i++) {
            float x[kVector];
            ts::unpack(keys.get(i), x);
#pragma unroll
            for (int e = 0; e < kVector; e++)
                x[e] = scale_of[i] * (sizeof(A) == 4 ? x[e] : ts::elu1_fast(x[e]));
#pragma unroll
            for (int e = 0; e < kVector; e += 4)
                ts::store4(fold_keys + (first + i * kParts) * D + column + e,
                           make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]));
            if (!shape::kShared)
                *(uint4 *)(fold_values + (first + i * kParts) * D + column) = values.get(i);
        }
        __syncthreads();
        ts::fold_state<typename shape::shares, A, D>((A *)a.cache.state, a.cache.state_rest, head, reach, R, fold_keys,
                                                     fold_values, [&](int i) { return old[i]; });
        if (tid < D)
            a.cache.mass[head * D + tid] = ts::fold_mass<D>(mass, reach, R, fold_keys);
        if (tid == 0) {
            a.cache.decay_end[head] += c_now;
            if ((span.position + 1) % a.cache.tile_size == 0) {
                const int64_t n_tiles = (span.position + 1) / a.cache.tile_size;
                a.cache.pairs[2 * head] += n_tiles;
                a.cache.pairs[2 * head + 1] += n_tiles;
            }
        }
    }
}

template <typename A, int D, int R> cudaError_t launch_rows(cudaStream_t stream, const ts_cuda_attention *a) {
    using shape = decode_shape<A, D, R>;
    constexpr int token = shape::kSumBytes + shape::kRowBytes;
    const int bytes = a->cache.is_sparse || shape::kFoldBytes < token ? token : shape::kFoldBytes;
    static_assert(token <= 163 << 10 && (shape::kFoldBytes <= 163 << 10), "what a block may have on an A100");
    const unsigned n_blocks = (unsigned)a->pieces.n_spans * (unsigned)a->cache.n_kv_heads;
    (void)cudaFuncSetAttribute(decode_kernel<A, D, R>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return ts::launch_following(a->capability == 90, decode_kernel<A, D, R>, n_blocks, shape::kThreads, (size_t)bytes,
                                stream, *a);
}

template <typename A> cudaError_t launch(cudaStream_t stream, const ts_cuda_attention *a) {
    const bool d64 = a->cache.head_dim == 64;
    if constexpr (sizeof(A) == 2) {
        if (!a->cache.is_sparse)
            return d64 ? launch_rows<A, 64, TS_FOLD_TOKENS>(stream, a) : launch_rows<A, 128, TS_FOLD_TOKENS>(stream, a);
    }
    return d64                        ? launch_rows<A, 64, 64>(stream, a)
           : a->cache.tile_size == 64 ? launch_rows<A, 128, 64>(stream, a)
                                      : launch_rows<A, 128, 128>(stream, a);
}

} // namespace

ts_status ts_cuda_attention_decode(cudaStream_t stream, const ts_cuda_attention *a) {
    return ts_cuda_status(a->qkvg.dtype == TS_F32 ? launch<float>(stream, a) : launch<ts::bf16>(stream, a),
                          "attention: decode");
}
