"""Reads levels off weights: the grid that a tensor of quantised weights lies on.

Levels are step * (2 code - (K-1)), code 0..K-1: odd multiples of the step, and with K = 3 its multiples by -2, 0 and 2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantopt.reference import levels as grid

LEVELS = (2, 3, 4, 8, 16)  # K
MIN_WEIGHTS = 8  # per scale: with fewer, a few float weights would soon lie on levels by chance
_FEW_ROWS, _BLOCK = 64, 2**18  # rows that most grids are refused by; elements that are looked at at once
_FLOAT_ERROR = 2.0**-22  # relative, of levels computed in float32


class Reading(NamedTuple):
    """Weights on a grid."""

    levels: int  # K
    codes: Tensor  # uint8, as the weights
    step: Tensor  # float32, half the distance of two levels: [1], [rows] or [rows, ceil(elements per row / group_size)]
    group_size: int  # 0 unless the steps are per group


class _Fit(NamedTuple):
    """Slices x = step * multiples, [slices, elements]."""

    multiples: Tensor  # int8
    step: Tensor  # float32 [slices]; 0 of a slice of zeros


def read_levels(w: Tensor, group_size: int | None = None) -> Reading | None:
    """The grid with the fewest levels, and then the fewest scales, that all weights of ``w`` lie on, else None.

    A scale is that of the tensor, of a row (dim 0), or of ``group_size`` consecutive elements of a row; without
    ``group_size`` it is found (the last group of a row may be shorter). Weights lie on levels if each is one up to the
    rounding of its type; values that a narrower type holds (of weights that were converted) have the rounding of that
    type. A slice of zeros has the step 0. Levels that no weight of the tensor takes are not seen: weights of 16 levels
    that take the inner 8 alone are read as of 8. The values are the same.

    Evidence: ``w`` must have weights of both signs, and at least ``MIN_WEIGHTS`` for each scale.
    """
    x = grid.rows(w.detach())
    if not x.is_floating_point() or x.numel() < MIN_WEIGHTS:
        return None
    low, high = x.aminmax()
    if not bool((low < 0) & (high > 0) & low.isfinite() & high.isfinite()):
        return None
    sample = x[:, :MIN_WEIGHTS] if x.shape[1] >= MIN_WEIGHTS else x.reshape(1, -1)
    if all(_fit(sample, levels, _tolerance(sample)) is None for levels in (3, 16)):
        return None  # of float weights, at the price of a few columns
    tolerance = _tolerance(x)
    few = x[:_FEW_ROWS]
    for levels in LEVELS:
        for size, per_tensor in _granularities(few, levels, tolerance, group_size):
            fit = None
            for part in (few, x):  # most are refused by a few rows
                part = part.reshape(1, -1) if per_tensor else part
                fit = _fit_groups(part, levels, tolerance, size)
                if fit is None:
                    break
            if fit is not None:
                codes = (fit.multiples + (levels - 1)).div(2, rounding_mode="floor").to(torch.uint8)
                step = fit.step.flatten() if size == 0 else fit.step
                return Reading(levels, codes.reshape(w.shape), step, size)
    return None


def scale_of_levels(w: Tensor, levels: int, scale: str, group_size: int) -> Tensor | None:
    """sigma of the grid that ``w`` lies on, in the shape of ``grid.frozen_scale(w, scale, group_size)``, if it has the
    number of levels and no more scales than that; else None."""
    if scale == "none":
        return None
    reading = read_levels(w, group_size if scale == "group" else w.numel() + 1)
    if reading is None or reading.levels != levels or not bool((reading.step > 0).all()):
        return None
    step = reading.step
    if step.dim() == 1 and step.numel() > 1 and scale == "tensor":
        return None
    rows, length = grid.rows(w).shape
    if scale != "tensor":
        step = step.expand(rows) if step.numel() == 1 else step
    if scale == "group" and step.dim() == 1:
        step = step.unsqueeze(1).expand(rows, -(-length // group_size))
    return (step.double() * ((levels - 1) / grid.level_factor(levels))).to(w.dtype).contiguous()


def _granularities(
    x: Tensor, levels: int, tolerance: float, group_size: int | None
) -> Iterator[tuple[int, bool]]:
    """(group size or 0, whether there is one scale for all), in the order in which they are tried."""
    length = x.shape[1]
    yield 0, True
    if length < MIN_WEIGHTS:
        return
    yield 0, False
    if group_size is not None:
        if MIN_WEIGHTS <= group_size < length:
            yield group_size, False
        return
    # The first group of every row lies on levels, and with elements of the second it does not.
    fits, fails = MIN_WEIGHTS - 1, length
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if _fit(x[:, :middle], levels, tolerance) is None:
            fails = middle
        else:
            fits = middle
    # By chance they may: equal scales, zeros of ternary weights, rounding to 16 bits.
    for size in range(fits, MIN_WEIGHTS - 1, -1):
        if _fit(x[:, size : 2 * size], levels, tolerance) is not None:
            yield size, False


def _tolerance(x: Tensor) -> float:
    """How far, in relative terms, a multiple of the step may be from a whole number: the rounding of two weights."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(x.to(dtype).to(x.dtype), x):
            return torch.finfo(dtype).eps + 2 * _FLOAT_ERROR
    return 2 * _FLOAT_ERROR


