// The sampling chain, one block a row, without sorting the vocabulary.
//
// A row is kept in shared memory where it fits (up to about 51,000 tokens), else read again from L2 in every pass. With
// x the adjusted logits, every token weighs e^{(x - largest) / temperature}, in fixed point (2^44 is 1), so that sums
// do not depend on the order in which threads add.
//
// "The first tokens, in falling order, that weigh more than w", which is what top_p and the draw ask for, and "the
// first n tokens", top_k, start from a histogram of 4,096 linear bins below the largest. It only counts: a 32-bit
// shared atomic a token, where masses would take 64 bits and several times as long. Counts say exactly where top_k ends
// and nearly where a mass does; a further pass then sums the masses ahead of that bin exactly and lists its tokens, and
// in the rare case that the sum ends in another bin, goes on there. The list is ranked in shared memory; a bin of too
// many tokens is narrowed by bisection first.
//
// Bound by reading the row where nothing filters, else by the instructions of one pass with an exponential per token
// for the histogram, top_p and the draw each.
#include "kernels/cuda/device.h"
#include "kernels/cuda/primitives/matrix.cuh"

#include <cfloat>
#include <climits>

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
static_assert(kWarps == 32, "a warp's lanes hold one value of every warp");
constexpr int kBins = 4096, kListed = 512;
constexpr double kBinsPerUnit = 128; // of (largest - x) / temperature: what is in the last bin weighs less than 2^-44
constexpr uint64_t kOne = 1ull << 44;
constexpr double kLog2E = 1.4426950408889634074;

struct shared_state {
    uint32_t count[kBins];
    uint64_t listed[kListed], masses[kListed];
    uint64_t sums[kWarps], more_sums[kWarps];
    float largest[kWarps];
    int place[kWarps];
    uint32_t n_listed, least, most; // tokens in the list, their keys
    uint64_t mass_up_to;
    uint32_t count_before;
    int bin, token;
};

// Larger values have larger keys.
__device__ __forceinline__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f); // -0 counts as 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct row_view {
    const float *x;
    int n, n_fours; // fours: of which the row may be read
    float largest;
    float high, low; // their sum: -log2(e) / temperature
    float bins;      // bins per unit of x
    float farthest;  // below the largest: weighs nothing

    __device__ void set_scale(float top, float temperature) {
        const double scale = 1 / fmin((double)temperature, 1e36), exponent = -fmin(scale * kLog2E, (double)FLT_MAX);
        largest = top;
        high = (float)exponent, low = (float)(exponent - (double)high);
        bins = (float)fmin(scale * kBinsPerUnit, (double)FLT_MAX);
        farthest = (float)(-60 / exponent);
    }
    // 2^(high + low) d, right to a unit in the last place: the rounded product apart from the rest.
    __device__ __forceinline__ float weight(float v) const {
        constexpr float kMagic = 12582912; // 1.5 * 2^23: its sum with a number ends in the number's integer
        const float d = fminf(largest - v, farthest), shifted = fmaf(d, high, kMagic);
        const float rest = fmaf(d, low, fmaf(d, high, kMagic - shifted));
        float power;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(rest));
        return __int_as_float(__float_as_int(power) + (__float_as_int(shifted) << 23));
    }
    __device__ __forceinline__ uint64_t mass(float v) const {
        return (uint64_t)(weight(v) * (float)kOne);
    }
    __device__ __forceinline__ int bin(float v) const {
        constexpr float kMagic = 8388608; // 2^23, likewise
        return __float_as_int(fminf((largest - v) * bins, (float)(kBins - 1)) + kMagic) & 0x7fffff;
    }
    // f(i, x[i]) for all tokens, rising in each thread.
    template <typename F> __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 2
        for (int i = threadIdx.x; i < n_fours; i += kThreads) {
            const float4 v = reinterpret_cast<const float4 *>(x)[i];
            f(4 * i, v.x), f(4 * i + 1, v.y), f(4 * i + 2, v.z), f(4 * i + 3, v.w);
        }
        for (int i = 4 * n_fours + threadIdx.x; i < n; i += kThreads)
            f(i, x[i]);
    }
};

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Inclusive, over the lanes.
__device__ __forceinline__ uint64_t warp_prefix(uint64_t x) {
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(~0u, x, step);
        x += (int)(threadIdx.x % 32) >= step ? other : 0;
    }
    return x;
}

