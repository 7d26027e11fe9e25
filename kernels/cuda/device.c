// One GPU as a device: its memory, its stream, and the pinned stages between host and device.
#include "kernels/cuda/device.h"

#include <stdio.h>
#include <stdlib.h>

ts_status ts_cuda_status(cudaError_t error, const char *what) {
    if (error == cudaSuccess)
        return TS_OK;
    (void)cudaGetLastError(); // an error that a later call could repeat is answered here
    if (error == cudaErrorMemoryAllocation)
        return TS_FAIL(TS_ERR_MEMORY, "cuda: %s: out of device memory", what);
    return TS_FAIL(TS_ERR_DEVICE, "cuda: %s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

ts_status ts_cuda_blas_status(cublasStatus_t error, const char *what) {
    if (error == CUBLAS_STATUS_SUCCESS)
        return TS_OK;
    return TS_FAIL(TS_ERR_DEVICE, "cuda: %s: %s", what, cublasLtGetStatusString(error));
}

ts_status ts_cuda_check_activation(const ts_tensor *tensor, const char *what) {
    if (tensor->dtype == TS_F32 || tensor->dtype == TS_BF16)
        return TS_OK;
    return TS_FAIL(TS_ERR_UNSUPPORTED, "cuda: %s is %s; activations may be F32 or BF16", what,
                   ts_dtype_name(tensor->dtype));
}

static void device_free(ts_device *base) {
    ts_cuda_device *device = ts_cuda_device_of(base);
    if (device->stream)
        (void)cudaStreamSynchronize(device->stream);
    if (device->blas)
        (void)cublasLtDestroy(device->blas);
    (void)cudaFree(device->blas_workspace);
    (void)cudaFree(device->scratch);
    (void)cudaFreeHost(device->stages);
    for (int i = 0; i < TS_CUDA_N_STAGES; i++)
        if (device->stage_events[i])
            (void)cudaEventDestroy(device->stage_events[i]);
    for (int i = 0; i < 2; i++)
        if (device->marks[i])
            (void)cudaEventDestroy(device->marks[i]);
    if (device->stream)
        (void)cudaStreamDestroy(device->stream);
    free(device->linear_plans);
    free(device);
}

static ts_status device_alloc(ts_device *device, size_t n_bytes, void **out) {
    ts_status status = TS_OK;
    void *data = NULL;
    const cudaError_t error = cudaMalloc(&data, n_bytes);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return TS_ERR_MEMORY; // the caller knows what the memory was for
    }
    TS_CUDA_TRY(error);
    TS_CUDA_TRY(cudaMemsetAsync(data, 0, n_bytes, ts_cuda_device_of(device)->stream));
    *out = data;
    data = NULL;
done:
    (void)cudaFree(data);
    return status;
}

static void device_release(ts_device *device, void *data) {
    (void)cudaStreamSynchronize(ts_cuda_device_of(device)->stream);
    (void)cudaFree(data);
}

// The next stage, once what last passed through it has left.
static ts_status take_stage(ts_cuda_device *device, int *stage) {
    ts_status status = TS_OK;
    TS_CUDA_TRY(cudaEventSynchronize(device->stage_events[device->next_stage]));
    *stage = device->next_stage;
    device->next_stage = (device->next_stage + 1) % TS_CUDA_N_STAGES;
done:
    return status;
}

static ts_status device_upload(ts_device *base, void *data, const void *host, size_t n_bytes) {
    ts_status status = TS_OK;
    ts_cuda_device *device = ts_cuda_device_of(base);
    for (size_t at = 0; at < n_bytes; at += TS_CUDA_STAGE_BYTES) {
        const size_t n = n_bytes - at < TS_CUDA_STAGE_BYTES ? n_bytes - at : TS_CUDA_STAGE_BYTES;
        int stage;
        TS_TRY(take_stage(device, &stage));
        char *pinned = device->stages + (size_t)stage * TS_CUDA_STAGE_BYTES;
        memcpy(pinned, (const char *)host + at, n);
        TS_CUDA_TRY(cudaMemcpyAsync((char *)data + at, pinned, n, cudaMemcpyHostToDevice, device->stream));
        TS_CUDA_TRY(cudaEventRecord(device->stage_events[stage], device->stream));
    }
done:
    return status;
}

static ts_status device_download(ts_device *base, void *host, const void *data, size_t n_bytes) {
    ts_status status = TS_OK;
    ts_cuda_device *device = ts_cuda_device_of(base);
    // A round: as many chunks as there are stages in flight, then each is copied out as it arrives.
    for (size_t round = 0; round < n_bytes; round += (size_t)TS_CUDA_N_STAGES * TS_CUDA_STAGE_BYTES) {
        int stages[TS_CUDA_N_STAGES], n_stages = 0;
        for (size_t at = round; at < n_bytes && n_stages < TS_CUDA_N_STAGES; at += TS_CUDA_STAGE_BYTES) {
            const size_t n = n_bytes - at < TS_CUDA_STAGE_BYTES ? n_bytes - at : TS_CUDA_STAGE_BYTES;
            int stage;
            TS_TRY(take_stage(device, &stage));
            TS_CUDA_TRY(cudaMemcpyAsync(device->stages + (size_t)stage * TS_CUDA_STAGE_BYTES, (const char *)data + at,
                                        n, cudaMemcpyDeviceToHost, device->stream));
            TS_CUDA_TRY(cudaEventRecord(device->stage_events[stage], device->stream));
            stages[n_stages++] = stage;
        }
        for (int i = 0; i < n_stages; i++) {
            const size_t at = round + (size_t)i * TS_CUDA_STAGE_BYTES;
            const size_t n = n_bytes - at < TS_CUDA_STAGE_BYTES ? n_bytes - at : TS_CUDA_STAGE_BYTES;
            TS_CUDA_TRY(cudaEventSynchronize(device->stage_events[stages[i]]));
            memcpy((char *)host + at, device->stages + (size_t)stages[i] * TS_CUDA_STAGE_BYTES, n);
        }
    }
done:
    return status;
}

static ts_status device_copy(ts_device *device, void *to, const void *from, size_t n_bytes) {
    return ts_cuda_status(
        cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToDevice, ts_cuda_device_of(device)->stream), "copy");
}

