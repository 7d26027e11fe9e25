// Rule 1: how much a tile says in layer 0, and whether that is too little to keep it.
#include "kernels/cpu/features.h"
#include "kernels/cpu/isa.h"

// The sum of gate * (ELU(k) + 1) over d features.
static double key_importance(const float *k, float gate, int64_t d) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; i++)
        sum += (double)(gate * ts_elu1(k[i]));
    return sum;
}

ts_status TS_ISA(tile_importance)(ts_device *device, const ts_tile_importance_args *args) {
    const int n_threads = ts_cpu_device_of(device)->n_threads;
    const ts_tile_history *history = args->history;
    const int32_t n_kv_heads = history->n_kv_heads;
    const int64_t d = args->head_dim, T = history->tile_size;
    const ts_qkvg_layout at = ts_qkvg_layout_of(args->n_heads, n_kv_heads, d);
#pragma omp parallel for num_threads(n_threads) if (args->batch->n_rows > 64)
    for (int32_t j = 0; j < n_kv_heads; j++) {
        int64_t tile = 0;
        for (int32_t s = 0; s < args->batch->n_spans; s++) {
            const ts_span *span = &args->batch->spans[s];
            if (span->sequence == TS_PADDING)
                continue;
            double *open = &history->open_mass[(int64_t)span->sequence * n_kv_heads + j];
            for (int64_t i = 0; i < span->n_tokens; i++) {
                const float *row = (const float *)args->qkvg.data + (span->row + i) * args->qkvg.stride;
                *open += key_importance(row + at.k + j * d, ts_key_gate(row[at.key_gate + j]), d);
                if ((span->position + i + 1) % T == 0) {
                    args->importance[tile++ * n_kv_heads + j] = *open;
                    *open = 0;
                }
            }
        }
    }
    return TS_OK;
}

ts_status TS_ISA(tile_prune)(ts_device *device, const ts_tile_prune_args *args) {
    const ts_tile_history *history = args->history;
    const int32_t n_kv_heads = history->n_kv_heads;
    const int64_t n_tiles = ts_batch_tiles_completed(args->batch, history->tile_size);
    int64_t tile = 0;
    for (int32_t s = 0; s < args->batch->n_spans; s++) {
        const ts_span *span = &args->batch->spans[s];
        if (span->sequence == TS_PADDING)
            continue;
        double *known = history->importance[span->sequence];
        const int64_t first = span->position / history->tile_size;
        const int64_t end = first + ts_span_tiles_completed(span, history->tile_size);
        for (int64_t t = first; t < end; t++, tile++) {
            double mine = 0;
            for (int32_t rank = 0; rank < args->n_ranks; rank++)
                for (int32_t j = 0; j < n_kv_heads; j++)
                    mine += args->importance[(rank * n_tiles + tile) * n_kv_heads + j];
            int64_t below = 0;
            for (int64_t u = 0; u < t; u++)
                below += known[u] < mine;
            known[t] = mine;
            history->pruned[span->sequence][t] =
                t >= history->sink_tiles && (double)below < history->prune_ratio * (double)t;
        }
    }
    return TS_OK;
}
