// The attention op in sparse form where its arrays pass 2^31 elements: a sequence whose slots lie beyond, and rows of
// qkvg beyond, must come out bit by bit as the same sequence does in small arrays; and sequences in one batch as each
// does alone. Needs a GPU with 24 GiB free; exits 77 without one.
//
//     test.kernels.attention_sparse_cuda
//     test.kernels.attention_sparse_cuda time [N_TOKENS [HEAD_DIM [CALLS [fp8 [CHUNK]]]]]
//
// `time` prefills sequences of random rows in one call each (or in CHUNKs), decay spread over the heads so that about
// 6 % of tile pairs are selected, and prints the median and the spread of the op's time.
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <vector>

namespace {

constexpr int kSkipped = 77;

void check(ts_status status) {
    if (status == TS_OK)
        return;
    printf("FAIL: %s\n", ts_status_message());
    exit(1);
}

void check(cudaError_t error) {
    check(ts_cuda_status(error, "test"));
}

__device__ uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// Rows [first, first + n_rows) of a sequence: normal q, k, v and key gates; decay gates about `decay` of the head.
__global__ void fill_kernel(__nv_bfloat16 *rows, int64_t n_rows, int64_t stride, int n_heads, int n_kv, int d,
                            int64_t first, uint64_t seed, float slowest) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_rows * stride)
        return;
    const int64_t row = i / stride, column = i % stride, gates = (int64_t)(n_heads + 2 * n_kv) * d;
    const uint64_t bits = mix(seed ^ (uint64_t)((first + row) * stride + column) * 0x2545f4914f6cdd1du);
    const float u = ((float)(bits >> 40) + 0.5f) * 0x1p-24f, w = (float)(bits & 0xffffff) * 0x1p-24f;
    float x = sqrtf(-2.0f * logf(u)) * cospif(2.0f * w);
    if (column >= gates + n_kv) { // half-lives from half a tile to `slowest` tiles, in equal ratios
        const int j = (int)(column - gates - n_kv);
        const float tiles = 0.5f * exp2f(log2f(2 * slowest) * (float)j / (float)(n_kv > 1 ? n_kv - 1 : 1));
        x = logf(64.0f * tiles / 0.6931f) + 0.25f * x;
    }
    rows[i] = __float2bfloat16_rn(x);
}

struct shape {
    int n_heads, n_kv, d, T;
    ts_dtype slots;
    ts_sparsity sparsity;
};

struct cache {
    ts_tile_cache_layer layer;
    std::vector<void *> memory;

    template <typename T> void take(T **out, int64_t n_bytes) {
        void *data;
        check(cudaMalloc(&data, (size_t)n_bytes));
        check(cudaMemset(data, 0, (size_t)n_bytes));
        memory.push_back(data);
        *out = (T *)data;
    }

