#include "runtime/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utf8proc.h>

#include "runtime/added_tokens.h"
#include "runtime/pretokenizer.h"
#include "runtime/tokenizer_bpe.h"
#include "runtime/tokenizer_json.h"
#include "runtime/utf8_stream.h"

enum { N_BYTES = 256, END_OF_TEXT = 0 };

struct ts_tokenizer {
    bool is_bytes; // nothing below is then used but byte_values
    char byte_values[N_BYTES];
    ts_tokenizer_spec spec;
    ts_bpe *bpe;
    ts_pretokenizer *pretokenizer;
    ts_added_tokens *added_raw;        // looked for in the text as given
    ts_added_tokens *added_normalized; // looked for in the normalized text
};

// What one encode call works with.
typedef struct encoding {
    const ts_tokenizer *tokenizer;
    ts_pretokenizer_scratch *pretokenizer_scratch;
    ts_bpe_scratch *bpe_scratch;
    ts_id_list list;
    char *prefixed; // a text or piece with a space put before it
    size_t prefixed_capacity;
} encoding;

// ---- create ----

static ts_status build_bpe(ts_tokenizer *made) {
    ts_status status = TS_OK;
    const ts_tokenizer_spec *spec = &made->spec;
    size_t n_whole = 0;
    ts_bpe_token *whole = NULL;
    if (spec->ignore_merges) {
        whole = malloc(((size_t)spec->vocab_size + 1) * sizeof *whole);
        TS_CHECK(whole, TS_ERR_MEMORY, "tokenizer: out of memory");
        for (int32_t id = 0; id < spec->vocab_size; id++) {
            if (spec->vocab[id].byte_level)
                whole[n_whole++] = (ts_bpe_token){spec->vocab[id].bytes, spec->vocab[id].n_bytes, id};
        }
    }
    TS_TRY(ts_bpe_create(spec->byte_ids, spec->merges, spec->n_merges, whole, n_whole, &made->bpe));
done:
    free(whole);
    return status;
}

// NFC of text[0, n_bytes), malloc'd.
static ts_status normalize(const char *text, size_t n_bytes, char **out, size_t *n_out) {
    utf8proc_uint8_t *normalized = NULL;
    const utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)n_bytes, &normalized,
                                            UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (n < 0)
        return TS_FAIL(n == UTF8PROC_ERROR_NOMEM ? TS_ERR_MEMORY : TS_ERR_INTERNAL,
                       "tokenizer: normalizing %zu bytes: %s", n_bytes, utf8proc_errmsg(n));
    *out = (char *)normalized;
    *n_out = (size_t)n;
    return TS_OK;
}

static ts_status build_added(ts_tokenizer *made) {
    ts_status status = TS_OK;
    const ts_tokenizer_spec *spec = &made->spec;
    size_t n_raw = 0, n_normalized = 0;
    ts_added_token *raw = calloc(spec->n_added + 1, sizeof *raw);
    ts_added_token *normalized = calloc(spec->n_added + 1, sizeof *normalized);
    char **owned = calloc(spec->n_added + 1, sizeof *owned); // normalized contents
    TS_CHECK(raw && normalized && owned, TS_ERR_MEMORY, "tokenizer: out of memory");
    for (size_t i = 0; i < spec->n_added; i++) {
        if (!spec->added[i].normalized) {
            raw[n_raw++] = spec->added[i];
            continue;
        }
        ts_added_token *token = &normalized[n_normalized];
        *token = spec->added[i];
        if (spec->nfc) {
            TS_TRY(normalize(spec->added[i].content, spec->added[i].n_bytes, &owned[n_normalized], &token->n_bytes));
            token->content = owned[n_normalized];
        }
        n_normalized++;
    }
    TS_TRY(ts_added_tokens_create(raw, n_raw, &made->added_raw));
    TS_TRY(ts_added_tokens_create(normalized, n_normalized, &made->added_normalized));
done:
    for (size_t i = 0; owned && i < n_normalized; i++)
        free(owned[i]);
    free(owned);
    free(raw);
    free(normalized);
    return status;
}

