// The leader of a replica: takes requests, schedules them, has the replica carry out steps, and hands finished records
// on.
//
//     TS_TRY(ts_engine_create(tp, model, tokenizer, replica, &limits, &engine));
//     TS_TRY(ts_engine_run(engine, &job));     // until the source ends and everything it gave is done
//     ts_engine_free(engine);
//
// The other ranks of the replica call ts_replica_follow instead.
#ifndef TS_ENGINE_H
#define TS_ENGINE_H

#include "runtime/replica.h"
#include "runtime/request.h"
#include "runtime/tokenizer.h"

// A finished line of the output.
typedef struct ts_record {
    const char *line; // [n_bytes], ends with '\n'
    size_t n_bytes;
    bool failed; // the request was refused
    int64_t prompt_tokens, completion_tokens;
} ts_record;

// Where requests come from and records go. Every callback's failure ends the run with its status.
typedef struct ts_engine_job {
    void *context;
    // The next request, owned by the caller from then on; or *request NULL, with *end true when there will be no more.
    // `wait`: nothing is running; the call may block until there is one.
    ts_status (*next)(void *context, bool wait, ts_request **request, bool *end);
    ts_status (*done)(void *context, const ts_record *record);
    // After every step: tokens it read of prompts, tokens it generated, and the most that the requests taken so far can
    // still ask for of both.
    ts_status (*tick)(void *context, int64_t n_prompt_tokens, int64_t n_generated, int64_t n_ahead);
} ts_engine_job;

typedef struct ts_engine ts_engine;

// All are borrowed until free. `options` are those of the replica.
ts_status ts_engine_create(ts_device *device, ts_group *tp, ts_model *model, const ts_tokenizer *tokenizer,
                           ts_replica *replica, const ts_replica_options *options, ts_engine **out);
void ts_engine_free(ts_engine *engine);

// Runs the job to its end and stops the followers. Collective with their ts_replica_follow.
ts_status ts_engine_run(ts_engine *engine, const ts_engine_job *job);

#endif
