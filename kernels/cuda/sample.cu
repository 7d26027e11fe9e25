// The sampling chain, one block a row, without sorting the vocabulary.
//
// A row is kept in shared memory where it fits (up to about 56,000 tokens), else read again from L2 in every pass. With
// x the adjusted logits, every token weighs e^{(x - largest) / temperature}, in fixed point (2^44 is 1), so that sums
// do not depend on the order in which threads add. "The first tokens, in falling order, that weigh more than w", which
// is what top_p and the draw ask for, and "the first n tokens", top_k, are found digit by digit: a histogram of 2,048
// linear bins below the largest, then the bits of the one bin's values. What is left at the end is one value of x and
// how many of the tokens that share it come before, in order of tokens.
//
// Bound by shared-memory atomics in the first histogram and, without filters, by reading the row.
#include "kernels/cuda/device.h"

#include <cfloat>
#include <climits>

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 64; // of (largest - x) / temperature: what is below the last bin weighs e^-32
constexpr uint64_t kOne = 1ull << 44;
constexpr int kStaticBytes = 32 << 10; // more than the kernel's shared variables take

struct found {
    uint32_t key;  // of the value where the sum is passed
    int rank;      // among the tokens of that value
    uint64_t mass; // of all tokens up to that one
};

struct shared_state {
    uint64_t mass[kBins];
    uint32_t count[kBins];
    uint64_t sums[kWarps];
    uint32_t counts[kWarps];
    float largest[kWarps];
    int place[kWarps];
    found result;
    int bin;
    uint64_t mass_before;
    uint32_t count_before;
    int token;
};

// Larger values have larger keys.
__device__ __forceinline__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f); // -0 counts as 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct row_view {
    const float *x;
    int n;
    float largest;
    double scale; // 1 / temperature

    __device__ float below(int i) const {
        return (float)(((double)largest - (double)x[i]) * scale);
    }
    __device__ uint64_t mass(int i) const {
        return (uint64_t)(expf(-below(i)) * (float)kOne);
    }
    __device__ int bin(int i) const {
        return (int)fminf(below(i) * kBinsPerUnit, (float)(kBins - 1));
    }
};

__device__ uint64_t block_sum(uint64_t x, shared_state &s) {
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        s.sums[threadIdx.x / 32] = x;
    __syncthreads();
    uint64_t sum = 0;
    for (int i = 0; i < kWarps; i++)
        sum += s.sums[i];
    return sum;
}

