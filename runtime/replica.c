#include "runtime/replica.h"

#include "runtime/batch.h"
#include "runtime/decode_graphs.h"
#include "runtime/device_sampler.h"

#include <stdlib.h>

struct ts_replica {
    ts_device *device;
    ts_group *tp;
    ts_model *model;
    ts_replica_options options;
    ts_tile_cache *cache;
    ts_batch_buffer *buffer;
    ts_decode_graphs *graphs;
    ts_sampler *sampler; // of the host; one of the two is NULL
    ts_device_sampler *device_sampler;
    ts_sampler_row *rows; // [max_sequences]
    int64_t *n_prompt;    // [max_sequences] tokens of each row's prompt
    // Of one step:
    const ts_sampler_row **sampled; // [max_sequences]
    int64_t *last_rows;             // [max_sequences] row of the batch whose logits are wanted
    ts_message message;
    float *logits; // host copy, where the device's memory is not the host's
    size_t n_logits;
};

ts_tile_cache_shape ts_replica_cache_shape(const ts_device *device, int tp_size, const ts_model *model,
                                           const ts_replica_options *options) {
    ts_tile_cache_shape shape = ts_tile_cache_shape_of(ts_model_config(model), tp_size);
    shape.open_dtype = device->compute_dtype;
    shape.slot_dtype = options->slot_dtype;
    return shape;
}

// Rows of the largest step.
static int64_t max_rows_of(const ts_replica_options *options) {
    return options->prefill_chunk > options->max_sequences ? options->prefill_chunk : options->max_sequences;
}

// What ops on this rank work in, in the largest steps.
static size_t scratch_bytes(const ts_device *device, int tp_size, const ts_model *model,
                            const ts_replica_options *options) {
    const ts_tile_cache_shape shape = ts_replica_cache_shape(device, tp_size, model, options);
    const ts_tile_cache_layer layer = ts_tile_cache_layer_of(&shape, options->n_pages);
    return ts_model_scratch_bytes(model, &layer, max_rows_of(options), options->max_sequences);
}

size_t ts_replica_bytes(const ts_device *device, int tp_size, const ts_model *model,
                        const ts_replica_options *options) {
    const ts_config *config = ts_model_config(model);
    const size_t n = (size_t)options->max_sequences, max_rows = (size_t)max_rows_of(options);
    const size_t row_of_logits = (size_t)(config->vocab_size / tp_size + 1) * sizeof(float);
    const size_t row_selected = (size_t)config->hidden_size * ts_dtype_bytes(device->compute_dtype);
    return ts_model_activation_bytes(config, device->compute_dtype, tp_size, (int64_t)max_rows) +
           scratch_bytes(device, tp_size, model, options) + max_rows * (sizeof(ts_span) + sizeof(int32_t)) +
           n * (row_of_logits + row_selected) +
           (device->ops->sample && tp_size == 1 ? ts_device_sampler_bytes(options->max_sequences) : 0);
}

ts_status ts_replica_create(ts_device *device, ts_group *tp, ts_model *model, const ts_replica_options *options,
                            ts_replica **out) {
    ts_status status = TS_OK;
    const int tp_size = ts_group_size(tp);
    const ts_tile_cache_shape shape = ts_replica_cache_shape(device, tp_size, model, options);
    const size_t n = (size_t)options->max_sequences;
    const int64_t max_rows = max_rows_of(options);
    ts_replica *replica = calloc(1, sizeof *replica);
    TS_CHECK(replica, TS_ERR_MEMORY, "replica: out of memory");
    replica->device = device;
    replica->tp = tp;
    replica->model = model;
    replica->options = *options;
    replica->rows = calloc(n, sizeof *replica->rows);
    replica->n_prompt = calloc(n, sizeof *replica->n_prompt);
    replica->sampled = calloc(n, sizeof *replica->sampled);
    replica->last_rows = calloc(n, sizeof *replica->last_rows);
    TS_CHECK(replica->rows && replica->n_prompt && replica->sampled && replica->last_rows, TS_ERR_MEMORY,
             "replica: out of memory");
    TS_TRY(ts_tile_cache_create(device, &shape, options->max_sequences, options->n_pages, &replica->cache));
    TS_TRY(ts_model_reserve(model, max_rows));
    TS_TRY(ts_model_reserve_logits(model, options->max_sequences));
    TS_TRY(ts_device_reserve_scratch(device, scratch_bytes(device, tp_size, model, options)));
    TS_TRY(ts_batch_buffer_create(device, max_rows, &replica->buffer));
    if (ts_device_sampler_is_possible(device, tp))
        TS_TRY(ts_device_sampler_create(device, options->max_sequences, &replica->device_sampler));
    else
        TS_TRY(ts_sampler_create(tp, &replica->sampler));
    TS_TRY(ts_decode_graphs_create(device, tp, model, replica->cache, replica->device_sampler, options->max_sequences,
                                   &replica->graphs));
    TS_TRY(ts_decode_graphs_warm_up(replica->graphs, replica->buffer));
    *out = replica;
    replica = NULL;
done:
    ts_replica_free(replica);
    return status;
}

