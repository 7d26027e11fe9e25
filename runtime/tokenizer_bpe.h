// Byte-pair merging of one piece of text into token ids: start from one token a byte, and as long as two neighbours
// have a merge, apply the one of lowest rank, the leftmost of equals.
//
//     ts_bpe_create(&config, &bpe);                                   // once; may be shared by threads
//     ts_bpe_scratch_create(n_bytes_expected, &scratch);              // one per thread or call
//     for each piece:  ts_bpe_encode(bpe, scratch, piece, n_bytes, &ids);
#ifndef TS_RUNTIME_TOKENIZER_BPE_H
#define TS_RUNTIME_TOKENIZER_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/base/status.h"

// left, right -> merged; the index in the list is the rank.
typedef struct ts_bpe_merge {
    int32_t left, right, merged;
} ts_bpe_merge;

// The bytes of a token, borrowed.
typedef struct ts_bpe_token {
    const char *bytes;
    size_t n_bytes;
    int32_t id;
} ts_bpe_token;

// A growing list of ids. All zero is empty; `ids` is malloc'd and belongs to whoever holds the list.
typedef struct ts_id_list {
    int32_t *ids;
    size_t n_ids, capacity;
} ts_id_list;

ts_status ts_id_list_reserve(ts_id_list *list, size_t n_more);

typedef struct ts_bpe ts_bpe;
typedef struct ts_bpe_scratch ts_bpe_scratch;

// byte_ids: the token of each single byte. merges: no pair twice (TS_ERR_INVALID). whole_tokens: tokens that a piece
// equal to them becomes outright, whatever the merges would give ("ignore_merges"); may be empty; their bytes must
// outlive the result, the rest is copied.
ts_status ts_bpe_create(const int32_t byte_ids[256], const ts_bpe_merge *merges, size_t n_merges,
                        const ts_bpe_token *whole_tokens, size_t n_whole_tokens, ts_bpe **out);
void ts_bpe_free(ts_bpe *bpe);

// Working memory, and a memory of short pieces met before, sized for a text of about n_bytes_expected. Serves one list
// of ids, which must only grow while it does, and one thread at a time.
ts_status ts_bpe_scratch_create(size_t n_bytes_expected, ts_bpe_scratch **out);
void ts_bpe_scratch_free(ts_bpe_scratch *scratch);

// Appends the ids of piece[0, n_bytes) to `list`. Time O(n log n), memory 48 n. Errors: TS_ERR_MEMORY;
// TS_ERR_UNSUPPORTED for a piece of 4 GiB or more.
ts_status ts_bpe_encode(const ts_bpe *bpe, ts_bpe_scratch *scratch, const char *piece, size_t n_bytes,
                        ts_id_list *list);

#endif
