#include "runtime/input_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *file_kind(mode_t mode) {
    return S_ISDIR(mode) ? "a directory" : S_ISFIFO(mode) ? "a FIFO" : S_ISSOCK(mode) ? "a socket" : "a device";
}

ts_status ts_input_file_open(const char *path, int *out_fd, size_t *out_n_bytes) {
    ts_status status = TS_OK;
    struct stat info;
    // O_NONBLOCK: the open of a FIFO without a writer would never return. It means nothing to a regular file.
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    TS_CHECK(fd >= 0, TS_ERR_IO, "%s: cannot open: %s; a readable file is needed", path, strerror(errno));
    TS_CHECK(fstat(fd, &info) == 0, TS_ERR_IO, "%s: cannot read its size: %s", path, strerror(errno));
    TS_CHECK(S_ISREG(info.st_mode), TS_ERR_INVALID, "%s: is %s; a regular file is needed", path,
             file_kind(info.st_mode));
    TS_CHECK(info.st_size > 0, TS_ERR_FORMAT, "%s: the file is empty (0 bytes)", path);
    *out_n_bytes = (size_t)info.st_size;
    *out_fd = fd;
    fd = -1;
done:
    if (fd >= 0)
        close(fd);
    return status;
}
