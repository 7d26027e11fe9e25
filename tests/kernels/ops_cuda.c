// Every op case on the CUDA backend, in both compute dtypes and all dtypes of slots; with "small" those that end soon
// under compute-sanitizer. Needs a GPU; exits 77 without one.
#include "kernels/cuda/cuda.h"
#include "op_cases.h"

enum { SKIPPED = 77 };

// capability 80: the kernels that an A100 runs; 0: those made for this GPU.
static int run(ts_dtype compute_dtype, int capability, bool small) {
    ts_device *device = NULL;
    const ts_status status = ts_cuda_device_create(0, compute_dtype, capability, &device);
    if (status != TS_OK) {
        printf("%s: %s\n", status == TS_ERR_UNSUPPORTED ? "SKIP" : "FAIL", ts_status_message());
        return status == TS_ERR_UNSUPPORTED ? -1 : 1;
    }
    printf("%s, activations %s, kernels %s\n", ts_cuda_device_name(device), ts_dtype_name(compute_dtype),
           capability ? "of sm_80" : "its own");
    int (*const ops)(ts_device *, ts_dtype, FILE *) = small ? op_cases_run_small : op_cases_run;
    int (*const attention)(ts_device *, ts_dtype, ts_dtype, FILE *) =
        small ? attention_cases_run_small : attention_cases_run;
    int n_failed = capability ? 0 : ops(device, compute_dtype, stdout);
    n_failed += attention(device, compute_dtype, TS_F32, stdout);
    n_failed += attention(device, compute_dtype, TS_BF16, stdout);
    n_failed += attention(device, compute_dtype, TS_FP8_E4M3, stdout);
    ts_device_free(device);
    return n_failed;
}

int main(int argc, char **argv) {
    const bool small = argc > 1 && strcmp(argv[1], "small") == 0;
    const int in_f32 = run(TS_F32, 0, small);
    if (in_f32 < 0)
        return SKIPPED;
    const int n_failed = in_f32 + run(TS_BF16, 0, small) + run(TS_BF16, 80, small);
    printf("%d failed\n", n_failed);
    return n_failed > 0;
}
