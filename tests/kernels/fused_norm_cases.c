// An RMSNorm fused into the products in front of it and behind it (ts_fused_norm), against both and the norm in
// float64, for every number of rows that a product of decode may have.
#include "op_cases.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct fused_case {
    int64_t K, D, N;
    bool bias, gelu; // of the product behind
} fused_case;

// Of every tile of tokens that a kernel may have, and more rows than a product of decode has.
static const int64_t counts[] = {300, 200, 65, 64, 30, 12, 3, 1};
enum { N_COUNTS = sizeof counts / sizeof *counts };

// The stream after the product in front, and y of the product behind.
static void expect(const fused_case *c, int64_t M, double eps, const float *a, const float *front, const float *stream,
                   const float *weight, const float *behind, const float *bias, double *sums, double *y) {
    for (int64_t m = 0; m < M; m++) {
        double *s = sums + m * c->D, squares = 0;
        for (int64_t e = 0; e < c->D; e++) {
            s[e] = (double)stream[m * c->D + e];
            for (int64_t k = 0; k < c->K; k++)
                s[e] += (double)a[m * c->K + k] * (double)front[e * c->K + k];
            squares += s[e] * s[e];
        }
        const double scale = 1 / sqrt(squares / (double)c->D + eps);
        for (int64_t n = 0; n < c->N; n++) {
            double sum = c->bias ? (double)bias[n] : 0;
            for (int64_t e = 0; e < c->D; e++)
                sum += s[e] * scale * (double)weight[e] * (double)behind[n * c->D + e];
            if (c->gelu)
                sum *= 0.5 * (1 + tanh(sqrt(2 / M_PI) * (sum + 0.044715 * sum * sum * sum)));
            y[m * c->N + n] = sum;
        }
    }
}

// Whether `got` begins with the same bits as the first run's, which are kept.
static bool same_bits(float **first, float *got, int64_t n) {
    if (!*first) {
        *first = got;
        return true;
    }
    const bool same = memcmp(got, *first, (size_t)n * sizeof *got) == 0;
    free(got);
    return same;
}

static void run(ts_device *device, ts_dtype activation, const fused_case *c, uint64_t seed, case_group *group) {
    const int64_t most = counts[0], K = c->K, D = c->D, N = c->N;
    const double eps = 1e-5;
    float *a = case_values(seed, most * K, 0.1, 1, activation),
          *front = case_values(seed + 1, D * K, 0.02, 0.2, TS_BF16);
    float *stream = case_values(seed + 2, most * D, 0.1, 1, TS_F32), *weight = case_values(seed + 3, D, 1, 0.5, TS_F32);
    float *behind = case_values(seed + 4, N * D, 0.02, 0.2, TS_BF16),
          *bias = case_values(seed + 5, N, 0, 1, activation);
    double *sums = malloc((size_t)(most * D) * sizeof *sums), *expected = malloc((size_t)(most * N) * sizeof *expected);
    float *first_stream = NULL, *first_y = NULL;
    ts_tensor ta = {0}, tfront = {0}, tweight = {0}, tbehind = {0}, tbias = {0};
    ts_status status = sums && expected ? TS_OK : TS_ERR_MEMORY;
    if (status == TS_OK)
        expect(c, most, eps, a, front, stream, weight, behind, bias, sums, expected);
    status = status ? status : case_upload(device, a, most, K, K, activation, &ta);
    status = status ? status : case_upload_weight(device, front, D, K, TS_BF16, &tfront);
    status = status ? status : case_upload(device, weight, 1, D, D, TS_F32, &tweight);
    status = status ? status : case_upload_weight(device, behind, N, D, TS_BF16, &tbehind);
    status = status ? status : case_upload(device, bias, 1, N, N, activation, &tbias);
    if (status == TS_OK && !ts_op_fuses_norm(device, &tfront, &tbehind))
        goto done;
    for (int i = 0; i < N_COUNTS && status == TS_OK; i++) {
        const int64_t M = counts[i];
        ts_tensor x, h, partial, y;
        status = case_upload(device, stream, M, D, D, TS_F32, &x);
        status = status ? status : case_upload(device, NULL, M, D, D, activation, &h);
        status =
            status ? status : case_upload(device, NULL, M, D / TS_NORM_COLUMNS, D / TS_NORM_COLUMNS, TS_F32, &partial);
        status = status ? status : case_upload(device, NULL, M, N, N, activation, &y);
        const ts_fused_norm norm = {x, tweight, partial, eps};
        status = status ? status
                        : ts_op_linear(device, &(ts_linear_args){.x = ts_tensor_rows(ta, 0, M),
                                                                 .w = tfront,
                                                                 .y = h,
                                                                 .row_invariant = true,
                                                                 .norm_behind = &norm});
        status = status ? status
                        : ts_op_linear(device, &(ts_linear_args){.x = h,
                                                                 .w = tbehind,
                                                                 .bias = c->bias ? &tbias : NULL,
                                                                 .y = y,
                                                                 .activation = c->gelu ? TS_ACTIVATION_GELU_TANH
                                                                                       : TS_ACTIVATION_NONE,
                                                                 .row_invariant = true,
                                                                 .norm_in_front = &norm});
        if (!case_ok(group, status, "fused norm"))
            break;
        float *got_stream = case_download(device, &x), *got = case_download(device, &y);
        // f32 sums of K <= 1024 products; then h and y as BF16.
        case_result(group, case_error(got_stream, sums, M, D), 3e-6, "stream: M %lld K %lld D %lld", (long long)M,
                    (long long)K, (long long)D);
        case_result(group, case_error(got, expected, M, N), 2 * 0x1p-8, "y: M %lld D %lld N %lld bias %d gelu %d",
                    (long long)M, (long long)D, (long long)N, c->bias, c->gelu);
        // I3: a row's bits do not depend on the number of rows.
        const bool same = same_bits(&first_stream, got_stream, M * D);
        case_result(group, same_bits(&first_y, got, M * N) && same ? 0 : 1, 0, "rows of %lld among %lld, K %lld D %lld",
                    (long long)M, (long long)most, (long long)K, (long long)D);
        ts_device_release(device, x.data);
        ts_device_release(device, h.data);
        ts_device_release(device, partial.data);
        ts_device_release(device, y.data);
    }
done:
    if (status != TS_OK)
        case_ok(group, status, "fused norm");
    ts_device_release(device, ta.data);
    ts_device_release(device, tfront.data);
    ts_device_release(device, tweight.data);
    ts_device_release(device, tbehind.data);
    ts_device_release(device, tbias.data);
    free(first_stream);
    free(first_y);
    free(sums);
    free(expected);
    free(a);
    free(front);
    free(stream);
    free(weight);
    free(behind);
    free(bias);
}

int fused_norm_cases_run(ts_device *device, ts_dtype activation, FILE *report) {
    // K whole and in parts; D of few columns and of more than a kernel cuts K for; N that ends within a block.
    static const fused_case cases[] = {
        {.K = 200, .D = 128, .N = 72},
        {.K = 1024, .D = 1024, .N = 200, .bias = true},
        {.K = 1000, .D = 256, .N = 64, .gelu = true},
        {.K = 72, .D = 2176, .N = 96, .bias = true, .gelu = true},
    };
    case_group group = {.name = "fused norm", .report = report};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        run(device, activation, &cases[i], 3000 + 10 * (uint64_t)i, &group);
    if (group.n_cases == 0) {
        fprintf(report, "fused norm: this device keeps norms apart from products of %s\n", ts_dtype_name(activation));
        return 0;
    }
    return case_group_end(&group);
}
