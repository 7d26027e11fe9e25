// What the blocks of a cluster share and tell each other in the dense form's kernel (attention_dense_cluster.cuh), and
// the recurrence over a wave's tiles.
#ifndef TS_CUDA_ATTENTION_DENSE_RECURRENCE_CUH
#define TS_CUDA_ATTENTION_DENSE_RECURRENCE_CUH

#include "kernels/cuda/attention/dense/attention_dense_pieces.cuh"

namespace ts {

constexpr int kWorkers = 3; // warpgroups of a block that have tiles
constexpr int kWaveTiles = kClusterBlocks * kWorkers;
constexpr int kClusterThreads = 128 * (kWorkers + 1);
constexpr int kTileBytes = 64 * kPanelRowBytes;
constexpr int kSliceBytes = 8 * kPanelRowBytes + 8 * (int)sizeof(float); // of S_t and z_t, to one block
// Of a pair, from piece to piece: S; z and log of the decay.
using TilePieces = PieceShape<64, 2 * kWaveTiles, 64 * 64 * 8 + kClusterBlocks * 128>;

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

// What of a wave is a worker's.
struct TileTask {
    int row; // of its first token in the batch; what the span does not begin before it is negative or another's
    int head;
    int kind;
    int unused;
};

constexpr int kGateStages = 3; // gates are written two waves ahead
constexpr int kWaveStages = 8; // waves are told three ahead

struct WorkerShared {
    unsigned char k[2][kTileBytes], v[2][kTileBytes], q[kTileBytes];
    unsigned char state[2][kTileBytes]; // S^ as it comes in, then y on its way out
};

struct ClusterShared {
    WorkerShared worker[kWorkers];
    unsigned char inbox[2][kWaveTiles][8 * kPanelRowBytes];
    TileSlice inbox_slices[2][kWaveTiles];
    unsigned char ones[16 * kPanelRowBytes]; // rows of 1 in bf16, behind the values
    __nv_bfloat16 mass[kWorkers][2][64];     // z^; a product reads beyond one, and takes nothing from there
    Gates gates[kWorkers][kGateStages];
    Wave wave[kWaveStages];
    TileTask task[kWorkers][kWaveStages];
    // Of even and of odd waves; the inbox by the block that sends, so that early tiles do not wait for late ones.
    uint64_t inbox_full[2][kClusterBlocks], state_full[kWorkers][2], gates_full[kWorkers][2], keys_full[kWorkers][2];
    uint64_t queries_full[kWorkers];
};

// 16-byte unit of a row of S_t on its way, as the sender's lane holds it: columns 8 j + 2 (lane % 4) + {0, 1}, four j
// of half `half`. Rows of a slice differ, so that neither side meets itself in a bank.
__device__ __forceinline__ int inbox_unit(int row, int half, int lane) {
    return ((4 * half + lane % 4) ^ row) * 16;
}

// One of two warps: rows 8 block + 4 warp ... of the running state; a lane has 8 columns of one row.
__device__ __forceinline__ void run_recurrence(const DenseArgs &a, ClusterShared &shared, int warp, int block,
                                               int cluster, int n_clusters) {
    const int lane = threadIdx.x & 31, local = 4 * warp + lane / 8, row = 8 * block + local, column = lane % 8 * 8;
    const uint32_t inbox_full = shared_address(&shared.inbox_full[0][0]);
    const uint32_t out_offset = row * kPanelRowBytes + (((column / 8) ^ local) << 4);
    uint32_t in_offset[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        in_offset[i] = local * kPanelRowBytes + inbox_unit(local, column / 32, i) + column / 8 % 4 * 4;
    int stage = 0, parity = 0;
    ClusterWork w = next_work<TilePieces>(a, cluster, n_clusters), next = w;
    for (; w.item >= 0; w = next) {
        const int64_t state = (w.cache * 64 + row) * 64 + column;
        unsigned char *carry =
            w.carry + ((2 * block + warp) * 4 * 32 + lane) * 16; // and 512 bytes further, three times
        float s[8];
        if (w.piece == 0) {
            load_split8(a.state, a.state_rest, state, s);
            if (w.begin > 0) {
                const double log_sum = open_decay(a, w);
                const float carried = (float)exp(log_sum);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    s[e] *= carried;
                for (int m = 0; m < w.begin; m++) {
                    const float k = open_key<64>(a, w, log_sum, m, row);
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        s[e] += k * __bfloat162float(a.open_v[(w.cache * kOpenRows + m) * 64 + column + e]);
                }
            }
        } else {
            uint32_t x[8];
#pragma unroll
            for (int i = 0; i < 4; i++)
                take_over(carry + i * 512, x[2 * i], x[2 * i + 1], w.piece);
#pragma unroll
            for (int e = 0; e < 8; e++)
                s[e] = __uint_as_float(x[e]);
        }
        const int closing = closing_tile<TilePieces>(w);
        for (int wave = w.first_tile; wave < w.end_tile; wave += kWaveTiles, parity ^= stage, stage ^= 1) {
            const int n = min(kWaveTiles, w.end_tile - wave);
            const uint32_t arrived = inbox_full + stage * (uint32_t)sizeof(shared.inbox_full[0]);
            // Both warps arrive: a block without a tile waits for neither, and could end two phases while one is
            // behind.
            if (lane < kClusterBlocks && warp == 0)
                expect_bytes(arrived + 8 * lane,
                             min(max(n - lane * kWorkers, 0), kWorkers) * kSliceBytes + kWorkers * 16);
            else if (lane < kClusterBlocks)
                arrive(arrived + 8 * lane);
            if (wave + kWaveTiles >= w.end_tile) // while there is time
                next = next_work<TilePieces>(a, w.item + n_clusters, n_clusters);
            const uint32_t inbox = shared_address(shared.inbox[stage]),
                           slices = shared_address(&shared.inbox_slices[stage][0].decay),
                           out_state = shared_address(shared.worker[0].state[stage]) + out_offset,
                           full = shared_address(&shared.state_full[0][stage]);
            // Of the tiles of one block.
            struct Arrived {
                uint32_t s[kWorkers][4];
                float decay[kWorkers];
            };
            auto take = [&](Arrived &tiles, int from_block) {
                wait_phase(arrived + 8 * from_block, parity);
#pragma unroll
                for (int u = 0; u < kWorkers; u++) {
                    const int t = from_block * kWorkers + u;
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        tiles.s[u][i] = load_shared4(inbox + t * 8 * kPanelRowBytes + in_offset[i]);
                    tiles.decay[u] = __uint_as_float(load_shared4(slices + t * (int)sizeof(TileSlice)));
                }
            };
            auto answer = [&](int to_block, int u) {
                send(in_block(out_state, to_block) + u * (uint32_t)sizeof(WorkerShared), pack_bf16(s[0], s[1]),
                     pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7]),
                     in_block(full, to_block) + u * (uint32_t)sizeof(shared.state_full[0]));
            };
            auto add = [&](const Arrived &tiles, int u) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[2 * i] = tiles.decay[u] * s[2 * i] + low_of(tiles.s[u][i]);
                    s[2 * i + 1] = tiles.decay[u] * s[2 * i + 1] + high_of(tiles.s[u][i]);
                }
            };
            // A tile is answered after its own state has been taken: only then may what follows it come.
            Arrived tiles;
            if (n == kWaveTiles && (closing < wave || closing >= wave + kWaveTiles)) {
#pragma unroll 2
                for (int to_block = 0; to_block < kClusterBlocks; to_block++) {
                    take(tiles, to_block);
#pragma unroll
                    for (int u = 0; u < kWorkers; u++) {
                        answer(to_block, u);
                        add(tiles, u);
                    }
                }
            } else {
#pragma unroll 1
                for (int to_block = 0; to_block < kClusterBlocks; to_block++) {
                    take(tiles, to_block);
#pragma unroll
                    for (int u = 0; u < kWorkers; u++) {
                        const int t = to_block * kWorkers + u;
                        if (t < n) {
                            answer(to_block, u);
                            if (wave + t == closing)
                                store_split8(a.state, a.state_rest, state, s);
                            add(tiles, u);
                        }
                    }
                }
            }
        }
        if (w.end_tile * (int64_t)64 < w.end) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                leave(carry + i * 512, __float_as_uint(s[2 * i]), __float_as_uint(s[2 * i + 1]), w.piece + 1);
        } else if (closing == w.end_tile) {
            store_split8(a.state, a.state_rest, state, s);
        }
    }
}

