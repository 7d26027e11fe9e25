#include "runtime/safetensors_write.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "runtime/safetensors.h"
#include "tests/runtime/scratch.h"

Test(safetensors_writer, the_reader_gets_back_what_was_written) {
    static const float logits[6] = {0, -1, 2.5f, 3e30f, -0.0f, 1e-40f};
    static const int32_t tokens[3] = {7, -8, 9};
    static const ts_tensor_spec specs[] = {
        {"logits", TS_F32, 2, {3, 2}}, {"tokens", TS_I32, 1, {3}}, {"none", TS_F16, 2, {0, 5}}, {"one", TS_U8, 0, {0}}};
    const scratch s = scratch_create();
    char path[300];
    snprintf(path, sizeof path, "%s/out.safetensors", s.dir);
    scratch_write(&s, "out.safetensors", "old", 3);
    ts_safetensors_writer *w = NULL;
    cr_assert_eq(ts_safetensors_writer_create(path, specs, 4, &w), TS_OK, "%s", ts_status_message());
    // Pieces need not end where tensors do.
    cr_assert_eq(ts_safetensors_writer_append(w, logits, 5), TS_OK);
    cr_assert_eq(ts_safetensors_writer_append(w, NULL, 0), TS_OK);
    char rest[19 + 12 + 1];
    memcpy(rest, (const char *)logits + 5, 19);
    memcpy(rest + 19, tokens, 12);
    rest[31] = 42;
    cr_assert_eq(ts_safetensors_writer_append(w, rest, sizeof rest), TS_OK);
    FILE *f = fopen(path, "rb"); // until finish the old file stands
    cr_expect(fgetc(f) == 'o' && fgetc(f) == 'l');
    fclose(f);
    cr_assert_eq(ts_safetensors_writer_finish(w), TS_OK, "%s", ts_status_message());
    cr_expect_eq(ts_safetensors_writer_append(w, rest, 0), TS_ERR_INVALID);
    cr_expect_eq(ts_safetensors_writer_finish(w), TS_ERR_INVALID);
    ts_safetensors_writer_free(w);
    cr_expect_eq(scratch_count_files(&s), 1);

    ts_safetensors *set = NULL;
    cr_assert_eq(ts_safetensors_open_file(path, &set), TS_OK, "%s", ts_status_message());
    cr_expect_eq(ts_safetensors_count(set), 4);
    const ts_safetensor *a = ts_safetensors_find(set, "logits"), *b = ts_safetensors_find(set, "tokens");
    cr_assert(a->dtype == TS_F32 && a->n_dims == 2 && a->shape[0] == 3 && a->shape[1] == 2);
    cr_expect_eq(memcmp(a->data, logits, sizeof logits), 0);
    cr_expect_eq((uintptr_t)a->data % 8, 0);
    cr_assert(b->dtype == TS_I32 && b->n_dims == 1 && b->shape[0] == 3);
    cr_expect_eq(memcmp(b->data, tokens, sizeof tokens), 0);
    cr_expect_eq(ts_safetensors_find(set, "none")->n_bytes, 0);
    cr_expect_eq(*(const unsigned char *)ts_safetensors_find(set, "one")->data, 42);
    ts_safetensors_free(set);
    scratch_remove(&s);
}

// Byte for byte, so that reader and writer cannot be wrong together.
Test(safetensors_writer, the_bytes_are_those_of_the_format) {
    static const char header[] = "{\"x\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[0,4]},"
                                 "\"y\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[4,5]}}";
    const size_t n_padded = (sizeof header - 1 + 7) / 8 * 8;
    char expected[256];
    memset(expected, 0, 8);
    expected[0] = (char)n_padded;
    memset(expected + 8, ' ', n_padded);
    memcpy(expected + 8, header, sizeof header - 1);
    memcpy(expected + 8 + n_padded, "\x80\x3f\x00\x40\xff", 5);

    const scratch s = scratch_create();
    char path[300], found[256];
    snprintf(path, sizeof path, "%s/out", s.dir);
    ts_safetensors_writer *w = NULL;
    const ts_tensor_spec specs[] = {{"x", TS_BF16, 2, {1, 2}}, {"y", TS_U8, 0, {0}}};
    cr_assert_eq(ts_safetensors_writer_create(path, specs, 2, &w), TS_OK, "%s", ts_status_message());
    cr_assert_eq(ts_safetensors_writer_append(w, "\x80\x3f\x00\x40\xff", 5), TS_OK);
    cr_assert_eq(ts_safetensors_writer_finish(w), TS_OK, "%s", ts_status_message());
    ts_safetensors_writer_free(w);
    FILE *f = fopen(path, "rb");
    cr_assert_eq(fread(found, 1, sizeof found, f), 8 + n_padded + 5);
    fclose(f);
    cr_expect_eq(memcmp(found, expected, 8 + n_padded + 5), 0);
    scratch_remove(&s);
}

