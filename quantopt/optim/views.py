"""Views of the weights of an optimizer: projected onto their levels, latent, as codes, and in numbers."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantopt.levels import Quantization, level_count
from quantopt.ops.weights import pack_signs
from quantopt.optim import state
from quantopt.optim.sharded import gathered, local, reshard
from quantopt.optim.written import mark
from quantopt.reference import levels as grid
from quantopt.reference.askew import t_star

if TYPE_CHECKING:
    from quantopt.optim.base import LevelOptimizer

CLOSED_INTERVAL = 0.995  # |t| from which a weight counts as feasible where a rule has no epsilon


def quantised_params(opt: LevelOptimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    """The quantised parameters with their groups; their state is made if it is missing."""
    for group in opt.param_groups:
        if group["bits"] != 0:
            state.ensure(opt, group)
            yield from ((group, p) for p in group["params"] if p.numel())


def operand(opt: LevelOptimizer, p: nn.Parameter) -> Tensor:
    """The full-precision tensor behind a quantised weight: its latent, its master weights, or itself."""
    own = opt.state[p]
    value: Tensor = own.get("latent", own.get("master", p.detach()))
    # Of a loaded state that is of other weights, the weights count.
    return p.detach().to(value.dtype) if p in opt._written.strange else value


def max_level(opt: LevelOptimizer, group: dict[str, Any], p: nn.Parameter) -> Tensor:
    """The outer levels in the shape of the scale."""
    scale: Tensor = opt.state[p]["scale"]
    return scale * grid.level_factor(level_count(group["bits"]))


def projected(opt: LevelOptimizer, group: dict[str, Any], p: nn.Parameter) -> Tensor:
    """This rank's weights on their nearest levels."""
    w, hi = local(operand(opt, p)), local(max_level(opt, group, p))
    return grid.project(w, grid.spread_over(hi, w, group["group_size"]), level_count(group["bits"]))


@contextlib.contextmanager
def swapped(
    opt: LevelOptimizer, weight_of: Callable[[dict[str, Any], nn.Parameter], Tensor]
) -> Iterator[None]:
    """Context in which every quantised parameter holds ``weight_of(group, p)``."""
    record = opt._written
    with torch.no_grad():
        params = [(group, p) for group, p in quantised_params(opt)]
        shown = [weight_of(group, p).to(p.dtype) for group, p in params]
        saved = [local(p.detach()).clone() for _, p in params]
        held = record.views == 0  # whether the parameters hold the weights of the training
        record.views += 1
        for (_, p), w in zip(params, shown, strict=True):
            local(p.detach()).copy_(w)
        marks = [mark(p) for _, p in params]
    try:
        reshard(p for _, p in params)
        yield
    finally:
        with torch.no_grad():
            record.views -= 1
            for (group, p), w, before, marked in zip(params, shown, saved, marks, strict=True):
                now = local(p.detach())
                if mark(p) != marked and not torch.equal(now, w):
                    _warn_of_write(opt, group, p)
                now.copy_(before)
                if held:
                    record.note(p)
        reshard(p for _, p in params)


def _warn_of_write(opt: LevelOptimizer, group: dict[str, Any], p: nn.Parameter) -> None:
    warnings.warn(
        f"{opt.name_of_param(group, p)} was written to inside quantized() or latent(); the weights from before are "
        "restored now, and what was written is lost. Write outside of the context",
        stacklevel=4,
    )


def quantization(opt: LevelOptimizer, group: dict[str, Any], p: nn.Parameter) -> Quantization:
    """Codes and outer levels of the projection of ``p``, gathered from all ranks."""
    levels = level_count(group["bits"])
    hi, w = gathered(max_level(opt, group, p)), gathered(operand(opt, p))
    if not bool(torch.isfinite(w).all()):
        raise ValueError("a quantised weight is not finite: the training diverged, there is nothing to pack")
    codes = grid.codes(w, grid.spread_over(hi, w, group["group_size"]), levels)
    return Quantization(levels, codes, hi.float(), group["group_size"] if hi.dim() == 2 else 0)


def metrics(opt: LevelOptimizer, group: dict[str, Any]) -> dict[str, Any]:
    """See :meth:`LevelOptimizer.metrics`."""
    numel = sum(local(p.detach()).numel() for p in group["params"])
    row: dict[str, Any] = {"bits": group["bits"], "numel": numel}
    if group["bits"] == 0:
        return row
    state.ensure(opt, group)
    smallest = t_star(float(group["epsilon"])) if "epsilon" in opt.defaults else CLOSED_INTERVAL
    # Without the clamp of AskewSGD a weight may stand beyond the outer levels, by delta <= sqrt(e).
    largest = math.inf if group.get("clamp", True) else 1 + math.sqrt(float(group["epsilon"]))
    smallest, largest = smallest - 1e-5, largest + 1e-5  # rounding of t
    levels = level_count(group["bits"])
    feasible = distance = scale = 0.0
    flips = 0
    for p in group["params"]:
        if local(p.detach()).numel() == 0:
            continue
        own = opt.state[p]
        hi = local(max_level(opt, group, p))
        w = local(own.get("master", p.detach())).to(hi.dtype)
        hi = grid.spread_over(hi, w, group["group_size"])
        _, _, t = grid.cell(w, hi, levels)
        t = torch.where((hi == 0) & (w == 0), 1.0, t)  # 0/0: on their level, where a scale has become 0
        feasible += float(((t.abs() >= smallest) & (t.abs() <= largest)).sum())
        distance += float((1 - t.abs()).abs().clamp(max=1).sum())
        scale += float(hi.expand_as(w).sum()) / grid.level_factor(levels)
        signs = pack_signs(local(operand(opt, p)).reshape(-1))
        if state.SIGNS in own:
            flips += _count_bits(signs ^ own[state.SIGNS])
        own[state.SIGNS] = signs
    count = max(numel, 1)
    row.update(
        fraction_feasible=feasible / count, sign_flips=flips, distance=distance / count, scale=scale / count
    )
    return row


def _count_bits(x: Tensor) -> int:
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)], device=x.device)
    return int(ones[x.int()].sum())
