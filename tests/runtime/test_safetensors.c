#include "runtime/safetensors.h"

#include <criterion/criterion.h>
#include <sys/stat.h>

#include "tests/runtime/scratch.h"

// Length, header, then n_data bytes 0, 1, 2, ... of data. *out is the caller's to free.
static size_t compose(const char *header, size_t n_header, size_t n_data, char **out) {
    const uint64_t length = n_header;
    char *bytes = malloc(8 + n_header + n_data);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, n_header);
    for (size_t i = 0; i < n_data; i++)
        bytes[8 + n_header + i] = (char)i;
    *out = bytes;
    return 8 + n_header + n_data;
}

static const char *write_file(const scratch *s, const char *name, const char *header, size_t n_data) {
    char *bytes;
    const size_t n = compose(header, strlen(header), n_data, &bytes);
    const char *path = scratch_write(s, name, bytes, n);
    free(bytes);
    return path;
}

// What must hold for a set that opened, whatever the files were. Touches every byte of data.
static void check_sane(const ts_safetensors *set, size_t n_data_bytes) {
    size_t n_bytes = 0;
    unsigned sum = 0;
    for (size_t i = 0; i < ts_safetensors_count(set); i++) {
        const ts_safetensor *t = ts_safetensors_at(set, i);
        size_t expected = ts_dtype_bytes(t->dtype);
        cr_assert(t->n_dims >= 0 && t->n_dims <= TS_SAFETENSORS_MAX_DIMS);
        for (int j = 0; j < t->n_dims; j++) {
            cr_assert_geq(t->shape[j], 0);
            expected *= (size_t)t->shape[j];
        }
        cr_assert_eq(t->n_bytes, expected);
        cr_assert_not_null(t->data);
        cr_assert(i == 0 || strcmp(ts_safetensors_at(set, i - 1)->name, t->name) < 0);
        cr_assert_eq(ts_safetensors_find(set, t->name), t);
        for (size_t j = 0; j < t->n_bytes; j++)
            sum += ((const unsigned char *)t->data)[j];
        n_bytes += t->n_bytes;
    }
    cr_assert_eq(n_bytes, n_data_bytes);
    cr_assert_lt(sum, 256u * (n_bytes + 1));
}

// `path` is refused with that code, in a sentence that begins with prefix and contains all of `says`.
static void expect_refused(ts_status status, ts_status code, const ts_safetensors *set, const char *label,
                           const char *prefix, const char *const *says, size_t n_says) {
    const char *message = ts_status_message();
    cr_expect_eq(status, code, "%s: status %s, wanted %s: %s", label, ts_status_name(status), ts_status_name(code),
                 message);
    cr_expect_null(set, "%s: the output was set", label);
    cr_expect_eq(strncmp(message, prefix, strlen(prefix)), 0, "%s: no '%s' in front: %s", label, prefix, message);
    for (size_t i = 0; i < n_says && says[i] != NULL; i++)
        cr_expect_not_null(strstr(message, says[i]), "%s: no '%s' in: %s", label, says[i], message);
}

// ---- what must load

