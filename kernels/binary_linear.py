"""y = activation(x W^T + b) in Triton, W = scale * sum_i plane_weights[i] * (±1 plane i) from its bits.

Each byte of the bits is loaded once and becomes eight ±1; W is the left operand of the product, the rows of x are its
columns. K is split where the blocks of rows do not fill the device: the parts are stored, and a second kernel adds them
up in their order, so that a result has the same bits in every run. The sizes of a block follow from the number of rows
(CONFIGS).

Many rows: W is expanded into memory of torch's allocator, and cuBLAS multiplies.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantopt.kernels.epilogue import epilogue, epilogue_arguments, run_epilogue
from quantopt.kernels.quantize import quantize_rows
from quantopt.packed_weight import PackedWeight


class Config(NamedTuple):
    """A block: rows of x, rows of W, weights of a row in one step; and how it is compiled."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


# Up to so many rows of x, a block that reads the bits in runs of 16 bytes (64 weights: 8) and whose sums fit the
# registers.
CONFIGS = (
    (16, Config(16, 64, 128, 4, 4)),
    (32, Config(32, 64, 128, 4, 3)),
    (64, Config(64, 64, 128, 4, 3)),
    (None, Config(128, 128, 64, 8, 3)),
)
# From so many rows on cuBLAS multiplies, by mode: where csrc/cuda/binary_dispatch.h crosses too.
CUBLAS_ROWS = {"int8": 257, "exact": 513}
CUBLAS_SUMS = 32 << 20  # bytes of sums at a time, as in csrc/cuda/binary_linear_ops.cpp


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
        y = epilogue(sums, scale_ptr, bias_ptr, x_scale_ptr, m, n, rows, outputs, ONE_SCALE, ACTIVATION)
        tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=mask)


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


