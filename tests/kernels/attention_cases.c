#include "op_cases.h"

#include "attention_reference.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>

enum { MAX_SEQUENCES = 4 };

typedef struct attention_case {
    const char *name;
    int n_heads, n_kv_heads, head_dim, tile_size;
    bool is_sparse;
    ts_sparsity sparsity;
    int n_tokens[MAX_SEQUENCES]; // 0 after the last sequence
    double decay_logit;          // about which the decay gates' logits lie; temperature 1
    uint64_t seed;
} attention_case;

// decay_logit 4: a tile of 64 decays by about e^-1.2. The seeds are such that no decision of rules 1 to 3 is within
// 1e-4 of the other side; the reference checks it.
static const attention_case cases[] = {
    {"dense", 2, 2, 64, 64, false, {0, 0, 0, 1, 0, 0}, {200}, 4, 1},
    {"dense, groups of two", 4, 2, 64, 64, false, {0, 0, 0, 1, 0, 0}, {130, 64, 1}, 4, 2},
    {"dense, d 128 T 64", 2, 1, 128, 64, false, {0, 0, 0, 1, 0, 0}, {200, 129}, 4, 3},
    {"dense, d 128 T 128", 1, 1, 128, 128, false, {0, 0, 0, 1, 0, 0}, {300}, 4, 4},
    {"dense, groups of ten", 10, 1, 64, 64, false, {0, 0, 0, 1, 0, 0}, {130, 70}, 4, 19},
    {"dense, one token", 3, 1, 64, 64, false, {0, 0, 0, 1, 0, 0}, {1, 3}, 4, 5},
    {"dense, strong decay", 2, 2, 64, 64, false, {0, 0, 0, 1, 0, 0}, {200, 70}, -7, 6},
    {"sparse, all held", 2, 2, 64, 64, true, {0, 0, 0, 1, 1, 0}, {330, 64}, 5, 7},
    {"sparse, skipping", 4, 2, 64, 64, true, {0, 0.1, 0, 1, 2, 1}, {900, 300, 129}, 5, 8},
    {"sparse, pruning", 2, 2, 64, 64, true, {0.4, 0, 0, 1, 2, 1}, {800, 450}, 5, 9},
    {"sparse, budget of two", 2, 2, 64, 64, true, {0, 0, 2, 1, 1, 0}, {800, 500}, 6, 10},
    {"sparse, budget in lanes", 4, 1, 64, 64, true, {0, 0.02, 4, 2, 2, 1}, {1100, 700, 65, 64}, 6, 11},
    {"sparse, budget below lanes", 2, 1, 64, 64, true, {0, 0, 1, 2, 1, 0}, {600}, 6, 12},
    {"sparse, nothing recent", 2, 2, 64, 64, true, {0.3, 0.05, 2, 1, 0, 0}, {800, 320}, 6, 13},
    {"sparse, all rules", 4, 2, 64, 64, true, {0.25, 0.05, 4, 2, 2, 1}, {1300, 700, 200, 1}, 5, 14},
    {"sparse, all rules, d 128", 2, 2, 128, 64, true, {0.25, 0.05, 2, 2, 1, 1}, {700, 200}, 5, 15},
    {"sparse, all rules, T 128", 2, 1, 128, 128, true, {0.25, 0.05, 2, 1, 1, 1}, {1200, 300}, 6, 16},
    {"sparse, many recent", 2, 2, 64, 64, true, {0.2, 0, 2, 1, 5, 0}, {900, 128}, 5, 17},
    {"sparse, strong decay", 2, 2, 64, 64, true, {0, 0.01, 2, 1, 1, 1}, {500, 130}, -7, 18},
};

// One layer's cache with room for every tile, made by hand: what the ops read is all there is.
typedef struct case_cache {
    ts_tile_cache_layer layer;
    ts_tile_history history;
    void *memory[40];
    int n_memory;
    void *importance[MAX_SEQUENCES], *pruned[MAX_SEQUENCES];
} case_cache;

typedef struct run {
    ts_device *device;
    const attention_case *c;
    int n_sequences, n_tiles; // the most of any sequence
    int64_t columns, stride;
    ts_dtype activation, slot_dtype;
    const float *qkvg[MAX_SEQUENCES];
    float *y[MAX_SEQUENCES]; // [n_tokens, H d] filled as outputs come
    case_cache cache;
} run;

