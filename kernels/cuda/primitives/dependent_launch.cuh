// Kernels that begin before the kernel in front of them on the stream has ended (programmatic dependent launch, sm_90).
//
// What a kernel does before wait_for_front may only read, and only what the kernel in front does not write: every
// kernel lets the next begin after its own wait, so all before the one in front have ended by then. A kernel that does
// not keep to that says why it may, and waits before it ends.
#ifndef TS_CUDA_DEPENDENT_LAUNCH_CUH
#define TS_CUDA_DEPENDENT_LAUNCH_CUH

#include <cuda_runtime.h>
#include <stdint.h>

namespace ts {

// The kernels in front have ended and what they wrote is there. At once where the launch was an ordinary one.
__device__ __forceinline__ void wait_for_front() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin once every block has said so.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both, once a kernel needs what those in front wrote.
__device__ __forceinline__ void follow_front() {
    wait_for_front();
    let_next_begin();
}

// A flag in device memory by which a block of the kernel in front hands on what it wrote: raised by one thread after a
// barrier of its block, awaited by one thread before a barrier of the other.
__device__ __forceinline__ void raise_flag(uint32_t *flag) {
    asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

__device__ __forceinline__ void await_flag(const uint32_t *flag) {
    for (;;) {
        uint32_t is_raised;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(is_raised) : "l"(flag) : "memory");
        if (is_raised)
            break;
        __nanosleep(100);
    }
}

// A launch with up to two attributes.
struct launch_config {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config;

    launch_config(dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream) : attributes(), config() {
        config.gridDim = grid;
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream;
        config.attrs = attributes;
    }
    // For kernels that wait_for_front, on sm_90.
    void begin_early() {
        cudaLaunchAttribute &a = attributes[config.numAttrs++];
        a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        a.val.programmaticStreamSerializationAllowed = 1;
    }
    void in_clusters(unsigned n_blocks) {
        cudaLaunchAttribute &a = attributes[config.numAttrs++];
        a.id = cudaLaunchAttributeClusterDimension;
        a.val.clusterDim.x = n_blocks;
        a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
};

// Launches a kernel that waits for the one in front; early: on sm_90. An error is the last error, too.
template <typename... P, typename... A>
cudaError_t launch_following(bool early, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared_bytes,
                             cudaStream_t stream, const A &...args) {
    launch_config l(grid, threads, shared_bytes, stream);
    if (early)
        l.begin_early();
    return cudaLaunchKernelEx(&l.config, kernel, args...);
}

} // namespace ts
#endif