// Both become their sums over the block.
__device__ void block_sums(uint64_t *x, uint64_t *y, shared_state &s) {
    const uint64_t a = warp_sum(*x), b = warp_sum(*y);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        s.sums[threadIdx.x / 32] = a, s.more_sums[threadIdx.x / 32] = b;
    __syncthreads();
    *x = warp_sum(s.sums[threadIdx.x % 32]);
    *y = warp_sum(s.more_sums[threadIdx.x % 32]);
}

__device__ __forceinline__ void larger_of_lanes(float *best, int *at) {
    for (int step = 16; step > 0; step /= 2) {
        const float v = __shfl_xor_sync(~0u, *best, step);
        const int i = __shfl_xor_sync(~0u, *at, step);
        if (v > *best || (v == *best && i < *at))
            *best = v, *at = i;
    }
}

// Of a thread's tokens, taken as they rise: the largest and the first that has it. NaN and +infinity are wrong.
struct largest_so_far {
    float value = -INFINITY;
    int token = INT_MAX;
    bool wrong = false;

    __device__ __forceinline__ void take(int i, float v) {
        wrong |= !(v < INFINITY);
        if (v > value || token == INT_MAX)
            value = v, token = i;
    }
};

// The largest of the row and the smallest token that has it, or -1 where no thread has any. bad: a token is wrong.
struct row_largest {
    float value;
    int token;
    bool bad;
};

__device__ row_largest block_largest(largest_so_far x, shared_state &s) {
    larger_of_lanes(&x.value, &x.token);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        s.largest[threadIdx.x / 32] = x.value, s.place[threadIdx.x / 32] = x.token;
    const bool bad = __syncthreads_or(x.wrong);
    x.value = s.largest[threadIdx.x % 32], x.token = s.place[threadIdx.x % 32];
    larger_of_lanes(&x.value, &x.token);
    return {x.value, x.token == INT_MAX ? -1 : x.token, bad};
}

__device__ row_largest find_largest(const row_view &row, shared_state &s) {
    largest_so_far best;
    row.for_each([&](int i, float v) { best.take(i, v); });
    return block_largest(best, s);
}

// Among those that stand after `last` in falling order.
__device__ row_largest find_next(const row_view &row, const row_largest &last, shared_state &s) {
    largest_so_far best;
    const uint32_t last_key = key_of(last.value);
    row.for_each([&](int i, float v) {
        const uint32_t key = key_of(v);
        if (key < last_key || (key == last_key && i > last.token))
            best.take(i, v);
    });
    return block_largest(best, s);
}

// The first token, in order of tokens, with which the sum of weight(x) passes `target`, which is below the whole sum.
template <typename F> __device__ int find_in_order(const row_view &row, shared_state &s, uint64_t target, F weight) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int begin = 0, end = row.n;
    while (end - begin > 32) { // down to the part of one warp, which all then divide again
        const int each = (end - begin + kThreads - 1) / kThreads * 32;
        const int from = begin + warp * each, to = min(end, from + each);
        uint64_t sum = 0;
#pragma unroll 4
        for (int i = from + lane; i < to; i += 32)
            sum += weight(row.x[i]);
        sum = warp_sum(sum);
        __syncthreads();
        if (lane == 0)
            s.sums[warp] = sum;
        __syncthreads();
        const uint64_t own = s.sums[lane], up_to = warp_prefix(own);
        const int part = __ffs((int)__ballot_sync(~0u, up_to > target)) - 1;
        target -= __shfl_sync(~0u, up_to - own, part);
        begin += part * each;
        end = min(end, begin + each);
    }
    const uint64_t up_to = warp_prefix(begin + lane < end ? weight(row.x[begin + lane]) : 0);
    return begin + __ffs((int)__ballot_sync(~0u, up_to > target)) - 1;
}

// Tokens by bin, without those of the last, which weigh nothing. *total: the mass of all; *heavy: of those that weigh
// at least `least`.
__device__ void fill_bins(const row_view &row, shared_state &s, float least, uint64_t *total, uint64_t *heavy) {
    for (int i = threadIdx.x; i < kBins; i += kThreads)
        s.count[i] = 0;
    __syncthreads();
    uint64_t sum = 0, sum_of_heavy = 0;
    row.for_each([&](int, float v) {
        const int bin = row.bin(v);
        if (bin < kBins - 1)
            atomicAdd(&s.count[bin], 1u);
        const float weight = row.weight(v);
        const uint64_t mass = (uint64_t)(weight * (float)kOne);
        sum += mass;
        sum_of_heavy += weight >= least ? mass : 0;
    });
    *total = sum, *heavy = sum_of_heavy;
    block_sums(total, heavy, s);
}

