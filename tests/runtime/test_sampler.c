// The sampler on a vocabulary of its own: distributions over many requests against exact ones, and edges by hand.
#include "runtime/sampler.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ts_group *world;
static ts_sampler *sampler;

static void create_sampler(void) {
    cr_assert_eq(ts_world_create_self(&world), TS_OK);
    cr_assert_eq(ts_sampler_create(world, &sampler), TS_OK);
}

static void free_sampler(void) {
    ts_sampler_free(sampler);
    ts_world_free(world);
}

TestSuite(sampler, .init = create_sampler, .fini = free_sampler);

static const int32_t eos[] = {0};

// A row of V tokens that has read a prompt and generated some.
typedef struct history {
    const int32_t *prompt, *generated;
    int n_prompt, n_generated;
} history;

static ts_sampler_row row_of(const ts_sampling_params *params, int64_t V, const history *past) {
    ts_sampler_row row;
    cr_assert_eq(ts_sampler_row_begin(&row, params, 1, 0, 0, V, eos, 1), TS_OK);
    if (past) {
        ts_sampler_row_prompt(&row, past->prompt, past->n_prompt);
        for (int i = 0; i < past->n_generated; i++)
            ts_sampler_row_token(&row, past->generated[i]);
    }
    return row;
}

static ts_tensor same_for_all(float *logits, int64_t n, int64_t V) {
    ts_tensor tensor = ts_tensor_of(logits, TS_F32, n, V);
    tensor.stride = 0;
    return tensor;
}

static ts_status try_choose(const ts_sampling_params *params, const float *logits, int64_t V, const history *past,
                            ts_next_token *out) {
    ts_sampler_row row = row_of(params, V, past);
    const ts_sampler_row *rows[] = {&row};
    float *copy = malloc((size_t)V * sizeof *copy);
    memcpy(copy, logits, (size_t)V * sizeof *copy);
    const ts_status status = ts_sampler_choose(sampler, ts_tensor_of(copy, TS_F32, 1, V), rows, 1, out);
    free(copy);
    ts_sampler_row_end(&row);
    return status;
}

static ts_next_token choose(const ts_sampling_params *params, const float *logits, int64_t V, const history *past) {
    ts_next_token token = {.token = -1};
    cr_assert_eq(try_choose(params, logits, V, past, &token), TS_OK, "%s", ts_status_message());
    return token;
}

#define CHOOSE(params, past, ...)                                                                                      \
    choose(params, (const float[])__VA_ARGS__, sizeof((const float[])__VA_ARGS__) / sizeof(float), past).token

static ts_sampling_params greedy(void) {
    ts_sampling_params params = ts_sampling_params_default();
    params.temperature = 0;
    return params;
}

// Draws for N requests of other names, and compares how often each token came with `expected`, its exact probability.
// The names are fixed, so the outcome is too; five standard deviations beyond the mean of chi-square would be one false
// sampler in a million. A token of probability 0 must never come.
static void check_distribution(const ts_sampling_params *params, const float *logits, int64_t V, const history *past,
                               const double *expected) {
    enum { N = 20000, BLOCK = 500 };
    static ts_sampler_row rows[BLOCK];
    const ts_sampler_row *pointers[BLOCK];
    ts_next_token *choices = malloc(BLOCK * sizeof *choices);
    int counts[1024] = {0};
    float copy[1024];
    cr_assert_leq(V, 1024);
    memcpy(copy, logits, (size_t)V * sizeof *copy);
    for (int i = 0; i < BLOCK; i++) {
        rows[i] = row_of(params, V, past);
        pointers[i] = &rows[i];
    }
    for (int first = 0; first < N; first += BLOCK) {
        for (int i = 0; i < BLOCK; i++)
            rows[i].request = (uint64_t)(first + i) * 0x9e3779b97f4a7c15u;
        cr_assert_eq(ts_sampler_choose(sampler, same_for_all(copy, BLOCK, V), pointers, BLOCK, choices), TS_OK, "%s",
                     ts_status_message());
        for (int i = 0; i < BLOCK; i++)
            counts[choices[i].token]++;
    }
    double chi_square = 0, total = 0;
    int freedom = -1;
    for (int64_t t = 0; t < V; t++)
        total += expected[t];
    cr_assert_float_eq(total, 1, 1e-9, "the test's own sum is %g", total);
    for (int64_t t = 0; t < V; t++) {
        cr_assert(expected[t] > 0 || counts[t] == 0, "token %d came %d times", (int)t, counts[t]);
        if (expected[t] <= 0)
            continue;
        const double off = counts[t] - N * expected[t];
        chi_square += off * off / (N * expected[t]);
        freedom++;
    }
    if (freedom > 0)
        cr_assert_lt(chi_square, freedom + 5 * sqrt(2.0 * freedom), "chi square %g of %d degrees of freedom",
                     chi_square, freedom);
    for (int i = 0; i < BLOCK; i++)
        ts_sampler_row_end(&rows[i]);
    free(choices);
}

