#include "runtime/tokenizer_file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- normalizer, pre-tokenizer, decoder ----

static ts_status read_normalizer(ts_tokenizer_file *r) {
    static const char *const keys[] = {"type", NULL}, accepted[] = "null or {\"type\": \"NFC\"}";
    ts_status status = TS_OK;
    const char *type = "";
    json_t *normalizer = json_object_get(r->root, "normalizer");
    if (!normalizer || json_is_null(normalizer))
        return TS_OK;
    TS_TRY(ts_tokenizer_file_type(r, normalizer, "normalizer", accepted, &type));
    if (strcmp(type, "NFC") != 0) {
        status = ts_tokenizer_file_refuse_type(r, "normalizer", type, accepted);
        goto done;
    }
    TS_TRY(ts_tokenizer_file_check_keys(r, normalizer, "normalizer", keys));
    r->spec->nfc = true;
done:
    return status;
}

// A {"type": "ByteLevel"} object in any of its three roles.
static ts_status read_byte_level(ts_tokenizer_file *r, json_t *object, const char *where, bool *add_prefix_space,
                                 bool *use_regex) {
    static const char *const keys[] = {"type", "add_prefix_space", "trim_offsets", "use_regex", NULL};
    ts_status status = TS_OK;
    bool trim_offsets = false; // concerns offsets into the text only
    *use_regex = true;         // files older than the key
    TS_TRY(ts_tokenizer_file_check_keys(r, object, where, keys));
    TS_TRY(ts_tokenizer_file_bool(r, object, where, "add_prefix_space", TS_TOKENIZER_REQUIRED, add_prefix_space));
    TS_TRY(ts_tokenizer_file_bool(r, object, where, "trim_offsets", TS_TOKENIZER_REQUIRED, &trim_offsets));
    TS_TRY(ts_tokenizer_file_bool(r, object, where, "use_regex", TS_TOKENIZER_OPTIONAL, use_regex));
done:
    return status;
}

static ts_status read_split(ts_tokenizer_file *r, json_t *split, const char *where) {
    static const char *const keys[] = {"type", "pattern", "behavior", "invert", NULL}, *const pattern_keys[] = {"Regex",
                                                                                                                NULL};
    ts_status status = TS_OK;
    const char *regex = "", *behavior = "";
    bool invert = false;
    char at[TS_TOKENIZER_WHERE_BYTES];
    json_t *pattern = json_object_get(split, "pattern");
    TS_TRY(ts_tokenizer_file_check_keys(r, split, where, keys));
    snprintf(at, sizeof at, "%s.pattern", where);
    TS_TRY(ts_tokenizer_file_check_keys(r, pattern, at, pattern_keys));
    TS_TRY(ts_tokenizer_file_string(r, pattern, at, "Regex", &regex));
    if (!ts_pretokenizer_find(regex, &r->spec->pretokenizer)) {
        status =
            TS_FAIL(TS_ERR_UNSUPPORTED,
                    "%s: %s.Regex is '%.600s'; accepted are, exactly, those of %s '%s', %s '%s' and %s '%s'", r->path,
                    at, regex, ts_pretokenizer_name(TS_PRETOKENIZER_GPT2), ts_pretokenizer_regex(TS_PRETOKENIZER_GPT2),
                    ts_pretokenizer_name(TS_PRETOKENIZER_LLAMA3), ts_pretokenizer_regex(TS_PRETOKENIZER_LLAMA3),
                    ts_pretokenizer_name(TS_PRETOKENIZER_QWEN2), ts_pretokenizer_regex(TS_PRETOKENIZER_QWEN2));
        goto done;
    }
    TS_TRY(ts_tokenizer_file_string(r, split, where, "behavior", &behavior));
    TS_CHECK(strcmp(behavior, "Isolated") == 0, TS_ERR_UNSUPPORTED,
             "%s: %s.behavior is \"%s\"; accepted is \"Isolated\"", r->path, where,
             ts_tokenizer_file_quote(r, 0, behavior));
    TS_TRY(ts_tokenizer_file_bool(r, split, where, "invert", TS_TOKENIZER_OPTIONAL, &invert));
    TS_CHECK(!invert, TS_ERR_UNSUPPORTED, "%s: %s.invert is true; accepted is false", r->path, where);
done:
    return status;
}

