#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace quantopt {
namespace {

bool built(Isa isa) {
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2:
#ifdef QUANTOPT_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Isa::avxvnni:
#ifdef QUANTOPT_HAVE_AVXVNNI
      return built(Isa::avx2);
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
    case Isa::amx:
#ifdef QUANTOPT_HAVE_AMX
      return built(Isa::avx512vnni);
#else
      return false;
#endif
  }
  return false;
}

constexpr const char* kNoProcessor = "is not supported by this processor";

#if defined(__x86_64__)

// AVX-VNNI, in the encoding of AVX2, for which gcc 12 has no name.
bool ask_for_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvxVnni = 1u << 4;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvxVnni) != 0;
}

// Why tile registers cannot be used, or null. Linux grants them for the whole process, to threads that run
// already too, and keeps no count: asking again is harmless.
const char* amx_refusal() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kOsXsave = 1u << 27;
  constexpr unsigned kNeeded = kBFloat16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return kNoProcessor;
  constexpr unsigned kGfni = 1u << 8;  // by which weights are expanded
  if ((c & kGfni) == 0) return kNoProcessor;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsXsave) == 0) return kNoProcessor;
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTileState = 3u << 17;  // tile configuration and data
  if ((low & kTileState) != kTileState)
    return "needs tile registers, which this operating system does not enable";
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return "needs tile registers, for which Linux gave no permission (arch_prctl)";
  }
  return nullptr;
#else
  return "needs Linux";
#endif
}

#endif

// Why this machine does not run the instruction set, or null. The compiler's builtins also ask whether the
// operating system saves the wide registers.
const char* refusal(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("popcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool vnni = v4 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::portable: return nullptr;
    case Isa::avx2: return v3 ? nullptr : kNoProcessor;
    case Isa::avxvnni: {
      static const bool avx_vnni = ask_for_avx_vnni();  // virtual machines take long to answer
      return v3 && avx_vnni && __builtin_cpu_supports("gfni") ? nullptr : kNoProcessor;
    }
    case Isa::avx512: return v4 ? nullptr : kNoProcessor;
    case Isa::avx512vnni: return vnni ? nullptr : kNoProcessor;
    case Isa::amx: {
      static const char* const amx = amx_refusal();
      return vnni ? amx : kNoProcessor;
    }
  }
  return kNoProcessor;
#else
  return isa == Isa::portable ? nullptr : kNoProcessor;
#endif
}

Isa detect_best() {
  Isa best = Isa::portable;
  for (Isa isa : kIsas) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

std::atomic<const std::string*> wanted{nullptr};  // QUANTOPT_CPU_ISA as it was read, in a string that stays

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avxvnni: return "avxvnni";
    case Isa::avx512: return "avx512";
    case Isa::avx512vnni: return "avx512vnni";
    case Isa::amx: return "amx";
  }
  return "unknown";
}

bool isa_supported(Isa isa) { return built(isa) && refusal(isa) == nullptr; }

Isa best_isa() {
  static const Isa best = detect_best();
  return best;
}

Isa active_isa() {
  const std::string* const name = wanted.load();
  if (name == nullptr || name->empty()) return best_isa();
  const std::string prefix = "QUANTOPT_CPU_ISA=" + *name;
  for (Isa isa : kIsas) {
    if (*name != isa_name(isa)) continue;
    if (!built(isa)) throw std::runtime_error(prefix + " was not built");
    if (const char* why = refusal(isa)) throw std::runtime_error(prefix + " " + why);
    return isa;
  }
  throw std::runtime_error(prefix + " is unknown: use portable, avx2, avxvnni, avx512, avx512vnni or amx");
}

void read_isa_choice() {
  static std::set<std::string> names;
  const char* const name = std::getenv("QUANTOPT_CPU_ISA");
  wanted.store(&*names.insert(name == nullptr ? "" : name).first);
}

}  // namespace quantopt
