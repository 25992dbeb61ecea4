"""The bits in the order that the kernels of their device read, derived once and passed to the products as ``tiles``.

Tiles remember the bits that they come from, and keep their memory alive: with other bits, or when these were written to
since, the products derive the order again at each call. A copy of tiles remembers nothing, as that in a program of
torch.export that was saved: on the CPU it is compared once with what the bits give, and serves them from then on if it
is equal; on a GPU it does not serve.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantopt import backends
from quantopt.packed_weight import check_bits, planes_of


def binary_tiles(bits: Tensor, in_features: int) -> Tensor | None:
    """``bits`` in the order the kernels of their device read; None where no kernel reads one."""
    check_bits(bits, in_features, (2, 3))
    if backends.choose("binary_linear", bits.device, torch.float32).name not in ("cpu", "cuda"):
        return None
    return _or_none(torch.ops.quantopt.binary_tiles(bits, in_features))


def conv_tiles(
    bits: Tensor, channels: int, kernel_size: Sequence[int], groups: int = 1, group_size: int = 0
) -> Tensor | None:
    """The same for a convolution: bits of [N, channels of a group, kh, kw], flattened per output channel.

    None too where the CPU runs ATen's convolution: for small groups
    (with less than a quarter of the 32 outputs or 16 channels that are taken together), and for scales of groups of
    weights that are no multiple of 16 or, unless the kernel is 1x1, have fewer than 64 outputs.
    """
    taps = kernel_size[0] * kernel_size[1]
    check_bits(bits, channels * taps, (2, 3))
    # x is not known: int8 of 16-bit x is what the most convolutions take.
    product = backends.Product(
        planes_of(bits), group_size, "int8", groups, channels, bits.shape[-2] // groups
    )
    chosen = backends.choose("binary_conv2d", bits.device, torch.bfloat16, product=product).name
    if chosen not in ("cpu", "cuda"):
        return None
    return _or_none(torch.ops.quantopt.binary_conv_tiles(bits, channels, taps, groups, group_size))


def _or_none(tiles: Tensor) -> Tensor | None:
    return tiles if tiles.numel() > 0 else None
