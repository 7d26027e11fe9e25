#include "runtime/tokenizer_json.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/byte_alphabet.h"

enum {
    MAX_IDS = 1 << 24, // far above any vocabulary; keeps one wild id from allocating the whole memory
    WHERE_BYTES = 256,
    QUOTE_BYTES = 192,
};

typedef struct reader {
    const char *path;
    json_t *root;
    json_t *vocab;
    ts_tokenizer_spec *spec;
    size_t text_bytes; // used of spec->text
    char quoted[2][QUOTE_BYTES];
} reader;

// A string of the file made fit for an error message: control characters escaped, long ones cut short.
static const char *quote(reader *r, int slot, const char *string) {
    char *out = r->quoted[slot];
    size_t n = 0;
    for (const char *s = string; *s; s++) {
        // Cut between characters; within one only if the string is not even UTF-8.
        if (n + 8 > QUOTE_BYTES && (((uint8_t)*s & 0xC0) != 0x80 || n + 5 > QUOTE_BYTES)) {
            memcpy(out + n, "...", 4);
            return out;
        }
        if ((uint8_t)*s < 0x20 || *s == 0x7F)
            n += (size_t)snprintf(out + n, QUOTE_BYTES - n, "\\x%02x", (uint8_t)*s);
        else
            out[n++] = *s;
    }
    out[n] = '\0';
    return out;
}

static const char *type_name(const json_t *value) {
    static const char *const names[] = {"an object",     "an array", "a string", "an integer",
                                        "a real number", "true",     "false",    "null"};
    return value ? names[json_typeof(value)] : "absent";
}

#define FORMAT(...)      TS_FAIL(TS_ERR_FORMAT, __VA_ARGS__)
#define UNSUPPORTED(...) TS_FAIL(TS_ERR_UNSUPPORTED, __VA_ARGS__)

// An object must hold nothing but these keys (NULL ends the list): an unknown one may well change the ids.
static ts_status check_keys(reader *r, json_t *object, const char *where, const char *const *allowed) {
    const char *key;
    json_t *value;
    if (!json_is_object(object))
        return FORMAT("%s: %s is %s; an object is expected", r->path, where, type_name(object));
    json_object_foreach(object, key, value) {
        const char *const *known = allowed;
        while (*known && strcmp(*known, key) != 0)
            known++;
        if (*known)
            continue;
        char list[512] = "";
        for (known = allowed; *known; known++)
            snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", *list ? ", " : "", *known);
        return UNSUPPORTED("%s: %s has the unknown key \"%s\"; known are %s", r->path, where, quote(r, 0, key), list);
    }
    return TS_OK;
}

typedef enum presence { REQUIRED, OPTIONAL } presence;

static ts_status read_bool(reader *r, json_t *object, const char *where, const char *key, presence needed, bool *out) {
    const json_t *value = json_object_get(object, key);
    if (!value && needed == OPTIONAL)
        return TS_OK;
    if (!json_is_boolean(value))
        return FORMAT("%s: %s.%s is %s; true or false is expected", r->path, where, key, type_name(value));
    *out = json_is_true(value);
    return TS_OK;
}

static ts_status read_string(reader *r, json_t *object, const char *where, const char *key, const char **out) {
    const json_t *value = json_object_get(object, key);
    if (!json_is_string(value))
        return FORMAT("%s: %s.%s is %s; a string is expected", r->path, where, key, type_name(value));
    *out = json_string_value(value);
    return TS_OK;
}

static ts_status read_id(reader *r, const json_t *value, const char *where, int32_t *out) {
    if (!json_is_integer(value))
        return FORMAT("%s: %s is %s; a token id, an integer, is expected", r->path, where, type_name(value));
    const json_int_t id = json_integer_value(value);
    if (id < 0 || id >= MAX_IDS)
        return FORMAT("%s: %s is %" JSON_INTEGER_FORMAT "; ids from 0 to %d are accepted", r->path, where, id,
                      MAX_IDS - 1);
    *out = (int32_t)id;
    return TS_OK;
}

// The "type" of a part of the file.
static ts_status read_type(reader *r, json_t *object, const char *where, const char *accepted, const char **out) {
    if (!json_is_object(object))
        return FORMAT("%s: %s is %s; %s is expected", r->path, where, type_name(object), accepted);
    return read_string(r, object, where, "type", out);
}

