"""STAM in two forms, our reconstruction from the abstract of Bian, Liu, Zhang (arXiv 2204.11065).

No reproduction of the paper's algorithm is claimed, and no convergence theorem. kappa is the relaxation weight;
an infinite one is a branch. Source: docs/algorithms.md, section 3.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from quantopt.reference.levels import project
from quantopt.reference.rule import Weights, ends, rule


def relax(x: Tensor, q: Tensor, kappa: float) -> Tensor:
    """(x + kappa q) / (1 + kappa), or q if kappa is infinite."""
    return q if math.isinf(kappa) else (x + kappa * q) / (1 + kappa)


def box(x: Tensor, hi: Tensor, *, lr: float, weight_decay: float) -> Tensor:
    """y = clamp(x / (1 + gamma wd), lo, hi): the prox of gamma (wd/2 |.|^2 + box), where the network runs."""
    return torch.clamp(x / (1 + lr * weight_decay), -hi, hi)


def splitting_point(x: Tensor, y: Tensor, d: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
    """(r, ex) of the y that the direction d belongs to: ex = x - y; r = y - gamma d - ex."""
    ex = x - y
    return y - lr * d - ex, ex


def splitting_step(r: Tensor, ex: Tensor, hi: Tensor, levels: int, *, kappa: float) -> Tensor:
    """x <- z + ex, z = relax(r, project(r), kappa)."""
    return relax(r, project(r, hi, levels), kappa) + ex


def alternating_step(
    u: Tensor,
    d: Tensor,
    hi: Tensor,
    levels: int,
    *,
    lr: float,
    weight_decay: float,
    lam: float,
    limit: Tensor | None,
) -> Tensor:
    """u <- clamp(u (1 - eta wd) - eta d + eta lam (q - u), -limit, limit).

    Not clamped if ``limit`` is None; ``hi`` are the levels before the step."""
    u = u * (1 - lr * weight_decay) - lr * d + (lr * lam * (project(u, hi, levels) - u) if lam else 0.0)
    return u.clamp(-limit, limit) if isinstance(limit, Tensor) else u


def alternating_weight(u: Tensor, hi: Tensor, levels: int, *, kappa: float) -> Tensor:
    """p = (u + kappa q) / (1 + kappa), q = project(u) (binary: a sgn(u))."""
    return relax(u, project(u, hi, levels), kappa)


@rule("splitting")
def _splitting(x: Weights, d: Tensor) -> tuple[Tensor, Tensor]:
    h = x.hyper
    if (
        h.weight_decay and x.exact
    ):  # p is the y of the lr that made it; rounding to 16 bits would add up in ex
        y = torch.clamp(x.p, -x.hi, x.hi)
    else:
        y = box(x.w, x.hi, lr=h.lr, weight_decay=h.weight_decay)
    r, ex = splitting_point(x.w, y, d, lr=h.lr)
    hi = x.rescale(r)
    latent = splitting_step(r, ex, hi, x.levels, kappa=h.kappa)
    return latent, box(latent, hi, lr=h.lr, weight_decay=h.weight_decay)


@rule("alternating")
def _alternating(x: Weights, d: Tensor) -> tuple[Tensor, Tensor]:
    h = x.hyper
    latent = alternating_step(
        x.w, d, x.hi, x.levels, lr=h.lr, weight_decay=h.weight_decay, lam=h.lam, limit=x.latent_limit
    )
    return latent, alternating_weight(latent, x.rescale(latent), x.levels, kappa=h.kappa)


@ends("splitting")
def _splitting_ends(x: Tensor, hi: Tensor, levels: int, h: SimpleNamespace) -> tuple[Tensor, Tensor]:
    y = box(x, hi, lr=h.lr, weight_decay=h.weight_decay)
    return y, y


@ends("alternating")
def _alternating_ends(u: Tensor, hi: Tensor, levels: int, h: SimpleNamespace) -> tuple[Tensor, Tensor]:
    p = alternating_weight(u, hi, levels, kappa=h.kappa)
    return p, p
