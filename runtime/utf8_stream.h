// Text out of bytes that arrive in pieces. A token may end inside a UTF-8 character: the stream holds the unfinished
// bytes back until the next token completes them, so that whatever it hands out is whole, valid UTF-8. Bytes that can
// belong to no character become U+FFFD, one for each maximal prefix of a character, which is what Python's
// bytes.decode("utf-8", "replace") gives for the same bytes however they are cut.
//
//     ts_utf8_stream stream = {0};
//     for each token:  n = ts_utf8_stream_push(&stream, bytes, n_bytes, out);   // out: TS_UTF8_STREAM_ROOM(n_bytes)
//     at the end:      n = ts_utf8_stream_flush(&stream, out);                  // out: TS_UTF8_STREAM_ROOM(0)
#ifndef TS_RUNTIME_UTF8_STREAM_H
#define TS_RUNTIME_UTF8_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// A plain value: all zero is the start of a text, and a copy of it is a snapshot.
typedef struct ts_utf8_stream {
    uint8_t held[3];         // the beginning of a character
    uint8_t n_held;          // bytes in `held`
    uint8_t n_missing;       // bytes the character still needs; 0 exactly when n_held is 0
    uint8_t lowest, highest; // what its next byte may be
} ts_utf8_stream;

// Most bytes one push of n_bytes can write: every byte may turn into U+FFFD (3 bytes), and so may what was held.
#define TS_UTF8_STREAM_ROOM(n_bytes) (3 * (size_t)(n_bytes) + 3)

// Takes n_bytes and writes the characters they complete to `out`, without a final NUL. Returns the bytes written. `out`
// has room for TS_UTF8_STREAM_ROOM(n_bytes) and does not overlap `bytes`.
size_t ts_utf8_stream_push(ts_utf8_stream *stream, const char *bytes, size_t n_bytes, char *out);

// Ends the text: a character left unfinished is written as one U+FFFD. Returns the bytes written (0 or 3); the stream
// is then ready for another text.
size_t ts_utf8_stream_flush(ts_utf8_stream *stream, char *out);

// Whether all of text[0, n_bytes) is valid UTF-8; if not, *at is the offset of the first byte of the first bad
// sequence.
bool ts_utf8_is_valid(const char *text, size_t n_bytes, size_t *at);

#endif
