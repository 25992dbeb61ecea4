// Runs the torch-free CPU kernels, built with the address and undefined-behaviour sanitizers, for every
// instruction set that this processor has (make sanitize). All memory is of exactly the size that the
// interfaces promise, and aligned to no more than one element where sizes are odd. Products are checked
// against plain loops in double, steps against the portable kernels, which must give the same bits. The
// kernels for AMX run with emulated registers. Exits with 1 on a wrong result; the sanitizers end the program
// themselves.
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "core/activation.h"
#include "core/rounding.h"
#include "cpu/isa.h"
#include "cpu/kernels/amx_conv.h"
#include "cpu/kernels/amx_linear.h"
#include "cpu/kernels/binary_conv.h"
#include "cpu/kernels/binary_linear.h"
#include "cpu/kernels/quantize.h"
#include "cpu/kernels/step.h"

namespace quantopt {
// tests/amx_on_host
const char* conv_on_emulated_amx(amx::Convolution conv, int64_t first, int64_t together, bool side_by_side,
                                 int64_t cut);
const char* linear_on_emulated_amx(const amx::Product& product, int64_t row, int64_t tile);
}  // namespace quantopt

using namespace quantopt;

namespace {

bool failed = false;

void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("wrong: %s\n", what.c_str());
  failed = true;
}

uint32_t random_state = 1;
uint32_t random_word() {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 8;
}
float random_float() { return static_cast<float>(random_word() & 0xFFFF) / 32768.0f - 1.0f; }

// `count` elements that end where the memory ends: a page that may not be touched follows, which also stops
// the masked accesses that the address sanitizer does not see; what precedes them is poisoned.
template <class T>
class Array {
 public:
  explicit Array(int64_t count, const T& value = T{}) : count_(count) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    room_ = (bytes() + page - 1) / page * page;
    void* const memory =
        mmap(nullptr, room_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + room_, page, PROT_NONE) != 0)
      std::abort();
    memory_ = Pages(static_cast<char*>(memory), Unmap{room_ + page});
    __asan_poison_memory_region(memory_.get(), room_ - bytes());
    for (int64_t i = 0; i < count; ++i) (*this)[i] = value;
  }
  T* data() const { return reinterpret_cast<T*>(memory_.get() + room_ - bytes()); }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }
  bool operator==(const Array& other) const {
    return count_ == other.count_ && std::memcmp(data(), other.data(), bytes()) == 0;
  }

 private:
  struct Unmap {
    size_t size = 0;
    void operator()(char* memory) const {
      __asan_unpoison_memory_region(memory, size);
      munmap(memory, size);
    }
  };
  using Pages = std::unique_ptr<char, Unmap>;

  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  Pages memory_;
  size_t room_;
  int64_t count_;
};

Array<float> random_floats(int64_t count) {
  Array<float> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = random_float();
  return result;
}

// The kernels of one instruction set.
struct Kernels {
  Isa isa;
  decltype(&portable::binary_uses_tiles) uses_tiles;
  decltype(&portable::binary_tiles) tiles;
  decltype(&portable::binary_linear) linear;
  decltype(&portable::quantize_row) quantize_row;
  decltype(&portable::binary_conv_available) conv_available;
  decltype(&portable::binary_conv_memory) conv_memory;
  decltype(&portable::binary_conv_pieces) conv_pieces;
  decltype(&portable::binary_conv2d) conv2d;
  decltype(&portable::step_piece) step_piece;
  decltype(&portable::step_groups) step_groups;
  decltype(&portable::magnitude_of_piece) magnitude_of_piece;
};

#define KERNELS(isa, of_step)                                                                             \
  Kernels {                                                                                               \
    Isa::isa, isa::binary_uses_tiles, isa::binary_tiles, isa::binary_linear, isa::quantize_row,           \
        isa::binary_conv_available, isa::binary_conv_memory, isa::binary_conv_pieces, isa::binary_conv2d, \
        of_step::step_piece, of_step::step_groups, of_step::magnitude_of_piece                            \
  }

const Kernels kBuilt[] = {
    KERNELS(portable, portable),
#ifdef QUANTOPT_HAVE_AVX2
    KERNELS(avx2, avx2),
#endif
#ifdef QUANTOPT_HAVE_AVXVNNI
    KERNELS(avxvnni, avx2),
#endif
#ifdef QUANTOPT_HAVE_AVX512
    KERNELS(avx512, avx512),
#endif
#ifdef QUANTOPT_HAVE_AVX512VNNI
    KERNELS(avx512vnni, avx512vnni),
#endif
};

