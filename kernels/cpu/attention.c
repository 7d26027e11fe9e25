// Eqs. (1) to (9) over a batch.
//
// Prefill goes in four passes over pieces, a piece being the part of one tile that a span covers: (1) features, and
// states of the tiles that end, for all pieces and heads at once; (2) head by head and tile by tile the cache: store,
// drop, select; (3) outputs, again all at once; (4) the open tiles' keys. Only pass 2 is sequential, and it is the
// cheapest. Decode does the same for one token at a time without the matrices.
#include "kernels/cpu/features.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/tile_select.h"

#include <omp.h>

typedef struct piece {
    int32_t span, n_tokens;
    int64_t row;   // first row of the batch
    int32_t first; // its place in the tile: 0, or the tokens already open
    bool closes;   // its last token completes the tile
    int64_t tile;  // index of the tile in its sequence
    int64_t slot;  // index among the completed tiles of the batch, when it closes
} piece;

// Scratch of one call, carved out of the device's.
typedef struct workspace {
    piece *pieces;
    int64_t *span_begin; // [spans + 1] first piece of each span
    int64_t n_pieces, n_closed;
    double *c;          // [KV, rows]
    float *query_sums;  // [pieces, KV, d]
    float *tile_states; // [closed, KV, d, d] S_t
    float *tile_masses; // [closed, KV, d] z_t
    float *next_states; // [closed, KV, d, d] S^ of the tile that follows
    float *next_masses; // [closed, KV, d]
    double *scores;     // [threads, slots + 1]
} workspace;

static int64_t max_slots(const ts_tile_cache_layer *cache) {
    return cache->is_sparse ? cache->page_table_stride + 1 : 1;
}

static void *carve(char **at, size_t n_bytes) {
    void *out = *at;
    *at += (n_bytes + 63) / 64 * 64;
    return out;
}

