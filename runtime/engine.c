#include "runtime/engine.h"

#include "runtime/generation.h"
#include "runtime/scheduler.h"

#include <assert.h>
#include <stdlib.h>
#include <time.h>

struct in_flight;

// One sample of a request in flight: what the scheduler calls an owner.
typedef struct sequence {
    struct in_flight *parent;
    ts_generation generation;
} sequence;

typedef struct in_flight {
    ts_request *request; // owned
    int32_t *prompt;     // owned
    int64_t n_prompt;
    uint64_t hash; // of custom_id: what the generator's counter calls the request
    int32_t n_left;
    sequence *samples;              // [request->sampling.n]
    struct in_flight *next, **link; // in the engine's list
} in_flight;

struct ts_engine {
    ts_model *model;
    const ts_tokenizer *tokenizer;
    ts_replica *replica;
    ts_replica_options options;
    ts_tile_cache_shape shape;
    ts_scheduler *scheduler;
    in_flight *all;
    const ts_engine_job *job; // while running
    bool input_ended;
    // The step being made; arrays of max_sequences, tokens of the largest step.
    Ts__Job__Step step;
    Ts__Job__Admission *admissions, **admission_pointers;
    Ts__Job__Sampling *samplings;
    int32_t *release, *rows, *lengths, *tokens, *sample_rows, *sample_spans;
    int64_t *positions;
    sequence **sampled; // whose token sample i is
    ts_next_token *next;
};

ts_status ts_engine_create(ts_device *device, ts_group *tp, ts_model *model, const ts_tokenizer *tokenizer,
                           ts_replica *replica, const ts_replica_options *options, ts_engine **out) {
    ts_status status = TS_OK;
    const size_t n = (size_t)options->max_sequences;
    const size_t n_tokens =
        (size_t)(options->prefill_chunk > options->max_sequences ? options->prefill_chunk : options->max_sequences);
    ts_engine *engine = calloc(1, sizeof *engine);
    TS_CHECK(engine, TS_ERR_MEMORY, "engine: out of memory");
    engine->model = model;
    engine->tokenizer = tokenizer;
    engine->replica = replica;
    engine->options = *options;
    engine->shape = ts_replica_cache_shape(device, ts_group_size(tp), model, options);
    engine->admissions = calloc(n, sizeof *engine->admissions);
    engine->admission_pointers = calloc(n, sizeof *engine->admission_pointers);
    engine->samplings = calloc(n, sizeof *engine->samplings);
    engine->release = calloc(n, sizeof *engine->release);
    engine->rows = calloc(n, sizeof *engine->rows);
    engine->positions = calloc(n, sizeof *engine->positions);
    engine->lengths = calloc(n, sizeof *engine->lengths);
    engine->tokens = calloc(n_tokens, sizeof *engine->tokens);
    engine->sample_rows = calloc(n, sizeof *engine->sample_rows);
    engine->sample_spans = calloc(n, sizeof *engine->sample_spans);
    engine->sampled = calloc(n, sizeof *engine->sampled);
    engine->next = calloc(n, sizeof *engine->next);
    TS_CHECK(engine->admissions && engine->admission_pointers && engine->samplings && engine->release && engine->rows &&
                 engine->positions && engine->lengths && engine->tokens && engine->sample_rows &&
                 engine->sample_spans && engine->sampled && engine->next,
             TS_ERR_MEMORY, "engine: out of memory");
    TS_CHECK(ts_tokenizer_vocab_size(tokenizer) <= ts_model_config(model)->vocab_size, TS_ERR_INVALID,
             "the tokenizer has %d tokens; the model's vocab_size is %d, which must be at least as many",
             ts_tokenizer_vocab_size(tokenizer), ts_model_config(model)->vocab_size);
    const ts_scheduler_limits limits = {
        .max_sequences = options->max_sequences,
        .n_pages = options->n_pages,
        .prefill_chunk = options->prefill_chunk,
        .max_prefill_spans = device->packs_prefill ? options->max_sequences : 1,
    };
    TS_TRY(ts_scheduler_create(&limits, &engine->scheduler));
    *out = engine;
    engine = NULL;
done:
    ts_engine_free(engine);
    return status;
}

