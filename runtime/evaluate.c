#include "runtime/evaluate.h"

#include <math.h>
#include <stdlib.h>

// Rows of logits at a time: [BLOCK, V] f32 in memory.
enum { BLOCK = 256 };

typedef struct scorer {
    ts_device *device;
    ts_group *tp;
    ts_model *model;
    const int32_t *tokens; // of the window, [n + 1]: row i predicts tokens[i + 1]
    int32_t *targets;      // device [BLOCK]
    double *parts;         // device [BLOCK, 3]
    double *all;           // [ranks, BLOCK, 3]
    double nats;
} scorer;

static ts_status score_block(scorer *s, int64_t first, const int64_t *rows, int64_t n) {
    ts_status status = TS_OK;
    const int n_ranks = ts_group_size(s->tp);
    ts_tensor logits;
    TS_TRY(ts_device_upload(s->device, s->targets, s->tokens + first + 1, (size_t)n * sizeof *s->targets));
    TS_TRY(ts_model_logits(s->model, rows, n, false, &logits));
    TS_TRY(ts_op_cross_entropy(
        s->device, &(ts_cross_entropy_args){logits, s->targets, ts_model_weights(s->model)->first_token, s->parts}));
    double *mine = s->all + 3 * n * ts_group_rank(s->tp);
    TS_TRY(ts_device_download(s->device, mine, s->parts, (size_t)(3 * n) * sizeof *mine));
    TS_TRY(ts_group_all_gather(s->tp, mine, (size_t)(3 * n) * sizeof *mine, s->all));
    for (int64_t i = 0; i < n; i++) {
        double largest = -INFINITY, sum = 0, target = -INFINITY;
        for (int r = 0; r < n_ranks; r++)
            largest = fmax(largest, s->all[3 * (r * n + i)]);
        for (int r = 0; r < n_ranks; r++) {
            const double *part = s->all + 3 * (r * n + i);
            sum += part[1] * exp(part[0] - largest);
            target = fmax(target, part[2]);
        }
        s->nats += largest + log(sum) - target;
    }
done:
    return status;
}

static ts_status score_step(void *context, int64_t first, int64_t n) {
    ts_status status = TS_OK;
    int64_t rows[BLOCK];
    for (int64_t done = 0; done < n; done += BLOCK) {
        const int64_t size = n - done < BLOCK ? n - done : BLOCK;
        for (int64_t i = 0; i < size; i++)
            rows[i] = done + i;
        TS_TRY(score_block(context, first + done, rows, size));
    }
done:
    return status;
}

ts_status ts_evaluate(ts_device *device, ts_group *tp, ts_model *model, const int32_t *tokens, int64_t n_tokens,
                      int64_t context, int64_t chunk, ts_evaluation *out) {
    ts_status status = TS_OK;
    scorer s = {.device = device, .tp = tp, .model = model};
    void *targets = NULL, *parts = NULL;
    ts_evaluation sum = {0};
    const int64_t window = context > 0 ? context : n_tokens;
    TS_CHECK(n_tokens >= 2, TS_ERR_INVALID, "the text has %lld tokens; 2 or more can be scored", (long long)n_tokens);
    s.all = malloc((size_t)(3 * BLOCK * ts_group_size(tp)) * sizeof *s.all);
    TS_CHECK(s.all, TS_ERR_MEMORY, "eval: out of memory");
    TS_TRY(ts_device_alloc(device, BLOCK * sizeof *s.targets, "targets", &targets));
    TS_TRY(ts_device_alloc(device, 3 * BLOCK * sizeof *s.parts, "targets", &parts));
    s.targets = targets;
    s.parts = parts;
    for (int64_t first = 0; first + 1 < n_tokens; first += window) {
        const int64_t n = n_tokens - 1 - first < window ? n_tokens - 1 - first : window;
        ts_feed_counts counts;
        s.tokens = tokens + first;
        TS_TRY(ts_feed_tokens(device, tp, model, tokens + first, n, (ts_feed_options){.chunk = chunk}, score_step, &s,
                              &counts));
        sum.n_scored += n;
        sum.counts.pairs_available += counts.pairs_available;
        sum.counts.pairs_selected += counts.pairs_selected;
    }
    sum.nats = s.nats;
    *out = sum;
done:
    ts_device_release(device, targets);
    ts_device_release(device, parts);
    free(s.all);
    return status;
}