static ts_status workspace_create(ts_device *device, const ts_attention_args *args, workspace *work) {
    ts_status status = TS_OK;
    const ts_tile_cache_layer *cache = args->cache;
    const ts_batch *batch = args->batch;
    const size_t n_kv = (size_t)cache->n_kv_heads, d = (size_t)cache->head_dim;
    const int64_t T = cache->tile_size;
    size_t n_pieces = 0, n_closed = 0;
    for (int32_t s = 0; s < batch->n_spans; s++) {
        const ts_span *span = &batch->spans[s];
        n_pieces += (size_t)((span->position + span->n_tokens + T - 1) / T - span->position / T);
        n_closed += (size_t)ts_span_tiles_completed(span, (int32_t)T);
    }
    const size_t n_threads = (size_t)ts_cpu_device_of(device)->n_threads, n_slots = (size_t)max_slots(cache);
    const size_t sizes[] = {
        n_pieces * sizeof(piece),
        ((size_t)batch->n_spans + 1) * sizeof(int64_t),
        (size_t)batch->n_rows * n_kv * sizeof(double),
        n_pieces * n_kv * d * sizeof(float),
        n_closed * n_kv * d * d * sizeof(float),
        n_closed * n_kv * d * sizeof(float),
        n_closed * n_kv * d * d * sizeof(float),
        n_closed * n_kv * d * sizeof(float),
        n_threads * n_slots * sizeof(double),
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        total += (sizes[i] + 63) / 64 * 64;
    void *scratch;
    TS_TRY(ts_cpu_device_scratch(device, total, &scratch));
    char *at = scratch;
    work->pieces = carve(&at, sizes[0]);
    work->span_begin = carve(&at, sizes[1]);
    work->c = carve(&at, sizes[2]);
    work->query_sums = carve(&at, sizes[3]);
    work->tile_states = carve(&at, sizes[4]);
    work->tile_masses = carve(&at, sizes[5]);
    work->next_states = carve(&at, sizes[6]);
    work->next_masses = carve(&at, sizes[7]);
    work->scores = carve(&at, sizes[8]);
    work->n_pieces = 0;
    work->n_closed = 0;
    for (int32_t s = 0; s < batch->n_spans; s++) {
        const ts_span *span = &batch->spans[s];
        work->span_begin[s] = work->n_pieces;
        for (int64_t done = 0; done < span->n_tokens;) {
            const int64_t first = (span->position + done) % T;
            const int64_t n = T - first < span->n_tokens - done ? T - first : span->n_tokens - done;
            const bool closes = first + n == T;
            work->pieces[work->n_pieces++] = (piece){
                .span = s,
                .n_tokens = (int32_t)n,
                .row = span->row + done,
                .first = (int32_t)first,
                .closes = closes,
                .tile = (span->position + done) / T,
                .slot = closes ? work->n_closed++ : -1,
            };
            done += n;
        }
    }
    work->span_begin[batch->n_spans] = work->n_pieces;
done:
    return status;
}

typedef struct heads {
    const ts_attention_args *args;
    const ts_tile_cache_layer *cache;
    ts_qkvg_layout at;
    int64_t d, T, group;
} heads;

static heads heads_of(const ts_attention_args *args) {
    const ts_tile_cache_layer *cache = args->cache;
    return (heads){
        .args = args,
        .cache = cache,
        .at = ts_qkvg_layout_of(cache->n_heads, cache->n_kv_heads, cache->head_dim),
        .d = cache->head_dim,
        .T = cache->tile_size,
        .group = cache->n_heads / cache->n_kv_heads,
    };
}

TS_INLINE float *row_of(const heads *h, int64_t row) {
    return (float *)h->args->qkvg.data + row * h->args->qkvg.stride;
}

// Index of a sequence's KV head in the per-sequence arrays.
TS_INLINE int64_t head_index(const heads *h, const piece *p, int32_t j) {
    return (int64_t)h->args->batch->spans[p->span].sequence * h->cache->n_kv_heads + j;
}

// q^ of the group and k^ in place of q and k; c; adds q^ to query_sum.
static void token_features(const heads *h, int64_t row, int32_t j, double c_before, double *c, float *query_sum) {
    float *x = row_of(h, row);
    float *k = x + h->at.k + j * h->d;
    ts_feature_row(k, k, ts_key_gate(x[h->at.key_gate + j]), h->d);
    *c = c_before + ts_log_decay(x[h->at.decay_gate + j], h->args->decay_temperature);
    for (int64_t i = j * h->group; i < (j + 1) * h->group; i++) {
        float *q = x + i * h->d;
        ts_feature_row(q, q, 1.0f, h->d);
        for (int64_t e = 0; e < h->d; e += TS_LANES)
            ts_vec_store(query_sum + e, ts_vec_load(query_sum + e) + ts_vec_load(q + e));
    }
}

// Appends the piece's keys to the sequence's open tile.
static void keep_open(const heads *h, const workspace *work, const piece *p, int32_t j) {
    const ts_tile_cache_layer *cache = h->cache;
    const int64_t head = head_index(h, p, j);
    for (int64_t i = 0; i < p->n_tokens; i++) {
        const float *x = row_of(h, p->row + i);
        const int64_t at = head * h->T + p->first + i;
        memcpy((float *)cache->open_k + at * h->d, x + h->at.k + j * h->d, (size_t)h->d * sizeof(float));
        memcpy((float *)cache->open_v + at * h->d, x + h->at.v + j * h->d, (size_t)h->d * sizeof(float));
        cache->open_c[at] = work->c[j * h->args->batch->n_rows + p->row + i];
    }
}

// The keys of the piece's tile so far. A piece that begins its tile reads them where they were projected; one that
// continues an open tile reads the open buffers, to which pass 1 has appended it.
static ts_tile_keys keys_of(const heads *h, const workspace *work, const piece *p, int32_t j) {
    const ts_tile_cache_layer *cache = h->cache;
    if (p->first == 0) {
        const float *x = row_of(h, p->row);
        return (ts_tile_keys){
            .k = x + h->at.k + j * h->d,
            .v = x + h->at.v + j * h->d,
            .k_stride = h->args->qkvg.stride,
            .v_stride = h->args->qkvg.stride,
            .c = work->c + j * h->args->batch->n_rows + p->row,
            .n = p->n_tokens,
        };
    }
    const int64_t at = head_index(h, p, j) * h->T;
    return (ts_tile_keys){
        .k = (float *)cache->open_k + at * h->d,
        .v = (float *)cache->open_v + at * h->d,
        .k_stride = h->d,
        .v_stride = h->d,
        .c = cache->open_c + at,
        .n = p->first + p->n_tokens,
    };
}

// Pass 1.
static void piece_features(const heads *h, const workspace *work, const piece *p, int32_t j) {
    const ts_tile_cache_layer *cache = h->cache;
    const int64_t head = head_index(h, p, j), n_kv = cache->n_kv_heads;
    float *query_sum = work->query_sums + ((p - work->pieces) * n_kv + j) * h->d;
    if (p->first > 0)
        memcpy(query_sum, cache->query_sum + head * h->d, (size_t)h->d * sizeof *query_sum);
    else
        memset(query_sum, 0, (size_t)h->d * sizeof *query_sum);
    double before = p->first > 0 ? cache->open_c[head * h->T + p->first - 1] : 0.0;
    double *c = work->c + j * h->args->batch->n_rows + p->row;
    for (int64_t i = 0; i < p->n_tokens; i++) {
        token_features(h, p->row + i, j, before, &c[i], query_sum);
        before = c[i];
    }
    if (p->first > 0)
        keep_open(h, work, p, j);
    if (p->closes) {
        const ts_tile_keys keys = keys_of(h, work, p, j);
        const int64_t at = p->slot * n_kv + j;
        ts_tile_state(&keys, h->d, work->tile_states + at * h->d * h->d, work->tile_masses + at * h->d);
        const float mean = 1.0f / (float)(h->T * h->group);
        for (int64_t i = 0; i < h->d; i++)
            query_sum[i] *= mean;
    }
}

// Pass 2 for one KV head of one span, whose pieces are [begin, end).
static void span_tiles(const heads *h, const workspace *work, int64_t begin, int64_t end, int32_t j, double *scores) {
    const ts_tile_cache_layer *cache = h->cache;
    const int64_t n_kv = cache->n_kv_heads, head = head_index(h, &work->pieces[begin], j), d = h->d;
    const size_t state_bytes = (size_t)(d * d) * sizeof(float), mass_bytes = (size_t)d * sizeof(float);
    const float *state = (float *)cache->state + head * d * d, *mass = cache->mass + head * d;
    for (int64_t i = begin; i < end; i++) {
        const piece *p = &work->pieces[i];
        if (!p->closes)
            continue;
        const int64_t at = p->slot * n_kv + j;
        const ts_closed_tile closed = {
            .tile = p->tile,
            .state = work->tile_states + at * d * d,
            .mass = work->tile_masses + at * d,
            .decay = p->first == 0 ? work->c[j * h->args->batch->n_rows + p->row + p->n_tokens - 1]
                                   : cache->open_c[head * h->T + h->T - 1],
            .mean_query = work->query_sums + (i * n_kv + j) * d,
        };
        float *next_state = work->next_states + at * d * d, *next_mass = work->next_masses + at * d;
        if (!cache->is_sparse) {
            memcpy(next_state, state, state_bytes);
            memcpy(next_mass, mass, mass_bytes);
        }
        TS_ISA(tile_close)(cache, h->args->batch->spans[p->span].sequence, j, &closed, scores, next_state, next_mass);
        state = next_state;
        mass = next_mass;
    }
}

// Pass 3: outputs of the piece's query heads.
static void piece_outputs(const heads *h, const workspace *work, const piece *p, int32_t j) {
    const ts_tile_cache_layer *cache = h->cache;
    const int64_t d = h->d, head = head_index(h, p, j);
    const bool opens_span = p == work->pieces || p[-1].span != p->span;
    const float *state = (float *)cache->state + head * d * d, *mass = cache->mass + head * d;
    if (!opens_span) {
        const int64_t at = p[-1].slot * cache->n_kv_heads + j;
        state = work->next_states + at * d * d;
        mass = work->next_masses + at * d;
    }
    float transposed[TS_TILE_MAX * TS_HEAD_MAX];
    const ts_tile_keys keys = keys_of(h, work, p, j);
    ts_tile_transpose(&keys, d, h->T, transposed);
    for (int64_t i = j * h->group; i < (j + 1) * h->group; i++)
        ts_tile_output(row_of(h, p->row) + i * d, h->args->qkvg.stride, p->first, p->n_tokens, &keys, transposed, state,
                       mass, d, h->T, (float)h->args->normalizer_eps,
                       (float *)h->args->y.data + p->row * h->args->y.stride + i * d, h->args->y.stride);
}

// Pass 4: what the span leaves behind it: the open tile and the state before it.
static void span_leave(const heads *h, const workspace *work, int64_t begin, int64_t end, int32_t j) {
    const ts_tile_cache_layer *cache = h->cache;
    const int64_t d = h->d, n_kv = cache->n_kv_heads;
    const piece *last = &work->pieces[end - 1];
    const int64_t head = head_index(h, last, j);
    int64_t closed = -1;
    for (int64_t i = begin; i < end; i++)
        closed = work->pieces[i].closes ? work->pieces[i].slot : closed;
    if (closed >= 0) {
        const int64_t at = closed * n_kv + j;
        memcpy((float *)cache->state + head * d * d, work->next_states + at * d * d, (size_t)(d * d) * sizeof(float));
        memcpy(cache->mass + head * d, work->next_masses + at * d, (size_t)d * sizeof(float));
    }
    if (last->closes)
        return;
    if (last->first == 0)
        keep_open(h, work, last, j);
    memcpy(cache->query_sum + head * d, work->query_sums + ((end - 1) * n_kv + j) * d, (size_t)d * sizeof(float));
}

static ts_status prefill(ts_device *device, const ts_attention_args *args) {
    ts_status status = TS_OK;
    const int n_threads = ts_cpu_device_of(device)->n_threads;
    const heads h = heads_of(args);
    const int32_t n_kv = args->cache->n_kv_heads, n_spans = args->batch->n_spans;
    workspace work;
    TS_TRY(workspace_create(device, args, &work));
#pragma omp parallel num_threads(n_threads)
    {
        double *scores = work.scores + omp_get_thread_num() * max_slots(args->cache);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < work.n_pieces; i++)
            for (int32_t j = 0; j < n_kv; j++)
                piece_features(&h, &work, &work.pieces[i], j);
#pragma omp for collapse(2) schedule(dynamic)
        for (int32_t s = 0; s < n_spans; s++)
            for (int32_t j = 0; j < n_kv; j++)
                span_tiles(&h, &work, work.span_begin[s], work.span_begin[s + 1], j, scores);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < work.n_pieces; i++)
            for (int32_t j = 0; j < n_kv; j++)
                piece_outputs(&h, &work, &work.pieces[i], j);
#pragma omp for collapse(2) schedule(dynamic)
        for (int32_t s = 0; s < n_spans; s++)
            for (int32_t j = 0; j < n_kv; j++)
                span_leave(&h, &work, work.span_begin[s], work.span_begin[s + 1], j);
    }