void ts_replica_free(ts_replica *replica) {
    if (!replica)
        return;
    for (int32_t i = 0; replica->rows && i < replica->options.max_sequences; i++)
        ts_sampler_row_end(&replica->rows[i]);
    ts_decode_graphs_free(replica->graphs);
    ts_tile_cache_free(replica->cache);
    ts_batch_buffer_free(replica->buffer);
    ts_sampler_free(replica->sampler);
    ts_device_sampler_free(replica->device_sampler);
    ts_message_free(&replica->message);
    free(replica->rows);
    free(replica->n_prompt);
    free(replica->sampled);
    free(replica->last_rows);
    free(replica->logits);
    free(replica);
}

static ts_sampling_params params_of(const Ts__Job__Sampling *sampling) {
    return (ts_sampling_params){
        .max_tokens = sampling->max_tokens,
        .min_tokens = sampling->min_tokens,
        .top_k = sampling->top_k,
        .temperature = sampling->temperature,
        .top_p = sampling->top_p,
        .min_p = sampling->min_p,
        .presence_penalty = sampling->presence_penalty,
        .frequency_penalty = sampling->frequency_penalty,
        .repetition_penalty = sampling->repetition_penalty,
        .n = 1,
        .seed = sampling->seed,
        .logprobs = sampling->logprobs,
        .ignore_eos = sampling->ignore_eos,
        .n_stop_ids = (int32_t)sampling->n_stop_ids,
        .n_biases = (int32_t)sampling->n_bias_ids,
        .stop_ids = sampling->stop_ids,
        .bias_ids = sampling->bias_ids,
        .biases = sampling->biases,
    };
}

static ts_status admit(ts_replica *replica, const Ts__Job__Admission *admission) {
    ts_status status = TS_OK;
    const ts_config *config = ts_model_config(replica->model);
    const ts_weights *weights = ts_model_weights(replica->model);
    const ts_sampling_params params = params_of(admission->sampling);
    replica->n_prompt[admission->row] = admission->n_prompt;
    TS_TRY(ts_tile_cache_open(replica->cache, admission->row, admission->n_tokens));
    TS_TRY(ts_sampler_row_begin(&replica->rows[admission->row], &params, admission->request, admission->sample,
                                weights->first_token, weights->head.rows, config->eos_token_ids, config->n_eos));
done:
    return status;
}

// The state that row `from` has now that the shared part of the prompt has been read.
static ts_status fork_row(ts_replica *replica, const Ts__Job__Admission *admission) {
    ts_status status = TS_OK;
    TS_TRY(ts_tile_cache_fork(replica->cache, admission->from, admission->row, admission->n_positions));
    ts_sampler_row_copy_prompt(&replica->rows[admission->row], &replica->rows[admission->from]);
done:
    return status;
}

// Every row of the step gets a next token: what a decode step is, so that sampling can be part of a graph.
static bool samples_all_rows(const Ts__Job__Step *step) {
    return step->kind == TS__JOB__STEP__KIND__DECODE && step->n_sample_rows == step->n_rows;
}

// Whose tokens are sampled, and the rows of the batch with the logits after the last token of each span that is. Spans
// come in rising order.
static void list_sampled(ts_replica *replica, const Ts__Job__Step *step) {
    int64_t end = 0;
    size_t span = 0;
    for (size_t i = 0; i < step->n_sample_rows; i++) {
        for (; span <= (size_t)step->sample_spans[i]; span++)
            end += step->lengths[span];
        replica->last_rows[i] = end - 1;
        replica->sampled[i] = &replica->rows[step->sample_rows[i]];
    }
}

