#include "runtime/result.h"

#include "runtime/id_set.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OUT_OF_MEMORY() TS_FAIL(TS_ERR_MEMORY, "result: out of memory for a line of output")

enum { TEXT_DIGITS = 9 }; // enough for a float to be read back bitwise

static const double LOWEST_LOGPROB = -9999.0;

typedef struct record_ids {
    char batch[48], request[48], completion[48];
} record_ids;

static record_ids make_ids(const char *name, size_t n_bytes) {
    const ts_id_hash hash = ts_id_hash_compute(name, n_bytes);
    record_ids ids;
    snprintf(ids.batch, sizeof ids.batch, "batch_req_%016" PRIx64 "%016" PRIx64, hash.high, hash.low);
    snprintf(ids.request, sizeof ids.request, "req_%016" PRIx64 "%016" PRIx64, hash.high, hash.low);
    snprintf(ids.completion, sizeof ids.completion, "cmpl-%016" PRIx64 "%016" PRIx64, hash.high, hash.low);
    return ids;
}

// Appends to `list` or sets a key of `object`, and takes the reference over. False when memory ran out on the way here.
static bool append(json_t *list, json_t *value) {
    return json_array_append_new(list, value) == 0;
}

static bool set(json_t *object, const char *key, json_t *value) {
    return json_object_set_new(object, key, value) == 0;
}

static json_t *make_logprob(float logprob) {
    return json_real(logprob >= LOWEST_LOGPROB && isfinite(logprob) ? logprob : LOWEST_LOGPROB);
}

// NULL when memory ran out.
static json_t *make_piece(const char *text, size_t n_bytes) {
    if (!memchr(text, '\0', n_bytes)) {
        json_t *piece = json_stringn(text, n_bytes); // NULL also when this is not UTF-8
        if (piece)
            return piece;
    }
    char *escaped = malloc(sizeof "bytes:" + 4 * n_bytes);
    if (!escaped)
        return NULL;
    size_t at = (size_t)sprintf(escaped, "bytes:");
    for (size_t i = 0; i < n_bytes; i++)
        at += (size_t)sprintf(escaped + at, "\\x%02x", (unsigned char)text[i]);
    json_t *piece = json_stringn(escaped, at);
    free(escaped);
    return piece;
}

// A piece that is there already stays: of two tokens with the same text, the more likely one came first.
static bool add_top(json_t *top, const char *text, size_t n_bytes, float logprob) {
    json_t *piece = make_piece(text, n_bytes);
    const bool added = piece && (json_object_get(top, json_string_value(piece)) ||
                                 set(top, json_string_value(piece), make_logprob(logprob)));
    json_decref(piece);
    return added;
}

static json_t *make_top(const ts_token_logprob *token) {
    json_t *top = json_object();
    bool added = top != NULL;
    for (int32_t i = 0; i < token->n_top && added; i++)
        added = add_top(top, token->top[i].text, token->top[i].text_bytes, token->top[i].logprob);
    if (added && add_top(top, token->text, token->text_bytes, token->logprob))
        return top;
    json_decref(top);
    return NULL;
}

static json_t *make_logprobs(const ts_choice *choice) {
    if (!choice->logprobs)
        return json_null();
    json_t *tokens = json_array(), *token_logprobs = json_array(), *top_logprobs = json_array(),
           *offsets = json_array();
    bool built = tokens && token_logprobs && top_logprobs && offsets;
    for (int64_t i = 0; i < choice->n_tokens && built; i++) {
        const ts_token_logprob *token = &choice->logprobs[i];
        built = append(tokens, make_piece(token->text, token->text_bytes)) &&
                append(token_logprobs, make_logprob(token->logprob)) && append(top_logprobs, make_top(token)) &&
                append(offsets, json_integer(token->text_offset));
    }
    json_t *logprobs = NULL;
    if (built)
        logprobs = json_pack("{s:O, s:O, s:O, s:O}", "tokens", tokens, "token_logprobs", token_logprobs, "top_logprobs",
                             top_logprobs, "text_offset", offsets);
    json_decref(tokens);
    json_decref(token_logprobs);
    json_decref(top_logprobs);
    json_decref(offsets);
    return logprobs;
}

