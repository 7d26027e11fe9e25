#include "runtime/config.h"

#include <criterion/criterion.h>
#include <math.h>
#include <sys/stat.h>

#include "tests/runtime/scratch.h"

#define SPARSITY(prune, skip, tiles, lanes, recent, sink)                                                              \
    "{\"prune_ratio\": " prune ", \"skip_share\": " skip ", \"cache_tiles\": " tiles ", \"cache_lanes\": " lanes       \
    ", \"recent_tiles\": " recent ", \"sink_tiles\": " sink "}"

// A config that loads, key by key.
static const struct {
    const char *key, *value;
} good[] = {
    {"model_type", "\"tessera\""},
    {"architectures", "[\"TesseraForCausalLM\"]"}, // unknown to us, like two below: ignored
    {"vocab_size", "256"},
    {"hidden_size", "256"},
    {"num_hidden_layers", "10"},
    {"num_attention_heads", "4"},
    {"num_key_value_heads", "2"},
    {"head_dim", "64"},
    {"intermediate_size", "1024"},
    {"hidden_act", "\"gelu_tanh\""},
    {"rms_norm_eps", "1e-06"},
    {"normalizer_eps", "0.001"},
    {"decay_temperature", "16.0"},
    {"tie_word_embeddings", "false"},
    {"tile_size", "64"},
    {"tile_sparsity", SPARSITY("0.25", "0.001", "512", "8", "2", "1")},
    {"eos_token_id", "0"},
    {"bos_token_id", "3"},
    {"tokenizer", "\"bytes\""},
    {"torch_dtype", "\"bfloat16\""},
    {"extra", "{\"hidden_size\": -1}"},
};

#define N_GOOD (sizeof good / sizeof *good)

typedef struct change {
    const char *key, *value; // value NULL: the key is left out
} change;

// The good config with some values changed.
static size_t compose(char *text, size_t capacity, const change *changes, size_t n_changes) {
    size_t n = (size_t)snprintf(text, capacity, "{");
    for (size_t i = 0; i < N_GOOD; i++) {
        const char *value = good[i].value;
        for (size_t j = 0; j < n_changes; j++)
            if (changes[j].key != NULL && strcmp(changes[j].key, good[i].key) == 0)
                value = changes[j].value;
        if (value != NULL)
            n += (size_t)snprintf(text + n, capacity - n, "%s\n  \"%s\": %s", n == 1 ? "" : ",", good[i].key, value);
    }
    n += (size_t)snprintf(text + n, capacity - n, "\n}\n");
    cr_assert_lt(n, capacity);
    return n;
}

static ts_status load_changed(const scratch *s, const change *changes, size_t n_changes, ts_config *out) {
    char text[4096];
    scratch_write(s, "config.json", text, compose(text, sizeof text, changes, n_changes));
    return ts_config_load(s->dir, out);
}

Test(config, reads_every_key) {
    const scratch s = scratch_create();
    ts_config c;
    cr_assert_eq(load_changed(&s, NULL, 0, &c), TS_OK, "%s", ts_status_message());
    cr_expect(c.vocab_size == 256 && c.hidden_size == 256 && c.n_layers == 10 && c.intermediate_size == 1024);
    cr_expect(c.n_heads == 4 && c.n_kv_heads == 2 && c.head_dim == 64 && c.tile_size == 64);
    cr_expect_eq(c.mlp, TS_MLP_GELU_TANH);
    cr_expect(c.rms_norm_eps == 1e-6 && c.normalizer_eps == 0.001 && c.decay_temperature == 16);
    cr_expect_not(c.tie_word_embeddings);
    cr_expect(c.is_sparse);
    cr_expect(c.sparsity.prune_ratio == 0.25 && c.sparsity.skip_share == 0.001);
    cr_expect(c.sparsity.cache_tiles == 512 && c.sparsity.cache_lanes == 8);
    cr_expect(c.sparsity.recent_tiles == 2 && c.sparsity.sink_tiles == 1);
    cr_expect(c.n_eos == 1 && c.eos_token_ids[0] == 0 && c.bos_token_id == 3);
    cr_expect_str_eq(c.tokenizer, "bytes");
    scratch_remove(&s);
}

