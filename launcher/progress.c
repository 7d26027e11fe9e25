#include "launcher/progress.h"

#include "kernels/base/log.h"
#include "launcher/launch.h"

#include <stdio.h>
#include <unistd.h>

#define BAR_SECONDS 0.1
#define LOG_SECONDS 10.0

void ts_progress_begin(ts_progress *progress) {
    const double now = ts_launch_seconds();
    *progress = (ts_progress){
        .is_terminal = isatty(STDERR_FILENO) == 1,
        .start = now,
        .last = now,
        .last_rate_at = now,
    };
}

// The share of the job that is done, -1 when nobody can know: of the tokens that the requests read so far ask for, as
// rank 0's replica sees them, those that are done; of the input what they make of it.
static double share_done(const ts_job_progress *job) {
    if (job->n_bytes_total <= 0 || job->n_own_tokens == 0)
        return -1;
    const double read = (double)job->n_bytes_read / (double)job->n_bytes_total;
    return read * (double)job->n_own_tokens / (double)(job->n_own_tokens + job->n_own_ahead);
}

static void format_seconds(char *out, size_t n, double seconds) {
    const long s = (long)(seconds + 0.5);
    if (s >= 3600)
        snprintf(out, n, "%ldh%02ldm", s / 3600, s / 60 % 60);
    else if (s >= 60)
        snprintf(out, n, "%ldm%02lds", s / 60, s % 60);
    else
        snprintf(out, n, "%lds", s);
}

void ts_progress_show(void *context, const ts_job_progress *job) {
    ts_progress *progress = context;
    const double now = ts_launch_seconds();
    if (now - progress->last < (progress->is_terminal ? BAR_SECONDS : LOG_SECONDS))
        return;
    progress->last = now;
    const int64_t tokens = job->n_prompt_tokens + job->n_generated;
    if (now - progress->last_rate_at >= 1.0 || progress->rate == 0) {
        const double rate = (double)(tokens - progress->last_tokens) / (now - progress->last_rate_at);
        progress->rate = progress->rate == 0 ? rate : 0.7 * progress->rate + 0.3 * rate;
        progress->last_rate_at = now;
        progress->last_tokens = tokens;
    }
    const double share = share_done(job);
    char left[32] = "";
    if (share > 0)
        format_seconds(left, sizeof left, (now - progress->start) * (1 - share) / share);
    if (!progress->is_terminal) {
        ts_log(TS_LOG_INFO,
               "%lld requests done (%lld refused), %lld prompt and %lld generated tokens, %.0f tokens/s%s%s",
               (long long)job->n_done, (long long)job->n_failed, (long long)job->n_prompt_tokens,
               (long long)job->n_generated, progress->rate, *left ? ", time left " : "", left);
        return;
    }
    enum { WIDTH = 24 };
    char bar[WIDTH + 1];
    const int filled = share < 0 ? 0 : (int)(share * WIDTH);
    for (int i = 0; i < WIDTH; i++)
        bar[i] = i < filled ? '#' : '.';
    bar[WIDTH] = '\0';
    fprintf(stderr, "\r\033[K[%s] %lld done, %.0f tokens/s%s%s", bar, (long long)job->n_done, progress->rate,
            *left ? ", left " : "", left);
    fflush(stderr);
}

void ts_progress_end(ts_progress *progress) {
    if (progress->is_terminal)
        fputs("\r\033[K", stderr);
}
