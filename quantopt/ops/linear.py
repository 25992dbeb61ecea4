"""binary_linear: y = activation(x W^T + b) with W packed at one bit per plane.

On the CPU and on CUDA the compiled kernels run, on other GPUs those in Triton (quantopt/backends.py chooses); without
them and for float64 the reference does (quantopt/reference/binary.py). Source of the plane sum: docs/algorithms.md,
section 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from quantopt import _extension, backends
from quantopt.ops.inputs import (
    check_activation,
    check_floating,
    compute_mode,
    needs_gradient,
    straight_through,
)
from quantopt.ops.weights import checked_weight
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference


def _pre_activation_grad(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    """The gradient for y, given that for activation(y)."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, y, 0)  # type: ignore[no-any-return]
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, y)  # type: ignore[no-any-return]
    s = torch.sigmoid(y)  # silu_backward has no derivative
    return grad * (s * (1 + y * (1 - s)))


class _Linear(torch.autograd.Function):
    """Gradients for x and the bias (those of the dense layer; int8 and bf16: straight through the rounding).

    What goes into the activation is computed once more for its gradient: in fp32, as the kernel does. The record of the
    weights is passed field by field, because autograd looks for tensors among the arguments alone.
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: Tensor, compute: str, activation: str, *weight: Any) -> Tensor:
        return _forward(x, PackedWeight(*weight), compute, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, compute, activation, *fields = inputs
        weight = PackedWeight(*fields)
        again = (None, None, None) if activation == "none" else (x, weight.bias, weight.tiles)
        ctx.save_for_backward(weight.bits, weight.scale, *again)
        ctx.form = (weight.in_features, weight.plane_weights, weight.group_size)
        ctx.modes = (compute, activation)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        bits, scale, x, bias, tiles = ctx.saved_tensors  # type: ignore[attr-defined]
        in_features, plane_weights, group_size = ctx.form  # type: ignore[attr-defined]
        weight = PackedWeight(bits, scale, bias, in_features, plane_weights, group_size, tiles)
        compute, activation = ctx.modes  # type: ignore[attr-defined]
        need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]  # type: ignore[attr-defined]
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_y = grad.to(wide)
        if activation != "none":
            y = run_linear(x.to(wide), weight, compute, "none")  # differentiable, for second derivatives
            grad_y = _pre_activation_grad(grad_y, y, activation)
        grad_x = grad_bias = None
        if need_x:
            dense = reference.dense_weight(weight, wide)
            with reference.full_precision(grad):
                grad_x = (grad_y @ dense).to(grad.dtype)
        if need_bias:
            grad_bias = grad_y.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, None, None, None, grad_bias, None, None, None, None


def _forward(x: Tensor, weight: PackedWeight, compute: str, activation: str) -> Tensor:
    compute = compute_mode(compute)
    product = backends.Product(weight.planes, weight.group_size, compute)
    backend = backends.choose("binary_linear", x.device, x.dtype, product=product).name
    if backend not in ("cpu", "cuda"):
        weight.check_memory(x)
    if backend == "reference":
        return reference.binary_linear(x, weight, compute, activation)
    bits, _, bias, in_features, plane_weights, group_size, tiles = weight
    head = (x, bits, weight.scale_fp32, bias, in_features, plane_weights, group_size, compute)
    y: Tensor
    if backend == "triton":
        y = torch.ops.quantopt.binary_linear_triton(*head, activation)
    else:
        y = torch.ops.quantopt.binary_linear.default(*head, tiles, activation)
    return y


def run_linear(x: Tensor, weight: PackedWeight, compute: str, activation: str) -> Tensor:
    """:func:`binary_linear` without its checks but that of x, for modules that made them once."""
    # Tensors may have tangents, which the kernels do not see: the reference, plain PyTorch, takes those.
    forward_mode = forward_ad._current_level >= 0
    direct = _extension.binary_linear_direct
    if direct is not None and not forward_mode and not is_compiling():
        plain: Tensor | None = direct(x, weight, compute, activation)
        if plain is not None:  # the operator's result: CPU tensors, no gradients, nothing that watches calls
            return plain
    check_floating(x)
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x must have in_features={weight.in_features} as its last dimension, not shape {list(x.shape)}"
        )
    if forward_mode:
        weight.check_memory(x)
        mode, dtype = compute_mode(compute), x.dtype
        if mode != "exact":
            x, mode = straight_through(x, 1, mode), "exact"
        y: Tensor = reference.binary_linear(x, weight, mode, activation)
        return y.to(dtype)
    if needs_gradient(x, weight.bias):
        result: Tensor = _Linear.apply(x, compute, activation, *weight)
        return result
    return _forward(x, weight, compute, activation)


def binary_linear(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    compute: str = "auto",
    group_size: int = 0,
    plane_weights: Sequence[int] | None = None,
    tiles: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """y[..., n] = activation(sum_k W[n, k] x[..., k] + bias[n]), with
    W = scale * sum_i plane_weights[i] * (±1 plane i of bits).

    Args:
        x: [..., K], fp32, bf16 or fp16 (float64: the reference), any strides and leading dimensions.
        bits: uint8 [N, ceil(K/8)], or [P, N, ceil(K/8)] with P planes; see :func:`pack_signs`.
        scale: [1], [N], or [N, ceil(K/group_size)] with ``group_size``.
        bias: [N] or None.
        in_features: K.
        compute: "auto" is "exact". "exact": fp32 accumulation of x as it is, y rounded once to the type of x. Scales
            without groups come after the sum, which overflows where sum_k |x[k]| does, however small they are.
            "int8": x is first rounded, row by row, to s * q with s = max|x| / 127 and whole q; the sums of q are
            exact, so the error is that of the rounding of x: at most s/2 * sum_k |W[n, k]|, and |y| errs by about
            0.4 % of its size in practice. A row of x with an infinity or NaN gives NaN.
            With ``group_size`` the CPU kernels also round the scales of a row of W, as the numbers of x, to whole
            levels times a 127th of the largest of them, r = max_g |scale[n, g]| / 127: all of the sum is exact then,
            and y errs by another r/2 * sum_k |s q[k]| at most (the signs of ternary weights add up to 2: twice that).
            A row whose largest scale is not finite gives NaN, one whose largest scale is denormal loses more. Scales
            stay as they are with planes other than ternary ones or of weights above 32 in sum, in rows of more than
            2^31 / 127^2 over that sum, on GPUs and in the reference.
            "bf16": x is first rounded to the nearest bfloat16, by at most 2^-8 of each |x| (more for denormals; from
            2^128 - 2^119 on it gives an infinity), the rest is as in "exact", y of the type of x. Where x is bfloat16
            nothing is rounded. On a GPU and on a CPU with AMX fp32 x is then multiplied once, not in three parts.
            Elsewhere it saves nothing.
        group_size: consecutive weights of a row that share a scale; 0: scale is per tensor or per row.
        plane_weights: weight of each plane, default 1, 2, 4, ...; ternary weights are two planes of weights 1, 1,
            those of 17 levels five of 1, 2, 4, 8, 1.
        tiles: :func:`binary_tiles` of these bits, if derived before (saves time when x has few rows).
        activation: "none", "relu", "gelu" (exact, by erf: torch's approximate="none") or "silu", of the fp32 sums,
            before y is rounded to its type.

    Returns y [..., N] of the type of x. On the CPU each sum is taken in an order that depends on K alone: the same bits
    for any number of threads or rows. On a CPU with AMX that holds for "int8" (but where scales for groups stay as they
    are); in the other modes for any number of rows from a threshold on, where registers of AMX take over from lookups,
    and for any number below it: 1 to 48 rows by size and type (csrc/cpu/kernels/thresholds.h). On a GPU the order
    depends on the sizes and the device, never on the run; in "int8" mode without groups the sums are whole numbers and
    y is that of the CPU.
    With AMX and on a GPU "exact" multiplies fp32 x in three bfloat16 parts that add up to it. AMX takes denormals as
    zero, so rows whose largest |x| is not within 2^±60 are multiplied by a power of two before and after: what is lost
    is less than 2^-60 of the largest (with scales for groups, where those are normal numbers). In "exact" and "bf16"
    mode infinities and NaN propagate as in a dense layer, on the CPU whatever the planes; on a GPU an infinity may give
    NaN with several planes, which are summed one by one.
    ``tiles`` that are not those of ``bits`` as they are now are not used. Differentiable with respect to x and bias, by
    torch.func too; in forward mode (jvp) the reference runs. Raises TypeError or ValueError naming the argument that
    does not fit.
    """
    weight = checked_weight(bits, scale, bias, in_features, plane_weights, group_size, tiles)
    check_floating(x)
    weight.check_devices(x)
    compute_mode(compute)
    check_activation(activation)
    return run_linear(x, weight, compute, activation)
