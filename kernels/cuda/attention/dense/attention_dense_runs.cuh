// How a batch is cut for the dense form where k and v are read twice.
//
// A span is cut into runs of consecutive chunks, as many as fill the device over all KV heads. A first kernel forms
// what each run but a span's last adds to the state, (decay, S, z), into a slot. A second one composes, for each run,
// the state that the span begins with and the slots of the runs before, and goes through the run once more for the
// outputs. The span's first state is in a slot too: where the outputs leave the cache's new state, other runs may still
// have to begin.
// The cut depends on the span alone, so a row's value does not depend on the rest of the batch.
#ifndef TS_CUDA_ATTENTION_DENSE_RUNS_CUH
#define TS_CUDA_ATTENTION_DENSE_RUNS_CUH

#include "kernels/cuda/attention/dense/attention_dense_gates.cuh"

namespace ts {

constexpr int kChunk = 64;    // tokens that a block takes at a time
constexpr int kLeastRun = 16; // chunks; shorter runs cost more to begin than they gain
constexpr int kMostRuns = 64; // of a span: each reads the slots of all before it

struct SpanRuns {
    int n_chunks, run_chunks, n_runs;
    int n_slots; // of each KV head: the first state, then one for each run but the last; 0 where one run is all
};

// `wanted`: runs that a long span is cut into.
__host__ __device__ inline SpanRuns span_runs(const ts_span &span, int wanted) {
    SpanRuns s;
    s.n_chunks = (int)((span.position % kOpenRows + span.n_tokens + kChunk - 1) / kChunk);
    const int run_chunks = (s.n_chunks + wanted - 1) / wanted;
    s.run_chunks = run_chunks > kLeastRun ? run_chunks : kLeastRun;
    s.n_runs = (s.n_chunks + s.run_chunks - 1) / s.run_chunks;
    s.n_slots = s.n_runs > 1 ? s.n_runs : 0;
    return s;
}

// A slot: S in fragment order, z, then log of the decay as a double.
__host__ __device__ constexpr int slot_floats(int d) {
    return d * d + d + 4;
}

struct Run {
    ts_span span;
    SpanRuns cut;
    int index, head;
    int64_t first_slot; // of (the span, KV head 0); the span's other slots follow, those of all heads together
};

// What block `block` takes: KV head fastest, then runs, then spans. Without outputs, a span's last run is left out.
template <bool outputs>
__device__ __forceinline__ Run find_run(const ts_span *spans, int n_spans, int n_kv_heads, int wanted, int block) {
    const int lane = threadIdx.x & 31;
    int index = block / n_kv_heads, slots_before = 0;
    Run r;
    r.head = block % n_kv_heads;
    for (int first = 0;; first += 32) {
        int runs = 0, slots = 0;
        if (first + lane < n_spans) {
            const SpanRuns cut = span_runs(spans[first + lane], wanted);
            runs = cut.n_runs - !outputs;
            slots = cut.n_slots;
        }
        const int own_runs = runs, own_slots = slots;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int more_runs = __shfl_up_sync(~0u, runs, step), more_slots = __shfl_up_sync(~0u, slots, step);
            if (lane >= step)
                runs += more_runs, slots += more_slots;
        }
        const unsigned found = __ballot_sync(~0u, runs > index);
        if (found == 0) {
            index -= __shfl_sync(~0u, runs, 31);
            slots_before += __shfl_sync(~0u, slots, 31);
            continue;
        }
        const int at = __ffs(found) - 1;
        r.span = spans[first + at];
        r.span.position %= kOpenRows;
        r.cut = span_runs(r.span, wanted);
        r.index = index - __shfl_sync(~0u, runs - own_runs, at);
        r.first_slot = (int64_t)(slots_before + __shfl_sync(~0u, slots - own_slots, at)) * n_kv_heads;
        return r;
    }
}

} // namespace ts
#endif
