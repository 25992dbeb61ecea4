#include "tiles.h"

#include <c10/core/StorageImpl.h>

#include <vector>

namespace quantopt {
namespace {

// The memory of tiles, and what they were derived from.
struct Tied {
  c10::DataPtr memory;
  c10::Storage bits;
  const void* data;
  std::vector<int64_t> sizes, strides;
  int64_t version, tiles_version;
  TilesForm form;
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
                              form};
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

}  // namespace quantopt
