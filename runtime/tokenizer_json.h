// Reads the tokenizer.json of a byte-level BPE vocabulary, strictly: whatever could change an id and is not handled
// exactly is refused by name, with the place in the file and what is accepted.
//
//     ts_tokenizer_spec spec = {0};
//     ts_tokenizer_json_read("dir/tokenizer.json", &spec);
//     ts_tokenizer_spec_free(&spec);
#ifndef TS_RUNTIME_TOKENIZER_JSON_H
#define TS_RUNTIME_TOKENIZER_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/base/status.h"
#include "runtime/added_tokens.h"
#include "runtime/pretokenizer.h"
#include "runtime/tokenizer_bpe.h"

typedef struct ts_vocab_entry {
    const char *bytes; // in ts_tokenizer_spec.text; NULL where no token has this id
    size_t n_bytes;
    bool special;    // an added token marked so
    bool byte_level; // the vocabulary spells it in the 256-letter byte alphabet, so that a piece of text can equal it
} ts_vocab_entry;

// What the file says, as plain data. All pointers are owned here.
typedef struct ts_tokenizer_spec {
    char *text;            // the bytes of every token
    ts_vocab_entry *vocab; // [vocab_size], by id
    int32_t vocab_size;
    int32_t byte_ids[256];
    ts_bpe_merge *merges; // [n_merges], by rank
    size_t n_merges;
    bool ignore_merges;
    ts_added_token *added; // [n_added], special ones first, in the file's order; content in `text`
    size_t n_added;
    bool nfc;
    ts_pretokenizer_kind pretokenizer;
    bool add_prefix_space;
    bool prefix_each_piece; // the space is put before every piece, not before the text (Split comes before ByteLevel)
    int32_t *prefix_ids, *suffix_ids; // [n_prefix_ids], [n_suffix_ids]: what the post-processor puts around a text
    size_t n_prefix_ids, n_suffix_ids;
} ts_tokenizer_spec;

// Fills *spec, which was all zero; on failure it is all zero again. TS_ERR_IO, TS_ERR_FORMAT (not what such a file may
// hold), TS_ERR_UNSUPPORTED (a tokenizer of another kind).
ts_status ts_tokenizer_json_read(const char *path, ts_tokenizer_spec *spec);

// Releases what *spec owns and zeroes it.
void ts_tokenizer_spec_free(ts_tokenizer_spec *spec);

#endif
