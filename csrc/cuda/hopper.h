// The instructions of sm_90a that CUDA C++ has no name for, and tensor maps. tests/cuda_on_host has
// the same functions for the host, as it has those of ptx.h.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/binary_wgmma.h"

namespace quantopt {

using TensorMap = CUtensorMap;

// Describes a matrix of bytes or 16-bit numbers to the copy engine. It copies boxes of `box_rows` rows of 128
// bytes to shared memory in the layout of swizzle_128, with zeros beyond the end of the matrix. `columns`
// counts elements; `stride` is in bytes and a multiple of 16.
inline cudaError_t make_tensor_map(TensorMap& map, const void* memory, bool bytes, int64_t rows,
                                   int64_t columns, int64_t stride, int box_rows) {
  // The driver's library is not linked: machines without a GPU do not have it.
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(bytes ? kBoxBytes : kBoxBytes / 2),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = reinterpret_cast<Encode>(function)(
      &map, bytes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
      const_cast<void*>(memory), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- barriers in shared memory ----

using SharedBarrier = uint64_t;

// By one thread, before fence_barriers and a barrier of the block.
__device__ __forceinline__ void make_barrier(SharedBarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Barriers just made can be seen by the copy engine.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(SharedBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and this phase ends no sooner than copies have brought `bytes`.
__device__ __forceinline__ void arrive_and_expect(SharedBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void wait_phase(SharedBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- copies ----

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Starts to copy the box at this column (of elements) and row; `barrier` is told of its bytes.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int column, int row,
                                         SharedBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// ---- warpgroups ----

// Called by all four warps of a warpgroup alike.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Waits for the 128 threads of a warpgroup; `id` 1..15 is that group's.
__device__ __forceinline__ void warpgroup_barrier(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// The operand in shared memory that begins at this address.
__device__ __forceinline__ uint64_t operand_descriptor(const void* shared) {
  return swizzled_descriptor(shared_address(shared));
}

// Before the first product, and when registers that products read or add to have been written.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of the products so far.
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most the last `Groups` groups are under way.
template <int Groups>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}
// Keeps the compiler from moving sums across a wait.
template <class Number, int kCount>
__device__ __forceinline__ void keep_in_place(Number (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(Number) == 4 && Number(0.5f) == Number(0)) {
      asm volatile("" : "+r"(c[i])::"memory");
    } else {
      asm volatile("" : "+f"(c[i])::"memory");
    }
  }
}

// c += A B for the warpgroup: A 64 x k of registers, B k x n in shared memory, each column's k side by side.
#define QUANTOPT_4(C, f, i) C(f[i]), C(f[i + 1]), C(f[i + 2]), C(f[i + 3])
#define QUANTOPT_16(C, f, i) \
  QUANTOPT_4(C, f, i), QUANTOPT_4(C, f, i + 4), QUANTOPT_4(C, f, i + 8), QUANTOPT_4(C, f, i + 12)
#define QUANTOPT_R(x) "+r"(x)
#define QUANTOPT_F(x) "+f"(x)
#define QUANTOPT_WGMMA(name, depth, types, Number, C, rest)                                             \
  __device__ __forceinline__ void name(Number(&c)[32], const uint32_t (&a)[4], uint64_t b) {            \
    asm volatile(                                                                                       \
        "wgmma.mma_async.sync.aligned.m64n64" depth types                                               \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, " rest \
        : QUANTOPT_16(C, c, 0), QUANTOPT_16(C, c, 16)                                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
  }                                                                                                     \
  __device__ __forceinline__ void name(Number(&c)[64], const uint32_t (&a)[4], uint64_t b) {            \
    asm volatile(                                                                                       \
        "wgmma.mma_async.sync.aligned.m64n128" depth types                                              \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "    \
        "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "    \
        "%56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, " rest                     \
        : QUANTOPT_16(C, c, 0), QUANTOPT_16(C, c, 16), QUANTOPT_16(C, c, 32), QUANTOPT_16(C, c, 48)     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
  }
QUANTOPT_WGMMA(wgmma_s8, "k32", ".s32.s8.s8 ", int32_t, QUANTOPT_R, "1;")
QUANTOPT_WGMMA(wgmma_bf16, "k16", ".f32.bf16.bf16 ", float, QUANTOPT_F, "1, 1, 1, 0;")
QUANTOPT_WGMMA(wgmma_f16, "k16", ".f32.f16.f16 ", float, QUANTOPT_F, "1, 1, 1, 0;")
#undef QUANTOPT_WGMMA
#undef QUANTOPT_F
#undef QUANTOPT_R
#undef QUANTOPT_16
#undef QUANTOPT_4

}  // namespace quantopt
