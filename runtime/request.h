// One line of an OpenAI batch input file, checked field by field.
//
//     {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "Once"}}
//
// Order of calls: ts_request_parse, ts_request_check_vocabulary once the model is known, then ts_request_free. A line
// that is not a request we can serve is data, not a failure: it becomes a ts_request_error, which runtime/result.h
// writes to the output as a record with status 400, and the job goes on.
//
// Fields of the body ("model" and "prompt" are required; null is the same as absent in every other one):
//     model              string
//     prompt             non-empty string, or non-empty array of token ids (one prompt a line)
//     max_tokens         integer, 1 or more (16)              min_tokens         integer, 0 to max_tokens (0)
//     temperature        number, [0, 2] (1; 0 = greedy)       top_k              integer, 1 or more; 0 or -1 = off (0)
//     top_p              number, (0, 1] (1)                   min_p              number, [0, 1] (0)
//     presence_penalty   number, [-2, 2] (0)                  frequency_penalty  number, [-2, 2] (0)
//     repetition_penalty number, (0, 10] (1)                  n                  integer, 1 to 128 (1)
//     seed               integer, 64 bits signed (0)          logprobs           integer, 0 to 20 (none)
//     stop               non-empty string, or up to 16 of them
//     stop_token_ids     array of token ids                   ignore_eos         boolean (false)
//     logit_bias         object: token id in decimal -> number, [-100, 100]
//     best_of            integer, equal to n                  stream, echo       false
//     suffix, stream_options  null                            user               string, ignored
// Integers must be written as JSON integers (16, not 16.0). Numbers are rounded to float; one with a lower bound that
// it may not touch must still be above it as a float. Any other field, and a key that comes twice, is refused.
//
// Codes of a ts_request_error decided here: "invalid_json_line", "missing_required_parameter", "unknown_parameter",
// "invalid_type", "invalid_value", "unsupported_value". runtime/job_reader.h adds "line_too_long", "invalid_utf8" and
// "duplicate_custom_id".
#ifndef TS_RUNTIME_REQUEST_H
#define TS_RUNTIME_REQUEST_H

#include "kernels/base/status.h"
#include "runtime/sampling_params.h"

#include <stddef.h>
#include <stdint.h>

#define TS_REQUEST_URL         "/v1/completions"
#define TS_CUSTOM_ID_BYTES_MAX 1024
#define TS_STOPS_MAX           16

typedef struct ts_request {
    int64_t line; // 1 is the first line of the input file
    char *custom_id;
    char *model;
    char *prompt_text; // [prompt_bytes] UTF-8 and a final NUL that is not counted, may hold U+0000; NULL when given as
                       // ids
    size_t prompt_bytes;
    int32_t *prompt_ids; // [n_prompt_ids], each 0 or more; NULL when given as text
    size_t n_prompt_ids;
    char **stops; // [n_stops] non-empty UTF-8 without U+0000; NULL when none
    size_t n_stops;
    ts_sampling_params sampling;
} ts_request;

typedef struct ts_request_error {
    int64_t line;
    char *custom_id; // NULL when it could not be read
    char *param;     // the field, e.g. "temperature"; NULL when no single field is to blame
    char *message;   // "line 12: temperature is 3; must be a number from 0 to 2"
    const char *code;
} ts_request_error;

// Parses one line (UTF-8, the newline may be left off) and checks everything that can be checked without the model.
// Returns TS_OK in two cases: a good line sets *request (free with ts_request_free) and *error = NULL; a bad line sets
// *error (free with ts_request_error_free) and *request = NULL. Memory in use while parsing is at most proportional to
// the line. TS_ERR_MEMORY leaves both alone.
ts_status ts_request_parse(const char *text, size_t n_bytes, int64_t line, ts_request **request,
                           ts_request_error **error);

// Checks prompt ids, stop_token_ids and the ids of logit_bias against [0, vocab_size). *error is NULL when all are
// inside, else it is the caller's to free and names the first id outside. TS_ERR_MEMORY leaves it alone.
ts_status ts_request_check_vocabulary(const ts_request *request, int32_t vocab_size, ts_request_error **error);

// For errors that are found elsewhere (wrong model name, prompt too long for the memory, tokenizer). The message
// becomes "line <line>: " and the formatted text. `custom_id` and `param` may be NULL and are copied; `code` must be a
// literal.
ts_status ts_request_error_create(int64_t line, const char *custom_id, const char *param, const char *code,
                                  ts_request_error **error, const char *format, ...)
    __attribute__((format(printf, 6, 7)));

void ts_request_free(ts_request *request);
void ts_request_error_free(ts_request_error *error);

#endif
