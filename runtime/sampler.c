#include "runtime/sampler.h"

#include "runtime/philox.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

// A token of this shard that may still be chosen, or whose log-probability is to be reported.
typedef struct candidate {
    double score; // logit after penalties
    double raw;   // the model's logit
    int32_t token;
} candidate;

// What one rank contributes to one row: `n` candidates, then `n_top` of its largest raw logits.
typedef struct row_header {
    int32_t n, n_top;
} row_header;

// Mass of a shard: largest x and the sum of exp(x - largest), of raw logits and of scores over temperature. Differences
// are taken before they are divided by the temperature: they are exact where it is tiny.
typedef struct shard_mass {
    double raw_largest, raw_sum, largest, sum;
} shard_mass;

struct ts_sampler {
    ts_group *tp;
    float *adjusted;    // [V] logits of one row after penalties
    candidate *sorted;  // [V]
    int64_t n_tokens;   // room in both
    shard_mass *masses; // [ranks, rows]
    size_t n_masses;
    ts_message mine, all;
    size_t *n_bytes_of, *cursor; // [ranks]
    candidate *merged;
    size_t n_merged;
};

ts_status ts_sampler_row_begin(ts_sampler_row *row, const ts_sampling_params *params, uint64_t request, uint32_t sample,
                               int64_t first_token, int64_t n_tokens, const int32_t *eos, int32_t n_eos) {
    ts_status status = TS_OK;
    *row = (ts_sampler_row){
        .params = *params,
        .request = request,
        .sample = sample,
        .first_token = first_token,
        .n_tokens = n_tokens,
        .eos = eos,
        .n_eos = n_eos,
    };
    row->params.stop_ids = NULL;
    row->params.bias_ids = NULL;
    row->params.biases = NULL;
    const size_t n_stops = (size_t)params->n_stop_ids, n_biases = (size_t)params->n_biases;
    const bool penalised =
        params->presence_penalty != 0 || params->frequency_penalty != 0 || params->repetition_penalty != 1;
    row->params.stop_ids = malloc(n_stops * sizeof(int32_t) + 1);
    row->params.bias_ids = malloc(n_biases * sizeof(int32_t) + 1);
    row->params.biases = malloc(n_biases * sizeof(float) + 1);
    if (penalised)
        row->n_times = calloc((size_t)n_tokens + 1, sizeof *row->n_times);
    if (penalised)
        row->seen = malloc(((size_t)n_tokens + 1) * sizeof *row->seen);
    if (params->repetition_penalty != 1)
        row->in_prompt = calloc((size_t)n_tokens + 1, 1);
    TS_CHECK(row->params.stop_ids && row->params.bias_ids && row->params.biases &&
                 ((row->n_times && row->seen) || !penalised) && (row->in_prompt || params->repetition_penalty == 1),
             TS_ERR_MEMORY, "sampler: out of memory");
    if (n_stops)
        memcpy(row->params.stop_ids, params->stop_ids, n_stops * sizeof(int32_t));
    if (n_biases) {
        memcpy(row->params.bias_ids, params->bias_ids, n_biases * sizeof(int32_t));
        memcpy(row->params.biases, params->biases, n_biases * sizeof(float));
    }
done:
    if (status != TS_OK)
        ts_sampler_row_end(row);
    return status;
}

void ts_sampler_row_end(ts_sampler_row *row) {
    free(row->params.stop_ids);
    free(row->params.bias_ids);
    free(row->params.biases);
    free(row->n_times);
    free(row->seen);
    free(row->in_prompt);
    *row = (ts_sampler_row){0};
}

static bool in_shard(const ts_sampler_row *row, int32_t token) {
    return token >= row->first_token && token < row->first_token + row->n_tokens;
}

static void see(ts_sampler_row *row, int64_t i) {
    if (row->n_times[i] == 0 && !(row->in_prompt && row->in_prompt[i]))
        row->seen[row->n_seen++] = (int32_t)i;
}

