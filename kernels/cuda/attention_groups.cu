// Eqs. (8) and (9) in one kernel (sm_90, head size 64, BF16): S^ of a group of 32 events and the outputs of the 32 tiles
// that follow, so that S^ never leaves the multiprocessors. By the lists of tile_choose.cu.
//
// A cluster of four blocks has one group and KV head. Each block sums a quarter of S^'s rows for all events, so that a
// state is read once for all of them, and sends every event's slice to the block that has its tile; then each works on
// eight tiles. The product of weights and states is events by tiles by elements on the matrix units, weights rounded to
// BF16. Two clusters share their multiprocessors, so that one reads while the other computes. What bounds it: reading q,
// k, v and writing y.
//
// Features are permuted within every 16: what a thread reads of q at once is then what it needs as an operand. Rows of
// S^ and z^ and columns of k^ lie in that order; panels are those of matrix.cuh.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/matrix.cuh"

namespace {

using ts::bf16, ts::fp8;

constexpr int D = 64, kThreads = 256, kWarps = kThreads / 32, kBlocks = 4; // of a cluster
constexpr int kGroup = TS_CUDA_GROUP, kOwn = kGroup / kBlocks;             // kOwn: tiles of a block
constexpr int kTiles = 16, kStages = 2;                                    // rows multiplied at a time, and under way
constexpr int kListed = 128, kWeightPitch = kGroup + 8;                    // entries of the list at a time
constexpr int kTeams = 2, kPanelBytes = D * D * (int)sizeof(bf16);         // kTeams: tiles worked on at a time

struct group_shared {
    alignas(128) char states[kOwn][kPanelBytes]; // S^ of the block's tiles
    union {
        bf16 stages[kWarps][kStages][kTiles][D]; // of each warp, the vectors of a row swapped as in a panel
        struct {
            char keys[kTeams][kPanelBytes], values[kTeams][kPanelBytes];
        };
    };
    union {
        struct {
            alignas(16) bf16 weights[kListed][kWeightPitch];
            int64_t places[kListed];      // page, or ~index
            const char *sources[kListed]; // the state there
        };
        struct {
            double c[kTeams][D]; // as in device memory
            float gates[kTeams][D];
        };
    };
    uint4 masses[kOwn][D / 4]; // z^ of four features: as BF16 (x, y), and what that leaves out, as BF16 (z, w)
    alignas(16) float decays[kTeams][D], key_decays[kTeams][D]; // c, and c less the key gate's logarithm; to base 2
};
static_assert(sizeof(group_shared) <= 113 * 1024, "two blocks a multiprocessor");

#if TS_HAS_WGMMA
constexpr int kPasses = D / kBlocks / kWarps; // over the list: a warp sums one row in each
constexpr int kTeam = kThreads / kTeams;      // threads that work on one tile
constexpr int kUnits = D / 8;                 // of 16 bytes, in a row

// Where a feature's row or column lies within its 16: features 4 c + 2 h + i at 8 h + 2 c + i.
__device__ __forceinline__ int place_of(int feature) {
    return (feature & ~15) + (feature >> 1 & 1) * 8 + (feature >> 2 & 3) * 2 + (feature & 1);
}

__device__ __forceinline__ int feature_at(int place) {
    return (place & ~15) + (place >> 1 & 3) * 4 + (place >> 3 & 1) * 2 + (place & 1);
}

__device__ __forceinline__ void team_sync(int team) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kTeam) : "memory");
}

__device__ __forceinline__ void store_shared8(uint32_t to, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x), "r"(y) : "memory");
}

// The rows of a group's tiles: addresses within them are 32-bit.
struct group_rows {
    const bf16 *qkvg; // of the first
    int64_t first;
    int n; // that the span has from there on, of as many as the group's tiles may have
    __device__ int count(int event) const {
        return min(D, n - event * D);
    }
};

