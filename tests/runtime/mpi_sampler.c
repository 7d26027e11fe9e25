// The sampler over shards of the vocabulary: for every kind of parameters, the ranks together choose what one rank with
// all of it chooses.
#include "runtime/sampler.h"
#include "tests/comm/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { V = 97, N_CASES = 14, N_DRAWS = 60, N_KINDS = 4, N_ROWS = N_CASES * N_DRAWS };

static const int32_t eos[] = {0, 50};
static const int32_t prompt[] = {1, 2, 30, 60, 96}, generated[] = {2, 24, 25, 25, 48, 49, 96};

// Shards cut V where it does not divide: floor(V r / n), as the model does.
static int64_t begin_of(int rank, int n_ranks) {
    return (int64_t)V * rank / n_ranks;
}

// Four rows of logits: spread, many ties, one token far above, and half of them banned, whole shards among them.
static void fill_logits(float logits[N_KINDS][V]) {
    for (int t = 0; t < V; t++) {
        const float noise = (float)((t * 7919 + 13) % 101) / 101.0f;
        logits[0][t] = 4 * noise - 2;
        logits[1][t] = (float)(t % 3);
        logits[2][t] = t == 73 ? 9 : noise;
        logits[3][t] = t < 52 ? -INFINITY : 2 * noise;
    }
}

static int32_t stop_ids[] = {5, 73}, bias_ids[] = {3, 24, 90};
static float biases[] = {1.5f, -2, 2.5f};

static ts_sampling_params params_of(int c) {
    ts_sampling_params p = ts_sampling_params_default();
    p.logprobs = c % 3 == 0 ? 20 : c % 3 == 1 ? 0 : -1;
    p.temperature = c == 1 || c == 9 ? 0 : c == 2 ? 1e-40f : c == 3 ? 1.7f : 0.8f;
    p.top_k = c == 4 ? 1 : c == 5 || c == 8 ? 10 : c == 10 ? 96 : 0;
    p.top_p = c == 6 || c == 8 ? 0.7f : c == 10 ? 0.95f : 1;
    p.min_p = c == 7 || c == 8 ? 0.2f : 0;
    p.presence_penalty = c >= 9 ? 0.5f : 0;
    p.frequency_penalty = c >= 10 ? -0.3f : 0;
    p.repetition_penalty = c >= 11 ? 1.3f : 1;
    if (c >= 12) {
        p.n_biases = 3;
        p.bias_ids = bias_ids;
        p.biases = biases;
        p.n_stop_ids = 2;
        p.stop_ids = stop_ids;
        p.min_tokens = 20;
        p.max_tokens = 40;
    }
    p.ignore_eos = c == 13;
    return p;
}

// All cases for all draws over all kinds of logits, in one call a kind.
static void choose(checker *c, ts_group *tp, const float logits[N_KINDS][V], ts_next_token *choices) {
    const int64_t first = begin_of(ts_group_rank(tp), ts_group_size(tp)),
                  n = begin_of(ts_group_rank(tp) + 1, ts_group_size(tp)) - first;
    ts_sampler *sampler = NULL;
    ts_sampler_row *rows = calloc(N_ROWS, sizeof *rows);
    const ts_sampler_row **pointers = malloc(N_ROWS * sizeof(ts_sampler_row *));
    float *shard = malloc((size_t)n * sizeof *shard);
    CHECK(c, rows && pointers && shard, "memory");
    CHECK_OK(c, ts_sampler_create(tp, &sampler));
    for (int i = 0; i < N_ROWS; i++) {
        const ts_sampling_params params = params_of(i % N_CASES);
        CHECK_OK(c, ts_sampler_row_begin(&rows[i], &params, (uint64_t)i * 77, (uint32_t)i % 2, first, n, eos, 2));
        ts_sampler_row_prompt(&rows[i], prompt, 5);
        for (size_t t = 0; t < sizeof generated / sizeof *generated; t++)
            ts_sampler_row_token(&rows[i], generated[t]);
        pointers[i] = &rows[i];
    }
    for (int kind = 0; kind < N_KINDS; kind++) {
        ts_tensor same = ts_tensor_of(shard, TS_F32, N_ROWS, n); // for every row
        same.stride = 0;
        memcpy(shard, logits[kind] + first, (size_t)n * sizeof *shard);
        CHECK_OK(c, ts_sampler_choose(sampler, same, pointers, N_ROWS, choices + (int64_t)kind * N_ROWS));
    }
    for (int i = 0; i < N_ROWS; i++)
        ts_sampler_row_end(&rows[i]);
    ts_sampler_free(sampler);
    free(shard);
    free(pointers);
    free(rows);
}

