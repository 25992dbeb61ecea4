"""binary_conv2d: y = activation(conv2d(x, W) + b) with W packed at one bit per plane.

quantopt/backends.py chooses the kernels; the reference (quantopt/reference/binary.py) runs torch's convolution on
expanded weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from quantopt import backends
from quantopt.ops.inputs import (
    check_activation,
    check_floating,
    compute_mode,
    needs_gradient,
    straight_through,
)
from quantopt.ops.weights import checked_weight
from quantopt.packed_weight import ConvGeometry, PackedWeight, kind_of
from quantopt.reference import binary as reference


def _pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} must be one or two integers of at least {least}, not {value!r}")
    return pair[0], pair[1]


def binary_conv2d(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    compute: str = "auto",
    group_size: int = 0,
    plane_weights: Sequence[int] | None = None,
    tiles: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(conv2d) with packed weights W [N, C/groups, kh, kw], each output channel flattened to a row of bits.

    Args:
        x: [B, C, H, W] or [C, H, W], fp32, bf16 or fp16, any strides.
        bits: uint8 [N, ceil(K/8)], or [P, N, ceil(K/8)] with P planes, K = C/groups * kh * kw.
        compute: as in :func:`binary_linear`, but "int8" has one s for each image (over C, H and W). Rows are here the
            output pixels of all images.

    scale, bias, group_size, plane_weights, tiles and activation are as in :func:`binary_linear`; kernel_size, stride,
    padding (zeros), dilation and groups as in torch.nn.functional.conv2d.

    On GPUs one kernel takes all of them but what :data:`quantopt.backends.LIMITS` lists. On the CPU a kernel of 1x1
    without padding and groups is a linear layer; else, with a processor with AVX2 and neither small groups nor an odd
    group_size (see :func:`quantopt.ops.tiles.conv_tiles`; modules keep the tiles), the product runs on the packed
    weights too. Where none of this holds, W is expanded to ±1 (exact in every type) for each call, and torch's
    convolution runs in fp32: that saves memory but no time. So it does where gradients for x or bias are asked for:
    call packed networks under torch.inference_mode or no_grad. The same bits for any number of threads and images are
    promised for the packed kernels alone; with AMX not for 1x1 kernels but in "int8", as there a threshold of rows is
    one of the pixels of all images. With AMX the power of two of "exact" and "bf16" (see :func:`binary_linear`) is that
    of an image: what is lost is less than 2^-60 of the largest |x| of the image, in 1x1 kernels of the pixel.

    Returns [B, N, H', W'] of the type of x, channels last in memory. Differentiable with respect to x and bias. Raises
    TypeError or ValueError naming the argument that does not fit.
    """
    geometry = ConvGeometry(
        _pair(kernel_size, "kernel_size", 1),
        _pair(stride, "stride", 1),
        _pair(padding, "padding", 0),
        _pair(dilation, "dilation", 1),
        groups,
    )
    check_floating(x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, C, H, W] or [C, H, W], not of shape {list(x.shape)}")
    if not isinstance(bits, Tensor) or bits.dim() not in (2, 3):
        raise TypeError(
            f"bits must be a uint8 tensor [N, ceil(K/8)] or [P, N, ceil(K/8)], not {kind_of(bits)}"
        )
    channels = x.shape[-3]
    if not isinstance(groups, int) or groups < 1 or channels % groups or bits.shape[-2] % groups:
        raise ValueError(
            f"groups={groups!r} must be an integer that divides the {channels} channels of x and "
            f"the {bits.shape[-2]} of bits"
        )
    features = channels // groups * geometry.taps
    weight = checked_weight(bits, scale, bias, features, plane_weights, group_size, tiles)
    weight.check_devices(x)
    compute_mode(compute)
    check_activation(activation)
    if min(geometry.output_size(x)) < 1:
        raise ValueError(
            f"kernel_size={geometry.kernel_size} with dilation={geometry.dilation} is larger than the padded image of x"
        )
    return run_conv2d(x, weight, geometry, compute, activation)


def run_conv2d(
    x: Tensor, weight: PackedWeight, geometry: ConvGeometry, compute: str, activation: str
) -> Tensor:
    """:func:`binary_conv2d` without its checks but that of x's type, for modules that made them once."""
    check_floating(x)
    compute = compute_mode(compute)
    height, width = geometry.output_size(x)
    forward_mode = forward_ad._current_level >= 0
    product = backends.Product(
        weight.planes,
        weight.group_size,
        compute,
        geometry.groups,
        x.shape[-3] // geometry.groups,
        weight.outputs // geometry.groups,
        height * width,
        differentiated=forward_mode or needs_gradient(x, weight.bias),
    )
    chosen = backends.choose("binary_conv2d", x.device, x.dtype, product=product).name
    if chosen not in ("cpu", "cuda"):
        weight.check_memory(x)
    if chosen == "reference":
        dtype = x.dtype
        if compute != "exact" and (forward_mode or (torch.is_grad_enabled() and x.requires_grad)):
            x, compute = straight_through(x, 3, compute), "exact"
        y: Tensor = reference.binary_conv2d(x, weight, geometry, compute, activation)
        return y.to(dtype)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    head = (images, weight.bits, weight.scale_fp32, weight.bias, *geometry, weight.plane_weights)
    if chosen == "triton":
        y = torch.ops.quantopt.binary_conv2d_triton(*head, compute, activation)
    else:
        y = torch.ops.quantopt.binary_conv2d.default(
            *head, weight.group_size, compute, weight.tiles, activation
        )
    return y if x.dim() == 4 else y.squeeze(0)
