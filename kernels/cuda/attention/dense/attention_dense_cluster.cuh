// The bf16 kernel of the dense form on Hopper, head size 64: one pass, k and v read once.
//
// A (span, KV head) is cut into pieces of TilePieces::tiles tiles. Piece p of every pair comes before piece p + 1 of
// any; clusters of 8 blocks take pieces in turn, so a piece finds the state of the one before it ready, and a number of
// clusters that does not divide the number of pairs loses little. Within a piece a cluster goes in waves of 24 tiles,
// one tile per worker warpgroup. Per wave a worker
//     1. maps its keys, forms its tile's own state S_t, eq. (7), and sends feature rows 8 c ... 8 c + 7 of it to
//        block c, each warp the rows that it has, from registers;
//     2. forms what the tile's tokens give each other, eq. (9), while
//     3. three warps of block c run the recurrence of eq. (8) over the wave's tiles for its 8 rows, in f32, and send
//        each tile the state that it begins with, in bf16;
//     4. adds the state's part and writes y.
// The fourth warp beside the workers plans: it tells each worker its tiles and their gates ahead. Whole tiles are
// loaded and stored by the copy engine; a tile in which a span begins or ends is copied row by row.
// Blocks talk through distributed shared memory; each buffer is announced by an mbarrier that counts bytes. A worker,
// with a tile or without, goes on to the next wave only after all 8 blocks have answered it, so no buffer is
// overwritten before it was read.
#ifndef TS_CUDA_ATTENTION_DENSE_CLUSTER_CUH
#define TS_CUDA_ATTENTION_DENSE_CLUSTER_CUH

#include "kernels/cuda/attention/dense/attention_dense_tile.cuh"
#include "kernels/cuda/primitives/tensor_copy.cuh"

