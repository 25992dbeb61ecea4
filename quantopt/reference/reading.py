"""Reads levels off weights: the grid that a tensor of quantised weights lies on.

Levels are step * (2 code - (K-1)), code 0..K-1: odd multiples of the step, and where K is odd even ones, with zero.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantopt.reference import levels as grid

# Per scale: with fewer, a few float weights would soon lie on levels by chance. Zeros lie on every grid of an odd K, so
# that of these weights, as many must not be zero, in the mean over the scales. Small whole numbers, as those of a fixed
# filter, lie on 17 levels too: there it takes the weights of a layer.
MIN_WEIGHTS, MIN_NONZERO = 8, dict.fromkeys(grid.COUNTS, 4) | {17: 14}
_HINT = 2  # weights per scale that lie on levels as a hint, which is no evidence
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
    rounding of float32. Where a 16-bit type holds all values (also of weights that were converted), each weight must be
    its level rounded to that type. A slice of zeros has the step 0. Levels that no weight of the tensor takes are not
    seen: weights of 16 levels that take the inner 8 alone are read as of 8. The values are the same.

    Evidence: ``w`` must have weights of both signs, at least ``MIN_WEIGHTS`` for each scale, and of these at least
    ``MIN_NONZERO[K]`` that are not zero, in the mean over the scales that are not.
    """
    low, high = _range(w)
    return _read(w, group_size, MIN_WEIGHTS, MIN_NONZERO) if low < 0 < high else None


def doubt_of(w: Tensor) -> str:
    """Why weights that :func:`read_levels` does not read may lie on levels nevertheless; "" if they do not.

    One weight for each scale lies on levels whatever it is, and is not told from a float weight."""
    low, high = _range(w)
    if low == high == 0:
        return "all its weights are zero"
    hint = _read(w, None, _HINT, dict.fromkeys(MIN_NONZERO, _HINT))
    if hint is None:
        return ""
    if not low < 0 < high:
        return "all its weights have one sign"
    nonzero = MIN_NONZERO[hint.levels]
    return f"it has fewer than {MIN_WEIGHTS} weights, or {nonzero} that are not zero, for each scale"


def _range(w: Tensor) -> tuple[float, float]:
    """The least and the greatest weight; NaN if there is none."""
    if not w.numel() or not w.is_floating_point():
        return math.nan, math.nan
    low, high = w.detach().aminmax()
    return float(low), float(high)


def _read(w: Tensor, group_size: int | None, least: int, nonzero: dict[int, int]) -> Reading | None:
    """``least``: weights for each scale. ``nonzero``: {K: those that are not zero}."""
    x = grid.rows(w.detach())
    if x.numel() < least or not all(map(math.isfinite, _range(x))):
        return None
    sample = x[:, :least] if x.shape[1] >= least else x.reshape(1, -1)
    if all(_fit(sample, levels, _narrow(sample)) is None for levels in (16, 17)):
        return None  # of float weights, at the price of a few columns
    narrow = _narrow(x)
    few = x[:_FEW_ROWS]
    for levels in grid.COUNTS:
        for size, per_tensor in _granularities(few, levels, narrow, group_size, least):
            fit = None
            for part in (few, x):  # most are refused by a few rows
                part = part.reshape(1, -1) if per_tensor else part
                fit = _fit_groups(part, levels, narrow, size)
                if fit is None:
                    break
            if fit is not None and int((x != 0).sum()) >= nonzero[levels] * int((fit.step > 0).sum()):
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
    x: Tensor, levels: int, narrow: torch.dtype | None, group_size: int | None, least: int
) -> Iterator[tuple[int, bool]]:
    """(group size or 0, whether there is one scale for all), in the order in which they are tried."""
    length = x.shape[1]
    yield 0, True
    if length < least:
        return
    yield 0, False
    if group_size is not None:
        if least <= group_size < length:
            yield group_size, False
        return
    # The first group of every row lies on levels, and with elements of the second it does not.
    fits, fails = least - 1, length
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if _fit(x[:, :middle], levels, narrow) is None:
            fails = middle
        else:
            fits = middle
    # By chance they may: equal scales, zeros of ternary weights, rounding to 16 bits.
    for size in range(fits, least - 1, -1):
        if _fit(x[:, size : 2 * size], levels, narrow) is not None:
            yield size, False