// c += a b for 16 rows of b, all 64 columns; `columns` is the address of this thread's unit in the first of them.
__device__ __forceinline__ uint32_t column_operand(uint32_t panel) {
    const int lane = threadIdx.x % 32;
    return ts::panel_unit(panel, lane % 16, lane / 16);
}

__device__ __forceinline__ void product_columns(ts::Accumulator &c, const uint32_t (&a)[4], uint32_t columns) {
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        ts::load_matrices_transposed(b, columns ^ n << 4);
        ts::mma(c[n], a, b[0], b[1]);
        ts::mma(c[n + 1], a, b[2], b[3]);
    }
}

// Where the rows of a token's heads begin in qkvg.
struct head_columns {
    int stride, group, q, k, v;
    __device__ head_columns(const ts_cuda_attention &a, int j)
        : stride((int)a.qkvg.stride), group(a.cache.n_heads / a.cache.n_kv_heads), q(j * group * D),
          k((a.cache.n_heads + j) * D), v(k + a.cache.n_kv_heads * D) {
    }
};

__device__ __forceinline__ void prefetch(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ void prefetch_queries(const group_rows &rows, const head_columns &columns, int row) {
#pragma unroll 1
    for (int h = 0; h < columns.group; h++)
        prefetch(rows.qkvg + (row * columns.stride + columns.q + h * D));
}

__device__ __forceinline__ void store_remote(uint32_t to, uint32_t x) {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void store_remote(uint32_t to, uint32_t x, uint32_t y) {
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A thread's number, read anew: for what is cheaper to find again than to keep.
__device__ __forceinline__ int thread_again() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

template <int n> __device__ __forceinline__ void copy_small(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(ts::shared_address(to)), "l"(from), "n"(n)
                 : "memory");
}

// Brings a warp's row of the states in the list to shared memory, kTiles at a time: BF16 by asynchronous copies, FP8
// through registers. A lane has one vector of every fourth state.
template <typename S> struct row_stages;

template <> struct row_stages<bf16> {
    static constexpr int kItems = kTiles * kUnits / 32;
    const ts_cuda_attention &a;
    const group_shared &s;
    uint32_t stage; // of kStages, the first
    int row = 0;    // of the states
    const char *sources[kItems];

    // Where what the next ask() asks for lies.
    __device__ void find(int step, int n_steps) {
        const int lane = threadIdx.x % 32;
        if (step < n_steps)
#pragma unroll
            for (int v = 0; v < kItems; v++)
                sources[v] = s.sources[step * kTiles + lane / kUnits + v * (32 / kUnits)];
    }
    __device__ void ask(int step, int n_steps) {
        const int lane = threadIdx.x % 32, unit = lane % kUnits;
        if (step < n_steps) {
            const uint32_t to = ts::panel_unit(stage + step % kStages * (kTiles * D * 2), lane / kUnits, unit);
#pragma unroll
            for (int v = 0; v < kItems; v++) {
                const uint32_t line = to + v * (32 / kUnits) * (D * 2);
                ts::copy_async(v % 2 ? line ^ 64 : line, sources[v] + (row * D + unit * 8) * (int)sizeof(bf16));
            }
        }
        ts::copy_commit(); // nothing, beyond the last step: the waits count alike
    }
    __device__ void begin(int n_steps) {
        for (int step = 0; step < kStages; step++) {
            find(step, n_steps);
            ask(step, n_steps);
        }
    }
    __device__ uint32_t wait(int step, int n_steps) {
        find(step + kStages, n_steps);
        ts::copy_wait<kStages - 1>();
        __syncwarp();
        return stage + step % kStages * (kTiles * D * 2);
    }
    // After the stage has been read.
    __device__ void next(int step, int n_steps) {
        __syncwarp();
        ask(step + kStages, n_steps);
    }
};

template <> struct row_stages<fp8> {
    static constexpr int kItems = kTiles * D / 16 / 32;
    const ts_cuda_attention &a;
    const group_shared &s;
    uint32_t stage;
    int row = 0;
    uint4 raw[kItems];
    float scales[kItems];

    __device__ void ask(int step, int n_steps) {
        if (step >= n_steps)
            return;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int v = 0; v < kItems; v++) {
            const int k = step * kTiles + lane / 4 + v * 8;
            const int64_t at = s.places[k];
            raw[v] = __ldg((const uint4 *)(s.sources[k] + row * D + lane % 4 * 16));
            scales[v] = __ldg((at >= 0 ? a.cache.slot_scale + at * D : a.tile_scales + ~at * D) + row);
        }
    }
    __device__ void begin(int n_steps) {
        ask(0, n_steps);
    }
    __device__ uint32_t wait(int step, int n_steps) {
        const int lane = threadIdx.x % 32;
        const uint32_t to = stage + step % kStages * (kTiles * D * 2);
#pragma unroll
        for (int v = 0; v < kItems; v++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x[8];
                ts::unpack(half ? make_uint2(raw[v].z, raw[v].w) : make_uint2(raw[v].x, raw[v].y), scales[v], x);
                ts::store_shared16(ts::panel_unit(to, lane / 4 + v * 8, lane % 4 * 2 + half),
                                   make_uint4(ts::pack(x[0], x[1]), ts::pack(x[2], x[3]), ts::pack(x[4], x[5]),
                                              ts::pack(x[6], x[7])));
            }
        __syncwarp();
        return to;
    }
    __device__ void next(int step, int n_steps) {
        ask(step + 1, n_steps); // the stage is written again after another __syncwarp
    }
};

// S^ and z^ of all events of the group, this block's rows, each to the block that has the event's tile. A warp sums one
// row of S^ in each pass and, in one of them, eight features of z^ for half of the events; warps wait for each other
// only where another part of the list is staged.
template <typename S>
__device__ void sum_states(const ts_cuda_attention &a, group_shared &s, const ts_cuda_list &head, int64_t list, int j,
                           const group_rows &rows) {
    static_assert(kPasses == 2 && kOwn == 8, "a warp's share of z^; an event's block");
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, block = blockIdx.x, n = head.length;
    const int feature = block * (D / kBlocks), mass_feature = feature + warp % 2 * 8, mass_half = warp / 2 % 2;
    row_stages<S> stages = {a, s, ts::shared_address(s.stages[warp])};
    for (int pass = 0; pass < kPasses; pass++) {
        const bool sums_mass = pass == warp / 4;
        float acc[2][8][4] = {}, mass[4] = {};
        stages.row = feature + pass * kWarps + warp;
        if (pass == kPasses - 1 && tid < kTeams * D) { // what the outputs need first; earlier it would not last
            const int row = block * kOwn * D + tid;
            const head_columns columns(a, j);
            if (row < rows.n) {
                prefetch(rows.qkvg + (row * columns.stride + columns.k));
                prefetch(rows.qkvg + (row * columns.stride + columns.v));
                prefetch_queries(rows, columns, row);
            }
        }
        for (int first = 0; first < n; first += kListed) {
            const int n_here = min(kListed, n - first), n_steps = (n_here + kTiles - 1) / kTiles;
            if (pass == 0 || n > kListed) {
                if (pass > 0 || first > 0)
                    __syncthreads(); // the part before has been read
                for (int i = tid; i < n_steps * kTiles * (kGroup / 8); i += kThreads) {
                    const int k = i / (kGroup / 8), g = i % (kGroup / 8) * 8;
                    const float *from = a.list_weights + (list + first + min(k, n_here - 1)) * kGroup;
                    ts::copy_async(ts::shared_address(&s.weights[k][g]), (const bf16 *)from + g, k < n_here);
                }
                ts::copy_commit();
                if (tid < n_steps * kTiles) { // beyond the list: any state, with no weight
                    const int64_t at = a.list_at[list + first + min(tid, n_here - 1)];
                    s.places[tid] = at;
                    s.sources[tid] = (const char *)(at >= 0 ? a.cache.slot_state : a.tile_states) +
                                     (at >= 0 ? at : ~at) * (D * D * (int)sizeof(S));
                }
                ts::copy_wait<0>();
                __syncthreads();
            }
            stages.begin(n_steps);
            float z[4];
            const auto ask_masses = [&](int step) {
                int64_t at[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    at[i] = s.places[step * kTiles + i / 2 * 8 + lane % 4 * 2 + i % 2];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    z[i] = (at[i] >= 0 ? a.cache.slot_mass + at[i] * D
                                       : a.tile_masses + ~at[i] * D)[mass_feature + lane / 4];
            };
            if (sums_mass)
                ask_masses(0);
            for (int step = 0; step < n_steps; step++) {
                uint32_t w[2][4], b[D / 16][4];
#pragma unroll
                for (int h = 0; h < 2; h++)
                    ts::load_a_transposed(w[h], s.weights[step * kTiles], kWeightPitch, 16 * h, 0);
                const uint32_t columns = column_operand(stages.wait(step, n_steps));
#pragma unroll
                for (int i = 0; i < D / 16; i++)
                    ts::load_matrices_transposed(b[i], columns ^ i << 5);
                stages.next(step, n_steps);
#pragma unroll
                for (int i = 0; i < D / 16; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        ts::multiply_add(acc[h][2 * i], w[h], b[i][0], b[i][1]);
                        ts::multiply_add(acc[h][2 * i + 1], w[h], b[i][2], b[i][3]);
                    }
                if (sums_mass) { // in two parts, which keeps 16 bits of z
                    uint32_t high[2], rest[2], half[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        high[i] = ts::pack(z[2 * i], z[2 * i + 1]);
                        rest[i] = ts::pack(z[2 * i] - ts::low_of(high[i]), z[2 * i + 1] - ts::high_of(high[i]));
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        half[i] = mass_half ? w[1][i] : w[0][i];
                    if (step + 1 < n_steps)
                        ask_masses(step + 1);
                    ts::multiply_add(mass, half, high[0], high[1]);
                    ts::multiply_add(mass, half, rest[0], rest[1]);
                }
            }
        }
        if (pass == 0)
            cluster_wait(); // the others have started
        // Event lane / 4 + 8 r is tile lane / 4 of block r. Neighbouring lanes exchange words, so that each sends 8 bytes.
        const int odd = lane & 1, place = place_of(stages.row);
        const uint32_t line = ts::panel_unit(ts::shared_address(s.states[lane / 4]), place, 0) & ~127u;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const uint32_t to = ts::in_block(line, r) + (lane & 2) * 4;
#pragma unroll
            for (int i = 0; i < D / 8; i += 2) {
                const uint32_t x = ts::pack(acc[r / 2][i][r % 2 * 2], acc[r / 2][i][r % 2 * 2 + 1]);
                const uint32_t y = ts::pack(acc[r / 2][i + 1][r % 2 * 2], acc[r / 2][i + 1][r % 2 * 2 + 1]);
                const uint32_t other = __shfl_xor_sync(~0u, odd ? x : y, 1);
                store_remote(to + (((i + odd) ^ (place & 7)) << 4), odd ? other : x, odd ? y : other);
            }
        }
        if (sums_mass)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int e = mass_feature + lane % 4 * 2;
                const float x = mass[2 * r], y = mass[2 * r + 1];
                const uint32_t high = ts::pack(x, y), rest = ts::pack(x - ts::low_of(high), y - ts::high_of(high));
                const uint32_t *to = (const uint32_t *)&s.masses[lane / 4][e / 4] + e / 2 % 2;
                const uint32_t at = ts::in_block(ts::shared_address(to), 2 * mass_half + r);
                store_remote(at, high);
                store_remote(at + 8, rest);
            }
    }
}

// S^ and z^ of one of this block's tiles to the cache, by a team.
__device__ __noinline__ void leave_state(const ts_cuda_attention &a, const group_shared &s, int own, int64_t cached,
                                         int tid) {
    for (int i = tid; i < D * kUnits; i += kTeam) {
        const int place = i / kUnits, unit = i % kUnits;
        *(uint4 *)((bf16 *)a.cache.state + (cached * D + feature_at(place)) * D + unit * 8) =
            ts::load_shared16(ts::panel_unit(ts::shared_address(s.states[own]), place, unit));
    }
    if (tid < D) {
        const uint32_t *mass = (const uint32_t *)&s.masses[own][tid / 4] + tid / 2 % 2;
        a.cache.mass[cached * D + tid] =
            tid % 2 ? ts::high_of(mass[0]) + ts::high_of(mass[2]) : ts::low_of(mass[0]) + ts::low_of(mass[2]);
    }
}

// Eq. (9) for this block's tiles, in two teams.
__device__ void make_outputs(const ts_cuda_attention &a, group_shared &s, const ts_cuda_list &head, int j,
                             const group_rows &rows) {
    constexpr int kSteps = D / 16, kVectors = D * kUnits / kTeam;
    const int team = threadIdx.x / kTeam, tid = threadIdx.x % kTeam, lane = tid % 32, warp = tid / 32;
    const head_columns columns(a, j);
    const int group = columns.group, y_stride = (int)a.y.stride;
    bf16 *y0 = (bf16 *)a.y.data + rows.first * a.y.stride;
    asm volatile("" : "+l"(y0)); // one pointer, to which 32 bits are added
    const uint32_t keys = ts::shared_address(s.keys[team]), rows_of_keys = ts::panel_unit(
                                                                keys, lane % 8 + lane / 16 * 8, lane / 8 % 2);
    // Where this thread puts its first vector of a tile's keys and values; the others lie whole rows on.
    constexpr int kRowsApart = kTeam / kUnits, kBytesApart = kRowsApart * 128;
    const int r0 = tid / kUnits, unit = tid % kUnits;
    const uint32_t key_to = ts::panel_unit(keys, r0, unit / 2 * 2) + unit % 2 * 8;
    float *decays = s.decays[team], *key_decays = s.key_decays[team];
    uint2 raw_q[kSteps][2];
    uint4 raw_k[kVectors];
    const auto ask_queries = [&](int event, int h) {
        const int last = event * D + rows.count(event) - 1, column = columns.q + h * D + lane % 4 * 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = min(event * D + warp * 16 + lane / 4 + 8 * r, last);
            const bf16 *q = rows.qkvg + (row * columns.stride + column);
#pragma unroll
            for (int k = 0; k < kSteps; k++)
                raw_q[k][r] = __ldg((const uint2 *)(q + 16 * k));
        }
    };
    const auto ask_keys = [&](int event) {
        const int last = event * D + rows.count(event) - 1;
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
            const int row = min(event * D + r0 + v * kRowsApart, last);
            raw_k[v] = ts::load_raw(rows.qkvg + (row * columns.stride + columns.k + unit * 8));
        }
        if (tid < D) {
            const int64_t at = j * a.n_rows + rows.first + min(event * D + tid, last);
            copy_small<sizeof(double)>(&s.c[team][tid], a.c + at);
            copy_small<sizeof(float)>(&s.gates[team][tid], a.gate + at);
        }
        ts::copy_commit();
    };
    const auto ask_values = [&](int event, uint32_t to) {
        const int last = event * D + rows.count(event) - 1;
        to = ts::panel_unit(to, r0, unit);
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
            const int row = event * D + r0 + v * kRowsApart;
            ts::copy_async(to + v * kBytesApart,
                           rows.qkvg + (min(row, last) * columns.stride + columns.v + unit * 8), row <= last);
        }
        ts::copy_commit();
    };
    const int first = (int)blockIdx.x * kOwn, end = min(first + kOwn, head.n_events);
    uint32_t values = ts::shared_address(s.values[team]);
    const auto has_rows = [&](int event) { return event < end && rows.count(event) > 0; };
    if (has_rows(first + team)) {
        ask_keys(first + team);
        ask_queries(first + team, 0);
        ask_values(first + team, values);
    }
    for (int event = first + team; event < end; event += kTeams) {
        const int n_rows = rows.count(event), own = event % kOwn;
        const uint32_t states = ts::shared_address(s.states[own]);
        if (n_rows < D) // the span ends in the tile that follows: the cache keeps S^
            leave_state(a, s, own, ts::head_of(a, head.sequence, j), tid);
        if (n_rows <= 0)
            break;
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
            const uint4 x = raw_k[v];
            store_shared8(key_to + v * kBytesApart, ts::feature_map(x.x), ts::feature_map(x.z));
            store_shared8((key_to ^ 16) + v * kBytesApart, ts::feature_map(x.y), ts::feature_map(x.w));
        }
        ts::copy_wait<0>();
        if (tid < D) { // what this thread has copied
            const float decay = (float)(s.c[team][tid] * (double)ts::kLog2E);
            decays[tid] = decay;
            key_decays[tid] = decay - __log2f(s.gates[team][tid]);
        }
        team_sync(team);
        const bool goes_on = has_rows(event + kTeams);
        if (goes_on) {
            const int next = min((event + kTeams) * D + tid / 2, rows.n - 1);
            if (tid % 2)
                prefetch(rows.qkvg + (next * columns.stride + columns.k));
            else
                prefetch_queries(rows, columns, next);
        }
        for (int h = 0; h < group; h++) {
            // Hidden from the compiler, which else finds all addresses before the loop and has no registers for them.
            uint32_t states_columns = column_operand(states), values_columns = column_operand(values);
            uint32_t keys_rows = rows_of_keys;
            asm volatile("" : "+r"(states_columns), "+r"(values_columns), "+r"(keys_rows));
            uint32_t q[kSteps][4];
#pragma unroll
            for (int k = 0; k < kSteps; k++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    q[k][i] = ts::feature_map(i < 2 ? raw_q[k][i % 2].x : raw_q[k][i % 2].y);
            ts::Accumulator acc = {};
            float below[4] = {}, rest[4] = {}; // columns alike
            const float decay[2] = {decays[warp * 16 + lane / 4], decays[warp * 16 + lane / 4 + 8]};
#pragma unroll
            for (int k = 0; k < kSteps; k++) {
                product_columns(acc, q[k], states_columns + k * 2048);
                const uint4 mass = s.masses[own][4 * k + lane % 4];
                ts::mma(below, q[k], mass.x, mass.y);
                ts::mma(rest, q[k], mass.z, mass.w);
            }
            int next_event = event + kTeams;
            asm volatile("" : "+r"(next_event)); // nor their addresses
            if (h + 1 == group && goes_on) { // S^ has been read: the next values go there
                team_sync(team);
                ask_values(next_event, states);
            }
            const int places[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float reach = ts::exp2_fast(decay[r]);
                below[2 * r] = (below[2 * r] + rest[2 * r]) * reach;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    acc[n][2 * r] *= reach;
                    acc[n][2 * r + 1] *= reach;
                }
            }
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                if (n > warp)
                    break; // no row of the warp sees these keys
                float p[2][4] = {};
#pragma unroll
                for (int k = 0; k < kSteps; k++) {
                    uint32_t b[4];
                    ts::load_matrices(b, (keys_rows ^ k << 5) + n * 2048);
                    ts::mma(p[0], q[k], b[0], b[1]);
                    ts::mma(p[1], q[k], b[2], b[3]);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int m = 16 * n + 8 * i + lane % 4 * 2;
                    const float2 key_decay = *(const float2 *)(key_decays + m);
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const float weight = ts::exp2_fast(decay[k / 2] - (k % 2 ? key_decay.y : key_decay.x));
                        p[i][k] = n < warp || m + k % 2 <= places[k / 2] ? p[i][k] * weight : 0.0f;
                    }
                }
                const uint32_t weights[4] = {ts::pack(p[0][0], p[0][1]), ts::pack(p[0][2], p[0][3]),
                                             ts::pack(p[1][0], p[1][1]), ts::pack(p[1][2], p[1][3])};
                product_columns(acc, weights, values_columns + n * 2048);
                ts::mma(below, weights, ts::kOnes, ts::kOnes);
            }
            asm volatile("" : "+r"(next_event));
            if (h + 1 < group) {
                ask_queries(next_event - kTeams, h + 1);
            } else if (goes_on) {
                ask_keys(next_event);
                ask_queries(next_event, 0);
            }
            // Neighbouring lanes exchange words, so that each writes 8 bytes.
            const int thread = thread_again(), odd = thread & 1;
            const int row = thread % kTeam / 32 * 16 + thread % 32 / 4;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float scale = 1.0f / (below[2 * r] + a.normalizer_eps);
                bf16 *y = y0 + ((event * D + row + 8 * r) * y_stride + (j * group + h) * D + thread % 4 / 2 * 4 + odd * 8);