// The bin with which the tokens pass `target`, and s.count_before it; or, not exactly, with which their mass passes
// target / total of all. -1: there are no more tokens than target.
template <bool ByCount> __device__ int find_bin(shared_state &s, uint64_t target, uint64_t total) {
    constexpr int kEach = kBins / kThreads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = (int)threadIdx.x * kEach;
    uint64_t sizes[kEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const float centre = exp2f((float)(first + i) * (float)(-kLog2E / kBinsPerUnit));
        sizes[i] = s.count[first + i] * (ByCount ? 1ull : (uint64_t)(centre * (float)kOne));
        sum += sizes[i];
    }
    const uint64_t up_to = warp_prefix(sum);
    __syncthreads();
    if (lane == 31)
        s.sums[warp] = up_to;
    if (threadIdx.x == 0)
        s.bin = -1;
    __syncthreads();
    const uint64_t warps_up_to = warp_prefix(s.sums[lane]), all = __shfl_sync(~0u, warps_up_to, 31);
    uint64_t before = __shfl_sync(~0u, warps_up_to, warp) - s.sums[warp] + up_to - sum;
    if (!ByCount)
        target = min((uint64_t)((double)target / (double)total * (double)all), all - 1);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        if (before <= target && before + sizes[i] > target)
            s.bin = first + i, s.count_before = (uint32_t)before;
        before += sizes[i];
    }
    __syncthreads();
    return s.bin;
}

// Tokens x of which where(x) is 0 into the list, as far as it has room, with the range of their keys. *before: the mass
// of those where it is negative; *inside: of those where it is 0.
template <typename F>
__device__ void list_tokens(const row_view &row, shared_state &s, F where, uint64_t *before, uint64_t *inside) {
    __syncthreads();
    if (threadIdx.x == 0)
        s.n_listed = s.most = 0, s.least = ~0u;
    __syncthreads();
    uint64_t sum = 0, sum_inside = 0;
    row.for_each([&](int i, float v) {
        const int place = where(v);
        if (place > 0)
            return;
        const uint64_t mass = row.mass(v);
        if (place < 0) {
            sum += mass;
            return;
        }
        sum_inside += mass;
        const uint32_t key = key_of(v), at = atomicAdd(&s.n_listed, 1u);
        atomicMin(&s.least, key);
        atomicMax(&s.most, key);
        if (at < kListed)
            s.listed[at] = (uint64_t)key << 32 | (uint32_t)~i, s.masses[at] = mass;
    });
    *before = sum, *inside = sum_inside;
    block_sums(before, inside, s);
}

struct found {
    int token;
    uint64_t mass; // of all tokens up to this one
};

// The first token of the list, in falling order, with which masses or the number of tokens pass `target`.
template <bool ByCount> __device__ found rank_list(shared_state &s, uint64_t target, uint64_t before) {
    constexpr int kShare = 8; // lanes a token
    const int n = (int)s.n_listed, part = threadIdx.x % kShare;
    for (int first = 0; first < n; first += kThreads / kShare) {
        const int i = first + (int)threadIdx.x / kShare;
        const uint64_t mine = i < n ? s.listed[i] : ~0ull;
        uint64_t mass = 0;
        uint32_t count = 0;
        for (int j = part; j < n; j += kShare)
            if (s.listed[j] >= mine)
                mass += s.masses[j], count++;
        for (int step = kShare / 2; step > 0; step /= 2) {
            mass += __shfl_xor_sync(~0u, mass, step);
            count += __shfl_xor_sync(~0u, count, step);
        }
        if (i >= n || part != 0)
            continue;
        const uint64_t up_to = ByCount ? count : mass, own = ByCount ? 1 : s.masses[i];
        if (up_to > target && up_to - own <= target)
            s.token = (int)~(uint32_t)mine, s.mass_up_to = before + mass;
    }
    __syncthreads();
    return {s.token, s.mass_up_to};
}

