// Weights that are drawn: what they depend on, and how they are distributed. Those of files: test_safetensors and the
// golden models.
#include "runtime/weight_source.h"

#include <criterion/criterion.h>
#include <math.h>

enum { ROWS = 300, COLS = 256, N = ROWS * COLS };

static void draw(uint64_t seed, const char *name, bool is_vector, int64_t rows, int64_t cols, float *out) {
    ts_weight_source *source = NULL;
    ts_weight_tensor tensor;
    cr_assert_eq(ts_weight_source_open_random(seed, &source), TS_OK);
    cr_assert_eq(ts_weight_source_find(source, name, is_vector, rows, cols, &tensor), TS_OK);
    for (int64_t r = 0; r < rows; r++)
        ts_weight_tensor_read(&tensor, r, 0, cols, TS_F32, out + r * cols);
    cr_assert_eq(ts_weight_source_finish(source), TS_OK);
    ts_weight_source_free(source);
}

static void moments(const float *values, int n, double *mean, double *spread) {
    double sum = 0, squares = 0;
    for (int i = 0; i < n; i++)
        sum += (double)values[i];
    *mean = sum / n;
    for (int i = 0; i < n; i++)
        squares += ((double)values[i] - *mean) * ((double)values[i] - *mean);
    *spread = sqrt(squares / n);
}

// A shard reads a part of a row that the whole tensor has too, in whatever dtype the device wants.
Test(weight_source, a_part_has_the_numbers_of_the_whole) {
    static float whole[N];
    float part[100];
    uint16_t narrow[100];
    ts_weight_source *source = NULL;
    ts_weight_tensor tensor;
    draw(7, "lm_head.weight", false, ROWS, COLS, whole);
    cr_assert_eq(ts_weight_source_open_random(7, &source), TS_OK);
    cr_assert_eq(ts_weight_source_find(source, "lm_head.weight", false, ROWS, COLS, &tensor), TS_OK);
    ts_weight_tensor_read(&tensor, 123, 45, 100, TS_F32, part);
    ts_weight_tensor_read(&tensor, 123, 45, 100, TS_BF16, narrow);
    for (int i = 0; i < 100; i++) {
        cr_assert_eq(part[i], whole[123 * COLS + 45 + i], "%d", i);
        cr_assert_eq(ts_bf16_to_f32(narrow[i]), part[i], "%d", i);
    }
    ts_weight_source_free(source);
}

Test(weight_source, seed_and_name_make_other_numbers) {
    static float a[N], b[N];
    const struct {
        uint64_t seed;
        const char *name;
    } others[] = {{8, "model.layers.1.mlp.up_proj.weight"}, {7, "model.layers.2.mlp.up_proj.weight"}};
    draw(7, "model.layers.1.mlp.up_proj.weight", false, ROWS, COLS, a);
    for (int o = 0; o < 2; o++) {
        int n_same = 0;
        draw(others[o].seed, others[o].name, false, ROWS, COLS, b);
        for (int i = 0; i < N; i++)
            n_same += a[i] == b[i];
        cr_assert_lt(n_same, N / 50, "%d of %d", n_same, N); // BF16 numbers coincide now and then
    }
}

Test(weight_source, matrices_are_scaled_by_their_width) {
    static float a[N];
    double mean, spread;
    draw(1, "model.layers.0.self_attn.q_proj.weight", false, ROWS, COLS, a);
    moments(a, N, &mean, &spread);
    cr_assert_lt(fabs(mean), 1e-3, "%g", mean); // 1 / 16 / sqrt(N) is 2.3e-4
    cr_assert_lt(fabs(spread * 16 - 1), 0.02, "%g", spread);
}

Test(weight_source, norms_are_one_and_gates_those_of_a_trained_model) {
    static float a[4096];
    double mean, spread;
    draw(1, "model.norm.weight", true, 1, 4096, a);
    moments(a, 4096, &mean, &spread);
    cr_assert(mean == 1 && spread == 0);
    draw(1, "model.layers.0.self_attn.key_gate.bias", true, 1, 4096, a);
    moments(a, 4096, &mean, &spread);
    cr_assert(fabs(mean - 1) < 0.03 && fabs(spread - 0.3) < 0.03, "%g %g", mean, spread);
    draw(1, "model.layers.0.self_attn.decay_gate.bias", true, 1, 4096, a);
    moments(a, 4096, &mean, &spread);
    cr_assert(fabs(mean - 2.5) < 0.03 && fabs(spread - 0.3) < 0.03, "%g %g", mean, spread);
}