Test(config, reads_the_file_itself) {
    const scratch s = scratch_create();
    char text[4096];
    const char *path = scratch_write(&s, "other.json", text, compose(text, sizeof text, NULL, 0));
    ts_config c;
    cr_assert_eq(ts_config_load(path, &c), TS_OK, "%s", ts_status_message());
    cr_expect_eq(c.n_layers, 10);
    scratch_remove(&s);
}

Test(config, optional_keys_may_be_absent_or_null) {
    static const char *const optional[] = {"model_type",   "tile_sparsity", "eos_token_id",
                                           "bos_token_id", "tokenizer",     "architectures"};
    const scratch s = scratch_create();
    for (int with_null = 0; with_null < 2; with_null++) {
        change changes[6];
        for (size_t i = 0; i < 6; i++)
            changes[i] = (change){optional[i], with_null ? "null" : NULL};
        ts_config c;
        cr_assert_eq(load_changed(&s, changes, 6, &c), TS_OK, "%s", ts_status_message());
        cr_expect_not(c.is_sparse);
        cr_expect(c.sparsity.prune_ratio == 0 && c.sparsity.cache_lanes == 0);
        cr_expect(c.n_eos == 0 && c.bos_token_id == -1);
        cr_expect_str_eq(c.tokenizer, "");
    }
    scratch_remove(&s);
}

Test(config, accepts_the_edges) {
    static const change edges[][2] = {
        {{"hidden_act", "\"swiglu\""}},
        {{"head_dim", "128"}},
        {{"head_dim", "128"}, {"tile_size", "128"}},
        {{"num_key_value_heads", "4"}},
        {{"num_key_value_heads", "1"}},
        {{"vocab_size", "16777216"}},
        {{"hidden_size", "1048576"}},
        {{"rms_norm_eps", "1"}}, // an integer is a number
        {{"decay_temperature", "16"}},
        {{"tie_word_embeddings", "true"}},
        {{"eos_token_id", "[1, 2, 255, 0, 5, 6, 7, 8]"}},
        {{"eos_token_id", "[]"}},
        {{"eos_token_id", "255"}},
        {{"tile_sparsity", SPARSITY("0", "0", "0", "1", "0", "0")}},
        {{"tile_sparsity", SPARSITY("1", "1.0", "3", "8", "0", "0")}}, // less than a tile a lane: none is kept
        {{"tokenizer", "\"a name of sixty-three bytes, the longest that has room: .......\""}},
    };
    const scratch s = scratch_create();
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++) {
        ts_config c;
        cr_expect_eq(load_changed(&s, edges[i], 2, &c), TS_OK, "%s: %s", edges[i][0].key, ts_status_message());
    }
    ts_config c;
    cr_assert_eq(load_changed(&s, edges[10], 2, &c), TS_OK);
    cr_expect(c.n_eos == 8 && c.eos_token_ids[2] == 255 && c.eos_token_ids[7] == 8);
    cr_assert_eq(load_changed(&s, edges[0], 2, &c), TS_OK);
    cr_expect_eq(c.mlp, TS_MLP_SWIGLU);
    scratch_remove(&s);
}

