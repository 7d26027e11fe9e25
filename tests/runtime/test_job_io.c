#include "runtime/id_set.h"
#include "runtime/job_reader.h"
#include "runtime/job_writer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define AROUND(id, body) "{\"custom_id\":\"" id "\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":" body "}"
#define GOOD(id)         AROUND(id, "{\"model\":\"m\",\"prompt\":\"p\"}")

// A folder of the test's own: criterion runs every test in its own process, setup and teardown included.
static char folder[256];

static void make_folder(void) {
    snprintf(folder, sizeof folder, "%s/job-XXXXXX", TS_BINARY_DIR);
    cr_assert_not_null(mkdtemp(folder));
}

static void remove_folder(void) {
    static const char *const names[] = {"in", "out", "pipe"};
    char path[512];
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        unlink(path);
    }
    cr_expect_eq(rmdir(folder), 0, "something was left in %s", folder);
}

TestSuite(job_io, .init = make_folder, .fini = remove_folder);

static const char *in_folder(const char *name, char path[512]) {
    snprintf(path, 512, "%s/%s", folder, name);
    return path;
}

static const char *write_input(const char *text, size_t n_bytes) {
    static char path[512];
    FILE *file = fopen(in_folder("in", path), "w");
    cr_assert_not_null(file);
    cr_assert_eq(fwrite(text, 1, n_bytes, file), n_bytes);
    fclose(file);
    return path;
}

static ts_job_reader *open_reader(const char *path) {
    ts_job_reader *reader = NULL;
    cr_assert_eq(ts_job_reader_create(path, folder, &reader), TS_OK, "%s", ts_status_message());
    return reader;
}

// Reads one line: its text when it is whole, or the code of its refusal, or "end".
static void expect_line(ts_job_reader *reader, int64_t number, const char *text, size_t n_text) {
    const char *got;
    size_t n_bytes;
    int64_t line;
    ts_request_error *error;
    bool end;
    cr_assert_eq(ts_job_reader_next(reader, &got, &n_bytes, &line, &error, &end), TS_OK, "%s", ts_status_message());
    cr_assert_not(end, "the input ends before line %lld", (long long)number);
    cr_assert_null(error, "%s", error ? error->message : "");
    cr_expect_eq(line, number);
    cr_assert_eq(n_bytes, n_text, "line %lld has %zu bytes", (long long)line, n_bytes);
    cr_expect_eq(memcmp(got, text, n_text), 0);
}

static void expect_refusal(ts_job_reader *reader, int64_t number, const char *code, const char *says) {
    const char *got;
    size_t n_bytes;
    int64_t line;
    ts_request_error *error;
    bool end;
    cr_assert_eq(ts_job_reader_next(reader, &got, &n_bytes, &line, &error, &end), TS_OK, "%s", ts_status_message());
    cr_assert_not(end);
    cr_assert_null(got);
    cr_assert_not_null(error);
    cr_expect_eq(line, number);
    cr_expect_eq(error->line, number);
    cr_expect_null(error->custom_id);
    cr_expect_str_eq(error->code, code);
    cr_expect(strstr(error->message, says), "\"%s\" does not say \"%s\"", error->message, says);
    ts_request_error_free(error);
}

static void expect_end(ts_job_reader *reader) {
    for (int i = 0; i < 2; i++) { // and it stays the end
        const char *got;
        size_t n_bytes;
        int64_t line;
        ts_request_error *error;
        bool end = false;
        cr_assert_eq(ts_job_reader_next(reader, &got, &n_bytes, &line, &error, &end), TS_OK);
        cr_expect(end);
        cr_expect_null(got);
        cr_expect_null(error);
    }
}

