// Which sequences run next. Pure logic: no memory, no device, no clock; the engine carries out what it says.
//
//     TS_TRY(ts_scheduler_create(&limits, &scheduler));
//     TS_TRY(ts_scheduler_add(scheduler, &task));            // in order of arrival
//     while (ts_scheduler_next(scheduler, &decision)) {      // false: nothing to do
//         ... run it; for sequences that have ended ...
//         ts_scheduler_finish(scheduler, row);               // their rows and pages are free from the next decision on
//     }
//
// The policy serves throughput: while a waiting sequence fits, its prompt is read first, chunk by chunk; then all
// running sequences decode together. First come, first served: a sequence that needs more pages than are free waits,
// and those behind it wait with it, so that none starves.
//
// The samples of one prompt (n > 1) are a family. The first one reads the prompt but for its last token, and the others
// begin as copies of that state; the last token each reads for itself, in a decode step. While others of the family
// still wait for room, the first one holds the state and does not go on. Only where none of them fits beside it even
// when nothing else runs does it go on, and they read the prompt themselves.
#ifndef TS_SCHEDULER_H
#define TS_SCHEDULER_H

#include "kernels/base/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct ts_scheduler_limits {
    int32_t max_sequences;     // rows of the tile cache
    int64_t n_pages;           // of the tile cache
    int64_t prefill_chunk;     // tokens of one prefill step
    int32_t max_prefill_spans; // sequences in one prefill step: 1 where the device must not pack them
} ts_scheduler_limits;

typedef struct ts_task {
    void *owner;        // the engine's; handed back in decisions
    const void *family; // of one family: tasks that share a prompt of 2 or more tokens, added in a row; or NULL
    int64_t n_prompt;   // tokens, at least 1
    int64_t n_pages;    // pages it borrows when admitted
} ts_task;

typedef struct ts_scheduled_span {
    void *owner;
    int32_t row;
    int64_t position; // of the first token
    int32_t n_tokens; // of the prompt; decode: 1, the token generated last
    bool completes;   // after this span the next token is sampled
} ts_scheduled_span;

typedef struct ts_scheduled_admission {
    void *owner;
    int32_t row;
    int32_t from; // >= 0: after this step's forward, a copy of row `from`: the prompt but for its last token
} ts_scheduled_admission;

typedef struct ts_decision {
    bool decode;
    int32_t n_admissions, n_spans;
    const ts_scheduled_admission *admissions; // borrowed until the next call, like spans
    const ts_scheduled_span *spans;
} ts_decision;

typedef struct ts_scheduler ts_scheduler;

ts_status ts_scheduler_create(const ts_scheduler_limits *limits, ts_scheduler **out);
void ts_scheduler_free(ts_scheduler *scheduler);

// TS_ERR_INVALID when the task could never run: n_pages beyond the pool.
ts_status ts_scheduler_add(ts_scheduler *scheduler, const ts_task *task);

int64_t ts_scheduler_n_waiting(const ts_scheduler *scheduler);
// Prompt tokens that waiting and running sequences have still to read, further samples counted as if none were copied.
int64_t ts_scheduler_prompt_tokens_ahead(const ts_scheduler *scheduler);
int32_t ts_scheduler_n_running(const ts_scheduler *scheduler);

// The next step, or false when no sequence waits or runs.
bool ts_scheduler_next(ts_scheduler *scheduler, ts_decision *out);

// The sequence in `row` has ended.
void ts_scheduler_finish(ts_scheduler *scheduler, int32_t row);

#endif
