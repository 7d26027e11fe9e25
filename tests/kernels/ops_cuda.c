// Every op case on the CUDA backend, in both compute dtypes and all dtypes of slots; with "small N" those that end soon
// under compute-sanitizer: attention cases of up to N tokens. Needs a GPU; exits 77 without one.
#include "kernels/cuda/cuda.h"
#include "op_cases.h"

#include <limits.h>
#include <stdlib.h>

enum { SKIPPED = 77 };

// capability 80: the kernels that an A100 runs; 0: those made for this GPU.
// most_tokens: of a small run; 0: all cases.
static int run(ts_dtype compute_dtype, int capability, int most_tokens) {
    ts_device *device = NULL;
    const ts_status status = ts_cuda_device_create(0, compute_dtype, capability, &device);
    if (status != TS_OK) {
        printf("%s: %s\n", status == TS_ERR_UNSUPPORTED ? "SKIP" : "FAIL", ts_status_message());
        return status == TS_ERR_UNSUPPORTED ? -1 : 1;
    }
    printf("%s, activations %s, kernels %s\n", ts_cuda_device_name(device), ts_dtype_name(compute_dtype),
           capability ? "of sm_80" : "its own");
    static const ts_dtype slots[] = {TS_F32, TS_BF16, TS_FP8_E4M3};
    int n_failed = 0;
    if (most_tokens)
        n_failed += op_cases_run_small(device, compute_dtype, compute_dtype == TS_BF16 && !capability, stdout);
    else if (!capability)
        n_failed += op_cases_run(device, compute_dtype, stdout);
    for (int i = 0; i < 3; i++)
        n_failed += attention_cases_run(device, compute_dtype, slots[i], most_tokens ? most_tokens : INT_MAX, stdout);
    ts_device_free(device);
    return n_failed;
}

int main(int argc, char **argv) {
    const int most_tokens = argc > 2 && strcmp(argv[1], "small") == 0 ? atoi(argv[2]) : 0;
    const int in_f32 = run(TS_F32, 0, most_tokens);
    if (in_f32 < 0)
        return SKIPPED;
    const int n_failed = in_f32 + run(TS_BF16, 0, most_tokens) + run(TS_BF16, 80, most_tokens);
    printf("%d failed\n", n_failed);
    return n_failed > 0;
}
