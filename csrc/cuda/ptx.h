// The instructions that CUDA C++ has no name for. tests/cuda_on_host has the same functions for the
// host, after PTX's documentation: a test compiles the kernels with that header in place of this one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quantopt {

// ---- 16-bit floats, as their bits ----

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(Half x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
__device__ __forceinline__ void from_float(float x, float& result) { result = x; }
__device__ __forceinline__ void from_float(float x, BFloat16& result) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
}
__device__ __forceinline__ void from_float(float x, Half& result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
}

// ---- memory ----

// The shared memory that the launch asked for.
__device__ __forceinline__ uint4* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

// 16 bytes that no one reads again soon.
__device__ __forceinline__ uint4 load_streaming(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Starts to copy 16 bytes to shared memory past the first-level cache; zeros instead if not `inside`.
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool inside = true) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
// Closes the group of this thread's copies so far.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last `Groups` groups of this thread are under way.
template <int Groups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// ---- clusters of blocks, from sm_90 on ----

// Waits for all threads of the cluster; what they wrote can be read.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#endif
}
// What the cluster's block of this rank has where this one has `here`, in shared memory; 4 bytes.
template <class T>
__device__ __forceinline__ T load_from_block(const T* here, int rank) {
  static_assert(sizeof(T) == 4);
  uint32_t value = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t there;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(here));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
#endif
  T result;
  memcpy(&result, &value, sizeof result);
  return result;
}

// ---- overlap of kernels, from sm_90 on: before that a kernel starts when the last has ended ----

// Lets the next kernel start if it was launched to overlap.
__device__ __forceinline__ void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernel before has ended and what it wrote can be read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- products ----

// (a & b) | c as one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// sum + the products of the four unsigned bytes of a and the four signed ones of b.
__device__ __forceinline__ int32_t dot4(uint32_t a, uint32_t b, int32_t sum) {
  int32_t result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
  return result;
}

// c += A B for the warp: A 16 x k by rows, B k x 8 by columns, c 16 x 8, in the fragments of mma.sync.
#define QUANTOPT_MMA(name, shape, types, Number, constraint)                                              \
  __device__ __forceinline__ void name(Number(&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned." shape ".row.col." types                                                       \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                \
        : "+" constraint(c[0]), "+" constraint(c[1]), "+" constraint(c[2]), "+" constraint(c[3])          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                  \
  }
QUANTOPT_MMA(mma_bf16, "m16n8k16", "f32.bf16.bf16.f32", float, "f")
QUANTOPT_MMA(mma_f16, "m16n8k16", "f32.f16.f16.f32", float, "f")
QUANTOPT_MMA(mma_s8, "m16n8k32", "s32.s8.s8.s32", int32_t, "r")
#undef QUANTOPT_MMA

}  // namespace quantopt
