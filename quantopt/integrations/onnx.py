"""Packed models in torch.onnx.export: quantopt's operators as ONNX's own.

The file needs nothing of quantopt to run. It holds the packed bits, and the scales; its graph unpacks them with integer
operators and multiplies fp32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantopt import extras

try:
    import onnx
    from onnxscript import opset18 as op
except ImportError as error:
    raise ImportError(
        f"quantopt.integrations.onnx {extras.missing('onnx', 'onnxscript', why=error)}"
    ) from None

from quantopt import _extension
from quantopt.packed_weight import ConvGeometry
from quantopt.reference.binary import takes_levels

__all__ = ["translation_table"]

_FLOAT = onnx.TensorProto.FLOAT


def translation_table() -> dict[Any, Callable[..., Any]]:
    """{operator: its translation}: the ``custom_translation_table`` of ``torch.onnx.export(..., dynamo=True)``.

    For models on the CPU, with the compiled extension. All modes are translated: y is that of the operator up to the
    order of the fp32 sums. "int8" rounds x per row (per image for conv2d), and scales of groups, as the CPU kernels do,
    and "bf16" rounds x to bfloat16; the products are of fp32. The weights are uint8 bits in the file; a runtime that
    folds constants unpacks them when it loads the file, to fp32.

    Raises RuntimeError without the compiled extension.
    """
    if _extension.error is not None:
        raise RuntimeError(
            f"translation_table: the operators to translate are those of the compiled extension: {_extension.error}"
        )
    ops = torch.ops.quantopt
    return {ops.binary_linear.default: _binary_linear, ops.binary_conv2d.default: _binary_conv2d}


def _constant(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _planes(bits: Any, in_features: int, plane_weights: Sequence[int]) -> Any:
    """sum_i plane_weights[i] * (±1 of plane i), fp32 [N, K]: reference.expand_planes."""
    shape = list(bits.shape)
    shifts = op.Cast(_constant(*range(8)), to=onnx.TensorProto.UINT8)
    one = op.Cast(_constant(1), to=onnx.TensorProto.UINT8)
    ones = op.BitwiseAnd(op.BitShift(op.Unsqueeze(bits, _constant(-1)), shifts, direction="RIGHT"), one)
    ones = op.Reshape(ones, _constant(*shape[:-1], 8 * shape[-1]))
    if in_features != 8 * shape[-1]:
        ones = op.Slice(ones, _constant(0), _constant(in_features), _constant(-1))
    signs = op.Sub(op.Mul(op.Cast(ones, to=_FLOAT), 2.0), 1.0)
    if len(shape) == 2:
        return signs if plane_weights[0] == 1 else op.Mul(signs, float(plane_weights[0]))
    factors = op.Constant(value_floats=[float(w) for w in plane_weights])
    factors = op.Reshape(factors, _constant(-1, 1, 1))
    return op.ReduceSum(op.Mul(signs, factors), _constant(0), keepdims=0)


def _scaled(planes: Any, scale: Any, outputs: int, in_features: int, group_size: int) -> Any:
    """[N, K] with scales [N, ceil(K/group_size)], N = ``outputs``."""
    groups, group = -(-in_features // group_size), min(group_size, in_features)
    spare = groups * group - in_features
    if spare:
        planes = op.Pad(planes, _constant(0, 0, 0, spare))
    # A multiplication that broadcasts: exporters that fold constants would store scales spread over [N, K].
    grouped = op.Mul(
        op.Reshape(planes, _constant(outputs, groups, group)), op.Unsqueeze(scale, _constant(-1))
    )
    flat = op.Reshape(grouped, _constant(outputs, groups * group))
    return op.Slice(flat, _constant(0), _constant(in_features), _constant(-1)) if spare else flat


def _quantized(x: Any, *axes: int) -> tuple[Any, Any]:
    """(q, s) of reference.quantize_rows, over ``axes``."""
    over = _constant(*axes)
    # Of infinities and NaN the second sum makes s NaN; a maximum need not.
    s = op.Div(op.ReduceMax(op.Abs(x), over, keepdims=1), 127.0)
    s = op.Add(s, op.ReduceSum(op.Mul(x, 0.0), over, keepdims=1))
    q = op.Clip(op.Round(op.Div(x, s)), -127.0, 127.0)
    return op.Where(op.Greater(s, 0.0), q, 0.0), s


def _factors(
    bits: Any, scale: Any, in_features: int, plane_weights: Sequence[int], group_size: int, compute: str
) -> tuple[Any, Any]:
    """(M [N, K], f [1] or [N]) with W = f M; f None: W = M."""
    planes = _planes(bits, in_features, plane_weights)
    scale = op.Cast(scale, to=_FLOAT)
    if not group_size:
        return planes, scale
    factor = None
    if compute == "int8" and takes_levels(group_size, plane_weights, in_features):
        scale, factor = _quantized(scale, -1)
        factor = op.Squeeze(factor, _constant(-1))
    return _scaled(planes, scale, bits.shape[-2], in_features, group_size), factor


def _activated(y: Any, activation: str) -> Any:
    if activation == "relu":
        return op.Relu(y)
    if activation == "gelu":
        return op.Mul(op.Mul(y, 0.5), op.Add(op.Erf(op.Div(y, math.sqrt(2))), 1.0))
    return op.Mul(y, op.Sigmoid(y)) if activation == "silu" else y


def _values(x: Any, compute: str) -> Any:
    values = op.Cast(x, to=onnx.TensorProto.BFLOAT16) if compute == "bf16" else x
    return op.Cast(values, to=_FLOAT)


def _binary_linear(
    x: Any,
    bits: Any,
    scale: Any,
    bias: Any,
    in_features: int,
    plane_weights: Sequence[int],
    group_size: int = 0,
    compute: str = "exact",
    tiles: Any = None,
    activation: str = "none",
) -> Any:
    values, s = _values(x, compute), None
    if compute == "int8":
        values, s = _quantized(values, -1)
    matrix, factor = _factors(bits, scale, in_features, plane_weights, group_size, compute)
    y = op.MatMul(values, op.Transpose(matrix, perm=[1, 0]))
    for one in (factor, s):
        y = y if one is None else op.Mul(y, one)
    if bias is not None:
        y = op.Add(y, op.Cast(bias, to=_FLOAT))
    return op.CastLike(_activated(y, activation), x)


def _binary_conv2d(
    x: Any,
    bits: Any,
    scale: Any,
    bias: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    plane_weights: Sequence[int],
    group_size: int = 0,
    compute: str = "exact",
    tiles: Any = None,
    activation: str = "none",
) -> Any:
    channels, outputs = x.shape[1] // groups, bits.shape[-2]
    in_features = channels * ConvGeometry(kernel_size).taps
    values, s = _values(x, compute), None
    if compute == "int8":
        values, s = _quantized(values, 1, 2, 3)
    matrix, factor = _factors(bits, scale, in_features, plane_weights, group_size, compute)
    y = op.Conv(
        values,
        op.Reshape(matrix, _constant(outputs, channels, *kernel_size)),
        kernel_shape=list(kernel_size),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    by_output = _constant(-1, 1, 1)
    if factor is not None:
        y = op.Mul(y, op.Reshape(factor, by_output))
    if s is not None:
        y = op.Mul(y, s)
    if bias is not None:
        y = op.Add(y, op.Reshape(op.Cast(bias, to=_FLOAT), by_output))
    return op.CastLike(_activated(y, activation), x)
