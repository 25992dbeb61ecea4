// The convolution of AMX with emulated registers, behind a C interface for ctypes.
#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#define QUANTOPT_AMX_EMULATED
#define QUANTOPT_ISA amx
#include "cpu/conv_plan.h"
#include "cpu/kernels/amx_conv.cpp"
#include "guarded.h"

using namespace quantopt;

namespace quantopt {

// A convolution of `together` images that alternate, then of those that are left over, whose blocks and tiles
// are each multiplied in two calls, the second from `cut` on. x and y of `conv` are those of a group whose
// first channel is `first`. Returns what the emulated processor objected
// to, or null.
const char* conv_on_emulated_amx(amx::Convolution conv, int64_t first, int64_t together, bool side_by_side,
                                 int64_t cut) {
  amx_state().fault = nullptr;
  const Guarded tiles(side_by_side ? amx::side_by_side_words(conv) * static_cast<int64_t>(sizeof(uint16_t))
                                   : 0);
  if (side_by_side) {
    amx::put_side_by_side(conv, tiles.get<uint16_t>());
    conv.p.tiles = tiles.get<uint16_t>();
  }
  const ConvProblem& p = conv.p;
  amx::Convolution all_groups = conv;
  if (p.x != nullptr) all_groups.p.x -= first;
  if (p.x_bf16 != nullptr) all_groups.p.x_bf16 -= first;
  std::vector<amx::ImageFactor> factors;
  for (int64_t i = 0; i < p.images; ++i) {
    const int64_t middle = p.height / 2;
    const float upper = amx::largest_value(all_groups, i, 0, middle),
                rest = amx::largest_value(all_groups, i, middle, p.height);
    factors.push_back(amx::factor_for(conv.form, upper > rest ? upper : rest));
  }
  for (int64_t image = 0; image < p.images;) {
    const int64_t some = std::min(together, p.images - image), groups = (p.images - image) / some;
    const ConvPlan plan = plan_conv(p, some, side_by_side);
    const amx::ConvSlots& slots = plan.slots;
    const int64_t bytes = slots.count * amx::slot_bytes(conv, slots);
    const Guarded memory(groups * bytes), putting(amx::putting_memory(conv, slots)),
        working(amx::working_memory(conv, slots), nullptr, 64);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t middle = slots.line_count / 2;
      for (const auto& [begin, end] : {std::pair{int64_t{0}, middle}, std::pair{middle, slots.line_count}}) {
        amx::put_lines(conv, slots, factors.data(), image + group * some, begin, end,
                       memory.get() + group * bytes, putting.get());
      }
    }
    const int64_t all = tile_count(p.outputs), tile = std::min(cut, all),
                  block = std::min(cut, slots.block_count);
    for (const auto& [begin, end] : {std::pair{int64_t{0}, tile}, std::pair{tile, all}}) {
      for (const auto& [from, to] : {std::pair{int64_t{0}, block}, std::pair{block, slots.block_count}}) {
        amx::multiply(conv, slots, factors.data(), image, groups, from, to, begin, end, memory.get(),
                      working.get());
      }
    }
    image += groups * some;
  }
  return objection();
}

}  // namespace quantopt

extern "C" {

// levels: with `group` weights of a row to each, in the order of tiles; or null with 0. geometry: images,
// height, width, channels, x_stride, out_height, out_width, outputs, y_stride, then pairs: kernel, stride,
// padding, dilation. x and y: all of their channels, of which those from `first` and `first_output` on are
// used.
const char* conv_on_host(const int64_t* geometry, int64_t planes, const uint16_t* weights, int64_t words,
                         const int32_t* plane_weights, const float* scale, int64_t scale_stride,
                         const float* bias, int64_t group, const int8_t* levels, int32_t form, bool half_x,
                         const void* x, int64_t first, int32_t activation, bool half_y, void* y,
                         int64_t first_output, int64_t together, bool side_by_side, int64_t cut) {
  amx::Convolution conv{};
  ConvProblem& c = conv.p;
  int64_t* const sizes[] = {&c.images,     &c.height,    &c.width,   &c.channels, &c.x_stride,
                            &c.out_height, &c.out_width, &c.outputs, &c.y_stride};
  for (int64_t* size : sizes) *size = *geometry++;
  for (auto* pair : {c.kernel, c.stride, c.padding, c.dilation}) {
    for (int i = 0; i < 2; ++i) pair[i] = *geometry++;
  }
  const int64_t x_width = half_x ? 2 : 4, y_width = half_y ? 2 : 4;
  const int64_t y_bytes = c.images * c.out_height * c.out_width * c.y_stride * y_width;
  const Guarded tiles(words * 2, weights), scales(scale_stride != 0 ? 4 * c.outputs : 4, scale),
      offsets(bias != nullptr ? 4 * c.outputs : 0, bias),
      values(c.images * c.height * c.width * c.x_stride * x_width, x), result(y_bytes, y);
  conv.group = group;
  conv.levels = levels;
  conv.form = static_cast<amx::Form>(form);
  c.planes = planes;
  c.tiles = tiles.get<uint16_t>();
  c.plane_weights = plane_weights;
  c.scale = scales.get<float>();
  c.scale_stride = scale_stride;
  if (bias != nullptr) c.bias = offsets.get<float>();
  c.activation = static_cast<Activation>(activation);
  if (half_x) {
    c.x_bf16 = values.get<uint16_t>() + first;
  } else {
    c.x = values.get<float>() + first;
  }
  if (half_y) {
    conv.y_bf16 = result.get<uint16_t>() + first_output;
  } else {
    c.y = result.get<float>() + first_output;
  }
  if (!amx::takes(conv)) return "not for AMX";
  const char* const fault = conv_on_emulated_amx(conv, first, together, side_by_side, cut);
  std::memcpy(y, result.get(), static_cast<size_t>(y_bytes));
  return fault;
}
}