static ts_status create_from_json(const char *path, ts_tokenizer *made) {
    ts_status status = TS_OK;
    TS_TRY(ts_tokenizer_json_read(path, &made->spec));
    status = build_bpe(made);
    if (status == TS_ERR_INVALID)
        status = TS_FAIL(TS_ERR_FORMAT, "%s: model.merges: %s", path, ts_status_message());
    TS_TRY(status);
    TS_TRY(build_added(made));
    TS_TRY(ts_pretokenizer_create(made->spec.pretokenizer, &made->pretokenizer));
done:
    return status;
}

ts_status ts_tokenizer_create(const char *model_dir, const char *kind, ts_tokenizer **out) {
    ts_status status = TS_OK;
    char *path = NULL;
    ts_tokenizer *made = calloc(1, sizeof *made);
    TS_CHECK(made, TS_ERR_MEMORY, "tokenizer: out of memory");
    if (kind && strcmp(kind, "bytes") == 0) {
        made->is_bytes = true;
        for (int byte = 0; byte < N_BYTES; byte++)
            made->byte_values[byte] = (char)byte;
    } else {
        TS_CHECK(!kind || strcmp(kind, "tokenizer.json") == 0, TS_ERR_INVALID,
                 "%s/config.json: tokenizer is \"%.200s\"; \"bytes\" and \"tokenizer.json\" are accepted", model_dir,
                 kind);
        if (asprintf(&path, "%s/tokenizer.json", model_dir) < 0)
            path = NULL;
        TS_CHECK(path, TS_ERR_MEMORY, "tokenizer: out of memory");
        TS_CHECK(kind || access(path, F_OK) == 0, TS_ERR_IO,
                 "%s is missing, and config.json names no tokenizer; add that file, or \"tokenizer\": \"bytes\" to "
                 "config.json",
                 path);
        TS_TRY(create_from_json(path, made));
    }
    *out = made;
    made = NULL;
done:
    free(path);
    ts_tokenizer_free(made);
    return status;
}

void ts_tokenizer_free(ts_tokenizer *tokenizer) {
    if (!tokenizer)
        return;
    ts_bpe_free(tokenizer->bpe);
    ts_pretokenizer_free(tokenizer->pretokenizer);
    ts_added_tokens_free(tokenizer->added_raw);
    ts_added_tokens_free(tokenizer->added_normalized);
    ts_tokenizer_spec_free(&tokenizer->spec);
    free(tokenizer);
}

int32_t ts_tokenizer_vocab_size(const ts_tokenizer *tokenizer) {
    return tokenizer->is_bytes ? N_BYTES : tokenizer->spec.vocab_size;
}

const char *ts_tokenizer_token_bytes(const ts_tokenizer *tokenizer, int32_t id, size_t *n_bytes, bool *is_special) {
    const ts_vocab_entry none = {"", 0, false, false};
    ts_vocab_entry entry = none;
    if (id >= 0 && id < ts_tokenizer_vocab_size(tokenizer)) {
        if (tokenizer->is_bytes)
            entry = (ts_vocab_entry){&tokenizer->byte_values[id], 1, id == END_OF_TEXT, true};
        else if (tokenizer->spec.vocab[id].bytes)
            entry = tokenizer->spec.vocab[id];
    }
    if (is_special)
        *is_special = entry.special;
    *n_bytes = entry.n_bytes;
    return entry.bytes;
}

// ---- encode ----

// text[0, n_bytes) with a space before it, unless it has one; in e->prefixed until the next call.
static ts_status put_prefix_space(encoding *e, const char **text, size_t *n_bytes) {
    ts_status status = TS_OK;
    if ((*text)[0] == ' ')
        return TS_OK;
    if (*n_bytes + 1 > e->prefixed_capacity) {
        free(e->prefixed);
        e->prefixed_capacity = 0;
        e->prefixed = malloc(2 * *n_bytes + 64);
        TS_CHECK(e->prefixed, TS_ERR_MEMORY, "tokenizer: out of memory for %zu bytes of text", *n_bytes);
        e->prefixed_capacity = 2 * *n_bytes + 64;
    }
    e->prefixed[0] = ' ';
    memcpy(e->prefixed + 1, *text, *n_bytes);
    *text = e->prefixed;
    *n_bytes += 1;
done:
    return status;
}

