#include "runtime/request.h"

#include <assert.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INVALID_JSON     "invalid_json_line"
#define MISSING          "missing_required_parameter"
#define UNKNOWN          "unknown_parameter"
#define INVALID_TYPE     "invalid_type"
#define INVALID_VALUE    "invalid_value"
#define UNSUPPORTED      "unsupported_value"
#define OUT_OF_MEMORY(p) TS_FAIL(TS_ERR_MEMORY, "line %lld: out of memory for the request", (long long)(p)->line)

enum { SHOWN_BYTES = 96 };

// The line being read. A field is refused by setting `error`, which ends the reading with TS_OK.
typedef struct parser {
    int64_t line;
    ts_request *request; // filled as the fields are read
    ts_request_error *error;
} parser;

typedef struct field_rule {
    const char *name;
    ts_status (*read)(parser *p, const struct field_rule *field, const json_t *value);
    bool required;    // then null counts as absent and both are refused
    size_t offset;    // of the number in ts_sampling_params
    double low, high; // what the number may be
    bool above_low;   // low itself is not allowed
} field_rule;

// ---- errors

static ts_status create_error(int64_t line, const char *custom_id, const char *param, const char *code,
                              ts_request_error **out, const char *format, va_list args) {
    ts_status status = TS_OK;
    char *text = NULL;
    ts_request_error *error = calloc(1, sizeof *error);
    TS_CHECK(error && vasprintf(&text, format, args) >= 0, TS_ERR_MEMORY, "line %lld: out of memory for its error",
             (long long)line);
    error->line = line;
    error->code = code;
    error->custom_id = custom_id ? strdup(custom_id) : NULL;
    error->param = param ? strdup(param) : NULL;
    TS_CHECK(asprintf(&error->message, "line %lld: %s", (long long)line, text) >= 0 &&
                 !error->custom_id == !custom_id && !error->param == !param,
             TS_ERR_MEMORY, "line %lld: out of memory for its error", (long long)line);
    *out = error;
    error = NULL;
done:
    free(text);
    ts_request_error_free(error);
    return status;
}

ts_status ts_request_error_create(int64_t line, const char *custom_id, const char *param, const char *code,
                                  ts_request_error **error, const char *format, ...) {
    va_list args;
    va_start(args, format);
    const ts_status status = create_error(line, custom_id, param, code, error, format, args);
    va_end(args);
    return status;
}

void ts_request_error_free(ts_request_error *error) {
    if (!error)
        return;
    free(error->custom_id);
    free(error->param);
    free(error->message);
    free(error);
}

__attribute__((format(printf, 4, 5))) static ts_status refuse(parser *p, const char *param, const char *code,
                                                              const char *format, ...) {
    assert(!p->error);
    va_list args;
    va_start(args, format);
    const ts_status status = create_error(p->line, p->request->custom_id, param, code, &p->error, format, args);
    va_end(args);
    return status;
}

typedef struct excerpt {
    char *text; // [SHOWN_BYTES]
    size_t used;
    bool cut;
} excerpt;

static int append_to_excerpt(const char *text, size_t n, void *data) {
    excerpt *out = data;
    const size_t room = SHOWN_BYTES - sizeof "..." - out->used;
    out->cut |= n > room;
    memcpy(out->text + out->used, text, n > room ? room : n);
    out->used += n > room ? room : n;
    return 0;
}

// What the user wrote, short enough for a sentence. Pure ASCII, so that cutting it never splits a character.
static const char *show(const json_t *value, char shown[SHOWN_BYTES]) {
    if (json_is_array(value) || json_is_object(value)) {
        const size_t n = json_is_array(value) ? json_array_size(value) : json_object_size(value);
        snprintf(shown, SHOWN_BYTES, "%s of %zu", json_is_array(value) ? "an array" : "an object", n);
        return shown;
    }
    excerpt out = {.text = shown};
    json_dump_callback(value, append_to_excerpt, &out, JSON_ENCODE_ANY | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(15));
    strcpy(shown + out.used, out.cut ? "..." : "");
    return shown;
}

