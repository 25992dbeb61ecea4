"""Products with packed ±1 weights, as plain PyTorch of any floating type: the oracle of the binary kernels.

Bits are plain row-major, least significant first: bit k % 8 of byte k // 8 is weight k, 1 = +1, 0 = -1.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from quantopt.packed_weight import ConvGeometry, PackedWeight


def pack_signs(w: Tensor) -> Tensor:
    """[..., K] -> uint8 [..., ceil(K/8)]; bit 1 where w >= 0 (so sign(±0) = +1; NaN gives 0), spare bits 0."""
    ones = F.pad((w >= 0).to(torch.uint8), (0, -w.shape[-1] % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=w.device)
    grouped: Tensor = ones.unflatten(-1, (ones.shape[-1] // 8, 8))
    return (grouped * powers).sum(-1, dtype=torch.uint8)


def unpack_signs(bits: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [..., ceil(K/8)] -> ±1 [..., K], K = ``in_features``."""
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)  # torch.onnx cannot shift uint8
    ones = (bits.unsqueeze(-1) & powers) != 0
    return (2 * ones.flatten(-2)[..., :in_features].to(torch.int8) - 1).to(dtype)


def expand_planes(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """sum_i plane_weights[i] * (±1 of plane i), [N, K]."""
    bits = weight.bits
    signs = unpack_signs(bits if bits.dim() == 3 else bits.unsqueeze(0), weight.in_features, dtype)
    factors = torch.tensor(list(weight.plane_weights), dtype=dtype, device=bits.device)
    return (signs * factors.view(-1, 1, 1)).sum(0)


def dense_weight(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W = scale * sum_i plane_weights[i] * (±1 of plane i), [N, K]."""
    scale = weight.scale.to(dtype)
    if weight.group_size:
        group = min(weight.group_size, weight.in_features)
        scale = scale.repeat_interleave(group, dim=1)[:, : weight.in_features]
    else:
        scale = scale.unsqueeze(-1)
    return scale * expand_planes(weight, dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s): s = max|x| / 127 over the last dimension (kept, size 1), q = x / s rounded half to even, |q| <= 127.

    A row of zeros has s = 0 and q = 0; one with an infinity or NaN has s = NaN and q = 0.
    """
    if x.shape[-1] == 0:
        return x, x.new_zeros(*x.shape[:-1], 1)
    s = x.abs().amax(-1, keepdim=True) / 127
    s = torch.where(s.isfinite(), s, torch.nan)
    q = torch.where(s > 0, (x / s).round().clamp(-127, 127), 0.0)
    return q.to(x.dtype), s


def takes_levels(group_size: int, plane_weights: Sequence[int], in_features: int) -> bool:
    """Whether the CPU kernels replace the scales of groups in ``compute="int8"``: not without groups, with planes other
    than one or two of equal weight (32 in all at most), nor where the sum might leave 32 bits."""
    weights = list(plane_weights)
    if not group_size or weights not in ([weights[0]], [weights[0]] * 2):
        return False
    return sum(weights) <= 32 and in_features <= (2**31 - 1) // (127 * 127 * sum(weights))


def level_scales(weight: PackedWeight) -> tuple[Tensor, Tensor] | None:
    """(u [N, groups], r [N, 1]) by which the CPU kernels replace the scales of groups in ``compute="int8"``: those of a
    row are rounded to r * u as :func:`quantize_rows` rounds a row of x, so that the sum of whole numbers q u (±1) is
    exact. None where they keep the scales (:func:`takes_levels`). The reference, and the kernels of GPUs, always do."""
    if not takes_levels(weight.group_size, weight.plane_weights, weight.in_features):
        return None
    return quantize_rows(weight.scale.to(torch.promote_types(weight.scale.dtype, torch.float32)))


def round_to_bfloat16(x: Tensor) -> Tensor:
    """x rounded to the nearest bfloat16 (ties to even), in its own type; infinity from the middle of the largest finite
    one and 2^128 on. By whole numbers: of two conversions torch.compile makes none."""
    bits = x.to(torch.float32).view(torch.int32).to(torch.int64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return torch.where(x.isnan(), x, rounded.to(torch.int32).view(torch.float32).to(x.dtype))


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast: products keep the type that they are given. On devices without it, nothing; torch.compile of torch
    2.11 cannot trace the question."""
    device = x.device.type
    return (
        torch.autocast(device, enabled=False)
        if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
        else contextlib.nullcontext()
    )


def _fp32_convolutions(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No TF32 in cuDNN, which its convolutions of fp32 use by default; torch.compile cannot trace the setting."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    cudnn = torch.backends.cudnn
    flags: contextlib.AbstractContextManager[object] = cudnn.flags(
        cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )
    return flags


def activate(y: Tensor, activation: str) -> Tensor:
    """max(y, 0), y Phi(y) (the normal distribution function, by erf) or y / (1 + e^-y); "none": y."""
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    return F.silu(y) if activation == "silu" else y


def binary_linear(
    x: Tensor, weight: PackedWeight, compute: str = "exact", activation: str = "none"
) -> Tensor:
    """y = activation(x W^T + b) [..., N]; with ``compute="int8"`` x is replaced by s * q of :func:`quantize_rows`, with
    "bf16" by :func:`round_to_bfloat16` of it."""
    with full_precision(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        values = round_to_bfloat16(x.to(wide)) if compute == "bf16" else x.to(wide)
        if compute == "int8":
            q, s = quantize_rows(values)
            if not weight.group_size and weight.in_features:  # whole numbers: exact in float64
                product = q.double() @ expand_planes(weight, torch.float64).T
                y = product.to(wide) * (weight.scale.to(wide) * s)
            else:
                y = q @ dense_weight(weight, wide).T * s
        elif weight.group_size:
            y = values @ dense_weight(weight, wide).T
        else:
            y = values @ expand_planes(weight, wide).T * weight.scale.to(wide)
        return activate(y if weight.bias is None else y + weight.bias.to(wide), activation).to(x.dtype)


def binary_conv2d(
    x: Tensor,
    weight: PackedWeight,
    geometry: ConvGeometry,
    compute: str = "exact",
    activation: str = "none",
) -> Tensor:
    """activation(conv2d(x) + b), x [B, C, H, W] or [C, H, W], W [N, C/groups, kh, kw] with its rows flattened in bits.

    With ``compute="int8"`` x is quantised per image (over C, H and W) as by :func:`quantize_rows`, with "bf16" rounded
    by :func:`round_to_bfloat16`.
    """
    kernel_size, stride, padding, dilation, groups = geometry
    with full_precision(x), _fp32_convolutions(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        values = round_to_bfloat16(x.to(wide)) if compute == "bf16" else x.to(wide)
        channels = x.shape[-3] // groups
        s = None
        if compute == "int8":
            q, s = quantize_rows(values.flatten(-3))
            values, s = q.view_as(values), s[..., None, None]
        if weight.group_size:
            dense = dense_weight(weight, wide)
            factor = None
        else:
            dense = expand_planes(weight, wide)
            factor = weight.scale.to(wide).view(-1, 1, 1)
        dense = dense.view(weight.outputs, channels, *kernel_size)
        if channels == 0:  # torch's convolution would return no outputs either
            values, dense = F.pad(values, (0, 0, 0, 0, 0, groups)), F.pad(dense, (0, 0, 0, 0, 0, 1))
        if values.shape[-3] == 1:
            # The stride of a single channel says nothing, but that of channels last misleads torch 2.13.
            values = values.reshape(-1).view(values.shape)
        y = F.conv2d(values, dense, None, stride, padding, dilation, groups)
        if factor is not None:
            y = y * factor
        if s is not None:
            y = y * s
        bias = weight.bias
        return activate(y if bias is None else y + bias.to(wide).view(-1, 1, 1), activation).to(x.dtype)
