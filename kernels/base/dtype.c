#include "kernels/base/dtype.h"

static const struct {
    const char *name;
    size_t bytes;
} dtypes[TS_N_DTYPES] = {
    [TS_F32] = {"F32", 4}, [TS_BF16] = {"BF16", 2}, [TS_F16] = {"F16", 2}, [TS_F64] = {"F64", 8},
    [TS_I32] = {"I32", 4}, [TS_I64] = {"I64", 8},   [TS_U8] = {"U8", 1},   [TS_FP8_E4M3] = {"F8_E4M3", 1},
};

size_t ts_dtype_bytes(ts_dtype dtype) {
    return dtypes[dtype].bytes;
}

const char *ts_dtype_name(ts_dtype dtype) {
    return dtypes[dtype].name;
}

bool ts_dtype_parse(const char *name, size_t name_length, ts_dtype *out) {
    for (int i = 0; i < TS_N_DTYPES; i++) {
        if (strlen(dtypes[i].name) == name_length && memcmp(dtypes[i].name, name, name_length) == 0) {
            *out = (ts_dtype)i;
            return true;
        }
    }
    return false;
}
