// The sizes and constants of a model, from its config.json (Hugging Face convention: keys that are not listed here are
// ignored). Every value is checked before anybody computes with it.
//
//     ts_config config;
//     TS_TRY(ts_config_load(model_dir, &config));
//
// | key in config.json  | allowed                                        | absent or null |
// |---------------------|------------------------------------------------|----------------|
// | model_type          | "tessera"                                      | not checked    |
// | vocab_size          | 1 to TS_CONFIG_MAX_VOCAB                       | error          |
// | hidden_size         | 1 to TS_CONFIG_MAX_HIDDEN                      | error          |
// | num_hidden_layers   | 1 to TS_CONFIG_MAX_LAYERS                      | error          |
// | num_attention_heads | 1 to TS_CONFIG_MAX_HEADS                       | error          |
// | num_key_value_heads | a divisor of num_attention_heads               | error          |
// | head_dim            | 64 or 128                                      | error          |
// | intermediate_size   | 1 to TS_CONFIG_MAX_INTERMEDIATE                | error          |
// | hidden_act          | "gelu_tanh" or "swiglu"                        | error          |
// | rms_norm_eps        | > 0, within the normal numbers of float32      | error          |
// | normalizer_eps      | the same                                       | error          |
// | decay_temperature   | the same                                       | error          |
// | tie_word_embeddings | true or false                                  | error          |
// | tile_size           | 64, or 128 where head_dim is 128               | error          |
// | tile_sparsity       | an object with exactly the keys of ts_sparsity | dense          |
// | eos_token_id        | an id, or an array of up to TS_CONFIG_MAX_EOS  | none           |
// | bos_token_id        | an id                                          | none           |
// | tokenizer           | a string of 1 to 63 bytes                      | ""             |
//
// Integers are written as integers (64.0 is refused); real numbers may be written as integers. Ids lie in
// [0, vocab_size). hidden_size need not be num_attention_heads * head_dim. A key inside tile_sparsity that is none of
// the six is an error, because a misspelt one would silently change results.
//
// The limits hold every count of elements or bytes of the weights, also summed over all layers, below 2^60. Products
// with cache_tiles are not among these: check them.
#ifndef TS_CONFIG_H
#define TS_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/base/status.h"
#include "kernels/sparsity.h"

#define TS_CONFIG_MAX_VOCAB        (1 << 24)
#define TS_CONFIG_MAX_HIDDEN       (1 << 20)
#define TS_CONFIG_MAX_LAYERS       (1 << 12)
#define TS_CONFIG_MAX_HEADS        (1 << 13)
#define TS_CONFIG_MAX_INTERMEDIATE (1 << 22)
#define TS_CONFIG_MAX_TILES        (1 << 30) // cache_lanes, recent_tiles, sink_tiles
#define TS_CONFIG_MAX_CACHE_TILES  (INT64_C(1) << 40)
#define TS_CONFIG_MAX_EOS          8
#define TS_CONFIG_MAX_BYTES        (1 << 20) // size of config.json

typedef enum ts_mlp_kind {
    TS_MLP_GELU_TANH, // down(gelu_tanh(up(h)))
    TS_MLP_SWIGLU     // down(silu(gate(h)) * up(h))
} ts_mlp_kind;

typedef struct ts_config {
    int32_t vocab_size;        // V
    int32_t hidden_size;       // D
    int32_t n_layers;          // L
    int32_t n_heads;           // H, query heads
    int32_t n_kv_heads;        // KV; query head i reads KV head i / (H / KV)
    int32_t head_dim;          // d
    int32_t intermediate_size; // width of the mlp
    int32_t tile_size;         // T, tokens of a tile
    ts_mlp_kind mlp;
    double rms_norm_eps;
    double normalizer_eps;
    double decay_temperature;
    bool tie_word_embeddings; // the output layer is the embedding: no lm_head.weight
    bool is_sparse;           // false: dense, and sparsity is all zeros
    ts_sparsity sparsity;
    int32_t n_eos;
    int32_t eos_token_ids[TS_CONFIG_MAX_EOS];
    int32_t bos_token_id; // -1: none
    char tokenizer[64];   // "": the key is absent. Which names exist is the tokenizer's to say
} ts_config;

// Reads DIR/config.json, or the file itself when the path is no directory. *out is set only on success.
// Errors: TS_ERR_INVALID for a key that is missing or whose value is not allowed (the sentence names file, key, value
// and what is allowed), TS_ERR_FORMAT for bad JSON and for a file over TS_CONFIG_MAX_BYTES, TS_ERR_IO, TS_ERR_MEMORY.
ts_status ts_config_load(const char *dir_or_file, ts_config *out);

#endif