Test(safetensors, reads_every_dtype_shape_and_byte) {
    static const char header[] =
        "{\"__metadata__\": {\"format\": \"pt\"},"
        "\"w\": {\"dtype\": \"BF16\", \"shape\": [2, 3], \"data_offsets\": [9, 21]},"
        "\"b\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]},"
        "\"h\": {\"dtype\": \"F16\", \"shape\": [1, 1, 1, 1, 1, 1, 1, 2], \"data_offsets\": [21, 25]},"
        "\"none\": {\"dtype\": \"F64\", \"shape\": [4, 0], \"data_offsets\": [9, 9]},"
        "\"u\": {\"data_offsets\": [8, 9], \"shape\": [], \"dtype\": \"U8\"},"
        "\"i\": {\"dtype\": \"I32\", \"shape\": [1], \"data_offsets\": [25, 29]},"
        "\"j\": {\"dtype\": \"I64\", \"shape\": [1], \"data_offsets\": [29, 37]},"
        "\"d\": {\"dtype\": \"F64\", \"shape\": [1], \"data_offsets\": [37, 45]},"
        "\"8\": {\"dtype\": \"F8_E4M3\", \"shape\": [3], \"data_offsets\": [45, 48]}}   ";
    static const struct {
        const char *name;
        ts_dtype dtype;
        int n_dims;
        int64_t first, last;
        size_t begin, n_bytes;
    } expected[] = {
        // in name order
        {"8", TS_FP8_E4M3, 1, 3, 3, 45, 3}, {"b", TS_F32, 1, 2, 2, 0, 8},  {"d", TS_F64, 1, 1, 1, 37, 8},
        {"h", TS_F16, 8, 1, 2, 21, 4},      {"i", TS_I32, 1, 1, 1, 25, 4}, {"j", TS_I64, 1, 1, 1, 29, 8},
        {"none", TS_F64, 2, 4, 0, 9, 0},    {"u", TS_U8, 0, 0, 0, 8, 1},   {"w", TS_BF16, 2, 2, 3, 9, 12},
    };
    const scratch s = scratch_create();
    const char *path = write_file(&s, "all.safetensors", header, 48);
    ts_safetensors *set = NULL;
    cr_assert_eq(ts_safetensors_open_file(path, &set), TS_OK, "%s", ts_status_message());
    cr_assert_eq(ts_safetensors_count(set), sizeof expected / sizeof *expected);
    for (size_t i = 0; i < ts_safetensors_count(set); i++) {
        const ts_safetensor *t = ts_safetensors_at(set, i);
        cr_expect_str_eq(t->name, expected[i].name);
        cr_expect_str_eq(t->path, path);
        cr_expect(t->dtype == expected[i].dtype && t->n_dims == expected[i].n_dims, "%s", t->name);
        if (t->n_dims > 0)
            cr_expect(t->shape[0] == expected[i].first && t->shape[t->n_dims - 1] == expected[i].last, "%s", t->name);
        cr_assert_eq(t->n_bytes, expected[i].n_bytes, "%s", t->name);
        for (size_t j = 0; j < t->n_bytes; j++)
            cr_expect_eq(((const unsigned char *)t->data)[j], expected[i].begin + j, "%s[%zu]", t->name, j);
    }
    check_sane(set, 48);
    cr_expect_null(ts_safetensors_find(set, "x"));
    cr_expect_null(ts_safetensors_find(set, ""));
    cr_expect_null(ts_safetensors_find(set, "__metadata__"));
    ts_safetensors_free(set);
    ts_safetensors_free(NULL);
    scratch_remove(&s);
}

Test(safetensors, a_file_without_tensors_is_fine) {
    const scratch s = scratch_create();
    ts_safetensors *set = NULL;
    cr_assert_eq(ts_safetensors_open_file(write_file(&s, "a", "{}", 0), &set), TS_OK, "%s", ts_status_message());
    cr_expect_eq(ts_safetensors_count(set), 0);
    cr_expect_null(ts_safetensors_find(set, "a"));
    ts_safetensors_free(set);
    scratch_remove(&s);
}

Test(safetensors, many_tensors_are_found_by_name) {
    enum { N = 20000 };
    const scratch s = scratch_create();
    char *header = malloc(N * 80), name[16];
    size_t n = (size_t)sprintf(header, "{");
    for (int i = 0; i < N; i++)
        n += (size_t)sprintf(header + n, "%s\"t%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
                             i ? "," : "", i, N - 1 - i, N - i);
    sprintf(header + n, "}");
    ts_safetensors *set = NULL;
    cr_assert_eq(ts_safetensors_open_file(write_file(&s, "a", header, N), &set), TS_OK, "%s", ts_status_message());
    cr_assert_eq(ts_safetensors_count(set), N);
    for (int i = 0; i < N; i++) {
        sprintf(name, "t%d", i);
        const ts_safetensor *t = ts_safetensors_find(set, name);
        cr_assert_not_null(t, "%s", name);
        cr_assert_eq(*(const unsigned char *)t->data, (unsigned char)(N - 1 - i));
    }
    ts_safetensors_free(set);
    free(header);
    scratch_remove(&s);
}

#define A_8    "\"a\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}"
#define B_4    "\"b\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [8, 12]}"
#define B_ONLY "{\"b\": {\"dtype\": \"F16\", \"shape\": [3, 1], \"data_offsets\": [0, 6]}}"

