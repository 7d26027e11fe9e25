// Eqs. (8) and (9) in one kernel (sm_90, head size 64, BF16): S^ of a group of 32 events and the outputs of the 32
// tiles that follow, so that S^ never leaves the multiprocessors. By the lists of tile_choose.cu.
//
// A cluster of four blocks has one group and KV head. Each block sums a quarter of S^'s rows for all events, so that a
// state is read once for all of them, and sends every event's slice to the block that has its tile; then each works on
// eight tiles. The product of weights and states is events by tiles by elements on the matrix units, weights rounded to
// BF16. A tile's products are wgmma's, of the warpgroup that has it. Two clusters share their multiprocessors, so that
// one reads while the other computes. What bounds it: latency.
//
// Features are permuted within every 16: what a thread reads of q at once is then what it needs as an operand. Rows of
// S^ and z^ and columns of k^ lie in that order; panels are those of matrix.cuh.
#include "kernels/cuda/attention/tiles/attention_group_sums.cuh"

namespace {

using ts::bf16, ts::fp8;
using namespace ts::groups;

#if TS_HAS_WGMMA
__device__ __forceinline__ int feature_at(int place) {
    return (place & ~15) + (place >> 1 & 3) * 4 + (place >> 3 & 1) * 2 + (place & 1);
}

__device__ __forceinline__ void team_sync(int team) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kTeam) : "memory");
}

__device__ __forceinline__ void store_shared8(uint32_t to, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x), "r"(y) : "memory");
}

template <int n> __device__ __forceinline__ void copy_small(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(ts::shared_address(to)), "l"(from), "n"(n)
                 : "memory");
}

