#include "kernels/cpu/tile_select.h"

#include "kernels/cpu/simd.h"

#include <float.h>
#include <math.h>

// The slots of one sequence and KV head.
typedef struct head_slots {
    const ts_tile_cache_layer *cache;
    const int32_t *pages;
    int64_t base; // index of the head's page 0
} head_slots;

TS_INLINE int64_t slot_at(const head_slots *slots, int64_t i) {
    return slots->base + slots->pages[i];
}

TS_INLINE void add_scaled(float *sum, const float *x, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i += TS_LANES)
        ts_vec_store(sum + i, ts_vec_load(sum + i) + scale * ts_vec_load(x + i));
}

// Keeps S_t in the slots' dtype; FP8 in units of each row's largest magnitude over the largest FP8.
static void state_store(const ts_tile_cache_layer *cache, size_t at, const float *state) {
    const size_t d = (size_t)cache->head_dim;
    if (cache->slot_dtype == TS_F32) {
        memcpy((float *)cache->slot_state + at * d * d, state, d * d * sizeof(float));
        return;
    }
    if (cache->slot_dtype == TS_BF16) {
        uint16_t *out = (uint16_t *)cache->slot_state + at * d * d;
        for (size_t i = 0; i < d * d; i++)
            out[i] = ts_bf16_from_f32(state[i]);
        return;
    }
    uint8_t *out = (uint8_t *)cache->slot_state + at * d * d;
    for (size_t r = 0; r < d; r++) {
        float largest = 0;
        for (size_t i = 0; i < d; i++)
            largest = fmaxf(largest, fabsf(state[r * d + i]));
        const float scale = largest / TS_FP8_E4M3_MAX, inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
        for (size_t i = 0; i < d; i++)
            out[r * d + i] = ts_fp8_from_f32(state[r * d + i] * inverse);
        cache->slot_scale[at * d + r] = scale;
    }
}

// sum += reach S_t.
static void state_add(const ts_tile_cache_layer *cache, size_t at, float reach, float *sum) {
    const size_t d = (size_t)cache->head_dim;
    if (cache->slot_dtype == TS_F32) {
        add_scaled(sum, (const float *)cache->slot_state + at * d * d, reach, (int64_t)(d * d));
    } else if (cache->slot_dtype == TS_BF16) {
        const uint16_t *state = (const uint16_t *)cache->slot_state + at * d * d;
        for (size_t i = 0; i < d * d; i += TS_LANES)
            ts_vec_store(sum + i, ts_vec_load(sum + i) + reach * ts_vec_load_bf16(state + i));
    } else {
        const uint8_t *state = (const uint8_t *)cache->slot_state + at * d * d;
        for (size_t r = 0; r < d; r++) {
            const float scale = reach * cache->slot_scale[at * d + r];
            for (size_t i = r * d; i < (r + 1) * d; i++)
                sum[i] += scale * ts_fp8_to_f32(state[i]);
        }
    }
}

static void slot_move(const head_slots *slots, int64_t to, int64_t from) {
    const ts_tile_cache_layer *cache = slots->cache;
    const size_t d = (size_t)cache->head_dim;
    const size_t a = (size_t)slot_at(slots, to), b = (size_t)slot_at(slots, from);
    const size_t state_bytes = d * d * ts_dtype_bytes(cache->slot_dtype);
    char *states = cache->slot_state;
    memcpy(states + a * state_bytes, states + b * state_bytes, state_bytes);
    if (cache->slot_dtype == TS_FP8_E4M3)
        memcpy(cache->slot_scale + a * d, cache->slot_scale + b * d, d * sizeof(float));
    memcpy(cache->slot_mass + a * d, cache->slot_mass + b * d, d * sizeof(float));
    cache->slot_decay_end[a] = cache->slot_decay_end[b];
    cache->slot_key[a] = cache->slot_key[b];
    cache->slot_tile[a] = cache->slot_tile[b];
}

static void slot_store(const head_slots *slots, int64_t i, const ts_closed_tile *closed, double decay_end, double key) {
    const ts_tile_cache_layer *cache = slots->cache;
    const size_t d = (size_t)cache->head_dim, at = (size_t)slot_at(slots, i);
    state_store(cache, at, closed->state);
    memcpy(cache->slot_mass + at * d, closed->mass, d * sizeof(float));
    cache->slot_decay_end[at] = decay_end;
    cache->slot_key[at] = key;
    cache->slot_tile[at] = closed->tile;
}

// The slot whose tile must leave its lane because tile `old`, no longer recent, joins it; -1 when the lane has room.
// On a tie of keys the newer tile stays.
static int64_t lane_overflow(const head_slots *slots, int64_t n_held, int64_t old) {
    const ts_tile_cache_layer *cache = slots->cache;
    const ts_sparsity *rules = &cache->sparsity;
    int64_t n_in_lane = 0, worst = -1, worst_tile = 0;
    double worst_key = 0;
    for (int64_t i = 0; i < n_held; i++) {
        const int64_t at = slot_at(slots, i), tile = cache->slot_tile[at];
        if (tile > old || tile < rules->sink_tiles || tile % rules->cache_lanes != old % rules->cache_lanes)
            continue;
        const double key = cache->slot_key[at];
        n_in_lane++;
        if (worst < 0 || key < worst_key || (key == worst_key && tile < worst_tile)) {
            worst = i;
            worst_key = key;
            worst_tile = tile;
        }
    }
    return n_in_lane > rules->cache_tiles / rules->cache_lanes ? worst : -1;
}