Test(safetensors, reads_an_index_and_its_shards) {
    static const char index[] = "{\"metadata\": {\"total_size\": 1}, \"weight_map\": "
                                "{\"b\": \"model-2.safetensors\", \"a\": \"model-1.safetensors\"}}";
    const scratch s = scratch_create();
    write_file(&s, "model-1.safetensors", "{" A_8 "}", 8);
    write_file(&s, "model-2.safetensors", B_ONLY, 6);
    scratch_write(&s, "model.safetensors.index.json", index, strlen(index));
    ts_safetensors *set = NULL;
    cr_assert_eq(ts_safetensors_open_model(s.dir, &set), TS_OK, "%s", ts_status_message());
    check_sane(set, 14);
    cr_assert_eq(ts_safetensors_count(set), 2);
    const ts_safetensor *a = ts_safetensors_find(set, "a"), *b = ts_safetensors_find(set, "b");
    cr_expect_not_null(strstr(a->path, "model-1.safetensors"));
    cr_expect_not_null(strstr(b->path, "model-2.safetensors"));
    cr_expect(b->dtype == TS_F16 && b->n_dims == 2 && b->shape[0] == 3 && b->n_bytes == 6);
    ts_safetensors_free(set);

    // A single file beside the index wins, and the index is not even read.
    write_file(&s, "model.safetensors", "{" A_8 "," B_4 "}", 12);
    scratch_write(&s, "model.safetensors.index.json", "broken", 6);
    cr_assert_eq(ts_safetensors_open_model(s.dir, &set), TS_OK, "%s", ts_status_message());
    cr_expect_eq(ts_safetensors_find(set, "b")->dtype, TS_F32);
    ts_safetensors_free(set);
    scratch_remove(&s);
}

// ---- what must not: headers

#define T(fields) "{\"first.weight\": {" fields "}}"
#define U8(name, begin, end, n)                                                                                        \
    "\"" name "\": {\"dtype\": \"U8\", \"shape\": [" n "], \"data_offsets\": [" begin ", " end "]}"
#define DTYPES "allowed: F32, BF16, F16, F64, I32, I64, U8, F8_E4M3"

