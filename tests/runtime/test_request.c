#include "runtime/request.h"

#include <criterion/criterion.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A line around a body, and around the fields of a body that go with a good model and prompt.
#define LINE(body)   "{\"custom_id\":\"c1\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":" body "}"
#define WITH(fields) LINE("{\"model\":\"m\",\"prompt\":\"p\"," fields "}")

typedef struct bad_line {
    const char *text;
    const char *param, *code;
    const char *says[2]; // what the message must hold beside the number of the line
} bad_line;

static const bad_line bad_lines[] = {
    // Not an object of JSON.
    {"", NULL, "invalid_json_line", {"JSON"}},
    {"nonsense", NULL, "invalid_json_line", {"near byte", "must be one JSON object"}},
    {"{\"custom_id\":\"c1\"", NULL, "invalid_json_line", {"near byte"}},
    {"[1,2]", NULL, "invalid_json_line", {"an array of 2", "must be one JSON object"}},
    {"17", NULL, "invalid_json_line", {"it is 17"}},
    {"null", NULL, "invalid_json_line", {"it is null"}},
    {WITH("\"n\":1") " {}", NULL, "invalid_json_line", {"end of file expected"}},
    {WITH("\"n\":1,\"n\":1"), NULL, "invalid_json_line", {"duplicate object key", "without repeated keys"}},
    {WITH("\"seed\":9223372036854775808"), NULL, "invalid_json_line", {"too big integer"}},
    {WITH("\"temperature\":1e999"), NULL, "invalid_json_line", {"real number overflow"}},
    {WITH("\"temperature\":NaN"), NULL, "invalid_json_line", {"near"}},
    {WITH("\"user\":\"\xff\""), NULL, "invalid_json_line", {"near byte"}},
    // Around the body.
    {"{}", "custom_id", "missing_required_parameter", {"custom_id is missing"}},
    {"{\"custom_id\":null}", "custom_id", "missing_required_parameter", {"custom_id is null"}},
    {"{\"custom_id\":7}", "custom_id", "invalid_type", {"custom_id is 7", "up to 1024 bytes"}},
    {"{\"custom_id\":\"\"}", "custom_id", "invalid_value", {"custom_id is \"\""}},
    {"{\"custom_id\":\"a\\u0000b\"}", "custom_id", "invalid_value", {"without U+0000"}},
    {"{\"custom_id\":\"c1\",\"metod\":\"POST\"}",
     "metod",
     "unknown_parameter",
     {"unknown field \"metod\"", "custom_id, method, url, body"}},
    {"{\"custom_id\":\"c1\"}", "method", "missing_required_parameter", {"method is missing"}},
    {"{\"custom_id\":\"c1\",\"method\":\"GET\"}", "method", "invalid_value", {"method is \"GET\"", "\"POST\""}},
    {"{\"custom_id\":\"c1\",\"method\":1}", "method", "invalid_type", {"method is 1", "\"POST\""}},
    {"{\"custom_id\":\"c1\",\"method\":\"POST\"}", "url", "missing_required_parameter", {"url is missing"}},
    {"{\"custom_id\":\"c1\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\"}",
     "url",
     "invalid_value",
     {"/v1/chat/completions", "must be \"/v1/completions\""}},
    {"{\"custom_id\":\"c1\",\"method\":\"POST\",\"url\":\"/v1/completions\\u0000x\"}",
     "url",
     "invalid_value",
     {"must be \"/v1/completions\""}},
    {"{\"custom_id\":\"c1\",\"method\":\"POST\",\"url\":[]}", "url", "invalid_type", {"an array of 0"}},
    {"{\"custom_id\":\"c1\",\"method\":\"POST\",\"url\":\"/v1/completions\"}",
     "body",
     "missing_required_parameter",
     {"body is missing"}},
    {LINE("\"text\""), "body", "invalid_type", {"body is \"text\"", "an object"}},
    // Model and prompt.
    {LINE("{\"prompt\":\"p\"}"), "model", "missing_required_parameter", {"model is missing"}},
    {LINE("{\"model\":\"\",\"prompt\":\"p\"}"), "model", "invalid_value", {"non-empty string"}},
    {LINE("{\"model\":3,\"prompt\":\"p\"}"), "model", "invalid_type", {"model is 3"}},
    {LINE("{\"model\":\"m\"}"), "prompt", "missing_required_parameter", {"prompt is missing"}},
    {LINE("{\"model\":\"m\",\"prompt\":null}"), "prompt", "missing_required_parameter", {"prompt is null"}},
    {LINE("{\"model\":\"m\",\"prompt\":\"\"}"), "prompt", "invalid_value", {"non-empty string", "token ids"}},
    {LINE("{\"model\":\"m\",\"prompt\":[]}"), "prompt", "invalid_value", {"an array of 0", "token ids"}},
    {LINE("{\"model\":\"m\",\"prompt\":{}}"), "prompt", "invalid_type", {"an object of 0", "token ids"}},
    {LINE("{\"model\":\"m\",\"prompt\":[\"a\",\"b\"]}"), "prompt", "unsupported_value", {"one prompt a line"}},
    {LINE("{\"model\":\"m\",\"prompt\":[[1],[2]]}"), "prompt", "unsupported_value", {"one prompt a line"}},
    {LINE("{\"model\":\"m\",\"prompt\":[1,2.0]}"), "prompt", "invalid_type", {"prompt[1] is 2.0", "token id"}},
    {LINE("{\"model\":\"m\",\"prompt\":[1,-2]}"), "prompt", "invalid_value", {"prompt[1] is -2", "from 0"}},
    {LINE("{\"model\":\"m\",\"prompt\":[2147483648]}"), "prompt", "invalid_value", {"prompt[0] is 2147483648"}},
    {LINE("{\"model\":\"m\",\"promt\":\"p\"}"),
     "promt",
     "unknown_parameter",
     {"\"promt\"", "model, prompt, max_tokens"}},
    // Sampling.
    {WITH("\"messages\":[]"), "messages", "unknown_parameter", {"\"messages\"", "logit_bias"}},
    {WITH("\"max_tokens\":0"), "max_tokens", "invalid_value", {"max_tokens is 0", "from 1 to 2147483647"}},
    {WITH("\"max_tokens\":16.0"), "max_tokens", "invalid_type", {"max_tokens is 16.0", "an integer"}},
    {WITH("\"max_tokens\":\"16\""), "max_tokens", "invalid_type", {"max_tokens is \"16\""}},
    {WITH("\"max_tokens\":2147483648"), "max_tokens", "invalid_value", {"2147483648", "to 2147483647"}},
    {WITH("\"min_tokens\":-1"), "min_tokens", "invalid_value", {"min_tokens is -1", "from 0"}},
    {WITH("\"min_tokens\":17"), "min_tokens", "invalid_value", {"min_tokens is 17", "max_tokens, which is 16"}},
    {WITH("\"temperature\":-0.1"), "temperature", "invalid_value", {"temperature is -0.1", "from 0 to 2"}},
    {WITH("\"temperature\":2.1"), "temperature", "invalid_value", {"temperature is 2.1;", "from 0 to 2"}},
    {WITH("\"temperature\":true"), "temperature", "invalid_type", {"temperature is true", "a number"}},
    {WITH("\"top_k\":-2"), "top_k", "invalid_value", {"top_k is -2", "from -1"}},
    {WITH("\"top_k\":1.5"), "top_k", "invalid_type", {"top_k is 1.5", "an integer"}},
    {WITH("\"top_p\":0"), "top_p", "invalid_value", {"top_p is 0;", "above 0, up to 1"}},
    {WITH("\"top_p\":1e-60"), "top_p", "invalid_value", {"top_p is 1e-60", "above 0"}},
    {WITH("\"top_p\":1.01"), "top_p", "invalid_value", {"top_p is 1.01", "up to 1"}},
    {WITH("\"min_p\":1.5"), "min_p", "invalid_value", {"min_p is 1.5", "from 0 to 1"}},
    {WITH("\"min_p\":-1"), "min_p", "invalid_value", {"min_p is -1", "from 0 to 1"}},
    {WITH("\"n\":0"), "n", "invalid_value", {"n is 0", "from 1 to 128"}},
    {WITH("\"n\":129"), "n", "invalid_value", {"n is 129", "from 1 to 128"}},
    {WITH("\"n\":[1]"), "n", "invalid_type", {"n is an array of 1", "an integer"}},
    {WITH("\"seed\":1.5"), "seed", "invalid_type", {"seed is 1.5", "64-bit"}},
    {WITH("\"seed\":\"1\""), "seed", "invalid_type", {"seed is \"1\"", "64-bit"}},
    {WITH("\"stop\":\"\""), "stop", "invalid_value", {"stop is \"\"", "up to 16"}},
    {WITH("\"stop\":[\"a\",\"\"]"), "stop", "invalid_value", {"stop is \"\"", "non-empty"}},
    {WITH("\"stop\":[\"a\",3]"), "stop", "invalid_type", {"stop is 3", "non-empty"}},
    {WITH("\"stop\":4"), "stop", "invalid_type", {"stop is 4", "an array of up to 16"}},
    {WITH("\"stop\":\"a\\u0000\""), "stop", "invalid_value", {"without U+0000"}},
    {WITH("\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\",\"h\",\"i\",\"j\",\"k\",\"l\",\"m\",\"n\",\"o\",\"p\","
          "\"q\"]"),
     "stop",
     "invalid_value",
     {"an array of 17", "up to 16"}},
    {WITH("\"stop_token_ids\":3"), "stop_token_ids", "invalid_type", {"stop_token_ids is 3", "an array of token ids"}},
    {WITH("\"stop_token_ids\":[3,\"x\"]"), "stop_token_ids", "invalid_type", {"stop_token_ids[1] is \"x\""}},
    {WITH("\"stop_token_ids\":[-1]"), "stop_token_ids", "invalid_value", {"stop_token_ids[0] is -1"}},
    {WITH("\"ignore_eos\":1"), "ignore_eos", "invalid_type", {"ignore_eos is 1", "true or false"}},
    {WITH("\"logprobs\":21"), "logprobs", "invalid_value", {"logprobs is 21", "from 0 to 20"}},
    {WITH("\"logprobs\":-1"), "logprobs", "invalid_value", {"logprobs is -1", "from 0 to 20"}},
    {WITH("\"logprobs\":true"), "logprobs", "invalid_type", {"logprobs is true", "from 0 to 20"}},
    {WITH("\"presence_penalty\":2.5"), "presence_penalty", "invalid_value", {"is 2.5", "from -2 to 2"}},
    {WITH("\"presence_penalty\":\"1\""), "presence_penalty", "invalid_type", {"is \"1\"", "from -2 to 2"}},
    {WITH("\"frequency_penalty\":-3"), "frequency_penalty", "invalid_value", {"is -3", "from -2 to 2"}},
    {WITH("\"repetition_penalty\":0"), "repetition_penalty", "invalid_value", {"is 0;", "above 0, up to 10"}},
    {WITH("\"repetition_penalty\":11"), "repetition_penalty", "invalid_value", {"is 11", "up to 10"}},
    {WITH("\"logit_bias\":[5]"), "logit_bias", "invalid_type", {"an array of 1", "an object from token ids"}},
    {WITH("\"logit_bias\":{\"x\":1}"), "logit_bias", "invalid_value", {"key \"x\"", "in decimal"}},
    {WITH("\"logit_bias\":{\"-1\":1}"), "logit_bias", "invalid_value", {"key \"-1\"", "in decimal"}},
    {WITH("\"logit_bias\":{\"07\":1}"), "logit_bias", "invalid_value", {"key \"07\"", "in decimal"}},
    {WITH("\"logit_bias\":{\"\":1}"), "logit_bias", "invalid_value", {"key \"\"", "in decimal"}},
    {WITH("\"logit_bias\":{\"99999999999\":1}"), "logit_bias", "invalid_value", {"99999999999", "in decimal"}},
    {WITH("\"logit_bias\":{\"2147483648\":1}"), "logit_bias", "invalid_value", {"2147483648", "in decimal"}},
    {WITH("\"logit_bias\":{\"5\":\"1\"}"), "logit_bias", "invalid_type", {"logit_bias[\"5\"] is \"1\"", "-100 to 100"}},
    {WITH("\"logit_bias\":{\"5\":101}"), "logit_bias", "invalid_value", {"logit_bias[\"5\"] is 101", "-100 to 100"}},
    // OpenAI fields that are only accepted when they change nothing.
    {WITH("\"stream\":true"), "stream", "unsupported_value", {"stream is true", "must be false or absent"}},
    {WITH("\"stream\":0"), "stream", "invalid_type", {"stream is 0", "must be false or absent"}},
    {WITH("\"stream_options\":{}"), "stream_options", "unsupported_value", {"must be null or absent"}},
    {WITH("\"echo\":true"), "echo", "unsupported_value", {"echo is true", "must be false or absent"}},
    {WITH("\"suffix\":\"x\""), "suffix", "unsupported_value", {"suffix is \"x\"", "must be null or absent"}},
    {WITH("\"best_of\":2"), "best_of", "unsupported_value", {"best_of is 2", "equal to n, which is 1"}},
    {WITH("\"best_of\":2,\"n\":3"), "best_of", "unsupported_value", {"best_of is 2", "equal to n, which is 3"}},
    {WITH("\"best_of\":1.0"), "best_of", "invalid_type", {"best_of is 1.0", "equal to n"}},
    {WITH("\"user\":5"), "user", "invalid_type", {"user is 5", "a string"}},
};

