// The operators of csrc/cuda on the host: those of quantopt as quantopt_host, for CPU tensors. While `guard`
// is on, the memory of a tensor ends at a guard page: a read beyond it is a crash.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstring>

#undef TORCH_LIBRARY
#define TORCH_LIBRARY(library, m) TORCH_LIBRARY_FRAGMENT(quantopt_host, m)
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) TORCH_LIBRARY_FRAGMENT(quantopt_host, m)
#include "cuda/binary_conv_ops.cpp"
#include "cuda/binary_linear_ops.cpp"
#include "cuda/step_ops.cpp"
#include "ops.cpp"
#include "step_ops.cpp"

namespace quantopt {

inline bool hyper_on_device = false;

// The step of CPU tensors by the kernels of CUDA, with hyper-parameters in "device" memory where the test
// says so.
void run_step_on_cpu(const StepOptions& options, std::vector<StepSegment>& segments, bool dynamic_scale,
                     at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf, const at::Tensor& first_param) {
  StepOptions here = options;
  if (hyper_on_device) {
    here.device_hyper = &options.hyper;
    here.hyper = {};
  }
  run_step_on_cuda(here, segments, dynamic_scale, steps, grad_scale, found_inf, first_param);
}

}  // namespace quantopt

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

TORCH_LIBRARY_FRAGMENT(quantopt_host, m) {
  m.def("guard(bool on) -> ()", &guard);
  m.def("device(int capability, int processors) -> ()", [](int64_t capability, int64_t processors) {
    quantopt::host_context.capability = static_cast<int>(capability);
    quantopt::host_context.processors = static_cast<int>(processors);
    most_shared = (capability >= 90 ? 227 : 163) << 10;
  });
  // The threads of a block run in the other order: a missing barrier shows.
  m.def("backwards(bool on) -> ()", [](bool on) { emulator::backwards = on; });
  // fused_step reads the hyper-parameters as from a device.
  m.def("hyper_on_device(bool on) -> ()", [](bool on) { quantopt::hyper_on_device = on; });
  // Of each launch only the last `count` blocks along x run; all where it is negative.
  m.def("last_blocks(int count) -> ()", [](int64_t count) { last_blocks = static_cast<unsigned>(count); });
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
              quantopt::choose_binary_kernel(w, int8, rows, quantopt::host_context.capability));
        });
}
