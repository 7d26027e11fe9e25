// The bf16 kernel of the dense form on Hopper, head size 128: one pass, k and v read once.
//
// Pieces, clusters and waves are those of head size 64 (attention_dense_cluster.cuh), but a tile has 128 tokens, so
// that half as much of S_t and S^ travels, and a block has one tile at a time: 64 tokens each for two warpgroups.
// Per wave a block
//     1. forms what the tile's tokens give each other, eq. (9);
//     2. maps the next tile's keys and forms its S_t, eq. (7), which stays in registers, 16 feature rows a warp;
//     3. adds the state's part, as soon as S^ of this tile has come from the blocks that have its rows;
//     4. sends the next tile's S_t, each warp to the block of its rows, and writes y.
// Two warps of block c run the recurrence of eq. (8) over the wave's tiles for rows 16 c ... 16 c + 15 in f32, a third
// does z^, and a fourth tells the gates of tiles ahead. S_t of a tile is answered by S^ while y is written and step 1
// of the next tile runs.
// S_t leaves only after S^ of the tile before has been used, and no block is answered before its S_t has been taken,
// so one place each suffices for S_t and S^.
#ifndef TS_CUDA_ATTENTION_DENSE_WIDE_CUH
#define TS_CUDA_ATTENTION_DENSE_WIDE_CUH

#include "kernels/cuda/attention/dense/attention_dense_wide_tile.cuh"
#include "kernels/cuda/primitives/tensor_copy.cuh"

#include <type_traits>