static bool same(const char *a, const char *b) {
    return a && b ? strcmp(a, b) == 0 : a == b;
}

Test(request, bad_lines) {
    const size_t n = sizeof bad_lines / sizeof *bad_lines;
    cr_assert_geq(n, 60);
    for (size_t i = 0; i < n; i++) {
        const bad_line *bad = &bad_lines[i];
        ts_request *request = (ts_request *)&request;
        ts_request_error *error = NULL;
        const int64_t line = 1000 + (int64_t)i;
        cr_assert_eq(ts_request_parse(bad->text, strlen(bad->text), line, &request, &error), TS_OK, "%s", bad->text);
        cr_assert_null(request, "accepted: %s", bad->text);
        cr_assert_not_null(error, "%s", bad->text);
        char prefix[32];
        snprintf(prefix, sizeof prefix, "line %lld: ", (long long)line);
        cr_expect(strncmp(error->message, prefix, strlen(prefix)) == 0, "%s", error->message);
        cr_expect_eq(error->line, line);
        cr_expect(same(error->param, bad->param), "%s: param %s", error->message, error->param);
        cr_expect_str_eq(error->code, bad->code, "%s: code %s", error->message, error->code);
        // The id is known as soon as the line is JSON and has one that may be.
        const bool has_id = strstr(bad->text, "\"custom_id\":\"c1\"") && strcmp(bad->code, "invalid_json_line") != 0;
        cr_expect(same(error->custom_id, has_id ? "c1" : NULL), "%s: %s", error->message, error->custom_id);
        for (int j = 0; j < 2 && bad->says[j]; j++)
            cr_expect(strstr(error->message, bad->says[j]), "\"%s\" does not say \"%s\"", error->message, bad->says[j]);
        if (bad->param) // the field's own name is in the sentence
            cr_expect(strstr(error->message, bad->param), "%s", error->message);
        ts_request_error_free(error);
    }
}