def expand(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W without its scale [N, K] as whole numbers of ``dtype``, N padded with zeros to 8 rows and K to 16 columns."""
    outputs, columns = weight.outputs, triton.cdiv(weight.in_features, 16) * 16
    w = torch.empty([triton.cdiv(outputs, 8) * 8, columns], dtype=dtype, device=weight.bits.device)
    block = min(512, triton.next_power_of_2(columns // 8))
    expand_kernel[(w.shape[0], triton.cdiv(columns // 8, block))](
        weight.bits.contiguous(),
        w,
        outputs,
        weight.in_features,
        weight.bits.shape[-1],
        columns,
        PLANE_WEIGHTS=tuple(weight.plane_weights),
        BLOCK=block,
    )
    return w


def config_for(rows: int, group_size: int) -> Config:
    """The block for so many rows of x; a step of K never holds weights of two groups."""
    config = next(config for most, config in CONFIGS if most is None or rows <= most)
    return config._replace(inputs=min(config.inputs, group_size)) if group_size else config


def cublas_takes(x: Tensor, weight: PackedWeight, compute: str) -> bool:
    """Whether cuBLAS multiplies: W must be whole numbers that int8 or bfloat16 hold, sums come out in 32 bits."""
    most = 127 if compute == "int8" else 256
    typed = compute == "int8" or x.dtype != torch.float32
    known = torch.version.hip is None
    exact = not weight.group_size and sum(weight.plane_weights) <= most
    return known and typed and exact and x.shape[0] >= CUBLAS_ROWS[compute]


def cublas_product(x: Tensor, w: Tensor) -> Tensor:
    """x w^T into int32 or fp32."""
    if x.dtype == torch.int8:
        return torch._int_mm(x, w.t())
    if x.is_cuda:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return x.float() @ w.float().t()  # in the interpreter


def multiply_by_cublas(
    values: Tensor, weight: PackedWeight, y: Tensor, compute: str, arguments: dict[str, Any]
) -> None:
    """y [M, N] from rows [M, K], in turns of CUBLAS_SUMS."""
    int8, outputs, inputs = compute == "int8", weight.outputs, weight.in_features
    w = expand(weight, torch.int8 if int8 else values.dtype)
    columns = w.shape[1]
    # _int_mm wants more than 16 rows; a grid has 65535 blocks along y, one for each row that epilogue_kernel takes.
    most = min(65535, max(32, CUBLAS_SUMS // (4 * w.shape[0])))
    for some, target in zip(values.split(most), y.split(most), strict=True):
        count = some.shape[0]
        if int8:
            q = torch.empty([max(32, count), columns], dtype=torch.int8, device=y.device)
            x_scale = torch.empty([count], dtype=torch.float32, device=y.device)
            quantize_rows(some, q, x_scale)
            some, arguments = q, {**arguments, "x_scale_ptr": x_scale}
        elif columns != inputs:
            some = torch.nn.functional.pad(some, (0, columns - inputs))
        sums = cublas_product(some, w)
        if w.shape[0] != outputs:
            sums = sums[:, :outputs].contiguous()
        # int8 has rows more
        run_epilogue(sums[: len(target)].unsqueeze(0), target, arguments)


def splits_for(blocks: int, steps: int, processors: int) -> int:
    """Parts of K: as many as fill the device twice over, each of at least four steps, none empty."""
    wanted = max(1, min(2 * processors // blocks, steps // 4))
    each = -(-steps // wanted)
    return -(-steps // each)


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def binary_linear(x: Tensor, weight: PackedWeight, compute: str, activation: str) -> Tensor:
    """:func:`quantopt.binary_linear` of checked arguments. The group size is 0 or a power of two from 32 on."""
    if compute == "int8" and weight.in_features * 127 * sum(weight.plane_weights) >= 1 << 31:
        raise ValueError(
            f"in_features={weight.in_features} is too large for the 32-bit sums of "
            'compute="int8"; use compute="exact"'
        )
    outputs, inputs, group_size = weight.outputs, weight.in_features, weight.group_size
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
        arguments = epilogue_arguments(weight, activation)
        if cublas_takes(values, weight, compute):
            multiply_by_cublas(values, weight, y.view(rows, outputs), compute, arguments)
            return y
        config = config_for(rows, group_size)
        if compute == "int8":
            q = torch.empty([rows, inputs], dtype=torch.int8, device=x.device)
            x_scale = torch.empty([rows], dtype=torch.float32, device=x.device)
            quantize_rows(values, q, x_scale)
            values, arguments["x_scale_ptr"] = q, x_scale
        steps = triton.cdiv(inputs, config.inputs)
        grid = (triton.cdiv(outputs, config.outputs), triton.cdiv(rows, config.rows))
        splits = splits_for(grid[0] * grid[1], steps, processors_of(x.device))
        whole = compute == "int8" and not group_size
        sums = y
        if splits > 1:
            sums = torch.empty(
                [splits, rows, outputs], dtype=torch.int32 if whole else torch.float32, device=x.device
            )
        linear_kernel[(*grid, splits)](
            x_ptr=values,
            bits_ptr=weight.bits.contiguous(),
            group_scale_ptr=weight.scale.contiguous() if group_size else None,
            out_ptr=sums,
            rows=rows,
            outputs=outputs,
            inputs=inputs,
            x_stride=values.stride(0),
            row_bytes=weight.bits.shape[-1],
            groups=weight.scale.shape[1] if group_size else 0,
            steps=steps,
            steps_each=triton.cdiv(steps, splits),
            PLANE_WEIGHTS=tuple(weight.plane_weights),
            GROUP=group_size,
            INT8=compute == "int8",
            PARTIAL=splits > 1,
            ROWS=config.rows,
            OUTPUTS=config.outputs,
            INPUTS=config.inputs,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # Not fused with the sum, scale and bias give the bits of the CPU; fp32 x is multiplied in fused operations.
            enable_fp_fusion=values.dtype == torch.float32,
            **arguments,
        )
        if splits > 1:
            run_epilogue(sums, y, arguments)
    return y
