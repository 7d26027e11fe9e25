// What the blocks of a cluster share and tell each other in the dense form's kernel for head size 128
// (attention_dense_wide.cuh), and the recurrence over a wave's tiles.
#ifndef TS_CUDA_ATTENTION_DENSE_WIDE_RECURRENCE_CUH
#define TS_CUDA_ATTENTION_DENSE_WIDE_RECURRENCE_CUH

#include "kernels/cuda/attention/dense/attention_dense_pieces.cuh"

namespace ts {

constexpr int kWideTile = 128;                        // tokens
constexpr int kWidePanelBytes = 128 * kPanelRowBytes; // 64 columns of a tile, or of a state
constexpr int kWideTileBytes = 2 * kWidePanelBytes;   // all 128
constexpr int kWideRows = 128 / kClusterBlocks;       // of the state, that a block has
constexpr int kWideRowsBytes = kWideRows * 128 * 2;   // of a tile's S_t, in bf16
constexpr int kWideMassBytes = kWideRows * (int)sizeof(float);
constexpr int kWideCarryBytes = kWideRows * 128 * 8 + 192; // of a block, from piece to piece: S; z and log of the decay
using WidePieces = PieceShape<kWideTile, 2 * kClusterBlocks, kClusterBlocks * kWideCarryBytes>;

// What a block sends to another beside 16 rows of its tile's S_t.
struct WideSlice {
    float log_decay; // of the tile, in powers of 2
    float decay;     // 2^log_decay
    float unused[2];
    float z[kWideRows];
};

// Gates of a tile's tokens, eqs. (2), (3), (5), in powers of 2. Decay is split between the two sides of a product, as
// at head size 64 (attention_dense_recurrence.cuh).
struct WideGates {
    float log_decay[kWideTile];         // c
    __nv_bfloat16 key_scale[kWideTile]; // of k^ beside phi: the key gate and, unless is_strong, e^{-c_m}
    float decay;                        // e^{c_last}
    float state_scale;                  // what S_t, as it comes from those keys, is multiplied by
    int is_strong;
    int unused;
};

// What a block does in a wave.
struct WideTask {
    int row; // of the tile's first token in the batch; what the span does not begin before it is negative or another's
    int head;
    int kind;
    int tokens; // of the tile that are the span's: the first, and 2^16 times the one after the last
};

constexpr int kWideTasks = 8; // waves are told three ahead, and read until they end

struct WideShared {
    unsigned char k[2][kWideTileBytes], v[2][kWideTileBytes], q[kWideTileBytes];
    unsigned char state[kWideTileBytes]; // S^ in bf16, row = feature
    unsigned char inbox[kClusterBlocks][kWideRowsBytes];
    WideSlice slices[kClusterBlocks];
    __nv_bfloat16 ones[16];
    __nv_bfloat16 mass[128]; // z^; a product reads beyond this and ones, and takes nothing from there
    WideGates gates[2];
    WideTask task[kWideTasks];
    uint64_t inbox_full[kClusterBlocks]; // by the block that sends, so that early tiles do not wait for late ones
    uint64_t keys_full[2], gates_full[2], queries_full, state_full;
};

// Where S_t on its way has a 16-byte unit of row `row`, as the sender's lane holds it: columns 8 j + 2 (lane % 4) +
// {0, 1}, the first four j. The next four are 64 bytes further, and so on. Neighbouring rows differ, so that they do
// not meet in a bank.
__device__ __forceinline__ int wide_inbox_unit(int row, int lane) {
    return row * 256 + ((lane ^ row) & 3) * 16;
}

// One of two warps: rows 16 block + 8 warp ... of the running state. A lane has 8 columns of each panel of two rows:
// part i is of row i / 2 and panel i % 2.
__device__ __forceinline__ void run_wide_recurrence(const DenseArgs &a, WideShared &shared, int warp, int block,
                                                    int cluster, int n_clusters) {
    const int lane = threadIdx.x & 31, local = 8 * warp + lane / 8, unit = lane % 8;
    const int first_row = kWideRows * block + local, column = 8 * unit;
    const uint32_t inbox = shared_address(shared.inbox[0]), slices = shared_address(&shared.slices[0].decay),
                   inbox_full = shared_address(&shared.inbox_full[0]), full = shared_address(&shared.state_full);
    const uint32_t out_state = panel_unit(shared_address(shared.state), first_row, unit);
    uint32_t in_from[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
        in_from[e] = inbox + wide_inbox_unit(local, e) + unit / 4 * 64 + unit % 4 * 4;
    int parity = 0;
    ClusterWork w = next_work<WidePieces>(a, cluster, n_clusters), next = w;
    for (; w.item >= 0; w = next) {
        const int64_t state = (w.cache * 128 + first_row) * 128 + column;
        const auto place = [&](int i) { return state + i / 2 * (4 * 128) + i % 2 * 64; };
        unsigned char *carry = w.carry + ((2 * block + warp) * 16 * 32 + lane) * 16; // and 512 bytes further, 15 times
        float s[4][8];
        if (w.piece == 0) {
            const double log_sum = w.begin > 0 ? open_decay(a, w) : 0.0;
            const float carried = (float)exp(log_sum);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                load_split8(a.state, a.state_rest, place(i), s[i]);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    s[i][e] *= carried;
            }
#pragma unroll 1
            for (int m = 0; m < w.begin; m++) {
                const float k[2] = {open_key<128>(a, w, log_sum, m, first_row),
                                    open_key<128>(a, w, log_sum, m, first_row + 4)};
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        s[i][e] += k[i / 2] * __bfloat162float(
                                                  a.open_v[(w.cache * kOpenRows + m) * 128 + column + i % 2 * 64 + e]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x[16];
                take_over<8>(carry + i * 8 * 512, x, w.piece);
#pragma unroll
                for (int e = 0; e < 16; e++)
                    s[2 * i + e / 8][e % 8] = x[e];
            }
        }
        const int closing = closing_tile<WidePieces>(w);
        const auto close = [&] {
#pragma unroll
            for (int i = 0; i < 4; i++)
                store_split8(a.state, a.state_rest, place(i), s[i]);
        };
        for (int wave = w.first_tile; wave < w.end_tile; wave += kClusterBlocks, parity ^= 1) {
            const int n = min(kClusterBlocks, w.end_tile - wave);
            // Both warps arrive: a block without a tile waits for neither, and could end two phases while one is
            // behind.
            if (lane < kClusterBlocks && warp == 0)
                expect_bytes(inbox_full + 8 * lane, (lane < n ? kWideRowsBytes + kWideMassBytes : 0) + 16);
            else if (lane < kClusterBlocks)
                arrive(inbox_full + 8 * lane);
            if (wave + kClusterBlocks >= w.end_tile) // while there is time
                next = next_work<WidePieces>(a, w.item + n_clusters, n_clusters);
            // Taken one tile ahead. A tile is answered after its own state has been taken: only then may what follows
            // it
            // come.
            struct Arrived {
                uint32_t s[4][4];
                float decay;
            };
            const auto take = [&](Arrived &tile, int t) {
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        tile.s[i][e] = load_shared4(in_from[e] + t * kWideRowsBytes + i / 2 * 1024 + i % 2 * 128);
                tile.decay = __uint_as_float(load_shared4(slices + t * (int)sizeof(WideSlice)));
            };
            const auto answer = [&](int t) {
                const uint32_t there = in_block(full, t), to = there - full + out_state; // and 4 rows further
#pragma unroll
                for (int i = 0; i < 4; i++)
                    send((i < 2 ? to : (to + 512) ^ 64) + i % 2 * kWidePanelBytes, pack_bf16(s[i][0], s[i][1]),
                         pack_bf16(s[i][2], s[i][3]), pack_bf16(s[i][4], s[i][5]), pack_bf16(s[i][6], s[i][7]), there);
            };
            const auto add = [&](const Arrived &tile) {
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        s[i][2 * e] = tile.decay * s[i][2 * e] + low_of(tile.s[i][e]);
                        s[i][2 * e + 1] = tile.decay * s[i][2 * e + 1] + high_of(tile.s[i][e]);
                    }
            };
            if (n == kClusterBlocks && (closing < wave || closing >= wave + kClusterBlocks)) {
                Arrived tiles[2];
                wait_phase(inbox_full, parity);
                take(tiles[0], 0);
#pragma unroll
                for (int t = 0; t < kClusterBlocks; t++) {
                    const bool is_more = t + 1 < kClusterBlocks,
                               is_there = is_more && __all_sync(~0u, phase_ended(inbox_full + 8 * (t + 1), parity));
                    answer(t);
                    if (is_more) {
                        if (!is_there)
                            wait_phase(inbox_full + 8 * (t + 1), parity);
                        __syncwarp();
                        take(tiles[(t + 1) % 2], t + 1);
                    }
                    add(tiles[t % 2]);
                }
            } else {
#pragma unroll 1
                for (int t = 0; t < kClusterBlocks; t++) {
                    wait_phase(inbox_full + 8 * t, parity);
                    if (t < n) {
                        Arrived tile;
                        take(tile, t);
                        answer(t);
                        if (wave + t == closing)
                            close();
                        add(tile);
                    }
                }
            }
        }
        if (w.end_tile * (int64_t)kWideTile < w.end) {
#pragma unroll
            for (int i = 0; i < 16; i++)
                leave(carry + i * 512, __float_as_uint(s[i / 4][i % 4 * 2]), __float_as_uint(s[i / 4][i % 4 * 2 + 1]),
                      w.piece + 1);
        } else if (closing == w.end_tile) {
            close();
        }
    }
}

// One warp: z of the block's 16 features, two in each of its first eight lanes, and the sum of log decays.
__device__ __forceinline__ void run_wide_masses(const DenseArgs &a, WideShared &shared, int block, int cluster,
                                                int n_clusters) {
    const int lane = threadIdx.x & 31, pair = lane % 8, row = kWideRows * block + 2 * pair;
    const uint32_t slices = shared_address(&shared.slices[0]), inbox_full = shared_address(&shared.inbox_full[0]),
                   out_mass = shared_address(&shared.mass[row]), full = shared_address(&shared.state_full);
    int parity = 0;
    ClusterWork w = next_work<WidePieces>(a, cluster, n_clusters), next = w;
    for (; w.item >= 0; w = next) {
        float *mass = a.mass + w.cache * 128 + row;
        unsigned char *carry = w.carry + 128 * 128 * 8 + block * 192, *carry_log = carry + 128;
        float z[2];
        double log_sum = 0.0;
        if (w.piece == 0) {
            z[0] = mass[0], z[1] = mass[1];
            if (w.begin > 0) {
                log_sum = open_decay(a, w);
                const float carried = (float)exp(log_sum);
                z[0] *= carried, z[1] *= carried;
                for (int m = 0; m < w.begin; m++) {
                    z[0] += open_key<128>(a, w, log_sum, m, row);
                    z[1] += open_key<128>(a, w, log_sum, m, row + 1);
                }
                log_sum *= 1.4426950408889634;
            }
        } else {
            uint32_t x, y;
            take_over(carry + pair * 16, x, y, w.piece);
            z[0] = __uint_as_float(x), z[1] = __uint_as_float(y);
            take_over(carry_log, x, y, w.piece);
            log_sum = __hiloint2double((int)y, (int)x);
        }
        const int closing = closing_tile<WidePieces>(w);
        const auto close = [&](double log_decay) {
            if (lane < 8)
                mass[0] = z[0], mass[1] = z[1];
            if (block == 0 && lane == 0)
                a.decay_end[w.cache] += log_decay * 0.6931471805599453;
        };
        for (int wave = w.first_tile; wave < w.end_tile; wave += kClusterBlocks, parity ^= 1) {
            const int n = min(kClusterBlocks, w.end_tile - wave);
            if (wave + kClusterBlocks >= w.end_tile)
                next = next_work<WidePieces>(a, w.item + n_clusters, n_clusters);
#pragma unroll 2
            for (int t = 0; t < kClusterBlocks; t++) {
                wait_phase(inbox_full + 8 * t, parity);
                const uint32_t from = slices + t * (int)sizeof(WideSlice);
                const float z0 = __uint_as_float(load_shared4(from + (int)offsetof(WideSlice, z) + 8 * pair)),
                            z1 = __uint_as_float(load_shared4(from + (int)offsetof(WideSlice, z) + 8 * pair + 4)),
                            decay = __uint_as_float(load_shared4(from + (int)offsetof(WideSlice, decay))),
                            log_decay = __uint_as_float(load_shared4(from));
                if (lane < 8)
                    send(in_block(out_mass, t), pack_bf16(z[0], z[1]), in_block(full, t));
                if (t < n) {
                    if (__builtin_expect(wave + t == closing, 0))
                        close(log_sum);
                    z[0] = decay * z[0] + z0;
                    z[1] = decay * z[1] + z1;
                    log_sum += log_decay;
                }
            }
        }
        if (w.end_tile * (int64_t)kWideTile < w.end) {
            if (lane < 8)
                leave(carry + pair * 16, __float_as_uint(z[0]), __float_as_uint(z[1]), w.piece + 1);
            if (lane == 0)
                leave(carry_log, (uint32_t)__double2loint(log_sum), (uint32_t)__double2hiint(log_sum), w.piece + 1);
        } else if (closing == w.end_tile) {
            close(log_sum);
        }
    }
}

} // namespace ts
#endif
