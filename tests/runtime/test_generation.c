// A sample as it grows, with tokens that are bytes: what is shown, what ends it, and where tokens stand in the text.
#include "runtime/generation.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static ts_tokenizer *bytes;
static const int32_t eos[] = {0, 3};

static void create_tokenizer(void) {
    cr_assert_eq(ts_tokenizer_create(".", "bytes", &bytes), TS_OK, "%s", ts_status_message());
}

static void free_tokenizer(void) {
    ts_tokenizer_free(bytes);
}

TestSuite(generation, .init = create_tokenizer, .fini = free_tokenizer);

static ts_request request_of(int32_t max_tokens) {
    ts_request request = {.sampling = ts_sampling_params_default()};
    request.sampling.max_tokens = max_tokens;
    return request;
}

// Feeds text byte by byte until the generation ends; returns how many bytes it took.
static size_t feed(ts_generation *g, const char *text, size_t n) {
    size_t i = 0;
    while (i < n && !g->ended) {
        const ts_next_token token = {.token = (unsigned char)text[i++]};
        cr_assert_eq(ts_generation_accept(g, &token), TS_OK, "%s", ts_status_message());
    }
    return i;
}

typedef struct outcome {
    const char *shown;
    size_t n_taken;
    bool ended, stopped;
} outcome;

static void check(const ts_request *request, const char *text, size_t n, outcome expected) {
    ts_generation g;
    ts_generation_begin(&g, request, bytes, eos, 2, 5);
    const size_t n_taken = feed(&g, text, n);
    const ts_choice choice = ts_generation_choice(&g);
    cr_assert_eq(choice.index, 5);
    cr_assert_eq(g.ended, expected.ended);
    cr_assert_eq(choice.stopped, expected.stopped);
    cr_assert_eq(n_taken, expected.n_taken, "%zu tokens were taken, not %zu", n_taken, expected.n_taken);
    cr_assert_eq((int64_t)n_taken, g.n_tokens);
    cr_assert(choice.text_bytes == strlen(expected.shown) &&
                  memcmp(choice.text, expected.shown, choice.text_bytes) == 0,
              "\"%.*s\", not \"%s\"", (int)choice.text_bytes, choice.text, expected.shown);
    cr_assert(choice.logprobs == NULL && choice.n_tokens == 0);
    ts_generation_end(&g);
}

#define CHECK(request, text, ...) check(request, text, sizeof(text) - 1, (outcome)__VA_ARGS__)

Test(generation, max_tokens_ends_with_length) {
    const ts_request request = request_of(4);
    CHECK(&request, "abcdef", {"abcd", 4, true, false});
    CHECK(&request, "abc", {"abc", 3, false, false});
}

Test(generation, end_of_text_is_not_shown) {
    const ts_request request = request_of(10);
    CHECK(&request, "ab\0cd", {"ab", 3, true, true});
    CHECK(&request, "ab\3cd", {"ab", 3, true, true}); // the second of two ids
    CHECK(&request, "\0", {"", 1, true, true});
}

Test(generation, end_of_text_as_the_last_token_is_a_stop) {
    const ts_request request = request_of(3);
    CHECK(&request, "ab\0", {"ab", 3, true, true});
}

Test(generation, end_of_text_may_be_ignored) {
    ts_request request = request_of(5);
    request.sampling.ignore_eos = true;
    CHECK(&request, "a\0b\0cd", {"abc", 5, true, false}); // a mark, not text
}

Test(generation, stop_tokens_end_and_are_not_shown) {
    int32_t ids[] = {'x', 'y'};
    ts_request request = request_of(10);
    request.sampling.stop_ids = ids;
    request.sampling.n_stop_ids = 2;
    CHECK(&request, "abyx", {"ab", 3, true, true});
    request.sampling.ignore_eos = true; // says nothing of them
    CHECK(&request, "ab\0xy", {"ab", 4, true, true});
}

Test(generation, end_of_text_named_as_a_stop_token_ends_although_ignored) {
    int32_t ids[] = {0};
    ts_request request = request_of(10);
    request.sampling.stop_ids = ids;
    request.sampling.n_stop_ids = 1;
    request.sampling.ignore_eos = true;
    CHECK(&request, "ab\0cd", {"ab", 3, true, true});
}

static ts_request stopping_at(char **stops, size_t n) {
    ts_request request = request_of(100);
    request.stops = stops;
    request.n_stops = n;
    return request;
}

Test(generation, a_stop_string_may_lie_over_several_tokens) {
    char *stops[] = {"END"};
    const ts_request request = stopping_at(stops, 1);
    CHECK(&request, "the END of", {"the ", 7, true, true});
    CHECK(&request, "E EN EEND", {"E EN E", 9, true, true}); // beginnings of it are text
    CHECK(&request, "EN", {"EN", 2, false, false});
}

Test(generation, a_stop_string_at_the_start_leaves_nothing) {
    char *stops[] = {"ab"};
    const ts_request request = stopping_at(stops, 1);
    CHECK(&request, "abc", {"", 2, true, true});
}

Test(generation, a_stop_string_that_overlaps_itself) {
    char *stops[] = {"aab"};
    const ts_request request = stopping_at(stops, 1);
    CHECK(&request, "aaaab", {"aa", 5, true, true});
}

Test(generation, the_stop_string_that_is_complete_first_wins) {
    char *stops[] = {"cdef", "d", "zz"};
    const ts_request request = stopping_at(stops, 3);
    CHECK(&request, "abcdef", {"abc", 4, true, true});
}

