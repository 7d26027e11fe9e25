#include "runtime/device_sampler.h"

#include "runtime/philox.h"

#include <assert.h>
#include <stdlib.h>

static_assert(sizeof(ts_sample_row) % _Alignof(ts_sample_change) == 0, "changes stand right behind rows");
static_assert((int)TS_SAMPLE_TOP_MAX == (int)TS_LOGPROBS_MAX, "log-probabilities of a row");

enum { CHANGES_PER_ROW = 64 }; // room at set-up: end of text, some bans, biases and penalties

struct ts_device_sampler {
    ts_device *device;
    int32_t max_rows;
    // A step's rows and, right behind them, its changes: one upload.
    void *inputs, *device_inputs;
    ts_sample_result *results; // [max_rows], and on the device
    ts_sample_result *device_results;
    float *device_raw;                                  // [max_device_changes]
    int64_t n_changes, max_changes, max_device_changes; // beside max_rows rows
    int64_t n_moves;                                    // of the device's memory
};

bool ts_device_sampler_is_possible(const ts_device *device, const ts_group *tp) {
    return device->ops->sample && ts_group_size(tp) == 1;
}

static size_t input_bytes(int32_t n_rows, int64_t n_changes) {
    return (size_t)n_rows * sizeof(ts_sample_row) + (size_t)n_changes * sizeof(ts_sample_change);
}

size_t ts_device_sampler_bytes(int32_t max_rows) {
    return input_bytes(max_rows, (int64_t)max_rows * CHANGES_PER_ROW) +
           (size_t)max_rows * (sizeof(ts_sample_result) + CHANGES_PER_ROW * sizeof(float));
}

// The changes behind the rows of a step of n_rows.
static ts_sample_change *changes_in(void *inputs, int32_t n_rows) {
    return (ts_sample_change *)((char *)inputs + input_bytes(n_rows, 0));
}

// Room on the device for the largest step: max_rows rows and n changes. It grows as the host's does, by doubling.
static ts_status reserve(ts_device_sampler *sampler, int64_t n) {
    ts_status status = TS_OK;
    void *inputs = NULL, *raw = NULL;
    if (n <= sampler->max_device_changes)
        goto done;
    TS_TRY(ts_device_alloc(sampler->device, input_bytes(sampler->max_rows, n), "sampling", &inputs));
    TS_TRY(ts_device_alloc(sampler->device, (size_t)n * sizeof(float), "sampling", &raw));
    ts_device_release(sampler->device, sampler->device_inputs);
    ts_device_release(sampler->device, sampler->device_raw);
    sampler->device_inputs = inputs;
    sampler->device_raw = raw;
    sampler->max_device_changes = n;
    sampler->n_moves++;
    inputs = NULL;
done:
    ts_device_release(sampler->device, inputs);
    return status;
}

ts_status ts_device_sampler_create(ts_device *device, int32_t max_rows, ts_device_sampler **out) {
    ts_status status = TS_OK;
    void *data;
    ts_device_sampler *sampler = calloc(1, sizeof *sampler);
    TS_CHECK(sampler, TS_ERR_MEMORY, "sampler: out of memory");
    sampler->device = device;
    sampler->max_rows = max_rows;
    sampler->max_changes = (int64_t)max_rows * CHANGES_PER_ROW;
    sampler->inputs = malloc(input_bytes(max_rows, sampler->max_changes));
    sampler->results = calloc((size_t)max_rows, sizeof *sampler->results);
    TS_CHECK(sampler->inputs && sampler->results, TS_ERR_MEMORY, "sampler: out of memory");
    TS_TRY(ts_device_alloc(device, (size_t)max_rows * sizeof *sampler->results, "sampling", &data));
    sampler->device_results = data;
    TS_TRY(reserve(sampler, sampler->max_changes));
    *out = sampler;
    sampler = NULL;
done:
    ts_device_sampler_free(sampler);
    return status;
}

void ts_device_sampler_free(ts_device_sampler *sampler) {
    if (!sampler)
        return;
    ts_device_release(sampler->device, sampler->device_results);
    ts_device_release(sampler->device, sampler->device_inputs);
    ts_device_release(sampler->device, sampler->device_raw);
    free(sampler->inputs);
    free(sampler->results);
    free(sampler);
}

static ts_status add_change(ts_device_sampler *sampler, int32_t n_rows, ts_sample_change change) {
    ts_status status = TS_OK;
    if (sampler->n_changes == sampler->max_changes) {
        const int64_t n = 2 * sampler->max_changes;
        void *grown = realloc(sampler->inputs, input_bytes(sampler->max_rows, n));
        TS_CHECK(grown, TS_ERR_MEMORY, "sampler: out of memory for %lld changes", (long long)n);
        sampler->inputs = grown;
        sampler->max_changes = n;
    }
    changes_in(sampler->inputs, n_rows)[sampler->n_changes++] = change;
done:
    return status;
}

// A ban of one token; of two in a row for the same token the second changes nothing.
static ts_status ban(ts_device_sampler *sampler, int32_t n_rows, int32_t token) {
    return add_change(sampler, n_rows, (ts_sample_change){.token = token, .kind = TS_SAMPLE_BAN});
}

