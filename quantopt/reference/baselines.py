"""Baselines. BinaryConnect (Courbariaux 2015) and BinaryRelax (Yin 2018) are the alternating form of
:mod:`quantopt.reference.stam` with a clipped latent; ProxQuant (Bai 2019) is here.

Source: docs/algorithms.md, section 4.
"""

import math

import torch
from torch import Tensor

from quantopt.reference.base import decayed_gradient
from quantopt.reference.levels import project, sign
from quantopt.reference.rule import Weights, gradient, rule


def prox(p: Tensor, hi: Tensor, levels: int, *, threshold: float) -> Tensor:
    """q + sgn(p-q) max(|p-q| - lam_k, 0), q = project(p); the level itself if ``threshold`` is infinite."""
    q = project(p, hi, levels)
    if math.isinf(threshold):
        return q
    return q + sign(p - q) * ((p - q).abs() - threshold).clamp(min=0)


def stochastic_sign(u: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """+1 with probability clamp((u+1)/2, 0, 1), else -1 (BinaryConnect, section 2.3); NaN for NaN."""
    probability = ((u + 1) / 2).clamp(0, 1)
    drawn = 2 * torch.bernoulli(probability.nan_to_num(0.0), generator=generator) - 1
    return torch.where(u.isnan(), u, drawn)


gradient("prox")(decayed_gradient)


@rule("prox")
def _prox(x: Weights, d: Tensor) -> tuple[None, Tensor]:
    p = x.w * x.shrink - x.hyper.lr * d
    return None, prox(p, x.hi, x.levels, threshold=x.hyper.threshold)