Test(job_io, line_ends) {
    static const char text[] = "\xef\xbb\xbfone\r\n\n  \t\r\ntwo \n\r\nthree\rfour\n\xef\xbb\xbf"
                               "five";
    ts_job_reader *reader = open_reader(write_input(text, sizeof text - 1));
    expect_line(reader, 1, "one", 3);
    expect_line(reader, 4, "two ", 4);
    int64_t done, total;
    ts_job_reader_progress(reader, &done, &total);
    cr_expect_eq(done, 3 + 5 + 1 + 5 + 5);
    cr_expect_eq(total, (int64_t)sizeof text - 1);
    expect_line(reader, 6, "three\rfour", 10);
    expect_line(reader, 7,
                "\xef\xbb\xbf"
                "five",
                7); // only the first line may have a byte order mark
    expect_end(reader);
    ts_job_reader_progress(reader, &done, &total);
    cr_expect_eq(done, total);
    ts_job_reader_free(reader);
}

Test(job_io, empty_inputs) {
    static const char *const texts[] = {"", "\n", "\xef\xbb\xbf", "\xef\xbb\xbf\r\n \n", "\r"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        ts_job_reader *reader = open_reader(write_input(texts[i], strlen(texts[i])));
        expect_end(reader);
        ts_job_reader_free(reader);
    }
}

Test(job_io, bad_bytes) {
    static const struct {
        const char *line;
        size_t n_bytes;
        const char *says; // NULL: good
    } cases[] = {
        {"ab\0c", 4, "byte 3 of the line is 0x00, which is NUL"},
        {"\xff", 1, "byte 1 of the line is 0xff"},
        {"a\xc3\xa9\xc3", 4, "byte 4 of the line is 0xc3"}, // cut
        {"\x80", 1, "byte 1"},
        {"\xc0\xaf", 2, "byte 1"},         // overlong
        {"ab\xe0\x9f\xbf", 5, "byte 3"},   // overlong
        {"\xf0\x8f\xbf\xbf", 4, "byte 1"}, // overlong
        {"\xed\xa0\x80", 3, "byte 1"},     // surrogate
        {"\xf4\x90\x80\x80", 4, "byte 1"}, // above U+10FFFF
        {"\xf5\x80\x80\x80", 4, "byte 1"}, //
        {"\xe2\x82", 2, "byte 1"},         // cut
        {"\xc3\xa9 \xe0\xa0\x80 \xed\x9f\xbf \xf0\x90\x80\x80 \xf4\x8f\xbf\xbf", 20, NULL},
        {"\x7f\x01", 2, NULL},
    };
    char text[1024];
    size_t n = 0;
    const size_t n_cases = sizeof cases / sizeof *cases;
    for (size_t i = 0; i < n_cases; i++) {
        memcpy(text + n, cases[i].line, cases[i].n_bytes);
        n += cases[i].n_bytes;
        text[n++] = '\n';
    }
    ts_job_reader *reader = open_reader(write_input(text, n));
    for (size_t i = 0; i < n_cases; i++) {
        if (cases[i].says)
            expect_refusal(reader, (int64_t)i + 1, "invalid_utf8", cases[i].says);
        else
            expect_line(reader, (int64_t)i + 1, cases[i].line, cases[i].n_bytes);
    }
    expect_end(reader);
    ts_job_reader_free(reader);
}

Test(job_io, no_input) {
    ts_job_reader *reader = NULL;
    char path[512];
    cr_expect_eq(ts_job_reader_create(in_folder("none", path), folder, &reader), TS_ERR_IO);
    cr_expect(strstr(ts_status_message(), path));
    cr_expect_eq(ts_job_reader_create(folder, folder, &reader), TS_ERR_IO);
    cr_expect(strstr(ts_status_message(), "directory"));
    cr_expect_null(reader);
}

// ---- pipes

typedef struct feed {
    int file;
    size_t n_long; // bytes of a long line, in front of the others
    int n_lines;
} feed;

static void put(int file, const char *text, size_t n) {
    for (size_t at = 0; at < n;) {
        const ssize_t written = write(file, text + at, n - at);
        cr_assert_gt(written, 0);
        at += (size_t)written;
    }
}

