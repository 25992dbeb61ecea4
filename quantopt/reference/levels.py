"""Uniform grids of K levels on [-hi, hi], their scale, and the cell coordinates of a weight.

Source: docs/algorithms.md, section 1. ``hi`` below is always broadcastable against the weights.
"""

import torch
from torch import Tensor

# Step of the best uniform quantiser of a unit Gaussian with K levels (Max 1960): the least mean squared error.
GAUSSIAN_STEP = {3: 1.224, 4: 0.9957, 8: 0.5860, 16: 0.3352, 17: 0.3189}
COUNTS = (2, *GAUSSIAN_STEP)  # K of the grids
# c1 and c2 of SAWB's outer level, fitted to the best ones of several distributions (Choi et al., arXiv 1807.06964). Of
# 4 and 8 levels those of its authors' code, of 16 and 17 those of LUQ.
SAWB = {4: (3.12, 2.064), 8: (7.509, 6.892), 16: (12.1, 12.2), 17: (12.1, 12.2)}


def level_factor(levels: int) -> float:
    """hi / sigma for ``levels`` = K: 1 if binary, else (K-1)/2 * D."""
    return 1.0 if levels == 2 else (levels - 1) / 2 * GAUSSIAN_STEP[levels]


def sign(x: Tensor) -> Tensor:
    """sgn with sgn(0) = +1; NaN stays NaN."""
    return torch.where(x >= 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)


def rows(w: Tensor) -> Tensor:
    """``w`` as a matrix [channels, elements per channel]; a 0-d or 1-d tensor has one element per channel."""
    return w.reshape(w.shape[0] if w.dim() > 0 else 1, -1) if w.numel() else w.reshape(1, 0)


def frozen_scale(w: Tensor, scale: str, group_size: int = 128) -> Tensor:
    """sigma of every slice: torch.std (unbiased), or mean|w| where a slice has one element or no spread.

    Returns [1] for ``scale`` "none" and "tensor", [channels] for "channel", and
    [channels, ceil(elements per channel / group_size)] for "group".
    """
    if scale == "none":
        return torch.ones(1, dtype=w.dtype, device=w.device)
    if scale == "group":
        slices = list(rows(w).split(group_size, dim=1))
    else:
        slices = [rows(w) if scale == "channel" else w.reshape(1, -1)]
    columns = []
    for part in slices:
        mean = part.abs().mean(dim=1)
        spread = part.std(dim=1) if part.shape[1] > 1 else torch.zeros_like(mean)
        columns.append(torch.where(spread == 0, mean, spread))
    return torch.stack(columns, dim=1) if scale == "group" else columns[0]


def sawb_clip(w: Tensor, levels: int) -> Tensor:
    """hi = c1 sqrt(mean w^2) - c2 mean|w| over all of ``w``, or max|w| where that is not positive; no dimensions."""
    c1, c2 = SAWB[levels]
    magnitude = w.abs()
    clip = c1 * w.square().mean().sqrt() - c2 * magnitude.mean()
    return torch.where(clip > 0, clip, magnitude.amax())


def mean_magnitude(w: Tensor) -> Tensor:
    """a = mean|w| per channel [channels]; of a 0-d or 1-d tensor, over all of it [1]."""
    return (rows(w) if w.dim() > 1 else w.reshape(1, -1)).abs().mean(dim=1)


def spread_over(scale: Tensor, w: Tensor, group_size: int = 128) -> Tensor:
    """``scale`` ([1], [channels] or [channels, groups]) broadcastable against ``w``."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:
        return scale.reshape(-1, *[1] * (w.dim() - 1))
    length = rows(w).shape[1]
    return scale.repeat_interleave(min(group_size, length), dim=1)[:, :length].reshape(w.shape)


def cell(w: Tensor, hi: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(half, mid, t): half = (hi-lo)/(2(K-1)), mid the middle of w's cell, t = (w-mid)/half."""
    half = hi / (levels - 1)
    j = ((w + hi) / (2 * half)).floor().clamp(0, levels - 2)
    mid = (2 * j - (levels - 2)) * half  # lo + (2j + 1) half
    return half, mid, (w - mid) / half


def project(w: Tensor, hi: Tensor, levels: int) -> Tensor:
    """Nearest level; ties away from zero, a tie at 0 to the positive level."""
    if levels == 2:
        return hi * sign(w)
    half, mid, t = cell(w, hi, levels)
    return mid + half * torch.where(t == 0, sign(mid), sign(t))


def codes(w: Tensor, hi: Tensor, levels: int) -> Tensor:
    """Index 0..K-1 of the level of project(w), as uint8."""
    return ((project(w, hi, levels) / hi + 1) * ((levels - 1) / 2)).round().to(torch.uint8)
