"""Packed linear layers as blocks of ggml, and back.

- Q1_0: 128 weights in 18 bytes: d (fp16), then the signs, least significant bit first, 1 = +1. w = ±d.
- TQ2_0: 256 weights in 66 bytes: 64 bytes of codes 0, 1, 2, then d. Byte 32 h + m holds the weights 128 h + 32 l + m in
  its bits 2 l and 2 l + 1, h = 0, 1, l = 0..3, m = 0..31. w = d (code - 1).
- TQ1_0: 256 weights in 54 bytes: 48 + 4 bytes of codes in base 3, then d. A byte is ceil(256 v / 243), v the number
  that its five digits spell, the first one most significant: byte m of the first 32 holds the codes of the weights
  32 n + m, n = 0..4; of the next 16 those of 160 + 16 n + m; of the last 4 those of 240 + 4 n + m, n = 0..3, and a 0.
  w = d (code - 1).

Source: block_q1_0, block_tq1_0 and block_tq2_0 of ggml/src/ggml-common.h, and their dequantize_row in ggml-quants.c.
"""

from math import gcd
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from quantopt.nn import BinaryLinear
from quantopt.ops.weights import pack_signs, planes_of_codes

Bytes = npt.NDArray[np.uint8]
Scales = Literal["exact", "round"]

LEVELS = {"Q1_0": 2, "TQ1_0": 3, "TQ2_0": 3}
_DEFAULT_KIND = {2: "Q1_0", 3: "TQ2_0"}
_SCALE_BYTES = 2
_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint16)
# The parts of a TQ1_0 block: bytes, and codes per byte.
_TQ1_0_PARTS = ((32, 5), (16, 5), (4, 4))


