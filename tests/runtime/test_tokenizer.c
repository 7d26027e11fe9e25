#include <criterion/criterion.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/tokenizer.h"
#include "runtime/utf8_stream.h"

#define DATA TS_SOURCE_DIR "/tests/runtime/tokenizers/"
static const char *const names[] = {"gpt2", "llama3", "qwen2"};
enum { N_NAMES = 3 };

static ts_tokenizer *open_named(const char *name) {
    char dir[1024];
    ts_tokenizer *tokenizer = NULL;
    snprintf(dir, sizeof dir, DATA "%s", name);
    cr_assert_eq(ts_tokenizer_create(dir, NULL, &tokenizer), TS_OK, "%s", ts_status_message());
    return tokenizer;
}

static json_t *load_cases(const char *name) {
    char path[1024];
    json_error_t error;
    snprintf(path, sizeof path, DATA "%s/cases.json", name);
    json_t *cases = json_load_file(path, 0, &error);
    cr_assert(cases, "%s: %s", path, error.text);
    return cases;
}

static void encode(const ts_tokenizer *t, const char *text, size_t n_bytes, bool special, int32_t **ids, size_t *n) {
    cr_assert_eq(ts_tokenizer_encode(t, text, n_bytes, special, ids, n), TS_OK, "%s", ts_status_message());
}

static bool same_ids(const int32_t *ids, size_t n_ids, const json_t *want) {
    if (n_ids != json_array_size(want))
        return false;
    for (size_t i = 0; i < n_ids; i++) {
        if (ids[i] != json_integer_value(json_array_get(want, i)))
            return false;
    }
    return true;
}

// The text of ids, pushed through a stream in steps of `step` bytes of each token (0: whole tokens). Malloc'd.
static char *decode(const ts_tokenizer *t, const int32_t *ids, size_t n_ids, size_t step, size_t *n_out) {
    ts_utf8_stream stream = {0};
    size_t n = 0, n_bytes, n_all = 0;
    for (size_t i = 0; i < n_ids; i++) {
        ts_tokenizer_token_bytes(t, ids[i], &n_bytes, NULL);
        n_all += n_bytes;
    }
    char *out = malloc(TS_UTF8_STREAM_ROOM(n_all));
    for (size_t i = 0; i < n_ids; i++) {
        const char *bytes = ts_tokenizer_token_bytes(t, ids[i], &n_bytes, NULL);
        for (size_t at = 0; at < n_bytes; at += step ? step : n_bytes) {
            const size_t n_push = !step ? n_bytes : at + step < n_bytes ? step : n_bytes - at;
            n += ts_utf8_stream_push(&stream, bytes + at, n_push, out + n);
        }
    }
    n += ts_utf8_stream_flush(&stream, out + n);
    *n_out = n;
    return out;
}

Test(tokenizer, ids_equal_the_reference_and_decode_back) {
    for (int k = 0; k < N_NAMES; k++) {
        ts_tokenizer *t = open_named(names[k]);
        json_t *file = load_cases(names[k]), *cases = json_object_get(file, "cases"), *item;
        size_t index, n_wrong = 0;
        cr_assert_geq(json_array_size(cases), 500);
        json_array_foreach(cases, index, item) {
            const json_t *text = json_array_get(item, 0), *decoded = json_array_get(item, 2);
            int32_t *ids = NULL;
            size_t n_ids = 0;
            encode(t, json_string_value(text), json_string_length(text), false, &ids, &n_ids);
            if (!same_ids(ids, n_ids, json_array_get(item, 1))) {
                n_wrong++;
                cr_log_error("%s case %zu: ids differ for \"%s\"", names[k], index, json_string_value(text));
            }
            const json_t *want = decoded ? decoded : text;
            for (size_t step = 0; step < 3; step++) {
                size_t n;
                char *got = decode(t, ids, n_ids, step, &n);
                if (n != json_string_length(want) || memcmp(got, json_string_value(want), n) != 0) {
                    n_wrong++;
                    cr_log_error("%s case %zu: decoded to \"%.*s\", not \"%s\"", names[k], index, (int)n, got,
                                 json_string_value(want));
                }
                free(got);
            }
            free(ids);
        }
        cr_assert_eq(n_wrong, 0, "%s: %zu wrong", names[k], n_wrong);
        json_decref(file);
        ts_tokenizer_free(t);
    }
}

Test(tokenizer, the_post_processor_frames_the_text) {
    for (int k = 0; k < N_NAMES; k++) {
        ts_tokenizer *t = open_named(names[k]);
        json_t *file = load_cases(names[k]), *item;
        size_t index;
        json_array_foreach(json_object_get(file, "framed"), index, item) {
            const char *text = json_string_value(json_array_get(item, 0));
            int32_t *ids = NULL;
            size_t n_ids = 0;
            encode(t, text, strlen(text), true, &ids, &n_ids);
            cr_assert(same_ids(ids, n_ids, json_array_get(item, 1)), "%s: \"%s\"", names[k], text);
            free(ids);
        }
        cr_assert_eq(index, 5);
        json_decref(file);
        ts_tokenizer_free(t);
    }
}