void ts_sampler_row_prompt(ts_sampler_row *row, const int32_t *tokens, int64_t n) {
    for (int64_t i = 0; row->in_prompt && i < n; i++)
        if (in_shard(row, tokens[i])) {
            see(row, tokens[i] - row->first_token);
            row->in_prompt[tokens[i] - row->first_token] = 1;
        }
}

void ts_sampler_row_token(ts_sampler_row *row, int32_t token) {
    row->n_generated++;
    if (row->n_times && in_shard(row, token)) {
        see(row, token - row->first_token);
        row->n_times[token - row->first_token]++;
    }
}

void ts_sampler_row_copy_prompt(ts_sampler_row *row, const ts_sampler_row *from) {
    for (int64_t i = 0; row->in_prompt && from->in_prompt && i < row->n_tokens; i++)
        if (from->in_prompt[i]) {
            see(row, i);
            row->in_prompt[i] = 1;
        }
}

ts_status ts_sampler_create(ts_group *tp, ts_sampler **out) {
    ts_status status = TS_OK;
    ts_sampler *sampler = calloc(1, sizeof *sampler);
    TS_CHECK(sampler, TS_ERR_MEMORY, "sampler: out of memory");
    sampler->tp = tp;
    sampler->n_bytes_of = calloc((size_t)ts_group_size(tp), sizeof *sampler->n_bytes_of);
    sampler->cursor = calloc((size_t)ts_group_size(tp), sizeof *sampler->cursor);
    TS_CHECK(sampler->n_bytes_of && sampler->cursor, TS_ERR_MEMORY, "sampler: out of memory");
    *out = sampler;
    sampler = NULL;
done:
    ts_sampler_free(sampler);
    return status;
}

void ts_sampler_free(ts_sampler *sampler) {
    if (!sampler)
        return;
    free(sampler->adjusted);
    free(sampler->sorted);
    free(sampler->masses);
    ts_message_free(&sampler->mine);
    ts_message_free(&sampler->all);
    free(sampler->n_bytes_of);
    free(sampler->cursor);
    free(sampler->merged);
    free(sampler);
}

// Grows *array to n elements of `bytes` each.
static ts_status grow(void *array_pointer, size_t n, size_t bytes) {
    void *array;
    memcpy(&array, array_pointer, sizeof array);
    void *grown = realloc(array, n * bytes);
    if (!grown)
        return TS_FAIL(TS_ERR_MEMORY, "sampler: out of memory for %zu candidates", n);
    memcpy(array_pointer, &grown, sizeof grown);
    return TS_OK;
}

// Repetition penalty divides a positive logit and multiplies a negative one. A tiny penalty may make a logit as large
// as a number can be, but not infinite.
static float repeated(float logit, float penalty) {
    return logit > 0 && logit <= FLT_MAX ? fminf(logit / penalty, FLT_MAX) : logit * penalty;
}

// Everything before temperature.
static void adjust(const ts_sampler_row *row, const float *logits, float *out) {
    const ts_sampling_params *params = &row->params;
    memcpy(out, logits, (size_t)row->n_tokens * sizeof *out);
    for (int64_t i = 0; row->n_times && i < row->n_tokens; i++) {
        const int32_t times = row->n_times[i];
        if (row->in_prompt && (times > 0 || row->in_prompt[i]))
            out[i] = repeated(out[i], params->repetition_penalty);
        if (times > 0)
            out[i] -= params->presence_penalty + params->frequency_penalty * (float)times;
    }
    for (int32_t i = 0; i < params->n_biases; i++)
        if (in_shard(row, params->bias_ids[i]))
            out[params->bias_ids[i] - row->first_token] += params->biases[i];
    if (row->n_generated < params->min_tokens) {
        for (int32_t i = 0; i < row->n_eos && !params->ignore_eos; i++)
            if (in_shard(row, row->eos[i]))
                out[row->eos[i] - row->first_token] = -INFINITY;
        for (int32_t i = 0; i < params->n_stop_ids; i++)
            if (in_shard(row, params->stop_ids[i]))
                out[params->stop_ids[i] - row->first_token] = -INFINITY;
    }
}

