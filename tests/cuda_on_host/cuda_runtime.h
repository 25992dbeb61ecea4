// As much of CUDA as the step kernels of csrc/cuda need, on the host: the blocks of a launch run one after
// the other, the threads of a block as coroutines that change at barriers. The indices, tables, tails,
// alignment, barriers and reductions of the kernels are tested with it where there is no GPU. A __shared__
// variable is one for all blocks.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
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
  explicit dim3(unsigned width) : x(width) {}
};
inline dim3 blockIdx, threadIdx;
using std::min;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  unsigned dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// ---- the threads of a block

inline bool backwards = false;  // the last thread runs first: a missing barrier shows

struct Block {
  static constexpr size_t kStack = 1 << 17;
  enum class At { kRunning, kWarpBarrier, kBlockBarrier, kEnd };

  explicit Block(unsigned count) : threads(count), stacks(new char[count * kStack]) {}

  void run(const std::function<void()>& kernel) {
    body = &kernel;
    current = this;
    for (unsigned i = 0; i < threads.size(); ++i) {
      threads[i].at = At::kRunning;
      getcontext(&threads[i].context);
      threads[i].context.uc_stack = {stacks.get() + i * kStack, 0, kStack};
      threads[i].context.uc_link = &scheduler;
      makecontext(&threads[i].context, &Block::start, 0);
    }
    while (step()) {
    }
  }

  // Runs every thread to its next barrier, then opens the barriers that all have reached.
  bool step() {
    bool any = false;
    const auto count = static_cast<unsigned>(threads.size());
    for (unsigned k = 0; k < count; ++k) {
      const unsigned i = backwards ? count - 1 - k : k;
      if (threads[i].at != At::kRunning) continue;
      any = true;
      threadIdx.x = i;
      swapcontext(&scheduler, &threads[i].context);
      if (threads[i].at == At::kRunning) threads[i].at = At::kEnd;
    }
    const bool block_waits = all(0, count, At::kBlockBarrier);
    for (unsigned warp = 0; warp < count; warp += 32) {
      const unsigned end = std::min(count, warp + 32);
      if (all(warp, end, At::kWarpBarrier)) open(warp, end);
    }
    if (block_waits) open(0, count);
    if (!any && !all(0, count, At::kEnd)) {
      std::fprintf(stderr, "threads wait for each other at different barriers\n");
      std::abort();
    }
    return any;
  }

  void wait(At barrier) {
    const unsigned i = threadIdx.x;
    threads[i].at = barrier;
    swapcontext(&threads[i].context, &scheduler);
    threadIdx.x = i;
  }

  // All of these threads that have not ended wait here, and there are some.
  bool all(unsigned begin, unsigned end, At place) const {
    bool some = place == At::kEnd;
    for (unsigned i = begin; i < end; ++i) {
      if (threads[i].at == place)
        some = true;
      else if (threads[i].at != At::kEnd)
        return false;
    }
    return some;
  }

  void open(unsigned begin, unsigned end) {
    for (unsigned i = begin; i < end; ++i) {
      if (threads[i].at != At::kEnd) threads[i].at = At::kRunning;
    }
  }

  static void start() { (*current->body)(); }

  struct Thread {
    ucontext_t context;
    At at = At::kEnd;
    double given = 0.0;
  };
  static inline Block* current = nullptr;
  std::vector<Thread> threads;
  std::unique_ptr<char[]> stacks;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
};

inline void __syncthreads() { Block::current->wait(Block::At::kBlockBarrier); }

inline double __shfl_xor_sync(unsigned, double x, int distance) {
  Block& block = *Block::current;
  block.threads[threadIdx.x].given = x;
  block.wait(Block::At::kWarpBarrier);
  const double got = block.threads[threadIdx.x ^ static_cast<unsigned>(distance)].given;
  block.wait(Block::At::kWarpBarrier);
  return got;
}

// ---- launches

inline int64_t launches = 0;
inline unsigned blocks_from_the_end = ~0u;  // run only so many blocks of a launch, the last ones

template <class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...),
                               const std::common_type_t<Arguments>&... arguments) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks == 0 || blocks > 0x7FFFFFFFu || threads == 0 || threads > 1024) return cudaErrorInvalidValue;
  ++launches;
  static Block block(threads);
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned i = blocks > blocks_from_the_end ? blocks - blocks_from_the_end : 0; i < blocks; ++i) {
    blockIdx.x = i;
    block.run(body);
  }
  return cudaSuccess;
}
