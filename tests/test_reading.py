"""Levels read off weights: the codes and steps that they were made with, and no reading of float weights."""

import pytest
import torch
from torch import Tensor, nn

import quantopt
from optim_cases import MAKERS
from quantopt.levels import LEVEL_COUNT
from quantopt.reference import levels as grid
from quantopt.reference.reading import doubt_of, read_levels, scale_of_levels


def on_levels(shape: tuple[int, ...], levels: int, scale: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their codes, and half the distance of two levels."""
    w = 0.05 * torch.randn(shape)
    hi = grid.frozen_scale(w, scale, size) * grid.level_factor(levels)
    spread = grid.spread_over(hi, w, size)
    return grid.project(w, spread, levels), grid.codes(w, spread, levels), hi / (levels - 1)


def values(reading: quantopt.reference.reading.Reading, w: Tensor) -> Tensor:
    step = grid.spread_over(reading.step, w, reading.group_size)
    return step * (2 * reading.codes.float() - (reading.levels - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("levels", grid.COUNTS)
@pytest.mark.parametrize(
    ("scale", "size", "shape"),
    [
        ("tensor", 0, (33, 7, 3, 3)), ("tensor", 0, (70, 1)), ("channel", 0, (33, 130)), ("channel", 0, (40, 10, 2)),
        ("group", 32, (21, 150)), ("group", 100, (3, 350)), ("group", 24, (1, 400)),
    ],
)  # fmt: skip
def test_codes_and_steps(
    dtype: torch.dtype, levels: int, scale: str, size: int, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(levels)
    w, codes, step = on_levels(shape, levels, scale, size)
    w = w.to(dtype)
    reading = read_levels(w)
    assert reading is not None and (reading.levels, reading.group_size) == (levels, size)
    exact = dtype in (torch.float32, torch.float64)
    tolerance = 1e-6 if exact else torch.finfo(dtype).eps
    # A slice that takes few levels may be read with other codes; its values are the same.
    assert reading.step.shape == step.shape and reading.codes.shape == w.shape
    torch.testing.assert_close(values(reading, w), w.float(), rtol=tolerance, atol=0)
    same = (reading.step / step - 1).abs() < tolerance
    assert float(same.float().mean()) > 0.8
    if scale != "group":
        assert bool(same.all()) and torch.equal(reading.codes, codes)
    if dtype == torch.bfloat16:  # converted: the rounding of bfloat16 in a float32 model
        again = read_levels(w.float())
        assert again is not None and torch.equal(again.codes, reading.codes)


def test_rows_that_miss_levels() -> None:
    """The step is found from the ratios of the levels that are there."""
    step = torch.tensor([0.1, 0.3, 0.7, 0.2])
    multiples = torch.tensor([[-7, 7, 3, 5], [-3, 5, 3, 3], [1, 1, 1, -1], [0, 0, 0, 0]]).repeat(1, 4)
    reading = read_levels(step[:, None] * multiples)
    assert reading is not None and reading.levels == 8
    assert torch.equal(2 * reading.codes[:3].long() - 7, multiples[:3])
    torch.testing.assert_close(reading.step, step * torch.tensor([1, 1, 1, 0]))
    # K is that of all rows: alone, the third is binary, and the first two together need eight
    assert read_levels((step[:, None] * multiples)[2:3]).levels == 2  # type: ignore[union-attr]
    ternary = read_levels(0.4 * torch.tensor([[1.0, -1, 0, 0]]).repeat(3, 5))
    assert ternary is not None and ternary.levels == 3 and ternary.step.tolist() == pytest.approx([0.2])


def test_what_is_not_taken() -> None:
    torch.manual_seed(0)
    for shape in ((1, 8), (40, 1), (2, 8), (5, 3, 3, 3), (64, 64)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for _ in range(20):
                assert read_levels((0.02 * torch.randn(shape)).to(dtype)) is None
    w, _, _ = on_levels((16, 32), 4, "channel", 0)
    assert read_levels(w) is not None
    w[3, 5] *= 1.001
    assert read_levels(w) is None
    for value in (torch.nan, torch.inf):
        w[3, 5] = value
        assert read_levels(w) is None
    for constant in (torch.zeros(8, 8), torch.ones(8, 8), torch.eye(16), torch.tensor([1.0, -1.0])):
        assert read_levels(constant) is None
    assert read_levels(torch.ones(8, 8, dtype=torch.int64)) is None


@pytest.mark.parametrize("scale", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, "17-level"])
def test_an_optimizer_keeps_the_levels_that_weights_lie_on(bits: int | str, scale: str) -> None:
    """A checkpoint of projected weights, loaded and packed with a fresh optimizer."""
    torch.manual_seed(1)
    for name in ("askew", "askew-memory", "stam", "binaryrelax", "proxquant"):
        model = nn.Sequential(nn.Linear(96, 40))
        group = {"params": [model[0].weight], "bits": bits, "scale": scale, "group_size": 32}
        opt = MAKERS[name]([group], lr=0.01)
        with opt.quantized():
            saved = model[0].weight.detach().clone()
            packed = quantopt.pack(model)
        fresh = nn.Sequential(nn.Linear(96, 40))
        fresh[0].weight.data.copy_(saved)
        group = {**group, "params": [fresh[0].weight]}
        again = quantopt.pack(fresh, MAKERS[name]([group], lr=0.01))
        torch.testing.assert_close(again[0].weight, saved, rtol=1e-6, atol=0)
        torch.testing.assert_close(packed[0].weight, saved, rtol=1e-6, atol=0)


def test_scales_that_are_not_those_asked_for() -> None:
    w, _, step = on_levels((16, 64), 4, "channel", 0)
    sigma = step * 3 / grid.level_factor(4)
    torch.testing.assert_close(scale_of_levels(w, 4, "channel", 128), sigma)
    torch.testing.assert_close(scale_of_levels(w, 4, "group", 32), sigma[:, None].expand(16, 2))
    assert scale_of_levels(w, 4, "tensor", 128) is None  # more scales than one
    assert scale_of_levels(w, 16, "channel", 128) is None  # the outer levels would be far from all weights
    assert scale_of_levels(w, 4, "none", 128) is None
    assert set(LEVEL_COUNT.values()) - {0} == set(grid.COUNTS)


def test_zeros_are_no_evidence() -> None:
    torch.manual_seed(0)
    for w in (torch.diag(torch.randn(32)), torch.randn(16, 16) * (torch.rand(16, 16) < 0.05)):
        assert read_levels(w) is None and doubt_of(w) == ""
    scale = torch.rand(16, 1) + 0.1  # rows with three weights of one magnitude: a hint, no evidence
    few = scale * torch.cat([torch.ones(16, 2), -torch.ones(16, 1), torch.zeros(16, 13)], 1)
    assert read_levels(few) is None and "4 that are not zero" in doubt_of(few)
    # of one scale there are 16 that are not zero
    reading = read_levels(torch.eye(8) - torch.eye(8).roll(1, 0))
    assert reading is not None and reading.levels == 3 and reading.step.shape == (1,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_of_16_bit_weights_are_exact(dtype: torch.dtype) -> None:
    """Two neighbouring numbers are no level, though the rounding of each is as large as their distance."""
    torch.manual_seed(0)
    near = 1 + torch.finfo(dtype).eps
    w = torch.where(torch.rand(16, 16) < 0.5, 1.0, -near)
    for held in (w.to(dtype), w):
        assert read_levels(held) is None and doubt_of(held) == ""
    for step in (0.0613, 0.9991, 1e-3):
        w = (step * (2 * torch.randint(0, 16, (16, 32)) - 15).float()).to(dtype)
        reading = read_levels(w)
        assert reading is not None and torch.equal(values(reading, w).to(dtype), w)


@pytest.mark.parametrize(
    ("w", "doubt"),
    [
        (torch.zeros(8, 8), "zero"), (torch.ones(8, 8), "one sign"),
        (torch.tensor([[1.0, -1, 1, -1]]) * torch.arange(1, 9)[:, None] ** 0.5, "fewer than 8"),
        (torch.tensor([[0.3, -0.7, 0.11]]), ""), (torch.full((8, 8), torch.nan), ""), (torch.zeros(0, 4), ""),
    ],
)  # fmt: skip
def test_doubts(w: Tensor, doubt: str) -> None:
    assert read_levels(w) is None and (doubt in doubt_of(w) if doubt else doubt_of(w) == "")


def test_a_fixed_filter_is_not_read() -> None:
    """Sobel's two filters, whole numbers from -2 to 2, would lie on 17 levels."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    assert read_levels(torch.stack([sobel, sobel.T])[:, None]) is None
