"""Weights that somebody else has written: what becomes of the latent or the master weights behind them.

``p.data`` is what the network runs with, so it counts. A latent and master weights are made anew where p is not what
the optimizer wrote last. That something was written is seen by torch's count of the writes (``p._version``) and by the
memory of p; what was written, by comparing p with the weights that the latent gives with the numbers of the last step.
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
from quantopt.ops.weights import unpack_signs
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


class Origin(NamedTuple):
    """What gave a parameter its weights: a rule and its numbers, or a copy of what is behind them (no rule)."""

    rule: str = ""
    numbers: tuple[float, ...] = ()


COPY = Origin()


class Record:
    """Which of the parameters of an optimizer hold what it wrote last: the mark of each when that was so.

    A step makes no marks, as that would cost time: the steps of the groups tell which parameters were written to since.
    """

    def __init__(self) -> None:
        self.views = 0  # depth of the contexts in which the parameters hold something else
        self.forget()

    def forget(self) -> None:
        """The states are others now, of which only the next look at the weights tells whether they belong to them."""
        self.marks: dict[nn.Parameter, Mark] = {}
        self.origins: dict[nn.Parameter, Origin] = {}  # of the parameters that no present step has written
        self.strange: set[nn.Parameter] = set()  # with weights that their loaded state does not belong to
        self.drawn: dict[nn.Parameter, Tensor] = {}  # packed signs of weights that are drawn

    def note(self, p: nn.Parameter) -> None:
        """``p`` holds what the optimizer wrote."""
        self.marks[p] = mark(p)

    def must_compare(self, p: nn.Parameter) -> bool:
        """Whether ``p`` may hold something else, which only a look at its weights and state tells."""
        return p in self.strange or self.marks.get(p) != mark(p)

    def made(self, p: nn.Parameter) -> None:
        """What is behind ``p`` was made of it."""
        self.note(p)
        self.origins[p] = COPY

    def retire(self, step: GroupStep) -> None:
        """Remembers of a step that will be laid out again what it has written."""
        numbers = step.numbers()
        for bucket in step.buckets if step.is_current else ():
            written = set(bucket.written())
            for i, p in enumerate(bucket.params if bucket.counted else ()):
                if numbers is not None:
                    self.origins[p] = Origin(bucket.record.rule, numbers)
                    if i in written:
                        self.marks.pop(p, None)
                if i not in written:
                    self.note(p)

    @torch.no_grad()
    def take_up(self, opt: LevelOptimizer, group: dict[str, Any], p: nn.Parameter, stepping: bool) -> None:
        """Makes latent or master weights of ``p`` from what it holds, where others have written that.

        A state that was just loaded is left for a step to change, since its weights may be loaded later."""
        state = opt.state[p]
        key = "latent" if "latent" in state else "master" if "master" in state else None
        if key is None or self.views:
            return
        now = mark(p)
        known = self.marks.get(p) == now
        if known and not (stepping and p in self.strange):
            return
        origin = self.origins.get(p)
        step = next((s for s in opt._group_steps if s.wrote(p)), None)
        if step is not None:
            if not step.was_written(p):
                self.marks[p] = now
                return
            numbers = step.numbers()
            origin = origin if numbers is None else Origin(step.rule_of(p), numbers)
        behind, weight = local(state[key]), local(p.detach())
        changed = _Comparison(opt, group, p, weight, behind, key == "master").changed(origin)
        if changed is None:
            self.strange.discard(p)
        else:
            name = opt.name_of_param(group, p)
            if origin is None and p not in self.strange:
                warnings.warn(
                    f"{name} does not hold the weights that its loaded state belongs to. Its weights count: its {key} "
                    "will be made anew from them. Load the model's state that was saved with the optimizer's",
                    stacklevel=2,
                )
            if origin is None and not stepping:
                self.strange.add(p)
            else:
                self.strange.discard(p)
                behind.copy_(torch.where(changed, weight.to(behind.dtype), behind))
                _warn_of_scale(state, group, behind, changed, name)
        self.marks[p] = now


def _warn_of_scale(
    state: dict[str, Any], group: dict[str, Any], behind: Tensor, changed: Tensor, name: str
) -> None:
    """The scale stays when weights are taken up. Says so where that will change them much."""
    if group["bits"] == 0 or group["scale"] == "none" or float(changed.float().mean()) <= 0.5:
        return
    size, scale = float(behind.abs().mean()), float(local(state["scale"]).mean())
    if not scale / 8 <= size <= 8 * scale:
        warnings.warn(
            f"{name} was given weights of mean magnitude {size:.3g}, and its levels keep their scale of {scale:.3g}: "
            "for weights of another network, make another optimizer",
            stacklevel=2,
        )


class _Comparison:
    """A parameter's weights against those of what is ``behind`` them, latent or master weights."""

    def __init__(
        self,
        opt: LevelOptimizer,
        group: dict[str, Any],
        p: nn.Parameter,
        weight: Tensor,
        behind: Tensor,
        master: bool,
    ) -> None:
        self.opt, self.group, self.p = opt, group, p
        self.weight, self.w, self.behind, self.master = weight, weight.to(behind.dtype), behind, master
        self.drawn = opt._written.drawn.get(p) if group.get("stochastic") else None

    def changed(self, origin: Origin | None) -> Tensor | None:
        """The elements that are not what ``origin`` gives; None: there are none.

        Without an origin any numbers may have given the weights, and they may have been rounded since. Where most of
        them do not fit even so, they are others, and all have changed."""
        if origin is not None and self._is_as_given(origin):
            return None
        changed = self._differs(origin, self.weight.dtype)
        for narrow in (torch.bfloat16, torch.float16):  # as of a model that was converted, and back
            if bool(changed.any()) and torch.equal(self.weight, self.weight.to(narrow).to(self.weight.dtype)):
                changed &= self._differs(origin, narrow)
        if not bool(changed.any()):
            return None
        if origin is None and float(changed.float().mean()) > 0.5:
            return torch.ones_like(changed)
        return changed

    def _is_as_given(self, origin: Origin) -> bool:
        """A few operations that see in most cases that nothing has changed."""
        if self.master or origin.rule not in ENDS or self.drawn is not None:
            return False
        hi, levels = self._outer_level()
        (numbers,) = self._numbers(origin)
        p, other_end = ENDS[origin.rule](self.behind, hi, levels, SimpleNamespace(**numbers))
        if p is not other_end:
            return False
        if self.weight.dtype != self.behind.dtype:
            return torch.equal(self.weight, p.to(self.weight.dtype))
        return torch.allclose(self.weight, p, rtol=1e-7, atol=1e-6 * float(hi.min()))

    def _outer_level(self) -> tuple[Tensor, int]:
        levels = level_count(self.group["bits"])
        scale = local(self.opt.state[self.p]["scale"]).to(self.behind.dtype)
        return level_factor(levels) * spread_over(scale, self.behind, self.group["group_size"]), levels

    def _differs(self, origin: Origin | None, rounded_to: torch.dtype) -> Tensor:
        """Also false where the weights are rounded to ``rounded_to``."""
        if self.master or origin == COPY:
            return self.weight != self.behind.to(rounded_to).to(self.weight.dtype)
        rule = self.opt.rule_of(self.group) if origin is None else origin.rule
        if rule not in ENDS:
            return torch.ones_like(self.weight, dtype=torch.bool)
        hi, levels = self._outer_level()
        rounding = 1e-6 * hi
        w = self.w
        if self.drawn is not None:  # whatever the sign of the latent
            ends = [hi * unpack_signs(self.drawn, w.numel()).view(w.shape).to(w.dtype)]
        else:
            # Of a latent between two levels, rounding decides which one is nearer.
            around = (self.behind - rounding, self.behind + rounding)
            each = [(x, numbers) for numbers in self._numbers(origin) for x in around]
            ends = [end for x, h in each for end in ENDS[rule](x, hi, levels, SimpleNamespace(**h))]
            if origin is None:
                ends.append(self.behind)  # as before the first step
                if self.group.get("stochastic"):
                    w, ends = w.abs(), [end.abs() for end in ends]
        low, high = functools.reduce(torch.minimum, ends), functools.reduce(torch.maximum, ends)
        largest = torch.maximum(low.abs(), high.abs())
        if origin is None:
            slack = 2 * torch.finfo(torch.bfloat16).eps * largest
        else:
            slack = 0.501 * _last_place(largest, rounded_to)
        return ~((w >= low - slack - rounding) & (w <= high + slack + rounding))

    def _numbers(self, origin: Origin | None) -> list[dict[str, float]]:
        if origin is not None:
            return [dict(zip(HYPER, origin.numbers, strict=True))]
        present = self.opt._hyperparameters(self.group).items()
        h = dict.fromkeys(HYPER, 0.0) | {key: float(value) for key, value in present}
        # The annealed numbers at their two ends; of the decay of the splitting form, none and four times the present.
        return [
            h | {"epsilon": 1.0, "kappa": 0.0, "weight_decay": 0.0},
            h | {"epsilon": 0.0, "kappa": math.inf, "weight_decay": 4 * h["weight_decay"]},
        ]


def _last_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of numbers of ``dtype`` next to ``x``."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent - 1
    return torch.ldexp(torch.full_like(x, info.eps), exponent).clamp(min=info.smallest_normal * info.eps)
