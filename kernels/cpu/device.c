// Host memory as a device. Allocations are zeroed lazily by the kernel, so untouched cache pages cost nothing.
#include "kernels/cpu/device.h"

#include "kernels/cpu/panels.h"

#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

// The size of an allocation stands before it, so that release can unmap it.
enum { HEADER_BYTES = 4096 };

static void cpu_free(ts_device *device) {
    free(ts_cpu_device_of(device)->scratch);
    free(device);
}

static ts_status cpu_alloc(ts_device *device, size_t n_bytes, void **out) {
    size_t mapped;
    if (!ts_size_add(n_bytes, HEADER_BYTES, &mapped))
        return TS_ERR_MEMORY;
    char *base = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return TS_ERR_MEMORY;
    *(size_t *)base = mapped;
    *out = base + HEADER_BYTES;
    return TS_OK;
}

static void cpu_release(ts_device *device, void *data) {
    char *base = (char *)data - HEADER_BYTES;
    munmap(base, *(size_t *)base);
}

static ts_status cpu_copy(ts_device *device, void *to, const void *from, size_t n_bytes) {
    memcpy(to, from, n_bytes);
    return TS_OK;
}

static ts_status cpu_zero(ts_device *device, void *data, size_t n_bytes) {
    memset(data, 0, n_bytes);
    return TS_OK;
}

static ts_status cpu_synchronize(ts_device *device) {
    return TS_OK;
}

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Work is done when its call returns.
static ts_status cpu_mark(ts_device *device, int mark) {
    ts_cpu_device_of(device)->marks[mark] = seconds_now();
    return TS_OK;
}

static ts_status cpu_elapsed(ts_device *device, double *seconds) {
    const double *marks = ts_cpu_device_of(device)->marks;
    *seconds = marks[1] - marks[0];
    return TS_OK;
}

// The number that follows `key` in a file of the kernel; SIZE_MAX where there is none ("max" in a control group).
static size_t read_number(const char *path, const char *key) {
    char line[256];
    unsigned long long number = 0;
    bool found = false;
    FILE *file = fopen(path, "r");
    while (file && !found && fgets(line, sizeof line, file))
        if (strncmp(line, key, strlen(key)) == 0)
            found = sscanf(line + strlen(key), "%llu", &number) == 1;
    if (file)
        fclose(file);
    return found ? (size_t)number : SIZE_MAX;
}

// What a program can take without swapping: page cache counts as free, and a control group's limit as all there is.
static ts_status cpu_memory(ts_device *device, size_t *free_bytes, size_t *total_bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t available = read_number("/proc/meminfo", "MemAvailable:");
    const size_t limit = read_number("/sys/fs/cgroup/memory.max", ""),
                 used = read_number("/sys/fs/cgroup/memory.current", "");
    *total_bytes = (size_t)sysconf(_SC_PHYS_PAGES) * page;
    *free_bytes = available < SIZE_MAX / 1024 ? available * 1024 : (size_t)sysconf(_SC_AVPHYS_PAGES) * page;
    if (limit < *total_bytes && used <= limit) {
        *total_bytes = limit;
        *free_bytes = *free_bytes < limit - used ? *free_bytes : limit - used;
    }
    return TS_OK;
}

static size_t cpu_weight_bytes(int64_t n_rows, int64_t n_cols, ts_dtype dtype) {
    return (size_t)(ts_panel_count(n_rows) * TS_PANEL * n_cols) * ts_dtype_bytes(dtype);
}

static ts_status cpu_upload_weight(ts_device *device, void *data, const void *host, int64_t n_rows, int64_t n_cols,
                                   ts_dtype dtype) {
    const size_t element = ts_dtype_bytes(dtype);
    for (int64_t n = 0; n < ts_panel_count(n_rows) * TS_PANEL; n++)
        for (int64_t k = 0; k < n_cols; k++) {
            char *to = (char *)data + (size_t)ts_panel_index(n, k, n_cols) * element;
            if (n < n_rows)
                memcpy(to, (const char *)host + (size_t)(n * n_cols + k) * element, element);
            else
                memset(to, 0, element);
        }
    return TS_OK;
}