static double score_scale(const ts_sampling_params *params) {
    return params->temperature > 0 ? 1.0 / (double)params->temperature : 1.0;
}

// A NaN or +infinity in x makes *sum NaN; *sum is 0 where all are -infinity.
static void mass_of(const float *x, int64_t n, double scale, double *largest, double *sum) {
    float top = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        top = x[i] > top ? x[i] : top;
    double total = 0;
    for (int64_t i = 0; i < n; i++)
        total += x[i] == -INFINITY ? 0 : exp(scale * ((double)x[i] - (double)top));
    *largest = (double)top;
    *sum = total;
}

// What the shards weigh together: the sum of exp(scale * (x - *largest)). masses[r * n_rows] is rank r's.
static double total_mass(const shard_mass *masses, int32_t n_rows, int n_ranks, double scale, double *largest) {
    double total = 0;
    *largest = -INFINITY;
    for (int r = 0; r < n_ranks; r++)
        *largest = fmax(*largest, masses[r * n_rows].largest);
    for (int r = 0; r < n_ranks; r++)
        if (masses[r * n_rows].sum != 0)
            total += masses[r * n_rows].sum * exp(scale * (masses[r * n_rows].largest - *largest));
    return total;
}

// Largest value first; the smaller token on a tie, so that the order is the same however the vocabulary is sharded.
static int by_score(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    return x->score != y->score ? (x->score < y->score ? 1 : -1) : (x->token > y->token) - (x->token < y->token);
}

static int by_raw(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    return x->raw != y->raw ? (x->raw < y->raw ? 1 : -1) : (x->token > y->token) - (x->token < y->token);
}

// The n largest of `count` candidates in `order`, sorted, at the front.
static void keep_largest(candidate *c, int64_t count, int64_t n, int (*order)(const void *, const void *)) {
    int64_t low = 0, high = count - 1;
    while (n < count && low < high) { // quickselect
        const candidate pivot = c[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (order(&c[i], &pivot) < 0)
                i++;
            while (order(&c[j], &pivot) > 0)
                j--;
            if (i <= j) {
                const candidate swap = c[i];
                c[i++] = c[j];
                c[j--] = swap;
            }
        }
        if (n <= j)
            high = j;
        else if (n >= i)
            low = i;
        else
            break;
    }
    qsort(c, (size_t)(n < count ? n : count), sizeof *c, order);
}

static bool draws_from_all(const ts_sampling_params *params) {
    return params->top_k == 0 && params->top_p >= 1 && params->min_p <= 0;
}

static double draw(const ts_sampler_row *row) {
    return ts_philox_uniform(row->params.seed, row->request, row->sample, (uint32_t)row->n_generated);
}

// Without a filter the draw goes over the whole vocabulary in token order. Every rank knows what the others weigh, so
// that they agree on the one whose share the draw falls into; it takes the token, and the others none.
static int64_t draw_in_shard(const ts_sampler_row *row, const float *adjusted, const shard_mass *masses, int32_t n_rows,
                             int n_ranks, int rank) {
    const double scale = score_scale(&row->params);
    double largest, before = 0, end = 0;
    const double target = draw(row) * total_mass(masses, n_rows, n_ranks, scale, &largest);
    int owner = -1;
    for (int r = 0; r < n_ranks; r++) {
        const double mass = masses[r * n_rows].sum * exp(scale * (masses[r * n_rows].largest - largest));
        if (mass <= 0 || (owner >= 0 && target < end))
            continue;
        owner = r; // the last rank with any mass takes what rounding leaves over
        before = end;
        end += mass;
    }
    if (owner != rank)
        return -1;
    int64_t chosen = -1;
    double sum = before;
    for (int64_t i = 0; i < row->n_tokens; i++) {
        const double mass = exp(scale * ((double)adjusted[i] - largest));
        if (mass <= 0)
            continue;
        sum += mass;
        chosen = i;
        if (sum > target)
            break;
    }
    return chosen;
}

