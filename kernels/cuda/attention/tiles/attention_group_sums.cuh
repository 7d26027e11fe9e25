// How attention_groups.cu sums S^ and z^ of a group of events (eq. 8): the shared memory of a block, and what each warp
// adds up. Features are permuted within every 16, for the outputs; panels are those of matrix.cuh.
#ifndef TS_CUDA_ATTENTION_GROUP_SUMS_CUH
#define TS_CUDA_ATTENTION_GROUP_SUMS_CUH

#include "kernels/cuda/attention/attention.cuh"
#include "kernels/cuda/primitives/cluster.cuh"
#include "kernels/cuda/primitives/matrix.cuh"

namespace ts::groups {

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

// The rows of a group's tiles: addresses within them are 32-bit.
struct group_rows {
    const bf16 *qkvg; // of the first
    int64_t first;
    int n; // that the span has from there on, of as many as the group's tiles may have
    __device__ int count(int event) const {
        return min(D, n - event * D);
    }
};

// Address of this thread's vector of the first 16 rows of a panel, as the right operand of a product.
__device__ __forceinline__ uint32_t column_operand(uint32_t panel) {
    const int lane = threadIdx.x % 32;
    return ts::panel_unit(panel, lane % 16, lane / 16);
}

// Where the rows of a token's heads begin in qkvg.
struct head_columns {
    int stride, group, q, k, v;
    __device__ head_columns(const ts_cuda_attention &a, int j)
        : stride((int)a.qkvg.stride), group(a.cache.n_heads / a.cache.n_kv_heads), q(j * group * D),
          k((a.cache.n_heads + j) * D), v(k + a.cache.n_kv_heads * D) {
    }
};

// A thread's number, read anew: for what is cheaper to find again than to keep.
__device__ __forceinline__ int thread_again() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

__device__ __forceinline__ void prefetch(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ void prefetch_queries(const group_rows &rows, const head_columns &columns, int row) {
#    pragma unroll 1
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
#    pragma unroll
            for (int v = 0; v < kItems; v++)
                sources[v] = s.sources[step * kTiles + lane / kUnits + v * (32 / kUnits)];
    }
    __device__ void ask(int step, int n_steps) {
        const int lane = threadIdx.x % 32, unit = lane % kUnits;
        if (step < n_steps) {
            const uint32_t to = ts::panel_unit(stage + step % kStages * (kTiles * D * 2), lane / kUnits, unit);
#    pragma unroll
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
#    pragma unroll
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
#    pragma unroll
        for (int v = 0; v < kItems; v++)
#    pragma unroll
            for (int half = 0; half < 2; half++) {
                float x[8];
                ts::unpack(half ? make_uint2(raw[v].z, raw[v].w) : make_uint2(raw[v].x, raw[v].y), scales[v], x);
                ts::store_shared16(
                    ts::panel_unit(to, lane / 4 + v * 8, lane % 4 * 2 + half),
                    make_uint4(ts::pack(x[0], x[1]), ts::pack(x[2], x[3]), ts::pack(x[4], x[5]), ts::pack(x[6], x[7])));
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
                for (int i = thread_again(); i < n_steps * kTiles * (kGroup / 8); i += kThreads) {
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
                    if (pass == 0)
                        prefetch((at >= 0 ? a.cache.slot_mass + at * D : a.tile_masses + ~at * D) + feature);
                }
                ts::copy_wait<0>();
                __syncthreads();
            }
            stages.begin(n_steps);
            float z[4];
            const auto ask_masses = [&](int step, int lane) {
                int64_t at[4];
#    pragma unroll
                for (int i = 0; i < 4; i++)
                    at[i] = s.places[step * kTiles + i / 2 * 8 + lane % 4 * 2 + i % 2];
#    pragma unroll
                for (int i = 0; i < 4; i++)
                    z[i] = (at[i] >= 0 ? a.cache.slot_mass + at[i] * D
                                       : a.tile_masses + ~at[i] * D)[mass_feature + lane / 4];
            };
            if (sums_mass)
                ask_masses(0, thread_again() % 32);
            for (int step = 0; step < n_steps; step++) {
                uint32_t w[2][4], b[D / 16][4];
#    pragma unroll
                for (int h = 0; h < 2; h++)
                    ts::load_a_transposed(w[h], s.weights[step * kTiles], kWeightPitch, 16 * h, 0);
                const uint32_t columns = column_operand(stages.wait(step, n_steps));
#    pragma unroll
                for (int i = 0; i < D / 16; i++)
                    ts::load_matrices_transposed(b[i], columns ^ i << 5);
                stages.next(step, n_steps);
#    pragma unroll
                for (int i = 0; i < D / 16; i++)
#    pragma unroll
                    for (int h = 0; h < 2; h++) {
                        ts::multiply_add(acc[h][2 * i], w[h], b[i][0], b[i][1]);
                        ts::multiply_add(acc[h][2 * i + 1], w[h], b[i][2], b[i][3]);
                    }
                if (sums_mass) { // in two parts, which keeps 16 bits of z
                    uint32_t high[2], rest[2], half[4];
#    pragma unroll
                    for (int i = 0; i < 2; i++) {
                        high[i] = ts::pack(z[2 * i], z[2 * i + 1]);
                        rest[i] = ts::pack(z[2 * i] - ts::low_of(high[i]), z[2 * i + 1] - ts::high_of(high[i]));
                    }
#    pragma unroll
                    for (int i = 0; i < 4; i++)
                        half[i] = mass_half ? w[1][i] : w[0][i];
                    if (step + 1 < n_steps)
                        ask_masses(step + 1, lane);
                    ts::multiply_add(mass, half, high[0], high[1]);
                    ts::multiply_add(mass, half, rest[0], rest[1]);
                }
            }
        }
        if (pass == 0)
            cluster_wait(); // the others have started
        // Event lane / 4 + 8 r is tile lane / 4 of block r. Neighbouring lanes exchange words, so that each sends 8
        // bytes.
        const int lane = thread_again() % 32, odd = lane & 1, place = place_of(stages.row);
        const uint32_t line = ts::panel_unit(ts::shared_address(s.states[lane / 4]), place, 0) & ~127u;
#    pragma unroll
        for (int r = 0; r < 4; r++) {
            const uint32_t to = ts::in_block(line, r) + (lane & 2) * 4;
#    pragma unroll
            for (int i = 0; i < D / 8; i += 2) {
                const uint32_t x = ts::pack(acc[r / 2][i][r % 2 * 2], acc[r / 2][i][r % 2 * 2 + 1]);
                const uint32_t y = ts::pack(acc[r / 2][i + 1][r % 2 * 2], acc[r / 2][i + 1][r % 2 * 2 + 1]);
                const uint32_t other = __shfl_xor_sync(~0u, odd ? x : y, 1);
                store_remote(to + (((i + odd) ^ (place & 7)) << 4), odd ? other : x, odd ? y : other);
            }
        }
        if (sums_mass)
#    pragma unroll
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
#endif

} // namespace ts::groups
#endif
