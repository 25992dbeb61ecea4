// The AMX kernels with emulated registers, behind a C interface for ctypes.
#include <initializer_list>
#include <new>
#include <utility>

#define QUANTOPT_AMX_EMULATED
#define QUANTOPT_ISA amx
#include "cpu/kernels/binary_amx.cpp"

using namespace quantopt;

namespace quantopt {

// The product in two calls, the second from part `cut` on. Returns what the emulated processor objected to,
// or null.
const char* conv_on_emulated_amx(const ConvProblem& c, int64_t cut) {
  const int64_t parts = amx::binary_amx_parts(c);
  if (!amx::binary_amx_covers(c.q != nullptr, c.plane_weights, c.planes)) return "not for AMX";
  if (cut < 0 || cut > parts) return "there are not so many parts";
  amx_state().fault = nullptr;
  for (const auto& [begin, end] : {std::pair{int64_t{0}, cut}, std::pair{cut, parts}}) {
    if (begin == end) continue;
    const auto bytes = static_cast<size_t>(amx::binary_amx_memory(c));
    void* memory = ::operator new(bytes, std::align_val_t{64});
    std::memset(memory, 0x55, bytes);
    amx::binary_amx(c, begin, end, memory);
    ::operator delete(memory, std::align_val_t{64});
  }
  if (amx_state().fault == nullptr && amx_state().configured) return "registers were not released";
  return amx_state().fault;
}

}  // namespace quantopt

extern "C" {

// geometry: images, height, width, channels, x_stride, out_height, out_width, outputs, y_stride, then pairs:
// kernel, stride, padding, dilation. x: int8 with x_scale, else bfloat16.
const char* conv_on_host(const int64_t* geometry, int64_t planes, const uint16_t* weights,
                         const int32_t* plane_weights, const float* scale, int64_t scale_stride,
                         const float* bias, const void* x, const float* x_scale, int32_t activation, float* y,
                         int64_t cut) {
  ConvProblem c{};
  int64_t* const sizes[] = {&c.images,     &c.height,    &c.width,   &c.channels, &c.x_stride,
                            &c.out_height, &c.out_width, &c.outputs, &c.y_stride};
  for (int64_t* size : sizes) *size = *geometry++;
  for (auto* pair : {c.kernel, c.stride, c.padding, c.dilation}) {
    for (int i = 0; i < 2; ++i) pair[i] = *geometry++;
  }
  c.planes = planes;
  c.tiles = weights;
  c.plane_weights = plane_weights;
  c.scale = scale;
  c.scale_stride = scale_stride;
  c.bias = bias;
  if (x_scale != nullptr) {
    c.q = static_cast<const int8_t*>(x);
    c.x_scale = x_scale;
  } else {
    c.x_bf16 = static_cast<const uint16_t*>(x);
  }
  c.activation = static_cast<Activation>(activation);
  c.y = y;
  return conv_on_emulated_amx(c, cut);
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
