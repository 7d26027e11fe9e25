// One sample of a request as it grows: tokens become text, and the text or a token ends it.
#ifndef TS_GENERATION_H
#define TS_GENERATION_H

#include "runtime/request.h"
#include "runtime/result.h"
#include "runtime/sampler.h"
#include "runtime/tokenizer.h"
#include "runtime/utf8_stream.h"

typedef struct ts_generation {
    const ts_request *request;     // borrowed
    const ts_tokenizer *tokenizer; // borrowed
    const int32_t *eos;            // borrowed
    int32_t n_eos;
    int32_t sample; // index of the choice
    int32_t last_token;
    int64_t n_tokens;
    bool ended, stopped;
    ts_utf8_stream stream;
    char *text; // shown so far, whole UTF-8
    size_t text_bytes, text_capacity;
    int64_t text_points;        // code points in text
    ts_token_logprob *logprobs; // [n_logprobs]
    int64_t n_logprobs, logprob_capacity;
} ts_generation;

void ts_generation_begin(ts_generation *generation, const ts_request *request, const ts_tokenizer *tokenizer,
                         const int32_t *eos, int32_t n_eos, int32_t sample);

// Takes the next token. generation->ended says whether it was the last: an end-of-text or stop token (which is not
// shown), a stop string (which is cut off with what follows it), or the max_tokens-th.
ts_status ts_generation_accept(ts_generation *generation, const ts_next_token *token);

// The finished sample as a choice of a result; strings are borrowed from the generation.
ts_choice ts_generation_choice(const ts_generation *generation);

void ts_generation_end(ts_generation *generation);

#endif