static const struct {
    const char *header;
    size_t n_data;
    ts_status code;
    const char *says[3];
} hostile[] = {
    // JSON
    {"{", 0, TS_ERR_FORMAT, {"line 1", "byte 9"}},
    {"{\"a\": ", 0, TS_ERR_FORMAT, {"line 1", "byte 14"}},
    {"{}{}", 0, TS_ERR_FORMAT, {"line 1", "end of file expected"}},
    {"{} x", 0, TS_ERR_FORMAT, {"line 1"}},
    {"{\"a\\u0000b\": {}}", 0, TS_ERR_FORMAT, {"line 1", "a\\u0000b"}},
    {"{\"a\\ud800\": {}}", 0, TS_ERR_FORMAT, {"line 1", "a\\ud800"}},
    {"{\"a\xff\": {}}", 0, TS_ERR_FORMAT, {"UTF-8", "{\"a"}},
    {"{\"a\nb\": {}}", 0, TS_ERR_FORMAT, {"unexpected newline", "{\"a"}},
    {"{\"a\x01\": {}}", 0, TS_ERR_FORMAT, {"control character", "{\"a"}},
    {"{'a': {}}", 0, TS_ERR_FORMAT, {"line 1"}},
    {"{" A_8 "," A_8 "}", 8, TS_ERR_FORMAT, {"duplicate", "\"a\""}},
    {"{" U8("model.layers.0.self_attn.q_proj.weight", "0", "1", "1") "," U8("model.layers.0.self_attn.q_proj.weight",
                                                                            "1", "2", "1") "}",
     2,
     TS_ERR_FORMAT,
     {"duplicate", "model.layers.0.self_attn.q_proj.weight"}},
    {T("\"dtype\": \"U8\", \"dtype\": \"U8\", \"shape\": [], \"data_offsets\": [0, 1]"),
     1,
     TS_ERR_FORMAT,
     {"duplicate", "\"dtype\""}},
    {"{\"__metadata__\": {\"k\": \"1\", \"k\": \"2\"}}", 0, TS_ERR_FORMAT, {"duplicate", "\"k\""}},
    {"{\"__metadata__\": {}, \"__metadata__\": {}}", 0, TS_ERR_FORMAT, {"duplicate", "__metadata__"}},
    // metadata
    {"{\"__metadata__\": [\"pt\"]}", 0, TS_ERR_FORMAT, {"__metadata__ is [\"pt\"]", "an object of strings"}},
    {"{\"__metadata__\": {\"format\": 5}}", 0, TS_ERR_FORMAT, {"__metadata__", "'format' is 5", "a string"}},
    {"{\"__metadata__\": {\"format\": {}}}", 0, TS_ERR_FORMAT, {"'format' is {}", "a string"}},
    {"{\"__metadata__\": null}", 0, TS_ERR_FORMAT, {"__metadata__ is null", "an object of strings"}},
    // a tensor's object
    {"{\"first.weight\": null}", 0, TS_ERR_FORMAT, {"'first.weight' is null", "\"dtype\", \"shape\""}},
    {"{\"first.weight\": []}", 0, TS_ERR_FORMAT, {"'first.weight' is []", "\"dtype\", \"shape\""}},
    {T(""), 0, TS_ERR_FORMAT, {"'first.weight' is {}", "\"dtype\", \"shape\""}},
    {T("\"shape\": [], \"data_offsets\": [0, 1]"), 1, TS_ERR_FORMAT, {"'first.weight'", "\"dtype\""}},
    {T("\"dtype\": \"U8\", \"data_offsets\": [0, 1]"), 1, TS_ERR_FORMAT, {"'first.weight'", "\"shape\""}},
    {T("\"dtype\": \"U8\", \"shape\": []"), 1, TS_ERR_FORMAT, {"'first.weight'", "\"data_offsets\""}},
    {T("\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": [0, 1], \"strides\": []"),
     1,
     TS_ERR_FORMAT,
     {"'first.weight'", "strides", "no other key"}},
    // dtype
    {T("\"dtype\": 4, \"shape\": [], \"data_offsets\": [0, 1]"), 1, TS_ERR_FORMAT, {"'first.weight'", "dtype is 4"}},
    {T("\"dtype\": \"F8_E5M2\", \"shape\": [], \"data_offsets\": [0, 1]"),
     1,
     TS_ERR_UNSUPPORTED,
     {"'first.weight'", "dtype is \"F8_E5M2\"", DTYPES}},
    {T("\"dtype\": \"I16\", \"shape\": [], \"data_offsets\": [0, 2]"), 2, TS_ERR_UNSUPPORTED, {"\"I16\"", DTYPES}},
    {T("\"dtype\": \"BOOL\", \"shape\": [], \"data_offsets\": [0, 1]"), 1, TS_ERR_UNSUPPORTED, {"\"BOOL\"", DTYPES}},
    {T("\"dtype\": \"f32\", \"shape\": [], \"data_offsets\": [0, 4]"), 4, TS_ERR_UNSUPPORTED, {"\"f32\"", DTYPES}},
    {T("\"dtype\": \"\", \"shape\": [], \"data_offsets\": [0, 4]"), 4, TS_ERR_UNSUPPORTED, {"dtype is \"\"", DTYPES}},
    // shape
    {T("\"dtype\": \"U8\", \"shape\": 1, \"data_offsets\": [0, 1]"),
     1,
     TS_ERR_FORMAT,
     {"'first.weight'", "shape is 1"}},
    {T("\"dtype\": \"U8\", \"shape\": [\"1\"], \"data_offsets\": [0, 1]"),
     1,
     TS_ERR_FORMAT,
     {"'first.weight'", "is \"1\"", "an integer >= 0"}},
    {T("\"dtype\": \"U8\", \"shape\": [1, -1], \"data_offsets\": [0, 1]"),
     1,
     TS_ERR_FORMAT,
     {"'first.weight'", "dimension 1 of shape [1, -1] is -1", "an integer >= 0"}},
    {T("\"dtype\": \"U8\", \"shape\": [-1, -1], \"data_offsets\": [0, 1]"), 1, TS_ERR_FORMAT, {"is -1"}},
    {T("\"dtype\": \"U8\", \"shape\": [1.0], \"data_offsets\": [0, 1]"),
     1,
     TS_ERR_FORMAT,
     {"is 1.0", "an integer >= 0"}},
    {T("\"dtype\": \"U8\", \"shape\": [1e0], \"data_offsets\": [0, 1]"), 1, TS_ERR_FORMAT, {"an integer >= 0"}},
    {T("\"dtype\": \"U8\", \"shape\": [true], \"data_offsets\": [0, 1]"), 1, TS_ERR_FORMAT, {"is true"}},
    {T("\"dtype\": \"U8\", \"shape\": [[1]], \"data_offsets\": [0, 1]"), 1, TS_ERR_FORMAT, {"is [1]"}},
    {T("\"dtype\": \"U8\", \"shape\": [1, 1, 1, 1, 1, 1, 1, 1, 1], \"data_offsets\": [0, 1]"),
     1,
     TS_ERR_UNSUPPORTED,
     {"'first.weight'", "9 dimensions", "at most 8"}},
    {T("\"dtype\": \"F32\", \"shape\": [4294967296, 4294967296], \"data_offsets\": [0, 0]"), // 2^66 bytes, 0 when
                                                                                             // wrapped
     0,
     TS_ERR_FORMAT,
     {"'first.weight'", "do not fit"}},
    {T("\"dtype\": \"F64\", \"shape\": [2305843009213693952], \"data_offsets\": [0, 0]"),
     0,
     TS_ERR_FORMAT,
     {"F64 [2305843009213693952]", "do not fit"}},
    {T("\"dtype\": \"U8\", \"shape\": [9223372036854775808], \"data_offsets\": [0, 0]"),
     0,
     TS_ERR_FORMAT,
     {"9223372036854775808"}},
    // data_offsets
    {T("\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": 0"),
     1,
     TS_ERR_FORMAT,
     {"data_offsets is 0", "two integers"}},
    {T("\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": []"), 1, TS_ERR_FORMAT, {"data_offsets is []"}},
    {T("\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": [1]"), 1, TS_ERR_FORMAT, {"data_offsets is [1]"}},
    {T("\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": [0, 1, 1]"), 1, TS_ERR_FORMAT, {"is [0, 1, 1]"}},
    {T("\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": [-1, 0]"), 1, TS_ERR_FORMAT, {"is [-1, 0]", "0 <= begin"}},
    {T("\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": [0, 1.0]"), 1, TS_ERR_FORMAT, {"is [0, 1.0]"}},
    {T("\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": [\"0\", 1]"), 1, TS_ERR_FORMAT, {"is [\"0\", 1]"}},
    {T("\"dtype\": \"U8\", \"shape\": [1], \"data_offsets\": [1, 0]"), 1, TS_ERR_FORMAT, {"is [1, 0]", "begin <= end"}},
    {T("\"dtype\": \"U8\", \"shape\": [5], \"data_offsets\": [0, 5]"),
     4,
     TS_ERR_FORMAT,
     {"'first.weight'", "[0, 5]", "4 bytes of data"}},
    {T("\"dtype\": \"U8\", \"shape\": [1], \"data_offsets\": [9223372036854775806, 9223372036854775807]"),
     1,
     TS_ERR_FORMAT,
     {"past the end", "1 bytes of data"}},
    {T("\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 4]"),
     4,
     TS_ERR_FORMAT,
     {"'first.weight'", "hold 4 bytes", "the 8 bytes"}},
    {T("\"dtype\": \"F32\", \"shape\": [0], \"data_offsets\": [0, 4]"),
     4,
     TS_ERR_FORMAT,
     {"hold 4 bytes", "the 0 bytes"}},
    {T("\"dtype\": \"BF16\", \"shape\": [], \"data_offsets\": [0, 4]"),
     4,
     TS_ERR_FORMAT,
     {"hold 4 bytes", "the 2 bytes"}},
    // how tensors lie
    {"{" U8("one", "0", "3", "3") "," U8("two", "2", "4", "2") "}", 4, TS_ERR_FORMAT, {"'two'", "overlaps 'one'"}},
    {"{" U8("one", "0", "4", "4") "," U8("two", "0", "4", "4") "}", 4, TS_ERR_FORMAT, {"overlaps"}},
    {"{" U8("one", "0", "4", "4") "," U8("two", "2", "2", "0") "}", 4, TS_ERR_FORMAT, {"'two'", "overlaps 'one'"}},
    {"{" U8("one", "1", "4", "3") "}", 4, TS_ERR_FORMAT, {"'one'", "hole", "the header"}},
    {"{" U8("two", "3", "4", "1") "," U8("one", "0", "2", "2") "}", 4, TS_ERR_FORMAT, {"'two'", "hole", "'one'"}},
    {"{" U8("one", "0", "3", "3") "}", 4, TS_ERR_FORMAT, {"end at data byte 3", "'one'", "4 bytes of data"}},
    {"{}", 1, TS_ERR_FORMAT, {"1 bytes of data"}},
    {"{\"__metadata__\": {\"a\": \"b\"}}", 8, TS_ERR_FORMAT, {"8 bytes of data"}},
};

Test(safetensors, refuses_hostile_headers) {
    const scratch s = scratch_create();
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        const char *path = write_file(&s, "x.safetensors", hostile[i].header, hostile[i].n_data);
        ts_safetensors *set = NULL;
        const ts_status status = ts_safetensors_open_file(path, &set);
        expect_refused(status, hostile[i].code, set, hostile[i].header, path, hostile[i].says, 3);
    }
    scratch_remove(&s);
}

Test(safetensors, refuses_a_bottomless_header) {
    const scratch s = scratch_create();
    char *header = malloc(200001);
    memcpy(header, "{\"a\":", 5);
    memset(header + 5, '[', 200000 - 5);
    header[200000] = '\0';
    ts_safetensors *set = NULL;
    const char *path = write_file(&s, "x", header, 0);
    const ts_status status = ts_safetensors_open_file(path, &set);
    expect_refused(status, TS_ERR_FORMAT, set, "depth", path, (const char *[]){"depth"}, 1);
    free(header);
    scratch_remove(&s);
}

Test(safetensors, messages_carry_no_control_characters) {
    const scratch s = scratch_create();
    ts_safetensors *set = NULL;
    const char *path = write_file(&s, "x", "{\"a\\u001b[2J\\u009b\\n\": 1}", 0);
    const ts_status status = ts_safetensors_open_file(path, &set);
    expect_refused(status, TS_ERR_FORMAT, set, "escape", path, (const char *[]){"'a?[2J?", "' is 1"}, 2);
    cr_expect_null(strpbrk(ts_status_message(), "\x1b\n"), "%s", ts_status_message());
    cr_expect_null(strstr(ts_status_message(), "\xc2\x9b"), "%s", ts_status_message());
    scratch_remove(&s);
}

// ---- what must not: the file around the header

Test(safetensors, refuses_broken_files) {
    static const struct {
        const char *label;
        const char *bytes;
        size_t n_bytes;
        const char *says[2];
    } cases[] = {
        {"empty", "", 0, {"empty"}},
        {"half a length", "\x02\0\0\0", 4, {"4 bytes", "at least the 8"}},
        {"length 0", "\0\0\0\0\0\0\0\0", 8, {"byte 8", "'{'"}},
        {"length past the end", "\x03\0\0\0\0\0\0\0{}", 10, {"length is 3", "at most the 2"}},
        {"length just over the limit", "\x01\xe1\xf5\x05\0\0\0\0{}", 10, {"length is 100000001", "at most 100000000"}},
        {"length of 2^64 - 1", "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10, {"18446744073709551615", "at most 100000000"}},
        {"length of 2^63", "\0\0\0\0\0\0\0\x80{}", 10, {"9223372036854775808", "at most 100000000"}},
        {"length that wraps with the 8", "\xfa\xff\xff\xff\xff\xff\xff\xff{}", 10, {"byte 0"}},
        {"leading space", "\x03\0\0\0\0\0\0\0 {}", 11, {"byte 8", "'{'"}},
        {"an array", "\x02\0\0\0\0\0\0\0[]", 10, {"byte 8", "'{'"}},
        {"a byte after nothing", "\x02\0\0\0\0\0\0\0{}x", 11, {"1 bytes of data"}},
        {"a zip", "PK\x03\x04\x14\0\0\0\x08\0\x08\0", 12, {"header's length", "Is this a safetensors file?"}},
    };
    const scratch s = scratch_create();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *path = scratch_write(&s, "x.safetensors", cases[i].bytes, cases[i].n_bytes);
        ts_safetensors *set = NULL;
        const ts_status status = ts_safetensors_open_file(path, &set);
        expect_refused(status, TS_ERR_FORMAT, set, cases[i].label, path, cases[i].says, 2);
    }
    scratch_remove(&s);
}

Test(safetensors, refuses_what_is_no_regular_file) {
    const scratch s = scratch_create();
    char path[300];
    ts_safetensors *set = NULL;
    ts_status status = ts_safetensors_open_file(s.dir, &set);
    expect_refused(status, TS_ERR_INVALID, set, "directory", s.dir, (const char *[]){"a directory", "regular file"}, 2);
    snprintf(path, sizeof path, "%s/absent", s.dir);
    status = ts_safetensors_open_file(path, &set);
    expect_refused(status, TS_ERR_IO, set, "absent", path, (const char *[]){"No such file"}, 1);
    snprintf(path, sizeof path, "%s/fifo", s.dir);
    cr_assert_eq(mkfifo(path, 0600), 0);
    status = ts_safetensors_open_file(path, &set); // and does not wait for a writer
    expect_refused(status, TS_ERR_INVALID, set, "fifo", path, (const char *[]){"a FIFO", "regular file"}, 2);
    status = ts_safetensors_open_file("/dev/zero", &set);
    expect_refused(status, TS_ERR_INVALID, set, "device", "/dev/zero", (const char *[]){"a device", "regular file"}, 2);
    scratch_remove(&s);
}

// ---- what must not: an index and its shards

Test(safetensors, refuses_hostile_indexes) {
    static const struct {
        const char *index;
        const char *says[3];
        const char *shard_at_fault; // NULL: the sentence begins with the index
        ts_status code;             // TS_OK: TS_ERR_FORMAT
    } cases[] = {
        {"{", {"line 1"}, NULL, 0},
        {"", {"empty"}, NULL, 0},
        {"[]", {"the file is []", "weight_map"}, NULL, 0},
        {"{}", {"weight_map is absent", "an object"}, NULL, 0},
        {"{\"weight_map\": [\"1\"]}", {"weight_map is [\"1\"]", "an object"}, NULL, 0},
        {"{\"weight_map\": {}}", {"weight_map is {}", "at least one tensor"}, NULL, 0},
        {"{\"weight_map\": {\"a\": 1}}", {"'a' is in 1", "name of a file"}, NULL, 0},
        {"{\"weight_map\": {\"a\": null}}", {"'a' is in null", "name of a file"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"\"}}", {"'a' is in \"\"", "name of a file"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \".\"}}", {"'a' is in \".\"", "name of a file"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"..\"}}", {"'a' is in \"..\"", "name of a file"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"../one\"}}", {"'a' is in \"../one\"", "without '/'"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", {"\"/etc/passwd\"", "without '/'"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"./one\"}}", {"\"./one\"", "without '/'"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"one\", \"a\": \"two\"}}", {"duplicate", "\"a\""}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"none\"}}", {"No such file"}, "none", TS_ERR_IO},
        {"{\"weight_map\": {\"a\": \"broken\"}}", {"byte 8"}, "broken", 0},
        {"{\"weight_map\": {\"a\": \"one\", \"c\": \"one\"}}", {"'c' is in \"one\"", "no such tensor"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"both\"}}", {"'b' is not in weight_map", "index.json"}, "both", 0},
        {"{\"weight_map\": {\"a\": \"two\", \"b\": \"one\"}}", {"'a' is in \"two\"", "/one has it"}, NULL, 0},
        {"{\"weight_map\": {\"a\": \"one\", \"b\": \"both\"}}", {"'a'", "/both", "one shard only"}, NULL, -1},
    };
    const scratch s = scratch_create();
    write_file(&s, "one", "{" A_8 "}", 8);
    write_file(&s, "two", B_ONLY, 6);
    write_file(&s, "both", "{" A_8 "," B_4 "}", 12);
    write_file(&s, "broken", "[]", 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *index = scratch_write(&s, "model.safetensors.index.json", cases[i].index, strlen(cases[i].index));
        char prefix[600];
        if (cases[i].shard_at_fault != NULL)
            snprintf(prefix, sizeof prefix, "%s/%s: ", s.dir, cases[i].shard_at_fault);
        else // of a tensor in two shards either may come first
            snprintf(prefix, sizeof prefix, "%s", (int)cases[i].code == -1 ? s.dir : index);
        const ts_status code = (int)cases[i].code > 0 ? cases[i].code : TS_ERR_FORMAT;
        ts_safetensors *set = NULL;
        const ts_status status = ts_safetensors_open_model(s.dir, &set);
        expect_refused(status, code, set, cases[i].index, prefix, cases[i].says, 3);
    }
    scratch_remove(&s);
}

Test(safetensors, refuses_places_without_a_model) {
    const scratch s = scratch_create();
    char path[300];
    ts_safetensors *set = NULL;
    ts_status status = ts_safetensors_open_model(s.dir, &set);
    expect_refused(status, TS_ERR_IO, set, "empty directory", s.dir,
                   (const char *[]){"model.safetensors.index.json", "/model.safetensors is needed"}, 2);
    snprintf(path, sizeof path, "%s/absent", s.dir);
    status = ts_safetensors_open_model(path, &set);
    expect_refused(status, TS_ERR_IO, set, "no directory", path, (const char *[]){"the directory of a model"}, 1);
    const char *file = write_file(&s, "a", "{}", 0);
    status = ts_safetensors_open_model(file, &set);
    expect_refused(status, TS_ERR_INVALID, set, "a file", file, (const char *[]){"is not a directory"}, 1);
    scratch_remove(&s);
}

// ---- accidents and deliberate damage

#define SMALL                                                                                                          \
    "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[0,8]},"          \
    "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[8,14]}}  "

Test(safetensors, every_truncation_is_refused) {
    const scratch s = scratch_create();
    char *bytes;
    const size_t n = compose(SMALL, strlen(SMALL), 14, &bytes);
    for (size_t length = 0; length <= n; length++) {
        const char *path = scratch_write(&s, "x", bytes, length);
        ts_safetensors *set = NULL;
        const ts_status status = ts_safetensors_open_file(path, &set);
        if (length < n)
            expect_refused(status, TS_ERR_FORMAT, set, "truncated", path, NULL, 0);
        else
            cr_expect_eq(status, TS_OK, "%s", ts_status_message());
        ts_safetensors_free(set);
    }
    free(bytes);
    scratch_remove(&s);
}

static bool open_and_check(const scratch *s, const char *bytes, size_t n_bytes) {
    const char *path = scratch_write(s, "x", bytes, n_bytes);
    ts_safetensors *set = NULL;
    const ts_status status = ts_safetensors_open_file(path, &set);
    cr_assert_lt((unsigned)status, TS_N_STATUSES);
    if (status != TS_OK) {
        cr_assert_null(set);
        cr_assert_eq(strncmp(ts_status_message(), path, strlen(path)), 0, "%s", ts_status_message());
        return false;
    }
    uint64_t n_header;
    memcpy(&n_header, bytes, 8);
    check_sane(set, n_bytes - 8 - n_header);
    ts_safetensors_free(set);
    return true;
}

Test(safetensors, every_flipped_bit_gives_a_status) {
    const scratch s = scratch_create();
    char *bytes;
    const size_t n = compose(SMALL, strlen(SMALL), 14, &bytes);
    int n_accepted = 0;
    for (size_t bit = 0; bit < 8 * (8 + strlen(SMALL)); bit++) {
        bytes[bit / 8] ^= (char)(1 << bit % 8);
        n_accepted += open_and_check(&s, bytes, n);
        bytes[bit / 8] ^= (char)(1 << bit % 8);
    }
    cr_expect(n_accepted > 0 && n_accepted < 200, "%d accepted", n_accepted); // a letter of a name may change
    free(bytes);
    scratch_remove(&s);
}

Test(safetensors, mutated_headers_only_ever_give_a_status) {
    enum { N_ROUNDS = 20000, N_DATA = 14, CAPACITY = 4096 };
    const scratch s = scratch_create();
    uint64_t state = 20240229;
    int n_accepted = 0;
    char header[CAPACITY];
    for (int round = 0; round < N_ROUNDS; round++) {
        memcpy(header, SMALL, strlen(SMALL));
        const size_t n_header = scratch_mutate(header, strlen(SMALL), CAPACITY, &state);
        char *bytes;
        const size_t n = compose(header, n_header, N_DATA, &bytes);
        n_accepted += open_and_check(&s, bytes, n);
        free(bytes);
    }
    cr_expect(n_accepted > N_ROUNDS / 200 && n_accepted < N_ROUNDS / 2, "%d of %d accepted", n_accepted, N_ROUNDS);
    scratch_remove(&s);
}