static ts_status read_pretokenizer(ts_tokenizer_file *r) {
    static const char *const keys[] = {"type", "pretokenizers", NULL};
    static const char accepted[] = "\"ByteLevel\" with use_regex true (GPT-2), or a \"Sequence\" of a \"Split\" by the "
                                   "Llama-3 or Qwen2 regex and a \"ByteLevel\" with use_regex false";
    ts_status status = TS_OK;
    const char *type = "", *first = "(none)", *second = "(none)";
    bool use_regex = true;
    json_t *pretokenizer = json_object_get(r->root, "pre_tokenizer");
    TS_TRY(ts_tokenizer_file_type(r, pretokenizer, "pre_tokenizer", accepted, &type));
    if (strcmp(type, "ByteLevel") == 0) {
        TS_TRY(read_byte_level(r, pretokenizer, "pre_tokenizer", &r->spec->add_prefix_space, &use_regex));
        TS_CHECK(use_regex, TS_ERR_UNSUPPORTED, "%s: pre_tokenizer.use_regex is false; accepted is %s", r->path,
                 accepted);
        r->spec->pretokenizer = TS_PRETOKENIZER_GPT2;
        goto done;
    }
    if (strcmp(type, "Sequence") != 0) {
        status = ts_tokenizer_file_refuse_type(r, "pre_tokenizer", type, accepted);
        goto done;
    }
    TS_TRY(ts_tokenizer_file_check_keys(r, pretokenizer, "pre_tokenizer", keys));
    json_t *parts = json_object_get(pretokenizer, "pretokenizers");
    json_t *split = json_array_get(parts, 0), *byte_level = json_array_get(parts, 1);
    TS_CHECK(json_array_size(parts) == 2, TS_ERR_UNSUPPORTED,
             "%s: pre_tokenizer.pretokenizers does not hold two parts; accepted is %s", r->path, accepted);
    TS_TRY(ts_tokenizer_file_type(r, split, "pre_tokenizer.pretokenizers[0]", accepted, &first));
    TS_TRY(ts_tokenizer_file_type(r, byte_level, "pre_tokenizer.pretokenizers[1]", accepted, &second));
    TS_CHECK(strcmp(first, "Split") == 0 && strcmp(second, "ByteLevel") == 0, TS_ERR_UNSUPPORTED,
             "%s: pre_tokenizer.pretokenizers are \"%s\" and \"%s\"; accepted is %s", r->path,
             ts_tokenizer_file_quote(r, 0, first), ts_tokenizer_file_quote(r, 1, second), accepted);
    TS_TRY(read_split(r, split, "pre_tokenizer.pretokenizers[0]"));
    TS_TRY(read_byte_level(r, byte_level, "pre_tokenizer.pretokenizers[1]", &r->spec->add_prefix_space, &use_regex));
    TS_CHECK(!use_regex, TS_ERR_UNSUPPORTED,
             "%s: pre_tokenizer.pretokenizers[1].use_regex is true (or left out); accepted after a Split is false",
             r->path);
    r->spec->prefix_each_piece = r->spec->add_prefix_space;
done:
    return status;
}

static ts_status read_decoder(ts_tokenizer_file *r) {
    ts_status status = TS_OK;
    const char *type = "";
    bool add_prefix_space = false, use_regex = true;
    json_t *decoder = json_object_get(r->root, "decoder");
    TS_TRY(ts_tokenizer_file_type(r, decoder, "decoder", "{\"type\": \"ByteLevel\"}", &type));
    if (strcmp(type, "ByteLevel") != 0)
        status = ts_tokenizer_file_refuse_type(r, "decoder", type, "\"ByteLevel\"");
    else
        status = read_byte_level(r, decoder, "decoder", &add_prefix_space, &use_regex);
done:
    return status;
}

// ---- post-processor ----

