#include "runtime/safetensors_write.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/json_strict.h"

enum { HEADER_ALIGNMENT = 8, MAX_TEMPORARY_NAMES = 1000 };

struct ts_safetensors_writer {
    char *path, *temporary; // temporary is NULL when there is nothing to remove
    int fd;
    size_t n_header_bytes, n_data_bytes, n_written; // n_written counts data
    bool failed;                                    // the file's content is unknown after a failed write
};

// ---- the header

static ts_status add_spec(const char *path, const ts_tensor_spec *spec, json_t *header, size_t *n_data_bytes) {
    ts_status status = TS_OK;
    json_t *entry = NULL, *shape = json_array();
    TS_CHECK(spec->name != NULL && strcmp(spec->name, "__metadata__") != 0, TS_ERR_INVALID,
             "%s: tensor name '%s'; allowed: any but __metadata__", path, spec->name == NULL ? "NULL" : spec->name);
    TS_CHECK(json_object_get(header, spec->name) == NULL, TS_ERR_INVALID,
             "%s: tensor '%s' comes twice; allowed: distinct names", path, spec->name);
    TS_CHECK((unsigned)spec->dtype < TS_N_DTYPES, TS_ERR_INVALID, "%s: tensor '%s': dtype %d; allowed: 0 to %d", path,
             spec->name, (int)spec->dtype, TS_N_DTYPES - 1);
    TS_CHECK(spec->n_dims >= 0 && spec->n_dims <= TS_SAFETENSORS_MAX_DIMS, TS_ERR_INVALID,
             "%s: tensor '%s': %d dimensions; allowed: 0 to %d", path, spec->name, spec->n_dims,
             TS_SAFETENSORS_MAX_DIMS);
    size_t n_bytes = ts_dtype_bytes(spec->dtype), end = 0;
    bool fits = true;
    for (int i = 0; i < spec->n_dims; i++) {
        TS_CHECK(spec->shape[i] >= 0, TS_ERR_INVALID, "%s: tensor '%s': dimension %d is %lld; allowed: >= 0", path,
                 spec->name, i, (long long)spec->shape[i]);
        fits = fits && ts_size_mul(n_bytes, (size_t)spec->shape[i], &n_bytes);
        TS_CHECK(json_array_append_new(shape, json_integer(spec->shape[i])) == 0, TS_ERR_MEMORY,
                 "%s: no memory left for the header", path);
    }
    TS_CHECK(fits && ts_size_add(*n_data_bytes, n_bytes, &end) && end <= INT64_MAX - 2 * TS_SAFETENSORS_MAX_HEADER,
             TS_ERR_INVALID, "%s: tensor '%s' ends past 2^63 bytes; allowed: what a file can hold", path, spec->name);
    entry = json_pack("{s:s, s:O, s:[I, I]}", "dtype", ts_dtype_name(spec->dtype), "shape", shape, "data_offsets",
                      (json_int_t)*n_data_bytes, (json_int_t)end);
    TS_CHECK(entry != NULL, TS_ERR_MEMORY, "%s: no memory left for the header", path);
    TS_CHECK(json_object_set(header, spec->name, entry) == 0, TS_ERR_INVALID, "%s: tensor name '%s'; allowed: UTF-8",
             path, spec->name);
    *n_data_bytes = end;
done:
    json_decref(entry);
    json_decref(shape);
    return status;
}

// The bytes before the data: length and padded header. *out is owned.
static ts_status build_header(const char *path, const ts_tensor_spec *specs, size_t n_specs, char **out, size_t *n_out,
                              size_t *n_data_bytes) {
    ts_status status = TS_OK;
    char *text = NULL, *bytes = NULL;
    size_t n_data = 0;
    json_t *header = json_object();
    TS_CHECK(header != NULL, TS_ERR_MEMORY, "%s: no memory left for the header", path);
    for (size_t i = 0; i < n_specs; i++)
        TS_TRY(add_spec(path, &specs[i], header, &n_data));
    text = json_dumps(header, JSON_COMPACT);
    TS_CHECK(text != NULL, TS_ERR_MEMORY, "%s: no memory left for the header", path);
    const size_t n_text = strlen(text);
    const uint64_t n_padded = (n_text + HEADER_ALIGNMENT - 1) / HEADER_ALIGNMENT * HEADER_ALIGNMENT;
    TS_CHECK(n_padded <= TS_SAFETENSORS_MAX_HEADER, TS_ERR_INVALID,
             "%s: the header of %zu tensors has %zu bytes; allowed: at most %d", path, n_specs, n_text,
             TS_SAFETENSORS_MAX_HEADER);
    bytes = malloc(sizeof n_padded + n_padded);
    TS_CHECK(bytes != NULL, TS_ERR_MEMORY, "%s: no memory left for the header", path);
    memcpy(bytes, &n_padded, sizeof n_padded);
    memset(bytes + sizeof n_padded, ' ', n_padded);
    memcpy(bytes + sizeof n_padded, text, n_text);
    *n_data_bytes = n_data;
    *n_out = sizeof n_padded + n_padded;
    *out = bytes;
done:
    free(text);
    json_decref(header);
    return status;
}

// ---- the file

// Creates a file beside `path` with a name that nobody has. An ordinary open, and not mkstemp, so that the result gets
// the permissions of the user's umask.
static ts_status create_temporary(ts_safetensors_writer *writer) {
    for (int i = 0; i < MAX_TEMPORARY_NAMES; i++) {
        char *name = NULL;
        if (asprintf(&name, "%s.%ld.%d.tmp", writer->path, (long)getpid(), i) < 0)
            return TS_FAIL(TS_ERR_MEMORY, "%s: no memory left for a path", writer->path);
        writer->fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (writer->fd >= 0) {
            writer->temporary = name;
            return TS_OK;
        }
        const int reason = errno;
        free(name);
        if (reason != EEXIST)
            return TS_FAIL(TS_ERR_IO, "%s: cannot create a file beside it: %s; a writable directory is needed",
                           writer->path, strerror(reason));
    }
    return TS_FAIL(TS_ERR_IO, "%s: %d temporary files of this name lie beside it; remove the old ones (.tmp)",
                   writer->path, MAX_TEMPORARY_NAMES);
}

