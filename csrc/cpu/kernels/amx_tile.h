// The tile registers of AMX: eight matrices of up to 16 rows of 64 bytes, and the int8 product on them.
//
// Two implementations: the instructions, and with QUANTOPT_AMX_EMULATED their architectural meaning in plain
// C++, by which tests/amx_on_host runs the kernels on processors without AMX. The instructions are inline
// assembly: gcc 12's _tile_loadconfig declares that it reads 8 bytes, so that stores to the other 56 can be
// dropped, and its other intrinsics take register numbers as text only.
#pragma once

#include <cstdint>
#include <cstring>

namespace quantopt {

// The operand of ldtilecfg, palette 1.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void shape(int tile, int64_t row_count, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(row_count);
    row_bytes[tile] = static_cast<uint16_t>(row_count > 0 ? bytes : 0);
  }
};
static_assert(sizeof(TileConfig) == 64);

namespace {  // one set per translation unit

#if !defined(QUANTOPT_AMX_EMULATED)

inline void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
inline void tile_release() { asm volatile("tilerelease"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows of the tile from memory, `stride` bytes apart.
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
// C[m][n] += sum_k sum_{j<4} A[m][4 k + j] B[k][4 n + j]: signed bytes, 32-bit sums.
template <int C, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

struct TileState {
  TileConfig config;
  bool configured = false;
  const char* fault = nullptr;  // the first breach of the rules, for which the processor raises #UD or #GP
  uint8_t tile[8][16][64];
};
inline TileState& tiles() {
  static thread_local TileState state;
  return state;
}
inline bool tile_valid(int t) {
  TileState& s = tiles();
  const bool valid = s.configured && s.config.rows[t] > 0;
  if (!valid && s.fault == nullptr) s.fault = "a tile that is not configured";
  return valid;
}

inline void tile_configure(const TileConfig& config) {
  TileState& s = tiles();
  s.config = config;
  s.configured = true;
  std::memset(s.tile, 0, sizeof s.tile);
  bool legal = config.palette == 1 && config.start_row == 0;
  for (const uint8_t byte : config.reserved) legal = legal && byte == 0;
  for (int t = 0; t < 16; ++t) {
    legal = legal && config.rows[t] <= 16 && config.row_bytes[t] <= 64;
    legal = legal && (config.rows[t] == 0) == (config.row_bytes[t] == 0);
    legal = legal && (t < 8 || config.rows[t] == 0);
  }
  if (!legal && s.fault == nullptr) s.fault = "an illegal configuration";
}
inline void tile_release() { tiles().configured = false; }

template <int T>
inline void tile_zero() {
  if (tile_valid(T)) std::memset(tiles().tile[T], 0, sizeof tiles().tile[T]);
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  if (!tile_valid(T)) return;
  TileState& s = tiles();
  std::memset(s.tile[T], 0, sizeof s.tile[T]);
  for (int r = 0; r < s.config.rows[T]; ++r) {
    std::memcpy(s.tile[T][r], static_cast<const uint8_t*>(from) + r * stride, s.config.row_bytes[T]);
  }
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  if (!tile_valid(T)) return;
  TileState& s = tiles();
  for (int r = 0; r < s.config.rows[T]; ++r) {
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, s.tile[T][r], s.config.row_bytes[T]);
  }
}
template <int C, int A, int B>
inline void tile_multiply() {
  if (!tile_valid(C) || !tile_valid(A) || !tile_valid(B)) return;
  TileState& s = tiles();
  const TileConfig& f = s.config;
  const bool fits = f.rows[C] == f.rows[A] && f.row_bytes[A] == 4 * f.rows[B] &&
                    f.row_bytes[C] == f.row_bytes[B] && C != A && C != B && A != B;
  if (!fits) {
    if (s.fault == nullptr) s.fault = "tiles of shapes that do not fit, or one twice";
    return;
  }
  for (int m = 0; m < f.rows[C]; ++m) {
    for (int k = 0; k < f.rows[B]; ++k) {
      for (int n = 0; n < f.row_bytes[B] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, s.tile[C][m] + 4 * n, 4);
        for (int j = 0; j < 4; ++j) {
          sum += static_cast<int8_t>(s.tile[A][m][4 * k + j]) * static_cast<int8_t>(s.tile[B][k][4 * n + j]);
        }
        std::memcpy(s.tile[C][m] + 4 * n, &sum, 4);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace quantopt
