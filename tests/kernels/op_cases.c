#include "op_cases.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>

enum { N_ROW_COUNTS = 5 };
static const int64_t row_counts[N_ROW_COUNTS] = {1, 3, 64, 65, 200};

// Rounding of a result to its dtype: half a unit in the last place of BF16 is 2^-9 = 0.002 of a value; F32's is lost in
// the bounds on its sums.
static double rounding(ts_dtype dtype) {
    return dtype == TS_BF16 ? 0x1p-8 : 0.0;
}

void case_result(case_group *group, double error, double bound, const char *format, ...) {
    group->n_cases++;
    if (!(error <= group->worst)) {
        group->worst = error;
        group->bound = bound;
    }
    if (error <= bound)
        return;
    group->n_failed++;
    fprintf(group->report, "FAIL %s: ", group->name);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(group->report, format, arguments);
    va_end(arguments);
    fprintf(group->report, ": error %.3g, bound %.3g\n", error, bound);
}

bool case_ok(case_group *group, ts_status status, const char *what) {
    if (status == TS_OK)
        return true;
    group->n_cases++;
    group->n_failed++;
    fprintf(group->report, "FAIL %s: %s: %s\n", group->name, what, ts_status_message());
    return false;
}

int case_group_end(case_group *group) {
    fprintf(group->report, "%-28s %4d cases, %d failed, worst error %.3g (bound %.3g)\n", group->name, group->n_cases,
            group->n_failed, group->worst, group->bound);
    fflush(group->report);
    return group->n_failed;
}

double case_uniform(uint64_t *seed) {
    *seed += 0x9e3779b97f4a7c15u;
    uint64_t x = *seed;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return (double)(x >> 11) * 0x1p-52 - 1.0;
}

static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Normal numbers of moderate size only.
static uint16_t to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x38800000u) // below the least normal: zero
        return (uint16_t)sign;
    return (uint16_t)(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}

static float rounded(float x, ts_dtype dtype) {
    return dtype == TS_BF16 ? ts_bf16_to_f32(to_bf16(x)) : dtype == TS_F16 ? ts_f16_to_f32(to_f16(x)) : x;
}

float *case_values(uint64_t seed, int64_t n, double centre, double spread, ts_dtype dtype) {
    float *values = malloc((size_t)n * sizeof *values);
    for (int64_t i = 0; i < n; i++)
        values[i] = rounded((float)(centre + spread * case_uniform(&seed)), dtype);
    return values;
}

// The values in dtype on the host, rows `stride` elements apart; all bytes 0xff where values is NULL.
static char *encode(const float *values, int64_t rows, int64_t cols, int64_t stride, ts_dtype dtype) {
    const size_t element = ts_dtype_bytes(dtype), n_bytes = (size_t)(rows * stride) * element;
    char *host = malloc(n_bytes + 1);
    memset(host, 0xff, n_bytes);
    for (int64_t i = 0; values && i < rows * cols; i++) {
        char *at = host + (size_t)(i / cols * stride + i % cols) * element;
        const uint16_t half = dtype == TS_BF16 ? to_bf16(values[i]) : to_f16(values[i]);
        memcpy(at, dtype == TS_F32 ? (const void *)&values[i] : (const void *)&half, element);
    }
    return host;
}

ts_status case_upload(ts_device *device, const float *values, int64_t rows, int64_t cols, int64_t stride,
                      ts_dtype dtype, ts_tensor *out) {
    ts_status status = TS_OK;
    const size_t n_bytes = (size_t)(rows * stride) * ts_dtype_bytes(dtype);
    char *host = encode(values, rows, cols, stride, dtype);
    *out = ts_tensor_of(NULL, dtype, rows, cols);
    out->stride = stride;
    TS_TRY(ts_device_alloc(device, n_bytes, "case", &out->data));
    TS_TRY(ts_device_upload(device, out->data, host, n_bytes));
done:
    free(host);
    return status;
}

