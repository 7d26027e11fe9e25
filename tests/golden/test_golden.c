// Every golden model, in the chunked form with several chunk sizes and in the one-token form, against the float64
// reference (I1, I2, I5), and the number of tile pairs it looked at, which shows every decision of rules 1 to 4.
#include "golden_case.h"

#include <criterion/parameterized.h>

// Float32 arithmetic in sums of up to a few hundred terms lands near 4e-7; a wrong term or decision far above this.
// Rounding to BF16 after every op and of every operand, 2^-9 each, adds up over the layers to a few 1e-3.
static double tolerance(ts_dtype dtype) {
    return dtype == TS_BF16 ? 2e-2 : 1e-5;
}

// Decisions of rules 1 to 3 compare numbers that BF16 has rounded: near their thresholds they fall either way. 1 pair
// in 5,000 was seen to differ; a rule that is left out or applied to the wrong tiles moves tenths of them.
static double pair_tolerance(ts_dtype dtype) {
    return dtype == TS_BF16 ? 0.02 : 0;
}

typedef struct golden_name {
    char directory[256];
    ts_dtype dtype;
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
    enum { N = sizeof directories / sizeof *directories, MAX_DTYPES = 2 };
    static golden_name names[N * MAX_DTYPES];
    for (int i = 0; i < N * golden_n_dtypes; i++) {
        snprintf(names[i].directory, sizeof names[i].directory, "%s/%s", TS_SOURCE_DIR, directories[i % N]);
        names[i].dtype = golden_dtypes[i / N];
    }
    return cr_make_param_array(golden_name, names, (size_t)(N * golden_n_dtypes));
}

typedef struct comparison {
    golden_case *golden;
    bool decode;
    float *logits; // [n_tokens, vocab_size]
} comparison;

static ts_status keep(void *context, int64_t first, int64_t n) {
    comparison *c = context;
    return golden_logits(c->golden, -1, n, c->decode, c->logits + first * c->golden->vocab_size);
}

ParameterizedTest(golden_name *name, golden, against_reference) {
    static const ts_feed_options runs[] = {{1 << 20, false}, {64, false}, {100, false}, {37, false}, {1, true}};
    golden_case golden = golden_open(name->directory, name->dtype, 2);
    const int64_t n = golden.n_tokens * golden.vocab_size;
    comparison c = {.golden = &golden, .logits = malloc((size_t)n * sizeof(float))};
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        ts_feed_counts counts;
        c.decode = runs[i].decode;
        MUST(ts_feed_tokens(golden.device, golden.self, golden.model, golden.tokens, golden.n_tokens, runs[i], keep, &c,
                            &counts));
        const double error = golden_difference(c.logits, golden.logits, n);
        cr_log_info("%s %s, chunk %lld%s: relative error %.2e, %lld tile pairs", name->directory,
                    ts_dtype_name(name->dtype), (long long)runs[i].chunk, runs[i].decode ? ", decode" : "", error,
                    (long long)counts.pairs_selected);
        cr_expect(error <= tolerance(name->dtype), "%s %s, chunk %lld%s: relative error %.2e", name->directory,
                  ts_dtype_name(name->dtype), (long long)runs[i].chunk, runs[i].decode ? ", decode" : "", error);
        if (!golden.tile_pairs)
            continue;
        const double difference = fabs((double)(counts.pairs_selected - golden.tile_pairs[1]));
        cr_expect(counts.pairs_available == golden.tile_pairs[0] &&
                      difference <= pair_tolerance(name->dtype) * (double)golden.tile_pairs[1],
                  "%s %s, chunk %lld: %lld of %lld tile pairs selected, the reference selects %lld of %lld",
                  name->directory, ts_dtype_name(name->dtype), (long long)runs[i].chunk,
                  (long long)counts.pairs_selected, (long long)counts.pairs_available, (long long)golden.tile_pairs[1],
                  (long long)golden.tile_pairs[0]);
    }
    free(c.logits);
    golden_close(&golden);
}
