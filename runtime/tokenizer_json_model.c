// The "model" and "added_tokens" of tokenizer.json.
#include "runtime/tokenizer_file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/byte_alphabet.h"

static ts_status check_model_options(ts_tokenizer_file *r, json_t *model) {
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
        TS_TRY(ts_tokenizer_file_type(r, model, "model", "a BPE model", &type));
    if (strcmp(type, "BPE") != 0) {
        status = ts_tokenizer_file_refuse_type(r, "model", type, "\"BPE\"");
        goto done;
    }
    TS_TRY(ts_tokenizer_file_check_keys(r, model, "model", keys));

    const json_t *dropout = json_object_get(model, "dropout");
    TS_CHECK(!dropout || json_is_null(dropout) || (json_is_number(dropout) && json_number_value(dropout) == 0),
             TS_ERR_UNSUPPORTED, "%s: model.dropout is set; only null is accepted", r->path);
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
        const json_t *value = json_object_get(model, strings[i]);
        TS_CHECK(!value || json_is_null(value) || (json_is_string(value) && json_string_length(value) == 0),
                 TS_ERR_UNSUPPORTED, "%s: model.%s is %s; only null and the empty string are accepted", r->path,
                 strings[i],
                 json_is_string(value) ? ts_tokenizer_file_quote(r, 0, json_string_value(value))
                                       : ts_tokenizer_file_type_name(value));
    }
    bool byte_fallback = false, fuse_unk = false; // the latter means nothing where no token is unknown
    TS_TRY(ts_tokenizer_file_bool(r, model, "model", "fuse_unk", TS_TOKENIZER_OPTIONAL, &fuse_unk));
    TS_TRY(ts_tokenizer_file_bool(r, model, "model", "byte_fallback", TS_TOKENIZER_OPTIONAL, &byte_fallback));
    TS_CHECK(!byte_fallback, TS_ERR_UNSUPPORTED, "%s: model.byte_fallback is true; only false is accepted", r->path);
    TS_TRY(ts_tokenizer_file_bool(r, model, "model", "ignore_merges", TS_TOKENIZER_OPTIONAL, &r->spec->ignore_merges));
done:
    return status;
}