// Normalized text in which no added token is left.
static ts_status encode_ordinary(encoding *e, const char *text, size_t n_bytes) {
    ts_status status = TS_OK;
    const ts_tokenizer_spec *spec = &e->tokenizer->spec;
    if (spec->add_prefix_space && !spec->prefix_each_piece)
        TS_TRY(put_prefix_space(e, &text, &n_bytes));
    for (size_t begin = 0, end; begin < n_bytes; begin = end) {
        TS_TRY(ts_pretokenizer_next(e->tokenizer->pretokenizer, e->pretokenizer_scratch, text, n_bytes, begin, &end));
        const char *piece = text + begin;
        size_t n_piece = end - begin;
        if (spec->prefix_each_piece)
            TS_TRY(put_prefix_space(e, &piece, &n_piece));
        TS_TRY(ts_bpe_encode(e->tokenizer->bpe, e->bpe_scratch, piece, n_piece, &e->list));
    }
done:
    return status;
}

static ts_status push_id(encoding *e, int32_t id) {
    ts_status status = TS_OK;
    TS_TRY(ts_id_list_reserve(&e->list, 1));
    e->list.ids[e->list.n_ids++] = id;
done:
    return status;
}

// Text below U+0300 is its own NFC.
static bool needs_normalizing(const char *text, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i++) {
        if ((uint8_t)text[i] >= 0xCC)
            return true;
    }
    return false;
}

// Text between the added tokens that were found in the raw text.
static ts_status encode_between(encoding *e, const char *text, size_t n_bytes) {
    ts_status status = TS_OK;
    char *normalized = NULL;
    ts_added_cursor cursor = {0};
    ts_added_span span;
    if (e->tokenizer->spec.nfc && needs_normalizing(text, n_bytes)) {
        TS_TRY(normalize(text, n_bytes, &normalized, &n_bytes));
        text = normalized;
    }
    while (ts_added_tokens_next(e->tokenizer->added_normalized, text, n_bytes, &cursor, &span)) {
        if (span.id >= 0)
            TS_TRY(push_id(e, span.id));
        else
            TS_TRY(encode_ordinary(e, text + span.begin, span.end - span.begin));
    }
done:
    free(normalized);
    return status;
}

static ts_status encode_bpe(encoding *e, const char *text, size_t n_bytes, bool add_special) {
    ts_status status = TS_OK;
    const ts_tokenizer_spec *spec = &e->tokenizer->spec;
    size_t bad = 0;
    ts_added_cursor cursor = {0};
    ts_added_span span;
    TS_CHECK(ts_utf8_is_valid(text, n_bytes, &bad), TS_ERR_INVALID,
             "text: not UTF-8 at byte %zu of %zu (0x%02x); this tokenizer takes valid UTF-8", bad, n_bytes,
             (uint8_t)text[bad]);
    TS_TRY(ts_pretokenizer_scratch_create(e->tokenizer->pretokenizer, &e->pretokenizer_scratch));
    TS_TRY(ts_bpe_scratch_create(n_bytes, &e->bpe_scratch));
    for (size_t i = 0; add_special && i < spec->n_prefix_ids; i++)
        TS_TRY(push_id(e, spec->prefix_ids[i]));
    while (ts_added_tokens_next(e->tokenizer->added_raw, text, n_bytes, &cursor, &span)) {
        if (span.id >= 0)
            TS_TRY(push_id(e, span.id));
        else
            TS_TRY(encode_between(e, text + span.begin, span.end - span.begin));
    }
    for (size_t i = 0; add_special && i < spec->n_suffix_ids; i++)
        TS_TRY(push_id(e, spec->suffix_ids[i]));
done:
    return status;
}

ts_status ts_tokenizer_encode(const ts_tokenizer *tokenizer, const char *text, size_t n_bytes, bool add_special,
                              int32_t **ids, size_t *n_ids) {
    ts_status status = TS_OK;
    encoding e = {.tokenizer = tokenizer};
    if (tokenizer->is_bytes) {
        TS_TRY(ts_id_list_reserve(&e.list, n_bytes));
        for (size_t i = 0; i < n_bytes; i++)
            e.list.ids[e.list.n_ids++] = (uint8_t)text[i];
    } else {
        TS_TRY(encode_bpe(&e, text, n_bytes, add_special));
    }
    *ids = e.list.ids;
    *n_ids = e.list.n_ids;
    e.list.ids = NULL;
done:
    ts_pretokenizer_scratch_free(e.pretokenizer_scratch);
    ts_bpe_scratch_free(e.bpe_scratch);
    free(e.prefixed);
    free(e.list.ids);
    return status;
}