// Wraps `body`, which it takes over, in the record of a batch output and writes that as one line.
static ts_status format_record(const record_ids *ids, const char *custom_id, int status_code, json_t *body, char **line,
                               size_t *n_bytes) {
    ts_status status = TS_OK;
    char *text = NULL;
    json_t *record =
        json_pack("{s:s, s:s?, s:{s:i, s:s, s:o}, s:n}", "id", ids->batch, "custom_id", custom_id, "response",
                  "status_code", status_code, "request_id", ids->request, "body", body, "error");
    const size_t flags = JSON_COMPACT | JSON_REAL_PRECISION(TEXT_DIGITS);
    if (!record) {
        status = OUT_OF_MEMORY();
        goto done;
    }
    const size_t n = json_dumpb(record, NULL, 0, flags);
    text = n > 0 ? malloc(n + 2) : NULL;
    if (!text || json_dumpb(record, text, n, flags) != n) {
        status = OUT_OF_MEMORY();
        goto done;
    }
    memcpy(text + n, "\n", 2);
    *line = text;
    *n_bytes = n + 1;
    text = NULL;
done:
    free(text);
    json_decref(record);
    return status;
}

ts_status ts_result_format(const ts_result *result, char **line, size_t *n_bytes) {
    ts_status status = TS_OK;
    const record_ids ids = make_ids(result->custom_id, strlen(result->custom_id));
    json_t *choices = json_array(), *body = NULL;
    for (int32_t i = 0; i < result->n_choices; i++) {
        const ts_choice *choice = &result->choices[i];
        json_t *text = json_stringn(choice->text, choice->text_bytes);
        TS_CHECK(text, TS_ERR_INTERNAL, "result of \"%s\": the text of choice %d is not valid UTF-8", result->custom_id,
                 choice->index);
        json_t *made = json_pack("{s:i, s:o, s:o, s:s}", "index", (int)choice->index, "text", text, "logprobs",
                                 make_logprobs(choice), "finish_reason", choice->stopped ? "stop" : "length");
        if (!append(choices, made)) {
            status = OUT_OF_MEMORY();
            goto done;
        }
    }
    body = json_pack("{s:s, s:s, s:I, s:s, s:O, s:{s:I, s:I, s:I}}", "id", ids.completion, "object", "text_completion",
                     "created", (json_int_t)result->created, "model", result->model, "choices", choices, "usage",
                     "prompt_tokens", (json_int_t)result->prompt_tokens, "completion_tokens",
                     (json_int_t)result->completion_tokens, "total_tokens",
                     (json_int_t)(result->prompt_tokens + result->completion_tokens));
    TS_TRY(format_record(&ids, result->custom_id, 200, body, line, n_bytes));
done:
    json_decref(choices);
    return status;
}

ts_status ts_request_error_format(const ts_request_error *error, char **line, size_t *n_bytes) {
    ts_status status = TS_OK;
    char *name = NULL, *message = strdup(error->message);
    // Two refusals may share a custom_id, and a refusal may share it with a result; a line is refused once.
    const int n = asprintf(&name, "%s%c%" PRId64, error->custom_id ? error->custom_id : "", '\0', error->line);
    if (n < 0 || !message) {
        name = n < 0 ? NULL : name;
        status = OUT_OF_MEMORY();
        goto done;
    }
    const record_ids ids = make_ids(name, (size_t)n);
    // A message may quote a path or a line that is not UTF-8; what is wrong must still be said.
    json_t *sentence = json_string(message);
    if (!sentence) {
        for (char *c = message; *c != '\0'; c++)
            *c = (unsigned char)*c < 0x80 ? *c : '?';
        sentence = json_string(message);
    }
    json_t *body = json_pack("{s:{s:o, s:s, s:s?, s:s}}", "error", "message", sentence, "type", "invalid_request_error",
                             "param", error->param, "code", error->code);
    TS_TRY(format_record(&ids, error->custom_id, 400, body, line, n_bytes));
done:
    free(name);
    free(message);
    return status;
}