// The candidates of this shard into sorted[]: every token that the filters could leave. `mass` is the whole row's.
static int64_t shard_candidates(ts_sampler *sampler, const ts_sampler_row *row, const float *raw,
                                const shard_mass *masses, int32_t n_rows) {
    const ts_sampling_params *params = &row->params;
    const int n_ranks = ts_group_size(sampler->tp);
    const double scale = score_scale(params);
    const float *adjusted = sampler->adjusted;
    candidate *out = sampler->sorted;
    int64_t n = 0;
    if (params->temperature > 0 && draws_from_all(params)) {
        const int64_t i = draw_in_shard(row, adjusted, masses, n_rows, n_ranks, ts_group_rank(sampler->tp));
        if (i >= 0)
            out[n++] = (candidate){(double)adjusted[i], (double)raw[i], (int32_t)(row->first_token + i)};
        return n;
    }
    // Tokens so far below the largest cannot be chosen: min_p says so itself, and all tokens of less than (1 - top_p) /
    // V of the mass together weigh less than what top_p leaves out. With top_k, top_p needs the mass of all that it
    // left.
    double largest, least = -INFINITY;
    const double total = total_mass(masses, n_rows, n_ranks, scale, &largest);
    if (params->top_k == 0 && params->min_p > 0)
        least = log((double)params->min_p) - 1e-9;
    if (params->top_k == 0 && params->top_p < 1) {
        const double vocabulary = (double)row->n_tokens * n_ranks + n_ranks;
        least = fmax(least, log((1.0 - (double)params->top_p) * total / vocabulary));
    }
    if (params->temperature <= 0)
        least = 0;
    least = fmin(least, 0);
    for (int64_t i = 0; i < row->n_tokens; i++)
        if (adjusted[i] > -INFINITY && scale * ((double)adjusted[i] - largest) >= least)
            out[n++] = (candidate){(double)adjusted[i], (double)raw[i], (int32_t)(row->first_token + i)};
    const int64_t most = params->temperature <= 0 ? 1 : params->top_k > 0 ? params->top_k : n;
    keep_largest(out, n, most, by_score);
    return n < most ? n : most;
}

// The tokens of a row of logits that are largest in the model's own view.
static int64_t shard_top(ts_sampler *sampler, const ts_sampler_row *row, const float *raw) {
    const int64_t most = row->params.logprobs < row->n_tokens ? row->params.logprobs : row->n_tokens;
    for (int64_t i = 0; i < row->n_tokens; i++)
        sampler->sorted[i] = (candidate){0, (double)raw[i], (int32_t)(row->first_token + i)};
    keep_largest(sampler->sorted, row->n_tokens, most, by_raw);
    return most;
}

// Root: applies the filters to all candidates of a row and draws.
static candidate pick(const ts_sampler_row *row, candidate *c, int64_t n, const shard_mass *masses, int32_t n_rows,
                      int n_ranks) {
    const ts_sampling_params *params = &row->params;
    qsort(c, (size_t)n, sizeof *c, by_score);
    if (params->temperature <= 0 || n <= 1 || draws_from_all(params))
        return c[0];
    // top_p counts over what top_k left, or over the whole vocabulary.
    const double scale = score_scale(params);
    double largest, total = total_mass(masses, n_rows, n_ranks, scale, &largest);
    if (params->top_k > 0) {
        n = n < params->top_k ? n : params->top_k;
        total = 0;
        for (int64_t i = 0; i < n; i++)
            total += exp(scale * (c[i].score - largest));
    }
    double sum = 0;
    int64_t kept = 0;
    for (; kept < n; kept++) {
        const double mass = exp(scale * (c[kept].score - largest));
        if (kept > 0 && (sum >= (double)params->top_p * total || mass < (double)params->min_p))
            break;
        sum += mass;
    }
    double target = draw(row) * sum;
    for (int64_t i = 0; i < kept; i++) {
        target -= exp(scale * (c[i].score - largest));
        if (target < 0)
            return c[i];
    }
    return c[kept - 1];
}

