#include "runtime/tokenizer_bpe.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/base/dtype.h"

enum {
    NONE = -1,
    MAX_REMEMBERED_BYTES = 22, // longer pieces seldom come back
    MAX_REMEMBERED_SLOTS = 1 << 13,
};
#define NO_RANK UINT32_MAX

typedef struct merge_slot {
    uint64_t pair; // left << 32 | right
    uint32_t rank; // NO_RANK: empty slot
} merge_slot;

struct ts_bpe {
    int32_t byte_ids[256];
    int32_t *merged; // by rank
    merge_slot *slots;
    size_t slot_mask;
    ts_bpe_token *whole; // open addressing, NULL bytes: empty
    size_t whole_mask;
};

// A token of the piece being merged, at the index of its first byte.
typedef struct symbol {
    int32_t id;
    uint32_t rank; // of the merge with its right neighbour; NO_RANK if there is none
    uint32_t previous, next;
} symbol;

typedef struct remembered {
    char bytes[MAX_REMEMBERED_BYTES];
    uint8_t n_bytes, n_ids; // n_ids 0: empty
    size_t at;              // where its ids stand in the list
} remembered;

struct ts_bpe_scratch {
    symbol *symbols;
    uint64_t *heap; // rank << 32 | index of the left symbol; least first
    size_t capacity;
    remembered *seen; // indexed by hash; a newer piece takes the place of an older one
    size_t seen_mask;
};

static uint64_t mix(uint64_t x) {
    x ^= x >> 32;
    x *= UINT64_C(0xd6e8feb86659fd93);
    x ^= x >> 32;
    x *= UINT64_C(0xd6e8feb86659fd93);
    return x ^ x >> 32;
}

static uint64_t hash_bytes(const char *bytes, size_t n) {
    uint64_t hash = n, word;
    for (; n >= 8; bytes += 8, n -= 8) {
        memcpy(&word, bytes, 8);
        hash = mix(hash ^ word);
    }
    word = 0;
    memcpy(&word, bytes, n);
    return mix(hash ^ word);
}

// The mask of a table of a power of two slots that `n` entries fill to one half at most.
static size_t table_mask(size_t n) {
    size_t size = 16;
    while (size < 2 * n)
        size *= 2;
    return size - 1;
}

ts_status ts_id_list_reserve(ts_id_list *list, size_t n_more) {
    ts_status status = TS_OK;
    size_t need, bytes;
    TS_CHECK(ts_size_add(list->n_ids, n_more, &need), TS_ERR_MEMORY, "tokenizer: too many ids");
    if (need <= list->capacity)
        return TS_OK;
    size_t capacity = list->capacity + list->capacity / 2;
    if (capacity < need)
        capacity = need < 16 ? 16 : need;
    TS_CHECK(ts_size_mul(capacity, sizeof *list->ids, &bytes), TS_ERR_MEMORY, "tokenizer: too many ids");
    int32_t *grown = realloc(list->ids, bytes);
    TS_CHECK(grown, TS_ERR_MEMORY, "tokenizer: out of memory for %zu ids", capacity);
    list->ids = grown;
    list->capacity = capacity;
done:
    return status;
}