Test(safetensors_writer, counts_the_bytes_and_cleans_up) {
    const scratch s = scratch_create();
    char path[300];
    snprintf(path, sizeof path, "%s/out", s.dir);
    const ts_tensor_spec spec = {"x", TS_U8, 1, {4}};
    ts_safetensors_writer *w = NULL, *other = NULL;
    cr_assert_eq(ts_safetensors_writer_create(path, &spec, 1, &w), TS_OK, "%s", ts_status_message());
    cr_assert_eq(ts_safetensors_writer_create(path, &spec, 1, &other), TS_OK, "two at once: %s", ts_status_message());
    cr_expect_eq(scratch_count_files(&s), 2);
    cr_assert_eq(ts_safetensors_writer_append(w, "abc", 3), TS_OK);
    cr_expect_eq(ts_safetensors_writer_finish(w), TS_ERR_INVALID);
    cr_expect_not_null(strstr(ts_status_message(), "3 bytes of data came; allowed: exactly the 4"), "%s",
                       ts_status_message());
    cr_expect_eq(ts_safetensors_writer_append(w, "de", 2), TS_ERR_INVALID);
    cr_expect_not_null(strstr(ts_status_message(), "allowed: 1 more"), "%s", ts_status_message());
    ts_safetensors_writer_free(other);
    cr_expect_eq(scratch_count_files(&s), 1);
    cr_assert_eq(ts_safetensors_writer_append(w, "d", 1), TS_OK);
    cr_expect_eq(ts_safetensors_writer_finish(w), TS_OK, "%s", ts_status_message());
    ts_safetensors_writer_free(w);
    ts_safetensors_writer_free(NULL);
    cr_expect_eq(access(path, R_OK), 0);

    char late[300]; // a directory that comes while the file is written: only the rename can tell
    snprintf(late, sizeof late, "%s/late", s.dir);
    cr_assert_eq(ts_safetensors_writer_create(late, &spec, 1, &w), TS_OK);
    cr_assert_eq(ts_safetensors_writer_append(w, "abcd", 4), TS_OK);
    cr_assert_eq(mkdir(late, 0700), 0);
    cr_expect_eq(ts_safetensors_writer_finish(w), TS_ERR_IO);
    cr_expect_eq(ts_safetensors_writer_finish(w), TS_ERR_IO);
    ts_safetensors_writer_free(w);
    scratch_remove(&s);
}

