"""y = activation(x W^T + b) in Triton, W = scale * sum_i plane_weights[i] * (±1 plane i) from its bits.

Each byte of the bits is loaded once and becomes eight ±1; W is the left operand of the product, the rows of x are its
columns. K is split where the blocks of rows do not fill the device: the parts are stored, and a second kernel adds them
up in their order, so that a result has the same bits in every run with the same block. The sizes of a block follow
from the number of rows (CONFIGS): the first of its line, unless :func:`tune` found another one to be faster and
kernels/choices.py kept it. Nothing is tuned unasked; QUANTOPT_TRITON_TUNE=1 asks, at the first product of each bucket.

Many rows: W is expanded into memory of torch's allocator, and the library multiplies.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantopt.kernels import choices


class Config(NamedTuple):
    """A block: rows of x, rows of W, weights of a row in one step; and how it is compiled."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


# Up to so many rows of x, at most five blocks. Not measured: chosen so that a block reads the bits in runs of 16 bytes
# and its sums fit the registers.
CONFIGS = (
    (16, (Config(16, 64, 128, 4, 4), Config(16, 32, 256, 4, 4), Config(16, 128, 128, 8, 3))),
    (32, (Config(32, 64, 128, 4, 3), Config(32, 128, 128, 8, 3))),
    (64, (Config(64, 64, 128, 4, 3), Config(64, 128, 64, 8, 3))),
    (None, (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 3), Config(64, 128, 64, 8, 4))),
)
# From so many rows on the library multiplies, by mode: where csrc/cuda/binary_dispatch.h crosses too. Not measured.
LIBRARY_ROWS = {"int8": 257, "exact": 513}
LIBRARY_SUMS = 32 << 20  # bytes of sums at a time, as in csrc/cuda/binary_ops.cpp


