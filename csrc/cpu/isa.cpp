#include "isa.h"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace quantopt {
namespace {

constexpr std::array<Isa, 4> kAll = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512vnni};

bool built(Isa isa) {
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2:
#ifdef QUANTOPT_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#ifdef QUANTOPT_HAVE_AVX512
      return true;
#else
      return false;
#endif
    case Isa::avx512vnni:
#ifdef QUANTOPT_HAVE_AVX512VNNI
      return true;
#else
      return false;
#endif
  }
  return false;
}

// The compiler's builtins also ask whether the operating system saves the wide registers.
bool processor_runs(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("popcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool vnni = v4 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("gfni");
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return v3;
    case Isa::avx512: return v4;
    case Isa::avx512vnni: return vnni;
  }
  return false;
#else
  return isa == Isa::portable;
#endif
}

Isa detect_best() {
  Isa best = Isa::portable;
  for (Isa isa : kAll) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512vnni: return "avx512vnni";
  }
  return "unknown";
}

bool isa_supported(Isa isa) { return built(isa) && processor_runs(isa); }

Isa best_isa() {
  static const Isa best = detect_best();
  return best;
}

Isa active_isa() {
  const char* name = std::getenv("QUANTOPT_CPU_ISA");
  if (name == nullptr || *name == '\0') return best_isa();
  for (Isa isa : kAll) {
    if (std::string(name) != isa_name(isa)) continue;
    if (!built(isa)) throw std::runtime_error(std::string("QUANTOPT_CPU_ISA=") + name + " was not built");
    if (!processor_runs(isa)) {
      throw std::runtime_error(std::string("QUANTOPT_CPU_ISA=") + name +
                               " is not supported by this processor");
    }
    return isa;
  }
  throw std::runtime_error(std::string("QUANTOPT_CPU_ISA=") + name +
                           " is unknown: use portable, avx2, avx512 or avx512vnni");
}

}  // namespace quantopt