static ts_status refuse_type(parser *p, const char *param, const json_t *value, const char *allowed) {
    char shown[SHOWN_BYTES];
    return refuse(p, param, INVALID_TYPE, "%s is %s; must be %s", param, show(value, shown), allowed);
}

static ts_status refuse_value(parser *p, const char *param, const json_t *value, const char *allowed) {
    char shown[SHOWN_BYTES];
    return refuse(p, param, INVALID_VALUE, "%s is %s; must be %s", param, show(value, shown), allowed);
}

// The same about a key of the object `owner`, which the message calls `what`.
static ts_status refuse_key(parser *p, const char *param, const char *code, const char *owner, const char *what,
                            const char *key, const char *allowed) {
    char shown[SHOWN_BYTES];
    json_t *name = json_string(key);
    if (!name)
        return OUT_OF_MEMORY(p);
    const ts_status status = refuse(p, param, code, "%s has the %s %s; %s", owner, what, show(name, shown), allowed);
    json_decref(name);
    return status;
}

static bool equals(const json_t *string, const char *text) {
    const size_t n = strlen(text);
    return json_string_length(string) == n && memcmp(json_string_value(string), text, n) == 0;
}

// ---- kinds of fields

// A copy of a string that C code may take as ended by NUL. *out stays NULL when the field is refused.
static ts_status read_string(parser *p, const char *name, const json_t *value, size_t max_bytes, const char *allowed,
                             char **out) {
    if (!json_is_string(value))
        return refuse_type(p, name, value, allowed);
    const size_t n = json_string_length(value);
    if (n == 0 || n > max_bytes || memchr(json_string_value(value), '\0', n))
        return refuse_value(p, name, value, allowed);
    *out = strdup(json_string_value(value));
    return *out ? TS_OK : OUT_OF_MEMORY(p);
}

static ts_status read_integer(parser *p, const field_rule *field, const json_t *value) {
    char allowed[64];
    snprintf(allowed, sizeof allowed, "an integer from %.0f to %.0f", field->low, field->high);
    if (!json_is_integer(value))
        return refuse_type(p, field->name, value, allowed);
    const json_int_t integer = json_integer_value(value);
    if (integer < (json_int_t)field->low || integer > (json_int_t)field->high)
        return refuse_value(p, field->name, value, allowed);
    *(int32_t *)((char *)&p->request->sampling + field->offset) = (int32_t)integer;
    return TS_OK;
}

static ts_status read_number(parser *p, const field_rule *field, const json_t *value) {
    char allowed[64];
    if (field->above_low)
        snprintf(allowed, sizeof allowed, "a number above %g, up to %g", field->low, field->high);
    else
        snprintf(allowed, sizeof allowed, "a number from %g to %g", field->low, field->high);
    if (!json_is_number(value))
        return refuse_type(p, field->name, value, allowed);
    const double number = json_number_value(value);
    const float rounded = (float)number + 0.0f; // -0 becomes 0
    if (number < field->low || number > field->high || (field->above_low && rounded <= (float)field->low))
        return refuse_value(p, field->name, value, allowed);
    *(float *)((char *)&p->request->sampling + field->offset) = rounded;
    return TS_OK;
}

static ts_status read_boolean(parser *p, const field_rule *field, const json_t *value) {
    if (!json_is_boolean(value))
        return refuse_type(p, field->name, value, "true or false");
    *(bool *)((char *)&p->request->sampling + field->offset) = json_is_true(value);
    return TS_OK;
}

// OpenAI fields whose neutral value changes nothing; any other would ask for what a batch job does not do.
static ts_status read_false(parser *p, const field_rule *field, const json_t *value) {
    char shown[SHOWN_BYTES];
    if (json_is_false(value))
        return TS_OK;
    return refuse(p, field->name, json_is_true(value) ? UNSUPPORTED : INVALID_TYPE, "%s is %s; must be false or absent",
                  field->name, show(value, shown));
}

static ts_status read_nothing(parser *p, const field_rule *field, const json_t *value) {
    char shown[SHOWN_BYTES];
    return refuse(p, field->name, UNSUPPORTED, "%s is %s; must be null or absent", field->name, show(value, shown));
}

static ts_status read_ignored_string(parser *p, const field_rule *field, const json_t *value) {
    return json_is_string(value) ? TS_OK : refuse_type(p, field->name, value, "a string (it is ignored)");
}