static ts_status take(run *r, size_t n_bytes, void *out) {
    ts_status status = TS_OK;
    void *data;
    TS_TRY(ts_device_alloc(r->device, n_bytes, "case", &data));
    r->cache.memory[r->cache.n_memory++] = data;
    memcpy(out, &data, sizeof data);
done:
    return status;
}

static ts_status cache_create(run *r) {
    ts_status status = TS_OK;
    case_cache *cache = &r->cache;
    ts_tile_cache_layer *layer = &cache->layer;
    const attention_case *c = r->c;
    const size_t n = (size_t)(r->n_sequences * c->n_kv_heads), d = (size_t)c->head_dim, T = (size_t)c->tile_size;
    const size_t stride = (size_t)r->n_tiles + 1, n_pages = stride * (size_t)r->n_sequences;
    const size_t n_slots = n_pages * (size_t)c->n_kv_heads;
    int32_t *table = malloc(n_pages * sizeof *table);
    void *device_table, *pruned, *importance;
    *cache = (case_cache){0};
    *layer = (ts_tile_cache_layer){
        .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads,
        .head_dim = c->head_dim,
        .tile_size = c->tile_size,
        .is_sparse = c->is_sparse,
        .sparsity = c->sparsity,
        .n_pages = (int64_t)n_pages,
        .page_table_stride = (int64_t)stride,
        .slot_dtype = r->slot_dtype,
    };
    layer->open_dtype = r->activation;
    TS_TRY(take(r, n * T * d * ts_dtype_bytes(r->activation), &layer->open_k));
    TS_TRY(take(r, n * T * d * ts_dtype_bytes(r->activation), &layer->open_v));
    TS_TRY(take(r, n * T * sizeof(float), &layer->open_gate));
    TS_TRY(take(r, n * T * sizeof(double), &layer->open_c));
    TS_TRY(take(r, n * d * sizeof(float), &layer->query_sum));
    TS_TRY(take(r, n * sizeof(double), &layer->decay_end));
    TS_TRY(take(r, n * d * d * ts_dtype_bytes(r->activation), &layer->state));
    TS_TRY(take(r, n * d * d * sizeof(int16_t), &layer->state_rest));
    TS_TRY(take(r, n * d * sizeof(float), &layer->mass));
    TS_TRY(take(r, n * 2 * sizeof(int64_t), &layer->pairs));
    TS_TRY(take(r, n * sizeof(int32_t), &layer->n_held));
    TS_TRY(take(r, n_slots * d * d * ts_dtype_bytes(r->slot_dtype), &layer->slot_state));
    if (r->slot_dtype == TS_FP8_E4M3)
        TS_TRY(take(r, n_slots * d * sizeof(float), &layer->slot_scale));
    TS_TRY(take(r, n_slots * d * sizeof(float), &layer->slot_mass));
    TS_TRY(take(r, n_slots * sizeof(double), &layer->slot_decay_end));
    TS_TRY(take(r, n_slots * sizeof(double), &layer->slot_key));
    TS_TRY(take(r, n_slots * sizeof(int64_t), &layer->slot_tile));
    TS_TRY(take(r, n_pages * sizeof(int32_t), &device_table));
    TS_TRY(take(r, (size_t)r->n_sequences * sizeof(void *), &importance));
    TS_TRY(take(r, (size_t)r->n_sequences * sizeof(void *), &pruned));
    TS_TRY(take(r, n * sizeof(double), &cache->history.open_mass));
    for (int s = 0; s < r->n_sequences; s++) {
        TS_TRY(take(r, stride * sizeof(double), &cache->importance[s]));
        TS_TRY(take(r, stride, &cache->pruned[s]));
    }
    for (size_t i = 0; i < n_pages; i++) // pages of a sequence lie apart and backwards
        table[i] = (int32_t)(n_pages - 1 - (i % stride * (size_t)r->n_sequences + i / stride));
    TS_TRY(ts_device_upload(r->device, device_table, table, n_pages * sizeof *table));
    TS_TRY(ts_device_upload(r->device, importance, cache->importance, (size_t)r->n_sequences * sizeof(void *)));
    TS_TRY(ts_device_upload(r->device, pruned, cache->pruned, (size_t)r->n_sequences * sizeof(void *)));
    layer->page_table = device_table;
    layer->pruned = pruned;
    cache->history.n_kv_heads = c->n_kv_heads;
    cache->history.tile_size = c->tile_size;
    cache->history.sink_tiles = c->sparsity.sink_tiles;
    cache->history.prune_ratio = c->sparsity.prune_ratio;
    cache->history.importance = importance;
    cache->history.pruned = pruned;
done:
    free(table);
    return status;
}

