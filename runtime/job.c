#include "runtime/job.h"

#include "runtime/job_reader.h"
#include "runtime/job_writer.h"
#include "runtime/result.h"

#include <stdlib.h>
#include <time.h>

enum { LOOK_MS = 2 }; // between looks at the input and at the others

// What rank 0 knows of a replica; its own is number 0.
typedef struct replica_share {
    int64_t n_wanted;  // lines it could take and has not got: a window at first
    int64_t n_working; // lines it has got and not reported
    bool told_end, ended;
} replica_share;

// A line that came from rank 0 before the engine asked.
typedef struct queued {
    ts_request *request;
    struct queued *next;
} queued;

struct ts_job {
    ts_group *leaders;
    ts_engine_job for_engine;
    ts_message message, packed;
    // Rank 0:
    ts_job_options options;
    ts_job_reader *reader;
    ts_job_writer *writer;
    replica_share *shares; // [replicas]
    bool input_ended;
    ts_job_progress progress;
    // Others:
    queued *first, **last;
    bool told_end;
};

static ts_status post_work(ts_job *job, int to, Ts__Job__Work *work) {
    ts_status status = TS_OK;
    TS_TRY(ts_message_reserve(&job->packed, ts__job__work__get_packed_size(work) + 1));
    TS_TRY(ts_group_post(job->leaders, to, job->packed.data, ts__job__work__pack(work, job->packed.data)));
done:
    return status;
}

static ts_status post_report(ts_job *job, Ts__Job__Report *report) {
    ts_status status = TS_OK;
    TS_TRY(ts_message_reserve(&job->packed, ts__job__report__get_packed_size(report) + 1));
    TS_TRY(ts_group_post(job->leaders, 0, job->packed.data, ts__job__report__pack(report, job->packed.data)));
done:
    return status;
}

// ---- Rank 0

static ts_status write_record(ts_job *job, const char *line, size_t n_bytes, bool failed) {
    ts_status status = TS_OK;
    TS_TRY(ts_job_writer_write(job->writer, line, n_bytes));
    job->progress.n_done++;
    job->progress.n_failed += failed;
done:
    return status;
}

static ts_status take_report(ts_job *job, int from) {
    ts_status status = TS_OK;
    replica_share *share = &job->shares[from];
    Ts__Job__Report *report = ts__job__report__unpack(NULL, job->message.n_bytes, job->message.data);
    TS_CHECK(report, TS_ERR_COMM, "job: a report of %zu bytes from replica %d cannot be read", job->message.n_bytes,
             from);
    share->n_wanted += report->n_wanted;
    share->ended = share->ended || report->end;
    if (report->record.len > 0) {
        share->n_working--;
        job->progress.n_prompt_tokens += report->prompt_tokens;
        job->progress.n_generated += report->completion_tokens;
        TS_TRY(write_record(job, (const char *)report->record.data, report->record.len, report->failed));
    }
done:
    if (report)
        ts__job__report__free_unpacked(report, NULL);
    return status;
}

// Reads until a good request, the end, or no whole line is there and `timeout_ms` is over. Refused lines become
// records.
static ts_status read_request(ts_job *job, int timeout_ms, ts_request **out) {
    ts_status status = TS_OK;
    char *line = NULL;
    ts_request_error *error = NULL;
    *out = NULL;
    while (!*out && !job->input_ended) {
        bool ready;
        size_t n_bytes;
        TS_TRY(ts_job_reader_poll(job->reader, timeout_ms, &ready));
        if (!ready)
            break;
        TS_TRY(ts_job_reader_next_request(job->reader, out, &error, &job->input_ended));
        if (error) {
            TS_TRY(ts_request_error_format(error, &line, &n_bytes));
            TS_TRY(write_record(job, line, n_bytes, true));
            free(line);
            line = NULL;
            ts_request_error_free(error);
            error = NULL;
        }
    }
    ts_job_reader_progress(job->reader, &job->progress.n_bytes_read, &job->progress.n_bytes_total);
done:
    free(line);
    ts_request_error_free(error);
    return status;
}

// The other replica that wants work and has least of it, if it has less than `most`; -1 otherwise.
static int neediest(const ts_job *job, int64_t most) {
    int best = -1;
    for (int r = 1; r < ts_group_size(job->leaders); r++)
        if (job->shares[r].n_wanted > 0 && job->shares[r].n_working < most) {
            best = r;
            most = job->shares[r].n_working;
        }
    return best;
}

