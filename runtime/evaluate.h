// How well the model predicts a text: teacher-forced cross entropy.
#ifndef TS_EVALUATE_H
#define TS_EVALUATE_H

#include "runtime/feed.h"

typedef struct ts_evaluation {
    int64_t n_scored; // tokens that had a prediction: all but the first
    double nats;      // the sum of -log p over them
    ts_feed_counts counts;
} ts_evaluation;

// Scores tokens[1 ..] of a text, each from those before it in windows of `context` tokens: a window starts from an
// empty state, and the last token of one is the first of the next, so that every token but the first is scored once.
// context 0: one window. Collective over `tp`.
ts_status ts_evaluate(ts_device *device, ts_group *tp, ts_model *model, const int32_t *tokens, int64_t n_tokens,
                      int64_t context, int64_t chunk, ts_evaluation *out);

#endif