namespace ts {

// What the copy engine needs to know of the projections and the outputs.
struct ClusterMaps {
    CUtensorMap qkv; // boxes of a tile
    CUtensorMap y;   // boxes of a warp's 16 rows
};

// The worker forms S of the next wave between the two halves of this wave's outputs, so that it need not wait for S^.
__device__ __forceinline__ void run_worker(const DenseArgs &a, const ClusterMaps &maps, ClusterShared &shared,
                                           int worker, int block) {
    const int lane = lane_id(), warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    const int heads = a.n_heads / a.n_kv_heads, rank = block * kWorkers + worker;
    WorkerShared &mine = shared.worker[worker];
    const uint32_t k_base = shared_address(mine.k[0]), v_base = shared_address(mine.v[0]), q = shared_address(mine.q);
    const uint32_t state_base = shared_address(mine.state[0]),
                   state_full = shared_address(&shared.state_full[worker][0]),
                   gates_full = shared_address(&shared.gates_full[worker][0]),
                   keys_full = shared_address(&shared.keys_full[worker][0]),
                   queries_full = shared_address(&shared.queries_full[worker]);
    // A phase ends with every wave, with a tile or without. What is copied in part is waited for apart.
    const TileTask *tasks = shared.task[worker];
    auto load_keys = [&](const TileTask &task, int wave) {
        const int stage = wave % 2, column = (a.n_heads + task.head) * 64;
        const uint32_t k = k_base + stage * kTileBytes, v = v_base + stage * kTileBytes, full = keys_full + 8 * stage;
        if (warp == 0 && elect()) {
            expect_bytes(full, task.kind == kWholeTile ? 2 * kTileBytes : 0);
            if (task.kind == kWholeTile) {
                tensor_load(k, maps.qkv, column, task.row, full);
                tensor_load(v, maps.qkv, column + a.n_kv_heads * 64, task.row, full);
            }
        }
        if (__builtin_expect(task.kind == kPartTile, 0)) {
            copy_part(a, shared.wave[wave % kWaveStages], rank, column, k);
            copy_part(a, shared.wave[wave % kWaveStages], rank, column + a.n_kv_heads * 64, v);
        }
    };
    auto load_queries = [&](const TileTask &task, int wave, int i) {
        const int column = (task.head * heads + i) * 64;
        if (warp == 0 && elect()) {
            expect_bytes(queries_full, task.kind == kWholeTile ? kTileBytes : 0);
            if (task.kind == kWholeTile)
                tensor_load(q, maps.qkv, column, task.row, queries_full);
        }
        if (__builtin_expect(task.kind == kPartTile, 0))
            copy_part(a, shared.wave[wave % kWaveStages], rank, column, q);
    };
    auto begin_wave = [&](const TileTask &task, int wave, int parity) {
        const int stage = wave % 2;
        const bool is_active = task.kind >= kPartTile;
        if (task.kind == kNoWave)
            return;
        if (warp == 0 && elect())
            expect_bytes(state_full + 8 * stage, (is_active ? kTileBytes : 0) + 64 * (uint32_t)sizeof(__nv_bfloat16));
        if (lane == 0)
            tensor_store_wait(); // S^ comes where y left
        __syncwarp();
        if (is_active) {
            wait_phase(keys_full + 8 * stage, parity);
            if (task.kind == kPartTile)
                copy_wait<0>();
            send_tile_state(shared, lane, warp, worker, stage, shared.gates[worker][wave % kGateStages],
                            k_base + stage * kTileBytes, v_base + stage * kTileBytes, block);
        } else {
            send_decay(shared, lane, warp, worker, stage, block, 0.0f, 0.0f);
        }
    };
    int stage = 0, wave = 0, parity = 0, next_parity = 0, queries_parity = 0;
    wait_phase(gates_full, 0);
    TileTask task = tasks[0], next = tasks[1];
    load_keys(task, 0);
    load_queries(task, 0, 0);
    load_keys(next, 1);
    begin_wave(task, 0, 0);
    for (; task.kind != kNoWave; stage ^= 1, wave++) {
        const bool is_active = task.kind >= kPartTile, is_whole = task.kind == kWholeTile;
        const Gates &gates = shared.gates[worker][wave % kGateStages];
        const uint32_t k = k_base + stage * kTileBytes, v = v_base + stage * kTileBytes,
                       state = state_base + stage * kTileBytes;
        TileTask after;
        next_parity ^= stage;
        for (int i = 0; i < heads; i++) {
            const bool is_last = i + 1 == heads;
            uint32_t fq[4][4];
            Accumulator y;
            float mass[4];
            if (is_active) {
                const int n0 = 16 * warp + lane / 4;
                const float c0 = gates.log_decay[n0], c1 = gates.log_decay[n0 + 8];
                const bool is_strong = gates.is_strong;
                const float from0 = exp2_fast(c0), from1 = exp2_fast(c1);
                const uint32_t decay0 = pack_bf16(from0, from0), decay1 = pack_bf16(from1, from1);
                const float log0 = is_strong ? 0.0f : c0, log1 = is_strong ? 0.0f : c1;
                const uint32_t scale0 = is_strong ? kOnes : decay0, scale1 = is_strong ? kOnes : decay1;
                wait_phase(queries_full, queries_parity);
                queries_parity ^= 1;
                if (!is_whole) {
                    copy_wait<0>();
                    worker_sync(worker);
                }
                uint32_t fw[4][4];
#pragma unroll
                for (int t = 0; t < 4; t++)
                    load_matrices(fq[t], panel_unit(q, 16 * warp + (lane & 15), 2 * t + (lane >> 4)));
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    fq[t][0] = feature_map(fq[t][0], log0, scale0);
                    fq[t][1] = feature_map(fq[t][1], log1, scale1);
                    fq[t][2] = feature_map(fq[t][2], log0, scale0);
                    fq[t][3] = feature_map(fq[t][3], log1, scale1);
                }
                Accumulator weights;
                const uint64_t keys = panel_descriptor(k), values = panel_descriptor(v),
                               ones = column_descriptor(shared_address(shared.ones));
                group_begin();
#pragma unroll
                for (int t = 0; t < 4; t++)
                    group_product<0>(weights, fq[t], panel_further(keys, t * 32), t > 0);
                group_commit();
                group_wait<0>();
                group_hold(weights);
                if (__builtin_expect(!is_strong, 1)) {
                    mask_weights(fw, weights, lane, warp);
                } else {
                    decay_weights(fw, weights, gates.log_decay, c0, c1);
#pragma unroll
                    for (int t = 0; t < 4; t++) {
                        fq[t][0] = multiply_bf16(fq[t][0], decay0);
                        fq[t][1] = multiply_bf16(fq[t][1], decay1);
                        fq[t][2] = multiply_bf16(fq[t][2], decay0);
                        fq[t][3] = multiply_bf16(fq[t][3], decay1);
                    }
                }
                group_begin();
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    group_product<1>(y, fw[t], panel_further(values, t * 2048), t > 0);
                    group_product_columns(mass, fw[t], ones, t > 0);
                }
                group_commit();
                group_wait<0>();
                group_hold(y);
                group_hold(mass);
            } else if (is_last) {
                queries_parity ^= 1;
            }
            if (is_last) {
                worker_sync(worker); // k, v and q of this wave have been read
                wait_phase(gates_full + 8 * (stage ^ 1), next_parity);
                after = tasks[(wave + 2) % kWaveStages];
                load_queries(next, wave + 1, 0);
                load_keys(after, wave + 2);
                begin_wave(next, wave + 1, next_parity);
            }
            if (i == 0) {
                wait_phase(state_full + 8 * stage, parity);
                publish_to_wgmma();
            }
            if (is_active) {
                const uint64_t states = panel_descriptor(state),
                               masses = column_descriptor(shared_address(shared.mass[worker][stage]));
                group_begin();
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    group_product_columns(mass, fq[t], panel_further(masses, t * 32), 1);
                    group_product<1>(y, fq[t], panel_further(states, t * 2048), 1);
                }
                group_commit();
                group_wait<0>();
                group_hold(y);
                group_hold(mass);
                // Of the eight columns, the first is z^'s.
                const float mass0 = __shfl_sync(~0u, mass[0], lane & ~3), mass1 = __shfl_sync(~0u, mass[2], lane & ~3);
                const float scale0 = __fdividef(1.0f, mass0 + a.normalizer_eps),
                            scale1 = __fdividef(1.0f, mass1 + a.normalizer_eps);
                // Through the warp's own rows of a panel: the state's after the last head, q's before it.
                const uint32_t panel = is_last ? state : q;
                const int column = (task.head * heads + i) * 64;
                worker_sync(worker);
                store_accumulator(panel, 16 * warp, y, scale0, scale1, lane);
                publish_to_wgmma();
                __syncwarp();
                if (__builtin_expect(is_whole, 1)) {
                    if (lane == 0)
                        tensor_store(maps.y, column, task.row + 16 * warp, panel + 16 * warp * kPanelRowBytes);
                } else {
                    store_part(a, shared.wave[wave % kWaveStages], rank * 64 + 16 * warp, column,
                               panel + 16 * warp * kPanelRowBytes);
                }
                if (!is_last) {
                    if (lane == 0)
                        tensor_store_wait();
                    worker_sync(worker);
                    load_queries(task, wave, i + 1);
                }
            }
        }
        parity ^= stage;
        task = next, next = after;
    }
    tensor_store_wait();
}