static void in_flight_free(in_flight *job) {
    if (!job)
        return;
    if (job->link) {
        *job->link = job->next;
        if (job->next)
            job->next->link = job->link;
    }
    for (int32_t i = 0; job->samples && i < job->request->sampling.n; i++)
        ts_generation_end(&job->samples[i].generation);
    free(job->samples);
    free(job->prompt);
    ts_request_free(job->request);
    free(job);
}

void ts_engine_free(ts_engine *engine) {
    if (!engine)
        return;
    while (engine->all)
        in_flight_free(engine->all);
    ts_scheduler_free(engine->scheduler);
    free(engine->admissions);
    free(engine->admission_pointers);
    free(engine->samplings);
    free(engine->release);
    free(engine->rows);
    free(engine->positions);
    free(engine->lengths);
    free(engine->tokens);
    free(engine->sample_rows);
    free(engine->sample_spans);
    free(engine->sampled);
    free(engine->next);
    free(engine);
}

// FNV-1a: a request keeps its draws wherever it stands in a batch, and whichever replica runs it.
static uint64_t hash_of(const char *text) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *text; text++)
        hash = (hash ^ (unsigned char)*text) * 0x100000001b3u;
    return hash;
}

// ---- Requests in, records out

static ts_status refuse(ts_engine *engine, ts_request_error *error) {
    ts_status status = TS_OK;
    char *line = NULL;
    ts_record record = {.failed = true};
    TS_TRY(ts_request_error_format(error, &line, &record.n_bytes));
    record.line = line;
    TS_TRY(engine->job->done(engine->job->context, &record));
done:
    free(line);
    ts_request_error_free(error);
    return status;
}

// The prompt as tokens, or *error.
static ts_status read_prompt(ts_engine *engine, in_flight *job, ts_request_error **error) {
    ts_status status = TS_OK;
    const ts_request *request = job->request;
    size_t n = request->n_prompt_ids;
    if (request->prompt_ids) {
        job->prompt = malloc(n * sizeof *job->prompt);
        TS_CHECK(job->prompt, TS_ERR_MEMORY, "engine: out of memory for a prompt of %zu tokens", n);
        memcpy(job->prompt, request->prompt_ids, n * sizeof *job->prompt);
    } else {
        const ts_status encoded =
            ts_tokenizer_encode(engine->tokenizer, request->prompt_text, request->prompt_bytes, true, &job->prompt, &n);
        TS_CHECK(encoded != TS_ERR_MEMORY, encoded, "%s", ts_status_message());
        if (encoded != TS_OK) {
            TS_TRY(ts_request_error_create(request->line, request->custom_id, "prompt", "invalid_value", error,
                                           "prompt: %s", ts_status_message()));
            goto done;
        }
    }
    job->n_prompt = (int64_t)n;
done:
    return status;
}

// Before min_tokens neither end of text nor a stop token may come: something else must be left in the vocabulary.
static ts_status check_bans(ts_engine *engine, in_flight *job, ts_request_error **error) {
    ts_status status = TS_OK;
    const ts_config *config = ts_model_config(engine->model);
    const ts_sampling_params *params = &job->request->sampling;
    const int32_t n_eos = params->ignore_eos ? 0 : config->n_eos;
    int32_t n_left = config->vocab_size;
    uint8_t *banned = NULL;
    if (params->min_tokens == 0 || n_eos + params->n_stop_ids < n_left)
        goto done;
    banned = calloc((size_t)config->vocab_size, 1);
    TS_CHECK(banned, TS_ERR_MEMORY, "engine: out of memory");
    for (int32_t i = 0; i < n_eos + params->n_stop_ids; i++) {
        const int32_t id = i < n_eos ? config->eos_token_ids[i] : params->stop_ids[i - n_eos];
        n_left -= !banned[id];
        banned[id] = 1;
    }
    if (n_left == 0)
        TS_TRY(ts_request_error_create(job->request->line, job->request->custom_id, "stop_token_ids", "invalid_value",
                                       error,
                                       "stop_token_ids leave no token that may come before min_tokens %d; at "
                                       "least 1 of %d must be left",
                                       params->min_tokens, config->vocab_size));
done:
    free(banned);
    return status;
}

