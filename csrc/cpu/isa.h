#pragma once

// The instruction sets for which the torch-free kernels in csrc/cpu/kernels are compiled, and the choice
// among them at run time. setup.py defines QUANTOPT_HAVE_<ISA> for each that was built (portable always is).

namespace quantopt {

// In increasing order: the best that a machine supports is the last. Each contains the ones before, but for
// avxvnni (AVX2 with products of bytes and GFNI), which processors with AVX-512 may lack. amx adds products
// on its tile registers (kernels/amx_linear.h, amx_conv.h) to the kernels of avx512vnni.
enum class Isa { portable, avx2, avxvnni, avx512, avx512vnni, amx };
constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avxvnni, Isa::avx512, Isa::avx512vnni, Isa::amx};

const char* isa_name(Isa isa);

// Whether the instruction set was built and this processor and operating system run it. Asks Linux, at the
// first call for amx, to let this process use the tile registers.
bool isa_supported(Isa isa);

// The best supported instruction set.
Isa best_isa();

// best_isa(), or the one that the environment variable QUANTOPT_CPU_ISA names (portable, avx2, avxvnni,
// avx512, avx512vnni, amx; empty: no choice). Throws std::runtime_error with the reason if the name is
// unknown or the instruction set is not supported. Any thread may call it.
Isa active_isa();

// Reads the variable: when the extension is loaded, and for tests. Not while a thread may write to the
// environment.
void read_isa_choice();

}  // namespace quantopt

// Declares functions in the namespace of every instruction set up to avx512vnni, e.g.
//     QUANTOPT_DECLARE_PER_ISA(void scale(float* x, int64_t n, float a);)
// declares quantopt::portable::scale, quantopt::avx2::scale, ... Use at global scope. Only those that
// setup.py's table compiles are defined.
#define QUANTOPT_DECLARE_PER_ISA(...) \
  namespace quantopt::portable {      \
  __VA_ARGS__                         \
  }                                   \
  namespace quantopt::avx2 {          \
  __VA_ARGS__                         \
  }                                   \
  namespace quantopt::avxvnni {       \
  __VA_ARGS__                         \
  }                                   \
  namespace quantopt::avx512 {        \
  __VA_ARGS__                         \
  }                                   \
  namespace quantopt::avx512vnni {    \
  __VA_ARGS__                         \
  }

// OF(n) for the namespace n of the best kernels that were built for `isa`, e.g.
//     #define KERNELS(n) Kernels{&quantopt::n::scale}
//     const Kernels kernels = QUANTOPT_FOR_ISA(isa, KERNELS);
#define QUANTOPT_FOR_ISA(isa, OF) QUANTOPT_CHOOSE_ISA(isa, OF, avxvnni)
// The same for kernels that are not compiled for avxvnni: those of avx2 take their place.
#define QUANTOPT_FOR_ISA_BUT_AVXVNNI(isa, OF) QUANTOPT_CHOOSE_ISA(isa, OF, avx2)
#define QUANTOPT_CHOOSE_ISA(isa, OF, OF_AVXVNNI) \
  [](::quantopt::Isa chosen) {                   \
    switch (chosen) {                            \
      QUANTOPT_CASE_AVX512VNNI(OF)               \
      QUANTOPT_CASE_AVX512(OF)                   \
      QUANTOPT_CASE_AVXVNNI(OF, OF_AVXVNNI)      \
      QUANTOPT_CASE_AVX2(OF)                     \
      default: return OF(portable);              \
    }                                            \
  }(isa)
#ifdef QUANTOPT_HAVE_AVX512VNNI
#define QUANTOPT_CASE_AVX512VNNI(OF) \
  case ::quantopt::Isa::amx:         \
  case ::quantopt::Isa::avx512vnni: return OF(avx512vnni);
#else
#define QUANTOPT_CASE_AVX512VNNI(OF)
#endif
#ifdef QUANTOPT_HAVE_AVX512
#define QUANTOPT_CASE_AVX512(OF) \
  case ::quantopt::Isa::avx512: return OF(avx512);
#else
#define QUANTOPT_CASE_AVX512(OF)
#endif
#ifdef QUANTOPT_HAVE_AVXVNNI
#define QUANTOPT_CASE_AVXVNNI(OF, name) \
  case ::quantopt::Isa::avxvnni: return OF(name);
#else
#define QUANTOPT_CASE_AVXVNNI(OF, name)
#endif
#ifdef QUANTOPT_HAVE_AVX2
#define QUANTOPT_CASE_AVX2(OF) \
  case ::quantopt::Isa::avx2: return OF(avx2);
#else
#define QUANTOPT_CASE_AVX2(OF)
#endif
