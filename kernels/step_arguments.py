"""The checks of the arguments of a step on which the Triton kernels rely, as csrc/step_arguments.h has them for the
compiled ones."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from quantopt.reference.levels import COUNTS
from quantopt.reference.step import check_moments
from quantopt.rules import BASES, RULES, StepRecord

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def check(record: StepRecord) -> None:
    """Raises ValueError or TypeError naming the argument that does not fit the others."""
    rule = RULES.get(record.rule)
    if rule is None:
        raise ValueError(f"fused_step: unknown rule {record.rule!r}; use one of {list(RULES)}")
    if record.base not in BASES:
        raise ValueError(f"fused_step: unknown base {record.base!r}; use one of {BASES}")
    if rule.quantised and record.levels not in COUNTS:
        raise ValueError(f"fused_step: levels must be one of {COUNTS}, not {record.levels}")
    if record.dynamic_scale and not rule.dynamic_scale:
        raise ValueError(f"fused_step: rule {record.rule!r} has no dynamic scale")
    adam = record.base == "adam"
    if record.base == "given" and record.momentum_buffers:
        raise ValueError("fused_step: base 'given' has no momentum_buffers; pass an empty list")
    if record.exp_avg_sqs and not adam:
        raise ValueError(f"fused_step: base {record.base!r} has no exp_avg_sqs; pass an empty list")
    params = record.params
    required = {
        "grads": True,
        "momentum_buffers": adam,
        "exp_avg_sqs": adam,
        "latents": rule.latent,
        "scales": rule.quantised,
        "latent_bounds": False,
        "steps": adam or record.seed >= 0,
    }
    for name, needed in required.items():
        count = len(getattr(record, name))
        if count != len(params) and (needed or count):
            raise ValueError(f"fused_step: {name} has {count} tensors for {len(params)} parameters")
    _check_tensors("params", params, params, params[0].dtype)
    _check_tensors("grads", record.grads, params, params[0].dtype)
    momentum_dtype = record.momentum_buffers[0].dtype if record.momentum_buffers else torch.float32
    _check_tensors("momentum_buffers", record.momentum_buffers, params, momentum_dtype)
    check_moments(record)
    for exp_avg_sq in record.exp_avg_sqs[:1]:  # which has the dtype of all
        if exp_avg_sq.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"fused_step: exp_avg_sqs[0] must be float32 or bfloat16, not {exp_avg_sq.dtype}")
        _check_tensors("exp_avg_sqs", record.exp_avg_sqs, params, exp_avg_sq.dtype)
    _check_tensors("latents", record.latents, params, torch.float32)
    for name in ("scales", "latent_bounds", "steps"):
        for i, tensor in enumerate(getattr(record, name)):
            _check_device(name, i, tensor, params[0].device)
            if tensor.dtype != torch.float32:
                raise TypeError(f"fused_step: {name}[{i}] must be float32, not {tensor.dtype}")
    for i, (bound, param) in enumerate(zip(record.latent_bounds, params, strict=False)):
        channels = param.shape[0] if param.dim() else 1
        shapes = [scale.shape for scale in record.scales[i : i + 1]]
        if param.numel() and bound.numel() not in (1, channels) and bound.shape not in shapes:
            raise ValueError(
                f"fused_step: latent_bounds[{i}] has shape {list(bound.shape)}; it must be one, one per channel or one "
                "per scale"
            )
    for i, (bound, scale) in enumerate(zip(record.latent_bounds, record.scales, strict=False)):
        if record.dynamic_scale and scale.numel() == 1 < bound.numel():
            raise ValueError(
                f"fused_step: latent_bounds[{i}] has one value per channel, but the dynamic scale of its parameter has "
                "one: pass one"
            )
    for i, (scale, param) in enumerate(zip(record.scales, params, strict=True) if rule.quantised else ()):
        channels = param.shape[0] if param.dim() else 1
        groups = -(-(param.numel() // max(channels, 1)) // max(record.group_size, 1))
        if param.numel() and scale.numel() != 1 and scale.shape not in ((channels,), (channels, groups)):
            raise ValueError(
                f"fused_step: scales[{i}] has shape {list(scale.shape)} for a parameter of shape {list(param.shape)}"
            )
    for dtype in (params[0].dtype, momentum_dtype):
        if dtype not in DTYPES:
            raise TypeError(f"fused_step: the Triton kernels take float32, bfloat16 and float16, not {dtype}")
    if record.seed >= 0 and (params[0].dtype != torch.bfloat16 or record.latents):
        raise ValueError(
            "fused_step: stochastic rounding is for bfloat16 params without latents; pass seed=-1"
        )


def _check_device(name: str, i: int, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"fused_step: {name}[{i}] is on {tensor.device}, not {device}")


def _check_tensors(
    name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Tensors with the elements of the parameters, in the same order in memory."""
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=False)):
        _check_device(name, i, tensor, params[0].device)
        if tensor.shape != param.shape or (tensor.stride() != param.stride() and param.numel() > 1):
            raise ValueError(f"fused_step: {name}[{i}] has another shape or layout than its parameter")
        if tensor.dtype != dtype:
            raise TypeError(f"fused_step: {name}[{i}] has dtype {tensor.dtype}, not {dtype}")
