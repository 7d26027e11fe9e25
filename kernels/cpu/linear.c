// y = activation(x w^T + bias), w in panels and in the dtype of its file (panels.h).
//
// Few rows (decode) are bound by reading w: a kernel of our own reads it once, as stored; every output is one sum over
// k in rising order, so a row's bits do not depend on the rows beside it. Many rows (prefill) are bound by arithmetic:
// w is widened into scratch once and OpenBLAS does the product.
#include "kernels/cpu/isa.h"
#include "kernels/cpu/panels.h"

#include <cblas.h>

enum {
    BLAS_MIN_ROWS = 32, // fewer rows: our kernel
    BLAS_ROWS = 256,    // the block of y that one call of OpenBLAS makes
    BLAS_COLUMNS = 512,
    PANEL_VECS = TS_PANEL / TS_LANES, // vectors of one panel
    // Rows of x times panels whose sums are kept in registers together.
    BLOCK_ROWS = TS_LANES == 16  ? 8
                 : TS_LANES == 8 ? 6
                                 : 2,
    BLOCK_PANELS = TS_LANES == 16 ? 3 : 1,
    // One or two rows alone take more panels, to have enough independent sums in flight.
    SINGLE_PANELS = TS_LANES == 16  ? 8
                    : TS_LANES == 8 ? 4
                                    : 2,
    MAX_PANELS = SINGLE_PANELS,
};

