"""Sizes, random weights and the product by definition, for the tests of packed linear layers."""

import torch
from torch import Tensor

from quantopt.reference import binary as reference

ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 129)


# In and around every block: bytes, lookups of 4 and 6, words of 16, units of 48, chunks of 256, panels of 256 x 8,
# tiles of 32 and their bands of 128, blocks of 4096.
INPUTS = (
    0,
    1,
    4,
    5,
    6,
    7,
    8,
    9,
    12,
    15,
    16,
    17,
    28,
    31,
    47,
    48,
    49,
    63,
    65,
    127,
    129,
    241,
    255,
    256,
    257,
    304,
    500,
    1029,
)


OUTPUTS = (0, 1, 7, 8, 9, 16, 31, 32, 33, 63, 65, 96, 127, 129, 257)


def signs_by_definition(w: Tensor) -> Tensor:
    return torch.where(w >= 0, 1.0, -1.0).to(torch.float64)


def product(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int = 0,
    compute: str = "exact",
    exact_scales: bool = False,
) -> tuple[Tensor, Tensor]:
    """y in float64 from the signs of w, and the sum of the magnitudes that error bounds are relative to. With "int8"
    the scales of groups are rounded to levels, unless ``exact_scales``."""
    if compute == "int8" and group_size and not exact_scales:
        levels, r = reference.quantize_rows(scale.float())
        scale = levels.double() * r.double()
    if compute == "bf16":
        x = x.to(torch.bfloat16)
    if (
        compute == "int8" and x.shape[-1]
    ):  # the rounding is defined in fp32: near a tie float64 may fall on the other side
        s = x.float().abs().amax(-1, keepdim=True) / 127
        x = torch.where(s > 0, (x.float() / s).round().clamp(-127, 127), 0.0).double() * s.double()
    x = x.double()
    spread = (
        scale.double().repeat_interleave(group_size, 1)[:, : w.shape[1]]
        if group_size
        else scale.double()[:, None]
    )
    weight = signs_by_definition(w) * spread
    y = x @ weight.T
    size = x.abs() @ weight.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return y, size


def make(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(m, k).to(dtype), torch.randn(n, k), torch.rand(n) + 0.5, torch.randn(n)


def check(y: Tensor, expected: Tensor, size: Tensor, tolerance: float = 1e-6) -> None:
    assert y.shape == expected.shape
    error = (y.double() - expected).abs()
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[y.dtype]
    assert bool((error <= tolerance * size + rounding * expected.abs() + 1e-30).all()), float(
        (error / size).max()
    )


SMOOTH = {
    "none": lambda y: y,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}
