#include "kernels/cpu/isa.h"
#include "kernels/cpu/panels.h"

ts_status TS_ISA(embed)(ts_device *device, const ts_embed_args *args) {
    const ts_tensor *table = &args->table, *x = &args->x;
    for (int64_t i = 0; i < x->rows; i++) {
        const int64_t row = args->tokens[i] - args->first_token;
        float *out = (float *)x->data + i * x->stride;
        if (row < 0 || row >= table->rows) {
            memset(out, 0, (size_t)x->cols * sizeof *out);
            continue;
        }
        for (int64_t k = 0; k < table->cols; k++)
            out[k] = ts_weight_at(table->data, ts_panel_index(row, k, table->cols), table->dtype);
    }
    return TS_OK;
}
