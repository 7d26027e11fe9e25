#include "runtime/device_sampler.h"

#include "runtime/philox.h"

#include <assert.h>
#include <stdlib.h>

static_assert((int)TS_SAMPLE_TOP_MAX == (int)TS_LOGPROBS_MAX, "log-probabilities of a row");

enum { CHANGES_PER_ROW = 64 }; // room at set-up: end of text, some bans, biases and penalties

struct ts_device_sampler {
    ts_device *device;
    int32_t max_rows;
    ts_sample_row *rows;       // [max_rows], and on the device
    ts_sample_result *results; // [max_rows], and on the device
    ts_sample_row *device_rows;
    ts_sample_result *device_results;
    ts_sample_change *changes; // [max_changes], and on the device
    ts_sample_change *device_changes;
    float *device_raw; // [max_changes]
    int64_t n_changes, max_changes, max_device_changes;
    int64_t n_moves; // of device_changes and device_raw
};

bool ts_device_sampler_is_possible(const ts_device *device, const ts_group *tp) {
    return device->ops->sample && ts_group_size(tp) == 1;
}

size_t ts_device_sampler_bytes(int32_t max_rows) {
    return (size_t)max_rows * (sizeof(ts_sample_row) + sizeof(ts_sample_result) +
                               CHANGES_PER_ROW * (sizeof(ts_sample_change) + sizeof(float)));
}

// Room for the changes of a step on the device.
static ts_status reserve_changes(ts_device_sampler *sampler, int64_t n) {
    ts_status status = TS_OK;
    void *changes = NULL, *raw = NULL;
    if (n <= sampler->max_device_changes)
        goto done;
    TS_TRY(ts_device_alloc(sampler->device, (size_t)n * sizeof(ts_sample_change), "sampling", &changes));
    TS_TRY(ts_device_alloc(sampler->device, (size_t)n * sizeof(float), "sampling", &raw));
    ts_device_release(sampler->device, sampler->device_changes);
    ts_device_release(sampler->device, sampler->device_raw);
    sampler->device_changes = changes;
    sampler->device_raw = raw;
    sampler->max_device_changes = n;
    sampler->n_moves++;
    changes = NULL;
done:
    ts_device_release(sampler->device, changes);
    return status;
}

ts_status ts_device_sampler_create(ts_device *device, int32_t max_rows, ts_device_sampler **out) {
    ts_status status = TS_OK;
    void *data;
    ts_device_sampler *sampler = calloc(1, sizeof *sampler);
    TS_CHECK(sampler, TS_ERR_MEMORY, "sampler: out of memory");
    sampler->device = device;
    sampler->max_rows = max_rows;
    sampler->rows = calloc((size_t)max_rows, sizeof *sampler->rows);
    sampler->results = calloc((size_t)max_rows, sizeof *sampler->results);
    TS_CHECK(sampler->rows && sampler->results, TS_ERR_MEMORY, "sampler: out of memory");
    TS_TRY(ts_device_alloc(device, (size_t)max_rows * sizeof *sampler->rows, "sampling", &data));
    sampler->device_rows = data;
    TS_TRY(ts_device_alloc(device, (size_t)max_rows * sizeof *sampler->results, "sampling", &data));
    sampler->device_results = data;
    TS_TRY(reserve_changes(sampler, (int64_t)max_rows * CHANGES_PER_ROW));
    *out = sampler;
    sampler = NULL;
done:
    ts_device_sampler_free(sampler);
    return status;
}

void ts_device_sampler_free(ts_device_sampler *sampler) {
    if (!sampler)
        return;
    ts_device_release(sampler->device, sampler->device_rows);
    ts_device_release(sampler->device, sampler->device_results);
    ts_device_release(sampler->device, sampler->device_changes);
    ts_device_release(sampler->device, sampler->device_raw);
    free(sampler->rows);
    free(sampler->results);
    free(sampler->changes);
    free(sampler);
}

static ts_status add_change(ts_device_sampler *sampler, ts_sample_change change) {
    ts_status status = TS_OK;
    if (sampler->n_changes == sampler->max_changes) {
        const int64_t n = sampler->max_changes ? 2 * sampler->max_changes : 1024;
        ts_sample_change *grown = realloc(sampler->changes, (size_t)n * sizeof *grown);
        TS_CHECK(grown, TS_ERR_MEMORY, "sampler: out of memory for %lld changes", (long long)n);
        sampler->changes = grown;
        sampler->max_changes = n;
    }
    sampler->changes[sampler->n_changes++] = change;
done:
    return status;
}

// A ban of one token; of two in a row for the same token the second changes nothing.
static ts_status ban(ts_device_sampler *sampler, int32_t token) {
    return add_change(sampler, (ts_sample_change){.token = token, .kind = TS_SAMPLE_BAN});
}

static ts_status describe_row(ts_device_sampler *sampler, const ts_sampler_row *row, ts_sample_row *out) {
    ts_status status = TS_OK;
    const ts_sampling_params *params = &row->params;
    *out = (ts_sample_row){
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
            sampler,
            (ts_sample_change){.token = row->seen[i], .kind = TS_SAMPLE_PENALTY, .times = row->n_times[row->seen[i]]}));
    for (int32_t i = 0; i < params->n_biases; i++)
        TS_TRY(add_change(
            sampler,
            (ts_sample_change){.token = params->bias_ids[i], .kind = TS_SAMPLE_BIAS, .bias = params->biases[i]}));
    if (row->n_generated < params->min_tokens) {
        for (int32_t i = 0; i < row->n_eos && !params->ignore_eos; i++)
            TS_TRY(ban(sampler, row->eos[i]));
        for (int32_t i = 0; i < params->n_stop_ids; i++)
            TS_TRY(ban(sampler, params->stop_ids[i]));
    }
    out->n_changes = (int32_t)(sampler->n_changes - out->first_change);
    TS_CHECK(sampler->n_changes <= INT32_MAX, TS_ERR_MEMORY, "sampler: penalties for more than 2^31 tokens at once");
done:
    return status;
}

ts_status ts_device_sampler_prepare(ts_device_sampler *sampler, const ts_sampler_row *const *rows, int32_t n) {
    ts_status status = TS_OK;
    assert(n <= sampler->max_rows);
    sampler->n_changes = 0;
    for (int32_t i = 0; i < n; i++)
        TS_TRY(describe_row(sampler, rows[i], &sampler->rows[i]));
    TS_TRY(reserve_changes(sampler, sampler->n_changes));
    TS_TRY(ts_device_upload(sampler->device, sampler->device_rows, sampler->rows, (size_t)n * sizeof *sampler->rows));
    TS_TRY(ts_device_upload(sampler->device, sampler->device_changes, sampler->changes,
                            (size_t)sampler->n_changes * sizeof *sampler->changes));
done:
    return status;
}

ts_status ts_device_sampler_enqueue(ts_device_sampler *sampler, ts_tensor logits) {
    return ts_op_sample(sampler->device, &(ts_sample_args){logits, sampler->device_rows, sampler->device_changes,
                                                           sampler->device_raw, sampler->device_results});
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
    TS_TRY(ts_device_sampler_prepare(sampler, rows, n));
    TS_TRY(ts_device_sampler_enqueue(sampler, logits));
    TS_TRY(ts_device_sampler_collect(sampler, rows, n, choices));
done:
    return status;
}

int64_t ts_device_sampler_moves(const ts_device_sampler *sampler) {
    return sampler->n_moves;
}