// ---- products ---

double activated(Activation activation, double y) {
  switch (activation) {
    case Activation::none: return y;
    case Activation::relu: return y < 0.0 ? 0.0 : y;
    case Activation::gelu: return 0.5 * y * (1.0 + std::erf(y * std::sqrt(0.5)));
    case Activation::silu: return y / (1.0 + std::exp(-y));
  }
  return y;
}

struct Weights {
  int64_t outputs, inputs, planes;
  Array<uint8_t> bits;  // the spare bits of the last bytes set: they must not matter
  Array<int32_t> plane_weights;

  Weights(int64_t outputs, int64_t inputs, int64_t planes)
      : outputs(outputs),
        inputs(inputs),
        planes(planes),
        bits(planes * outputs * ((inputs + 7) / 8)),
        plane_weights(planes) {
    for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(random_word());
    const bool ternary = planes == 2 && inputs % 4 == 3;
    for (int64_t p = 0; p < planes; ++p) plane_weights[p] = ternary ? 1 : 1 << p;
  }
  double at(int64_t n, int64_t k) const {
    double w = 0.0;
    for (int64_t p = 0; p < planes; ++p) {
      const int byte = bits[(p * outputs + n) * ((inputs + 7) / 8) + k / 8];
      w += (byte >> (k % 8)) & 1 ? plane_weights[p] : -plane_weights[p];
    }
    return w;
  }
};

Array<uint16_t> tiles_of(const Kernels& kernels, const uint8_t* bits, int64_t planes, int64_t outputs,
                         int64_t inputs) {
  const int64_t size = tile_count(outputs) * tile_words(inputs) * kTileRows;
  Array<uint16_t> tiles(planes * size);
  for (int64_t p = 0; p < planes; ++p) {
    kernels.tiles(bits + p * outputs * ((inputs + 7) / 8), outputs, inputs, tiles.data() + p * size, 0,
                  tile_count(outputs));
  }
  return tiles;
}

// Quantises `rows` rows of x to q and checks the numbers; the scales. x becomes what q stands for, less the
// scales.
Array<float> quantize(const Kernels& kernels, Array<float>& x, Array<int8_t>& q, int64_t rows) {
  Array<float> scales(rows);
  q = Array<int8_t>(x.size());
  const int64_t length = x.size() / rows;
  for (int64_t m = 0; m < rows; ++m) {
    scales[m] = kernels.quantize_row(x.data() + m * length, length, q.data() + m * length);
    for (int64_t k = 0; k < length; ++k) {
      const float value = q[m * length + k];
      expect(value >= -127.0f && std::fabs(value * scales[m] - x[m * length + k]) <= 0.5001f * scales[m],
             "quantize_row");
      x[m * length + k] = value;
    }
  }
  return scales;
}

