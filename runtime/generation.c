#include "runtime/generation.h"

#include <stdlib.h>
#include <string.h>

void ts_generation_begin(ts_generation *generation, const ts_request *request, const ts_tokenizer *tokenizer,
                         const int32_t *eos, int32_t n_eos, int32_t sample) {
    *generation = (ts_generation){
        .request = request,
        .tokenizer = tokenizer,
        .eos = eos,
        .n_eos = n_eos,
        .sample = sample,
    };
}

static void free_logprob(ts_token_logprob *logprob) {
    for (int32_t i = 0; i < logprob->n_top; i++)
        free(logprob->top[i].text);
    free(logprob->top);
    free(logprob->text);
}

void ts_generation_end(ts_generation *generation) {
    for (int64_t i = 0; i < generation->n_logprobs; i++)
        free_logprob(&generation->logprobs[i]);
    free(generation->logprobs);
    free(generation->text);
    *generation = (ts_generation){0};
}

static bool contains(const int32_t *tokens, int32_t n, int32_t token) {
    for (int32_t i = 0; i < n; i++)
        if (tokens[i] == token)
            return true;
    return false;
}

// Makes room for `more` bytes of text and a NUL.
static ts_status reserve_text(ts_generation *generation, size_t more) {
    ts_status status = TS_OK;
    size_t need = generation->text_bytes + more + 1;
    if (need > generation->text_capacity) {
        need = need < 256 ? 256 : 2 * need;
        char *text = realloc(generation->text, need);
        TS_CHECK(text, TS_ERR_MEMORY, "generation: out of memory for %zu bytes of text", need);
        generation->text = text;
        generation->text_capacity = need;
    }
done:
    return status;
}

static int64_t code_points(const char *text, size_t n_bytes) {
    int64_t n = 0;
    for (size_t i = 0; i < n_bytes; i++)
        n += ((unsigned char)text[i] & 0xc0) != 0x80;
    return n;
}

// Cuts the text at the first stop string that the bytes from `shown` on could have completed.
static bool cut_at_stop(ts_generation *generation, size_t shown) {
    size_t first = SIZE_MAX;
    for (size_t i = 0; i < generation->request->n_stops; i++) {
        const char *stop = generation->request->stops[i];
        const size_t length = strlen(stop), from = shown >= length ? shown - length + 1 : 0;
        if (from >= generation->text_bytes)
            continue;
        const char *found = memmem(generation->text + from, generation->text_bytes - from, stop, length);
        if (found && (size_t)(found - generation->text) < first)
            first = (size_t)(found - generation->text);
    }
    if (first == SIZE_MAX)
        return false;
    generation->text_bytes = first;
    generation->text[first] = '\0';
    generation->text_points = code_points(generation->text, first);
    return true;
}

static ts_status copy_token_text(const ts_generation *generation, int32_t token, char **text, size_t *n_bytes) {
    ts_status status = TS_OK;
    bool is_special;
    const char *bytes = ts_tokenizer_token_bytes(generation->tokenizer, token, n_bytes, &is_special);
    char *copy = malloc(*n_bytes + 1);
    TS_CHECK(copy, TS_ERR_MEMORY, "generation: out of memory");
    if (*n_bytes)
        memcpy(copy, bytes, *n_bytes);
    copy[*n_bytes] = '\0';
    *text = copy;
done:
    return status;
}

static ts_status note_logprob(ts_generation *generation, const ts_next_token *token) {
    ts_status status = TS_OK;
    ts_token_logprob entry = {.logprob = (float)token->logprob, .text_offset = generation->text_points};
    if (generation->n_logprobs == generation->logprob_capacity) {
        const int64_t capacity = generation->logprob_capacity ? 2 * generation->logprob_capacity : 32;
        ts_token_logprob *grown = realloc(generation->logprobs, (size_t)capacity * sizeof *grown);
        TS_CHECK(grown, TS_ERR_MEMORY, "generation: out of memory");
        generation->logprobs = grown;
        generation->logprob_capacity = capacity;
    }
    entry.top = calloc((size_t)token->n_top + 1, sizeof *entry.top);
    TS_CHECK(entry.top, TS_ERR_MEMORY, "generation: out of memory");
    TS_TRY(copy_token_text(generation, token->token, &entry.text, &entry.text_bytes));
    for (; entry.n_top < token->n_top; entry.n_top++) {
        ts_top_logprob *top = &entry.top[entry.n_top];
        top->logprob = (float)token->top[entry.n_top].logprob;
        TS_TRY(copy_token_text(generation, token->top[entry.n_top].token, &top->text, &top->text_bytes));
    }
    generation->logprobs[generation->n_logprobs++] = entry;
    entry = (ts_token_logprob){0};
done:
    free_logprob(&entry);
    return status;
}

ts_status ts_generation_accept(ts_generation *generation, const ts_next_token *token) {
    ts_status status = TS_OK;
    const ts_sampling_params *params = &generation->request->sampling;
    const size_t shown = generation->text_bytes;
    const bool ends_text = (!params->ignore_eos && contains(generation->eos, generation->n_eos, token->token)) ||
                           contains(params->stop_ids, params->n_stop_ids, token->token);
    generation->last_token = token->token;
    generation->n_tokens++;
    generation->stopped = ends_text;
    generation->ended = ends_text || generation->n_tokens >= params->max_tokens;
    if (params->logprobs >= 0)
        TS_TRY(note_logprob(generation, token));
    if (!ends_text) {
        size_t n_bytes;
        bool is_special;
        const char *bytes = ts_tokenizer_token_bytes(generation->tokenizer, token->token, &n_bytes, &is_special);
        if (is_special)
            n_bytes = 0;
        TS_TRY(reserve_text(generation, TS_UTF8_STREAM_ROOM(n_bytes)));
        generation->text_bytes +=
            ts_utf8_stream_push(&generation->stream, bytes, n_bytes, generation->text + generation->text_bytes);
    }
    if (generation->ended) {
        TS_TRY(reserve_text(generation, TS_UTF8_STREAM_ROOM(0)));
        generation->text_bytes += ts_utf8_stream_flush(&generation->stream, generation->text + generation->text_bytes);
    }
    generation->text_points += code_points(generation->text + shown, generation->text_bytes - shown);
    if (generation->text_bytes > shown && generation->n_tokens >= params->min_tokens && cut_at_stop(generation, shown))
        generation->ended = generation->stopped = true;
done:
    return status;
}

ts_choice ts_generation_choice(const ts_generation *generation) {
    return (ts_choice){
        .index = generation->sample,
        .text = generation->text,
        .text_bytes = generation->text_bytes,
        .stopped = generation->stopped,
        .n_tokens = generation->n_logprobs,
        .logprobs = generation->logprobs,
    };
}
