#include "runtime/json_strict.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/input_file.h"

enum { EXCERPT_BYTES = 120, ALLOWED_BYTES = 512 };

// ---- excerpts

// Where a cut at `n` bytes does not split a UTF-8 sequence.
static size_t cut_before(const char *text, size_t n) {
    while (n > 0 && ((unsigned char)text[n] & 0xc0) == 0x80)
        n--;
    return n;
}

ts_json_excerpt ts_json_excerpt_text(const char *text, size_t n_bytes) {
    ts_json_excerpt excerpt;
    const size_t n = n_bytes > EXCERPT_BYTES ? cut_before(text, EXCERPT_BYTES) : n_bytes;
    for (size_t i = 0; i < n; i++) {
        const bool c0 = (unsigned char)text[i] < 0x20 || text[i] == 0x7f;
        const bool c1 = (unsigned char)text[i] == 0xc2 && i + 1 < n && (unsigned char)text[i + 1] < 0xa0; // U+0080..9F
        excerpt.text[i] = c0 || c1 ? '?' : text[i];
        if (c1)
            excerpt.text[++i] = '?';
    }
    strcpy(excerpt.text + n, n < n_bytes ? "..." : "");
    return excerpt;
}

ts_json_excerpt ts_json_excerpt_value(const json_t *value) {
    if (value == NULL)
        return ts_json_excerpt_text("absent", 6);
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(15));
    if (text == NULL)
        return ts_json_excerpt_text("a value too large to show", 25);
    const ts_json_excerpt excerpt = ts_json_excerpt_text(text, strlen(text));
    free(text);
    return excerpt;
}

// ---- loading

ts_status ts_json_parse(const char *path, size_t offset, const char *text, size_t n_bytes, json_t **out) {
    json_error_t error = {.text = ""};
    json_t *root = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &error);
    if (root != NULL) {
        *out = root;
        return TS_OK;
    }
    if (error.text[0] == '\0' || json_error_code(&error) == json_error_out_of_memory)
        return TS_FAIL(TS_ERR_MEMORY, "%s: no memory left to parse %zu bytes of JSON", path, n_bytes);
    // jansson quotes the source only when it is short; quoted here always, as the text that ends where it stopped.
    char *near = strstr(error.text, " near ");
    if (near != NULL)
        *near = '\0';
    const size_t position = error.position > 0 ? (size_t)error.position : 0,
                 end = position < n_bytes ? position : n_bytes;
    size_t begin = end > 100 ? end - 100 : 0;
    while (begin < end && ((unsigned char)text[begin] & 0xc0) == 0x80)
        begin++;
    return TS_FAIL(TS_ERR_FORMAT,
                   "%s: line %d, column %d (byte %zu): %s, after '%s'; allowed: JSON in UTF-8 without duplicate keys",
                   path, error.line, error.column, offset + position,
                   ts_json_excerpt_text(error.text, strlen(error.text)).text,
                   ts_json_excerpt_text(text + begin, end - begin).text);
}

ts_status ts_json_load(const char *path, size_t max_bytes, json_t **out) {
    ts_status status = TS_OK;
    int fd = -1;
    char *text = NULL;
    size_t n_bytes = 0, n_read = 0;
    TS_TRY(ts_input_file_open(path, &fd, &n_bytes));
    TS_CHECK(n_bytes <= max_bytes, TS_ERR_FORMAT, "%s: the file has %zu bytes; allowed: at most %zu", path, n_bytes,
             max_bytes);
    text = malloc(n_bytes);
    TS_CHECK(text != NULL, TS_ERR_MEMORY, "%s: no memory left for its %zu bytes", path, n_bytes);
    while (n_read < n_bytes) {
        const ssize_t n = read(fd, text + n_read, n_bytes - n_read);
        if (n < 0 && errno == EINTR)
            continue;
        TS_CHECK(n >= 0, TS_ERR_IO, "%s: byte %zu: cannot read: %s", path, n_read, strerror(errno));
        TS_CHECK(n > 0, TS_ERR_IO, "%s: byte %zu: the file became shorter while it was read", path, n_read);
        n_read += (size_t)n;
    }
    TS_TRY(ts_json_parse(path, 0, text, n_bytes, out));
done:
    free(text);
    if (fd >= 0)
        close(fd);
    return status;
}

// ---- values

static const json_t *get(const ts_json_view *view, const char *key) {
    return json_object_get(view->object, key);
}

bool ts_json_has(const ts_json_view *view, const char *key) {
    const json_t *value = get(view, key);
    return value != NULL && !json_is_null(value);
}