def _narrow(x: Tensor) -> torch.dtype | None:
    """The 16-bit type that holds all of ``x``, None if there is none."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(x.to(dtype).to(x.dtype), x):
            return dtype
    return None


def _fit_groups(x: Tensor, levels: int, narrow: torch.dtype | None, size: int) -> _Fit | None:
    """:func:`_fit` of each row, or of each ``size`` elements of a row; steps [rows] or [rows, groups]."""
    if size == 0:
        return _fit(x, levels, narrow)
    whole = x.shape[1] // size * size
    fits = []
    for part in (x[:, :whole], x[:, whole:]):
        width = min(size, part.shape[1])
        fit = _fit(part.reshape(-1, width), levels, narrow) if width else None
        if fit is None and width:
            return None
        if fit is not None:
            fits.append(_Fit(fit.multiples.view_as(part), fit.step.view(x.shape[0], -1)))
    return _Fit(torch.cat([f.multiples for f in fits], 1), torch.cat([f.step for f in fits], 1))


def _fit(x: Tensor, levels: int, narrow: torch.dtype | None) -> _Fit | None:
    """Each slice x [slices, elements] on a grid of its own, with the least multiples; None if one is on none."""
    fits = []
    for part in x.split(max(1, _BLOCK // x.shape[1])):
        fit = _fit_block(part, levels, narrow)
        if fit is None:
            return None
        fits.append(fit)
    return fits[0] if len(fits) == 1 else _Fit(*map(torch.cat, zip(*fits, strict=True)))


def _fit_block(x: Tensor, levels: int, narrow: torch.dtype | None) -> _Fit | None:
    # How far, in relative terms, a multiple of the step may be from a whole number: the rounding of two weights.
    tolerance = 2 * _FLOAT_ERROR + (0 if narrow is None else torch.finfo(narrow).eps)
    size = x.abs()
    top = size.amax(1)
    zero = top == 0
    first = 2 if levels % 2 else 1  # the least multiple of a level that is not zero
    least = torch.where(size == 0, torch.inf, size).amin(1) if levels % 2 else size.amin(1)
    if bool((~zero & (least * ((levels - 1) // first) * (1 + 4 * tolerance) < top)).any()):
        return None
    size, least = size.double(), least.double()
    multiples = torch.zeros_like(size)
    step = torch.zeros_like(least)
    open_ = (~zero).nonzero().flatten()
    # the multiple that the least of a slice may be
    for multiple in range(first, levels, 2):
        if open_.numel() == 0:
            break
        guess = least[open_] / multiple
        own = size if open_.numel() == len(size) else size[open_]
        ratio = own / guess.unsqueeze(1)
        nearest = ((ratio - first) / 2).round() * 2 + first
        fits = ((ratio - nearest).abs() <= tolerance * nearest) & (nearest <= levels - 1)
        on = fits.all(1)
        found, exact = _step_of(own[on], nearest[on], guess[on], narrow)
        on[on.clone()] = exact
        multiples[open_[on]], step[open_[on]] = nearest[on], found[exact]
        open_ = open_[~on]
    if open_.numel():
        return None
    return _Fit(torch.where(x < 0, -multiples, multiples).to(torch.int8), step.float())


def _step_of(
    size: Tensor, multiples: Tensor, guess: Tensor, narrow: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The steps of slices whose magnitudes are ``multiples`` of about ``guess``, and whether each has one."""
    # As float32, as it was where all levels follow from the guess.
    step = guess.float().double()
    if narrow is None:
        off = ((size - multiples * step.unsqueeze(1)).abs() > _FLOAT_ERROR * size).any(1)
        weight = multiples.square().sum(1).clamp(min=1)
        return torch.where(off, (multiples * size).sum(1) / weight, step), torch.ones_like(off)

    def exact(step: Tensor) -> Tensor:
        return ((multiples * step.unsqueeze(1)).float().to(narrow).double() == size).all(1)

    # The numbers that round to a magnitude lie between the middles of it and its neighbours.
    mantissa, exponent = torch.frexp(size)
    finfo = torch.finfo(narrow)
    gap = torch.ldexp(torch.full_like(size, finfo.eps), exponent - 1).clamp(
        min=finfo.smallest_normal * finfo.eps
    )
    below = torch.where(mantissa == 0.5, gap / 4, gap / 2)
    there = multiples > 0
    low = torch.where(there, (size - below) / multiples, 0).amax(1)
    high = torch.where(there, (size + gap / 2) / multiples, torch.inf).amin(1)
    middle = ((low + high) / 2).float().double()
    step = torch.where(exact(step), step, middle)
    return step, exact(step)