def block_of(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block of "Q1_0", "TQ1_0" or "TQ2_0"."""
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[check_kind(kind)]]
    return weights, size


BLOCKS = {levels: GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] for levels, kind in _DEFAULT_KIND.items()}
"""{levels of a packed layer: the weights of a row that share a scale in a file}."""


def check_kind(kind: str) -> str:
    """``kind``. Raises ValueError unless it is one of the three."""
    if kind not in LEVELS:
        raise ValueError(f"kind must be one of {', '.join(LEVELS)}, not {kind!r}")
    return kind


def to_blocks(
    layer: BinaryLinear, kind: str | None = None, *, scales: Scales = "exact", name: str = "the layer"
) -> Bytes:
    """The weights of ``layer`` as blocks: uint8 [out_features, bytes of a row]. The bias is not in them.

    Args:
        layer: with 2 levels for "Q1_0", 3 for "TQ1_0" and "TQ2_0".
        kind: None: "Q1_0" or "TQ2_0", as the levels ask.
        scales: "exact": each scale must be a number of fp16 (of ternary layers twice the scale, the outer level).
            "round": scales are rounded to the nearest number of fp16, which changes the weights by at most 1 part in
            2^11 where the scale is 2^-14 or more, and more below.
        name: what errors call the layer.

    Raises:
        TypeError: ``layer`` is no BinaryLinear.
        ValueError: naming the layer and the remedy: its levels, in_features, groups or scales do not fit, or it applies
            an activation.
    """
    if not isinstance(layer, BinaryLinear):
        raise TypeError(f"{name} must be a quantopt.nn.BinaryLinear, not {type(layer).__name__}")
    if scales not in ("exact", "round"):
        raise ValueError(f'scales must be "exact" or "round", not {scales!r}')
    kind = kind_of_layer(layer, kind, name)
    if layer.bits.is_meta:
        raise ValueError(f"{name} is on the meta device: it has no values to save")
    block, size = block_of(kind)
    rows, blocks = layer.out_features, layer.in_features // block
    d = (
        _fp16(_block_scales(layer, kind, name), scales, name)
        .view(np.uint8)
        .reshape(rows, blocks, _SCALE_BYTES)
    )
    bits = layer.bits.cpu().numpy()
    parts: list[Bytes]
    if kind == "Q1_0":
        parts = [d, bits.reshape(rows, blocks, block // 8)]
    else:
        planes = np.unpackbits(bits, axis=-1, bitorder="little", count=layer.in_features)
        codes = planes.sum(axis=0, dtype=np.uint8).reshape(rows, blocks, block)
        parts = [_tq2_0_bytes(codes) if kind == "TQ2_0" else _tq1_0_bytes(codes), d]
    return np.concatenate(parts, axis=-1).reshape(rows, blocks * size)


def kind_of_layer(layer: BinaryLinear, kind: str | None, name: str) -> str:
    """The type that :func:`to_blocks` writes ``layer`` as. Raises ValueError if no block holds it."""
    if kind is None and layer.levels not in _DEFAULT_KIND:
        raise ValueError(
            f"{name} has {layer.levels} levels, and GGUF types hold 2 (Q1_0) or 3 (TQ1_0, TQ2_0): train it with "
            "bits=1 or ternary, or write its weight unpacked"
        )
    kind = _DEFAULT_KIND[layer.levels] if kind is None else check_kind(kind)
    if LEVELS[kind] != layer.levels:
        raise ValueError(
            f"{name} has {layer.levels} levels, and {kind} holds {LEVELS[kind]}: leave kind to None"
        )
    block, _ = block_of(kind)
    if layer.in_features % block:
        raise ValueError(
            f"{name} has in_features={layer.in_features}, and {kind} holds rows of a multiple of {block}: change the "
            "width of the model, leave the layer float, or write its weight unpacked"
        )
    if layer.activation != "none":
        raise ValueError(
            f"{name} applies {layer.activation}, which GGUF does not hold: pack without fold_batchnorm"
        )
    return kind


def _block_scales(layer: BinaryLinear, kind: str, name: str) -> Tensor:
    """The outer level of each block, float32 [out_features, in_features / block].

    Raises ValueError if a block has more than one, or one that is negative or not finite."""
    block, _ = block_of(kind)
    length, group = layer.in_features, layer.group_size
    outer = layer.scale.detach().cpu() * (layer.levels - 1)  # exact: by 1 or 2
    if not bool((outer.isfinite() & ~outer.signbit()).all()):
        raise ValueError(f"{name} has a scale that is negative or not finite")
    if not group:
        return outer.reshape(-1, 1).expand(layer.out_features, length // block)
    unit = gcd(group, block)  # a stretch of weights that no group and no block ends in
    each = outer[:, torch.arange(0, length, unit) // group].reshape(layer.out_features, -1, block // unit)
    if not bool((each == each[..., :1]).all()):
        raise ValueError(
            f"{name} has a scale for each {group} weights, and {kind} one for each {block}: train it with "
            f"group_size={block} or scale='channel', or write its weight unpacked"
        )
    return each[..., 0]


def _fp16(outer: Tensor, scales: Scales, name: str) -> npt.NDArray[np.float16]:
    half = outer.to(torch.float16)
    wrong = half.float() != outer
    if bool(wrong.any()):
        count, first = int(wrong.sum()), float(outer[wrong][0])
        if scales == "exact":
            raise ValueError(
                f"{name}: {count} of the {wrong.numel()} scales of its blocks are no numbers of fp16, the first is "
                f'{first:.9g}: pass scales="round" to round them'
            )
        lost = ~half.isfinite() | ((half == 0) & (outer != 0))
        if bool(lost.any()):
            raise ValueError(
                f"{name}: the scale {float(outer[lost][0]):.9g} is outside the range of fp16: scale the layer"
            )
    array: npt.NDArray[np.float16] = half.contiguous().numpy()
    return array


def from_blocks(
    blocks: Bytes,
    kind: str,
    *,
    bias: Tensor | None = None,
    compute: str = "auto",
    name: str = "the tensor",
) -> BinaryLinear:
    """The layer whose weights are ``blocks`` [out_features, bytes of a row] of ``kind``; the inverse of
    :func:`to_blocks`.

    Its scales are those of the blocks, exactly: scale="group" with group_size 128 (Q1_0) or 256; scale="channel" if all
    blocks of each row, two or more, have the same one. Raises ValueError naming the tensor if the bytes are no whole
    blocks, a scale is negative or not finite, or a code of TQ2_0 is 3.
    """
    weights, scale, group_size = parse_blocks(blocks, kind, name)
    layer = BinaryLinear(
        weights.shape[-1] * 8,
        weights.shape[-2],
        bias is not None,
        levels=LEVELS[kind],
        scale="group" if group_size else "channel",
        group_size=group_size,
        compute=compute,
        device="meta",
    )
    return layer.set_weights(weights, scale, bias)


def parse_blocks(blocks: Bytes, kind: str, name: str) -> tuple[Tensor, Tensor, int]:
    """bits, scale and group_size of the layer that :func:`from_blocks` makes."""
    block, size = block_of(kind)
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] % size or not blocks.size:
        raise ValueError(
            f"{name}: blocks of {kind} must be uint8 [out_features, a multiple of {size}], not {blocks.dtype} "
            f"{list(blocks.shape)}"
        )
    each = blocks.reshape(len(blocks), -1, size)
    first = kind == "Q1_0"
    d = each[..., :_SCALE_BYTES] if first else each[..., -_SCALE_BYTES:]
    outer = torch.from_numpy(np.ascontiguousarray(d).view(np.float16)[..., 0].astype(np.float32))
    if not bool((outer.isfinite() & ~outer.signbit()).all()):
        raise ValueError(f"{name}: a scale is negative or not finite: the file is damaged")
    data = each[..., _SCALE_BYTES:] if first else each[..., :-_SCALE_BYTES]
    if first:
        bits = torch.from_numpy(data.reshape(len(blocks), -1).copy())
    else:
        codes = _tq2_0_codes(data) if kind == "TQ2_0" else _tq1_0_codes(data)
        if int(codes.max()) > 2:
            raise ValueError(f"{name}: a code is 3, and TQ2_0 holds 0, 1 and 2: it is damaged or not ternary")
        bits = _planes(torch.from_numpy(codes.reshape(len(blocks), -1)))
    scale = outer / (LEVELS[kind] - 1)
    if scale.shape[1] > 1 and bool((scale == scale[:, :1]).all()):
        return bits, scale[:, 0].clone(), 0
    return bits, scale, block


def exact_blocks(weight: Tensor, kind: str) -> Bytes | None:
    """``weight`` [N, K] as blocks of ``kind`` if they hold its values exactly, else None."""
    block, _ = block_of(kind)
    if weight.shape[1] % block:
        return None
    for rows in (slice(0, 16), slice(None)):  # most float weights are told by a few rows
        w = weight[rows].detach().cpu().float()
        each = w.reshape(len(w), -1, block)
        outer = each.abs().amax(dim=-1, keepdim=True)
        level = each.abs() == outer
        if LEVELS[kind] == 3:
            level |= each == 0
        if not bool(level.all()) or not bool((outer.half().float() == outer).all()):
            return None
    ternary = LEVELS[kind] == 3
    bits = _planes(each.sign().add(1).to(torch.uint8).reshape(w.shape)) if ternary else pack_signs(w)
    layer = BinaryLinear(
        w.shape[1], w.shape[0], False, levels=LEVELS[kind], scale="group", group_size=block, device="meta"
    )
    return to_blocks(layer.set_weights(bits, outer[..., 0] / (LEVELS[kind] - 1), None), kind)


def _planes(codes: Tensor) -> Tensor:
    """Codes 0, 1, 2 [N, K] as the bits of a ternary layer, uint8 [2, N, K/8]."""
    planes = planes_of_codes(codes, 3).numpy()
    return torch.from_numpy(np.packbits(planes, axis=-1, bitorder="little"))


def _tq2_0_bytes(codes: Bytes) -> Bytes:
    quads = codes.reshape(*codes.shape[:-1], 2, 4, 32)
    packed: Bytes = (quads << _shifts()).sum(axis=-2, dtype=np.uint8)
    return packed.reshape(*codes.shape[:-1], 64)


def _tq2_0_codes(data: Bytes) -> Bytes:
    halves = data.reshape(*data.shape[:-1], 2, 1, 32)
    codes: Bytes = (halves >> _shifts()) & np.uint8(3)
    return codes.reshape(*data.shape[:-1], 256)


def _shifts() -> Bytes:
    return np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]


def _tq1_0_bytes(codes: Bytes) -> Bytes:
    parts: list[Any] = []
    start = 0
    for size, digits in _TQ1_0_PARTS:
        part = codes[..., start : start + size * digits].reshape(*codes.shape[:-1], digits, size)
        number = (part * _POWERS[:digits, None]).sum(axis=-2, dtype=np.uint16)
        parts.append((number * 256 + 242) // 243)
        start += size * digits
    return np.concatenate(parts, axis=-1).astype(np.uint8)


def _tq1_0_codes(data: Bytes) -> Bytes:
    parts: list[Any] = []
    start = 0
    for size, digits in _TQ1_0_PARTS:
        part = data[..., None, start : start + size].astype(np.uint16)
        # The byte is a fraction in base 3: times 3^n without whole part, then times 3, has the digit n as whole part.
        turned = (part * _POWERS[::-1][:digits, None]) & 255
        parts.append(((turned * 3) >> 8).reshape(*data.shape[:-1], -1))
        start += size
    return np.concatenate(parts, axis=-1).astype(np.uint8)