static ts_status refuse_type(reader *r, const char *where, const char *type, const char *accepted) {
    return UNSUPPORTED("%s: %s is of type \"%s\"; accepted is %s", r->path, where, quote(r, 0, type), accepted);
}

// ---- model ----

static ts_status check_model_options(reader *r, json_t *model) {
    static const char *const keys[] = {"type",
                                       "dropout",
                                       "unk_token",
                                       "continuing_subword_prefix",
                                       "end_of_word_suffix",
                                       "fuse_unk",
                                       "byte_fallback",
                                       "ignore_merges",
                                       "vocab",
                                       "merges",
                                       NULL};
    static const char *const strings[] = {"unk_token", "continuing_subword_prefix", "end_of_word_suffix"};
    ts_status status = TS_OK;
    // Files of 2019 leave the type out; "merges" is then what tells BPE from the rest.
    const char *type = json_object_get(model, "merges") ? "BPE" : "(none)";
    if (!json_is_object(model) || json_object_get(model, "type"))
        TS_TRY(read_type(r, model, "model", "a BPE model", &type));
    if (strcmp(type, "BPE") != 0) {
        status = refuse_type(r, "model", type, "\"BPE\"");
        goto done;
    }
    TS_TRY(check_keys(r, model, "model", keys));

    const json_t *dropout = json_object_get(model, "dropout");
    TS_CHECK(!dropout || json_is_null(dropout) || (json_is_number(dropout) && json_number_value(dropout) == 0),
             TS_ERR_UNSUPPORTED, "%s: model.dropout is set; only null is accepted", r->path);
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
        const json_t *value = json_object_get(model, strings[i]);
        TS_CHECK(!value || json_is_null(value) || (json_is_string(value) && json_string_length(value) == 0),
                 TS_ERR_UNSUPPORTED, "%s: model.%s is %s; only null and the empty string are accepted", r->path,
                 strings[i], json_is_string(value) ? quote(r, 0, json_string_value(value)) : type_name(value));
    }
    bool byte_fallback = false, fuse_unk = false; // the latter means nothing where no token is unknown
    TS_TRY(read_bool(r, model, "model", "fuse_unk", OPTIONAL, &fuse_unk));
    TS_TRY(read_bool(r, model, "model", "byte_fallback", OPTIONAL, &byte_fallback));
    TS_CHECK(!byte_fallback, TS_ERR_UNSUPPORTED, "%s: model.byte_fallback is true; only false is accepted", r->path);
    TS_TRY(read_bool(r, model, "model", "ignore_merges", OPTIONAL, &r->spec->ignore_merges));
done:
    return status;
}

// Sizes spec->vocab and spec->text for the vocabulary and the added tokens together.
static ts_status size_vocab(reader *r, json_t *added) {
    ts_status status = TS_OK;
    const char *key;
    json_t *value;
    size_t i, n_text = 0;
    int32_t id = 0, largest = -1;
    char where[WHERE_BYTES];
    json_object_foreach(r->vocab, key, value) {
        if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) >= MAX_IDS) {
            snprintf(where, sizeof where, "model.vocab[\"%s\"]", quote(r, 0, key));
            TS_TRY(read_id(r, value, where, &id));
        }
        id = (int32_t)json_integer_value(value);
        largest = id > largest ? id : largest;
        n_text += strlen(key);
    }
    json_array_foreach(added, i, value) {
        snprintf(where, sizeof where, "added_tokens[%zu].id", i);
        TS_TRY(read_id(r, json_object_get(value, "id"), where, &id));
        largest = id > largest ? id : largest;
        const json_t *content = json_object_get(value, "content");
        n_text += json_is_string(content) ? json_string_length(content) : 0;
    }
    r->spec->vocab_size = largest + 1;
    r->spec->vocab = calloc((size_t)largest + 2, sizeof *r->spec->vocab);
    r->spec->text = malloc(n_text + 1);
    TS_CHECK(r->spec->vocab && r->spec->text, TS_ERR_MEMORY, "%s: out of memory for %d tokens", r->path, largest + 1);
