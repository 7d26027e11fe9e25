#include "runtime/weight_source.h"

#include "runtime/safetensors.h"
#include "runtime/weight_random.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ts_weight_source {
    ts_safetensors *files; // NULL: random
    bool *used;            // [tensors of files]
    uint64_t seed;
};

ts_status ts_weight_source_open_files(const char *dir, ts_weight_source **out) {
    ts_status status = TS_OK;
    ts_weight_source *source = calloc(1, sizeof *source);
    TS_CHECK(source, TS_ERR_MEMORY, "weights: out of memory");
    TS_TRY(ts_safetensors_open_model(dir, &source->files));
    source->used = calloc(ts_safetensors_count(source->files) + 1, sizeof *source->used);
    TS_CHECK(source->used, TS_ERR_MEMORY, "weights: out of memory");
    *out = source;
    source = NULL;
done:
    ts_weight_source_free(source);
    return status;
}

ts_status ts_weight_source_open_random(uint64_t seed, ts_weight_source **out) {
    ts_weight_source *source = calloc(1, sizeof *source);
    if (!source)
        return TS_FAIL(TS_ERR_MEMORY, "weights: out of memory");
    source->seed = seed;
    *out = source;
    return TS_OK;
}

void ts_weight_source_free(ts_weight_source *source) {
    if (!source)
        return;
    ts_safetensors_free(source->files);
    free(source->used);
    free(source);
}

static ts_status find_in_files(ts_weight_source *source, const char *name, bool is_vector, int64_t rows, int64_t cols,
                               ts_weight_tensor *out) {
    ts_status status = TS_OK;
    const ts_safetensor *tensor = ts_safetensors_find(source->files, name);
    TS_CHECK(tensor, TS_ERR_FORMAT, "%s: tensor \"%s\" is missing",
             ts_safetensors_count(source->files) ? ts_safetensors_at(source->files, 0)->path : "model", name);
    TS_CHECK(tensor->dtype == TS_F32 || tensor->dtype == TS_BF16 || tensor->dtype == TS_F16, TS_ERR_FORMAT,
             "%s: tensor \"%s\" is %s; weights may be F32, BF16 or F16", tensor->path, name,
             ts_dtype_name(tensor->dtype));
    const bool fits = is_vector ? tensor->n_dims == 1 && tensor->shape[0] == cols
                                : tensor->n_dims == 2 && tensor->shape[0] == rows && tensor->shape[1] == cols;
    if (!fits) {
        char got[22 * TS_SAFETENSORS_MAX_DIMS] = "";
        for (int i = 0, n = 0; i < tensor->n_dims; i++)
            n += snprintf(got + n, sizeof got - (size_t)n, "%s%lld", i ? ", " : "", (long long)tensor->shape[i]);
        if (is_vector)
            status = TS_FAIL(TS_ERR_FORMAT, "%s: tensor \"%s\" has shape [%s]; config.json asks for [%lld]",
                             tensor->path, name, got, (long long)cols);
        else
            status = TS_FAIL(TS_ERR_FORMAT, "%s: tensor \"%s\" has shape [%s]; config.json asks for [%lld, %lld]",
                             tensor->path, name, got, (long long)rows, (long long)cols);
        goto done;
    }
    source->used[tensor - ts_safetensors_at(source->files, 0)] = true; // one array, in the order of names
    *out = (ts_weight_tensor){.dtype = tensor->dtype, .rows = rows, .cols = cols, .data = tensor->data};
done:
    return status;
}

ts_status ts_weight_source_find(ts_weight_source *source, const char *name, bool is_vector, int64_t rows, int64_t cols,
                                ts_weight_tensor *out) {
    if (source->files)
        return find_in_files(source, name, is_vector, rows, cols, out);
    *out = ts_weight_random_tensor(source->seed, name, is_vector, rows, cols);
    return TS_OK;
}

static void widen(float *out, const char *in, ts_dtype dtype, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        switch (dtype) {
        case TS_F32:
            memcpy(out + i, in + 4 * i, 4);
            break;
        case TS_BF16:
            memcpy(&half, in + 2 * i, 2);
            out[i] = ts_bf16_to_f32(half);
            break;
        default:
            memcpy(&half, in + 2 * i, 2);
            out[i] = ts_f16_to_f32(half);
        }
    }
}

void ts_weight_tensor_read(const ts_weight_tensor *tensor, int64_t row, int64_t col, int64_t n, ts_dtype dtype,
                           void *out) {
    enum { BLOCK = 1024 };
    const size_t element = ts_dtype_bytes(tensor->dtype);
    const int64_t first = row * tensor->cols + col;
    const char *data = tensor->data ? (const char *)tensor->data + (size_t)first * element : NULL;
    if (data && tensor->dtype == dtype) {
        memcpy(out, data, (size_t)n * element);
        return;
    }
    for (int64_t done = 0; done < n; done += BLOCK) {
        const int64_t size = n - done < BLOCK ? n - done : BLOCK;
        float wide[BLOCK];
        if (data)
            widen(wide, data + (size_t)done * element, tensor->dtype, size);
        else
            ts_weight_random_draw(tensor, first + done, size, wide);
        for (int64_t i = 0; i < size; i++) {
            const uint16_t half = ts_bf16_from_f32(wide[i]);
            // Drawn numbers are BF16 in whatever dtype one asks for.
            const float value = data ? wide[i] : ts_bf16_to_f32(half);
            if (dtype == TS_F32)
                memcpy((char *)out + 4 * (done + i), &value, sizeof value);
            else
                memcpy((char *)out + 2 * (done + i), &half, sizeof half);
        }
    }
}

ts_status ts_weight_source_finish(const ts_weight_source *source) {
    ts_status status = TS_OK;
    for (size_t i = 0; source->files && i < ts_safetensors_count(source->files); i++)
        TS_CHECK(source->used[i], TS_ERR_FORMAT,
                 "%s: tensor \"%s\" has no place in the model that config.json describes",
                 ts_safetensors_at(source->files, i)->path, ts_safetensors_at(source->files, i)->name);
done:
    return status;
}
