// I8: memory of the GPU follows the formulas of ts_model_weight_bytes, ts_model_activation_bytes and the tile cache,
// and does not grow while decoding. A host's memory is not this process's alone, so the test is for a GPU.
#include "golden_case.h"

#include "runtime/decode_graphs.h"
#include "runtime/tile_cache.h"

enum { N_SEQUENCES = 8, N_PAGES = 4000, CHUNK = 512, N_PROMPT = 1000, N_WARM = 70, N_STEPS = 200 };

// The driver hands memory out in pieces of 2 MiB; an allocation may fill its last one badly.
static double piece_bytes(int n_allocations) {
    return n_allocations * (double)(2 << 20);
}

static double free_bytes(ts_device *device) {
    size_t free, total;
    MUST(ts_device_memory(device, &free, &total));
    return (double)free;
}

static void check_taken(const char *what, double before, double after, double expected, int n_allocations) {
    cr_log_info("%s: %.0f bytes taken, %.0f by the formula", what, before - after, expected);
    cr_expect(before - after >= expected && before - after <= expected + piece_bytes(n_allocations),
              "%s: %.0f bytes taken, %.0f by the formula", what, before - after, expected);
}

static void forward(golden_case *golden, ts_tile_cache *cache, ts_batch_buffer *buffer) {
    const ts_batch *batch;
    MUST(ts_batch_buffer_upload(buffer, &batch));
    MUST(ts_model_forward(golden->model, cache, batch));
}

static void check_memory(const char *directory, ts_dtype dtype) {
    golden_case golden = golden_open(directory, dtype, 1);
    const ts_config *config = ts_model_config(golden.model);
    ts_tile_cache_shape shape = ts_tile_cache_shape_of(config, 1);
    shape.open_dtype = dtype;
    shape.slot_dtype = dtype;
    ts_tile_cache *cache;
    ts_batch_buffer *buffer;
    ts_decode_graphs *graphs;
    ts_device_sampler *sampler;
    ts_sampler_row greedy = {.params = ts_sampling_params_default()};
    const ts_sampler_row *sampled[N_SEQUENCES];
    ts_next_token next[N_SEQUENCES];
    double before = free_bytes(golden.device);
    MUST(ts_tile_cache_create(golden.device, &shape, N_SEQUENCES, N_PAGES, &cache));
    double after = free_bytes(golden.device);
    check_taken(
        "tile cache", before, after,
        (double)(N_SEQUENCES * ts_tile_cache_sequence_bytes(&shape) + N_PAGES * ts_tile_cache_page_bytes(&shape)),
        config->n_layers + 4);
    before = after;
    MUST(ts_model_reserve(golden.model, 1 << 17));
    after = free_bytes(golden.device);
    check_taken("activations", before, after, (double)ts_model_activation_bytes(config, dtype, 1, 1 << 17), 2);
    MUST(ts_batch_buffer_create(golden.device, CHUNK, &buffer));
    MUST(ts_device_sampler_create(golden.device, N_SEQUENCES, &sampler));
    MUST(ts_device_reserve_scratch(
        golden.device, ts_model_scratch_bytes(golden.model, ts_tile_cache_layer_at(cache, 0), CHUNK, N_SEQUENCES)));
    MUST(ts_decode_graphs_create(golden.device, golden.self, golden.model, cache, sampler, N_SEQUENCES, &graphs));
    MUST(ts_decode_graphs_warm_up(graphs, buffer));
    const size_t scratch_bytes = golden.device->scratch_bytes;
    cr_expect(scratch_bytes > 0);
    greedy.params.temperature = 0;
    for (int s = 0; s < N_SEQUENCES; s++)
        sampled[s] = &greedy;
    // Prompts of different lengths, so that tiles close at different steps.
    for (int s = 0; s < N_SEQUENCES; s++) {
        const int64_t n_prompt = N_PROMPT + 7 * s;
        MUST(ts_tile_cache_open(cache, s, n_prompt + N_WARM + N_STEPS));
        for (int64_t first = 0; first < n_prompt; first += CHUNK) {
            const int64_t left = n_prompt - first;
            ts_batch_buffer_clear(buffer, false);
            MUST(ts_batch_buffer_add(buffer, s, first, golden.tokens + first % 100,
                                     (int32_t)(left < CHUNK ? left : CHUNK)));
            forward(&golden, cache, buffer);
        }
    }
    // The first steps record graphs and close a tile of every sequence.
    const double before_decode = free_bytes(golden.device);
    for (int64_t step = 0; step < N_WARM + N_STEPS; step++) {
        ts_tensor logits;
        ts_batch_buffer_clear(buffer, true);
        for (int s = 0; s < N_SEQUENCES; s++)
            MUST(ts_batch_buffer_add(buffer, s, N_PROMPT + 7 * s + step, golden.tokens + (step + s) % golden.n_tokens,
                                     1));
        MUST(ts_decode_graphs_run(graphs, buffer, sampled, &logits));
        MUST(ts_device_sampler_collect(sampler, sampled, N_SEQUENCES, next));
        if (step == N_WARM)
            before = free_bytes(golden.device);
    }
    MUST(ts_device_synchronize(golden.device));
    after = free_bytes(golden.device);
    cr_log_info("first %d decode steps: %.0f bytes for graphs and kernels", N_WARM, before_decode - before);
    cr_expect(before == after, "%s %s: %.0f bytes free before %d decode steps, %.0f after them", directory,
              ts_dtype_name(dtype), before, N_STEPS, after);
    cr_expect_eq(golden.device->scratch_bytes, scratch_bytes,
                 "%s %s: %zu bytes of scratch were reserved, %zu are taken", directory, ts_dtype_name(dtype),
                 scratch_bytes, golden.device->scratch_bytes);
    ts_decode_graphs_free(graphs);
    ts_device_sampler_free(sampler);
    ts_batch_buffer_free(buffer);
    ts_tile_cache_free(cache);
    golden_close(&golden);
}

// One test, not one for each dtype: Criterion runs tests beside each other, and free memory is the whole device's.
Test(memory, of_the_demo_model) {
    check_memory(TS_SOURCE_DIR "/configs/models/demo", TS_F32);
    check_memory(TS_SOURCE_DIR "/configs/models/demo", TS_BF16);
}
