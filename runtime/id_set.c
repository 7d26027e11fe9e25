// Open addressing with linear probing, the same layout in memory and in the file. A slot is the top bits of the hash,
// so doubling the table keeps the order of entries and the copy walks both tables from front to back.
#include "runtime/id_set.h"

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    FIRST_LOG2_SLOTS = 10, // 24 KiB: a small job pays nothing
    PROBE_ENTRIES = 32,    // read at once: at the fullest, the mean search ends within 9
    COPY_ENTRIES = 1024,
};

typedef struct entry {
    ts_id_hash hash;
    int64_t line; // 0: the slot is empty
} entry;

struct ts_id_set {
    char *directory;
    entry *table; // [1 << log2_slots]; NULL once the entries are in the file
    int file;     // -1 while they are in memory
    int log2_slots;
    int64_t count;
};

static inline uint64_t rotate(uint64_t x, int bits) {
    return x << bits | x >> (64 - bits);
}

static void sip_rounds(uint64_t v[4], int n) {
    for (int i = 0; i < n; i++) {
        v[0] += v[1];
        v[2] += v[3];
        v[1] = rotate(v[1], 13) ^ v[0];
        v[3] = rotate(v[3], 16) ^ v[2];
        v[0] = rotate(v[0], 32);
        v[2] += v[1];
        v[0] += v[3];
        v[1] = rotate(v[1], 17) ^ v[2];
        v[3] = rotate(v[3], 21) ^ v[0];
        v[2] = rotate(v[2], 32);
    }
}

static uint64_t little_endian(const unsigned char *bytes, size_t n) {
    uint64_t word = 0;
    for (size_t i = 0; i < n; i++)
        word |= (uint64_t)bytes[i] << (8 * i);
    return word;
}

ts_id_hash ts_id_hash_compute(const char *id, size_t n_bytes) {
    const unsigned char *bytes = (const unsigned char *)id;
    const uint64_t key[2] = {0x0706050403020100u, 0x0f0e0d0c0b0a0908u};
    uint64_t v[4] = {
        key[0] ^ 0x736f6d6570736575u,
        key[1] ^ 0x646f72616e646f6du ^ 0xee, // 0xee and 0xdd: the 128-bit form
        key[0] ^ 0x6c7967656e657261u,
        key[1] ^ 0x7465646279746573u,
    };
    const size_t n_whole = n_bytes / 8;
    for (size_t i = 0; i <= n_whole; i++) {
        // The last word is padded with zeros and ends in the length modulo 256.
        const uint64_t word = i < n_whole ? little_endian(bytes + 8 * i, 8)
                                          : little_endian(bytes + 8 * i, n_bytes % 8) | (uint64_t)n_bytes << 56;
        v[3] ^= word;
        sip_rounds(v, 2);
        v[0] ^= word;
    }
    ts_id_hash hash;
    v[2] ^= 0xee;
    sip_rounds(v, 4);
    hash.low = v[0] ^ v[1] ^ v[2] ^ v[3];
    v[1] ^= 0xdd;
    sip_rounds(v, 4);
    hash.high = v[0] ^ v[1] ^ v[2] ^ v[3];
    return hash;
}

static inline uint64_t slot_of(ts_id_hash hash, int log2_slots) {
    return hash.high >> (64 - log2_slots);
}

// Whether a search for `hash` ends at this slot: it is empty or holds it.
static inline bool search_ends(const entry *slot, ts_id_hash hash) {
    return slot->line == 0 || (slot->hash.low == hash.low && slot->hash.high == hash.high);
}

static entry *find_in_memory(entry *table, int log2_slots, ts_id_hash hash) {
    const uint64_t mask = ((uint64_t)1 << log2_slots) - 1;
    uint64_t slot = slot_of(hash, log2_slots);
    while (!search_ends(&table[slot], hash))
        slot = (slot + 1) & mask;
    return &table[slot];
}

static ts_status transfer_failed(const ts_id_set *set, const char *verb, ssize_t result) {
    return TS_FAIL(TS_ERR_IO, "%s: cannot %s the temporary file of custom_ids: %s", set->directory, verb,
                   result < 0 ? strerror(errno) : "it ended early");
}

static ts_status read_entries(const ts_id_set *set, int file, uint64_t slot, entry *entries, uint64_t n) {
    for (size_t at = 0; at < n * sizeof(entry);) {
        const ssize_t got =
            pread(file, (char *)entries + at, n * sizeof(entry) - at, (off_t)(slot * sizeof(entry) + at));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return transfer_failed(set, "read", got);
        at += (size_t)got;
    }
    return TS_OK;
}

static ts_status write_entry(const ts_id_set *set, int file, uint64_t slot, const entry *value) {
    for (size_t at = 0; at < sizeof *value;) {
        const ssize_t put =
            pwrite(file, (const char *)value + at, sizeof *value - at, (off_t)(slot * sizeof *value + at));
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return transfer_failed(set, "write", put);
        at += (size_t)put;
    }
    return TS_OK;
}

// Puts `value` in the file unless its hash is there; *first_line as in ts_id_set_add.
static ts_status add_in_file(const ts_id_set *set, int file, int log2_slots, const entry *value, int64_t *first_line) {
    ts_status status = TS_OK;
    const uint64_t n_slots = (uint64_t)1 << log2_slots;
    uint64_t slot = slot_of(value->hash, log2_slots);
    for (;;) {
        entry probed[PROBE_ENTRIES];
        const uint64_t n = n_slots - slot < PROBE_ENTRIES ? n_slots - slot : PROBE_ENTRIES;
        TS_TRY(read_entries(set, file, slot, probed, n));
        for (uint64_t i = 0; i < n; i++) {
            if (search_ends(&probed[i], value->hash)) {
                if (probed[i].line == 0)
                    TS_TRY(write_entry(set, file, slot + i, value));
                *first_line = probed[i].line;
                goto done;
            }
        }
        slot = (slot + n) & (n_slots - 1);
    }
done:
    return status;
}

