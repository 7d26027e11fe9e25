// The alphabet in which byte-level vocabularies spell their tokens: each of the 256 bytes has one printable letter, so
// that any bytes can stand in a JSON string ("\u0120the" is " the").
#ifndef TS_RUNTIME_BYTE_ALPHABET_H
#define TS_RUNTIME_BYTE_ALPHABET_H

#include <stdbool.h>
#include <stddef.h>

// Writes the bytes that the letters of spelling[0, n_spelling) stand for to `out`, which has room for n_spelling, and
// sets *n_bytes. False, with *n_bytes left alone, if it has a character outside the alphabet.
bool ts_byte_alphabet_decode(const char *spelling, size_t n_spelling, char *out, size_t *n_bytes);

#endif