// What the model and its memory have to say against the request.
static ts_status check_request(ts_engine *engine, in_flight *job, ts_request_error **error) {
    ts_status status = TS_OK;
    const ts_request *request = job->request;
    TS_TRY(ts_request_check_vocabulary(request, ts_model_config(engine->model)->vocab_size, error));
    if (*error)
        goto done;
    TS_TRY(check_bans(engine, job, error));
    if (*error)
        goto done;
    TS_TRY(read_prompt(engine, job, error));
    if (*error)
        goto done;
    const int64_t n_tokens = job->n_prompt + request->sampling.max_tokens;
    if (job->n_prompt < 1)
        TS_TRY(ts_request_error_create(request->line, request->custom_id, "prompt", "invalid_value", error,
                                       "prompt has no tokens; at least 1 is needed"));
    else if (ts_tile_cache_pages_for(&engine->shape, n_tokens) > engine->options.n_pages)
        TS_TRY(ts_request_error_create(request->line, request->custom_id, "prompt", "context_length_exceeded", error,
                                       "prompt of %lld tokens and max_tokens %d need %lld tiles of cache; the cache "
                                       "has %lld, enough for %lld tokens",
                                       (long long)job->n_prompt, request->sampling.max_tokens,
                                       (long long)ts_tile_cache_pages_for(&engine->shape, n_tokens),
                                       (long long)engine->options.n_pages,
                                       (long long)((engine->options.n_pages + 1) * engine->shape.tile_size - 1)));
done:
    return status;
}

static ts_status enqueue(ts_engine *engine, ts_request *request) {
    ts_status status = TS_OK;
    const ts_config *config = ts_model_config(engine->model);
    const int32_t n = request->sampling.n;
    ts_request_error *error = NULL;
    in_flight *job = calloc(1, sizeof *job);
    if (!job)
        ts_request_free(request);
    TS_CHECK(job, TS_ERR_MEMORY, "engine: out of memory");
    job->request = request;
    TS_TRY(check_request(engine, job, &error));
    if (error) {
        TS_TRY(refuse(engine, error));
        goto done;
    }
    job->hash = hash_of(request->custom_id);
    job->samples = calloc((size_t)n, sizeof *job->samples);
    TS_CHECK(job->samples, TS_ERR_MEMORY, "engine: out of memory");
    for (int32_t i = 0; i < n; i++) {
        sequence *s = &job->samples[i];
        s->parent = job;
        ts_generation_begin(&s->generation, request, engine->tokenizer, config->eos_token_ids, config->n_eos, i);
        s->generation.last_token = job->prompt[job->n_prompt - 1]; // read in a decode step where samples share the rest
        const ts_task task = {
            .owner = s,
            .family = n > 1 && job->n_prompt > 1 ? job : NULL,
            .n_prompt = job->n_prompt,
            .n_pages = ts_tile_cache_pages_for(&engine->shape, job->n_prompt + request->sampling.max_tokens),
        };
        TS_TRY(ts_scheduler_add(engine->scheduler, &task));
    }
    job->n_left = n;
    job->next = engine->all;
    job->link = &engine->all;
    if (job->next)
        job->next->link = &job->next;
    engine->all = job;
    job = NULL;
done:
    in_flight_free(job);
    return status;
}