done:
    return status;
}

// One row of d floats into L2.
TS_INLINE void prefetch_row(const float *row, int64_t d) {
    enum { LINE = 16 };
    for (int64_t i = 0; i < d; i += LINE)
        __builtin_prefetch(row + i, 0, 2);
}

// One query against the open tile's keys 0 .. n and the state before it. d is a constant at every call: the output
// stays in registers. Every row is read once, from L3 or beyond: the same row of the next head, which follows in
// memory, is asked for at the same time.
TS_INLINE void token_output_of(int64_t d, int64_t T, const float *q, const ts_tile_keys *keys, const float *state,
                               const float *mass, float eps, float *y) {
    const int64_t n = keys->n - 1, n_vecs = d / TS_LANES;
    float weights[TS_TILE_MAX];
    ts_vec out[TS_HEAD_MAX / TS_LANES], before = {0};
    const float reach = ts_exp((float)keys->c[n]);
    for (int64_t e = 0; e < n_vecs; e++) {
        out[e] = (ts_vec){0};
        before += ts_vec_load(q + e * TS_LANES) * ts_vec_load(mass + e * TS_LANES);
    }
    for (int64_t i = 0; i < d; i++) {
        prefetch_row(state + (d + i) * d, d);
#pragma GCC unroll 8
        for (int64_t e = 0; e < n_vecs; e++)
            out[e] += q[i] * ts_vec_load(state + i * d + e * TS_LANES);
    }
#pragma GCC unroll 8
    for (int64_t e = 0; e < n_vecs; e++)
        out[e] *= reach;
    for (int64_t m = 0; m <= n; m++) {
        ts_vec product = {0};
        prefetch_row(keys->k + (T + m) * d, d);
#pragma GCC unroll 8
        for (int64_t e = 0; e < n_vecs; e++)
            product += ts_vec_load(q + e * TS_LANES) * ts_vec_load(keys->k + m * d + e * TS_LANES);
        weights[m] = ts_vec_sum(product);
    }
    float within = 0;
#pragma omp simd reduction(+ : within)
    for (int64_t m = 0; m <= n; m++) {
        weights[m] *= ts_exp((float)(keys->c[n] - keys->c[m]));
        within += weights[m];
    }
    for (int64_t m = 0; m <= n; m++) {
        prefetch_row(keys->v + (T + m) * d, d);
#pragma GCC unroll 8
        for (int64_t e = 0; e < n_vecs; e++)
            out[e] += weights[m] * ts_vec_load(keys->v + m * d + e * TS_LANES);
    }
    const float scale = 1.0f / (reach * ts_vec_sum(before) + within + eps);
#pragma GCC unroll 8
    for (int64_t e = 0; e < n_vecs; e++)
        ts_vec_store(y + e * TS_LANES, scale * out[e]);
}