static void *feed_pipe(void *data) {
    const feed *job = data;
    char block[65536];
    memset(block, 'x', sizeof block);
    for (size_t at = 0; at < job->n_long; at += sizeof block)
        put(job->file, block, job->n_long - at < sizeof block ? job->n_long - at : sizeof block);
    if (job->n_long > 0)
        put(job->file, "\r\n", 2);
    for (int i = 0; i < job->n_lines; i++) {
        char line[256];
        put(job->file, line, (size_t)snprintf(line, sizeof line, GOOD("id-%d") "\n", i));
    }
    close(job->file);
    return NULL;
}

// Standard input is a pipe: a line of the greatest length passes, one of a byte more is refused, and both leave the
// next line whole.
Test(job_io, long_lines_on_standard_input) {
    for (size_t extra = 0; extra < 2; extra++) {
        int ends[2];
        cr_assert_eq(pipe(ends), 0);
        dup2(ends[0], STDIN_FILENO);
        close(ends[0]);
        feed job = {.file = ends[1], .n_long = TS_JOB_LINE_BYTES_MAX + extra, .n_lines = 1};
        pthread_t thread;
        pthread_create(&thread, NULL, feed_pipe, &job);
        ts_job_reader *reader = open_reader("-");
        if (extra == 0) {
            const char *got;
            size_t n_bytes;
            int64_t line;
            ts_request_error *error;
            bool end;
            cr_assert_eq(ts_job_reader_next(reader, &got, &n_bytes, &line, &error, &end), TS_OK);
            cr_expect_eq(n_bytes, TS_JOB_LINE_BYTES_MAX);
            cr_expect(got && got[0] == 'x' && got[n_bytes - 1] == 'x');
        } else {
            expect_refusal(reader, 1, "line_too_long", "67108865 bytes; a line may have up to 67108864");
        }
        expect_line(reader, 2, GOOD("id-0"), sizeof GOOD("id-0") - 1);
        expect_end(reader);
        int64_t done, total;
        ts_job_reader_progress(reader, &done, &total);
        cr_expect_eq(done, (int64_t)(TS_JOB_LINE_BYTES_MAX + extra + 2 + sizeof GOOD("id-0")));
        cr_expect_eq(total, -1);
        ts_job_reader_free(reader);
        pthread_join(thread, NULL);
        cr_expect_neq(fcntl(STDIN_FILENO, F_GETFD), -1, "standard input stays open");
    }
}

static int64_t peak_kib(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
}

// Five times the length of a line may pass without an end, and is not held.
Test(job_io, a_line_too_long_is_not_held) {
    int ends[2];
    cr_assert_eq(pipe(ends), 0);
    dup2(ends[0], STDIN_FILENO);
    close(ends[0]);
    feed job = {.file = ends[1], .n_long = 5 * TS_JOB_LINE_BYTES_MAX, .n_lines = 1};
    pthread_t thread;
    pthread_create(&thread, NULL, feed_pipe, &job);
    ts_job_reader *reader = open_reader("-");
    const int64_t before = peak_kib();
    expect_refusal(reader, 1, "line_too_long", "335544320 bytes");
    cr_expect_lt(peak_kib() - before, 4 * (int64_t)(TS_JOB_LINE_BYTES_MAX / 1024),
                 "less than the line, even where growing keeps the old buffers for a while");
    expect_line(reader, 2, GOOD("id-0"), sizeof GOOD("id-0") - 1);
    expect_end(reader);
    ts_job_reader_free(reader);
    pthread_join(thread, NULL);
}

