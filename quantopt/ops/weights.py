"""Weights packed at one bit per plane: packing signs, and the public arguments as one :class:`PackedWeight`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantopt.packed_weight import PackedWeight, check_bits, check_memory, kind_of
from quantopt.reference import binary as reference
from quantopt.reference.levels import COUNTS

# 1, 2, 4, ...; an odd number of levels has one more plane of weight 1, which the outer level alone sets.
_PLANE_WEIGHTS = {K: [1 << i for i in range(K.bit_length() - 1)] + [1] * (K % 2) for K in COUNTS}


def plane_weights_of(levels: int) -> list[int]:
    """Weights of the bit planes of a uniform grid: 1, 2, ..., K/2 for K = ``levels`` = 2, 4, 8 or 16; 1, 1 for 3
    (ternary); 1, 2, 4, 8, 1 for 17. Their sum is K-1. Raises ValueError for another K."""
    weights = _PLANE_WEIGHTS.get(levels)
    if weights is None:
        raise ValueError(f"levels must be 2, 3, 4, 8, 16 or 17, not {levels!r}")
    return list(weights)


def planes_of_codes(codes: Tensor, levels: int) -> Tensor:
    """``codes`` [...] in 0..K-1, uint8, as bits 0 and 1 of planes [P, ...]: with w = plane_weights_of(levels),
    code = sum_i w[i] * bits[i], and so the level, as a multiple of its scale, 2 code - (K-1) = sum_i w[i] * (±1)."""
    binary = levels.bit_length() - 1
    inner = codes.clamp(max=(1 << binary) - 1)
    planes = [inner >> i & 1 for i in range(binary)]
    if levels % 2:
        planes.append((codes == levels - 1).to(codes.dtype))
    return torch.stack(planes)


def pack_signs(w: Tensor) -> Tensor:
    """Signs of ``w`` [..., K], any floating type, as uint8 [..., ceil(K/8)], least significant bit first.

    Bit 1 = +1, bit 0 = -1, sign(0) = sign(-0.0) = +1, NaN counts as -1; the spare bits of the last byte are 0.
    Raises TypeError if ``w`` is not a floating tensor, ValueError if it has no dimension.
    """
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"w must be a floating tensor, not {kind_of(w)}")
    if w.dim() == 0:
        raise ValueError("w must have at least one dimension: its last one is packed")
    check_memory("w", w)
    return reference.pack_signs(w.detach())


def unpack_signs(bits: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of :func:`pack_signs`: uint8 [..., ceil(K/8)] -> ±1 [..., K] of ``dtype``, K = ``in_features``."""
    check_bits(bits, in_features, range(1, 65))
    check_memory("bits", bits)
    return reference.unpack_signs(bits, in_features, dtype)


def checked_weight(
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    plane_weights: Sequence[int] | None,
    group_size: int,
    tiles: Tensor | None,
) -> PackedWeight:
    """The public arguments as one record; ``plane_weights`` None stands for 1, 2, 4, ..."""
    check_bits(bits, in_features, (2, 3))
    planes = bits.shape[0] if bits.dim() == 3 else 1
    if plane_weights is not None and not isinstance(plane_weights, Sequence):
        raise TypeError(f"plane_weights must be a list of {planes} integers, not {kind_of(plane_weights)}")
    weights = [1 << i for i in range(planes)] if plane_weights is None else list(plane_weights)
    weight = PackedWeight(bits, scale, bias, in_features, weights, group_size, tiles)
    weight.check()
    return weight