// Sums of n_rows rows of x with n_panels panels, into y. Both are constants at every call, so the loops unroll.
TS_INLINE void product_block(const float *x, int64_t x_stride, int n_rows, const char *panels, size_t panel_bytes,
                             int n_panels, int64_t K, ts_dtype dtype, float *y, int64_t y_stride, int64_t n_columns) {
    ts_vec acc[BLOCK_ROWS][MAX_PANELS * PANEL_VECS];
    const int n_vecs = n_panels * PANEL_VECS;
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < n_vecs; j++)
            acc[i][j] = (ts_vec){0};
    for (int64_t k = 0; k < K; k++) {
        ts_vec w[MAX_PANELS * PANEL_VECS];
#pragma GCC unroll 16
        for (int j = 0; j < n_vecs; j++)
            w[j] = ts_weight_load(panels + (size_t)(j / PANEL_VECS) * panel_bytes,
                                  k * TS_PANEL + j % PANEL_VECS * TS_LANES, dtype);
        // The panels of the next block, into L2 while this one is being multiplied.
        for (int j = 0; j < n_panels && n_rows > 2; j++)
            __builtin_prefetch(
                panels + (size_t)(n_panels + j) * panel_bytes + (size_t)k * TS_PANEL * (dtype == TS_F32 ? 4 : 2), 0, 2);
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; i++) {
            const float xs = x[i * x_stride + k];
#pragma GCC unroll 16
            for (int j = 0; j < n_vecs; j++)
                acc[i][j] += xs * w[j];
        }
    }
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < n_vecs; j++) {
            const int64_t left = n_columns - j * TS_LANES;
            if (left >= TS_LANES)
                ts_vec_store(y + i * y_stride + j * TS_LANES, acc[i][j]);
            else if (left > 0)
                memcpy(y + i * y_stride + j * TS_LANES, &acc[i][j], (size_t)left * sizeof *y);
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

// All rows of x with panels [begin, end).
TS_INLINE void product_panels(const ts_linear_args *args, int64_t begin, int64_t end, ts_dtype dtype) {
    const ts_tensor *x = &args->x, *w = &args->w, *y = &args->y;
    const size_t panel_bytes = (size_t)w->cols * TS_PANEL * ts_dtype_bytes(dtype);
#define TS_BLOCK(ROWS, PANELS)                                                                                         \
    for (; p + (PANELS) <= end; p += (PANELS))                                                                         \
    product_block((const float *)x->data + i * x->stride, x->stride, ROWS,                                             \
                  (const char *)w->data + (size_t)p * panel_bytes, panel_bytes, PANELS, w->cols, dtype,                \
                  (float *)y->data + i * y->stride + p * TS_PANEL, y->stride, w->rows - p * TS_PANEL)
#define TS_BLOCK_ROWS(ROWS)                                                                                            \
    case ROWS:                                                                                                         \
        TS_BLOCK(ROWS, BLOCK_PANELS);                                                                                  \
        TS_BLOCK(ROWS, 1);                                                                                             \
        break
    for (int64_t i = 0; i < x->rows; i += BLOCK_ROWS) {
        int64_t p = begin;
        switch (x->rows - i < BLOCK_ROWS ? x->rows - i : BLOCK_ROWS) {
        case 1:
            TS_BLOCK(1, SINGLE_PANELS);
            TS_BLOCK(1, 1);
            break;
            TS_BLOCK_ROWS(2);
#if TS_LANES >= 8
            TS_BLOCK_ROWS(3);
            TS_BLOCK_ROWS(4);
            TS_BLOCK_ROWS(5);
            TS_BLOCK_ROWS(6);
#endif
#if TS_LANES >= 16
            TS_BLOCK_ROWS(7);
            TS_BLOCK_ROWS(8);
#endif
        }
    }
#undef TS_BLOCK_ROWS
#undef TS_BLOCK
    for (int64_t i = 0; i < x->rows; i++)
        finish_row(args, i, begin * TS_PANEL, end * TS_PANEL < w->rows ? end * TS_PANEL : w->rows);
}

static void linear_by_panels(const ts_linear_args *args, int n_threads) {
    const int64_t n_panels = ts_panel_count(args->w.rows);
    // Panels a thread takes at a time: few enough to stay in its cache while all rows pass, and the same for every
    // thread.
    const int64_t share = (n_panels + n_threads - 1) / n_threads, n_steps = (share + 23) / 24;
    const int64_t step = (share + n_steps - 1) / n_steps;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (args->w.rows * args->w.cols * args->x.rows > 32768)
    for (int64_t begin = 0; begin < n_panels; begin += step) {
        const int64_t end = begin + step < n_panels ? begin + step : n_panels;
        switch (args->w.dtype) {
        case TS_BF16:
            product_panels(args, begin, end, TS_BF16);
            break;
        case TS_F16:
            product_panels(args, begin, end, TS_F16);
            break;
        default:
            product_panels(args, begin, end, TS_F32);
        }
    }
}

// Panels back to rows of k: wide[k, n], n padded to whole panels.
TS_INLINE void widen_panel(const ts_tensor *w, int64_t p, ts_dtype dtype, float *wide, int64_t stride) {
    const char *panel = (const char *)w->data + (size_t)(p * w->cols * TS_PANEL) * ts_dtype_bytes(dtype);
    for (int64_t k = 0; k < w->cols; k++)
        for (int v = 0; v < PANEL_VECS; v++)
            ts_vec_store(wide + k * stride + p * TS_PANEL + v * TS_LANES,
                         ts_weight_load(panel, k * TS_PANEL + v * TS_LANES, dtype));
}

static ts_status linear_by_blas(ts_device *device, const ts_linear_args *args, int n_threads) {
    ts_status status = TS_OK;
    const ts_tensor *x = &args->x, *w = &args->w, *y = &args->y;
    const int64_t n_panels = ts_panel_count(w->rows), stride = n_panels * TS_PANEL;
    void *wide;
    TS_TRY(ts_cpu_device_scratch(device, (size_t)stride * (size_t)w->cols * sizeof(float), &wide));
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (int64_t p = 0; p < n_panels; p++) {
        switch (w->dtype) {
        case TS_BF16:
            widen_panel(w, p, TS_BF16, wide, stride);
            break;
        case TS_F16:
            widen_panel(w, p, TS_F16, wide, stride);
            break;
        default:
            widen_panel(w, p, TS_F32, wide, stride);
        }
    }
    // Blocks of a fixed size, each by one thread: the bits do not depend on how many threads there are (I4).
    const int64_t n_row_blocks = (x->rows + BLAS_ROWS - 1) / BLAS_ROWS;
    const int64_t n_column_blocks = (w->rows + BLAS_COLUMNS - 1) / BLAS_COLUMNS;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(n_threads)
    for (int64_t i = 0; i < n_row_blocks; i++)
        for (int64_t j = 0; j < n_column_blocks; j++) {
            const int64_t row = i * BLAS_ROWS, column = j * BLAS_COLUMNS;
            const int64_t n_rows = x->rows - row < BLAS_ROWS ? x->rows - row : BLAS_ROWS;
            const int64_t n_columns = w->rows - column < BLAS_COLUMNS ? w->rows - column : BLAS_COLUMNS;
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)n_rows, (blasint)n_columns,
                        (blasint)x->cols, 1.0f, (const float *)x->data + row * x->stride, (blasint)x->stride,
                        (const float *)wide + column, (blasint)stride, 0.0f,
                        (float *)y->data + row * y->stride + column, (blasint)y->stride);
        }
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
        linear_by_panels(args, n_threads);
        return TS_OK;
    }
    return linear_by_blas(device, args, n_threads);
}