// One warp: z of the block's 8 features, two in each of its first four lanes, and the sum of log decays.
__device__ __forceinline__ void run_masses(const DenseArgs &a, ClusterShared &shared, int block, int cluster,
                                           int n_clusters) {
    const int lane = threadIdx.x & 31, pair = lane % 4, row = 8 * block + 2 * pair;
    const uint32_t inbox_full = shared_address(&shared.inbox_full[0][0]);
    int stage = 0, parity = 0;
    ClusterWork w = next_work<TilePieces>(a, cluster, n_clusters), next = w;
    for (; w.item >= 0; w = next) {
        float *mass = a.mass + w.cache * 64 + row;
        unsigned char *carry = w.carry + 64 * 64 * 8 + block * 128, *carry_log = carry + 64;
        float z[2];
        double log_sum = 0.0;
        if (w.piece == 0) {
            z[0] = mass[0], z[1] = mass[1];
            if (w.begin > 0) {
                log_sum = open_decay(a, w);
                const float carried = (float)exp(log_sum);
                z[0] *= carried, z[1] *= carried;
                for (int m = 0; m < w.begin; m++) {
                    z[0] += open_key<64>(a, w, log_sum, m, row);
                    z[1] += open_key<64>(a, w, log_sum, m, row + 1);
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
        const int closing = closing_tile<TilePieces>(w);
        auto close = [&] {
            if (lane < 4)
                mass[0] = z[0], mass[1] = z[1];
            if (block == 0 && lane == 0)
                a.decay_end[w.cache] += log_sum * 0.6931471805599453;
        };
        for (int wave = w.first_tile; wave < w.end_tile; wave += kWaveTiles, parity ^= stage, stage ^= 1) {
            const int n = min(kWaveTiles, w.end_tile - wave);
            if (wave + kWaveTiles >= w.end_tile)
                next = next_work<TilePieces>(a, w.item + n_clusters, n_clusters);
            const uint32_t arrived = inbox_full + stage * (uint32_t)sizeof(shared.inbox_full[0]);
            const uint32_t slices = shared_address(shared.inbox_slices[stage]),
                           out_mass = shared_address(&shared.mass[0][stage][row]),
                           full = shared_address(&shared.state_full[0][stage]);
            // Of the tiles of one block.
            struct Arrived {
                float2 z[kWorkers];
                float decay[kWorkers], log_decay;
            };
            auto take = [&](Arrived &tiles, int from_block) {
                wait_phase(arrived + 8 * from_block, parity);
#pragma unroll
                for (int u = 0; u < kWorkers; u++) {
                    const uint32_t from = slices + (from_block * kWorkers + u) * (int)sizeof(TileSlice);
                    tiles.z[u].x = __uint_as_float(load_shared4(from + (int)offsetof(TileSlice, z) + 8 * pair));
                    tiles.z[u].y = __uint_as_float(load_shared4(from + (int)offsetof(TileSlice, z) + 8 * pair + 4));
                    tiles.decay[u] = __uint_as_float(load_shared4(from + (int)offsetof(TileSlice, decay)));
                }
                tiles.log_decay = 0.0f; // of tile `lane` of the three
                if (lane < kWorkers)
                    tiles.log_decay =
                        __uint_as_float(load_shared4(slices + (from_block * kWorkers + lane) * (int)sizeof(TileSlice) +
                                                     (int)offsetof(TileSlice, log_decay)));
            };
            auto answer = [&](int to_block, int u) {
                if (lane < 4)
                    send(in_block(out_mass, to_block) + u * (uint32_t)sizeof(shared.mass[0]), pack_bf16(z[0], z[1]),
                         in_block(full, to_block) + u * (uint32_t)sizeof(shared.state_full[0]));
            };
            auto add = [&](const Arrived &tiles, int u) {
                z[0] = tiles.decay[u] * z[0] + tiles.z[u].x;
                z[1] = tiles.decay[u] * z[1] + tiles.z[u].y;
            };
            Arrived tiles;
            if (n == kWaveTiles && (closing < wave || closing >= wave + kWaveTiles)) {
                double sum = 0.0;
#pragma unroll 2
                for (int to_block = 0; to_block < kClusterBlocks; to_block++) {
                    take(tiles, to_block);
#pragma unroll
                    for (int u = 0; u < kWorkers; u++) {
                        answer(to_block, u);
                        add(tiles, u);
                    }
                    sum += tiles.log_decay;
                }
#pragma unroll
                for (int step = 16; step > 0; step /= 2)
                    sum += __shfl_xor_sync(~0u, sum, step);
                log_sum += sum;
            } else {
#pragma unroll 1
                for (int to_block = 0; to_block < kClusterBlocks; to_block++) {
                    take(tiles, to_block);
#pragma unroll
                    for (int u = 0; u < kWorkers; u++) {
                        const int t = to_block * kWorkers + u;
                        answer(to_block, u);
                        if (t < n) {
                            if (wave + t == closing)
                                close();
                            add(tiles, u);
                            log_sum += __shfl_sync(~0u, tiles.log_decay, u);
                        }
                    }
                }
            }
        }
        if (w.end_tile * (int64_t)64 < w.end) {
            if (lane < 4)
                leave(carry + pair * 16, __float_as_uint(z[0]), __float_as_uint(z[1]), w.piece + 1);
            if (lane == 0)
                leave(carry_log, (uint32_t)__double2loint(log_sum), (uint32_t)__double2hiint(log_sum), w.piece + 1);
        } else if (closing == w.end_tile) {
            close();
        }
    }
}

} // namespace ts
#endif
