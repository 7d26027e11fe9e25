// The scheduler alone: decisions for made-up tasks. A decision is written as text, one word a span, so that a test
// reads as the story of a job: "a0+4." is tokens 0 to 3 of a's prompt, the dot says that the next token is sampled; in
// a decode step "a@7" feeds a's token at position 7. Admissions stand before, "[a:0]" into row 0, "[b:1<0]" as a copy.
#include "runtime/scheduler.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static ts_scheduler *create(int32_t max_sequences, int64_t n_pages, int64_t prefill_chunk, int32_t max_prefill_spans) {
    ts_scheduler *scheduler = NULL;
    const ts_scheduler_limits limits = {max_sequences, n_pages, prefill_chunk, max_prefill_spans};
    cr_assert_eq(ts_scheduler_create(&limits, &scheduler), TS_OK, "%s", ts_status_message());
    return scheduler;
}

// Owners are one-letter names.
static char names[128];

static void *owner_of(char name) {
    names[(int)name] = name;
    return &names[(int)name];
}

static void add(ts_scheduler *scheduler, char name, int64_t n_prompt, int64_t n_pages, const void *family) {
    const ts_task task = {owner_of(name), family, n_prompt, n_pages};
    cr_assert_eq(ts_scheduler_add(scheduler, &task), TS_OK, "%s", ts_status_message());
}

static const char *next(ts_scheduler *scheduler) {
    static char text[4096];
    ts_decision decision;
    int n = 0;
    if (!ts_scheduler_next(scheduler, &decision))
        return "nothing";
    text[0] = '\0';
    for (int32_t i = 0; i < decision.n_admissions; i++) {
        const ts_scheduled_admission *a = &decision.admissions[i];
        n += snprintf(text + n, sizeof text - (size_t)n, "%s[%c:%d", n ? " " : "", *(char *)a->owner, a->row);
        n += snprintf(text + n, sizeof text - (size_t)n, a->from >= 0 ? "<%d]" : "]", a->from);
    }
    for (int32_t i = 0; i < decision.n_spans; i++) {
        const ts_scheduled_span *s = &decision.spans[i];
        const long long position = s->position;
        n += snprintf(text + n, sizeof text - (size_t)n, "%s%c", n ? " " : "", *(char *)s->owner);
        if (decision.decode) {
            cr_assert(s->n_tokens == 1 && s->completes);
            n += snprintf(text + n, sizeof text - (size_t)n, "@%lld", position);
        } else {
            n += snprintf(text + n, sizeof text - (size_t)n, "%lld+%d%s", position, s->n_tokens,
                          s->completes ? "." : "");
        }
    }
    return text;
}

#define NEXT_IS(scheduler, expected)                                                                                   \
    do {                                                                                                               \
        const char *got = next(scheduler);                                                                             \
        cr_assert_str_eq(got, expected, "expected \"%s\", got \"%s\"", expected, got);                                 \
    } while (0)

Test(scheduler, nothing_to_do_before_anything_came) {
    ts_scheduler *s = create(2, 8, 4, 1);
    NEXT_IS(s, "nothing");
    NEXT_IS(s, "nothing");
    ts_scheduler_free(s);
}

Test(scheduler, prompts_are_read_in_order_then_all_decode) {
    ts_scheduler *s = create(4, 0, 8, 1);
    add(s, 'a', 3, 0, NULL);
    add(s, 'b', 5, 0, NULL);
    cr_assert_eq(ts_scheduler_n_waiting(s), 2);
    NEXT_IS(s, "[a:0] a0+3.");
    NEXT_IS(s, "[b:1] b0+5.");
    cr_assert_eq(ts_scheduler_n_waiting(s), 0);
    cr_assert_eq(ts_scheduler_n_running(s), 2);
    NEXT_IS(s, "a@3 b@5");
    NEXT_IS(s, "a@4 b@6");
    add(s, 'c', 1, 0, NULL); // who comes late is read before the others go on
    NEXT_IS(s, "[c:2] c0+1.");
    NEXT_IS(s, "a@5 b@7 c@1");
    ts_scheduler_finish(s, 1);
    NEXT_IS(s, "a@6 c@2");
    ts_scheduler_finish(s, 0);
    ts_scheduler_finish(s, 2);
    NEXT_IS(s, "nothing");
    ts_scheduler_free(s);
}

Test(scheduler, long_prompts_are_read_in_chunks) {
    ts_scheduler *s = create(2, 0, 4, 1);
    add(s, 'a', 9, 0, NULL);
    add(s, 'b', 4, 0, NULL);
    NEXT_IS(s, "[a:0] a0+4");
    NEXT_IS(s, "a4+4");
    NEXT_IS(s, "a8+1.");
    NEXT_IS(s, "[b:1] b0+4.");
    NEXT_IS(s, "a@9 b@4");
    ts_scheduler_free(s);
}

