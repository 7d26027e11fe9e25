#include "kernels/base/status.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_message[2048];

const char *ts_status_name(ts_status code) {
    static const char *const names[TS_N_STATUSES] = {
        "ok", "invalid", "format", "io", "memory", "unsupported", "device", "comm", "internal",
    };
    return (unsigned)code < TS_N_STATUSES ? names[code] : "unknown";
}

const char *ts_status_message(void) {
    return last_message;
}

ts_status ts_status_fail(ts_status code, const char *format, ...) {
    assert(code != TS_OK);
    // Formatted aside first: an argument may be the previous message itself.
    char message[sizeof last_message];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    snprintf(last_message, sizeof last_message, "%s", message);
    return code;
}