// Logits whose softmax is p.
static void logits_of(const double *p, int64_t V, float *out) {
    for (int64_t i = 0; i < V; i++)
        out[i] = (float)(log(p[i]) + 3.0);
}

static const double five[] = {0.1, 0.4, 0.05, 0.25, 0.2};

static void check_five(const ts_sampling_params *params, const double *expected) {
    float logits[5];
    logits_of(five, 5, logits);
    check_distribution(params, logits, 5, NULL, expected);
}

// ---- Greedy

Test(sampler, greedy_takes_the_largest) {
    const ts_sampling_params params = greedy();
    cr_assert_eq(CHOOSE(&params, NULL, {-3, 2, 7, -1}), 2);
    cr_assert_eq(CHOOSE(&params, NULL, {-3}), 0);
}

Test(sampler, greedy_takes_the_lowest_id_of_a_tie) {
    const ts_sampling_params params = greedy();
    cr_assert_eq(CHOOSE(&params, NULL, {1, 5, 2, 5, 5}), 1);
    cr_assert_eq(CHOOSE(&params, NULL, {0, 0, 0}), 0);
    cr_assert_eq(CHOOSE(&params, NULL, {-0.0f, 0.0f}), 0);
}

Test(sampler, greedy_does_not_look_at_filters) {
    ts_sampling_params params = greedy();
    params.top_k = 3;
    params.top_p = 0.01f;
    params.min_p = 1;
    cr_assert_eq(CHOOSE(&params, NULL, {1, 5, 2, 5, 5}), 1);
}

// ---- Distributions

Test(sampler, draws_from_the_softmax) {
    const ts_sampling_params params = ts_sampling_params_default();
    check_five(&params, five);
}

Test(sampler, temperature_sharpens_and_flattens) {
    ts_sampling_params params = ts_sampling_params_default();
    for (int i = 0; i < 2; i++) {
        params.temperature = i ? 0.5f : 2.0f;
        double expected[5], total = 0;
        for (int t = 0; t < 5; t++)
            total += expected[t] = pow(five[t], i ? 2.0 : 0.5);
        for (int t = 0; t < 5; t++)
            expected[t] /= total;
        check_five(&params, expected);
    }
}

Test(sampler, top_k_keeps_the_largest) {
    ts_sampling_params params = ts_sampling_params_default();
    params.top_k = 2;
    check_five(&params, (const double[]){0, 0.4 / 0.65, 0, 0.25 / 0.65, 0});
    params.top_k = 1;
    check_five(&params, (const double[]){0, 1, 0, 0, 0});
    params.top_k = 5;
    check_five(&params, five);
    params.top_k = 1 << 30;
    check_five(&params, five);
}

Test(sampler, top_k_keeps_the_lowest_ids_of_a_tie) {
    ts_sampling_params params = ts_sampling_params_default();
    params.top_k = 2;
    check_distribution(&params, (const float[]){1, 1, 1, 1}, 4, NULL, (const double[]){0.5, 0.5, 0, 0});
}

