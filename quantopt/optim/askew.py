"""AskewSGD and AskewAdam (Leconte, Schechtman, Moulines, AISTATS 2023)."""

import math
from typing import Any

from quantopt.optim.base import QuantOptimizer, number

# The anneal of the interval: (fraction of the training at which t* leaves 0, at which it stays, its last value).
PLAIN_ANNEAL = (0.7, 0.9, 0.995)
MEMORY_ANNEAL = (0.5, 0.8, 1.0)


def interval_epsilon(progress: float, hold: float, end: float, last: float) -> float:
    """e = (1 - t*^2)^2 with t* = 0 until ``hold``, linear to ``last`` at ``end``, then constant."""
    if not (0 <= hold < end <= 1 and 0 < last <= 1):
        raise ValueError(f"{hold=}, {end=}, {last=}: must be 0 <= hold < end <= 1 and 0 < last <= 1")
    t = last * min(max((progress - hold) / (end - hold), 0.0), 1.0)
    return float(((1 - t) * (1 + t)) ** 2)


def _default_rate(memory: bool) -> float:
    return math.inf if memory else 0.1


class _Askew(QuantOptimizer):
    def _rule(self, group: dict[str, Any]) -> str:
        if group["memory"]:
            return "askew_memory"
        return "askew_gradient" if group["constrain"] == "gradient" else "askew"

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"epsilon": number(group, "epsilon"), **{key: group[key] for key in ("rate", "cap", "bound")}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in the base class; a group that sets memory and no rate gets the default rate of its own form."""
        if param_group.get("memory", self.defaults["memory"]) != self.defaults["memory"]:
            param_group = {"rate": _default_rate(param_group["memory"]), **param_group}
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["memory"] and math.isinf(group["rate"]):
            raise ValueError(
                "rate=inf: an infinite rate is the exact projection of memory=True; use a finite rate"
            )
        if group["memory"] and group["constrain"] == "gradient":
            raise ValueError("constrain='gradient' has no form with memory=True; use constrain='velocity'")

    def annealed(
        self,
        group: dict[str, Any],
        step: int,
        total_steps: int,
        *,
        hold: float | None = None,
        end: float | None = None,
        last: float | None = None,
    ) -> dict[str, float]:
        default = MEMORY_ANNEAL if group["memory"] else PLAIN_ANNEAL
        given = (hold, end, last)
        chosen = (own if value is None else value for value, own in zip(given, default, strict=True))
        return {"epsilon": interval_epsilon(step / total_steps, *chosen)}


class AskewSGD(_Askew):
    r"""Interval-constrained SGD whose intervals close on the levels.

    With :math:`t \in [-1, 1]` the coordinate of a weight in its cell of the grid (levels at :math:`\pm 1`) and
    :math:`u = (1-|t|)(1+|t|)`, a weight is feasible iff :math:`u^2 \le e`; :math:`e` is annealed from 1
    (all of the cell) to 0 (the levels), by :class:`quantopt.Anneal`. In each step

    .. math::
        m &\leftarrow \beta m + g, \quad v = -\eta (m + \lambda w) / \mathrm{half} \\
        v &\leftarrow s \max(s v, \min(k, \mathrm{cap})) \text{ if infeasible},
            \quad k = r (u - e/u) / (4 |t|), \quad s = \mathrm{sgn}(t) \\
        w &\leftarrow \mathrm{clamp}(w + \mathrm{half}\, v, -hi, hi)

    With ``memory=True`` (an extension of ours, to which the paper's theorem does not carry over) a latent weight moves
    by the base step, and the network runs with its projection onto the feasible interval, so that signs can still
    change when the intervals have separated. The recipes of the command line use it.

    Bytes moved per float32 parameter: 20; with memory 24 (28 with a finite ``rate``).

    Args:
        params: parameters, or groups as from :func:`quantopt.param_groups`.
        lr: eta; default 0.3, with memory 1.
        momentum, nesterov, weight_decay, maximize: as in torch.optim.SGD; weight decay is part of the velocity, not of
            the momentum. decoupled_weight_decay: w <- w (1 - lr wd) before the step instead.
        bits: 0, 1, 2, 3, 4 or "ternary". scale: "none", "tensor", "channel", "group" (of ``group_size`` consecutive
            elements of a row): sigma of the levels, the standard deviation of the weights when first seen, frozen.
        epsilon: e in [0, 1]. rate: r, the restoring rate per step (default 0.1; with memory infinite, the exact
            projection). cap: largest restoring step in units of t. bound: with memory, the latent stays in
            [-bound hi, bound hi].
        constrain: "velocity", or "gradient" for the authors' order (the constraint acts on the gradient, with
            alpha = rate/lr, before momentum).
        rounding: for bfloat16 and float16 parameters "master" (fp32 weights in the state), "nearest", or "stochastic"
            (bfloat16; reproducible from ``seed`` and the step). momentum_dtype: "float32" or "bfloat16".
        error_if_nonfinite: raise FloatingPointError naming the parameter, before anything is changed, where a
            gradient is not finite; costs a check. capturable: lr and the annealed numbers become float64 tensors on
            the device of the parameters, which schedules fill and replays of a captured CUDA graph read; capture
            anew after load_state_dict, which replaces the state.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a value out of range, naming the key; or weights without a scale (all zero), naming the parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        epsilon: float = 1.0,
        rate: float | None = None,
        cap: float = 0.25,
        constrain: str = "velocity",
        memory: bool = False,
        bound: float = 2.0,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        lr = (1.0 if memory else 0.3) if lr is None else lr
        rate = _default_rate(memory) if rate is None else rate
        defaults: dict[str, Any] = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, epsilon=epsilon
        )
        defaults |= dict(rate=rate, cap=cap, constrain=constrain, memory=memory, bound=bound, **options)
        super().__init__(params, defaults, backend)


class AskewAdam(_Askew):
    r"""The rule of :class:`AskewSGD` on Adam's direction
    :math:`d = (m / (1-\beta_1^k)) / (\sqrt{v / (1-\beta_2^k)} + \epsilon_\mathrm{Adam})`.

    A learning rate of about 0.1 of the weights' standard deviation is a good start. With ``constrain="gradient"`` the
    authors' alpha loses its meaning, since Adam rescales the restoring gradient. Other arguments as in AskewSGD.
    """

    _adam = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        epsilon: float = 1.0,
        rate: float | None = None,
        cap: float = 0.25,
        constrain: str = "velocity",
        memory: bool = False,
        bound: float = 2.0,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        rate = _default_rate(memory) if rate is None else rate
        defaults: dict[str, Any] = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, epsilon=epsilon, rate=rate, cap=cap
        )
        super().__init__(
            params, defaults | dict(constrain=constrain, memory=memory, bound=bound, **options), backend
        )
