// Whether a tensor's memory is there: torch lets a storage be freed or resized below the tensors on it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

namespace quantopt {

// Of a tensor whose elements lie side by side.
inline bool has_dense_memory(const at::Tensor& tensor) {
  const c10::TensorImpl& t = *tensor.unsafeGetTensorImpl();
  const c10::StorageImpl* const storage = t.unsafe_storage().unsafeGetStorageImpl();
  return storage != nullptr &&
         storage->nbytes() >= static_cast<size_t>(t.storage_offset() + t.numel()) * t.itemsize();
}

// A few instructions, since a small product takes 2 us in all.
inline bool has_memory(const at::Tensor& tensor) {
  const c10::TensorImpl& t = *tensor.unsafeGetTensorImpl();
  int64_t elements = t.numel();
  if (!t.is_contiguous()) {
    elements = 1;
    for (int64_t i = 0; i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
  }
  const c10::StorageImpl* const storage = t.unsafe_storage().unsafeGetStorageImpl();
  if (storage == nullptr) return false;
  return elements == 0 ||
         storage->nbytes() >= static_cast<size_t>(t.storage_offset() + elements) * t.itemsize();
}

// An error that names the argument unless its memory is there.
inline void check_memory(const at::Tensor& tensor, const char* operation, const char* argument) {
  TORCH_CHECK_VALUE(has_memory(tensor), operation, ": ", argument,
                    " has no memory: its storage was freed or resized");
}

}  // namespace quantopt