// The first token, in falling order, with which the number of tokens or the sum of masses passes `target`; masses must
// pass it. With fewer tokens than that, token -1 and `total`, the mass of all.
template <bool ByCount> __device__ found find(const row_view &row, shared_state &s, uint64_t target, uint64_t total) {
    int bin = find_bin<ByCount>(s, target, total);
    if (bin < 0)
        return {-1, total};
    const uint32_t count_before = s.count_before;
    uint64_t before, inside;
    for (;;) {
        list_tokens(
            row, s, [&](float v) { return row.bin(v) - bin; }, &before, &inside);
        if (ByCount || (before <= target && before + inside > target))
            break;
        const int step = before > target ? -1 : 1;
        do
            bin += step;
        while (s.count[bin] == 0);
    }
    target -= ByCount ? count_before : before;
    uint32_t n = s.n_listed, least = s.least, most = s.most;
    if (n <= kListed)
        return rank_list<ByCount>(s, target, before);
    while (n > kListed && least < most) {
        const uint32_t middle = most - (most - least) / 2;
        uint64_t mass = 0, count = 0;
        row.for_each([&](int, float v) {
            const uint32_t key = key_of(v);
            if (key >= middle && key <= most)
                mass += row.mass(v), count++;
        });
        block_sums(&mass, &count, s);
        const uint64_t size = ByCount ? count : mass;
        if (size > target) {
            least = middle;
            n = (uint32_t)count;
        } else {
            most = middle - 1;
            n -= (uint32_t)count;
            target -= size;
            before += mass;
        }
    }
    if (n > kListed) { // all alike
        const uint64_t each = row.mass(value_of(least)), rank = ByCount ? target : target / each;
        return {find_in_order(row, s, rank, [&](float v) { return (uint64_t)(key_of(v) == least); }),
                before + (rank + 1) * each};
    }
    uint64_t ahead;
    list_tokens(
        row, s, [&](float v) { return key_of(v) >= least && key_of(v) <= most ? 0 : 1; }, &ahead, &inside);
    return rank_list<ByCount>(s, target, before);
}

// x of token `i` before its row was changed: the first of the lists that has it kept it.
__device__ float raw_of(const ts_sample_args &a, const ts_sample_row &row, const float *x, int i) {
    for (int k = 0; k < row.n_changes; k++)
        if (a.changes[row.first_change + k].token == i)
            return a.raw[row.first_change + k];
    return x[i];
}

// Penalties, bias and bans, in this order. A token has at most one penalty and one bias, and any number of bans.
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
    uint64_t total = 0, heavy = 0;
    if (row.top_k <= 0 && row.top_p >= 1 && row.min_p <= 0) {
        view.for_each([&](int, float v) { total += view.mass(v); });
        block_sums(&total, &heavy, s);
        const uint64_t target = min((uint64_t)(row.draw * (double)total), total - 1);
        return find_in_order(view, s, target, [&](float v) { return view.mass(v); });
    }
    // Every filter leaves the first tokens in falling order: together, those of the least mass.
    fill_bins(view, s, row.min_p, &total, &heavy);
    uint64_t left = total;
    if (row.top_k > 0)
        left = find<true>(view, s, (uint64_t)row.top_k - 1, total).mass;
    uint64_t kept = min(left, heavy);
    if (row.top_p < 1) {
        const double share = ceil((double)row.top_p * (double)left);
        const uint64_t passed = share < 1 ? 0 : (uint64_t)share - 1;
        if (passed < left)
            kept = min(kept, find<false>(view, s, passed, total).mass);
    }
    kept = max(kept, kOne); // the largest always stays
    return find<false>(view, s, min((uint64_t)(row.draw * (double)kept), kept - 1), total).token;
}

// A row on its way into shared memory, all of it in flight at once, in groups that are waited for one after the other.
struct row_copy {
    static constexpr int kGroups = 4;
    const row_view &row;
    float *staged;