static uint64_t pair_key(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static uint32_t merge_rank(const ts_bpe *bpe, int32_t left, int32_t right) {
    const uint64_t pair = pair_key(left, right);
    size_t i = mix(pair) & bpe->slot_mask;
    while (bpe->slots[i].rank != NO_RANK && bpe->slots[i].pair != pair)
        i = (i + 1) & bpe->slot_mask;
    return bpe->slots[i].rank;
}

static int32_t whole_token(const ts_bpe *bpe, const char *bytes, size_t n_bytes) {
    size_t i = hash_bytes(bytes, n_bytes) & bpe->whole_mask;
    for (; bpe->whole[i].bytes; i = (i + 1) & bpe->whole_mask) {
        if (bpe->whole[i].n_bytes == n_bytes && memcmp(bpe->whole[i].bytes, bytes, n_bytes) == 0)
            return bpe->whole[i].id;
    }
    return NONE;
}

ts_status ts_bpe_create(const int32_t byte_ids[256], const ts_bpe_merge *merges, size_t n_merges,
                        const ts_bpe_token *whole_tokens, size_t n_whole_tokens, ts_bpe **out) {
    ts_status status = TS_OK;
    ts_bpe *made = calloc(1, sizeof *made);
    TS_CHECK(made, TS_ERR_MEMORY, "tokenizer: out of memory");
    TS_CHECK(n_merges < NO_RANK, TS_ERR_UNSUPPORTED, "tokenizer: %zu merges; at most 2^32 - 2 are handled", n_merges);
    memcpy(made->byte_ids, byte_ids, sizeof made->byte_ids);

    made->slot_mask = table_mask(n_merges);
    made->slots = malloc((made->slot_mask + 1) * sizeof *made->slots);
    made->merged = malloc((n_merges + 1) * sizeof *made->merged);
    TS_CHECK(made->slots && made->merged, TS_ERR_MEMORY, "tokenizer: out of memory for %zu merges", n_merges);
    for (size_t i = 0; i <= made->slot_mask; i++)
        made->slots[i].rank = NO_RANK;
    for (size_t rank = 0; rank < n_merges; rank++) {
        const uint64_t pair = pair_key(merges[rank].left, merges[rank].right);
        size_t i = mix(pair) & made->slot_mask;
        for (; made->slots[i].rank != NO_RANK; i = (i + 1) & made->slot_mask)
            TS_CHECK(made->slots[i].pair != pair, TS_ERR_INVALID,
                     "merge %zu repeats merge %u (ids %d and %d); each pair may be given once", rank,
                     made->slots[i].rank, merges[rank].left, merges[rank].right);
        made->slots[i] = (merge_slot){pair, (uint32_t)rank};
        made->merged[rank] = merges[rank].merged;
    }

    if (n_whole_tokens > 0) {
        made->whole_mask = table_mask(n_whole_tokens);
        made->whole = calloc(made->whole_mask + 1, sizeof *made->whole);
        TS_CHECK(made->whole, TS_ERR_MEMORY, "tokenizer: out of memory for %zu tokens", n_whole_tokens);
        for (size_t t = 0; t < n_whole_tokens; t++) {
            size_t i = hash_bytes(whole_tokens[t].bytes, whole_tokens[t].n_bytes) & made->whole_mask;
            while (made->whole[i].bytes)
                i = (i + 1) & made->whole_mask;
            made->whole[i] = whole_tokens[t];
        }
    }
    *out = made;
    made = NULL;
done:
    ts_bpe_free(made);
    return status;
}

void ts_bpe_free(ts_bpe *bpe) {
    if (!bpe)
        return;
    free(bpe->merged);
    free(bpe->slots);
    free(bpe->whole);
    free(bpe);
}

ts_status ts_bpe_scratch_create(size_t n_bytes_expected, ts_bpe_scratch **out) {
    ts_status status = TS_OK;
    ts_bpe_scratch *made = calloc(1, sizeof *made);
    TS_CHECK(made, TS_ERR_MEMORY, "tokenizer: out of memory");
    size_t n_slots = 16;
    while (n_slots < MAX_REMEMBERED_SLOTS && n_slots < n_bytes_expected / 8)
        n_slots *= 2;
    made->seen_mask = n_slots - 1;
    made->seen = calloc(n_slots, sizeof *made->seen);
    TS_CHECK(made->seen, TS_ERR_MEMORY, "tokenizer: out of memory");
    *out = made;
    made = NULL;
done:
    ts_bpe_scratch_free(made);
    return status;
}

void ts_bpe_scratch_free(ts_bpe_scratch *scratch) {
    if (!scratch)
        return;
    free(scratch->symbols);
    free(scratch->heap);
    free(scratch->seen);
    free(scratch);
}

static ts_status scratch_reserve(ts_bpe_scratch *scratch, size_t n_symbols) {
    ts_status status = TS_OK;
    if (n_symbols <= scratch->capacity)
        return TS_OK;
    const size_t capacity = n_symbols < 256 ? 256 : n_symbols + n_symbols / 2;
    free(scratch->symbols);
    free(scratch->heap);
    scratch->capacity = 0;
    // n - 1 first candidates, and each of at most n - 1 merges adds two.
    scratch->symbols = malloc(capacity * sizeof *scratch->symbols);
    scratch->heap = malloc(3 * capacity * sizeof *scratch->heap);
    TS_CHECK(scratch->symbols && scratch->heap, TS_ERR_MEMORY, "tokenizer: out of memory for a piece of %zu bytes",
             n_symbols);
    scratch->capacity = capacity;
done:
    return status;
}

static void heap_sift_down(uint64_t *heap, size_t n, size_t i) {
    const uint64_t value = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child])
            child++;
        if (value <= heap[child])
            break;
        heap[i] = heap[child];
    }
    heap[i] = value;
}