// Row i_row of n_rows into the inputs, and its changes.
static ts_status describe_row(ts_device_sampler *sampler, const ts_sampler_row *row, int32_t i_row, int32_t n_rows) {
    ts_status status = TS_OK;
    const ts_sampling_params *params = &row->params;
    ts_sample_row out = {
        .temperature = params->temperature,
        .top_p = params->top_p,
        .min_p = params->min_p,
        .top_k = params->top_k,
        .n_logprobs = params->logprobs,
        .presence_penalty = params->presence_penalty,
        .frequency_penalty = params->frequency_penalty,
        .repetition_penalty = params->repetition_penalty,
        .draw = ts_philox_uniform(params->seed, row->request, row->sample, (uint32_t)row->n_generated),
        .first_change = (int32_t)sampler->n_changes,
    };
    for (int64_t i = 0; i < row->n_seen; i++)
        TS_TRY(add_change(
            sampler, n_rows,
            (ts_sample_change){.token = row->seen[i], .kind = TS_SAMPLE_PENALTY, .times = row->n_times[row->seen[i]]}));
    for (int32_t i = 0; i < params->n_biases; i++)
        TS_TRY(add_change(
            sampler, n_rows,
            (ts_sample_change){.token = params->bias_ids[i], .kind = TS_SAMPLE_BIAS, .bias = params->biases[i]}));
    if (row->n_generated < params->min_tokens) {
        for (int32_t i = 0; i < row->n_eos && !params->ignore_eos; i++)
            TS_TRY(ban(sampler, n_rows, row->eos[i]));
        for (int32_t i = 0; i < params->n_stop_ids; i++)
            TS_TRY(ban(sampler, n_rows, params->stop_ids[i]));
    }
    out.n_changes = (int32_t)(sampler->n_changes - out.first_change);
    TS_CHECK(sampler->n_changes <= INT32_MAX, TS_ERR_MEMORY, "sampler: penalties for more than 2^31 tokens at once");
    ((ts_sample_row *)sampler->inputs)[i_row] = out; // changes may have moved the buffer
done:
    return status;
}

ts_status ts_device_sampler_prepare(ts_device_sampler *sampler, const ts_sampler_row *const *rows, int32_t n,
                                    int32_t n_rows) {
    ts_status status = TS_OK;
    assert(n <= n_rows && n_rows <= sampler->max_rows);
    sampler->n_changes = 0;
    for (int32_t i = 0; i < n; i++)
        TS_TRY(describe_row(sampler, rows[i], i, n_rows));
    for (int32_t i = n; i < n_rows; i++)
        ((ts_sample_row *)sampler->inputs)[i] = (ts_sample_row){.top_p = 1, .n_logprobs = -1, .repetition_penalty = 1};
    TS_TRY(reserve(sampler, sampler->max_changes));
    TS_TRY(ts_device_upload(sampler->device, sampler->device_inputs, sampler->inputs,
                            input_bytes(n_rows, sampler->n_changes)));
done:
    return status;
}

ts_status ts_device_sampler_enqueue(ts_device_sampler *sampler, ts_tensor logits) {
    const ts_sample_change *changes = changes_in(sampler->device_inputs, (int32_t)logits.rows);
    return ts_op_sample(sampler->device, &(ts_sample_args){logits, sampler->device_inputs, changes, sampler->device_raw,
                                                           sampler->device_results});
}

ts_status ts_device_sampler_collect(ts_device_sampler *sampler, const ts_sampler_row *const *rows, int32_t n,
                                    ts_next_token *choices) {
    ts_status status = TS_OK;
    TS_TRY(ts_device_download(sampler->device, sampler->results, sampler->device_results,
                              (size_t)n * sizeof *sampler->results));
    for (int32_t i = 0; i < n; i++) {
        const ts_sample_result *result = &sampler->results[i];
        TS_CHECK(result->token >= 0, TS_ERR_INTERNAL,
                 "sampler: no token may follow: logits are NaN or infinite, or all banned");
        choices[i] = (ts_next_token){.token = result->token};
        if (rows[i]->params.logprobs < 0)
            continue;
        choices[i].logprob = (double)result->logit - result->log_total;
        choices[i].n_top = result->n_top;
        for (int32_t t = 0; t < result->n_top; t++)
            choices[i].top[t] =
                (ts_scored_token){result->top_tokens[t], (double)result->top_logits[t] - result->log_total};
    }
done:
    return status;
}

ts_status ts_device_sampler_choose(ts_device_sampler *sampler, ts_tensor logits, const ts_sampler_row *const *rows,
                                   int32_t n, ts_next_token *choices) {
    ts_status status = TS_OK;
    assert(logits.rows == n);
    TS_TRY(ts_device_sampler_prepare(sampler, rows, n, n));
    TS_TRY(ts_device_sampler_enqueue(sampler, logits));
    TS_TRY(ts_device_sampler_collect(sampler, rows, n, choices));
done:
    return status;
}

int64_t ts_device_sampler_moves(const ts_device_sampler *sampler) {
    return sampler->n_moves;
}
