#include "cpu/amx_conv_ops.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/binary_conv_ops.h"
#include "cpu/conv_plan.h"
#include "cpu/kernels/amx_conv.h"
#include "cpu/kernels/amx_linear.h"
#include "cpu/kernels/thresholds.h"
#include "cpu/scratch.h"

namespace quantopt {

#ifdef QUANTOPT_HAVE_AMX

namespace {

using amx::Convolution;
using amx::Form;
using amx::ImageFactor;

constexpr int64_t kPutWork = 16384;        // values that a thread should take at least
constexpr int64_t kTogether = 1024 << 10;  // bytes of images that all outputs are multiplied with in turn

c10::DataPtr memory_of(int64_t bytes) {  // aligned to 64 bytes
  return c10::GetCPUAllocator()->allocate(static_cast<size_t>(bytes));
}

// Magnitudes order as their bits do, and infinities and NaN come last.
float larger(float a, float b) {
  uint32_t of[2];
  std::memcpy(&of[0], &a, sizeof a);
  std::memcpy(&of[1], &b, sizeof b);
  return of[0] < of[1] ? b : a;
}

ImageFactor factor_of(const Convolution& conv, int64_t image) {
  return amx::factor_for(conv.form, amx::largest_value(conv, image, 0, conv.p.height));
}

// Those of all images, each taken by several threads.
std::vector<ImageFactor> factors_of(const Convolution& conv) {
  const ConvProblem& p = conv.p;
  const int64_t lines = p.images * p.height, grain = 1 + kPutWork / (p.width * p.x_stride + 1);
  std::vector<float> largest(static_cast<size_t>(lines));
  at::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % p.height;
      largest[static_cast<size_t>(i)] = amx::largest_value(conv, i / p.height, row, row + 1);
    }
  });
  std::vector<ImageFactor> factors;
  for (int64_t i = 0; i < lines; i += p.height) {
    float most = 0.0f;
    for (int64_t row = 0; row < p.height; ++row) most = larger(most, largest[static_cast<size_t>(i + row)]);
    factors.push_back(amx::factor_for(conv.form, most));
  }
  return factors;
}

// The convolutions of all groups, which differ in pointers alone.
class Groups {
 public:
  Groups(const ConvArguments& conv, const at::Tensor& x, const at::Tensor& layout, const at::Tensor& y) {
    const bool half = x.scalar_type() == at::kBFloat16;
    for (int64_t group = 0; group < conv.groups; ++group) {
      Convolution one{problem_of(x, conv, layout, group),
                      conv.weights.quantize ? Form::int8
                      : half                ? Form::bfloat16
                                            : Form::parts,
                      nullptr, 0, nullptr};
      ConvProblem& p = one.p;
      if (half) {
        p.x_bf16 = bf16_data(x) + group * conv.channels;
      } else {
        p.x = x.const_data_ptr<float>() + group * conv.channels;
      }
      if (y.scalar_type() == at::kBFloat16) {
        one.y_bf16 = reinterpret_cast<uint16_t*>(y.mutable_data_ptr<at::BFloat16>()) + group * conv.outputs;
      } else {
        p.y = y.mutable_data_ptr<float>() + group * conv.outputs;
      }
      all_.push_back(one);
    }
  }

  // Scales of groups of weights as levels.
  void put_levels(const BinaryKernels& kernels, int64_t group, int64_t inputs) {
    for (Convolution& conv : all_) {
      LinearProblem p{};
      p.outputs = conv.p.outputs;
      scales_.push_back(
          group_scales_of(kernels, conv.p.scale, p.outputs, (inputs + group - 1) / group, /*levels=*/true));
      set_group_scales(scales_.back(), p);
      conv.group = group;
      conv.levels = p.levels;
      conv.p.scale = p.scale;
      conv.p.scale_stride = p.scale_stride;
    }
  }

  const Convolution& first() const { return all_.front(); }
  const std::vector<Convolution>& all() const { return all_; }