static ts_status create_file(const ts_id_set *set, int log2_slots, int *out) {
    ts_status status = TS_OK;
    int file = -1;
    char *path = NULL;
    TS_CHECK(asprintf(&path, "%s/tessera-ids-XXXXXX", set->directory) >= 0, TS_ERR_MEMORY,
             "id set: out of memory for a path");
    file = mkostemp(path, 0);
    TS_CHECK(file >= 0, TS_ERR_IO,
             "%s: cannot create a temporary file for custom_ids: %s; name a directory that can be written",
             set->directory, strerror(errno));
    unlink(path);
    TS_CHECK(ftruncate(file, (off_t)(sizeof(entry) << log2_slots)) == 0, TS_ERR_IO,
             "%s: cannot extend the temporary file of custom_ids to %zu bytes: %s", set->directory,
             sizeof(entry) << log2_slots, strerror(errno));
    *out = file;
    file = -1;
done:
    if (file >= 0)
        close(file);
    free(path);
    return status;
}

static ts_status grow_in_memory(ts_id_set *set) {
    const int log2_slots = set->log2_slots + 1;
    entry *table = calloc((size_t)1 << log2_slots, sizeof *table);
    if (!table)
        return TS_FAIL(TS_ERR_MEMORY, "id set: out of memory for %zu entries", (size_t)1 << log2_slots);
    for (size_t i = 0; i < (size_t)1 << set->log2_slots; i++) {
        if (set->table[i].line != 0)
            *find_in_memory(table, log2_slots, set->table[i].hash) = set->table[i];
    }
    free(set->table);
    set->table = table;
    set->log2_slots = log2_slots;
    return TS_OK;
}

// Copies all entries, from memory or from the present file, to a new file of twice the slots.
static ts_status grow_in_file(ts_id_set *set) {
    ts_status status = TS_OK;
    int file = -1;
    const int log2_slots = set->log2_slots + 1;
    const uint64_t n_slots = (uint64_t)1 << set->log2_slots; // a multiple of COPY_ENTRIES
    entry *copied = malloc(COPY_ENTRIES * sizeof *copied);
    TS_CHECK(copied, TS_ERR_MEMORY, "id set: out of memory for a copy buffer");
    TS_TRY(create_file(set, log2_slots, &file));
    for (uint64_t slot = 0; slot < n_slots; slot += COPY_ENTRIES) {
        if (set->table)
            memcpy(copied, set->table + slot, COPY_ENTRIES * sizeof *copied);
        else
            TS_TRY(read_entries(set, set->file, slot, copied, COPY_ENTRIES));
        for (size_t i = 0; i < COPY_ENTRIES; i++) {
            int64_t present;
            if (copied[i].line != 0)
                TS_TRY(add_in_file(set, file, log2_slots, &copied[i], &present));
        }
    }
    free(set->table);
    set->table = NULL;
    if (set->file >= 0)
        close(set->file);
    set->file = file;
    file = -1;
    set->log2_slots = log2_slots;
done:
    if (file >= 0)
        close(file);
    free(copied);
    return status;
}

ts_status ts_id_set_create(const char *directory, ts_id_set **out) {
    ts_status status = TS_OK;
    ts_id_set *set = calloc(1, sizeof *set);
    TS_CHECK(set, TS_ERR_MEMORY, "id set: out of memory");
    set->file = -1;
    set->log2_slots = FIRST_LOG2_SLOTS;
    set->directory = strdup(directory);
    set->table = calloc((size_t)1 << FIRST_LOG2_SLOTS, sizeof *set->table);
    TS_CHECK(set->directory && set->table, TS_ERR_MEMORY, "id set: out of memory");
    *out = set;
    set = NULL;
done:
    ts_id_set_free(set);
    return status;
}

ts_status ts_id_set_add(ts_id_set *set, const char *id, size_t n_bytes, int64_t line, int64_t *first_line) {
    assert(line > 0);
    ts_status status = TS_OK;
    const entry value = {ts_id_hash_compute(id, n_bytes), line};
    int64_t present;
    // Filled to three quarters at most; the table that leaves memory is a quarter full, so that 3/4 is far again.
    if (set->table && set->count == TS_ID_SET_IN_MEMORY)
        TS_TRY(grow_in_file(set));
    else if (set->count >= (int64_t)3 << (set->log2_slots - 2))
        TS_TRY(set->table ? grow_in_memory(set) : grow_in_file(set));
    if (set->table) {
        entry *slot = find_in_memory(set->table, set->log2_slots, value.hash);
        present = slot->line;
        if (present == 0)
            *slot = value;
    } else {
        TS_TRY(add_in_file(set, set->file, set->log2_slots, &value, &present));
    }
    set->count += present == 0;
    *first_line = present;
done:
    return status;
}

int64_t ts_id_set_count(const ts_id_set *set) {
    return set->count;
}

int64_t ts_id_set_file_bytes(const ts_id_set *set) {
    return set->table ? 0 : (int64_t)sizeof(entry) << set->log2_slots;
}

void ts_id_set_free(ts_id_set *set) {
    if (!set)
        return;
    if (set->file >= 0)
        close(set->file);
    free(set->table);
    free(set->directory);
    free(set);
}