// One warp tells the block's workers what comes: waves three ahead, for the loads, and the gates of their tiles two
// ahead.
__device__ __forceinline__ void run_planner(const DenseArgs &a, ClusterShared &shared, int block, int cluster,
                                            int n_clusters) {
    const int lane = threadIdx.x & 31;
    const uint32_t inbox_full = shared_address(&shared.inbox_full[0][block]);
    ClusterWork work = next_work<TilePieces>(a, cluster, n_clusters);
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
                work = next_work<TilePieces>(a, work.item + n_clusters, n_clusters);
                tile = work.first_tile;
            }
        }
        if (lane == 0)
            shared.wave[n_told % kWaveStages] = wave;
        if (lane < kWorkers) {
            const int rank = block * kWorkers + lane;
            const bool is_whole = rank * 64 >= wave.begin && (rank + 1) * 64 <= wave.end;
            shared.task[lane][n_told % kWaveStages] = {(int)wave.row + rank * 64, wave.head,
                                                       wave.n_tiles == 0      ? kNoWave
                                                       : rank >= wave.n_tiles ? kNoTile
                                                       : is_whole             ? kWholeTile
                                                                              : kPartTile,
                                                       0};
        }
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
        wait_phase(inbox_full + (wave & 1) * (uint32_t)sizeof(shared.inbox_full[0]),
                   wave >> 1 & 1); // the workers have taken the gates whose place these take
        tell_gates();
    }
}

// Launched in clusters of kClusterBlocks blocks.
__global__ void __launch_bounds__(kClusterThreads, 1)
    dense_attention_cluster(const __grid_constant__ DenseArgs a, const __grid_constant__ ClusterMaps maps) {
#if TS_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char bytes[];
    ClusterShared &shared = *reinterpret_cast<ClusterShared *>(bytes);
    const int block = blockIdx.x % kClusterBlocks, cluster = blockIdx.x / kClusterBlocks,
              n_clusters = gridDim.x / kClusterBlocks;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    reinterpret_cast<uint32_t *>(shared.ones)[threadIdx.x] = kOnes;
    static_assert(sizeof shared.ones == kClusterThreads * sizeof(uint32_t), "a word a thread");
    publish_to_wgmma();
    if (threadIdx.x == 0) {
        auto begin = [](const uint64_t &barrier, int n_arrivals) {
            init_barrier(shared_address(&barrier), n_arrivals);
        };
        for (int stage = 0; stage < 2; stage++) {
            for (int from = 0; from < kClusterBlocks; from++)
                begin(shared.inbox_full[stage][from], 2); // each warp of the recurrence
            for (int i = 0; i < kWorkers; i++) {
                begin(shared.state_full[i][stage], 1);
                begin(shared.keys_full[i][stage], 1);
                begin(shared.gates_full[i][stage], 32); // every lane arrives for what it has written itself
            }
        }
        for (int i = 0; i < kWorkers; i++)
            begin(shared.queries_full[i], 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    follow_front();
    if (group < kWorkers) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 136;");
        run_worker(a, maps, shared, group, block);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
        if (warp < 2)
            run_recurrence(a, shared, warp, block, cluster, n_clusters);
        else if (warp == 2)
            run_masses(a, shared, block, cluster, n_clusters);
        else
            run_planner(a, shared, block, cluster, n_clusters);
    }
    cluster_sync();
#endif
}

} // namespace ts
#endif