// Step 1: what each shard weighs, shared by all ranks.
static ts_status share_masses(ts_sampler *sampler, ts_tensor logits, const ts_sampler_row *const *rows, int32_t n) {
    ts_status status = TS_OK;
    const size_t n_ranks = (size_t)ts_group_size(sampler->tp);
    if ((size_t)n * n_ranks > sampler->n_masses) {
        TS_TRY(grow(&sampler->masses, (size_t)n * n_ranks, sizeof *sampler->masses));
        sampler->n_masses = (size_t)n * n_ranks;
    }
    if (logits.cols > sampler->n_tokens) {
        TS_TRY(grow(&sampler->adjusted, (size_t)logits.cols, sizeof *sampler->adjusted));
        TS_TRY(grow(&sampler->sorted, (size_t)logits.cols, sizeof *sampler->sorted));
        sampler->n_tokens = logits.cols;
    }
    shard_mass *mine = sampler->masses + (size_t)ts_group_rank(sampler->tp) * (size_t)n;
    for (int32_t i = 0; i < n; i++) {
        const float *raw = (const float *)logits.data + i * logits.stride;
        mine[i] = (shard_mass){0};
        adjust(rows[i], raw, sampler->adjusted);
        mass_of(sampler->adjusted, logits.cols, score_scale(&rows[i]->params), &mine[i].largest, &mine[i].sum);
        if (rows[i]->params.logprobs >= 0)
            mass_of(raw, logits.cols, 1.0, &mine[i].raw_largest, &mine[i].raw_sum);
    }
    TS_TRY(ts_group_all_gather(sampler->tp, mine, (size_t)n * sizeof *mine, sampler->masses));
    for (int32_t i = 0; i < n; i++) { // every rank sees the same and fails alike
        double total = 0;
        for (size_t r = 0; r < n_ranks; r++)
            total += sampler->masses[r * (size_t)n + (size_t)i].sum;
        TS_CHECK(total > 0, TS_ERR_INTERNAL, "sampler: no token may follow: logits are NaN or infinite, or all banned");
    }
done:
    return status;
}

// Step 2: this shard's candidates of every row, in one message.
static ts_status collect(ts_sampler *sampler, ts_tensor logits, const ts_sampler_row *const *rows, int32_t n) {
    ts_status status = TS_OK;
    sampler->mine.n_bytes = 0;
    for (int32_t i = 0; i < n; i++) {
        const float *raw = (const float *)logits.data + i * logits.stride;
        row_header header = {0, 0};
        const size_t header_at = sampler->mine.n_bytes;
        TS_TRY(ts_message_append(&sampler->mine, &header, sizeof header));
        adjust(rows[i], raw, sampler->adjusted);
        header.n = (int32_t)shard_candidates(sampler, rows[i], raw, sampler->masses + i, n);
        TS_TRY(ts_message_append(&sampler->mine, sampler->sorted, (size_t)header.n * sizeof *sampler->sorted));
        if (rows[i]->params.logprobs > 0) {
            header.n_top = (int32_t)shard_top(sampler, rows[i], raw);
            TS_TRY(ts_message_append(&sampler->mine, sampler->sorted, (size_t)header.n_top * sizeof *sampler->sorted));
        }
        memcpy(sampler->mine.data + header_at, &header, sizeof header);
    }
    TS_TRY(
        ts_group_gather(sampler->tp, 0, sampler->mine.data, sampler->mine.n_bytes, &sampler->all, sampler->n_bytes_of));
done:
    return status;
}