// The largest of x and the smallest token that has it, among those that stand after (key, token) in falling order;
// token -1 where there is none. NaN and +infinity make *bad.
__device__ void block_largest(const float *x, int n, uint32_t after_key, int after_token, shared_state &s,
                              float *largest, int *token, bool *bad) {
    float best = -INFINITY;
    int at = INT_MAX;
    bool wrong = false;
    for (int i = threadIdx.x; i < n; i += kThreads) {
        const float v = x[i];
        wrong |= !(v < INFINITY);
        const uint32_t key = key_of(v);
        if (key > after_key || (key == after_key && i <= after_token))
            continue;
        if (v > best || (v == best && i < at))
            best = v, at = i;
    }
    for (int step = 16; step > 0; step /= 2) {
        const float v = __shfl_xor_sync(~0u, best, step);
        const int i = __shfl_xor_sync(~0u, at, step);
        if (v > best || (v == best && i < at))
            best = v, at = i;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        s.largest[threadIdx.x / 32] = best, s.place[threadIdx.x / 32] = at;
    *bad = __syncthreads_or(wrong);
    best = s.largest[0], at = s.place[0];
    for (int i = 1; i < kWarps; i++)
        if (s.largest[i] > best || (s.largest[i] == best && s.place[i] < at))
            best = s.largest[i], at = s.place[i];
    *largest = best;
    *token = at == INT_MAX ? -1 : at;
}

// The bin, from the front, where the sum of masses passes `mass` (or that of counts passes `count`); what comes before
// is added to s.mass_before and s.count_before. Bins are counted backwards where `falling`: larger digits come first.
__device__ void pass_bins(shared_state &s, bool falling, bool by_count, uint64_t mass, uint32_t count) {
    constexpr int kEach = kBins / kThreads;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    uint64_t m[kEach], m_sum = 0;
    uint32_t c[kEach], c_sum = 0;
    for (int i = 0; i < kEach; i++) {
        const int bin = tid * kEach + i, at = falling ? kBins - 1 - bin : bin;
        m[i] = s.mass[at], c[i] = s.count[at];
        m_sum += m[i], c_sum += c[i];
    }
    uint64_t m_before = m_sum;
    uint32_t c_before = c_sum;
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t m_other = __shfl_up_sync(~0u, m_before, step);
        const uint32_t c_other = __shfl_up_sync(~0u, c_before, step);
        if (lane >= step)
            m_before += m_other, c_before += c_other;
    }
    __syncthreads();
    if (lane == 31)
        s.sums[warp] = m_before, s.counts[warp] = c_before;
    __syncthreads();
    m_before += s.mass_before - m_sum, c_before += s.count_before - c_sum;
    for (int i = 0; i < warp; i++)
        m_before += s.sums[i], c_before += s.counts[i];
    __syncthreads();
    for (int i = 0; i < kEach; i++) {
        const bool passes =
            by_count ? c_before <= count && c_before + c[i] > count : m_before <= mass && m_before + m[i] > mass;
        if (passes) {
            const int bin = tid * kEach + i;
            s.bin = falling ? kBins - 1 - bin : bin;
            s.mass_before = m_before, s.count_before = c_before;
        }
        m_before += m[i], c_before += c[i];
    }
    __syncthreads();
}

__device__ void clear_bins(shared_state &s) {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads)
        s.mass[i] = 0, s.count[i] = 0;
    __syncthreads();
}

__device__ __forceinline__ void add_to_bin(shared_state &s, int bin, uint64_t mass) {
    if (mass)
        atomicAdd((unsigned long long *)&s.mass[bin], (unsigned long long)mass);
    atomicAdd(&s.count[bin], 1u);
}

// The first token, in falling order of x, with which the sum of masses passes `mass`, or that of counts `count`; one
// must exist. Tokens of -infinity are not there.
__device__ found find(const row_view &row, shared_state &s, bool by_count, uint64_t mass, uint32_t count) {
    clear_bins(s);
    for (int i = threadIdx.x; i < row.n; i += kThreads)
        if (row.x[i] > -INFINITY)
            add_to_bin(s, row.bin(i), row.mass(i));
    if (threadIdx.x == 0)
        s.mass_before = 0, s.count_before = 0;
    __syncthreads();
    pass_bins(s, false, by_count, mass, count);
    const int bin = s.bin;
    uint32_t prefix = 0;
    for (int level = 0; level < 3; level++) {
        const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, digit_bits = level == 2 ? 10 : 11;
        clear_bins(s);
        for (int i = threadIdx.x; i < row.n; i += kThreads) {
            const uint32_t key = key_of(row.x[i]);
            if ((level == 0 || key >> (shift + digit_bits) == prefix) && row.x[i] > -INFINITY && row.bin(i) == bin)
                add_to_bin(s, (int)(key >> shift & ((1u << digit_bits) - 1)), row.mass(i));
        }
        __syncthreads();
        pass_bins(s, true, by_count, mass, count);
        prefix = prefix << digit_bits | (uint32_t)s.bin;
    }
    // All tokens of the last bin are of one value, and weigh alike.
    if (threadIdx.x == 0) {
        const uint64_t each = s.mass[s.bin] / s.count[s.bin];
        const uint32_t rank = by_count ? count - s.count_before : (uint32_t)((mass - s.mass_before) / each);
        s.result = {prefix, (int)rank, s.mass_before + (rank + 1) * each};
    }
    __syncthreads();
    const found out = s.result;
    __syncthreads();
    return out;
}

