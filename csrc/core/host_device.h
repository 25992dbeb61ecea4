#pragma once

// QUANTOPT_HOST_DEVICE marks the scalar functions that state an update rule, so that the CPU and the CUDA
// kernels compile the same source:
//     QUANTOPT_HOST_DEVICE float rule(float w) { ... }
// They are always inlined. On the CPU this also keeps code of one instruction set from being chosen by the
// linker for another: the kernels are compiled several times, and an out-of-line copy would be shared between
// them.
#if defined(__CUDACC__)
#define QUANTOPT_HOST_DEVICE __host__ __device__ inline __attribute__((always_inline))
#elif defined(__GNUC__) || defined(__clang__)
#define QUANTOPT_HOST_DEVICE inline __attribute__((always_inline))
#else
#define QUANTOPT_HOST_DEVICE inline
#endif
