// JSON files that somebody else wrote, read strictly, and typed access that can say what is wrong with a value.
//
//     json_t *root = NULL;
//     TS_TRY(ts_json_load(path, max_bytes, &root));
//     ts_json_view view = {root, path, ""};
//     TS_TRY(ts_json_check_object(&view));
//     TS_TRY(ts_json_get_int(&view, "n_heads", 1, 64, &n_heads));
//     ...
//     json_decref(root);
//
// Strictly: one JSON value, UTF-8, no duplicate key in any object, no NUL in a string, at most 2,048 levels deep.
// Every sentence names the file, the key, the value found and what would have been accepted. Text from a file is shown
// shortened and without control characters, so that a file cannot write on the terminal of whoever reads the message.
#ifndef TS_JSON_STRICT_H
#define TS_JSON_STRICT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/base/status.h"

// Reads and parses the file `path`. *out is owned: json_decref.
// Errors: those of ts_input_file_open; TS_ERR_FORMAT for a file over max_bytes and for bad JSON (line, column, byte).
ts_status ts_json_load(const char *path, size_t max_bytes, json_t **out);

// Parses n_bytes of text that begins at byte `offset` of the file `path` (both for messages only). *out is owned.
ts_status ts_json_parse(const char *path, size_t offset, const char *text, size_t n_bytes, json_t **out);

// An object inside a file, and its place there: prefix is "" or the key that leads to it with a dot ("tile_sparsity.").
// Everything is borrowed.
typedef struct ts_json_view {
    const json_t *object;
    const char *path, *prefix;
} ts_json_view;

// The getters below fail with TS_ERR_INVALID and leave *out alone. A key that is absent is an error; where a key may be
// absent or null, ask ts_json_has first. `allowed` ends the sentence "KEY is VALUE; allowed: ...".
bool ts_json_has(const ts_json_view *view, const char *key); // present and not null

ts_status ts_json_check_object(const ts_json_view *view); // view->object is an object indeed
// Every key of the object is one of the n_keys names; the sentence names the stranger and lists the names.
ts_status ts_json_check_keys(const ts_json_view *view, const char *const *keys, size_t n_keys);

// An integer in [min, max]. 64.0 is a real number, not an integer, and is refused.
ts_status ts_json_get_int(const ts_json_view *view, const char *key, int64_t min, int64_t max, int64_t *out);
ts_status ts_json_get_int32(const ts_json_view *view, const char *key, int32_t min, int32_t max, int32_t *out);
// A real number or an integer, in [min, max].
ts_status ts_json_get_real(const ts_json_view *view, const char *key, double min, double max, double *out);
ts_status ts_json_get_bool(const ts_json_view *view, const char *key, bool *out);
// A string of at most max_bytes bytes. Borrowed from the object.
ts_status ts_json_get_string(const ts_json_view *view, const char *key, size_t max_bytes, const char **out);
// A string that is one of n_names; *out is its index.
ts_status ts_json_get_choice(const ts_json_view *view, const char *key, const char *const *names, size_t n_names,
                             size_t *out);

// The refusal itself, for rules that the getters do not know: "PATH: KEY is VALUE; allowed: ALLOWED".
ts_status ts_json_refuse(const ts_json_view *view, const char *key, const char *allowed, ...)
    __attribute__((format(printf, 3, 4)));

// Something from a file as it may stand in a message: at most 120 bytes and "...", control characters as '?'.
typedef struct ts_json_excerpt {
    char text[128];
} ts_json_excerpt;
ts_json_excerpt ts_json_excerpt_value(const json_t *value); // as JSON; NULL gives "absent"
ts_json_excerpt ts_json_excerpt_text(const char *text, size_t n_bytes);

#endif