// The ids of an array; both outputs are set only when all are token ids. An empty array gives NULL and 0.
static ts_status read_token_ids(parser *p, const char *name, const json_t *array, int32_t **out, size_t *n_out) {
    ts_status status = TS_OK;
    const size_t n = json_array_size(array);
    int32_t *ids = n > 0 ? malloc(n * sizeof *ids) : NULL;
    if (n > 0 && !ids)
        return OUT_OF_MEMORY(p);
    for (size_t i = 0; i < n; i++) {
        const json_t *item = json_array_get(array, i);
        const json_int_t id = json_integer_value(item);
        if (!json_is_integer(item) || id < 0 || id > INT32_MAX) {
            char shown[SHOWN_BYTES];
            status = refuse(p, name, json_is_integer(item) ? INVALID_VALUE : INVALID_TYPE,
                            "%s[%zu] is %s; must be a token id, an integer from 0 to the vocabulary size - 1", name, i,
                            show(item, shown));
            goto done;
        }
        ids[i] = (int32_t)id;
    }
    *out = ids;
    *n_out = n;
    ids = NULL;
done:
    free(ids);
    return status;
}

// ---- fields with rules of their own

static ts_status read_model(parser *p, const field_rule *field, const json_t *value) {
    return read_string(p, field->name, value, SIZE_MAX, "a non-empty string, the name of the model",
                       &p->request->model);
}

static ts_status read_prompt(parser *p, const field_rule *field, const json_t *value) {
    const char *allowed = "one non-empty string or one non-empty array of token ids";
    ts_request *request = p->request;
    if (json_is_array(value) && json_array_size(value) > 0) {
        const json_t *first = json_array_get(value, 0);
        if (json_is_string(first) || json_is_array(first))
            return refuse(p, field->name, UNSUPPORTED, "%s is an array of prompts; must be %s, one prompt a line",
                          field->name, allowed);
        return read_token_ids(p, field->name, value, &request->prompt_ids, &request->n_prompt_ids);
    }
    if (!json_is_string(value) && !json_is_array(value))
        return refuse_type(p, field->name, value, allowed);
    if (json_string_length(value) == 0) // an empty string or array
        return refuse_value(p, field->name, value, allowed);
    request->prompt_bytes = json_string_length(value);
    request->prompt_text = malloc(request->prompt_bytes + 1);
    if (!request->prompt_text)
        return OUT_OF_MEMORY(p);
    memcpy(request->prompt_text, json_string_value(value), request->prompt_bytes + 1);
    return TS_OK;
}

static ts_status read_seed(parser *p, const field_rule *field, const json_t *value) {
    if (!json_is_integer(value))
        return refuse_type(p, field->name, value, "a 64-bit signed integer");
    p->request->sampling.seed = (uint64_t)json_integer_value(value);
    return TS_OK;
}

static ts_status read_stop(parser *p, const field_rule *field, const json_t *value) {
    const char *allowed = "a non-empty string without U+0000, or an array of up to 16 of them";
    ts_request *request = p->request;
    static_assert(TS_STOPS_MAX == 16, "the sentence above says 16");
    if (!json_is_array(value) && !json_is_string(value))
        return refuse_type(p, field->name, value, allowed);
    const size_t n = json_is_array(value) ? json_array_size(value) : 1;
    if (n > TS_STOPS_MAX)
        return refuse_value(p, field->name, value, allowed);
    if (n == 0)
        return TS_OK;
    request->stops = calloc(n, sizeof *request->stops);
    if (!request->stops)
        return OUT_OF_MEMORY(p);
    request->n_stops = n;
    for (size_t i = 0; i < n; i++) {
        const json_t *item = json_is_array(value) ? json_array_get(value, i) : value;
        const ts_status status = read_string(p, field->name, item, SIZE_MAX, allowed, &request->stops[i]);
        if (status != TS_OK || p->error)
            return status;
    }
    return TS_OK;
}