static void compare(checker *c, const ts_next_token *sharded, const ts_next_token *alone) {
    int n_different[N_CASES] = {0}; // tokens seen that are not the first one's, so that draws were made at all
    for (int i = 0; i < N_KINDS * N_ROWS; i++) {
        const ts_next_token *a = &sharded[i], *b = &alone[i];
        const int which = i % N_ROWS % N_CASES, kind = i / N_ROWS;
        CHECK(c, a->token == b->token, "case %d, logits %d: token %d, not %d", which, kind, a->token, b->token);
        CHECK(c, fabs(a->logprob - b->logprob) < 1e-12, "case %d, logits %d: %.17g, not %.17g", which, kind, a->logprob,
              b->logprob);
        CHECK(c, a->n_top == b->n_top, "case %d: %d alternatives, not %d", which, a->n_top, b->n_top);
        CHECK(c, a->n_top == (which % 3 == 0 ? 20 : 0), "case %d: %d alternatives", which, a->n_top);
        for (int t = 0; t < a->n_top; t++)
            CHECK(c,
                  a->top[t].token == b->top[t].token &&
                      (a->top[t].logprob == b->top[t].logprob || fabs(a->top[t].logprob - b->top[t].logprob) < 1e-12),
                  "case %d, logits %d: alternative %d", which, kind, t);
        n_different[which] += a->token != sharded[kind * N_ROWS + which].token;
    }
    for (int which = 0; which < N_CASES; which++) {
        const ts_sampling_params p = params_of(which);
        const bool draws = p.temperature > 1e-30f && p.top_k != 1;
        CHECK(c, !draws || n_different[which] > 20, "case %d: %d draws differ", which, n_different[which]);
        CHECK(c, p.temperature != 0 || n_different[which] == 0, "case %d: greedy differs", which);
    }
}

// A NaN in the shard of one rank is an error on all, and leaves the ranks in step.
static void check_nan(checker *c, ts_group *tp) {
    const int rank = ts_group_rank(tp), n_ranks = ts_group_size(tp);
    ts_sampler *sampler = NULL;
    ts_sampler_row row;
    const ts_sampler_row *rows[] = {&row};
    ts_next_token choice;
    CHECK_OK(c, ts_sampler_create(tp, &sampler));
    for (int bad = 0; bad < n_ranks; bad++) {
        const ts_sampling_params params = params_of(bad % 8);
        CHECK_OK(c, ts_sampler_row_begin(&row, &params, 1, 0, 3 * rank, 3, eos, 2));
        float logits[] = {1, rank == bad ? NAN : 2, 3};
        CHECK(c, ts_sampler_choose(sampler, ts_tensor_of(logits, TS_F32, 1, 3), rows, 1, &choice) == TS_ERR_INTERNAL,
              "NaN on rank %d", bad);
        logits[1] = 2;
        CHECK_OK(c, ts_sampler_choose(sampler, ts_tensor_of(logits, TS_F32, 1, 3), rows, 1, &choice));
        ts_sampler_row_end(&row);
    }
    ts_sampler_free(sampler);
}

int main(int argc, char **argv) {
    checker c = {0};
    ts_group *alone = NULL;
    static float logits[N_KINDS][V];
    if (ts_world_create_mpi(&argc, &argv, &c.world) != TS_OK) {
        fprintf(stderr, "%s\n", ts_status_message());
        return 1;
    }
    ts_next_token *sharded = calloc((size_t)N_KINDS * N_ROWS, sizeof *sharded),
                  *reference = calloc((size_t)N_KINDS * N_ROWS, sizeof *reference);
    CHECK(&c, sharded && reference, "memory");
    CHECK_OK(&c, ts_group_split(c.world, ts_group_rank(c.world), 0, &alone));
    fill_logits(logits);
    choose(&c, c.world, (const float(*)[V])logits, sharded);
    choose(&c, alone, (const float(*)[V])logits, reference);
    if (ts_group_rank(c.world) == 0)
        compare(&c, sharded, reference);
    check_nan(&c, c.world);
    check_report(&c, "mpi_sampler");
    free(sharded);
    free(reference);
    ts_group_free(alone);
    ts_world_free(c.world);
    return 0;
}