static void heap_push(uint64_t *heap, size_t *n, uint64_t value) {
    size_t i = (*n)++;
    for (; i > 0 && value < heap[(i - 1) / 2]; i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = value;
}

static uint64_t heap_pop(uint64_t *heap, size_t *n) {
    const uint64_t least = heap[0];
    heap[0] = heap[--*n];
    if (*n > 0)
        heap_sift_down(heap, *n, 0);
    return least;
}

// Looks up the merge of symbol i with its right neighbour, and queues it.
static void offer_pair(const ts_bpe *bpe, ts_bpe_scratch *scratch, size_t *n_heap, uint32_t i, uint32_t end) {
    symbol *s = scratch->symbols;
    s[i].rank = s[i].next < end ? merge_rank(bpe, s[i].id, s[s[i].next].id) : NO_RANK;
    if (s[i].rank != NO_RANK)
        heap_push(scratch->heap, n_heap, (uint64_t)s[i].rank << 32 | i);
}

static void merge_symbols(const ts_bpe *bpe, ts_bpe_scratch *scratch, uint32_t n) {
    symbol *s = scratch->symbols;
    uint64_t *heap = scratch->heap;
    size_t n_heap = 0;
    for (uint32_t i = 0; i + 1 < n; i++) {
        s[i].rank = merge_rank(bpe, s[i].id, s[i + 1].id);
        if (s[i].rank != NO_RANK)
            heap[n_heap++] = (uint64_t)s[i].rank << 32 | i;
    }
    s[n - 1].rank = NO_RANK;
    for (size_t i = n_heap / 2; i-- > 0;)
        heap_sift_down(heap, n_heap, i);

    while (n_heap > 0) {
        const uint64_t top = heap_pop(heap, &n_heap);
        const uint32_t i = (uint32_t)top, rank = (uint32_t)(top >> 32);
        if (s[i].rank != rank) // a neighbour changed since, or the symbol was swallowed
            continue;
        const uint32_t gone = s[i].next, after = s[gone].next;
        s[i].id = bpe->merged[rank];
        s[i].next = after;
        s[gone].id = NONE;
        s[gone].rank = NO_RANK;
        if (after < n)
            s[after].previous = i;
        offer_pair(bpe, scratch, &n_heap, i, n);
        if (i > 0)
            offer_pair(bpe, scratch, &n_heap, s[i].previous, n);
    }
}

static ts_status encode_afresh(const ts_bpe *bpe, ts_bpe_scratch *scratch, const char *piece, size_t n_bytes,
                               ts_id_list *list) {
    ts_status status = TS_OK;
    TS_CHECK(n_bytes < UINT32_MAX, TS_ERR_UNSUPPORTED,
             "tokenizer: a piece of %zu bytes without a place to cut; pieces up to 4 GiB are handled", n_bytes);
    if (bpe->whole) {
        const int32_t id = whole_token(bpe, piece, n_bytes);
        if (id != NONE) {
            TS_TRY(ts_id_list_reserve(list, 1));
            list->ids[list->n_ids++] = id;
            goto done;
        }
    }
    TS_TRY(scratch_reserve(scratch, n_bytes));
    TS_TRY(ts_id_list_reserve(list, n_bytes));
    const uint32_t n = (uint32_t)n_bytes;
    for (uint32_t i = 0; i < n; i++)
        scratch->symbols[i] = (symbol){bpe->byte_ids[(uint8_t)piece[i]], NO_RANK, i - 1, i + 1};
    merge_symbols(bpe, scratch, n);
    for (uint32_t i = 0; i < n; i = scratch->symbols[i].next)
        list->ids[list->n_ids++] = scratch->symbols[i].id;
done:
    return status;
}

ts_status ts_bpe_encode(const ts_bpe *bpe, ts_bpe_scratch *scratch, const char *piece, size_t n_bytes,
                        ts_id_list *list) {
    ts_status status = TS_OK;
    if (n_bytes == 0)
        return TS_OK;
    if (n_bytes > MAX_REMEMBERED_BYTES)
        return encode_afresh(bpe, scratch, piece, n_bytes, list);
    remembered *seen = &scratch->seen[hash_bytes(piece, n_bytes) & scratch->seen_mask];
    if (seen->n_ids > 0 && seen->n_bytes == n_bytes && memcmp(seen->bytes, piece, n_bytes) == 0) {
        TS_TRY(ts_id_list_reserve(list, seen->n_ids));
        memcpy(list->ids + list->n_ids, list->ids + seen->at, seen->n_ids * sizeof *list->ids);
        list->n_ids += seen->n_ids;
        goto done;
    }
    const size_t at = list->n_ids;
    TS_TRY(encode_afresh(bpe, scratch, piece, n_bytes, list));
    memcpy(seen->bytes, piece, n_bytes);
    seen->n_bytes = (uint8_t)n_bytes;
    seen->n_ids = (uint8_t)(list->n_ids - at);
    seen->at = at;
done:
    return status;
}
