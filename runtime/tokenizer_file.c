#include "runtime/tokenizer_file.h"

#include <stdio.h>
#include <string.h>

const char *ts_tokenizer_file_quote(ts_tokenizer_file *r, int slot, const char *string) {
    char *out = r->quoted[slot];
    size_t n = 0;
    for (const char *s = string; *s; s++) {
        // Cut between characters; within one only if the string is not even UTF-8.
        if (n + 8 > TS_TOKENIZER_QUOTE_BYTES && (((uint8_t)*s & 0xC0) != 0x80 || n + 5 > TS_TOKENIZER_QUOTE_BYTES)) {
            memcpy(out + n, "...", 4);
            return out;
        }
        if ((uint8_t)*s < 0x20 || *s == 0x7F)
            n += (size_t)snprintf(out + n, TS_TOKENIZER_QUOTE_BYTES - n, "\\x%02x", (uint8_t)*s);
        else
            out[n++] = *s;
    }
    out[n] = '\0';
    return out;
}

const char *ts_tokenizer_file_type_name(const json_t *value) {
    static const char *const names[] = {"an object",     "an array", "a string", "an integer",
                                        "a real number", "true",     "false",    "null"};
    return value ? names[json_typeof(value)] : "absent";
}

ts_status ts_tokenizer_file_check_keys(ts_tokenizer_file *r, json_t *object, const char *where,
                                       const char *const *allowed) {
    const char *key;
    json_t *value;
    if (!json_is_object(object))
        return TS_FAIL(TS_ERR_FORMAT, "%s: %s is %s; an object is expected", r->path, where,
                       ts_tokenizer_file_type_name(object));
    json_object_foreach(object, key, value) {
        const char *const *known = allowed;
        while (*known && strcmp(*known, key) != 0)
            known++;
        if (*known)
            continue;
        char list[512] = "";
        for (known = allowed; *known; known++)
            snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", *list ? ", " : "", *known);
        return TS_FAIL(TS_ERR_UNSUPPORTED, "%s: %s has the unknown key \"%s\"; known are %s", r->path, where,
                       ts_tokenizer_file_quote(r, 0, key), list);
    }
    return TS_OK;
}

ts_status ts_tokenizer_file_bool(ts_tokenizer_file *r, json_t *object, const char *where, const char *key,
                                 ts_tokenizer_presence needed, bool *out) {
    const json_t *value = json_object_get(object, key);
    if (!value && needed == TS_TOKENIZER_OPTIONAL)
        return TS_OK;
    if (!json_is_boolean(value))
        return TS_FAIL(TS_ERR_FORMAT, "%s: %s.%s is %s; true or false is expected", r->path, where, key,
                       ts_tokenizer_file_type_name(value));
    *out = json_is_true(value);
    return TS_OK;
}

ts_status ts_tokenizer_file_string(ts_tokenizer_file *r, json_t *object, const char *where, const char *key,
                                   const char **out) {
    const json_t *value = json_object_get(object, key);
    if (!json_is_string(value))
        return TS_FAIL(TS_ERR_FORMAT, "%s: %s.%s is %s; a string is expected", r->path, where, key,
                       ts_tokenizer_file_type_name(value));
    *out = json_string_value(value);
    return TS_OK;
}

ts_status ts_tokenizer_file_id(ts_tokenizer_file *r, const json_t *value, const char *where, int32_t *out) {
    if (!json_is_integer(value))
        return TS_FAIL(TS_ERR_FORMAT, "%s: %s is %s; a token id, an integer, is expected", r->path, where,
                       ts_tokenizer_file_type_name(value));
    const json_int_t id = json_integer_value(value);
    if (id < 0 || id >= TS_TOKENIZER_MAX_IDS)
        return TS_FAIL(TS_ERR_FORMAT, "%s: %s is %" JSON_INTEGER_FORMAT "; ids from 0 to %d are accepted", r->path,
                       where, id, TS_TOKENIZER_MAX_IDS - 1);
    *out = (int32_t)id;
    return TS_OK;
}

ts_status ts_tokenizer_file_type(ts_tokenizer_file *r, json_t *object, const char *where, const char *accepted,
                                 const char **out) {
    if (!json_is_object(object))
        return TS_FAIL(TS_ERR_FORMAT, "%s: %s is %s; %s is expected", r->path, where,
                       ts_tokenizer_file_type_name(object), accepted);
    return ts_tokenizer_file_string(r, object, where, "type", out);
}

ts_status ts_tokenizer_file_refuse_type(ts_tokenizer_file *r, const char *where, const char *type,
                                        const char *accepted) {
    return TS_FAIL(TS_ERR_UNSUPPORTED, "%s: %s is of type \"%s\"; accepted is %s", r->path, where,
                   ts_tokenizer_file_quote(r, 0, type), accepted);
}
