#include "attention_reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// What one KV head keeps of a tile.
typedef struct kept_tile {
    int64_t tile;
    double *state, *mass; // [d, d], [d]
    double end, key;
} kept_tile;

typedef struct kv_head {
    kept_tile *kept; // the held tiles, in no order
    int n_kept;
    double *state, *mass;  // S^, z^ of the open tile
    double *k, *v, *c;     // [T, d], [T, d], [T] the open tile
    double *query_sum;     // [d]
    double end, open_mass; // E; importance of the open tile
} kv_head;

static double elu1(double x) {
    return x > 0 ? x + 1 : exp(x);
}

static double *zeros(int64_t n) {
    return calloc((size_t)n, sizeof(double));
}

static void note(attention_reference *out, double a, double b) {
    const double scale = fmax(fabs(a), fabs(b)), margin = scale > 0 ? fabs(a - b) / scale : INFINITY;
    out->margin = fmin(out->margin, margin);
}

static void drop(kv_head *head, int i) {
    free(head->kept[i].state);
    free(head->kept[i].mass);
    head->kept[i] = head->kept[--head->n_kept];
}

// Rules 1 and 2 when tile `old` stops being recent.
static void grow_old(const attention_shape *shape, kv_head *head, int64_t old, const bool *pruned,
                     attention_reference *out) {
    const ts_sparsity *rules = &shape->sparsity;
    if (old < rules->sink_tiles)
        return;
    if (pruned[old]) {
        for (int i = head->n_kept - 1; i >= 0; i--)
            if (head->kept[i].tile == old)
                drop(head, i);
        return;
    }
    if (rules->cache_tiles == 0)
        return;
    int n = 0, worst = -1;
    double second = INFINITY;
    for (int i = 0; i < head->n_kept; i++) {
        const kept_tile *kept = &head->kept[i];
        if (kept->tile > old || kept->tile < rules->sink_tiles ||
            kept->tile % rules->cache_lanes != old % rules->cache_lanes)
            continue;
        n++;
        if (worst < 0 || kept->key < head->kept[worst].key ||
            (kept->key == head->kept[worst].key && kept->tile < head->kept[worst].tile)) {
            second = worst < 0 ? INFINITY : head->kept[worst].key;
            worst = i;
        } else {
            second = fmin(second, kept->key);
        }
    }
    if (n <= rules->cache_tiles / rules->cache_lanes)
        return;
    if (n > 1)
        out->margin = fmin(out->margin, second - head->kept[worst].key); // keys are logarithms
    drop(head, worst);
}

// Rule 3 and eq. (8).
static void choose(const attention_shape *shape, kv_head *head, int64_t next, const double *mean_query,
                   attention_reference *out) {
    const ts_sparsity *rules = &shape->sparsity;
    const int d = shape->head_dim;
    double *scores = zeros(head->n_kept + 1), total = 0;
    for (int i = 0; i < head->n_kept; i++) {
        for (int e = 0; e < d; e++)
            scores[i] += mean_query[e] * head->kept[i].mass[e];
        scores[i] *= exp(head->end - head->kept[i].end);
        total += scores[i];
    }
    memset(head->state, 0, (size_t)(d * d) * sizeof(double));
    memset(head->mass, 0, (size_t)d * sizeof(double));
    for (int i = 0; i < head->n_kept; i++) {
        const kept_tile *kept = &head->kept[i];
        if (next - kept->tile > rules->recent_tiles && kept->tile >= rules->sink_tiles) {
            if (rules->skip_share > 0)
                note(out, scores[i], rules->skip_share * total);
            if (scores[i] < rules->skip_share * total)
                continue;
        }
        out->pairs[1]++;
        const double reach = exp(head->end - kept->end);
        for (int e = 0; e < d * d; e++)
            head->state[e] += reach * kept->state[e];
        for (int e = 0; e < d; e++)
            head->mass[e] += reach * kept->mass[e];
    }
    free(scores);
}

static void close_tile(const attention_shape *shape, kv_head *head, int64_t tile, const bool *pruned,
                       attention_reference *out) {
    const int d = shape->head_dim, T = shape->tile_size, group = shape->n_heads / shape->n_kv_heads;
    kept_tile closed = {.tile = tile, .state = zeros((int64_t)d * d), .mass = zeros(d)};
    double sum = 0;
    for (int m = 0; m < T; m++)
        for (int i = 0; i < d; i++) {
            const double k = exp(head->c[T - 1] - head->c[m]) * head->k[m * d + i];
            closed.mass[i] += k;
            sum += k;
            for (int e = 0; e < d; e++)
                closed.state[i * d + e] += k * head->v[m * d + e];
        }
    head->end += head->c[T - 1];
    closed.end = head->end;
    closed.key = log(sum) - head->end;
    out->pairs[0] += tile + 1;
    if (!shape->is_sparse) {
        const double decay = exp(head->c[T - 1]);
        for (int e = 0; e < d * d; e++)
            head->state[e] = decay * head->state[e] + closed.state[e];
        for (int e = 0; e < d; e++)
            head->mass[e] = decay * head->mass[e] + closed.mass[e];
        out->pairs[1] += tile + 1;
        free(closed.state);
        free(closed.mass);
    } else {
        head->kept[head->n_kept++] = closed;
        if (tile - shape->sparsity.recent_tiles >= 0)
            grow_old(shape, head, tile - shape->sparsity.recent_tiles, pruned, out);
        for (int e = 0; e < d; e++)
            head->query_sum[e] /= T * group;
        choose(shape, head, tile + 1, head->query_sum, out);
    }
    memset(head->query_sum, 0, (size_t)d * sizeof(double));
}

