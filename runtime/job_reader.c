#include "runtime/job_reader.h"

#include "runtime/id_set.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { FIRST_CAPACITY = 64 * 1024 };

// What the buffer may grow to: the longest line and its CRLF. If that many bytes hold no newline, the line is too long.
static const size_t CAPACITY_MAX = TS_JOB_LINE_BYTES_MAX + 2;

struct ts_job_reader {
    int file;
    char *path; // "standard input" for "-"
    bool owns_file;
    char *buffer; // [capacity]; bytes [begin, end) are read but not handed out, none of [begin, scanned) is a newline
    size_t capacity, begin, scanned, end;
    size_t n_dropped;      // bytes of the present line that were thrown away because it is too long
    bool at_eof;           // read() said so
    int64_t line;          // the last one handed out
    const char *last_text; // of that line, in the buffer
    size_t n_last_bytes;
    int64_t n_bytes_done, n_bytes_total;
    ts_id_set *ids;
};

ts_status ts_job_reader_create(const char *path, const char *temp_directory, ts_job_reader **out) {
    ts_status status = TS_OK;
    const bool is_stdin = strcmp(path, "-") == 0;
    struct stat info;
    ts_job_reader *reader = calloc(1, sizeof *reader);
    TS_CHECK(reader, TS_ERR_MEMORY, "%s: out of memory for reading it", path);
    reader->file = -1;
    reader->owns_file = !is_stdin;
    reader->path = strdup(is_stdin ? "standard input" : path);
    reader->capacity = FIRST_CAPACITY;
    reader->buffer = malloc(reader->capacity);
    TS_CHECK(reader->path && reader->buffer, TS_ERR_MEMORY, "%s: out of memory for reading it", path);
    reader->file = is_stdin ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    TS_CHECK(reader->file >= 0, TS_ERR_IO,
             "%s: cannot open the input: %s; give a file, a pipe, or - for standard input", path, strerror(errno));
    TS_CHECK(fstat(reader->file, &info) == 0, TS_ERR_IO, "%s: cannot read from it: %s", reader->path, strerror(errno));
    TS_CHECK(!S_ISDIR(info.st_mode), TS_ERR_IO, "%s: it is a directory; give a file, a pipe, or - for standard input",
             reader->path);
    reader->n_bytes_total = -1;
    if (S_ISREG(info.st_mode)) {
        const off_t at = lseek(reader->file, 0, SEEK_CUR); // standard input may have been read in part
        reader->n_bytes_total = at >= 0 && at <= info.st_size ? info.st_size - at : 0;
    }
    TS_TRY(ts_id_set_create(temp_directory, &reader->ids));
    *out = reader;
    reader = NULL;
done:
    ts_job_reader_free(reader);
    return status;
}

void ts_job_reader_free(ts_job_reader *reader) {
    if (!reader)
        return;
    if (reader->owns_file && reader->file >= 0)
        close(reader->file);
    ts_id_set_free(reader->ids);
    free(reader->buffer);
    free(reader->path);
    free(reader);
}

static int64_t bytes_read(const ts_job_reader *reader) {
    return reader->n_bytes_done + (int64_t)(reader->n_dropped + (reader->end - reader->begin));
}

// Whether the buffer holds the end of the present line: *n_bytes up to its newline, or up to the end of the input.
static bool find_end(ts_job_reader *reader, size_t *n_bytes) {
    const char *newline = memchr(reader->buffer + reader->scanned, '\n', reader->end - reader->scanned);
    reader->scanned = newline ? (size_t)(newline - reader->buffer) : reader->end;
    *n_bytes = reader->scanned - reader->begin;
    return newline || reader->at_eof;
}

