#include "kernels/base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

static struct {
    int rank, size;
    ts_log_level level;
} log_config = {0, 1, TS_LOG_INFO};

void ts_log_configure(int rank, int size, ts_log_level level) {
    log_config.rank = rank;
    log_config.size = size;
    log_config.level = level;
}

void ts_log(ts_log_level level, const char *format, ...) {
    static const char *const names[] = {"error: ", "warning: ", "", "debug: "};
    if (level > log_config.level)
        return;
    char line[4096];
    int n = log_config.size > 1 ? snprintf(line, sizeof line, "tessera[%d]: %s", log_config.rank, names[level])
                                : snprintf(line, sizeof line, "tessera: %s", names[level]);
    va_list args;
    va_start(args, format);
    int more = vsnprintf(line + n, sizeof line - (size_t)n - 1, format, args);
    va_end(args);
    n += more < (int)sizeof line - n - 1 ? more : (int)sizeof line - n - 2;
    line[n++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, (size_t)n);
    (void)written; // nowhere left to report a failing stderr
}
