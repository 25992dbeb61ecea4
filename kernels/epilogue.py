"""From the sums of a product to y in Triton: scales, bias, activation, rounding; and the sum over parts of K."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quantopt.packed_weight import PackedWeight


@triton.jit
def epilogue(
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
    """activation(sums * scale[n] * x_scale[m] + bias[n]), sums [rows of x, rows of W]."""
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


@triton.jit(do_not_specialize=["rows", "splits", "rows_of_scale"])
def epilogue_kernel(
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
    """y from sums [splits, rows, outputs], added up in the order of the parts."""
    m = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n[None, :] < outputs
    total = tl.load(sums_ptr + m[:, None] * outputs + n[None, :], mask=mask, other=0)
    for part in range(1, splits):
        total += tl.load(sums_ptr + (part * rows + m[:, None]) * outputs + n[None, :], mask=mask, other=0)
    of_scale = m // rows_of_scale
    y = epilogue(total, scale_ptr, bias_ptr, x_scale_ptr, of_scale, n, rows, outputs, ONE_SCALE, ACTIVATION)
    tl.store(y_ptr + m[:, None] * outputs + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def epilogue_arguments(weight: PackedWeight, activation: str) -> dict[str, Any]:
    """What a kernel with an epilogue is given for it; x_scale_ptr is to be set where x was quantised."""
    return {
        "scale_ptr": None if weight.group_size else weight.scale.contiguous(),
        "bias_ptr": None if weight.bias is None else weight.bias.float().contiguous(),
        "x_scale_ptr": None,
        "ONE_SCALE": weight.scale.numel() == 1,
        "ACTIVATION": activation,
    }


def run_epilogue(sums: Tensor, y: Tensor, arguments: dict[str, Any], rows_of_scale: int = 1) -> None:
    """y, M rows of N, from sums [splits, M, N]; ``rows_of_scale``: rows that share a scale of x."""
    splits, rows, outputs = sums.shape
    block = 1024
    epilogue_kernel[(triton.cdiv(outputs, block), rows)](
        sums,
        y_ptr=y,
        rows=rows,
        outputs=outputs,
        splits=splits,
        rows_of_scale=rows_of_scale,
        BLOCK=block,
        enable_fp_fusion=False,
        **arguments,
    )