def _fit_groups(x: Tensor, levels: int, tolerance: float, size: int) -> _Fit | None:
    """:func:`_fit` of each row, or of each ``size`` elements of a row; steps [rows] or [rows, groups]."""
    if size == 0:
        return _fit(x, levels, tolerance)
    whole = x.shape[1] // size * size
    fits = []
    for part in (x[:, :whole], x[:, whole:]):
        width = min(size, part.shape[1])
        fit = _fit(part.reshape(-1, width), levels, tolerance) if width else None
        if fit is None and width:
            return None
        if fit is not None:
            fits.append(_Fit(fit.multiples.view_as(part), fit.step.view(x.shape[0], -1)))
    return _Fit(torch.cat([f.multiples for f in fits], 1), torch.cat([f.step for f in fits], 1))


def _fit(x: Tensor, levels: int, tolerance: float) -> _Fit | None:
    """Each slice x [slices, elements] on a grid of its own, with the least multiples; None if one is on none."""
    fits = []
    for part in x.split(max(1, _BLOCK // x.shape[1])):
        fit = _fit_block(part, levels, tolerance)
        if fit is None:
            return None
        fits.append(fit)
    return fits[0] if len(fits) == 1 else _Fit(*map(torch.cat, zip(*fits, strict=True)))


def _fit_block(x: Tensor, levels: int, tolerance: float) -> _Fit | None:
    size = x.abs()
    top = size.amax(1)
    zero = top == 0
    least = top if levels == 3 else size.amin(1)
    if levels != 3 and bool((~zero & (least * (levels - 1) * (1 + 4 * tolerance) < top)).any()):
        return None
    size, least = size.double(), least.double()
    multiples = torch.zeros_like(size)
    step = torch.zeros_like(least)
    open_ = (~zero).nonzero().flatten()
    for first in (
        (2,) if levels == 3 else range(1, levels, 2)
    ):  # the multiple that the least of a slice may be
        if open_.numel() == 0:
            break
        guess = least[open_] / first
        ratio = (size if open_.numel() == len(size) else size[open_]) / guess.unsqueeze(1)
        nearest = 2 * (ratio > 1).to(ratio) if levels == 3 else ((ratio - 1) / 2).round() * 2 + 1
        fits = ((ratio - nearest).abs() <= tolerance * nearest) & (nearest <= max(levels - 1, 2))
        on = fits.all(1)
        multiples[open_[on]], step[open_[on]] = nearest[on], guess[on]
        open_ = open_[~on]
    if open_.numel():
        return None
    # The step as float32, as it was where all levels follow from it, else the one nearest to all weights.
    exact = step.float().double()
    off = ((size - multiples * exact.unsqueeze(1)).abs() > _FLOAT_ERROR * size).any(1)
    weight = multiples.square().sum(1).clamp(min=1)
    step = torch.where(off, (multiples * size).sum(1) / weight, exact)
    return _Fit(torch.where(x < 0, -multiples, multiples).to(torch.int8), step.float())