static void cache_free(run *r) {
    for (int i = 0; i < r->cache.n_memory; i++)
        ts_device_release(r->device, r->cache.memory[i]);
    r->cache.n_memory = 0;
}

// Scratch for the batch as a run would reserve it; *n_bytes: how much, 0 where the backend does not know.
static ts_status reserve_scratch(run *r, const ts_batch *batch, size_t *n_bytes) {
    ts_status status = TS_OK;
    const ts_run_limits limits = {&r->cache.layer, batch->n_rows, batch->n_spans, 0};
    *n_bytes = r->device->ops->scratch_bytes ? r->device->ops->scratch_bytes(r->device, &limits) : 0;
    if (*n_bytes > 0)
        TS_TRY(ts_device_reserve_scratch(r->device, *n_bytes));
done:
    return status;
}

// One batch: spans[i].n_tokens tokens from spans[i].position on. In decode a row of NaN follows as padding, for which
// there must be room behind the spans; nothing may be written for it.
static ts_status step(run *r, ts_span *spans, int n_spans, bool decode) {
    ts_status status = TS_OK;
    const attention_case *c = r->c;
    const int64_t H = c->n_heads, d = c->head_dim;
    ts_tensor qkvg = {0}, y = {0};
    void *device_spans = NULL, *importance = NULL;
    float *rows = NULL, *got = NULL;
    size_t scratch_bytes;
    if (decode)
        spans[n_spans] = (ts_span){.sequence = TS_PADDING, .n_tokens = 1};
    ts_batch batch = {.decode = decode, .n_spans = n_spans + decode, .spans = spans};
    for (int i = 0; i < batch.n_spans; i++) {
        spans[i].row = batch.n_rows;
        batch.n_rows += spans[i].n_tokens;
    }
    rows = malloc((size_t)(batch.n_rows * r->columns) * sizeof *rows);
    memset(rows, 0xff, (size_t)(batch.n_rows * r->columns) * sizeof *rows);
    for (int i = 0; i < n_spans; i++)
        memcpy(rows + spans[i].row * r->columns, r->qkvg[spans[i].sequence] + spans[i].position * r->columns,
               (size_t)(spans[i].n_tokens * r->columns) * sizeof *rows);
    TS_TRY(case_upload(r->device, rows, batch.n_rows, r->columns, r->stride, r->activation, &qkvg));
    TS_TRY(case_upload(r->device, NULL, batch.n_rows, H * d, H * d, r->activation, &y));
    TS_TRY(ts_device_alloc(r->device, (size_t)batch.n_spans * sizeof *spans, "case", &device_spans));
    TS_TRY(ts_device_upload(r->device, device_spans, spans, (size_t)batch.n_spans * sizeof *spans));
    batch.device_spans = device_spans;
    TS_TRY(reserve_scratch(r, &batch, &scratch_bytes));
    if (c->is_sparse) {
        const int64_t n_closed = ts_batch_tiles_completed(&batch, c->tile_size);
        TS_TRY(ts_device_alloc(r->device, (size_t)(n_closed * c->n_kv_heads) * sizeof(double), "case", &importance));
        TS_TRY(ts_op_tile_importance(r->device, &(ts_tile_importance_args){&batch, qkvg, c->n_heads, c->head_dim,
                                                                           &r->cache.history, importance}));
        if (n_closed > 0)
            TS_TRY(ts_op_tile_prune(r->device, &(ts_tile_prune_args){&batch, 1, importance, &r->cache.history}));
    }
    TS_TRY(ts_op_attention(r->device, &(ts_attention_args){&batch, qkvg, &r->cache.layer, 1.0, 1e-6, y}));
    TS_CHECK(scratch_bytes == 0 || r->device->scratch_bytes == scratch_bytes, TS_ERR_INTERNAL,
             "%zu bytes of scratch were used, and at most %zu are by scratch_bytes", r->device->scratch_bytes,
             scratch_bytes);
    got = case_download(r->device, &y);
    for (int64_t e = 0; decode && e < H * d; e++)
        TS_CHECK(isnan(got[n_spans * H * d + e]), TS_ERR_INTERNAL, "y was written for padding");
    for (int i = 0; i < n_spans; i++)
        memcpy(r->y[spans[i].sequence] + spans[i].position * H * d, got + spans[i].row * H * d,
               (size_t)(spans[i].n_tokens * H * d) * sizeof *got);
done:
    ts_device_release(r->device, qkvg.data);
    ts_device_release(r->device, y.data);
    ts_device_release(r->device, device_spans);
    ts_device_release(r->device, importance);
    free(rows);
    free(got);
    return status;
}