done:
    return status;
}

static ts_status read_vocab(reader *r) {
    ts_status status = TS_OK;
    const char *key;
    json_t *value;
    json_object_foreach(r->vocab, key, value) {
        ts_vocab_entry *entry = &r->spec->vocab[json_integer_value(value)];
        TS_CHECK(!entry->bytes, TS_ERR_FORMAT,
                 "%s: model.vocab[\"%s\"] has id %" JSON_INTEGER_FORMAT ", which another token has; ids are unique",
                 r->path, quote(r, 0, key), json_integer_value(value));
        char *bytes = r->spec->text + r->text_bytes;
        entry->n_bytes = strlen(key);
        TS_CHECK(entry->n_bytes > 0, TS_ERR_FORMAT, "%s: model.vocab has an empty token; each stands for some bytes",
                 r->path);
        entry->byte_level = ts_byte_alphabet_decode(key, entry->n_bytes, bytes, &entry->n_bytes);
        if (!entry->byte_level) // such a token stands for its own spelling, as the byte-level decoder has it
            memcpy(bytes, key, entry->n_bytes);
        entry->bytes = bytes;
        r->text_bytes += entry->n_bytes;
        if (entry->byte_level && entry->n_bytes == 1)
            r->spec->byte_ids[(uint8_t)bytes[0]] = (int32_t)json_integer_value(value);
    }
    for (int byte = 0; byte < 256; byte++)
        TS_CHECK(r->spec->byte_ids[byte] >= 0, TS_ERR_UNSUPPORTED,
                 "%s: model.vocab has no token for byte 0x%02x; a byte-level vocabulary holds all 256", r->path, byte);
done:
    return status;
}

static ts_status vocab_id(reader *r, size_t rank, const char *token, int32_t *out) {
    const json_t *id = json_object_get(r->vocab, token);
    if (!id)
        return FORMAT(
            "%s: model.merges[%zu]: \"%s\" is not in model.vocab; both parts of a merge and its result must be",
            r->path, rank, quote(r, 0, token));
    *out = (int32_t)json_integer_value(id);
    return TS_OK;
}

static ts_status read_merge(reader *r, size_t rank, const json_t *value) {
    ts_status status = TS_OK;
    ts_bpe_merge *merge = &r->spec->merges[rank];
    char *joined = NULL;
    size_t n_left, n_right;
    const char *left, *right;
    if (json_is_array(value)) {
        const json_t *a = json_array_get(value, 0), *b = json_array_get(value, 1);
        TS_CHECK(json_array_size(value) == 2 && json_is_string(a) && json_is_string(b), TS_ERR_FORMAT,
                 "%s: model.merges[%zu] is an array, but not of two strings; [\"a\", \"b\"] or \"a b\" is expected",
                 r->path, rank);
        left = json_string_value(a), n_left = json_string_length(a);
        right = json_string_value(b), n_right = json_string_length(b);
    } else {
        TS_CHECK(json_is_string(value), TS_ERR_FORMAT,
                 "%s: model.merges[%zu] is %s; \"a b\" or [\"a\", \"b\"] is expected", r->path, rank, type_name(value));
        left = json_string_value(value);
        const char *space = strchr(left, ' ');
        // "#version" lines are comments to the package that wrote the file, and shift every rank after them.
        TS_CHECK(space && !strchr(space + 1, ' ') && strncmp(left, "#version", 8) != 0, TS_ERR_FORMAT,
                 "%s: model.merges[%zu] is \"%s\"; two tokens with one space between are expected", r->path, rank,
                 quote(r, 0, left));
        n_left = (size_t)(space - left);
        right = space + 1, n_right = strlen(right);
    }
    joined = malloc(n_left + n_right + 1);
    TS_CHECK(joined, TS_ERR_MEMORY, "%s: out of memory", r->path);
    memcpy(joined, left, n_left);
    joined[n_left] = '\0';
    TS_TRY(vocab_id(r, rank, joined, &merge->left));
    TS_TRY(vocab_id(r, rank, right, &merge->right));
    memcpy(joined + n_left, right, n_right + 1);
    TS_TRY(vocab_id(r, rank, joined, &merge->merged));
done:
    free(joined);
    return status;
}

