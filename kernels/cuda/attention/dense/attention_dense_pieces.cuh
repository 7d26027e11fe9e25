// How the kernels of the dense form that go in clusters cut a batch, and how a piece hands its state to the next.
#ifndef TS_CUDA_ATTENTION_DENSE_PIECES_CUH
#define TS_CUDA_ATTENTION_DENSE_PIECES_CUH

#include "kernels/cuda/attention/dense/attention_dense_gates.cuh"
#include "kernels/cuda/primitives/cluster.cuh"
#include "kernels/cuda/primitives/dependent_launch.cuh"

namespace ts {

constexpr int kClusterBlocks = 8;

// A (span, KV head) is cut into pieces of n_tiles tiles of tile_tokens tokens; state_bytes pass from piece to piece.
template <int tile_tokens, int n_tiles, int state_bytes> struct PieceShape {
    static constexpr int tile = tile_tokens, tiles = n_tiles, carry_bytes = state_bytes;
    static constexpr int least_carried = tiles * tile - tile + 1; // tokens of a span that is more than one piece
};

// What a worker finds in a wave.
enum { kNoWave, kNoTile, kPartTile, kWholeTile };

// A piece of a (span, KV head). Tile 0 is the tile that the span begins in.
struct ClusterWork {
    unsigned char *carry; // where one piece leaves its state to the next
    int64_t row;          // of tile 0's first token in the batch; negative where the span begins inside the tile
    int64_t cache;        // index of (sequence, KV head)
    int64_t end;          // token after the span's last, from tile 0's first
    int item;             // -1 when there is none
    int pair, piece, head;
    int first_tile, end_tile; // of the piece
    int begin;                // tokens of tile 0 before the span
};

// The first piece at or after `item`, in this cluster's turn.
template <typename Pieces>
__device__ __forceinline__ ClusterWork next_work(const DenseArgs &a, int item, int n_clusters) {
    ClusterWork w;
    const int pairs = a.n_spans * a.n_kv_heads;
    for (;; item += n_clusters) {
        if (item >= a.n_items) {
            w.item = -1;
            return w;
        }
        w.piece = item / pairs;
        w.pair = item - w.piece * pairs;
        const int index = w.pair / a.n_kv_heads;
        const ts_span span = a.spans[index];
        w.begin = (int)(span.position % kOpenRows);
        w.end = w.begin + span.n_tokens;
        const int n_tiles = (int)((w.end + Pieces::tile - 1) / Pieces::tile);
        w.first_tile = w.piece * Pieces::tiles;
        if (w.first_tile >= n_tiles)
            continue;
        w.end_tile = min(n_tiles, w.first_tile + Pieces::tiles);
        w.item = item;
        w.row = span.row - w.begin;
        w.head = w.pair - index * a.n_kv_heads;
        w.cache = (int64_t)span.sequence * a.n_kv_heads + w.head;
        const int64_t slot = a.carry_rows > 0 ? span.row / a.carry_rows : index;
        w.carry = a.carry + (slot * a.n_kv_heads + w.head) * Pieces::carry_bytes;
        return w;
    }
}

// What a lane leaves for the same lane of another cluster, which takes the next piece: each number beside the piece
// that it begins, in 8 bytes that are written as one. So nothing has to be waited for but the numbers themselves.
__device__ __forceinline__ void leave(unsigned char *to, uint32_t x, uint32_t y, int piece) {
    asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%1, %3};\nmov.b64 b, {%2, %3};\n"
                 "st.relaxed.gpu.global.v2.b64 [%0], {a, b};\n}" ::"l"(to),
                 "r"(x), "r"(y), "r"(piece)
                 : "memory");
}

__device__ __forceinline__ void take_over(const unsigned char *from, uint32_t &x, uint32_t &y, int piece) {
    int of_x, of_y;
    do
        asm volatile("{\n.reg .b64 a, b;\nld.relaxed.gpu.global.v2.b64 {a, b}, [%4];\n"
                     "mov.b64 {%0, %1}, a;\nmov.b64 {%2, %3}, b;\n}"
                     : "=r"(x), "=r"(of_x), "=r"(y), "=r"(of_y)
                     : "l"(from)
                     : "memory");
    while (of_x != piece || of_y != piece);
}

// The same of n places, 512 bytes apart, all asked for at once.
template <int n>
__device__ __forceinline__ void take_over(const unsigned char *from, float (&numbers)[2 * n], int piece) {
    uint32_t x[2 * n];
    bool is_there;
    do {
        int of[2 * n];
#pragma unroll
        for (int i = 0; i < n; i++)
            asm volatile("{\n.reg .b64 a, b;\nld.relaxed.gpu.global.v2.b64 {a, b}, [%4];\n"
                         "mov.b64 {%0, %1}, a;\nmov.b64 {%2, %3}, b;\n}"
                         : "=r"(x[2 * i]), "=r"(of[2 * i]), "=r"(x[2 * i + 1]), "=r"(of[2 * i + 1])
                         : "l"(from + i * 512)
                         : "memory");
        is_there = true;
#pragma unroll
        for (int i = 0; i < 2 * n; i++)
            is_there &= of[i] == piece;
    } while (!is_there);
#pragma unroll
    for (int i = 0; i < 2 * n; i++)
        numbers[i] = __uint_as_float(x[i]);
}

// Tokens of the open tile before the span: log of the decay up to the span's first token.
__device__ __forceinline__ double open_decay(const DenseArgs &a, const ClusterWork &w) {
    return a.open_c[w.cache * kOpenRows + w.begin - 1];
}

template <int D>
__device__ __forceinline__ float open_key(const DenseArgs &a, const ClusterWork &w, double log_sum, int token,
                                          int row) {
    const int64_t at = w.cache * kOpenRows + token;
    return (float)exp(log_sum - a.open_c[at]) * open_feature(a.open_k[at * D + row], a.open_gate[at]);
}

// The tile before which the state is the one that the span leaves in the cache; -1 where it leaves none.
template <typename Pieces> __device__ __forceinline__ int closing_tile(const ClusterWork &w) {
    const int open_tile = (int)(w.end / Pieces::tile);
    return open_tile > 0 ? open_tile : -1;
}

} // namespace ts
#endif