Test(safetensors_writer, refuses_specs_and_says_which) {
    static const struct {
        ts_tensor_spec specs[2];
        size_t n_specs;
        const char *says[2];
    } cases[] = {
        {{{"x", TS_U8, 1, {-1}}}, 1, {"'x'", "-1; allowed: >= 0"}},
        {{{"x", TS_U8, 9, {1}}}, 1, {"'x'", "9 dimensions; allowed: 0 to 8"}},
        {{{"x", TS_U8, -1, {1}}}, 1, {"'x'", "-1 dimensions"}},
        {{{"x", TS_N_DTYPES, 1, {1}}}, 1, {"'x'", "dtype 8"}},
        {{{"x", TS_F32, 2, {INT64_C(1) << 32, INT64_C(1) << 32}}}, 1, {"'x'", "2^63"}},
        {{{"x", TS_U8, 1, {INT64_MAX}}}, 1, {"'x'", "2^63"}},
        {{{"x", TS_U8, 1, {INT64_C(1) << 62}}, {"y", TS_U8, 1, {INT64_C(1) << 62}}}, 2, {"'y'", "2^63"}},
        {{{"x", TS_U8, 1, {1}}, {"x", TS_U8, 1, {1}}}, 2, {"'x'", "twice"}},
        {{{"__metadata__", TS_U8, 1, {1}}}, 1, {"__metadata__"}},
        {{{NULL, TS_U8, 1, {1}}}, 1, {"NULL"}},
        {{{"\xff", TS_U8, 1, {1}}}, 1, {"UTF-8"}},
    };
    const scratch s = scratch_create();
    char path[300];
    snprintf(path, sizeof path, "%s/out", s.dir);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ts_safetensors_writer *w = NULL;
        cr_expect_eq(ts_safetensors_writer_create(path, cases[i].specs, cases[i].n_specs, &w), TS_ERR_INVALID);
        cr_expect_null(w);
        cr_expect_eq(strncmp(ts_status_message(), path, strlen(path)), 0, "%s", ts_status_message());
        for (int j = 0; j < 2 && cases[i].says[j] != NULL; j++)
            cr_expect_not_null(strstr(ts_status_message(), cases[i].says[j]), "case %zu, '%s': %s", i, cases[i].says[j],
                               ts_status_message());
    }
    cr_expect_eq(scratch_count_files(&s), 0);
    snprintf(path, sizeof path, "%s/absent/out", s.dir);
    ts_safetensors_writer *w = NULL;
    cr_expect_eq(ts_safetensors_writer_create(path, cases[7].specs, 1, &w), TS_ERR_IO);
    cr_expect_not_null(strstr(ts_status_message(), path), "%s", ts_status_message());
    scratch_remove(&s);
}

Test(safetensors_writer, a_full_disk_is_an_error_and_stays_one) {
    const ts_tensor_spec spec = {"x", TS_U8, 1, {1 << 20}};
    const scratch s = scratch_create();
    char path[300];
    snprintf(path, sizeof path, "%s/out", s.dir);
    ts_safetensors_writer *w = NULL;
    char *block = calloc(1, 1 << 20);
    cr_assert_eq(ts_safetensors_writer_create(path, &spec, 1, &w), TS_OK, "%s", ts_status_message());
    // A limit on the size of files stands for the full disk.
    const struct rlimit limit = {1 << 16, RLIM_INFINITY};
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    cr_expect_eq(ts_safetensors_writer_append(w, block, 1 << 20), TS_ERR_IO);
    cr_expect_not_null(strstr(ts_status_message(), "byte 65536: cannot write"), "%s", ts_status_message());
    cr_expect_eq(ts_safetensors_writer_append(w, block, 1), TS_ERR_IO);
    cr_expect_eq(ts_safetensors_writer_finish(w), TS_ERR_IO);
    ts_safetensors_writer_free(w);
    free(block);
    cr_expect_eq(scratch_count_files(&s), 0);
    scratch_remove(&s);
}

// To put the finished file in the place of a device or a pipe would remove it.
Test(safetensors_writer, leaves_alone_what_is_no_ordinary_file) {
    const scratch s = scratch_create();
    char path[300];
    struct stat after;
    ts_safetensors_writer *w = NULL;
    snprintf(path, sizeof path, "%s/pipe", s.dir);
    cr_assert_eq(mkfifo(path, 0600), 0);
    const char *const paths[] = {path, s.dir};
    for (int i = 0; i < 2; i++) {
        cr_expect_eq(ts_safetensors_writer_create(paths[i], NULL, 0, &w), TS_ERR_INVALID);
        cr_expect_null(w);
        cr_expect_not_null(strstr(ts_status_message(), "is no ordinary file"), "%s", ts_status_message());
    }
    cr_expect(stat(path, &after) == 0 && S_ISFIFO(after.st_mode));
    cr_expect_eq(scratch_count_files(&s), 1);
    scratch_remove(&s);
}
