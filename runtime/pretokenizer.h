// Cuts text into the pieces inside which byte-level BPE may merge, exactly as the regular expressions of GPT-2, Llama-3
// and Qwen2 do in the Hugging Face tokenizers package. Letters and digits are those of the Unicode version the PCRE2
// library was built with.
//
//     ts_pretokenizer_create(kind, &pretokenizer);             // once; may be shared by threads
//     ts_pretokenizer_scratch_create(pretokenizer, &scratch);  // one per thread or call
//     for (begin = 0; begin < n_bytes; begin = end)
//         ts_pretokenizer_next(pretokenizer, scratch, text, n_bytes, begin, &end);
#ifndef TS_RUNTIME_PRETOKENIZER_H
#define TS_RUNTIME_PRETOKENIZER_H

#include <stdbool.h>
#include <stddef.h>

#include "kernels/base/status.h"

typedef enum ts_pretokenizer_kind {
    TS_PRETOKENIZER_GPT2,
    TS_PRETOKENIZER_LLAMA3,
    TS_PRETOKENIZER_QWEN2,
    TS_N_PRETOKENIZERS
} ts_pretokenizer_kind;

typedef struct ts_pretokenizer ts_pretokenizer;
typedef struct ts_pretokenizer_scratch ts_pretokenizer_scratch;

// "GPT-2", "Llama-3", "Qwen2".
const char *ts_pretokenizer_name(ts_pretokenizer_kind kind);

// The expression as tokenizer.json spells it.
const char *ts_pretokenizer_regex(ts_pretokenizer_kind kind);

// The kind whose expression is exactly `regex`; false (and *out left alone) when there is none.
bool ts_pretokenizer_find(const char *regex, ts_pretokenizer_kind *out);

ts_status ts_pretokenizer_create(ts_pretokenizer_kind kind, ts_pretokenizer **out);
void ts_pretokenizer_free(ts_pretokenizer *pretokenizer);

ts_status ts_pretokenizer_scratch_create(const ts_pretokenizer *pretokenizer, ts_pretokenizer_scratch **out);
void ts_pretokenizer_scratch_free(ts_pretokenizer_scratch *scratch);

// The piece of text[0, n_bytes) that begins at `begin` (< n_bytes) ends at *end (> begin). The text is valid UTF-8 and
// `begin` is 0 or an earlier *end: pieces cover the text without gaps.
ts_status ts_pretokenizer_next(const ts_pretokenizer *pretokenizer, ts_pretokenizer_scratch *scratch, const char *text,
                               size_t n_bytes, size_t begin, size_t *end);

#endif