// Rules 1 and 2: the slot that tile `old` frees by becoming old, or -1. Tiles become old one at a time, so one is
// enough.
static int64_t slot_to_drop(const head_slots *slots, int32_t sequence, int64_t n_held, int64_t old) {
    const ts_tile_cache_layer *cache = slots->cache;
    if (old < cache->sparsity.sink_tiles)
        return -1;
    if (cache->pruned[sequence][old]) {
        for (int64_t i = n_held - 1; i >= 0; i--)
            if (cache->slot_tile[slot_at(slots, i)] == old)
                return i;
        return -1;
    }
    return cache->sparsity.cache_tiles > 0 ? lane_overflow(slots, n_held, old) : -1;
}

TS_INLINE float dot(const float *a, const float *b, int64_t d) {
    ts_vec sum = {0};
    for (int64_t i = 0; i < d; i += TS_LANES)
        sum += ts_vec_load(a + i) * ts_vec_load(b + i);
    return ts_vec_sum(sum);
}

// Rule 3 and eq. (8). Returns how many tiles were selected.
static int64_t select_tiles(const head_slots *slots, int64_t n_held, int64_t next, double decay_end,
                            const float *mean_query, double *scores, float *state, float *mass) {
    const ts_tile_cache_layer *cache = slots->cache;
    const ts_sparsity *rules = &cache->sparsity;
    const int64_t d = cache->head_dim;
    double total = 0;
    for (int64_t i = 0; i < n_held; i++) {
        const int64_t at = slot_at(slots, i);
        const float reach = ts_exp((float)(decay_end - cache->slot_decay_end[at]));
        scores[i] = (double)reach * (double)dot(mean_query, cache->slot_mass + at * d, d);
        total += scores[i];
    }
    memset(state, 0, (size_t)(d * d) * sizeof *state);
    memset(mass, 0, (size_t)d * sizeof *mass);
    int64_t n_selected = 0;
    for (int64_t i = 0; i < n_held; i++) {
        const int64_t at = slot_at(slots, i), tile = cache->slot_tile[at];
        if (next - tile > rules->recent_tiles && tile >= rules->sink_tiles && scores[i] < rules->skip_share * total)
            continue;
        n_selected++;
        const float reach = ts_exp((float)(decay_end - cache->slot_decay_end[at]));
        if (reach == 0.0f)
            continue;
        state_add(cache, (size_t)at, reach, state);
        add_scaled(mass, cache->slot_mass + at * d, reach, d);
    }
    return n_selected;
}

static void close_dense(const ts_tile_cache_layer *cache, const ts_closed_tile *closed, float *state, float *mass) {
    const int64_t d = cache->head_dim;
    const ts_vec decay = ts_vec_set((float)exp(closed->decay));
    for (int64_t i = 0; i < d * d; i += TS_LANES)
        ts_vec_store(state + i, decay * ts_vec_load(state + i) + ts_vec_load(closed->state + i));
    for (int64_t i = 0; i < d; i += TS_LANES)
        ts_vec_store(mass + i, decay * ts_vec_load(mass + i) + ts_vec_load(closed->mass + i));
}

void TS_ISA(tile_close)(const ts_tile_cache_layer *cache, int32_t sequence, int32_t kv_head,
                        const ts_closed_tile *closed, double *scores, float *state, float *mass) {
    const int64_t head = (int64_t)sequence * cache->n_kv_heads + kv_head, next = closed->tile + 1;
    int64_t *pairs = cache->pairs + 2 * head;
    const double decay_end = cache->decay_end[head] + closed->decay;
    cache->decay_end[head] = decay_end;
    pairs[0] += next;
    if (!cache->is_sparse) {
        close_dense(cache, closed, state, mass);
        pairs[1] += next;
        return;
    }
    const head_slots slots = {cache, cache->page_table + (int64_t)sequence * cache->page_table_stride,
                              (int64_t)kv_head * cache->n_pages};
    double mass_sum = 0;
    for (int64_t i = 0; i < cache->head_dim; i++)
        mass_sum += (double)closed->mass[i];
    const double key = log(mass_sum) - decay_end;

    // The tile that stops being recent may drop one tile, whose slot the new tile takes: a sequence never has a hole.
    int64_t n_held = cache->n_held[head];
    const int64_t old = next - cache->sparsity.recent_tiles - 1;
    if (cache->sparsity.recent_tiles > 0) {
        const int64_t drop = old >= 0 ? slot_to_drop(&slots, sequence, n_held, old) : -1;
        slot_store(&slots, drop >= 0 ? drop : n_held++, closed, decay_end, key);
    } else { // the new tile itself is old at once: it must stand among the held before one is dropped
        slot_store(&slots, n_held++, closed, decay_end, key);
        const int64_t drop = slot_to_drop(&slots, sequence, n_held, old);
        if (drop >= 0 && drop != --n_held)
            slot_move(&slots, drop, n_held);
    }
    cache->n_held[head] = (int32_t)n_held;
    pairs[1] += select_tiles(&slots, n_held, next, decay_end, closed->mean_query, scores, state, mass);
}