// The token that crosses top_p is the last one in.
Test(sampler, top_p_keeps_the_smallest_set_that_reaches_it) {
    ts_sampling_params params = ts_sampling_params_default();
    params.top_p = 0.64f;
    check_five(&params, (const double[]){0, 0.4 / 0.65, 0, 0.25 / 0.65, 0});
    params.top_p = 0.66f;
    check_five(&params, (const double[]){0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85});
    params.top_p = 0.96f;
    check_five(&params, five);
    params.top_p = 1e-6f;
    check_five(&params, (const double[]){0, 1, 0, 0, 0});
}

// A half is exact: a set that reaches top_p with equality is complete.
Test(sampler, top_p_reached_exactly) {
    ts_sampling_params params = ts_sampling_params_default();
    params.top_p = 0.5f;
    check_distribution(&params, (const float[]){1, 1, 1, 1}, 4, NULL, (const double[]){0.5, 0.5, 0, 0});
}

Test(sampler, top_p_of_a_long_flat_tail) {
    enum { V = 1000 };
    ts_sampling_params params = ts_sampling_params_default();
    float logits[V];
    double expected[V];
    for (int i = 0; i < V; i++)
        logits[i] = i == 500 ? logf(999.0f) : 0;
    params.top_p = 0.75f; // 1/2 for token 500, then a quarter over 500 of the 999 others: those of the lowest ids
    for (int i = 0; i < V; i++)
        expected[i] = i == 500 ? 999.0 / (999 + 500) : i < 500 ? 1.0 / (999 + 500) : 0;
    check_distribution(&params, logits, V, NULL, expected);
}

Test(sampler, min_p_is_a_share_of_the_largest) {
    ts_sampling_params params = ts_sampling_params_default();
    params.min_p = 0.45f; // 0.18 of 0.4
    check_five(&params, (const double[]){0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85});
    params.min_p = 1;
    check_five(&params, (const double[]){0, 1, 0, 0, 0});
    check_distribution(&params, (const float[]){2, 1, 2, 0}, 4, NULL, (const double[]){0.5, 0, 0.5, 0});
}

// top_p counts over what top_k left: 0.4 of 0.65 is above 0.6, which it would not be of 1.
Test(sampler, top_p_counts_over_what_top_k_left) {
    ts_sampling_params params = ts_sampling_params_default();
    params.top_k = 2;
    params.top_p = 0.6f;
    check_five(&params, (const double[]){0, 1, 0, 0, 0});
    params.top_p = 0.63f;
    check_five(&params, (const double[]){0, 0.4 / 0.65, 0, 0.25 / 0.65, 0});
}

// min_p comes after top_p and does not make top_p's whole smaller: of 0.4, 0.38 and 0.22, a half needs the first two.
Test(sampler, min_p_does_not_change_what_top_p_counts_over) {
    ts_sampling_params params = ts_sampling_params_default();
    static const double p[] = {0.22, 0.4, 0.38};
    float logits[3];
    logits_of(p, 3, logits);
    params.top_p = 0.5f;
    params.min_p = 0.9f;
    check_distribution(&params, logits, 3, NULL, (const double[]){0, 0.4 / 0.78, 0.38 / 0.78});
    params.top_k = 3;
    check_distribution(&params, logits, 3, NULL, (const double[]){0, 0.4 / 0.78, 0.38 / 0.78});
}

Test(sampler, min_p_thins_what_top_k_and_top_p_left) {
    ts_sampling_params params = ts_sampling_params_default();
    params.top_k = 4;
    params.top_p = 0.95f; // 0.4 + 0.25 + 0.2 + 0.1 are left, and all are needed
    params.min_p = 0.3f;
    check_five(&params, (const double[]){0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85});
}

Test(sampler, filters_see_the_temperature) {
    ts_sampling_params params = ts_sampling_params_default();
    params.temperature = 0.5f; // squares: 0.01, 0.16, 0.0025, 0.0625, 0.04 of 0.275
    params.top_p = 0.57f;      // 0.16 are 0.58 of it
    check_five(&params, (const double[]){0, 1, 0, 0, 0});
    params.top_p = 1;
    params.min_p = 0.38f; // 0.39 is the second, as a share of the first
    check_five(&params, (const double[]){0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0});
}

