// The output of a job: one record a line (runtime/result.h), in the order in which requests finish.
//
// Order of calls: ts_job_writer_create, ts_job_writer_write ..., ts_job_writer_finish, ts_job_writer_free. One thread
// at a time.
//
// The file named is the file written, from the first record on: progress can be watched, and what was written outlives
// a crash of the program. Every record goes to the system in a single write, nothing is kept back; if the disk is full
// in the middle of one, the file is cut back to its last whole line.
#ifndef TS_RUNTIME_JOB_WRITER_H
#define TS_RUNTIME_JOB_WRITER_H

#include "kernels/base/status.h"

#include <stddef.h>
#include <stdint.h>

typedef struct ts_job_writer ts_job_writer;

// `path` "-" is standard output, which stays open at the end. An existing file is OVERWRITTEN, except that its first
// keep_bytes bytes stay: 0 for a new job, the value of ts_job_writer_bytes to go on with an interrupted one.
// `input_path` is what the job reads ("-": standard input; NULL: none): TS_ERR_INVALID, and nothing is touched, when
// both are one file. A closed pipe is an error only if the program ignores SIGPIPE.
ts_status ts_job_writer_create(const char *path, const char *input_path, int64_t keep_bytes, ts_job_writer **writer);

// Writes one record: n_bytes that end in '\n', the only one. Waits when a pipe is full. TS_ERR_IO names path and byte.
ts_status ts_job_writer_write(ts_job_writer *writer, const char *line, size_t n_bytes);

// Bytes of whole records in the output: a position to note in a journal and to give to keep_bytes later.
int64_t ts_job_writer_bytes(const ts_job_writer *writer);

// Sends a file to its disk and closes it; some file systems report only now that it is full. Nothing may be written
// after.
ts_status ts_job_writer_finish(ts_job_writer *writer);

void ts_job_writer_free(ts_job_writer *writer);

#endif
