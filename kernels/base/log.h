// Lines for a person on stderr, prefixed with the rank when there are several. Nothing here decides what is an error.
#ifndef TS_BASE_LOG_H
#define TS_BASE_LOG_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ts_log_level { TS_LOG_ERROR, TS_LOG_WARNING, TS_LOG_INFO, TS_LOG_DEBUG } ts_log_level;

// Call once at start, before other threads exist: the one piece of process-wide state. `rank` is printed when `size`
// > 1.
void ts_log_configure(int rank, int size, ts_log_level level);

// Writes one line "tessera[rank]: level: text" to stderr in a single write, so that ranks do not interleave.
void ts_log(ts_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif
#endif
