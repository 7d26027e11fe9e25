// Tensors from safetensors files, read-only and mapped into memory. Nothing in the files is trusted.
//
//     ts_safetensors *set = NULL;
//     TS_TRY(ts_safetensors_open_model(dir, &set));
//     const ts_safetensor *t = ts_safetensors_find(set, "model.norm.weight"); // NULL when absent
//     ... t->data is t->n_bytes bytes of t->dtype, row-major, little-endian ...
//     ts_safetensors_free(set);
//
// A file: 8 bytes, the length of the header (little-endian, at most TS_SAFETENSORS_MAX_HEADER); the header, a JSON
// object
// {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [BEGIN, END]}, ...}; the data, in which offsets count.
// Accepted only when the tensors cover the data exactly, from its first byte to the end of the file, without overlap
// or hole, each with END - BEGIN = elements times the dtype's bytes; a dimension may be 0. "__metadata__" may hold
// strings only, and is not kept. A tensor's object holds these three keys and no other.
//
// Data may be unaligned, because the format does not pad tensors: copy, or read with memcpy, unless the address says
// otherwise.
//
// The files must not shrink while the set lives: the system answers a read past the new end with SIGBUS, which kills
// the process. Replace weights by renaming a new file over the old one, never in place.
//
// Opening parses the header into memory that is freed again: for a sane one a few kB, for the worst one of 100 MB about
// 2.5 GB. Where that much is not to be had, opening fails with TS_ERR_MEMORY.
//
// After open a set is immutable: any number of threads may read it.
#ifndef TS_SAFETENSORS_H
#define TS_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

#define TS_SAFETENSORS_MAX_DIMS   8
#define TS_SAFETENSORS_MAX_HEADER 100000000 // bytes; the format's own limit
#define TS_SAFETENSORS_MAX_INDEX  100000000 // bytes of model.safetensors.index.json

typedef struct ts_safetensors ts_safetensors;

// All of it is borrowed from the set, until ts_safetensors_free.
typedef struct ts_safetensor {
    const char *name;
    ts_dtype dtype;
    int n_dims; // 0 for a scalar
    int64_t shape[TS_SAFETENSORS_MAX_DIMS];
    const void *data; // n_bytes bytes, of any alignment; never NULL, also when n_bytes is 0
    size_t n_bytes;
    const char *path; // the file it lies in, for messages
} ts_safetensor;

// Opens one file. *out is owned: ts_safetensors_free.
// Errors: TS_ERR_IO, TS_ERR_INVALID (a directory, a FIFO, a device), TS_ERR_FORMAT (any rule above broken),
// TS_ERR_UNSUPPORTED (a dtype that ts_dtype has not, more than TS_SAFETENSORS_MAX_DIMS dimensions), TS_ERR_MEMORY.
ts_status ts_safetensors_open_file(const char *path, ts_safetensors **out);

// Opens DIR/model.safetensors, or else the shards that "weight_map" in DIR/model.safetensors.index.json names. When
// both are there the single file wins and the index is not read, as in Hugging Face transformers. Shards are plain file
// names in DIR. The map and the shards must agree exactly: every tensor of the map is in the shard it names, no shard
// has a tensor that the map lacks, no tensor is in two shards. Other keys of the index
// ("metadata") are ignored. Errors as above; TS_ERR_IO when DIR has neither file.
ts_status ts_safetensors_open_model(const char *dir, ts_safetensors **out);

void ts_safetensors_free(ts_safetensors *set); // NULL is fine

size_t ts_safetensors_count(const ts_safetensors *set);

// The i-th tensor in the byte order of names, i < count.
const ts_safetensor *ts_safetensors_at(const ts_safetensors *set, size_t i);

// The tensor of that name, NULL when there is none. O(log count).
const ts_safetensor *ts_safetensors_find(const ts_safetensors *set, const char *name);

#endif
