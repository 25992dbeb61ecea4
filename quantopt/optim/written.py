"""Weights that somebody else has written: what becomes of the latent or the master weights behind them.

``p.data`` is what the network runs with, so it counts. A latent and master weights are made anew where p is not what
the optimizer wrote last. Writes are seen by torch's count of them (``p._version``), and by the memory of p.
"""

from __future__ import annotations

import functools
import math
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from quantopt.levels import level_count
from quantopt.optim.sharded import local
from quantopt.reference.levels import level_factor, spread_over
from quantopt.reference.rule import ENDS
from quantopt.rules import HYPER

if TYPE_CHECKING:
    from quantopt.optim.base import LevelOptimizer
    from quantopt.optim.step import GroupStep


class Mark(NamedTuple):
    """Changes with every write to a parameter that torch counts, and with its memory.

    The storage is held weakly, so that memory that is given up is freed; one that is made later is another one, though
    it may have the address of the memory before.
    """

    versions: tuple[int, ...]
    storage: StorageWeakRef
    address: int


def mark(p: nn.Parameter) -> Mark:
    shard = local(p)
    versions = tuple(-1 if t.is_inference() else t._version for t in ((p, shard) if shard is not p else (p,)))
    return Mark(versions, StorageWeakRef(shard.untyped_storage()), shard.data_ptr())


class Record:
    """Which of the parameters of an optimizer hold what it wrote last: the mark of each when that was so.

    A step makes no marks, as that would cost time: the steps of the groups tell which parameters were written to since.
    """

    def __init__(self) -> None:
        self.marks: dict[nn.Parameter, Mark] = {}
        self.views = 0  # depth of the contexts in which the parameters hold something else

    def note(self, p: nn.Parameter) -> None:
        """``p`` holds what the optimizer wrote."""
        self.marks[p] = mark(p)

    @torch.no_grad()
    def take_up(self, opt: LevelOptimizer, group: dict[str, Any], p: nn.Parameter) -> None:
        """Makes latent or master weights of ``p`` from what it holds, where others have written that."""
        state = opt.state[p]
        key = "latent" if "latent" in state else "master" if "master" in state else None
        if key is None or self.views:
            return
        now = mark(p)
        if self.marks.get(p) == now:
            return
        step = next((s for s in opt._group_steps if s.wrote(p)), None)
        if step is None or step.was_written(p):
            behind, weight = local(state[key]), local(p.detach())
            changed = _changed(opt, group, p, weight, behind, key, step)
            if changed is not None:
                behind.copy_(torch.where(changed, weight.to(behind.dtype), behind))
                if p not in self.marks:
                    name = opt.name_of(group, next(i for i, own in enumerate(group["params"]) if own is p))
                    warnings.warn(
                        f"{name} does not hold the weights that its loaded state belongs to. Its weights count: its "
                        f"{key} is made anew from them. Load the model's state that was saved with the optimizer's",
                        stacklevel=2,
                    )
        self.marks[p] = now


def _changed(
    opt: LevelOptimizer,
    group: dict[str, Any],
    p: nn.Parameter,
    weight: Tensor,
    behind: Tensor,
    key: str,
    step: GroupStep | None,
) -> Tensor | None:
    """The elements of ``p`` that are not the weights of what is ``behind`` them; None: there are none.

    ``step``: the last step of its group, whose numbers gave the weights. Without one (after a load) any numbers may
    have given them: then all elements have changed, or none.
    """
    w = weight.to(behind.dtype)
    # A checkpoint may have rounded the weights to 16 bits.
    precision = torch.finfo(torch.bfloat16 if step is None else weight.dtype).eps
    if key == "master":
        changed = (
            (w - behind).abs() > precision * behind.abs()
            if step is None
            else weight != behind.to(weight.dtype)
        )
        return changed if bool(changed.any()) else None
    rule = opt.rule_of(group) if step is None else step.rule_of(p)
    if rule not in ENDS:
        return torch.ones_like(weight, dtype=torch.bool)
    levels = level_count(group["bits"])
    scale = local(opt.state[p]["scale"]).to(behind.dtype)
    hi = level_factor(levels) * spread_over(scale, behind, group["group_size"])
    if step is not None:
        numbers = [dict(zip(HYPER, step.hyper.tolist(), strict=True))]
    else:
        h = dict.fromkeys(HYPER, 0.0) | {k: float(v) for k, v in opt._hyperparameters(group).items()}
        # The annealed numbers at their two ends; of the decay of the splitting form, none and four times the present.
        numbers = [
            h | {"epsilon": 1.0, "kappa": 0.0, "weight_decay": 0.0},
            h | {"epsilon": 0.0, "kappa": math.inf, "weight_decay": 4 * h["weight_decay"]},
        ]
    rounding = 1e-6 * hi
    around = (
        behind - rounding,
        behind + rounding,
    )  # of a latent between two levels, rounding decides which is nearer
    ends = [end for h in numbers for x in around for end in ENDS[rule](x, hi, levels, SimpleNamespace(**h))]
    if step is None:
        ends.append(behind)  # as before the first step
    if group.get("stochastic"):  # drawn, whatever the sign of the latent
        w, ends = w.abs(), [end.abs() for end in ends]
    low, high = functools.reduce(torch.minimum, ends), functools.reduce(torch.maximum, ends)
    slack = 2 * precision * torch.maximum(low.abs(), high.abs()) + rounding
    changed = ~((w >= low - slack) & (w <= high + slack))
    if not bool(changed.any()):
        return None
    return changed if step is not None else torch.ones_like(changed)
