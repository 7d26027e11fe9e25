// Eqs. (1) to (9) over a batch.
//
// Prefill: (1) place: which slots the tiles that complete will have, where no budget makes that depend on their keys;
// (2) tiles: features, decay and the states of those tiles, every piece by itself; (3) rules: which tile is held when;
// (4) in waves of bounded memory, choose: what every tile that follows a completed one selects; and (5) groups: S^ and
// outputs in one kernel, on Hopper at d 64; elsewhere sum and outputs, with S^ in device memory between; (6) store: the
// cache as the spans leave it. No pass is sequential over tiles but the sum of decay and, in dense form, the
// recurrence. Dense form in BF16 has a kernel of its own (attention_dense.h).
//
// Decode: one kernel appends and answers, and in dense form closes the tiles that are complete; in sparse form a second
// kernel closes those.
#include "kernels/cuda/attention/attention.h"

// Lists of one wave of selection (tile_choose.cu): a prefill of any length takes no more, beyond one group's lists.
#define LIST_BYTES ((size_t)320 << 20)
enum { MOST_WAVE_GROUPS = 32768 }; // a grid's second dimension

static void *carve(char **at, size_t n_bytes) {
    void *out = *at;
    *at += (n_bytes + 255) / 256 * 256;
    return out;
}

// Places the arrays from `memory` on, or measures where memory is NULL. Returns the bytes they take.
static size_t place(ts_cuda_attention *a, char *memory) {
    const size_t n_kv = (size_t)a->cache.n_kv_heads, d = (size_t)a->cache.head_dim;
    const size_t n_pieces = (size_t)a->pieces.n_pieces, n_closed = (size_t)a->pieces.n_closed * n_kv;
    const size_t n_rows = (size_t)a->n_rows * n_kv, n_spans = (size_t)a->pieces.n_spans * n_kv;
    const bool is_sparse = a->cache.is_sparse;
    const bool in_groups = ts_cuda_attention_groups_apply(a),
               places_first = is_sparse && a->cache.sparsity.cache_tiles == 0;
    const size_t n_apart = a->all_in_slots ? 0 : n_closed;
    const ts_dtype state_dtype = is_sparse ? a->cache.slot_dtype : TS_F32;
    const size_t n_slots = is_sparse ? (size_t)a->pieces.n_held * n_kv : 0;
    const size_t n_held_ranges = is_sparse ? (size_t)a->pieces.n_held_ranges * n_kv : 0;
    const size_t n_groups = is_sparse ? (size_t)a->pieces.n_groups * n_kv : 0;
    char *at = memory;
    a->c = carve(&at, n_rows * sizeof *a->c);
    a->gate = carve(&at, n_rows * sizeof *a->gate);
    a->query_sums = carve(&at, n_pieces * n_kv * d * sizeof *a->query_sums);
    a->tile_states = carve(&at, n_apart * d * d * ts_dtype_bytes(state_dtype));
    a->tile_scales = carve(&at, state_dtype == TS_FP8_E4M3 ? n_apart * d * sizeof *a->tile_scales : 0);
    a->tile_masses = carve(&at, n_closed * d * sizeof *a->tile_masses);
    a->tile_decays = carve(&at, n_closed * sizeof *a->tile_decays);
    a->tile_sums = carve(&at, n_closed * sizeof *a->tile_sums);
    a->tile_ends = carve(&at, n_closed * sizeof *a->tile_ends);
    a->next_states = in_groups ? NULL : carve(&at, n_closed * d * d * ts_dtype_bytes(a->qkvg.dtype));
    a->next_masses = in_groups ? NULL : carve(&at, n_closed * d * sizeof *a->next_masses);
    a->tile_keys = carve(&at, n_closed * sizeof *a->tile_keys);
    if (!a->all_in_slots) {
        a->tile_deaths = carve(&at, n_closed * sizeof *a->tile_deaths);
        a->tile_slots = carve(&at, n_closed * sizeof *a->tile_slots);
        a->held_deaths = carve(&at, n_slots * sizeof *a->held_deaths);
        a->holes = carve(&at, n_slots * sizeof *a->holes);
        a->tile_places = places_first ? carve(&at, n_closed * sizeof *a->tile_places) : NULL;
        a->held_after = carve(&at, n_spans * sizeof *a->held_after);
    }
    a->joining_keys = carve(&at, (n_closed + n_spans * (size_t)a->n_lead) * sizeof *a->joining_keys);
    a->held_ranges = carve(&at, n_held_ranges * sizeof *a->held_ranges);
    a->tile_ranges = carve(&at, n_groups * sizeof *a->tile_ranges);
    a->held_range_masses = carve(&at, n_held_ranges * d * sizeof *a->held_range_masses);
    a->tile_range_masses = carve(&at, n_groups * d * sizeof *a->tile_range_masses);
    a->lists = carve(&at, n_groups * sizeof *a->lists);
    a->listed = carve(&at, n_groups * sizeof *a->listed);
    a->list_at = carve(&at, a->n_listed * sizeof *a->list_at);
    a->list_weights = carve(&at, a->n_listed * TS_CUDA_GROUP * sizeof *a->list_weights);
    return (size_t)(at - memory);
}