// Keeps a few sequences waiting, so that a row that falls free is taken at once, and no more: another replica might be
// idle.
static ts_status take_requests(ts_engine *engine) {
    ts_status status = TS_OK;
    const int64_t enough = engine->options.max_sequences / 4 + 1;
    while (!engine->input_ended && ts_scheduler_n_waiting(engine->scheduler) < enough) {
        const bool idle =
            ts_scheduler_n_waiting(engine->scheduler) == 0 && ts_scheduler_n_running(engine->scheduler) == 0;
        ts_request *request = NULL;
        TS_TRY(engine->job->next(engine->job->context, idle, &request, &engine->input_ended));
        if (!request)
            break;
        TS_TRY(enqueue(engine, request));
    }
done:
    return status;
}

static ts_status finish_request(ts_engine *engine, in_flight *job) {
    ts_status status = TS_OK;
    const int32_t n = job->request->sampling.n;
    char *line = NULL;
    ts_record record = {.prompt_tokens = job->n_prompt};
    ts_choice *choices = calloc((size_t)n, sizeof *choices);
    TS_CHECK(choices, TS_ERR_MEMORY, "engine: out of memory");
    for (int32_t i = 0; i < n; i++) {
        choices[i] = ts_generation_choice(&job->samples[i].generation);
        record.completion_tokens += job->samples[i].generation.n_tokens;
    }
    const ts_result result = {
        .custom_id = job->request->custom_id,
        .model = job->request->model,
        .prompt_tokens = job->n_prompt,
        .completion_tokens = record.completion_tokens,
        .created = (int64_t)time(NULL),
        .choices = choices,
        .n_choices = n,
    };
    TS_TRY(ts_result_format(&result, &line, &record.n_bytes));
    record.line = line;
    TS_TRY(engine->job->done(engine->job->context, &record));
    in_flight_free(job);
done:
    free(line);
    free(choices);
    return status;
}

// ---- Steps

static void fill_sampling(Ts__Job__Sampling *out, const ts_sampling_params *params) {
    ts__job__sampling__init(out);
    out->max_tokens = params->max_tokens;
    out->min_tokens = params->min_tokens;
    out->top_k = params->top_k;
    out->temperature = params->temperature;
    out->top_p = params->top_p;
    out->min_p = params->min_p;
    out->presence_penalty = params->presence_penalty;
    out->frequency_penalty = params->frequency_penalty;
    out->repetition_penalty = params->repetition_penalty;
    out->seed = params->seed;
    out->logprobs = params->logprobs;
    out->ignore_eos = params->ignore_eos;
    out->n_stop_ids = (size_t)params->n_stop_ids;
    out->stop_ids = params->stop_ids;
    out->n_bias_ids = out->n_biases = (size_t)params->n_biases;
    out->bias_ids = params->bias_ids;
    out->biases = params->biases;
}

static void fill_admission(ts_engine *engine, size_t i, const ts_scheduled_admission *admission) {
    const sequence *s = admission->owner;
    Ts__Job__Admission *out = &engine->admissions[i];
    ts__job__admission__init(out);
    fill_sampling(&engine->samplings[i], &s->parent->request->sampling);
    out->row = admission->row;
    out->n_tokens = s->parent->n_prompt + s->parent->request->sampling.max_tokens;
    out->request = s->parent->hash;
    out->sample = (uint32_t)s->generation.sample;
    out->sampling = &engine->samplings[i];
    out->is_fork = admission->from >= 0;
    out->from = admission->from;
    out->n_prompt = s->parent->n_prompt;
    out->n_positions = s->parent->n_prompt - 1;
    engine->admission_pointers[i] = out;
}

