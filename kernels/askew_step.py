"""The AskewSGD and AskewAdam step in Triton, and the plain base step that their other parameters take.

The equations are those of docs/algorithms.md, section 2, and of quantopt.reference. Divisions and square roots are
exact, and nothing is contracted into fused multiply-add.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GAUSSIAN_STEP = {2: 2.0, 3: 1.224, 4: 0.9957, 8: 0.5860, 16: 0.3352}  # as in csrc/core/levels.h
RULES = ("base", "askew", "askew_gradient", "askew_memory")


@triton.jit
def minimum(x, bound):
    return tl.where(x > bound, bound, x)  # a NaN stays NaN


@triton.jit
def maximum(x, bound):
    return tl.where(x < bound, bound, x)


@triton.jit
def with_sign_of(magnitude, x):
    return tl.where(x >= 0.0, magnitude, tl.where(x < 0.0, -magnitude, x))


@triton.jit
def cell_middle(w, hi, half, last, BINARY: tl.constexpr):
    if BINARY:
        middle = w * 0.0
    else:
        j = minimum(maximum(tl.floor(tl.div_rn(w + hi, 2.0 * half)), 0.0), last)
        middle = (2.0 * j - last) * half
    return middle


@triton.jit
def constraint(t):
    """u = (1 - |t|)(1 + |t|)"""
    return (1.0 - tl.abs(t)) * (1.0 + tl.abs(t))


@triton.jit
def restoring_step(t, u, epsilon, rate, cap):
    """min(k(t), cap), k = r (u - e/u) / (4|t|)"""
    safe_u = tl.where(u > 1e-12, u, 1e-12)
    quarter = 4.0 * tl.abs(t)
    safe_quarter = tl.where(quarter > 1e-12, quarter, 1e-12)
    k = tl.div_rn(rate * (safe_u - tl.div_rn(epsilon + 0.0 * safe_u, safe_u)), safe_quarter)
    return tl.where(k < cap, k, cap)


@triton.jit
def askew_step_kernel(
    param_ptr,
    grad_ptr,
    momentum_ptr,
    second_ptr,
    latent_ptr,
    scale_ptr,
    corrections_ptr,  # Adam: 1 - b1^k, 1 - b2^k
    grad_scale_ptr,
    found_inf_ptr,
    numel,
    row,
    group,
    scales_per_row,
    level_factor,
    intervals,  # K - 1
    gradient_factor,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    adam_eps,
    lr,
    decay,
    shrink,
    epsilon,
    root_epsilon,
    t_star,
    rate,
    cap,
    bound,
    RULE: tl.constexpr,
    BINARY: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    ADAM: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    factor = gradient_factor
    if grad_scale_ptr is not None:
        factor = tl.div_rn(gradient_factor, tl.load(grad_scale_ptr))

    g = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32) * factor
    if RULE == "askew_memory":
        w = tl.load(latent_ptr + i, mask=inside, other=0.0)
    else:
        w = tl.load(param_ptr + i, mask=inside, other=0.0).to(tl.float32)

    # The grid: hi = level_factor sigma, half = hi / (K - 1).
    if RULE != "base":
        if ONE_SCALE:
            sigma = tl.load(scale_ptr) + tl.full([BLOCK], 0.0, tl.float32)
        else:
            in_row = i % row
            sigma = tl.load(scale_ptr + (i // row) * scales_per_row + in_row // group, mask=inside, other=1.0)
        hi = sigma * level_factor
        half = tl.div_rn(hi, intervals + 0.0 * hi)
        last = intervals - 1.0

    if RULE == "base":
        g = g + decay * w
    elif RULE == "askew_gradient":
        w = w * shrink
        t = tl.div_rn(w - cell_middle(w, hi, half, last, BINARY), half)
        u = constraint(t)
        safe_lr = tl.where(lr != 0.0, lr, 1.0)
        k = tl.div_rn(half * restoring_step(t, u, epsilon, rate, cap), safe_lr + 0.0 * half)
        outward = tl.where(t > 0.0, minimum(g, -k), maximum(g, k))
        g = tl.where((lr != 0.0) & (t != 0.0) & (u > root_epsilon), outward, g)

    # The base direction d.
    d = g
    if ADAM:
        m = beta1 * tl.load(momentum_ptr + i, mask=inside, other=0.0).to(tl.float32) + one_minus_beta1 * g
        v = beta2 * tl.load(second_ptr + i, mask=inside, other=0.0) + one_minus_beta2 * g * g
        c1 = tl.load(corrections_ptr) + tl.full([BLOCK], 0.0, tl.float32)
        c2 = tl.load(corrections_ptr + 1) + tl.full([BLOCK], 0.0, tl.float32)
        d = tl.div_rn(tl.div_rn(m, c1), tl.sqrt_rn(tl.div_rn(v, c2)) + adam_eps)
        tl.store(second_ptr + i, v, mask=inside)
        tl.store(momentum_ptr + i, m.to(momentum_ptr.dtype.element_ty), mask=inside)
    elif MOMENTUM:
        m = beta1 * tl.load(momentum_ptr + i, mask=inside, other=0.0).to(tl.float32) + g
        d = m
        if NESTEROV:
            d = g + beta1 * m
        tl.store(momentum_ptr + i, m.to(momentum_ptr.dtype.element_ty), mask=inside)

    if RULE == "base":
        w = w * shrink - lr * d
    elif RULE == "askew":
        w = w * shrink
        t = tl.div_rn(w - cell_middle(w, hi, half, last, BINARY), half)
        u = constraint(t)
        v = -lr * (d + decay * w)
        least = half * restoring_step(t, u, epsilon, rate, cap)
        outward = tl.where(t > 0.0, maximum(v, least), minimum(v, -least))
        v = tl.where((t != 0.0) & (u > root_epsilon), outward, v)
        w = maximum(minimum(w + v, hi), -hi)
    elif RULE == "askew_gradient":
        w = maximum(minimum(w - lr * (d + decay * w), hi), -hi)
    else:
        latent = maximum(minimum(w * shrink - lr * d, bound * hi), -bound * hi)
        tl.store(latent_ptr + i, latent, mask=inside)
        middle = cell_middle(latent, hi, half, last, BINARY)
        t = tl.div_rn(latent - middle, half)
        size = minimum(maximum(tl.abs(t), t_star), 1.0)
        if LIMITED:
            before = tl.load(param_ptr + i, mask=inside, other=0.0).to(tl.float32)
            t_before = tl.div_rn(before - cell_middle(before, hi, half, last, BINARY), half)
            u = constraint(t_before)
            reach = tl.abs(t_before) + restoring_step(t_before, u, epsilon, rate, cap)
            size = tl.where((u > root_epsilon) & (size > reach), reach, size)
        w = middle + with_sign_of(half * size, t)
    tl.store(param_ptr + i, w.to(param_ptr.dtype.element_ty), mask=inside)


@functools.cache
def level_factor(levels: int) -> float:
    """hi / sigma, multiplied in single precision as the C++ kernels do."""
    return float(torch.tensor((levels - 1) / 2) * torch.tensor(GAUSSIAN_STEP[levels]))


def unsupported(
    rule: str,
    params: Sequence[Tensor],
    latents: Sequence[Tensor],
    *,
    moving_levels: bool = False,
    seed: int = -1,
) -> str | None:
    """Why :func:`fused_step` cannot make this step, or None if it can."""
    if rule not in RULES:
        return f"the Triton kernels have the rules {', '.join(RULES)}, not {rule}"
    if moving_levels:
        return "the Triton kernels have no moving levels"
    if seed >= 0:
        return "the Triton kernels have no stochastic rounding"
    if latents and rule != "askew_memory":
        return "the Triton kernels have no master weights"
    if any(param.dtype not in DTYPES for param in params):
        return "the Triton kernels take float32, bfloat16 and float16 parameters"
    return None


def constants(rule: str, hyper: Tensor, *, decoupled: bool) -> dict[str, float]:
    """The scalars of the kernel from the op's ``hyper`` (csrc/core/hyper.h), computed in double precision."""
    lr, beta1, beta2, adam_eps, weight_decay, epsilon, rate, cap, bound = hyper.tolist()[:9]
    before_step = decoupled or rule == "askew_memory"
    root_epsilon = math.sqrt(epsilon)
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "adam_eps": adam_eps,
        "lr": lr,
        "decay": 0.0 if before_step else weight_decay,
        "shrink": 1 - lr * weight_decay if before_step else 1.0,
        "epsilon": epsilon,
        "root_epsilon": root_epsilon,
        "t_star": math.sqrt(1 - root_epsilon) if root_epsilon <= 1 else math.nan,
        "rate": rate,
        "cap": cap,
        "bound": bound,
    }


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
    """One step of every parameter, in place; the arguments of the operator ``quantopt::fused_step``.

    Parameters and gradients are float32, bfloat16 or float16, dense and of one layout; all state is float32,
    except that momentum may have the parameters' type. One launch per tensor, on the current stream; nothing
    waits for the device. Raises NotImplementedError with the reason for what :func:`unsupported` names.
    """
    reason = unsupported(rule, params, latents, moving_levels=moving_levels, seed=seed)
    if reason is not None:
        raise NotImplementedError(f"fused_step: {reason}")
    if steps:
        torch._foreach_add_(list(steps), 1.0 if found_inf is None else (found_inf == 0).float().reshape(()))
    scalars = constants(rule, hyper, decoupled=decoupled)
    limited = math.isfinite(scalars["rate"])
    for i, param in enumerate(params):
        numel = param.numel()
        if numel == 0:
            continue
        scale = scales[i] if rule != "base" else None
        one_scale = scale is None or scale.numel() == 1
        row = numel if one_scale else numel // param.shape[0]
        group = group_size if scale is not None and scale.dim() == 2 and not one_scale else row
        corrections = None
        if seconds:
            step = steps[i].double()
            corrections = torch.stack([1 - scalars["beta1"] ** step, 1 - scalars["beta2"] ** step]).float()
        arguments: dict[str, Any] = {
            **scalars,
            "param_ptr": param,
            "grad_ptr": grads[i],
            "momentum_ptr": momentums[i] if momentums else None,
            "second_ptr": seconds[i] if seconds else None,
            "latent_ptr": latents[i] if latents else None,
            "scale_ptr": scale,
            "corrections_ptr": corrections,
            "grad_scale_ptr": grad_scale,
            "found_inf_ptr": found_inf,
            "numel": numel,
            "row": row,
            "group": group,
            "scales_per_row": -(-row // group),
            "level_factor": level_factor(levels) if scale is not None else 1.0,
            "intervals": float(levels - 1),
            "gradient_factor": -1.0 if maximize else 1.0,
        }
        askew_step_kernel[(triton.cdiv(numel, BLOCK),)](
            **arguments,
            RULE=rule,
            BINARY=levels == 2,
            ONE_SCALE=one_scale,
            MOMENTUM=bool(momentums),
            NESTEROV=nesterov,
            ADAM=bool(seconds),
            LIMITED=limited,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