static ts_status read_stop_ids(parser *p, const field_rule *field, const json_t *value) {
    ts_sampling_params *sampling = &p->request->sampling;
    size_t n = 0;
    if (!json_is_array(value))
        return refuse_type(p, field->name, value, "an array of token ids");
    if (json_array_size(value) > INT32_MAX)
        return refuse_value(p, field->name, value, "an array of fewer than 2^31 token ids");
    const ts_status status = read_token_ids(p, field->name, value, &sampling->stop_ids, &n);
    sampling->n_stop_ids = (int32_t)n;
    return status;
}

// Decimal digits without sign, spaces or leading zeros, so that an id has one spelling and cannot come twice.
static bool parse_token_id(const char *text, int32_t *id) {
    int64_t value = 0;
    const size_t n = strspn(text, "0123456789");
    if (n == 0 || n > 10 || text[n] != '\0' || (text[0] == '0' && n > 1))
        return false;
    for (size_t i = 0; i < n; i++)
        value = 10 * value + (text[i] - '0');
    if (value > INT32_MAX)
        return false;
    *id = (int32_t)value;
    return true;
}

static ts_status read_logit_bias(parser *p, const field_rule *field, const json_t *value) {
    ts_sampling_params *sampling = &p->request->sampling;
    char shown[SHOWN_BYTES];
    if (!json_is_object(value))
        return refuse_type(p, field->name, value, "an object from token ids in decimal to numbers from -100 to 100");
    const size_t n = json_object_size(value);
    if (n > INT32_MAX)
        return refuse_value(p, field->name, value, "an object of fewer than 2^31 token ids");
    if (n == 0)
        return TS_OK;
    sampling->bias_ids = malloc(n * sizeof *sampling->bias_ids);
    sampling->biases = malloc(n * sizeof *sampling->biases);
    if (!sampling->bias_ids || !sampling->biases)
        return OUT_OF_MEMORY(p);
    const char *key;
    json_t *bias;
    json_object_foreach((json_t *)value, key, bias) {
        if (!parse_token_id(key, &sampling->bias_ids[sampling->n_biases]))
            return refuse_key(p, field->name, INVALID_VALUE, field->name, "key", key,
                              "must be a token id in decimal, such as \"42\"");
        const double number = json_number_value(bias);
        if (!json_is_number(bias) || number < -TS_BIAS_MAX || number > TS_BIAS_MAX)
            return refuse(p, field->name, json_is_number(bias) ? INVALID_VALUE : INVALID_TYPE,
                          "%s[\"%s\"] is %s; must be a number from %g to %g", field->name, key, show(bias, shown),
                          -TS_BIAS_MAX, TS_BIAS_MAX);
        sampling->biases[sampling->n_biases++] = (float)number;
    }
    return TS_OK;
}

static ts_status read_best_of(parser *p, const field_rule *field, const json_t *value) {
    char shown[SHOWN_BYTES];
    const int32_t n = p->request->sampling.n; // read before: `n` comes earlier in the table
    if (!json_is_integer(value))
        return refuse_type(p, field->name, value, "an integer equal to n, or absent");
    if (json_integer_value(value) != n)
        return refuse(p, field->name, UNSUPPORTED, "%s is %s; must be equal to n, which is %d, or absent", field->name,
                      show(value, shown), n);
    return TS_OK;
}

// ---- the line

#define FIELD(key, reader)       .name = key, .read = reader
#define SAMPLING(member, reader) FIELD(#member, reader), .offset = offsetof(ts_sampling_params, member)
#define RANGE(from, to)          .low = from, .high = to

