// The bf16 kernel of the dense form on Hopper, head size 64: one pass, k and v read once.
//
// A (span, KV head) is cut into pieces of kPieceTiles tiles. Piece p of every pair comes before piece p + 1 of any;
// clusters of 8 blocks take pieces in turn, so a piece finds the state of the one before it ready, and a number of
// clusters that does not divide the number of pairs loses little. Within a piece a cluster goes in waves of 24 tiles,
// one tile per worker warpgroup. Per wave a worker
//     1. maps its keys, forms its tile's own state S_t, eq. (7), and sends feature rows 8 c ... 8 c + 7 of it to
//        block c, each warp the rows that it has;
//     2. forms what the tile's tokens give each other, eq. (9), while
//     3. two warps of block c run the recurrence of eq. (8) over the wave's tiles for its 8 rows, in f32, and send
//        each tile the state that it begins with, in bf16;
//     4. adds the state's part and writes y.
// Blocks talk through distributed shared memory; each buffer is announced by an mbarrier that counts bytes. A worker,
// with a tile or without, goes on to the next wave only after all 8 blocks have answered it, so no buffer is
// overwritten before it was read.
#ifndef TS_CUDA_ATTENTION_DENSE_CLUSTER_CUH
#define TS_CUDA_ATTENTION_DENSE_CLUSTER_CUH

#include "kernels/cuda/attention_dense_recurrence.cuh"

namespace ts {

__device__ __forceinline__ void worker_sync(int worker) {
    asm volatile("bar.sync %0, 128;" ::"r"(worker + 1) : "memory");
}

// Where a thread finds its part of tile `rank` of a wave.
struct TileRows {
    const __nv_bfloat16 *from; // 16-byte unit (thread % 8) of row (thread / 8), column 0
    bool is_full;              // all 64 rows are the span's
};

__device__ __forceinline__ TileRows tile_rows(const DenseArgs &a, const Wave &w, int rank) {
    const int unit = threadIdx.x & 7, row = rank * 64 + threadIdx.x % 128 / 8;
    return {a.qkvg + (w.row + row) * a.stride + 8 * unit, rank * 64 >= w.begin && (rank + 1) * 64 <= w.end};
}

// The tile's rows of 64 columns into a panel; rows outside the span become 0.
__device__ __forceinline__ void copy_tile(const DenseArgs &a, const Wave &w, int rank, const TileRows &rows, int column,
                                          uint32_t panel) {
    const int unit = threadIdx.x & 7, row = threadIdx.x % 128 / 8;
    const uint32_t to = panel_unit(panel, row, unit);
    const __nv_bfloat16 *from = rows.from + column;
    const int64_t step = 16 * a.stride;
    if (rows.is_full) {
#pragma unroll
        for (int i = 0; i < 4; i++, from += step)
            copy_async(to + i * 16 * kPanelRowBytes, from);
    } else {
#pragma unroll 1
        for (int i = 0; i < 4; i++, from += step) {
            const int n = rank * 64 + row + 16 * i;
            const bool valid = n >= w.begin && n < w.end;
            copy_async(to + i * 16 * kPanelRowBytes, valid ? from : a.qkvg, valid);
        }
    }
}

// Gate logits of a lane's two tokens of tile `rank` of the wave: key, decay, key, decay; key gate and decay 0 outside
// the span.
struct GateLogits {
    __nv_bfloat16 key[2], decay[2];
    bool valid[2];
};

__device__ __forceinline__ GateLogits load_logits(const DenseArgs &a, const Wave &w, int rank) {
    const int lane = threadIdx.x & 31;
    const int64_t column = (int64_t)(a.n_heads + 2 * a.n_kv_heads) * 64 + w.head;
    GateLogits g;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int n = rank * 64 + 2 * lane + i;
        g.valid[i] = n >= w.begin && n < w.end;
        const __nv_bfloat16 *from = g.valid[i] ? a.qkvg + (w.row + n) * a.stride + column : a.qkvg;
        g.key[i] = from[0];
        g.decay[i] = from[g.valid[i] ? a.n_kv_heads : 0];
    }
    return g;
}