// S^ and z^ of one of this block's tiles to the cache, by a team.
__device__ __noinline__ void leave_state(const ts_cuda_attention &a, const group_shared &s, int own, int64_t cached,
                                         int tid) {
    ts::wait_for_front(); // which reads what the cache held
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
    static_assert(kTeam == 128, "a team is a warpgroup");
    constexpr int kSteps = D / 16, kVectors = D * kUnits / kTeam;
    const int team = threadIdx.x / kTeam, tid = threadIdx.x % kTeam, lane = tid % 32, warp = tid / 32;
    const head_columns columns(a, j);
    const int group = columns.group, y_stride = (int)a.y.stride;
    bf16 *y0 = (bf16 *)a.y.data + rows.first * a.y.stride;
    asm volatile("" : "+l"(y0)); // one pointer, to which 32 bits are added
    const uint32_t keys = ts::shared_address(s.keys[team]);
    // Where this thread puts its first vector of a tile's keys and values; the others lie whole rows on.
    constexpr int kRowsApart = kTeam / kUnits, kBytesApart = kRowsApart * 128;
    const int r0 = tid / kUnits, unit = tid % kUnits;
    const uint32_t key_to = ts::panel_unit(keys, r0, unit / 2 * 2) + unit % 2 * 8;
    float *decays = s.decays[team], *key_decays = s.key_decays[team];
    uint2 raw_q[kSteps][2];
    uint4 raw_k[kVectors];
    const auto ask_queries = [&](int event, int h) {
        const int last = event * D + rows.count(event) - 1, column = columns.q + h * D + lane % 4 * 4;
#    pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = min(event * D + warp * 16 + lane / 4 + 8 * r, last);
            const bf16 *q = rows.qkvg + (row * columns.stride + column);
#    pragma unroll
            for (int k = 0; k < kSteps; k++)
                raw_q[k][r] = __ldg((const uint2 *)(q + 16 * k));
        }
    };
    const auto ask_keys = [&](int event) {
        const int last = event * D + rows.count(event) - 1;
#    pragma unroll
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
#    pragma unroll
        for (int v = 0; v < kVectors; v++) {
            const int row = event * D + r0 + v * kRowsApart;
            ts::copy_async(to + v * kBytesApart, rows.qkvg + (min(row, last) * columns.stride + columns.v + unit * 8),
                           row <= last);
        }
        ts::copy_commit();
    };
    // Outputs of a tile's last head leave when the next tile's keys have been published, which would wait for them.
    uint2 out[2][D / 16];
    const auto store_outputs = [&](int event, int h) {
        const int thread = thread_again(), row = thread % kTeam / 32 * 16 + thread % 32 / 4;
        const int column = (j * group + h) * D + thread % 4 / 2 * 4 + (thread & 1) * 8, n_rows = rows.count(event);
#    pragma unroll
        for (int r = 0; r < 2; r++) {
            bf16 *y = y0 + ((event * D + row + 8 * r) * y_stride + column);
#    pragma unroll
            for (int n = 0; n < D / 16; n++)
                if (row + 8 * r < n_rows)
                    *(uint2 *)(y + 16 * n) = out[r][n];
        }
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
#    pragma unroll
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
        ts::publish_to_wgmma();
        team_sync(team);
        if (event > first + team)
            store_outputs(event - kTeams, group - 1);
        const bool goes_on = has_rows(event + kTeams);
        for (int h = 0; h < group; h++) {
            uint32_t q[kSteps][4];
#    pragma unroll
            for (int k = 0; k < kSteps; k++)
#    pragma unroll
                for (int i = 0; i < 4; i++)
                    q[k][i] = ts::feature_map(i < 2 ? raw_q[k][i % 2].x : raw_q[k][i % 2].y);
            ts::Accumulator acc, p;
            float below[4] = {}, rest[4] = {}; // columns alike
            // Hidden from the compiler, which else finds all of them before the loop and has no registers for them.
            uint32_t states_here = states, keys_here = keys, values_here = values;
            asm volatile("" : "+r"(states_here), "+r"(keys_here), "+r"(values_here));
            const uint64_t states_at = ts::panel_descriptor(states_here), keys_at = ts::panel_descriptor(keys_here),
                           values_at = ts::panel_descriptor(values_here);
            ts::group_begin();
#    pragma unroll
            for (int k = 0; k < kSteps; k++)
                ts::group_product<0>(p, q[k], ts::panel_further(keys_at, k * 32), k > 0);
#    pragma unroll
            for (int k = 0; k < kSteps; k++)
                ts::group_product<1>(acc, q[k], ts::panel_further(states_at, k * 2048), k > 0);
            ts::group_commit();
#    pragma unroll
            for (int k = 0; k < kSteps; k++) {
                const uint4 mass = s.masses[own][4 * k + lane % 4];
                ts::mma(below, q[k], mass.x, mass.y);
                ts::mma(rest, q[k], mass.z, mass.w);
            }
            ts::group_wait<0>();
            ts::group_hold(p);
            ts::group_hold(acc);
            int next_event = event + kTeams;
            asm volatile("" : "+r"(next_event)); // its addresses are not to be kept
            if (h + 1 == group && goes_on) {     // S^ has been read: the next values go there
                team_sync(team);
                ask_values(next_event, states);
            }
            const float decay[2] = {decays[warp * 16 + lane / 4], decays[warp * 16 + lane / 4 + 8]};
#    pragma unroll
            for (int r = 0; r < 2; r++) {
                const float reach = ts::exp2_fast(decay[r]);
                below[2 * r] = (below[2 * r] + rest[2 * r]) * reach;
#    pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    acc[n][2 * r] *= reach;
                    acc[n][2 * r + 1] *= reach;
                }
            }
            uint32_t weights[kSteps][4] = {};
#    pragma unroll
            for (int n = 0; n < kSteps; n++) {
                if (n > warp)
                    break; // no row of the warp sees these keys
#    pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int m = 16 * n + 8 * i + lane % 4 * 2;
                    const float2 key_decay = *(const float2 *)(key_decays + m);
                    float x[4];
#    pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const float weight = ts::exp2_fast(decay[k / 2] - (k % 2 ? key_decay.y : key_decay.x));
                        const int row = warp * 16 + lane / 4 + k / 2 * 8;
                        x[k] = n < warp || m + k % 2 <= row ? p[2 * n + i][k] * weight : 0.0f;
                    }
                    weights[n][2 * i] = ts::pack(x[0], x[1]);
                    weights[n][2 * i + 1] = ts::pack(x[2], x[3]);
                }
                ts::mma(below, weights[n], ts::kOnes, ts::kOnes);
            }
            ts::group_begin();