Test(config, refuses_values_and_says_what_is_allowed) {
    static const struct {
        const char *key, *value; // value NULL: absent
        const char *named;       // as the sentence names the key; NULL: the key itself
        const char *allowed;
    } cases[] = {
        {"model_type", "\"llama\"", NULL, "\"tessera\""},
        {"model_type", "7", NULL, "\"tessera\""},
        {"vocab_size", NULL, NULL, "an integer from 1 to 16777216"},
        {"vocab_size", "null", NULL, "an integer from 1 to 16777216"},
        {"vocab_size", "0", NULL, "an integer from 1 to 16777216"},
        {"vocab_size", "-5", NULL, "an integer from 1 to 16777216"},
        {"vocab_size", "256.0", NULL, "an integer from 1 to 16777216"},
        {"vocab_size", "\"256\"", NULL, "an integer from 1 to 16777216"},
        {"vocab_size", "16777217", NULL, "an integer from 1 to 16777216"},
        {"vocab_size", "4294967552", NULL, "an integer from 1 to 16777216"}, // 256 in 32 bits
        {"hidden_size", NULL, NULL, "an integer from 1 to 1048576"},
        {"hidden_size", "1048577", NULL, "an integer from 1 to 1048576"},
        {"hidden_size", "true", NULL, "an integer from 1 to 1048576"},
        {"num_hidden_layers", NULL, NULL, "an integer from 1 to 4096"},
        {"num_hidden_layers", "0", NULL, "an integer from 1 to 4096"},
        {"num_hidden_layers", "4097", NULL, "an integer from 1 to 4096"},
        {"num_attention_heads", NULL, NULL, "an integer from 1 to 8192"},
        {"num_attention_heads", "0", NULL, "an integer from 1 to 8192"},
        {"num_attention_heads", "9223372036854775807", NULL, "an integer from 1 to 8192"},
        {"num_key_value_heads", NULL, NULL, "an integer from 1 to 4"},
        {"num_key_value_heads", "0", NULL, "an integer from 1 to 4"},
        {"num_key_value_heads", "3", NULL, "a divisor of num_attention_heads, which is 4"},
        {"num_key_value_heads", "8", NULL, "an integer from 1 to 4"},
        {"head_dim", NULL, NULL, "64 or 128"},
        {"head_dim", "32", NULL, "64 or 128"},
        {"head_dim", "96", NULL, "64 or 128"},
        {"head_dim", "192", NULL, "64 or 128"},
        {"head_dim", "64.0", NULL, "64 or 128"},
        {"intermediate_size", NULL, NULL, "an integer from 1 to 4194304"},
        {"intermediate_size", "[1024]", NULL, "an integer from 1 to 4194304"},
        {"hidden_act", NULL, NULL, "\"gelu_tanh\" or \"swiglu\""},
        {"hidden_act", "\"gelu_pytorch_tanh\"", NULL, "\"gelu_tanh\" or \"swiglu\""},
        {"hidden_act", "\"relu\"", NULL, "\"gelu_tanh\" or \"swiglu\""},
        {"hidden_act", "null", NULL, "\"gelu_tanh\" or \"swiglu\""},
        {"rms_norm_eps", NULL, NULL, "a number > 0, from 1.18e-38 to 3.4e+38"},
        {"rms_norm_eps", "0", NULL, "a number > 0"},
        {"rms_norm_eps", "-1e-6", NULL, "a number > 0"},
        {"rms_norm_eps", "1e-300", NULL, "a number > 0"},
        {"rms_norm_eps", "\"1e-6\"", NULL, "a number > 0"},
        {"normalizer_eps", NULL, NULL, "a number > 0"},
        {"normalizer_eps", "0.0", NULL, "a number > 0"},
        {"normalizer_eps", "1e300", NULL, "a number > 0"},
        {"decay_temperature", NULL, NULL, "a number > 0"},
        {"decay_temperature", "0", NULL, "a number > 0"},
        {"decay_temperature", "-16.0", NULL, "a number > 0"},
        {"tie_word_embeddings", NULL, NULL, "true or false"},
        {"tie_word_embeddings", "0", NULL, "true or false"},
        {"tie_word_embeddings", "\"false\"", NULL, "true or false"},
        {"tile_size", NULL, NULL, "64 (128 needs a head_dim of 128)"},
        {"tile_size", "128", NULL, "64 (128 needs a head_dim of 128)"},
        {"tile_size", "0", NULL, "64 (128 needs a head_dim of 128)"},
        {"tile_sparsity", "true", NULL, "an object"},
        {"tile_sparsity", "[]", NULL, "an object"},
        {"tile_sparsity", "{}", "tile_sparsity.prune_ratio", "a number from 0 to 1"},
        {"tile_sparsity", SPARSITY("-0.1", "0", "0", "1", "0", "0"), "tile_sparsity.prune_ratio",
         "a number from 0 to 1"},
        {"tile_sparsity", SPARSITY("1.5", "0", "0", "1", "0", "0"), "tile_sparsity.prune_ratio",
         "a number from 0 to 1"},
        {"tile_sparsity", SPARSITY("0", "2", "0", "1", "0", "0"), "tile_sparsity.skip_share", "a number from 0 to 1"},
        {"tile_sparsity", SPARSITY("0", "null", "0", "1", "0", "0"), "tile_sparsity.skip_share",
         "a number from 0 to 1"},
        {"tile_sparsity", SPARSITY("0", "0", "-1", "1", "0", "0"), "tile_sparsity.cache_tiles",
         "an integer from 0 to 1099511627776"},
        {"tile_sparsity", SPARSITY("0", "0", "0.5", "1", "0", "0"), "tile_sparsity.cache_tiles",
         "an integer from 0 to 1099511627776"},
        {"tile_sparsity", SPARSITY("0", "0", "0", "0", "0", "0"), "tile_sparsity.cache_lanes",
         "an integer from 1 to 1073741824"},
        {"tile_sparsity", SPARSITY("0", "0", "0", "1", "-1", "0"), "tile_sparsity.recent_tiles",
         "an integer from 0 to 1073741824"},
        {"tile_sparsity", SPARSITY("0", "0", "0", "1", "0", "-1"), "tile_sparsity.sink_tiles",
         "an integer from 0 to 1073741824"},
        {"tile_sparsity", SPARSITY("0", "0", "0", "1", "0", "2147483648"), "tile_sparsity.sink_tiles",
         "an integer from 0 to 1073741824"},
        {"tile_sparsity", SPARSITY("0", "0", "0", "1", "0", "0, \"skip_shares\": 0.1"), "tile_sparsity.skip_shares",
         "\"prune_ratio\", \"skip_share\", \"cache_tiles\", \"cache_lanes\", \"recent_tiles\" or \"sink_tiles\""},
        {"tile_sparsity", "{\"prune_ratio\": 0, \"skip_share\": 0, \"cache_lanes\": 8}", "tile_sparsity.cache_tiles",
         "an integer from 0 to 1099511627776"},
        {"eos_token_id", "256", NULL, "an integer from 0 to 255, an array of at most 8 of them, or null"},
        {"eos_token_id", "-1", NULL, "an integer from 0 to 255"},
        {"eos_token_id", "true", NULL, "an integer from 0 to 255"},
        {"eos_token_id", "[0, 256]", NULL, "an integer from 0 to 255"},
        {"eos_token_id", "[null]", NULL, "an integer from 0 to 255"},
        {"eos_token_id", "[0, 1, 2, 3, 4, 5, 6, 7, 8]", NULL, "at most 8"},
        {"eos_token_id", "\"</s>\"", NULL, "an integer from 0 to 255"},
        {"bos_token_id", "256", NULL, "an integer from 0 to 255, or null"},
        {"bos_token_id", "-1", NULL, "an integer from 0 to 255, or null"},
        {"bos_token_id", "[1]", NULL, "an integer from 0 to 255, or null"},
        {"tokenizer", "\"\"", NULL, "a string of 1 to 63 bytes, or null"},
        {"tokenizer", "5", NULL, "a string of 1 to 63 bytes, or null"},
        {"tokenizer", "\"a name of sixty-four bytes, one longer than the room there is: .\"", NULL,
         "a string of 1 to 63 bytes, or null"},
    };
    const scratch s = scratch_create();
    char path[300];
    snprintf(path, sizeof path, "%s/config.json: ", s.dir);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const change one = {cases[i].key, cases[i].value};
        const char *named = cases[i].named != NULL ? cases[i].named : cases[i].key;
        ts_config c;
        memset(&c, 0x5a, sizeof c);
        ts_config before = c;
        const ts_status status = load_changed(&s, &one, 1, &c);
        const char *message = ts_status_message();
        cr_expect_eq(status, TS_ERR_INVALID, "%s = %s: %s", one.key, one.value, message);
        cr_expect_eq(strncmp(message, path, strlen(path)), 0, "%s", message);
        cr_expect_eq(strncmp(message + strlen(path), named, strlen(named)), 0, "%s: %s", named, message);
        cr_expect_not_null(strstr(message, cases[i].allowed), "%s: %s", cases[i].allowed, message);
        if (cases[i].named == NULL && one.value != NULL && strpbrk(one.value, "\".e") == NULL)
            cr_expect_not_null(strstr(message, one.value), "the value %s: %s", one.value, message);
        if (one.value == NULL)
            cr_expect_not_null(strstr(message, "absent"), "%s", message);
        cr_expect_eq(memcmp(&c, &before, sizeof c), 0, "%s: the output was touched", one.key);
    }
    scratch_remove(&s);
}