  // Weights for slots that hold the columns of the kernel side by side.
  void put_side_by_side() {
    const int64_t words = amx::side_by_side_words(first());
    memory_ = memory_of(words * static_cast<int64_t>(all_.size() * sizeof(uint16_t)));
    auto* to = static_cast<uint16_t*>(memory_.mutable_get());
    for (Convolution& conv : all_) {
      amx::put_side_by_side(conv, to);
      conv.p.tiles = to;
      to += words;
    }
  }

 private:
  std::vector<Convolution> all_;
  std::vector<at::Tensor> scales_;
  c10::DataPtr memory_;
};

// Images [begin, end), by one thread: some at a time, so that what all outputs read stays in its cache.
void run_images(const Groups& groups, const ConvPlan& plan, int64_t begin, int64_t end) {
  const Convolution& first = groups.first();
  const int64_t together = plan.slots.images;
  if ((end - begin) % together != 0 && end - begin > together) {
    const int64_t middle = begin + (end - begin) / together * together;
    run_images(groups, plan, begin, middle);
    begin = middle;
  }
  if ((end - begin) % together != 0) {
    return run_images(groups, plan_conv(first.p, end - begin, plan.slots.side_by_side), begin, end);
  }
  const amx::ConvSlots& slots = plan.slots;
  const int64_t bytes = slots.count * amx::slot_bytes(first, slots), tiles = tile_count(first.p.outputs);
  const int64_t most = std::clamp<int64_t>(kTogether / bytes, 1, (end - begin) / together);
  const int64_t putting = amx::putting_memory(first, slots), working = amx::working_memory(first, slots);
  const Scratch<struct Images> memory(most * bytes + std::max(putting, working));
  char* const at = memory.get();
  char* const work = at + most * bytes;
  std::vector<ImageFactor> factors(static_cast<size_t>(end));
  for (; begin < end; begin += most * together) {
    const int64_t count = std::min(most, (end - begin) / together);
    for (const Convolution& conv : groups.all()) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t image = begin + i * together;
        for (int64_t j = image; &conv == &first && j < image + together; ++j) {
          factors[static_cast<size_t>(j)] = factor_of(first, j);
        }
        amx::put_lines(conv, slots, factors.data(), image, 0, slots.line_count, at + i * bytes, work);
      }
      amx::multiply(conv, slots, factors.data(), begin, count, 0, slots.block_count, 0, tiles, at, work);
    }
  }
}

// Images [begin, end), each by several threads.
void run_shared(const Groups& groups, const ConvPlan& plan, const std::vector<ImageFactor>& factors,
                int64_t begin, int64_t end, int64_t threads) {
  const Convolution& first = groups.first();
  const amx::ConvSlots& slots = plan.slots;
  const int64_t slot = amx::slot_bytes(first, slots), bytes = slots.count * slot, images = end - begin;
  const int64_t tiles = tile_count(first.p.outputs);
  const Scratch<struct Images> memory(images * bytes);
  char* const at = memory.get();
  const int64_t by_tiles = std::min(tiles, threads), by_blocks = (threads + by_tiles - 1) / by_tiles;
  const int64_t grain = 1 + kPutWork / (slots.width * slot);
  for (const Convolution& conv : groups.all()) {
    at::parallel_for(0, images * slots.line_count, grain, [&](int64_t from, int64_t to) {
      const Scratch<struct Working> own(amx::putting_memory(conv, slots));
      for (int64_t i = from; i < to; ++i) {
        const int64_t image = i / slots.line_count, line = i % slots.line_count;
        amx::put_lines(conv, slots, factors.data(), begin + image, line, line + 1, at + image * bytes,
                       own.get());
      }
    });
    at::parallel_for(0, by_tiles * by_blocks, 1, [&](int64_t from, int64_t to) {
      const Scratch<struct Working> own(amx::working_memory(conv, slots));
      for (int64_t i = from; i < to; ++i) {
        const int64_t n = i % by_tiles, b = i / by_tiles;
        amx::multiply(conv, slots, factors.data(), begin, images, b * slots.block_count / by_blocks,
                      (b + 1) * slots.block_count / by_blocks, n * tiles / by_tiles,
                      (n + 1) * tiles / by_tiles, at, own.get());
      }
    });
  }
}