// Everything in one prefill; sequences in one batch, in reverse order.
static ts_status run_at_once(run *r) {
    ts_span spans[MAX_SEQUENCES];
    for (int s = 0; s < r->n_sequences; s++)
        spans[s] = (ts_span){.sequence = r->n_sequences - 1 - s, .n_tokens = r->c->n_tokens[r->n_sequences - 1 - s]};
    return step(r, spans, r->n_sequences, false);
}

// Prefill in ragged chunks, then the last tokens one at a time; sequences [first, end) in each batch while they last.
static ts_status run_in_chunks(run *r, int first, int end) {
    static const int chunks[] = {1, 3, 60, 64, 65, 128, 7};
    ts_status status = TS_OK;
    int64_t at[MAX_SEQUENCES] = {0};
    for (int i = 0;; i++) {
        ts_span spans[MAX_SEQUENCES];
        int n_spans = 0;
        for (int s = first; s < end; s++) {
            const int64_t all = r->c->n_tokens[s], prompt = all - all / 3, left = prompt - at[s];
            const int64_t chunk = chunks[(i + s) % 7], n = chunk < left ? chunk : left;
            if (left <= 0)
                continue;
            spans[n_spans++] = (ts_span){.sequence = s, .n_tokens = (int32_t)n, .position = at[s]};
            at[s] += n;
        }
        if (n_spans == 0)
            break;
        TS_TRY(step(r, spans, n_spans, false));
    }
    for (;;) {
        ts_span spans[MAX_SEQUENCES + 1];
        int n_spans = 0;
        for (int s = first; s < end; s++)
            if (at[s] < r->c->n_tokens[s])
                spans[n_spans++] = (ts_span){.sequence = s, .n_tokens = 1, .position = at[s]++};
        if (n_spans == 0)
            break;
        TS_TRY(step(r, spans, n_spans, true));
    }
done:
    return status;
}

static void poison(run *r) {
    for (int s = 0; s < r->n_sequences; s++)
        memset(r->y[s], 0xff, (size_t)(r->c->n_tokens[s] * r->c->n_heads * r->c->head_dim) * sizeof(float));
}

