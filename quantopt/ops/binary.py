"""Products with weights packed at one bit, W = scale * sum_i plane_weights[i] * (±1 plane i), and conv2d:
y = activation(x W^T + b).

One plane is a binary weight; b planes weighted 1, 2, 4, ... the uniform grid of 2^b levels; two planes weighted 1, 1 a
ternary weight. Bits are plain row-major, least significant first, 1 = +1, in uint8 [N, ceil(K/8)] or, with P planes,
[P, N, ceil(K/8)]; bits beyond K are ignored. Everything is derived from these, nothing else is saved.

On the CPU and on CUDA the compiled kernels run, on other GPUs those in Triton (quantopt/backends.py chooses); without
them and for float64 the reference does (quantopt/reference/binary.py): for conv2d, the library's convolution on
expanded weights. Source of the plane sum: docs/algorithms.md, section 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from quantopt import _extension, backends
from quantopt.reference import binary as reference

COMPUTE = ("exact", "bf16", "int8")  # and "auto", see arithmetic
ACTIVATIONS = ("none", "relu", "gelu", "silu")


def plane_weights_of(levels: int) -> list[int]:
    """Weights of the bit planes of a uniform grid of ``levels`` = 2 (binary), 3 (ternary: 1, 1), 4, 8 or 16 levels."""
    weights = {2: [1], 3: [1, 1], 4: [1, 2], 8: [1, 2, 4], 16: [1, 2, 4, 8]}.get(levels)
    if weights is None:
        raise ValueError(f"levels must be 2, 3, 4, 8 or 16, not {levels!r}")
    return weights


def arithmetic(compute: str) -> str:
    """The mode that ``compute`` stands for: "auto" is "exact", what loses accuracy is asked for by name."""
    if compute not in (*COMPUTE, "auto"):
        raise ValueError(f'compute must be "auto", "exact", "bf16" or "int8", not {compute!r}')
    return "exact" if compute == "auto" else compute


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "none", "relu", "gelu" or "silu", not {activation!r}')


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def pack_signs(w: Tensor) -> Tensor:
    """Signs of ``w`` [..., K], any floating type, as uint8 [..., ceil(K/8)], least significant bit first.

    Bit 1 = +1, bit 0 = -1, sign(0) = sign(-0.0) = +1, NaN counts as -1; the spare bits of the last byte are 0.
    Raises TypeError if ``w`` is not a floating tensor, ValueError if it has no dimension.
    """
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"w must be a floating tensor, not {_kind(w)}")
    if w.dim() == 0:
        raise ValueError("w must have at least one dimension: its last one is packed")
    return reference.pack_signs(w.detach())


def unpack_signs(bits: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of :func:`pack_signs`: uint8 [..., ceil(K/8)] -> ±1 [..., K] of ``dtype``, K = ``in_features``."""
    _check_bits(bits, in_features, range(1, 65))
    return reference.unpack_signs(bits, in_features, dtype)


