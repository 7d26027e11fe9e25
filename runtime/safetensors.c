#include "runtime/safetensors.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/input_file.h"
#include "runtime/json_strict.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors data is little-endian and used in place");

#define LENGTH_BYTES   8
#define ALLOWED_TENSOR "\"dtype\", \"shape\" and \"data_offsets\", each once, and no other key"

// A mapped file. Its tensors point into it.
typedef struct shard {
    char *path;
    void *map;
    size_t n_bytes;
} shard;

struct ts_safetensors {
    shard *shards;
    size_t n_shards;
    ts_safetensor *tensors; // in name order; names are owned, path is that of a shard
    size_t n_tensors;
};

void ts_safetensors_free(ts_safetensors *set) {
    if (set == NULL)
        return;
    for (size_t i = 0; i < set->n_tensors; i++)
        free((char *)set->tensors[i].name);
    for (size_t i = 0; i < set->n_shards; i++) {
        if (set->shards[i].map != NULL)
            munmap(set->shards[i].map, set->shards[i].n_bytes);
        free(set->shards[i].path);
    }
    free(set->tensors);
    free(set->shards);
    free(set);
}

size_t ts_safetensors_count(const ts_safetensors *set) {
    return set->n_tensors;
}

const ts_safetensor *ts_safetensors_at(const ts_safetensors *set, size_t i) {
    assert(i < set->n_tensors);
    return &set->tensors[i];
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const ts_safetensor *)a)->name, ((const ts_safetensor *)b)->name);
}

const ts_safetensor *ts_safetensors_find(const ts_safetensors *set, const char *name) {
    if (set->n_tensors == 0)
        return NULL;
    const ts_safetensor key = {.name = name};
    return bsearch(&key, set->tensors, set->n_tensors, sizeof key, compare_names);
}

static ts_json_excerpt quote(const char *name) {
    return ts_json_excerpt_text(name, strlen(name));
}

// ---- one tensor of a header

static ts_status read_dtype(const ts_safetensor *tensor, const json_t *value, ts_dtype *out) {
    if (!json_is_string(value))
        return TS_FAIL(TS_ERR_FORMAT, "%s: tensor '%s': dtype is %s; allowed: a string", tensor->path,
                       quote(tensor->name).text, ts_json_excerpt_value(value).text);
    if (ts_dtype_parse(json_string_value(value), json_string_length(value), out))
        return TS_OK;
    char allowed[128] = "";
    for (int i = 0; i < TS_N_DTYPES; i++) {
        const size_t n = strlen(allowed);
        snprintf(allowed + n, sizeof allowed - n, "%s%s", i == 0 ? "" : ", ", ts_dtype_name((ts_dtype)i));
    }
    return TS_FAIL(TS_ERR_UNSUPPORTED, "%s: tensor '%s': dtype is %s; allowed: %s", tensor->path,
                   quote(tensor->name).text, ts_json_excerpt_value(value).text, allowed);
}

// Sets n_dims, shape and n_bytes. dtype is set already.
static ts_status read_shape(const json_t *value, ts_safetensor *tensor) {
    ts_status status = TS_OK;
    TS_CHECK(json_is_array(value), TS_ERR_FORMAT, "%s: tensor '%s': shape is %s; allowed: an array of integers >= 0",
             tensor->path, quote(tensor->name).text, ts_json_excerpt_value(value).text);
    const size_t n_dims = json_array_size(value);
    TS_CHECK(n_dims <= TS_SAFETENSORS_MAX_DIMS, TS_ERR_UNSUPPORTED,
             "%s: tensor '%s': shape %s has %zu dimensions; allowed: at most %d", tensor->path,
             quote(tensor->name).text, ts_json_excerpt_value(value).text, n_dims, TS_SAFETENSORS_MAX_DIMS);
    size_t n_bytes = ts_dtype_bytes(tensor->dtype);
    for (size_t i = 0; i < n_dims; i++) {
        const json_t *dim = json_array_get(value, i);
        TS_CHECK(json_is_integer(dim) && json_integer_value(dim) >= 0, TS_ERR_FORMAT,
                 "%s: tensor '%s': dimension %zu of shape %s is %s; allowed: an integer >= 0", tensor->path,
                 quote(tensor->name).text, i, ts_json_excerpt_value(value).text, ts_json_excerpt_value(dim).text);
        tensor->shape[i] = json_integer_value(dim);
        TS_CHECK(ts_size_mul(n_bytes, (size_t)tensor->shape[i], &n_bytes), TS_ERR_FORMAT,
                 "%s: tensor '%s': the bytes of shape %s %s do not fit in 64 bits; allowed: the shape of the data in "
                 "this file",
                 tensor->path, quote(tensor->name).text, ts_dtype_name(tensor->dtype),
                 ts_json_excerpt_value(value).text);
    }
    tensor->n_dims = (int)n_dims;
    tensor->n_bytes = n_bytes;
done:
    return status;
}

