#include "comm/message.h"

#include "kernels/base/dtype.h"

#include <stdlib.h>
#include <string.h>

ts_status ts_message_reserve(ts_message *message, size_t capacity) {
    if (capacity <= message->capacity)
        return TS_OK;
    // Growing by half at least keeps repeated appends linear in the final size.
    size_t wanted;
    if (!ts_size_add(message->capacity, message->capacity / 2, &wanted) || wanted < capacity)
        wanted = capacity;
    unsigned char *data = realloc(message->data, wanted);
    if (data == NULL)
        return TS_FAIL(TS_ERR_MEMORY, "comm: no memory for a message of %zu bytes", capacity);
    message->data = data;
    message->capacity = wanted;
    return TS_OK;
}

ts_status ts_message_set(ts_message *message, const void *data, size_t n_bytes) {
    message->n_bytes = 0;
    return ts_message_append(message, data, n_bytes);
}

ts_status ts_message_append(ts_message *message, const void *data, size_t n_bytes) {
    ts_status status = TS_OK;
    size_t total;
    TS_CHECK(ts_size_add(message->n_bytes, n_bytes, &total), TS_ERR_MEMORY,
             "comm: a message of %zu + %zu bytes does not fit in memory", message->n_bytes, n_bytes);
    TS_TRY(ts_message_reserve(message, total));
    if (n_bytes > 0)
        memcpy(message->data + message->n_bytes, data, n_bytes);
    message->n_bytes = total;
done:
    return status;
}

void ts_message_free(ts_message *message) {
    if (message == NULL)
        return;
    free(message->data);
    *message = (ts_message){0};
}