// Sizes spec->vocab and spec->text for the vocabulary and the added tokens together.
static ts_status size_vocab(ts_tokenizer_file *r, json_t *added) {
    ts_status status = TS_OK;
    const char *key;
    json_t *value;
    size_t i, n_text = 0;
    int32_t id = 0, largest = -1;
    char where[TS_TOKENIZER_WHERE_BYTES];
    json_object_foreach(r->vocab, key, value) {
        if (!json_is_integer(value) || json_integer_value(value) < 0 ||
            json_integer_value(value) >= TS_TOKENIZER_MAX_IDS) {
            snprintf(where, sizeof where, "model.vocab[\"%s\"]", ts_tokenizer_file_quote(r, 0, key));
            TS_TRY(ts_tokenizer_file_id(r, value, where, &id));
        }
        id = (int32_t)json_integer_value(value);
        largest = id > largest ? id : largest;
        n_text += strlen(key);
    }
    json_array_foreach(added, i, value) {
        snprintf(where, sizeof where, "added_tokens[%zu].id", i);
        TS_TRY(ts_tokenizer_file_id(r, json_object_get(value, "id"), where, &id));
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

static ts_status read_vocab(ts_tokenizer_file *r) {
    ts_status status = TS_OK;
    const char *key;
    json_t *value;
    json_object_foreach(r->vocab, key, value) {
        ts_vocab_entry *entry = &r->spec->vocab[json_integer_value(value)];
        TS_CHECK(!entry->bytes, TS_ERR_FORMAT,
                 "%s: model.vocab[\"%s\"] has id %" JSON_INTEGER_FORMAT ", which another token has; ids are unique",
                 r->path, ts_tokenizer_file_quote(r, 0, key), json_integer_value(value));
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

static ts_status vocab_id(ts_tokenizer_file *r, size_t rank, const char *token, int32_t *out) {
    const json_t *id = json_object_get(r->vocab, token);
    if (!id)
        return TS_FAIL(
            TS_ERR_FORMAT,
            "%s: model.merges[%zu]: \"%s\" is not in model.vocab; both parts of a merge and its result must be",
            r->path, rank, ts_tokenizer_file_quote(r, 0, token));
    *out = (int32_t)json_integer_value(id);
    return TS_OK;
}

static ts_status read_merge(ts_tokenizer_file *r, size_t rank, const json_t *value) {
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
                 "%s: model.merges[%zu] is %s; \"a b\" or [\"a\", \"b\"] is expected", r->path, rank,
                 ts_tokenizer_file_type_name(value));
        left = json_string_value(value);
        const char *space = strchr(left, ' ');
        // "#version" lines are comments to the package that wrote the file, and shift every rank after them.
        TS_CHECK(space && !strchr(space + 1, ' ') && strncmp(left, "#version", 8) != 0, TS_ERR_FORMAT,
                 "%s: model.merges[%zu] is \"%s\"; two tokens with one space between are expected", r->path, rank,
                 ts_tokenizer_file_quote(r, 0, left));
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

ts_status ts_tokenizer_file_read_model(ts_tokenizer_file *r, json_t *added) {
    ts_status status = TS_OK;
    json_t *model = json_object_get(r->root, "model"), *merges, *value;
    size_t rank;
    TS_TRY(check_model_options(r, model));
    r->vocab = json_object_get(model, "vocab");
    merges = json_object_get(model, "merges");
    TS_CHECK(json_is_object(r->vocab), TS_ERR_FORMAT, "%s: model.vocab is %s; an object of token: id is expected",
             r->path, ts_tokenizer_file_type_name(r->vocab));
    TS_CHECK(json_is_array(merges), TS_ERR_FORMAT, "%s: model.merges is %s; an array of merges is expected", r->path,
             ts_tokenizer_file_type_name(merges));
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

static ts_status read_added_token(ts_tokenizer_file *r, json_t *value, size_t index, ts_added_token *token) {
    static const char *const keys[] = {"id",     "content",    "single_word", "lstrip",
                                       "rstrip", "normalized", "special",     NULL};
    ts_status status = TS_OK;
    char where[TS_TOKENIZER_WHERE_BYTES];
    const char *content = "";
    snprintf(where, sizeof where, "added_tokens[%zu]", index);
    TS_TRY(ts_tokenizer_file_check_keys(r, value, where, keys));
    TS_TRY(ts_tokenizer_file_string(r, value, where, "content", &content));
    TS_CHECK(*content, TS_ERR_FORMAT, "%s: %s.content is empty; an added token has a text", r->path, where);
    TS_TRY(ts_tokenizer_file_bool(r, value, where, "single_word", TS_TOKENIZER_REQUIRED, &token->single_word));
    TS_TRY(ts_tokenizer_file_bool(r, value, where, "lstrip", TS_TOKENIZER_REQUIRED, &token->lstrip));
    TS_TRY(ts_tokenizer_file_bool(r, value, where, "rstrip", TS_TOKENIZER_REQUIRED, &token->rstrip));
    TS_TRY(ts_tokenizer_file_bool(r, value, where, "normalized", TS_TOKENIZER_REQUIRED, &token->normalized));
    TS_TRY(ts_tokenizer_file_bool(r, value, where, "special", TS_TOKENIZER_REQUIRED, &token->special));
    token->id = (int32_t)json_integer_value(json_object_get(value, "id")); // checked by size_vocab
    token->n_bytes = strlen(content);
    token->content = memcpy(r->spec->text + r->text_bytes, content, token->n_bytes);
    r->text_bytes += token->n_bytes;

    ts_vocab_entry *entry = &r->spec->vocab[token->id];
    const json_t *in_vocab = json_object_get(r->vocab, content);
    if (in_vocab) {
        TS_CHECK(json_integer_value(in_vocab) == token->id, TS_ERR_FORMAT,
                 "%s: %s gives \"%s\" the id %d, but model.vocab gives it %" JSON_INTEGER_FORMAT "; they must agree",
                 r->path, where, ts_tokenizer_file_quote(r, 0, content), token->id, json_integer_value(in_vocab));
    } else {
        TS_CHECK(!entry->bytes, TS_ERR_FORMAT, "%s: %s gives \"%s\" the id %d, which another token has; ids are unique",
                 r->path, where, ts_tokenizer_file_quote(r, 0, content), token->id);
        *entry = (ts_vocab_entry){token->content, token->n_bytes, false, false};
    }
    entry->special = token->special;
done:
    return status;
}

// Special tokens come first, because of two that match alike (after normalization) the first is found.
ts_status ts_tokenizer_file_read_added_tokens(ts_tokenizer_file *r, json_t *added) {
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
                     r->path, i, ts_tokenizer_file_quote(r, 0, content));
            TS_CHECK(json_object_set_new(contents, content, json_true()) == 0, TS_ERR_MEMORY, "%s: out of memory",
                     r->path);
        }
    }
done:
    json_decref(contents);
    return status;
}