// run(p) computes the y of p.
template <class Run>
void check_linear(const Kernels& kernels, int64_t rows, int64_t outputs, int64_t inputs, int64_t planes,
                  int64_t group, bool quantized, Activation activation, const Run& run) {
  const Weights w(outputs, inputs, planes);
  const int64_t groups = group > 0 ? (inputs + group - 1) / group : 1;
  const bool one_scale = group == 0 && outputs % 2 == 1;
  const Array<float> scale = random_floats(one_scale ? 1 : outputs);
  const int64_t in_tiles = group > 0 ? tile_count(outputs) * kTileRows * groups : 0;
  const Array<float> group_scales = random_floats(in_tiles);
  const Array<float> bias = random_floats(outputs);
  Array<float> x = random_floats(rows * inputs), y(rows * outputs, NAN);
  Array<int8_t> q(0);
  const Array<float> x_scale = quantized ? quantize(kernels, x, q, rows) : Array<float>(0);
  LinearProblem p{};
  p.rows = rows;
  p.outputs = outputs;
  p.inputs = inputs;
  p.planes = planes;
  p.bits = w.bits.data();
  p.plane_weights = w.plane_weights.data();
  const bool levelled = group > 0 && quantized && takes_levels(p.plane_weights, planes, inputs);
  Array<int8_t> levels(levelled ? in_tiles : 0);
  for (int64_t i = 0; i < levels.size(); ++i) levels[i] = static_cast<int8_t>(127 * group_scales[i]);
  p.scale = group == 0 || levelled ? scale.data() : nullptr;
  p.scale_stride = one_scale ? 0 : 1;
  p.group = group;
  p.group_scales = group > 0 && !levelled ? group_scales.data() : nullptr;
  p.levels = levelled ? levels.data() : nullptr;
  p.bias = rows == 1 ? nullptr : bias.data();
  p.x = quantized ? nullptr : x.data();
  p.q = quantized ? q.data() : nullptr;
  p.x_scale = quantized ? x_scale.data() : nullptr;
  p.y = y.data();
  p.activation = activation;
  Array<uint16_t> tiles(0);
  if (kernels.uses_tiles(p)) {
    tiles = tiles_of(kernels, w.bits.data(), planes, outputs, inputs);
    p.tiles = tiles.data();
  }
  run(p);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < outputs; ++n) {
      double sum = 0.0, size = 1.0;
      for (int64_t k = 0; k < inputs; ++k) {
        double factor = p.scale != nullptr ? scale[n * p.scale_stride] : 1.0f;
        if (levelled) factor *= levels[group_index(n, k / group, groups)];
        if (p.group_scales != nullptr) factor *= group_scales[group_index(n, k / group, groups)];
        const double term = w.at(n, k) * x[m * inputs + k] * factor * (quantized ? x_scale[m] : 1.0f);
        sum += term;
        size += std::fabs(term);
      }
      const double expected = activated(activation, sum + (p.bias != nullptr ? bias[n] : 0.0f));
      expect(std::fabs(y[m * outputs + n] - expected) <= 3e-6 * size,
             "binary_linear M=" + std::to_string(rows) + " N=" + std::to_string(outputs) +
                 " K=" + std::to_string(inputs) + " planes=" + std::to_string(planes) +
                 " group=" + std::to_string(group) + (quantized ? " int8" : " exact"));
    }
  }
}

void check_products(const Kernels& kernels) {
  const auto run = [&](const LinearProblem& p) {
    const int64_t middle = p.outputs / 2 / kBandRows * kBandRows;  // in two pieces, as two threads would
    kernels.linear(p, 0, p.rows, 0, middle);
    kernels.linear(p, 0, p.rows, middle, p.outputs);
  };
  const int64_t most[] = {1, 7, 16, 31, 47, 49, 128, 255, 256, 257, 500};
  for (int64_t inputs : most) {
    for (int64_t outputs : {1, 31, 33, 129, 161}) {
      for (int64_t rows : {1, 2, 5}) {
        for (bool quantized : {false, true}) {
          const auto activation = static_cast<Activation>((inputs + outputs + rows) % 4);
          check_linear(kernels, rows, outputs, inputs, 1 + inputs % 2, 0, quantized, activation, run);
          check_linear(kernels, rows, outputs, inputs, 1, inputs % 3 == 0 ? 7 : 16, quantized, activation,
                       run);
          check_linear(kernels, rows, outputs, inputs, 3, 32, quantized, activation, run);
        }
      }
      for (int64_t rows : {13, 26}) {
        check_linear(kernels, rows, outputs, inputs, 1 + inputs % 3, 0, true, Activation::none, run);
        check_linear(kernels, rows, outputs, inputs, 1 + inputs % 2, 48, true, Activation::none, run);
      }
    }
  }
  check_linear(kernels, 131, 300, 600, 1, 64, true, Activation::none, run);  // more rows than share a panel
  for (bool quantized : {false, true}) {
    check_linear(kernels, 3, 4130, 17, 1, 0, quantized, Activation::none, run);  // more than a block of tiles
    check_linear(kernels, 67, 9, 300, 2, 0, quantized, Activation::relu,
                 run);  // more rows than share a panel
    check_linear(kernels, 2, 5, 0, 1, 0, quantized, Activation::gelu, run);
  }
}

struct ConvCase {
  int64_t images, height, width, channels, outputs, kernel[2], stride[2], padding[2], dilation[2], planes;
  int64_t groups = 1;  // of which the last is computed
};

enum class Compute { exact, int8, bfloat16 };

