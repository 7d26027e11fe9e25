// y = activation(x w^T + bias) by cuBLASLt, which sees columns where we see rows: y^T [N, M] = w [N, K] x^T [K, M]. The
// products of decode go to a kernel of our own where it applies (linear_few.cu).
//
// F32 activations are multiplied in full f32 (no tf32): that mode is for validation. Weights in another dtype than the
// activations are converted into scratch at each call; a model that runs in BF16 has its matrices in BF16 already.
#include "kernels/cuda/linear/linear.h"

// The weights in scratch where they are not of the dtype that is multiplied.
static ts_status convert(ts_device *base, const ts_linear_args *args, ts_tensor *w) {
    ts_status status = TS_OK;
    void *scratch;
    *w = args->w;
    if (args->w.dtype == args->x.dtype)
        goto done;
    TS_TRY(ts_cuda_device_scratch(base, (size_t)(w->rows * w->cols) * ts_dtype_bytes(args->x.dtype), &scratch));
    TS_TRY(ts_cuda_linear_convert(ts_cuda_device_of(base)->stream, &args->w, scratch, args->x.dtype));
    *w = ts_tensor_of(scratch, args->x.dtype, args->w.rows, args->w.cols);
done:
    return status;
}

ts_status ts_cuda_linear(ts_device *base, const ts_linear_args *args) {
    ts_status status = TS_OK;
    ts_cuda_device *device = ts_cuda_device_of(base);
    const ts_cuda_linear_plan *plan;
    // cuBLASLt's gelu is an approximation of a few 1e-6: below BF16's rounding, above F32's.
    const bool gelu = args->activation == TS_ACTIVATION_GELU_TANH, fuses = !gelu || args->y.dtype != TS_F32;
    ts_cuda_linear_operands in = {.x = args->x, .y = args->y, .bias = args->bias ? args->bias->data : NULL};
    TS_TRY(ts_cuda_check_activation(&args->x, "linear: x"));
    TS_TRY(ts_cuda_check_activation(&args->y, "linear: y"));
    if (args->x.rows == 0)
        goto done;
    TS_TRY(convert(base, args, &in.w));
    if (ts_cuda_linear_few_applies(device, args, &in.w)) {
        TS_TRY(ts_cuda_linear_few(device, args, &in.w, in.w.data == args->w.data));
        goto done;
    }
    TS_CHECK(!args->norm_behind && !args->norm_in_front, TS_ERR_UNSUPPORTED,
             "cuda: linear: no norm is fused into x [M, %lld] by w [%lld, %lld]", (long long)args->x.cols,
             (long long)in.w.rows, (long long)in.w.cols);
    in.epilogue = !fuses               ? CUBLASLT_EPILOGUE_DEFAULT
                  : args->bias && gelu ? CUBLASLT_EPILOGUE_GELU_BIAS
                  : args->bias         ? CUBLASLT_EPILOGUE_BIAS
                  : gelu               ? CUBLASLT_EPILOGUE_GELU
                                       : CUBLASLT_EPILOGUE_DEFAULT;
    TS_TRY(ts_cuda_linear_find_plan(device, &in, args->row_invariant, &plan));
    if (!plan->exists && in.epilogue != CUBLASLT_EPILOGUE_DEFAULT) {
        in.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
        TS_TRY(ts_cuda_linear_find_plan(device, &in, args->row_invariant, &plan));
    }
    TS_CHECK(plan->exists, TS_ERR_UNSUPPORTED,
             "cuda: linear: cuBLASLt has no product of x [M, %lld] %s by w [%lld, %lld] with operands aligned to %d "
             "bytes",
             (long long)in.w.cols, ts_dtype_name(args->x.dtype), (long long)in.w.rows, (long long)in.w.cols,
             plan->key.alignment);
    const int64_t step = args->row_invariant ? TS_CUDA_LINEAR_FEW_ROWS : args->x.rows;
    for (int64_t first = 0; first < args->x.rows; first += step) {
        const int64_t rows = args->x.rows - first < step ? args->x.rows - first : step;
        ts_cuda_linear_operands part = in;
        part.x = ts_tensor_rows(args->x, first, rows);
        part.y = ts_tensor_rows(args->y, first, rows);
        TS_TRY(ts_cuda_linear_multiply(device, &part, plan));
    }
    if (in.epilogue == CUBLASLT_EPILOGUE_DEFAULT && (args->bias || gelu))
        TS_TRY(ts_cuda_linear_finish(device->stream, &args->y, args->bias, args->activation));
done:
    return status;
}
