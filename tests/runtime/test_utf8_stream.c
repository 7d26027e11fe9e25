#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "runtime/utf8_stream.h"

static size_t unhex(const char *hex, char *out) {
    size_t n = strlen(hex) / 2;
    for (size_t i = 0; i < n; i++) {
        unsigned byte;
        cr_assert_eq(sscanf(hex + 2 * i, "%2x", &byte), 1);
        out[i] = (char)byte;
    }
    return n;
}

// Every case of utf8.json, in pushes of every size: what comes out is what Python's "replace" gives, each push stays
// within its stated room and ends between characters.
Test(utf8_stream, equals_python_replace_however_cut) {
    json_error_t error;
    json_t *cases = json_load_file(TS_SOURCE_DIR "/tests/runtime/tokenizers/utf8.json", 0, &error), *item;
    cr_assert(cases, "%s", error.text);
    cr_assert_gt(json_array_size(cases), 800);
    size_t index;
    json_array_foreach(cases, index, item) {
        char bytes[256], want[256], got[1024];
        const char *hex = json_string_value(json_array_get(item, 0));
        const size_t n = unhex(hex, bytes), n_want = unhex(json_string_value(json_array_get(item, 1)), want);
        for (size_t step = 1; step <= n + 1; step++) {
            ts_utf8_stream stream = {0};
            size_t n_got = 0, at;
            for (size_t i = 0; i < n; i += step) {
                const size_t n_push = i + step < n ? step : n - i;
                const size_t wrote = ts_utf8_stream_push(&stream, bytes + i, n_push, got + n_got);
                cr_assert_leq(wrote, TS_UTF8_STREAM_ROOM(n_push));
                n_got += wrote;
                cr_assert(ts_utf8_is_valid(got, n_got, &at), "%s in steps of %zu", hex, step);
            }
            n_got += ts_utf8_stream_flush(&stream, got + n_got);
            cr_assert(n_got == n_want && memcmp(got, want, n_want) == 0, "%s in steps of %zu", hex, step);
            cr_assert_eq(ts_utf8_stream_flush(&stream, got), 0);
        }
        size_t at;
        cr_assert_eq(ts_utf8_is_valid(bytes, n, &at), n == n_want && memcmp(bytes, want, n) == 0, "%s", hex);
    }
    json_decref(cases);
}

Test(utf8_stream, the_stated_room_is_reached) {
    ts_utf8_stream stream = {0};
    char out[TS_UTF8_STREAM_ROOM(2)];
    cr_assert_eq(ts_utf8_stream_push(&stream, "\xF0\x9F\x91", 3, out), 0);
    cr_assert_eq(ts_utf8_stream_push(&stream, "\xFF\xFF", 2, out), TS_UTF8_STREAM_ROOM(2));
}

Test(utf8_stream, validity_names_the_first_bad_sequence) {
    size_t at = 99;
    cr_assert(ts_utf8_is_valid("", 0, &at));
    cr_assert(!ts_utf8_is_valid("abcdefgh\xF0\x9F\x91x", 12, &at));
    cr_assert_eq(at, 8);
    cr_assert(!ts_utf8_is_valid("abcdefghijklmnopqrst\xE4\xB8", 22, &at));
    cr_assert_eq(at, 20);
    cr_assert(!ts_utf8_is_valid("\xC3\xA9\xED\xA0\x80", 5, &at)); // a surrogate
    cr_assert_eq(at, 2);
}