static ts_request *parse_good(const char *text) {
    ts_request *request = NULL;
    ts_request_error *error = (ts_request_error *)&error;
    cr_assert_eq(ts_request_parse(text, strlen(text), 5, &request, &error), TS_OK);
    cr_assert_null(error, "%s", error ? error->message : "");
    cr_assert_not_null(request);
    return request;
}

static void expect_defaults(const ts_sampling_params *sampling) {
    cr_expect_eq(sampling->max_tokens, 16);
    cr_expect_eq(sampling->min_tokens, 0);
    cr_expect_eq(sampling->top_k, 0);
    cr_expect_eq(sampling->temperature, 1.0f);
    cr_expect_eq(sampling->top_p, 1.0f);
    cr_expect_eq(sampling->min_p, 0.0f);
    cr_expect_eq(sampling->presence_penalty, 0.0f);
    cr_expect_eq(sampling->frequency_penalty, 0.0f);
    cr_expect_eq(sampling->repetition_penalty, 1.0f);
    cr_expect_eq(sampling->n, 1);
    cr_expect_eq(sampling->seed, 0);
    cr_expect_eq(sampling->logprobs, -1);
    cr_expect_not(sampling->ignore_eos);
    cr_expect_eq(sampling->n_stop_ids, 0);
    cr_expect_eq(sampling->n_biases, 0);
    cr_expect_null(sampling->stop_ids);
    cr_expect_null(sampling->bias_ids);
    cr_expect_null(sampling->biases);
}

