// Hostile and foreign tokenizer.json files: each is the smallest good file with one thing changed, and must be refused
// with a sentence that names the file, the place and what would have been accepted.
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/tokenizer.h"

static char directory[] = "/tmp/tessera-tokenizer-XXXXXX";

static void write_file(const char *text, size_t n) {
    char path[256];
    snprintf(path, sizeof path, "%s/tokenizer.json", directory);
    FILE *file = fopen(path, "wb");
    cr_assert(file && fwrite(text, 1, n, file) == n && fclose(file) == 0);
}

static void make_directory(void) {
    cr_assert(mkdtemp(directory));
}

static void remove_directory(void) {
    char path[256];
    snprintf(path, sizeof path, "%s/tokenizer.json", directory);
    unlink(path);
    rmdir(directory);
}

// The 256 letters of the byte alphabet as `"letter": id`, ids 0 to 255.
static void put_alphabet(char *out) {
    int extra = 0;
    for (int byte = 0; byte < 256; byte++) {
        const bool own = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
        out += sprintf(out, "\"\\u%04x\": %d, ", own ? byte : 0x100 + extra++, byte);
    }
}

static const char good[] =
    "{\"version\": \"1.0\", \"truncation\": null, \"padding\": null, \"added_tokens\": [{\"id\": 258, \"content\": "
    "\"<e>\", "
    "\"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}], "
    "\"normalizer\": null, \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": "
    "true, "
    "\"use_regex\": true}, \"post_processor\": null, \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": "
    "true, "
    "\"trim_offsets\": true}, \"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, "
    "\"continuing_subword_prefix\": null, \"end_of_word_suffix\": null, \"fuse_unk\": false, \"byte_fallback\": false, "
    "\"ignore_merges\": false, \"vocab\": {@\"ab\": 256, \"abc\": 257}, \"merges\": [\"a b\", [\"ab\", \"c\"]]}}";

// The good file with the first `from` replaced by `to`. Malloc'd.
static char *variant(const char *from, const char *to) {
    char *alphabet = malloc(256 * 32), *out = malloc(sizeof good + 256 * 32 + strlen(to));
    put_alphabet(alphabet);
    const char *at = strstr(good, from);
    cr_assert(at, "%s", from);
    char *text = malloc(sizeof good + strlen(to));
    sprintf(text, "%.*s%s%s", (int)(at - good), good, to, at + strlen(from));
    char *mark = strchr(text, '@');
    if (mark)
        sprintf(out, "%.*s%s%s", (int)(mark - text), text, alphabet, mark + 1);
    else
        strcpy(out, text);
    free(text);
    free(alphabet);
    return out;
}

static ts_status load(const char *from, const char *to) {
    ts_tokenizer *t = NULL;
    char *text = variant(from, to);
    write_file(text, strlen(text));
    const ts_status status = ts_tokenizer_create(directory, "tokenizer.json", &t);
    cr_assert_eq(status == TS_OK, t != NULL);
    ts_tokenizer_free(t);
    free(text);
    return status;
}

#define GPT2_PRE "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": true}"
#define SPLIT(regex, behavior, rest)                                                                                   \
    "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\": \"" regex             \
    "\"}, \"behavior\": \"" behavior "\"" rest
#define BYTE_LEVEL_OFF                                                                                                 \
    "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": false}"
#define GPT2_REGEX "'s|'t|'re|'ve|'m|'ll|'d| ?\\\\p{L}+| ?\\\\p{N}+| ?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|\\\\s+"
#define TEMPLATE(single, tokens)                                                                                       \
    "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [" single                                      \
    "], \"pair\": [], \"special_tokens\": {" tokens "}}"
#define TEXT_A "{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}"
#define E_IN   "{\"SpecialToken\": {\"id\": \"<e>\", \"type_id\": 0}}"

TestSuite(tokenizer_refusals, .init = make_directory, .fini = remove_directory);

