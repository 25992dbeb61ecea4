// Tiles (core/tile.h) that remember which bits they were derived from, so that they serve no others. Copies
// remember nothing, as those of a program that was saved: on the CPU they are compared with what the bits
// give, once.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <functional>

#include "memory.h"

namespace quantopt {

// What tiles were made for: the length of a row, kernel positions and groups.
using TilesForm = std::array<int64_t, 3>;

// Lets `tiles`, which were derived from `bits`, remember that: their storage holds that of the bits, so that
// no other bits can take its place.
void tie_tiles(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form);

// Whether `tiles` were derived in this form from these very bits, and neither was written to since (in ways
// that torch counts), or are known to be equal to those. Costs some nanoseconds, on any device.
bool tiles_fit(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form);

// What derive() makes of `bits`; if `tiles`, which are of its size and type, hold the same and are not tied
// to other bits: `tiles`, which are then known to fit these bits. On other devices than the CPU nothing is
// compared.
at::Tensor derived_or_equal(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form,
                            const std::function<at::Tensor()>& derive);

// `tiles` if they fit `bits`; else what derive() returns, for this call alone. Tiles that are not `size`
// elements of `type` are an error; null, or of no elements, are none, and so are those of the other kind of
// device, which a program that was exported there still holds when it is moved here.
template <class Derive>
at::Tensor tiles_or_derived(const at::Tensor* tiles, const at::Tensor& bits, const TilesForm& form,
                            at::ScalarType type, int64_t size, const Derive& derive) {
  if (tiles == nullptr || tiles->numel() == 0) return derive();
  const bool of_other_device = tiles->scalar_type() == (type == at::kShort ? at::kInt : at::kShort);
  if (of_other_device && tiles->device() == bits.device()) return derive();
  TORCH_CHECK_VALUE(tiles->device() == bits.device() && tiles->scalar_type() == type &&
                        tiles->is_contiguous() && tiles->numel() == size,
                    "quantopt: tiles do not belong to these bits; derive them from the bits again");
  check_memory(*tiles, "quantopt", "tiles");
  return tiles_fit(*tiles, bits, form) ? *tiles : derived_or_equal(*tiles, bits, form, derive);
}

// What derive() makes of `scale` in this form. `tiles` that fit their bits keep the last that was made and
// give it again until the scale is written to (in ways that torch counts).
at::Tensor kept_with_tiles(const at::Tensor& tiles, const at::Tensor& scale, int64_t form,
                           const std::function<at::Tensor()>& derive);

}  // namespace quantopt