static ts_status read_model(reader *r, json_t *added) {
    ts_status status = TS_OK;
    json_t *model = json_object_get(r->root, "model"), *merges, *value;
    size_t rank;
    TS_TRY(check_model_options(r, model));
    r->vocab = json_object_get(model, "vocab");
    merges = json_object_get(model, "merges");
    TS_CHECK(json_is_object(r->vocab), TS_ERR_FORMAT, "%s: model.vocab is %s; an object of token: id is expected",
             r->path, type_name(r->vocab));
    TS_CHECK(json_is_array(merges), TS_ERR_FORMAT, "%s: model.merges is %s; an array of merges is expected", r->path,
             type_name(merges));
    TS_TRY(size_vocab(r, added));
    TS_TRY(read_vocab(r));
    r->spec->n_merges = json_array_size(merges);
    r->spec->merges = calloc(r->spec->n_merges + 1, sizeof *r->spec->merges);
    TS_CHECK(r->spec->merges, TS_ERR_MEMORY, "%s: out of memory for %zu merges", r->path, r->spec->n_merges);
    json_array_foreach(merges, rank, value) TS_TRY(read_merge(r, rank, value));
done:
    return status;
}

// ---- added tokens ----

static ts_status read_added_token(reader *r, json_t *value, size_t index, ts_added_token *token) {
    static const char *const keys[] = {"id",     "content",    "single_word", "lstrip",
                                       "rstrip", "normalized", "special",     NULL};
    ts_status status = TS_OK;
    char where[WHERE_BYTES];
    const char *content = "";
    snprintf(where, sizeof where, "added_tokens[%zu]", index);
    TS_TRY(check_keys(r, value, where, keys));
    TS_TRY(read_string(r, value, where, "content", &content));
    TS_CHECK(*content, TS_ERR_FORMAT, "%s: %s.content is empty; an added token has a text", r->path, where);
    TS_TRY(read_bool(r, value, where, "single_word", REQUIRED, &token->single_word));
    TS_TRY(read_bool(r, value, where, "lstrip", REQUIRED, &token->lstrip));
    TS_TRY(read_bool(r, value, where, "rstrip", REQUIRED, &token->rstrip));
    TS_TRY(read_bool(r, value, where, "normalized", REQUIRED, &token->normalized));
    TS_TRY(read_bool(r, value, where, "special", REQUIRED, &token->special));
    token->id = (int32_t)json_integer_value(json_object_get(value, "id")); // checked by size_vocab
    token->n_bytes = strlen(content);
    token->content = memcpy(r->spec->text + r->text_bytes, content, token->n_bytes);
    r->text_bytes += token->n_bytes;

    ts_vocab_entry *entry = &r->spec->vocab[token->id];
    const json_t *in_vocab = json_object_get(r->vocab, content);
    if (in_vocab) {
        TS_CHECK(json_integer_value(in_vocab) == token->id, TS_ERR_FORMAT,
                 "%s: %s gives \"%s\" the id %d, but model.vocab gives it %" JSON_INTEGER_FORMAT "; they must agree",
                 r->path, where, quote(r, 0, content), token->id, json_integer_value(in_vocab));
    } else {
        TS_CHECK(!entry->bytes, TS_ERR_FORMAT, "%s: %s gives \"%s\" the id %d, which another token has; ids are unique",
                 r->path, where, quote(r, 0, content), token->id);
        *entry = (ts_vocab_entry){token->content, token->n_bytes, false, false};
    }
    entry->special = token->special;
done:
    return status;
}

// Special tokens come first, because of two that match alike (after normalization) the first is found.
static ts_status read_added_tokens(reader *r, json_t *added) {
    ts_status status = TS_OK;
    json_t *value, *contents = json_object();
    size_t i, n = json_array_size(added);
    r->spec->added = calloc(n + 1, sizeof *r->spec->added);
    TS_CHECK(r->spec->added && contents, TS_ERR_MEMORY, "%s: out of memory for %zu added tokens", r->path, n);
    for (int want_special = 1; want_special >= 0; want_special--) {
        json_array_foreach(added, i, value) {
            if (json_is_true(json_object_get(value, "special")) != want_special)
                continue;
            TS_TRY(read_added_token(r, value, i, &r->spec->added[r->spec->n_added++]));
            const char *content = json_string_value(json_object_get(value, "content"));
            TS_CHECK(!json_object_get(contents, content), TS_ERR_FORMAT,
                     "%s: added_tokens[%zu].content \"%s\" was given before; each added token may be given once",
                     r->path, i, quote(r, 0, content));
            TS_CHECK(json_object_set_new(contents, content, json_true()) == 0, TS_ERR_MEMORY, "%s: out of memory",
                     r->path);
        }
    }
done:
    json_decref(contents);
    return status;
}