ts_status case_upload_weight(ts_device *device, const float *values, int64_t rows, int64_t cols, ts_dtype dtype,
                             ts_tensor *out) {
    ts_status status = TS_OK;
    char *host = encode(values, rows, cols, cols, dtype);
    *out = ts_tensor_of(NULL, dtype, rows, cols);
    TS_TRY(ts_device_alloc(device, ts_device_weight_bytes(device, rows, cols, dtype), "case", &out->data));
    TS_TRY(ts_device_upload_weight(device, out->data, host, rows, cols, dtype));
done:
    free(host);
    return status;
}

float *case_download(ts_device *device, const ts_tensor *tensor) {
    const size_t element = ts_dtype_bytes(tensor->dtype), n_bytes = (size_t)(tensor->rows * tensor->stride) * element;
    char *host = malloc(n_bytes + 1);
    float *values = malloc((size_t)(tensor->rows * tensor->cols + 1) * sizeof *values);
    if (ts_device_download(device, host, tensor->data, n_bytes) != TS_OK)
        memset(host, 0xff, n_bytes);
    for (int64_t i = 0; i < tensor->rows * tensor->cols; i++) {
        const char *at = host + (size_t)(i / tensor->cols * tensor->stride + i % tensor->cols) * element;
        uint16_t half;
        if (tensor->dtype == TS_F32) {
            memcpy(&values[i], at, sizeof *values);
        } else {
            memcpy(&half, at, sizeof half);
            values[i] = ts_bf16_to_f32(half);
        }
    }
    free(host);
    return values;
}

double case_error(const float *out, const double *expected, int64_t rows, int64_t cols) {
    double worst = 0;
    for (int64_t r = 0; r < rows; r++) {
        double above = 0, below = 0;
        for (int64_t i = r * cols; i < (r + 1) * cols; i++) {
            above += ((double)out[i] - expected[i]) * ((double)out[i] - expected[i]);
            below += expected[i] * expected[i];
        }
        const double error = below > 0 ? sqrt(above / below) : above > 0 ? INFINITY : above;
        worst = error <= worst ? worst : error;
    }
    return worst;
}

// Both, so that a call's arguments can stand in one line.
static double *wide(int64_t n) {
    return calloc((size_t)n + 1, sizeof(double));
}

static void embed_cases(ts_device *device, ts_dtype activation, case_group *group) {
    static const ts_dtype tables[] = {TS_F32, TS_BF16, TS_F16}, outs[] = {TS_F32, TS_BF16};
    static const int64_t columns[] = {50, 64, 257};
    for (int i = 0; i < 3 * 3 * 2; i++) {
        const ts_dtype dtype = tables[i % 3], out = outs[i / 9];
        const int64_t D = columns[i / 3 % 3], V = 40, M = row_counts[i % N_ROW_COUNTS], first = 100;
        if (out == TS_BF16 && activation == TS_F32)
            continue;
        float *table = case_values((uint64_t)i + 1, V * D, 0, 1, dtype);
        double *expected = wide(M * D);
        int32_t *tokens = calloc((size_t)M, sizeof *tokens);
        void *device_tokens = NULL;
        ts_tensor w, x;
        for (int64_t m = 0; m < M; m++) {
            tokens[m] = (int32_t)(first - 2 + (m * 7 + i) % (V + 4)); // some outside the shard
            const int64_t row = tokens[m] - first;
            for (int64_t e = 0; e < D && row >= 0 && row < V; e++)
                expected[m * D + e] = (double)table[row * D + e];
        }
        ts_status status = case_upload_weight(device, table, V, D, dtype, &w);
        status = status ? status : case_upload(device, NULL, M, D, D + 3, out, &x);
        status = status ? status : ts_device_alloc(device, (size_t)M * sizeof *tokens, "case", &device_tokens);
        status = status ? status : ts_device_upload(device, device_tokens, tokens, (size_t)M * sizeof *tokens);
        status = status ? status : ts_op_embed(device, &(ts_embed_args){device_tokens, first, w, x});
        if (case_ok(group, status, "embed")) {
            float *got = case_download(device, &x);
            // A copy: exact but for the rounding of a wider table.
            case_result(group, case_error(got, expected, M, D), out == TS_BF16 && dtype != TS_BF16 ? rounding(out) : 0,
                        "M %lld D %lld table %s x %s", (long long)M, (long long)D, ts_dtype_name(dtype),
                        ts_dtype_name(out));
            free(got);
        }
        ts_device_release(device, w.data);
        ts_device_release(device, x.data);
        ts_device_release(device, device_tokens);
        free(table);
        free(expected);
        free(tokens);
    }
}

