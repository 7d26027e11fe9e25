#include "launcher/blas_kernels.h"

#include <cblas.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void ts_blas_kernels_choose(char **argv) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!has_avx512 || getenv("OPENBLAS_CORETYPE") || strcmp(openblas_get_corename(), "Haswell") != 0)
        return;
    setenv("OPENBLAS_CORETYPE", "SkylakeX", 1);
    execv("/proc/self/exe", argv); // returns only when it fails, and then the slower kernels do
#else
    (void)argv;
#endif
}
