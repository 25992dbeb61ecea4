"""The op ``quantopt::fused_step`` in plain PyTorch: which rule meets which state, tensor by tensor.

Arguments as documented in :mod:`quantopt.ops.step`. float64 parameters are stepped in float64, all others in
float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantopt.reference import askew, base, baselines, stam
from quantopt.reference.levels import level_factor, mean_magnitude, spread_over
from quantopt.reference.rounding import stochastic_bfloat16


def fused_step(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentums: Sequence[Tensor],
    seconds: Sequence[Tensor],
    latents: Sequence[Tensor],
    scales: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    *,
    levels: int = 2,
    group_size: int = 0,
    moving_levels: bool = False,
    nesterov: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
    seed: int = -1,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if found_inf is not None and bool(found_inf):
        return
    for step in steps:
        step.add_(1)
    lr, momentum, beta2, adam_eps, weight_decay, epsilon, rate, cap, bound, kappa, lam, threshold = (
        hyper.tolist()
    )
    decay = 0.0 if decoupled else weight_decay
    shrink = 1 - lr * weight_decay if decoupled else 1.0

    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        p = param.to(dtype)
        w = latents[i].to(dtype) if latents else p
        g = grads[i].to(dtype) * (
            (-1.0 if maximize else 1.0) / (grad_scale.to(dtype) if grad_scale is not None else 1)
        )
        if rule != "base":
            factor = level_factor(levels)
            scale = scales[i].to(dtype)
            hi = factor * spread_over(scale, p, group_size)

        # the gradient, and the base direction of it
        if rule in ("base", "prox"):
            g = g + decay * w
        elif rule == "askew_gradient":
            g = askew.constrained_gradient(
                g, w * shrink, hi, levels, lr=lr, epsilon=epsilon, rate=rate, cap=cap
            )
        if seconds:
            d, m, v = base.adam_direction(
                g, momentums[i].to(dtype), seconds[i].to(dtype), int(steps[i]), momentum, beta2, adam_eps
            )
            momentums[i].copy_(m)
            seconds[i].copy_(v)
        elif momentums:
            d, m = base.sgd_direction(g, momentums[i].to(dtype), momentum, nesterov)
            momentums[i].copy_(m)
        else:
            d = g

        # the rule: `latent` is the new state, `p` what the network runs with
        latent = None
        if rule == "base":
            p = w * shrink - lr * d
        elif rule == "askew":
            p = askew.velocity_step(
                w * shrink, d, hi, levels, lr=lr, decay=decay, epsilon=epsilon, rate=rate, cap=cap
            )
        elif rule == "askew_gradient":
            p = askew.gradient_step(w * shrink, d, hi, lr=lr, decay=decay)
        elif rule == "askew_memory":
            latent = askew.latent_step(w, d, hi, lr=lr, weight_decay=weight_decay, bound=bound)
            p = askew.feasible_projection(latent, p, hi, levels, epsilon=epsilon, rate=rate, cap=cap)
        elif rule == "splitting":
            r, ex = stam.splitting_point(w, d, hi, lr=lr, weight_decay=weight_decay)
            if moving_levels:
                scales[i].copy_(_mean(r, scale))
                hi = factor * spread_over(scales[i].to(dtype), p, group_size)
            latent = stam.splitting_step(r, ex, hi, levels, kappa=kappa)
            p = stam.box(latent, hi, lr=lr, weight_decay=weight_decay)
        elif rule == "alternating":
            limit = bound * spread_over(sigmas[i].to(dtype), p) if sigmas else None
            latent = stam.alternating_step(
                w, d, hi, levels, lr=lr, weight_decay=weight_decay, lam=lam, limit=limit
            )
            if moving_levels:
                scales[i].copy_(_mean(latent, scale))
                hi = factor * spread_over(scales[i].to(dtype), p, group_size)
            p = stam.alternating_weight(latent, hi, levels, kappa=kappa)
        elif rule == "prox":
            p = baselines.prox(w * shrink - lr * d, hi, levels, threshold=threshold)
        else:
            raise ValueError(f"fused_step: unknown rule {rule!r}")

        if latents:
            latents[i].copy_(p if latent is None else latent)
        if seed >= 0:
            p = stochastic_bfloat16(p, int(steps[i]), i, seed)
        param.copy_(p)


def _mean(x: Tensor, like: Tensor) -> Tensor:
    """mean|x| at the granularity of ``like``: one number, or one per channel."""
    return x.abs().mean().reshape(1) if like.numel() == 1 else mean_magnitude(x)