// Eqs. (2), (3), (5) for a tile, by one warp.
__device__ __forceinline__ void store_gates(const DenseArgs &a, const GateLogits &g, Gates &gates) {
    const int lane = threadIdx.x & 31;
    float gate[2], decay[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        gate[i] = g.valid[i] ? __fdividef(1.0f, 1.0f + __expf(-__bfloat162float(g.key[i]))) : 0.0f;
        decay[i] = g.valid[i] ? log_sigmoid(__bfloat162float(g.decay[i])) * a.decay_scale : 0.0f;
    }
    const DecaySums c = sum_decays(decay);
    *reinterpret_cast<float2 *>(&gates.log_decay[2 * lane]) = c.to;
    *reinterpret_cast<uint32_t *>(&gates.key_gate[2 * lane]) = pack_bf16(gate[0], gate[1]);
    *reinterpret_cast<uint32_t *>(&gates.to_end[2 * lane]) =
        pack_bf16(exp2_fast(c.all - c.to.x), exp2_fast(c.all - c.to.y));
}

// k becomes k^ in place, eq. (4).
__device__ __forceinline__ void map_tile_keys(const Gates &gates, uint32_t k) {
    const int thread = threadIdx.x % 128, row = thread / 8;
    const unsigned short *gate = reinterpret_cast<const unsigned short *>(gates.key_gate) + row;
    const uint32_t at = panel_unit(k, row, thread & 7);
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[i] = load_shared16(at + i * 16 * kPanelRowBytes);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t g = gate[16 * i] * 0x10001u;
        x[i].x = multiply_bf16(feature_map(x[i].x), g);
        x[i].y = multiply_bf16(feature_map(x[i].y), g);
        x[i].z = multiply_bf16(feature_map(x[i].z), g);
        x[i].w = multiply_bf16(feature_map(x[i].w), g);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        store_shared16(at + i * 16 * kPanelRowBytes, x[i]);
}

// Fragments of e^{c_last - c_m} k^_m, transposed.
__device__ __forceinline__ void load_tile_keys(uint32_t (&fk)[4][4], const Gates &gates, uint32_t k) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    const int row = (lane & 7) + ((lane >> 4) << 3), unit = 2 * warp + ((lane >> 3) & 1);
#pragma unroll
    for (int t = 0; t < 4; t++)
        load_matrices_transposed(fk[t], panel_unit(k, 16 * t + row, unit));
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const uint32_t *weight = reinterpret_cast<const uint32_t *>(&gates.to_end[16 * t]) + lane % 4;
        const uint32_t low = weight[0], high = weight[4];
        fk[t][0] = multiply_bf16(fk[t][0], low);
        fk[t][1] = multiply_bf16(fk[t][1], low);
        fk[t][2] = multiply_bf16(fk[t][2], high);
        fk[t][3] = multiply_bf16(fk[t][3], high);
    }
}

// The warp's feature rows go to the two blocks that have them, with S_t where there is a tile. To its own block they
// are written, not sent: a block may not be the destination of its own bulk copies.
__device__ __forceinline__ void send_slices(ClusterShared &shared, int worker, int stage, int block, bool has_tile) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, rank = block * kWorkers + worker;
    const uint32_t full = shared_address(&shared.inbox_full[stage]), inbox = shared_address(shared.inbox[stage][rank]),
                   slice = shared_address(&shared.inbox_slices[stage][rank]),
                   state = shared_address(shared.worker[worker].state[stage]),
                   outbox = shared_address(&shared.outbox[worker][stage][0]);
    if (warp == 0 && lane == 0)
        expect_bytes(shared_address(&shared.state_full[worker][stage]), (has_tile ? kTileBytes : 0) + 64 * 4);
    const int to = 2 * warp + lane;
    if (lane < 2 && to != block) {
        const uint32_t barrier = in_block(full, to);
        if (has_tile)
            send_bulk(in_block(inbox, to), state + to * 8 * kPanelRowBytes, 8 * kPanelRowBytes, barrier);
        send_bulk(in_block(slice, to), outbox + to * (uint32_t)sizeof(TileSlice), sizeof(TileSlice), barrier);
    }
    __syncwarp();
    if (warp == block / 2) {
        if (has_tile) {
            const uint32_t own = state + block * 8 * kPanelRowBytes + 16 * lane;
            store_shared16(inbox + 16 * lane, load_shared16(own));
            store_shared16(inbox + 16 * (lane + 32), load_shared16(own + 16 * 32));
        }
        if (lane < (int)sizeof(TileSlice) / 16)
            store_shared16(slice + 16 * lane, load_shared16(outbox + block * (uint32_t)sizeof(TileSlice) + 16 * lane));
        arrive(full);
    }
    __syncwarp();
}