#pragma unroll
                for (int n = 0; n < D / 8; n += 2) {
                    const uint32_t x = ts::pack(acc[n][2 * r] * scale, acc[n][2 * r + 1] * scale);
                    const uint32_t z = ts::pack(acc[n + 1][2 * r] * scale, acc[n + 1][2 * r + 1] * scale);
                    const uint32_t other = __shfl_xor_sync(~0u, odd ? x : z, 1);
                    if (row + 8 * r < n_rows)
                        *(uint2 *)(y + 8 * n) = odd ? make_uint2(other, z) : make_uint2(x, other);
                }
            }
        }
        team_sync(team); // keys and values have been read
        values = states;
    }
}
#endif

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) groups_kernel(const __grid_constant__ ts_cuda_attention a) {
#if TS_HAS_WGMMA
    extern __shared__ __align__(1024) char memory[];
    group_shared &s = *(group_shared *)memory;
    // Groups of one head run at a time: they share most states, which so stay in L2. The latest first: they have the
    // longest lists.
    const int j = blockIdx.z, n_kv = a.cache.n_kv_heads;
    const int64_t in_wave = a.n_wave_groups - 1 - blockIdx.y;
    const ts_cuda_list head = a.lists[in_wave * n_kv + j];
    group_rows rows = {(const bf16 *)a.qkvg.data + head.row * a.qkvg.stride, head.row, head.n_rows};
    asm volatile("" : "+l"(rows.qkvg)); // one pointer, to which 32 bits are added
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    sum_states<S>(a, s, head, (in_wave * n_kv + j) * a.list_stride, j, rows);
    ts::cluster_sync();
    make_outputs(a, s, head, j, rows);
#endif
}

template <typename S> ts_status launch(cudaStream_t stream, const ts_cuda_attention *a) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};
    config.gridDim = dim3(kBlocks, (unsigned)a->n_wave_groups, (unsigned)a->cache.n_kv_heads);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(group_shared);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kBlocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    (void)cudaFuncSetAttribute(groups_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(group_shared));
    return ts_cuda_status(cudaLaunchKernelEx(&config, groups_kernel<S>, *a), "attention: outputs by groups");
}

} // namespace

bool ts_cuda_attention_groups_apply(const ts_cuda_attention *a) {
    return a->capability == 90 && a->cache.is_sparse && a->cache.head_dim == D && a->cache.tile_size == D &&
           a->qkvg.dtype == TS_BF16 && a->cache.slot_dtype != TS_F32;
}

ts_status ts_cuda_attention_groups(cudaStream_t stream, const ts_cuda_attention *a) {
    return a->cache.slot_dtype == TS_FP8_E4M3 ? launch<fp8>(stream, a) : launch<bf16>(stream, a);
}