// Where the next wave of groups begins.
typedef struct wave_place {
    int32_t span;
    int64_t group; // of the span
} wave_place;

static int64_t ranges_of(int64_t n_tiles) {
    return (n_tiles + TS_CUDA_GROUP - 1) / TS_CUDA_GROUP;
}

// Bytes of the lists of one wave for each tile that all KV heads list.
static size_t entry_bytes_of(const ts_cuda_attention *a) {
    return (size_t)a->cache.n_kv_heads * (sizeof *a->list_at + TS_CUDA_GROUP * sizeof *a->list_weights);
}

// The groups after the last wave: as many as LIST_BYTES hold lists for, but at least one. False where none is left.
static bool next_wave(const ts_batch *batch, wave_place *next, ts_cuda_attention *a) {
    const size_t entry_bytes = entry_bytes_of(a);
    a->first_group += a->n_wave_groups;
    a->n_wave_groups = 0;
    a->list_stride = 0;
    while (next->span < batch->n_spans && a->n_wave_groups < MOST_WAVE_GROUPS) {
        const ts_span *span = &batch->spans[next->span];
        if (next->group == ranges_of(ts_span_tiles_completed(span, a->cache.tile_size))) {
            *next = (wave_place){next->span + 1, 0};
            continue;
        }
        const int64_t n_ranges =
            ranges_of(ts_cuda_span_held(span, a->cache.tile_size, a->cache.page_table_stride)) + next->group + 1;
        const int64_t stride = n_ranges * TS_CUDA_GROUP > a->list_stride ? n_ranges * TS_CUDA_GROUP : a->list_stride;
        if (a->n_wave_groups > 0 && (size_t)(a->n_wave_groups + 1) * (size_t)stride * entry_bytes > LIST_BYTES)
            break;
        a->list_stride = stride;
        a->n_wave_groups++;
        next->group++;
    }
    return a->n_wave_groups > 0;
}

