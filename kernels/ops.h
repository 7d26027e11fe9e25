// Every op of the model: equation (numbers as in docs/model.md), shapes, limits. A backend is one table of them.
//
// Notation: M rows of a batch; D hidden size; H query heads, KV key/value heads, d head size, T tile size, all as owned
// by this rank; V rows of the vocabulary on this rank. Activations are of the device's compute_dtype: F32, or BF16
// where the backend has it; the residual stream (rms_norm's x) and logits are F32. Accumulation is at least f32; decay
// sums (c, E) and importance are f64. Unless an op says so, inputs and outputs must not overlap.
//
// ts_op_<name> checks the arguments (TS_ERR_INVALID), looks the op up in the device's table (TS_ERR_UNSUPPORTED when
// the backend lacks it) and enqueues it. Nothing here allocates but scratch that a device grows to the largest batch
// seen, or takes beforehand (ts_device_reserve_scratch).
#ifndef TS_OPS_H
#define TS_OPS_H

#include "kernels/base/tensor.h"
#include "kernels/device.h"
#include "kernels/sparsity.h"

#ifdef __cplusplus
extern "C" {
#endif

// The sequence of a span that only fills a decode batch up to a size it is wanted in. Such spans stand last, at
// position 0. Ops on rows compute theirs like any other; attention and importance neither read nor write anything for
// them, so y of attention keeps what it held.
enum { TS_PADDING = -1 };

// Consecutive tokens of one sequence inside a batch.
typedef struct ts_span {
    int32_t sequence; // its row in the tile cache, or TS_PADDING
    int32_t n_tokens; // > 0; 1 in a decode batch
    int64_t row;      // first row of the batch
    int64_t position; // position of the first token in its sequence
} ts_span;

// The rows of one forward pass. A sequence appears in at most one span. Spans cover the rows in order, without holes.
typedef struct ts_batch {
    bool decode; // every span has one token; a row's value must not depend on the number of rows (I3)
    int32_t n_spans;
    int64_t n_rows;
    const ts_span *spans;        // host memory
    const ts_span *device_spans; // the same on the device
    const int32_t *tokens;       // [n_rows] device
} ts_batch;

// Tokens that are open at most where the dense form folds them into S^ before their tile ends (BF16): a token then
// reads few rows beside S^.
enum { TS_FOLD_TOKENS = 16 };

// Rows of the open buffers of a sequence and KV head.
static inline int32_t ts_open_rows(bool is_sparse, ts_dtype open_dtype, int32_t tile_size) {
    return is_sparse || open_dtype != TS_BF16 ? tile_size : TS_FOLD_TOKENS;
}

// One layer's part of the tile cache, as the attention ops see it. All pointers are device memory.
// Per sequence s and KV head j, at index (s * n_kv_heads + j):
typedef struct ts_tile_cache_layer {
    int32_t n_heads, n_kv_heads, head_dim, tile_size;
    // What every token reads is of open_dtype, as the activations are: the open tokens, and S^ of all before them. They
    // are those of the open tile or, in dense form under BF16, since the last multiple of TS_FOLD_TOKENS; with R of
    // ts_open_rows, the first position % R rows are valid. F32: open_k is k^. BF16: it is W_k h, which BF16 holds
    // exactly, and k^ = open_gate phi(open_k) is formed where it is read; rounding k^ would move z and what rules 2 and
    // 3 decide by it.
    ts_dtype open_dtype;
    void *open_k;      // [R, d]
    void *open_v;      // [R, d]
    float *open_gate;  // [R] eq. (2); BF16 only, else NULL
    double *open_c;    // [R] eq. (5), from the first open token on
    float *query_sum;  // [d] sum of q^ over the open tile and the query heads of the group; sparse form reads it
    double *decay_end; // [1] E where S^ stands: of the last complete tile, eq. (6), or of the tokens folded since
    void *state;       // [d, d] S^ of the open tokens, eq. (8), of open_dtype; row i belongs to feature i of k^
    // [d, d] what BF16 left out of S^: its f32 bits are (state's << 16) + state_rest, and state is the nearest BF16.
    // The recurrence of the dense form carries S^ on, so it needs them all. BF16 in dense form only, else NULL.
    int16_t *state_rest;
    float *mass;     // [d] z^ of the open tokens
    int64_t *pairs;  // [2] tile pairs available and selected so far
    int32_t *n_held; // [1] tiles held: slots 0 .. n_held - 1 of the sequence. Sparse form only, as all below

    bool is_sparse; // false: the dense recurrence; no tile is kept
    ts_sparsity sparsity;
    // A sequence's slot i is page_table[s * page_table_stride + i]. Per KV head j and page p, at index (j * n_pages +
    // p):
    int64_t n_pages, page_table_stride;
    const int32_t *page_table;
    ts_dtype slot_dtype;
    void *slot_state;             // [d, d] S_t, eq. (7), of slot_dtype: F32, BF16, or FP8_E4M3 in units of slot_scale
    float *slot_scale;            // [d] largest magnitude of each row of S_t over 448; FP8_E4M3 only, else NULL
    float *slot_mass;             // [d] z_t
    double *slot_decay_end;       // [1] E_t
    double *slot_key;             // [1] key_t = log sum z_t - E_t
    int64_t *slot_tile;           // [1] t
    const uint8_t *const *pruned; // [n_sequences] -> [tiles] 1 where rule 1 prunes; shared by layers
} ts_tile_cache_layer;

// What rule 1 needs of each sequence; shared by layers, the same on every tensor-parallel rank.
typedef struct ts_tile_history {
    int32_t n_kv_heads; // on this rank
    int32_t tile_size, sink_tiles;
    double prune_ratio;
    double *open_mass;         // [n_sequences, n_kv_heads] importance of the open tile so far
    double *const *importance; // [n_sequences] -> [tiles] I_t, all KV heads of the model
    uint8_t *const *pruned;    // [n_sequences] -> [tiles]
} ts_tile_history;

// x[i, :] = table[tokens[i] - first_token, :], or 0 where the token is not in [first_token, first_token + table.rows).
typedef struct ts_embed_args {
    const int32_t *tokens; // [M] device
    int64_t first_token;   // of this rank's vocabulary shard
    ts_tensor table;       // [V, D] weight: F32, BF16 or F16, uploaded by ts_device_upload_weight
    ts_tensor x;           // [M, D] out
} ts_embed_args;

// x += residual where given; h = x / sqrt(mean(x^2) + eps) * weight, in f32.
typedef struct ts_rms_norm_args {
    ts_tensor x;               // [M, D] in, and out where residual is given
    const ts_tensor *residual; // [M, D] or NULL
    ts_tensor weight;          // [1, D] f32
    double eps;
    ts_tensor h; // [M, D] out
} ts_rms_norm_args;

typedef enum ts_activation { TS_ACTIVATION_NONE, TS_ACTIVATION_GELU_TANH } ts_activation;

// An RMSNorm between two products, without a pass of its own. The product in front adds its result to the residual
// stream and has h = stream * weight for its y; the product behind, which reads h, divides by sqrt(mean(stream^2) +
// eps) what it sums. Row-invariant products only, and only where ts_op_fuses_norm says so.
typedef struct ts_fused_norm {
    ts_tensor stream; // [M, D] F32, in and out
    ts_tensor weight; // [1, D] F32
    ts_tensor sums;   // [M, D / TS_NORM_COLUMNS] F32: of squares of the stream. Out in front, in behind
    double eps;
} ts_fused_norm;

enum { TS_NORM_COLUMNS = 16 };

// y = activation(x w^T + bias).
typedef struct ts_linear_args {
    ts_tensor x;           // [M, K]
    ts_tensor w;           // [N, K] weight: F32, BF16 or F16, uploaded by ts_device_upload_weight
    const ts_tensor *bias; // [1, N] of y's dtype, or NULL
    ts_tensor y;           // [M, N] out
    ts_activation activation;
    bool row_invariant;      // a row's value must not depend on M: decode (I3)
    const ts_tensor *next_w; // weights that the next product reads, or NULL: they may be brought nearer meanwhile
    const ts_fused_norm *norm_behind;   // or NULL: y is h of this norm
    const ts_fused_norm *norm_in_front; // or NULL: x is h of this norm
} ts_linear_args;

// y = silu(gate_up[:, :F]) * gate_up[:, F:].
typedef struct ts_swiglu_args {
    ts_tensor gate_up; // [M, 2 F]
    ts_tensor y;       // [M, F] out
} ts_swiglu_args;

// y[i, :] = x[rows[i], :].
typedef struct ts_gather_rows_args {
    ts_tensor x;         // [M, D]
    const int64_t *rows; // [y.rows] host memory
    ts_tensor y;         // out
} ts_gather_rows_args;

// Importance of the tiles that the batch completes, before rule 1: I_t per KV head, the sum of k^ over the tile's
// tokens and features, eqs. (2) and (4). Tiles of one batch are numbered span by span: the tiles that span i completes
// begin at the sum over earlier spans of floor((position + n_tokens) / T) - floor(position / T).
typedef struct ts_tile_importance_args {
    const ts_batch *batch;
    ts_tensor qkvg; // as in ts_attention_args
    int32_t n_heads, head_dim;
    const ts_tile_history *history; // open_mass is read and written
    double *importance;             // [tiles completed, n_kv_heads] out
} ts_tile_importance_args;

// Rule 1 for the tiles that the batch completes. Heads are summed in the order of ranks, so every rank decides alike.
typedef struct ts_tile_prune_args {
    const ts_batch *batch;
    int32_t n_ranks;
    const double *importance; // [n_ranks, tiles completed, n_kv_heads] what each rank's ts_op_tile_importance gave
    const ts_tile_history *history; // importance and pruned are written
} ts_tile_prune_args;

// Eqs. (1) to (9) for a batch, from projections to outputs. Reads and advances the cache: a span begins where the
// sequence's open tile ends, and every tile that it completes is stored, pruned, evicted and selected from (rules 1 to
// 4).
typedef struct ts_attention_args {
    const ts_batch *batch;
    ts_tensor qkvg; // [M, (H + 2 KV) d + 2 KV]: W_q h | W_k h | W_v h | W_gamma h + b_gamma | W_delta h + b_delta
    const ts_tile_cache_layer *cache;
    double decay_temperature, normalizer_eps;
    ts_tensor y; // [M, H d] out
} ts_attention_args;

// Per row of a vocabulary shard: the largest logit, the sum of exp(logit - largest), and the target's logit (-inf where
// the target is outside [first_token, first_token + V)). Shards merge into a cross entropy.
typedef struct ts_cross_entropy_args {
    ts_tensor logits;       // [M, V]
    const int32_t *targets; // [M] device
    int64_t first_token;
    double *parts; // [M, 3] out: largest, sum, target
} ts_cross_entropy_args;

// A change to one logit of a row before its temperature, in the order of the kinds: repetition penalty for tokens seen,
// presence and frequency penalty for those generated `times` > 0 times; bias; -infinity.
typedef enum ts_sample_change_kind { TS_SAMPLE_PENALTY, TS_SAMPLE_BIAS, TS_SAMPLE_BAN } ts_sample_change_kind;
typedef struct ts_sample_change {
    int32_t token, kind; // a token has at most one penalty and one bias
    int32_t times;       // TS_SAMPLE_PENALTY
    float bias;          // TS_SAMPLE_BIAS
} ts_sample_change;

typedef struct ts_sample_row {
    float temperature, top_p, min_p; // 0: greedy; 1 and 0: off
    int32_t top_k, n_logprobs;       // 0: off; -1: none
    float presence_penalty, frequency_penalty, repetition_penalty;
    double draw; // in [0, 1)
    int32_t first_change, n_changes;
} ts_sample_row;

enum { TS_SAMPLE_TOP_MAX = 20 };
typedef struct ts_sample_result {
    int32_t token;    // -1: a logit is NaN or +infinity, or none is left
    float logit;      // of the token, before changes, as all below
    double log_total; // log of the sum of exp(logit); where log-probabilities are asked for
    int32_t n_top;
    int32_t top_tokens[TS_SAMPLE_TOP_MAX]; // the n_logprobs largest, the smaller token first on a tie
    float top_logits[TS_SAMPLE_TOP_MAX];
} ts_sample_result;

// The next token of every row: changes, temperature, top_k, top_p over what top_k left, min_p, and the token that
// `draw` falls on in falling order of logits (in order of tokens where nothing filters). What runtime/sampler.h
// describes, for a vocabulary on one rank. Masses are summed to 2^-44 of the largest.
typedef struct ts_sample_args {
    ts_tensor logits;                // [M, V] F32, overwritten where rows have changes
    const ts_sample_row *rows;       // [M] device, like all below
    const ts_sample_change *changes; // of all rows
    float *raw;                      // [as many] scratch
    ts_sample_result *results;       // [M] out
} ts_sample_args;

// The largest batches of a run: what ops can be asked for beforehand.
typedef struct ts_run_limits {
    const ts_tile_cache_layer *cache; // of any layer; only its numbers are read
    int64_t max_rows;
    int32_t max_spans;       // of one batch
    int64_t weight_elements; // of the largest matrix whose dtype is not the device's compute_dtype; 0 without
} ts_run_limits;

struct ts_ops {
    const char *name; // for messages: "cpu (x86-64-v4)"
    // Bytes of scratch that no op exceeds within the limits. NULL: not known ahead.
    size_t (*scratch_bytes)(const ts_device *device, const ts_run_limits *limits);
    ts_status (*embed)(ts_device *device, const ts_embed_args *args);
    ts_status (*rms_norm)(ts_device *device, const ts_rms_norm_args *args);
    ts_status (*linear)(ts_device *device, const ts_linear_args *args);
    // See ts_op_fuses_norm. NULL: never.
    bool (*fuses_norm)(const ts_device *device, const ts_tensor *front_w, const ts_tensor *behind_w);
    ts_status (*swiglu)(ts_device *device, const ts_swiglu_args *args);
    ts_status (*gather_rows)(ts_device *device, const ts_gather_rows_args *args);
    ts_status (*tile_importance)(ts_device *device, const ts_tile_importance_args *args);
    ts_status (*tile_prune)(ts_device *device, const ts_tile_prune_args *args);
    ts_status (*attention)(ts_device *device, const ts_attention_args *args);
    ts_status (*cross_entropy)(ts_device *device, const ts_cross_entropy_args *args);
    ts_status (*sample)(ts_device *device, const ts_sample_args *args); // NULL: rows are sampled on the host
};

ts_status ts_op_embed(ts_device *device, const ts_embed_args *args);
ts_status ts_op_rms_norm(ts_device *device, const ts_rms_norm_args *args);
ts_status ts_op_linear(ts_device *device, const ts_linear_args *args);
// Whether the device takes an RMSNorm into the products by these weights, front_w [D, K] and behind_w [N, D], when they
// are row invariant and x and y of the compute dtype.
bool ts_op_fuses_norm(const ts_device *device, const ts_tensor *front_w, const ts_tensor *behind_w);
ts_status ts_op_swiglu(ts_device *device, const ts_swiglu_args *args);
ts_status ts_op_gather_rows(ts_device *device, const ts_gather_rows_args *args);
ts_status ts_op_tile_importance(ts_device *device, const ts_tile_importance_args *args);
ts_status ts_op_tile_prune(ts_device *device, const ts_tile_prune_args *args);
ts_status ts_op_attention(ts_device *device, const ts_attention_args *args);
ts_status ts_op_cross_entropy(ts_device *device, const ts_cross_entropy_args *args);
ts_status ts_op_sample(ts_device *device, const ts_sample_args *args);

// Tiles that a span, or all spans of a batch, complete.
static inline int64_t ts_span_tiles_completed(const ts_span *span, int32_t tile_size) {
    return (span->position + span->n_tokens) / tile_size - span->position / tile_size;
}
int64_t ts_batch_tiles_completed(const ts_batch *batch, int32_t tile_size);

#ifdef __cplusplus
}
#endif
#endif