Test(config, refuses_files_that_are_no_config) {
    static const struct {
        const char *text;
        ts_status code;
        const char *says[3];
    } cases[] = {
        {"", TS_ERR_FORMAT, {"empty"}},
        {"{", TS_ERR_FORMAT, {"line 1", "column", "byte 1"}},
        {"{\n  \"vocab_size\": 5,\n  \"vocab_size\": 6\n}", TS_ERR_FORMAT, {"line 3", "duplicate", "vocab_size"}},
        {"{\"tile_sparsity\": {\"a key too long to quote it all\": 1, \"a key too long to quote it all\": 2}}",
         TS_ERR_FORMAT,
         {"line 1", "duplicate", "a key too long to quote it all"}},
        {"{\"vocab_size\": 99999999999999999999}", TS_ERR_FORMAT, {"line 1", "99999999999999999999"}},
        {"{\"rms_norm_eps\": 1e999}", TS_ERR_FORMAT, {"line 1", "1e999"}},
        {"{\"rms_norm_eps\": NaN}", TS_ERR_FORMAT, {"line 1", "NaN"}},
        {"{} {}", TS_ERR_FORMAT, {"line 1"}},
        {"{\"a\\u0000b\": 1}", TS_ERR_FORMAT, {"line 1"}},
        {"{\"a\": \"\xff\"}", TS_ERR_FORMAT, {"UTF-8"}},
        {"\xef\xbb\xbf{}", TS_ERR_FORMAT, {"line 1"}},
        {"[]", TS_ERR_INVALID, {"the file is []", "an object"}},
        {"\"text\"", TS_ERR_INVALID, {"the file is \"text\"", "an object"}},
        {"{}", TS_ERR_INVALID, {"vocab_size is absent"}},
    };
    const scratch s = scratch_create();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *path = scratch_write(&s, "config.json", cases[i].text, strlen(cases[i].text));
        ts_config c;
        cr_expect_eq(ts_config_load(s.dir, &c), cases[i].code, "case %zu: %s", i, ts_status_message());
        cr_expect_eq(strncmp(ts_status_message(), path, strlen(path)), 0, "%s", ts_status_message());
        for (int j = 0; j < 3 && cases[i].says[j] != NULL; j++)
            cr_expect_not_null(strstr(ts_status_message(), cases[i].says[j]), "case %zu, %s: %s", i, cases[i].says[j],
                               ts_status_message());
    }
    scratch_remove(&s);
}