// x as bfloat16; x becomes what that stands for.
Array<uint16_t> round_to_bfloat16(Array<float>& x) {
  Array<uint16_t> halves(x.size());
  for (int64_t i = 0; i < x.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], sizeof bits);
    halves[i] = static_cast<uint16_t>(bfloat16_nearest(bits) >> 16);
    bits = static_cast<uint32_t>(halves[i]) << 16;
    std::memcpy(&x[i], &bits, sizeof bits);
  }
  return halves;
}

// run(c) computes the y of c.
template <class Run>
void check_conv(const Kernels& kernels, const ConvCase& v, Compute compute, const Run& run) {
  const bool quantized = compute == Compute::int8;
  const int64_t taps = v.kernel[0] * v.kernel[1], bytes = (v.channels + 7) / 8;
  const Weights w(v.planes * taps * v.outputs, v.channels, 1);  // [planes, taps, outputs, channels]
  const Array<uint16_t> tiles = tiles_of(kernels, w.bits.data(), v.planes * taps, v.outputs, v.channels);
  const Array<float> scale = random_floats(v.outputs), bias = random_floats(v.outputs);
  const int64_t x_stride = v.groups * v.channels, y_stride = v.groups * v.outputs;
  const int64_t first = (v.groups - 1) * v.channels, first_output = (v.groups - 1) * v.outputs;
  Array<float> x = random_floats(v.images * v.height * v.width * x_stride);
  Array<int8_t> q(0);
  const Array<float> x_scale = quantized ? quantize(kernels, x, q, v.images) : Array<float>(0);
  const Array<uint16_t> halves = compute == Compute::bfloat16 ? round_to_bfloat16(x) : Array<uint16_t>(0);
  Array<int32_t> plane_weights(v.planes);
  for (int64_t p = 0; p < v.planes; ++p) plane_weights[p] = static_cast<int32_t>(p + 1);
  ConvProblem c{};
  c.images = v.images;
  c.height = v.height;
  c.width = v.width;
  c.channels = v.channels;
  c.outputs = v.outputs;
  c.x_stride = x_stride;
  c.y_stride = y_stride;
  int64_t* const out[] = {&c.out_height, &c.out_width};
  for (int i = 0; i < 2; ++i) {
    c.kernel[i] = v.kernel[i];
    c.stride[i] = v.stride[i];
    c.padding[i] = v.padding[i];
    c.dilation[i] = v.dilation[i];
    *out[i] = ((i == 0 ? v.height : v.width) + 2 * v.padding[i] - v.dilation[i] * (v.kernel[i] - 1) - 1) /
                  v.stride[i] +
              1;
  }
  Array<float> y(v.images * c.out_height * c.out_width * y_stride, NAN);
  c.planes = v.planes;
  c.tiles = tiles.data();
  c.plane_weights = plane_weights.data();
  c.scale = scale.data();
  c.scale_stride = 1;
  c.bias = bias.data();
  c.x = compute == Compute::exact ? x.data() + first : nullptr;
  c.q = quantized ? q.data() + first : nullptr;
  c.x_bf16 = compute == Compute::bfloat16 ? halves.data() + first : nullptr;
  c.x_scale = quantized ? x_scale.data() : nullptr;
  c.y = y.data() + first_output;
  c.activation = Activation::relu;
  run(c);
  for (int64_t i = 0; i < y.size(); ++i) {
    const int64_t n = i % y_stride - first_output, ox = i / y_stride % c.out_width,
                  oy = i / y_stride / c.out_width % c.out_height,
                  image = i / y_stride / c.out_width / c.out_height;
    if (n < 0) {
      expect(std::isnan(y[i]), "binary_conv2d writes to another group");
      continue;
    }
    double sum = 0.0, size = 1.0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t iy = oy * v.stride[0] - v.padding[0] + tap / v.kernel[1] * v.dilation[0];
      const int64_t ix = ox * v.stride[1] - v.padding[1] + tap % v.kernel[1] * v.dilation[1];
      if (iy < 0 || iy >= v.height || ix < 0 || ix >= v.width) continue;
      for (int64_t k = 0; k < v.channels; ++k) {
        const double value = x[((image * v.height + iy) * v.width + ix) * x_stride + first + k] * scale[n] *
                             (quantized ? x_scale[image] : 1.0f);
        for (int64_t p = 0; p < v.planes; ++p) {
          const int byte = w.bits[((p * taps + tap) * v.outputs + n) * bytes + k / 8];
          sum += ((byte >> (k % 8)) & 1 ? value : -value) * plane_weights[p];
          size += std::fabs(value) * plane_weights[p];
        }
      }
    }
    expect(std::fabs(y[i] - activated(c.activation, sum + bias[n])) <= 3e-6 * size,
           "binary_conv2d channels=" + std::to_string(v.channels) +
               " compute=" + std::to_string(static_cast<int>(compute)));
  }
}