// Takes what the others have sent, and gives work to those who want it and have less than `most`.
static ts_status serve(ts_job *job, int64_t most) {
    ts_status status = TS_OK;
    ts_request *request = NULL;
    for (bool got = ts_group_size(job->leaders) > 1; got;) {
        int from;
        TS_TRY(ts_group_poll(job->leaders, &from, &job->message, &got));
        if (got)
            TS_TRY(take_report(job, from));
    }
    for (int r; (r = neediest(job, most)) > 0 && !job->input_ended;) {
        TS_TRY(read_request(job, 0, &request));
        if (!request)
            break;
        Ts__Job__Work work = TS__JOB__WORK__INIT;
        work.line = request->line;
        work.text.data = (uint8_t *)(uintptr_t)ts_job_reader_last_line(job->reader, &work.text.len);
        TS_TRY(post_work(job, r, &work));
        job->shares[r].n_wanted--;
        job->shares[r].n_working++;
        ts_request_free(request);
        request = NULL;
    }
    for (int r = 1; r < ts_group_size(job->leaders) && job->input_ended; r++) {
        Ts__Job__Work work = TS__JOB__WORK__INIT;
        work.end = true;
        if (!job->shares[r].told_end)
            TS_TRY(post_work(job, r, &work));
        job->shares[r].told_end = true;
    }
done:
    ts_request_free(request);
    return status;
}

static ts_status root_next(void *context, bool wait, ts_request **request, bool *end) {
    ts_status status = TS_OK;
    ts_job *job = context;
    *request = NULL;
    do {
        // Replicas get lines in turn: whoever has less goes first.
        TS_TRY(serve(job, job->shares[0].n_working + 1));
        TS_TRY(read_request(job, wait ? LOOK_MS : 0, request));
    } while (wait && !*request && !job->input_ended);
    job->shares[0].n_working += *request != NULL;
    TS_TRY(serve(job, job->input_ended ? INT64_MAX : job->shares[0].n_working + 1));
    *end = job->input_ended;
done:
    return status;
}

static ts_status root_done(void *context, const ts_record *record) {
    ts_job *job = context;
    job->shares[0].n_working--;
    return write_record(job, record->line, record->n_bytes, record->failed);
}

static ts_status root_tick(void *context, int64_t n_prompt_tokens, int64_t n_generated, int64_t n_ahead) {
    ts_status status = TS_OK;
    ts_job *job = context;
    job->progress.n_prompt_tokens += n_prompt_tokens;
    job->progress.n_generated += n_generated;
    job->progress.n_own_tokens += n_prompt_tokens + n_generated;
    job->progress.n_own_ahead = n_ahead;
    TS_TRY(serve(job, INT64_MAX));
    if (job->options.progress)
        job->options.progress(job->options.context, &job->progress);
done:
    return status;
}

static ts_status root_finish(ts_job *job) {
    ts_status status = TS_OK;
    for (;;) {
        bool all_ended = true;
        TS_TRY(serve(job, INT64_MAX));
        for (int r = 1; r < ts_group_size(job->leaders); r++)
            all_ended = all_ended && job->shares[r].ended;
        if (job->options.progress)
            job->options.progress(job->options.context, &job->progress);
        if (all_ended)
            break;
        // Looks for messages in serve, and in between sleeps: progress goes on while others work.
        nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000L}, NULL);
    }
    TS_TRY(ts_group_flush(job->leaders));
    TS_TRY(ts_job_writer_finish(job->writer));
done:
    return status;
}

// ---- Other leaders

static ts_status take_work(ts_job *job) {
    ts_status status = TS_OK;
    ts_request_error *error = NULL;
    queued *entry = NULL;
    Ts__Job__Work *work = ts__job__work__unpack(NULL, job->message.n_bytes, job->message.data);
    TS_CHECK(work, TS_ERR_COMM, "job: %zu bytes of work from rank 0 cannot be read", job->message.n_bytes);
    job->told_end = job->told_end || work->end;
    if (work->end)
        goto done;
    entry = calloc(1, sizeof *entry);
    TS_CHECK(entry, TS_ERR_MEMORY, "job: out of memory");
    TS_TRY(ts_request_parse((const char *)work->text.data, work->text.len, work->line, &entry->request, &error));
    TS_CHECK(entry->request, TS_ERR_INTERNAL, "job: rank 0 sent a line that it should have refused: %s",
             error ? error->message : "");
    *job->last = entry;
    job->last = &entry->next;
    entry = NULL;
done:
    free(entry);
    ts_request_error_free(error);
    if (work)
        ts__job__work__free_unpacked(work, NULL);
    return status;
}