@triton.jit
def finish(
    y,
    scale_ptr,
    bias_ptr,
    x_scale_ptr,
    m,
    n,
    rows,
    outputs,
    ONE_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """What becomes of the sums [rows of x, rows of W], as in csrc/cuda/binary_epilogue.h."""
    y = y.to(tl.float32)
    factor = tl.full([1, 1], 1.0, tl.float32)
    if scale_ptr is not None:
        if ONE_SCALE:
            factor = factor * tl.load(scale_ptr)
        else:
            factor = factor * tl.load(scale_ptr + n, mask=n < outputs, other=0.0)[None, :]
    if x_scale_ptr is not None:
        factor = factor * tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)[:, None]
    y = y * factor
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=n < outputs, other=0.0)[None, :]
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def quantize_kernel(x_ptr, q_ptr, scale_ptr, inputs, columns, stride, BLOCK: tl.constexpr):
    """A row of x: s = max|x| / 127, q = x / s rounded half to even; 0 and NaN for s as in csrc/core/quantize.h."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], 0, tl.int32)
    for first in range(0, inputs, BLOCK):
        k = first + at
        x = tl.load(x_ptr + row * stride + k, mask=k < inputs, other=0.0).to(tl.float32)
        # As integers magnitudes order like floats, infinities and NaN last.
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    most = tl.reduce(largest, 0, larger)
    finite = most < 0x7F800000
    s = tl.div_rn(most.to(tl.float32, bitcast=True), 127.0)
    usable = finite & (s > 0.0)
    divisor = tl.where(usable, s, 1.0)
    for first in range(0, columns, BLOCK):
        k = first + at
        x = tl.load(x_ptr + row * stride + k, mask=k < inputs, other=0.0).to(tl.float32)
        quotient = tl.div_rn(tl.where(usable, x, 0.0), divisor)
        whole = (quotient + 12582912.0) - 12582912.0  # 1.5 * 2^23: no fraction is left
        whole = tl.where(whole > 127.0, 127.0, tl.where(whole < -127.0, -127.0, whole))
        tl.store(q_ptr + row * columns + k, whole.to(tl.int8), mask=k < columns)
    tl.store(scale_ptr + row, tl.where(finite, s, float("nan")))


@triton.jit(do_not_specialize=["rows", "steps", "steps_each"])
def linear_kernel(
    x_ptr,
    bits_ptr,
    scale_ptr,
    bias_ptr,
    x_scale_ptr,
    group_scale_ptr,
    out_ptr,  # y [M, N], or with PARTIAL the sums [splits, M, N]
    rows,
    outputs,
    inputs,
    x_stride,
    row_bytes,
    groups,
    steps,  # blocks of K
    steps_each,  # in one part
    PLANE_WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    INT8: tl.constexpr,
    PARTIAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2).to(tl.int64)
    whole: tl.constexpr = INT8 and GROUP == 0
    total = tl.full([OUTPUTS, ROWS], 0, tl.int32 if whole else tl.float32)
    eight = tl.arange(0, 8)
    for step in range(part * steps_each, tl.minimum(steps, (part + 1) * steps_each)):
        k = step * INPUTS + tl.arange(0, INPUTS)
        x = tl.load(
            x_ptr + m[None, :] * x_stride + k[:, None],
            mask=(m[None, :] < rows) & (k[:, None] < inputs),
            other=0,
        )
        byte = step * (INPUTS // 8) + tl.arange(0, INPUTS // 8)
        inside = (n[:, None] < outputs) & (byte[None, :] < row_bytes)
        if GROUP > 0:
            group = step * INPUTS // GROUP
            factor = tl.load(group_scale_ptr + n * groups + group, mask=n < outputs, other=0.0)[:, None]
        for plane in tl.static_range(len(PLANE_WEIGHTS)):
            packed = tl.load(
                bits_ptr + (plane * outputs + n[:, None]) * row_bytes + byte[None, :],
                mask=inside,
                other=0,
            )
            ones = (packed[:, :, None] >> eight[None, None, :].to(tl.uint8)) & 1
            if INT8:
                signs = 2 * ones.to(tl.int8) - 1
                product = tl.dot(signs.reshape(OUTPUTS, INPUTS), x)
            else:
                signs = tl.where(ones != 0, 1.0, -1.0).to(x.dtype)
                product = tl.dot(signs.reshape(OUTPUTS, INPUTS), x, input_precision="ieee")
            if GROUP > 0:
                total += product.to(tl.float32) * (PLANE_WEIGHTS[plane] * factor)
            else:
                total += product * PLANE_WEIGHTS[plane]
    sums = tl.trans(total)
    where = m[:, None] * outputs + n[None, :]
    mask = (m[:, None] < rows) & (n[None, :] < outputs)
    if PARTIAL:
        tl.store(out_ptr + part * rows * outputs + where, sums, mask=mask)
    else:
        y = finish(sums, scale_ptr, bias_ptr, x_scale_ptr, m, n, rows, outputs, ONE_SCALE, ACTIVATION)
        tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "splits", "rows_of_scale"])
def finish_kernel(
    sums_ptr,
    scale_ptr,
    bias_ptr,
    x_scale_ptr,
    y_ptr,
    rows,
    outputs,
    splits,
    rows_of_scale,  # that share one scale of x
    ONE_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n[None, :] < outputs
    total = tl.load(sums_ptr + m[:, None] * outputs + n[None, :], mask=mask, other=0)
    for part in range(1, splits):
        total += tl.load(sums_ptr + (part * rows + m[:, None]) * outputs + n[None, :], mask=mask, other=0)
    of_scale = m // rows_of_scale
    y = finish(total, scale_ptr, bias_ptr, x_scale_ptr, of_scale, n, rows, outputs, ONE_SCALE, ACTIVATION)
    tl.store(y_ptr + m[:, None] * outputs + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expand_kernel(
    bits_ptr,
    w_ptr,  # [outputs_padded, columns]
    outputs,
    inputs,
    row_bytes,
    columns,
    PLANE_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W = sum_i plane_weights[i] * (±1 plane i), a row and BLOCK bytes of it; zero beyond outputs and inputs."""
    n = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    eight = tl.arange(0, 8)
    total = tl.full([BLOCK, 8], 0, tl.int32)
    for plane in tl.static_range(len(PLANE_WEIGHTS)):
        packed = tl.load(
            bits_ptr + (plane * outputs + n) * row_bytes + byte,
            mask=(n < outputs) & (byte < row_bytes),
            other=0,
        )
        ones = (packed[:, None] >> eight[None, :].to(tl.uint8)) & 1
        total += (2 * ones.to(tl.int32) - 1) * PLANE_WEIGHTS[plane]
    k = byte[:, None] * 8 + eight[None, :]
    whole = tl.where((n[:, None] < outputs) & (k < inputs), total, 0)
    tl.store(
        w_ptr + n[:, None] * columns + k, whole.to(tl.float32).to(w_ptr.dtype.element_ty), mask=k < columns
    )