void check_convolutions(const Kernels& kernels) {
  if (!kernels.conv_available()) return;
  const ConvCase cases[] = {
      {2, 5, 6, 1, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
      {1, 4, 3, 17, 33, {2, 3}, {2, 1}, {0, 2}, {1, 2}, 2},
      {2, 3, 9, 48, 31, {1, 1}, {1, 2}, {0, 0}, {1, 1}, 1},
      {1, 6, 5, 257, 65, {3, 2}, {1, 1}, {2, 1}, {2, 1}, 1},
      {1, 1, 1, 300, 7, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
      {1, 2, 2, 5, 4130, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1},
      {2, 4, 5, 20, 35, {3, 3}, {1, 2}, {1, 1}, {1, 1}, 2, 3},
      {7, 3, 3, 17, 33, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},     // several images in a block
      {2, 9, 70, 16, 31, {3, 3}, {2, 1}, {1, 1}, {1, 1}, 1},    // parts of rows
      {3, 16, 16, 64, 130, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},  // several rows
      {1, 7, 8, 3, 5, {6, 7}, {1, 1}, {3, 3}, {1, 1}, 1},       // more positions than are summed at once
  };
  const auto run = [&](const ConvProblem& c) {
    const int64_t pieces = kernels.conv_pieces(c);
    for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, pieces / 2}, {pieces / 2, pieces}}) {
      const size_t size = static_cast<size_t>(kernels.conv_memory(c));
      const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, size), &std::free);
      kernels.conv2d(c, begin, end, memory.get());
    }
  };
  for (const ConvCase& v : cases) {
    for (Compute compute : {Compute::exact, Compute::int8}) check_conv(kernels, v, compute, run);
  }
}

#ifdef QUANTOPT_HAVE_AMX
// What q of `rows` rows stands for.
Array<float> restored(const int8_t* q, const float* scale, int64_t rows, int64_t length) {
  Array<float> x(rows * length);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = q[i] * scale[i / length];
  return x;
}