// Makes room behind `end`: moves the line to the front, grows the buffer, or drops what can only be a line too long.
static ts_status make_room(ts_job_reader *reader) {
    const size_t n = reader->end - reader->begin;
    assert(reader->scanned == reader->end);
    if (n == 0)
        reader->begin = reader->scanned = reader->end = 0;
    if (reader->end < reader->capacity)
        return TS_OK;
    if (reader->n_dropped > 0 || n >= CAPACITY_MAX) {
        reader->buffer[0] = reader->buffer[reader->end - 1]; // it may be the CR of the line's end
        reader->n_dropped += n - 1;
        reader->begin = 0;
        reader->scanned = reader->end = 1;
    } else if (reader->begin > 0) {
        memmove(reader->buffer, reader->buffer + reader->begin, n);
        reader->begin = 0;
        reader->scanned = reader->end = n;
    } else {
        const size_t capacity = 2 * reader->capacity + 2 < CAPACITY_MAX ? 2 * reader->capacity : CAPACITY_MAX;
        char *buffer = realloc(reader->buffer, capacity);
        if (!buffer)
            return TS_FAIL(TS_ERR_MEMORY, "%s: line %lld: out of memory for a line of more than %zu bytes",
                           reader->path, (long long)reader->line + 1, reader->capacity);
        reader->buffer = buffer;
        reader->capacity = capacity;
    }
    return TS_OK;
}

// One read(). Sets at_eof at the end of the input; nothing changes when a signal came or nothing is there yet.
static ts_status read_some(ts_job_reader *reader) {
    ts_status status = TS_OK;
    TS_TRY(make_room(reader));
    const ssize_t got = read(reader->file, reader->buffer + reader->end, reader->capacity - reader->end);
    TS_CHECK(got >= 0 || errno == EINTR || errno == EAGAIN, TS_ERR_IO, "%s: byte %lld: cannot read: %s", reader->path,
             (long long)bytes_read(reader), strerror(errno));
    reader->at_eof = got == 0;
    reader->end += got > 0 ? (size_t)got : 0;
done:
    return status;
}

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000 + now.tv_nsec / 1000000;
}

ts_status ts_job_reader_poll(ts_job_reader *reader, int timeout_ms, bool *ready) {
    ts_status status = TS_OK;
    const int64_t deadline = now_ms() + timeout_ms;
    size_t n_bytes;
    bool found;
    while (!(found = find_end(reader, &n_bytes))) {
        const int64_t left = deadline - now_ms();
        struct pollfd input = {.fd = reader->file, .events = POLLIN};
        const int n = poll(&input, 1, timeout_ms < 0 ? -1 : left < 0 ? 0 : (int)left);
        TS_CHECK(n >= 0 || errno == EINTR, TS_ERR_IO, "%s: byte %lld: cannot wait for input: %s", reader->path,
                 (long long)bytes_read(reader), strerror(errno));
        if (n <= 0)
            break;
        TS_TRY(read_some(reader));
    }
    *ready = found;
done:
    return status;
}

// Length in bytes of the UTF-8 character at text[0], or 0 when the bytes there are not one, or are NUL.
static size_t character_bytes(const unsigned char *text, size_t n) {
    const unsigned char first = text[0];
    if (first < 0x80)
        return first != 0;
    if (first < 0xc2 || first > 0xf4) // a continuation, an overlong form of ASCII, or above U+10FFFF
        return 0;
    const size_t length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    if (length > n)
        return 0;
    for (size_t i = 1; i < length; i++) {
        if ((text[i] & 0xc0) != 0x80)
            return 0;
    }
    // The other overlong forms, surrogates and the rest above U+10FFFF show in the second byte.
    const unsigned char second = text[1];
    const bool allowed = !(first == 0xe0 && second < 0xa0) && !(first == 0xed && second >= 0xa0) &&
                         !(first == 0xf0 && second < 0x90) && !(first == 0xf4 && second >= 0x90);
    return allowed ? length : 0;
}

// Index of the first byte that is NUL or begins no UTF-8 character; n when there is none.
static size_t find_bad_byte(const char *text, size_t n) {
    size_t i = 0;
    while (i < n) {
        const size_t length = character_bytes((const unsigned char *)text + i, n - i);
        if (length == 0)
            break;
        i += length;
    }
    return i;
}

static bool is_blank(const char *text, size_t n) {
    while (n > 0 && (text[n - 1] == ' ' || text[n - 1] == '\t' || text[n - 1] == '\r'))
        n--;
    return n == 0;
}