Test(scheduler, a_chunk_of_one_token) {
    ts_scheduler *s = create(1, 0, 1, 1);
    add(s, 'a', 2, 0, NULL);
    NEXT_IS(s, "[a:0] a0+1");
    NEXT_IS(s, "a1+1.");
    NEXT_IS(s, "a@2");
    ts_scheduler_free(s);
}

Test(scheduler, packs_prompts_into_a_chunk_up_to_its_spans) {
    ts_scheduler *s = create(8, 0, 10, 3);
    add(s, 'a', 2, 0, NULL);
    add(s, 'b', 3, 0, NULL);
    add(s, 'c', 2, 0, NULL);
    add(s, 'd', 2, 0, NULL);
    add(s, 'e', 9, 0, NULL);
    NEXT_IS(s, "[a:0] [b:1] [c:2] a0+2. b0+3. c0+2."); // three spans are the most
    NEXT_IS(s, "[d:3] [e:4] d0+2. e0+8");              // ten tokens are the most
    add(s, 'f', 4, 0, NULL);
    NEXT_IS(s, "[f:5] e8+1. f0+4."); // what was begun goes first
    NEXT_IS(s, "a@2 b@3 c@2 d@2 e@9 f@4");
    ts_scheduler_free(s);
}

Test(scheduler, rows_limit_who_runs_and_are_used_again) {
    ts_scheduler *s = create(2, 0, 8, 1);
    add(s, 'a', 1, 0, NULL);
    add(s, 'b', 1, 0, NULL);
    add(s, 'c', 1, 0, NULL);
    add(s, 'd', 1, 0, NULL);
    NEXT_IS(s, "[a:0] a0+1.");
    NEXT_IS(s, "[b:1] b0+1.");
    NEXT_IS(s, "a@1 b@1");
    ts_scheduler_finish(s, 0);
    NEXT_IS(s, "[c:0] c0+1.");
    NEXT_IS(s, "b@2 c@1"); // by age, not by row
    ts_scheduler_finish(s, 1);
    ts_scheduler_finish(s, 0);
    NEXT_IS(s, "[d:0] d0+1."); // the lowest row
    NEXT_IS(s, "d@1");
    ts_scheduler_free(s);
}

Test(scheduler, pages_limit_who_runs) {
    ts_scheduler *s = create(4, 10, 8, 1);
    add(s, 'a', 1, 6, NULL);
    add(s, 'b', 1, 4, NULL);
    add(s, 'c', 1, 1, NULL);
    NEXT_IS(s, "[a:0] a0+1.");
    NEXT_IS(s, "[b:1] b0+1.");
    NEXT_IS(s, "a@1 b@1"); // c waits: all ten are taken
    ts_scheduler_finish(s, 1);
    NEXT_IS(s, "[c:1] c0+1.");
    NEXT_IS(s, "a@2 c@1");
    ts_scheduler_free(s);
}

// A large task at the head is not overtaken by small ones that would fit: they could keep it waiting for ever.
Test(scheduler, large_tasks_do_not_starve) {
    ts_scheduler *s = create(4, 10, 8, 1);
    add(s, 'a', 1, 3, NULL);
    add(s, 'B', 1, 10, NULL);
    add(s, 'c', 1, 1, NULL);
    NEXT_IS(s, "[a:0] a0+1.");
    NEXT_IS(s, "a@1");
    NEXT_IS(s, "a@2");
    ts_scheduler_finish(s, 0);
    NEXT_IS(s, "[B:0] B0+1.");
    NEXT_IS(s, "B@1");
    ts_scheduler_finish(s, 0);
    NEXT_IS(s, "[c:0] c0+1.");
    ts_scheduler_free(s);
}

Test(scheduler, a_task_that_could_never_run_is_refused) {
    ts_scheduler *s = create(4, 10, 8, 1);
    const ts_task task = {owner_of('x'), NULL, 1, 11};
    cr_assert_eq(ts_scheduler_add(s, &task), TS_ERR_INVALID);
    cr_assert_str_eq(ts_status_message(), "11 pages are needed; the tile cache has 10");
    cr_assert_eq(ts_scheduler_n_waiting(s), 0);
    NEXT_IS(s, "nothing");
    add(s, 'a', 1, 10, NULL);
    NEXT_IS(s, "[a:0] a0+1.");
    ts_scheduler_free(s);
}

