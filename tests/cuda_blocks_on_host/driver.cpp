// csrc/cuda/binary_ops.cpp on the host: the operators of quantopt as those of quantopt_host, for CPU tensors.
// While `guard` is on, memory of tensors ends where no page is, so that a read beyond it does not go
// unnoticed.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstring>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) TORCH_LIBRARY_FRAGMENT(quantopt_host, m)
#include "cuda/binary_conv_ops.cpp"
#include "cuda/binary_ops.cpp"

namespace {

struct Area {
  void* begin;
  size_t bytes;
};

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t pages = (bytes + 4095) / 4096 * 4096 + 4096;
    auto* const area = static_cast<uint8_t*>(
        mmap(nullptr, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    std::memset(area, 0xFF, pages - 4096);  // NaN, where it is read as a float
    mprotect(area + pages - 4096, 4096, PROT_NONE);
    return {area + pages - 4096 - bytes, new Area{area, pages}, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void release(void* context) {
    auto* const area = static_cast<Area*>(context);
    munmap(area->begin, area->bytes);
    delete area;
  }
};

GuardedAllocator guarded;

void guard(bool on) {
  static c10::Allocator* const plain = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? static_cast<c10::Allocator*>(&guarded) : plain, /*priority=*/100);
}

}  // namespace

TORCH_LIBRARY(quantopt_host, m) {
  m.def("guard(bool on) -> ()", &guard);
  m.def("device(int capability, int processors) -> ()", [](int64_t capability, int64_t processors) {
    quantopt::host_place.capability = static_cast<int>(capability);
    quantopt::host_place.processors = static_cast<int>(processors);
    most_shared = (capability >= 90 ? 227 : 163) << 10;
  });
  m.def("launches() -> int", [] { return launches; });
  // The kernel that the table names, by its place in BinaryKernel.
  m.def("chosen(bool int8, int rows, int inputs, bool grouped) -> int",
        [](bool int8, int64_t rows, int64_t inputs, bool grouped) {
          quantopt::BinaryWeights w{};
          const float scale = 1;
          w.inputs = inputs;
          w.planes = 1;
          w.plane_weights[0] = 1;
          w.group_scale = grouped ? &scale : nullptr;
          return static_cast<int64_t>(
              quantopt::choose_binary_kernel(w, int8, rows, quantopt::host_place.capability));
        });
  m.def("binary_tiles(Tensor bits, int in_features) -> Tensor");
  m.def(
      "binary_tiles_and_weight(Tensor bits, int in_features, int[] plane_weights, ScalarType dtype) -> "
      "Tensor");
  m.def("binary_conv_tiles(Tensor bits, int channels, int taps, int groups, int group_size=0) -> Tensor");
  m.def(
      "binary_conv2d(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, int[] plane_weights, int group_size=0, str "
      "compute=\"exact\", Tensor? tiles=None, str activation=\"none\") -> Tensor");
  m.def(
      "binary_linear(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int in_features, int[] "
      "plane_weights, "
      "int group_size=0, str compute=\"exact\", Tensor? tiles=None, str activation=\"none\") -> Tensor");
  m.def(
      "binary_linear_by(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int in_features, int[] "
      "plane_weights, "
      "str kernel, int shape=-1, int splits=1, int group_size=0, str compute=\"exact\", Tensor? tiles=None, "
      "str activation=\"none\") -> Tensor");
}
