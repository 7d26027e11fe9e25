#include "comm/inbox.h"

#include <stdlib.h>

struct ts_inbox_entry {
    struct ts_inbox_entry *next;
    ts_message message;
    int from;
};

ts_status ts_inbox_push(ts_inbox *inbox, int from, ts_message *message) {
    struct ts_inbox_entry *entry = malloc(sizeof *entry);
    if (entry == NULL)
        return TS_FAIL(TS_ERR_MEMORY, "comm: no memory to keep a message of %zu bytes from rank %d", message->n_bytes,
                       from);
    *entry = (struct ts_inbox_entry){.message = *message, .from = from};
    *message = (ts_message){0};
    if (inbox->last != NULL)
        inbox->last->next = entry;
    else
        inbox->first = entry;
    inbox->last = entry;
    return TS_OK;
}

bool ts_inbox_pop(ts_inbox *inbox, int *from, ts_message *message) {
    struct ts_inbox_entry *entry = inbox->first;
    if (entry == NULL)
        return false;
    inbox->first = entry->next;
    if (inbox->first == NULL)
        inbox->last = NULL;
    ts_message_free(message);
    *message = entry->message;
    *from = entry->from;
    free(entry);
    return true;
}

void ts_inbox_clear(ts_inbox *inbox) {
    ts_message dropped = {0};
    int from;
    while (ts_inbox_pop(inbox, &from, &dropped)) {
    }
    ts_message_free(&dropped);
}
