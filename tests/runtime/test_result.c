#include "runtime/result.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEXT(literal) .text = (char *)literal, .text_bytes = sizeof literal - 1

// Checks that it is one line, and parses it.
static json_t *parse_line(char *line, size_t n_bytes) {
    cr_assert_eq(strlen(line), n_bytes);
    cr_assert_eq(strchr(line, '\n'), line + n_bytes - 1, "one line feed, at the end");
    json_error_t error;
    json_t *root = json_loadb(line, n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    cr_assert_not_null(root, "%s: %s", error.text, line);
    free(line);
    return root;
}

static json_t *format(const ts_result *result) {
    char *line = NULL;
    size_t n_bytes = 0;
    cr_assert_eq(ts_result_format(result, &line, &n_bytes), TS_OK, "%s", ts_status_message());
    return parse_line(line, n_bytes);
}

// The value at a path of keys and, for arrays, digits.
static json_t *at(json_t *root, const char *path) {
    char keys[128];
    snprintf(keys, sizeof keys, "%s", path);
    for (char *rest = keys, *key; root && (key = strsep(&rest, "/"));)
        root = json_is_array(root) ? json_array_get(root, (size_t)atoi(key)) : json_object_get(root, key);
    cr_assert_not_null(root, "no %s", path);
    return root;
}

static const char *text_at(json_t *root, const char *path) {
    cr_assert(json_is_string(at(root, path)), "%s is not a string", path);
    return json_string_value(at(root, path));
}

static json_int_t integer_at(json_t *root, const char *path) {
    cr_assert(json_is_integer(at(root, path)), "%s is not an integer", path);
    return json_integer_value(at(root, path));
}

Test(result, fields) {
    ts_choice choices[2] = {
        {.index = 0, TEXT("line\nand \"quote\" \\ \xc3\xa9\xf0\x9f\x98\x80 \0 end\x01"), .stopped = true},
        {.index = 1, TEXT(""), .stopped = false},
    };
    const ts_result result = {.custom_id = "id \"1\"",
                              .model = "demo",
                              .prompt_tokens = 5000000000,
                              .completion_tokens = 7,
                              .created = 1700000000,
                              .choices = choices,
                              .n_choices = 2};
    json_t *root = format(&result);
    cr_expect_eq(json_object_size(root), 4);
    cr_expect_str_eq(text_at(root, "custom_id"), "id \"1\"");
    cr_expect(json_is_null(at(root, "error")));
    cr_expect_eq(integer_at(root, "response/status_code"), 200);
    cr_expect(strncmp(text_at(root, "id"), "batch_req_", 10) == 0);
    cr_expect(strncmp(text_at(root, "response/request_id"), "req_", 4) == 0);
    cr_expect(strncmp(text_at(root, "response/body/id"), "cmpl-", 5) == 0);
    cr_expect_str_eq(text_at(root, "response/body/object"), "text_completion");
    cr_expect_str_eq(text_at(root, "response/body/model"), "demo");
    cr_expect_eq(integer_at(root, "response/body/created"), 1700000000);
    cr_expect_eq(integer_at(root, "response/body/usage/prompt_tokens"), 5000000000);
    cr_expect_eq(integer_at(root, "response/body/usage/completion_tokens"), 7);
    cr_expect_eq(integer_at(root, "response/body/usage/total_tokens"), 5000000007);
    cr_assert_eq(json_array_size(at(root, "response/body/choices")), 2);
    json_t *choice = at(root, "response/body/choices/0");
    cr_expect_eq(json_object_size(choice), 4);
    cr_expect_eq(integer_at(choice, "index"), 0);
    cr_assert_eq(json_string_length(at(choice, "text")), choices[0].text_bytes);
    cr_expect_arr_eq(text_at(choice, "text"), choices[0].text, choices[0].text_bytes);
    cr_expect(json_is_null(at(choice, "logprobs")));
    cr_expect_str_eq(text_at(choice, "finish_reason"), "stop");
    cr_expect_eq(integer_at(root, "response/body/choices/1/index"), 1);
    cr_expect_str_eq(text_at(root, "response/body/choices/1/text"), "");
    cr_expect_str_eq(text_at(root, "response/body/choices/1/finish_reason"), "length");
    json_decref(root);
}

Test(result, ids_are_the_same_in_every_run) {
    ts_choice choice = {.text = (char *)""};
    ts_result result = {.custom_id = "a", .model = "m", .choices = &choice, .n_choices = 1};
    json_t *first = format(&result), *again = format(&result);
    result.custom_id = "b";
    json_t *other = format(&result);
    cr_expect(json_equal(first, again));
    cr_expect_str_neq(text_at(first, "id"), text_at(other, "id"));
    cr_expect_str_neq(text_at(first, "response/body/id"), text_at(other, "response/body/id"));
    // The hash is part of the format: an output can be compared with one from another machine.
    cr_expect_eq(strlen(text_at(first, "id")), strlen("batch_req_") + 32);
    json_decref(first);
    json_decref(again);
    json_decref(other);
}

Test(result, logprobs) {
    ts_top_logprob top0[] = {
        {TEXT("Once"), .logprob = -0.1f}, {TEXT(" "), .logprob = -2.5f}, {TEXT(" "), .logprob = -3.0f}};
    ts_top_logprob top1[] = {{TEXT("x"), .logprob = -0.25f}};
    ts_token_logprob tokens[] = {
        {TEXT("Once"), .logprob = -0.1f, .text_offset = 0, .top = top0, .n_top = 3},
        {TEXT("\xe2\x80"), .logprob = -1.5f, .text_offset = 4, .top = top1, .n_top = 1},
        {TEXT("\0"), .logprob = -INFINITY, .text_offset = 5},
        {TEXT("z"), .logprob = NAN, .text_offset = 6},
    };
    ts_choice choice = {.text = (char *)"", .n_tokens = 4, .logprobs = tokens};
    const ts_result result = {.custom_id = "a", .model = "m", .choices = &choice, .n_choices = 1};
    json_t *root = format(&result), *logprobs = at(root, "response/body/choices/0/logprobs");
    cr_expect_eq(json_object_size(logprobs), 4);
    static const char *const lists[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    for (int i = 0; i < 4; i++)
        cr_assert_eq(json_array_size(at(logprobs, lists[i])), 4, "%s", lists[i]);
    cr_expect_str_eq(text_at(logprobs, "tokens/0"), "Once");
    cr_expect_str_eq(text_at(logprobs, "tokens/1"), "bytes:\\xe2\\x80");
    cr_expect_str_eq(text_at(logprobs, "tokens/2"), "bytes:\\x00");
    for (int i = 0; i < 2; i++) // bitwise, whatever the number of digits
        cr_expect_eq((float)json_real_value(json_array_get(at(logprobs, "token_logprobs"), (size_t)i)),
                     tokens[i].logprob);
    cr_expect_eq(json_real_value(at(logprobs, "token_logprobs/2")), -9999.0);
    cr_expect_eq(json_real_value(at(logprobs, "token_logprobs/3")), -9999.0);
    cr_expect_eq(integer_at(logprobs, "text_offset/3"), 6);
    // Of two alternatives with one text the likelier stays; the chosen token is always there.
    cr_expect_eq(json_object_size(at(logprobs, "top_logprobs/0")), 2);
    cr_expect_eq((float)json_real_value(at(logprobs, "top_logprobs/0/ ")), -2.5f);
    cr_expect_eq(json_object_size(at(logprobs, "top_logprobs/1")), 2);
    cr_expect_eq((float)json_real_value(at(logprobs, "top_logprobs/1/x")), -0.25f);
    cr_expect_eq((float)json_real_value(at(logprobs, "top_logprobs/1/bytes:\\xe2\\x80")), -1.5f);
    cr_expect_eq(json_object_size(at(logprobs, "top_logprobs/2")), 1);
    json_decref(root);
}

Test(result, text_must_be_utf8) {
    ts_choice choice = {TEXT("\xff")};
    const ts_result result = {.custom_id = "a17", .model = "m", .choices = &choice, .n_choices = 1};
    char *line = NULL;
    size_t n_bytes = 3;
    cr_expect_eq(ts_result_format(&result, &line, &n_bytes), TS_ERR_INTERNAL);
    cr_expect(strstr(ts_status_message(), "a17"));
    cr_expect_null(line);
    cr_expect_eq(n_bytes, 3);
}

static json_t *format_error(int64_t number, const char *custom_id, const char *param, const char *text) {
    ts_request_error *error = NULL;
    char *line = NULL;
    size_t n_bytes = 0;
    cr_assert_eq(ts_request_error_create(number, custom_id, param, "invalid_value", &error, "%s", text), TS_OK);
    cr_assert_eq(ts_request_error_format(error, &line, &n_bytes), TS_OK, "%s", ts_status_message());
    ts_request_error_free(error);
    return parse_line(line, n_bytes);
}

Test(result, refusal) {
    json_t *root = format_error(9, "a", "top_p", "too \"large\"");
    cr_expect_eq(json_object_size(root), 4);
    cr_expect_str_eq(text_at(root, "custom_id"), "a");
    cr_expect(json_is_null(at(root, "error")));
    cr_expect_eq(integer_at(root, "response/status_code"), 400);
    cr_expect_eq(json_object_size(at(root, "response/body")), 1);
    json_t *error = at(root, "response/body/error");
    cr_expect_eq(json_object_size(error), 4);
    cr_expect_str_eq(text_at(error, "message"), "line 9: too \"large\"");
    cr_expect_str_eq(text_at(error, "type"), "invalid_request_error");
    cr_expect_str_eq(text_at(error, "param"), "top_p");
    cr_expect_str_eq(text_at(error, "code"), "invalid_value");
    json_t *later = format_error(10, "a", "top_p", "too \"large\"");
    cr_expect_str_neq(text_at(root, "id"), text_at(later, "id"), "a custom_id may be refused on two lines");
    json_decref(root);
    json_decref(later);

    root = format_error(2, NULL, NULL, "bytes \xff and \xc3\xa9");
    cr_expect(json_is_null(at(root, "custom_id")));
    cr_expect(json_is_null(at(root, "response/body/error/param")));
    cr_expect_str_eq(text_at(root, "response/body/error/message"), "line 2: bytes ? and ??");
    json_decref(root);
}
