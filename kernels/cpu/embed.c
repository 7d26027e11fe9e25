#include "kernels/cpu/isa.h"
#include "kernels/cpu/weight_row.h"

ts_status TS_ISA(embed)(ts_device *device, const ts_embed_args *args) {
    const ts_tensor *table = &args->table, *x = &args->x;
    const size_t row_bytes = (size_t)table->stride * ts_dtype_bytes(table->dtype);
    for (int64_t i = 0; i < x->rows; i++) {
        const int64_t row = args->tokens[i] - args->first_token;
        float *out = (float *)x->data + i * x->stride;
        if (row < 0 || row >= table->rows)
            memset(out, 0, (size_t)x->cols * sizeof *out);
        else
            ts_weight_row_widen(out, (const char *)table->data + (size_t)row * row_bytes, table->cols, table->dtype);
    }
    return TS_OK;
}