// ---- normalizer, pre-tokenizer, decoder ----

static ts_status read_normalizer(reader *r) {
    static const char *const keys[] = {"type", NULL}, accepted[] = "null or {\"type\": \"NFC\"}";
    ts_status status = TS_OK;
    const char *type = "";
    json_t *normalizer = json_object_get(r->root, "normalizer");
    if (!normalizer || json_is_null(normalizer))
        return TS_OK;
    TS_TRY(read_type(r, normalizer, "normalizer", accepted, &type));
    if (strcmp(type, "NFC") != 0) {
        status = refuse_type(r, "normalizer", type, accepted);
        goto done;
    }
    TS_TRY(check_keys(r, normalizer, "normalizer", keys));
    r->spec->nfc = true;
done:
    return status;
}

// A {"type": "ByteLevel"} object in any of its three roles.
static ts_status read_byte_level(reader *r, json_t *object, const char *where, bool *add_prefix_space,
                                 bool *use_regex) {
    static const char *const keys[] = {"type", "add_prefix_space", "trim_offsets", "use_regex", NULL};
    ts_status status = TS_OK;
    bool trim_offsets = false; // concerns offsets into the text only
    *use_regex = true;         // files older than the key
    TS_TRY(check_keys(r, object, where, keys));
    TS_TRY(read_bool(r, object, where, "add_prefix_space", REQUIRED, add_prefix_space));
    TS_TRY(read_bool(r, object, where, "trim_offsets", REQUIRED, &trim_offsets));
    TS_TRY(read_bool(r, object, where, "use_regex", OPTIONAL, use_regex));
done:
    return status;
}

static ts_status read_split(reader *r, json_t *split, const char *where) {
    static const char *const keys[] = {"type", "pattern", "behavior", "invert", NULL}, *const pattern_keys[] = {"Regex",
                                                                                                                NULL};
    ts_status status = TS_OK;
    const char *regex = "", *behavior = "";
    bool invert = false;
    char at[WHERE_BYTES];
    json_t *pattern = json_object_get(split, "pattern");
    TS_TRY(check_keys(r, split, where, keys));
    snprintf(at, sizeof at, "%s.pattern", where);
    TS_TRY(check_keys(r, pattern, at, pattern_keys));
    TS_TRY(read_string(r, pattern, at, "Regex", &regex));
    if (!ts_pretokenizer_find(regex, &r->spec->pretokenizer)) {
        status = UNSUPPORTED("%s: %s.Regex is '%.600s'; accepted are, exactly, those of %s '%s', %s '%s' and %s '%s'",
                             r->path, at, regex, ts_pretokenizer_name(TS_PRETOKENIZER_GPT2),
                             ts_pretokenizer_regex(TS_PRETOKENIZER_GPT2), ts_pretokenizer_name(TS_PRETOKENIZER_LLAMA3),
                             ts_pretokenizer_regex(TS_PRETOKENIZER_LLAMA3), ts_pretokenizer_name(TS_PRETOKENIZER_QWEN2),
                             ts_pretokenizer_regex(TS_PRETOKENIZER_QWEN2));
        goto done;
    }
    TS_TRY(read_string(r, split, where, "behavior", &behavior));
    TS_CHECK(strcmp(behavior, "Isolated") == 0, TS_ERR_UNSUPPORTED,
             "%s: %s.behavior is \"%s\"; accepted is \"Isolated\"", r->path, where, quote(r, 0, behavior));
    TS_TRY(read_bool(r, split, where, "invert", OPTIONAL, &invert));
    TS_CHECK(!invert, TS_ERR_UNSUPPORTED, "%s: %s.invert is true; accepted is false", r->path, where);
done:
    return status;
}