static void rms_norm_cases(ts_device *device, ts_dtype activation, case_group *group) {
    static const int64_t columns[] = {50, 64, 256, 1000, 1024, 4096, 5000};
    for (int i = 0; i < 7 * 2 * 2; i++) {
        const int64_t D = columns[i % 7], M = row_counts[i % N_ROW_COUNTS], stride = i / 14 ? D : D + 4;
        const bool add = i / 7 % 2;
        const double eps = 1e-5;
        float *x = case_values((uint64_t)i + 100, M * D, 0.1, 1, TS_F32);
        float *r = case_values((uint64_t)i + 200, M * D, 0, 1, activation);
        float *weight = case_values((uint64_t)i + 300, D, 1, 0.5, TS_F32);
        double *expected = wide(M * D), *sums = wide(M * D);
        for (int64_t m = 0; m < M; m++) {
            double sum = 0;
            for (int64_t e = m * D; e < (m + 1) * D; e++) {
                sums[e] = (double)x[e] + (add ? (double)r[e] : 0);
                sum += sums[e] * sums[e];
            }
            for (int64_t e = 0; e < D; e++)
                expected[m * D + e] = sums[m * D + e] / sqrt(sum / (double)D + eps) * (double)weight[e];
        }
        ts_tensor tx, tr, tw, h;
        ts_status status = case_upload(device, x, M, D, stride, TS_F32, &tx);
        status = status ? status : case_upload(device, r, M, D, stride, activation, &tr);
        status = status ? status : case_upload(device, weight, 1, D, D, TS_F32, &tw);
        status = status ? status : case_upload(device, NULL, M, D, stride, activation, &h);
        status = status ? status : ts_op_rms_norm(device, &(ts_rms_norm_args){tx, add ? &tr : NULL, tw, eps, h});
        if (case_ok(group, status, "rms_norm")) {
            float *got = case_download(device, &h), *stream = case_download(device, &tx);
            // D squares may be added one after another in f32: roundings that wander by sqrt(D) / 2 of half a unit in
            // the last place, halved by the root, and four times that to be safe. x itself is one f32 addition.
            case_result(group, case_error(got, expected, M, D),
                        0x1p-23 + sqrt((double)D) * 0x1p-25 * 2 + rounding(activation), "h: M %lld D %lld add %d",
                        (long long)M, (long long)D, add);
            case_result(group, case_error(stream, sums, M, D), 1e-7, "x: M %lld D %lld add %d", (long long)M,
                        (long long)D, add);
            free(got);
            free(stream);
        }
        ts_device_release(device, tx.data);
        ts_device_release(device, tr.data);
        ts_device_release(device, tw.data);
        ts_device_release(device, h.data);
        free(x);
        free(r);
        free(weight);
        free(expected);
        free(sums);
    }
}

typedef struct linear_case {
    int64_t N, K;
    ts_dtype w;
    bool bias, gelu, row_invariant, wide_y;
} linear_case;

