"""y = activation(x W^T + b) in Triton, W = scale * sum_i plane_weights[i] * (±1 plane i) from its bits.

Each byte of the bits is loaded once and becomes eight ±1; W is the left operand of the product, the rows of x are its
columns. K is split where the blocks of rows do not fill the device: the parts are stored, and a second kernel adds them
up in their order, so that a result has the same bits in every run. Nothing is tuned at run time: the sizes of a block
follow from the number of rows (CONFIGS), and Triton keeps what it compiled on disk.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """A block: rows of x, rows of W, weights of a row in one step; and how it is compiled."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


# Up to so many rows of x. Not measured: chosen so that a block reads the bits in runs of 16 bytes and its sums fit the
# registers.
CONFIGS = (
    (16, Config(16, 64, 128, 4, 4)),
    (32, Config(32, 64, 128, 4, 3)),
    (64, Config(64, 64, 128, 4, 3)),
    (None, Config(128, 128, 64, 8, 3)),
)


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
def quantize_kernel(x_ptr, q_ptr, scale_ptr, inputs, stride, BLOCK: tl.constexpr):
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
    for first in range(0, inputs, BLOCK):
        k = first + at
        x = tl.load(x_ptr + row * stride + k, mask=k < inputs, other=0.0).to(tl.float32)
        quotient = tl.div_rn(tl.where(usable, x, 0.0), divisor)
        whole = (quotient + 12582912.0) - 12582912.0  # 1.5 * 2^23: no fraction is left
        whole = tl.where(whole > 127.0, 127.0, tl.where(whole < -127.0, -127.0, whole))
        tl.store(q_ptr + row * inputs + k, whole.to(tl.int8), mask=k < inputs)
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


def config_for(rows: int, group_size: int) -> Config:
    """The block for so many rows of x; a step of K never holds weights of two groups."""
    config = next(config for most, config in CONFIGS if most is None or rows <= most)
    return config._replace(inputs=min(config.inputs, group_size)) if group_size else config


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
) -> Tensor:
    """The arguments of :func:`quantopt.binary_linear`, checked. group_size is 0 or a power of two from 32 on."""
    outputs, inputs = bits.shape[-2], in_features
    y = x.new_empty([*x.shape[:-1], outputs])
    if y.numel() == 0:
        return y
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
        if compute == "int8":
            q = torch.empty([rows, inputs], dtype=torch.int8, device=x.device)
            x_scale = torch.empty([rows], dtype=torch.float32, device=x.device)
            block = max(32, min(4096, triton.next_power_of_2(inputs)))
            quantize_kernel[(rows,)](values, q, x_scale, inputs, values.stride(0), BLOCK=block)
            values, arguments["x_scale_ptr"] = q, x_scale
        config = config_for(rows, group_size)
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
            block = 1024
            finish_kernel[(triton.cdiv(outputs, block), rows)](
                sums,
                y_ptr=y,
                rows=rows,
                outputs=outputs,
                splits=splits,
                rows_of_scale=1,
                BLOCK=block,
                enable_fp_fusion=False,
                **arguments,
                **meta,
            )
    return y