// Each leaves everything at its default: absent, null, neutral, or the default written out.
Test(request, defaults) {
    static const char *const lines[] = {
        LINE("{\"model\":\"m\",\"prompt\":\"p\"}"),
        WITH(
            "\"max_tokens\":null,\"min_tokens\":null,\"temperature\":null,\"top_k\":null,\"top_p\":null,\"min_p\":null,"
            "\"n\":null,\"seed\":null,\"stop\":null,\"stop_token_ids\":null,\"ignore_eos\":null,\"logprobs\":null,"
            "\"presence_penalty\":null,\"frequency_penalty\":null,\"repetition_penalty\":null,\"logit_bias\":null,"
            "\"best_of\":null,\"stream\":null,\"stream_options\":null,\"echo\":null,\"suffix\":null,\"user\":null"),
        WITH("\"stream\":false,\"echo\":false,\"best_of\":1,\"suffix\":null,\"user\":\"someone\",\"stop\":[],"
             "\"stop_token_ids\":[],\"logit_bias\":{},\"top_k\":-1"),
        WITH("\"max_tokens\":16,\"min_tokens\":0,\"temperature\":1,\"top_k\":0,\"top_p\":1,\"min_p\":0,\"n\":1,"
             "\"seed\":0,\"ignore_eos\":false,\"presence_penalty\":-0.0,\"frequency_penalty\":0,"
             "\"repetition_penalty\":1.0"),
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        ts_request *request = parse_good(lines[i]);
        expect_defaults(&request->sampling);
        cr_expect_eq(request->line, 5);
        cr_expect_str_eq(request->custom_id, "c1");
        cr_expect_str_eq(request->model, "m");
        cr_expect_str_eq(request->prompt_text, "p");
        cr_expect_eq(request->prompt_bytes, 1);
        cr_expect_null(request->prompt_ids);
        cr_expect_eq(request->n_prompt_ids, 0);
        cr_expect_null(request->stops);
        cr_expect_eq(request->n_stops, 0);
        ts_request_free(request);
    }
}