static void linear_case_run(ts_device *device, ts_dtype activation, const linear_case *c, uint64_t seed,
                            case_group *group) {
    // Of every tile of tokens that a kernel may have, and more than one; more rows than a product of decode has.
    static const int64_t counts[] = {1, 3, 12, 30, 64, 65, 200, 300};
    const int n_counts = (int)(sizeof counts / sizeof *counts);
    const int64_t most = counts[n_counts - 1], N = c->N, K = c->K;
    const ts_dtype y_dtype = c->wide_y ? TS_F32 : activation;
    float *x = case_values(seed, most * K, 0.1, 1, activation), *w = case_values(seed + 1, N * K, 0.02, 0.2, c->w);
    float *b = case_values(seed + 2, N, 0, 1, y_dtype), *full = NULL;
    double *expected = wide(most * N);
    for (int64_t m = 0; m < most; m++)
        for (int64_t n = 0; n < N; n++) {
            double sum = c->bias ? (double)b[n] : 0;
            for (int64_t k = 0; k < K; k++)
                sum += (double)x[m * K + k] * (double)w[n * K + k];
            if (c->gelu)
                sum *= 0.5 * (1 + tanh(sqrt(2 / M_PI) * (sum + 0.044715 * sum * sum * sum)));
            expected[m * N + n] = sum;
        }
    ts_tensor tx, tw, tb = {0};
    ts_status status = case_upload(device, x, most, K, K, activation, &tx);
    status = status ? status : case_upload_weight(device, w, N, K, c->w, &tw);
    status = status ? status : case_upload(device, b, 1, N, N, y_dtype, &tb);
    for (int i = n_counts - 1; i >= 0 && status == TS_OK; i--) {
        const int64_t M = counts[i];
        ts_tensor y;
        status = case_upload(device, NULL, M, N, (N + 7) / 8 * 8, y_dtype, &y);
        status = status ? status
                        : ts_op_linear(device, &(ts_linear_args){ts_tensor_rows(tx, 0, M), tw, c->bias ? &tb : NULL, y,
                                                                 c->gelu ? TS_ACTIVATION_GELU_TANH : TS_ACTIVATION_NONE,
                                                                 c->row_invariant, NULL, NULL, NULL});
        if (!case_ok(group, status, "linear"))
            break;
        float *got = case_download(device, &y);
        // f32 sums of K <= 1024 products; BF16 rounds y (twice where bias or gelu is a pass of its own) and weights of
        // another dtype.
        const double roundings = (y_dtype == TS_BF16 ? 2 : 0) + (activation == TS_BF16 && c->w != TS_BF16 ? 1 : 0);
        case_result(group, case_error(got, expected, M, N), 3e-6 + roundings * rounding(TS_BF16),
                    "M %lld N %lld K %lld w %s bias %d gelu %d invariant %d", (long long)M, (long long)N, (long long)K,
                    ts_dtype_name(c->w), c->bias, c->gelu, c->row_invariant);
        // I3: a row's bits do not depend on the number of rows.
        if (!full)
            full = got;
        else {
            if (c->row_invariant || device->packs_prefill)
                case_result(group, memcmp(got, full, (size_t)(M * N) * sizeof *got) ? 1 : 0, 0,
                            "rows of %lld among %lld, N %lld K %lld w %s invariant %d", (long long)M, (long long)most,
                            (long long)N, (long long)K, ts_dtype_name(c->w), c->row_invariant);
            free(got);
        }
        ts_device_release(device, y.data);
    }
    ts_device_release(device, tx.data);
    ts_device_release(device, tw.data);
    ts_device_release(device, tb.data);
    free(full);
    free(x);
    free(w);
    free(b);
    free(expected);
}