// Sets data. n_bytes is set already.
static ts_status read_offsets(const json_t *value, const char *data, size_t n_data_bytes, ts_safetensor *tensor) {
    ts_status status = TS_OK;
    const json_t *first = json_array_get(value, 0), *second = json_array_get(value, 1);
    TS_CHECK(json_array_size(value) == 2 && json_is_integer(first) && json_is_integer(second) &&
                 json_integer_value(first) >= 0 && json_integer_value(first) <= json_integer_value(second),
             TS_ERR_FORMAT, "%s: tensor '%s': data_offsets is %s; allowed: two integers, 0 <= begin <= end",
             tensor->path, quote(tensor->name).text, ts_json_excerpt_value(value).text);
    const size_t begin = (size_t)json_integer_value(first), end = (size_t)json_integer_value(second);
    TS_CHECK(end <= n_data_bytes, TS_ERR_FORMAT,
             "%s: tensor '%s': data_offsets %s go past the end of the file; allowed: up to its %zu bytes of data",
             tensor->path, quote(tensor->name).text, ts_json_excerpt_value(value).text, n_data_bytes);
    TS_CHECK(end - begin == tensor->n_bytes, TS_ERR_FORMAT,
             "%s: tensor '%s': data_offsets %s hold %zu bytes; allowed: the %zu bytes of its shape and dtype %s",
             tensor->path, quote(tensor->name).text, ts_json_excerpt_value(value).text, end - begin, tensor->n_bytes,
             ts_dtype_name(tensor->dtype));
    tensor->data = data + begin;
done:
    return status;
}

// `tensor` has its name and path already.
static ts_status read_tensor(const json_t *entry, const char *data, size_t n_data_bytes, ts_safetensor *tensor) {
    ts_status status = TS_OK;
    const json_t *dtype = json_object_get(entry, "dtype"), *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    TS_CHECK(dtype != NULL && shape != NULL && offsets != NULL && json_object_size(entry) == 3, TS_ERR_FORMAT,
             "%s: tensor '%s' is %s; allowed: an object with " ALLOWED_TENSOR, tensor->path, quote(tensor->name).text,
             ts_json_excerpt_value(entry).text);
    TS_TRY(read_dtype(tensor, dtype, &tensor->dtype));
    TS_TRY(read_shape(shape, tensor));
    TS_TRY(read_offsets(offsets, data, n_data_bytes, tensor));
done:
    return status;
}

static ts_status check_metadata(const char *path, const json_t *metadata) {
    ts_status status = TS_OK;
    const char *key;
    json_t *value;
    TS_CHECK(json_is_object(metadata), TS_ERR_FORMAT, "%s: __metadata__ is %s; allowed: an object of strings", path,
             ts_json_excerpt_value(metadata).text);
    json_object_foreach((json_t *)metadata, key, value) {
        TS_CHECK(json_is_string(value), TS_ERR_FORMAT, "%s: __metadata__: '%s' is %s; allowed: a string", path,
                 quote(key).text, ts_json_excerpt_value(value).text);
    }
done:
    return status;
}

// ---- one file

static int compare_places(const void *a, const void *b) {
    const ts_safetensor *x = *(const ts_safetensor *const *)a, *y = *(const ts_safetensor *const *)b;
    const uintptr_t x_begin = (uintptr_t)x->data, y_begin = (uintptr_t)y->data;
    if (x_begin != y_begin)
        return x_begin < y_begin ? -1 : 1;
    return (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes); // an empty tensor stands before the one it touches
}