// The reference merges a piece on its own; the sum of all cases with a space between crosses every size of piece
// memory.
Test(tokenizer, remembered_pieces_do_not_change_ids) {
    for (int k = 0; k < N_NAMES; k++) {
        ts_tokenizer *t = open_named(names[k]);
        json_t *file = load_cases(names[k]), *item;
        size_t index, n_all = 0;
        int32_t *all = NULL, *one = NULL;
        char *text = calloc(1, 4 << 20), *end = text;
        json_array_foreach(json_object_get(file, "cases"), index, item) {
            const char *part = json_string_value(json_array_get(item, 0));
            if (!strstr(part, "<") && strlen(part) < 60) // joined by a token that keeps neighbours apart
                end += sprintf(end, "%s<|eot|>%s<think>", part, part);
        }
        encode(t, text, (size_t)(end - text), false, &all, &n_all);
        size_t at = 0;
        json_array_foreach(json_object_get(file, "cases"), index, item) {
            const char *part = json_string_value(json_array_get(item, 0));
            if (strstr(part, "<") || strlen(part) >= 60)
                continue;
            for (int twice = 0; twice < 2; twice++) {
                size_t n_one = 0;
                encode(t, part, strlen(part), false, &one, &n_one);
                cr_assert(at + n_one < n_all && (n_one == 0 || memcmp(all + at, one, n_one * sizeof *one) == 0),
                          "%s: \"%s\"", names[k], part);
                at += n_one + 1;
                free(one);
                one = NULL;
            }
        }
        cr_assert_eq(at, n_all);
        free(all);
        free(text);
        json_decref(file);
        ts_tokenizer_free(t);
    }
}

typedef struct part {
    const char *text;
    int n;
} part;

// The rule itself, slowly: of all neighbours with a merge take the lowest rank, the leftmost of equals, one at a time.
static size_t merge_slowly(json_t *merges, const char *text, part *parts) {
    size_t n = strlen(text);
    for (size_t i = 0; i < n; i++)
        parts[i] = (part){text + i, 1};
    for (;;) {
        size_t best = SIZE_MAX, where = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            char key[256];
            snprintf(key, sizeof key, "%.*s %.*s", parts[i].n, parts[i].text, parts[i + 1].n, parts[i + 1].text);
            const json_t *rank = json_object_get(merges, key);
            if (rank && (size_t)json_integer_value(rank) < best) {
                best = (size_t)json_integer_value(rank);
                where = i;
            }
        }
        if (best == SIZE_MAX)
            return n;
        parts[where].n += parts[where + 1].n;
        memmove(&parts[where + 1], &parts[where + 2], (n - where - 2) * sizeof *parts);
        n--;
    }
}

Test(tokenizer, long_pieces_merge_by_the_rule) {
    json_error_t error;
    json_t *file = json_load_file(DATA "gpt2/tokenizer.json", 0, &error), *merge;
    json_t *merges = json_object();
    size_t rank;
    cr_assert(file);
    json_array_foreach(json_object_get(json_object_get(file, "model"), "merges"), rank, merge)
        json_object_set_new(merges, json_string_value(merge), json_integer((json_int_t)rank));
    ts_tokenizer *t = open_named("gpt2");
    static part parts[1200];
    uint32_t seed = 12345;
    for (int round = 0; round < 20; round++) {
        char text[1201];
        const size_t n_text = 30 + (size_t)round * 58;
        for (size_t i = 0; i < n_text;) { // three letters in a row of a text full of merges
            seed = seed * 1664525u + 1013904223u;
            const char *from = &"theringandonesaterentheinouldingwas"[(seed >> 16) % 33];
            for (int k = 0; k < 3 && i < n_text; k++)
                text[i++] = from[k];
        }
        text[n_text] = '\0';
        const size_t n_want = merge_slowly(merges, text, parts);
        int32_t *ids = NULL;
        size_t n_ids = 0;
        encode(t, text, n_text, false, &ids, &n_ids);
        cr_assert_eq(n_ids, n_want);
        cr_assert_lt(n_ids, n_text * 3 / 4); // merges did happen
        for (size_t i = 0; i < n_ids; i++) {
            size_t n_bytes;
            const char *bytes = ts_tokenizer_token_bytes(t, ids[i], &n_bytes, NULL);
            cr_assert(n_bytes == (size_t)parts[i].n && memcmp(bytes, parts[i].text, n_bytes) == 0);
        }
        free(ids);
    }
    ts_tokenizer_free(t);
    json_decref(merges);
    json_decref(file);
}

// One piece of megabytes of each sort of character: every step is linear or n log n, and no library limit is met.
Test(tokenizer, pieces_of_megabytes, .timeout = 120) {
    static const char *const units[] = {" ", "\n", "a", "the", "中", "9", ".", "\xCC\x81", "\t \r\n", "<", " a"};
    for (int k = 0; k < N_NAMES; k++) {
        ts_tokenizer *t = open_named(names[k]);
        for (size_t u = 0; u < sizeof units / sizeof *units; u++) {
            const size_t n_unit = strlen(units[u]), n = (1 << 20) / n_unit * n_unit;
            char *text = malloc(n + 1);
            for (size_t i = 0; i < n; i += n_unit)
                memcpy(text + i, units[u], n_unit);
            int32_t *ids = NULL;
            size_t n_ids = 0, n_text;
            encode(t, text, n, false, &ids, &n_ids);
            char *back = decode(t, ids, n_ids, 0, &n_text);
            cr_assert(n_text == n && memcmp(back, text, n) == 0, "%s: %s", names[k], units[u]);
            free(back);
            free(ids);
            free(text);
        }
        ts_tokenizer_free(t);
    }
}

