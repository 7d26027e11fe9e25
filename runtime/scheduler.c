#include "runtime/scheduler.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

typedef struct running {
    ts_task task;
    bool used;
    int64_t n_read; // tokens of the prompt that have been scheduled
    int64_t position;
    int64_t order; // of admission
} running;

struct ts_scheduler {
    ts_scheduler_limits limits;
    running *rows; // [max_sequences]
    int32_t n_running;
    int64_t n_free_pages, n_admitted;
    ts_task *waiting; // ring
    int64_t n_waiting, first_waiting, capacity;
    ts_scheduled_admission *admissions; // [max_sequences]
    ts_scheduled_span *spans;           // [max_sequences]
    int32_t *order;                     // [max_sequences] rows, oldest first
};

ts_status ts_scheduler_create(const ts_scheduler_limits *limits, ts_scheduler **out) {
    ts_status status = TS_OK;
    ts_scheduler *scheduler = calloc(1, sizeof *scheduler);
    const size_t n = (size_t)limits->max_sequences;
    TS_CHECK(scheduler, TS_ERR_MEMORY, "scheduler: out of memory");
    scheduler->limits = *limits;
    scheduler->n_free_pages = limits->n_pages;
    scheduler->rows = calloc(n, sizeof *scheduler->rows);
    scheduler->admissions = calloc(n, sizeof *scheduler->admissions);
    scheduler->spans = calloc(n, sizeof *scheduler->spans);
    scheduler->order = calloc(n, sizeof *scheduler->order);
    TS_CHECK(scheduler->rows && scheduler->admissions && scheduler->spans && scheduler->order, TS_ERR_MEMORY,
             "scheduler: out of memory");
    *out = scheduler;
    scheduler = NULL;
done:
    ts_scheduler_free(scheduler);
    return status;
}

void ts_scheduler_free(ts_scheduler *scheduler) {
    if (!scheduler)
        return;
    free(scheduler->rows);
    free(scheduler->waiting);
    free(scheduler->admissions);
    free(scheduler->spans);
    free(scheduler->order);
    free(scheduler);
}

ts_status ts_scheduler_add(ts_scheduler *scheduler, const ts_task *task) {
    ts_status status = TS_OK;
    assert(task->n_prompt >= 1);
    TS_CHECK(task->n_pages <= scheduler->limits.n_pages, TS_ERR_INVALID,
             "%lld pages are needed; the tile cache has %lld", (long long)task->n_pages,
             (long long)scheduler->limits.n_pages);
    if (scheduler->n_waiting == scheduler->capacity) {
        const int64_t capacity = scheduler->capacity ? 2 * scheduler->capacity : 64;
        ts_task *waiting = malloc((size_t)capacity * sizeof *waiting);
        TS_CHECK(waiting, TS_ERR_MEMORY, "scheduler: out of memory");
        for (int64_t i = 0; i < scheduler->n_waiting; i++)
            waiting[i] = scheduler->waiting[(scheduler->first_waiting + i) % scheduler->capacity];
        free(scheduler->waiting);
        scheduler->waiting = waiting;
        scheduler->first_waiting = 0;
        scheduler->capacity = capacity;
    }
    scheduler->waiting[(scheduler->first_waiting + scheduler->n_waiting++) % scheduler->capacity] = *task;
done:
    return status;
}

int64_t ts_scheduler_n_waiting(const ts_scheduler *scheduler) {
    return scheduler->n_waiting;
}

int64_t ts_scheduler_prompt_tokens_ahead(const ts_scheduler *scheduler) {
    int64_t n = 0;
    for (int64_t i = 0; i < scheduler->n_waiting; i++)
        n += scheduler->waiting[(scheduler->first_waiting + i) % scheduler->capacity].n_prompt;
    for (int32_t row = 0; row < scheduler->limits.max_sequences; row++)
        if (scheduler->rows[row].used)
            n += scheduler->rows[row].task.n_prompt - scheduler->rows[row].n_read;
    return n;
}

int32_t ts_scheduler_n_running(const ts_scheduler *scheduler) {
    return scheduler->n_running;
}

static const ts_task *head_of(const ts_scheduler *scheduler) {
    return scheduler->n_waiting > 0 ? &scheduler->waiting[scheduler->first_waiting] : NULL;
}

static bool head_fits(const ts_scheduler *scheduler) {
    const ts_task *head = head_of(scheduler);
    return head && scheduler->n_running < scheduler->limits.max_sequences && head->n_pages <= scheduler->n_free_pages;
}

