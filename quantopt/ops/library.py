"""Every operator that Python registers, and the shapes (fakes) of all operators; csrc/ops.cpp has the other schemas."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantopt import _extension
from quantopt.packed_weight import ConvGeometry, PackedWeight, planes_of
from quantopt.rules import StepRecord

# torch.library.custom_op would import triton with this module.
_library = torch.library.Library("quantopt", "FRAGMENT")
_library.define(
    "binary_linear_triton(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int in_features, int[] plane_weights, "
    "int group_size, str compute, str activation) -> Tensor"
)
_library.define(
    "binary_conv2d_triton(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int groups, int[] plane_weights, str compute, str activation) -> Tensor"
)


@torch.library.impl(_library, "binary_linear_triton", "CUDA")
def _linear_in_triton(x: Tensor, *arguments: Any) -> Tensor:
    from quantopt.kernels import binary_linear as kernels

    *weight, compute, activation = arguments
    y: Tensor = kernels.binary_linear(x, PackedWeight(*weight), compute, activation)
    return y


@torch.library.impl(_library, "binary_conv2d_triton", "CUDA")
def _conv2d_in_triton(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    from quantopt.kernels import binary_conv as kernels

    kernel_size, stride, padding, dilation, groups, plane_weights, compute, activation = arguments
    geometry = ConvGeometry(kernel_size, stride, padding, dilation, groups)
    in_features = x.shape[1] // groups * geometry.taps
    weight = PackedWeight(bits, scale, bias, in_features, plane_weights)
    y: Tensor = kernels.binary_conv2d(x, weight, geometry, compute, activation)
    return y


def _empty_linear(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    plane_weights: list[int],
    *_: Any,
    **__: Any,
) -> Tensor:
    weight = PackedWeight(bits, scale, bias, in_features, plane_weights)
    weight.check_devices(x)  # with bits on "meta" this runs for any x
    return x.new_empty([*x.shape[:-1], weight.outputs])


def _empty_conv2d(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    plane_weights: list[int],
    *_: Any,
    **__: Any,
) -> Tensor:
    geometry = ConvGeometry(kernel_size, stride, padding, dilation, groups)
    in_features = x.shape[1] // groups * geometry.taps
    weight = PackedWeight(bits, scale, bias, in_features, plane_weights)
    weight.check_devices(x)
    return torch.empty(
        [x.shape[0], weight.outputs, *geometry.output_size(x)],
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _empty_tiles(bits: Tensor, in_features: int) -> Tensor:
    return _empty_layout(bits, planes_of(bits), bits.shape[-2], in_features)


def _empty_conv_tiles(bits: Tensor, channels: int, taps: int, groups: int, group_size: int = 0) -> Tensor:
    outputs, planes = bits.shape[-2] // groups, planes_of(bits)
    if bits.device.type == "cuda":
        if group_size > 0:
            return bits.new_empty([0], dtype=torch.int32)
        return _empty_layout(bits, groups * planes, outputs, taps * -(-channels // 64) * 64)
    if not _extension.conv_takes_tiles(outputs, channels, taps, groups, group_size):
        return bits.new_empty([0], dtype=torch.int16)
    if group_size > 0:
        channels, taps = channels * taps, 1
    return _empty_layout(bits, groups * planes * taps, outputs, channels)


def _empty_layout(bits: Tensor, matrices: int, outputs: int, inputs: int) -> Tensor:
    """Tiles of so many matrices of bits, [outputs, inputs] each."""
    rows = -(-outputs // 32)
    if bits.device.type == "cuda":
        return bits.new_empty([matrices, rows * -(-inputs // 128) * 128], dtype=torch.int32)
    return bits.new_empty([matrices, rows * -(-inputs // 16) * 32], dtype=torch.int16)


def _no_result(*arguments: Any) -> None:
    """Of fused_step, which changes its arguments alone. A single meta tensor leads here, where nothing is stepped."""
    StepRecord(*arguments).check_meta()


torch.library.register_fake("quantopt::binary_linear_triton", _empty_linear)
torch.library.register_fake("quantopt::binary_conv2d_triton", _empty_conv2d)
if _extension.error is None:
    torch.library.register_fake("quantopt::binary_linear", _empty_linear)
    torch.library.register_fake("quantopt::binary_conv2d", _empty_conv2d)
    torch.library.register_fake("quantopt::binary_tiles", _empty_tiles)
    torch.library.register_fake("quantopt::binary_conv_tiles", _empty_conv_tiles)
    torch.library.register_fake("quantopt::fused_step", _no_result)