Test(sampler, large_vocabularies_with_every_filter) {
    enum { V = 1000, K = 50 };
    ts_sampling_params params = ts_sampling_params_default();
    float logits[V];
    double expected[V] = {0}, total = 0;
    for (int i = 0; i < V; i++) // a permutation: token 7 i mod V has rank i
        logits[7 * i % V] = 5.0f - 0.05f * (float)i;
    params.top_k = K;
    for (int i = 0; i < K; i++)
        total += expected[7 * i % V] = exp(-0.05 * i);
    for (int i = 0; i < V; i++)
        expected[i] /= total;
    check_distribution(&params, logits, V, NULL, expected);
}

// ---- Edges

Test(sampler, the_smallest_temperatures) {
    ts_sampling_params params = ts_sampling_params_default();
    static const float temperatures[] = {1e-40f, 1.4e-45f, 1e-30f, 1e-5f};
    for (int i = 0; i < 4; i++) {
        params = ts_sampling_params_default();
        params.temperature = temperatures[i];
        for (int filter = 0; filter < 4; filter++) {
            params.top_k = filter == 1 ? 3 : 0;
            params.top_p = filter == 2 ? 0.9f : 1;
            params.min_p = filter == 3 ? 0.1f : 0;
            cr_assert_eq(CHOOSE(&params, NULL, {-100, 11.3f, 11.7f, 11.6f}), 2, "%g", (double)temperatures[i]);
            cr_assert_eq(CHOOSE(&params, NULL, {-7, -5.1f, -5.3f}), 1, "%g", (double)temperatures[i]);
            check_distribution(&params, (const float[]){3.7f, -1, 3.7f}, 3, NULL, (const double[]){0.5, 0, 0.5});
        }
    }
}

Test(sampler, minus_infinity_never_comes) {
    ts_sampling_params params = ts_sampling_params_default();
    static const float logits[] = {-INFINITY, 1, -INFINITY, 1, -INFINITY};
    static const double expected[] = {0, 0.5, 0, 0.5, 0};
    check_distribution(&params, logits, 5, NULL, expected);
    params.top_k = 4;
    check_distribution(&params, logits, 5, NULL, expected);
    params.top_k = 0;
    params.top_p = 0.999f;
    check_distribution(&params, logits, 5, NULL, expected);
    params.top_p = 1;
    params.min_p = 1e-30f;
    check_distribution(&params, logits, 5, NULL, expected);
    params = greedy();
    cr_assert_eq(choose(&params, logits, 5, NULL).token, 1);
}

Test(sampler, logits_that_are_no_numbers_are_an_error) {
    static const float rows[][3] = {
        {NAN, NAN, NAN},  {1, NAN, 2},
        {NAN, 1, 2},      {-INFINITY, -INFINITY, -INFINITY},
        {1, INFINITY, 2}, {-INFINITY, NAN, -INFINITY},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int filter = 0; filter < 5; filter++) {
            ts_sampling_params params = ts_sampling_params_default();
            ts_next_token token = {.token = -1};
            params.temperature = filter == 4 ? 0 : 1;
            params.top_k = filter == 1 ? 2 : 0;
            params.top_p = filter == 2 ? 0.9f : 1;
            params.min_p = filter == 3 ? 0.1f : 0;
            cr_assert_eq(try_choose(&params, rows[i], 3, NULL, &token), TS_ERR_INTERNAL, "row %zu, filter %d", i,
                         filter);
            cr_assert_eq(token.token, -1);
        }
    const ts_sampling_params params = greedy();
    cr_assert_eq(CHOOSE(&params, NULL, {1, 2}), 1); // the sampler can be used on
}

Test(sampler, huge_logits) {
    const ts_sampling_params params = ts_sampling_params_default();
    cr_assert_eq(CHOOSE(&params, NULL, {-3e38f, 3e38f, 0}), 1);
    check_distribution(&params, (const float[]){3e38f, 3e38f, -3e38f}, 3, NULL, (const double[]){0.5, 0.5, 0});
}