    // Slots of every sequence are the last of n_pages pages.
    cache(const shape &s, int n_sequences, int64_t n_slots, int64_t n_pages) {
        const int64_t n = (int64_t)n_sequences * s.n_kv, d = s.d, T = s.T, pool = n_pages * s.n_kv;
        layer = {};
        layer.n_heads = s.n_heads, layer.n_kv_heads = s.n_kv, layer.head_dim = s.d, layer.tile_size = s.T;
        layer.is_sparse = true, layer.sparsity = s.sparsity, layer.slot_dtype = s.slots;
        layer.n_pages = n_pages, layer.page_table_stride = n_slots;
        layer.open_dtype = TS_BF16;
        take((char **)&layer.open_k, n * T * d * 2);
        take((char **)&layer.open_v, n * T * d * 2);
        take(&layer.open_gate, n * T * 4);
        take(&layer.open_c, n * T * 8);
        take(&layer.query_sum, n * d * 4);
        take(&layer.decay_end, n * 8);
        take((char **)&layer.state, n * d * d * 2);
        take(&layer.mass, n * d * 4);
        take(&layer.pairs, n * 16);
        take(&layer.n_held, n * 4);
        take((char **)&layer.slot_state, pool * d * d * (int64_t)ts_dtype_bytes(s.slots));
        take(&layer.slot_scale, pool * d * 4);
        take(&layer.slot_mass, pool * d * 4);
        take(&layer.slot_decay_end, pool * 8);
        take(&layer.slot_key, pool * 8);
        take(&layer.slot_tile, pool * 8);
        std::vector<int32_t> table;
        for (int64_t i = 0; i < n_sequences * n_slots; i++)
            table.push_back((int32_t)(n_pages - 1 - i));
        int32_t *pages;
        take(&pages, (int64_t)table.size() * 4);
        check(cudaMemcpy(pages, table.data(), table.size() * 4, cudaMemcpyHostToDevice));
        layer.page_table = pages;
        std::vector<uint8_t *> pruned((size_t)n_sequences);
        for (uint8_t *&p : pruned)
            take(&p, 1 << 17);
        uint8_t **device_pruned;
        take(&device_pruned, n_sequences * 8);
        check(cudaMemcpy(device_pruned, pruned.data(), pruned.size() * 8, cudaMemcpyHostToDevice));
        layer.pruned = device_pruned;
    }
    ~cache() {
        (void)cudaDeviceSynchronize();
        for (void *data : memory)
            (void)cudaFree(data);
    }
    void empty(const shape &s, int n_sequences) {
        const size_t n = (size_t)n_sequences * s.n_kv;
        check(cudaMemset(layer.decay_end, 0, n * 8));
        check(cudaMemset(layer.state, 0, n * s.d * s.d * 2));
        check(cudaMemset(layer.mass, 0, n * s.d * 4));
        check(cudaMemset(layer.pairs, 0, n * 16));
        check(cudaMemset(layer.n_held, 0, n * 4));
    }
};

struct rows {
    ts_tensor qkvg, y;
    rows(const shape &s, int64_t n) {
        const int64_t columns = (int64_t)(s.n_heads + 2 * s.n_kv) * s.d + 2 * s.n_kv, stride = (columns + 7) / 8 * 8;
        qkvg = {NULL, TS_BF16, n, columns, stride};
        y = {NULL, TS_BF16, n, (int64_t)s.n_heads * s.d, (int64_t)s.n_heads * s.d};
        check(cudaMalloc(&qkvg.data, (size_t)(n * stride) * 2));
        check(cudaMalloc(&y.data, (size_t)(n * y.stride) * 2));
        check(cudaMemset(y.data, 0xff, (size_t)(n * y.stride) * 2));
    }
    void fill(const shape &s, int64_t at, int64_t n, uint64_t seed, float slowest) {
        const int64_t n_elements = n * qkvg.stride;
        fill_kernel<<<(unsigned)((n_elements + 255) / 256), 256>>>(
            (__nv_bfloat16 *)qkvg.data + at * qkvg.stride, n, qkvg.stride, s.n_heads, s.n_kv, s.d, 0, seed, slowest);
        check(cudaDeviceSynchronize());
    }
    ~rows() {
        (void)cudaDeviceSynchronize();
        (void)cudaFree(qkvg.data);
        (void)cudaFree(y.data);
    }
};

ts_tensor rows_from(const ts_tensor &t, int64_t first, int64_t n) {
    ts_tensor out = t;
    out.data = (char *)t.data + first * t.stride * 2;
    out.rows = n;
    return out;
}

void attend(ts_device *device, const cache &c, const rows &r, std::vector<ts_span> spans, int64_t first_row) {
    static ts_span *device_spans = NULL;
    if (!device_spans)
        check(cudaMalloc(&device_spans, 16 * sizeof(ts_span)));
    int64_t n_rows = 0;
    for (ts_span &span : spans) {
        span.row = n_rows;
        n_rows += span.n_tokens;
    }
    check(cudaMemcpyAsync(device_spans, spans.data(), spans.size() * sizeof(ts_span), cudaMemcpyHostToDevice,
                          ts_cuda_device_of(device)->stream));
    ts_batch batch = {};
    batch.n_spans = (int32_t)spans.size();
    batch.n_rows = n_rows;
    batch.spans = spans.data();
    batch.device_spans = device_spans;
    const ts_attention_args args = {&batch, rows_from(r.qkvg, first_row, n_rows), &c.layer, 1.0,
                                    1e-6,   rows_from(r.y, first_row, n_rows)};
    check(ts_op_attention(device, &args));
}

