// The functions of csrc/cuda/ptx.h on the host, after PTX's documentation ("Matrix fragments for
// mma.m16n8k16" and "mma.m16n8k32"): lane 4 g + t holds, of A, rows g and g + 8 of columns from t * (4 bytes)
// and from 16 bytes further; of B the same of its columns; of C rows g and g + 8, columns 2 t and 2 t + 1.
#pragma once

#include <cuda_runtime.h>

namespace quantopt {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline float to_float(Half x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
}
inline void from_float(float x, float& result) { result = x; }
inline void from_float(float x, BFloat16& result) {
  const uint32_t bits = __float_as_uint(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  result.bits = static_cast<uint16_t>(nan ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, Half& result) {
  const auto half = static_cast<_Float16>(x);
  std::memcpy(&result, &half, sizeof half);
}

inline uint4* dynamic_shared() { return reinterpret_cast<uint4*>(emulator::block().memory); }

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
    emulator::fail("16 bytes at an address that is no multiple of 16");
}

inline uint4 load_streaming(const void* from) {
  check_aligned(from);
  return *static_cast<const uint4*>(from);
}

inline void copy_async(void* shared, const void* from, bool inside = true) {
  check_aligned(shared);
  check_aligned(from);
  emulator::Thread& thread = emulator::threads[emulator::current];
  thread.copies.push_back({shared, from, inside, thread.group});
}
inline void copy_async_commit() { ++emulator::threads[emulator::current].group; }
template <int Groups>
inline void copy_async_wait() {
  emulator::Thread& thread = emulator::threads[emulator::current];
  size_t ready = 0;
  for (; ready < thread.copies.size() && thread.copies[ready].group < thread.group - Groups; ++ready) {
    const emulator::Copy& copy = thread.copies[ready];
    if (copy.inside) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(ready));
}

inline void cluster_barrier() {
  emulator::meet(emulator::of_cluster, emulator::alive, [] {});
}
template <class T>
inline T load_from_block(const T* here, int rank) {
  if (emulator::blocks[rank].alive == 0) emulator::fail("memory of a block that has ended");
  const auto offset = reinterpret_cast<const uint8_t*>(here) - emulator::block().memory;
  T value;
  std::memcpy(&value, emulator::blocks[rank].memory + offset, sizeof value);
  return value;
}

inline void start_next_kernel() {}
inline void wait_for_previous_kernel() {}

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

inline int32_t dot4(uint32_t a, uint32_t b, int32_t sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int32_t>(a >> (8 * i) & 0xFF) * static_cast<int8_t>(b >> (8 * i) & 0xFF);
  }
  return sum;
}

// Element i of a register.
struct OfBFloat16 {
  static constexpr int kPer = 2;
  static float at(uint32_t r, int i) { return to_float(BFloat16{static_cast<uint16_t>(r >> (16 * i))}); }
};
struct OfHalf {
  static constexpr int kPer = 2;
  static float at(uint32_t r, int i) { return to_float(Half{static_cast<uint16_t>(r >> (16 * i))}); }
};
struct OfInt8 {
  static constexpr int kPer = 4;
  static int32_t at(uint32_t r, int i) { return static_cast<int8_t>(r >> (8 * i)); }
};

template <class Of, class Wide, class Number>
void mma(Number (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Lane mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {}};
  std::memcpy(mine.c, c, sizeof c);
  mine = emulator::warp_operation(mine, [](emulator::Lane* lanes) {
    constexpr int kDepth = 8 * Of::kPer;
    Wide left[16][kDepth], right[8][kDepth];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < Of::kPer; ++i) {
        const int k = Of::kPer * t + i;
        left[g][k] = Of::at(lanes[lane].a[0], i);
        left[g + 8][k] = Of::at(lanes[lane].a[1], i);
        left[g][k + kDepth / 2] = Of::at(lanes[lane].a[2], i);
        left[g + 8][k + kDepth / 2] = Of::at(lanes[lane].a[3], i);
        right[g][k] = Of::at(lanes[lane].b[0], i);
        right[g][k + kDepth / 2] = Of::at(lanes[lane].b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        Number result;
        std::memcpy(&result, &lanes[lane].c[i], 4);
        Wide sum = result;
        for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[column][k];
        result = static_cast<Number>(sum);
        std::memcpy(&lanes[lane].c[i], &result, 4);
      }
    }
  });
  std::memcpy(c, mine.c, sizeof c);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<OfBFloat16, double>(c, a, b0, b1);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<OfHalf, double>(c, a, b0, b1);
}
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<OfInt8, int32_t>(c, a, b0, b1);
}

}  // namespace quantopt