static ts_status read_pretokenizer(reader *r) {
    static const char *const keys[] = {"type", "pretokenizers", NULL};
    static const char accepted[] = "\"ByteLevel\" with use_regex true (GPT-2), or a \"Sequence\" of a \"Split\" by the "
                                   "Llama-3 or Qwen2 regex and a \"ByteLevel\" with use_regex false";
    ts_status status = TS_OK;
    const char *type = "", *first = "(none)", *second = "(none)";
    bool use_regex = true;
    json_t *pretokenizer = json_object_get(r->root, "pre_tokenizer");
    TS_TRY(read_type(r, pretokenizer, "pre_tokenizer", accepted, &type));
    if (strcmp(type, "ByteLevel") == 0) {
        TS_TRY(read_byte_level(r, pretokenizer, "pre_tokenizer", &r->spec->add_prefix_space, &use_regex));
        TS_CHECK(use_regex, TS_ERR_UNSUPPORTED, "%s: pre_tokenizer.use_regex is false; accepted is %s", r->path,
                 accepted);
        r->spec->pretokenizer = TS_PRETOKENIZER_GPT2;
        goto done;
    }
    if (strcmp(type, "Sequence") != 0) {
        status = refuse_type(r, "pre_tokenizer", type, accepted);
        goto done;
    }
    TS_TRY(check_keys(r, pretokenizer, "pre_tokenizer", keys));
    json_t *parts = json_object_get(pretokenizer, "pretokenizers");
    json_t *split = json_array_get(parts, 0), *byte_level = json_array_get(parts, 1);
    TS_CHECK(json_array_size(parts) == 2, TS_ERR_UNSUPPORTED,
             "%s: pre_tokenizer.pretokenizers does not hold two parts; accepted is %s", r->path, accepted);
    TS_TRY(read_type(r, split, "pre_tokenizer.pretokenizers[0]", accepted, &first));
    TS_TRY(read_type(r, byte_level, "pre_tokenizer.pretokenizers[1]", accepted, &second));
    TS_CHECK(strcmp(first, "Split") == 0 && strcmp(second, "ByteLevel") == 0, TS_ERR_UNSUPPORTED,
             "%s: pre_tokenizer.pretokenizers are \"%s\" and \"%s\"; accepted is %s", r->path, quote(r, 0, first),
             quote(r, 1, second), accepted);
    TS_TRY(read_split(r, split, "pre_tokenizer.pretokenizers[0]"));
    TS_TRY(read_byte_level(r, byte_level, "pre_tokenizer.pretokenizers[1]", &r->spec->add_prefix_space, &use_regex));
    TS_CHECK(!use_regex, TS_ERR_UNSUPPORTED,
             "%s: pre_tokenizer.pretokenizers[1].use_regex is true (or left out); accepted after a Split is false",
             r->path);
    r->spec->prefix_each_piece = r->spec->add_prefix_space;
done:
    return status;
}

static ts_status read_decoder(reader *r) {
    ts_status status = TS_OK;
    const char *type = "";
    bool add_prefix_space = false, use_regex = true;
    json_t *decoder = json_object_get(r->root, "decoder");
    TS_TRY(read_type(r, decoder, "decoder", "{\"type\": \"ByteLevel\"}", &type));
    if (strcmp(type, "ByteLevel") != 0)
        status = refuse_type(r, "decoder", type, "\"ByteLevel\"");
    else
        status = read_byte_level(r, decoder, "decoder", &add_prefix_space, &use_regex);
done:
    return status;
}

// ---- post-processor ----