def expand(bits: Tensor, inputs: int, plane_weights: Sequence[int], dtype: torch.dtype) -> Tensor:
    """W [N, K] as whole numbers of ``dtype``, N padded with zeros to 8 rows and K to 16 columns."""
    outputs, columns = bits.shape[-2], triton.cdiv(inputs, 16) * 16
    w = torch.empty([triton.cdiv(outputs, 8) * 8, columns], dtype=dtype, device=bits.device)
    block = min(512, triton.next_power_of_2(columns // 8))
    expand_kernel[(w.shape[0], triton.cdiv(columns // 8, block))](
        bits.contiguous(),
        w,
        outputs,
        inputs,
        bits.shape[-1],
        columns,
        PLANE_WEIGHTS=tuple(plane_weights),
        BLOCK=block,
    )
    return w


def configs_for(rows: int, group_size: int) -> list[Config]:
    """The blocks for so many rows of x, the untuned choice first; a step of K never holds weights of two groups."""
    configs = next(configs for most, configs in CONFIGS if most is None or rows <= most)
    if not group_size:
        return list(configs)
    return list(dict.fromkeys(c._replace(inputs=min(c.inputs, group_size)) for c in configs))


def config_for(rows: int, group_size: int) -> Config:
    """The block of a product that was not tuned."""
    return configs_for(rows, group_size)[0]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def bucket(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, group_size: int, compute: str, planes: int
) -> str:
    """The products that share a choice: N and K up to the next power of two."""
    most = next(most for most, _ in CONFIGS if most is None or rows <= most)
    kind = "int8" if compute == "int8" else str(dtype).removeprefix("torch.")
    size = f"N{triton.next_power_of_2(outputs)} K{triton.next_power_of_2(inputs)}"
    return f"binary_linear {kind} M{most or 'more'} {size} group{group_size} planes{planes}"


def tune(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    in_features: int,
    plane_weights: Sequence[int],
    group_size: int = 0,
    compute: str = "exact",
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> Config:
    """Times every block for this product, and keeps the fastest for its bucket, on disk too. Takes some seconds.

    The arguments are those of :func:`binary_linear`. measure(call) gives a time; triton.testing.do_bench by default.
    """
    rows = x.numel() // max(1, in_features)
    timed: Callable[[Callable[[], object]], float] = measure or triton.testing.do_bench
    seconds = {}
    for config in configs_for(rows, group_size):

        def call(config: Config = config) -> Tensor:
            return binary_linear(
                x, bits, scale, None, in_features, plane_weights, group_size, compute, "none", config
            )

        seconds[config] = timed(call)
    best = min(seconds, key=lambda config: seconds[config])
    key = bucket(rows, bits.shape[-2], in_features, x.dtype, group_size, compute, len(plane_weights))
    choices.store(device_name(x.device), key, best)
    return best


def chosen_config(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    in_features: int,
    plane_weights: Sequence[int],
    group_size: int,
    compute: str,
    rows: int,
) -> Config:
    """The block that was tuned for the bucket, or the first."""
    key = bucket(rows, bits.shape[-2], in_features, x.dtype, group_size, compute, len(plane_weights))
    configs = configs_for(rows, group_size)
    choice = choices.load(device_name(x.device), key)
    for config in configs:
        if choice == list(config):
            return config
    asked = os.environ.get("QUANTOPT_TRITON_TUNE") == "1"
    if asked and x.is_cuda and not torch.cuda.is_current_stream_capturing():
        return tune(x, bits, scale, in_features, plane_weights, group_size, compute)
    return configs[0]


def by_library(x: Tensor, rows: int, plane_weights: Sequence[int], group_size: int, compute: str) -> bool:
    """Whether the library multiplies: W must be whole numbers that int8 or bfloat16 hold, sums come out in 32 bits."""
    most = 127 if compute == "int8" else 256
    typed = compute == "int8" or x.dtype != torch.float32
    known = torch.version.hip is None
    return known and typed and not group_size and sum(plane_weights) <= most and rows >= LIBRARY_ROWS[compute]


def library_product(x: Tensor, w: Tensor) -> Tensor:
    """x w^T into int32 or fp32."""
    if x.dtype == torch.int8:
        return torch._int_mm(x, w.t())
    if x.is_cuda:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return x.float() @ w.float().t()  # in the interpreter


def multiply_by_library(
    values: Tensor,
    bits: Tensor,
    y: Tensor,
    inputs: int,
    plane_weights: Sequence[int],
    compute: str,
    arguments: dict[str, Any],
    meta: dict[str, Any],
) -> None:
    """y [M, N] from rows [M, K], in turns of LIBRARY_SUMS."""
    int8, outputs = compute == "int8", y.shape[1]
    w = expand(bits, inputs, plane_weights, torch.int8 if int8 else values.dtype)
    columns = w.shape[1]
    # _int_mm wants more than 16 rows; a grid has 65535 blocks along y, one for each row that finish_kernel takes.
    most = min(65535, max(32, LIBRARY_SUMS // (4 * w.shape[0])))
    for some, target in zip(values.split(most), y.split(most), strict=True):
        count = some.shape[0]
        if int8:
            q = torch.empty([max(32, count), columns], dtype=torch.int8, device=y.device)
            x_scale = torch.empty([count], dtype=torch.float32, device=y.device)
            quantize(some, q, x_scale, inputs)
            some, arguments = q, {**arguments, "x_scale_ptr": x_scale}
        elif columns != inputs:
            some = torch.nn.functional.pad(some, (0, columns - inputs))
        sums = library_product(some, w)
        if w.shape[0] != outputs:
            sums = sums[:, :outputs].contiguous()
        # int8 has rows more
        add_up(sums[: len(target)].unsqueeze(0), target, arguments, meta)


def quantize(x: Tensor, q: Tensor, x_scale: Tensor, inputs: int) -> None:
    """Rows of x [M, K] into q [at least M, at least K], zeros from K on, and their scales."""
    block = max(32, min(4096, triton.next_power_of_2(inputs)))
    quantize_kernel[(x.shape[0],)](x, q, x_scale, inputs, q.shape[1], x.stride(0), BLOCK=block)


def add_up(
    sums: Tensor, y: Tensor, arguments: dict[str, Any], meta: dict[str, Any], rows_of_scale: int = 1
) -> None:
    """y, M rows of N, from sums [splits, M, N]; ``rows_of_scale``: rows that share a scale of x."""
    splits, rows, outputs = sums.shape
    block = 1024
    finish_kernel[(triton.cdiv(outputs, block), rows)](
        sums,
        y_ptr=y,
        rows=rows,
        outputs=outputs,
        splits=splits,
        rows_of_scale=rows_of_scale,
        BLOCK=block,
        enable_fp_fusion=False,
        **arguments,
        **meta,
    )


def splits_for(blocks: int, steps: int, processors: int) -> int:
    """Parts of K: as many as fill the device twice over, each of at least four steps, none empty."""
    wanted = max(1, min(2 * processors // blocks, steps // 4))
    each = -(-steps // wanted)
    return -(-steps // each)


def binary_linear(
    x: Tensor,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    plane_weights: Sequence[int],
    group_size: int,
    compute: str,
    activation: str,
    config: Config | None = None,
) -> Tensor:
    """The arguments of :func:`quantopt.binary_linear`, checked. group_size is 0 or a power of two from 32 on.

    config: the block, None for the one that :func:`tune` chose, or the library's product.
    """
    if compute == "int8" and in_features * 127 * sum(plane_weights) >= 1 << 31:
        raise ValueError(
            f'in_features={in_features} is too large for the 32-bit sums of compute="int8"; use compute="exact"'
        )
    outputs, inputs = bits.shape[-2], in_features
    y = x.new_empty([*x.shape[:-1], outputs])
    if y.numel() == 0:
        return y
    if compute == "bf16":
        x, compute = x.to(torch.bfloat16), "exact"
    values = x.reshape(y.numel() // outputs, inputs)
    if inputs > 1 and values.stride(1) != 1:
        values = values.contiguous()
    rows = values.shape[0]
    # Triton launches on the current device.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        arguments: dict[str, Any] = {
            "scale_ptr": None if group_size else scale.contiguous(),
            "bias_ptr": None if bias is None else bias.float().contiguous(),
            "x_scale_ptr": None,
        }
        meta = {"ONE_SCALE": scale.numel() == 1, "ACTIVATION": activation}
        if config is None and by_library(x, rows, plane_weights, group_size, compute):
            flat = y.view(rows, outputs)
            multiply_by_library(values, bits, flat, inputs, plane_weights, compute, arguments, meta)
            return y
        if config is None:
            config = chosen_config(x, bits, scale, in_features, plane_weights, group_size, compute, rows)
        if compute == "int8":
            q = torch.empty([rows, inputs], dtype=torch.int8, device=x.device)
            x_scale = torch.empty([rows], dtype=torch.float32, device=x.device)
            quantize(values, q, x_scale, inputs)
            values, arguments["x_scale_ptr"] = q, x_scale
        steps = triton.cdiv(inputs, config.inputs)
        grid = (triton.cdiv(outputs, config.outputs), triton.cdiv(rows, config.rows))
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
        splits = splits_for(grid[0] * grid[1], steps, processors)
        whole = compute == "int8" and not group_size
        sums = y
        if splits > 1:
            sums = torch.empty(
                [splits, rows, outputs], dtype=torch.int32 if whole else torch.float32, device=x.device
            )
        linear_kernel[(*grid, splits)](
            x_ptr=values,
            bits_ptr=bits.contiguous(),
            group_scale_ptr=scale.contiguous() if group_size else None,
            out_ptr=sums,
            rows=rows,
            outputs=outputs,
            inputs=inputs,
            x_stride=values.stride(0),
            row_bytes=bits.shape[-1],
            groups=scale.shape[1] if group_size else 0,
            steps=steps,
            steps_each=triton.cdiv(steps, splits),
            PLANE_WEIGHTS=tuple(plane_weights),
            GROUP=group_size,
            INT8=compute == "int8",
            PARTIAL=splits > 1,
            ROWS=config.rows,
            OUTPUTS=config.outputs,
            INPUTS=config.inputs,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # Kept apart, scale and bias give the bits of the CPU; fp32 x is multiplied in fused operations.
            enable_fp_fusion=values.dtype == torch.float32,
            **arguments,
            **meta,
        )
        if splits > 1:
            add_up(sums, y, arguments, meta)
    return y