static void compare(run *r, const attention_reference *reference, const char *how, case_group *group) {
    const attention_case *c = r->c;
    const int64_t columns = (int64_t)c->n_heads * c->head_dim, n_kv = c->n_kv_heads;
    // f32: weights are f32 exponentials of f64 differences rounded to f32 (up to 87 * 2^-24), summed over few hundred
    // positive terms. BF16 rounds y (2^-9), and a backend may round q^, k^, weights and states to it before its
    // products: independent errors of 2^-9 in sums that average them. BF16 slots: the same of S_t.
    // FP8 slots: errors of up to 2^-4 of an element of S_t, independent, in sums that average them.
    const double of_slots = !c->is_sparse || r->slot_dtype == TS_F32 ? 2e-5 : r->slot_dtype == TS_BF16 ? 4e-3 : 0x1p-6;
    const double bound = r->activation == TS_BF16 && of_slots < 1e-2 ? 1e-2 : of_slots;
    int64_t *pairs = malloc((size_t)(r->n_sequences * n_kv * 2) * sizeof *pairs);
    if (!case_ok(group,
                 ts_device_download(r->device, pairs, r->cache.layer.pairs,
                                    (size_t)(r->n_sequences * n_kv * 2) * sizeof *pairs),
                 "download"))
        return;
    for (int s = 0; s < r->n_sequences; s++) {
        const int n_tiles = c->n_tokens[s] / c->tile_size;
        int64_t sums[2] = {0, 0};
        case_result(group, case_error(r->y[s], reference[s].y, c->n_tokens[s] * c->n_heads, c->head_dim), bound,
                    "%s, %s: y of sequence %d [%d, %lld]", c->name, how, s, c->n_tokens[s], (long long)columns);
        for (int64_t j = 0; j < 2 * n_kv; j++)
            sums[j % 2] += pairs[s * n_kv * 2 + j];
        case_result(group, sums[0] == reference[s].pairs[0] && sums[1] == reference[s].pairs[1] ? 0 : 1, 0,
                    "%s, %s: tile pairs of sequence %d are %lld, %lld, expected %lld, %lld", c->name, how, s,
                    (long long)sums[0], (long long)sums[1], (long long)reference[s].pairs[0],
                    (long long)reference[s].pairs[1]);
        if (!c->is_sparse || n_tiles == 0)
            continue;
        double *importance = malloc((size_t)n_tiles * sizeof *importance), worst = 0;
        uint8_t *pruned = malloc((size_t)n_tiles);
        ts_status status =
            ts_device_download(r->device, importance, r->cache.importance[s], (size_t)n_tiles * sizeof *importance);
        status = status ? status : ts_device_download(r->device, pruned, r->cache.pruned[s], (size_t)n_tiles);
        if (case_ok(group, status, "download")) {
            int n_wrong = 0;
            for (int t = 0; t < n_tiles; t++) {
                worst = fmax(worst, fabs(importance[t] / reference[s].importance[t] - 1));
                n_wrong += pruned[t] != reference[s].pruned[t];
            }
            // A sum in f64 of f32 values.
            case_result(group, worst, 1e-6, "%s, %s: importance in sequence %d", c->name, how, s);
            case_result(group, n_wrong, 0, "%s, %s: tiles wrongly pruned or kept in sequence %d", c->name, how, s);
        }
        free(importance);
        free(pruned);
    }
    free(pairs);
}

