// What the blocks of a cluster share and tell each other in the dense form's kernel (attention_dense_cluster.cuh), and
// the recurrence over a wave's tiles.
#ifndef TS_CUDA_ATTENTION_DENSE_RECURRENCE_CUH
#define TS_CUDA_ATTENTION_DENSE_RECURRENCE_CUH

#include "kernels/cuda/attention_dense_gates.cuh"
#include "kernels/cuda/cluster.cuh"

namespace ts {

constexpr int kClusterBlocks = 8;
constexpr int kWorkers = 3; // warpgroups of a block that have tiles
constexpr int kWaveTiles = kClusterBlocks * kWorkers;
constexpr int kClusterThreads = 128 * (kWorkers + 1);
constexpr int kTileBytes = 64 * kPanelRowBytes;
constexpr int kSliceBytes = 8 * kPanelRowBytes + 8 * (int)sizeof(float); // of S_t and z_t, to one block
constexpr int kPieceTiles = 2 * kWaveTiles;
constexpr int kCarryFloats = 64 * 64 + 64 + 4; // S, z, log of the decay as a double

// What a tile's worker sends to one block beside 8 rows of S_t.
struct TileSlice {
    float log_decay; // of the tile, in powers of 2
    float decay;     // 2^log_decay
    float unused[2];
    float z[8];
};

// Gates of a tile's tokens, eqs. (2), (3), (5), in powers of 2.
//
// The decay between two tokens is split between them: e^{c_n} goes into q^_n and e^{-c_m} into k^_m, so that a product
// has it already; S_t then wants e^{c_last} once. Where a tile decays by more than 2^-kMostDecay, e^{-c_m} could leave
// the range of numbers: such a tile has is_strong, and weights are decayed one by one.
struct Gates {
    float log_decay[64]; // c
    float log_key[64];   // of what k^ is multiplied by beside phi: the key gate and, unless is_strong, e^{-c_m}
    float decay;         // e^{c_last}
    float state_scale;   // what S_t, as it comes from those keys, is multiplied by
    int is_strong;
    int unused;
};

constexpr float kMostDecay = 64.0f;

// 24 tiles or fewer of a piece. Tokens are counted from the first tile's first.
struct Wave {
    int64_t row; // of token 0 in the batch; negative where the span begins inside the first tile
    int head;
    int n_tiles;    // 0 after the last piece
    int begin, end; // the span's tokens
};

constexpr int kGateStages = 3; // gates are written two waves ahead
constexpr int kWaveStages = 8; // waves are told three ahead

struct WorkerShared {
    unsigned char k[2][kTileBytes], v[2][kTileBytes], q[kTileBytes];
    unsigned char state[2][kTileBytes]; // S_t on its way out, then S^ as it comes in, then y on its way out
};

struct ClusterShared {
    WorkerShared worker[kWorkers];
    unsigned char inbox[2][kWaveTiles][8 * kPanelRowBytes];
    TileSlice inbox_slices[2][kWaveTiles];
    uint32_t mass[kWorkers][2][32]; // z^ in bf16: pair p of features at mass_word(p)
    Gates gates[kWorkers][kGateStages];
    Wave wave[kWaveStages];
    uint64_t inbox_full[2], state_full[kWorkers][2], gates_full[kWorkers][2], keys_full[kWorkers][2]; // of even and of
                                                                                                      // odd waves
    uint64_t queries_full[kWorkers];
};

// Where pair p of 32 is, so that a lane finds what it needs as fragments in neighbouring words.
__device__ __forceinline__ int mass_word(int p) {
    return p % 4 * 8 + p / 4;
}

// 16-byte unit of a row of S_t on its way, as the sender's lane holds it: columns 8 j + 2 (lane % 4) + {0, 1}, four j of
// half `half`. Rows of a slice differ, so that neither side meets itself in a bank.
__device__ __forceinline__ int inbox_unit(int row, int half, int lane) {
    return ((4 * half + lane % 4) ^ row) * 16;
}

// A piece of a (span, KV head). Tile 0 is the tile that the span begins in.
struct ClusterWork {
    int64_t row;   // of tile 0's first token in the batch; negative where the span begins inside the tile
    int64_t cache; // index of (sequence, KV head)
    int64_t end;   // token after the span's last, from tile 0's first
    int item;      // -1 when there is none
    int pair, piece, head;
    int first_tile, end_tile; // of the piece
    int begin;                // tokens of tile 0 before the span
};

// The first piece at or after `item`, in this cluster's turn.
__device__ __forceinline__ ClusterWork next_work(const DenseArgs &a, int item, int n_clusters) {
    ClusterWork w;
    const int pairs = a.n_spans * a.n_kv_heads;
    for (;; item += n_clusters) {
        if (item >= a.n_items) {
            w.item = -1;
            return w;
        }
        w.piece = item / pairs;
        w.pair = item - w.piece * pairs;
        const int index = w.pair / a.n_kv_heads;
        const ts_span span = a.spans[index];
        w.begin = (int)(span.position % 64);
        w.end = w.begin + span.n_tokens;
        const int n_tiles = (int)((w.end + 63) / 64);
        w.first_tile = w.piece * kPieceTiles;
        if (w.first_tile >= n_tiles)
            continue;
        w.end_tile = min(n_tiles, w.first_tile + kPieceTiles);
        w.item = item;
        w.row = span.row - w.begin;
        w.head = w.pair - index * a.n_kv_heads;
        w.cache = (int64_t)span.sequence * a.n_kv_heads + w.head;
        return w;
    }
}

// Two warps: rows 8 block ... of the running state; a thread has 8 columns of one row.
__device__ __forceinline__ void run_recurrence(const DenseArgs &a, ClusterShared &shared, int block, int cluster,
                                               int n_clusters) {
    const int thread = threadIdx.x % 128, local = thread / 8, row = 8 * block + local, column = thread % 8 * 8;
    const uint32_t inbox_full = shared_address(&shared.inbox_full[0]);
    const uint32_t out_offset = row * kPanelRowBytes + (((column / 8) ^ local) << 4);
    uint32_t in_offset[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        in_offset[i] = local * kPanelRowBytes + inbox_unit(local, column / 32, i) + column / 8 % 4 * 4;
    const bool is_clerk = block == 0 && thread < 32; // keeps the sum of log decays
    auto sync = [] { asm volatile("bar.sync %0, 64;" ::"n"(kWorkers + 1) : "memory"); };
    int stage = 0, parity = 0;
    for (ClusterWork w = next_work(a, cluster, n_clusters); w.item >= 0;
         w = next_work(a, w.item + n_clusters, n_clusters)) {
        const int64_t at = w.cache;
        const int64_t state = (at * 64 + row) * 64 + column;
        float *carry = a.slots + (int64_t)w.pair * kCarryFloats;
        double *carry_log = reinterpret_cast<double *>(carry + 64 * 64 + 64);
        int *pieces_done = a.counters + w.pair * kClusterBlocks + block;
        float s[8], z;
        double log_sum = 0.0;
        if (w.piece == 0) {
            load_split8(a.state, a.state_rest, state, s);
            z = a.mass[at * 64 + row];
            if (w.begin > 0) { // the tokens of the open tile before the span
                const __nv_bfloat16 *open_k = a.open_k + at * 64 * 64 + row, *open_v = a.open_v + at * 64 * 64 + column;
                const float *open_gate = a.open_gate + at * 64;
                const double *open_c = a.open_c + at * 64;
                log_sum = open_c[w.begin - 1];
                const float carried = (float)exp(log_sum);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    s[e] *= carried;
                z *= carried;
                for (int m = 0; m < w.begin; m++) {
                    const float k = (float)exp(log_sum - open_c[m]) * open_feature(open_k[m * 64], open_gate[m]);
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        s[e] += k * __bfloat162float(open_v[m * 64 + e]);
                    z += k;
                }
                log_sum *= 1.4426950408889634;
            }
        } else {
            if (thread == 0) {
                while (*reinterpret_cast<const volatile int *>(pieces_done) < w.piece)
                    __nanosleep(20);
                __threadfence();
            }
            sync();
            const float4 *from = reinterpret_cast<const float4 *>(carry + row * 64 + column);
            const float4 x = __ldcg(from), y = __ldcg(from + 1);
            s[0] = x.x, s[1] = x.y, s[2] = x.z, s[3] = x.w;
            s[4] = y.x, s[5] = y.y, s[6] = y.z, s[7] = y.w;
            z = __ldcg(carry + 64 * 64 + row);
            if (is_clerk)
                log_sum = __ldcg(carry_log);
        }
        const int open_tile = (int)(w.end / 64); // begins where the span's last complete tile ends
        const int closing = open_tile > 0 ? open_tile : -1;
        auto close = [&] {
            store_split8(a.state, a.state_rest, state, s);
            if (column == 0)
                a.mass[at * 64 + row] = z;
            if (is_clerk && thread == 0)
                a.decay_end[at] += log_sum * 0.6931471805599453;
        };
        for (int wave = w.first_tile; wave < w.end_tile; wave += kWaveTiles, parity ^= stage, stage ^= 1) {
            const int n = min(kWaveTiles, w.end_tile - wave);
            if (thread == 0) {
                expect_bytes(inbox_full + 8 * stage, n * kSliceBytes + kWaveTiles * 16);
            }
            wait_phase(inbox_full + 8 * stage, parity);
            const uint32_t inbox = shared_address(shared.inbox[stage]);
            const TileSlice *slices = shared.inbox_slices[stage];
            const uint32_t out_state = shared_address(shared.worker[0].state[stage]) + out_offset,
                           out_mass = shared_address(&shared.mass[0][stage][mass_word(row / 2)]),
                           full = shared_address(&shared.state_full[0][stage]);
#pragma unroll 1
            for (int to_block = 0; to_block < kClusterBlocks; to_block++) {
                const uint32_t to_state = in_block(out_state, to_block), to_mass = in_block(out_mass, to_block),
                               to_full = in_block(full, to_block);
                uint4 own[kWorkers];
                float own_z[kWorkers], decay[kWorkers], log_decay[kWorkers];
#pragma unroll
                for (int u = 0; u < kWorkers; u++) {
                    const int t = to_block * kWorkers + u;
                    const uint32_t from = inbox + t * 8 * kPanelRowBytes;
                    own[u] = make_uint4(load_shared4(from + in_offset[0]), load_shared4(from + in_offset[1]),
                                        load_shared4(from + in_offset[2]), load_shared4(from + in_offset[3]));
                    own_z[u] = slices[t].z[local];
                    decay[u] = slices[t].decay;
                    log_decay[u] = slices[t].log_decay;
                }
#pragma unroll
                for (int u = 0; u < kWorkers; u++) {
                    const int t = to_block * kWorkers + u;
                    const uint32_t barrier = to_full + u * (uint32_t)sizeof(shared.state_full[0]);
                    const float next_z = __shfl_down_sync(~0u, z, 8); // of the next row
                    if (column == 0 && local % 2 == 0)
                        send(to_mass + u * (uint32_t)sizeof(shared.mass[0]), pack_bf16(z, next_z), barrier);
                    if (t < n) {
                        send(to_state + u * (uint32_t)sizeof(WorkerShared), pack_bf16(s[0], s[1]),
                             pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7]), barrier);
                        if (wave + t == closing)
                            close();
                        s[0] = decay[u] * s[0] + low_of(own[u].x);
                        s[1] = decay[u] * s[1] + high_of(own[u].x);
                        s[2] = decay[u] * s[2] + low_of(own[u].y);
                        s[3] = decay[u] * s[3] + high_of(own[u].y);
                        s[4] = decay[u] * s[4] + low_of(own[u].z);
                        s[5] = decay[u] * s[5] + high_of(own[u].z);
                        s[6] = decay[u] * s[6] + low_of(own[u].w);
                        s[7] = decay[u] * s[7] + high_of(own[u].w);
                        z = decay[u] * z + own_z[u];
                        if (is_clerk)
                            log_sum += log_decay[u];
                    }
                }
            }
        }
        if (w.end_tile * (int64_t)64 >= w.end) {
            if (open_tile == w.end_tile)
                close();
        } else {
            float4 *to = reinterpret_cast<float4 *>(carry + row * 64 + column);
            __stcg(to, make_float4(s[0], s[1], s[2], s[3]));
            __stcg(to + 1, make_float4(s[4], s[5], s[6], s[7]));
            if (column == 0)
                __stcg(carry + 64 * 64 + row, z);
            if (is_clerk && thread == 0)
                __stcg(carry_log, log_sum);
            __threadfence();
            sync();
            if (thread == 0)
                *reinterpret_cast<volatile int *>(pieces_done) = w.piece + 1;
        }
    }
}

} // namespace ts
#endif
