// A job over the leaders of 1, 2 and 4 replicas, with a stand-in for the engine that generates nothing: every line is
// handed out once, every record is written once, all replicas take part, and a slow pipe holds nobody up for ever.
#include "runtime/job.h"
#include "tests/comm/check.h"

#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N_MOST = 400, PROMPT_TOKENS = 3, COMPLETION_TOKENS = 2 };

// Of a job: lines 0 .. n_lines - 1. Some are no requests (is_bad), some the engine refuses (is_refused).
typedef struct test_job {
    const char *name;
    int n_lines, bad_every, refused_every;
    int32_t window, capacity; // lines given ahead, and held at once
    bool is_pipe;
    bool last_is_late; // the last replica begins when the others have long been at work
} test_job;

static bool is_bad(const test_job *t, int line) {
    return t->bad_every > 0 && line % t->bad_every == t->bad_every - 1;
}

static bool is_refused(const test_job *t, int line) {
    return t->refused_every > 0 && line % t->refused_every == 0;
}

static int format_line(const test_job *t, int line, char *text, size_t n) {
    if (is_bad(t, line))
        return snprintf(text, n, "{\"custom_id\":\"bad %d\"}\n", line);
    return snprintf(text, n,
                    "{\"custom_id\":\"%d\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{\"model\":\"m\","
                    "\"prompt\":\"p%*s\"}}\n",
                    line, line % 50, "");
}

typedef struct writer {
    const test_job *t;
    char path[600];
} writer;

// Lines in two pieces each, with pauses between: what comes out of a program that makes requests as it goes.
static void *write_slowly(void *context) {
    const writer *w = context;
    char text[512];
    const int file = open(w->path, O_WRONLY);
    for (int line = 0; line < w->t->n_lines; line++) {
        const int n = format_line(w->t, line, text, sizeof text), half = n / 2;
        if (write(file, text, (size_t)half) != half)
            break;
        usleep(1500);
        if (write(file, text + half, (size_t)(n - half)) != n - half)
            break;
    }
    close(file);
    return NULL;
}

static void write_file(checker *c, const writer *w) {
    char text[512];
    FILE *file = fopen(w->path, "w");
    CHECK(c, file, "%s", w->path);
    for (int line = 0; line < w->t->n_lines; line++)
        fwrite(text, 1, (size_t)format_line(w->t, line, text, sizeof text), file);
    CHECK(c, fclose(file) == 0, "%s", w->path);
}

// What the engine does with a job, less the generating: holds up to `capacity` requests and ends the oldest in every
// step. Returns how many it ended.
static int consume(checker *c, const test_job *t, const ts_engine_job *job) {
    ts_request *held[64];
    int n_held = 0, n_ended = 0;
    bool end = false;
    while (!end || n_held > 0) {
        while (!end && n_held < t->capacity) {
            ts_request *request = NULL;
            CHECK_OK(c, job->next(job->context, n_held == 0, &request, &end));
            if (!request)
                break;
            held[n_held++] = request;
        }
        if (n_held == 0)
            continue;
        char line[128];
        const int number = atoi(held[0]->custom_id);
        const bool refused = is_refused(t, number);
        const int n =
            snprintf(line, sizeof line, "{\"custom_id\":\"%d\",\"replica\":%d}\n", number, ts_group_rank(c->world));
        CHECK(c, held[0]->line == number + 1, "request %d says that it is line %lld", number, (long long)held[0]->line);
        CHECK(c, held[0]->prompt_bytes == (size_t)(1 + number % 50), "the prompt of %d has %zu bytes", number,
              held[0]->prompt_bytes);
        const ts_record record = {line, (size_t)n, refused, refused ? 0 : PROMPT_TOKENS,
                                  refused ? 0 : COMPLETION_TOKENS};
        CHECK_OK(c, job->done(job->context, &record));
        CHECK_OK(c, job->tick(job->context, record.prompt_tokens, record.completion_tokens, n_held - 1));
        ts_request_free(held[0]);
        memmove(held, held + 1, (size_t)--n_held * sizeof *held);
        n_ended++;
    }
    return n_ended;
}

