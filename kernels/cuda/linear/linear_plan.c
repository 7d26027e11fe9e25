// Which algorithm of cuBLASLt a product runs on, chosen at its first use and kept.
//
// Prefill takes what cuBLASLt thinks best. In decode a row's bits must not depend on the batch (I3), nor on
// what a clock says: what cuBLASLt thinks best for FEW_ROWS rows is the reference, and any other algorithm may stand in
// for it that gives the same bits. Most do, as they differ in the shape of their tiles but not in the order in which a
// sum's terms are added. The first use times those for several numbers of rows, so timing decides speed alone.
#include "kernels/cuda/linear/linear.h"

#include <math.h>
#include <stdlib.h>

// Prefill is planned for MANY_ROWS. FEW_ROWS is what a decode batch is multiplied by at most at a time.
enum { MANY_ROWS = 4096, FEW_ROWS = TS_CUDA_LINEAR_FEW_ROWS };

enum {
    MAX_CANDIDATES = 16,     // for each number of rows
    N_TIMINGS = 5,           // of each, odd: the median counts
    CHECKED_ROWS = 32,       // whose bits are compared
    FLUSH_BYTES = 128 << 20, // more than an L2 holds: weights are not in there when a step comes to them
};

// cuBLASLt's view of a product: its matrices have columns where ours have rows.
typedef struct product {
    cublasLtMatmulDesc_t description;
    cublasLtMatmulDescOpaque_t description_memory;
    cublasLtMatrixLayoutOpaque_t w, x, y;
} product;

static const int64_t class_rows[TS_CUDA_LINEAR_N_CLASSES] = {8, 32, 64, 128, FEW_ROWS};