// A further sample waits while the first one is still reading their prompt: then it can begin as a copy.
static bool head_may_copy_soon(const ts_scheduler *scheduler) {
    const void *family = head_of(scheduler)->family;
    for (int32_t row = 0; family && row < scheduler->limits.max_sequences; row++) {
        const running *r = &scheduler->rows[row];
        if (r->used && r->task.family == family && r->n_read < r->task.n_prompt)
            return true;
    }
    return false;
}

// Moves the head of the queue into the lowest free row.
static int32_t admit_head(ts_scheduler *scheduler, ts_decision *out, int32_t from) {
    const ts_task task = *head_of(scheduler);
    int32_t row = 0;
    while (scheduler->rows[row].used)
        row++;
    scheduler->first_waiting = (scheduler->first_waiting + 1) % scheduler->capacity;
    scheduler->n_waiting--;
    scheduler->n_running++;
    scheduler->n_free_pages -= task.n_pages;
    scheduler->rows[row] = (running){.task = task, .used = true, .order = scheduler->n_admitted++};
    scheduler->admissions[out->n_admissions++] = (ts_scheduled_admission){task.owner, row, from};
    return row;
}

// Further samples of a prompt that has just been read through begin as its copies.
static void fork_family(ts_scheduler *scheduler, ts_decision *out, int32_t row) {
    const void *family = scheduler->rows[row].task.family;
    while (family && head_fits(scheduler) && head_of(scheduler)->family == family) {
        running *copy = &scheduler->rows[admit_head(scheduler, out, row)];
        copy->n_read = copy->position = copy->task.n_prompt;
    }
}

// The next piece of row's prompt, of at most `budget` tokens. Returns its length.
static int64_t add_prompt_span(ts_scheduler *scheduler, ts_decision *out, int32_t row, int64_t budget) {
    running *r = &scheduler->rows[row];
    const int64_t left = r->task.n_prompt - r->n_read, n = left < budget ? left : budget;
    scheduler->spans[out->n_spans++] = (ts_scheduled_span){r->task.owner, row, r->n_read, (int32_t)n, n == left};
    r->n_read += n;
    r->position = r->n_read;
    if (n == left) // the row holds the whole prompt after this step
        fork_family(scheduler, out, row);
    return n;
}

// Rows in the order of their admission.
static int32_t rows_by_age(ts_scheduler *scheduler) {
    int32_t n = 0;
    for (int32_t row = 0; row < scheduler->limits.max_sequences; row++) {
        if (!scheduler->rows[row].used)
            continue;
        int32_t at = n++;
        for (; at > 0 && scheduler->rows[scheduler->order[at - 1]].order > scheduler->rows[row].order; at--)
            scheduler->order[at] = scheduler->order[at - 1];
        scheduler->order[at] = row;
    }
    return n;
}

bool ts_scheduler_next(ts_scheduler *scheduler, ts_decision *out) {
    *out = (ts_decision){.admissions = scheduler->admissions, .spans = scheduler->spans};
    int64_t budget = scheduler->limits.prefill_chunk;
    // Prompts already begun go on first, then waiting ones begin.
    int32_t n = rows_by_age(scheduler);
    for (int32_t i = 0; i < n && budget > 0 && out->n_spans < scheduler->limits.max_prefill_spans; i++)
        if (scheduler->rows[scheduler->order[i]].n_read < scheduler->rows[scheduler->order[i]].task.n_prompt)
            budget -= add_prompt_span(scheduler, out, scheduler->order[i], budget);
    while (budget > 0 && out->n_spans < scheduler->limits.max_prefill_spans && head_fits(scheduler) &&
           !head_may_copy_soon(scheduler))
        budget -= add_prompt_span(scheduler, out, admit_head(scheduler, out, -1), budget);
    if (out->n_spans > 0)
        return true;
    for (int32_t i = 0; i < n; i++) {
        running *r = &scheduler->rows[scheduler->order[i]];
        scheduler->spans[out->n_spans++] =
            (ts_scheduled_span){r->task.owner, scheduler->order[i], r->position++, 1, true};
    }
    out->decode = true;
    return out->n_spans > 0;
}

void ts_scheduler_finish(ts_scheduler *scheduler, int32_t row) {
    running *r = &scheduler->rows[row];
    assert(r->used);
    scheduler->n_free_pages += r->task.n_pages;
    scheduler->n_running--;
    r->used = false;
}
