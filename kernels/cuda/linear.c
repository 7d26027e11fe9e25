// y = activation(x w^T + bias) by cuBLASLt, which sees columns where we see rows: y^T [N, M] = w [N, K] x^T [K, M].
//
// F32 activations are multiplied in full f32 (no tf32): that mode is for validation. Weights in another dtype than the
// activations are converted into scratch at each call; a model that runs in BF16 has its matrices in BF16 already.
#include "kernels/cuda/linear.h"

#include <stdlib.h>

// The batches that algorithms are chosen for. A decode batch is multiplied FEW_ROWS rows at a time: an algorithm that
// splits K in a fixed number of parts needs workspace for the rows, and here it always has it.
enum { FEW_ROWS = 256, MANY_ROWS = 4096 };

typedef struct product {
    cublasLtMatmulDesc_t description;
    cublasLtMatmulDescOpaque_t description_memory;
    cublasLtMatrixLayoutOpaque_t w, x, y;
} product;

static cudaDataType_t type_of(ts_dtype dtype) {
    return dtype == TS_F32 ? CUDA_R_32F : dtype == TS_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

static int32_t alignment_of(const void *data, int64_t stride, ts_dtype dtype) {
    const uintptr_t bits = (uintptr_t)data | (uintptr_t)stride * ts_dtype_bytes(dtype) | 256;
    return (int32_t)(bits & (~bits + 1));
}

// The operands as cuBLASLt is to have them: w and bias in a dtype it multiplies.
typedef struct operands {
    ts_tensor w;
    const void *bias; // of y's dtype; NULL without
    cublasLtEpilogue_t epilogue;
} operands;

static ts_status describe(const ts_linear_args *args, const operands *in, int64_t rows, product *out) {
    ts_status status = TS_OK;
    const cublasOperation_t transpose = CUBLAS_OP_T;
    const ts_tensor w = in->w;
    const cublasLtEpilogue_t epilogue = in->epilogue;
    const uint64_t n = (uint64_t)w.rows, k = (uint64_t)w.cols, m = (uint64_t)rows;
    out->description = &out->description_memory;
    TS_BLAS_TRY(cublasLtMatmulDescInit(out->description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    TS_BLAS_TRY(
        cublasLtMatmulDescSetAttribute(out->description, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose));
    TS_BLAS_TRY(
        cublasLtMatmulDescSetAttribute(out->description, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (epilogue & CUBLASLT_EPILOGUE_BIAS) {
        const cudaDataType_t type = type_of(args->y.dtype);
        TS_BLAS_TRY(cublasLtMatmulDescSetAttribute(out->description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &in->bias,
                                                   sizeof in->bias));
        TS_BLAS_TRY(
            cublasLtMatmulDescSetAttribute(out->description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type));
    }
    TS_BLAS_TRY(cublasLtMatrixLayoutInit(&out->w, type_of(w.dtype), k, n, w.stride));
    TS_BLAS_TRY(cublasLtMatrixLayoutInit(&out->x, type_of(args->x.dtype), k, m, args->x.stride));
    TS_BLAS_TRY(cublasLtMatrixLayoutInit(&out->y, type_of(args->y.dtype), n, m, args->y.stride));
done:
    return status;
}

static ts_status choose(ts_cuda_device *device, const ts_linear_args *args, const operands *in,
                        ts_cuda_linear_plan *plan) {
    ts_status status = TS_OK;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t result;
    product p;
    int n_found = 0;
    // Prefill has rows enough to fill the device. Decode may split K: the parts are as many in every batch, stand in
    // workspace in f32, and are added in one order.
    const uint32_t reduction =
        plan->key.few_rows ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE;
    const uint32_t alignment = (uint32_t)plan->key.alignment;
    const uint64_t workspace_bytes = TS_CUDA_BLAS_BYTES;
    TS_TRY(describe(args, in, plan->key.few_rows ? FEW_ROWS : MANY_ROWS, &p));
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
                                                                &preference, 1, &result, &n_found);
    if (found == CUBLAS_STATUS_SUCCESS && n_found == 1 && result.state == CUBLAS_STATUS_SUCCESS) {
        plan->algorithm = result.algo;
        plan->exists = true;
    } else if (found != CUBLAS_STATUS_SUCCESS && found != CUBLAS_STATUS_NOT_SUPPORTED) {
        TS_BLAS_TRY(found);
    }
done:
    return status;
}

// The plan for this product, chosen at its first use and kept.
static ts_status find_plan(ts_cuda_device *device, const ts_linear_args *args, const operands *in,
                           const ts_cuda_linear_plan **out) {
    ts_status status = TS_OK;
    const ts_tensor w = in->w;
    int32_t alignment = alignment_of(w.data, w.stride, w.dtype);
    const int32_t of_x = alignment_of(args->x.data, args->x.stride, args->x.dtype);
    const int32_t of_y = alignment_of(args->y.data, args->y.stride, args->y.dtype);
    alignment = of_x < alignment ? of_x : alignment;
    alignment = of_y < alignment ? of_y : alignment;
    const ts_cuda_linear_key key = {
        .n = w.rows,
        .k = w.cols,
        .x_stride = args->x.stride,
        .w_stride = w.stride,
        .y_stride = args->y.stride,
        .x_dtype = (int32_t)args->x.dtype,
        .y_dtype = (int32_t)args->y.dtype,
        .epilogue = (int32_t)in->epilogue,
        .few_rows = args->row_invariant,
        .alignment = alignment < 16 ? alignment : 16,
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
    TS_TRY(choose(device, args, in, plan));
    device->n_linear_plans++;
    *out = plan;
done:
    return status;
}

// Weights and bias in scratch where they are not of the dtype that is multiplied.
static ts_status convert(ts_device *base, const ts_linear_args *args, operands *in) {
    ts_status status = TS_OK;
    cudaStream_t stream = ts_cuda_device_of(base)->stream;
    const bool converts_w = args->w.dtype != args->x.dtype;
    const bool converts_bias = args->bias && args->y.dtype != TS_F32;
    const size_t w_bytes =
        converts_w ? ((size_t)(args->w.rows * args->w.cols) * ts_dtype_bytes(args->x.dtype) + 255) / 256 * 256 : 0;
    const size_t bias_bytes = converts_bias ? (size_t)args->w.rows * ts_dtype_bytes(args->y.dtype) : 0;
    char *scratch = NULL;
    in->w = args->w;
    in->bias = args->bias ? args->bias->data : NULL;
    if (converts_w || converts_bias) {
        void *memory;
        TS_TRY(ts_cuda_device_scratch(base, w_bytes + bias_bytes, &memory));
        scratch = memory;
    }
    if (converts_w) {
        TS_TRY(ts_cuda_linear_convert(stream, &args->w, scratch, args->x.dtype));
        in->w = ts_tensor_of(scratch, args->x.dtype, args->w.rows, args->w.cols);
    }
    if (converts_bias) {
        TS_TRY(ts_cuda_linear_convert(stream, args->bias, scratch + w_bytes, args->y.dtype));
        in->bias = scratch + w_bytes;
    }
done:
    return status;
}

ts_status ts_cuda_linear(ts_device *base, const ts_linear_args *args) {
    ts_status status = TS_OK;
    ts_cuda_device *device = ts_cuda_device_of(base);
    const ts_cuda_linear_plan *plan;
    const float one = 1.0f, zero = 0.0f;
    // cuBLASLt's gelu is an approximation of a few 1e-6: below BF16's rounding, above F32's.
    const bool gelu = args->activation == TS_ACTIVATION_GELU_TANH, fuses = !gelu || args->y.dtype != TS_F32;
    operands in;
    TS_TRY(ts_cuda_check_activation(&args->x, "linear: x"));
    TS_TRY(ts_cuda_check_activation(&args->y, "linear: y"));
    if (args->x.rows == 0)
        goto done;
    TS_TRY(convert(base, args, &in));
    in.epilogue = !fuses               ? CUBLASLT_EPILOGUE_DEFAULT
                  : args->bias && gelu ? CUBLASLT_EPILOGUE_GELU_BIAS
                  : args->bias         ? CUBLASLT_EPILOGUE_BIAS
                  : gelu               ? CUBLASLT_EPILOGUE_GELU
                                       : CUBLASLT_EPILOGUE_DEFAULT;
    TS_TRY(find_plan(device, args, &in, &plan));
    if (!plan->exists && in.epilogue != CUBLASLT_EPILOGUE_DEFAULT) {
        in.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
        TS_TRY(find_plan(device, args, &in, &plan));
    }
    TS_CHECK(plan->exists, TS_ERR_UNSUPPORTED,
             "cuda: linear: cuBLASLt has no product of x [M, %lld] %s by w [%lld, %lld] with operands aligned to %d "
             "bytes",
             (long long)in.w.cols, ts_dtype_name(args->x.dtype), (long long)in.w.rows, (long long)in.w.cols,
             plan->key.alignment);
    const int64_t step = args->row_invariant ? FEW_ROWS : args->x.rows;
    for (int64_t first = 0; first < args->x.rows; first += step) {
        const int64_t rows = args->x.rows - first < step ? args->x.rows - first : step;
        const ts_tensor x = ts_tensor_rows(args->x, first, rows), y = ts_tensor_rows(args->y, first, rows);
        product p;
        TS_TRY(describe(args, &in, rows, &p));
        TS_BLAS_TRY(cublasLtMatmul(device->blas, p.description, &one, in.w.data, &p.w, x.data, &p.x, &zero, y.data,
                                   &p.y, y.data, &p.y, &plan->algorithm, device->blas_workspace, TS_CUDA_BLAS_BYTES,
                                   device->stream));
    }
    if (in.epilogue == CUBLASLT_EPILOGUE_DEFAULT && (args->bias || gelu))
        TS_TRY(ts_cuda_linear_finish(device->stream, &args->y, args->bias, args->activation));
done:
    return status;
}