// ---- Penalties

static const int32_t prompt[] = {1, 2, 2}, generated[] = {2, 3, 3};
static const history past = {prompt, generated, 3, 3};

// The logits that are compared after penalties, read off the reported order of a greedy choice: raises one token by a
// bias until it wins, so that the penalised value is known to 1/64.
static float penalised(const ts_sampling_params *params, const float *logits, int64_t V, int32_t token,
                       const history *with) {
    ts_sampling_params probe = *params;
    int32_t ids[2] = {token, (int32_t)V};
    float biases[2], wide[16];
    memcpy(wide, logits, (size_t)V * sizeof *wide);
    for (int64_t i = 0; i < V; i++)
        wide[i] = i == token ? logits[i] : -50;
    wide[V] = 0; // what it is measured against: never in a prompt, never generated
    probe.n_biases = 1;
    probe.bias_ids = ids;
    probe.biases = biases;
    float low = -100, high = 100; // the token wins at `low` already, or first at `high`; ties go to the lower id
    for (int i = 0; i < 30; i++) {
        biases[0] = 0.5f * (low + high);
        const bool wins = choose(&probe, wide, V + 1, with).token == token;
        *(wins ? &high : &low) = biases[0];
    }
    return -high;
}

#define PENALISED_IS(params, token, expected)                                                                          \
    do {                                                                                                               \
        const float got = penalised(params, logits, 5, token, &past);                                                  \
        cr_assert_float_eq(got, expected, 1e-4, "token %d: %g, not %g", token, (double)got, (double)(expected));       \
    } while (0)

static const float logits[] = {1, 2, 3, -4, -5};

Test(sampler, presence_penalty_counts_what_was_generated_once) {
    ts_sampling_params params = greedy();
    params.presence_penalty = 0.75f;
    PENALISED_IS(&params, 1, 2.0f); // in the prompt only
    PENALISED_IS(&params, 2, 2.25f);
    PENALISED_IS(&params, 3, -4.75f); // twice
    PENALISED_IS(&params, 4, -5.0f);
    params.presence_penalty = -0.5f;
    PENALISED_IS(&params, 3, -3.5f);
}

Test(sampler, frequency_penalty_counts_every_time) {
    ts_sampling_params params = greedy();
    params.frequency_penalty = 0.75f;
    PENALISED_IS(&params, 1, 2.0f);
    PENALISED_IS(&params, 2, 2.25f);
    PENALISED_IS(&params, 3, -5.5f);
    PENALISED_IS(&params, 4, -5.0f);
}

Test(sampler, repetition_penalty_knows_the_prompt_too) {
    ts_sampling_params params = greedy();
    params.repetition_penalty = 2;
    PENALISED_IS(&params, 0, 1.0f);
    PENALISED_IS(&params, 1, 1.0f);
    PENALISED_IS(&params, 2, 1.5f); // once, although it was in both
    PENALISED_IS(&params, 3, -8.0f);
    PENALISED_IS(&params, 4, -5.0f);
    params.repetition_penalty = 0.5f;
    PENALISED_IS(&params, 1, 4.0f);
    PENALISED_IS(&params, 3, -2.0f);
}

Test(sampler, penalties_together_in_order) {
    ts_sampling_params params = greedy();
    params.repetition_penalty = 2;
    params.presence_penalty = 0.25f;
    params.frequency_penalty = 0.5f;
    PENALISED_IS(&params, 2, 3.0f / 2 - 0.25f - 0.5f);
    PENALISED_IS(&params, 3, -4.0f * 2 - 0.25f - 2 * 0.5f);
    PENALISED_IS(&params, 1, 1.0f);
}