static ts_status take_messages(ts_job *job) {
    ts_status status = TS_OK;
    for (bool got = true; got;) {
        int from;
        TS_TRY(ts_group_poll(job->leaders, &from, &job->message, &got));
        if (got)
            TS_TRY(take_work(job));
    }
done:
    return status;
}

static ts_status remote_next(void *context, bool wait, ts_request **request, bool *end) {
    ts_status status = TS_OK;
    ts_job *job = context;
    TS_TRY(take_messages(job));
    while (wait && !job->first && !job->told_end) {
        int from;
        TS_TRY(ts_group_wait(job->leaders, &from, &job->message));
        TS_TRY(take_work(job));
    }
    queued *entry = job->first;
    *request = NULL;
    if (entry) {
        *request = entry->request;
        job->first = entry->next;
        if (!job->first)
            job->last = &job->first;
        free(entry);
        Ts__Job__Report report = TS__JOB__REPORT__INIT;
        report.n_wanted = 1;
        TS_TRY(post_report(job, &report));
    }
    *end = job->told_end && !job->first;
done:
    return status;
}

static ts_status remote_done(void *context, const ts_record *record) {
    Ts__Job__Report report = TS__JOB__REPORT__INIT;
    report.record.data = (uint8_t *)(uintptr_t)record->line;
    report.record.len = record->n_bytes;
    report.failed = record->failed;
    report.prompt_tokens = record->prompt_tokens;
    report.completion_tokens = record->completion_tokens;
    return post_report(context, &report);
}

static ts_status remote_tick(void *context, int64_t n_prompt_tokens, int64_t n_generated, int64_t n_ahead) {
    return take_messages(context);
}

static ts_status remote_finish(ts_job *job) {
    ts_status status = TS_OK;
    Ts__Job__Report report = TS__JOB__REPORT__INIT;
    report.end = true;
    TS_TRY(post_report(job, &report));
    TS_TRY(ts_group_flush(job->leaders));
done:
    return status;
}

// ---- Both

ts_status ts_job_create_root(ts_group *leaders, const ts_job_options *options, ts_job **out) {
    ts_status status = TS_OK;
    ts_job *job = calloc(1, sizeof *job);
    TS_CHECK(job, TS_ERR_MEMORY, "job: out of memory");
    job->leaders = leaders;
    job->options = *options;
    job->last = &job->first;
    job->for_engine = (ts_engine_job){job, root_next, root_done, root_tick};
    job->shares = calloc((size_t)ts_group_size(leaders), sizeof *job->shares);
    TS_CHECK(job->shares, TS_ERR_MEMORY, "job: out of memory");
    for (int r = 1; r < ts_group_size(leaders); r++)
        job->shares[r].n_wanted = options->window;
    TS_TRY(ts_job_reader_create(options->input, options->temp_directory, &job->reader));
    TS_TRY(ts_job_writer_create(options->output, options->input, 0, &job->writer));
    *out = job;
    job = NULL;
done:
    ts_job_free(job);
    return status;
}

ts_status ts_job_create_remote(ts_group *leaders, ts_job **out) {
    ts_status status = TS_OK;
    ts_job *job = calloc(1, sizeof *job);
    TS_CHECK(job, TS_ERR_MEMORY, "job: out of memory");
    job->leaders = leaders;
    job->last = &job->first;
    job->for_engine = (ts_engine_job){job, remote_next, remote_done, remote_tick};
    *out = job;
done:
    return status;
}

void ts_job_free(ts_job *job) {
    if (!job)
        return;
    while (job->first) {
        queued *next = job->first->next;
        ts_request_free(job->first->request);
        free(job->first);
        job->first = next;
    }
    ts_job_reader_free(job->reader);
    ts_job_writer_free(job->writer);
    ts_message_free(&job->message);
    ts_message_free(&job->packed);
    free(job->shares);
    free(job);
}

const ts_engine_job *ts_job_for_engine(const ts_job *job) {
    return &job->for_engine;
}

ts_status ts_job_finish(ts_job *job) {
    return job->reader ? root_finish(job) : remote_finish(job);
}

const ts_job_progress *ts_job_progress_of(const ts_job *job) {
    return &job->progress;
}