Test(job_io, poll_does_not_wait_for_half_a_line) {
    char path[512];
    cr_assert_eq(mkfifo(in_folder("pipe", path), 0600), 0);
    const int both = open(path, O_RDWR); // so that no open() waits for the other
    const int file = open(path, O_WRONLY);
    ts_job_reader *reader = open_reader(path);
    close(both);
    bool ready = true;
    cr_assert_eq(ts_job_reader_poll(reader, 0, &ready), TS_OK);
    cr_expect_not(ready);
    put(file, "half", 4);
    cr_assert_eq(ts_job_reader_poll(reader, 0, &ready), TS_OK);
    cr_expect_not(ready);
    put(file, " a line\nmore", 12);
    cr_assert_eq(ts_job_reader_poll(reader, -1, &ready), TS_OK);
    cr_expect(ready);
    expect_line(reader, 1, "half a line", 11);
    cr_assert_eq(ts_job_reader_poll(reader, 1, &ready), TS_OK);
    cr_expect_not(ready);
    close(file);
    cr_assert_eq(ts_job_reader_poll(reader, -1, &ready), TS_OK);
    cr_expect(ready);
    expect_line(reader, 2, "more", 4);
    cr_assert_eq(ts_job_reader_poll(reader, 0, &ready), TS_OK);
    cr_expect(ready, "the end does not wait either");
    expect_end(reader);
    ts_job_reader_free(reader);
}

// ---- requests

Test(job_io, requests_and_duplicates) {
    static const char text[] = GOOD("a") "\n\n" GOOD("b") "\nnot json\n" GOOD("a") "\n" AROUND("c", "{}") "\n" GOOD(
        "c") "\n" GOOD("\\u0061") "\n" GOOD("d");
    static const struct {
        int64_t line;
        const char *custom_id, *code, *says;
    } expected[] = {
        {1, "a", NULL, NULL},
        {3, "b", NULL, NULL},
        {4, NULL, "invalid_json_line", "line 4: "},
        {5, "a", "duplicate_custom_id", "line 5: custom_id was used on line 1 already"},
        {6, "c", "missing_required_parameter", "model"},
        {7, "c", "duplicate_custom_id", "line 6"},
        {8, "a", "duplicate_custom_id", "line 1"},
        {9, "d", NULL, NULL},
    };
    ts_job_reader *reader = open_reader(write_input(text, sizeof text - 1));
    ts_request *request;
    ts_request_error *error;
    bool end;
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        cr_assert_eq(ts_job_reader_next_request(reader, &request, &error, &end), TS_OK, "%s", ts_status_message());
        cr_assert_not(end);
        cr_assert_eq((request != NULL) + (error != NULL), 1);
        cr_assert_eq(error != NULL, expected[i].code != NULL, "%s", error ? error->message : "accepted");
        cr_expect_eq(request ? request->line : error->line, expected[i].line);
        const char *custom_id = request ? request->custom_id : error->custom_id;
        cr_assert_eq(custom_id != NULL, expected[i].custom_id != NULL);
        if (custom_id)
            cr_expect_str_eq(custom_id, expected[i].custom_id);
        if (error) {
            cr_expect_str_eq(error->code, expected[i].code);
            cr_expect(strstr(error->message, expected[i].says), "%s", error->message);
        }
        ts_request_free(request);
        ts_request_error_free(error);
    }
    cr_assert_eq(ts_job_reader_next_request(reader, &request, &error, &end), TS_OK);
    cr_expect(end);
    cr_expect_null(request);
    cr_expect_null(error);
    ts_job_reader_free(reader);
}

// The sanitizer keeps freed memory for a while, up to this much.
#ifdef __SANITIZE_ADDRESS__
enum { FREED_BUT_KEPT_KIB = 320 * 1024 };
#else
enum { FREED_BUT_KEPT_KIB = 0 };
#endif

