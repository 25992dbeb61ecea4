// The CPU step on the last elements of a tensor of over 2^33 elements: the pointers are set so that only
// these exist. They must come out as in a small tensor that consists of them. Prints "equal" or what differs.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/kernels/step.cpp"

using namespace quantopt;

int main() {
  constexpr int64_t kCount = 1000, kRow = 250, kFirst = (int64_t{1} << 33) / kRow * kRow;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    const int64_t width = dtype == Dtype::kFloat32 ? 4 : 2;
    std::vector<char> memory[2][3];
    std::vector<float> scales(kCount / kRow);
    for (int64_t i = 0; i < kCount / kRow; ++i) scales[i] = 0.5f + 0.25f * static_cast<float>(i);
    for (int large = 0; large < 2; ++large) {
      for (int k = 0; k < 3; ++k) {
        memory[large][k].resize(kCount * width);
        for (int64_t i = 0; i < kCount; ++i) {
          const float value = static_cast<float>((i * 37 + k * 11) % 101 - 50) / 60.0f;
          uint32_t bits;
          std::memcpy(&bits, &value, 4);
          if (width == 2) bits >>= 16;
          std::memcpy(memory[large][k].data() + i * width, &bits, width);
        }
      }
      const int64_t first = large ? kFirst : 0;
      StepOptions options{};
      options.rule = Rule::kAskew;
      options.param_dtype = options.momentum_dtype = dtype;
      options.hyper = {0.1, 0.9, 0, 0, 0.01, 0.5, 0.1, 0.25, 2, 0, 0, 0};
      options.levels = 4;
      options.level_factor = max_level_factor(4);
      options.has_momentum = true;
      options.gradient_factor = 1.0f;
      StepSegment segment{};
      const auto at = [&](int k) { return memory[large][k].data() - first * width; };
      segment.param = at(0);
      segment.grad = at(1);
      segment.momentum = at(2);
      segment.scale = segment.next_scale = scales.data() - first / kRow;
      segment.numel = first + kCount;
      segment.row = segment.group = kRow;
      segment.scales_per_row = 1;
      QUANTOPT_ISA::step_piece(StepContext(options), segment, first, first + kCount);
    }
    for (const int k : {0, 2}) {
      if (memory[0][k] != memory[1][k]) {
        std::printf("width %d: array %d differs\n", static_cast<int>(width), k);
        return 1;
      }
    }
  }
  std::puts("equal");
  return 0;
}