// Finds out the pieces of the batch and gives them and the passes their memory.
static ts_status prepare(ts_device *device, const ts_batch *batch, ts_cuda_attention *a) {
    ts_status status = TS_OK;
    const int64_t T = a->cache.tile_size;
    int64_t most_lead = 0;
    wave_place next = {0, 0};
    void *scratch;
    ts_cuda_pieces_count(batch, (int32_t)T, a->cache.is_sparse ? a->cache.page_table_stride : 0, &a->pieces);
    for (int32_t s = 0; s < batch->n_spans; s++) {
        const int64_t before = batch->spans[s].position / T;
        const int64_t events = ts_span_tiles_completed(&batch->spans[s], (int32_t)T);
        const int64_t held = ts_cuda_span_held(&batch->spans[s], (int32_t)T, a->pieces.most_slots);
        most_lead = before > most_lead ? before : most_lead;
        a->most_held = held > a->most_held ? held : a->most_held;
        a->most_events = events > a->most_events ? events : a->most_events;
    }
    a->n_lead = most_lead < a->cache.sparsity.recent_tiles ? (int32_t)most_lead : a->cache.sparsity.recent_tiles;
    while (a->cache.is_sparse && next_wave(batch, &next, a)) {
        const size_t n_listed = (size_t)(a->n_wave_groups * a->cache.n_kv_heads * a->list_stride);
        a->n_listed = n_listed > a->n_listed ? n_listed : a->n_listed;
    }
    const size_t pieces_bytes = ts_cuda_pieces_bytes(&a->pieces);
    TS_TRY(ts_cuda_device_scratch(device, pieces_bytes + place(a, NULL), &scratch));
    place(a, (char *)scratch + pieces_bytes);
    TS_TRY(ts_cuda_pieces_make(ts_cuda_device_of(device)->stream, a->capability == 90, batch, (int32_t)T, scratch,
                               &a->pieces));
done:
    return status;
}

// In one kernel where the form is dense and activations are BF16.
static ts_status prefill_dense(ts_device *base, const ts_attention_args *args) {
    ts_status status = TS_OK;
    ts_cuda_device *device = ts_cuda_device_of(base);
    const size_t n_bytes = ts_cuda_attention_dense_workspace(args, &device->dense_plan);
    void *workspace;
    TS_TRY(ts_cuda_device_scratch(base, n_bytes, &workspace));
    TS_TRY(ts_cuda_attention_dense(args, &device->dense_plan, workspace, n_bytes, device->stream));
done:
    return status;
}

static ts_status prefill_tiles(ts_device *device, const ts_batch *batch, ts_cuda_attention *a) {
    ts_status status = TS_OK;
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    wave_place next = {0, 0};
    bool in_groups;
    TS_TRY(prepare(device, batch, a));
    TS_TRY(ts_cuda_tile_place(stream, a));
    TS_TRY(ts_cuda_attention_tiles(stream, a));
    TS_TRY(ts_cuda_tile_rules(stream, a));
    in_groups = ts_cuda_attention_groups_apply(a);
    a->first_group = a->n_wave_groups = 0;
    while (a->cache.is_sparse && next_wave(batch, &next, a)) {
        TS_TRY(ts_cuda_tile_choose(stream, a));
        if (in_groups && a->first_group == 0) // beside choose
            TS_TRY(ts_cuda_attention_outputs(stream, a, true));
        if (in_groups)
            TS_TRY(ts_cuda_attention_groups(stream, a));
        else
            TS_TRY(ts_cuda_tile_sum(stream, a));
    }
    if (!a->cache.is_sparse)
        TS_TRY(ts_cuda_tile_sum(stream, a));
    if (!in_groups || a->pieces.n_groups == 0) // without groups all pieces begin their spans
        TS_TRY(ts_cuda_attention_outputs(stream, a, false));
    TS_TRY(ts_cuda_tile_store(stream, a));
done:
    return status;
}

static ts_status decode(ts_device *device, const ts_batch *batch, ts_cuda_attention *a) {
    ts_status status = TS_OK;
    cudaStream_t stream = ts_cuda_device_of(device)->stream;
    a->pieces.n_spans = batch->n_spans;
    TS_TRY(ts_cuda_attention_decode(stream, a));
    if (a->cache.is_sparse && ts_batch_tiles_completed(batch, a->cache.tile_size) > 0)
        TS_TRY(ts_cuda_attention_close(stream, a));
done:
    return status;
}

// No budget and no pruning: every tile stays.
static bool stays_in_slots(const ts_tile_cache_layer *cache) {
    return cache->is_sparse && cache->sparsity.cache_tiles == 0 && cache->sparsity.prune_ratio == 0;
}

