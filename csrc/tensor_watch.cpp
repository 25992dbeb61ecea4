#include "tensor_watch.h"

#include "memory.h"

namespace quantopt {
namespace {

// A loop, as std::equal of so few numbers would call memcmp.
bool equal(at::IntArrayRef values, const int64_t* expected) {
  for (int64_t value : values) {
    if (value != *expected++) return false;
  }
  return true;
}

// Tensors made in inference mode have no count: nothing is seen of writes to them.
int64_t version_of(const at::Tensor& tensor) {
  const c10::VariableVersion& version = tensor.unsafeGetTensorImpl()->version_counter();
  return version.enabled() ? static_cast<int64_t>(version.current_version()) : -1;
}

const c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

}  // namespace

void TensorWatch::add(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    watched_.push_back({tensor, tensor.unsafeGetTensorImpl()->data(), tensor.dtype()});
    layouts_.push_back(tensor.dim());
    layouts_.insert(layouts_.end(), tensor.sizes().begin(), tensor.sizes().end());
    layouts_.insert(layouts_.end(), tensor.strides().begin(), tensor.strides().end());
  }
}

void TensorWatch::count_writes(at::TensorList tensors) {
  counted_ = tensors.vec();
  storages_.clear();
  for (const at::Tensor& tensor : counted_) {
    storages_.push_back(tensor.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl());
  }
  note_writes();
}

void TensorWatch::note_writes() {
  versions_.clear();
  for (const at::Tensor& tensor : counted_) versions_.push_back(version_of(tensor));
}

bool TensorWatch::unchanged() const {
  for (size_t i = 0; i < counted_.size(); ++i) {
    if (version_of(counted_[i]) != versions_[i] ||
        storage_of(counted_[i]) != storages_[i]._unsafe_get_target()) {
      return false;
    }
  }
  const int64_t* layout = layouts_.data();
  for (const Watched& watched : watched_) {
    const c10::TensorImpl& tensor = *watched.tensor.unsafeGetTensorImpl();
    const int64_t dim = *layout++;
    if (tensor.data() != watched.data || tensor.dtype() != watched.dtype || tensor.dim() != dim ||
        !equal(tensor.sizes(), layout) || !equal(tensor.strides(), layout + dim)) {
      return false;
    }
    layout += 2 * dim;
  }
  return true;
}

bool gradient_fits(const at::Tensor& grad, const at::Tensor& weight) {
  return grad.defined() && grad.dtype() == weight.dtype() && grad.layout() == at::kStrided &&
         grad.device() == weight.device() && grad.dim() == weight.dim() &&
         equal(grad.sizes(), weight.sizes().data()) &&
         (equal(grad.strides(), weight.strides().data()) ||
          (grad.is_contiguous() && weight.is_contiguous())) &&
         !grad.is_neg() && !grad.unsafeGetTensorImpl()->is_python_dispatch() && has_dense_memory(grad);
}

}  // namespace quantopt