static ts_status push_template_ids(reader *r, json_t *special_tokens, const char *where, const char *name,
                                   bool after_text) {
    static const char *const keys[] = {"id", "ids", "tokens", NULL};
    ts_status status = TS_OK;
    json_t *token = json_object_get(special_tokens, name), *ids, *value;
    size_t i;
    char at[WHERE_BYTES];
    TS_CHECK(token, TS_ERR_FORMAT, "%s: %s names \"%s\", which its special_tokens lack", r->path, where,
             quote(r, 0, name));
    snprintf(at, sizeof at, "post_processor special_tokens[\"%.100s\"]", quote(r, 1, name));
    TS_TRY(check_keys(r, token, at, keys));
    ids = json_object_get(token, "ids");
    TS_CHECK(json_is_array(ids), TS_ERR_FORMAT, "%s: %s.ids is %s; an array of ids is expected", r->path, at,
             type_name(ids));
    int32_t **list = after_text ? &r->spec->suffix_ids : &r->spec->prefix_ids;
    size_t *n_list = after_text ? &r->spec->n_suffix_ids : &r->spec->n_prefix_ids;
    int32_t *grown = realloc(*list, (*n_list + json_array_size(ids) + 1) * sizeof **list);
    TS_CHECK(grown, TS_ERR_MEMORY, "%s: out of memory", r->path);
    *list = grown;
    json_array_foreach(ids, i, value) {
        int32_t id = 0;
        TS_TRY(read_id(r, value, at, &id));
        TS_CHECK(id < r->spec->vocab_size && r->spec->vocab[id].bytes, TS_ERR_FORMAT,
                 "%s: %s.ids[%zu] is %d, an id no token has", r->path, at, i, id);
        (*list)[(*n_list)++] = id;
    }
done:
    return status;
}

static ts_status read_template(reader *r, json_t *post, const char *where) {
    static const char *const keys[] = {"type", "single", "pair", "special_tokens", NULL};
    static const char *const piece_keys[] = {"SpecialToken", "Sequence", NULL}, *const part_keys[] = {"id", "type_id",
                                                                                                      NULL};
    ts_status status = TS_OK;
    json_t *single, *special_tokens, *piece;
    size_t i;
    bool after_text = false;
    char at[WHERE_BYTES];
    TS_TRY(check_keys(r, post, where, keys)); // "pair" is for two texts, which are never encoded here
    single = json_object_get(post, "single");
    special_tokens = json_object_get(post, "special_tokens");
    TS_CHECK(json_is_array(single) && json_is_object(special_tokens), TS_ERR_FORMAT,
             "%s: %s.single is %s and special_tokens %s; an array and an object are expected", r->path, where,
             type_name(single), type_name(special_tokens));
    json_array_foreach(single, i, piece) {
        const char *name = "";
        snprintf(at, sizeof at, "%s.single[%zu]", where, i);
        TS_TRY(check_keys(r, piece, at, piece_keys));
        TS_CHECK(json_object_size(piece) == 1, TS_ERR_FORMAT, "%s: %s must hold one of SpecialToken and Sequence",
                 r->path, at);
        json_t *special = json_object_get(piece, "SpecialToken"),
               *part = special ? special : json_object_get(piece, "Sequence");
        TS_TRY(check_keys(r, part, at, part_keys));
        TS_TRY(read_string(r, part, at, "id", &name));
        if (special) {
            TS_TRY(push_template_ids(r, special_tokens, at, name, after_text));
            continue;
        }
        TS_CHECK(strcmp(name, "A") == 0 && !after_text, TS_ERR_UNSUPPORTED,
                 "%s: %s is Sequence \"%s\"; accepted is \"A\", once", r->path, at, quote(r, 0, name));
        after_text = true;
    }
    TS_CHECK(after_text, TS_ERR_UNSUPPORTED, "%s: %s.single has no Sequence \"A\"; the text must appear in it once",
             r->path, where);
done:
    return status;
}

// One post-processor that is not a Sequence.
static ts_status read_post_part(reader *r, json_t *post, const char *where, bool *has_template) {
    static const char accepted[] = "null, \"ByteLevel\", \"TemplateProcessing\" or a \"Sequence\" of these with one "
                                   "template at most";
    ts_status status = TS_OK;
    const char *type = "";
    bool add_prefix_space = false, use_regex = true;
    TS_TRY(read_type(r, post, where, accepted, &type));
    if (strcmp(type, "ByteLevel") == 0) {
        status = read_byte_level(r, post, where, &add_prefix_space, &use_regex);
    } else if (strcmp(type, "TemplateProcessing") == 0 && !*has_template) {
        *has_template = true;
        status = read_template(r, post, where);
    } else {
        status = refuse_type(r, where, type, accepted);
    }
done:
    return status;
}