// Step 1 of a wave: k, already in shared memory, becomes k^, and S_t and z_t leave.
__device__ __forceinline__ void send_tile_state(ClusterShared &shared, int worker, int stage, const Gates &gates,
                                                uint32_t k, uint32_t v, int block) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    map_tile_keys(gates, k);
    publish_to_wgmma();
    worker_sync(worker);
    uint32_t fk[4][4];
    float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    Accumulator s;
    load_tile_keys(fk, gates, k);
    group_begin();
    const uint64_t values = panel_descriptor(v);
#pragma unroll
    for (int t = 0; t < 4; t++)
        group_product<1>(s, fk[t], panel_further(values, t * 2048), t > 0);
    group_commit();
#pragma unroll
    for (int t = 0; t < 4; t++)
        mma(z, fk[t], kOnes, kOnes);
    TileSlice *outbox = shared.outbox[worker][stage];
    if (lane % 4 == 0) {
        outbox[2 * warp].z[lane / 4] = z[0];
        outbox[2 * warp + 1].z[lane / 4] = z[2];
    }
    if (lane < 2) {
        const float log_decay = gates.log_decay[63];
        outbox[2 * warp + lane].log_decay = log_decay;
        outbox[2 * warp + lane].decay = exp2_fast(log_decay);
    }
    group_wait<0>();
    group_hold(s);
    store_accumulator(shared_address(shared.worker[worker].state[stage]), 16 * warp, s, 1.0f, 1.0f);
    publish_to_wgmma();
    __syncwarp();
    send_slices(shared, worker, stage, block, true);
}