static void case_run(ts_device *device, const attention_case *c, ts_dtype activation, ts_dtype slot_dtype,
                     case_group *group) {
    const int64_t H = c->n_heads, KV = c->n_kv_heads, d = c->head_dim, columns = (H + 2 * KV) * d + 2 * KV;
    const attention_shape shape = {c->n_heads,   c->n_kv_heads, c->head_dim, c->tile_size,
                                   c->is_sparse, c->sparsity,   1.0,         1e-6};
    attention_reference reference[MAX_SEQUENCES];
    float *values[MAX_SEQUENCES], *chunked[MAX_SEQUENCES];
    run r = {
        .device = device,
        .c = c,
        .columns = columns,
        .stride = (columns + 7) / 8 * 8,
        .activation = activation,
        .slot_dtype = slot_dtype,
    };
    for (int s = 0; s < MAX_SEQUENCES && c->n_tokens[s] > 0; s++, r.n_sequences++) {
        const int64_t n = c->n_tokens[s];
        values[s] = case_values(c->seed * 10 + (uint64_t)s, n * columns, 0, 1.5, activation);
        for (int64_t i = 0; i < n * KV; i++) {
            float *decay = values[s] + i / KV * columns + columns - KV + i % KV;
            *decay += (float)c->decay_logit; // a whole number: exact in F32; rounded again for BF16
            if (activation == TS_BF16) {
                uint32_t bits;
                memcpy(&bits, decay, sizeof bits);
                bits &= 0xffff0000u;
                memcpy(decay, &bits, sizeof bits);
            }
        }
        // The first features of some tiles are large, so that tiles differ in what they weigh.
        for (int64_t i = 0; i < n; i++) {
            uint64_t seed = c->seed * 1000 + (uint64_t)(i / c->tile_size);
            const float scale = (float)exp2(floor(2 * case_uniform(&seed))); // a power of two: exact in any dtype
            for (int64_t e = H * d; e < (H + KV) * d; e++)
                values[s][i * columns + e] *= scale;
        }
        reference[s] = attention_reference_run(&shape, values[s], (int)n);
        case_result(group, reference[s].margin > 1e-5 ? 0 : 1, 0,
                    "%s: a decision of sequence %d is within %.2g of its other side: "
                    "the case says nothing, give it another seed",
                    c->name, s, reference[s].margin);
        if (c->decay_logit < 0 && n > 64)
            case_result(group, reference[s].least_decay_sum < -300 ? 0 : 1, 0,
                        "%s: decay of sequence %d reaches only %.0f", c->name, s, reference[s].least_decay_sum);
        r.qkvg[s] = values[s];
        r.y[s] = malloc((size_t)(n * H * d) * sizeof(float));
        chunked[s] = malloc((size_t)(n * H * d) * sizeof(float));
        r.n_tiles = n / c->tile_size > r.n_tiles ? (int)(n / c->tile_size) : r.n_tiles;
    }
    poison(&r);
    ts_status status = cache_create(&r);
    status = status ? status : run_at_once(&r);
    if (case_ok(group, status, c->name))
        compare(&r, reference, "at once", group);
    cache_free(&r);

    poison(&r);
    status = cache_create(&r);
    status = status ? status : run_in_chunks(&r, 0, r.n_sequences);
    if (case_ok(group, status, c->name))
        compare(&r, reference, "in chunks and steps", group);
    cache_free(&r);
    for (int s = 0; s < r.n_sequences; s++)
        memcpy(chunked[s], r.y[s], (size_t)(c->n_tokens[s] * H * d) * sizeof(float));

    // I3: the same steps with each sequence alone give the same bits.
    if (r.n_sequences > 1) {
        poison(&r);
        status = cache_create(&r);
        for (int s = 0; s < r.n_sequences; s++)
            status = status ? status : run_in_chunks(&r, s, s + 1);
        if (case_ok(group, status, c->name))
            for (int s = 0; s < r.n_sequences; s++)
                case_result(group, memcmp(chunked[s], r.y[s], (size_t)(c->n_tokens[s] * H * d) * sizeof(float)) ? 1 : 0,
                            0, "%s: bits of sequence %d alone and in a batch", c->name, s);
        cache_free(&r);
    }
    for (int s = 0; s < r.n_sequences; s++) {
        attention_reference_free(&reference[s]);
        free(values[s]);
        free(chunked[s]);
        free(r.y[s]);
    }
}

// ---- What a dense cache carries on: where tokens add nothing and nothing decays, S^ keeps every bit of f32, through
// prefill, a span that ends within a tile, and decode.

static const attention_case carried[] = {
    {"S^ carried on, d 64", 2, 2, 64, 64, false, {0, 0, 0, 1, 0, 0}, {128}, 80, 30},
    {"S^ carried on, d 128 T 64", 2, 1, 128, 64, false, {0, 0, 0, 1, 0, 0}, {128}, 80, 31},
    {"S^ carried on, d 128 T 128", 1, 1, 128, 128, false, {0, 0, 0, 1, 0, 0}, {256}, 80, 32},
};

// S^ of the only sequence, to the cache or from it.
static ts_status put_state(run *r, const float *state, size_t n) {
    ts_status status = TS_OK;
    uint16_t *high = malloc(n * sizeof *high);
    int16_t *rest = malloc(n * sizeof *rest);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &state[i], sizeof bits);
        high[i] = (uint16_t)((bits + 0x8000u) >> 16);
        rest[i] = (int16_t)(uint16_t)bits;
    }
    if (r->activation == TS_F32) {
        TS_TRY(ts_device_upload(r->device, r->cache.layer.state, state, n * sizeof *state));
    } else {
        TS_TRY(ts_device_upload(r->device, r->cache.layer.state, high, n * sizeof *high));
        TS_TRY(ts_device_upload(r->device, r->cache.layer.state_rest, rest, n * sizeof *rest));
    }
done:
    free(high);
    free(rest);
    return status;
}

