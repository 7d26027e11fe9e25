// An f32 number in two halves of 16 bits: BF16, rounded to nearest, and what that leaves out, so that one reader may
// take the half that it needs and another the number exactly. With h and r the halves' bits, r signed, the bits of x
// are (h << 16) + r.
#ifndef TS_CUDA_SPLIT_FLOAT_CUH
#define TS_CUDA_SPLIT_FLOAT_CUH

#include <stdint.h>

namespace ts {

// Two neighbours; the first is in the lower half of each word.
struct split_pair {
    uint32_t high, rest;
};

__device__ __forceinline__ split_pair split(float x, float y) {
    const uint32_t a = __float_as_uint(x), b = __float_as_uint(y);
    return {__byte_perm(a + 0x8000u, b + 0x8000u, 0x7632), __byte_perm(a, b, 0x5410)};
}

__device__ __forceinline__ float2 join(split_pair pair) {
    const int32_t a = (int16_t)(pair.rest & 0xffffu), b = (int32_t)pair.rest >> 16;
    return make_float2(__uint_as_float((pair.high << 16) + (uint32_t)a),
                       __uint_as_float((pair.high & 0xffff0000u) + (uint32_t)b));
}

// Eight neighbours of S^ in dense form (ts_tile_cache_layer.state, state_rest).
__device__ __forceinline__ void join8(const uint4 &h, const uint4 &r, float (&x)[8]) {
    const split_pair pairs[4] = {{h.x, r.x}, {h.y, r.y}, {h.z, r.z}, {h.w, r.w}};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = join(pairs[i]);
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}

__device__ __forceinline__ void load_split8(const void *high, const int16_t *rest, int64_t at, float (&x)[8]) {
    join8(*(const uint4 *)((const uint16_t *)high + at), *(const uint4 *)(rest + at), x);
}

__device__ __forceinline__ void store_split8(void *high, int16_t *rest, int64_t at, const float (&x)[8]) {
    const split_pair a = split(x[0], x[1]), b = split(x[2], x[3]), c = split(x[4], x[5]), d = split(x[6], x[7]);
    *(uint4 *)((uint16_t *)high + at) = make_uint4(a.high, b.high, c.high, d.high);
    *(uint4 *)(rest + at) = make_uint4(a.rest, b.rest, c.rest, d.rest);
}

// Two neighbours.
__device__ __forceinline__ float2 load_split2(const void *high, const int16_t *rest, int64_t at) {
    return join({*(const uint32_t *)((const uint16_t *)high + at), *(const uint32_t *)(rest + at)});
}

__device__ __forceinline__ void store_split2(void *high, int16_t *rest, int64_t at, float x, float y) {
    const split_pair pair = split(x, y);
    *(uint32_t *)((uint16_t *)high + at) = pair.high;
    *(uint32_t *)(rest + at) = pair.rest;
}

} // namespace ts
#endif