// Moves `count` candidates from rank r's run to the merged ones.
static ts_status take(ts_sampler *sampler, int r, int32_t count, size_t *n_merged) {
    ts_status status = TS_OK;
    const size_t bytes = (size_t)count * sizeof(candidate);
    if (*n_merged + (size_t)count > sampler->n_merged) {
        sampler->n_merged = 2 * (*n_merged + (size_t)count);
        TS_TRY(grow(&sampler->merged, sampler->n_merged, sizeof *sampler->merged));
    }
    if (bytes)
        memcpy(sampler->merged + *n_merged, sampler->all.data + sampler->cursor[r], bytes);
    sampler->cursor[r] += bytes;
    *n_merged += (size_t)count;
done:
    return status;
}

// Step 3, at the root.
static ts_status merge(ts_sampler *sampler, const ts_sampler_row *const *rows, int32_t n, ts_next_token *choices) {
    ts_status status = TS_OK;
    const int n_ranks = ts_group_size(sampler->tp);
    size_t at = 0;
    for (int r = 0; r < n_ranks; r++) {
        sampler->cursor[r] = at;
        at += sampler->n_bytes_of[r];
    }
    for (int32_t i = 0; i < n; i++) {
        const shard_mass *masses = sampler->masses + i;
        size_t n_candidates = 0, n_all = 0;
        row_header headers[n_ranks];
        for (int r = 0; r < n_ranks; r++) {
            memcpy(&headers[r], sampler->all.data + sampler->cursor[r], sizeof headers[r]);
            sampler->cursor[r] += sizeof headers[r];
            TS_TRY(take(sampler, r, headers[r].n, &n_candidates));
            // The tops stand behind; they are read once all candidates are.
            sampler->cursor[r] += (size_t)headers[r].n_top * sizeof(candidate);
        }
        assert(n_candidates > 0);
        const candidate chosen = pick(rows[i], sampler->merged, (int64_t)n_candidates, masses, n, n_ranks);
        ts_next_token *choice = &choices[i];
        *choice = (ts_next_token){.token = chosen.token};
        if (rows[i]->params.logprobs < 0)
            continue;
        double largest = -INFINITY, total = 0;
        for (int r = 0; r < n_ranks; r++)
            largest = fmax(largest, masses[r * n].raw_largest);
        for (int r = 0; r < n_ranks; r++)
            total += masses[r * n].raw_sum * exp(masses[r * n].raw_largest - largest);
        const double log_total = largest + log(total);
        choice->logprob = chosen.raw - log_total;
        for (int r = 0; r < n_ranks; r++) {
            sampler->cursor[r] -= (size_t)headers[r].n_top * sizeof(candidate);
            TS_TRY(take(sampler, r, headers[r].n_top, &n_all));
        }
        qsort(sampler->merged, n_all, sizeof *sampler->merged, by_raw);
        choice->n_top = n_all < (size_t)rows[i]->params.logprobs ? (int32_t)n_all : rows[i]->params.logprobs;
        for (int32_t t = 0; t < choice->n_top; t++)
            choice->top[t] = (ts_scored_token){sampler->merged[t].token, sampler->merged[t].raw - log_total};
    }
done:
    return status;
}

ts_status ts_sampler_choose(ts_sampler *sampler, ts_tensor logits, const ts_sampler_row *const *rows, int32_t n,
                            ts_next_token *choices) {
    ts_status status = TS_OK;
    assert(logits.rows == n);
    TS_TRY(share_masses(sampler, logits, rows, n));
    TS_TRY(collect(sampler, logits, rows, n));
    if (ts_group_rank(sampler->tp) == 0)
        TS_TRY(merge(sampler, rows, n, choices));
done:
    return status;
}
