// Text to token ids and back. Two kinds: "bytes", where a token is a byte and 0 is the end of text, and the
// "tokenizer.json" of a byte-level BPE vocabulary with the pre-tokenizer of GPT-2, Llama-3 or Qwen2, whose ids are
// exactly those of the Hugging Face tokenizers package. Anything else is refused by name.
//
//     ts_tokenizer_create(model_dir, config_value, &tokenizer);
//     ts_tokenizer_encode(tokenizer, text, n_bytes, true, &ids, &n_ids);   free(ids);
//     ts_tokenizer_token_bytes(tokenizer, id, &n_bytes, &is_special)      // whole characters: runtime/utf8_stream.h
//     ts_tokenizer_free(tokenizer);
//
// Letters, digits and NFC are those of the Unicode versions of PCRE2 and utf8proc: ids can differ only for characters
// that one side's Unicode tables do not know yet.
//
// A const ts_tokenizer may be used by several threads at once.
#ifndef TS_RUNTIME_TOKENIZER_H
#define TS_RUNTIME_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/base/status.h"

typedef struct ts_tokenizer ts_tokenizer;

// kind: the value of config.json's "tokenizer", that is "bytes" or "tokenizer.json"; NULL when config.json has none,
// and model_dir/tokenizer.json must then exist. Errors: TS_ERR_INVALID (another kind), TS_ERR_IO, TS_ERR_FORMAT,
// TS_ERR_UNSUPPORTED (a tokenizer.json of another kind of tokenizer), TS_ERR_MEMORY.
ts_status ts_tokenizer_create(const char *model_dir, const char *kind, ts_tokenizer **out);
void ts_tokenizer_free(ts_tokenizer *tokenizer);

// The largest id + 1. Ids below it may be holes.
int32_t ts_tokenizer_vocab_size(const ts_tokenizer *tokenizer);

// The ids of text[0, n_bytes), in *ids (malloc'd, the caller's; NULL when there are none). Added and special tokens are
// found in the text in any case; add_special also puts around it what the file's post-processor does (the
// <|begin_of_text|> of Llama-3). Text that is not UTF-8 is TS_ERR_INVALID with the byte offset, except for "bytes".
ts_status ts_tokenizer_encode(const ts_tokenizer *tokenizer, const char *text, size_t n_bytes, bool add_special,
                              int32_t **ids, size_t *n_ids);

// The bytes an id stands for: any bytes, possibly a part of a character; borrowed until the tokenizer is freed.
// *is_special (may be NULL): the token is a mark, not text. An id that no token has: *n_bytes is 0. An added token
// stands for its content as the file spells it, also where the package would take letters such as "ï" for raw bytes.
const char *ts_tokenizer_token_bytes(const ts_tokenizer *tokenizer, int32_t id, size_t *n_bytes, bool *is_special);

#endif