Test(job_io, memory_stays_flat_over_200000_lines) {
    enum { N_LINES = 200000, WARM = 70000 }; // the table of ids leaves memory before WARM
    char path[512];
    cr_assert_eq(mkfifo(in_folder("pipe", path), 0600), 0);
    const int both = open(path, O_RDWR);
    feed job = {.file = open(path, O_WRONLY), .n_lines = N_LINES};
    ts_job_reader *reader = open_reader(path);
    close(both);
    pthread_t thread;
    pthread_create(&thread, NULL, feed_pipe, &job);
    int64_t n = 0, warm_kib = 0;
    for (;; n++) {
        ts_request *request;
        ts_request_error *error;
        bool end;
        cr_assert_eq(ts_job_reader_next_request(reader, &request, &error, &end), TS_OK, "%s", ts_status_message());
        if (end)
            break;
        cr_assert_null(error, "%s", error ? error->message : "");
        ts_request_free(request);
        if (n == WARM)
            warm_kib = peak_kib();
    }
    cr_expect_eq(n, N_LINES);
    const int64_t grown_kib = peak_kib() - warm_kib;
    cr_expect_lt(grown_kib, 1024 + FREED_BUT_KEPT_KIB, "grew by %lld KiB", (long long)grown_kib);
    cr_expect_lt(warm_kib, 32 * 1024 + FREED_BUT_KEPT_KIB, "%lld KiB", (long long)warm_kib);
    ts_job_reader_free(reader);
    pthread_join(thread, NULL);
}

// ---- ids

// From the SipHash reference: key 00..0f, the empty message, 128 bits of output a3 81 7f 04 ba 25 a8 e6 6d f6 72 14 c7
// 55 02 93.
Test(job_io, id_hash) {
    ts_id_hash hash = ts_id_hash_compute("", 0);
    cr_expect_eq(hash.low, 0xe6a825ba047f81a3u);
    cr_expect_eq(hash.high, 0x930255c71472f66du);
    const char text[16] = "0123456789abcdef";
    for (size_t n = 0; n < 16; n++) { // every length is a hash of its own, and no byte behind it counts
        char copy[17];
        memset(copy, 'x', sizeof copy);
        memcpy(copy, text, n);
        const ts_id_hash a = ts_id_hash_compute(text, n), b = ts_id_hash_compute(copy, n),
                         c = ts_id_hash_compute(text, n + 1);
        cr_expect_eq(a.low, b.low);
        cr_expect_eq(a.high, b.high);
        cr_expect(a.low != c.low && a.high != c.high);
    }
}

Test(job_io, id_set_across_the_spill) {
    enum { N = 300000 };
    ts_id_set *set = NULL;
    cr_assert_eq(ts_id_set_create(folder, &set), TS_OK);
    char id[32];
    int64_t first;
    for (int i = 0; i < N; i++) {
        const size_t n = (size_t)snprintf(id, sizeof id, "request-%d", i);
        cr_assert_eq(ts_id_set_add(set, id, n, i + 1, &first), TS_OK, "%s", ts_status_message());
        cr_assert_eq(first, 0, "%s is new, but was found on line %lld", id, (long long)first);
        cr_assert_eq(ts_id_set_file_bytes(set) > 0, i >= TS_ID_SET_IN_MEMORY, "after %d ids", i + 1);
        if (i % 1000 == 999) { // one from before, wherever it lives now
            const int old = (i * 7) % (i + 1);
            cr_assert_eq(ts_id_set_add(set, id, (size_t)snprintf(id, sizeof id, "request-%d", old), 1 + N, &first),
                         TS_OK);
            cr_assert_eq(first, old + 1);
        }
    }
    cr_expect_eq(ts_id_set_count(set), N);
    cr_expect_leq(ts_id_set_file_bytes(set), 64 * (int64_t)N);
    for (int i = 0; i < N; i += 17) { // all are still there, with the line they came on first
        const size_t n = (size_t)snprintf(id, sizeof id, "request-%d", i);
        cr_assert_eq(ts_id_set_add(set, id, n, 1 + N, &first), TS_OK);
        cr_assert_eq(first, i + 1, "%s", id);
    }
    cr_expect_eq(ts_id_set_count(set), N);
    ts_id_set_free(set);
}