#    pragma unroll
            for (int n = 0; n < kSteps; n++)
                ts::group_product<1>(acc, weights[n], ts::panel_further(values_at, n * 2048), 1);
            ts::group_commit();
            ts::group_wait<0>();
            ts::group_hold(acc);
            if (h + 1 == group)
                team_sync(team); // keys and values have been read
            asm volatile("" : "+r"(next_event));
            if (h + 1 < group) {
                ask_queries(next_event - kTeams, h + 1);
            } else if (goes_on) {
                ask_keys(next_event);
                ask_queries(next_event, 0);
            } else { // else the compiler keeps the old ones through the products
#    pragma unroll
                for (int v = 0; v < kVectors; v++)
                    raw_k[v] = make_uint4(0, 0, 0, 0);
#    pragma unroll
                for (int k = 0; k < kSteps; k++)
                    raw_q[k][0] = raw_q[k][1] = make_uint2(0, 0);
            }
            // Neighbouring lanes exchange words, so that each writes 8 bytes.
            const int odd = thread_again() & 1;
#    pragma unroll
            for (int r = 0; r < 2; r++) {
                const float scale = 1.0f / (below[2 * r] + a.normalizer_eps);
#    pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    const float *left = acc[2 * n] + 2 * r, *right = acc[2 * n + 1] + 2 * r;
                    const uint32_t x = ts::pack(left[0] * scale, left[1] * scale);
                    const uint32_t z = ts::pack(right[0] * scale, right[1] * scale);
                    const uint32_t other = __shfl_xor_sync(~0u, odd ? x : z, 1);
                    out[r][n] = odd ? make_uint2(other, z) : make_uint2(x, other);
                }
            }
            if (h + 1 < group || !goes_on)
                store_outputs(event, h);
        }
        values = states;
    }
}
#endif

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) groups_kernel(const __grid_constant__ ts_cuda_attention a) {
#if TS_HAS_WGMMA
    // Does not wait for all of choose: it began when all before it had ended, and says of every list when it is there.
    // All blocks of choose have their places when this kernel begins.
    extern __shared__ __align__(1024) char memory[];
    group_shared &s = *(group_shared *)memory;
    // Heads vary fastest, so that clusters with short lists run beside those with long ones.
    const int j = blockIdx.y, n_kv = a.cache.n_kv_heads;
    const int64_t in_wave = a.n_wave_groups - 1 - blockIdx.z; // the latest first: they have the longest lists
    if (threadIdx.x == 0)
        ts::await_flag(a.listed + (a.first_group + in_wave) * n_kv + j);
    __syncthreads();
    ts::let_next_begin();
    const ts_cuda_list head = a.lists[in_wave * n_kv + j];
    group_rows rows = {(const bf16 *)a.qkvg.data + head.row * a.qkvg.stride, head.row, head.n_rows};
    asm volatile("" : "+l"(rows.qkvg)); // one pointer, to which 32 bits are added
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    sum_states<S>(a, s, head, (in_wave * n_kv + j) * a.list_stride, j, rows);
    ts::cluster_sync();
    make_outputs(a, s, head, j, rows);
    ts::wait_for_front();
#endif
}

template <typename S> ts_status launch(cudaStream_t stream, const ts_cuda_attention *a) {
    ts::launch_config l(dim3(kBlocks, (unsigned)a->cache.n_kv_heads, (unsigned)a->n_wave_groups), kThreads,
                        sizeof(group_shared), stream);
    l.begin_early();
    l.in_clusters(kBlocks);
    (void)cudaFuncSetAttribute(groups_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(group_shared));
    return ts_cuda_status(cudaLaunchKernelEx(&l.config, groups_kernel<S>, *a), "attention: outputs by groups");
}

} // namespace

bool ts_cuda_attention_groups_apply(const ts_cuda_attention *a) {
    return a->capability == 90 && a->cache.is_sparse && a->cache.head_dim == D && a->cache.tile_size == D &&
           a->qkvg.dtype == TS_BF16 && a->cache.slot_dtype != TS_F32;
}

ts_status ts_cuda_attention_groups(cudaStream_t stream, const ts_cuda_attention *a) {
    return a->cache.slot_dtype == TS_FP8_E4M3 ? launch<fp8>(stream, a) : launch<bf16>(stream, a);
}
