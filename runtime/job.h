// A job of requests over the replicas: rank 0 reads the input, hands lines to whichever replica has the least to do,
// and writes records in the order in which they come back.
//
//     rank 0:          TS_TRY(ts_job_create_root(leaders, &options, &job));
//     other leaders:   TS_TRY(ts_job_create_remote(leaders, &job));
//     then on both:    TS_TRY(ts_engine_run(engine, ts_job_for_engine(job)));
//                      TS_TRY(ts_job_finish(job));
//                      ts_job_free(job);
//
// Rank 0 runs a replica of its own: it looks after the others between its steps, and they have a window of lines
// ahead of their need, so that neither waits for the other.
#ifndef TS_JOB_H
#define TS_JOB_H

#include "runtime/engine.h"

typedef struct ts_job_progress {
    int64_t n_done, n_failed;             // records written; failed ones among them
    int64_t n_prompt_tokens, n_generated; // over all replicas; others' are counted when their records come
    int64_t n_own_tokens, n_own_ahead;    // rank 0's replica: tokens done, and the most its requests still ask for
    int64_t n_bytes_read, n_bytes_total;  // of the input; total -1 when it cannot be known
} ts_job_progress;

typedef struct ts_job_options {
    const char *input, *output; // paths, or "-"
    const char *temp_directory; // for the custom_ids of a very long job
    int32_t window;             // lines that another replica is given ahead of its need, 1 or more
    void *context;
    void (*progress)(void *context, const ts_job_progress *progress); // after every step of rank 0's replica
} ts_job_options;

typedef struct ts_job ts_job;

// leaders is the group of the replicas' leaders, borrowed until free. Rank 0 makes the root, every other leader a
// remote, in any order: lines wait for a leader that comes late.
ts_status ts_job_create_root(ts_group *leaders, const ts_job_options *options, ts_job **out);
ts_status ts_job_create_remote(ts_group *leaders, ts_job **out);
void ts_job_free(ts_job *job);

// The callbacks for this leader's engine; borrowed from the job.
const ts_engine_job *ts_job_for_engine(const ts_job *job);

// After the engine has run: rank 0 waits for the records of the other replicas and closes the output; they take leave.
ts_status ts_job_finish(ts_job *job);

// Rank 0: how it stands.
const ts_job_progress *ts_job_progress_of(const ts_job *job);

#endif
