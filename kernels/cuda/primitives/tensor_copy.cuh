// Boxes of 64 columns of a bf16 matrix between global memory and panels (matrix.cuh) by the copy engine (sm_90): one
// thread asks for a whole box, and addresses and swizzle cost no instructions.
#ifndef TS_CUDA_TENSOR_COPY_CUH
#define TS_CUDA_TENSOR_COPY_CUH

#include "kernels/cuda/primitives/cluster.cuh"
#include "kernels/cuda/primitives/matrix.cuh"

#include <cuda.h>

namespace ts {

// `encode` is the driver's cuTensorMapEncodeTiled. Rows begin at multiples of 16 bytes; stride in elements. Boxes of
// fewer columns than a panel lie row after row, without a swizzle.
inline bool tensor_map_create(CUtensorMap *map, void *encode, const void *data, int64_t rows, int64_t cols,
                              int64_t stride, int box_rows, int box_cols = kPanelCols) {
    const cuuint64_t sizes[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)stride * 2};
    const cuuint32_t box[2] = {(cuuint32_t)box_cols, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    const CUtensorMapSwizzle swizzle = box_cols == kPanelCols ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
    return ((decltype(&cuTensorMapEncodeTiled))encode)(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)data, sizes,
                                                       strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The box whose first element is [row][column]; the barrier counts its bytes.
__device__ __forceinline__ void tensor_load(uint32_t panel, const CUtensorMap &map, int column, int row,
                                            uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(panel),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// Of what was written and published before.
__device__ __forceinline__ void tensor_store(const CUtensorMap &map, int column, int row, uint32_t panel) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
                 "cp.async.bulk.commit_group;" ::"l"(&map),
                 "r"(column), "r"(row), "r"(panel)
                 : "memory");
}

// This thread's stores have read shared memory.
__device__ __forceinline__ void tensor_store_wait() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

} // namespace ts
#endif
