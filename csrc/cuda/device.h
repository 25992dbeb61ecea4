// Where a kernel runs. No torch.
#pragma once

namespace quantopt {

struct CudaContext {
  int device;
  void* stream;    // cudaStream_t
  int capability;  // 80, 90, ...
  int processors;  // streaming multiprocessors
};

// Fills in all but the stream. Returns null, or the CUDA error.
const char* describe_device(int device, CudaContext& context);

}  // namespace quantopt
