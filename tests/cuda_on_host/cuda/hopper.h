// The functions of csrc/cuda/hopper.h on the host, after PTX's documentation ("Asynchronous warpgroup level
// matrix", "Tensors", "mbarrier"). What is asynchronous happens as late as it may: a box is copied when a
// thread waits for its barrier, a product is computed when its warpgroup waits for its group; until then its
// fragments must not change, nor the stage that it reads.
#pragma once

#include <cuda_runtime.h>

#include "cuda/binary_wgmma.h"
#include "cuda/ptx.h"

namespace quantopt {

// ---- tensor maps ----

struct TensorMap {
  const uint8_t* memory;
  int element;
  int64_t rows, columns, stride;
  int box_rows;
};

inline cudaError_t make_tensor_map(TensorMap& map, const void* memory, bool bytes, int64_t rows,
                                   int64_t columns, int64_t stride, int box_rows) {
  map = {static_cast<const uint8_t*>(memory), bytes ? 1 : 2, rows, columns, stride, box_rows};
  const bool good = reinterpret_cast<uintptr_t>(memory) % 16 == 0 && stride % 16 == 0 && stride > 0 &&
                    stride >= columns * map.element && rows > 0 && columns > 0 && rows <= INT64_C(1) << 32 &&
                    columns <= INT64_C(1) << 32 && stride < INT64_C(1) << 40 && box_rows > 0 &&
                    box_rows <= 256;
  return good ? cudaSuccess : cudaErrorInvalidValue;
}
inline void prefetch_map(const TensorMap&) {}

// Addresses in shared memory as the copy engine and the tensor cores use them.
inline uint8_t* shared_base() {
  uint8_t* const memory = emulator::block().memory;
  return memory - reinterpret_cast<uintptr_t>(memory) % 1024;
}
// Units of 16 bytes in 128, by the number of these modulo 8.
inline uint8_t* at_swizzled(uint8_t* base, uint32_t address) {
  const uint32_t unit = address / 16 % 8, row = address / 128;
  return base + row * 128 + (unit ^ (row % 8)) * 16 + address % 16;
}

// ---- barriers ----

using SharedBarrier = uint64_t;

struct Barrier {
  uint8_t arrivals, pending;
  uint8_t made, phase;
  int32_t bytes;  // that are still to come
};
static_assert(sizeof(Barrier) == sizeof(SharedBarrier));
inline Barrier& at_barrier(SharedBarrier* barrier) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) emulator::fail("a barrier that is not aligned");
  return *reinterpret_cast<Barrier*>(barrier);
}

struct Box {
  SharedBarrier* barrier;
  uint8_t *base, *to;
  const TensorMap* map;
  int column, row;
};
inline std::vector<Box> boxes;  // under way

inline void make_barrier(SharedBarrier* barrier, int arrivals) {
  at_barrier(barrier) = {static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 42, 0, 0};
}
inline void fence_barriers() {}

inline void copy(const Box& box) {
  const TensorMap& map = *box.map;
  const int64_t width = 128 / map.element;
  const auto first = static_cast<uint32_t>(box.to - box.base);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int64_t k = 0; k < width; ++k) {
      const int64_t row = box.row + r, column = box.column + k;
      const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
      const uint8_t* const from = map.memory + row * map.stride + column * map.element;
      for (int byte = 0; byte < map.element; ++byte) {
        *at_swizzled(box.base, first + static_cast<uint32_t>(r * 128 + k * map.element + byte)) =
            inside ? from[byte] : uint8_t{0};
      }
    }
  }
}

inline void end_phase_if_complete(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.arrivals;
}
inline void arrive(SharedBarrier* barrier) {
  Barrier& b = at_barrier(barrier);
  if (b.made != 42 || b.pending == 0) emulator::fail("an arrival too many, or at no barrier");
  --b.pending;
  ++emulator::progress;
  end_phase_if_complete(b);
}
inline void arrive_and_expect(SharedBarrier* barrier, int bytes) {
  at_barrier(barrier).bytes += bytes;
  arrive(barrier);
}
inline void wait_phase(SharedBarrier* barrier, uint32_t parity) {
  Barrier& b = at_barrier(barrier);
  if (b.made != 42) emulator::fail("a wait at no barrier");
  while (b.phase == parity) {
    if (b.pending == 0) {  // but bytes are still to come
      for (size_t i = 0; i < boxes.size();) {
        if (boxes[i].barrier != barrier) {
          ++i;
          continue;
        }
        copy(boxes[i]);
        b.bytes -= 128 * boxes[i].map->box_rows;
        boxes.erase(boxes.begin() + static_cast<std::ptrdiff_t>(i));
        ++emulator::progress;
      }
      end_phase_if_complete(b);
      if (b.phase != parity) return;
    }
    emulator::yield();
  }
}

inline void copy_box(void* shared, const TensorMap& map, int column, int row, SharedBarrier* barrier) {
  auto* const to = static_cast<uint8_t*>(shared);
  if ((to - shared_base()) % 1024 != 0) emulator::fail("a swizzled box that does not begin at 1024 bytes");
  boxes.push_back({barrier, shared_base(), to, &map, column, row});
}

// ---- warpgroups ----