static void linear_cases(ts_device *device, ts_dtype activation, case_group *group) {
    static const int64_t sizes[][2] = {{96, 64}, {130, 72}, {33, 50}, {201, 100}, {256, 1024}, {8, 64}, {64, 2048}};
    static const ts_dtype dtypes[] = {TS_F32, TS_BF16, TS_F16};
    for (int size = 0; size < 7; size++)
        for (int i = 0; i < 3 * 2 * 3; i++) {
            const int kind = i / 6;
            const linear_case c = {
                .N = sizes[size][0],
                .K = sizes[size][1],
                .w = dtypes[i % 3],
                .bias = kind == 1,
                .gelu = kind == 2 || (kind == 1 && size % 2),
                .row_invariant = i / 3 % 2,
                .wide_y = kind == 0 && size % 2 == 0,
            };
            linear_case_run(device, activation, &c, (uint64_t)(1000 + 100 * size + i), group);
        }
    // Too many columns for a kernel to cut K: more steps of K than it has stages.
    const linear_case wide = {.N = 2124, .K = 1160, .w = TS_BF16, .bias = true, .row_invariant = true};
    linear_case_run(device, activation, &wide, 1900, group);
}

// K in one part and in several, N that ends within a block.
static void decode_linear_cases(ts_device *device, ts_dtype activation, case_group *group) {
    static const linear_case cases[] = {
        {.N = 200, .K = 200, .w = TS_BF16, .bias = true, .row_invariant = true},
        {.N = 72, .K = 1160, .w = TS_BF16, .bias = true, .gelu = true, .row_invariant = true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        linear_case_run(device, activation, &cases[i], 1950 + 10 * (uint64_t)i, group);
}

static void swiglu_cases(ts_device *device, ts_dtype activation, case_group *group) {
    static const int64_t columns[] = {50, 64, 1100};
    for (int i = 0; i < 3 * N_ROW_COUNTS; i++) {
        const int64_t F = columns[i % 3], M = row_counts[i / 3];
        float *in = case_values((uint64_t)i + 400, M * 2 * F, 0, 6, activation);
        double *expected = wide(M * F);
        for (int64_t m = 0; m < M; m++)
            for (int64_t e = 0; e < F; e++) {
                const double gate = (double)in[m * 2 * F + e];
                expected[m * F + e] = gate / (1 + exp(-gate)) * (double)in[m * 2 * F + F + e];
            }
        ts_tensor gate_up, y;
        ts_status status = case_upload(device, in, M, 2 * F, 2 * F, activation, &gate_up);
        status = status ? status : case_upload(device, NULL, M, F, F + 1, activation, &y);
        status = status ? status : ts_op_swiglu(device, &(ts_swiglu_args){gate_up, y});
        if (case_ok(group, status, "swiglu")) {
            float *got = case_download(device, &y);
            // A few f32 operations and an exponential of about one unit in the last place.
            case_result(group, case_error(got, expected, M, F), 1e-6 + rounding(activation), "M %lld F %lld",
                        (long long)M, (long long)F);
            free(got);
        }
        ts_device_release(device, gate_up.data);
        ts_device_release(device, y.data);
        free(in);
        free(expected);
    }
}

static void gather_rows_cases(ts_device *device, ts_dtype activation, case_group *group) {
    static const int64_t columns[] = {50, 64, 333};
    for (int i = 0; i < 3; i++) {
        const int64_t D = columns[i], M = 200, n = 300; // more rows asked for than a kernel's arguments hold
        float *x = case_values((uint64_t)i + 500, M * D, 0, 1, activation);
        double *expected = wide(n * D);
        int64_t rows[300];
        for (int64_t r = 0; r < n; r++) {
            rows[r] = (r * 37 + i) % M;
            for (int64_t e = 0; e < D; e++)
                expected[r * D + e] = (double)x[rows[r] * D + e];
        }
        ts_tensor tx, y;
        ts_status status = case_upload(device, x, M, D, D + 2, activation, &tx);
        status = status ? status : case_upload(device, NULL, n, D, D, activation, &y);
        status = status ? status : ts_op_gather_rows(device, &(ts_gather_rows_args){tx, rows, y});
        if (case_ok(group, status, "gather_rows")) {
            float *got = case_download(device, &y);
            case_result(group, case_error(got, expected, n, D), 0, "D %lld", (long long)D); // a copy
            free(got);
        }
        ts_device_release(device, tx.data);
        ts_device_release(device, y.data);
        free(x);
        free(expected);
    }
}

static void cross_entropy_cases(ts_device *device, ts_dtype activation, case_group *group) {
    static const int64_t columns[] = {1, 33, 256, 5000};
    for (int i = 0; i < 4 * N_ROW_COUNTS; i++) {
        const int64_t V = columns[i % 4], M = row_counts[i / 4], first = 10;
        float *logits = case_values((uint64_t)i + 600, M * V, 3, 20, TS_F32);
        double *expected = wide(3 * M), *parts = wide(3 * M);
        int32_t targets[200];
        bool outside_ok = true;
        for (int64_t m = 0; m < M; m++) {
            const float *x = logits + m * V;
            double *out = expected + 3 * m;
            targets[m] = (int32_t)(first - 1 + m * 13 % (V + 2));
            const int64_t target = targets[m] - first;
            out[0] = (double)x[0];
            for (int64_t e = 0; e < V; e++)
                out[0] = fmax(out[0], (double)x[e]);
            for (int64_t e = 0; e < V; e++)
                out[1] += exp((double)x[e] - out[0]);
            out[2] = target >= 0 && target < V ? (double)x[target] : -INFINITY;
        }
        ts_tensor tl;
        void *device_targets = NULL, *device_parts = NULL;
        ts_status status = case_upload(device, logits, M, V, V, TS_F32, &tl);
        status = status ? status : ts_device_alloc(device, (size_t)M * sizeof *targets, "case", &device_targets);
        status = status ? status : ts_device_upload(device, device_targets, targets, (size_t)M * sizeof *targets);
        status = status ? status : ts_device_alloc(device, (size_t)(3 * M) * sizeof *parts, "case", &device_parts);
        status = status
                     ? status
                     : ts_op_cross_entropy(device, &(ts_cross_entropy_args){tl, device_targets, first, device_parts});
        status = status ? status : ts_device_download(device, parts, device_parts, (size_t)(3 * M) * sizeof *parts);
        if (case_ok(group, status, "cross_entropy")) {
            double worst = 0;
            for (int64_t m = 0; m < M; m++) {
                outside_ok = outside_ok && parts[3 * m] == expected[3 * m] && parts[3 * m + 2] == expected[3 * m + 2];
                worst = fmax(worst, fabs(parts[3 * m + 1] / expected[3 * m + 1] - 1));
            }
            // f32 exponentials of f32 differences up to 40: 40 * 2^-24 in the exponent.
            case_result(group, outside_ok ? worst : INFINITY, 5e-6, "M %lld V %lld", (long long)M, (long long)V);
        }
        ts_device_release(device, tl.data);
        ts_device_release(device, device_targets);
        ts_device_release(device, device_parts);
        free(logits);
        free(expected);
        free(parts);
    }
}

typedef void (*case_list)(ts_device *device, ts_dtype activation, case_group *group);

static int run_cases(ts_device *device, ts_dtype activation, case_list linear, FILE *report) {
    const case_list runs[] = {embed_cases,  rms_norm_cases,    linear,
                              swiglu_cases, gather_rows_cases, cross_entropy_cases};
    static const char *const names[] = {"embed", "rms_norm", "linear", "swiglu", "gather_rows", "cross_entropy"};
    int n_failed = 0;
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        if (!runs[i])
            continue;
        case_group group = {.name = names[i], .report = report};
        runs[i](device, activation, &group);
        n_failed += case_group_end(&group);
    }
    return n_failed;
}

int op_cases_run(ts_device *device, ts_dtype activation, FILE *report) {
    return run_cases(device, activation, linear_cases, report) + fused_norm_cases_run(device, activation, report);
}

int op_cases_run_small(ts_device *device, ts_dtype activation, bool with_decode_products, FILE *report) {
    return run_cases(device, activation, with_decode_products ? decode_linear_cases : NULL, report) +
           (with_decode_products ? fused_norm_cases_run(device, activation, report) : 0);
}