Test(request, every_field) {
    ts_request *request =
        parse_good(WITH("\"max_tokens\":100,\"min_tokens\":100,\"temperature\":0,\"top_k\":40,\"top_p\":0.5,"
                        "\"min_p\":0.25,\"n\":128,\"best_of\":128,\"seed\":-1,\"stop\":[\"a\",\"\\u00e9b\"],"
                        "\"stop_token_ids\":[3,0,2147483647],\"ignore_eos\":true,\"logprobs\":20,"
                        "\"presence_penalty\":-2,\"frequency_penalty\":2,\"repetition_penalty\":10,"
                        "\"logit_bias\":{\"0\":-100,\"50256\":2.5,\"2147483647\":100}"));
    const ts_sampling_params *sampling = &request->sampling;
    cr_expect_eq(sampling->max_tokens, 100);
    cr_expect_eq(sampling->min_tokens, 100);
    cr_expect_eq(sampling->temperature, 0.0f);
    cr_expect_eq(sampling->top_k, 40);
    cr_expect_eq(sampling->top_p, 0.5f);
    cr_expect_eq(sampling->min_p, 0.25f);
    cr_expect_eq(sampling->n, 128);
    cr_expect_eq(sampling->seed, UINT64_MAX);
    cr_expect_eq(sampling->logprobs, 20);
    cr_expect(sampling->ignore_eos);
    cr_expect_eq(sampling->presence_penalty, -2.0f);
    cr_expect_eq(sampling->frequency_penalty, 2.0f);
    cr_expect_eq(sampling->repetition_penalty, 10.0f);
    cr_assert_eq(request->n_stops, 2);
    cr_expect_str_eq(request->stops[0], "a");
    cr_expect_str_eq(request->stops[1], "\xc3\xa9"
                                        "b");
    cr_assert_eq(sampling->n_stop_ids, 3);
    cr_expect_eq(sampling->stop_ids[0], 3);
    cr_expect_eq(sampling->stop_ids[2], INT32_MAX);
    cr_assert_eq(sampling->n_biases, 3);
    for (int i = 0; i < 3; i++) {
        const int32_t id = sampling->bias_ids[i];
        cr_expect_eq(sampling->biases[i], id == 0 ? -100.0f : id == 50256 ? 2.5f : 100.0f);
    }
    ts_request_free(request);
}