Test(scheduler, further_samples_begin_as_copies) {
    ts_scheduler *s = create(4, 8, 4, 1);
    const char family = 0;
    add(s, 'a', 6, 2, &family);
    add(s, 'b', 6, 2, &family);
    add(s, 'c', 6, 2, &family);
    add(s, 'd', 2, 2, NULL);
    NEXT_IS(s, "[a:0] a0+4");           // b could begin now, but will come for nothing in a moment
    NEXT_IS(s, "[b:1<0] [c:2<0] a4+1"); // the last token of the prompt each reads for itself
    NEXT_IS(s, "[d:3] d0+2.");
    NEXT_IS(s, "a@5 b@5 c@5 d@2");
    ts_scheduler_free(s);
}

// Where spans are packed, a prompt that fits into one chunk with room to spare is read once all the same.
Test(scheduler, further_samples_begin_as_copies_where_spans_are_packed) {
    ts_scheduler *s = create(8, 0, 16, 8);
    const char family = 0;
    add(s, 'a', 4, 0, &family);
    add(s, 'b', 4, 0, &family);
    add(s, 'c', 4, 0, &family);
    add(s, 'd', 4, 0, NULL);
    NEXT_IS(s, "[a:0] [b:1<0] [c:2<0] a0+3");
    NEXT_IS(s, "[d:3] d0+4.");
    NEXT_IS(s, "a@3 b@3 c@3 d@4");
    ts_scheduler_free(s);
}

// The first sample holds the state of the prompt until the last one has been copied from it.
Test(scheduler, the_first_sample_waits_for_the_others) {
    ts_scheduler *s = create(2, 0, 8, 1);
    const char family = 0;
    for (char name = 'a'; name <= 'd'; name++)
        add(s, name, 5, 0, &family);
    NEXT_IS(s, "[a:0] [b:1<0] a0+4");
    NEXT_IS(s, "b@4");
    NEXT_IS(s, "b@5");
    ts_scheduler_finish(s, 1);
    NEXT_IS(s, "[c:1<0]");
    NEXT_IS(s, "c@4");
    ts_scheduler_finish(s, 1);
    NEXT_IS(s, "[d:1<0]");
    NEXT_IS(s, "a@4 d@4");
    ts_scheduler_free(s);
}

// Where no other sample could ever run beside it, the first one goes on, and the next reads the prompt itself.
Test(scheduler, samples_without_room_beside_each_other_read_the_prompt) {
    ts_scheduler *s = create(1, 0, 8, 1);
    const char family = 0;
    add(s, 'a', 5, 0, &family);
    add(s, 'b', 5, 0, &family);
    NEXT_IS(s, "[a:0] a0+4");
    NEXT_IS(s, "a@4");
    NEXT_IS(s, "a@5");
    ts_scheduler_finish(s, 0);
    NEXT_IS(s, "[b:0] b0+4");
    NEXT_IS(s, "b@4");
    ts_scheduler_free(s);
}

Test(scheduler, copies_take_pages_too) {
    ts_scheduler *s = create(8, 5, 8, 1);
    const char family = 0;
    add(s, 'a', 5, 2, &family);
    add(s, 'b', 5, 2, &family);
    add(s, 'c', 5, 2, &family);
    NEXT_IS(s, "[a:0] [b:1<0] a0+4");
    NEXT_IS(s, "b@4");
    ts_scheduler_finish(s, 1);
    NEXT_IS(s, "[c:1<0]");
    NEXT_IS(s, "a@4 c@4");
    ts_scheduler_free(s);
}

// Two requests with several samples each: a family copies its own first sample only.
Test(scheduler, families_do_not_mix) {
    ts_scheduler *s = create(8, 0, 8, 1);
    const char one = 0, two = 0;
    cr_assert_neq((const void *)&one, (const void *)&two);
    add(s, 'a', 3, 0, &one);
    add(s, 'b', 3, 0, &one);
    add(s, 'c', 4, 0, &two);
    add(s, 'd', 4, 0, &two);
    NEXT_IS(s, "[a:0] [b:1<0] a0+2");
    NEXT_IS(s, "[c:2] [d:3<2] c0+3");
    NEXT_IS(s, "a@2 b@2 c@3 d@3");
    ts_scheduler_free(s);
}

typedef struct random_task {
    int64_t n_prompt, n_pages, n_left, n_read, position;
    const void *family;
    int32_t row; // -1: waits, -2: has ended
} random_task;

// Tokens that prefill steps read: a family's last one is read in decode steps.
static int64_t prefix_of(const random_task *task) {
    return task->n_prompt - (task->family != NULL);
}

static int64_t below(uint64_t *random, int64_t n) {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    return (int64_t)(*random % (uint64_t)n);
}

enum { N_TASKS = 200 };