static void token_output(const heads *h, const float *q, const ts_tile_keys *keys, const float *state,
                         const float *mass, float *y) {
    if (h->d == 64)
        token_output_of(64, h->T, q, keys, state, mass, (float)h->args->normalizer_eps, y);
    else
        token_output_of(128, h->T, q, keys, state, mass, (float)h->args->normalizer_eps, y);
}

static void decode_head(const heads *h, const ts_span *span, int32_t j, double *scores) {
    const ts_tile_cache_layer *cache = h->cache;
    const int64_t d = h->d, head = (int64_t)span->sequence * cache->n_kv_heads + j, n = span->position % h->T;
    float *x = row_of(h, span->row), *query_sum = cache->query_sum + head * d;
    float *state = (float *)cache->state + head * d * d, *mass = cache->mass + head * d;
    double *c = cache->open_c + head * h->T;
    if (n == 0)
        memset(query_sum, 0, (size_t)d * sizeof *query_sum);
    token_features(h, span->row, j, n > 0 ? c[n - 1] : 0.0, &c[n], query_sum);
    float *open_k = (float *)cache->open_k + head * h->T * d, *open_v = (float *)cache->open_v + head * h->T * d;
    memcpy(open_k + n * d, x + h->at.k + j * d, (size_t)d * sizeof(float));
    memcpy(open_v + n * d, x + h->at.v + j * d, (size_t)d * sizeof(float));
    const ts_tile_keys keys = {open_k, open_v, d, d, c, n + 1};
    for (int64_t i = j * h->group; i < (j + 1) * h->group; i++)
        token_output(h, x + i * d, &keys, state, mass,
                     (float *)h->args->y.data + span->row * h->args->y.stride + i * d);
    if (n + 1 < h->T)
        return;
    float tile_state[TS_HEAD_MAX * TS_HEAD_MAX], tile_mass[TS_HEAD_MAX], mean_query[TS_HEAD_MAX];
    const float mean = 1.0f / (float)(h->T * h->group);
    for (int64_t i = 0; i < d; i++)
        mean_query[i] = query_sum[i] * mean;
    ts_tile_state(&keys, d, tile_state, tile_mass);
    const ts_closed_tile closed = {span->position / h->T, tile_state, tile_mass, c[n], mean_query};
    TS_ISA(tile_close)(cache, span->sequence, j, &closed, scores, state, mass);
}

