// One finished request, or one that was refused, as a line of an OpenAI batch output file.
//
// A result:  {"id", "custom_id", "response": {"status_code": 200, "request_id", "body": {"id", "object":
//            "text_completion", "created", "model", "choices": [{"index", "text", "logprobs", "finish_reason"}],
//            "usage":
//            {"prompt_tokens", "completion_tokens", "total_tokens"}}}, "error": null}
// A refusal: the same around "status_code": 400 and "body": {"error": {"message", "type": "invalid_request_error",
// "param",
//            "code"}}; custom_id is null when it could not be read.
// The ids ("batch_req_...", "req_...", "cmpl-...") are hashes of the custom_id, of a refusal also of its line: the same
// in every run, and different for different lines of one output file.
#ifndef TS_RUNTIME_RESULT_H
#define TS_RUNTIME_RESULT_H

#include "runtime/request.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The text of one token may be part of a character, or hold U+0000. Such a piece is written as OpenAI does, in the form
// "bytes:\xe2\x80".
typedef struct ts_top_logprob {
    char *text; // [text_bytes], any bytes
    size_t text_bytes;
    float logprob; // natural logarithm; written as -9999 at the lowest, also for -infinity and NaN
} ts_top_logprob;

typedef struct ts_token_logprob {
    char *text; // [text_bytes], any bytes
    size_t text_bytes;
    float logprob;
    int64_t text_offset; // where the token begins in the choice's text, in code points
    ts_top_logprob
        *top; // [n_top], most likely first; the chosen token is added to what is written when it is not there
    int32_t n_top;
} ts_token_logprob;

typedef struct ts_choice {
    int32_t index;
    char *text; // [text_bytes] valid UTF-8, may hold U+0000
    size_t text_bytes;
    bool stopped;               // finish_reason "stop" (end of text, stop string or stop token), else "length"
    int64_t n_tokens;           // tokens with logprobs
    ts_token_logprob *logprobs; // [n_tokens]; NULL when they were not asked for
} ts_choice;

typedef struct ts_result {
    const char *custom_id, *model;
    int64_t prompt_tokens, completion_tokens; // of all choices together
    int64_t created;                          // seconds since 1970
    ts_choice *choices;                       // [n_choices]
    int32_t n_choices;
} ts_result;

// Both borrow everything they are given for the call only. *line is one line of JSON, ended by '\n' and a NUL that is
// not counted in *n_bytes; free() it. TS_ERR_INTERNAL when text that must be UTF-8 is not.
ts_status ts_result_format(const ts_result *result, char **line, size_t *n_bytes);
ts_status ts_request_error_format(const ts_request_error *error, char **line, size_t *n_bytes);

#endif