// What must hold of every decision, whatever the limits: admissions in order, into free rows, within the pages; spans
// within the chunk, each going on where the last one ended; copies only of a state of the same family, at the last
// token of the prompt.
static void check_decision(const ts_decision *d, const ts_scheduler_limits *limits, random_task *tasks, int *n_admitted,
                           int64_t *free_pages) {
    int64_t n_tokens = 0;
    for (int32_t i = 0; i < d->n_admissions; i++) {
        const ts_scheduled_admission *a = &d->admissions[i];
        random_task *task = a->owner;
        cr_assert_eq(task - tasks, (*n_admitted)++, "admitted out of turn");
        cr_assert(a->row >= 0 && a->row < limits->max_sequences);
        for (int other = 0; other < N_TASKS; other++)
            cr_assert_neq(tasks[other].row, a->row, "row %d is in use", a->row);
        task->row = a->row;
        *free_pages -= task->n_pages;
        cr_assert_geq(*free_pages, 0);
    }
    cr_assert_leq(d->n_spans, d->decode ? limits->max_sequences : limits->max_prefill_spans);
    for (int32_t i = 0; i < d->n_spans; i++) {
        const ts_scheduled_span *span = &d->spans[i];
        random_task *task = span->owner;
        cr_assert_eq(span->row, task->row);
        cr_assert_eq(span->position, task->position);
        cr_assert_eq(d->decode, task->n_read == prefix_of(task));
        task->position += span->n_tokens;
        task->n_read += d->decode ? 0 : span->n_tokens;
        n_tokens += span->n_tokens;
        cr_assert_eq(span->completes, d->decode || (!task->family && task->n_read == task->n_prompt));
    }
    cr_assert(d->decode || n_tokens <= limits->prefill_chunk);
    for (int32_t i = 0; i < d->n_admissions; i++) {
        const ts_scheduled_admission *a = &d->admissions[i];
        random_task *task = a->owner, *from = NULL;
        for (int other = 0; other < N_TASKS && a->from >= 0; other++)
            if (tasks[other].row == a->from)
                from = &tasks[other];
        if (!from)
            continue;
        cr_assert(from->family && from->family == task->family && from->position == prefix_of(from));
        task->n_read = task->position = prefix_of(task);
    }
}

Test(scheduler, random_jobs_keep_the_limits_and_end) {
    static random_task tasks[N_TASKS];
    uint64_t random = 88172645463325252u;
    for (int round = 0; round < 40; round++) {
        const int32_t n_rows = 1 + (int32_t)below(&random, 9);
        const ts_scheduler_limits limits = {n_rows, below(&random, 20), 1 + below(&random, 12),
                                            1 + (int32_t)below(&random, n_rows)};
        ts_scheduler *s = create(limits.max_sequences, limits.n_pages, limits.prefill_chunk, limits.max_prefill_spans);
        int n_made = 0, n_added = 0, n_done = 0, n_admitted = 0, n_steps = 0;
        int64_t free_pages = limits.n_pages;
        while (n_made < N_TASKS) {
            const random_task task = {2 + below(&random, 20), below(&random, limits.n_pages + 1), 0, 0, 0, NULL, -1};
            const void *family = below(&random, 2) ? &tasks[n_made] : NULL;
            for (int64_t n = family ? 2 + below(&random, 4) : 1; n > 0 && n_made < N_TASKS; n--) {
                tasks[n_made] = task;
                tasks[n_made].family = family;
                tasks[n_made++].n_left = 1 + below(&random, 6);
            }
        }
        while (n_done < N_TASKS) {
            ts_decision d;
            for (; n_added < N_TASKS && below(&random, 3) > 0; n_added++) {
                const ts_task task = {&tasks[n_added], tasks[n_added].family, tasks[n_added].n_prompt,
                                      tasks[n_added].n_pages};
                cr_assert_eq(ts_scheduler_add(s, &task), TS_OK);
            }
            cr_assert_lt(n_steps++, 100000, "round %d does not end", round);
            if (!ts_scheduler_next(s, &d)) {
                cr_assert_eq(n_done, n_added, "round %d: idle with tasks in hand", round);
                continue;
            }
            check_decision(&d, &limits, tasks, &n_admitted, &free_pages);
            for (int i = 0; i < N_TASKS; i++) {
                const bool has_sampled =
                    tasks[i].family ? tasks[i].position > prefix_of(&tasks[i]) : tasks[i].n_read == tasks[i].n_prompt;
                if (tasks[i].row < 0 || !has_sampled || --tasks[i].n_left > 0)
                    continue;
                ts_scheduler_finish(s, tasks[i].row);
                tasks[i].row = -2;
                free_pages += tasks[i].n_pages;
                n_done++;
            }
        }
        cr_assert_eq(ts_scheduler_n_running(s), 0);
        ts_scheduler_free(s);
    }
}
