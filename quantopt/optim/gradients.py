"""What is asked of the gradients before a step changes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantopt.optim import sharded
from quantopt.packed_weight import check_memory

if TYPE_CHECKING:
    from quantopt.optim.base import LevelOptimizer


def check_kinds(opt: LevelOptimizer, group: dict[str, Any]) -> None:
    """Raises TypeError for a sparse or complex gradient, ValueError for one without memory."""
    for i, p in enumerate(group["params"]):
        if p.grad is None or p.numel() == 0:
            continue
        kind = "sparse" if p.grad.layout != torch.strided else "complex" if p.grad.is_complex() else None
        if kind is not None:
            raise TypeError(
                f"{opt.name_of(group, i)} has a {kind} gradient; only dense, real gradients are supported"
            )
        check_memory(f"the gradient of {opt.name_of(group, i)}", sharded.local(p.grad))


def check_finite(opt: LevelOptimizer, group: dict[str, Any]) -> None:
    """Raises FloatingPointError for the first gradient that is not finite, on all ranks that share the group."""
    found_inf = getattr(opt, "found_inf", None)
    params = group["params"]
    first = len(params)
    if found_inf is None or not bool(found_inf):  # else GradScaler has seen it, and the step is skipped
        first = _first_nonfinite(params)
    first = sharded.least_over_ranks(params, first)
    if first < len(params):
        raise FloatingPointError(
            f"{opt.name_of(group, first)} has a gradient that is not finite; nothing was changed. Lower the "
            "learning rate, clip the gradients, or use torch.amp.GradScaler"
        )


def _first_nonfinite(params: list[Tensor]) -> int:
    """Index of the first of ``params`` whose gradient is not finite on this rank; their number if there is none."""
    grads = {i: sharded.local_gradient(p) for i, p in enumerate(params) if p.grad is not None}
    grads = {i: grad for i, grad in grads.items() if grad.numel()}
    sparse = any(grad.layout != torch.strided for grad in grads.values())  # which the step refuses
    if sparse or not grads:
        return len(params)
    sizes = torch._foreach_norm(list(grads.values()), float("inf"))
    together: dict[Any, list[Tensor]] = {}
    for size in sizes:
        together.setdefault((size.device, size.dtype), []).append(size)
    if all(bool(torch.isfinite(torch.stack(part)).all()) for part in together.values()):
        return len(params)
    return next(i for i, size in zip(grads, sizes, strict=True) if not bool(torch.isfinite(size)))
