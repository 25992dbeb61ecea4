// The products of rows of AMX with emulated registers, behind a C interface for ctypes.
#include <algorithm>
#include <initializer_list>
#include <utility>

#define QUANTOPT_AMX_EMULATED
#define QUANTOPT_ISA amx
#include "cpu/kernels/amx_linear.cpp"
#include "guarded.h"

using namespace quantopt;

namespace quantopt {

// A product whose rows and tiles are each multiplied in two calls, the second from `row` and `tile` on.
const char* linear_on_emulated_amx(const amx::Product& product, int64_t row, int64_t tile) {
  amx_state().fault = nullptr;
  const int64_t rows = product.p.rows, tiles = tile_count(product.p.outputs);
  const Guarded memory(amx::rows_memory(product), nullptr, 64),
      working(amx::working_memory(product), nullptr, 64);
  row = std::min(row / amx::kRowsTogether * amx::kRowsTogether, rows);
  tile = std::min(tile, tiles);
  for (const auto& [from, to] : {std::pair{int64_t{0}, row}, std::pair{row, rows}}) {
    amx::put_rows(product, from, to, memory.get());
  }
  for (const auto& [from, to] : {std::pair{int64_t{0}, row}, std::pair{row, rows}}) {
    for (const auto& [begin, end] : {std::pair{int64_t{0}, tile}, std::pair{tile, tiles}}) {
      amx::multiply(product, memory.get(), from, to, begin, end, working.get());
    }
  }
  return objection();
}

}  // namespace quantopt

extern "C" {

// x_scale: of each row, or null. scale: [outputs], or with `group` weights of a row to a scale in the order
// of tiles: fp32, or levels times `scale`.
const char* linear_on_host(int64_t rows, int64_t outputs, int64_t inputs, int64_t planes,
                           const uint16_t* weights, int64_t words, const int32_t* plane_weights,
                           const float* scale, int64_t group, const float* group_scales, const int8_t* levels,
                           const float* bias, int32_t form, bool half_x, const void* x, const float* x_scale,
                           int32_t activation, bool half_y, void* y, int64_t row, int64_t tile) {
  const int64_t y_bytes = rows * outputs * (half_y ? 2 : 4);
  const Guarded tiles(words * 2, weights), values(rows * inputs * (half_x ? 2 : 4), x), result(y_bytes, y);
  amx::Product product{};
  product.form = static_cast<amx::Form>(form);
  LinearProblem& p = product.p;
  p.rows = rows;
  p.outputs = outputs;
  p.inputs = inputs;
  p.planes = planes;
  p.tiles = tiles.get<uint16_t>();
  p.plane_weights = plane_weights;
  p.scale = scale;
  p.scale_stride = 1;
  p.group = group;
  p.group_scales = group_scales;
  p.levels = levels;
  p.bias = bias;
  p.activation = static_cast<Activation>(activation);
  if (half_x) {
    product.x_bf16 = values.get<uint16_t>();
  } else {
    product.x = values.get<float>();
  }
  product.x_scale = x_scale;
  if (half_y) {
    product.y_bf16 = result.get<uint16_t>();
  } else {
    product.y = result.get<float>();
  }
  product.y_stride = outputs;
  if (!amx::takes(p, product.form, levels != nullptr)) return "not for AMX";
  const char* const fault = linear_on_emulated_amx(product, row, tile);
  std::memcpy(y, result.get(), static_cast<size_t>(y_bytes));
  return fault;
}

// Breaches that the emulation must notice: 0 a product of registers that do not fit, 1 a register beyond the
// configuration, 2 an illegal configuration.
const char* breach_on_host(int which) {
  amx_state() = AmxState();
  AmxConfig config;
  config.shape(0, 16, 64);
  config.shape(1, 16, 32);
  config.shape(2, 16, 64);
  if (which == 2) config.rows[3] = 17;
  amx_configure(config);
  if (which == 0) amx_multiply<int8_t, 0, 1, 2>();
  if (which == 1) amx_zero<5>();
  return amx_state().fault;
}
}
