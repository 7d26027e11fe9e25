// Finds a vocabulary's added tokens ("<|endoftext|>" and the like) in text: leftmost first, the longest of those that
// begin at one place, each with its rules about words and the white space around it.
//
//     ts_added_tokens_create(tokens, n, &added);      // once; may be shared by threads
//     ts_added_cursor cursor = {0};
//     while (ts_added_tokens_next(added, text, n_bytes, &cursor, &span))
//         span.id < 0 ? text[span.begin, span.end) is ordinary text : it is token span.id
#ifndef TS_RUNTIME_ADDED_TOKENS_H
#define TS_RUNTIME_ADDED_TOKENS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/base/status.h"

typedef struct ts_added_token {
    const char *content; // valid UTF-8, not empty
    size_t n_bytes;
    int32_t id;
    bool special;     // is no text: not shown when decoding
    bool single_word; // found only where no word character touches it
    bool lstrip;      // takes the white space before it
    bool rstrip;      // takes the white space after it
    bool normalized;  // looked for in the normalized text, not in the raw one
} ts_added_token;

typedef struct ts_added_tokens ts_added_tokens;

typedef struct ts_added_span {
    size_t begin, end;
    int32_t id; // -1: ordinary text, never empty
} ts_added_span;

// All zero is the beginning of a text.
typedef struct ts_added_cursor {
    size_t scanned;        // no token that begins before this is still to come
    size_t text_begin;     // where ordinary text not yet handed out begins
    ts_added_span pending; // a token found, waiting for the text before it to be handed out
    bool has_pending;
} ts_added_cursor;

// The tokens are copied. Of two with the same content the earlier one is found. n may be 0: all text is then ordinary.
ts_status ts_added_tokens_create(const ts_added_token *tokens, size_t n_tokens, ts_added_tokens **out);
void ts_added_tokens_free(ts_added_tokens *added);

// The next span of text[0, n_bytes), which is valid UTF-8 and the same at every call with this cursor. False at the
// end.
bool ts_added_tokens_next(const ts_added_tokens *added, const char *text, size_t n_bytes, ts_added_cursor *cursor,
                          ts_added_span *out);

#endif
