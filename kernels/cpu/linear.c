// y = activation(x w^T + bias), w in the dtype of its file.
//
// Few rows (decode) are bound by reading w: a kernel of our own reads it once, as stored, and every output is one dot
// product along K in one fixed order, so a row's bits do not depend on the rows beside it. Many rows (prefill) are
// bound by arithmetic: w is widened once into scratch and OpenBLAS does the product.
#include "kernels/cpu/isa.h"
#include "kernels/cpu/weight_row.h"

#include <cblas.h>

enum {
    BLAS_MIN_ROWS = 32, // fewer rows: the dot kernel
    ROWS_OF_X = 6,      // x rows and w rows whose products are accumulated together: 6 * 4 vectors in registers
    ROWS_OF_W = 4,
    BLOCK_OF_W = 32, // w rows a thread takes at a time: they stay in its cache while all x rows pass
};

// sums[j][i] = x[i] . w[j]. n_x, n_w and dtype are constants at every call, so the loops unroll.
TS_INLINE void dot_block(const float *x, int64_t x_stride, int n_x, const char *w, size_t w_row_bytes, int n_w,
                         int64_t K, ts_dtype dtype, float sums[ROWS_OF_W * 2][ROWS_OF_X]) {
    ts_vec acc[ROWS_OF_W * 2][ROWS_OF_X];
    for (int j = 0; j < n_w; j++)
        for (int i = 0; i < n_x; i++)
            acc[j][i] = (ts_vec){0};
    int64_t k = 0;
    for (; k + TS_LANES <= K; k += TS_LANES) {
        ts_vec xs[ROWS_OF_X];
#pragma GCC unroll 8
        for (int i = 0; i < n_x; i++)
            xs[i] = ts_vec_load(x + i * x_stride + k);
#pragma GCC unroll 8
        for (int j = 0; j < n_w; j++) {
            const ts_vec ws = ts_weight_load(w + (size_t)j * w_row_bytes, k, dtype);
#pragma GCC unroll 8
            for (int i = 0; i < n_x; i++)
                acc[j][i] += xs[i] * ws;
        }
    }
    for (int j = 0; j < n_w; j++)
        for (int i = 0; i < n_x; i++) {
            float sum = ts_vec_sum(acc[j][i]);
            for (int64_t tail = k; tail < K; tail++)
                sum += x[i * x_stride + tail] * ts_weight_at(w + (size_t)j * w_row_bytes, tail, dtype);
            sums[j][i] = sum;
        }
}

// Bias and activation of y[row, begin .. end), in the same vectors whatever the other rows are.
TS_INLINE void finish_row(const ts_linear_args *args, int64_t row, int64_t begin, int64_t end) {
    float *y = (float *)args->y.data + row * args->y.stride;
    if (args->bias) {
        const float *bias = args->bias->data;
#pragma omp simd
        for (int64_t j = begin; j < end; j++)
            y[j] += bias[j];
    }
    if (args->activation == TS_ACTIVATION_GELU_TANH) {
#pragma omp simd
        for (int64_t j = begin; j < end; j++)
            y[j] = ts_gelu_tanh(y[j]);
    }
}

// All x rows against w rows [begin, end).
TS_INLINE void dot_panel(const ts_linear_args *args, int64_t begin, int64_t end, ts_dtype dtype) {
    const ts_tensor *x = &args->x, *w = &args->w;
    const size_t row_bytes = (size_t)w->stride * ts_dtype_bytes(dtype);
    float sums[ROWS_OF_W * 2][ROWS_OF_X];
#define TS_DOT(N_X, N_W)                                                                                               \
    do {                                                                                                               \
        for (; j + (N_W) <= end; j += (N_W)) {                                                                         \
            dot_block(rows, x->stride, N_X, (const char *)w->data + (size_t)j * row_bytes, row_bytes, N_W, x->cols,    \
                      dtype, sums);                                                                                    \
            for (int q = 0; q < (N_W); q++)                                                                            \
                for (int p = 0; p < (N_X); p++)                                                                        \
                    ((float *)args->y.data)[(i + p) * args->y.stride + j + q] = sums[q][p];                            \
        }                                                                                                              \
    } while (0)
#define TS_DOT_ROWS(N_X)                                                                                               \
    case N_X:                                                                                                          \
        TS_DOT(N_X, ROWS_OF_W);                                                                                        \
        TS_DOT(N_X, 1);                                                                                                \
        break
    for (int64_t i = 0; i < x->rows; i += ROWS_OF_X) {
        const float *rows = (const float *)x->data + i * x->stride;
        int64_t j = begin;
        switch (x->rows - i < ROWS_OF_X ? x->rows - i : ROWS_OF_X) {
        case 1:
            TS_DOT(1, ROWS_OF_W * 2);
            TS_DOT(1, 1);
            break;
            TS_DOT_ROWS(2);
            TS_DOT_ROWS(3);
            TS_DOT_ROWS(4);
            TS_DOT_ROWS(5);
            TS_DOT_ROWS(6);
        }
        for (int64_t p = i; p < i + ROWS_OF_X && p < x->rows; p++)
            finish_row(args, p, begin, end);
    }
#undef TS_DOT_ROWS
#undef TS_DOT
}

static void linear_by_dots(const ts_linear_args *args, int n_threads) {
    const int64_t N = args->w.rows, work = N * args->w.cols * args->x.rows;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (work > 32768)
    for (int64_t begin = 0; begin < N; begin += BLOCK_OF_W) {
        const int64_t end = begin + BLOCK_OF_W < N ? begin + BLOCK_OF_W : N;
        switch (args->w.dtype) {
        case TS_BF16:
            dot_panel(args, begin, end, TS_BF16);
            break;
        case TS_F16:
            dot_panel(args, begin, end, TS_F16);
            break;
        default:
            dot_panel(args, begin, end, TS_F32);
        }
    }
}

static ts_status linear_by_blas(ts_device *device, const ts_linear_args *args, int n_threads) {
    ts_status status = TS_OK;
    const ts_tensor *x = &args->x, *w = &args->w, *y = &args->y;
    const float *wide = w->data;
    int64_t wide_stride = w->stride;
    if (w->dtype != TS_F32) {
        void *scratch;
        TS_TRY(ts_cpu_device_scratch(device, (size_t)w->rows * (size_t)w->cols * sizeof(float), &scratch));
        const size_t row_bytes = (size_t)w->stride * ts_dtype_bytes(w->dtype);
#pragma omp parallel for schedule(static) num_threads(n_threads)
        for (int64_t j = 0; j < w->rows; j++)
            ts_weight_row_widen((float *)scratch + j * w->cols, (const char *)w->data + (size_t)j * row_bytes, w->cols,
                                w->dtype);
        wide = scratch;
        wide_stride = w->cols;
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)x->rows, (blasint)w->rows, (blasint)x->cols, 1.0f,
                x->data, (blasint)x->stride, wide, (blasint)wide_stride, 0.0f, y->data, (blasint)y->stride);
    if (args->bias || args->activation != TS_ACTIVATION_NONE) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
        for (int64_t i = 0; i < y->rows; i++)
            finish_row(args, i, 0, y->cols);
    }
done:
    return status;
}

ts_status TS_ISA(linear)(ts_device *device, const ts_linear_args *args) {
    const int n_threads = ts_cpu_device_of(device)->n_threads;
    if (args->row_invariant || args->x.rows < BLAS_MIN_ROWS) {
        linear_by_dots(args, n_threads);
        return TS_OK;
    }
    return linear_by_blas(device, args, n_threads);
}