// The smallest penalty that a request may give makes a positive logit larger than any float.
Test(sampler, the_smallest_repetition_penalty) {
    ts_sampling_params params = ts_sampling_params_default();
    params.repetition_penalty = 1.4e-45f;
    cr_assert_lt(CHOOSE(&params, &past, {1, 2, 3, -4, 100}), 3); // 1 and 2, which were there, leave all others behind
    params.temperature = 0;
    cr_assert_eq(CHOOSE(&params, &past, {1, -2, 3, -4, 100}), 2);
}

Test(sampler, a_fork_knows_the_prompt) {
    ts_sampling_params params = greedy();
    params.repetition_penalty = 4;
    ts_sampler_row from = row_of(&params, 3, &(history){prompt, NULL, 3, 0}), to = row_of(&params, 3, NULL);
    const ts_sampler_row *rows[] = {&to, &from};
    ts_next_token choices[2];
    float values[] = {1, 2, 3};
    ts_sampler_row_copy_prompt(&to, &from);
    cr_assert_eq(ts_sampler_choose(sampler, same_for_all(values, 2, 3), rows, 2, choices), TS_OK);
    cr_assert(choices[0].token == 0 && choices[1].token == 0);
    ts_sampler_row_end(&from);
    ts_sampler_row_end(&to);
}

Test(sampler, logit_bias_is_added) {
    ts_sampling_params params = greedy();
    int32_t ids[] = {0, 3};
    float biases[] = {2.5f, -100};
    params.n_biases = 2;
    params.bias_ids = ids;
    params.biases = biases;
    cr_assert_eq(CHOOSE(&params, NULL, {1, 3, 2, 50}), 0);
    params.temperature = 1;
    const double total = exp(3.5) + exp(3) + exp(2);
    check_distribution(&params, (const float[]){1, 3, 2, 50}, 4, NULL,
                       (const double[]){exp(3.5) / total, exp(3) / total, exp(2) / total, 0});
}

Test(sampler, no_end_before_min_tokens) {
    ts_sampling_params params = greedy();
    int32_t stops[] = {2};
    params.min_tokens = 4; // three are generated
    params.n_stop_ids = 1;
    params.stop_ids = stops;
    cr_assert_eq(CHOOSE(&params, &past, {9, 1, 8, 2}), 3);
    params.min_tokens = 3;
    cr_assert_eq(CHOOSE(&params, &past, {9, 1, 8, 2}), 0);
    params.min_tokens = 4;
    params.ignore_eos = true; // then end of text ends nothing, and may come
    cr_assert_eq(CHOOSE(&params, &past, {9, 1, 8, 2}), 0);
    params.temperature = 1;
    params.ignore_eos = false;
    check_distribution(&params, (const float[]){9, 1, 8, 1}, 4, &past, (const double[]){0, 0.5, 0, 0.5});
}

// ---- Log-probabilities

// Of the model: softmax of the logits as they came, whatever was done to them.
Test(sampler, log_probabilities_are_those_of_the_model) {
    ts_sampling_params params = greedy();
    int32_t ids[] = {0};
    float biases[] = {100}, values[5];
    logits_of(five, 5, values);
    params.logprobs = 3;
    params.temperature = 0.3f;
    params.top_k = 1;
    params.presence_penalty = 2;
    params.n_biases = 1;
    params.bias_ids = ids;
    params.biases = biases;
    const ts_next_token next = choose(&params, values, 5, &past);
    static const int32_t order[] = {1, 3, 4};
    cr_assert_eq(next.token, 0);
    cr_assert_float_eq(next.logprob, log(0.1), 1e-6);
    cr_assert_eq(next.n_top, 3);
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(next.top[i].token, order[i]);
        cr_assert_float_eq(next.top[i].logprob, log(five[order[i]]), 1e-6);
    }
}

Test(sampler, log_probabilities_in_order_of_ids_where_equal) {
    ts_sampling_params params = greedy();
    params.logprobs = 20;
    const ts_next_token next = choose(&params, (const float[]){1, 2, 1, 2, -INFINITY}, 5, NULL);
    static const int32_t order[] = {1, 3, 0, 2, 4};
    cr_assert_eq(next.n_top, 5); // no more than there are
    for (int i = 0; i < 5; i++)
        cr_assert_eq(next.top[i].token, order[i]);
    cr_assert(isinf(next.top[4].logprob) && next.top[4].logprob < 0);
}

