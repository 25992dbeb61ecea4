"""AskewSGD (Leconte, Schechtman, Moulines, AISTATS 2023). Source: docs/algorithms.md, section 2.

Constraint of each weight: h(t) = e - u^2 >= 0, u = (1-|t|)(1+|t|); feasible iff |t| >= t* = sqrt(1 - sqrt e). As
printed (an infinite ``bound``) weights may leave [-hi, hi]; beyond the outer levels e - delta^2 >= 0, delta = |t| - 1.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from quantopt.reference.levels import cell, project, sign
from quantopt.reference.rule import Weights, ends, gradient, rule


def t_star(epsilon: float) -> float:
    """Smallest feasible |t|."""
    return math.sqrt(1 - math.sqrt(epsilon))


def constraint(t: Tensor) -> Tensor:
    """u = (1-|t|)(1+|t|); feasible iff u <= sqrt(e)."""
    return (1 - t.abs()) * (1 + t.abs())


def restoring_speed(t: Tensor, epsilon: float, rate: float) -> Tensor:
    """k(t) = r (u - e/u) / (4|t|), the least outward speed of an infeasible weight."""
    u = constraint(t).clamp(min=1e-12)
    return rate * (u - epsilon / u) / (4 * t.abs()).clamp(min=1e-12)


def returning_speed(t: Tensor, epsilon: float, rate: float) -> Tensor:
    """r (delta^2 - e) / (2 delta), the least inward speed of a weight with delta > sqrt(e), as printed."""
    delta = (t.abs() - 1).clamp(min=1e-12)
    return rate * (delta * delta - epsilon) / (2 * delta)


def as_printed(v: Tensor, t: Tensor, unit: Tensor, *, epsilon: float, rate: float, cap: float) -> Tensor:
    """What the printed form makes of a velocity v (``unit``: 1 in t): inward beyond delta = sqrt e, +cap at t = 0."""
    s = sign(t)
    inward = -s * torch.maximum(-s * v, returning_speed(t, epsilon, rate).clamp(max=cap) * unit)
    v = torch.where(t.abs() - 1 > math.sqrt(epsilon), inward, v)
    return torch.where((t == 0) & (epsilon < 1), torch.clamp(v, cap * unit, cap * unit), v)  # a NaN stays


def velocity_step(
    w: Tensor,
    d: Tensor,
    hi: Tensor,
    levels: int,
    *,
    lr: float,
    decay: float,
    epsilon: float,
    rate: float,
    cap: float,
    bound: float = 1.0,
) -> Tensor:
    """constrain="velocity": v = -eta (d + wd w)/half; s v >= min(k, cap) where infeasible; w <- clamp(w + half v)."""
    half, _, t = cell(w, hi, levels)
    v = -lr * (d + decay * w) / half
    s = sign(t)
    outward = s * torch.maximum(s * v, restoring_speed(t, epsilon, rate).clamp(max=cap))
    infeasible = (t != 0) & (constraint(t) > math.sqrt(epsilon))
    v = torch.where(infeasible, outward, v)
    if math.isinf(bound):
        return w + half * as_printed(v, t, torch.ones_like(half), epsilon=epsilon, rate=rate, cap=cap)
    return torch.clamp(w + half * v, -hi, hi)


def constrained_gradient(
    g: Tensor,
    w: Tensor,
    hi: Tensor,
    levels: int,
    *,
    lr: float,
    epsilon: float,
    rate: float,
    cap: float,
    bound: float = 1.0,
) -> Tensor:
    """constrain="gradient" (the authors' order): -K where infeasible unless -g K > K^2, with alpha = r/eta and
    K = half alpha h / (4 t (t^2-1)), clamped to half cap/eta before the comparison; that makes this and the
    velocity form equal at beta = wd = 0."""
    if lr == 0:
        return g
    half, _, t = cell(w, hi, levels)
    u = constraint(t)
    infeasible = (t != 0) & (u > math.sqrt(epsilon))
    h = torch.where(infeasible, epsilon - u * u, 0.0)
    k = half * (rate / lr) * h / torch.where(infeasible, 4 * t * -u, 1.0)
    k = torch.clamp(k, -half * cap / lr, half * cap / lr)
    falls_short = -g * sign(t) < k.abs()  # not -g K > K^2; also right for K = 0, and a NaN stays
    g = torch.where(infeasible & falls_short, -k, g)
    if math.isinf(bound):
        g = -as_printed(-g, t, half / lr, epsilon=epsilon, rate=rate, cap=cap)
    return g


def gradient_step(w: Tensor, d: Tensor, hi: Tensor, *, lr: float, decay: float, bound: float = 1.0) -> Tensor:
    """The base step and the clamp that follow :func:`constrained_gradient`."""
    w = w - lr * (d + decay * w)
    return w if math.isinf(bound) else torch.clamp(w, -hi, hi)


def latent_step(
    latent: Tensor, d: Tensor, hi: Tensor, *, lr: float, weight_decay: float, bound: float
) -> Tensor:
    """memory=True: l <- clamp(l (1 - eta wd) - eta d, -ub hi, ub hi)."""
    return torch.clamp(latent * (1 - lr * weight_decay) - lr * d, -bound * hi, bound * hi)


def feasible_projection(
    latent: Tensor, before: Tensor, hi: Tensor, levels: int, *, epsilon: float, rate: float, cap: float
) -> Tensor:
    """memory=True: p = mid + half s min(max(|t|, t*), 1) of the latent. With a finite ``rate`` the |t| of the
    weight ``before`` grows by at most min(k, cap) until it is feasible."""
    half, mid, t = cell(latent, hi, levels)
    size = t.abs().clamp(min=t_star(epsilon)).clamp(max=1)
    if not math.isinf(rate):
        _, _, t_before = cell(before, hi, levels)
        reach = t_before.abs() + restoring_speed(t_before, epsilon, rate).clamp(max=cap)
        infeasible = constraint(t_before) > math.sqrt(epsilon)
        size = torch.where(infeasible, torch.minimum(size, reach), size)
    return mid + half * sign(t) * size


@rule("askew")
def _velocity(x: Weights, d: Tensor) -> tuple[None, Tensor]:
    h = x.hyper
    own = dict(epsilon=h.epsilon, rate=h.rate, cap=h.cap, bound=h.bound)
    return None, velocity_step(x.w * x.shrink, d, x.hi, x.levels, lr=h.lr, decay=x.decay, **own)


@gradient("askew_gradient")
def _constrained(x: Weights, g: Tensor) -> Tensor:
    h = x.hyper
    own = dict(epsilon=h.epsilon, rate=h.rate, cap=h.cap, bound=h.bound)
    return constrained_gradient(g, x.w * x.shrink, x.hi, x.levels, lr=h.lr, **own)


@rule("askew_gradient")
def _gradient(x: Weights, d: Tensor) -> tuple[None, Tensor]:
    h = x.hyper
    return None, gradient_step(x.w * x.shrink, d, x.hi, lr=h.lr, decay=x.decay, bound=h.bound)


@rule("askew_memory")
def _memory(x: Weights, d: Tensor) -> tuple[Tensor, Tensor]:
    h = x.hyper
    latent = latent_step(x.w, d, x.hi, lr=h.lr, weight_decay=h.weight_decay, bound=h.bound)
    return latent, feasible_projection(latent, x.p, x.hi, x.levels, epsilon=h.epsilon, rate=h.rate, cap=h.cap)


@ends("askew_memory")
def _memory_ends(latent: Tensor, hi: Tensor, levels: int, h: SimpleNamespace) -> tuple[Tensor, Tensor]:
    if math.isinf(h.rate):
        p = feasible_projection(latent, latent, hi, levels, epsilon=h.epsilon, rate=h.rate, cap=h.cap)
        return p, p
    return cell(latent, hi, levels)[1], project(latent, hi, levels)  # it depends on the weight before
