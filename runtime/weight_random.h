// Random numbers of the shape of a model's weights, so that a model can be timed without a checkpoint.
#ifndef TS_WEIGHT_RANDOM_H
#define TS_WEIGHT_RANDOM_H

#include "runtime/weight_source.h"

// How the tensor of that name and shape is drawn.
ts_weight_tensor ts_weight_random_tensor(uint64_t seed, const char *name, bool is_vector, int64_t rows, int64_t cols);

// Elements [first, first + n) of it, counted row by row, before they are rounded to BF16.
void ts_weight_random_draw(const ts_weight_tensor *tensor, int64_t first, int64_t n, float *out);

#endif