static ts_status get_state(run *r, float *state, size_t n) {
    ts_status status = TS_OK;
    uint16_t *high = malloc(n * sizeof *high);
    int16_t *rest = malloc(n * sizeof *rest);
    if (r->activation == TS_F32) {
        TS_TRY(ts_device_download(r->device, state, r->cache.layer.state, n * sizeof *state));
        goto done;
    }
    TS_TRY(ts_device_download(r->device, high, r->cache.layer.state, n * sizeof *high));
    TS_TRY(ts_device_download(r->device, rest, r->cache.layer.state_rest, n * sizeof *rest));
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = ((uint32_t)high[i] << 16) + (uint32_t)(int32_t)rest[i];
        memcpy(&state[i], &bits, sizeof bits);
    }
done:
    free(high);
    free(rest);
    return status;
}

static void carry_run(ts_device *device, const attention_case *c, ts_dtype activation, case_group *group) {
    const int64_t H = c->n_heads, KV = c->n_kv_heads, d = c->head_dim, T = c->tile_size, n = c->n_tokens[0];
    const int64_t columns = (H + 2 * KV) * d + 2 * KV;
    const size_t n_state = (size_t)(KV * d * d);
    float *values = case_values(c->seed, n * columns, 0, 1.5, activation);
    float *before = case_values(c->seed + 1, (int64_t)n_state, 0, 2, TS_F32), *after = malloc(n_state * sizeof *after);
    float *y = malloc((size_t)(n * H * d) * sizeof *y);
    run r = {.device = device,
             .c = c,
             .n_sequences = 1,
             .n_tiles = (int)(n / T),
             .columns = columns,
             .stride = (columns + 7) / 8 * 8,
             .activation = activation,
             .slot_dtype = TS_F32,
             .qkvg = {values},
             .y = {y}};
    for (int64_t i = 0; i < n; i++) {
        float *row = values + i * columns;
        memset(row + (H + KV) * d, 0, (size_t)(KV * d) * sizeof *row); // v
        for (int64_t j = 0; j < KV; j++) {
            row[columns - 2 * KV + j] = -80; // the key's gate
            row[columns - KV + j] = (float)c->decay_logit;
        }
    }
    const ts_span spans[] = {{.n_tokens = 40}, {.n_tokens = (int32_t)T - 40, .position = 40}};
    ts_status status = cache_create(&r);
    status = status ? status : put_state(&r, before, n_state);
    for (int i = 0; i < 2; i++) {
        ts_span span = spans[i];
        status = status ? status : step(&r, &span, 1, false);
    }
    status = status ? status : get_state(&r, after, n_state);
    if (case_ok(group, status, c->name))
        case_result(group, memcmp(before, after, n_state * sizeof *after) ? 1 : 0, 0, "%s: bits after prefill",
                    c->name);
    for (int64_t at = T; at < 2 * T; at++) {
        ts_span step_spans[2] = {{.n_tokens = 1, .position = at}};
        status = status ? status : step(&r, step_spans, 1, true);
    }
    status = status ? status : get_state(&r, after, n_state);
    if (case_ok(group, status, c->name))
        case_result(group, memcmp(before, after, n_state * sizeof *after) ? 1 : 0, 0, "%s: bits after decode", c->name);
    cache_free(&r);
    free(values);
    free(before);
    free(after);
    free(y);
}

int attention_cases_run(ts_device *device, ts_dtype activation, ts_dtype slot_dtype, int most_tokens, FILE *report) {
    char name[64];
    snprintf(name, sizeof name, "attention (slots %s)", ts_dtype_name(slot_dtype));
    case_group group = {.name = name, .report = report};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int n_tokens = 0;
        for (int s = 0; s < MAX_SEQUENCES; s++)
            n_tokens += cases[i].n_tokens[s];
        if (n_tokens <= most_tokens && (cases[i].is_sparse || slot_dtype == TS_F32))
            case_run(device, &cases[i], activation, slot_dtype, &group);
    }
    for (size_t i = 0; slot_dtype == TS_F32 && i < sizeof carried / sizeof *carried; i++)
        if (carried[i].n_tokens[0] <= most_tokens)
            carry_run(device, &carried[i], activation, &group);
    return case_group_end(&group);
}
