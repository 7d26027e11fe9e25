// Philox4x32-10 against the known answers that its authors publish with Random123, and the draws made of it.
#include "runtime/philox.h"

#include <criterion/criterion.h>
#include <string.h>

static void check_known(const uint32_t counter[4], const uint32_t key[2], const uint32_t expected[4]) {
    uint32_t out[4];
    ts_philox4x32(counter, key, out);
    cr_assert_arr_eq(out, expected, sizeof out, "%08x %08x %08x %08x", out[0], out[1], out[2], out[3]);
}

Test(philox, known_answer_of_zeros) {
    check_known((const uint32_t[]){0, 0, 0, 0}, (const uint32_t[]){0, 0},
                (const uint32_t[]){0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
}

Test(philox, known_answer_of_ones) {
    const uint32_t f = 0xffffffff;
    check_known((const uint32_t[]){f, f, f, f}, (const uint32_t[]){f, f},
                (const uint32_t[]){0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
}

Test(philox, known_answer_of_pi) {
    check_known((const uint32_t[]){0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                (const uint32_t[]){0xa4093822, 0x299f31d0},
                (const uint32_t[]){0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

// Every part of what a draw is for moves it, the upper halves of the 64-bit ones too.
Test(philox, draws_depend_on_all_they_are_given) {
    const double draws[] = {
        ts_philox_uniform(0, 0, 0, 0), ts_philox_uniform(1, 0, 0, 0),          ts_philox_uniform(1ull << 32, 0, 0, 0),
        ts_philox_uniform(0, 1, 0, 0), ts_philox_uniform(0, 1ull << 32, 0, 0), ts_philox_uniform(0, 0, 1, 0),
        ts_philox_uniform(0, 0, 0, 1),
    };
    for (size_t i = 0; i < sizeof draws / sizeof *draws; i++)
        for (size_t j = 0; j < i; j++)
            cr_assert_neq(draws[i], draws[j], "%zu and %zu", i, j);
    cr_assert_eq(draws[0], ts_philox_uniform(0, 0, 0, 0));
}

// The four counters that a job runs through, each alone: 64 bins of 65,536 draws, and the mean product of neighbours,
// which is 1/4 when they do not know of each other.
Test(philox, draws_are_uniform_along_every_axis) {
    enum { N = 1 << 16, BINS = 64 };
    for (int axis = 0; axis < 4; axis++) {
        int counts[BINS] = {0};
        double sum = 0, products = 0, last = 0;
        for (uint32_t i = 0; i < N; i++) {
            const double u =
                ts_philox_uniform(axis == 0 ? i : 7, axis == 1 ? i : 11, axis == 2 ? i : 0, axis == 3 ? i : 3);
            cr_assert(u >= 0 && u < 1, "%g", u);
            counts[(int)(u * BINS)]++;
            sum += u;
            products += i > 0 ? u * last : 0;
            last = u;
        }
        double chi_square = 0;
        for (int b = 0; b < BINS; b++) {
            const double expected = (double)N / BINS, off = counts[b] - expected;
            chi_square += off * off / expected;
        }
        cr_assert_lt(chi_square, 63 + 5 * 11.3, "axis %d: chi square %g of 63 degrees of freedom", axis, chi_square);
        cr_assert_float_eq(sum / N, 0.5, 5 * 0.289 / 256, "axis %d: mean %g", axis, sum / N);
        cr_assert_float_eq(products / (N - 1), 0.25, 5 * 0.25 / 256, "axis %d: product %g", axis, products / (N - 1));
    }
}
