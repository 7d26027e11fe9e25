#include "runtime/utf8_stream.h"

#include <string.h>

// Starts a character of several bytes at its first byte; false if no character starts so. The range of the second byte
// is what rules out overlong forms, surrogates and anything above U+10FFFF.
static bool begin_character(ts_utf8_stream *stream, uint8_t byte) {
    stream->lowest = 0x80;
    stream->highest = 0xBF;
    if (byte >= 0xC2 && byte <= 0xDF) {
        stream->n_missing = 1;
    } else if (byte >= 0xE0 && byte <= 0xEF) {
        stream->n_missing = 2;
        if (byte == 0xE0)
            stream->lowest = 0xA0;
        else if (byte == 0xED)
            stream->highest = 0x9F;
    } else if (byte >= 0xF0 && byte <= 0xF4) {
        stream->n_missing = 3;
        if (byte == 0xF0)
            stream->lowest = 0x90;
        else if (byte == 0xF4)
            stream->highest = 0x8F;
    } else {
        return false;
    }
    stream->held[0] = byte;
    stream->n_held = 1;
    return true;
}

static size_t put_replacement(char *out) {
    memcpy(out, "\xEF\xBF\xBD", 3);
    return 3;
}

size_t ts_utf8_stream_push(ts_utf8_stream *stream, const char *bytes, size_t n_bytes, char *out) {
    size_t n = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        const uint8_t byte = (uint8_t)bytes[i];
        if (stream->n_held > 0) {
            if (byte >= stream->lowest && byte <= stream->highest) {
                stream->lowest = 0x80;
                stream->highest = 0xBF;
                if (--stream->n_missing > 0) {
                    stream->held[stream->n_held++] = byte;
                } else {
                    memcpy(out + n, stream->held, stream->n_held);
                    n += stream->n_held;
                    out[n++] = (char)byte;
                    stream->n_held = 0;
                }
                continue;
            }
            n += ts_utf8_stream_flush(stream, out + n); // broken off; this byte begins something new
        }
        if (byte < 0x80)
            out[n++] = (char)byte;
        else if (!begin_character(stream, byte))
            n += put_replacement(out + n);
    }
    return n;
}

size_t ts_utf8_stream_flush(ts_utf8_stream *stream, char *out) {
    if (stream->n_held == 0)
        return 0;
    stream->n_held = 0;
    stream->n_missing = 0;
    return put_replacement(out);
}

bool ts_utf8_is_valid(const char *text, size_t n_bytes, size_t *at) {
    ts_utf8_stream stream = {0};
    size_t i = 0;
    while (i < n_bytes) {
        uint64_t word;
        if (i + sizeof word <= n_bytes) { // eight ASCII bytes at a time
            memcpy(&word, text + i, sizeof word);
            if ((word & UINT64_C(0x8080808080808080)) == 0) {
                i += sizeof word;
                continue;
            }
        }
        const size_t begin = i;
        const uint8_t first = (uint8_t)text[i++];
        if (first < 0x80)
            continue;
        *at = begin;
        if (!begin_character(&stream, first))
            return false;
        for (; stream.n_missing > 0; stream.n_missing--, i++) {
            if (i == n_bytes || (uint8_t)text[i] < stream.lowest || (uint8_t)text[i] > stream.highest)
                return false;
            stream.lowest = 0x80;
            stream.highest = 0xBF;
        }
    }
    return true;
}