static ts_status read_post_processor(reader *r) {
    static const char *const keys[] = {"type", "processors", NULL};
    ts_status status = TS_OK;
    json_t *post = json_object_get(r->root, "post_processor"), *parts, *part;
    const json_t *type = json_object_get(post, "type");
    size_t i;
    bool has_template = false;
    char where[WHERE_BYTES];
    if (!post || json_is_null(post))
        return TS_OK;
    if (!json_is_string(type) || strcmp(json_string_value(type), "Sequence") != 0)
        return read_post_part(r, post, "post_processor", &has_template);
    TS_TRY(check_keys(r, post, "post_processor", keys));
    parts = json_object_get(post, "processors");
    TS_CHECK(json_is_array(parts), TS_ERR_FORMAT, "%s: post_processor.processors is %s; an array is expected", r->path,
             type_name(parts));
    json_array_foreach(parts, i, part) {
        snprintf(where, sizeof where, "post_processor.processors[%zu]", i);
        TS_TRY(read_post_part(r, part, where, &has_template));
    }
done:
    return status;
}

// ---- the file ----

static ts_status parse_file(reader *r) {
    ts_status status = TS_OK;
    json_error_t error;
    FILE *file = fopen(r->path, "rb");
    TS_CHECK(file, TS_ERR_IO, "%s: cannot open: %s", r->path, strerror(errno));
    r->root = json_loadf(file, JSON_REJECT_DUPLICATES, &error);
    TS_CHECK(!ferror(file), TS_ERR_IO, "%s: cannot read: %s", r->path, strerror(errno));
    TS_CHECK(r->root, TS_ERR_FORMAT, "%s: line %d, column %d (byte %d): not acceptable JSON: %s", r->path, error.line,
             error.column, error.position, quote(r, 0, error.text));
done:
    if (file)
        fclose(file);
    return status;
}

static ts_status read_parts(reader *r) {
    static const char *const keys[] = {"version",       "truncation",     "padding", "added_tokens", "normalizer",
                                       "pre_tokenizer", "post_processor", "decoder", "model",        NULL};
    static const char *const nulls[] = {"truncation", "padding"};
    ts_status status = TS_OK;
    const char *version = "";
    json_t *added = json_object_get(r->root, "added_tokens");
    TS_TRY(check_keys(r, r->root, "the file", keys));
    TS_TRY(read_string(r, r->root, "the file", "version", &version));
    TS_CHECK(strcmp(version, "1.0") == 0, TS_ERR_UNSUPPORTED, "%s: version is \"%s\"; accepted is \"1.0\"", r->path,
             quote(r, 0, version));
    for (size_t i = 0; i < sizeof nulls / sizeof *nulls; i++) {
        const json_t *value = json_object_get(r->root, nulls[i]);
        TS_CHECK(!value || json_is_null(value), TS_ERR_UNSUPPORTED, "%s: %s is %s; only null is accepted", r->path,
                 nulls[i], type_name(value));
    }
    TS_CHECK(!added || json_is_null(added) || json_is_array(added), TS_ERR_FORMAT,
             "%s: added_tokens is %s; an array is expected", r->path, type_name(added));
    TS_TRY(read_normalizer(r));
    TS_TRY(read_pretokenizer(r));
    TS_TRY(read_decoder(r));
    TS_TRY(read_model(r, added));
    TS_TRY(read_added_tokens(r, added));
    TS_TRY(read_post_processor(r));
done:
    return status;
}

ts_status ts_tokenizer_json_read(const char *path, ts_tokenizer_spec *spec) {
    ts_status status = TS_OK;
    reader r = {.path = path, .spec = spec};
    for (int byte = 0; byte < 256; byte++)
        spec->byte_ids[byte] = -1;
    TS_TRY(parse_file(&r));
    TS_TRY(read_parts(&r));
done:
    if (status != TS_OK)
        ts_tokenizer_spec_free(spec);
    json_decref(r.root);
    return status;
}

void ts_tokenizer_spec_free(ts_tokenizer_spec *spec) {
    free(spec->text);
    free(spec->vocab);
    free(spec->merges);
    free(spec->added);
    free(spec->prefix_ids);
    free(spec->suffix_ids);
    *spec = (ts_tokenizer_spec){0};
}
