// Inside the tokenizer.json loader only: the file being read, and typed access that says what is wrong where.
#ifndef TS_RUNTIME_TOKENIZER_FILE_H
#define TS_RUNTIME_TOKENIZER_FILE_H

#include <jansson.h>

#include "runtime/tokenizer_json.h"

enum {
    TS_TOKENIZER_MAX_IDS = 1 << 24, // far above any vocabulary; keeps one wild id from allocating the whole memory
    TS_TOKENIZER_WHERE_BYTES = 256,
    TS_TOKENIZER_QUOTE_BYTES = 192,
};

typedef struct ts_tokenizer_file {
    const char *path;
    json_t *root;
    json_t *vocab;
    ts_tokenizer_spec *spec;
    size_t text_bytes; // used of spec->text
    char quoted[2][TS_TOKENIZER_QUOTE_BYTES];
} ts_tokenizer_file;

typedef enum ts_tokenizer_presence { TS_TOKENIZER_REQUIRED, TS_TOKENIZER_OPTIONAL } ts_tokenizer_presence;

// A string of the file made fit for an error message: control characters escaped, long ones cut short. Borrowed until
// the next call with the same slot (0 or 1).
const char *ts_tokenizer_file_quote(ts_tokenizer_file *r, int slot, const char *string);

// "an object", "absent", ... for messages.
const char *ts_tokenizer_file_type_name(const json_t *value);

// An object must hold nothing but these keys (NULL ends the list): an unknown one may well change the ids.
ts_status ts_tokenizer_file_check_keys(ts_tokenizer_file *r, json_t *object, const char *where,
                                       const char *const *allowed);

// object[key], at the place `where` of the file. An absent optional value leaves *out alone.
ts_status ts_tokenizer_file_bool(ts_tokenizer_file *r, json_t *object, const char *where, const char *key,
                                 ts_tokenizer_presence needed, bool *out);
ts_status ts_tokenizer_file_string(ts_tokenizer_file *r, json_t *object, const char *where, const char *key,
                                   const char **out);
ts_status ts_tokenizer_file_id(ts_tokenizer_file *r, const json_t *value, const char *where, int32_t *out);

// The "type" of a part of the file, and the refusal of one that is not accepted.
ts_status ts_tokenizer_file_type(ts_tokenizer_file *r, json_t *object, const char *where, const char *accepted,
                                 const char **out);
ts_status ts_tokenizer_file_refuse_type(ts_tokenizer_file *r, const char *where, const char *type,
                                        const char *accepted);

// The model (vocabulary and merges) and the added tokens of the file, into its spec (tokenizer_json_model.c).
ts_status ts_tokenizer_file_read_model(ts_tokenizer_file *r, json_t *added);
ts_status ts_tokenizer_file_read_added_tokens(ts_tokenizer_file *r, json_t *added);

#endif