static cudaDataType_t type_of(ts_dtype dtype) {
    return dtype == TS_F32 ? CUDA_R_32F : dtype == TS_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

static int32_t alignment_of(const ts_tensor *tensor) {
    const uintptr_t bits =
        (uintptr_t)tensor->data | (uintptr_t)tensor->stride * ts_dtype_bytes(tensor->dtype) | (uintptr_t)16;
    return (int32_t)(bits & (~bits + 1));
}

static int32_t smaller(int32_t a, int32_t b) {
    return a < b ? a : b;
}

static ts_status describe(const ts_cuda_linear_operands *in, product *out) {
    ts_status status = TS_OK;
    const cublasOperation_t transpose = CUBLAS_OP_T;
    const cublasLtEpilogue_t epilogue = in->epilogue;
    const uint64_t n = (uint64_t)in->w.rows, k = (uint64_t)in->w.cols, m = (uint64_t)in->x.rows;
    out->description = &out->description_memory;
    TS_BLAS_TRY(cublasLtMatmulDescInit(out->description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    TS_BLAS_TRY(
        cublasLtMatmulDescSetAttribute(out->description, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose));
    TS_BLAS_TRY(
        cublasLtMatmulDescSetAttribute(out->description, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (epilogue & CUBLASLT_EPILOGUE_BIAS) {
        const cudaDataType_t type = type_of(in->y.dtype);
        TS_BLAS_TRY(cublasLtMatmulDescSetAttribute(out->description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &in->bias,
                                                   sizeof in->bias));
        TS_BLAS_TRY(
            cublasLtMatmulDescSetAttribute(out->description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type));
    }
    TS_BLAS_TRY(cublasLtMatrixLayoutInit(&out->w, type_of(in->w.dtype), k, n, in->w.stride));
    TS_BLAS_TRY(cublasLtMatrixLayoutInit(&out->x, type_of(in->x.dtype), k, m, in->x.stride));
    TS_BLAS_TRY(cublasLtMatrixLayoutInit(&out->y, type_of(in->y.dtype), n, m, in->y.stride));
done:
    return status;
}

// *error: whether the algorithm runs.
static ts_status multiply(ts_cuda_device *device, const ts_cuda_linear_operands *in,
                          const cublasLtMatmulAlgo_t *algorithm, cublasStatus_t *error) {
    ts_status status = TS_OK;
    const float one = 1.0f, zero = 0.0f;
    product p;
    TS_TRY(describe(in, &p));
    *error =
        cublasLtMatmul(device->blas, p.description, &one, in->w.data, &p.w, in->x.data, &p.x, &zero, in->y.data, &p.y,
                       in->y.data, &p.y, algorithm, device->blas_workspace, TS_CUDA_BLAS_BYTES, device->stream);
done:
    return status;
}

// The algorithms that cuBLASLt proposes for in->x.rows rows, the most promising first.
static ts_status propose(ts_cuda_device *device, const ts_cuda_linear_operands *in, const ts_cuda_linear_key *key,
                         int most, cublasLtMatmulAlgo_t algorithms[], int *n) {
    ts_status status = TS_OK;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t results[MAX_CANDIDATES];
    product p;
    int n_found = 0;
    *n = 0;
    // Prefill has rows enough to fill the device. Decode may split K: the parts are as many in every batch, stand in
    // workspace in f32, and are added in one order.
    const uint32_t reduction = key->few_rows ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE;
    const uint32_t alignment = (uint32_t)key->alignment;
    const uint64_t workspace_bytes = TS_CUDA_BLAS_BYTES;
    TS_TRY(describe(in, &p));
    TS_BLAS_TRY(cublasLtMatmulPreferenceInit(&preference));
    TS_BLAS_TRY(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                     &workspace_bytes, sizeof workspace_bytes));
    TS_BLAS_TRY(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                     &reduction, sizeof reduction));
    const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; i++)
        TS_BLAS_TRY(cublasLtMatmulPreferenceSetAttribute(&preference, alignments[i], &alignment, sizeof alignment));
    const cublasStatus_t found = cublasLtMatmulAlgoGetHeuristic(device->blas, p.description, &p.w, &p.x, &p.y, &p.y,
                                                                &preference, most, results, &n_found);
    if (found != CUBLAS_STATUS_SUCCESS && found != CUBLAS_STATUS_NOT_SUPPORTED)
        TS_BLAS_TRY(found);
    for (int i = 0; found == CUBLAS_STATUS_SUCCESS && i < n_found; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS)
            algorithms[(*n)++] = results[i].algo;
done:
    return status;
}

// What timing a plan's candidates takes, for as long as it lasts.
typedef struct trial {
    // Drawn, such that the terms of every sum cancel but for what rounding leaves: there every order of adding shows,
    // which BF16 would otherwise round away. x and y of FEW_ROWS rows; no bias.
    ts_cuda_linear_operands in;
    ts_tensor expected;    // [CHECKED_ROWS, N] what the reference makes of them
    void *bias;            // [N] zero
    void *flush;           // [FLUSH_BYTES]
    uint32_t *n_different; // [1]
    cudaEvent_t begin, end;
} trial;

static void trial_free(trial *t) {
    (void)cudaFree(t->in.x.data);
    (void)cudaFree(t->in.w.data);
    (void)cudaFree(t->in.y.data);
    (void)cudaFree(t->expected.data);
    (void)cudaFree(t->bias);
    (void)cudaFree(t->flush);
    (void)cudaFree(t->n_different);
    if (t->begin)
        (void)cudaEventDestroy(t->begin);
    if (t->end)
        (void)cudaEventDestroy(t->end);
}

static ts_status allocate(ts_tensor *tensor, int64_t rows) {
    tensor->rows = rows;
    return ts_cuda_status(cudaMalloc(&tensor->data, (size_t)(rows * tensor->stride) * ts_dtype_bytes(tensor->dtype)),
                          "linear: choice of algorithms");
}

// TS_ERR_MEMORY where the device has none to spare: nothing is timed then.
static ts_status trial_create(ts_cuda_device *device, const ts_cuda_linear_operands *in, trial *t) {
    ts_status status = TS_OK;
    *t = (trial){.in = *in, .expected = in->y};
    t->in.x.data = t->in.w.data = t->in.y.data = t->expected.data = NULL;
    t->in.bias = NULL;
    const size_t bias_bytes = (size_t)in->w.rows * ts_dtype_bytes(in->y.dtype);
    TS_TRY(allocate(&t->in.x, FEW_ROWS));
    TS_TRY(allocate(&t->in.w, in->w.rows));
    TS_TRY(allocate(&t->in.y, FEW_ROWS));
    TS_TRY(allocate(&t->expected, CHECKED_ROWS));
    TS_CUDA_TRY(cudaMalloc(&t->bias, bias_bytes));
    TS_CUDA_TRY(cudaMalloc(&t->flush, FLUSH_BYTES));
    TS_CUDA_TRY(cudaMalloc((void **)&t->n_different, sizeof *t->n_different));
    TS_CUDA_TRY(cudaEventCreate(&t->begin));
    TS_CUDA_TRY(cudaEventCreate(&t->end));
    TS_CUDA_TRY(cudaMemsetAsync(t->bias, 0, bias_bytes, device->stream));
    t->in.bias = in->bias ? t->bias : NULL;
    TS_TRY(ts_cuda_linear_draw(device->stream, &t->in.x, true));
    TS_TRY(ts_cuda_linear_draw(device->stream, &t->in.w, false));
done:
    return status;
}

static ts_cuda_linear_operands of_rows(const ts_cuda_linear_operands *in, int64_t rows) {
    ts_cuda_linear_operands out = *in;
    out.x.rows = out.y.rows = rows;
    return out;
}

static int compare_floats(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// *ms: the algorithm's time at in->x.rows rows, infinite where it does not run or gives other bits than expected.
static ts_status time_of(ts_cuda_device *device, trial *t, int64_t rows, const cublasLtMatmulAlgo_t *algorithm,
                         float *ms) {
    ts_status status = TS_OK;
    ts_cuda_linear_operands in = of_rows(&t->in, rows);
    cublasStatus_t error;
    float times[N_TIMINGS];
    uint32_t n_different;
    *ms = INFINITY;
    const ts_tensor got = ts_tensor_rows(in.y, 0, rows < CHECKED_ROWS ? rows : CHECKED_ROWS);
    TS_CUDA_TRY(
        cudaMemsetAsync(in.y.data, 0xff, (size_t)(rows * in.y.stride) * ts_dtype_bytes(in.y.dtype), device->stream));
    TS_TRY(multiply(device, &in, algorithm, &error));
    if (error != CUBLAS_STATUS_SUCCESS)
        goto done;
    TS_TRY(ts_cuda_linear_count_different(device->stream, &got, &t->expected, t->n_different));
    TS_TRY(ts_device_download(&device->base, &n_different, t->n_different, sizeof n_different));
    if (n_different > 0)
        goto done;
    for (int i = 0; i < N_TIMINGS; i++) {
        TS_CUDA_TRY(cudaMemsetAsync(t->flush, i, FLUSH_BYTES, device->stream));
        TS_CUDA_TRY(cudaEventRecord(t->begin, device->stream));
        TS_TRY(multiply(device, &in, algorithm, &error));
        TS_BLAS_TRY(error);
        TS_CUDA_TRY(cudaEventRecord(t->end, device->stream));
        TS_CUDA_TRY(cudaEventSynchronize(t->end));
        TS_CUDA_TRY(cudaEventElapsedTime(&times[i], t->begin, t->end));
    }
    qsort(times, N_TIMINGS, sizeof *times, compare_floats);
    *ms = times[N_TIMINGS / 2];
done:
    return status;
}

// For every class of row counts the fastest algorithm that gives the reference's bits.
static ts_status choose_fastest(ts_cuda_device *device, const ts_cuda_linear_operands *in, ts_cuda_linear_plan *plan) {
    ts_status status = TS_OK;
    cublasLtMatmulAlgo_t candidates[MAX_CANDIDATES];
    cublasStatus_t error;
    trial t = {0};
    TS_TRY(trial_create(device, in, &t));
    ts_cuda_linear_operands expected = of_rows(&t.in, CHECKED_ROWS);
    expected.y = t.expected;
    TS_TRY(multiply(device, &expected, &plan->reference, &error));
    TS_BLAS_TRY(error);
    for (int c = 0; c < TS_CUDA_LINEAR_N_CLASSES; c++) {
        const ts_cuda_linear_operands of_class = of_rows(&t.in, class_rows[c]);
        float best, ms;
        int n;
        TS_TRY(time_of(device, &t, class_rows[c], &plan->reference, &best));
        TS_TRY(propose(device, &of_class, &plan->key, MAX_CANDIDATES, candidates, &n));
        for (int i = 0; i < n; i++) {
            TS_TRY(time_of(device, &t, class_rows[c], &candidates[i], &ms));
            if (ms < best) {
                best = ms;
                plan->algorithms[c] = candidates[i];
            }
        }
    }
done:
    trial_free(&t);
    return status;
}

static ts_status choose(ts_cuda_device *device, const ts_cuda_linear_operands *in, ts_cuda_linear_plan *plan) {
    ts_status status = TS_OK;
    const ts_cuda_linear_operands planned = of_rows(in, plan->key.few_rows ? FEW_ROWS : MANY_ROWS);
    int n;
    TS_TRY(propose(device, &planned, &plan->key, 1, &plan->reference, &n));
    plan->exists = n > 0;
    for (int c = 0; c < TS_CUDA_LINEAR_N_CLASSES; c++)
        plan->algorithms[c] = plan->reference;
    if (plan->exists && plan->key.few_rows && in->x.dtype == TS_BF16) { // F32 is for validation
        status = choose_fastest(device, in, plan);
        if (status == TS_ERR_MEMORY)
            status = TS_OK;
    }
done:
    return status;
}

ts_status ts_cuda_linear_find_plan(ts_cuda_device *device, const ts_cuda_linear_operands *in, bool few_rows,
                                   const ts_cuda_linear_plan **out) {
    ts_status status = TS_OK;
    const ts_cuda_linear_key key = {
        .n = in->w.rows,
        .k = in->w.cols,
        .x_stride = in->x.stride,
        .w_stride = in->w.stride,
        .y_stride = in->y.stride,
        .w_dtype = (int32_t)in->w.dtype,
        .y_dtype = (int32_t)in->y.dtype,
        .epilogue = (int32_t)in->epilogue,
        .few_rows = few_rows,
        .alignment = smaller(alignment_of(&in->w), smaller(alignment_of(&in->x), alignment_of(&in->y))),
    };
    for (int i = 0; i < device->n_linear_plans; i++)
        if (memcmp(&device->linear_plans[i].key, &key, sizeof key) == 0) {
            *out = &device->linear_plans[i];
            goto done;
        }
    if (device->n_linear_plans == device->linear_plan_capacity) {
        const int capacity = device->linear_plan_capacity ? 2 * device->linear_plan_capacity : 32;
        ts_cuda_linear_plan *plans = realloc(device->linear_plans, (size_t)capacity * sizeof *plans);
        TS_CHECK(plans, TS_ERR_MEMORY, "cuda: linear: out of memory");
        device->linear_plans = plans;
        device->linear_plan_capacity = capacity;
    }
    ts_cuda_linear_plan *plan = &device->linear_plans[device->n_linear_plans];
    *plan = (ts_cuda_linear_plan){.key = key};
    TS_TRY(choose(device, in, plan));
    device->n_linear_plans++;
    *out = plan;
done:
    return status;
}

ts_status ts_cuda_linear_multiply(ts_cuda_device *device, const ts_cuda_linear_operands *in,
                                  const ts_cuda_linear_plan *plan) {
    ts_status status = TS_OK;
    cublasStatus_t error;
    int c = 0;
    while (plan->key.few_rows && class_rows[c] < in->x.rows)
        c++;
    TS_TRY(multiply(device, in, &plan->algorithms[c], &error));
    if (error == CUBLAS_STATUS_NOT_SUPPORTED) // for this number of rows of its class
        TS_TRY(multiply(device, in, &plan->reference, &error));
    TS_BLAS_TRY(error);
done:
    return status;
}
