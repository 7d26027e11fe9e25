// The input of a job: a file, a pipe or standard input, one request a line (runtime/request.h), read as it is needed.
// Memory holds a buffer that grows to the longest line so far and a bounded number of custom_ids (runtime/id_set.h),
// however many lines there are.
//
// Order of calls: ts_job_reader_create, then ts_job_reader_next_request until *end, then ts_job_reader_free. One thread
// at a time.
//
// Lines end in LF or CRLF; the last one may have no end. A byte order mark before the first line and lines of nothing
// but spaces are skipped, but count for line numbers, which start at 1. A line that is longer than
// TS_JOB_LINE_BYTES_MAX (its end left out), or that is not UTF-8, or that holds a NUL byte, becomes a ts_request_error
// and reading goes on after it.
#ifndef TS_RUNTIME_JOB_READER_H
#define TS_RUNTIME_JOB_READER_H

#include "kernels/base/status.h"
#include "runtime/request.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TS_JOB_LINE_BYTES_MAX ((size_t)64 << 20)

typedef struct ts_job_reader ts_job_reader;

// `path` "-" is standard input, which stays open at the end. Opening a named pipe waits for its writer.
// `temp_directory` is where a job of more than TS_ID_SET_IN_MEMORY lines keeps its hashes of custom_ids. Both are
// copied.
ts_status ts_job_reader_create(const char *path, const char *temp_directory, ts_job_reader **reader);

// The next request: the next line, parsed, with a custom_id that no line before it had. Waits for input. Exactly one of
// the three outputs says something: *request (good), *error (the line is refused; both are the caller's to free), or
// *end; the others are NULL or false. A failure of ours (TS_ERR_IO, TS_ERR_MEMORY) names path and byte and leaves them
// alone.
ts_status ts_job_reader_next_request(ts_job_reader *reader, ts_request **request, ts_request_error **error, bool *end);

// The line that the last request was parsed from, [*n_bytes], to be parsed again elsewhere. Borrowed until the next
// call on the reader.
const char *ts_job_reader_last_line(const ts_job_reader *reader, size_t *n_bytes);

// The next line as it is, for a caller with a format of its own: *text [*n_bytes], without its end and not ended by
// NUL, borrowed until the next call on the reader. A refused line has *text NULL and *error set (the caller's to free).
ts_status ts_job_reader_next(ts_job_reader *reader, const char **text, size_t *n_bytes, int64_t *line,
                             ts_request_error **error, bool *end);

// Waits up to timeout_ms (0: not at all, -1: for ever) until the next call would not wait: a whole line is here, or the
// end. *ready false when the time is over or a signal came, so that a caller with other work never blocks on a slow
// pipe.
ts_status ts_job_reader_poll(ts_job_reader *reader, int timeout_ms, bool *ready);

// Bytes of the lines handed out so far, and of the whole input: -1 when it is not a regular file. For a progress bar.
void ts_job_reader_progress(const ts_job_reader *reader, int64_t *n_bytes_done, int64_t *n_bytes_total);

void ts_job_reader_free(ts_job_reader *reader);

#endif
