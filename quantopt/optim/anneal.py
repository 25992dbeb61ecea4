"""The schedule of epsilon and of the relaxation weight."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quantopt.optim.base import LevelOptimizer

__all__ = ["Anneal"]

Schedule = Callable[[dict[str, Any], int, int], dict[str, float]]


class Anneal:
    """Drives ``epsilon`` (AskewSGD), ``kappa`` (STAM, BinaryRelax) or ``reg_strength`` (ProxQuant) of every quantised
    group over ``total_steps`` optimizer steps, and the hard phase at the end.

    Call ``step()`` after each ``optimizer.step()``, beside any LR scheduler of torch. The schedules are those of
    docs/algorithms.md: AskewSGD holds e = 1 for 70 % of the steps, then t* rises linearly to 0.995 at 90 %
    (memory=True: from 50 % to 1 at 80 %); STAM alternating: kappa 0.01 to 100 until 80 %, then infinite; splitting: 0
    until 70 %, 1e-3 to 1 until 95 %, then infinite; BinaryRelax: 1 to 100 until 80 %, then infinite.

    Args:
        optimizer: one of this package. total_steps: how many steps the training has, at least 1.
        schedule: (group, step, total_steps) -> values of group keys, in place of the optimizer's own.
        settings: of the optimizer's own schedule, what is left out is as above. AskewSGD, AskewAdam: ``hold``, ``end``
            (fractions of the training) and ``last`` (of t*). STAM, BinaryRelax: ``start``, ``end``, ``first``, ``last``
            (of kappa). ProxQuant: ``end``, from where it is hard.
    """

    def __init__(
        self,
        optimizer: LevelOptimizer,
        total_steps: int,
        schedule: Schedule | None = None,
        **settings: float,
    ) -> None:
        if not isinstance(optimizer, LevelOptimizer):
            raise TypeError(
                f"optimizer={type(optimizer).__name__}: Anneal drives the optimizers of quantopt only"
            )
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r}: must be an int of at least 1")
        self.optimizer = optimizer
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
        self.schedule: Schedule = schedule or functools.partial(own, **settings)
        self.last_step = 0
        self._apply()

    def step(self) -> None:
        """To be called after each step of the optimizer."""
        self.last_step += 1
        self._apply()

    def _apply(self) -> None:
        step = min(self.last_step, self.total_steps)
        for group in self.optimizer.param_groups:
            if group["bits"] == 0:
                continue
            for key, value in self.schedule(group, step, self.total_steps).items():
                if isinstance(group[key], Tensor):  # in place: a captured graph reads it
                    group[key].fill_(value)
                else:
                    group[key] = value

    def state_dict(self) -> dict[str, int]:
        """Position and length of the schedule."""
        return {"last_step": self.last_step, "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Takes up a saved position. Raises ValueError if the state is not one of :meth:`state_dict`."""
        if set(state_dict) != {"last_step", "total_steps"}:
            raise ValueError(f"state_dict has keys {sorted(state_dict)}, not 'last_step' and 'total_steps'")
        self.last_step, self.total_steps = int(state_dict["last_step"]), int(state_dict["total_steps"])
        self._apply()
