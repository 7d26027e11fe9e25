#include "runtime/decode_graphs.h"

#include <stdlib.h>

enum { MAX_GRAPHS = 16, STEPS_BEFORE = 3 };

typedef struct recorded {
    ts_device_graph *graph;
    int64_t n_rows, last_used, sampler_moves;
    bool closes; // tiles, in sparse form
    ts_tensor logits;
} recorded;

struct ts_decode_graphs {
    ts_device *device;
    ts_model *model;
    ts_tile_cache *cache;
    ts_device_sampler *sampler;
    bool is_possible;
    recorded graphs[MAX_GRAPHS];
    int64_t n_steps, n_rows, n_alike; // steps so far; of the last ones, how many had n_rows
};

ts_status ts_decode_graphs_create(ts_device *device, ts_group *tp, ts_model *model, ts_tile_cache *cache,
                                  ts_device_sampler *sampler, ts_decode_graphs **out) {
    ts_decode_graphs *graphs = calloc(1, sizeof *graphs);
    if (!graphs)
        return TS_FAIL(TS_ERR_MEMORY, "decode: out of memory");
    graphs->device = device;
    graphs->model = model;
    graphs->cache = cache;
    graphs->sampler = sampler;
    graphs->is_possible = ts_device_can_capture(device) && ts_group_size(tp) == 1;
    *out = graphs;
    return TS_OK;
}

void ts_decode_graphs_free(ts_decode_graphs *graphs) {
    if (!graphs)
        return;
    for (int i = 0; i < MAX_GRAPHS; i++)
        ts_device_graph_free(graphs->device, graphs->graphs[i].graph);
    free(graphs);
}

static ts_status step(ts_decode_graphs *graphs, const ts_batch *batch, ts_tensor *logits) {
    ts_status status = TS_OK;
    TS_TRY(ts_model_forward(graphs->model, graphs->cache, batch));
    TS_TRY(ts_model_logits(graphs->model, NULL, batch->n_rows, true, logits));
    if (graphs->sampler)
        TS_TRY(ts_device_sampler_enqueue(graphs->sampler, *logits));
done:
    return status;
}

static int64_t sampler_moves(const ts_decode_graphs *graphs) {
    return graphs->sampler ? ts_device_sampler_moves(graphs->sampler) : 0;
}

static bool holds(const recorded *place, int64_t n_rows, bool closes) {
    return place->graph && place->n_rows == n_rows && place->closes == closes;
}

// The place of the graph for this many rows, or the one that was used least lately.
static recorded *place_of(ts_decode_graphs *graphs, int64_t n_rows, bool closes) {
    recorded *oldest = &graphs->graphs[0];
    for (int i = 0; i < MAX_GRAPHS; i++) {
        if (holds(&graphs->graphs[i], n_rows, closes))
            return &graphs->graphs[i];
        if (graphs->graphs[i].last_used < oldest->last_used)
            oldest = &graphs->graphs[i];
    }
    return oldest;
}

static ts_status record(ts_decode_graphs *graphs, const ts_batch *batch, bool closes, recorded *place) {
    ts_status status = TS_OK;
    ts_device_graph_free(graphs->device, place->graph);
    *place = (recorded){.n_rows = batch->n_rows, .closes = closes, .sampler_moves = sampler_moves(graphs)};
    TS_TRY(ts_device_capture_begin(graphs->device));
    const ts_status recorded_status = step(graphs, batch, &place->logits);
    const ts_status ended = ts_device_capture_end(graphs->device, &place->graph);
    TS_TRY(recorded_status);
    TS_TRY(ended);
done:
    return status;
}

ts_status ts_decode_graphs_run(ts_decode_graphs *graphs, const ts_batch *batch, ts_tensor *logits) {
    ts_status status = TS_OK;
    const ts_config *config = ts_model_config(graphs->model);
    graphs->n_steps++;
    graphs->n_alike = batch->n_rows == graphs->n_rows ? graphs->n_alike + 1 : 1;
    graphs->n_rows = batch->n_rows;
    const bool closes = config->is_sparse && ts_batch_tiles_completed(batch, config->tile_size) > 0;
    if (!graphs->is_possible || (closes && config->sparsity.prune_ratio > 0)) {
        TS_TRY(step(graphs, batch, logits));
        goto done;
    }
    recorded *place = place_of(graphs, batch->n_rows, closes);
    const bool is_there = holds(place, batch->n_rows, closes);
    if (!is_there && graphs->n_alike <= STEPS_BEFORE) {
        TS_TRY(step(graphs, batch, logits));
        goto done;
    }
    if (!is_there || place->sampler_moves != sampler_moves(graphs) ||
        !ts_device_graph_is_current(graphs->device, place->graph))
        TS_TRY(record(graphs, batch, closes, place));
    place->last_used = graphs->n_steps;
    TS_TRY(ts_device_graph_launch(graphs->device, place->graph));
    *logits = place->logits;
done:
    return status;
}