namespace ts {

constexpr int kWideThreads = 3 * 128;

// Keeps what is made of x from being made early and held: registers are scarce.
__device__ __forceinline__ int made_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// All threads that have tiles.
__device__ __forceinline__ void workers_sync() {
    asm volatile("bar.sync 3, 256;" ::: "memory");
}

// By all that have tiles, and by the planner's warp, which may then write the gates of two waves on.
__device__ __forceinline__ void gates_taken() {
    asm volatile("bar.arrive 4, 288;" ::: "memory");
}

__device__ __forceinline__ void wait_gates_taken() {
    asm volatile("bar.sync 4, 288;" ::: "memory");
}

__device__ __forceinline__ void warpgroup_sync(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Two warpgroups of threads, which share a tile's queries.
__device__ __forceinline__ void run_wide_worker(const DenseArgs &a, const CUtensorMap &qkv, WideShared &shared,
                                                int block) {
    // Taken from a shuffle, so that it is not read again and waited for; lane, warp and what comes of them are made
    // where they are wanted.
    const int thread = __shfl_sync(~0u, threadIdx.x, threadIdx.x & 31);
    const int heads = a.n_heads / a.n_kv_heads;
    const uint32_t k_base = shared_address(shared.k[0]), v_base = shared_address(shared.v[0]),
                   q = shared_address(shared.q), ones_at = shared_address(shared.ones),
                   keys_full = shared_address(&shared.keys_full[0]), gates_full = shared_address(&shared.gates_full[0]),
                   queries_full = shared_address(&shared.queries_full), state_full = shared_address(&shared.state_full),
                   to_block = in_block(ones_at, thread / 32) - ones_at;
    const auto stage_of = [](uint32_t base, int wave) { return base + wave % 2 * kWideTileBytes; };
    // A phase ends with every wave, with a tile or without. What is copied in part is waited for apart.
    const auto load_panels = [&](uint32_t panels, int column, int row, uint32_t full) {
        tensor_load(panels, qkv, column, row, full);
        tensor_load(panels + kWidePanelBytes, qkv, column + 64, row, full);
    };
    const auto load_keys = [&](const WideTask &task, int wave) {
        const int column = (a.n_heads + task.head) * 128;
        const uint32_t k = stage_of(k_base, wave), v = stage_of(v_base, wave), full = keys_full + wave % 2 * 8;
        if (thread < 32 && elect()) {
            expect_bytes(full, task.kind == kWholeTile ? 2 * kWideTileBytes : 0);
            if (task.kind == kWholeTile) {
                load_panels(k, column, task.row, full);
                load_panels(v, column + a.n_kv_heads * 128, task.row, full);
            }
        }
        if (__builtin_expect(task.kind == kPartTile, 0)) {
            const int t = made_here(thread);
            copy_wide_part(a, task.row, task.tokens, column, k, t / 8, 32, t & 7);
            copy_wide_part(a, task.row, task.tokens, column + a.n_kv_heads * 128, v, t / 8, 32, t & 7);
        }
    };
    const auto load_queries = [&](const WideTask &task, int i) {
        const int column = (task.head * heads + i) * 128;
        if (thread < 32 && elect()) {
            expect_bytes(queries_full, task.kind == kWholeTile ? kWideTileBytes : 0);
            if (task.kind == kWholeTile)
                load_panels(q, column, task.row, queries_full);
        }
        if (__builtin_expect(task.kind == kPartTile, 0)) {
            const int t = made_here(thread);
            copy_wide_part(a, task.row, task.tokens, column, q, t / 128 * 64 + t % 128 / 8, 16, t & 7);
        }
    };
    uint32_t fq[8][4]; // the warp's queries, then their features
    int queries_parity = 0;
    const auto take_queries = [&](const WideTask &task) {
        wait_phase(queries_full, queries_parity);
        queries_parity ^= 1;
        const int t = made_here(thread);
        if (__builtin_expect(task.kind == kPartTile, 0)) {
            copy_wait<0>();
            warpgroup_sync(t / 128);
        }
        const uint32_t from =
            panel_unit(q, t / 32 * 16 + (t & 15), (t >> 4) & 1); // units further differ by exclusive or
#pragma unroll
        for (int i = 0; i < 8; i++)
            load_matrices(fq[i], (from ^ (i % 4 * 32)) + i / 4 * kWidePanelBytes);
    };
    const auto wait_keys = [&](const WideTask &task, int wave) {
        wait_phase(keys_full + wave % 2 * 8, wave / 2 & 1);
        if (__builtin_expect(task.kind == kPartTile, 0))
            copy_wait<0>();
    };
    const auto map_keys = [&](int wave) {
        const WideGates &gates = shared.gates[wave % 2];
        map_wide_keys(gates, stage_of(k_base, wave), made_here(thread), gates.is_strong);
    };
    WideTileState formed;
    // S_t of a tile, half by half; rest() is done while products of the first run.
    const auto form_state = [&](int wave, auto rest) {
        const uint32_t k = stage_of(k_base, wave), v = stage_of(v_base, wave);
        const int group = made_here(thread) / 128;
        const WideGates &gates = shared.gates[wave % 2];
        Accumulator first, second;
        float z[4];
        begin_wide_state<0>(first, z, k, v, ones_at, group);
        rest();
        begin_wide_state<1>(second, z, k, v, ones_at, group);
        group_wait<1>();
        end_wide_state<0>(formed, first, z, gates);
        __syncwarp(); // so that the compiler does not wait before
        group_wait<0>();
        end_wide_state<1>(formed, second, z, gates);
    };
    // Called by all after S_t of this tile is formed and S^ of the one before has been used. The rows of S_t follow
    // with the first head.
    const auto send_formed = [&](const WideTask &task, int wave) {
        const bool is_active = task.kind >= kPartTile;
        if (task.kind == kNoWave)
            return;
        if (thread < 32 && elect())
            expect_bytes(state_full, (is_active ? kWideTileBytes : 0) + (uint32_t)sizeof(shared.mass));
        const int t = made_here(thread);
        send_wide_mass(shared, formed, is_active, t & 31, to_block, block);
        if (__builtin_expect(is_active && formed.is_strong, 0)) { // weights want keys without their decay to the end
            const uint32_t k = stage_of(k_base, wave);
            copy_wide_part(a, task.row, task.tokens, (a.n_heads + task.head) * 128, k, t / 8, 32, t & 7);
            copy_wait<0>();
            map_wide_keys(shared.gates[wave % 2], k, t, false);
            publish_to_wgmma();
            workers_sync();
        }
    };
    wait_phase(gates_full, 0);
    const auto task_of = [&](int wave) -> const WideTask & { return shared.task[wave % kWideTasks]; };
    load_keys(task_of(0), 0);
    load_queries(task_of(0), 0);
    load_keys(task_of(1), 1);
    int kind = task_of(0).kind;
    if (kind >= kPartTile) {
        wait_keys(task_of(0), 0);
        map_keys(0);
        publish_to_wgmma();
        workers_sync();
        form_state(0, [] {});
        workers_sync();
    }
    take_queries(task_of(0));
    send_formed(task_of(0), 0);
    for (int wave = 0; kind != kNoWave; wave++) {
        // What ends the first half of a wave: k, v and the gates of this tile have been read, and k of the next is
        // mapped.
        const auto turn = [&] {
            publish_to_wgmma();
            workers_sync();
            gates_taken();
            load_queries(task_of(wave + 1), 0);
            load_keys(task_of(wave + 2), wave + 2);
        };
        const auto wait_next = [&] {
            wait_phase(gates_full + (wave + 1) % 2 * 8, (wave + 1) / 2 & 1);
            if (task_of(wave + 1).kind >= kPartTile)
                wait_keys(task_of(wave + 1), wave + 1);
        };
        const auto wait_state = [&] {
            wait_phase(state_full, wave & 1);
            publish_to_wgmma();
        };
        // Head i of the group, whose queries have been taken. With its last head goes what the next tile wants; where
        // that has no tokens, products of whatever lies there are formed and not used: a branch among products in
        // flight would cost more.
        const auto attend = [&](int i, auto last) {
            constexpr bool is_last = decltype(last)::value;
            uint32_t fw[8][4];
            Accumulator y[2];
            float mass[4], old_mass[4]; // of the tile's own keys, and of earlier ones
            {
                const WideGates &gates = shared.gates[wave % 2];
                const int t0 = made_here(thread), row = t0 / 32 * 16 + t0 % 32 / 4;
                const float c0 = gates.log_decay[row], c1 = gates.log_decay[row + 8];
                const bool is_strong = gates.is_strong;
                const float from0 = exp2_fast(c0), from1 = exp2_fast(c1);
                const uint32_t decay0 = pack_bf16(from0, from0), decay1 = pack_bf16(from1, from1);
                const float log0 = is_strong ? 0.0f : c0, log1 = is_strong ? 0.0f : c1;
                const uint32_t scale0 = is_strong ? kOnes : decay0, scale1 = is_strong ? kOnes : decay1;
                // Queries are mapped, and rows of S_t leave, while the products of those before run. The first
                // warpgroup forms the weights of later keys too, and they are masked.
                Accumulator weights[2];
                const uint64_t keys = panel_descriptor(stage_of(k_base, wave));
#pragma unroll
                for (int t = 0; t < 8; t++) {
                    fq[t][0] = feature_map(fq[t][0], log0, scale0);
                    fq[t][1] = feature_map(fq[t][1], log1, scale1);
                    fq[t][2] = feature_map(fq[t][2], log0, scale0);
                    fq[t][3] = feature_map(fq[t][3], log1, scale1);
                    group_begin();
#pragma unroll
                    for (int b = 0; b < 2; b++)
                        group_product<0>(
                            weights[b], fq[t],
                            panel_further(keys, b * 64 * kPanelRowBytes + t / 4 * kWidePanelBytes + t % 4 * 32), t > 0);
                    group_commit();
                    if (t < 4) {
                        send_wide_rows(shared, formed, 2 * t, i == 0, t0 & 31, to_block, block);
                        send_wide_rows(shared, formed, 2 * t + 1, i == 0, t0 & 31, to_block, block);
                    }
                }
                group_wait<0>();
                group_hold(weights[0]);
                group_hold(weights[1]);
                if (__builtin_expect(is_strong, 0)) {
#pragma unroll
                    for (int b = 0; b < 2; b++)
                        decay_wide_weights(weights[b], gates.log_decay + 64 * b, c0, c1);
#pragma unroll
                    for (int t = 0; t < 8; t++) {
                        fq[t][0] = multiply_bf16(fq[t][0], decay0);
                        fq[t][1] = multiply_bf16(fq[t][1], decay1);
                        fq[t][2] = multiply_bf16(fq[t][2], decay0);
                        fq[t][3] = multiply_bf16(fq[t][3], decay1);
                    }
                }
                const int t1 = made_here(thread), group = t1 / 128;
#pragma unroll
                for (int b = 0; b < 2; b++)
                    mask_weights(&fw[4 * b], weights[b], t1 & 31, b < group ? 4 : b > group ? -1 : t1 / 32 % 4);
            }
            if (is_last)
                wait_next();
            const uint64_t values = panel_descriptor(stage_of(v_base, wave)), ones = column_descriptor(ones_at);
            group_begin();
#pragma unroll
            for (int t = 0; t < 8; t++) {
#pragma unroll
                for (int p = 0; p < 2; p++)
                    group_product<1>(y[p], fw[t], panel_further(values, p * kWidePanelBytes + t * 2048), t > 0);
                group_product_columns(mass, fw[t], ones, t > 0);
            }
            group_commit();
            if (is_last)
                map_keys(wave + 1);
            group_wait<0>();
            group_hold(y[0]);
            group_hold(y[1]);
            group_hold(mass);
            if (is_last) {
                turn();
            } else {
                workers_sync(); // q has been read
                load_queries(task_of(wave), i + 1);
            }
            if (i == 0)
                wait_state();
            const uint64_t states = panel_descriptor(shared_address(shared.state)),
                           masses = column_descriptor(shared_address(shared.mass));
            group_begin();
#pragma unroll
            for (int t = 0; t < 8; t++) {
                group_product_columns(old_mass, fq[t], panel_further(masses, t * 32), t > 0);
#pragma unroll
                for (int p = 0; p < 2; p++)
                    group_product<1>(y[p], fq[t], panel_further(states, p * kWidePanelBytes + t * 2048), 1);
            }
            group_commit();
            // Products of the next tile's S_t may run on.
            const auto finish = [&] {
                group_wait<is_last>();
                group_hold(y[0]);
                group_hold(y[1]);
                group_hold(old_mass);
                const int t2 = made_here(thread);
                const WideTask task = task_of(wave);
                store_wide_outputs(a, task, task.head * heads + i, y, mass[0] + old_mass[0], mass[2] + old_mass[2],
                                   t2 / 32 * 16 + t2 % 32 / 4, t2 & 31);
            };
            if (is_last)
                form_state(wave + 1, finish);
            else
                finish();
        };
        if (__builtin_expect(kind >= kPartTile, 1)) {
#pragma unroll 1
            for (int i = 0; i + 1 < heads; i++) {
                attend(i, std::false_type());
                take_queries(task_of(wave));
            }
            attend(heads - 1, std::true_type());
        } else {
            wait_next();
            map_keys(wave + 1);
            turn();
            wait_state();
            form_state(wave + 1, [] {});
        }
        take_queries(task_of(wave + 1));
        workers_sync(); // S^ of this wave has been used
        send_formed(task_of(wave + 1), wave + 1);
        kind = task_of(wave + 1).kind;
    }
}

// One warp tells the block what comes: waves three ahead, for the loads, and the gates of their tiles two ahead.
__device__ __forceinline__ void run_wide_planner(const DenseArgs &a, WideShared &shared, int block, int cluster,
                                                 int n_clusters) {
    const int lane = threadIdx.x & 31;
    ClusterWork work = next_work<WidePieces>(a, cluster, n_clusters);
    int tile = work.first_tile, n_told = 0, n_gated = 0;
    const auto tell_task = [&] {
        WideTask task = {0, 0, kNoWave, 0};
        if (work.item >= 0) {
            const int64_t first = (int64_t)(tile + block) * kWideTile;
            const int begin = first == 0 ? work.begin : 0, end = (int)min(work.end - first, (int64_t)kWideTile);
            task.row = (int)(work.row + first);
            task.head = work.head;
            task.kind = tile + block >= work.end_tile    ? kNoTile
                        : begin == 0 && end == kWideTile ? kWholeTile
                                                         : kPartTile;
            task.tokens = task.kind == kNoTile ? 0 : begin | end << 16;
            tile += kClusterBlocks;
            if (tile >= work.end_tile) {
                work = next_work<WidePieces>(a, work.item + n_clusters, n_clusters);
                tile = work.first_tile;
            }
        }
        if (lane == 0)
            shared.task[n_told % kWideTasks] = task;
        n_told++;
        __syncwarp();
    };
    WideLogits logits;
    const auto take_logits = [&] { logits = load_wide_logits(a, shared.task[n_gated % kWideTasks]); };
    const auto tell_gates = [&] {
        store_wide_gates(a, logits, shared.gates[n_gated % 2]);
        __syncwarp();
        arrive(shared_address(&shared.gates_full[n_gated % 2]));
        __syncwarp();
        n_gated++;
    };
    tell_task();
    tell_task();
    take_logits();
    tell_gates();
    tell_task();
    take_logits();
    tell_gates();
    for (int wave = 0; shared.task[wave % kWideTasks].kind != kNoWave; wave++) {
        tell_task();
        take_logits();
        wait_gates_taken();
        tell_gates();
    }
}

static_assert(sizeof(WideShared) <= 227 * 1024, "what a block can have");

// Launched in clusters of kClusterBlocks blocks. qkv: boxes of 128 rows.
__global__ void __launch_bounds__(kWideThreads, 1)
    dense_attention_wide(const __grid_constant__ DenseArgs a, const __grid_constant__ CUtensorMap qkv) {
#if TS_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char bytes[];
    WideShared &shared = *reinterpret_cast<WideShared *>(bytes);
    const int block = blockIdx.x % kClusterBlocks, cluster = blockIdx.x / kClusterBlocks,
              n_clusters = gridDim.x / kClusterBlocks;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x < 8)
        reinterpret_cast<uint32_t *>(shared.ones)[threadIdx.x] = kOnes;
    publish_to_wgmma();
    if (threadIdx.x == 0) {
        const auto begin = [](const uint64_t &barrier, int n_arrivals) {
            init_barrier(shared_address(&barrier), n_arrivals);
        };
        for (int from = 0; from < kClusterBlocks; from++)
            begin(shared.inbox_full[from], 2); // each warp of the recurrence
        for (int stage = 0; stage < 2; stage++) {
            begin(shared.keys_full[stage], 1);
            begin(shared.gates_full[stage], 32); // every lane arrives for what it has written itself
        }
        begin(shared.queries_full, 1);
        begin(shared.state_full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    follow_front();
    if (group < 2) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        run_wide_worker(a, qkv, shared, block);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
        if (warp < 2)
            run_wide_recurrence(a, shared, warp, block, cluster, n_clusters);
        else if (warp == 2)
            run_wide_masses(a, shared, block, cluster, n_clusters);
        else
            run_wide_planner(a, shared, block, cluster, n_clusters);
    }
    cluster_sync();
#endif
}

} // namespace ts
#endif