static ts_status write_all(ts_safetensors_writer *writer, const char *bytes, size_t n_bytes, size_t offset) {
    size_t n_done = 0;
    while (n_done < n_bytes) {
        const ssize_t n = write(writer->fd, bytes + n_done, n_bytes - n_done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            writer->failed = true;
            return TS_FAIL(TS_ERR_IO, "%s: byte %zu: cannot write: %s", writer->temporary, offset + n_done,
                           strerror(errno));
        }
        n_done += (size_t)n;
    }
    return TS_OK;
}

ts_status ts_safetensors_writer_create(const char *path, const ts_tensor_spec *specs, size_t n_specs,
                                       ts_safetensors_writer **out) {
    ts_status status = TS_OK;
    char *header = NULL;
    struct stat old;
    ts_safetensors_writer *writer = calloc(1, sizeof *writer);
    // The finished file takes the place of what is there, which would be the end of a device or a pipe.
    TS_CHECK(stat(path, &old) != 0 || S_ISREG(old.st_mode), TS_ERR_INVALID,
             "%s: is no ordinary file; allowed: a new name, or a file to replace", path);
    TS_CHECK(writer != NULL, TS_ERR_MEMORY, "%s: no memory left for a writer", path);
    writer->fd = -1;
    writer->path = strdup(path);
    TS_CHECK(writer->path != NULL, TS_ERR_MEMORY, "%s: no memory left for its path", path);
    TS_TRY(build_header(path, specs, n_specs, &header, &writer->n_header_bytes, &writer->n_data_bytes));
    TS_TRY(create_temporary(writer));
    TS_TRY(write_all(writer, header, writer->n_header_bytes, 0));
    *out = writer;
    writer = NULL;
done:
    ts_safetensors_writer_free(writer);
    free(header);
    return status;
}

// Neither finished nor broken.
static ts_status check_open(const ts_safetensors_writer *writer) {
    if (writer->failed)
        return TS_FAIL(TS_ERR_IO, "%s: an earlier write failed; the file cannot be completed", writer->path);
    if (writer->temporary == NULL)
        return TS_FAIL(TS_ERR_INVALID, "%s: the file is finished; allowed: only free", writer->path);
    return TS_OK;
}

ts_status ts_safetensors_writer_append(ts_safetensors_writer *writer, const void *data, size_t n_bytes) {
    ts_status status = TS_OK;
    TS_TRY(check_open(writer));
    TS_CHECK(n_bytes <= writer->n_data_bytes - writer->n_written, TS_ERR_INVALID,
             "%s: %zu bytes after the first %zu of data; allowed: %zu more, by the shapes in the header", writer->path,
             n_bytes, writer->n_written, writer->n_data_bytes - writer->n_written);
    TS_TRY(write_all(writer, data, n_bytes, writer->n_header_bytes + writer->n_written));
    writer->n_written += n_bytes;
done:
    return status;
}

// The rename is on the disk only once the directory is.
static ts_status sync_directory(const char *path) {
    ts_status status = TS_OK;
    int fd = -1;
    char *copy = strdup(path); // dirname writes into it
    TS_CHECK(copy != NULL, TS_ERR_MEMORY, "%s: no memory left for its path", path);
    const char *dir = dirname(copy);
    fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    TS_CHECK(fd >= 0, TS_ERR_IO, "%s: cannot open the directory %s: %s", path, dir, strerror(errno));
    // Some file systems cannot sync a directory and say EINVAL; there is nothing more to do there.
    TS_CHECK(fsync(fd) == 0 || errno == EINVAL, TS_ERR_IO, "%s: cannot flush the directory %s: %s", path, dir,
             strerror(errno));
done:
    if (fd >= 0)
        close(fd);
    free(copy);
    return status;
}

ts_status ts_safetensors_writer_finish(ts_safetensors_writer *writer) {
    ts_status status = TS_OK;
    TS_TRY(check_open(writer));
    TS_CHECK(writer->n_written == writer->n_data_bytes, TS_ERR_INVALID,
             "%s: %zu bytes of data came; allowed: exactly the %zu of the shapes in the header", writer->path,
             writer->n_written, writer->n_data_bytes);
    writer->failed = true; // until the end: a flush that failed cannot be repeated
    TS_CHECK(fsync(writer->fd) == 0, TS_ERR_IO, "%s: cannot flush: %s", writer->temporary, strerror(errno));
    const int fd = writer->fd;
    writer->fd = -1;
    TS_CHECK(close(fd) == 0, TS_ERR_IO, "%s: cannot close: %s", writer->temporary, strerror(errno));
    TS_CHECK(rename(writer->temporary, writer->path) == 0, TS_ERR_IO, "%s: cannot be renamed to %s: %s",
             writer->temporary, writer->path, strerror(errno));
    free(writer->temporary);
    writer->temporary = NULL;
    TS_TRY(sync_directory(writer->path));
    writer->failed = false;
done:
    return status;
}

void ts_safetensors_writer_free(ts_safetensors_writer *writer) {
    if (writer == NULL)
        return;
    if (writer->fd >= 0)
        close(writer->fd);
    if (writer->temporary != NULL)
        unlink(writer->temporary);
    free(writer->temporary);
    free(writer->path);
    free(writer);
}
