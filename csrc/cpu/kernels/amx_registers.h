// The tile registers of AMX: eight matrices of up to 16 rows of 64 bytes, and the products on them.
//
// Two implementations: the instructions, and with QUANTOPT_AMX_EMULATED their architectural meaning in plain
// C++, by which tests/amx_on_host runs the kernels on processors without AMX. The instructions are inline
// assembly: gcc 12's _tile_loadconfig declares that it reads 8 bytes, so that stores to the other 56 can be
// dropped, and its other intrinsics take register numbers as text only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace quantopt {

// The operand of ldtilecfg, palette 1.
struct alignas(64) AmxConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void shape(int index, int64_t row_count, int64_t bytes) {
    rows[index] = static_cast<uint8_t>(row_count);
    row_bytes[index] = static_cast<uint16_t>(row_count > 0 ? bytes : 0);
  }
};
static_assert(sizeof(AmxConfig) == 64);

namespace {  // one set per translation unit

#if !defined(QUANTOPT_AMX_EMULATED)

inline void amx_configure(const AmxConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
inline void amx_release() { asm volatile("tilerelease"); }

template <int T>
inline void amx_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows of the register from memory, `stride` bytes apart.
template <int T>
inline void amx_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
// The same for what is not read again soon: it does not displace what is in the first-level cache.
template <int T>
inline void amx_load_once(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void amx_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
// C[m][n] += sum_k sum_{j<J} A[m][J k + j] B[k][J n + j]: signed bytes and 32-bit sums, J = 4, or bfloat16
// (as uint16_t) and fp32 sums, J = 2, whose denormals, and those of A and B, are taken as zero.
template <class Value, int C, int A, int B>
inline void amx_multiply() {
  if constexpr (std::is_same_v<Value, int8_t>) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  } else {
    static_assert(std::is_same_v<Value, uint16_t>);
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
}

#else

struct AmxState {
  AmxConfig config;
  bool configured = false;
  const char* fault = nullptr;  // the first breach of the rules, for which the processor raises #UD or #GP
  uint8_t data[8][16][64];
};
inline AmxState& amx_state() {
  static thread_local AmxState state;
  return state;
}
inline bool amx_valid(int t) {
  AmxState& s = amx_state();
  const bool valid = s.configured && s.config.rows[t] > 0;
  if (!valid && s.fault == nullptr) s.fault = "a register that is not configured";
  return valid;
}

inline void amx_configure(const AmxConfig& config) {
  AmxState& s = amx_state();
  s.config = config;
  s.configured = true;
  std::memset(s.data, 0, sizeof s.data);
  bool legal = config.palette == 1 && config.start_row == 0;
  for (const uint8_t byte : config.reserved) legal = legal && byte == 0;
  for (int t = 0; t < 16; ++t) {
    legal = legal && config.rows[t] <= 16 && config.row_bytes[t] <= 64;
    legal = legal && (config.rows[t] == 0) == (config.row_bytes[t] == 0);
    legal = legal && (t < 8 || config.rows[t] == 0);
  }
  if (!legal && s.fault == nullptr) s.fault = "an illegal configuration";
}
inline void amx_release() { amx_state().configured = false; }

template <int T>
inline void amx_zero() {
  if (amx_valid(T)) std::memset(amx_state().data[T], 0, sizeof amx_state().data[T]);
}
template <int T>
inline void amx_load(const void* from, int64_t stride) {
  if (!amx_valid(T)) return;
  AmxState& s = amx_state();
  std::memset(s.data[T], 0, sizeof s.data[T]);
  for (int r = 0; r < s.config.rows[T]; ++r) {
    std::memcpy(s.data[T][r], static_cast<const uint8_t*>(from) + r * stride, s.config.row_bytes[T]);
  }
}
template <int T>
inline void amx_load_once(const void* from, int64_t stride) {
  amx_load<T>(from, stride);
}
template <int T>
inline void amx_store(void* to, int64_t stride) {
  if (!amx_valid(T)) return;
  AmxState& s = amx_state();
  for (int r = 0; r < s.config.rows[T]; ++r) {
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, s.data[T][r], s.config.row_bytes[T]);
  }
}
inline float without_denormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float from_bfloat16(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return without_denormal(value);
}
// C[m][n] of the product: a row of A, a column of B, so many rows.
inline int32_t dot(const uint8_t* a, const uint8_t (*b)[64], int column, int rows, int32_t sum, int8_t) {
  for (int k = 0; k < rows; ++k) {
    for (int j = 4 * k; j < 4 * k + 4; ++j) {
      sum += static_cast<int8_t>(a[j]) * static_cast<int8_t>(b[k][4 * column + j % 4]);
    }
  }
  return sum;
}
// The first and the second of all pairs are added up apart, each product fused with its addition; then the
// two sums are added, and that to C.
inline float dot(const uint8_t* a, const uint8_t (*b)[64], int column, int rows, float sum, uint16_t) {
  float part[2] = {};
  for (int k = 0; k < rows; ++k) {
    for (int j = 0; j < 2; ++j) {
      const float x = from_bfloat16(a + 4 * k + 2 * j), w = from_bfloat16(b[k] + 4 * column + 2 * j);
      part[j] = without_denormal(std::fma(x, w, part[j]));
    }
  }
  return without_denormal(without_denormal(sum) + without_denormal(part[0] + part[1]));
}
template <class Value, int C, int A, int B>
inline void amx_multiply() {
  if (!amx_valid(C) || !amx_valid(A) || !amx_valid(B)) return;
  AmxState& s = amx_state();
  const AmxConfig& f = s.config;
  const bool fits = f.rows[C] == f.rows[A] && f.row_bytes[A] == 4 * f.rows[B] &&
                    f.row_bytes[C] == f.row_bytes[B] && C != A && C != B && A != B;
  if (!fits) {
    if (s.fault == nullptr) s.fault = "registers of shapes that do not fit, or one twice";
    return;
  }
  for (int m = 0; m < f.rows[C]; ++m) {
    for (int n = 0; n < f.row_bytes[B] / 4; ++n) {
      std::conditional_t<std::is_same_v<Value, int8_t>, int32_t, float> sum;
      std::memcpy(&sum, s.data[C][m] + 4 * n, sizeof sum);
      sum = dot(s.data[A][m], s.data[B], n, f.rows[B], sum, Value{});
      std::memcpy(s.data[C][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

#endif

}  // namespace
}  // namespace quantopt