Test(sampler, log_probability_without_alternatives) {
    ts_sampling_params params = ts_sampling_params_default();
    float values[5];
    logits_of(five, 5, values);
    params.logprobs = 0;
    const ts_next_token next = choose(&params, values, 5, NULL);
    cr_assert_eq(next.n_top, 0);
    cr_assert_float_eq(next.logprob, log(five[next.token]), 1e-6);
}

// ---- What a draw depends on

// A batch of different rows, of two kinds of logits, gives each what it gets alone.
Test(sampler, rows_do_not_see_each_other) {
    enum { V = 61, N = 12 };
    float values[N * V];
    ts_sampler_row rows[N];
    const ts_sampler_row *pointers[N];
    ts_next_token together[N], alone;
    for (int i = 0; i < N * V; i++)
        values[i] = (float)((i % (2 * V) * 37) % 23) * 0.3f;
    for (int i = 0; i < N; i++) {
        ts_sampling_params params = ts_sampling_params_default();
        params.temperature = i % 5 == 4 ? 0 : 0.9f;
        params.top_k = i % 3 == 1 ? 7 : 0;
        params.top_p = i % 3 == 2 ? 0.8f : 1;
        params.frequency_penalty = i % 2 ? 0.7f : 0;
        params.logprobs = i % 4 - 1;
        params.seed = (uint64_t)i / 2;
        rows[i] = row_of(&params, V, &past);
        rows[i].sample = (uint32_t)i % 3;
        pointers[i] = &rows[i];
    }
    cr_assert_eq(ts_sampler_choose(sampler, ts_tensor_of(values, TS_F32, N, V), pointers, N, together), TS_OK);
    for (int i = 0; i < N; i++) {
        cr_assert_eq(ts_sampler_choose(sampler, ts_tensor_of(values + V * i, TS_F32, 1, V), &pointers[i], 1, &alone),
                     TS_OK);
        cr_assert_eq(alone.token, together[i].token);
        cr_assert_eq(alone.n_top, together[i].n_top);
        cr_assert_eq(alone.logprob, together[i].logprob);
        for (int t = 0; t < alone.n_top; t++)
            cr_assert(alone.top[t].token == together[i].top[t].token &&
                      alone.top[t].logprob == together[i].top[t].logprob);
        ts_sampler_row_end(&rows[i]);
    }
}

// 64 draws over 1,000 equal tokens: the same again for the same names, others as soon as one of them differs.
Test(sampler, draws_depend_on_seed_request_sample_and_position_alone) {
    enum { V = 1000, N = 64 };
    static float values[V];
    ts_sampler_row rows[N];
    const ts_sampler_row *pointers[N];
    static ts_next_token choices[N];
    const ts_sampling_params params = ts_sampling_params_default();
    int32_t first[N];
    for (int i = 0; i < N; i++) {
        rows[i] = row_of(&params, V, NULL);
        pointers[i] = &rows[i];
    }
    for (int change = 0; change < 6; change++) {
        int n_same = 0;
        for (int i = 0; i < N; i++) {
            rows[i].request = (uint64_t)i + (change == 2 ? 1ull << 40 : 0);
            rows[i].params.seed = change == 3 ? 1ull << 50 : 5;
            rows[i].sample = change == 4 ? 1 : 0;
            rows[i].n_generated = change == 5 ? 1 : 0;
        }
        cr_assert_eq(ts_sampler_choose(sampler, same_for_all(values, N, V), pointers, N, choices), TS_OK);
        for (int i = 0; i < N; i++) {
            first[i] = change == 0 ? choices[i].token : first[i];
            n_same += choices[i].token == first[i];
        }
        cr_assert(change < 2 ? n_same == N : n_same < 4, "change %d: %d of %d are the same", change, n_same, N);
    }
    for (int i = 0; i < N; i++)
        ts_sampler_row_end(&rows[i]);
}