// The worker forms S of the next wave between the two halves of this wave's outputs, so that it need not wait for S^.
__device__ __forceinline__ void run_worker(const DenseArgs &a, ClusterShared &shared, int worker, int block) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    const int heads = a.n_heads / a.n_kv_heads, rank = block * kWorkers + worker;
    WorkerShared &mine = shared.worker[worker];
    const uint32_t k_base = shared_address(mine.k[0]), v_base = shared_address(mine.v[0]), q = shared_address(mine.q);
    const uint32_t state_base = shared_address(mine.state[0]),
                   state_full = shared_address(&shared.state_full[worker][0]),
                   gates_full = shared_address(&shared.gates_full[worker][0]);
    auto load_keys = [&](const Wave &w, const TileRows &rows, int stage) {
        if (rank < w.n_tiles) {
            const int k_column = (a.n_heads + w.head) * 64;
            copy_tile(a, w, rank, rows, k_column, k_base + stage * kTileBytes);
            copy_tile(a, w, rank, rows, k_column + a.n_kv_heads * 64, v_base + stage * kTileBytes);
        }
        copy_commit();
    };
    auto load_queries = [&](const Wave &w, const TileRows &rows, int i) {
        if (rank < w.n_tiles)
            copy_tile(a, w, rank, rows, (w.head * heads + i) * 64, q);
        copy_commit();
    };
    auto begin_wave = [&](const Wave &w, const Gates &gates, int stage) {
        if (rank < w.n_tiles)
            send_tile_state(shared, worker, stage, gates, k_base + stage * kTileBytes, v_base + stage * kTileBytes,
                            block);
        else if (w.n_tiles > 0)
            send_slices(shared, worker, stage, block, false);
    };
    int stage = 0, wave = 0, parity = 0, gates_parity = 0;
    wait_phase(gates_full, 0);
    TileRows rows = tile_rows(a, shared.wave[0], rank), rows_next = tile_rows(a, shared.wave[1], rank);
    load_keys(shared.wave[0], rows, 0);
    load_queries(shared.wave[0], rows, 0);
    load_keys(shared.wave[1], rows_next, 1);
    copy_wait<2>();
    worker_sync(worker);
    begin_wave(shared.wave[0], shared.gates[worker][0], 0);
    for (;; stage ^= 1, wave++) {
        const Wave &w = shared.wave[wave % kWaveStages];
        if (w.n_tiles == 0)
            break;
        const bool is_active = rank < w.n_tiles;
        const Gates &gates = shared.gates[worker][wave % kGateStages];
        const uint32_t k = k_base + stage * kTileBytes, v = v_base + stage * kTileBytes,
                       state = state_base + stage * kTileBytes;
        gates_parity ^= stage; // of the next wave's
        const int n0 = 16 * warp + lane / 4;
        float c0 = 0.0f, c1 = 0.0f;
        if (is_active)
            c0 = gates.log_decay[n0], c1 = gates.log_decay[n0 + 8];
        const bool is_full = rows.is_full;
        for (int i = 0; i < heads; i++) {
            const bool is_last = i + 1 == heads;
            uint32_t fq[4][4];
            Accumulator y;
            float mass[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (is_active) {
                if (i == 0)
                    copy_wait<1>();
                else
                    copy_wait<0>();
                worker_sync(worker);
                uint32_t fw[4][4];
#pragma unroll
                for (int t = 0; t < 4; t++)
                    load_matrices(fq[t], panel_unit(q, 16 * warp + (lane & 15), 2 * t + (lane >> 4)));
#pragma unroll
                for (int t = 0; t < 4; t++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        fq[t][e] = feature_map(fq[t][e]);
                Accumulator weights;
                const uint64_t keys = panel_descriptor(k), values = panel_descriptor(v);
                group_begin();
#pragma unroll
                for (int t = 0; t < 4; t++)
                    group_product<0>(weights, fq[t], panel_further(keys, t * 32), t > 0);
                group_commit();
                group_wait<0>();
                group_hold(weights);
                decay_weights(fw, weights, gates.log_decay, c0, c1);
                group_begin();
#pragma unroll
                for (int t = 0; t < 4; t++)
                    group_product<1>(y, fw[t], panel_further(values, t * 2048), t > 0);
                group_commit();
#pragma unroll
                for (int t = 0; t < 4; t++)
                    mma(mass, fw[t], kOnes, kOnes);
                // e^{c_n} q^_n, so that the state's part is added where the tile's own is.
                const float from0 = exp2_fast(c0), from1 = exp2_fast(c1);
                const uint32_t decay0 = pack_bf16(from0, from0), decay1 = pack_bf16(from1, from1);
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    fq[t][0] = multiply_bf16(fq[t][0], decay0);
                    fq[t][1] = multiply_bf16(fq[t][1], decay1);
                    fq[t][2] = multiply_bf16(fq[t][2], decay0);
                    fq[t][3] = multiply_bf16(fq[t][3], decay1);
                }
                group_wait<0>();
                group_hold(y);
            }
            if (is_last) {
                worker_sync(worker); // k, v and q of this wave have been read
                wait_phase(gates_full + 8 * (stage ^ 1), gates_parity);
                const Wave &next = shared.wave[(wave + 1) % kWaveStages];
                const Wave &after = shared.wave[(wave + 2) % kWaveStages];
                load_queries(next, rows_next, 0);
                rows = rows_next;
                rows_next = tile_rows(a, after, rank);
                load_keys(after, rows_next, stage);
                copy_wait<2>();
                worker_sync(worker);
                begin_wave(next, shared.gates[worker][(wave + 1) % kGateStages], stage ^ 1);
            }
            if (i == 0) {
                wait_phase(state_full + 8 * stage, parity);
                publish_to_wgmma();
            }
            if (is_active) {
                const uint64_t states = panel_descriptor(state);
                group_begin();
#pragma unroll
                for (int t = 0; t < 4; t++)
                    group_product<1>(y, fq[t], panel_further(states, t * 2048), 1);
                group_commit();
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    const float2 *z = reinterpret_cast<const float2 *>(shared.mass[worker][stage]) + 8 * t + lane % 4;
                    mma(mass, fq[t], pack_bf16(z[0].x, z[0].y), pack_bf16(z[4].x, z[4].y));
                }
                const float scale0 = __fdividef(1.0f, mass[0] + a.normalizer_eps),
                            scale1 = __fdividef(1.0f, mass[2] + a.normalizer_eps);
                group_wait<0>();
                group_hold(y);
                // Through the warp's own rows of a panel, so that a row of y is written in units of 16 bytes: the
                // state's after the last head, q's before it.
                const uint32_t panel = is_last ? state : q;
                worker_sync(worker);
                store_accumulator(panel, 16 * warp, y, scale0, scale1);
                __syncwarp();
                const int first_row = 16 * warp + lane / 8, n = rank * 64 + first_row;
                __nv_bfloat16 *to = a.y + (w.row + n) * a.y_stride + ((int64_t)w.head * heads + i) * 64 + lane % 8 * 8;
                uint4 x[4];
#pragma unroll
                for (int t = 0; t < 4; t++)
                    x[t] = load_shared16(panel_unit(panel, first_row + 4 * t, lane % 8));
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    if (is_full || (n + 4 * t >= w.begin && n + 4 * t < w.end))
                        __stcs(reinterpret_cast<uint4 *>(to), x[t]);
                    to += 4 * a.y_stride;
                }
                if (!is_last) {
                    worker_sync(worker);
                    load_queries(w, rows, i + 1);
                }
            }
        }
        parity ^= stage;
    }
}