std::vector<uint16_t> read(const rows &r, int64_t first, int64_t n) {
    std::vector<uint16_t> out((size_t)(n * r.y.stride));
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(out.data(), (uint16_t *)r.y.data + first * r.y.stride, out.size() * 2, cudaMemcpyDeviceToHost));
    return out;
}

// Outputs are poisoned with 0xffff, a NaN, before a run.
bool is_written(const std::vector<uint16_t> &y) {
    return std::none_of(y.begin(), y.end(), [](uint16_t bits) { return (bits & 0x7fff) > 0x7f80; });
}

const ts_sparsity kRules = {0, 1e-3, 0, 1, 2, 1};

int verdict(const char *what, bool same) {
    printf("%s: %s\n", same ? "ok" : "FAIL", what);
    return same ? 0 : 1;
}

std::vector<int64_t> read_pairs(const cache &c, const shape &s, int n_sequences) {
    std::vector<int64_t> out((size_t)(2 * n_sequences * s.n_kv));
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(out.data(), c.layer.pairs, out.size() * 8, cudaMemcpyDeviceToHost));
    return out;
}

// I3: sequences of eight groups of 32 tiles, all of them in one call (640 groups and KV heads), then each in a call of
// its own (128), for which tile_choose.cu takes larger blocks, select the same tiles and write the same bits.
int verify_batch(ts_device *device, int d) {
    constexpr int kSequences = 5;
    constexpr int64_t n = 8 * 32 * 64, n_slots = n / 64;
    const shape s = {16, 16, d, 64, TS_BF16, kRules};
    rows r(s, kSequences * n);
    std::vector<ts_span> spans;
    for (int i = 0; i < kSequences; i++) {
        r.fill(s, i * n, n, 20 + (uint64_t)i, 72.0f);
        spans.push_back({i, (int32_t)n, 0, 0});
    }
    std::vector<uint16_t> y[2];
    std::vector<int64_t> pairs[2];
    for (int alone = 0; alone < 2; alone++) {
        const cache c(s, kSequences, n_slots, kSequences * n_slots);
        check(cudaMemset(r.y.data, 0xff, (size_t)(r.y.rows * r.y.stride) * 2));
        if (alone)
            for (int i = 0; i < kSequences; i++)
                attend(device, c, r, {spans[(size_t)i]}, i * n);
        else
            attend(device, c, r, spans, 0);
        y[alone] = read(r, 0, kSequences * n);
        pairs[alone] = read_pairs(c, s, kSequences);
    }
    return verdict(d == 64 ? "sequences in one batch and alone" : "sequences in one batch and alone, d 128",
                   y[0] == y[1] && pairs[0] == pairs[1] && is_written(y[0]));
}

int verify(ts_device *device) {
    size_t free_bytes, total_bytes;
    check(ts_device_memory(device, &free_bytes, &total_bytes));
    if (free_bytes < (size_t)24 << 30) {
        printf("SKIP: %zu bytes of device memory are free; 24 GiB are needed\n", free_bytes);
        return -1;
    }
    int n_failed = 0;
    for (ts_dtype slots : {TS_BF16, TS_FP8_E4M3}) {
        const shape s = {2, 2, 64, 64, slots, kRules};
        const int64_t n = 64 * 64 + 20, n_slots = 64;
        rows r(s, n);
        r.fill(s, 0, n, 1, 16.0f);
        std::vector<uint16_t> y[2];
        for (int big = 0; big < 2; big++) {
            const int64_t n_pages = big ? ((int64_t)1 << 31) / (64 * 64) + 1000 : n_slots; // of each head
            const cache c(s, 1, n_slots, n_pages);
            check(cudaMemset(r.y.data, 0xff, (size_t)(n * r.y.stride) * 2));
            for (int64_t at = 0; at < n; at += 1000) { // later chunks read the slots
                const int32_t chunk = (int32_t)std::min<int64_t>(1000, n - at);
                attend(device, c, r, {{0, chunk, 0, at}}, at);
            }
            y[big] = read(r, 0, n);
        }
        n_failed += verdict(slots == TS_BF16 ? "slots beyond 2^31 elements" : "slots beyond 2^31 elements, FP8",
                            y[0] == y[1] && is_written(y[0]));
    }
    n_failed += verify_batch(device, 64);
    n_failed += verify_batch(device, 128);
    const shape s = {16, 16, 64, 64, TS_BF16, kRules};
    const int64_t n_first = 700000, n = 5000;
    rows r(s, n_first + n);
    r.fill(s, 0, n_first, 2, 16.0f);
    r.fill(s, n_first, n, 3, 16.0f);
    std::vector<uint16_t> y[2];
    for (int big = 0; big < 2; big++) {
        const cache c(s, 2, n_first / 64, 2 * (n_first / 64));
        if (big)
            attend(device, c, r, {{0, (int32_t)n_first, 0, 0}, {1, (int32_t)n, 0, 0}}, 0);
        else
            attend(device, c, r, {{1, (int32_t)n, 0, 0}}, n_first);
        y[big] = read(r, n_first, n);
        check(cudaMemset(r.y.data, 0xff, (size_t)(r.y.rows * r.y.stride) * 2));
    }
    n_failed += verdict("rows beyond 2^31 elements", y[0] == y[1] && is_written(y[0]));
    return n_failed;
}

