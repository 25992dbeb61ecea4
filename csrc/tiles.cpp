#include "tiles.h"

#include <c10/core/StorageImpl.h>

#include <mutex>
#include <utility>
#include <vector>

namespace quantopt {
namespace {

// What was derived from scales.
struct Scales {
  c10::Storage scale;
  const void* data = nullptr;
  std::vector<int64_t> sizes;
  int64_t version = 0, form = 0;
  at::Tensor derived;
};

// The memory of tiles, and what they were derived from.
struct Tied {
  c10::DataPtr memory;
  c10::Storage bits;
  const void* data;
  std::vector<int64_t> sizes, strides;
  int64_t version, tiles_version;
  TilesForm form;
  std::mutex mutex;  // of `scales`
  Scales scales;
};

void delete_tied(void* tied) { delete static_cast<Tied*>(tied); }

}  // namespace

void tie_tiles(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form) {
  // Inference tensors do not count what is written.
  if (tiles.numel() == 0 || bits.is_inference() || tiles.is_inference()) return;
  c10::StorageImpl* const storage = tiles.storage().unsafeGetStorageImpl();
  void* const data = storage->mutable_data();
  auto* const tied = new Tied{{},
                              bits.storage(),
                              bits.const_data_ptr(),
                              bits.sizes().vec(),
                              bits.strides().vec(),
                              static_cast<int64_t>(bits._version()),
                              static_cast<int64_t>(tiles._version()),
                              form,
                              {},
                              {}};
  tied->memory = storage->set_data_ptr({data, tied, &delete_tied, tiles.device()});
}

bool tiles_fit(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form) {
  if (!tiles.has_storage() || !bits.has_storage() || bits.is_inference() || tiles.is_inference())
    return false;
  const auto* const tied = tiles.storage().data_ptr().cast_context<Tied>(&delete_tied);
  return tied != nullptr && tied->form == form && tied->bits.is_alias_of(bits.storage()) &&
         tied->data == bits.const_data_ptr() && tied->version == static_cast<int64_t>(bits._version()) &&
         tied->tiles_version == static_cast<int64_t>(tiles._version()) &&
         bits.sizes() == at::IntArrayRef(tied->sizes) && bits.strides() == at::IntArrayRef(tied->strides);
}

at::Tensor kept_with_tiles(const at::Tensor& tiles, const at::Tensor& scale, int64_t form,
                           const std::function<at::Tensor()>& derive) {
  auto* const tied =
      tiles.has_storage() ? tiles.storage().data_ptr().cast_context<Tied>(&delete_tied) : nullptr;
  if (tied == nullptr || !scale.has_storage() || scale.is_inference()) return derive();
  const auto version = static_cast<int64_t>(scale._version());
  {
    const std::lock_guard lock(tied->mutex);
    const Scales& s = tied->scales;
    if (s.derived.defined() && s.form == form && s.scale.is_alias_of(scale.storage()) &&
        s.data == scale.const_data_ptr() && s.version == version &&
        scale.sizes() == at::IntArrayRef(s.sizes)) {
      return s.derived;
    }
  }
  at::Tensor derived = derive();
  Scales made{scale.storage(), scale.const_data_ptr(), scale.sizes().vec(), version, form, derived};
  {
    const std::lock_guard lock(tied->mutex);
    std::swap(tied->scales, made);
  }
  return derived;  // what was kept before goes without the lock: its memory may be Python's, who has one too
}

}  // namespace quantopt