static ts_status push_template_ids(ts_tokenizer_file *r, json_t *special_tokens, const char *where, const char *name,
                                   bool after_text) {
    static const char *const keys[] = {"id", "ids", "tokens", NULL};
    ts_status status = TS_OK;
    json_t *token = json_object_get(special_tokens, name), *ids, *value;
    size_t i;
    char at[TS_TOKENIZER_WHERE_BYTES];
    TS_CHECK(token, TS_ERR_FORMAT, "%s: %s names \"%s\", which its special_tokens lack", r->path, where,
             ts_tokenizer_file_quote(r, 0, name));
    snprintf(at, sizeof at, "post_processor special_tokens[\"%.100s\"]", ts_tokenizer_file_quote(r, 1, name));
    TS_TRY(ts_tokenizer_file_check_keys(r, token, at, keys));
    ids = json_object_get(token, "ids");
    TS_CHECK(json_is_array(ids), TS_ERR_FORMAT, "%s: %s.ids is %s; an array of ids is expected", r->path, at,
             ts_tokenizer_file_type_name(ids));
    int32_t **list = after_text ? &r->spec->suffix_ids : &r->spec->prefix_ids;
    size_t *n_list = after_text ? &r->spec->n_suffix_ids : &r->spec->n_prefix_ids;
    int32_t *grown = realloc(*list, (*n_list + json_array_size(ids) + 1) * sizeof **list);
    TS_CHECK(grown, TS_ERR_MEMORY, "%s: out of memory", r->path);
    *list = grown;
    json_array_foreach(ids, i, value) {
        int32_t id = 0;
        TS_TRY(ts_tokenizer_file_id(r, value, at, &id));
        TS_CHECK(id < r->spec->vocab_size && r->spec->vocab[id].bytes, TS_ERR_FORMAT,
                 "%s: %s.ids[%zu] is %d, an id no token has", r->path, at, i, id);
        (*list)[(*n_list)++] = id;
    }
done:
    return status;
}

static ts_status read_template(ts_tokenizer_file *r, json_t *post, const char *where) {
    static const char *const keys[] = {"type", "single", "pair", "special_tokens", NULL};
    static const char *const piece_keys[] = {"SpecialToken", "Sequence", NULL}, *const part_keys[] = {"id", "type_id",
                                                                                                      NULL};
    ts_status status = TS_OK;
    json_t *single, *special_tokens, *piece;
    size_t i;
    bool after_text = false;
    char at[TS_TOKENIZER_WHERE_BYTES];
    TS_TRY(ts_tokenizer_file_check_keys(r, post, where, keys)); // "pair" is for two texts, which are never encoded here
    single = json_object_get(post, "single");
    special_tokens = json_object_get(post, "special_tokens");
    TS_CHECK(json_is_array(single) && json_is_object(special_tokens), TS_ERR_FORMAT,
             "%s: %s.single is %s and special_tokens %s; an array and an object are expected", r->path, where,
             ts_tokenizer_file_type_name(single), ts_tokenizer_file_type_name(special_tokens));
    json_array_foreach(single, i, piece) {
        const char *name = "";
        snprintf(at, sizeof at, "%s.single[%zu]", where, i);
        TS_TRY(ts_tokenizer_file_check_keys(r, piece, at, piece_keys));
        TS_CHECK(json_object_size(piece) == 1, TS_ERR_FORMAT, "%s: %s must hold one of SpecialToken and Sequence",
                 r->path, at);
        json_t *special = json_object_get(piece, "SpecialToken"),
               *part = special ? special : json_object_get(piece, "Sequence");
        TS_TRY(ts_tokenizer_file_check_keys(r, part, at, part_keys));
        TS_TRY(ts_tokenizer_file_string(r, part, at, "id", &name));
        if (special) {
            TS_TRY(push_template_ids(r, special_tokens, at, name, after_text));
            continue;
        }
        TS_CHECK(strcmp(name, "A") == 0 && !after_text, TS_ERR_UNSUPPORTED,
                 "%s: %s is Sequence \"%s\"; accepted is \"A\", once", r->path, at,
                 ts_tokenizer_file_quote(r, 0, name));
        after_text = true;
    }
    TS_CHECK(after_text, TS_ERR_UNSUPPORTED, "%s: %s.single has no Sequence \"A\"; the text must appear in it once",
             r->path, where);
done:
    return status;
}

// One post-processor that is not a Sequence.
static ts_status read_post_part(ts_tokenizer_file *r, json_t *post, const char *where, bool *has_template) {
    static const char accepted[] = "null, \"ByteLevel\", \"TemplateProcessing\" or a \"Sequence\" of these with one "
                                   "template at most";
    ts_status status = TS_OK;
    const char *type = "";
    bool add_prefix_space = false, use_regex = true;
    TS_TRY(ts_tokenizer_file_type(r, post, where, accepted, &type));
    if (strcmp(type, "ByteLevel") == 0) {
        status = read_byte_level(r, post, where, &add_prefix_space, &use_regex);
    } else if (strcmp(type, "TemplateProcessing") == 0 && !*has_template) {
        *has_template = true;
        status = read_template(r, post, where);
    } else {
        status = ts_tokenizer_file_refuse_type(r, where, type, accepted);
    }
done:
    return status;
}