// The n tensors cover the data from its first byte to its last, each byte once.
static ts_status check_cover(const char *path, const ts_safetensor *tensors, size_t n, const char *data,
                             size_t n_data_bytes) {
    ts_status status = TS_OK;
    const char *at = data, *before = "the header";
    const ts_safetensor **order = calloc(n + 1, sizeof(const ts_safetensor *));
    TS_CHECK(order != NULL, TS_ERR_MEMORY, "%s: no memory left for %zu tensors", path, n);
    for (size_t i = 0; i < n; i++)
        order[i] = &tensors[i];
    qsort(order, n, sizeof order[0], compare_places);
    for (size_t i = 0; i < n; i++) {
        const char *begin = order[i]->data;
        TS_CHECK(
            begin >= at, TS_ERR_FORMAT,
            "%s: tensor '%s' begins at data byte %zu and overlaps '%s', which ends at %zu; allowed: tensors that touch",
            path, quote(order[i]->name).text, (size_t)(begin - data), quote(before).text, (size_t)(at - data));
        TS_CHECK(begin == at, TS_ERR_FORMAT,
                 "%s: tensor '%s' begins at data byte %zu, after a hole: '%s' ends at %zu; allowed: tensors that touch",
                 path, quote(order[i]->name).text, (size_t)(begin - data), quote(before).text, (size_t)(at - data));
        at = begin + order[i]->n_bytes;
        before = order[i]->name;
    }
    TS_CHECK(at == data + n_data_bytes, TS_ERR_FORMAT,
             "%s: the tensors end at data byte %zu ('%s'), the file has %zu bytes of data; allowed: no byte after the "
             "last tensor",
             path, (size_t)(at - data), quote(before).text, n_data_bytes);
done:
    free(order);
    return status;
}

// Appends the tensors that `header` describes to set->tensors.
static ts_status read_header(ts_safetensors *set, const char *path, const json_t *header, const char *data,
                             size_t n_data_bytes) {
    ts_status status = TS_OK;
    const size_t n_before = set->n_tensors;
    const char *key;
    json_t *entry;
    TS_CHECK(json_is_object(header), TS_ERR_FORMAT, "%s: byte 8: the header is no JSON object; allowed: {...}", path);
    ts_safetensor *grown = realloc(set->tensors, (n_before + json_object_size(header) + 1) * sizeof *grown);
    TS_CHECK(grown != NULL, TS_ERR_MEMORY, "%s: no memory left for %zu tensors", path, json_object_size(header));
    set->tensors = grown;
    json_object_foreach((json_t *)header, key, entry) {
        if (strcmp(key, "__metadata__") == 0) {
            TS_TRY(check_metadata(path, entry));
            continue;
        }
        ts_safetensor *tensor = &set->tensors[set->n_tensors];
        *tensor = (ts_safetensor){.name = strdup(key), .path = path};
        TS_CHECK(tensor->name != NULL, TS_ERR_MEMORY, "%s: no memory left for a tensor's name", path);
        set->n_tensors++;
        TS_TRY(read_tensor(entry, data, n_data_bytes, tensor));
    }
    TS_TRY(check_cover(path, set->tensors + n_before, set->n_tensors - n_before, data, n_data_bytes));
done:
    return status;
}

