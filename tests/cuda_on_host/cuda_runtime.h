// The part of CUDA that the kernels of csrc/cuda need, on the host. The blocks of a launch, or its clusters
// of blocks, run one after the other. The threads of a block are coroutines with separate stacks: each runs
// from one barrier or warp-wide operation to the next. Dynamic shared memory is filled with nonsense before
// every block and ends at a guard page; a __shared__ variable is one for all blocks. An asynchronous copy to
// shared memory happens when its thread waits for it, as late as it may. Only x86-64.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline dim3 blockIdx, threadIdx, blockDim, gridDim;

using std::max;
using std::min;
inline float __uint_as_float(uint32_t x) {
  float result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}

// ---- threads ----

extern "C" void switch_stack(void** leave, void* enter);
asm(R"(
.text
.weak switch_stack
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulator {

constexpr size_t kStack = 128 << 10;
constexpr int kCluster = 8, kThreads = 384 * kCluster;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the host: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  bool inside;
  int group;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Thread {
  uint8_t* stack = nullptr;
  void* pointer = nullptr;
  bool done = true;
  std::vector<Copy> copies;
  int group = 0;  // of copies, the one that is open
};

// A block of the cluster that runs; a block alone is a cluster of one.
struct Block {
  Barrier barrier;
  int alive = 0;
  uint8_t* memory = nullptr;  // dynamic shared
  uint8_t* area = nullptr;    // where it lies
};

inline Thread threads[kThreads];  // of the blocks one after the other
inline Block blocks[kCluster];
inline void* scheduler;
inline int current, size, alive;  // the thread that runs, threads of a block, threads left of the cluster
inline Barrier of_cluster, of_warp[kThreads / 32];
inline int64_t progress;
inline bool backwards = false;  // the threads of a block run in the other order
inline std::function<void()> body;

inline Block& block() { return blocks[current / size]; }

inline void yield() { switch_stack(&threads[current].pointer, scheduler); }

// Waits for all `members`; the last to arrive calls `complete`.
template <class Complete>
void meet(Barrier& barrier, int members, const Complete& complete) {
  if (++barrier.arrived == members) {
    complete();
    barrier.arrived = 0;
    ++barrier.generation;
    ++progress;
    return;
  }
  const int generation = barrier.generation;
  while (barrier.generation == generation) yield();
}

// What the lanes of a warp bring to an operation, and take from it.
struct Lane {
  uint32_t a[4], b[2], c[4];
};
inline Lane lanes[kThreads / 32][32];

template <class Operation>
Lane warp_operation(const Lane& mine, const Operation& operation) {
  const int warp = current / 32;
  if (size % 32 != 0) fail("a warp-wide operation in a block of broken warps");
  lanes[warp][current % 32] = mine;
  meet(of_warp[warp], 32, [&] { operation(lanes[warp]); });
  return lanes[warp][current % 32];
}

inline void start() {
  body();
  threads[current].done = true;
  --alive;
  --block().alive;
  ++progress;
  if (block().barrier.arrived != 0 && block().barrier.arrived == block().alive) {
    fail("threads left while others wait for them");
  }
  yield();
}

// `count` blocks from blockIdx on, side by side along z.
inline void run_cluster(int threads_each, int count, size_t shared) {
  size = threads_each;
  alive = size * count;
  of_cluster = {};
  const size_t pages = (shared + 4095) / 4096 * 4096;
  for (int b = 0; b < count; ++b) {
    blocks[b] = {{}, size, nullptr, nullptr};
    blocks[b].area = static_cast<uint8_t*>(
        mmap(nullptr, pages + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(blocks[b].area + pages, 4096, PROT_NONE);
    blocks[b].memory = blocks[b].area + pages - shared;
    std::memset(blocks[b].area, 0xFF, pages);
  }
  for (int i = 0; i < size * count; ++i) {
    Thread& t = threads[i];
    if (t.stack == nullptr) t.stack = static_cast<uint8_t*>(std::malloc(kStack));
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(t.stack + kStack) / 16 * 16);
    *--top = nullptr;  // where a call would have left its return address
    *--top = reinterpret_cast<void*>(&start);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    t.pointer = top;
    t.done = false;
    t.copies.clear();
    t.group = 0;
    if (i % 32 == 0) of_warp[i / 32] = {};
  }
  const unsigned first = blockIdx.z;
  while (alive > 0) {
    const int64_t before = progress;
    for (int i = 0; i < size * count; ++i) {
      // Every other block runs its last thread first: a missing barrier shows.
      const bool forward = (blockIdx.x % 2 == 0) != backwards;
      current = forward ? i : size * count - 1 - i;
      if (threads[current].done) continue;
      threadIdx.x = static_cast<unsigned>(current % size);
      blockIdx.z = first + static_cast<unsigned>(current / size);
      switch_stack(&scheduler, threads[current].pointer);
    }
    if (progress == before) fail("the threads of a block wait for each other");
  }
  blockIdx.z = first;
  for (int b = 0; b < count; ++b) munmap(blocks[b].area, pages + 4096);
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::meet(emulator::block().barrier, emulator::block().alive, [] {});
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  emulator::Lane lane{};
  static_assert(sizeof value <= sizeof lane.a);
  std::memcpy(lane.a, &value, sizeof value);
  lane = emulator::warp_operation(lane, [mask](emulator::Lane* lanes) {
    for (int i = 0; i < 32; ++i) std::memcpy(lanes[i].c, lanes[i ^ mask].a, sizeof value);
  });
  std::memcpy(&value, lane.c, sizeof value);
  return value;
}

// ---- launching ----

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline size_t allowed_shared = 48 << 10, most_shared = 163 << 10;  // the latter of sm_80
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > most_shared) return cudaErrorInvalidValue;
  allowed_shared = static_cast<size_t>(bytes);
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline int64_t launches = 0;
inline unsigned last_blocks = ~0u;  // of each launch so many run, along x

template <class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...),
                               const std::common_type_t<Arguments>&... arguments) {
  static_assert((sizeof(Arguments) + ...) <= 32764, "kernel arguments");
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 || grid.y > 0xFFFFu || grid.z == 0 ||
      grid.z > 0xFFFFu || block.x == 0 || block.x > 1024 || config->dynamicSmemBytes > allowed_shared) {
    return cudaErrorInvalidValue;
  }
  allowed_shared = 48 << 10;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = config->attrs[i].val.clusterDim;
    if (size.x != 1 || size.y != 1 || size.z > emulator::kCluster || grid.z % size.z != 0) {
      return cudaErrorInvalidValue;
    }
    cluster = size.z;
  }
  if (block.x * cluster > emulator::kThreads) return cudaErrorInvalidValue;
  ++launches;
  gridDim = grid;
  blockDim = block;
  emulator::body = [&] { kernel(arguments...); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z += cluster) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = grid.x - min(grid.x, last_blocks); blockIdx.x < grid.x; ++blockIdx.x) {
        emulator::run_cluster(static_cast<int>(block.x), static_cast<int>(cluster), config->dynamicSmemBytes);
      }
    }
  }
  return cudaSuccess;
}