Test(request, good_values) {
    ts_request *request = parse_good(WITH("\"seed\":9223372036854775807,\"stop\":\"\\n\",\"logprobs\":0"));
    cr_expect_eq(request->sampling.seed, (uint64_t)INT64_MAX);
    cr_expect_eq(request->sampling.logprobs, 0);
    cr_assert_eq(request->n_stops, 1);
    cr_expect_str_eq(request->stops[0], "\n");
    ts_request_free(request);

    request = parse_good(LINE("{\"prompt\":[5,0,2147483647],\"model\":\"m\"}"));
    cr_expect_null(request->prompt_text);
    cr_assert_eq(request->n_prompt_ids, 3);
    cr_expect_eq(request->prompt_ids[0], 5);
    cr_expect_eq(request->prompt_ids[2], INT32_MAX);
    ts_request_free(request);

    // U+0000 is a character like any other for a tokenizer of bytes; the prompt's end is prompt_bytes.
    request = parse_good(LINE("{\"model\":\"m\",\"prompt\":\"a\\u0000b\\ud83d\\ude00\"}"));
    cr_expect_eq(request->prompt_bytes, 7);
    cr_expect_arr_eq(request->prompt_text, "a\0b\xf0\x9f\x98\x80", 8);
    ts_request_free(request);
}

Test(request, custom_id_length) {
    char id[TS_CUSTOM_ID_BYTES_MAX + 2] = "", line[2 * TS_CUSTOM_ID_BYTES_MAX];
    for (int extra = 0; extra < 2; extra++) {
        memset(id, 'x', TS_CUSTOM_ID_BYTES_MAX + (size_t)extra);
        snprintf(line, sizeof line,
                 "{\"custom_id\":\"%s\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{\"model\":\"m\","
                 "\"prompt\":\"p\"}}",
                 id);
        ts_request *request;
        ts_request_error *error;
        cr_assert_eq(ts_request_parse(line, strlen(line), 1, &request, &error), TS_OK);
        cr_expect_eq(request != NULL, extra == 0);
        cr_expect_eq(error != NULL, extra == 1);
        if (error)
            cr_expect(strstr(error->message, "xxx...; must be"), "%s", error->message);
        ts_request_free(request);
        ts_request_error_free(error);
    }
}

Test(request, depth_is_limited) {
    enum { DEPTH = 1000000 };
    char *line = malloc(DEPTH);
    memset(line, '[', DEPTH);
    ts_request *request;
    ts_request_error *error;
    cr_assert_eq(ts_request_parse(line, DEPTH, 1, &request, &error), TS_OK);
    cr_assert_not_null(error);
    cr_expect_str_eq(error->code, "invalid_json_line");
    cr_expect(strstr(error->message, "depth"), "%s", error->message);
    ts_request_error_free(error);
    free(line);
}

Test(request, vocabulary) {
    static const struct {
        const char *text, *param, *says;
    } cases[] = {
        {LINE("{\"model\":\"m\",\"prompt\":[0,99]}"), NULL, NULL},
        {LINE("{\"model\":\"m\",\"prompt\":[0,100]}"), "prompt", "token id 100 at index 1; must be from 0 to 99"},
        {WITH("\"stop_token_ids\":[99,7]"), NULL, NULL},
        {WITH("\"stop_token_ids\":[99,101]"), "stop_token_ids", "token id 101 at index 1; must be from 0 to 99"},
        {WITH("\"logit_bias\":{\"99\":1}"), NULL, NULL},
        {WITH("\"logit_bias\":{\"100\":1}"), "logit_bias", "token id 100 at index 0; must be from 0 to 99"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ts_request *request = parse_good(cases[i].text);
        ts_request_error *error = (ts_request_error *)&error;
        cr_assert_eq(ts_request_check_vocabulary(request, 100, &error), TS_OK);
        cr_assert_eq(error != NULL, cases[i].param != NULL);
        if (error) {
            cr_expect_str_eq(error->param, cases[i].param);
            cr_expect_str_eq(error->custom_id, "c1");
            cr_expect(strstr(error->message, "line 5: ") == error->message);
            cr_expect(strstr(error->message, cases[i].says), "%s", error->message);
        }
        ts_request_error_free(error);
        ts_request_free(request);
    }
}
