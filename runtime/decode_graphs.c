#include "runtime/decode_graphs.h"

#include <assert.h>
#include <stdlib.h>

// 1, 2, 3, 4, 6, 8, 12 and so on: powers of two and what lies halfway between. Two for every bit of an int32_t.
enum { N_SIZES = 64 };

typedef struct recorded {
    ts_device_graph *graph;
    bool has_run; // op by op: its kernels are loaded, and without a warm-up memory has grown and algorithms are chosen
    int64_t sampler_moves;
    ts_tensor logits;
} recorded;

struct ts_decode_graphs {
    ts_device *device;
    ts_model *model;
    ts_tile_cache *cache;
    ts_device_sampler *sampler;
    bool is_possible;
    int32_t max_rows;
    recorded graphs[N_SIZES][2]; // [1]: of steps in which a tile completes, in sparse form
};

ts_status ts_decode_graphs_create(ts_device *device, ts_group *tp, ts_model *model, ts_tile_cache *cache,
                                  ts_device_sampler *sampler, int32_t max_rows, ts_decode_graphs **out) {
    ts_decode_graphs *graphs = calloc(1, sizeof *graphs);
    if (!graphs)
        return TS_FAIL(TS_ERR_MEMORY, "decode: out of memory");
    graphs->device = device;
    graphs->model = model;
    graphs->cache = cache;
    graphs->sampler = sampler;
    graphs->is_possible = ts_device_can_capture(device) && ts_group_size(tp) == 1;
    graphs->max_rows = max_rows;
    *out = graphs;
    return TS_OK;
}

void ts_decode_graphs_free(ts_decode_graphs *graphs) {
    if (!graphs)
        return;
    for (int i = 0; i < N_SIZES; i++)
        for (int closes = 0; closes < 2; closes++)
            ts_device_graph_free(graphs->device, graphs->graphs[i][closes].graph);
    free(graphs);
}

static int64_t size_at(int i) {
    return i == 0 ? 1 : i % 2 ? INT64_C(2) << i / 2 : INT64_C(3) << (i / 2 - 1);
}

// The smallest size that holds n rows.
static int size_for(int64_t n) {
    int i = 0;
    while (size_at(i) < n)
        i++;
    return i;
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

static bool is_current(const ts_decode_graphs *graphs, const recorded *place) {
    return place->graph && place->sampler_moves == sampler_moves(graphs) &&
           ts_device_graph_is_current(graphs->device, place->graph);
}

static ts_status record(ts_decode_graphs *graphs, const ts_batch *batch, recorded *place) {
    ts_status status = TS_OK;
    ts_device_graph_free(graphs->device, place->graph);
    place->graph = NULL;
    place->sampler_moves = sampler_moves(graphs);
    TS_TRY(ts_device_capture_begin(graphs->device));
    const ts_status recorded_status = step(graphs, batch, &place->logits);
    const ts_status ended = ts_device_capture_end(graphs->device, &place->graph);
    TS_TRY(recorded_status);
    TS_TRY(ended);
done:
    return status;
}

// Uploads the batch filled up to a size that is recorded, and has the sampler know the n rows that count.
static ts_status prepare(ts_decode_graphs *graphs, ts_batch_buffer *buffer, const ts_sampler_row *const *sampled,
                         int32_t n, int64_t n_rows, const ts_batch **batch) {
    ts_status status = TS_OK;
    TS_TRY(ts_batch_buffer_pad(buffer, n_rows));
    TS_TRY(ts_batch_buffer_upload(buffer, batch));
    if (graphs->sampler)
        TS_TRY(ts_device_sampler_prepare(graphs->sampler, sampled, n, (int32_t)(*batch)->n_rows));
done:
    return status;
}

ts_status ts_decode_graphs_warm_up(ts_decode_graphs *graphs, ts_batch_buffer *buffer) {
    ts_status status = TS_OK;
    const ts_batch *batch;
    ts_tensor logits;
    if (!graphs->is_possible)
        goto done;
    ts_batch_buffer_clear(buffer, true);
    TS_TRY(prepare(graphs, buffer, NULL, 0, graphs->max_rows, &batch));
    TS_TRY(step(graphs, batch, &logits));
    TS_TRY(ts_device_synchronize(graphs->device));
    graphs->graphs[size_for(graphs->max_rows)][0].has_run = true;
    ts_batch_buffer_clear(buffer, true);
done:
    return status;
}

ts_status ts_decode_graphs_run(ts_decode_graphs *graphs, ts_batch_buffer *buffer, const ts_sampler_row *const *sampled,
                               ts_tensor *logits) {
    ts_status status = TS_OK;
    const ts_config *config = ts_model_config(graphs->model);
    const int64_t n = ts_batch_buffer_rows(buffer);
    const int size = size_for(n);
    const ts_batch *batch;
    ts_tensor all;
    assert(n > 0 && n <= graphs->max_rows);
    const int64_t filled = !graphs->is_possible               ? n
                           : size_at(size) < graphs->max_rows ? size_at(size)
                                                              : graphs->max_rows;
    TS_TRY(prepare(graphs, buffer, sampled, (int32_t)n, filled, &batch));
    const bool closes = config->is_sparse && ts_batch_tiles_completed(batch, config->tile_size) > 0;
    recorded *place = &graphs->graphs[size][closes];
    if (graphs->is_possible && place->has_run) {
        if (!is_current(graphs, place))
            TS_TRY(record(graphs, batch, place));
        TS_TRY(ts_device_graph_launch(graphs->device, place->graph));
        all = place->logits;
    } else {
        TS_TRY(step(graphs, batch, &all));
        place->has_run = true;
    }
    *logits = ts_tensor_rows(all, 0, n);
done:
    return status;
}
