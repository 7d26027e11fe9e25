// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011): a pure function of key and counter, so that a
// draw depends on what it is for and on nothing that happened before it.
#ifndef TS_PHILOX_H
#define TS_PHILOX_H

#include <stdint.h>

// out[0..3] = Philox4x32-10(counter[0..3], key[0..1]).
static inline void ts_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

// Uniform in [0, 1) with 53 bits, for one draw of a request: sample index and position are the counter, with the
// request.
static inline double ts_philox_uniform(uint64_t seed, uint64_t request, uint32_t sample, uint32_t position) {
    const uint32_t counter[4] = {position, sample, (uint32_t)request, (uint32_t)(request >> 32)};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t out[4];
    ts_philox4x32(counter, key, out);
    return (double)(((uint64_t)out[0] << 32 | out[1]) >> 11) * 0x1p-53;
}

#endif
