#include "runtime/byte_alphabet.h"

#include <stdint.h>
#include <utf8proc.h>

static bool is_own_letter(int byte) {
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

// Bytes that are printable in Latin-1 stand for themselves; the others follow, in order, from U+0100.
static int byte_of_letter(int32_t letter) {
    if (letter < 0x100)
        return letter >= 0 && is_own_letter(letter) ? letter : -1;
    int32_t next = 0x100;
    for (int byte = 0; byte < 0x100; byte++) {
        if (!is_own_letter(byte) && next++ == letter)
            return byte;
    }
    return -1;
}

bool ts_byte_alphabet_decode(const char *spelling, size_t n_spelling, char *out, size_t *n_bytes) {
    size_t n = 0;
    for (size_t i = 0; i < n_spelling;) {
        int32_t letter = -1;
        const utf8proc_ssize_t length =
            utf8proc_iterate((const utf8proc_uint8_t *)spelling + i, (utf8proc_ssize_t)(n_spelling - i), &letter);
        const int byte = length > 0 ? byte_of_letter(letter) : -1;
        if (byte < 0)
            return false;
        out[n++] = (char)byte;
        i += (size_t)length;
    }
    *n_bytes = n;
    return true;
}