// Takes the present line, of n_bytes before its newline, off the buffer. What it returns lies in the buffer until the
// next read; *n_whole is the length of the whole line without its end, also where part of it was dropped.
static const char *take_line(ts_job_reader *reader, size_t n_bytes, size_t *n_whole) {
    static const char byte_order_mark[] = "\xef\xbb\xbf";
    const char *text = reader->buffer + reader->begin;
    const bool has_newline = reader->begin + n_bytes < reader->end, is_held = reader->n_dropped == 0;
    *n_whole = reader->n_dropped + n_bytes;
    reader->n_bytes_done += (int64_t)(*n_whole + has_newline);
    reader->begin += n_bytes + has_newline;
    reader->scanned = reader->begin;
    reader->n_dropped = 0;
    reader->line++;
    if (n_bytes > 0 && text[n_bytes - 1] == '\r')
        --*n_whole;
    if (reader->line == 1 && is_held && n_bytes >= 3 && memcmp(text, byte_order_mark, 3) == 0) {
        *n_whole -= 3;
        text += 3;
    }
    return text;
}

ts_status ts_job_reader_next(ts_job_reader *reader, const char **text, size_t *n_bytes, int64_t *line,
                             ts_request_error **error, bool *end) {
    ts_status status = TS_OK;
    ts_request_error *refused = NULL;
    const char *taken;
    size_t n;
    do {
        while (!find_end(reader, &n)) {
            bool ready; // false after a signal: this call waits on
            TS_TRY(ts_job_reader_poll(reader, -1, &ready));
        }
        if (reader->begin == reader->end && reader->at_eof) {
            *text = NULL;
            *n_bytes = 0;
            *line = reader->line;
            *error = NULL;
            *end = true;
            goto done;
        }
        taken = take_line(reader, n, &n);
    } while (n <= TS_JOB_LINE_BYTES_MAX && is_blank(taken, n));

    if (n > TS_JOB_LINE_BYTES_MAX) {
        TS_TRY(ts_request_error_create(reader->line, NULL, NULL, "line_too_long", &refused,
                                       "it has %zu bytes; a line may have up to %zu", n, TS_JOB_LINE_BYTES_MAX));
    } else {
        const size_t bad = find_bad_byte(taken, n);
        if (bad < n)
            TS_TRY(ts_request_error_create(reader->line, NULL, NULL, "invalid_utf8", &refused,
                                           "byte %zu of the line is 0x%02x, which %s; must be UTF-8 without NUL bytes",
                                           bad + 1, (unsigned char)taken[bad],
                                           taken[bad] == '\0' ? "is NUL" : "begins no UTF-8 character"));
    }
    *text = refused ? NULL : taken;
    *n_bytes = refused ? 0 : n;
    *line = reader->line;
    *error = refused;
    *end = false;
done:
    return status;
}

ts_status ts_job_reader_next_request(ts_job_reader *reader, ts_request **request, ts_request_error **error, bool *end) {
    ts_status status = TS_OK;
    ts_request *parsed = NULL;
    ts_request_error *refused = NULL;
    const char *text;
    size_t n_bytes;
    int64_t line, first_line = 0;
    bool at_end;
    TS_TRY(ts_job_reader_next(reader, &text, &n_bytes, &line, &refused, &at_end));
    reader->last_text = text;
    reader->n_last_bytes = n_bytes;
    if (text)
        TS_TRY(ts_request_parse(text, n_bytes, line, &parsed, &refused));
    // A refused line also takes its custom_id: the output has a record that bears it.
    const char *custom_id = parsed ? parsed->custom_id : refused ? refused->custom_id : NULL;
    if (custom_id)
        TS_TRY(ts_id_set_add(reader->ids, custom_id, strlen(custom_id), line, &first_line));
    if (parsed && first_line > 0) {
        TS_TRY(ts_request_error_create(line, custom_id, "custom_id", "duplicate_custom_id", &refused,
                                       "custom_id was used on line %lld already; must be different on every line",
                                       (long long)first_line));
        ts_request_free(parsed);
        parsed = NULL;
    }
    *request = parsed;
    *error = refused;
    *end = at_end;
    parsed = NULL;
    refused = NULL;
done:
    ts_request_free(parsed);
    ts_request_error_free(refused);
    return status;
}

const char *ts_job_reader_last_line(const ts_job_reader *reader, size_t *n_bytes) {
    *n_bytes = reader->n_last_bytes;
    return reader->last_text;
}

void ts_job_reader_progress(const ts_job_reader *reader, int64_t *n_bytes_done, int64_t *n_bytes_total) {
    *n_bytes_done = reader->n_bytes_done;
    *n_bytes_total = reader->n_bytes_total;
}
