"""The schedule of epsilon and of the relaxation weight."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from quantopt.optim.base import LevelOptimizer
from quantopt.optim.options import POSITION
from quantopt.wrappers import unwrapped

__all__ = ["Anneal"]

Schedule = Callable[[dict[str, Any], int, int], dict[str, float]]


def paper_epsilon(group: dict[str, Any], step: int, total_steps: int) -> dict[str, float]:
    """The schedule "paper": e = 1 for the first half, then 0.88^(epoch - 50), the training being 100 epochs."""
    return {"epsilon": 0.88 ** max(100 * (step / total_steps - 0.5), 0.0)}


NAMED: dict[str, Schedule] = {"paper": paper_epsilon}


class Anneal(LRScheduler):
    """Drives ``epsilon`` (AskewSGD), ``kappa`` (STAM, BinaryRelax) or ``reg_strength`` (ProxQuant) of every quantised
    group over ``total_steps`` optimizer steps, and the hard phase at the end.

    Call ``step()`` after each ``optimizer.step()``, beside any LR scheduler of torch. The schedules are those of
    docs/algorithms.md: AskewSGD holds e = 1 for 70 % of the steps, then t* rises linearly to 0.995 at 90 %
    (memory=True: from 50 % to 1 at 80 %); STAM alternating: kappa 0.01 to 100 until 80 %, then infinite; splitting: 0
    until 70 %, 1e-3 to 1 until 95 %, then infinite; BinaryRelax: 1 to 100 until 80 %, then infinite.

    The optimizer counts its updates in the quantised groups (``group["anneal_step"]``), and ``step()`` sets the values
    that belong to the count: further calls, as with gradient accumulation, change nothing. The count is part of the
    optimizer's state_dict, so an Anneal whose optimizer is loaded, or that is made on a loaded one, goes on where it
    was; its own state_dict has the position too, as torch's schedulers. What counts, exactly:

    - A step that raises, or that torch.amp.GradScaler leaves out, does not count. With ``fused_amp=True`` it does, as
      only the device knows that it was left out.
    - In groups with ``capturable=True`` each call of ``step()`` counts instead, as the replay of a CUDA graph tells the
      optimizer nothing: call it once after each update.
    - A group that is added or quantised later takes up the position at the next ``step()``.

    It is a torch LRScheduler for the trainers that ask for one, and leaves the learning rate alone: give it to them by
    itself, or with a scheduler of the rate in torch's ChainedScheduler. It has no place in a SequentialLR.

    Args:
        optimizer: one of this package, or the wrapper that accelerate or Lightning made of it.
        total_steps: how many steps the training has, at least 1. It counts, with a warning, where the optimizer was
            loaded from a training of another length.
        schedule: (group, step, total_steps) -> values of group keys, in place of the optimizer's own; or "paper", for
            AskewSGD and AskewAdam: e = 1 for the first half of the steps, then 0.88^(100 (step/total_steps - 1/2)), as
            in the paper's trainings of 100 epochs. It ends at 0.0017, not at 0: the final projection, sign() of binary
            weights, moves them (:meth:`AskewSGD.quantized`).
        last_step: the position to begin at, 0 to start anew; None: where the optimizer's groups are.
        settings: of the optimizer's own schedule, what is left out is as above. AskewSGD, AskewAdam: ``hold``, ``end``
            (fractions of the training) and ``last`` (of t*). STAM, BinaryRelax: ``start``, ``end``, ``first``, ``last``
            (of kappa). ProxQuant: ``end``, from where it is hard.

    Raises:
        TypeError: another optimizer.
        ValueError: a value out of range, an unknown setting, or schedule="paper" of an
            optimizer without an epsilon.
    """

    # LRScheduler.__init__ is not called: it would add keys to the groups and wrap optimizer.step, to count the calls.
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        schedule: Schedule | str | None = None,
        *,
        last_step: int | None = None,
        **settings: float,
    ) -> None:
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, LevelOptimizer):
            raise TypeError(
                f"optimizer={type(optimizer).__name__}: Anneal drives the optimizers of quantopt only; of a wrapper, "
                "pass the optimizer within"
            )
        POSITION["anneal_total"]("total_steps", total_steps)
        if last_step is not None:
            POSITION["anneal_step"]("last_step", last_step)
        self.optimizer: LevelOptimizer = optimizer
        self.total_steps = total_steps
        own: Any = optimizer.annealed
        known = inspect.signature(own).parameters.values()
        names = sorted(argument.name for argument in known if argument.kind is argument.KEYWORD_ONLY)
        if unknown := sorted(settings.keys() - set(names)):
            raise ValueError(
                f"{unknown[0]}={settings[unknown[0]]!r}: the schedule of {type(optimizer).__name__} has "
                f"{', '.join(names) or 'no settings'}"
            )
        if schedule is not None and settings:
            raise ValueError(
                f"{sorted(settings)} are settings of the optimizer's schedule: leave out schedule="
            )
        if isinstance(schedule, str):
            schedule = _named(schedule, optimizer)
        elif schedule is not None and not callable(schedule):
            raise TypeError(
                f"schedule={schedule!r}: use 'paper', or a function of (group, step, total_steps)"
            )
        self.schedule: Schedule = schedule or functools.partial(own, **settings)
        lengths = {group.get("anneal_total") for group in optimizer.param_groups if "anneal_step" in group}
        if last_step is None and lengths - {total_steps}:
            warnings.warn(
                f"total_steps={total_steps}: the optimizer is at step {self.last_step} of an anneal of {lengths.pop()} "
                f"steps, and goes on at step {self.last_step} of {total_steps}. Pass last_step=0 to start anew",
                stacklevel=2,
            )
        self._go_to(last_step)
        self._follow_loads()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow_loads()  # of the copied optimizer

    def _follow_loads(self) -> None:
        """A state_dict may have been saved between optimizer.step() and step()."""
        this = weakref.ref(self)

        def follow(_: torch.optim.Optimizer) -> None:
            if (anneal := this()) is not None:
                anneal._go_to()

        self.optimizer.register_load_state_dict_post_hook(follow)

    @property
    def last_step(self) -> int:
        """How many updates of the optimizer have been counted."""
        counts = (group["anneal_step"] for group in self.optimizer.param_groups if "anneal_step" in group)
        return next(counts, 0)

    def step(self, epoch: None = None) -> None:  # type: ignore[override]
        """To be called after each step of the optimizer."""
        for group in self.optimizer.param_groups:
            if group["capturable"] and "anneal_step" in group:
                group["anneal_step"] += 1
        self._go_to()

    def _go_to(self, step: int | None = None, total_steps: int | None = None) -> None:
        """Gives every quantised group its values at ``step``; None: at the position that it has."""
        total = self.total_steps if total_steps is None else total_steps
        present = self.last_step
        groups = [group for group in self.optimizer.param_groups if group["bits"] != 0]
        steps = [group.get("anneal_step", present) if step is None else step for group in groups]
        rows = [self.schedule(group, min(at, total), total) for group, at in zip(groups, steps, strict=True)]
        self.total_steps = total
        for group, at, row in zip(groups, steps, rows, strict=True):
            group["anneal_step"], group["anneal_total"] = at, total
            for key, value in row.items():
                if isinstance(group[key], Tensor):  # in place: a captured graph reads it
                    group[key].fill_(value)
                else:
                    group[key] = value

    def state_dict(self) -> dict[str, int]:
        """Position and length of the schedule."""
        return {"last_step": self.last_step, "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Takes up a saved position and length. Raises ValueError if the state is not one of :meth:`state_dict`;
        nothing is changed then."""
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"last_step", "total_steps"}:
            given = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else state_dict
            raise ValueError(f"state_dict has {given!r}, not 'last_step' and 'total_steps'")
        POSITION["anneal_step"]("last_step", state_dict["last_step"])
        POSITION["anneal_total"]("total_steps", state_dict["total_steps"])
        self._go_to(state_dict["last_step"], state_dict["total_steps"])

    # ---- what trainers ask of a scheduler --------------------------------------------------------------------------

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """The position, under the name that torch's schedulers have for it."""
        return self.last_step

    @last_epoch.setter
    def last_epoch(self, _: int) -> None:
        raise TypeError(
            "the position of an Anneal is the optimizer's count of its updates: it has no place in a SequentialLR; "
            "call its step() beside that scheduler's, or put both into a ChainedScheduler"
        )

    def get_last_lr(self) -> list[Any]:
        """The present learning rates, which others set."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    @property
    def _step_count(self) -> int:
        # accelerate adds 1 here for each batch that it accumulates, and no longer calls step() above total_steps.
        return min(self.last_step, self.total_steps)

    @_step_count.setter
    def _step_count(self, _: int) -> None:
        pass


def _named(name: str, optimizer: LevelOptimizer) -> Schedule:
    if name not in NAMED:
        raise ValueError(f"schedule={name!r}: use one of {sorted(NAMED)}, or a function")
    if "epsilon" not in optimizer.defaults:
        raise ValueError(
            f"schedule={name!r}: {type(optimizer).__name__} has no epsilon to drive; leave schedule out for its own"
        )
    return NAMED[name]