static void check_output(checker *c, const test_job *t, const char *path, const ts_job_progress *p) {
    static int n_records[N_MOST], n_of_replica[64];
    int n_bad = 0, n_bad_records = 0, n_refused = 0;
    char *line = NULL;
    size_t capacity = 0;
    memset(n_records, 0, sizeof n_records);
    memset(n_of_replica, 0, sizeof n_of_replica);
    FILE *file = fopen(path, "r");
    CHECK(c, file, "%s", path);
    for (ssize_t n; (n = getline(&line, &capacity, file)) >= 0;) {
        json_t *record = json_loadb(line, (size_t)n, 0, NULL);
        const char *id = json_string_value(json_object_get(record, "custom_id"));
        CHECK(c, record && id, "%s: a record that cannot be read: %s", t->name, line);
        if (strncmp(id, "bad ", 4) == 0) {
            n_bad_records++;
        } else {
            n_records[atoi(id)]++;
            n_of_replica[json_integer_value(json_object_get(record, "replica"))]++;
        }
        json_decref(record);
    }
    for (int i = 0; i < t->n_lines; i++) {
        n_bad += is_bad(t, i);
        n_refused += !is_bad(t, i) && is_refused(t, i);
        CHECK(c, n_records[i] == !is_bad(t, i), "%s: %d records of line %d", t->name, n_records[i], i);
    }
    const int n_good = t->n_lines - n_bad, n_replicas = ts_group_size(c->world);
    CHECK(c, n_bad_records == n_bad, "%s: %d records of %d bad lines", t->name, n_bad_records, n_bad);
    // Lines are dealt in turn, whether a replica has begun or not. From a slow pipe rank 0, idle as the others, takes
    // them.
    for (int r = 0; r < n_replicas && n_good >= n_replicas && !t->is_pipe; r++)
        CHECK(c, n_of_replica[r] > 0, "%s: replica %d got nothing of %d", t->name, r, n_good);
    CHECK(c, p->n_done == t->n_lines, "%s: %lld done of %d", t->name, (long long)p->n_done, t->n_lines);
    CHECK(c, p->n_failed == n_bad + n_refused, "%s: %lld failed, not %d", t->name, (long long)p->n_failed,
          n_bad + n_refused);
    CHECK(c, p->n_prompt_tokens == (n_good - n_refused) * PROMPT_TOKENS, "%s: %lld prompt tokens", t->name,
          (long long)p->n_prompt_tokens);
    CHECK(c, p->n_generated == (n_good - n_refused) * COMPLETION_TOKENS, "%s: %lld generated tokens", t->name,
          (long long)p->n_generated);
    CHECK(c, t->is_pipe ? p->n_bytes_total == -1 : p->n_bytes_read == p->n_bytes_total, "%s: %lld of %lld bytes",
          t->name, (long long)p->n_bytes_read, (long long)p->n_bytes_total);
    free(line);
    fclose(file);
}

typedef struct watcher {
    checker *c;
    ts_job_progress last;
} watcher;

// Progress never goes back.
static void check_progress(void *context, const ts_job_progress *p) {
    watcher *w = context;
    CHECK(w->c, p->n_done >= w->last.n_done && p->n_bytes_read >= w->last.n_bytes_read, "progress goes back");
    CHECK(w->c, p->n_failed <= p->n_done, "%lld done, %lld failed", (long long)p->n_done, (long long)p->n_failed);
    w->last = *p;
}

static void run(checker *c, const test_job *t) {
    const bool is_root = ts_group_rank(c->world) == 0;
    char folder[512], output[600];
    writer w = {.t = t};
    watcher watching = {.c = c};
    pthread_t thread;
    ts_job *job = NULL;
    if (is_root) {
        snprintf(folder, sizeof folder, "%s/mpi-job-XXXXXX", TS_BINARY_DIR);
        CHECK(c, mkdtemp(folder), "%s", folder);
        snprintf(w.path, sizeof w.path, "%s/in", folder);
        snprintf(output, sizeof output, "%s/out", folder);
        if (t->is_pipe) {
            CHECK(c, mkfifo(w.path, 0600) == 0, "%s", w.path);
            CHECK(c, pthread_create(&thread, NULL, write_slowly, &w) == 0, "thread");
        } else {
            write_file(c, &w);
        }
        const ts_job_options options = {w.path, output, folder, t->window, &watching, check_progress};
        CHECK_OK(c, ts_job_create_root(c->world, &options, &job));
    } else {
        if (t->last_is_late && ts_group_rank(c->world) == ts_group_size(c->world) - 1)
            usleep(30000);
        CHECK_OK(c, ts_job_create_remote(c->world, &job));
    }
    int64_t n_ended = consume(c, t, ts_job_for_engine(job));
    CHECK_OK(c, ts_job_finish(job));
    CHECK_OK(c, ts_group_all_reduce_sum(c->world, &n_ended, 1, TS_I64));
    if (is_root) {
        int n_good = 0;
        for (int i = 0; i < t->n_lines; i++)
            n_good += !is_bad(t, i);
        CHECK(c, n_ended == n_good, "%s: %lld requests were run, not %d", t->name, (long long)n_ended, n_good);
        check_output(c, t, output, ts_job_progress_of(job));
        if (t->is_pipe)
            pthread_join(thread, NULL);
        unlink(w.path);
        unlink(output);
        CHECK(c, rmdir(folder) == 0, "%s", folder);
    }
    ts_job_free(job);
}

int main(int argc, char **argv) {
    static const test_job jobs[] = {
        {"nothing", 0, 0, 0, 2, 4, false, false},
        {"one line", 1, 0, 0, 2, 4, false, false},
        {"a line a replica", 4, 0, 0, 1, 1, false, false},
        {"bad lines only", 20, 1, 0, 2, 4, false, false},
        {"a mixture", N_MOST, 7, 5, 3, 8, false, false},
        {"one at a time", 100, 3, 4, 1, 1, false, false},
        {"a window wider than the job", 30, 0, 0, 64, 32, false, false},
        {"a slow pipe", 60, 7, 5, 2, 3, true, false},
        {"a slow pipe, one at a time", 20, 0, 0, 1, 1, true, false},
        {"an empty pipe", 0, 0, 0, 2, 2, true, false},
        {"a late replica", 12, 0, 0, 3, 4, false, true},
        {"a late replica and a line for each", 4, 0, 0, 1, 1, false, true},
    };
    checker c = {0};
    if (ts_world_create_mpi(&argc, &argv, &c.world) != TS_OK) {
        fprintf(stderr, "%s\n", ts_status_message());
        return 1;
    }
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++)
        run(&c, &jobs[i]);
    check_report(&c, "mpi_job");
    ts_world_free(c.world);
    return 0;
}
