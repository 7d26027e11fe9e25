// Messages that have arrived and wait for their reader, oldest first. Internal to the backends.
#ifndef TS_COMM_INBOX_H
#define TS_COMM_INBOX_H

#include "comm/message.h"

#include <stdbool.h>

// {0} is empty.
typedef struct ts_inbox {
    struct ts_inbox_entry *first, *last;
} ts_inbox;

// Takes over the storage of *message, which becomes {0}. TS_ERR_MEMORY: nothing is taken.
ts_status ts_inbox_push(ts_inbox *inbox, int from, ts_message *message);

// Hands the oldest message to the caller, whose old storage is released. False, and the outputs left alone, when empty.
bool ts_inbox_pop(ts_inbox *inbox, int *from, ts_message *message);

// Drops whatever is left.
void ts_inbox_clear(ts_inbox *inbox);

#endif
