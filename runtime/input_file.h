// Opening a file that somebody else wrote: only a regular, non-empty file passes.
//
// A directory, a FIFO or a device in the place of a file is refused at once, without waiting for a writer. Symbolic
// links are followed, because the Hugging Face cache is made of them.
#ifndef TS_INPUT_FILE_H
#define TS_INPUT_FILE_H

#include <stddef.h>

#include "kernels/base/status.h"

// Opens `path` for reading. *fd belongs to the caller, who closes it; *n_bytes > 0 is the size at this moment.
// Errors: TS_ERR_IO when the system refuses, TS_ERR_INVALID when it is no regular file, TS_ERR_FORMAT when it is empty.
ts_status ts_input_file_open(const char *path, int *fd, size_t *n_bytes);

#endif