// Whether slots should hold the columns of the kernel side by side, by cycles for each pixel of y: a product
// of a register with 32 outputs takes 2, what is put into slots the rest.
bool side_by_side(const Convolution& conv) {
  const ConvProblem& p = conv.p;
  const int64_t step_words = conv.form == Form::int8 ? 4 : 2, parts = conv.form == Form::parts ? 3 : 1;
  const int64_t words = tile_words(p.channels), columns = p.kernel[1];
  const auto steps = [&](int64_t of) { return (of + step_words - 1) / step_words; };
  const int64_t product = 2 * parts * p.kernel[0] * tile_count(p.outputs);
  constexpr int64_t kPutStep = 25, kCopyWord = 6;
  const int64_t apart = product * columns * steps(words) + kPutStep * steps(words);
  const int64_t beside =
      product * steps(columns * words) + kPutStep * steps(columns * words) + kCopyWord * columns * words;
  return columns > 1 && beside < apart;
}

// The product of whole rows of W, whose sums of groups are scaled apart, with gathered values; or false where
// there is no kernel.
bool run_on_patches(const BinaryKernels& kernels, const Groups& groups, int64_t group) {
  constexpr int64_t kRows = 2 * amx::kRowsTogether;  // pixels gathered at once
  for (const Convolution& conv : groups.all()) {
    const ConvProblem& c = conv.p;
    amx::Product product{};
    product.form = conv.form;
    LinearProblem& p = product.p;
    p = rows_of_weights(c, group);
    p.rows = kRows;
    product.y_stride = c.y_stride;
    if (!amx::takes(p, product.form, /*levels=*/false)) return false;
    const at::Tensor scales =
        group_scales_of(kernels, c.scale, p.outputs, (p.inputs + group - 1) / group, /*levels=*/false);
    set_group_scales(scales, p);
    std::vector<ImageFactor> factors;
    if (conv.form == Form::int8) factors = factors_of(groups.first());
    const int64_t image = c.out_height * c.out_width, pixels = c.images * image;
    const int64_t value = c.x != nullptr ? 4 : 2, work = kRows * p.inputs * p.outputs / 32;
    at::parallel_for(
        0, (pixels + kRows - 1) / kRows, 1 + kThreadWork / (work + 1), [&](int64_t begin, int64_t end) {
          const int64_t patch = (kRows * p.inputs * value + 63) / 64 * 64, put = amx::rows_memory(product);
          const Scratch<struct Patches> memory(patch + put + amx::working_memory(product));
          char* const at = memory.get();
          float x_scale[kRows];
          for (int64_t first = begin * kRows; first < std::min(pixels, end * kRows); first += kRows) {
            amx::Product some = product;
            some.p.rows = std::min(kRows, pixels - first);
            for (int64_t i = 0; i < some.p.rows; ++i) {
              if (c.x != nullptr) {
                gather_patch(c, c.x, first + i, reinterpret_cast<float*>(at) + i * p.inputs);
              } else {
                gather_patch(c, c.x_bf16, first + i, reinterpret_cast<uint16_t*>(at) + i * p.inputs);
              }
              if (!factors.empty()) x_scale[i] = factors[static_cast<size_t>((first + i) / image)].of_x;
            }
            if (c.x != nullptr) {
              some.x = reinterpret_cast<const float*>(at);
            } else {
              some.x_bf16 = reinterpret_cast<const uint16_t*>(at);
            }
            if (!factors.empty()) some.x_scale = x_scale;
            if (conv.y_bf16 != nullptr) {
              some.y_bf16 = conv.y_bf16 + first * c.y_stride;
            } else {
              some.y = c.y + first * c.y_stride;
            }
            amx::put_rows(some, 0, some.p.rows, at + patch);
            amx::multiply(some, at + patch, 0, some.p.rows, 0, tile_count(p.outputs), at + patch + put);
          }
        });
  }
  return true;
}

}  // namespace

