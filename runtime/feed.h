// Feeding a known text through the model, chunk by chunk or token by token: what eval and logits are made of.
#ifndef TS_FEED_H
#define TS_FEED_H

#include "runtime/model.h"

typedef struct ts_feed_options {
    int64_t chunk; // tokens of one prefill step
    bool decode;   // one token at a time instead, in the one-token form
} ts_feed_options;

// Called after every step, when ts_model_logits can give logits of its n rows: positions [first, first + n).
typedef ts_status (*ts_feed_visitor)(void *context, int64_t first, int64_t n);

typedef struct ts_feed_counts {
    int64_t pairs_available, pairs_selected; // tile pairs, over all layers and KV heads of the model
} ts_feed_counts;

// TS_ERR_INVALID where a token is outside the vocabulary; `where` names their source in the message.
ts_status ts_feed_check_tokens(const ts_config *config, const char *where, const int32_t *tokens, int64_t n_tokens);

// Runs tokens [n_tokens], all inside the vocabulary, as one sequence from its beginning. Collective over `tp`, the
// group of the model. Tile states are held in the device's slot_dtype. counts may be NULL. A visitor's failure ends
// the run with its status.
ts_status ts_feed_tokens(ts_device *device, ts_group *tp, ts_model *model, const int32_t *tokens, int64_t n_tokens,
                         ts_feed_options options, ts_feed_visitor visit, void *context, ts_feed_counts *counts);

#endif
