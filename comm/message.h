// A growable run of bytes that its owner keeps and reuses, so that a loop which receives or gathers allocates only
// while its largest message still grows.
//
//     ts_message message = {0};
//     ... ts_group_wait(group, &from, &message) ...   // message.data [message.n_bytes]
//     ts_message_free(&message);
#ifndef TS_COMM_MESSAGE_H
#define TS_COMM_MESSAGE_H

#include "kernels/base/status.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Owned by whoever declares it; {0} is empty. `data` comes from malloc and may be NULL while n_bytes is 0.
typedef struct ts_message {
    unsigned char *data;
    size_t n_bytes, capacity;
} ts_message;

// Makes capacity at least `capacity`; data[0..n_bytes) stays as it is, though it may move. Not collective.
// TS_ERR_MEMORY: the message is unchanged.
ts_status ts_message_reserve(ts_message *message, size_t capacity);

// Replaces the content by a copy of data[0..n_bytes), which must not lie inside the message. Not collective.
ts_status ts_message_set(ts_message *message, const void *data, size_t n_bytes);

// Adds a copy of data[0..n_bytes), which must not lie inside the message, at the end. Not collective.
ts_status ts_message_append(ts_message *message, const void *data, size_t n_bytes);

// Releases the storage and leaves {0}. NULL is fine. Not collective.
void ts_message_free(ts_message *message);

#ifdef __cplusplus
}
#endif
#endif
