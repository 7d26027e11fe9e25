#include "comm/message.h"

#include <criterion/criterion.h>
#include <stdint.h>
#include <string.h>

Test(message, appends_keep_what_is_there) {
    ts_message message = {0};
    for (int i = 0; i < 1000; i++)
        cr_assert_eq(ts_message_append(&message, &i, sizeof i), TS_OK);
    cr_assert_eq(message.n_bytes, 1000 * sizeof(int));
    for (int i = 0; i < 1000; i++)
        cr_assert_eq(memcmp(message.data + (size_t)i * sizeof i, &i, sizeof i), 0, "element %d", i);
    ts_message_free(&message);
    cr_assert(message.data == NULL && message.n_bytes == 0 && message.capacity == 0);
}

Test(message, setting_again_reuses_the_storage) {
    ts_message message = {0};
    cr_assert_eq(ts_message_set(&message, "a longer text", 13), TS_OK);
    const unsigned char *before = message.data;
    cr_assert_eq(ts_message_set(&message, "short", 5), TS_OK);
    cr_assert_eq(message.data, before);
    cr_assert(message.n_bytes == 5 && memcmp(message.data, "short", 5) == 0);
    cr_assert_eq(ts_message_set(&message, NULL, 0), TS_OK);
    cr_assert_eq(message.n_bytes, 0);
    ts_message_free(&message);
}

Test(message, impossible_sizes_leave_it_unchanged) {
    ts_message message = {0};
    cr_assert_eq(ts_message_set(&message, "kept", 4), TS_OK);
    cr_assert_eq(ts_message_append(&message, "x", SIZE_MAX), TS_ERR_MEMORY, "4 + SIZE_MAX wraps around");
    cr_assert_eq(ts_message_reserve(&message, SIZE_MAX / 2 - 64), TS_ERR_MEMORY);
    cr_assert(message.n_bytes == 4 && memcmp(message.data, "kept", 4) == 0);
    ts_message_free(&message);
    ts_message_free(NULL);
}
