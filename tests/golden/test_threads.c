// The number of threads of a CPU rank does not change a bit (I4 within a rank).
#include "golden_case.h"

Test(threads, threads_do_not_matter) {
    const char *directory = TS_SOURCE_DIR "/tests/golden/gqa_swiglu_tied";
    enum { N = 700 };
    int64_t V;
    ts_feed_counts counts;
    float *one = golden_logits_of(directory, TS_F32, 1, NULL, N, (ts_feed_options){600, false}, &V, &counts);
    for (int n_threads = 2; n_threads <= 5; n_threads++) {
        float *more =
            golden_logits_of(directory, TS_F32, n_threads, NULL, N, (ts_feed_options){600, false}, &V, &counts);
        cr_expect_arr_eq(one, more, (size_t)(N * V) * sizeof *one, "logits of 1 and %d threads differ", n_threads);
        free(more);
    }
    free(one);
}
