// Writes one safetensors file as a stream: the header first, then the data in pieces of any size, so that a result such
// as logits [n, V] never has to be in memory as a whole. Whoever looks at `path` sees the old file or the finished new
// one.
//
//     const ts_tensor_spec specs[] = {{"logits", TS_F32, 2, {n, V}}};
//     TS_TRY(ts_safetensors_writer_create(path, specs, 1, &writer));
//     for (...)
//         TS_TRY(ts_safetensors_writer_append(writer, block, block_bytes));
//     TS_TRY(ts_safetensors_writer_finish(writer));
// done:
//     ts_safetensors_writer_free(writer);
//
// One thread at a time per writer.
#ifndef TS_SAFETENSORS_WRITE_H
#define TS_SAFETENSORS_WRITE_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "runtime/safetensors.h"

typedef struct ts_safetensors_writer ts_safetensors_writer;

typedef struct ts_tensor_spec {
    const char *name; // UTF-8, distinct, not "__metadata__"; read only during create
    ts_dtype dtype;
    int n_dims; // 0 for a scalar, at most TS_SAFETENSORS_MAX_DIMS
    int64_t shape[TS_SAFETENSORS_MAX_DIMS];
} ts_tensor_spec;

// Creates a temporary file beside `path` and writes the header to it. The data begins at a multiple of 8 bytes; tensors
// follow each other in the order of the specs without padding, so put the widest dtypes first to keep them aligned.
// *out is owned: ts_safetensors_writer_free. Errors: TS_ERR_INVALID (a spec; the sentence names it; or `path` is a
// directory, a device or a pipe), TS_ERR_IO, TS_ERR_MEMORY.
ts_status ts_safetensors_writer_create(const char *path, const ts_tensor_spec *specs, size_t n_specs,
                                       ts_safetensors_writer **out);

// Appends n_bytes of data: row-major, little-endian, tensor after tensor in the order of the specs. A piece may begin
// and end anywhere. TS_ERR_INVALID when it is more than the specs have room for (nothing is written then) or after
// finish; TS_ERR_IO when the system fails, after which the writer only fails.
ts_status ts_safetensors_writer_append(ts_safetensors_writer *writer, const void *data, size_t n_bytes);

// Checks that every byte came (TS_ERR_INVALID when not; appending may go on), flushes the file to the disk and renames
// it to `path`, in place of any file there. Call once.
ts_status ts_safetensors_writer_finish(ts_safetensors_writer *writer);

// Removes the temporary file when finish did not succeed. NULL is fine.
void ts_safetensors_writer_free(ts_safetensors_writer *writer);

#endif