static ts_status device_zero(ts_device *device, void *data, size_t n_bytes) {
    return ts_cuda_status(cudaMemsetAsync(data, 0, n_bytes, ts_cuda_device_of(device)->stream), "zero");
}

static ts_status device_synchronize(ts_device *device) {
    return ts_cuda_status(cudaStreamSynchronize(ts_cuda_device_of(device)->stream), "work enqueued before");
}

static ts_status device_memory(ts_device *device, size_t *free_bytes, size_t *total_bytes) {
    return ts_cuda_status(cudaMemGetInfo(free_bytes, total_bytes), "memory");
}

struct ts_device_graph {
    cudaGraphExec_t executable;
    const void *scratch; // the device's, which its kernels may use
};

static ts_status capture_begin(ts_device *device) {
    return ts_cuda_status(cudaStreamBeginCapture(ts_cuda_device_of(device)->stream, cudaStreamCaptureModeThreadLocal),
                          "recording of a graph");
}

static void graph_free(ts_device_graph *graph) {
    if (graph->executable)
        (void)cudaGraphExecDestroy(graph->executable);
    free(graph);
}

static ts_status capture_end(ts_device *base, ts_device_graph **out) {
    ts_status status = TS_OK;
    ts_cuda_device *device = ts_cuda_device_of(base);
    cudaGraph_t recorded = NULL;
    ts_device_graph *graph = calloc(1, sizeof *graph);
    TS_CUDA_TRY(cudaStreamEndCapture(device->stream, &recorded));
    TS_CHECK(graph, TS_ERR_MEMORY, "cuda: out of memory for a graph");
    graph->scratch = device->scratch;
    TS_CUDA_TRY(cudaGraphInstantiate(&graph->executable, recorded, 0));
    TS_CUDA_TRY(cudaGraphUpload(graph->executable, device->stream));
    *out = graph;
    graph = NULL;
done:
    if (recorded)
        (void)cudaGraphDestroy(recorded);
    if (graph)
        graph_free(graph);
    return status;
}

static ts_status graph_launch(ts_device *device, ts_device_graph *graph) {
    return ts_cuda_status(cudaGraphLaunch(graph->executable, ts_cuda_device_of(device)->stream), "launch of a graph");
}

static bool graph_is_current(const ts_device *device, const ts_device_graph *graph) {
    return graph->scratch == ((const ts_cuda_device *)device)->scratch;
}

static ts_status device_mark(ts_device *device, int mark) {
    const ts_cuda_device *cuda = ts_cuda_device_of(device);
    return ts_cuda_status(cudaEventRecord(cuda->marks[mark], cuda->stream), "timer");
}

static ts_status device_elapsed(ts_device *device, double *seconds) {
    ts_status status = TS_OK;
    const ts_cuda_device *cuda = ts_cuda_device_of(device);
    float milliseconds;
    TS_CUDA_TRY(cudaEventSynchronize(cuda->marks[1]));
    TS_CUDA_TRY(cudaEventElapsedTime(&milliseconds, cuda->marks[0], cuda->marks[1]));
    *seconds = 1e-3 * (double)milliseconds;
done:
    return status;
}