// *logits are set where all rows are sampled, and what is sampled is then on its way on the device.
static ts_status forward(ts_replica *replica, const Ts__Job__Step *step, ts_tensor *logits) {
    ts_status status = TS_OK;
    const bool decode = step->kind == TS__JOB__STEP__KIND__DECODE;
    const ts_batch *batch;
    const int32_t *tokens = step->tokens;
    ts_batch_buffer_clear(replica->buffer, decode);
    for (size_t i = 0; i < step->n_rows; i++) {
        ts_sampler_row *row = &replica->rows[step->rows[i]];
        TS_TRY(ts_batch_buffer_add(replica->buffer, step->rows[i], step->positions[i], tokens, step->lengths[i]));
        if (step->positions[i] >= replica->n_prompt[step->rows[i]])
            ts_sampler_row_token(row, tokens[0]);
        else
            ts_sampler_row_prompt(row, tokens, step->lengths[i]);
        tokens += step->lengths[i];
    }
    if (samples_all_rows(step)) {
        TS_TRY(ts_decode_graphs_run(replica->graphs, replica->buffer, replica->sampled, logits));
        goto done;
    }
    TS_TRY(ts_batch_buffer_upload(replica->buffer, &batch));
    TS_TRY(ts_model_forward(replica->model, replica->cache, batch));
done:
    return status;
}

static ts_status sample(ts_replica *replica, const Ts__Job__Step *step, ts_tensor logits, ts_next_token *next) {
    ts_status status = TS_OK;
    const int64_t n_logit_rows = (int64_t)step->n_sample_rows;
    if (step->n_sample_rows == 0)
        goto done;
    if (samples_all_rows(step) && replica->device_sampler) {
        TS_TRY(ts_device_sampler_collect(replica->device_sampler, replica->sampled, (int32_t)n_logit_rows, next));
        goto done;
    }
    if (!samples_all_rows(step))
        TS_TRY(ts_model_logits(replica->model, replica->last_rows, n_logit_rows, true, &logits));
    if (replica->device_sampler) {
        TS_TRY(ts_device_sampler_choose(replica->device_sampler, logits, replica->sampled, (int32_t)step->n_sample_rows,
                                        next));
        goto done;
    }
    const size_t n = (size_t)(logits.rows * logits.cols);
    if (n > replica->n_logits) {
        float *grown = realloc(replica->logits, n * sizeof *grown);
        TS_CHECK(grown, TS_ERR_MEMORY, "replica: out of memory for %lld rows of logits", (long long)n_logit_rows);
        replica->logits = grown;
        replica->n_logits = n;
    }
    TS_TRY(ts_device_download(replica->device, replica->logits, logits.data, n * sizeof(float)));
    logits.data = replica->logits;
    TS_TRY(ts_sampler_choose(replica->sampler, logits, replica->sampled, (int32_t)step->n_sample_rows, next));
done:
    return status;
}

static ts_status carry_out(ts_replica *replica, const Ts__Job__Step *step, ts_next_token *next) {
    ts_status status = TS_OK;
    ts_tensor logits = {0};
    for (size_t i = 0; i < step->n_release; i++) {
        ts_tile_cache_close(replica->cache, step->release[i]);
        ts_sampler_row_end(&replica->rows[step->release[i]]);
    }
    for (size_t i = 0; i < step->n_admissions; i++)
        TS_TRY(admit(replica, step->admissions[i]));
    list_sampled(replica, step);
    if (step->n_rows > 0)
        TS_TRY(forward(replica, step, &logits));
    for (size_t i = 0; i < step->n_admissions; i++)
        if (step->admissions[i]->is_fork)
            TS_TRY(fork_row(replica, step->admissions[i]));
    TS_TRY(sample(replica, step, logits, next));
done:
    return status;
}

ts_status ts_replica_step(ts_replica *replica, Ts__Job__Step *step, ts_next_token *next) {
    ts_status status = TS_OK;
    if (ts_group_size(replica->tp) > 1) {
        replica->message.n_bytes = 0;
        TS_TRY(ts_message_reserve(&replica->message, ts__job__step__get_packed_size(step) + 1));
        replica->message.n_bytes = ts__job__step__pack(step, replica->message.data);
        TS_TRY(ts_group_broadcast_message(replica->tp, 0, &replica->message));
    }
    TS_TRY(carry_out(replica, step, next));
done:
    return status;
}

ts_status ts_replica_follow(ts_replica *replica) {
    ts_status status = TS_OK;
    Ts__Job__Step *step = NULL;
    for (bool stop = false; !stop;) {
        TS_TRY(ts_group_broadcast_message(replica->tp, 0, &replica->message));
        step = ts__job__step__unpack(NULL, replica->message.n_bytes, replica->message.data);
        TS_CHECK(step, TS_ERR_COMM, "replica: a step of %zu bytes from the leader cannot be read",
                 replica->message.n_bytes);
        TS_TRY(carry_out(replica, step, NULL));
        stop = step->kind == TS__JOB__STEP__KIND__STOP;
        ts__job__step__free_unpacked(step, NULL);
        step = NULL;
    }
done:
    if (step)
        ts__job__step__free_unpacked(step, NULL);
    return status;
}
