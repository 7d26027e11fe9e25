// The custom_ids of a job, each with the line where it came first, to find the ones that come twice. Jobs can have any
// number of lines, so memory must not grow with them: only a 128-bit hash of each id is kept; the first
// TS_ID_SET_IN_MEMORY of them live in memory, and from then on all live in a temporary file that has no name and
// vanishes with the process. The file takes 32 to 96 bytes an id. That any two of 10^9 different ids share a hash has
// probability 10^-21.
//
// Order of calls: ts_id_set_create, ts_id_set_add ..., ts_id_set_free. One thread at a time.
#ifndef TS_RUNTIME_ID_SET_H
#define TS_RUNTIME_ID_SET_H

#include "kernels/base/status.h"

#include <stddef.h>
#include <stdint.h>

#define TS_ID_SET_IN_MEMORY 65536

typedef struct ts_id_set ts_id_set;

typedef struct ts_id_hash {
    uint64_t low, high;
} ts_id_hash;

// SipHash-2-4 with 128 bits of output and the fixed key 00 01 .. 0f: the same for an id in every run and on every
// machine.
ts_id_hash ts_id_hash_compute(const char *id, size_t n_bytes);

// `directory` is where the temporary file goes when it is needed; it should be on a disk, not in memory. Copied.
ts_status ts_id_set_create(const char *directory, ts_id_set **set);

// Adds the id read on `line` (1 or more). *first_line becomes 0 when the id is new, else the line it was added with;
// that line stays. TS_ERR_IO names the directory; the set is then as it was before the call.
ts_status ts_id_set_add(ts_id_set *set, const char *id, size_t n_bytes, int64_t line, int64_t *first_line);

int64_t ts_id_set_count(const ts_id_set *set);

// Size of the temporary file; 0 while everything is in memory.
int64_t ts_id_set_file_bytes(const ts_id_set *set);

void ts_id_set_free(ts_id_set *set);

#endif