// Features of token m of its tile, appended.
static void append(const attention_shape *shape, kv_head *head, int j, int m, const float *row) {
    const int d = shape->head_dim, H = shape->n_heads, KV = shape->n_kv_heads, group = H / KV;
    const double gate = 1 / (1 + exp(-(double)row[(H + 2 * KV) * d + j]));
    const double logit = row[(H + 2 * KV) * d + KV + j];
    const double log_sigmoid = fmin(logit, 0) - log1p(exp(-fabs(logit)));
    head->c[m] = (m > 0 ? head->c[m - 1] : 0) + log_sigmoid / shape->decay_temperature;
    for (int e = 0; e < d; e++) {
        head->k[m * d + e] = gate * elu1(row[(H + j) * d + e]);
        head->v[m * d + e] = row[(H + KV + j) * d + e];
        head->open_mass += head->k[m * d + e];
        for (int h = j * group; h < (j + 1) * group; h++)
            head->query_sum[e] += elu1(row[h * d + e]);
    }
}

static void output(const attention_shape *shape, const kv_head *head, int m, const float *q, double *y) {
    const int d = shape->head_dim;
    double below = shape->normalizer_eps, features[128];
    for (int i = 0; i < d; i++)
        features[i] = elu1(q[i]);
    memset(y, 0, (size_t)d * sizeof *y);
    for (int i = 0; i < d; i++) {
        const double weight = exp(head->c[m]) * features[i];
        below += weight * head->mass[i];
        for (int e = 0; e < d; e++)
            y[e] += weight * head->state[i * d + e];
    }
    for (int n = 0; n <= m; n++) {
        double weight = 0;
        for (int i = 0; i < d; i++)
            weight += features[i] * head->k[n * d + i];
        weight *= exp(head->c[m] - head->c[n]);
        below += weight;
        for (int e = 0; e < d; e++)
            y[e] += weight * head->v[n * d + e];
    }
    for (int e = 0; e < d; e++)
        y[e] /= below;
}

attention_reference attention_reference_run(const attention_shape *shape, const float *qkvg, int n_tokens) {
    const int d = shape->head_dim, H = shape->n_heads, KV = shape->n_kv_heads, T = shape->tile_size;
    const int columns = (H + 2 * KV) * d + 2 * KV, n_tiles = n_tokens / T, group = H / KV;
    attention_reference out = {
        .y = zeros((int64_t)n_tokens * H * d),
        .importance = zeros(n_tiles + 1),
        .pruned = calloc((size_t)n_tiles + 1, sizeof(bool)),
        .margin = INFINITY,
    };
    kv_head *heads = calloc((size_t)KV, sizeof *heads);
    for (int j = 0; j < KV; j++)
        heads[j] = (kv_head){
            .kept = calloc((size_t)n_tiles + 1, sizeof(kept_tile)),
            .state = zeros((int64_t)d * d),
            .mass = zeros(d),
            .k = zeros((int64_t)T * d),
            .v = zeros((int64_t)T * d),
            .c = zeros(T),
            .query_sum = zeros(d),
        };
    for (int n = 0; n < n_tokens; n++) {
        const float *row = qkvg + (int64_t)n * columns;
        const int m = n % T, tile = n / T;
        for (int j = 0; j < KV; j++) {
            append(shape, &heads[j], j, m, row);
            out.least_decay_sum = fmin(out.least_decay_sum, heads[j].c[m]);
            for (int h = j * group; h < (j + 1) * group; h++)
                output(shape, &heads[j], m, row + h * d, out.y + ((int64_t)n * H + h) * d);
        }
        if (m < T - 1)
            continue;
        int n_below = 0;
        for (int j = 0; j < KV; j++) {
            out.importance[tile] += heads[j].open_mass;
            heads[j].open_mass = 0;
        }
        for (int t = 0; t < tile; t++) {
            n_below += out.importance[t] < out.importance[tile];
            note(&out, out.importance[t], out.importance[tile]);
        }
        out.pruned[tile] =
            shape->is_sparse && tile >= shape->sparsity.sink_tiles && n_below < shape->sparsity.prune_ratio * tile;
        for (int j = 0; j < KV; j++)
            close_tile(shape, &heads[j], tile, out.pruned, &out);
    }
    for (int j = 0; j < KV; j++) {
        while (heads[j].n_kept > 0)
            drop(&heads[j], 0);
        free(heads[j].kept);
        free(heads[j].state);
        free(heads[j].mass);
        free(heads[j].k);
        free(heads[j].v);
        free(heads[j].c);
        free(heads[j].query_sum);
    }
    free(heads);
    return out;
}

void attention_reference_free(attention_reference *reference) {
    free(reference->y);
    free(reference->importance);
    free(reference->pruned);
}