// The part of the row that a warp goes through in order of tokens.
__device__ void warp_range(int n, int *begin, int *end) {
    const int each = (n + kWarps - 1) / kWarps;
    *begin = min((int)(threadIdx.x / 32) * each, n);
    *end = min(*begin + each, n);
}

// The first token, in order of tokens, with which the sum of weight(i) passes `target`, which is below the whole sum.
template <typename F> __device__ int find_in_order(int n, shared_state &s, uint64_t target, F weight) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int begin, end;
    warp_range(n, &begin, &end);
    uint64_t sum = 0;
    for (int i = begin + lane; i < end; i += 32)
        sum += weight(i);
    for (int step = 16; step > 0; step /= 2)
        sum += __shfl_xor_sync(~0u, sum, step);
    __syncthreads();
    if (lane == 0)
        s.sums[warp] = sum;
    __syncthreads();
    uint64_t before = 0;
    for (int i = 0; i < warp; i++)
        before += s.sums[i];
    if (before <= target && before + sum > target)
        for (int first = begin; first < end; first += 32) {
            uint64_t up_to = first + lane < end ? weight(first + lane) : 0;
            for (int step = 1; step < 32; step *= 2) {
                const uint64_t other = __shfl_up_sync(~0u, up_to, step);
                up_to += lane >= step ? other : 0;
            }
            const unsigned passed = __ballot_sync(~0u, before + up_to > target);
            if (passed) {
                if (lane == 0)
                    s.token = first + __ffs((int)passed) - 1;
                break;
            }
            before += __shfl_sync(~0u, up_to, 31);
        }
    __syncthreads();
    const int token = s.token;
    __syncthreads();
    return token;
}

// x of token `i` before its row was changed: the first of the lists that has it kept it.
__device__ float raw_of(const ts_sample_args &a, const ts_sample_row &row, const float *x, int i) {
    for (int k = 0; k < row.n_changes; k++)
        if (a.changes[row.first_change + k].token == i)
            return a.raw[row.first_change + k];
    return x[i];
}

// Penalties, bias and bans, in this order. A token has at most one change of each kind.
__device__ void adjust(const ts_sample_args &a, const ts_sample_row &row, float *x) {
    for (int kind = TS_SAMPLE_PENALTY; kind <= TS_SAMPLE_BAN; kind++) {
        for (int k = threadIdx.x; k < row.n_changes; k += kThreads) {
            const ts_sample_change c = a.changes[row.first_change + k];
            if (c.kind != kind)
                continue;
            float v = x[c.token];
            a.raw[row.first_change + k] = v;
            if (kind == TS_SAMPLE_PENALTY) {
                v = v > 0 && v <= FLT_MAX ? fminf(__fdiv_rn(v, row.repetition_penalty), FLT_MAX)
                                          : __fmul_rn(v, row.repetition_penalty);
                if (c.times > 0)
                    v = __fsub_rn(v, __fadd_rn(row.presence_penalty, __fmul_rn(row.frequency_penalty, (float)c.times)));
            } else {
                v = kind == TS_SAMPLE_BIAS ? v + c.bias : -INFINITY;
            }
            x[c.token] = v;
        }
        __syncthreads();
    }
}

