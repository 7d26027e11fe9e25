// The sampling chain on the GPU against the host's (sampler.h), over random rows and every kind of parameter.
//
//     test.runtime.sampler_cuda            correctness; exits 77 without a GPU
//     test.runtime.sampler_cuda small      what ends soon under compute-sanitizer
//     test.runtime.sampler_cuda time       medians of 25 calls of 256 rows of 50,304 tokens
#include "kernels/cuda/cuda.h"
#include "runtime/device_sampler.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { SKIPPED = 77, N_ROWS = 64, N_GENERATED = 5 };

#define MUST(expression)                                                                                               \
    do {                                                                                                               \
        if ((expression) != TS_OK) {                                                                                   \
            printf("FAIL %s:%d: %s\n", __FILE__, __LINE__, ts_status_message());                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static uint64_t next_random(uint64_t *seed) {
    *seed += 0x9e3779b97f4a7c15u;
    uint64_t x = *seed;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static double uniform(uint64_t *seed) {
    return (double)(next_random(seed) >> 11) * 0x1p-53;
}

// Logits of a spread that changes from row to row; in some rows few different values, so that many tie, or -infinity.
static void fill(float *row, int64_t V, int kind, uint64_t *seed) {
    const double spread = kind % 3 == 0 ? 1 : kind % 3 == 1 ? 4 : 0.1;
    for (int64_t i = 0; i < V; i++) {
        const double normal = sqrt(-2 * log(1 - uniform(seed))) * cos(6.283185307179586 * uniform(seed));
        row[i] = (float)(spread * normal);
        if (kind % 5 == 4)
            row[i] = (float)floor((double)row[i]);
        if (kind % 7 == 6 && next_random(seed) % 3 == 0)
            row[i] = -INFINITY;
    }
}

static ts_sampling_params params_of(int kind, int64_t V, int32_t *ids, float *biases, uint64_t *seed) {
    static const float temperatures[] = {1, 0.7f, 0, 2, 0.05f}, top_ps[] = {1, 0.9f, 0.5f, 0.999f, 0.01f},
                       min_ps[] = {0, 0, 0.05f, 0.5f};
    static const int32_t top_ks[] = {0, 50, 1, 1000, 0, 7};
    ts_sampling_params params = ts_sampling_params_default();
    params.max_tokens = 100;
    params.seed = next_random(seed);
    params.temperature = temperatures[next_random(seed) % 5];
    if (kind % 4 != 0) { // a quarter of the rows without any filter
        params.top_p = top_ps[next_random(seed) % 5];
        params.min_p = min_ps[next_random(seed) % 4];
        params.top_k = top_ks[next_random(seed) % 6];
    }
    params.logprobs = kind % 3 == 0 ? (int32_t)(next_random(seed) % (TS_LOGPROBS_MAX + 1)) : -1;
    if (kind % 2) {
        params.presence_penalty = 0.5f;
        params.frequency_penalty = 0.25f;
        params.repetition_penalty = kind % 6 == 1 ? 1.3f : 1;
        params.min_tokens = kind % 10 == 1 ? 50 : 0;
        params.n_biases = 4;
        for (int i = 0; i < params.n_biases; i++) {
            ids[i] = (int32_t)((next_random(seed) % (uint64_t)V / 4) + (uint64_t)(V / 4) * (uint64_t)i);
            biases[i] = (float)(20 * uniform(seed) - 10);
        }
        params.bias_ids = ids;
        params.biases = biases;
    }
    return params;
}

typedef struct counts {
    int64_t n, n_different, n_wrong_logprobs;
} counts;

// Log-probabilities are logits in f32 less the log of a sum, in f64 on the host and in fixed point of 2^-44 on the
// device, rounded to f32 near -20: 2e-6 apart.
static const double tolerance = 1e-5;

static void compare(const ts_next_token *host, const ts_next_token *device, const ts_sampling_params *params,
                    counts *c) {
    c->n++;
    c->n_different += host->token != device->token;
    if (params->logprobs < 0)
        return;
    bool same = host->n_top == device->n_top;
    if (host->token == device->token)
        same = same && (fabs(host->logprob - device->logprob) < tolerance || host->logprob == device->logprob);
    for (int i = 0; same && i < host->n_top; i++)
        same = host->top[i].token == device->top[i].token &&
               !(fabs(host->top[i].logprob - device->top[i].logprob) > tolerance);
    c->n_wrong_logprobs += !same;
}

static void check_vocabulary(ts_device *device, ts_group *self, int64_t V, int n_rounds, counts *c) {
    static const int32_t eos[] = {0};
    uint64_t seed = (uint64_t)V;
    ts_sampler *host;
    ts_device_sampler *on_device;
    void *data;
    float *logits = malloc((size_t)(N_ROWS * V) * sizeof *logits);
    ts_sampler_row rows[N_ROWS];
    const ts_sampler_row *pointers[N_ROWS];
    int32_t ids[4];
    float biases[4];
    ts_next_token from_host[N_ROWS], from_device[N_ROWS];
    MUST(ts_sampler_create(self, &host));
    MUST(ts_device_sampler_create(device, N_ROWS, &on_device));
    MUST(ts_device_alloc(device, (size_t)(N_ROWS * V) * sizeof(float), "logits", &data));
    for (int round = 0; round < n_rounds; round++) {
        for (int i = 0; i < N_ROWS; i++) {
            const ts_sampling_params params = params_of(round * N_ROWS + i, V, ids, biases, &seed);
            MUST(ts_sampler_row_begin(&rows[i], &params, next_random(&seed), (uint32_t)i, 0, V, eos, 1));
            pointers[i] = &rows[i];
            for (int t = 0; t < 20; t++) {
                const int32_t token = (int32_t)(next_random(&seed) % (uint64_t)V);
                ts_sampler_row_prompt(&rows[i], &token, 1);
            }
        }
        for (int step = 0; step < N_GENERATED; step++) {
            for (int i = 0; i < N_ROWS; i++)
                fill(logits + i * V, V, round + i + step, &seed);
            const ts_tensor on_host = ts_tensor_of(logits, TS_F32, N_ROWS, V);
            MUST(ts_device_upload(device, data, logits, (size_t)(N_ROWS * V) * sizeof *logits));
            MUST(ts_sampler_choose(host, on_host, pointers, N_ROWS, from_host));
            MUST(ts_device_sampler_choose(on_device, ts_tensor_of(data, TS_F32, N_ROWS, V), pointers, N_ROWS,
                                          from_device));
            for (int i = 0; i < N_ROWS; i++) {
                compare(&from_host[i], &from_device[i], &rows[i].params, c);
                ts_sampler_row_token(&rows[i], from_host[i].token);
            }
        }
        for (int i = 0; i < N_ROWS; i++)
            ts_sampler_row_end(&rows[i]);
    }
    ts_device_release(device, data);
    ts_device_sampler_free(on_device);
    ts_sampler_free(host);
    free(logits);
}

// A row of NaN, +infinity or nothing must be refused with the host's sentence.
static bool check_refusals(ts_device *device) {
    enum { V = 300 };
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    bool good = true;
    ts_device_sampler *sampler;
    void *data;
    MUST(ts_device_sampler_create(device, 1, &sampler));
    MUST(ts_device_alloc(device, V * sizeof(float), "logits", &data));
    const ts_sampling_params params = ts_sampling_params_default();
    for (int k = 0; k < 3; k++) {
        float logits[V];
        ts_sampler_row row;
        const ts_sampler_row *pointer = &row;
        ts_next_token next;
        MUST(ts_sampler_row_begin(&row, &params, 1, 0, 0, V, NULL, 0));
        for (int i = 0; i < V; i++)
            logits[i] = k == 2 || i == 217 ? bad[k] : 0.5f;
        MUST(ts_device_upload(device, data, logits, sizeof logits));
        good &=
            ts_device_sampler_choose(sampler, ts_tensor_of(data, TS_F32, 1, V), &pointer, 1, &next) == TS_ERR_INTERNAL;
        ts_sampler_row_end(&row);
    }
    ts_device_release(device, data);
    ts_device_sampler_free(sampler);
    return good;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void time_one(ts_device *device, const char *name, ts_sample_row row) {
    enum { N = 256, V = 50304, REPEATS = 25, CALLS = 20 };
    ts_sample_row rows[N];
    void *logits, *device_rows, *results;
    uint64_t seed = 3;
    float *values = malloc((size_t)N * V * sizeof *values);
    for (int i = 0; i < N; i++) {
        rows[i] = row;
        rows[i].draw = uniform(&seed);
        fill(values + (size_t)i * V, V, 0, &seed);
    }
    MUST(ts_device_alloc(device, (size_t)N * V * sizeof(float), "logits", &logits));
    MUST(ts_device_alloc(device, sizeof rows, "rows", &device_rows));
    MUST(ts_device_alloc(device, N * sizeof(ts_sample_result), "results", &results));
    MUST(ts_device_upload(device, logits, values, (size_t)N * V * sizeof(float)));
    MUST(ts_device_upload(device, device_rows, rows, sizeof rows));
    double us[REPEATS];
    for (int r = -2; r < REPEATS; r++) {
        MUST(ts_device_synchronize(device));
        const double start = seconds();
        for (int c = 0; c < CALLS; c++)
            MUST(ts_op_sample(device,
                              &(ts_sample_args){ts_tensor_of(logits, TS_F32, N, V), device_rows, NULL, NULL, results}));
        MUST(ts_device_synchronize(device));
        if (r >= 0)
            us[r] = (seconds() - start) / CALLS * 1e6;
    }
    qsort(us, REPEATS, sizeof *us, by_value);
    printf("sample %-22s %d rows of %d: median %.1f us (%.1f to %.1f)\n", name, N, V, us[REPEATS / 2], us[0],
           us[REPEATS - 1]);
    ts_device_release(device, logits);
    ts_device_release(device, device_rows);
    ts_device_release(device, results);
    free(values);
}

int main(int argc, char **argv) {
    ts_device *device = NULL;
    ts_group *self;
    counts c = {0};
    const ts_status status = ts_cuda_device_create(0, TS_BF16, 0, &device);
    if (status != TS_OK) {
        printf("%s: %s\n", status == TS_ERR_UNSUPPORTED ? "SKIP" : "FAIL", ts_status_message());
        return status == TS_ERR_UNSUPPORTED ? SKIPPED : 1;
    }
    MUST(ts_world_create_self(&self));
    if (argc > 1 && strcmp(argv[1], "time") == 0) {
        const ts_sample_row plain = {.temperature = 1, .top_p = 1, .n_logprobs = -1, .repetition_penalty = 1};
        ts_sample_row greedy = plain, top_k = plain, top_p = plain, both = plain, logprobs = plain;
        greedy.temperature = 0;
        top_k.top_k = 50;
        top_p.top_p = 0.9f;
        both.top_k = 50, both.top_p = 0.9f, both.min_p = 0.01f;
        logprobs.temperature = 0, logprobs.n_logprobs = 5;
        time_one(device, "greedy", greedy);
        time_one(device, "temperature", plain);
        time_one(device, "top_k 50", top_k);
        time_one(device, "top_p 0.9", top_p);
        time_one(device, "top_k, top_p, min_p", both);
        time_one(device, "greedy, 5 logprobs", logprobs);
    } else {
        const bool is_small = argc > 1 && strcmp(argv[1], "small") == 0;
        check_vocabulary(device, self, 256, is_small ? 1 : 60, &c);
        check_vocabulary(device, self, 1001, is_small ? 1 : 30, &c); // rows that are not aligned
        if (!is_small) {
            check_vocabulary(device, self, 50304, 2, &c);
            check_vocabulary(device, self, 150000, 1, &c); // more than fits in shared memory
        }
        printf("%lld rows: %lld tokens differ from the host's, %lld rows of log-probabilities\n", (long long)c.n,
               (long long)c.n_different, (long long)c.n_wrong_logprobs);
        // Masses are right to 2^-23: one draw in about 10^6 may fall between.
        const bool good = check_refusals(device) && c.n_different <= 1 && c.n_wrong_logprobs == 0;
        puts(good ? "0 failed" : "FAILED");
        ts_world_free(self);
        ts_device_free(device);
        return !good;
    }
    ts_world_free(self);
    ts_device_free(device);
    return 0;
}