static bool runs_dense_kernel(const ts_tile_cache_layer *cache, ts_dtype dtype) {
    return !cache->is_sparse && dtype == TS_BF16;
}

size_t ts_cuda_attention_scratch_bytes(const ts_device *base, const ts_run_limits *limits) {
    const ts_cuda_device *device = (const ts_cuda_device *)base;
    const ts_tile_cache_layer *cache = limits->cache;
    ts_cuda_attention a = {
        .cache = *cache,
        .n_rows = limits->max_rows,
        .qkvg = {.dtype = base->compute_dtype},
        .capability = device->dense_plan.capability,
        .all_in_slots = stays_in_slots(cache),
    };
    if (runs_dense_kernel(cache, base->compute_dtype))
        return ts_cuda_attention_dense_most_workspace(limits, &device->dense_plan);
    ts_cuda_pieces_bound(limits->max_rows, limits->max_spans, cache->tile_size,
                         cache->is_sparse ? cache->page_table_stride : 0, cache->n_pages, &a.pieces);
    if (cache->is_sparse) {
        const int64_t recent = cache->sparsity.recent_tiles, slots = cache->page_table_stride;
        a.n_lead = (int32_t)(recent < slots ? recent : slots);
        // A wave of several groups fits LIST_BYTES; one group alone lists all that can be held when it ends.
        const int64_t longest = (ranges_of(slots) + ranges_of(limits->max_rows / cache->tile_size + 1)) * TS_CUDA_GROUP;
        const size_t all = (size_t)(a.pieces.n_groups * longest), fitting = LIST_BYTES / entry_bytes_of(&a);
        const size_t most = (size_t)longest > fitting ? (size_t)longest : fitting;
        a.n_listed = (all < most ? all : most) * (size_t)cache->n_kv_heads;
    }
    return ts_cuda_pieces_bytes(&a.pieces) + place(&a, NULL);
}

static bool is_aligned(const ts_tensor *tensor) {
    return ((uintptr_t)tensor->data | (size_t)tensor->stride * ts_dtype_bytes(tensor->dtype)) % 16 == 0;
}

ts_status ts_cuda_attention_forward(ts_device *device, const ts_attention_args *args) {
    ts_status status = TS_OK;
    ts_cuda_attention a = {
        .cache = *args->cache,
        .spans = args->batch->device_spans,
        .n_rows = args->batch->n_rows,
        .qkvg = args->qkvg,
        .y = args->y,
        .decay_temperature = args->decay_temperature,
        .normalizer_eps = (float)args->normalizer_eps,
        .capability = ts_cuda_device_of(device)->dense_plan.capability,
        .cache_is_settled = ts_cuda_device_of(device)->cache_is_settled,
        .all_in_slots = stays_in_slots(args->cache),
    };
    ts_cuda_device_of(device)->cache_is_settled = false;
    TS_TRY(ts_cuda_check_activation(&args->qkvg, "attention: qkvg"));
    TS_CHECK(args->qkvg.dtype == args->y.dtype && is_aligned(&args->qkvg) && is_aligned(&args->y), TS_ERR_INVALID,
             "cuda: attention: qkvg and y must have one dtype and rows that begin at multiples of 16 bytes");
    TS_CHECK(!a.cache.is_sparse || a.cache.slot_dtype == TS_F32 || a.cache.slot_dtype == TS_BF16 ||
                 a.cache.slot_dtype == TS_FP8_E4M3,
             TS_ERR_UNSUPPORTED, "cuda: attention: tile states of %s; F32, BF16 and FP8_E4M3 are stored",
             ts_dtype_name(a.cache.slot_dtype));
    if (args->batch->decode)
        TS_TRY(decode(device, args->batch, &a));
    else if (runs_dense_kernel(&a.cache, args->qkvg.dtype))
        TS_TRY(prefill_dense(device, args));
    else
        TS_TRY(prefill_tiles(device, args->batch, &a));
done:
    return status;
}