// Rows released since the last step stand in engine->release already.
static void make_step(ts_engine *engine, const ts_decision *decision) {
    Ts__Job__Step *step = &engine->step;
    const size_t n_release = step->n_release;
    ts__job__step__init(step);
    step->kind = decision->decode ? TS__JOB__STEP__KIND__DECODE : TS__JOB__STEP__KIND__PREFILL;
    step->n_release = n_release;
    step->release = engine->release;
    step->n_admissions = (size_t)decision->n_admissions;
    step->admissions = engine->admission_pointers;
    for (size_t i = 0; i < step->n_admissions; i++)
        fill_admission(engine, i, &decision->admissions[i]);
    step->n_rows = step->n_positions = step->n_lengths = (size_t)decision->n_spans;
    step->rows = engine->rows;
    step->positions = engine->positions;
    step->lengths = engine->lengths;
    step->tokens = engine->tokens;
    step->sample_rows = engine->sample_rows;
    step->sample_spans = engine->sample_spans;
    for (size_t i = 0; i < step->n_rows; i++) {
        const ts_scheduled_span *span = &decision->spans[i];
        sequence *s = span->owner;
        engine->rows[i] = span->row;
        engine->positions[i] = span->position;
        engine->lengths[i] = span->n_tokens;
        memcpy(engine->tokens + step->n_tokens,
               decision->decode ? &s->generation.last_token : s->parent->prompt + span->position,
               (size_t)span->n_tokens * sizeof *engine->tokens);
        step->n_tokens += (size_t)span->n_tokens;
        if (!span->completes)
            continue;
        engine->sample_rows[step->n_sample_rows] = span->row;
        engine->sample_spans[step->n_sample_rows] = (int32_t)i;
        engine->sampled[step->n_sample_rows++] = s;
    }
    step->n_sample_spans = step->n_sample_rows;
}

static ts_status accept_tokens(ts_engine *engine) {
    ts_status status = TS_OK;
    Ts__Job__Step *step = &engine->step;
    step->n_release = 0; // those of the last step have been carried out
    for (size_t i = 0; i < step->n_sample_rows; i++) {
        sequence *s = engine->sampled[i];
        TS_TRY(ts_generation_accept(&s->generation, &engine->next[i]));
        if (!s->generation.ended)
            continue;
        ts_scheduler_finish(engine->scheduler, engine->sample_rows[i]);
        engine->release[step->n_release++] = engine->sample_rows[i];
        if (--s->parent->n_left == 0)
            TS_TRY(finish_request(engine, s->parent));
    }
done:
    return status;
}

static int64_t tokens_ahead(const ts_engine *engine) {
    int64_t n = ts_scheduler_prompt_tokens_ahead(engine->scheduler);
    for (const in_flight *job = engine->all; job; job = job->next)
        for (int32_t i = 0; i < job->request->sampling.n; i++)
            if (!job->samples[i].generation.ended)
                n += job->request->sampling.max_tokens - job->samples[i].generation.n_tokens;
    return n;
}

ts_status ts_engine_run(ts_engine *engine, const ts_engine_job *job) {
    ts_status status = TS_OK;
    ts_decision decision;
    engine->job = job;
    engine->input_ended = false;
    engine->step.n_release = 0;
    for (;;) {
        TS_TRY(take_requests(engine));
        if (!ts_scheduler_next(engine->scheduler, &decision)) {
            if (engine->input_ended)
                break;
            continue;
        }
        make_step(engine, &decision);
        TS_TRY(ts_replica_step(engine->replica, &engine->step, engine->next));
        int64_t n_prompt_tokens = 0;
        for (int32_t i = 0; i < decision.n_spans && !decision.decode; i++)
            n_prompt_tokens += decision.spans[i].n_tokens;
        const int64_t n_generated = (int64_t)engine->step.n_sample_rows;
        TS_TRY(accept_tokens(engine));
        TS_TRY(job->tick(job->context, n_prompt_tokens, n_generated, tokens_ahead(engine)));
    }
    make_step(engine, &(ts_decision){0});
    engine->step.kind = TS__JOB__STEP__KIND__STOP;
    TS_TRY(ts_replica_step(engine->replica, &engine->step, engine->next));
    engine->step.n_release = 0;
done:
    return status;
}