// On emulated registers, which need only that the processor expands weights.
void check_tiles(const Kernels& kernels) {
  const auto check = [](const char* fault) {
    expect(fault == nullptr, std::string("tiles: ") + (fault != nullptr ? fault : ""));
  };
  const ConvCase cases[] = {
      {2, 5, 6, 1, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
      {1, 4, 5, 17, 33, {2, 3}, {2, 1}, {1, 2}, {1, 2}, 2},
      {2, 3, 9, 48, 31, {1, 1}, {1, 2}, {0, 0}, {1, 1}, 1},
      {1, 6, 5, 257, 65, {3, 2}, {1, 1}, {2, 1}, {2, 1}, 1},
      {1, 9, 9, 64, 161, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
      {5, 2, 2, 65, 40, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
      {1, 7, 1, 16, 35, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 1},
      {2, 4, 5, 20, 35, {3, 3}, {1, 2}, {1, 1}, {1, 1}, 2, 3},
  };
  for (const ConvCase& v : cases) {
    for (Compute compute : {Compute::int8, Compute::bfloat16, Compute::exact}) {
      for (int layout = 0; layout < 3; ++layout) {
        check_conv(kernels, v, compute, [&](const ConvProblem& c) {
          const int64_t first = (v.groups - 1) * v.channels;
          Array<float> x(0);
          amx::Convolution conv{c,
                                compute == Compute::int8       ? amx::Form::int8
                                : compute == Compute::bfloat16 ? amx::Form::bfloat16
                                                               : amx::Form::parts,
                                nullptr, 0, nullptr};
          if (c.q != nullptr) {
            x = restored(c.q - first, c.x_scale, v.images, v.height * v.width * c.x_stride);
            conv.p.x = x.data() + first;
          }
          check(conv_on_emulated_amx(conv, first, 1 + layout, layout == 1, layout));
        });
      }
    }
  }
  for (int64_t inputs : {1, 31, 33, 64, 129, 300, 513}) {
    for (int64_t rows : {8, 17, 33, 47}) {
      for (bool quantized : {false, true}) {
        for (int64_t group : {0, 64}) {
          check_linear(kernels, rows, 3 * rows + inputs % 40, inputs, 1 + rows % 2, group, quantized,
                       Activation::none, [&](const LinearProblem& p) {
                         Array<float> x(0);
                         amx::Product product{};
                         product.p = p;
                         product.form = quantized ? amx::Form::int8 : amx::Form::parts;
                         product.x = p.x;
                         product.x_scale = p.x_scale;
                         if (quantized) {
                           x = restored(p.q, p.x_scale, p.rows, p.inputs);
                           product.x = x.data();
                         }
                         product.y = p.y;
                         product.y_stride = p.outputs;
                         check(linear_on_emulated_amx(product, 32, 1));
                       });
        }
      }
    }
  }
  std::printf("amx: done, with emulated registers\n");
}
#endif

// ---- steps ---

struct StepCase {
  Rule rule;
  Base base;
  Dtype param, momentum;
  int levels;
  bool has_momentum, master, stochastic, grouped, latent_bound;
  int64_t rows, row, group;
  bool stream, frozen;
};

int64_t width_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// `count` numbers of a type; the same for the same seed.
Array<uint16_t> halves(Dtype dtype, int64_t count, float size, uint32_t seed) {
  random_state = seed;
  Array<uint16_t> memory(count * width_of(dtype) / 2);
  for (int64_t i = 0; i < count; ++i) {
    const float value = random_float() * size;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (dtype == Dtype::kFloat32) {
      std::memcpy(memory.data() + 2 * i, &bits, sizeof bits);
    } else {  // of float16 too: any bits that are a finite number
      memory[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  return memory;
}

struct StepResult {
  std::vector<Array<uint16_t>> memory;
  double magnitude;
};

StepResult run_step(const Kernels& kernels, const StepCase& v) {
  StepOptions o{};
  o.rule = v.rule;
  o.base = v.base;
  o.param_dtype = v.param;
  o.momentum_dtype = v.momentum;
  o.exp_avg_sq_dtype = v.levels == 2 ? Dtype::kFloat32 : Dtype::kBFloat16;
  o.stream = v.stream;
  o.hyper = {v.frozen ? 0.0 : 0.1, 0.9, 0.99, 1e-8, 0.01, 0.5, 0.1, 0.25, 2.0, 3.0, 0.01, 0.05};
  o.levels = v.levels;
  o.level_factor = max_level_factor(v.levels);
  o.has_momentum = v.has_momentum;
  o.nesterov = v.grouped;
  o.stochastic_rounding = v.stochastic;
  o.prefetch = true;
  o.gradient_factor = 1.0f;
  o.key = {1, 2, 3, 4};
  o.state_key = {5, 6, 7, 8};
  const RuleFacts& facts = facts_of(v.rule);
  if (v.grouped && !facts.latent) o.hyper.bound = INFINITY;  // AskewSGD as printed
  StepSegment s{};
  s.numel = v.rows * v.row;
  s.row = v.row;
  s.group = v.grouped ? v.group : v.row;
  s.scales_per_row = (v.row + s.group - 1) / s.group;
  s.step = 3.0;
  s.index = 5;
  StepResult result;
  result.magnitude = 0.0;
  const auto take = [&](Dtype dtype, int64_t count, float size) -> void* {
    result.memory.push_back(halves(dtype, count, size, static_cast<uint32_t>(100 + result.memory.size())));
    return result.memory.back().data();
  };
  s.param = take(v.param, s.numel, 1.0f);
  s.grad = take(v.param, s.numel, 1.0f);
  if (v.has_momentum) s.momentum = take(v.momentum, s.numel, 0.1f);
  if (v.base == Base::kAdam) {
    s.exp_avg_sq = take(o.exp_avg_sq_dtype, s.numel, 0.1f);
    const int64_t words = width_of(o.exp_avg_sq_dtype) / 2;  // of 16 bits: the last has the sign
    for (int64_t i = 1; i <= s.numel; ++i) static_cast<uint16_t*>(s.exp_avg_sq)[i * words - 1] &= 0x7FFF;
  }
  if (v.master || facts.latent) s.latent = static_cast<float*>(take(Dtype::kFloat32, s.numel, 1.0f));
  Array<float> scale(v.rows * s.scales_per_row, 0.5f), next(scale.size(), 0.4f),
      latent_bound(v.rows * (v.stream ? 1 : 2), 0.7f);
  if (facts.quantised) {
    s.scale = scale.data();
    s.next_scale = facts.dynamic_scale ? next.data() : scale.data();
  }
  if (v.latent_bound) {
    s.latent_bound = latent_bound.data();
    s.bound_row = s.numel / latent_bound.size();
  }
  const StepContext context(o);
  const int64_t middle = s.numel / 3;
  if (facts.dynamic_scale) {
    result.magnitude = kernels.magnitude_of_piece(context, s, 0, middle) +
                       kernels.magnitude_of_piece(context, s, middle, s.numel);
  }
  kernels.step_piece(context, s, 0, middle);
  kernels.step_piece(context, s, middle, s.numel);
  if (facts.dynamic_scale) {  // rows, and their groups
    kernels.step_groups(context, s, 0, s.row);
    kernels.step_groups(context, s, s.row, s.numel);
    Array<uint16_t> scales(2 * scale.size());
    std::memcpy(scales.data(), scale.data(), static_cast<size_t>(scale.size()) * sizeof(float));
    result.memory.push_back(std::move(scales));
  }
  return result;
}

// SGD without and with momentum, Adam, given directions.
struct BaseVariant {
  Base base;
  bool has_momentum;
};
constexpr BaseVariant kBaseVariants[] = {
    {Base::kSgd, false}, {Base::kSgd, true}, {Base::kAdam, true}, {Base::kGiven, false}};

void check_steps(const Kernels& kernels) {
  for (size_t rule = 0; rule < std::size(kRules); ++rule) {
    const RuleFacts& facts = kRules[rule];
    for (Dtype param : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
      for (Dtype momentum : {Dtype::kFloat32, param}) {
        for (int levels : {2, 4}) {
          for (int variant = 0; variant < 8; ++variant) {
            const BaseVariant& base = kBaseVariants[variant % 4];
            const bool grouped = variant >= 4;
            StepCase v{static_cast<Rule>(rule),
                       base.base,
                       param,
                       momentum,
                       levels,
                       base.has_momentum,
                       false,
                       false,
                       grouped,
                       false,
                       1 + variant,
                       0,
                       0,
                       false,
                       false};
            v.master = !facts.latent && param != Dtype::kFloat32 && variant % 3 == 1;
            v.stochastic = !facts.latent && !v.master && param == Dtype::kBFloat16 && variant % 3 == 2;
            // Groups of 32 and 64 are whole pairs, and cut off at the end of a row.
            for (int64_t row : {1, 15, 131, 600, 170, 452, 1100}) {
              v.row = row;
              v.group = row == 452 ? 64 : row == 170 || row == 1100 ? 32 : 100;
              v.stream = row == 452 || row == 1100;
              v.frozen = row == 15 && variant % 2 == 1;
              v.latent_bound = v.rule == Rule::kAlternating && variant % 3 != 0 && row % 2 == 0;
              const StepResult expected = run_step(kBuilt[0], v), result = run_step(kernels, v);
              const std::string name = std::string("step rule=") + facts.name +
                                       " dtype=" + std::to_string(static_cast<int>(param)) +
                                       " variant=" + std::to_string(variant) + " row=" + std::to_string(row);
              for (size_t i = 0; i < expected.memory.size(); ++i) {
                expect(result.memory[i] == expected.memory[i], name + " array " + std::to_string(i));
              }
              expect(std::fabs(result.magnitude - expected.magnitude) <= 1e-6 * expected.magnitude, name);
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (const Kernels& kernels : kBuilt) {
    if (!isa_supported(kernels.isa)) {
      std::printf("%s: compiled, but this processor does not run it\n", isa_name(kernels.isa));
      continue;
    }
    random_state = 1;
    check_products(kernels);
    check_convolutions(kernels);
    check_steps(kernels);
    std::printf("%s: done\n", isa_name(kernels.isa));
#ifdef QUANTOPT_HAVE_AMX
    if (kernels.isa == Isa::avx512vnni && __builtin_cpu_supports("gfni")) check_tiles(kernels);
#endif
  }
  return failed ? 1 : 0;
}
