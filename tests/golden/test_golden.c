// Every golden model, in the chunked form with several chunk sizes and in the one-token form, against the float64
// reference (I1, I2, I5), and the number of tile pairs it looked at, which shows every decision of rules 1 to 4.
#include "golden_case.h"

#include <criterion/parameterized.h>
#include <math.h>

// Float32 arithmetic in sums of up to a few hundred terms lands near 4e-7; a wrong term or decision far above this.
#define TOLERANCE 1e-5

typedef struct golden_name {
    char directory[256];
} golden_name;

static const char *const directories[] = {
    "configs/models/demo",           "tests/golden/gqa_swiglu_tied",
    "tests/golden/d128_t128",        "tests/golden/d128_t64",
    "tests/golden/tiny_budget",      "tests/golden/dense",
    "tests/golden/edge_sparsity",    "tests/golden/empty_selection",
    "tests/golden/strong_decay",     "tests/golden/weak_decay_no_skip",
    "tests/golden/weak_decay_dense",
};

ParameterizedTestParameters(golden, against_reference) {
    enum { N = sizeof directories / sizeof *directories };
    static golden_name names[N];
    for (int i = 0; i < N; i++)
        snprintf(names[i].directory, sizeof names[i].directory, "%s/%s", TS_SOURCE_DIR, directories[i]);
    return cr_make_param_array(golden_name, names, N);
}

typedef struct comparison {
    const golden_case *golden;
    bool decode;
    double error, norm;
} comparison;

static ts_status compare(void *context, int64_t first, int64_t n) {
    comparison *c = context;
    ts_tensor logits;
    const ts_status status = ts_model_logits(c->golden->model, NULL, n, c->decode, &logits);
    if (status != TS_OK)
        return status;
    const float *want = c->golden->logits + first * c->golden->vocab_size;
    for (int64_t i = 0; i < n * c->golden->vocab_size; i++) {
        const double difference = (double)((const float *)logits.data)[i] - (double)want[i];
        c->error += difference * difference;
        c->norm += (double)want[i] * (double)want[i];
    }
    return TS_OK;
}

ParameterizedTest(golden_name *name, golden, against_reference) {
    static const ts_feed_options runs[] = {{1 << 20, false}, {64, false}, {100, false}, {37, false}, {1, true}};
    golden_case golden = golden_open(name->directory, 2);
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        comparison c = {.golden = &golden, .decode = runs[i].decode};
        ts_feed_counts counts;
        MUST(ts_feed_tokens(golden.device, golden.self, golden.model, golden.tokens, golden.n_tokens, runs[i], compare,
                            &c, &counts));
        const double error = sqrt(c.error / c.norm);
        cr_expect(error <= TOLERANCE, "%s, chunk %lld%s: relative error %.2e", name->directory,
                  (long long)runs[i].chunk, runs[i].decode ? ", decode" : "", error);
        if (golden.tile_pairs)
            cr_expect(counts.pairs_available == golden.tile_pairs[0] && counts.pairs_selected == golden.tile_pairs[1],
                      "%s, chunk %lld: %lld of %lld tile pairs selected, the reference selects %lld of %lld",
                      name->directory, (long long)runs[i].chunk, (long long)counts.pairs_selected,
                      (long long)counts.pairs_available, (long long)golden.tile_pairs[1],
                      (long long)golden.tile_pairs[0]);
    }
    golden_close(&golden);
}
