// How a job stands, on stderr: a bar that redraws itself on a terminal, a line every ten seconds in a log.
#ifndef TS_PROGRESS_H
#define TS_PROGRESS_H

#include "runtime/job.h"

typedef struct ts_progress {
    bool is_terminal;
    double start, last;  // seconds
    double last_rate_at; // where the rate shown is counted from
    int64_t last_tokens;
    double rate; // tokens per second, smoothed
} ts_progress;

void ts_progress_begin(ts_progress *progress);

// For ts_job_options.progress; context is a ts_progress.
void ts_progress_show(void *context, const ts_job_progress *job);

// Clears the bar.
void ts_progress_end(ts_progress *progress);

#endif