Test(config, refuses_paths_that_are_no_config) {
    const scratch s = scratch_create();
    char path[300];
    ts_config c;
    cr_expect_eq(ts_config_load(s.dir, &c), TS_ERR_IO);
    cr_expect_not_null(strstr(ts_status_message(), "/config.json: cannot open"), "%s", ts_status_message());
    snprintf(path, sizeof path, "%s/absent", s.dir);
    cr_expect_eq(ts_config_load(path, &c), TS_ERR_IO);
    cr_expect_not_null(strstr(ts_status_message(), path), "%s", ts_status_message());

    snprintf(path, sizeof path, "%s/config.json", s.dir);
    cr_assert_eq(mkfifo(path, 0600), 0);
    cr_expect_eq(ts_config_load(s.dir, &c), TS_ERR_INVALID); // and does not wait for a writer
    cr_expect_not_null(strstr(ts_status_message(), "FIFO"), "%s", ts_status_message());
    cr_assert_eq(remove(path), 0);

    char *big = malloc(TS_CONFIG_MAX_BYTES + 1);
    memset(big, ' ', TS_CONFIG_MAX_BYTES + 1);
    scratch_write(&s, "config.json", big, TS_CONFIG_MAX_BYTES + 1);
    free(big);
    cr_expect_eq(ts_config_load(s.dir, &c), TS_ERR_FORMAT);
    cr_expect_not_null(strstr(ts_status_message(), "1048577 bytes; allowed: at most 1048576"), "%s",
                       ts_status_message());
    scratch_remove(&s);
}

