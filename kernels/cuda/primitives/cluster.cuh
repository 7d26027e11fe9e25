// How the blocks of a cluster hand bytes to each other (sm_90): into the other's shared memory, counted by the mbarrier
// there.
//
// A receiver announces with expect_bytes how many bytes a phase brings; the phase ends when that many have come. Bytes
// may come before they are announced, but nobody may run two phases ahead of somebody who waits.
#ifndef TS_CUDA_CLUSTER_CUH
#define TS_CUDA_CLUSTER_CUH

#include <stdint.h>

namespace ts {

__device__ __forceinline__ uint32_t in_block(uint32_t address, int block) {
    uint32_t r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(block));
    return r;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Kept where it is: the compiler would rather read threadIdx again and wait for it.
__device__ __forceinline__ int lane_id() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// One lane of a whole warp.
__device__ __forceinline__ bool elect() {
    uint32_t is_elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is_elected));
    return is_elected;
}

// n: arrivals that end a phase.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n) : "memory");
}

__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t n) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool phase_ended(uint32_t barrier, int parity) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

// Lanes may see the phase end at different times; the warp goes on as one.
__device__ __forceinline__ void wait_phase(uint32_t barrier, int parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
    __syncwarp();
}

__device__ __forceinline__ void send(uint32_t to, uint32_t x, uint32_t y, uint32_t z, uint32_t w, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
        : "memory");
}

// Without a branch.
__device__ __forceinline__ void send_where(bool valid, uint32_t to, const uint32_t (&x)[4], uint32_t barrier) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "@p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n}" ::"r"(
            to),
        "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(barrier), "r"((int)valid)
        : "memory");
}

__device__ __forceinline__ void send(uint32_t to, uint32_t x, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(x),
                 "r"(barrier)
                 : "memory");
}

} // namespace ts
#endif
