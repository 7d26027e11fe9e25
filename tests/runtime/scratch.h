// A directory of its own for a test that writes files, and edits that break a text on purpose.
#ifndef TS_TEST_SCRATCH_H
#define TS_TEST_SCRATCH_H

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct scratch {
    char dir[256];
} scratch;

static inline scratch scratch_create(void) {
    scratch s;
    snprintf(s.dir, sizeof s.dir, "%s/scratch.XXXXXX", TS_BINARY_DIR);
    cr_assert_not_null(mkdtemp(s.dir));
    return s;
}

// Files only, one level.
static inline void scratch_remove(const scratch *s) {
    char path[600];
    DIR *dir = opendir(s->dir);
    cr_assert_not_null(dir);
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        snprintf(path, sizeof path, "%s/%s", s->dir, e->d_name);
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            cr_assert_eq(remove(path), 0, "%s", path);
    }
    closedir(dir);
    cr_assert_eq(rmdir(s->dir), 0);
}

static inline size_t scratch_count_files(const scratch *s) {
    size_t n = 0;
    DIR *dir = opendir(s->dir);
    cr_assert_not_null(dir);
    for (struct dirent *e; (e = readdir(dir)) != NULL;)
        n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(dir);
    return n;
}

// Writes DIR/NAME and returns its path, valid until the fourth call after this one.
static inline const char *scratch_write(const scratch *s, const char *name, const void *bytes, size_t n_bytes) {
    static char paths[4][600];
    static int turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", s->dir, name);
    FILE *f = fopen(path, "wb");
    cr_assert_not_null(f, "%s", path);
    cr_assert_eq(fwrite(bytes, 1, n_bytes, f), n_bytes);
    cr_assert_eq(fclose(f), 0);
    return path;
}

// xorshift64: the same edits in every run.
static inline uint64_t scratch_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

// One to four random edits of text[n], which has room for `capacity` bytes; returns the new length.
static inline size_t scratch_mutate(char *text, size_t n, size_t capacity, uint64_t *state) {
    static const char *const tokens[] = {
        "-1",         "0",       "9223372036854775807",
        "4294967296", "1e400",   "0.5",
        "null",       "[]",      "{}",
        "\"",         ",",       "[",
        "]",          "\\u0000", "\xff",
        "true",       "64",      "-0",
        "[[[[[",      ":",       "\"\":",
        "\xc2\x9b",
    };
    for (uint64_t edits = 1 + scratch_random(state) % 4; edits > 0; edits--) {
        const size_t at = n > 0 ? scratch_random(state) % n : 0, left = n - at;
        const char *token = tokens[scratch_random(state) % (sizeof tokens / sizeof *tokens)];
        const size_t n_token = strlen(token), span = left > 0 ? 1 + scratch_random(state) % (left < 12 ? left : 12) : 0;
        switch (scratch_random(state) % 5) {
        case 0: // another byte
            if (left > 0)
                text[at] = (char)scratch_random(state);
            break;
        case 1: // a digit, where one was likely
            if (left > 0 && text[at] >= '0' && text[at] <= '9')
                text[at] = (char)('0' + scratch_random(state) % 10);
            break;
        case 2: // a span less
            memmove(text + at, text + at + span, left - span);
            n -= span;
            break;
        case 3: // a token more
            if (n + n_token <= capacity) {
                memmove(text + at + n_token, text + at, left);
                memcpy(text + at, token, n_token);
                n += n_token;
            }
            break;
        default: // a span twice
            if (n + span <= capacity) {
                memmove(text + at + span, text + at, left);
                n += span;
            }
        }
    }
    return n;
}

#endif
