// Where the tensors of a model come from: its safetensors files, or a seed.
//
//     ts_weight_source *source;
//     TS_TRY(ts_weight_source_open_files(dir, &source));              // or ts_weight_source_open_random(seed, &source)
//     TS_TRY(ts_weight_source_find(source, "lm_head.weight", false, V, D, &tensor));
//     ts_weight_tensor_read(&tensor, row, col, n, TS_BF16, to);       // any part of it, in any order
//     TS_TRY(ts_weight_source_finish(source));                        // whether something was left over
//     ts_weight_source_free(source);
#ifndef TS_WEIGHT_SOURCE_H
#define TS_WEIGHT_SOURCE_H

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

#include <stdint.h>

typedef struct ts_weight_source ts_weight_source;

// One tensor: [rows, cols], where a vector is one row. Borrowed from the source until it is freed.
typedef struct ts_weight_tensor {
    ts_dtype dtype; // F32, BF16 or F16
    int64_t rows, cols;
    const void *data;   // its elements; NULL: made as they are read, from the three below
    uint64_t key;       // of its generator
    float mean, spread; // standard deviation
} ts_weight_tensor;

// The files of a model directory (runtime/safetensors.h).
ts_status ts_weight_source_open_files(const char *dir, ts_weight_source **out);

// Any tensor one asks for, of BF16 numbers that depend on the seed, the tensor's name and the element's place in it,
// and on nothing else: any shard of it has the same numbers. Matrices are near normal with standard deviation 1 /
// sqrt(cols), norms are 1, and the gates' biases are those of a trained model (runtime/weight_random.c).
ts_status ts_weight_source_open_random(uint64_t seed, ts_weight_source **out);

void ts_weight_source_free(ts_weight_source *source); // NULL is fine

// The tensor of that name, which must be [rows, cols] or, where is_vector is set, [cols]. TS_ERR_FORMAT when it is
// missing, of another shape or of a dtype that weights cannot have; the sentence names file and tensor.
ts_status ts_weight_source_find(ts_weight_source *source, const char *name, bool is_vector, int64_t rows, int64_t cols,
                                ts_weight_tensor *out);

// Elements [col, col + n) of a row, as `dtype`: the tensor's own, F32 or BF16 (rounded to nearest).
void ts_weight_tensor_read(const ts_weight_tensor *tensor, int64_t row, int64_t col, int64_t n, ts_dtype dtype,
                           void *out);

// TS_ERR_FORMAT when the files have a tensor that was never asked for.
ts_status ts_weight_source_finish(const ts_weight_source *source);

#endif