static void *encode_cases(void *tokenizer) {
    json_t *file = load_cases("qwen2"), *item;
    size_t index, n_wrong = 0;
    json_array_foreach(json_object_get(file, "cases"), index, item) {
        const json_t *text = json_array_get(item, 0);
        int32_t *ids = NULL;
        size_t n_ids = 0;
        if (ts_tokenizer_encode(tokenizer, json_string_value(text), json_string_length(text), false, &ids, &n_ids) !=
                TS_OK ||
            !same_ids(ids, n_ids, json_array_get(item, 1)))
            n_wrong++;
        free(ids);
    }
    json_decref(file);
    return (void *)n_wrong;
}

Test(tokenizer, threads_share_one_tokenizer) {
    ts_tokenizer *t = open_named("qwen2");
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, encode_cases, t), 0);
    for (int i = 0; i < 4; i++) {
        void *n_wrong;
        pthread_join(threads[i], &n_wrong);
        cr_assert_null(n_wrong);
    }
    ts_tokenizer_free(t);
}

Test(tokenizer, token_bytes_and_holes) {
    ts_tokenizer *t = open_named("llama3");
    size_t n = 99;
    bool special = true;
    const int32_t size = ts_tokenizer_vocab_size(t);
    cr_assert_gt(size, 850);
    ts_tokenizer_token_bytes(t, -1, &n, &special);
    cr_assert(n == 0 && !special);
    ts_tokenizer_token_bytes(t, size, &n, &special);
    cr_assert(n == 0 && !special);
    int n_special = 0, n_ordinary = 0;
    for (int32_t id = 0; id < size; id++) {
        const char *bytes = ts_tokenizer_token_bytes(t, id, &n, &special);
        n_special += special;
        n_ordinary += n > 0 && !special;
        if (n == 17 && memcmp(bytes, "<|begin_of_text|>", 17) == 0)
            cr_assert(special);
        if (n == 7 && memcmp(bytes, "<think>", 7) == 0)
            cr_assert(!special);
    }
    cr_assert_eq(n_special, 8);
    cr_assert_eq(n_special + n_ordinary, size);
    ts_tokenizer_free(t);
}

Test(tokenizer, invalid_text_is_refused_with_its_offset) {
    ts_tokenizer *t = open_named("gpt2");
    int32_t *ids = (int32_t *)&t;
    size_t n_ids = 7;
    cr_assert_eq(ts_tokenizer_encode(t, "abc\xC3(", 5, false, &ids, &n_ids), TS_ERR_INVALID);
    cr_assert(strstr(ts_status_message(), "byte 3"), "%s", ts_status_message());
    cr_assert(ids == (int32_t *)&t && n_ids == 7); // outputs are left alone
    ts_tokenizer_free(t);
}

Test(tokenizer, bytes) {
    ts_tokenizer *t = NULL;
    cr_assert_eq(ts_tokenizer_create("/nonexistent", "bytes", &t), TS_OK);
    cr_assert_eq(ts_tokenizer_vocab_size(t), 256);
    const char text[] = "a\xFF\x00\x80";
    int32_t *ids = NULL;
    size_t n_ids = 0, n_bytes;
    encode(t, text, 4, true, &ids, &n_ids);
    cr_assert_eq(n_ids, 4);
    for (size_t i = 0; i < 4; i++) {
        bool special;
        cr_assert_eq(ids[i], (uint8_t)text[i]);
        const char *bytes = ts_tokenizer_token_bytes(t, ids[i], &n_bytes, &special);
        cr_assert(n_bytes == 1 && bytes[0] == text[i]);
        cr_assert_eq(special, text[i] == 0);
    }
    ts_tokenizer_token_bytes(t, 256, &n_bytes, NULL);
    cr_assert_eq(n_bytes, 0);
    free(ids);
    ts_tokenizer_free(t);
}

Test(tokenizer, kinds_other_than_two_are_refused_by_name) {
    ts_tokenizer *t = NULL;
    cr_assert_eq(ts_tokenizer_create(DATA "gpt2", "sentencepiece", &t), TS_ERR_INVALID);
    cr_assert(strstr(ts_status_message(), "\"sentencepiece\"") && strstr(ts_status_message(), "\"bytes\""));
    cr_assert_eq(ts_tokenizer_create(DATA, NULL, &t), TS_ERR_IO);
    cr_assert(strstr(ts_status_message(), "tokenizer.json is missing"), "%s", ts_status_message());
    cr_assert_eq(ts_tokenizer_create(DATA, "tokenizer.json", &t), TS_ERR_IO);
    cr_assert_null(t);
}
