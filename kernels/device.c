#include "kernels/device.h"

void ts_device_free(ts_device *device) {
    if (device)
        device->backend->free(device);
}

ts_status ts_device_alloc(ts_device *device, size_t n_bytes, const char *what, void **out) {
    ts_status status = device->backend->alloc(device, n_bytes ? n_bytes : 1, out);
    if (status != TS_ERR_MEMORY)
        return status;
    size_t free_bytes = 0, total_bytes = 0;
    (void)device->backend->memory(device, &free_bytes, &total_bytes);
    return TS_FAIL(TS_ERR_MEMORY, "%s: %zu bytes of %s memory could not be had; %zu of %zu bytes are free",
                   device->backend->name, n_bytes, what, free_bytes, total_bytes);
}

void ts_device_release(ts_device *device, void *data) {
    if (data)
        device->backend->release(device, data);
}

ts_status ts_device_upload(ts_device *device, void *data, const void *host, size_t n_bytes) {
    return n_bytes ? device->backend->upload(device, data, host, n_bytes) : TS_OK;
}

size_t ts_device_weight_bytes(const ts_device *device, int64_t n_rows, int64_t n_cols, ts_dtype dtype) {
    if (device->backend->weight_bytes)
        return device->backend->weight_bytes(n_rows, n_cols, dtype);
    return (size_t)n_rows * (size_t)n_cols * ts_dtype_bytes(dtype);
}

ts_status ts_device_upload_weight(ts_device *device, void *data, const void *host, int64_t n_rows, int64_t n_cols,
                                  ts_dtype dtype) {
    if (device->backend->upload_weight)
        return device->backend->upload_weight(device, data, host, n_rows, n_cols, dtype);
    return ts_device_upload(device, data, host, (size_t)n_rows * (size_t)n_cols * ts_dtype_bytes(dtype));
}

ts_status ts_device_download(ts_device *device, void *host, const void *data, size_t n_bytes) {
    return n_bytes ? device->backend->download(device, host, data, n_bytes) : TS_OK;
}

ts_status ts_device_copy(ts_device *device, void *to, const void *from, size_t n_bytes) {
    return n_bytes ? device->backend->copy(device, to, from, n_bytes) : TS_OK;
}

ts_status ts_device_zero(ts_device *device, void *data, size_t n_bytes) {
    return n_bytes ? device->backend->zero(device, data, n_bytes) : TS_OK;
}

ts_status ts_device_synchronize(ts_device *device) {
    return device->backend->synchronize(device);
}

ts_status ts_device_timer_start(ts_device *device) {
    return device->backend->mark(device, 0);
}

ts_status ts_device_timer_stop(ts_device *device, double *seconds) {
    ts_status status = TS_OK;
    TS_TRY(device->backend->mark(device, 1));
    TS_TRY(device->backend->elapsed(device, seconds));
done:
    return status;
}

ts_status ts_device_memory(ts_device *device, size_t *free_bytes, size_t *total_bytes) {
    return device->backend->memory(device, free_bytes, total_bytes);
}

ts_status ts_device_reserve_scratch(ts_device *device, size_t n_bytes) {
    return device->backend->reserve_scratch(device, n_bytes);
}

bool ts_device_can_capture(const ts_device *device) {
    return device->backend->capture_begin != NULL;
}

ts_status ts_device_capture_begin(ts_device *device) {
    if (!ts_device_can_capture(device))
        return TS_FAIL(TS_ERR_UNSUPPORTED, "%s: the backend records no graphs", device->backend->name);
    return device->backend->capture_begin(device);
}

ts_status ts_device_capture_end(ts_device *device, ts_device_graph **out) {
    return device->backend->capture_end(device, out);
}

ts_status ts_device_graph_launch(ts_device *device, ts_device_graph *graph) {
    return device->backend->graph_launch(device, graph);
}

bool ts_device_graph_is_current(const ts_device *device, const ts_device_graph *graph) {
    return device->backend->graph_is_current(device, graph);
}

void ts_device_graph_free(ts_device *device, ts_device_graph *graph) {
    if (graph)
        device->backend->graph_free(graph);
}