// One warp tells the block's workers what comes: waves three ahead, for the loads, and the gates of their tiles two
// ahead.
__device__ __forceinline__ void run_planner(const DenseArgs &a, ClusterShared &shared, int block, int cluster,
                                            int n_clusters) {
    const int lane = threadIdx.x & 31;
    const uint32_t inbox_full = shared_address(&shared.inbox_full[0]);
    ClusterWork work = next_work(a, cluster, n_clusters);
    int tile = work.first_tile, n_told = 0, n_gated = 0;
    auto tell_wave = [&] {
        Wave wave = {0, 0, 0, 0, 0};
        if (work.item >= 0) {
            wave.row = work.row + (int64_t)tile * 64;
            wave.head = work.head;
            wave.n_tiles = min(kWaveTiles, work.end_tile - tile);
            wave.begin = tile == 0 ? work.begin : 0;
            wave.end = (int)min(work.end - (int64_t)tile * 64, (int64_t)kWaveTiles * 64);
            tile += kWaveTiles;
            if (tile >= work.end_tile) {
                work = next_work(a, work.item + n_clusters, n_clusters);
                tile = work.first_tile;
            }
        }
        if (lane == 0)
            shared.wave[n_told % kWaveStages] = wave;
        n_told++;
        __syncwarp();
    };
    GateLogits logits[kWorkers];
    auto take_logits = [&] {
#pragma unroll
        for (int i = 0; i < kWorkers; i++)
            logits[i] = load_logits(a, shared.wave[n_gated % kWaveStages], block * kWorkers + i);
    };
    auto tell_gates = [&] {
#pragma unroll
        for (int i = 0; i < kWorkers; i++)
            store_gates(a, logits[i], shared.gates[i][n_gated % kGateStages]);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kWorkers; i++)
            arrive(shared_address(&shared.gates_full[i][n_gated % 2]));
        __syncwarp();
        n_gated++;
    };
    tell_wave();
    tell_wave();
    take_logits();
    tell_gates();
    tell_wave();
    take_logits();
    tell_gates();
    for (int wave = 0; shared.wave[wave % kWaveStages].n_tiles > 0; wave++) {
        tell_wave();
        take_logits();
        wait_phase(inbox_full + 8 * (wave & 1),
                   wave >> 1 & 1); // the workers have taken the gates whose place these take
        tell_gates();
    }
}

// Launched in clusters of kClusterBlocks blocks.
__global__ void __launch_bounds__(kClusterThreads, 1) dense_attention_cluster(const __grid_constant__ DenseArgs a) {
#if TS_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char bytes[];
    ClusterShared &shared = *reinterpret_cast<ClusterShared *>(bytes);
    const int block = blockIdx.x % kClusterBlocks, cluster = blockIdx.x / kClusterBlocks,
              n_clusters = gridDim.x / kClusterBlocks;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        auto begin = [](const uint64_t &barrier, int n_arrivals) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(n_arrivals)
                         : "memory");
        };
        // Every lane arrives for what it has written itself.
        begin(shared.inbox_full[0], 1 + 32 * kWorkers);
        begin(shared.inbox_full[1], 1 + 32 * kWorkers);
        for (int i = 0; i < kWorkers; i++) {
            begin(shared.state_full[i][0], 1);
            begin(shared.state_full[i][1], 1);
            begin(shared.gates_full[i][0], 32);
            begin(shared.gates_full[i][1], 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    if (group < kWorkers) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 136;");
        run_worker(a, shared, group, block);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
        if (warp < 2)
            run_recurrence(a, shared, block, cluster, n_clusters);
        else if (warp == 2)
            run_planner(a, shared, block, cluster, n_clusters);
    }
    cluster_sync();
#endif
}

} // namespace ts
#endif
