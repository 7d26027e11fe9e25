#include "runtime/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <assert.h>
#include <pcre2.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Unicode's White_Space, spelled out: PCRE2's own \s also takes U+180E, which stopped being a space in Unicode 6.3 and
// is none for the package these expressions come from.
#define SPACE "\\x{9}-\\x{d} \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"

// `regex` is the file's spelling, `pattern` the same expression for PCRE2.
static const struct {
    const char *name, *regex, *pattern;
} kinds[TS_N_PRETOKENIZERS] = {
    [TS_PRETOKENIZER_GPT2] =
        {
            "GPT-2",
            "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
            "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE "\\p{L}\\p{N}]+|[" SPACE "]+(?![^" SPACE
            "])|[" SPACE "]+",
        },
    [TS_PRETOKENIZER_LLAMA3] =
        {
            "Llama-3",
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
            "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^" SPACE
            "\\p{L}\\p{N}]+[\\r\\n]*|"
            "[" SPACE "]*[\\r\\n]+|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+",
        },
    [TS_PRETOKENIZER_QWEN2] =
        {
            "Qwen2",
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
            "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*|"
            "[" SPACE "]*[\\r\\n]+|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+",
        },
};

struct ts_pretokenizer {
    pcre2_code *code;
};

struct ts_pretokenizer_scratch {
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

const char *ts_pretokenizer_name(ts_pretokenizer_kind kind) {
    return kinds[kind].name;
}

const char *ts_pretokenizer_regex(ts_pretokenizer_kind kind) {
    return kinds[kind].regex;
}

bool ts_pretokenizer_find(const char *regex, ts_pretokenizer_kind *out) {
    for (int i = 0; i < TS_N_PRETOKENIZERS; i++) {
        if (strcmp(kinds[i].regex, regex) == 0) {
            *out = (ts_pretokenizer_kind)i;
            return true;
        }
    }
    return false;
}

static ts_status regex_failure(int code, const char *what) {
    PCRE2_UCHAR message[160];
    pcre2_get_error_message(code, message, sizeof message);
    return TS_FAIL(code == PCRE2_ERROR_NOMEMORY ? TS_ERR_MEMORY : TS_ERR_INTERNAL, "pretokenizer: %s: PCRE2: %s", what,
                   (const char *)message);
}

ts_status ts_pretokenizer_create(ts_pretokenizer_kind kind, ts_pretokenizer **out) {
    ts_status status = TS_OK;
    int code = 0;
    size_t at = 0;
    uint32_t jit_built = 0;
    assert((unsigned)kind < TS_N_PRETOKENIZERS);
    ts_pretokenizer *made = calloc(1, sizeof *made);
    TS_CHECK(made, TS_ERR_MEMORY, "pretokenizer: out of memory");
    made->code = pcre2_compile((PCRE2_SPTR)kinds[kind].pattern, PCRE2_ZERO_TERMINATED,
                               PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &code, &at, NULL);
    if (!made->code) {
        status = regex_failure(code, kinds[kind].name);
        goto done;
    }
    // A library built without its compiler interprets the same program: slower, not different.
    pcre2_config(PCRE2_CONFIG_JIT, &jit_built);
    if (jit_built) {
        code = pcre2_jit_compile(made->code, PCRE2_JIT_COMPLETE);
        if (code != 0 && code != PCRE2_ERROR_NOMEMORY) { // memory it may not execute: interpret
            status = regex_failure(code, kinds[kind].name);
            goto done;
        }
    }
    *out = made;
    made = NULL;
done:
    ts_pretokenizer_free(made);
    return status;
}

void ts_pretokenizer_free(ts_pretokenizer *pretokenizer) {
    if (!pretokenizer)
        return;
    pcre2_code_free(pretokenizer->code);
    free(pretokenizer);
}

ts_status ts_pretokenizer_scratch_create(const ts_pretokenizer *pretokenizer, ts_pretokenizer_scratch **out) {
    ts_status status = TS_OK;
    ts_pretokenizer_scratch *made = calloc(1, sizeof *made);
    TS_CHECK(made, TS_ERR_MEMORY, "pretokenizer: out of memory");
    made->match = pcre2_match_data_create_from_pattern(pretokenizer->code, NULL);
    made->context = pcre2_match_context_create(NULL);
    TS_CHECK(made->match && made->context, TS_ERR_MEMORY, "pretokenizer: out of memory");
    // Steps are at most linear in a piece, and a piece may be the whole text: no limit on their number.
    pcre2_set_match_limit(made->context, UINT32_MAX);
    made->stack = pcre2_jit_stack_create(32 << 10, 1 << 20, NULL);
    if (made->stack)
        pcre2_jit_stack_assign(made->context, NULL, made->stack);
    *out = made;
    made = NULL;
done:
    ts_pretokenizer_scratch_free(made);
    return status;
}

void ts_pretokenizer_scratch_free(ts_pretokenizer_scratch *scratch) {
    if (!scratch)
        return;
    pcre2_match_data_free(scratch->match);
    pcre2_match_context_free(scratch->context);
    pcre2_jit_stack_free(scratch->stack);
    free(scratch);
}

ts_status ts_pretokenizer_next(const ts_pretokenizer *pretokenizer, ts_pretokenizer_scratch *scratch, const char *text,
                               size_t n_bytes, size_t begin, size_t *end) {
    assert(begin < n_bytes);
    const int code = pcre2_match(pretokenizer->code, (PCRE2_SPTR)text, n_bytes, begin, PCRE2_NO_UTF_CHECK,
                                 scratch->match, scratch->context);
    if (code < 0) // every character begins some alternative, so even "no match" is our own fault
        return regex_failure(code, "cutting text");
    *end = pcre2_get_ovector_pointer(scratch->match)[1];
    assert(*end > begin);
    return TS_OK;
}