static ts_status cpu_reserve_scratch(ts_device *device, size_t n_bytes) {
    ts_cpu_device *cpu = ts_cpu_device_of(device);
    if (n_bytes == device->scratch_bytes)
        return TS_OK;
    free(cpu->scratch);
    cpu->scratch = NULL;
    device->scratch_bytes = 0;
    if (n_bytes > 0 && posix_memalign(&cpu->scratch, 64, n_bytes) != 0) {
        cpu->scratch = NULL;
        return TS_FAIL(TS_ERR_MEMORY, "cpu: out of memory for %zu bytes of scratch; a smaller prefill chunk needs less",
                       n_bytes);
    }
    device->scratch_bytes = n_bytes;
    return TS_OK;
}

static const ts_device_backend cpu_backend = {
    .name = "cpu",
    .free = cpu_free,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .upload = cpu_copy,
    .download = cpu_copy,
    .copy = cpu_copy,
    .zero = cpu_zero,
    .synchronize = cpu_synchronize,
    .memory = cpu_memory,
    .reserve_scratch = cpu_reserve_scratch,
    .mark = cpu_mark,
    .elapsed = cpu_elapsed,
    .weight_bytes = cpu_weight_bytes,
    .upload_weight = cpu_upload_weight,
};

static const ts_ops *widest_ops(void) {
#ifdef TS_CPU_X86_64
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        return &ts_cpu_ops_v4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return &ts_cpu_ops_v3;
#endif
    return &ts_cpu_ops_baseline;
}

ts_status ts_cpu_device_create(int n_threads, ts_device **out) {
    ts_status status = TS_OK;
    ts_cpu_device *device = NULL;
    TS_CHECK(n_threads >= 1 && n_threads <= 4096, TS_ERR_INVALID, "cpu: %d threads; 1 to 4096 are allowed", n_threads);
    device = calloc(1, sizeof *device);
    TS_CHECK(device, TS_ERR_MEMORY, "cpu: out of memory");
    device->base.backend = &cpu_backend;
    device->base.ops = widest_ops();
    // OpenBLAS may round a row differently when more rows stand beside it.
    device->base.packs_prefill = false;
    device->base.compute_dtype = TS_F32;
    device->base.slot_dtype = TS_F32;
    device->n_threads = n_threads;
    // Each of our threads makes products of its own; OpenBLAS must not start more inside them.
    openblas_set_num_threads(1);
    *out = &device->base;
done:
    return status;
}

ts_status ts_cpu_device_scratch(ts_device *device, size_t n_bytes, void **out) {
    ts_status status = TS_OK;
    if (n_bytes > device->scratch_bytes)
        TS_TRY(cpu_reserve_scratch(device, n_bytes));
    *out = ts_cpu_device_of(device)->scratch;
done:
    return status;
}

ts_status ts_cpu_sgemm_rate(ts_device *device, int n, double *flops_per_second) {
    ts_status status = TS_OK;
    const size_t count = (size_t)n * (size_t)n;
    float *a = malloc(3 * count * sizeof *a);
    TS_CHECK(a, TS_ERR_MEMORY, "cpu: out of memory for three [%d, %d] matrices", n, n);
    for (size_t i = 0; i < 2 * count; i++)
        a[i] = (float)((i * 2654435761u >> 8) & 0xffff) / 65536.0f - 0.5f;
    double best = 0;
    openblas_set_num_threads(ts_cpu_device_of(device)->n_threads);
    for (int repeat = 0; repeat < 6; repeat++) {
        const double start = seconds_now();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, n, n, 1.0f, a, n, a + count, n, 0.0f, a + 2 * count, n);
        const double rate = 2.0 * n * n * n / (seconds_now() - start);
        best = rate > best ? rate : best;
    }
    openblas_set_num_threads(1);
    *flops_per_second = best;
done:
    free(a);
    return status;
}