// Maps `path` as the next shard and appends its tensors. set->shards has room.
static ts_status add_file(ts_safetensors *set, const char *path) {
    ts_status status = TS_OK;
    int fd = -1;
    json_t *header = NULL;
    shard *file = &set->shards[set->n_shards++];
    file->path = strdup(path);
    TS_CHECK(file->path != NULL, TS_ERR_MEMORY, "%s: no memory left for its path", path);
    TS_TRY(ts_input_file_open(path, &fd, &file->n_bytes));
    TS_CHECK(file->n_bytes >= LENGTH_BYTES, TS_ERR_FORMAT,
             "%s: the file has %zu bytes; allowed: at least the %d bytes of the header's length", path, file->n_bytes,
             LENGTH_BYTES);
    void *map = mmap(NULL, file->n_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    TS_CHECK(map != MAP_FAILED, TS_ERR_IO, "%s: cannot map its %zu bytes: %s", path, file->n_bytes, strerror(errno));
    file->map = map;

    uint64_t n_header = 0;
    memcpy(&n_header, map, LENGTH_BYTES);
    TS_CHECK(n_header <= TS_SAFETENSORS_MAX_HEADER, TS_ERR_FORMAT,
             "%s: byte 0: the header's length is %llu; allowed: at most %d bytes. Is this a safetensors file?", path,
             (unsigned long long)n_header, TS_SAFETENSORS_MAX_HEADER);
    TS_CHECK(n_header <= file->n_bytes - LENGTH_BYTES, TS_ERR_FORMAT,
             "%s: byte 0: the header's length is %llu; allowed: at most the %zu bytes that follow it", path,
             (unsigned long long)n_header, file->n_bytes - LENGTH_BYTES);
    const char *text = (const char *)map + LENGTH_BYTES;
    TS_CHECK(n_header > 0 && text[0] == '{', TS_ERR_FORMAT,
             "%s: byte %d: the header (%llu bytes) does not begin with '{'; allowed: a JSON object", path, LENGTH_BYTES,
             (unsigned long long)n_header);
    TS_TRY(ts_json_parse(path, LENGTH_BYTES, text, n_header, &header));
    TS_TRY(read_header(set, file->path, header, text + n_header, file->n_bytes - LENGTH_BYTES - n_header));
done:
    json_decref(header);
    if (fd >= 0)
        close(fd);
    return status;
}

static ts_status create_set(const char *path, size_t n_shards, ts_safetensors **out) {
    ts_safetensors *set = calloc(1, sizeof *set);
    shard *shards = calloc(n_shards, sizeof *shards);
    if (set == NULL || shards == NULL) {
        free(set);
        free(shards);
        return TS_FAIL(TS_ERR_MEMORY, "%s: no memory left for %zu files", path, n_shards);
    }
    set->shards = shards;
    *out = set;
    return TS_OK;
}

static void sort_tensors(ts_safetensors *set) {
    if (set->n_tensors > 1)
        qsort(set->tensors, set->n_tensors, sizeof *set->tensors, compare_names);
}

ts_status ts_safetensors_open_file(const char *path, ts_safetensors **out) {
    ts_status status = TS_OK;
    ts_safetensors *set = NULL;
    TS_TRY(create_set(path, 1, &set));
    TS_TRY(add_file(set, path));
    sort_tensors(set);
    *out = set;
    set = NULL;
done:
    ts_safetensors_free(set);
    return status;
}

// ---- an index and its shards

// dir/name; *out is owned, NULL on failure.
static ts_status join_path(const char *dir, const char *name, char **out) {
    char *path = NULL;
    const bool joined = asprintf(&path, "%s/%s", dir, name) >= 0;
    *out = joined ? path : NULL;
    return joined ? TS_OK : TS_FAIL(TS_ERR_MEMORY, "%s: no memory left for a path", dir);
}

static int compare_strings(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// The distinct shard names of the map, sorted, each a plain file name. *out is owned, the strings are the map's.
static ts_status list_shards(const char *path, const json_t *map, const char ***out, size_t *n_out) {
    ts_status status = TS_OK;
    size_t n = 0, n_distinct = 0;
    const char *key;
    json_t *value;
    const char **names = NULL;
    TS_CHECK(json_is_object(map) && json_object_size(map) > 0, TS_ERR_FORMAT,
             "%s: weight_map is %s; allowed: an object {\"TENSOR\": \"SHARD\", ...} with at least one tensor", path,
             ts_json_excerpt_value(map).text);
    names = calloc(json_object_size(map), sizeof *names);
    TS_CHECK(names != NULL, TS_ERR_MEMORY, "%s: no memory left for %zu names", path, json_object_size(map));
    json_object_foreach((json_t *)map, key, value) {
        const char *name = json_string_value(value);
        TS_CHECK(name != NULL && name[0] != '\0' && strchr(name, '/') == NULL && strcmp(name, ".") != 0 &&
                     strcmp(name, "..") != 0,
                 TS_ERR_FORMAT,
                 "%s: weight_map: '%s' is in %s; allowed: the name of a file beside the index, without '/'", path,
                 quote(key).text, ts_json_excerpt_value(value).text);
        names[n++] = name;
    }
    qsort(names, n, sizeof *names, compare_strings);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(names[i], names[n_distinct - 1]) != 0)
            names[n_distinct++] = names[i];
    *n_out = n_distinct;
    *out = names;
    names = NULL;
done:
    free(names);
    return status;
}

// The map and the tensors of all its shards say the same.
static ts_status check_map(const char *path, const json_t *map, const ts_safetensors *set) {
    ts_status status = TS_OK;
    const char *key;
    json_t *value;
    for (size_t i = 1; i < set->n_tensors; i++) {
        const ts_safetensor *t = &set->tensors[i];
        TS_CHECK(strcmp(t->name, t[-1].name) != 0, TS_ERR_FORMAT,
                 "%s: tensor '%s' is in this shard and in %s; allowed: one shard only", t->path, quote(t->name).text,
                 t[-1].path);
    }
    for (size_t i = 0; i < set->n_tensors; i++) {
        const ts_safetensor *t = &set->tensors[i];
        const json_t *shard_name = json_object_get(map, t->name);
        const char *base = strrchr(t->path, '/') + 1; // every path here is DIR/SHARD
        TS_CHECK(shard_name != NULL, TS_ERR_FORMAT,
                 "%s: tensor '%s' is not in weight_map of %s; allowed: only tensors that the index lists", t->path,
                 quote(t->name).text, path);
        TS_CHECK(strcmp(json_string_value(shard_name), base) == 0, TS_ERR_FORMAT,
                 "%s: weight_map: '%s' is in %s, but the file %s has it; allowed: the shard that has the tensor", path,
                 quote(t->name).text, ts_json_excerpt_value(shard_name).text, t->path);
    }
    json_object_foreach((json_t *)map, key, value) {
        TS_CHECK(
            ts_safetensors_find(set, key) != NULL, TS_ERR_FORMAT,
            "%s: weight_map: '%s' is in %s, but that file has no such tensor; allowed: the shard that has the tensor",
            path, quote(key).text, ts_json_excerpt_value(value).text);
    }
done:
    return status;
}

static ts_status open_index(const char *dir, const char *path, ts_safetensors **out) {
    ts_status status = TS_OK;
    json_t *index = NULL;
    const char **names = NULL;
    size_t n_names = 0;
    ts_safetensors *set = NULL;
    char *shard_path = NULL;
    TS_TRY(ts_json_load(path, TS_SAFETENSORS_MAX_INDEX, &index));
    TS_CHECK(json_is_object(index), TS_ERR_FORMAT, "%s: the file is %s; allowed: an object with \"weight_map\"", path,
             ts_json_excerpt_value(index).text);
    const json_t *map = json_object_get(index, "weight_map");
    TS_TRY(list_shards(path, map, &names, &n_names));
    TS_TRY(create_set(path, n_names, &set));
    for (size_t i = 0; i < n_names; i++) {
        free(shard_path);
        TS_TRY(join_path(dir, names[i], &shard_path));
        TS_TRY(add_file(set, shard_path));
    }
    sort_tensors(set);
    TS_TRY(check_map(path, map, set));
    *out = set;
    set = NULL;
done:
    ts_safetensors_free(set);
    free(shard_path);
    free(names);
    json_decref(index);
    return status;
}

ts_status ts_safetensors_open_model(const char *dir, ts_safetensors **out) {
    ts_status status = TS_OK;
    char *single = NULL, *index = NULL;
    struct stat info;
    TS_CHECK(stat(dir, &info) == 0, TS_ERR_IO, "%s: cannot open: %s; the directory of a model is needed", dir,
             strerror(errno));
    TS_CHECK(S_ISDIR(info.st_mode), TS_ERR_INVALID, "%s: is not a directory; the directory of a model is needed", dir);
    TS_TRY(join_path(dir, "model.safetensors", &single));
    TS_TRY(join_path(dir, "model.safetensors.index.json", &index));
    if (stat(single, &info) == 0) {
        TS_TRY(ts_safetensors_open_file(single, out));
    } else {
        TS_CHECK(errno == ENOENT, TS_ERR_IO, "%s: cannot open: %s", single, strerror(errno));
        TS_CHECK(stat(index, &info) == 0, TS_ERR_IO, "%s: cannot open: %s; it or %s is needed", index, strerror(errno),
                 single);
        TS_TRY(open_index(dir, index, out));
    }
done:
    free(index);
    free(single);
    return status;
}