static ts_status decode(ts_device *device, const ts_attention_args *args) {
    ts_status status = TS_OK;
    const int n_threads = ts_cpu_device_of(device)->n_threads;
    const heads h = heads_of(args);
    const int32_t n_kv = args->cache->n_kv_heads, n_spans = args->batch->n_spans;
    void *scores;
    TS_TRY(ts_cpu_device_scratch(device, (size_t)(n_threads * max_slots(args->cache)) * sizeof(double), &scores));
#pragma omp parallel for collapse(2) schedule(static) num_threads(n_threads) if (n_spans * n_kv > 1)
    for (int32_t s = 0; s < n_spans; s++)
        for (int32_t j = 0; j < n_kv; j++)
            if (args->batch->spans[s].sequence != TS_PADDING)
                decode_head(&h, &args->batch->spans[s], j,
                            (double *)scores + omp_get_thread_num() * max_slots(args->cache));
done:
    return status;
}

ts_status TS_ISA(attention)(ts_device *device, const ts_attention_args *args) {
    const ts_dtype slots = args->cache->slot_dtype;
    if (args->cache->is_sparse && slots != TS_F32 && slots != TS_BF16 && slots != TS_FP8_E4M3)
        return TS_FAIL(TS_ERR_UNSUPPORTED, "cpu: attention: tile states of %s; F32, BF16 and FP8_E4M3 are stored",
                       ts_dtype_name(slots));
    return args->batch->decode ? decode(device, args) : prefill(device, args);
}