Test(job_io, id_set_names_its_directory) {
    ts_id_set *set = NULL;
    char id[32];
    int64_t first = -1;
    cr_assert_eq(ts_id_set_create("/nonexistent/folder", &set), TS_OK);
    for (int i = 0; i < TS_ID_SET_IN_MEMORY; i++)
        cr_assert_eq(ts_id_set_add(set, id, (size_t)snprintf(id, sizeof id, "%d", i), 1, &first), TS_OK);
    first = -1;
    for (int i = 0; i < 2; i++) {
        cr_expect_eq(ts_id_set_add(set, "x", 1, 1, &first), TS_ERR_IO);
        cr_expect(strstr(ts_status_message(), "/nonexistent/folder"), "%s", ts_status_message());
        cr_expect_eq(first, -1);
        cr_expect_eq(ts_id_set_count(set), TS_ID_SET_IN_MEMORY);
    }
    ts_id_set_free(set);
}

// ---- output

static void expect_file(const char *path, const char *text) {
    char got[256] = "";
    FILE *file = fopen(path, "r");
    cr_assert_not_null(file);
    got[fread(got, 1, sizeof got - 1, file)] = '\0';
    fclose(file);
    cr_expect_str_eq(got, text);
}

Test(job_io, output_is_there_after_every_record) {
    char path[512];
    ts_job_writer *writer = NULL;
    cr_assert_eq(ts_job_writer_create(in_folder("out", path), NULL, 0, &writer), TS_OK, "%s", ts_status_message());
    expect_file(path, "");
    cr_assert_eq(ts_job_writer_write(writer, "{\"a\":1}\n", 8), TS_OK);
    expect_file(path, "{\"a\":1}\n");
    cr_expect_eq(ts_job_writer_bytes(writer), 8);
    cr_assert_eq(ts_job_writer_write(writer, "{}\n", 3), TS_OK);
    cr_assert_eq(ts_job_writer_finish(writer), TS_OK);
    ts_job_writer_free(writer);
    expect_file(path, "{\"a\":1}\n{}\n");

    // Going on with an interrupted job: what came after the position noted is gone.
    cr_assert_eq(ts_job_writer_create(path, NULL, 8, &writer), TS_OK);
    cr_assert_eq(ts_job_writer_write(writer, "[]\n", 3), TS_OK);
    cr_expect_eq(ts_job_writer_bytes(writer), 11);
    ts_job_writer_free(writer);
    expect_file(path, "{\"a\":1}\n[]\n");
    writer = NULL;
    cr_expect_eq(ts_job_writer_create(path, NULL, 12, &writer), TS_ERR_INVALID);
    cr_expect(strstr(ts_status_message(), path));
    cr_expect_null(writer);
    expect_file(path, "{\"a\":1}\n[]\n");

    // A new job overwrites.
    cr_assert_eq(ts_job_writer_create(path, NULL, 0, &writer), TS_OK);
    ts_job_writer_free(writer);
    expect_file(path, "");
}

Test(job_io, output_must_not_be_the_input) {
    char other[512];
    const char *path = write_input("text\n", 5);
    ts_job_writer *writer = NULL;
    cr_assert_eq(link(path, in_folder("out", other)), 0);
    cr_expect_eq(ts_job_writer_create(path, path, 0, &writer), TS_ERR_INVALID);
    cr_expect_eq(ts_job_writer_create(other, path, 0, &writer), TS_ERR_INVALID, "another name of the same file");
    cr_expect(strstr(ts_status_message(), other) && strstr(ts_status_message(), path), "%s", ts_status_message());
    const int file = open(path, O_RDONLY);
    dup2(file, STDIN_FILENO);
    close(file);
    cr_expect_eq(ts_job_writer_create(other, "-", 0, &writer), TS_ERR_INVALID);
    cr_expect(strstr(ts_status_message(), "standard input"));
    cr_expect_null(writer);
    expect_file(path, "text\n");
    cr_assert_eq(ts_job_writer_create("/dev/null", "/dev/null", 0, &writer), TS_OK, "a device is not a file");
    ts_job_writer_free(writer);
}

