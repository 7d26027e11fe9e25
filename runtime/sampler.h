// Choosing the next token from logits that are sharded over the vocabulary.
//
// Every rank of the tensor-parallel group turns its shard of a row into a few candidates; the root merges them and
// picks. Order of operations, as in vLLM: repetition, presence and frequency penalty and logit_bias; tokens that may
// not come yet (min_tokens) leave; temperature; top_k; top_p over what top_k left; min_p; one draw. The draw is a pure
// function of (seed, request, sample, position), see philox.h. Log-probabilities are those of the model, before all of
// this.
//
//     ts_sampler_row_begin(&row, params, ...)             on every rank, when a sequence starts
//     ts_sampler_row_prompt / ts_sampler_row_token        on every rank, for every token fed
//     ts_sampler_choose(sampler, logits, rows, ...)       collective; choices at the root
//     ts_sampler_row_end(&row)
#ifndef TS_SAMPLER_H
#define TS_SAMPLER_H

#include "comm/comm.h"
#include "kernels/base/tensor.h"
#include "runtime/sampling_params.h"

// What sampling knows of one sequence on one rank.
typedef struct ts_sampler_row {
    ts_sampling_params params; // its arrays are owned
    uint64_t request;          // names the request in the counter of the generator
    uint32_t sample;
    int64_t n_generated; // tokens chosen and fed
    int32_t *n_times;    // [V] how often each token of this shard was generated; NULL without penalties
    uint8_t *in_prompt;  // [V]; NULL without repetition penalty
    int32_t *seen;       // [n_seen] the tokens, of the shard, that penalties apply to; NULL without
    int64_t n_seen;
    int64_t first_token, n_tokens; // the shard
    const int32_t *eos;            // borrowed
    int32_t n_eos;
} ts_sampler_row;

// Copies params. Tokens [first_token, first_token + n_tokens) are this rank's; eos is borrowed until the row ends.
ts_status ts_sampler_row_begin(ts_sampler_row *row, const ts_sampling_params *params, uint64_t request, uint32_t sample,
                               int64_t first_token, int64_t n_tokens, const int32_t *eos, int32_t n_eos);
void ts_sampler_row_end(ts_sampler_row *row);

// Tokens of the prompt, and a generated token, as they are fed.
void ts_sampler_row_prompt(ts_sampler_row *row, const int32_t *tokens, int64_t n);
void ts_sampler_row_token(ts_sampler_row *row, int32_t token);

// What `from` knows of its prompt, for a further sample of it.
void ts_sampler_row_copy_prompt(ts_sampler_row *row, const ts_sampler_row *from);

typedef struct ts_scored_token {
    int32_t token;
    double logprob;
} ts_scored_token;

// The token of one row. logprob and top are set where the row's params ask for log-probabilities; top is in falling
// order.
typedef struct ts_next_token {
    int32_t token;
    double logprob;
    int32_t n_top;
    ts_scored_token top[TS_LOGPROBS_MAX];
} ts_next_token;

typedef struct ts_sampler ts_sampler;

ts_status ts_sampler_create(ts_group *tp, ts_sampler **out); // tp is borrowed until free
void ts_sampler_free(ts_sampler *sampler);

// logits: [n, V] f32 in host memory. rows[i] is the sequence of row i. choices [n] are set at rank 0 of the group.
// Collective. Logits may be -infinity; TS_ERR_INTERNAL, on all ranks, where one is NaN or +infinity, or where no token
// of a row is left.
ts_status ts_sampler_choose(ts_sampler *sampler, ts_tensor logits, const ts_sampler_row *const *rows, int32_t n,
                            ts_next_token *choices);

#endif
