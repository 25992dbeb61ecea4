"""The op ``quantopt::fused_step`` in plain PyTorch, tensor by tensor.

float64 parameters are stepped in float64, all others in float32.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from quantopt.reference import base
from quantopt.reference.levels import COUNTS, level_factor, mean_of_slices, rows, spread_over
from quantopt.reference.rounding import STATE_TENSOR, stochastic_bfloat16
from quantopt.reference.rule import GRADIENTS, STEPS, Weights
from quantopt.rules import BASES, HYPER, RULES, StepRecord


def fused_step(record: StepRecord) -> None:
    """One step of all parameters of ``record`` in place. At lr = 0 weights, latents and scales stay as they are."""
    _check(record)
    if record.found_inf is not None and bool(record.found_inf):
        return
    for step in record.steps:
        step.add_(1)
    hyper = SimpleNamespace(**dict(zip(HYPER, record.hyper.tolist(), strict=True)))
    for i, param in enumerate(record.params):
        if param.numel():
            _step_one(record, hyper, i)


def _check(record: StepRecord) -> None:
    """Raises ValueError or TypeError naming the argument that does not fit the others."""
    if record.rule not in RULES:
        raise ValueError(f"fused_step: unknown rule {record.rule!r}; use one of {list(RULES)}")
    if record.base not in BASES:
        raise ValueError(f"fused_step: unknown base {record.base!r}; use one of {BASES}")
    rule, count = RULES[record.rule], len(record.params)
    if rule.quantised and record.levels not in COUNTS:
        raise ValueError(f"fused_step: levels must be 2, 3, 4, 8, 16 or 17, not {record.levels}")
    if record.dynamic_scale and not rule.dynamic_scale:
        raise ValueError(f"fused_step: {record.rule!r} has no dynamic scale; pass dynamic_scale=False")
    if record.hyper.shape != (len(HYPER),):
        raise ValueError(f"fused_step: hyper must hold {len(HYPER)} numbers, not {list(record.hyper.shape)}")
    adam, stochastic = record.base == "adam", record.seed >= 0
    needed = {
        "grads": True, "momentum_buffers": adam or None, "exp_avg_sqs": adam, "latents": rule.latent or None,
        "scales": rule.quantised, "latent_bounds": None, "steps": True if adam or stochastic else None,
    }  # fmt: skip
    if record.base == "given":
        needed["momentum_buffers"] = False
    for name, need in needed.items():
        tensors = getattr(record, name)
        if (len(tensors) != count and (need or tensors)) or (need is False and tensors):
            wanted = 0 if need is False else count
            raise ValueError(f"fused_step: {name} has {len(tensors)} tensors; {wanted} are needed")
        for i, (tensor, param) in enumerate(zip(tensors, record.params, strict=False)):
            if (
                name in ("grads", "momentum_buffers", "exp_avg_sqs", "latents")
                and tensor.shape != param.shape
            ):
                raise ValueError(
                    f"fused_step: {name}[{i}] has shape {list(tensor.shape)}, its parameter {list(param.shape)}"
                )
    for i, (scale, param) in enumerate(zip(record.scales, record.params, strict=False)):
        if param.numel() and not _fits(scale, param, record.group_size):
            raise ValueError(
                f"fused_step: scales[{i}] has shape {list(scale.shape)} for a parameter of shape {list(param.shape)}"
            )
    check_moments(record)
    if stochastic and (record.latents or any(p.dtype != torch.bfloat16 for p in record.params)):
        raise ValueError(
            "fused_step: stochastic rounding is for bfloat16 parameters without latents; pass seed=-1"
        )


def check_moments(record: StepRecord) -> None:
    """Raises ValueError or TypeError unless exp_avg_sqs have one dtype, and a seed where that is bfloat16."""
    for i, v in enumerate(record.exp_avg_sqs):
        if v.dtype != record.exp_avg_sqs[0].dtype:
            raise TypeError(
                f"fused_step: exp_avg_sqs[{i}] is {v.dtype}, exp_avg_sqs[0] {record.exp_avg_sqs[0].dtype}"
            )
    narrow = bool(record.exp_avg_sqs) and record.exp_avg_sqs[0].dtype == torch.bfloat16
    if narrow and record.state_seed < 0:
        raise ValueError(
            "fused_step: exp_avg_sqs are bfloat16, which rounding to nearest would stall; pass state_seed of at least "
            "0, or float32"
        )
    if record.state_seed >= 0 and not narrow:
        raise ValueError("fused_step: state_seed is for bfloat16 exp_avg_sqs; pass state_seed=-1")


def _fits(scale: Tensor, param: Tensor, group_size: int) -> bool:
    """Whether there is a scale for the tensor, each channel or each group."""
    if scale.numel() == 1:
        return True
    channels, length = rows(param).shape
    if scale.dim() == 2:
        return group_size > 0 and scale.shape == (channels, -(-length // group_size))
    return scale.shape == (channels,)


def _step_one(record: StepRecord, hyper: SimpleNamespace, i: int) -> None:
    rule, param = RULES[record.rule], record.params[i]
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    p = param.to(dtype)
    sign = -1.0 if record.maximize else 1.0
    g = record.grads[i].to(dtype) * (
        sign if record.grad_scale is None else sign / record.grad_scale.to(dtype)
    )
    factor = level_factor(record.levels) if rule.quantised else 1.0

    def outer_level() -> Tensor:
        return factor * spread_over(record.scales[i].to(dtype), p, record.group_size)

    def rescale(point: Tensor) -> Tensor:
        if record.dynamic_scale:
            scale = record.scales[i]
            slices = point.reshape(1, -1) if scale.numel() == 1 else rows(point)
            groups = record.group_size if scale.dim() == 2 and scale.numel() > 1 else 0
            scale.copy_(mean_of_slices(slices, groups))
        return outer_level()

    bounds = record.latent_bounds
    weights = Weights(
        w=record.latents[i].to(dtype) if record.latents else p,
        p=p,
        exact=param.dtype == dtype,
        hi=outer_level() if rule.quantised else p.new_tensor(torch.inf),
        levels=record.levels,
        hyper=hyper,
        decay=0.0 if record.decoupled else hyper.weight_decay,
        shrink=1 - hyper.lr * hyper.weight_decay if record.decoupled else 1.0,
        latent_limit=hyper.bound * spread_over(bounds[i].to(dtype), p, record.group_size) if bounds else None,
        rescale=rescale,
    )
    if record.rule in GRADIENTS:
        g = GRADIENTS[record.rule](weights, g)
    d = _direction(record, hyper, i, g)
    if hyper.lr == 0:
        return  # weights, latents and scales stay as they are
    latent, weight = STEPS[record.rule](weights, d)
    if record.latents:
        record.latents[i].copy_(weight if latent is None else latent)
    if record.seed >= 0:
        weight = stochastic_bfloat16(weight, int(record.steps[i]), i, record.seed)
    param.copy_(weight)


def _direction(record: StepRecord, hyper: SimpleNamespace, i: int, g: Tensor) -> Tensor:
    """The base direction of the gradient, with its state written."""
    if record.base == "adam":
        m, v = record.momentum_buffers[i], record.exp_avg_sqs[i]
        d, new_m, new_v = base.adam_direction(
            g, m.to(g.dtype), v.to(g.dtype), int(record.steps[i]), hyper.momentum, hyper.beta2, hyper.adam_eps
        )
        if v.dtype == torch.bfloat16:
            new_v = stochastic_bfloat16(
                new_v.float(), int(record.steps[i]), i + STATE_TENSOR, record.state_seed
            )
        v.copy_(new_v)
    elif record.base == "sgd" and record.momentum_buffers:
        m = record.momentum_buffers[i]
        d, new_m = base.sgd_direction(g, m.to(g.dtype), hyper.momentum, record.nesterov)
    else:
        return g
    m.copy_(new_m)
    return d
