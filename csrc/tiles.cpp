#include "tiles.h"

#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace quantopt {
namespace {

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

// What was derived from scales.
struct Scales {
  c10::Storage scale;
  const void* data = nullptr;
  std::vector<int64_t> sizes;
  int64_t version = 0, form = 0;
  at::Tensor derived;
};

struct KeptScales {
  std::mutex mutex;
  Scales last;
};

// What tiles were derived from, without the storage of the bits.
struct Source {
  const void *data, *tiles_data;  // views of one storage may be tiles of several bits
  std::vector<int64_t> sizes, strides;
  int64_t version, tiles_version;
  TilesForm form;

  Source(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& tiles_form)
      : data(bits.const_data_ptr()),
        tiles_data(tiles.const_data_ptr()),
        sizes(bits.sizes().vec()),
        strides(bits.strides().vec()),
        version(static_cast<int64_t>(bits._version())),
        tiles_version(static_cast<int64_t>(tiles._version())),
        form(tiles_form) {}

  bool fits(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& wanted) const {
    return form == wanted && data == bits.const_data_ptr() && tiles_data == tiles.const_data_ptr() &&
           version == static_cast<int64_t>(bits._version()) &&
           tiles_version == static_cast<int64_t>(tiles._version()) &&
           bits.sizes() == at::IntArrayRef(sizes) && bits.strides() == at::IntArrayRef(strides);
  }
};

// The memory of tiles, and what they were derived from.
struct Tied {
  c10::DataPtr memory;
  c10::Storage bits;
  Source source;
  KeptScales scales;
};

void delete_tied(void* tied) { delete static_cast<Tied*>(tied); }

Tied* tied_of(const at::Tensor& tiles) {
  return tiles.has_storage() ? tiles.storage().data_ptr().cast_context<Tied>(&delete_tied) : nullptr;
}

// Tiles that are not tied, but were found to be those of these bits. Their storage belongs to others, who may
// read it meanwhile: it stays as it is, and what is known of it lies here.
struct Adopted {
  // Weak, so that neither lives longer; no other storage gets the address meanwhile. Scales, and what was
  // derived from them, stay until other tiles are adopted.
  WeakStorage tiles, bits;
  Source source;
  KeptScales scales;
};

struct AllAdopted {
  std::mutex mutex;
  std::unordered_map<const c10::StorageImpl*, std::shared_ptr<Adopted>> of_tiles;
};

AllAdopted& adopted() {
  static auto* const all = new AllAdopted;  // tensors may outlive what is destroyed when the process ends
  return *all;
}

const c10::StorageImpl* address_of(const at::Tensor& tensor) {
  return tensor.storage().unsafeGetStorageImpl();
}

std::shared_ptr<Adopted> adopted_of(const at::Tensor& tiles) {
  if (!tiles.has_storage()) return nullptr;
  AllAdopted& all = adopted();
  const std::lock_guard lock(all.mutex);
  const auto found = all.of_tiles.find(address_of(tiles));
  return found == all.of_tiles.end() ? nullptr : found->second;
}

void adopt(const at::Tensor& tiles, const at::Tensor& bits, const Source& source) {
  std::shared_ptr<Adopted> made(
      new Adopted{tiles.storage().getWeakStorageImpl(), bits.storage().getWeakStorageImpl(), source, {}});
  // What is gone is freed without the lock: its memory may be Python's, who has one too.
  std::vector<std::shared_ptr<Adopted>> gone;
  AllAdopted& all = adopted();
  const std::lock_guard lock(all.mutex);
  for (auto i = all.of_tiles.begin(); i != all.of_tiles.end();) {
    const bool expired = i->second->tiles.expired() || i->second->bits.expired();
    if (expired) gone.push_back(std::move(i->second));
    i = expired ? all.of_tiles.erase(i) : std::next(i);
  }
  made.swap(all.of_tiles[address_of(tiles)]);
}

bool countable(const at::Tensor& tiles, const at::Tensor& bits) {
  // Inference tensors do not count what is written.
  return tiles.has_storage() && bits.has_storage() && !bits.is_inference() && !tiles.is_inference();
}

}  // namespace

void tie_tiles(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form) {
  if (tiles.numel() == 0 || !countable(tiles, bits)) return;
  c10::StorageImpl* const storage = tiles.storage().unsafeGetStorageImpl();
  void* const data = storage->mutable_data();
  auto* const tied = new Tied{{}, bits.storage(), Source(tiles, bits, form), {}};
  tied->memory = storage->set_data_ptr({data, tied, &delete_tied, tiles.device()});
}

bool tiles_fit(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form) {
  if (!countable(tiles, bits)) return false;
  if (const Tied* const tied = tied_of(tiles))
    return tied->bits.is_alias_of(bits.storage()) && tied->source.fits(tiles, bits, form);
  const std::shared_ptr<Adopted> known = adopted_of(tiles);
  return known != nullptr && known->bits._unsafe_get_target() == address_of(bits) &&
         known->source.fits(tiles, bits, form);
}

at::Tensor derived_or_equal(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form,
                            const std::function<at::Tensor()>& derive) {
  // On GPUs the comparison would wait for the device.
  if (!tiles.is_cpu() || !countable(tiles, bits) || tied_of(tiles) != nullptr) return derive();
  const Source source(tiles, bits, form);  // before the bits are read
  at::Tensor derived = derive();
  if (tiles.nbytes() != derived.nbytes() ||
      std::memcmp(tiles.const_data_ptr(), derived.const_data_ptr(), tiles.nbytes()) != 0) {
    return derived;
  }
  adopt(tiles, bits, source);
  return tiles;
}

at::Tensor kept_with_tiles(const at::Tensor& tiles, const at::Tensor& scale, int64_t form,
                           const std::function<at::Tensor()>& derive) {
  Tied* const tied = tied_of(tiles);
  const std::shared_ptr<Adopted> known = tied == nullptr ? adopted_of(tiles) : nullptr;
  if ((tied == nullptr && known == nullptr) || !scale.has_storage() || scale.is_inference()) return derive();
  KeptScales& kept = tied != nullptr ? tied->scales : known->scales;
  const auto version = static_cast<int64_t>(scale._version());
  {
    const std::lock_guard lock(kept.mutex);
    const Scales& s = kept.last;
    if (s.derived.defined() && s.form == form && s.scale.is_alias_of(scale.storage()) &&
        s.data == scale.const_data_ptr() && s.version == version &&
        scale.sizes() == at::IntArrayRef(s.sizes)) {
      return s.derived;
    }
  }
  at::Tensor derived = derive();
  Scales made{scale.storage(), scale.const_data_ptr(), scale.sizes().vec(), version, form, derived};
  {
    const std::lock_guard lock(kept.mutex);
    std::swap(kept.last, made);
  }
  return derived;  // what was kept before goes without the lock: its memory may be Python's, who has one too
}

}  // namespace quantopt