Test(tokenizer_refusals, good_variants_load) {
    static const char *const changes[][2] = {
        {"{@", "{@"},
        {"\"type\": \"BPE\", ", ""},
        {"\"dropout\": null", "\"dropout\": 0.0"},
        {"\"unk_token\": null, ", ""},
        {"\"end_of_word_suffix\": null", "\"end_of_word_suffix\": \"\""},
        {"\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}"},
        {"\"use_regex\": true}", "\"use_regex\": true }"},
        {"\"trim_offsets\": true, \"use_regex\": true}", "\"trim_offsets\": true}"},
        {"\"post_processor\": null", "\"post_processor\": " GPT2_PRE},
        {"\"post_processor\": null",
         TEMPLATE(E_IN ", " TEXT_A, "\"<e>\": {\"id\": \"<e>\", \"ids\": [258], \"tokens\": []}")},
        {GPT2_PRE, SPLIT(GPT2_REGEX, "Isolated", ", \"invert\": false}, " BYTE_LEVEL_OFF "]}")},
        {"\"id\": 258", "\"id\": 1000"},
    };
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++)
        cr_expect_eq(load(changes[i][0], changes[i][1]), TS_OK, "%s: %s", changes[i][1], ts_status_message());
}

Test(tokenizer_refusals, each_says_where_and_what_is_accepted) {
    static const struct {
        const char *from, *to;
        ts_status code;
        const char *says[3];
    } cases[] = {
        // other kinds
        {"\"BPE\"", "\"WordPiece\"", TS_ERR_UNSUPPORTED, {"model is", "\"WordPiece\"", "\"BPE\""}},
        {"\"BPE\"", "\"Unigram\"", TS_ERR_UNSUPPORTED, {"\"Unigram\"", "\"BPE\""}},
        {"\"BPE\"", "17", TS_ERR_FORMAT, {"model.type is an integer", "string"}},
        {"\"normalizer\": null",
         "\"normalizer\": {\"type\": \"Lowercase\"}",
         TS_ERR_UNSUPPORTED,
         {"normalizer", "\"Lowercase\"", "NFC"}},
        {"\"normalizer\": null",
         "\"normalizer\": {\"type\": \"NFC\", \"x\": 1}",
         TS_ERR_UNSUPPORTED,
         {"normalizer", "\"x\""}},
        {"\"normalizer\": null", "\"normalizer\": \"NFC\"", TS_ERR_FORMAT, {"normalizer is a string", "NFC"}},
        {GPT2_PRE, "{\"type\": \"Metaspace\"}", TS_ERR_UNSUPPORTED, {"pre_tokenizer", "\"Metaspace\"", "ByteLevel"}},
        {GPT2_PRE, "null", TS_ERR_FORMAT, {"pre_tokenizer is null", "Llama-3"}},
        {GPT2_PRE, BYTE_LEVEL_OFF, TS_ERR_UNSUPPORTED, {"pre_tokenizer.use_regex is false", "GPT-2"}},
        {GPT2_PRE,
         "{\"type\": \"Sequence\", \"pretokenizers\": [" GPT2_PRE "]}",
         TS_ERR_UNSUPPORTED,
         {"two parts", "Qwen2"}},
        {GPT2_PRE,
         "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Digits\"}, " BYTE_LEVEL_OFF "]}",
         TS_ERR_UNSUPPORTED,
         {"\"Digits\"", "Split"}},
        {GPT2_PRE,
         SPLIT("\\\\w+", "Isolated", ", \"invert\": false}, " BYTE_LEVEL_OFF "]}"),
         TS_ERR_UNSUPPORTED,
         {"pretokenizers[0].pattern.Regex is '\\w+'", "'s|'t", "\\p{N}{1,3}"}},
        {GPT2_PRE,
         SPLIT(GPT2_REGEX, "Removed", ", \"invert\": false}, " BYTE_LEVEL_OFF "]}"),
         TS_ERR_UNSUPPORTED,
         {"behavior is \"Removed\"", "\"Isolated\""}},
        {GPT2_PRE,
         SPLIT(GPT2_REGEX, "Isolated", ", \"invert\": true}, " BYTE_LEVEL_OFF "]}"),
         TS_ERR_UNSUPPORTED,
         {"invert is true", "false"}},
        {GPT2_PRE,
         SPLIT(GPT2_REGEX, "Isolated", ", \"invert\": false}, " GPT2_PRE "]}"),
         TS_ERR_UNSUPPORTED,
         {"pretokenizers[1].use_regex", "false"}},
        {GPT2_PRE,
         "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"String\": \" "
         "\"}}, " BYTE_LEVEL_OFF "]}",
         TS_ERR_UNSUPPORTED,
         {"\"String\"", "Regex"}},
        {"\"decoder\": {\"type\": \"ByteLevel\"",
         "\"decoder\": {\"type\": \"WordPiece\"",
         TS_ERR_UNSUPPORTED,
         {"decoder", "\"WordPiece\"", "\"ByteLevel\""}},
        {"\"truncation\": null",
         "\"truncation\": {\"max_length\": 512}",
         TS_ERR_UNSUPPORTED,
         {"truncation is an object", "null"}},
        {"\"padding\": null", "\"padding\": {}", TS_ERR_UNSUPPORTED, {"padding is an object", "null"}},
        {"\"version\": \"1.0\"", "\"version\": \"2.0\"", TS_ERR_UNSUPPORTED, {"\"2.0\"", "\"1.0\""}},
        {"\"version\": \"1.0\"",
         "\"version\": \"1.0\", \"mode\": 3",
         TS_ERR_UNSUPPORTED,
         {"\"mode\"", "version, truncation"}},
        // model options
        {"\"dropout\": null", "\"dropout\": 0.1", TS_ERR_UNSUPPORTED, {"model.dropout", "null"}},
        {"\"unk_token\": null", "\"unk_token\": \"<unk>\"", TS_ERR_UNSUPPORTED, {"model.unk_token is <unk>", "null"}},
        {"\"continuing_subword_prefix\": null",
         "\"continuing_subword_prefix\": \"##\"",
         TS_ERR_UNSUPPORTED,
         {"model.continuing_subword_prefix is ##"}},
        {"\"end_of_word_suffix\": null",
         "\"end_of_word_suffix\": \"</w>\"",
         TS_ERR_UNSUPPORTED,
         {"model.end_of_word_suffix is </w>"}},
        {"\"byte_fallback\": false", "\"byte_fallback\": true", TS_ERR_UNSUPPORTED, {"model.byte_fallback", "false"}},
        {"\"ignore_merges\": false",
         "\"ignore_merges\": 1",
         TS_ERR_FORMAT,
         {"model.ignore_merges is an integer", "true or false"}},
        {"\"ignore_merges\": false",
         "\"ignore_merge\": false",
         TS_ERR_UNSUPPORTED,
         {"\"ignore_merge\"", "ignore_merges"}},
        // vocabulary and merges
        {"\"vocab\": {@\"ab\": 256, \"abc\": 257}",
         "\"vocab\": []",
         TS_ERR_FORMAT,
         {"model.vocab is an array", "object"}},
        {"\"vocab\": {@\"ab\": 256, ",
         "\"vocab\": {\"ab\": 256, ",
         TS_ERR_UNSUPPORTED,
         {"no token for byte 0x00", "256"}},
        {"\"ab\": 256", "\"ab\": -1", TS_ERR_FORMAT, {"model.vocab[\"ab\"] is -1", "ids from 0"}},
        {"\"ab\": 256", "\"ab\": 99999999999", TS_ERR_FORMAT, {"model.vocab[\"ab\"] is 99999999999", "16777215"}},
        {"\"ab\": 256", "\"ab\": \"256\"", TS_ERR_FORMAT, {"model.vocab[\"ab\"] is a string", "integer"}},
        {"\"ab\": 256", "\"ab\": 2.5", TS_ERR_FORMAT, {"model.vocab[\"ab\"] is a real", "integer"}},
        {"\"ab\": 256", "\"ab\": 257", TS_ERR_FORMAT, {"has id 257", "unique"}},
        {"\"ab\": 256", "\"ab\": 256, \"ab\": 259", TS_ERR_FORMAT, {"duplicate object key", "line 1"}},
        {"\"ab\": 256", "\"ab\": 256, \"\": 259", TS_ERR_FORMAT, {"empty token"}},
        {"\"a b\"", "\"a q\"", TS_ERR_FORMAT, {"model.merges[0]: \"aq\" is not in model.vocab"}},
        {"\"a b\"", "\"a xyz\"", TS_ERR_FORMAT, {"model.merges[0]: \"xyz\" is not in model.vocab"}},
        {"\"a b\"", "\"ab\"", TS_ERR_FORMAT, {"model.merges[0] is \"ab\"", "one space"}},
        {"\"a b\"", "\"a b c\"", TS_ERR_FORMAT, {"model.merges[0] is \"a b c\"", "one space"}},
        {"\"a b\"", "\"#version: 0.2\"", TS_ERR_FORMAT, {"model.merges[0] is \"#version: 0.2\""}},
        {"\"a b\"", "7", TS_ERR_FORMAT, {"model.merges[0] is an integer", "\"a b\""}},
        {"[\"ab\", \"c\"]", "[\"ab\"]", TS_ERR_FORMAT, {"model.merges[1]", "two strings"}},
        {"[\"ab\", \"c\"]", "[\"a\", \"b\"]", TS_ERR_FORMAT, {"model.merges", "merge 1 repeats merge 0", "once"}},
        {"[\"a b\", [\"ab\", \"c\"]]", "{}", TS_ERR_FORMAT, {"model.merges is an object", "array"}},
        // added tokens
        {"\"id\": 258", "\"id\": 256", TS_ERR_FORMAT, {"added_tokens[0]", "256", "unique"}},
        {"\"id\": 258", "\"id\": 16777216", TS_ERR_FORMAT, {"added_tokens[0].id", "16777215"}},
        {"\"id\": 258, ", "", TS_ERR_FORMAT, {"added_tokens[0].id is absent"}},
        {"\"content\": \"<e>\"",
         "\"content\": \"ab\"",
         TS_ERR_FORMAT,
         {"added_tokens[0]", "model.vocab gives it 256", "agree"}},
        {"\"content\": \"<e>\"", "\"content\": \"\"", TS_ERR_FORMAT, {"added_tokens[0].content is empty"}},
        {"\"content\": \"<e>\"", "\"content\": null", TS_ERR_FORMAT, {"added_tokens[0].content is null", "string"}},
        {"\"lstrip\": false", "\"lstrip\": 0", TS_ERR_FORMAT, {"added_tokens[0].lstrip is an integer"}},
        {"\"rstrip\": false, ", "", TS_ERR_FORMAT, {"added_tokens[0].rstrip is absent"}},
        {"\"added_tokens\": [", "\"added_tokens\": [4, ", TS_ERR_FORMAT, {"added_tokens[0]"}},
        {"\"added_tokens\": [",
         "\"added_tokens\": [{\"id\": 300, \"content\": \"<e>\", \"single_word\": false, \"lstrip\": false, "
         "\"rstrip\": false, \"normalized\": true, \"special\": true}, ",
         TS_ERR_FORMAT,
         {"added_tokens[1]", "\"<e>\" was given before"}},
        // post-processor
        {"\"post_processor\": null",
         "\"post_processor\": {\"type\": \"BertProcessing\"}",
         TS_ERR_UNSUPPORTED,
         {"post_processor", "\"BertProcessing\"", "TemplateProcessing"}},
        {"\"post_processor\": null",
         TEMPLATE(E_IN ", " TEXT_A, ""),
         TS_ERR_FORMAT,
         {"post_processor.single[0]", "\"<e>\"", "special_tokens"}},
        {"\"post_processor\": null",
         TEMPLATE(E_IN ", " TEXT_A, "\"<e>\": {\"id\": \"<e>\", \"ids\": [999], \"tokens\": []}"),
         TS_ERR_FORMAT,
         {"\"<e>\"", "999", "no token"}},
        {"\"post_processor\": null",
         TEMPLATE(TEXT_A ", " TEXT_A, ""),
         TS_ERR_UNSUPPORTED,
         {"post_processor.single[1]", "\"A\", once"}},
        {"\"post_processor\": null", TEMPLATE("", ""), TS_ERR_UNSUPPORTED, {"post_processor.single", "\"A\""}},
        {"\"post_processor\": null",
         "\"post_processor\": {\"type\": \"Sequence\", \"processors\": [{\"type\": \"RobertaProcessing\"}]}",
         TS_ERR_UNSUPPORTED,
         {"post_processor.processors[0]", "\"RobertaProcessing\""}},
        // not a tokenizer at all
        {"\"model\": {", "\"model\": [{", TS_ERR_FORMAT, {"line 1", "byte"}},
        {"\"version\": \"1.0\"", "\"version\": \"1.0\xFF\"", TS_ERR_FORMAT, {"line 1", "unable to decode byte 0xff"}},
        {"\"<e>\"", "\"<\\u0000>\"", TS_ERR_FORMAT, {"line 1"}},
        {"\"model\": {", "\"model\": 3, \"decode\": {", TS_ERR_UNSUPPORTED, {"\"decode\""}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const ts_status status = load(cases[i].from, cases[i].to);
        const char *message = ts_status_message();
        cr_expect_eq(status, cases[i].code, "%s -> %s: %s: %s", cases[i].from, cases[i].to, ts_status_name(status),
                     message);
        cr_expect(strstr(message, directory), "%s", message);
        for (int s = 0; s < 3 && cases[i].says[s]; s++)
            cr_expect(strstr(message, cases[i].says[s]), "\"%s\" is not in: %s", cases[i].says[s], message);
    }
}

// Every prefix of a good file, and every file with one byte less, is refused without harm (under the sanitizers too).
Test(tokenizer_refusals, truncated_files) {
    char *text = variant("{@", "{@");
    const size_t n = strlen(text);
    ts_tokenizer *t = NULL;
    for (size_t cut = 0; cut < n; cut += 1 + cut / 64) {
        write_file(text, cut);
        cr_assert_eq(ts_tokenizer_create(directory, NULL, &t), TS_ERR_FORMAT, "%zu bytes", cut);
        cr_assert(strstr(ts_status_message(), "not acceptable JSON"));
    }
    free(text);
}

Test(tokenizer_refusals, control_characters_do_not_reach_the_message) {
    cr_assert_eq(load("\"BPE\"", "\"\\u001b[2J\\n\""), TS_ERR_UNSUPPORTED);
    cr_assert(strstr(ts_status_message(), "\\x1b[2J\\x0a") && !strchr(ts_status_message(), '\x1b'), "%s",
              ts_status_message());
}

Test(tokenizer_refusals, long_names_are_cut_between_characters) {
    char to[4096] = "\"";
    for (int i = 0; i < 300; i++)
        strcat(to, i % 3 ? "\xF0\x9F\x91\x8D" : "\\u0001");
    strcat(to, "\"");
    cr_assert_eq(load("\"BPE\"", to), TS_ERR_UNSUPPORTED);
    cr_assert(strstr(ts_status_message(), "\xF0\x9F\x91\x8D...\"") || strstr(ts_status_message(), "\\x01...\""), "%s",
              ts_status_message());
}

Test(tokenizer_refusals, prefix_space_goes_before_text_or_pieces) {
    static const struct {
        const char *from, *to, *text, *want;
    } cases[] = {
        {"\"add_prefix_space\": false", "\"add_prefix_space\": true", "x y<e>z", " x y<e> z"},
        {"\"add_prefix_space\": false", "\"add_prefix_space\": true", " x\n", " x\n"},
        {"\"add_prefix_space\": false", "\"add_prefix_space\": true", "", ""},
        {GPT2_PRE,
         SPLIT(GPT2_REGEX, "Isolated",
               "}, {\"type\": \"ByteLevel\", \"add_prefix_space\": true, \"trim_offsets\": true, \"use_regex\": "
               "false}]}"),
         "x1 y.", " x 1 y ."},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ts_tokenizer *t = NULL;
        char *file = variant(cases[i].from, cases[i].to), got[64] = "";
        int32_t *ids = NULL;
        size_t n_ids = 0, n;
        write_file(file, strlen(file));
        cr_assert_eq(ts_tokenizer_create(directory, NULL, &t), TS_OK, "%s", ts_status_message());
        cr_assert_eq(ts_tokenizer_encode(t, cases[i].text, strlen(cases[i].text), false, &ids, &n_ids), TS_OK);
        for (size_t k = 0; k < n_ids; k++) {
            const char *bytes = ts_tokenizer_token_bytes(t, ids[k], &n, NULL);
            strncat(got, bytes, n);
        }
        cr_assert_str_eq(got, cases[i].want);
        free(ids);
        free(file);
        ts_tokenizer_free(t);
    }
}