    // f(i) for this thread's fours of a group: the last has what is left.
    template <typename F> __device__ __forceinline__ void for_fours(int group, F f) const {
        constexpr int kEach = 4 * kThreads;
        const int end = group + 1 < kGroups ? min(row.n_fours, (group + 1) * kEach) : row.n_fours;
        for (int i = (int)threadIdx.x + group * kEach; i < end; i += kThreads)
            f(i);
    }
    __device__ __forceinline__ void ask() const {
        for (int group = 0; group < kGroups; group++) {
            for_fours(group, [&](int i) { ts::copy_async(ts::shared_address(staged + 4 * i), row.x + 4 * i); });
            ts::copy_commit();
        }
        for (int i = 4 * row.n_fours + (int)threadIdx.x; i < row.n; i += kThreads)
            staged[i] = row.x[i];
    }
    template <int kGroup> __device__ __forceinline__ void take(largest_so_far &best) const {
        ts::copy_wait<kGroups - 1 - kGroup>();
        for_fours(kGroup, [&](int i) {
            const float4 v = reinterpret_cast<const float4 *>(staged)[i];
            best.take(4 * i, v.x), best.take(4 * i + 1, v.y), best.take(4 * i + 2, v.z), best.take(4 * i + 3, v.w);
        });
    }
};

// Stages the row; its largest is sought in what has come while the rest is under way. A thread reads what it copied.
__device__ row_largest stage(const row_view &row, float *staged, shared_state &s) {
    const row_copy copy = {row, staged};
    largest_so_far best;
    copy.ask();
    copy.take<0>(best);
    copy.take<1>(best);
    copy.take<2>(best);
    copy.take<3>(best);
    for (int i = 4 * row.n_fours + (int)threadIdx.x; i < row.n; i += kThreads)
        best.take(i, staged[i]);
    return block_largest(best, s); // in which all meet
}

template <bool IsStaged>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ ts_sample_args a) {
    extern __shared__ float4 staged[];
    __shared__ shared_state s;
    const ts_sample_row row = a.rows[blockIdx.x];
    const int n = (int)a.logits.cols, tid = threadIdx.x;
    float *x = (float *)a.logits.data + blockIdx.x * a.logits.stride;
    ts_sample_result *out = a.results + blockIdx.x;
    row_view view = {x, n, (uintptr_t)x % sizeof(float4) == 0 ? n / 4 : 0};
    row_largest raw = {};
    if constexpr (IsStaged) {
        raw = stage(view, (float *)staged, s);
        x = (float *)staged;
        view = {x, n, n / 4};
    } else if (row.n_logprobs >= 0 || row.n_changes == 0) { // else nobody asks
        raw = find_largest(view, s);
    }
    uint64_t raw_total = 1;
    if (row.n_logprobs >= 0) { // as the model sees it, before anything is changed
        view.set_scale(raw.value, 1);
        uint64_t sum = 0, unused = 0;
        view.for_each([&](int, float v) { sum += view.mass(v); });
        block_sums(&sum, &unused, s);
        raw_total = sum;
        row_largest next = raw;
        int n_top = 0;
        while (n_top < row.n_logprobs && next.token >= 0) {
            if (tid == 0)
                out->top_tokens[n_top] = next.token, out->top_logits[n_top] = next.value;
            if (++n_top < row.n_logprobs)
                next = find_next(view, next, s);
        }
        if (tid == 0)
            out->n_top = n_top;
        __syncthreads();
    }
    row_largest top = raw;
    if (row.n_changes > 0) {
        adjust(a, row, x);
        top = find_largest(view, s);
    }
    int token = -1;
    if (!top.bad && top.value > -INFINITY) {
        view.set_scale(top.value, row.temperature > 0 ? row.temperature : 1);
        token = choose(row, view, top.token, s);
    }
    if (tid == 0) {
        out->token = token;
        out->logit = token >= 0 ? raw_of(a, row, x, token) : 0.0f;
        out->log_total = (double)raw.value + log((double)raw_total / (double)kOne);
    }
}

} // namespace

ts_status ts_cuda_sample(ts_device *base, const ts_sample_args *args) {
    ts_status status = TS_OK;
    int most_bytes = 0;
    const ts_cuda_device *device = ts_cuda_device_of(base);
    const size_t row_bytes = ((size_t)args->logits.cols * sizeof(float) + 15) / 16 * 16;
    const unsigned n_rows = (unsigned)args->logits.rows;
    TS_CUDA_TRY(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device->ordinal));
    if (row_bytes + sizeof(shared_state) + 128 <= (size_t)most_bytes) {
        TS_CUDA_TRY(
            cudaFuncSetAttribute(sample_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)row_bytes));
        sample_kernel<true><<<n_rows, kThreads, row_bytes, device->stream>>>(*args);
    } else {
        sample_kernel<false><<<n_rows, kThreads, 0, device->stream>>>(*args);
    }
    TS_CUDA_TRY(cudaGetLastError());
done:
    return status;
}
