// How many cycles a tile load and a tile product take together at this moment, on each thread of torch's
// pool.
//
// Some processors with AMX change between a fast mode, in which loads and products overlap (16 cycles for
// both), and a slow one, in which every tile instruction waits for the one before (60 and more). A cycle is a
// third of a multiplication in a chain, which neither mode changes (additions of a constant may take none).
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace {

constexpr int kRepeats = 10, kPairs = 400, kMultiplications = 400;  // 10 x (2.5 + 0.5) us at 2.6 GHz

// Palette 1, all eight tiles of 16 rows of 64 bytes.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Configuration kConfiguration;
alignas(64) const uint8_t kTile[1024] = {};

double nanoseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

double of_a_cycle() {
  const auto start = std::chrono::steady_clock::now();
  uint64_t value = 3;
  for (int i = 0; i < kMultiplications; i += 16) {
    asm volatile(".rept 16\n\timul %0, %0\n\t.endr" : "+r"(value));
  }
  return nanoseconds_since(start) / (3 * kMultiplications);
}

double of_a_pair() {
  asm volatile("ldtilecfg %0" ::"m"(kConfiguration));
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kPairs; i += 4) {
    asm volatile(
        "tileloadd (%0,%1,1), %%tmm4\n\ttdpbssd %%tmm7, %%tmm6, %%tmm0\n\t"
        "tileloadd (%0,%1,1), %%tmm5\n\ttdpbssd %%tmm7, %%tmm6, %%tmm1\n\t"
        "tileloadd (%0,%1,1), %%tmm4\n\ttdpbssd %%tmm7, %%tmm6, %%tmm2\n\t"
        "tileloadd (%0,%1,1), %%tmm5\n\ttdpbssd %%tmm7, %%tmm6, %%tmm3" ::"r"(kTile),
        "r"(int64_t{64})
        : "memory");
  }
  const double result = nanoseconds_since(start) / kPairs;
  asm volatile("tilerelease");
  return result;
}

}  // namespace

// Asks the system for the tiles' state; 0 if it grants it.
extern "C" long amx_gate_permission() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData);
}

// Of the slowest thread. The least of several short times of each: after other work the first tile
// instructions take longer for some microseconds in either mode, and interruptions are of one time only.
extern "C" double amx_gate_cycles() {
  double most = 0;
#pragma omp parallel reduction(max : most)
  {
    double cycle = of_a_cycle(), pair = of_a_pair();
    for (int i = 1; i < kRepeats; ++i) {
      cycle = std::min(cycle, of_a_cycle());
      pair = std::min(pair, of_a_pair());
    }
    most = std::max(most, pair / cycle);
  }
  return most;
}