Test(generation, of_stop_strings_complete_at_once_the_one_that_begins_first_wins) {
    char *stops[] = {"de", "bcde", "e"};
    const ts_request request = stopping_at(stops, 3);
    CHECK(&request, "abcdef", {"a", 5, true, true});
}

Test(generation, a_stop_string_with_the_last_token_is_a_stop) {
    char *stops[] = {"cd"};
    ts_request request = stopping_at(stops, 1);
    request.sampling.max_tokens = 4;
    CHECK(&request, "abcd", {"ab", 4, true, true});
}

Test(generation, a_stop_string_of_whole_characters) {
    char *stops[] = {"\xe2\x82\xac"}; // the euro sign
    const ts_request request = stopping_at(stops, 1);
    CHECK(&request,
          "a\xe2\x82\xac"
          "b",
          {"a", 4, true, true});
    CHECK(&request, "\xe2\x82\xad\xe2\x82\xac", {"\xe2\x82\xad", 6, true, true}); // a neighbour is not it
}

Test(generation, a_character_is_shown_when_it_is_whole) {
    const ts_request request = request_of(100);
    ts_generation g;
    ts_generation_begin(&g, &request, bytes, eos, 2, 0);
    static const size_t shown[] = {0, 0, 0, 4, 5};
    for (size_t i = 0; i < 5; i++) {
        feed(&g, "\xf0\x9f\x98\x80!" + i, 1);
        cr_assert_eq(g.text_bytes, shown[i], "after byte %zu: %zu bytes", i, g.text_bytes);
    }
    cr_assert_eq(g.text_points, 2);
    ts_generation_end(&g);
}

Test(generation, a_character_left_unfinished_becomes_one_replacement) {
    const ts_request request = request_of(3);
    CHECK(&request, "a\xf0\x9f", {"a\xef\xbf\xbd", 3, true, false});
    CHECK(&request, "\xf0\x9f\0", {"\xef\xbf\xbd", 3, true, true});
    CHECK(&request,
          "\xff"
          "bc",
          {"\xef\xbf\xbd"
           "bc",
           3, true, false});
}

// What was held back when the text ends may complete a stop string.
Test(generation, a_stop_string_of_the_replacement) {
    char *stops[] = {"a\xef\xbf\xbd"};
    ts_request request = stopping_at(stops, 1);
    request.sampling.max_tokens = 3;
    CHECK(&request, "xa\xe2", {"x", 3, true, true});
}

Test(generation, long_texts) {
    ts_request request = request_of(100000);
    ts_generation g;
    ts_generation_begin(&g, &request, bytes, eos, 2, 0);
    for (int i = 0; i < 100000; i++)
        feed(&g, "x", 1);
    cr_assert(g.ended && g.text_bytes == 100000 && g.text_points == 100000);
    cr_assert_eq(strspn(g.text, "x"), 100000);
    ts_generation_end(&g);
}

// Offsets count code points of what had been shown before the token; a piece of a character keeps its bytes.
Test(generation, log_probabilities_stand_where_their_tokens_do) {
    static const char text[] = "\xc3\xa9"
                               "a\xe2\x82\xac\0";
    static const int64_t offsets[] = {0, 0, 1, 2, 2, 2, 3};
    ts_request request = request_of(100);
    request.sampling.logprobs = 2;
    ts_generation g;
    ts_generation_begin(&g, &request, bytes, eos, 2, 0);
    for (int i = 0; i < 7; i++) {
        const ts_next_token token = {
            .token = (unsigned char)text[i],
            .logprob = -0.5 * i,
            .n_top = 2,
            .top = {{0xe2, -0.25}, {'b', -1.5}},
        };
        cr_assert(!g.ended);
        cr_assert_eq(ts_generation_accept(&g, &token), TS_OK);
    }
    const ts_choice choice = ts_generation_choice(&g);
    cr_assert(choice.stopped);
    cr_assert_eq(choice.n_tokens, 7); // the end of text too
    for (int i = 0; i < 7; i++) {
        const ts_token_logprob *entry = &choice.logprobs[i];
        cr_assert_eq(entry->text_offset, offsets[i], "token %d: offset %lld", i, (long long)entry->text_offset);
        cr_assert_eq(entry->logprob, -0.5f * (float)i);
        cr_assert(i == 6 || (entry->text_bytes == 1 && entry->text[0] == text[i]), "token %d", i);
        cr_assert_eq(entry->n_top, 2);
        cr_assert(entry->top[0].text_bytes == 1 && entry->top[0].text[0] == '\xe2' && entry->top[0].logprob == -0.25f);
        cr_assert(entry->top[1].text_bytes == 1 && entry->top[1].text[0] == 'b' && entry->top[1].logprob == -1.5f);
    }
    ts_generation_end(&g);
}

Test(generation, log_probabilities_without_alternatives) {
    ts_request request = request_of(40);
    request.sampling.logprobs = 0;
    ts_generation g;
    ts_generation_begin(&g, &request, bytes, eos, 2, 0);
    feed(&g, "0123456789012345678901234567890123456789", 40); // more than the first room for them
    const ts_choice choice = ts_generation_choice(&g);
    cr_assert_eq(choice.n_tokens, 40);
    cr_assert(choice.logprobs[39].n_top == 0 && choice.logprobs[39].text[0] == '9');
    cr_assert_eq(choice.logprobs[39].text_offset, 39);
    ts_generation_end(&g);
}
