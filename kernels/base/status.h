// How a function says that it failed: a code to branch on and a sentence for a person.
//
//     ts_status ts_thing_open(const char *path, ts_thing **out) {
//         ts_status status = TS_OK;
//         TS_CHECK(path[0] != '\0', TS_ERR_INVALID, "thing: the path is empty; give a file name");
//         TS_TRY(ts_thing_read(path));
//     done:
//         return status;
//     }
//
// Whoever decides an error writes the sentence (what, where, what is allowed); whoever forwards it stays silent; the
// launcher prints it once, with its rank. Bad input is a status; a bug of our own is an assert.
#ifndef TS_BASE_STATUS_H
#define TS_BASE_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ts_status {
    TS_OK = 0,
    TS_ERR_INVALID,     // a value that the caller or the user gave is not allowed
    TS_ERR_FORMAT,      // a file's content breaks its format
    TS_ERR_IO,          // the operating system refused a file operation
    TS_ERR_MEMORY,      // host or device memory ran out
    TS_ERR_UNSUPPORTED, // well formed, but this build or backend does not do it
    TS_ERR_DEVICE,      // the accelerator or its library failed
    TS_ERR_COMM,        // a peer rank or the communication library failed
    TS_ERR_INTERNAL,    // a promise between our own parts was broken
    TS_N_STATUSES
} ts_status;

// Short fixed name of a code, for logs ("invalid", "format", ...). Never NULL.
const char *ts_status_name(ts_status code);

// The sentence of the last failure decided on this thread; "" if none. Borrowed until the thread's next failure.
const char *ts_status_message(void);

// Stores the sentence for this thread and returns `code`. Use through TS_FAIL. `code` must not be TS_OK.
ts_status ts_status_fail(ts_status code, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define TS_FAIL(code, ...) ts_status_fail((code), __VA_ARGS__)

// Both need a local `ts_status status` and a label `done:`, where everything the function owns is released.
#define TS_TRY(expression)                                                                                             \
    do {                                                                                                               \
        status = (expression);                                                                                         \
        if (status != TS_OK)                                                                                           \
            goto done;                                                                                                 \
    } while (0)

#define TS_CHECK(condition, code, ...)                                                                                 \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            status = TS_FAIL((code), __VA_ARGS__);                                                                     \
            goto done;                                                                                                 \
        }                                                                                                              \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