static const field_rule body_fields[] = {
    {FIELD("model", read_model), .required = true},
    {FIELD("prompt", read_prompt), .required = true},
    {SAMPLING(max_tokens, read_integer), RANGE(1, INT32_MAX)},
    {SAMPLING(min_tokens, read_integer), RANGE(0, INT32_MAX)},
    {SAMPLING(temperature, read_number), RANGE(0, TS_TEMPERATURE_MAX)},
    {SAMPLING(top_k, read_integer), RANGE(-1, INT32_MAX)},
    {SAMPLING(top_p, read_number), RANGE(0, 1), .above_low = true},
    {SAMPLING(min_p, read_number), RANGE(0, 1)},
    {SAMPLING(n, read_integer), RANGE(1, TS_N_MAX)},
    {FIELD("seed", read_seed)},
    {FIELD("stop", read_stop)},
    {FIELD("stop_token_ids", read_stop_ids)},
    {SAMPLING(ignore_eos, read_boolean)},
    {SAMPLING(logprobs, read_integer), RANGE(0, TS_LOGPROBS_MAX)},
    {SAMPLING(presence_penalty, read_number), RANGE(-TS_PENALTY_MAX, TS_PENALTY_MAX)},
    {SAMPLING(frequency_penalty, read_number), RANGE(-TS_PENALTY_MAX, TS_PENALTY_MAX)},
    {SAMPLING(repetition_penalty, read_number), RANGE(0, TS_REPETITION_PENALTY_MAX), .above_low = true},
    {FIELD("logit_bias", read_logit_bias)},
    {FIELD("best_of", read_best_of)},
    {FIELD("stream", read_false)},
    {FIELD("stream_options", read_nothing)},
    {FIELD("echo", read_false)},
    {FIELD("suffix", read_nothing)},
    {FIELD("user", read_ignored_string)},
};
enum { N_BODY_FIELDS = sizeof body_fields / sizeof *body_fields };

static ts_status read_custom_id(parser *p, const field_rule *field, const json_t *value) {
    return read_string(p, field->name, value, TS_CUSTOM_ID_BYTES_MAX,
                       "a non-empty string of up to 1024 bytes without U+0000", &p->request->custom_id);
}
static_assert(TS_CUSTOM_ID_BYTES_MAX == 1024, "the sentence above says 1024");

static ts_status read_method(parser *p, const field_rule *field, const json_t *value) {
    if (!json_is_string(value))
        return refuse_type(p, field->name, value, "\"POST\"");
    return equals(value, "POST") ? TS_OK : refuse_value(p, field->name, value, "\"POST\"");
}

static ts_status read_url(parser *p, const field_rule *field, const json_t *value) {
    const char *allowed = "\"" TS_REQUEST_URL "\"";
    if (!json_is_string(value))
        return refuse_type(p, field->name, value, allowed);
    return equals(value, TS_REQUEST_URL) ? TS_OK : refuse_value(p, field->name, value, allowed);
}

static ts_status refuse_unknown(parser *p, const char *where, const json_t *object, const field_rule *fields,
                                size_t n_fields) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value) {
        size_t i = 0;
        while (i < n_fields && strcmp(fields[i].name, key) != 0)
            i++;
        if (i < n_fields)
            continue;
        char allowed[512];
        size_t at = (size_t)snprintf(allowed, sizeof allowed, "allowed are ");
        for (i = 0; i < n_fields; i++)
            at += (size_t)snprintf(allowed + at, sizeof allowed - at, "%s%s", i > 0 ? ", " : "", fields[i].name);
        return refuse_key(p, strlen(key) < SHOWN_BYTES ? key : NULL, UNKNOWN, where, "unknown field", key, allowed);
    }
    return TS_OK;
}

// In the order of the table.
static ts_status read_fields(parser *p, const json_t *object, const field_rule *fields, size_t n_fields) {
    ts_status status = TS_OK;
    for (size_t i = 0; i < n_fields && status == TS_OK && !p->error; i++) {
        const json_t *value = json_object_get(object, fields[i].name);
        const bool absent = !value || json_is_null(value);
        if (absent && fields[i].required)
            status = refuse(p, fields[i].name, MISSING, "%s is %s; it is required", fields[i].name,
                            value ? "null" : "missing");
        else if (!absent)
            status = fields[i].read(p, &fields[i], value);
    }
    return status;
}

static ts_status read_body(parser *p, const field_rule *field, const json_t *value) {
    ts_status status = TS_OK;
    ts_sampling_params *sampling = &p->request->sampling;
    if (!json_is_object(value))
        return refuse_type(p, field->name, value, "an object with the fields of a completion");
    // Unknown fields first: of a misspelt name, that is the better thing to say than that the right one is missing.
    TS_TRY(refuse_unknown(p, field->name, value, body_fields, N_BODY_FIELDS));
    if (!p->error)
        TS_TRY(read_fields(p, value, body_fields, N_BODY_FIELDS));
    if (p->error)
        goto done;
    if (sampling->top_k < 0)
        sampling->top_k = 0;
    if (sampling->min_tokens > sampling->max_tokens)
        status = refuse(p, "min_tokens", INVALID_VALUE,
                        "min_tokens is %d; must be an integer from 0 to max_tokens, which is %d", sampling->min_tokens,
                        sampling->max_tokens);
done:
    return status;
}

