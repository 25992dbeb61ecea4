// Whether tensors lie in memory as they did: what a step that was laid out once depends on.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace quantopt {

class TensorWatch {
 public:
  // Remembers address, dtype, sizes and strides of the tensors, and holds them.
  void add(at::TensorList tensors);
  // Whether all are as they were when they were added.
  bool unchanged() const;

 private:
  struct Watched {
    at::Tensor tensor;
    const void* data;
    caffe2::TypeMeta dtype;
  };
  std::vector<Watched> watched_;
  std::vector<int64_t> layouts_;  // of each tensor its number of dimensions, sizes, strides
};

// Whether kernels may read a gradient along with its weight: same dtype, device, sizes and strides, dense,
// and not a wrapper or a negated view.
bool gradient_fits(const at::Tensor& grad, const at::Tensor& weight);

}  // namespace quantopt
