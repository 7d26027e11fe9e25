#include "runtime/job_writer.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct ts_job_writer {
    int file;   // -1 once finished
    char *path; // "standard output" for "-"
    bool is_stdout, is_regular;
    int64_t n_bytes; // of whole records
};

static ts_status refuse_same_file(const char *path, const char *input_path, const struct stat *output) {
    struct stat input;
    const int found = strcmp(input_path, "-") == 0 ? fstat(STDIN_FILENO, &input) : stat(input_path, &input);
    // A terminal or /dev/null may well be both; and what is not there is for the reader to say.
    if (found != 0 || !S_ISREG(input.st_mode) || input.st_dev != output->st_dev || input.st_ino != output->st_ino)
        return TS_OK;
    return TS_FAIL(TS_ERR_INVALID, "%s: the output is the same file as the input, %s; name another file", path,
                   strcmp(input_path, "-") == 0 ? "standard input" : input_path);
}

ts_status ts_job_writer_create(const char *path, const char *input_path, int64_t keep_bytes, ts_job_writer **out) {
    ts_status status = TS_OK;
    struct stat info;
    ts_job_writer *writer = calloc(1, sizeof *writer);
    TS_CHECK(writer, TS_ERR_MEMORY, "%s: out of memory for writing it", path);
    writer->is_stdout = strcmp(path, "-") == 0;
    writer->file = -1;
    writer->path = strdup(writer->is_stdout ? "standard output" : path);
    TS_CHECK(writer->path, TS_ERR_MEMORY, "%s: out of memory for writing it", path);
    // Not O_TRUNC: it may turn out to be the input.
    writer->file = writer->is_stdout ? STDOUT_FILENO : open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    TS_CHECK(writer->file >= 0, TS_ERR_IO,
             "%s: cannot open the output: %s; give a file in a directory that exists, or -", path, strerror(errno));
    TS_CHECK(fstat(writer->file, &info) == 0, TS_ERR_IO, "%s: cannot write to it: %s", writer->path, strerror(errno));
    writer->is_regular = S_ISREG(info.st_mode);
    if (input_path)
        TS_TRY(refuse_same_file(writer->path, input_path, &info));
    if (writer->is_regular && !writer->is_stdout) {
        TS_CHECK(keep_bytes >= 0 && keep_bytes <= info.st_size, TS_ERR_INVALID,
                 "%s: cannot go on after byte %lld: the file has %lld; it was changed since", path,
                 (long long)keep_bytes, (long long)info.st_size);
        TS_CHECK(ftruncate(writer->file, keep_bytes) == 0 && lseek(writer->file, keep_bytes, SEEK_SET) == keep_bytes,
                 TS_ERR_IO, "%s: cannot cut it to %lld bytes: %s", path, (long long)keep_bytes, strerror(errno));
    } else {
        TS_CHECK(keep_bytes == 0, TS_ERR_INVALID, "%s: cannot go on after byte %lld: it is not a file of its own",
                 writer->path, (long long)keep_bytes);
    }
    writer->n_bytes = keep_bytes;
    *out = writer;
    writer = NULL;
done:
    ts_job_writer_free(writer);
    return status;
}

ts_status ts_job_writer_write(ts_job_writer *writer, const char *line, size_t n_bytes) {
    assert(writer->file >= 0 && n_bytes > 0 && line[n_bytes - 1] == '\n');
    for (size_t at = 0; at < n_bytes;) {
        const ssize_t put = write(writer->file, line + at, n_bytes - at);
        if (put >= 0) {
            at += (size_t)put;
        } else if (errno == EAGAIN) { // a pipe that whoever gave it to us made non-blocking
            struct pollfd output = {.fd = writer->file, .events = POLLOUT};
            poll(&output, 1, -1);
        } else if (errno != EINTR) {
            const ts_status status = TS_FAIL(TS_ERR_IO, "%s: byte %lld: cannot write a record: %s", writer->path,
                                             (long long)writer->n_bytes + (long long)at, strerror(errno));
            // Best effort: without it the file ends in part of a record, which is bad but no worse than the failure.
            if (at > 0 && writer->is_regular && !writer->is_stdout && ftruncate(writer->file, writer->n_bytes) == 0)
                lseek(writer->file, writer->n_bytes, SEEK_SET);
            return status;
        }
    }
    writer->n_bytes += (int64_t)n_bytes;
    return TS_OK;
}

int64_t ts_job_writer_bytes(const ts_job_writer *writer) {
    return writer->n_bytes;
}

ts_status ts_job_writer_finish(ts_job_writer *writer) {
    ts_status status = TS_OK;
    const int file = writer->file;
    writer->file = -1;
    if (writer->is_stdout || file < 0)
        return TS_OK;
    if (writer->is_regular && fsync(file) != 0)
        status = TS_FAIL(TS_ERR_IO, "%s: cannot send it to its disk: %s", writer->path, strerror(errno));
    if (close(file) != 0 && status == TS_OK)
        status = TS_FAIL(TS_ERR_IO, "%s: cannot close it: %s", writer->path, strerror(errno));
    return status;
}

void ts_job_writer_free(ts_job_writer *writer) {
    if (!writer)
        return;
    if (!writer->is_stdout && writer->file >= 0)
        close(writer->file);
    free(writer->path);
    free(writer);
}