ts_status ts_json_refuse(const ts_json_view *view, const char *key, const char *allowed, ...) {
    char sentence[ALLOWED_BYTES];
    va_list args;
    va_start(args, allowed);
    vsnprintf(sentence, sizeof sentence, allowed, args);
    va_end(args);
    return TS_FAIL(TS_ERR_INVALID, "%s: %s%s is %s; allowed: %s", view->path, view->prefix, key,
                   ts_json_excerpt_value(get(view, key)).text, sentence);
}

// "a", "b" or "c"
static void list_names(const char *const *names, size_t n_names, char out[ALLOWED_BYTES]) {
    size_t at = 0;
    out[0] = '\0';
    for (size_t i = 0; i < n_names && at < ALLOWED_BYTES; i++) {
        const char *before = i == 0 ? "" : i + 1 == n_names ? " or " : ", ";
        at += (size_t)snprintf(out + at, ALLOWED_BYTES - at, "%s\"%s\"", before, names[i]);
    }
}

static size_t find_name(const char *name, const char *const *names, size_t n_names) {
    size_t i = 0;
    while (i < n_names && strcmp(name, names[i]) != 0)
        i++;
    return i;
}

ts_status ts_json_check_object(const ts_json_view *view) {
    if (json_is_object(view->object))
        return TS_OK;
    const size_t n = strlen(view->prefix); // ends in a dot
    return TS_FAIL(TS_ERR_INVALID, "%s: %.*s is %s; allowed: an object {...}", view->path, n > 0 ? (int)n - 1 : 8,
                   n > 0 ? view->prefix : "the file", ts_json_excerpt_value(view->object).text);
}

ts_status ts_json_check_keys(const ts_json_view *view, const char *const *keys, size_t n_keys) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)view->object, key, value) {
        if (find_name(key, keys, n_keys) < n_keys)
            continue;
        char allowed[ALLOWED_BYTES];
        list_names(keys, n_keys, allowed);
        return TS_FAIL(TS_ERR_INVALID, "%s: %s%s is no known key; allowed: %s", view->path, view->prefix,
                       ts_json_excerpt_text(key, strlen(key)).text, allowed);
    }
    return TS_OK;
}

ts_status ts_json_get_int(const ts_json_view *view, const char *key, int64_t min, int64_t max, int64_t *out) {
    const json_t *value = get(view, key);
    const json_int_t integer = json_integer_value(value);
    if (!json_is_integer(value) || integer < min || integer > max)
        return ts_json_refuse(view, key, "an integer from %lld to %lld", (long long)min, (long long)max);
    *out = integer;
    return TS_OK;
}

ts_status ts_json_get_int32(const ts_json_view *view, const char *key, int32_t min, int32_t max, int32_t *out) {
    int64_t wide = 0;
    const ts_status status = ts_json_get_int(view, key, min, max, &wide);
    if (status == TS_OK)
        *out = (int32_t)wide;
    return status;
}

ts_status ts_json_get_real(const ts_json_view *view, const char *key, double min, double max, double *out) {
    const json_t *value = get(view, key);
    const double number = json_number_value(value);
    if (!json_is_number(value) || !(number >= min && number <= max))
        return ts_json_refuse(view, key, "a number from %g to %g", min, max);
    *out = number;
    return TS_OK;
}

ts_status ts_json_get_bool(const ts_json_view *view, const char *key, bool *out) {
    const json_t *value = get(view, key);
    if (!json_is_boolean(value))
        return ts_json_refuse(view, key, "true or false");
    *out = json_is_true(value);
    return TS_OK;
}

ts_status ts_json_get_string(const ts_json_view *view, const char *key, size_t max_bytes, const char **out) {
    const json_t *value = get(view, key);
    if (!json_is_string(value) || json_string_length(value) > max_bytes)
        return ts_json_refuse(view, key, "a string of at most %zu bytes", max_bytes);
    *out = json_string_value(value);
    return TS_OK;
}

ts_status ts_json_get_choice(const ts_json_view *view, const char *key, const char *const *names, size_t n_names,
                             size_t *out) {
    const json_t *value = get(view, key);
    const size_t found = json_is_string(value) ? find_name(json_string_value(value), names, n_names) : n_names;
    if (found == n_names) {
        char allowed[ALLOWED_BYTES];
        list_names(names, n_names, allowed);
        return ts_json_refuse(view, key, "%s", allowed);
    }
    *out = found;
    return TS_OK;
}