static ts_status read_post_processor(ts_tokenizer_file *r) {
    static const char *const keys[] = {"type", "processors", NULL};
    ts_status status = TS_OK;
    json_t *post = json_object_get(r->root, "post_processor"), *parts, *part;
    const json_t *type = json_object_get(post, "type");
    size_t i;
    bool has_template = false;
    char where[TS_TOKENIZER_WHERE_BYTES];
    if (!post || json_is_null(post))
        return TS_OK;
    if (!json_is_string(type) || strcmp(json_string_value(type), "Sequence") != 0)
        return read_post_part(r, post, "post_processor", &has_template);
    TS_TRY(ts_tokenizer_file_check_keys(r, post, "post_processor", keys));
    parts = json_object_get(post, "processors");
    TS_CHECK(json_is_array(parts), TS_ERR_FORMAT, "%s: post_processor.processors is %s; an array is expected", r->path,
             ts_tokenizer_file_type_name(parts));
    json_array_foreach(parts, i, part) {
        snprintf(where, sizeof where, "post_processor.processors[%zu]", i);
        TS_TRY(read_post_part(r, part, where, &has_template));
    }
done:
    return status;
}

// ---- the file ----

static ts_status parse_file(ts_tokenizer_file *r) {
    ts_status status = TS_OK;
    json_error_t error;
    FILE *file = fopen(r->path, "rb");
    TS_CHECK(file, TS_ERR_IO, "%s: cannot open: %s", r->path, strerror(errno));
    r->root = json_loadf(file, JSON_REJECT_DUPLICATES, &error);
    TS_CHECK(!ferror(file), TS_ERR_IO, "%s: cannot read: %s", r->path, strerror(errno));
    TS_CHECK(r->root, TS_ERR_FORMAT, "%s: line %d, column %d (byte %d): not acceptable JSON: %s", r->path, error.line,
             error.column, error.position, ts_tokenizer_file_quote(r, 0, error.text));
done:
    if (file)
        fclose(file);
    return status;
}

static ts_status read_parts(ts_tokenizer_file *r) {
    static const char *const keys[] = {"version",       "truncation",     "padding", "added_tokens", "normalizer",
                                       "pre_tokenizer", "post_processor", "decoder", "model",        NULL};
    static const char *const nulls[] = {"truncation", "padding"};
    ts_status status = TS_OK;
    const char *version = "";
    json_t *added = json_object_get(r->root, "added_tokens");
    TS_TRY(ts_tokenizer_file_check_keys(r, r->root, "the file", keys));
    TS_TRY(ts_tokenizer_file_string(r, r->root, "the file", "version", &version));
    TS_CHECK(strcmp(version, "1.0") == 0, TS_ERR_UNSUPPORTED, "%s: version is \"%s\"; accepted is \"1.0\"", r->path,
             ts_tokenizer_file_quote(r, 0, version));
    for (size_t i = 0; i < sizeof nulls / sizeof *nulls; i++) {
        const json_t *value = json_object_get(r->root, nulls[i]);
        TS_CHECK(!value || json_is_null(value), TS_ERR_UNSUPPORTED, "%s: %s is %s; only null is accepted", r->path,
                 nulls[i], ts_tokenizer_file_type_name(value));
    }
    TS_CHECK(!added || json_is_null(added) || json_is_array(added), TS_ERR_FORMAT,
             "%s: added_tokens is %s; an array is expected", r->path, ts_tokenizer_file_type_name(added));
    TS_TRY(read_normalizer(r));
    TS_TRY(read_pretokenizer(r));
    TS_TRY(read_decoder(r));
    TS_TRY(ts_tokenizer_file_read_model(r, added));
    TS_TRY(ts_tokenizer_file_read_added_tokens(r, added));
    TS_TRY(read_post_processor(r));
done:
    return status;
}

ts_status ts_tokenizer_json_read(const char *path, ts_tokenizer_spec *spec) {
    ts_status status = TS_OK;
    ts_tokenizer_file r = {.path = path, .spec = spec};
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
