#include "runtime/added_tokens.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

// A byte of some token's content, in a tree where siblings are the bytes that may stand at one place.
typedef struct node {
    uint8_t byte;
    int32_t token;           // the token that ends here, -1 if none
    uint32_t child, sibling; // 0: none
} node;

struct ts_added_tokens {
    node *nodes; // node 0 is unused
    uint32_t n_nodes;
    uint32_t roots[256]; // by first byte; 0: none
    ts_added_token *tokens;
};

ts_status ts_added_tokens_create(const ts_added_token *tokens, size_t n_tokens, ts_added_tokens **out) {
    ts_status status = TS_OK;
    size_t n_bytes = 0;
    ts_added_tokens *made = calloc(1, sizeof *made);
    TS_CHECK(made, TS_ERR_MEMORY, "tokenizer: out of memory");
    for (size_t t = 0; t < n_tokens; t++)
        n_bytes += tokens[t].n_bytes;
    TS_CHECK(n_bytes < INT32_MAX && n_tokens < INT32_MAX, TS_ERR_UNSUPPORTED,
             "tokenizer: %zu added tokens of %zu bytes in all; 2^31 - 2 are handled", n_tokens, n_bytes);
    made->nodes = calloc(n_bytes + 1, sizeof *made->nodes);
    made->tokens = calloc(n_tokens + 1, sizeof *made->tokens);
    TS_CHECK(made->nodes && made->tokens, TS_ERR_MEMORY, "tokenizer: out of memory for %zu added tokens", n_tokens);
    made->n_nodes = 1;
    for (size_t t = 0; t < n_tokens; t++) {
        made->tokens[t] = tokens[t];
        made->tokens[t].content = NULL; // the tree holds it
        uint32_t *link = &made->roots[(uint8_t)tokens[t].content[0]];
        node *at = NULL;
        for (size_t i = 0; i < tokens[t].n_bytes; i++, link = &at->child) {
            const uint8_t byte = (uint8_t)tokens[t].content[i];
            while (*link != 0 && made->nodes[*link].byte != byte)
                link = &made->nodes[*link].sibling;
            if (*link == 0) {
                *link = made->n_nodes++;
                made->nodes[*link] = (node){.byte = byte, .token = -1};
            }
            at = &made->nodes[*link];
        }
        if (at && at->token < 0)
            at->token = (int32_t)t;
    }
    *out = made;
    made = NULL;
done:
    ts_added_tokens_free(made);
    return status;
}

void ts_added_tokens_free(ts_added_tokens *added) {
    if (!added)
        return;
    free(added->nodes);
    free(added->tokens);
    free(added);
}

// The longest token that begins at text[begin]; NULL if there is none.
static const ts_added_token *longest_at(const ts_added_tokens *added, const char *text, size_t n_bytes, size_t begin) {
    int32_t found = -1;
    uint32_t at = added->roots[(uint8_t)text[begin]];
    for (size_t i = begin; at != 0;) {
        if (added->nodes[at].token >= 0)
            found = added->nodes[at].token;
        if (++i == n_bytes)
            break;
        at = added->nodes[at].child;
        while (at != 0 && added->nodes[at].byte != (uint8_t)text[i])
            at = added->nodes[at].sibling;
    }
    return found < 0 ? NULL : &added->tokens[found];
}

static bool is_space(int32_t c) { // Unicode's White_Space
    return (c >= 0x9 && c <= 0xD) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// \w of Unicode TR18: letters, marks, decimal and letter numbers, connectors, joiners, and the circled and squared
// letters, which are Alphabetic although their category is Symbol.
static bool is_word(int32_t c) {
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        return c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
               (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
    }
}

// The character that begins at `at` (< n_bytes), and its length.
static int32_t character_at(const char *text, size_t n_bytes, size_t at, size_t *length) {
    int32_t c = -1;
    *length = (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(n_bytes - at), &c);
    return c;
}

// The character that ends at `at` (> 0), and its length.
static int32_t character_before(const char *text, size_t at, size_t *length) {
    size_t begin = at - 1;
    while (begin > 0 && ((uint8_t)text[begin] & 0xC0) == 0x80)
        begin--;
    return character_at(text, at, begin, length);
}

static bool stands_alone(const char *text, size_t n_bytes, size_t begin, size_t end) {
    size_t length;
    return (begin == 0 || !is_word(character_before(text, begin, &length))) &&
           (end == n_bytes || !is_word(character_at(text, n_bytes, end, &length)));
}

bool ts_added_tokens_next(const ts_added_tokens *added, const char *text, size_t n_bytes, ts_added_cursor *cursor,
                          ts_added_span *out) {
    if (cursor->has_pending) {
        cursor->has_pending = false;
        *out = cursor->pending;
        return true;
    }
    while (cursor->scanned < n_bytes) {
        size_t begin = cursor->scanned, length;
        const ts_added_token *token = longest_at(added, text, n_bytes, begin);
        if (!token) {
            cursor->scanned++;
            continue;
        }
        size_t end = begin + token->n_bytes;
        cursor->scanned = end; // also when it is then rejected, and without the space it takes on its right
        if (token->single_word && !stands_alone(text, n_bytes, begin, end))
            continue;
        if (token->lstrip) {
            while (begin > cursor->text_begin && is_space(character_before(text, begin, &length)))
                begin -= length;
        }
        if (token->rstrip) {
            while (end < n_bytes && is_space(character_at(text, n_bytes, end, &length)))
                end += length;
        }
        const size_t text_begin = cursor->text_begin;
        cursor->text_begin = end;
        *out = (ts_added_span){begin, end, token->id};
        if (text_begin < begin) {
            cursor->pending = *out;
            cursor->has_pending = true;
            *out = (ts_added_span){text_begin, begin, -1};
        }
        return true;
    }
    if (cursor->text_begin < n_bytes) {
        *out = (ts_added_span){cursor->text_begin, n_bytes, -1};
        cursor->text_begin = n_bytes;
        return true;
    }
    return false;
}