def _check_floating(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, not {_kind(x)}")


def _check_devices(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("bits", bits), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")


def _check_bits(bits: Tensor, in_features: int, dims: Sequence[int]) -> None:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        raise TypeError(f"bits must be a uint8 tensor as pack_signs returns it, not {_kind(bits)}")
    if bits.dim() not in dims:
        raise ValueError(f"bits must be [N, ceil(K/8)] or [P, N, ceil(K/8)], not of shape {list(bits.shape)}")
    if not isinstance(in_features, int) or in_features < 0:
        raise ValueError(f"in_features must be an integer of at least 0, not {in_features!r}")
    if bits.shape[-1] != (in_features + 7) // 8:
        raise ValueError(
            f"in_features={in_features} needs {(in_features + 7) // 8} bytes per row, bits have {bits.shape[-1]}"
        )


def _check_product(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
    compute: str,
    plane_weights: Sequence[int] | None,
    activation: str,
) -> list[int]:
    _check_bits(bits, in_features, (2, 3))
    _check_floating(x)
    arithmetic(compute)
    check_activation(activation)
    if not isinstance(group_size, int) or group_size < 0:
        raise ValueError(f"group_size must be an integer of at least 0 (0: no groups), not {group_size!r}")
    outputs = bits.shape[-2]
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        raise TypeError("scale must be a floating tensor")
    shapes = [[outputs, -(-in_features // group_size)]] if group_size else [[1], [outputs]]
    if list(scale.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        hint = "; scales per group need group_size" if scale.dim() == 2 and not group_size else ""
        raise ValueError(f"scale must have shape {wanted}, not {list(scale.shape)}{hint}")
    if bias is not None and (not isinstance(bias, Tensor) or not bias.is_floating_point()):
        raise TypeError(f"bias must be a floating tensor or None, not {_kind(bias)}")
    if bias is not None and list(bias.shape) != [outputs]:
        raise ValueError(f"bias must have shape [{outputs}], not {list(bias.shape)}")
    _check_devices(x, bits, scale, bias)
    planes = bits.shape[0] if bits.dim() == 3 else 1
    if planes == 0:
        raise ValueError("bits must have at least one plane")
    if plane_weights is None:
        return [1 << i for i in range(planes)]
    if len(plane_weights) != planes or not all(isinstance(w, int) and 1 <= w <= 128 for w in plane_weights):
        raise ValueError(
            f"plane_weights must be {planes} integers in 1..128, one per plane, not {plane_weights!r}"
        )
    return list(plane_weights)


def operation_of(group_size: int, planes: int) -> str:
    """Which of :data:`quantopt.backends.OPERATIONS` a product is: the kernels of GPUs do not take all groups."""
    even = group_size % 32 == 0 and group_size & (group_size - 1) == 0 and planes <= 8
    return "binary_linear" if even else "binary_linear_odd_groups"


def binary_tiles(
    bits: Tensor,
    in_features: int,
    *,
    expanded: torch.dtype | None = None,
    plane_weights: Sequence[int] | None = None,
) -> Tensor | None:
    """``bits`` in the order the kernels of their device read, to be passed as ``tiles``; None where it is not used.

    They remember these very bits, whose memory they keep: with other bits, or when these were written to since, the
    products derive the order anew at each call. The same holds for a copy of the tiles.

    expanded: with CUDA's kernels the tiles keep W (``plane_weights`` as in :func:`binary_linear`) in this type too, one
    or two bytes per weight: products of many rows by the library, that of a binary_linear with compute="int8"
    (torch.int8), or "exact" and x in this type (torch.float16, torch.bfloat16, which is fp32's and "bf16"'s too), do
    not expand it at each call. Elsewhere it has no effect.
    """
    _check_bits(bits, in_features, (2, 3))
    if expanded not in (None, torch.int8, torch.float16, torch.bfloat16):
        raise ValueError(
            f"expanded must be torch.int8, torch.float16, torch.bfloat16 or None, not {expanded!r}"
        )
    chosen = backends.choose("binary_linear", bits.device, torch.float32).name
    if chosen not in ("cpu", "cuda"):
        return None
    tiles: Tensor
    if chosen == "cuda" and expanded is not None:
        planes = bits.shape[0] if bits.dim() == 3 else 1
        weights = [1 << i for i in range(planes)] if plane_weights is None else list(plane_weights)
        tiles = torch.ops.quantopt.binary_tiles_and_weight(bits, in_features, weights, expanded)
    else:
        tiles = torch.ops.quantopt.binary_tiles(bits, in_features)
    return tiles if tiles.numel() > 0 else None


def conv_tiles(
    bits: Tensor, channels: int, kernel_size: Sequence[int], groups: int = 1, group_size: int = 0
) -> Tensor | None:
    """The same for a convolution: bits of [N, channels of a group, kh, kw], flattened per output channel.

    None too for fake tensors, which have no bits, and where the library's convolution runs on the CPU: for small groups
    (with less than a quarter of the 32 outputs or 16 channels that are taken together), and for scales of groups of
    weights that are no multiple of 16 or, unless the kernel is 1x1, have fewer than 64 outputs.
    """
    taps = kernel_size[0] * kernel_size[1]
    _check_bits(bits, channels * taps, (2, 3))
    chosen = backends.choose("binary_conv2d", bits.device, torch.float32).name
    if chosen not in ("cpu", "cuda") or is_fake(bits):
        return None
    if chosen == "cuda" and not conv_on_cuda(
        torch.bfloat16,
        channels,
        bits.shape[-2] // groups,
        groups,
        group_size,
        bits.shape[0] if bits.dim() == 3 else 1,
        "int8",
    ):
        return None
    tiles: Tensor = torch.ops.quantopt.binary_conv_tiles(bits, channels, taps, groups, group_size)
    return tiles if tiles.numel() > 0 else None


CUDA_PLACES = 65535 * 64 // 3  # places of an output image that the CUDA kernel takes in every type


def conv_on_cuda(
    dtype: torch.dtype, channels: int, outputs: int, groups: int, group_size: int, planes: int, compute: str
) -> bool:
    """Whether the CUDA kernel takes a convolution of so many channels and outputs in a group, and is worth it: each
    group is a launch that fills channels up to 64 and outputs to 32. Else the reference runs it."""
    if group_size or planes > 8:
        return False
    if groups == 1:
        return True
    readable = compute == "int8" or (dtype != torch.float32 and channels % 8 == 0)
    return readable and groups <= 32 and channels >= 16 and outputs >= 8


def _pre_activation_grad(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    """The gradient for y, given that for activation(y)."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, y, 0)  # type: ignore[no-any-return]
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, y)  # type: ignore[no-any-return]
    s = torch.sigmoid(y)  # silu_backward has no derivative
    return grad * (s * (1 + y * (1 - s)))


def _in_forward_mode() -> bool:
    """Whether tensors may have tangents, which the kernels do not see: the reference, plain PyTorch, takes those."""
    return forward_ad._current_level >= 0


def _straight_through(x: Tensor, dims: int, compute: str) -> Tensor:
    """What "int8" or "bf16" rounds x to, the former over its last ``dims`` dimensions, with the gradient of x; fp32 as
    in the kernels."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    values = x.detach()
    if compute == "bf16":
        error = reference.round_to_bfloat16(values) - values
        return x + torch.where(values.isinf(), 0.0, error)
    q, s = reference.quantize_rows(values.flatten(-dims))
    return x + ((q * s).view(x.shape) - values)


class _Linear(torch.autograd.Function):
    """Gradients for x and the bias (those of the dense layer; int8 and bf16: straight through the rounding).

    What goes into the activation is computed once more for its gradient: in fp32, as the kernel does.
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bits, scale, bias, in_features, plane_weights, group_size, compute, tiles, activation = inputs
        ctx.save_for_backward(
            bits, scale, *((None, None, None) if activation == "none" else (x, bias, tiles))
        )
        ctx.form = (in_features, plane_weights, group_size, compute, activation)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        bits, scale, x, bias, tiles = ctx.saved_tensors  # type: ignore[attr-defined]
        need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3]  # type: ignore[attr-defined]
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_y = grad.to(wide)
        in_features, plane_weights, group_size, compute, activation = ctx.form  # type: ignore[attr-defined]
        if activation != "none":
            y = run_linear(  # differentiable, for second derivatives
                x.to(wide), bits, scale, bias, in_features, plane_weights, group_size, compute, tiles, "none"
            )
            grad_y = _pre_activation_grad(grad_y, y, activation)
        grad_x = grad_bias = None
        if need_x:
            weight = reference.dense_weight(bits, scale, in_features, plane_weights, group_size, wide)
            with reference.full_precision(grad):
                grad_x = (grad_y @ weight).to(grad.dtype)
        if need_bias:
            grad_bias = grad_y.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, None, grad_bias, None, None, None, None, None, None


def _forward(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    plane_weights: list[int],
    group_size: int,
    compute: str,
    tiles: Tensor | None,
    activation: str,
) -> Tensor:
    compute = arithmetic(compute)
    operation = operation_of(group_size, len(plane_weights))
    backend = backends.choose(operation, x.device, x.dtype).name
    if backend == "reference":
        return reference.binary_linear(
            x, bits, scale, bias, in_features, plane_weights, group_size, compute, activation
        )
    fp32 = scale if scale.dtype == torch.float32 else scale.float()
    y: Tensor
    if backend == "triton":
        y = torch.ops.quantopt.binary_linear_triton(
            x, bits, fp32, bias, in_features, plane_weights, group_size, compute, activation
        )
    else:
        y = torch.ops.quantopt.binary_linear.default(
            x, bits, fp32, bias, in_features, plane_weights, group_size, compute, tiles, activation
        )
    return y


def run_linear(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    plane_weights: list[int],
    group_size: int,
    compute: str,
    tiles: Tensor | None,
    activation: str,
) -> Tensor:
    """:func:`binary_linear` without its checks but that of x, for modules that made them once."""
    forward_mode = _in_forward_mode()
    arguments = (
        x,
        bits,
        scale,
        bias,
        in_features,
        plane_weights,
        group_size,
        compute,
        tiles,
        activation,
    )
    if _extension.binary_linear is not None and not forward_mode and not is_compiling():
        plain: Tensor | None = _extension.binary_linear(*arguments)
        if plain is not None:  # the operator's result: CPU tensors, no gradients, nothing that watches calls
            return plain
    _check_floating(x)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"x must have in_features={in_features} as its last dimension, not shape {list(x.shape)}"
        )
    if forward_mode:
        mode, dtype = arithmetic(compute), x.dtype
        if mode != "exact":
            x, mode = _straight_through(x, 1, mode), "exact"
        y: Tensor = reference.binary_linear(
            x, bits, scale, bias, in_features, plane_weights, group_size, mode, activation
        )
        return y.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        result: Tensor = _Linear.apply(*arguments)
        return result
    return _forward(*arguments)


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
            "bf16": x is first rounded to the nearest bfloat16, by at most 2^-8 of each |x| (more for denormals; from
            2^128 - 2^119 on it gives an infinity), the rest is as in "exact", y of the type of x. Where x is bfloat16
            nothing is rounded. On a GPU fp32 x is then multiplied once, not in three parts; on a CPU with AMX 8 rows or
            more run on its tiles, which take denormals of x and of sums as zero. Elsewhere it saves nothing.
        group_size: consecutive weights of a row that share a scale; 0: scale is per tensor or per row.
        plane_weights: weight of each plane, default 1, 2, 4, ...; ternary weights are two planes of weights 1, 1.
        tiles: :func:`binary_tiles` of these bits, if derived before (saves time when x has few rows).
        activation: "none", "relu", "gelu" (exact, by erf: torch's approximate="none") or "silu", of the fp32 sums,
            before y is rounded to its type.

    Returns y [..., N] of the type of x. On the CPU each sum is taken in an order that depends on K alone: the same bits
    for any number of threads or rows ("bf16" with AMX: for any 8 rows or more, and for any fewer). On a GPU the order
    depends on the sizes and the device, never on the run; in "int8" mode without groups the sums are whole numbers and
    y is that of the CPU. There "exact" multiplies fp32 x in three bfloat16 parts that add up to it. In "exact" and
    "bf16" mode infinities and NaN propagate as in a dense layer, on the CPU whatever the planes; on a GPU an infinity
    may give NaN with several planes, which are summed one by one.
    ``tiles`` that are not those of ``bits`` as they are now are not used. Differentiable with respect to x and bias, by
    torch.func too; in forward mode (jvp) the reference runs. Raises TypeError or ValueError naming the argument that
    does not fit.
    """
    weights = _check_product(
        x, bits, scale, bias, in_features, group_size, compute, plane_weights, activation
    )
    return run_linear(x, bits, scale, bias, in_features, weights, group_size, compute, tiles, activation)


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
        bits, scale, bias, group_size, plane_weights, tiles, activation: as in :func:`binary_linear`, with
            K = C/groups * kh * kw.
        kernel_size, stride, padding (zeros), dilation, groups: as in torch.nn.functional.conv2d.
        compute: as in :func:`binary_linear`, but "int8" has one s for each image (over C, H and W). Rows are here the
            places of all images of y.

    On CUDA one kernel takes all of them, but for scales of groups of weights, more than 8 planes, many or small groups
    (conv_on_cuda) and very large images; Triton's the same (conv_in_triton). On the CPU a kernel of 1x1 without padding
    and groups is a linear layer; else, with a processor with AVX2 and neither small groups nor an odd group_size (see
    :func:`conv_tiles`; modules keep the tiles), the product runs on the packed weights too. Where none of this holds, W
    is expanded to ±1 (exact in every type) for each call, and the library's convolution runs in fp32: that saves memory
    but no time. So it does where gradients for x or bias are asked for: call packed networks under torch.inference_mode
    or no_grad. The same bits for any number of threads and images are promised for the packed kernels alone.

    Returns [B, N, H', W'] of the type of x, channels last in memory. Differentiable with respect to x and bias. Raises
    TypeError or ValueError naming the argument that does not fit.
    """
    kernel = _pair(kernel_size, "kernel_size", 1)
    steps, pads, spread = (
        _pair(stride, "stride", 1),
        _pair(padding, "padding", 0),
        _pair(dilation, "dilation", 1),
    )
    _check_floating(x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, C, H, W] or [C, H, W], not of shape {list(x.shape)}")
    if not isinstance(bits, Tensor) or bits.dim() not in (2, 3):
        raise TypeError(f"bits must be a uint8 tensor [N, ceil(K/8)] or [P, N, ceil(K/8)], not {_kind(bits)}")
    channels = x.shape[-3]
    if not isinstance(groups, int) or groups < 1 or channels % groups or bits.shape[-2] % groups:
        raise ValueError(
            f"groups={groups!r} must be an integer that divides the {channels} channels of x and "
            f"the {bits.shape[-2]} of bits"
        )
    features = channels // groups * kernel[0] * kernel[1]
    weights = _check_product(x, bits, scale, bias, features, group_size, compute, plane_weights, activation)
    size = [x.shape[i - 2] + 2 * pads[i] - spread[i] * (kernel[i] - 1) for i in (0, 1)]
    if min(size) < 1:
        raise ValueError(f"kernel_size={kernel} with dilation={spread} is larger than the padded image of x")
    return run_conv2d(
        x,
        bits,
        scale,
        bias,
        kernel,
        steps,
        pads,
        spread,
        groups,
        weights,
        group_size,
        compute,
        tiles,
        activation,
    )


def run_conv2d(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    plane_weights: list[int],
    group_size: int,
    compute: str,
    tiles: Tensor | None,
    activation: str,
) -> Tensor:
    """:func:`binary_conv2d` without its checks but that of x's type, for modules that made them once."""
    _check_floating(x)
    compute = arithmetic(compute)
    forward_mode, backward_mode = _in_forward_mode(), torch.is_grad_enabled()
    needs_grad = backward_mode and (x.requires_grad or (bias is not None and bias.requires_grad))
    chosen = backends.choose("binary_conv2d", x.device, x.dtype).name
    channels, outputs = x.shape[-3] // groups, bits.shape[-2] // groups
    if chosen == "cuda":
        places = [
            (x.shape[i - 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in (0, 1)
        ]
        taken = places[0] * places[1] <= CUDA_PLACES and conv_on_cuda(
            torch.bfloat16 if compute == "bf16" else x.dtype,
            channels,
            outputs,
            groups,
            group_size,
            len(plane_weights),
            compute,
        )
        chosen = "cuda" if taken else "reference"
    if chosen == "triton" and not conv_in_triton(bits, channels, groups, group_size):
        chosen = "reference"
    if chosen == "reference" or needs_grad or forward_mode:
        dtype = x.dtype
        if compute != "exact" and (forward_mode or (backward_mode and x.requires_grad)):
            x, compute = _straight_through(x, 3, compute), "exact"
        y: Tensor = reference.binary_conv2d(
            x,
            bits,
            scale,
            bias,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            plane_weights,
            group_size,
            compute,
            activation,
        )
        return y.to(dtype)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    fp32 = scale if scale.dtype == torch.float32 else scale.float()
    head = (images, bits, fp32, bias, kernel, stride, padding, dilation, groups, plane_weights)
    if chosen == "triton":
        y = torch.ops.quantopt.binary_conv2d_triton(*head, compute, activation)
    else:
        y = torch.ops.quantopt.binary_conv2d.default(*head, group_size, compute, tiles, activation)
    return y if x.dim() == 4 else y.squeeze(0)


def conv_in_triton(bits: Tensor, channels: int, groups: int, group_size: int) -> bool:
    """Whether the Triton kernel takes a convolution and is worth it: with few channels or outputs in a group, of the 32
    and 16 that it multiplies at least, the library's convolution on expanded weights runs."""
    outputs, planes = bits.shape[-2] // groups, bits.shape[0] if bits.dim() == 3 else 1
    small = groups > 1 and 4 * channels * outputs < 32 * 16
    return group_size == 0 and planes <= 8 and not small


# torch.library.custom_op would import triton with this module.
_library = torch.library.Library("quantopt", "FRAGMENT")
_library.define(
    "binary_linear_triton(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int in_features, int[] plane_weights, "
    "int group_size, str compute, str activation) -> Tensor"
)


@torch.library.impl(_library, "binary_linear_triton", "CUDA")
def _(*arguments: Any) -> Tensor:
    from quantopt.kernels import binary_linear as kernels

    y: Tensor = kernels.binary_linear(*arguments)
    return y


_library.define(
    "binary_conv2d_triton(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int groups, int[] plane_weights, str compute, str activation) -> Tensor"
)


@torch.library.impl(_library, "binary_conv2d_triton", "CUDA")
def _(*arguments: Any) -> Tensor:
    from quantopt.kernels import binary_conv as kernels

    y: Tensor = kernels.binary_conv2d(*arguments)
    return y


def _empty_linear(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, *_: Any, **__: Any) -> Tensor:
    _check_devices(x, bits, scale, bias)  # with bits on "meta" this runs for any x
    return x.new_empty([*x.shape[:-1], bits.shape[-2]])


def _empty_conv2d(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: Any,
    **__: Any,
) -> Tensor:
    _check_devices(x, bits, scale, bias)
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    return torch.empty(
        [x.shape[0], bits.shape[-2], *size],
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


for _name in ("", "_triton") if _extension.error is None else ("_triton",):
    torch.library.register_fake(f"quantopt::binary_linear{_name}", _empty_linear)
    torch.library.register_fake(f"quantopt::binary_conv2d{_name}", _empty_conv2d)

if _extension.error is None:

    @torch.library.register_fake("quantopt::binary_tiles_and_weight")
    def _(bits: Tensor, in_features: int, plane_weights: list[int], dtype: torch.dtype) -> Tensor:
        tiles: Tensor = torch.ops.quantopt.binary_tiles(bits, in_features)
        return tiles

    @torch.library.register_fake("quantopt::binary_tiles")
    def _(bits: Tensor, in_features: int) -> Tensor:
        if bits.device.type == "cuda":
            planes = bits.shape[0] if bits.dim() == 3 else 1
            words = -(-bits.shape[-2] // 32) * -(-in_features // 128) * 128
            return bits.new_empty([planes, words], dtype=torch.int32)
        planes = bits.shape[0] if bits.dim() == 3 else 1
        words = -(-in_features // 16)
        return bits.new_empty([planes, -(-bits.shape[-2] // 32) * words * 32], dtype=torch.int16)
