// How a batch is cut for the dense form, and the order in which blocks take the pieces.
//
// A segment is kSegment consecutive positions of one sequence, cut at multiples of kSegment, so a row's value does not
// depend on the rest of the batch. Up to kGroup segments of a span are a row of the plan; a row has the items
//     state (head, segment): what the segment adds to the state, (decay, S, z), into the row's slots; whoever finishes
//     the last
//         one of a head composes them, so that each slot holds the state that its segment begins with;
//     output (head, segment): the outputs, from that state.
// The state items of row r come some rows before the output items of row r, so that an output item seldom waits. Blocks
// draw tickets in this order, so whatever an item waits for was drawn before it.
#ifndef TS_CUDA_ATTENTION_DENSE_PLAN_CUH
#define TS_CUDA_ATTENTION_DENSE_PLAN_CUH

#include "kernels/ops.h"

namespace ts {

constexpr int kChunk = 64; // tokens that a block takes at a time
constexpr int kSegment = 1024;
constexpr int kGroup = 4;
constexpr int kItemsAhead = 160;    // output items between a state item and the output items of its row
constexpr int kItemsInFlight = 400; // output items begun and not done, at most

struct PlanRow {
    int span, first_segment, n_segments;
    int is_first, is_last; // of its span
};

// Items of row r begin at row_item_state(r) and row_item_output(r).
struct PlanItem {
    int row, head, segment;
    int is_output;
};

struct SpanShape {
    int first_segment, n_segments, n_rows;
};

__host__ __device__ inline SpanShape span_shape(int64_t position, int64_t n_tokens) {
    SpanShape s;
    s.first_segment = (int)(position / kSegment);
    const int last = (int)((position + n_tokens - 1) / kSegment);
    s.n_segments = last - s.first_segment + 1;
    s.n_rows = last / kGroup - s.first_segment / kGroup + 1;
    return s;
}

// Segments in the first n rows of a span, 0 <= n <= n_rows.
__host__ __device__ inline int span_segments_in(const SpanShape &s, int n) {
    if (n == 0)
        return 0;
    if (n == s.n_rows)
        return s.n_segments;
    return (s.first_segment / kGroup + n) * kGroup - s.first_segment;
}

// A slot of the ring: S in fragment order, z, then log of the decay as a double.
__host__ __device__ constexpr int slot_floats(int d) {
    return d * d + d + 4;
}

} // namespace ts
#endif