inline emulator::Barrier of_warpgroup[emulator::kThreads / 128];
inline emulator::Barrier& my_warpgroup() { return of_warpgroup[emulator::current / 128]; }

template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::meet(my_warpgroup(), 128, [] {});
}
template <int kRegisters>
void take_registers() {
  give_registers<kRegisters>();
}
inline void warpgroup_barrier(int) {
  emulator::meet(my_warpgroup(), 128, [] {});
}

// ---- products ----

inline uint64_t operand_descriptor(const void* shared) {
  return swizzled_descriptor(static_cast<uint32_t>(static_cast<const uint8_t*>(shared) - shared_base()));
}

struct Product {
  void* c;
  int count;  // of numbers in c
  const uint32_t* a;
  uint32_t issued[4];
  uint64_t b;
  uint8_t* base;
  int group;
  void (*run)(const Product* const* lanes);
};
inline std::vector<Product> products[emulator::kThreads];
inline int product_group[emulator::kThreads];

// Of the four warps' lanes. Warp q has rows 16 q on.
template <class Of, class Wide, class Number>
void run_product(const Product* const* lanes) {
  constexpr int kDepth = 8 * Of::kPer, kSize = 4 / Of::kPer;
  const Product& first = *lanes[0];
  const int tokens = 2 * first.count;
  static Wide left[64][kDepth], right[256][kDepth];
  for (int lane = 0; lane < 128; ++lane) {
    const Product& p = *lanes[lane];
    if (p.b != first.b || p.count != first.count) emulator::fail("warps multiply by different operands");
    if (std::memcmp(p.a, p.issued, sizeof p.issued) != 0) emulator::fail("a fragment has changed too early");
    const int row = lane / 32 * 16 + lane % 32 / 4, t = lane % 4;
    for (int i = 0; i < Of::kPer; ++i) {
      const int k = Of::kPer * t + i;
      left[row][k] = Of::at(p.issued[0], i);
      left[row + 8][k] = Of::at(p.issued[1], i);
      left[row][k + kDepth / 2] = Of::at(p.issued[2], i);
      left[row + 8][k + kDepth / 2] = Of::at(p.issued[3], i);
    }
  }
  const auto start = static_cast<uint32_t>(first.b & 0x3FFF) << 4;
  const auto eight_rows = static_cast<uint32_t>(first.b >> 32 & 0x3FFF) << 4;
  if (first.b >> 62 != 1 || (first.b >> 49 & 7) != 0)
    emulator::fail("not a descriptor of swizzled rows of 128 bytes");
  for (int token = 0; token < tokens; ++token) {
    for (int k = 0; k < kDepth; k += Of::kPer) {
      const uint32_t address = start + static_cast<uint32_t>(token) / 8 * eight_rows +
                               static_cast<uint32_t>(token) % 8 * 128 + static_cast<uint32_t>(k * kSize);
      uint32_t word;
      std::memcpy(&word, at_swizzled(first.base, address), 4);
      for (int i = 0; i < Of::kPer; ++i) right[token][k + i] = Of::at(word, i);
    }
  }
  for (int lane = 0; lane < 128; ++lane) {
    auto* const c = static_cast<Number*>(lanes[lane]->c);
    for (int i = 0; i < first.count; ++i) {
      const int row = lane / 32 * 16 + lane % 32 / 4 + (i % 4 >= 2 ? 8 : 0);
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      Wide sum = c[i];
      for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[token][k];
      c[i] = static_cast<Number>(sum);
    }
  }
}

inline void products_fence() {}
inline void products_commit() { ++product_group[emulator::current]; }
template <int Groups>
void products_wait() {
  emulator::meet(my_warpgroup(), 128, [] {
    const int first = emulator::current / 128 * 128;
    const size_t count = products[first].size();
    for (int i = first; i < first + 128; ++i) {
      if (products[i].size() != count || product_group[i] != product_group[first]) {
        emulator::fail("warps of a warpgroup multiply differently");
      }
    }
    size_t done = 0;
    for (; done < count && products[first][done].group < product_group[first] - Groups; ++done) {
      const Product* lanes[128];
      for (int i = 0; i < 128; ++i) lanes[i] = &products[first + i][done];
      lanes[0]->run(lanes);
    }
    for (int i = first; i < first + 128; ++i) {
      products[i].erase(products[i].begin(), products[i].begin() + static_cast<std::ptrdiff_t>(done));
    }
  });
}
template <class Number, int kCount>
void keep_in_place(Number (&)[kCount]) {}

template <class Of, class Wide, class Number, int kCount>
void wgmma(Number (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {
  const int i = emulator::current;
  products[i].push_back({c,
                         kCount,
                         a,
                         {a[0], a[1], a[2], a[3]},
                         b,
                         shared_base(),
                         product_group[i],
                         run_product<Of, Wide, Number>});
}
template <int kCount>
void wgmma_s8(int32_t (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {
  wgmma<OfInt8, int32_t>(c, a, b);
}
template <int kCount>
void wgmma_bf16(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {
  wgmma<OfBFloat16, double>(c, a, b);
}
template <int kCount>
void wgmma_f16(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {
  wgmma<OfHalf, double>(c, a, b);
}

}  // namespace quantopt
