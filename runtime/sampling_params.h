// How the next token is chosen, as one request asks for it.
#ifndef TS_RUNTIME_SAMPLING_PARAMS_H
#define TS_RUNTIME_SAMPLING_PARAMS_H

#include <stdbool.h>
#include <stdint.h>

// Bounds that the request parser enforces.
#define TS_TEMPERATURE_MAX        2.0
#define TS_PENALTY_MAX            2.0
#define TS_REPETITION_PENALTY_MAX 10.0
#define TS_BIAS_MAX               100.0
#define TS_N_MAX                  128
#define TS_LOGPROBS_MAX           20

typedef struct ts_sampling_params {
    int32_t max_tokens, min_tokens; // tokens to generate at most; before min_tokens no end of text and no stop id
    int32_t top_k;                  // 0: off
    float temperature;              // 0: greedy
    float top_p, min_p;             // 1 and 0: off
    float presence_penalty, frequency_penalty, repetition_penalty; // 0, 0 and 1: off
    int32_t n;                                                     // samples of the prompt
    uint64_t seed;
    int32_t logprobs; // alternatives to report per token; -1: none, and no log-probabilities
    bool ignore_eos;
    int32_t n_stop_ids, n_biases;
    int32_t *stop_ids; // [n_stop_ids] tokens that end the text; owned by the request
    int32_t *bias_ids; // [n_biases] tokens and what is added to their logits; owned by the request
    float *biases;
} ts_sampling_params;

// What a request gets that says nothing: 16 tokens at temperature 1, seed 0.
static inline ts_sampling_params ts_sampling_params_default(void) {
    return (ts_sampling_params){
        .max_tokens = 16,
        .temperature = 1.0f,
        .top_p = 1.0f,
        .repetition_penalty = 1.0f,
        .n = 1,
        .logprobs = -1,
    };
}

#endif