at::Tensor conv_on_amx(const BinaryKernels& kernels, const ConvArguments& conv, const at::Tensor& x,
                       at::ScalarType y_type, const std::function<at::Tensor()>& tiles) {
  const BinaryArguments& w = conv.weights;
  const int64_t pixels = conv.size[0] * conv.size[1];
  const bool half = x.scalar_type() == at::kBFloat16;
  const bool levels =
      w.quantize && w.group_size > 0 && takes_levels(w.plane_weights.data(), w.planes(), w.inputs);
  const bool whole = w.quantize && (w.group_size == 0 || levels);  // sums, which no order changes
  const int64_t least = w.quantize ? thresholds::kAmxConvInt8
                        : half     ? thresholds::kAmxConvBFloat16
                                   : thresholds::kAmxConvParts;
  if ((whole ? x.size(0) : 1) * pixels < least) return {};
  if (!w.quantize && !half && conv.channels < thresholds::kAmxConvPartsChannels) return {};
  const at::Tensor layout = tiles();
  at::Tensor y = dense_tensor({x.size(0), w.outputs, conv.size[0], conv.size[1]},
                              y_type == at::kBFloat16 ? y_type : at::kFloat, at::MemoryFormat::ChannelsLast);
  Groups groups(conv, x, layout, y);
  const Convolution& first = groups.first();
  const ConvProblem& p = first.p;
  if (w.group_size > 0) {
    if (!levels) {
      return run_on_patches(kernels, groups, w.group_size) ? y : at::Tensor();
    }
    groups.put_levels(kernels, w.group_size, w.inputs);
  }
  if (!amx::takes(first)) return {};
  const int64_t work = p.images * pixels / 32 * p.outputs * conv.taps() * p.channels * conv.groups;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + work / kThreadWork);
  const bool shared = threads > 1 && p.images < 4 * threads;
  const bool beside = w.group_size == 0 && side_by_side(first);
  const int64_t image_bytes = p.height * p.width * p.channels * (first.form == Form::parts ? 6 : 2);
  const int64_t together = shared ? 1 : images_together(p, p.images / threads, image_bytes, beside);
  const ConvPlan plan = plan_conv(p, together, beside);
  if (plan.taps.empty()) return {};
  const int64_t laid_out = plan.slots.count * amx::slot_bytes(first, plan.slots);
  if (laid_out > (first.form == Form::parts ? thresholds::kAmxConvPartsBytes : thresholds::kAmxConvBytes)) {
    return {};
  }
  if (beside) groups.put_side_by_side();
  if (shared) {
    constexpr int64_t kBytes = 32 << 20;
    const int64_t most = std::max<int64_t>(kBytes / laid_out, 1);
    const std::vector<ImageFactor> factors = factors_of(first);
    for (int64_t image = 0; image < p.images; image += most) {
      run_shared(groups, plan, factors, image, std::min(p.images, image + most), threads);
    }
    return y;
  }
  const int64_t units = (p.images + together - 1) / together;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run_images(groups, plan, i * units / threads * together,
                 std::min(p.images, (i + 1) * units / threads * together));
    }
  });
  return y;
}

at::Tensor scales_of_pixels(const at::Tensor& x, int64_t pixels) {
  Convolution conv{};
  conv.form = Form::int8;
  conv.p.images = x.size(0);
  conv.p.height = x.size(2);
  conv.p.width = x.size(3);
  conv.p.x_stride = x.size(1);
  if (x.scalar_type() == at::kBFloat16) {
    conv.p.x_bf16 = bf16_data(x);
  } else {
    conv.p.x = x.const_data_ptr<float>();
  }
  const std::vector<ImageFactor> factors = factors_of(conv);
  at::Tensor scales = dense_tensor({x.size(0), pixels}, at::kFloat);
  float* to = scales.mutable_data_ptr<float>();
  for (const ImageFactor& factor : factors) to = std::fill_n(to, pixels, factor.of_x);
  return scales;
}

#else

at::Tensor conv_on_amx(const BinaryKernels&, const ConvArguments&, const at::Tensor&, at::ScalarType,
                       const std::function<at::Tensor()>&) {
  return {};
}
at::Tensor scales_of_pixels(const at::Tensor&, int64_t) { return {}; }

#endif

}  // namespace quantopt