static ts_status reserve_scratch(ts_device *base, size_t n_bytes) {
    ts_status status = TS_OK;
    ts_cuda_device *device = ts_cuda_device_of(base);
    cudaError_t error;
    if (n_bytes == base->scratch_bytes)
        goto done;
    TS_CUDA_TRY(cudaStreamSynchronize(device->stream));
    TS_CUDA_TRY(cudaFree(device->scratch));
    device->scratch = NULL;
    base->scratch_bytes = 0;
    error = n_bytes > 0 ? cudaMalloc(&device->scratch, n_bytes) : cudaSuccess;
    if (error == cudaErrorMemoryAllocation)
        (void)cudaGetLastError();
    TS_CHECK(error != cudaErrorMemoryAllocation, TS_ERR_MEMORY,
             "cuda: out of memory for %zu bytes of scratch; a smaller prefill chunk needs less", n_bytes);
    TS_CUDA_TRY(error);
    base->scratch_bytes = n_bytes;
done:
    return status;
}

static const ts_device_backend cuda_backend = {
    .name = "cuda",
    .free = device_free,
    .alloc = device_alloc,
    .release = device_release,
    .upload = device_upload,
    .download = device_download,
    .copy = device_copy,
    .zero = device_zero,
    .synchronize = device_synchronize,
    .memory = device_memory,
    .reserve_scratch = reserve_scratch,
    .capture_begin = capture_begin,
    .capture_end = capture_end,
    .graph_launch = graph_launch,
    .graph_is_current = graph_is_current,
    .graph_free = graph_free,
    .mark = device_mark,
    .elapsed = device_elapsed,
};

int ts_cuda_device_count(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return n;
}

const char *ts_cuda_device_name(const ts_device *device) {
    return ((const ts_cuda_device *)device)->name;
}

ts_status ts_cuda_device_create(int ordinal, ts_dtype compute_dtype, int capability, ts_device **out) {
    ts_status status = TS_OK;
    struct cudaDeviceProp properties;
    ts_cuda_device *device = NULL;
    int n_devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&n_devices);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        n_devices = 0;
    }
    TS_CHECK(n_devices > 0, TS_ERR_UNSUPPORTED, "cuda: no GPU is visible to this process (%s)",
             error != cudaSuccess ? cudaGetErrorString(error) : "the driver lists none");
    TS_CHECK(ordinal >= 0 && ordinal < n_devices, TS_ERR_INVALID, "cuda: GPU %d; 0 to %d are visible", ordinal,
             n_devices - 1);
    TS_CHECK(compute_dtype == TS_BF16 || compute_dtype == TS_F32, TS_ERR_INVALID,
             "cuda: activations of %s; BF16 and F32 are allowed", ts_dtype_name(compute_dtype));
    TS_CHECK(capability == 0 || capability == 80, TS_ERR_INVALID,
             "cuda: kernels of capability %d; 80, or 0 for the GPU's own, are allowed", capability);
    TS_CUDA_TRY(cudaGetDeviceProperties(&properties, ordinal));
    TS_CHECK(properties.major >= 8, TS_ERR_UNSUPPORTED,
             "cuda: GPU %d (%s) has compute capability %d.%d; 8.0 or newer is needed", ordinal, properties.name,
             properties.major, properties.minor);
    TS_CUDA_TRY(cudaSetDevice(ordinal));
    device = calloc(1, sizeof *device);
    TS_CHECK(device, TS_ERR_MEMORY, "cuda: out of memory");
    device->base.backend = &cuda_backend;
    device->base.ops = &ts_cuda_ops;
    device->base.packs_prefill = true; // every op computes a row alike whatever rows stand beside it
    device->base.compute_dtype = compute_dtype;
    device->base.slot_dtype = compute_dtype;
    device->ordinal = ordinal;
    TS_TRY(ts_cuda_attention_dense_plan_create(&device->dense_plan));
    if (capability != 0)
        device->dense_plan.capability = capability;
    snprintf(device->name, sizeof device->name, "%s", properties.name);
    TS_CUDA_TRY(cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking));
    TS_CUDA_TRY(cudaMallocHost((void **)&device->stages, (size_t)TS_CUDA_N_STAGES * TS_CUDA_STAGE_BYTES));
    for (int i = 0; i < TS_CUDA_N_STAGES; i++)
        TS_CUDA_TRY(cudaEventCreateWithFlags(&device->stage_events[i], cudaEventDisableTiming));
    for (int i = 0; i < 2; i++)
        TS_CUDA_TRY(cudaEventCreate(&device->marks[i]));
    TS_BLAS_TRY(cublasLtCreate(&device->blas));
    TS_CUDA_TRY(cudaMalloc(&device->blas_workspace, TS_CUDA_BLAS_BYTES));
    *out = &device->base;
    device = NULL;
done:
    if (device)
        device_free(&device->base);
    return status;
}

ts_status ts_cuda_device_scratch(ts_device *device, size_t n_bytes, void **out) {
    ts_status status = TS_OK;
    if (n_bytes > device->scratch_bytes)
        TS_TRY(reserve_scratch(device, n_bytes));
    *out = ts_cuda_device_of(device)->scratch;
done:
    return status;
}