Test(job_io, output_errors_name_the_path) {
    ts_job_writer *writer = NULL;
    cr_expect_eq(ts_job_writer_create("/nonexistent/out", NULL, 0, &writer), TS_ERR_IO);
    cr_expect(strstr(ts_status_message(), "/nonexistent/out"));
    cr_assert_null(writer);
    cr_assert_eq(ts_job_writer_create("/dev/full", NULL, 0, &writer), TS_OK);
    cr_expect_eq(ts_job_writer_write(writer, "{}\n", 3), TS_ERR_IO);
    cr_expect(strstr(ts_status_message(), "/dev/full") && strstr(ts_status_message(), strerror(ENOSPC)), "%s",
              ts_status_message());
    cr_expect_eq(ts_job_writer_bytes(writer), 0);
    ts_job_writer_free(writer);
}

// A limit on the size of files stands in for a disk that fills up in the middle of a record.
Test(job_io, a_full_disk_leaves_whole_lines) {
    char path[512], record[4096];
    memset(record, 'x', sizeof record);
    record[sizeof record - 1] = '\n';
    const struct rlimit limit = {6000, 6000};
    ts_job_writer *writer = NULL;
    cr_assert_eq(ts_job_writer_create(in_folder("out", path), NULL, 0, &writer), TS_OK);
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    cr_assert_eq(ts_job_writer_write(writer, record, sizeof record), TS_OK);
    const ts_status status = ts_job_writer_write(writer, record, sizeof record);
    cr_expect_eq(status, TS_ERR_IO);
    cr_expect(strstr(ts_status_message(), path) && strstr(ts_status_message(), "byte 6000"), "%s", ts_status_message());
    cr_expect_eq(ts_job_writer_bytes(writer), sizeof record);
    struct stat info;
    cr_assert_eq(stat(path, &info), 0);
    cr_expect_eq(info.st_size, sizeof record);
    ts_job_writer_free(writer);
}

static void *drain_pipe(void *data) {
    const int file = *(const int *)data;
    int64_t *n = malloc(sizeof *n);
    char block[1000];
    *n = 0;
    for (ssize_t got; (got = read(file, block, sizeof block)) > 0;)
        *n += got;
    return n;
}

// Standard output is a pipe that does not wait: a record larger than the pipe goes out in parts, and whole.
Test(job_io, standard_output_that_does_not_block) {
    int ends[2];
    enum { N_BYTES = 1000000 };
    char *record = malloc(N_BYTES);
    memset(record, 'x', N_BYTES);
    record[N_BYTES - 1] = '\n';
    cr_assert_eq(pipe(ends), 0);
    const int saved = dup(STDOUT_FILENO);
    fcntl(ends[1], F_SETFL, O_NONBLOCK);
    dup2(ends[1], STDOUT_FILENO);
    close(ends[1]);
    pthread_t thread;
    pthread_create(&thread, NULL, drain_pipe, &ends[0]);
    ts_job_writer *writer = NULL;
    const ts_status created = ts_job_writer_create("-", NULL, 0, &writer);
    const ts_status written = ts_job_writer_write(writer, record, N_BYTES), finished = ts_job_writer_finish(writer);
    const bool still_open = fcntl(STDOUT_FILENO, F_GETFD) != -1;
    dup2(saved, STDOUT_FILENO);
    void *n_read;
    pthread_join(thread, &n_read);
    cr_expect_eq(created, TS_OK);
    cr_expect_eq(written, TS_OK);
    cr_expect_eq(finished, TS_OK);
    cr_expect(still_open, "standard output stays open");
    cr_expect_eq(*(int64_t *)n_read, N_BYTES);
    ts_job_writer_free(writer);
    free(n_read);
    free(record);
}