__device__ int choose(const ts_sample_row &row, const row_view &view, int greedy, shared_state &s) {
    if (row.temperature <= 0)
        return greedy;
    uint64_t sum = 0;
    uint32_t n_there = 0;
    for (int i = threadIdx.x; i < view.n; i += kThreads) {
        const bool there = view.x[i] > -INFINITY;
        sum += there ? view.mass(i) : 0;
        n_there += there;
    }
    const uint64_t total = block_sum(sum, s);
    const bool filters = row.top_k > 0 || row.top_p < 1 || row.min_p > 0;
    if (!filters) {
        const uint64_t target = min((uint64_t)(row.draw * (double)total), total - 1);
        return find_in_order(view.n, s, target, [&](int i) { return view.x[i] > -INFINITY ? view.mass(i) : 0ull; });
    }
    uint64_t left = total, kept;
    if (row.top_k > 0 && (uint64_t)row.top_k < block_sum(n_there, s))
        left = find(view, s, true, 0, (uint32_t)row.top_k - 1).mass;
    kept = left;
    if (row.top_p < 1) {
        const double share = ceil((double)row.top_p * (double)left);
        const uint64_t passed = share < 1 ? 0 : (uint64_t)share - 1;
        if (passed < left)
            kept = find(view, s, false, passed, 0).mass;
    }
    if (row.min_p > 0) {
        const float least = (float)-log((double)row.min_p);
        sum = 0;
        for (int i = threadIdx.x; i < view.n; i += kThreads)
            sum += view.x[i] > -INFINITY && view.below(i) <= least ? view.mass(i) : 0;
        kept = min(kept, block_sum(sum, s));
    }
    kept = max(min(kept, left), kOne); // the largest always stays
    const found at = find(view, s, false, min((uint64_t)(row.draw * (double)kept), kept - 1), 0);
    return find_in_order(view.n, s, (uint64_t)at.rank,
                         [&](int i) { return key_of(view.x[i]) == at.key ? 1ull : 0ull; });
}

__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ ts_sample_args a, bool is_staged) {
    extern __shared__ float staged[];
    __shared__ shared_state s;
    const ts_sample_row row = a.rows[blockIdx.x];
    const int n = (int)a.logits.cols, tid = threadIdx.x;
    float *logits = (float *)a.logits.data + blockIdx.x * a.logits.stride, *x = logits;
    ts_sample_result *out = a.results + blockIdx.x;
    if (is_staged) {
        x = staged;
        for (int i = tid; i < n; i += kThreads)
            x[i] = logits[i];
        __syncthreads();
    }
    float largest, raw_largest = 0;
    int greedy;
    bool bad;
    uint64_t raw_total = 1;
    if (row.n_logprobs >= 0) { // as the model sees it, before anything is changed
        block_largest(x, n, 0xffffffffu, -1, s, &raw_largest, &greedy, &bad);
        const row_view raw = {x, n, raw_largest, 1.0};
        uint64_t sum = 0;
        for (int i = tid; i < n; i += kThreads)
            sum += x[i] > -INFINITY ? raw.mass(i) : 0;
        raw_total = block_sum(sum, s);
        uint32_t key = 0xffffffffu;
        int token = -1, n_top = 0;
        for (; n_top < row.n_logprobs; n_top++) {
            float value;
            block_largest(x, n, key, token, s, &value, &token, &bad);
            if (token < 0)
                break;
            key = key_of(value);
            if (tid == 0)
                out->top_tokens[n_top] = token, out->top_logits[n_top] = value;
        }
        if (tid == 0)
            out->n_top = n_top;
        __syncthreads();
    }
    adjust(a, row, x);
    block_largest(x, n, 0xffffffffu, -1, s, &largest, &greedy, &bad);
    int token = -1;
    if (!bad && largest > -INFINITY) {
        const row_view view = {x, n, largest, row.temperature > 0 ? 1.0 / (double)row.temperature : 1.0};
        token = choose(row, view, greedy, s);
    }
    if (tid == 0) {
        out->token = token;
        out->logit = token >= 0 ? raw_of(a, row, x, token) : 0.0f;
        out->log_total = (double)raw_largest + log((double)raw_total / (double)kOne);
    }
}

} // namespace

ts_status ts_cuda_sample(ts_device *base, const ts_sample_args *args) {
    ts_status status = TS_OK;
    int most_bytes = 0;
    bool is_staged;
    const ts_cuda_device *device = ts_cuda_device_of(base);
    const size_t row_bytes = (size_t)args->logits.cols * sizeof(float);
    TS_CUDA_TRY(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device->ordinal));
    is_staged = row_bytes + kStaticBytes <= (size_t)most_bytes;
    if (is_staged)
        TS_CUDA_TRY(cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)row_bytes));
    sample_kernel<<<(unsigned)args->logits.rows, kThreads, is_staged ? row_bytes : 0, device->stream>>>(*args,
                                                                                                        is_staged);
    TS_CUDA_TRY(cudaGetLastError());
done:
    return status;
}
