// A device: where tensors live and ops run. One process drives one device.
//
//     TS_TRY(ts_cpu_device_create(n_threads, &device)); // or another backend's constructor
//     TS_TRY(ts_device_alloc(device, n_bytes, "weights", &data));
//     TS_TRY(ts_op_linear(device, &args)); // enqueued, in order
//     TS_TRY(ts_device_download(device, host, data, n_bytes)); // waits for what was enqueued before it
//     ts_device_free(device);
//
// Work is ordered: each call acts as if it began when the one before it had ended. Only download, synchronize and a
// timer's stop wait.
// A backend is one ts_device_backend table for memory and one ts_ops table for arithmetic; shared code knows no other
// name of it. A device is used from one thread at a time.
#ifndef TS_DEVICE_H
#define TS_DEVICE_H

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ts_device ts_device;
typedef struct ts_ops ts_ops;
typedef struct ts_device_graph ts_device_graph;

typedef struct ts_device_backend {
    const char *name; // "cpu", "cuda"
    void (*free)(ts_device *device);
    ts_status (*alloc)(ts_device *device, size_t n_bytes, void **out);
    void (*release)(ts_device *device, void *data);
    ts_status (*upload)(ts_device *device, void *data, const void *host, size_t n_bytes);
    ts_status (*download)(ts_device *device, void *host, const void *data, size_t n_bytes);
    ts_status (*copy)(ts_device *device, void *to, const void *from, size_t n_bytes);
    ts_status (*zero)(ts_device *device, void *data, size_t n_bytes);
    ts_status (*synchronize)(ts_device *device);
    ts_status (*memory)(ts_device *device, size_t *free_bytes, size_t *total_bytes);
    ts_status (*reserve_scratch)(ts_device *device, size_t n_bytes);
    // Recorded work; all NULL where the backend records none.
    ts_status (*capture_begin)(ts_device *device);
    ts_status (*capture_end)(ts_device *device, ts_device_graph **out);
    ts_status (*graph_launch)(ts_device *device, ts_device_graph *graph);
    bool (*graph_is_current)(const ts_device *device, const ts_device_graph *graph);
    void (*graph_free)(ts_device_graph *graph);
    // Marks an instant between what was enqueued before and after; seconds from mark 0 to mark 1, once both have
    // passed.
    ts_status (*mark)(ts_device *device, int mark);
    ts_status (*elapsed)(ts_device *device, double *seconds);
    // How weight matrices lie in memory; both NULL where they lie row by row.
    size_t (*weight_bytes)(int64_t n_rows, int64_t n_cols, ts_dtype dtype);
    ts_status (*upload_weight)(ts_device *device, void *data, const void *host, int64_t n_rows, int64_t n_cols,
                               ts_dtype dtype);
} ts_device_backend;

// What every backend's device begins with.
struct ts_device {
    const ts_device_backend *backend;
    const ts_ops *ops;
    // Spans of different sequences may share one prefill batch without changing a bit of any row's value (I3).
    bool packs_prefill;
    // Of a model's activations, but for its residual stream and logits, which are F32.
    ts_dtype compute_dtype;
    // Of tile states held in a cache for this device: the compute dtype, unless whoever creates the device sets F32,
    // BF16 or FP8_E4M3 before any cache is made.
    ts_dtype slot_dtype;
    size_t scratch_bytes; // that ops work in: what was reserved, or more where an op has needed more
};

// Frees the device; what was allocated on it must have been released. Accepts NULL.
void ts_device_free(ts_device *device);

// Zero-filled memory, aligned to 256 bytes. `what` names it in the error. Not on the token path.
ts_status ts_device_alloc(ts_device *device, size_t n_bytes, const char *what, void **out);

// Accepts NULL.
void ts_device_release(ts_device *device, void *data);

// Host to device. `host` may be reused at once.
ts_status ts_device_upload(ts_device *device, void *data, const void *host, size_t n_bytes);

// Bytes of a weight matrix [n_rows, n_cols] in the layout that the device's ops read, and its upload from `host`, where
// it lies row by row. Only ops that say they take a weight (embed's table, linear's w) may read it.
size_t ts_device_weight_bytes(const ts_device *device, int64_t n_rows, int64_t n_cols, ts_dtype dtype);
ts_status ts_device_upload_weight(ts_device *device, void *data, const void *host, int64_t n_rows, int64_t n_cols,
                                  ts_dtype dtype);

// Device to host; returns when the bytes are there.
ts_status ts_device_download(ts_device *device, void *host, const void *data, size_t n_bytes);

// Device to device; the ranges must not overlap.
ts_status ts_device_copy(ts_device *device, void *to, const void *from, size_t n_bytes);

ts_status ts_device_zero(ts_device *device, void *data, size_t n_bytes);

// Waits for all enqueued work and returns its first failure.
ts_status ts_device_synchronize(ts_device *device);

// Makes the scratch that ops work in n_bytes large, so that those that need no more take none later. TS_ERR_MEMORY
// where there is not so much.
ts_status ts_device_reserve_scratch(ts_device *device, size_t n_bytes);

// Work as a graph, enqueued again with one call. Between begin and end ops are recorded, not run; nothing may be
// allocated, uploaded or downloaded there, so run the same ops once before. What the ops read and write must stay where
// it is. end also ends a recording in which an op has failed, and then fails.
bool ts_device_can_capture(const ts_device *device);
ts_status ts_device_capture_begin(ts_device *device);
ts_status ts_device_capture_end(ts_device *device, ts_device_graph **out);
ts_status ts_device_graph_launch(ts_device *device, ts_device_graph *graph);
// False once the device's own scratch has moved: record it again.
bool ts_device_graph_is_current(const ts_device *device, const ts_device_graph *graph);
void ts_device_graph_free(ts_device *device, ts_device_graph *graph); // accepts NULL

// Seconds that the device takes for what is enqueued between start and stop; stop waits for it. One timer a device.
ts_status ts_device_timer_start(ts_device *device);
ts_status ts_device_timer_stop(ts_device *device, double *seconds);

// Bytes that could still be allocated, and bytes in all.
ts_status ts_device_memory(ts_device *device, size_t *free_bytes, size_t *total_bytes);

#ifdef __cplusplus
}
#endif
#endif
