// Dense-form prefill attention on CUDA against a float64 evaluation of eqs. (1) to (9) on the CPU, and its times.
//
//     test.kernels.attention_dense_cuda [d]
//         correctness, of all head sizes or one: lengths, spans, groups of heads, strong decay, chained calls, packing
//     test.kernels.attention_dense_cuda time [N [verify]]
//         median of 25 calls at B 1, H 16, for head sizes 64 and 128, rotating input sets
#include "kernels/cuda/attention/dense/attention_dense.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <random>
#include <vector>

#define CUDA(call)                                                                                                     \
    do {                                                                                                               \
        cudaError_t error_ = (call);                                                                                   \
        if (error_ != cudaSuccess) {                                                                                   \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_));                          \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define OK(call)                                                                                                       \
    do {                                                                                                               \
        if ((call) != TS_OK) {                                                                                         \
            printf("%s:%d: %s\n", __FILE__, __LINE__, ts_status_message());                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

constexpr double kEps = 1e-6;
constexpr int R = TS_FOLD_TOKENS; // rows of the open buffers

struct Case {
    const char *name;
    int d, T, H, KV;
    double decay_mean, decay_spread, temperature;
    std::vector<std::vector<int>> lengths; // per sequence, tokens of each call; 0 = not in that call
};

struct Sequence { // what the reference makes of a whole sequence
    std::vector<double> y, state, mass, open_k, open_v, open_c, decay_end;
};

static int row_elements(const Case &c) {
    const int n = (c.H + 2 * c.KV) * c.d + 2 * c.KV;
    return (n + 7) / 8 * 8; // rows begin at multiples of 16 bytes
}

static double log_sigmoid(double x) {
    return std::min(x, 0.0) - log1p(exp(-fabs(x)));
}

static double feature(double x) {
    return x > 0 ? x + 1 : exp(x);
}

// rows: [n, stride] as the device sees them; only heads of KV head `only` where it is >= 0.
static Sequence reference(const Case &c, const float *rows, int64_t stride, int64_t n, int only) {
    const int d = c.d, group = c.H / c.KV;
    Sequence r;
    r.y.assign(n * c.H * d, 0);
    r.state.assign(c.KV * d * d, 0);
    r.mass.assign(c.KV * d, 0);
    r.open_k.assign(c.KV * R * d, 0);
    r.open_v = r.open_k;
    r.open_c.assign(c.KV * R, 0);
    r.decay_end.assign(c.KV, 0);
    std::vector<double> S(d * d), z(d), k(d), q(d), num(d);
    for (int j = 0; j < c.KV; j++) {
        if (only >= 0 && j != only)
            continue;
        std::fill(S.begin(), S.end(), 0.0);
        std::fill(z.begin(), z.end(), 0.0);
        double since = 0; // log decay since the state that is kept
        for (int64_t i = 0; i < n; i++) {
            const float *row = rows + i * stride;
            const double gate = 1 / (1 + exp(-(double)row[(c.H + 2 * c.KV) * d + j]));
            const double l = log_sigmoid(row[(c.H + 2 * c.KV) * d + c.KV + j]) / c.temperature, decay = exp(l);
            const float *v = row + (c.H + c.KV + j) * d;
            since += l;
            for (int a = 0; a < d; a++) {
                k[a] = gate * feature(row[(c.H + j) * d + a]);
                z[a] = decay * z[a] + k[a];
                for (int b = 0; b < d; b++)
                    S[a * d + b] = decay * S[a * d + b] + k[a] * v[b];
            }
            for (int h = j * group; h < (j + 1) * group; h++) {
                double den = kEps;
                std::fill(num.begin(), num.end(), 0.0);
                for (int a = 0; a < d; a++) {
                    const double x = feature(row[h * d + a]);
                    den += x * z[a];
                    for (int b = 0; b < d; b++)
                        num[b] += x * S[a * d + b];
                }
                for (int b = 0; b < d; b++)
                    r.y[(i * c.H + h) * d + b] = num[b] / den;
            }
            const int64_t at = j * R + i % R;
            for (int a = 0; a < d; a++) {
                r.open_k[at * d + a] = k[a];
                r.open_v[at * d + a] = v[a];
            }
            r.open_c[at] = since;
            if ((i + 1) % R == 0) {
                std::copy(S.begin(), S.end(), r.state.begin() + j * d * d);
                std::copy(z.begin(), z.end(), r.mass.begin() + j * d);
                r.decay_end[j] += since;
                since = 0;
            }
        }
    }
    return r;
}

struct Errors {
    double difference = 0, norm = 0;
    void add(double x, double reference) {
        difference += (x - reference) * (x - reference);
        norm += reference * reference;
        if (!(fabs(x) < 1e30))
            difference = NAN;
    }
    double relative() const {
        return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
    }
};

template <typename T> static T *on_device(const std::vector<T> &host) {
    T *p;
    CUDA(cudaMalloc(&p, host.size() * sizeof(T) + 256));
    CUDA(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

template <typename T> static std::vector<T> to_host(const T *p, size_t n) {
    std::vector<T> host(n);
    CUDA(cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}

struct Cache {
    ts_tile_cache_layer layer = {};
    Cache(const Case &c, int n_sequences) {
        const size_t n = (size_t)n_sequences * c.KV;
        layer.n_heads = c.H, layer.n_kv_heads = c.KV, layer.head_dim = c.d, layer.tile_size = c.T;
        layer.open_dtype = TS_BF16;
        const size_t bytes[] = {n * R * c.d * 2,   n * R * c.d * 2, n * R * 8, n * 8,    n * c.d * c.d * 2,
                                n * c.d * c.d * 2, n * c.d * 4,     n * 16,    n * R * 4};
        void **to[] = {(void **)&layer.open_k,    (void **)&layer.open_v, (void **)&layer.open_c,
                       (void **)&layer.decay_end, (void **)&layer.state,  (void **)&layer.state_rest,
                       (void **)&layer.mass,      (void **)&layer.pairs,  (void **)&layer.open_gate};
        for (int i = 0; i < 9; i++) {
            CUDA(cudaMalloc(to[i], bytes[i]));
            CUDA(cudaMemset(*to[i], 0, bytes[i]));
        }
    }
    ~Cache() {
        cudaFree(layer.open_k), cudaFree(layer.open_v), cudaFree(layer.open_c), cudaFree(layer.decay_end);
        cudaFree(layer.state), cudaFree(layer.state_rest), cudaFree(layer.mass), cudaFree(layer.pairs),
            cudaFree(layer.open_gate);
    }
};

// Runs calls of spans. y per sequence, [length, H d].
static std::vector<std::vector<float>> run_calls(const Case &c, const std::vector<std::vector<__nv_bfloat16>> &rows,
                                                 Cache &cache, const ts_cuda_attention_dense_plan &plan,
                                                 const std::vector<int> &sequences) {
    const int stride = row_elements(c), width = c.H * c.d;
    size_t n_calls = 0;
    std::vector<int64_t> position(c.lengths.size(), 0);
    std::vector<std::vector<float>> y(c.lengths.size());
    for (auto &l : c.lengths)
        n_calls = std::max(n_calls, l.size());
    for (size_t call = 0; call < n_calls; call++) {
        std::vector<ts_span> spans;
        std::vector<__nv_bfloat16> packed;
        int64_t n_rows = 0;
        for (int s : sequences) {
            const int n = call < c.lengths[s].size() ? c.lengths[s][call] : 0;
            if (n == 0)
                continue;
            spans.push_back({s, n, n_rows, position[s]});
            packed.insert(packed.end(), rows[s].begin() + position[s] * stride,
                          rows[s].begin() + (position[s] + n) * stride);
            n_rows += n;
            position[s] += n;
        }
        if (spans.empty())
            continue;
        __nv_bfloat16 *qkvg = on_device(packed), *out;
        ts_span *device_spans = on_device(spans);
        CUDA(cudaMalloc(&out, n_rows * width * sizeof(__nv_bfloat16)));
        CUDA(cudaMemset(out, 0xff, n_rows * width * sizeof(__nv_bfloat16))); // NaN
        ts_batch batch = {};
        batch.n_spans = (int)spans.size();
        batch.n_rows = n_rows;
        batch.spans = spans.data();
        batch.device_spans = device_spans;
        ts_attention_args args = {};
        args.batch = &batch;
        args.qkvg = ts_tensor{qkvg, TS_BF16, n_rows, (int64_t)(c.H + 2 * c.KV) * c.d + 2 * c.KV, stride};
        args.cache = &cache.layer;
        args.decay_temperature = c.temperature;
        args.normalizer_eps = kEps;
        args.y = {out, TS_BF16, n_rows, width, width};
        const size_t n_bytes = ts_cuda_attention_dense_workspace(&args, &plan);
        void *workspace;
        CUDA(cudaMalloc(&workspace, n_bytes));
        CUDA(cudaMemset(workspace, 0xff, n_bytes));
        OK(ts_cuda_attention_dense(&args, &plan, workspace, n_bytes, nullptr));
        CUDA(cudaDeviceSynchronize());
        std::vector<__nv_bfloat16> host = to_host(out, n_rows * width);
        for (auto &span : spans)
            for (int64_t i = 0; i < (int64_t)span.n_tokens * width; i++)
                y[span.sequence].push_back((float)host[span.row * width + i]);
        cudaFree(qkvg), cudaFree(out), cudaFree(device_spans), cudaFree(workspace);
    }
    return y;
}

static bool check(const Case &c, const ts_cuda_attention_dense_plan &plan, const char *path) {
    const int stride = row_elements(c), n_sequences = (int)c.lengths.size();
    std::mt19937 random(std::hash<std::string>()(c.name) + c.d);
    std::normal_distribution<float> normal(0, 1);
    std::vector<std::vector<__nv_bfloat16>> rows(n_sequences);
    std::vector<Sequence> expected;
    std::vector<int> all, reversed;
    for (int s = 0; s < n_sequences; s++) {
        int64_t n = 0;
        for (int l : c.lengths[s])
            n += l;
        std::vector<float> wide(n * stride);
        rows[s].resize(n * stride);
        for (int64_t i = 0; i < n * stride; i++) {
            float x = 1.5f * normal(random);
            if (i % stride >= (c.H + 2 * c.KV) * c.d + c.KV)
                x = (float)(c.decay_mean + c.decay_spread * normal(random));
            rows[s][i] = (__nv_bfloat16)x;
            wide[i] = (float)rows[s][i];
        }
        expected.push_back(reference(c, wide.data(), stride, n, -1));
        all.push_back(s);
        reversed.insert(reversed.begin(), s);
    }
    Cache cache(c, n_sequences);
    auto y = run_calls(c, rows, cache, plan, all);
    Errors e_y, e_state, e_mass, e_open, e_c, e_end;
    double worst = 0;
    auto rounded = to_host((const uint16_t *)cache.layer.state, (size_t)n_sequences * c.KV * c.d * c.d);
    auto rest = to_host(cache.layer.state_rest, rounded.size());
    std::vector<float> state(rounded.size());
    for (size_t i = 0; i < state.size(); i++) {
        const uint32_t bits = ((uint32_t)rounded[i] << 16) + (uint32_t)(int32_t)rest[i];
        std::memcpy(&state[i], &bits, sizeof bits);
    }
    auto mass = to_host(cache.layer.mass, (size_t)n_sequences * c.KV * c.d);
    auto open_k = to_host((const __nv_bfloat16 *)cache.layer.open_k, (size_t)n_sequences * c.KV * R * c.d);
    auto open_v = to_host((const __nv_bfloat16 *)cache.layer.open_v, (size_t)n_sequences * c.KV * R * c.d);
    auto open_gate = to_host(cache.layer.open_gate, (size_t)n_sequences * c.KV * R);
    auto open_c = to_host(cache.layer.open_c, (size_t)n_sequences * c.KV * R);
    auto decay_end = to_host(cache.layer.decay_end, (size_t)n_sequences * c.KV);
    auto pairs = to_host(cache.layer.pairs, (size_t)n_sequences * c.KV * 2);
    bool same_pairs = true;
    for (int s = 0; s < n_sequences; s++) {
        const Sequence &r = expected[s];
        for (size_t i = 0; i < r.y.size(); i++) {
            e_y.add(y[s][i], r.y[i]);
            worst = std::max(worst, fabs(y[s][i] - r.y[i]) / (1 + fabs(r.y[i])));
        }
        for (size_t i = 0; i < r.state.size(); i++)
            e_state.add(state[s * r.state.size() + i], r.state[i]);
        for (size_t i = 0; i < r.mass.size(); i++)
            e_mass.add(mass[s * r.mass.size() + i], r.mass[i]);
        const int n_open = (int)(y[s].size() / (c.H * c.d) % R);
        const int64_t n_tiles = (int64_t)(y[s].size() / (c.H * c.d)) / c.T;
        for (int j = 0; j < c.KV; j++) {
            for (int i = 0; i < 2; i++)
                same_pairs &= pairs[(s * c.KV + j) * 2 + i] == n_tiles * (n_tiles + 1) / 2;
            e_end.add(decay_end[s * c.KV + j], r.decay_end[j]);
            for (int m = 0; m < n_open; m++) {
                e_c.add(open_c[(s * c.KV + j) * R + m], r.open_c[j * R + m]);
                const int at = (s * c.KV + j) * R + m;
                for (int a = 0; a < c.d; a++) { // k^ = gate phi(k), as whoever reads it forms it
                    e_open.add(open_gate[at] * feature((float)open_k[at * c.d + a]), r.open_k[(j * R + m) * c.d + a]);
                    e_open.add((float)open_v[at * c.d + a], r.open_v[(j * R + m) * c.d + a]);
                }
            }
        }
    }
    // The same calls with the sequences in another order, and the first one alone: not a bit may change.
    Cache again(c, n_sequences), alone(c, n_sequences);
    const bool same_order = run_calls(c, rows, again, plan, reversed) == y;
    const bool same_alone = run_calls(c, rows, alone, plan, {0})[0] == y[0];
    const bool good = e_y.relative() < 8e-3 && worst < 6e-2 && e_state.relative() < 8e-3 && e_mass.relative() < 8e-3 &&
                      e_open.relative() < 1e-6 && e_c.relative() < 1e-9 && e_end.relative() < 1e-5 && same_order &&
                      same_alone && same_pairs;
    printf(
        "%-4s %-5s %-22s d %3d T %3d H %2d/%d  y %.1e (worst %.1e) S %.1e z %.1e open %.1e c %.1e E %.1e bits %d%d\n",
        good ? "ok" : "FAIL", path, c.name, c.d, c.T, c.H, c.KV, e_y.relative(), worst, e_state.relative(),
        e_mass.relative(), e_open.relative(), e_c.relative(), e_end.relative(), same_order, same_alone);
    fflush(stdout);
    return good;
}

__global__ void fill(__nv_bfloat16 *to, int64_t n, int64_t stride, int64_t first_decay, float decay_mean,
                     uint64_t seed) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1342543de82ef95ull;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        x ^= x >> 31;
        const float u = ((uint32_t)x + 1.0f) * 2.3283064e-10f, w = (uint32_t)(x >> 32) * 2.3283064e-10f;
        const float normal = sqrtf(-2.0f * logf(u)) * cospif(2.0f * w);
        to[i] = __float2bfloat16(i % stride >= first_decay ? decay_mean + normal : normal);
    }
}

static void time_shape(int d, int64_t n, int capability, const cudaDeviceProp &device, bool verify) {
    constexpr int n_sets = 3, n_repeats = 25;
    Case c = {"time", d, 64, 16, 16, 2.0, 1.0, 16.0, {}};
    const int stride = row_elements(c), width = c.H * d;
    __nv_bfloat16 *qkvg[n_sets], *y[n_sets];
    for (int i = 0; i < n_sets; i++) {
        CUDA(cudaMalloc(&qkvg[i], n * stride * 2));
        CUDA(cudaMalloc(&y[i], n * width * 2));
        fill<<<4096, 256>>>(qkvg[i], n * stride, stride, (int64_t)3 * 16 * d + 16, 2.0f, 17 + i);
        CUDA(cudaMemset(y[i], 0xff, n * width * 2));
    }
    Cache cache(c, 1);
    ts_span span = {0, (int32_t)n, 0, 0};
    ts_span *device_span = on_device(std::vector<ts_span>{span});
    ts_batch batch = {};
    batch.n_spans = 1, batch.n_rows = n, batch.spans = &span, batch.device_spans = device_span;
    ts_attention_args args = {};
    args.batch = &batch, args.cache = &cache.layer, args.decay_temperature = c.temperature, args.normalizer_eps = kEps;
    ts_cuda_attention_dense_plan plan;
    OK(ts_cuda_attention_dense_plan_create(&plan));
    plan.capability = capability;
    auto use = [&](int i) {
        args.qkvg = {qkvg[i], TS_BF16, n, (int64_t)3 * width + 32, stride};
        args.y = {y[i], TS_BF16, n, width, width};
    };
    use(0);
    const size_t n_bytes = ts_cuda_attention_dense_workspace(&args, &plan);
    void *workspace;
    CUDA(cudaMalloc(&workspace, n_bytes));
    auto clear = [&] {
        CUDA(cudaMemsetAsync(cache.layer.state, 0, (size_t)16 * d * d * 2));
        CUDA(cudaMemsetAsync(cache.layer.state_rest, 0, (size_t)16 * d * d * 2));
        CUDA(cudaMemsetAsync(cache.layer.mass, 0, (size_t)16 * d * 4));
    };
    clear();
    OK(ts_cuda_attention_dense(&args, &plan, workspace, n_bytes, nullptr));
    CUDA(cudaDeviceSynchronize());
    char verdict[64] = "";
    if (verify) {
        const int head = 5;
        std::vector<__nv_bfloat16> rows(n * stride), out(n * width);
        CUDA(cudaMemcpy(rows.data(), qkvg[0], n * stride * 2, cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(out.data(), y[0], n * width * 2, cudaMemcpyDeviceToHost));
        Case one = c;
        one.H = one.KV = 1;
        std::vector<float> narrow(n * (3 * d + 2));
        for (int64_t i = 0; i < n; i++) {
            const __nv_bfloat16 *row = rows.data() + i * stride;
            float *to = narrow.data() + i * (3 * d + 2);
            for (int j = 0; j < 3; j++)
                for (int a = 0; a < d; a++)
                    to[j * d + a] = (float)row[(j * 16 + head) * d + a];
            to[3 * d] = (float)row[48 * d + head];
            to[3 * d + 1] = (float)row[48 * d + 16 + head];
        }
        Sequence r = reference(one, narrow.data(), 3 * d + 2, n, -1);
        Errors e;
        bool written = true;
        for (int64_t i = 0; i < n; i++)
            for (int a = 0; a < d; a++)
                e.add((float)out[i * width + head * d + a], r.y[i * d + a]);
        for (auto x : out)
            written &= (float)x == (float)x;
        snprintf(verdict, sizeof verdict, "  error %.2e%s", e.relative(), written ? "" : "  NOT ALL WRITTEN");
    }
    cudaEvent_t event[n_repeats + 1];
    for (auto &e : event)
        CUDA(cudaEventCreate(&e));
    for (int i = 0; i < 3; i++) {
        use(i % n_sets);
        OK(ts_cuda_attention_dense(&args, &plan, workspace, n_bytes, nullptr));
    }
    CUDA(cudaEventRecord(event[0]));
    for (int i = 0; i < n_repeats; i++) {
        use(i % n_sets);
        OK(ts_cuda_attention_dense(&args, &plan, workspace, n_bytes, nullptr));
        CUDA(cudaEventRecord(event[i + 1]));
    }
    CUDA(cudaDeviceSynchronize());
    std::vector<float> ms(n_repeats);
    for (int i = 0; i < n_repeats; i++)
        CUDA(cudaEventElapsedTime(&ms[i], event[i], event[i + 1]));
    std::sort(ms.begin(), ms.end());
    const double bytes = (double)n * width * 2 * 4;
    printf("d %3d N %7lld path %d: median %.4f ms, %.4f to %.4f; %.0f GB/s of q, k, v, y once; workspace %.1f MB%s\n",
           d, (long long)n, capability, ms[n_repeats / 2], ms[0], ms[n_repeats - 1], bytes / ms[n_repeats / 2] * 1e-6,
           n_bytes * 1e-6, verdict);
    fflush(stdout);
    for (int i = 0; i < n_sets; i++)
        cudaFree(qkvg[i]), cudaFree(y[i]);
    cudaFree(workspace), cudaFree(device_span);
}

int main(int n_args, char **arg) {
    cudaDeviceProp device;
    if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
        printf("SKIP: no GPU is visible\n");
        return 77;
    }
    const int capability = device.major == 9 ? 90 : 80;
    if (n_args > 1 && !strcmp(arg[1], "time")) {
        const int64_t n = n_args > 2 ? atoll(arg[2]) : 131072;
        const bool verify = n_args > 3;
        for (int d : {64, 128})
            for (int path : {capability, 80}) {
                time_shape(d, n, path, device, verify);
                if (capability == 80)
                    break;
            }
        return 0;
    }
    const std::vector<Case> cases = {
        {"one short", 64, 64, 2, 2, 2, 1, 16, {{50}}},
        {"one tile", 64, 64, 2, 2, 2, 1, 16, {{64}}},
        {"long", 64, 64, 2, 2, 2, 1, 16, {{5000}}},
        {"long memory", 64, 64, 2, 1, 8, 1, 16, {{4500}}},
        {"groups", 64, 64, 6, 2, 2, 1, 16, {{777, 1000}}},
        {"packed, chained",
         64,
         64,
         4,
         2,
         2,
         1,
         16,
         {{100, 0, 3000}, {1, 63, 64, 200}, {2300, 5}, {64, 128, 1, 1}, {37, 1900, 77}}},
        // Spans of several pieces among more spans than could have a place each.
        {"long among short", 64, 64, 2, 1, 2, 1, 16, {{3100, 40}, {5}, {3}, {70}, {1}, {4000}}},
        {"many short", 64, 64, 16, 16, 2, 1, 16, {{3, 64}, {70}, {1, 1, 1}, {200, 2}, {64}, {65}, {5}, {130, 1}}},
        {"strong decay", 64, 64, 4, 4, -60, 40, 1, {{700, 333}, {64, 64}}},
        {"mixed decay", 64, 64, 2, 2, 0, 30, 1, {{1500}}},
        {"one short", 128, 128, 2, 2, 2, 1, 16, {{50}}},
        {"long", 128, 64, 2, 2, 2, 1, 16, {{3000}}},
        {"groups", 128, 128, 4, 2, 2, 1, 16, {{777, 1000}}},
        {"packed, chained",
         128,
         128,
         2,
         1,
         2,
         1,
         16,
         {{100, 0, 2300}, {1, 127, 128, 200}, {2300, 5}, {64, 128, 1, 1}, {37, 1900, 77}}},
        {"strong decay", 128, 64, 2, 2, -60, 40, 1, {{700, 333}, {64, 64}}},
    };
    bool good = true;
    const int only = n_args > 1 ? atoi(arg[1]) : 0;
    for (const Case &c : cases) {
        if (only && c.d != only)
            continue;
        ts_cuda_attention_dense_plan plan, older;
        OK(ts_cuda_attention_dense_plan_create(&plan));
        older = plan;
        older.capability = 80;
        good &= check(c, plan, "bf16");
        if (capability == 90)
            good &= check(c, older, "sm_80");
    }
    printf(good ? "all good\n" : "FAILED\n");
    return good ? 0 : 1;
}