static const field_rule line_fields[] = {
    {FIELD("custom_id", read_custom_id), .required = true},
    {FIELD("method", read_method), .required = true},
    {FIELD("url", read_url), .required = true},
    {FIELD("body", read_body), .required = true},
};
enum { N_LINE_FIELDS = sizeof line_fields / sizeof *line_fields };

static ts_status read_line(parser *p, const json_t *root) {
    ts_status status = TS_OK;
    char shown[SHOWN_BYTES];
    if (!json_is_object(root))
        return refuse(p, NULL, INVALID_JSON, "it is %s; must be one JSON object", show(root, shown));
    TS_TRY(read_fields(p, root, line_fields, 1)); // custom_id: every later refusal carries it
    if (!p->error)
        TS_TRY(refuse_unknown(p, "the request", root, line_fields, N_LINE_FIELDS));
    if (!p->error)
        TS_TRY(read_fields(p, root, line_fields + 1, N_LINE_FIELDS - 1));
done:
    return status;
}

static ts_status refuse_json(parser *p, const json_error_t *error) {
    // jansson leaves the text empty where an allocation failed in its lexer.
    if (json_error_code(error) == json_error_out_of_memory || error->text[0] == '\0')
        return OUT_OF_MEMORY(p);
    return refuse(p, NULL, INVALID_JSON, "not JSON near byte %d: %s; must be one JSON object without repeated keys",
                  error->position, error->text);
}

ts_status ts_request_parse(const char *text, size_t n_bytes, int64_t line, ts_request **request,
                           ts_request_error **error) {
    ts_status status = TS_OK;
    json_error_t json_error;
    json_t *root = NULL;
    parser p = {.line = line, .request = calloc(1, sizeof *p.request)};
    if (!p.request) {
        status = OUT_OF_MEMORY(&p);
        goto done;
    }
    p.request->line = line;
    p.request->sampling = ts_sampling_params_default();
    root = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &json_error);
    TS_TRY(root ? read_line(&p, root) : refuse_json(&p, &json_error));
    *request = p.error ? NULL : p.request;
    *error = p.error;
    if (!p.error)
        p.request = NULL;
    p.error = NULL;
done:
    json_decref(root);
    ts_request_free(p.request);
    ts_request_error_free(p.error);
    return status;
}

ts_status ts_request_check_vocabulary(const ts_request *request, int32_t vocab_size, ts_request_error **error) {
    const ts_sampling_params *sampling = &request->sampling;
    const struct {
        const char *name;
        const int32_t *ids;
        size_t n;
    } lists[] = {
        {"prompt", request->prompt_ids, request->n_prompt_ids},
        {"stop_token_ids", sampling->stop_ids, (size_t)sampling->n_stop_ids},
        {"logit_bias", sampling->bias_ids, (size_t)sampling->n_biases},
    };
    for (size_t list = 0; list < sizeof lists / sizeof *lists; list++) {
        for (size_t i = 0; i < lists[list].n; i++) {
            if (lists[list].ids[i] < 0 || lists[list].ids[i] >= vocab_size)
                return ts_request_error_create(request->line, request->custom_id, lists[list].name, INVALID_VALUE,
                                               error, "%s holds token id %d at index %zu; must be from 0 to %d",
                                               lists[list].name, lists[list].ids[i], i, vocab_size - 1);
        }
    }
    *error = NULL;
    return TS_OK;
}

void ts_request_free(ts_request *request) {
    if (!request)
        return;
    for (size_t i = 0; i < request->n_stops; i++)
        free(request->stops[i]);
    free(request->stops);
    free(request->custom_id);
    free(request->model);
    free(request->prompt_text);
    free(request->prompt_ids);
    free(request->sampling.stop_ids);
    free(request->sampling.bias_ids);
    free(request->sampling.biases);
    free(request);
}
