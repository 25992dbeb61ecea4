// Whether tensors lie in memory as they did, and whether somebody has written to them: what a step that was
// laid out once depends on.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace quantopt {

class TensorWatch {
 public:
  // Remembers address, dtype, sizes and strides of the tensors, and holds them.
  void add(at::TensorList tensors);
  // Counts the writes to the tensors from now on, as torch does for autograd: all but those through .data and
  // by kernels that know the address alone.
  void count_writes(at::TensorList tensors);
  // Whether all are as they were when they were added, and the counted ones have the same storage and have
  // not been written to since the last note_writes().
  bool unchanged() const;
  // The writes until now are known.
  void note_writes();
  // torch's count of the writes to counted tensor i at the last note_writes().
  int64_t version(size_t i) const { return versions_.at(i); }

 private:
  struct Watched {
    at::Tensor tensor;
    const void* data;
    caffe2::TypeMeta dtype;
  };
  std::vector<Watched> watched_;
  std::vector<int64_t> layouts_;  // of each tensor its number of dimensions, sizes, strides
  std::vector<at::Tensor> counted_;
  std::vector<int64_t> versions_;
  // Weak, so that memory that is given up is freed. A storage made later is another one, though it may have
  // the address of the memory before.
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages_;
};

// Whether kernels may read a gradient along with its weight: same dtype, device, sizes and strides, dense,
// and not a wrapper or a negated view.
bool gradient_fits(const at::Tensor& grad, const at::Tensor& weight);

}  // namespace quantopt
