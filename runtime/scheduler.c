#include "runtime/scheduler.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

typedef struct running {
    ts_task task;
    bool used;
    int64_t n_read; // tokens of the prompt that have been scheduled
    int64_t position;
    bool holds; // stands after the shared part of its prompt until the rest of its family has been copied from it
} running;

struct ts_scheduler {
    ts_scheduler_limits limits;
    running *rows; // [max_sequences]
    int32_t n_running;
    int64_t n_free_pages;
    ts_task *waiting; // ring
    int64_t n_waiting, first_waiting, capacity;
    ts_scheduled_admission *admissions; // [max_sequences]
    ts_scheduled_span *spans;           // [max_sequences]
    int32_t *order;                     // [n_running] rows, oldest first
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
    assert(task->n_prompt >= (task->family ? 2 : 1));
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

// Tokens of the prompt that are read in prefill steps; of a family's the last one is not.
static int64_t prefix_of(const ts_task *task) {
    return task->n_prompt - (task->family != NULL);
}

int64_t ts_scheduler_prompt_tokens_ahead(const ts_scheduler *scheduler) {
    int64_t n = 0;
    for (int64_t i = 0; i < scheduler->n_waiting; i++)
        n += scheduler->waiting[(scheduler->first_waiting + i) % scheduler->capacity].n_prompt;
    for (int32_t row = 0; row < scheduler->limits.max_sequences; row++)
        if (scheduler->rows[row].used)
            n += prefix_of(&scheduler->rows[row].task) - scheduler->rows[row].n_read;
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

// The row from which waiting tasks of `family` are, or soon can be, copied; -1 when there is none.
static int32_t source_of(const ts_scheduler *scheduler, const void *family) {
    for (int32_t i = 0; family && i < scheduler->n_running; i++) {
        const running *r = &scheduler->rows[scheduler->order[i]];
        if (r->task.family == family && (r->holds || r->n_read < prefix_of(&r->task)))
            return scheduler->order[i];
    }
    return -1;
}

// Moves the head of the queue into the lowest free row.
static int32_t admit_head(ts_scheduler *scheduler, ts_decision *out, int32_t from) {
    const ts_task task = *head_of(scheduler);
    int32_t row = 0;
    while (scheduler->rows[row].used)
        row++;
    scheduler->first_waiting = (scheduler->first_waiting + 1) % scheduler->capacity;
    scheduler->n_waiting--;
    scheduler->order[scheduler->n_running++] = row;
    scheduler->n_free_pages -= task.n_pages;
    scheduler->rows[row] = (running){.task = task, .used = true};
    scheduler->admissions[out->n_admissions++] = (ts_scheduled_admission){task.owner, row, from};
    return row;
}

// Copies of the row that holds a family's state, as many as fit; after the last one it goes on.
static void copy_family(ts_scheduler *scheduler, ts_decision *out) {
    const ts_task *head = head_of(scheduler);
    const int32_t row = head ? source_of(scheduler, head->family) : -1;
    if (row < 0 || !scheduler->rows[row].holds)
        return;
    const void *family = head->family;
    while (head_fits(scheduler) && head_of(scheduler)->family == family) {
        running *copy = &scheduler->rows[admit_head(scheduler, out, row)];
        copy->n_read = copy->position = prefix_of(&copy->task);
    }
    head = head_of(scheduler);
    scheduler->rows[row].holds = head && head->family == family;
}

// The next piece of row's prompt, of at most `budget` tokens. Returns its length.
static int64_t add_prompt_span(ts_scheduler *scheduler, ts_decision *out, int32_t row, int64_t budget) {
    running *r = &scheduler->rows[row];
    const int64_t left = prefix_of(&r->task) - r->n_read, n = left < budget ? left : budget;
    const ts_task *head = head_of(scheduler);
    scheduler->spans[out->n_spans++] =
        (ts_scheduled_span){r->task.owner, row, r->n_read, (int32_t)n, n == left && !r->task.family};
    r->n_read += n;
    r->position = r->n_read;
    r->holds = n == left && r->task.family && head && head->family == r->task.family;
    return n;
}

static void add_prompt_spans(ts_scheduler *scheduler, ts_decision *out) {
    int64_t budget = scheduler->limits.prefill_chunk;
    const int32_t n = scheduler->n_running, most = scheduler->limits.max_prefill_spans;
    // Prompts already begun go on first, then waiting ones begin; one that can be copied soon does not.
    for (int32_t i = 0; i < n && budget > 0 && out->n_spans < most; i++) {
        const running *r = &scheduler->rows[scheduler->order[i]];
        if (r->n_read < prefix_of(&r->task))
            budget -= add_prompt_span(scheduler, out, scheduler->order[i], budget);
    }
    while (budget > 0 && out->n_spans < most && head_fits(scheduler) &&
           source_of(scheduler, head_of(scheduler)->family) < 0)
        budget -= add_prompt_span(scheduler, out, admit_head(scheduler, out, -1), budget);
}

static void add_decode_spans(ts_scheduler *scheduler, ts_decision *out) {
    out->decode = true;
    for (int32_t i = 0; i < scheduler->n_running; i++) {
        running *r = &scheduler->rows[scheduler->order[i]];
        if (!r->holds)
            scheduler->spans[out->n_spans++] =
                (ts_scheduled_span){r->task.owner, scheduler->order[i], r->position++, 1, true};
    }
}

bool ts_scheduler_next(ts_scheduler *scheduler, ts_decision *out) {
    *out = (ts_decision){.admissions = scheduler->admissions, .spans = scheduler->spans};
    add_prompt_spans(scheduler, out);
    if (out->n_spans == 0)
        add_decode_spans(scheduler, out);
    copy_family(scheduler, out);
    if (out->n_spans == 0 && out->n_admissions == 0 && scheduler->n_running > 0) {
        // All that runs is a row that holds its state for others, and not one of them fits beside it.
        for (int32_t i = 0; i < scheduler->n_running; i++)
            scheduler->rows[scheduler->order[i]].holds = false;
        add_decode_spans(scheduler, out);
    }
    return out->n_spans > 0 || out->n_admissions > 0;
}

void ts_scheduler_finish(ts_scheduler *scheduler, int32_t row) {
    running *r = &scheduler->rows[row];
    assert(r->used);
    scheduler->n_free_pages += r->task.n_pages;
    int32_t at = 0;
    while (scheduler->order[at] != row)
        at++;
    scheduler->n_running--;
    memmove(scheduler->order + at, scheduler->order + at + 1,
            (size_t)(scheduler->n_running - at) * sizeof *scheduler->order);
    r->used = false;
}