Test(config, messages_carry_no_control_characters) {
    const scratch s = scratch_create();
    const change evil = {"hidden_act", "\"\\u001b[2J\\u009b\\n\""};
    const change key = {"tile_sparsity", "{\"\\u001b[2J\\u009b\\n\": 1}"};
    ts_config c;
    for (int i = 0; i < 2; i++) {
        cr_expect_eq(load_changed(&s, i == 0 ? &evil : &key, 1, &c), TS_ERR_INVALID);
        cr_expect_null(strpbrk(ts_status_message(), "\x1b\n"), "%s", ts_status_message());
        cr_expect_null(strstr(ts_status_message(), "\xc2\x9b"), "%s", ts_status_message());
    }
    scratch_remove(&s);
}

static void check_sane(const ts_config *c) {
    cr_assert(c->vocab_size > 0 && c->hidden_size > 0 && c->n_layers > 0 && c->intermediate_size > 0);
    cr_assert(c->n_heads > 0 && c->n_kv_heads > 0 && c->n_heads % c->n_kv_heads == 0);
    cr_assert(c->head_dim == 64 || c->head_dim == 128);
    cr_assert(c->tile_size == 64 || (c->tile_size == 128 && c->head_dim == 128));
    cr_assert(c->rms_norm_eps > 0 && isfinite(c->rms_norm_eps) && c->normalizer_eps > 0 && c->decay_temperature > 0);
    cr_assert(c->n_eos >= 0 && c->n_eos <= TS_CONFIG_MAX_EOS);
    for (int i = 0; i < c->n_eos; i++)
        cr_assert(c->eos_token_ids[i] >= 0 && c->eos_token_ids[i] < c->vocab_size);
    cr_assert(c->bos_token_id >= -1 && c->bos_token_id < c->vocab_size);
    cr_assert_not_null(memchr(c->tokenizer, '\0', sizeof c->tokenizer));
    if (c->is_sparse)
        cr_assert(c->sparsity.cache_lanes >= 1 && c->sparsity.prune_ratio >= 0 && c->sparsity.prune_ratio <= 1);
}

Test(config, mutated_files_only_ever_give_a_status) {
    const scratch s = scratch_create();
    char original[4096], text[4096];
    const size_t n_original = compose(original, sizeof original, NULL, 0);
    uint64_t state = 20240229;
    int n_accepted = 0;
    const int n_rounds = 20000;
    for (int round = 0; round < n_rounds; round++) {
        memcpy(text, original, n_original);
        const size_t n = scratch_mutate(text, n_original, sizeof text, &state);
        const char *path = scratch_write(&s, "config.json", text, n);
        ts_config c;
        const ts_status status = ts_config_load(path, &c);
        cr_assert_lt((unsigned)status, TS_N_STATUSES);
        if (status == TS_OK) {
            check_sane(&c);
            n_accepted++;
        } else {
            cr_assert_eq(strncmp(ts_status_message(), path, strlen(path)), 0, "%s", ts_status_message());
        }
    }
    cr_expect(n_accepted > n_rounds / 100 && n_accepted < n_rounds / 2, "%d of %d accepted", n_accepted, n_rounds);
    scratch_remove(&s);
}
