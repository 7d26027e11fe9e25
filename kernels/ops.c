// Argument checks shared by every backend, then dispatch through the device's table.
#include "kernels/ops.h"

#define TS_NEED(condition, op, allowed) TS_CHECK(condition, TS_ERR_INVALID, op ": " allowed)

#define TS_DISPATCH(op)                                                                                                \
    do {                                                                                                               \
        TS_CHECK(device->ops->op, TS_ERR_UNSUPPORTED, "%s: the backend has no op " #op, device->ops->name);            \
        TS_TRY(device->ops->op(device, args));                                                                         \
    } while (0)

static bool is_weight(ts_dtype dtype) {
    return dtype == TS_F32 || dtype == TS_BF16 || dtype == TS_F16;
}

#define SPANS_ALLOWED                                                                                                  \
    "the spans must cover the batch's rows in order, each with a sequence of 0 or more and a position of 0 or more; "  \
    "TS_PADDING at position 0 is allowed in decode, where every span has one token"

static bool batch_covers_rows(const ts_batch *batch) {
    int64_t row = 0;
    for (int32_t i = 0; i < batch->n_spans; i++) {
        const ts_span *span = &batch->spans[i];
        if (span->row != row || span->n_tokens < 1 || span->position < 0 || (batch->decode && span->n_tokens != 1))
            return false;
        if (span->sequence < 0 && (span->sequence != TS_PADDING || !batch->decode || span->position != 0))
            return false;
        row += span->n_tokens;
    }
    return row == batch->n_rows;
}

int64_t ts_batch_tiles_completed(const ts_batch *batch, int32_t tile_size) {
    int64_t n = 0;
    for (int32_t i = 0; i < batch->n_spans; i++)
        n += ts_span_tiles_completed(&batch->spans[i], tile_size);
    return n;
}

ts_status ts_op_embed(ts_device *device, const ts_embed_args *args) {
    ts_status status = TS_OK;
    TS_NEED(is_weight(args->table.dtype), "embed", "the table must be F32, BF16 or F16");
    TS_NEED(args->table.cols == args->x.cols, "embed", "table and x must have the same number of columns");
    TS_DISPATCH(embed);
done:
    return status;
}

ts_status ts_op_rms_norm(ts_device *device, const ts_rms_norm_args *args) {
    ts_status status = TS_OK;
    TS_NEED(args->weight.dtype == TS_F32 && args->weight.cols == args->x.cols, "rms_norm", "weight must be [1, D] F32");
    TS_NEED(args->h.rows == args->x.rows && args->h.cols == args->x.cols, "rms_norm", "h must have the shape of x");
    TS_NEED(!args->residual || (args->residual->rows == args->x.rows && args->residual->cols == args->x.cols),
            "rms_norm", "residual must have the shape of x");
    TS_DISPATCH(rms_norm);
done:
    return status;
}

static bool is_norm_of(const ts_fused_norm *norm, const ts_tensor *h) {
    return norm->stream.dtype == TS_F32 && norm->stream.rows == h->rows && norm->stream.cols == h->cols &&
           norm->weight.dtype == TS_F32 && norm->weight.cols == h->cols && norm->sums.dtype == TS_F32 &&
           norm->sums.rows == h->rows && norm->sums.cols * TS_NORM_COLUMNS == h->cols;
}

ts_status ts_op_linear(ts_device *device, const ts_linear_args *args) {
    ts_status status = TS_OK;
    TS_NEED(is_weight(args->w.dtype), "linear", "w must be F32, BF16 or F16");
    TS_CHECK(args->x.cols == args->w.cols && args->y.rows == args->x.rows && args->y.cols == args->w.rows,
             TS_ERR_INVALID,
             "linear: x [%lld, %lld], w [%lld, %lld], y [%lld, %lld] do not fit x [M, K] w [N, K] y [M, N]",
             (long long)args->x.rows, (long long)args->x.cols, (long long)args->w.rows, (long long)args->w.cols,
             (long long)args->y.rows, (long long)args->y.cols);
    TS_NEED(!args->bias || (args->bias->dtype == args->y.dtype && args->bias->cols == args->w.rows), "linear",
            "bias must be [1, N] of y's dtype");
    TS_NEED(!args->norm_behind || is_norm_of(args->norm_behind, &args->y), "linear",
            "the norm behind must have stream [M, N], weight [1, N] and sums [M, N / 16], F32");
    TS_NEED(!args->norm_behind || (!args->bias && args->activation == TS_ACTIVATION_NONE && !args->norm_in_front),
            "linear", "a norm behind stands beside no bias, activation or norm in front");
    TS_NEED(!args->norm_in_front || is_norm_of(args->norm_in_front, &args->x), "linear",
            "the norm in front must have stream [M, K], weight [1, K] and sums [M, K / 16], F32");
    TS_CHECK((!args->norm_behind && !args->norm_in_front) || (device->ops->fuses_norm && args->row_invariant),
             TS_ERR_UNSUPPORTED,
             "%s: linear: norms are fused into row-invariant products, where ts_op_fuses_norm says so",
             device->ops->name);
    TS_DISPATCH(linear);
done:
    return status;
}

bool ts_op_fuses_norm(const ts_device *device, const ts_tensor *front_w, const ts_tensor *behind_w) {
    return device->ops->fuses_norm && device->ops->fuses_norm(device, front_w, behind_w);
}

ts_status ts_op_swiglu(ts_device *device, const ts_swiglu_args *args) {
    ts_status status = TS_OK;
    TS_NEED(args->gate_up.cols == 2 * args->y.cols && args->gate_up.rows == args->y.rows, "swiglu",
            "gate_up must be [M, 2 F] for y [M, F]");
    TS_DISPATCH(swiglu);
done:
    return status;
}

ts_status ts_op_gather_rows(ts_device *device, const ts_gather_rows_args *args) {
    ts_status status = TS_OK;
    TS_NEED(args->x.cols == args->y.cols && args->x.dtype == args->y.dtype, "gather_rows",
            "x and y must agree in columns and dtype");
    for (int64_t i = 0; i < args->y.rows; i++)
        TS_CHECK(args->rows[i] >= 0 && args->rows[i] < args->x.rows, TS_ERR_INVALID,
                 "gather_rows: row %lld is outside 0 to %lld", (long long)args->rows[i], (long long)args->x.rows - 1);
    TS_DISPATCH(gather_rows);
done:
    return status;
}

ts_status ts_op_tile_importance(ts_device *device, const ts_tile_importance_args *args) {
    ts_status status = TS_OK;
    TS_NEED(batch_covers_rows(args->batch), "tile_importance", SPANS_ALLOWED);
    TS_DISPATCH(tile_importance);
done:
    return status;
}

ts_status ts_op_tile_prune(ts_device *device, const ts_tile_prune_args *args) {
    ts_status status = TS_OK;
    TS_NEED(batch_covers_rows(args->batch), "tile_prune", SPANS_ALLOWED);
    TS_DISPATCH(tile_prune);
done:
    return status;
}

ts_status ts_op_attention(ts_device *device, const ts_attention_args *args) {
    ts_status status = TS_OK;
    const ts_tile_cache_layer *cache = args->cache;
    const int64_t d = cache->head_dim, n_heads = cache->n_heads, n_kv_heads = cache->n_kv_heads;
    TS_NEED(d == 64 || d == 128, "attention", "head_dim must be 64 or 128");
    TS_NEED(cache->tile_size == 64 || (cache->tile_size == 128 && d == 128), "attention",
            "tile_size must be 64, or 128 where head_dim is 128");
    TS_NEED(n_kv_heads > 0 && n_heads % n_kv_heads == 0, "attention", "n_heads must be a multiple of n_kv_heads");
    TS_NEED(args->qkvg.cols == (n_heads + 2 * n_kv_heads) * d + 2 * n_kv_heads && args->y.cols == n_heads * d &&
                args->qkvg.rows == args->batch->n_rows && args->y.rows == args->batch->n_rows,
            "attention", "qkvg must be [M, (H + 2 KV) d + 2 KV] and y [M, H d]");
    TS_NEED(cache->open_dtype == args->qkvg.dtype, "attention", "the cache's open tiles must be of qkvg's dtype");
    TS_NEED(cache->is_sparse || cache->open_dtype == TS_F32 || cache->state_rest, "attention",
            "a dense cache in BF16 must have state_rest");
    TS_NEED(batch_covers_rows(args->batch), "attention", SPANS_ALLOWED);
    TS_DISPATCH(attention);
done:
    return status;
}

ts_status ts_op_cross_entropy(ts_device *device, const ts_cross_entropy_args *args) {
    ts_status status = TS_OK;
    TS_NEED(args->logits.dtype == TS_F32, "cross_entropy", "logits must be F32");
    TS_DISPATCH(cross_entropy);
done:
    return status;
}

ts_status ts_op_sample(ts_device *device, const ts_sample_args *args) {
    ts_status status = TS_OK;
    TS_NEED(args->logits.dtype == TS_F32 && args->logits.cols > 0 && args->logits.cols <= INT32_MAX, "sample",
            "logits must be F32, of 1 to 2^31 - 1 tokens");
    TS_DISPATCH(sample);
done:
    return status;
}