void time_prefill(ts_device *device, int64_t n, int d, int n_calls, ts_dtype slots, int64_t chunk) {
    constexpr int kInputs = 3;
    const shape s = {16, 16, d, 64, slots, kRules};
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    rows *r[kInputs];
    for (int i = 0; i < kInputs; i++) {
        r[i] = new rows(s, n);
        r[i]->fill(s, 0, n, 10 + (uint64_t)i, 72.0f);
    }
    cache c(s, 1, n / 64, n / 64);
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<float> times;
    for (int call = -3; call < n_calls; call++) {
        c.empty(s, 1);
        check(cudaDeviceSynchronize());
        check(cudaEventRecord(begin, stream));
        for (int64_t at = 0; at < n; at += chunk)
            attend(device, c, *r[(call + 3) % kInputs], {{0, (int32_t)std::min(chunk, n - at), 0, at}}, at);
        check(cudaEventRecord(end, stream));
        check(cudaEventSynchronize(end));
        float ms;
        check(cudaEventElapsedTime(&ms, begin, end));
        if (call >= 0)
            times.push_back(ms);
    }
    std::vector<int64_t> pairs(2 * 16);
    check(cudaMemcpy(pairs.data(), c.layer.pairs, pairs.size() * 8, cudaMemcpyDeviceToHost));
    double sums[2] = {};
    for (size_t i = 0; i < pairs.size(); i++)
        sums[i % 2] += (double)pairs[i];
    std::sort(times.begin(), times.end());
    printf("%s, N %lld in calls of %lld, H 16, d %d, slots %s: median %.3f ms (%.3f to %.3f, %zu calls), %.2f %% of "
           "pairs selected\n",
           ts_cuda_device_name(device), (long long)n, (long long)chunk, d, ts_dtype_name(slots),
           times[times.size() / 2], times.front(), times.back(), times.size(), 100 * sums[1] / sums[0]);
    for (rows *x : r)
        delete x;
}

} // namespace

int main(int argc, char **argv) {
    ts_device *device = NULL;
    const ts_status status = ts_cuda_device_create(0, TS_BF16, 0, &device);
    if (status == TS_ERR_UNSUPPORTED) {
        printf("SKIP: %s\n", ts_status_message());
        return kSkipped;
    }
    check(status);
    int n_failed = 0;
    if (argc > 1 && strcmp(argv[1], "time") == 0) {
        const int64_t n = argc > 2 ? atoll(argv[2]) : 131072;
        time_prefill(device, n, argc > 3 ? atoi(argv[3]) : 64, argc > 4 ? atoi(argv[4]) : 25,
                     argc > 5 && strcmp(argv[5], "fp8") == 0 ? TS_FP8_E4M3 : TS_BF16, argc > 6 ? atoll(argv[6]) : n);
    } else {
        n_failed = verify(device);
    }
    ts_device_free(device);
    return n_failed < 0 ? kSkipped : n_failed > 0;
}
