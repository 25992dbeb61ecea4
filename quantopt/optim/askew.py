"""AskewSGD and AskewAdam (Leconte, Schechtman, Moulines, AISTATS 2023)."""

import math
from typing import Any

from quantopt.optim.base import LevelOptimizer
from quantopt.optim.options import from_arguments, scheduled_value

__all__ = ["AskewAdam", "AskewSGD"]

# The anneal of the interval: (fraction of the training at which t* leaves 0, at which it stays, its last value).
PLAIN_ANNEAL = (0.7, 0.9, 0.995)
MEMORY_ANNEAL = (0.5, 0.8, 1.0)


def interval_epsilon(progress: float, hold: float, end: float, last: float) -> float:
    """e = (1 - t*^2)^2 with t* = 0 until ``hold``, linear to ``last`` at ``end``, then constant."""
    if not (0 <= hold < end <= 1 and 0 < last <= 1):
        raise ValueError(f"{hold=}, {end=}, {last=}: must be 0 <= hold < end <= 1 and 0 < last <= 1")
    t = last * min(max((progress - hold) / (end - hold), 0.0), 1.0)
    return float(((1 - t) * (1 + t)) ** 2)


class AskewSGD(LevelOptimizer):
    """Interval-constrained SGD whose intervals close on the levels.

    With t in [-1, 1] the coordinate of a weight in its cell of the grid (levels at ±1) and u = (1 - |t|)(1 + |t|), a
    weight is feasible iff u ≤ √e, that is |t| ≥ t° = √(1 - √e); e is annealed from 1 (all of the cell) to 0 (the
    levels), by :class:`quantopt.Anneal`. In each step

        m ← β m + g
        v = -η (m + wd w) / half
        v ← s max(s v, min(k, cap))  if infeasible,  k = r (u - e/u) / (4 |t|),  s = sgn(t)
        w ← clamp(w + half v, -hi, hi)

    With ``clamp=False``, the form of the paper, a weight may leave [-hi, hi]. Beyond the outer levels, by
    δ = |t| - 1, it is feasible iff δ ≤ √e; the step has no clamp, and before it

        v ← -s max(-s v, min(r (δ² - e) / (2 δ), cap))  if δ > √e
        v ← cap                                         if t = 0 and t° > 0

    With ``memory=True`` (an extension of ours, to which the paper's theorem does not carry over) a latent weight moves
    by the base step, and the network runs with its projection onto the feasible interval, so that signs can still
    change when the intervals have separated. The recipes of the command line use it.

    A step with lr = 0 updates momentum and step count alone, here and in every optimizer of this package.

    Bytes moved per float32 parameter: 20; with memory 24 (28 with a finite ``rate``).

    Args:
        params: parameters, or groups as from :func:`quantopt.param_groups`. A group may set every option but
            ``backend``, and have keys of its user's.
        lr: eta; default 0.3, with memory 1, on Adam and Muon 1e-3; none on a given direction.
        momentum: as in torch.optim.SGD; default 0.9, on Muon 0.95.
        nesterov: as in torch.optim.SGD; default False, on Muon True.
        weight_decay: part of the velocity, not of the momentum; with ``memory`` it is l ← l (1 - lr wd) - lr d. Groups
            with ``bits=0`` have it in the momentum, as torch, but on Muon beside d.
        decoupled_weight_decay: w ← w (1 - lr wd) before the step instead; refused with ``memory``, whose weight decay
            is so as it is.
        maximize: as in torch.optim.SGD.
        bits: 0, 1, 2, 3, 4, "17-level" (-8..8) or "ternary", of the groups that do not say it; there is no default.
        scale: "none", "tensor", "channel", "group" (of ``group_size`` consecutive elements of a row): sigma of the
            levels, the standard deviation of the weights when first seen, frozen; weights on such levels already keep
            theirs. A 1-d parameter has one element per channel, whose sigma is its magnitude. "sawb": per tensor and
            frozen, with the outer level c1 sqrt(mean w^2) - c2 mean|w| of SAWB (Choi et al., arXiv 1807.06964),
            or max|w| where that is not positive; not for 1 bit and "ternary".
        group_size: elements of a group, with scale="group".
        base: where the direction d comes from that the rule constrains: "sgd", "adam" (``betas`` and ``eps`` as in
            torch.optim.Adam, in place of momentum), "muon" (``momentum``, ``nesterov``, ``ns_steps`` and
            ``adjust_lr_fn`` as in torch.optim.Muon) or "given" (d is the gradient as the caller left it, for directions
            of other optimizers). A group may have another one.

            Muon is for hidden matrices; weights of convolutions are the matrices [out, the rest]. Everything else is
            better on Adam: ``param_groups(model, other={"base": "adam", "lr": 3e-4})``. Vectors and sharded parameters
            (DTensor) are refused, and ``constrain="gradient"``. It keeps a buffer of the parameter's size and dtype.
        epsilon: e in [0, 1].
        rate: r, the restoring rate per step; default 0.1, with memory infinite: the exact projection.
        cap: largest restoring step in units of t.
        memory: keep a latent weight.
        bound: with memory, the latent stays in [-bound hi, bound hi].
        clamp: False for the form of the paper, which has no memory.
        constrain: "velocity", or "gradient" for the authors' order (the constraint acts on the gradient of infeasible
            weights, with alpha = rate/lr, before momentum; the clamp to [-hi, hi] comes last).
        rounding: for bfloat16 and float16 parameters "master" (fp32 weights in the state), "nearest", or "stochastic"
            (bfloat16; reproducible from ``seed`` and the step).
        momentum_dtype: "float32" or "bfloat16".
        exp_avg_sq_dtype: of Adam's second moment, "float32" or "bfloat16", which is rounded stochastically whatever
            ``rounding`` is: to nearest it would stall. A state of another dtype is converted at the next step.
        error_if_nonfinite: raise FloatingPointError naming the parameter, before anything is changed, where a
            gradient is not finite; costs a check.
        capturable: lr and the annealed numbers become float64 tensors on
            the device of the parameters, which schedules fill and replays of a captured CUDA graph read.
            load_state_dict fills the state in place, so that a captured graph goes on with it.
        fused_amp: torch.amp.GradScaler leaves to the kernels what it has to do: they divide the gradients by its factor
            and skip the step where one is not finite, without waiting for the device. Gradients cannot be clipped then,
            as nobody sees them unscaled (without it, between ``scaler.unscale_`` and ``scaler.step``).
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: a value out of range, naming the key; or weights without a scale (all zero), naming the parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        nesterov: bool | None = None,
        *,
        epsilon: float = 1.0,
        rate: float | None = None,
        cap: float = 0.25,
        constrain: str = "velocity",
        memory: bool = False,
        clamp: bool = True,
        bound: float = 2.0,
        base: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        bits: int | str | None = None,
        scale: str = "tensor",
        group_size: int = 128,
        rounding: str = "master",
        momentum_dtype: str = "float32",
        exp_avg_sq_dtype: str = "float32",
        seed: int = 0,
        error_if_nonfinite: bool = False,
        capturable: bool = False,
        fused_amp: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, from_arguments(locals()), backend, fused_amp)

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        super().__setstate__(pickled)
        self._options.setdefault("clamp", True)  # pickled by an earlier version

    def _rule(self, group: dict[str, Any]) -> str:
        if group["memory"]:
            return "askew_memory"
        return "askew_gradient" if group["constrain"] == "gradient" else "askew"

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        bound = group["bound"] if group["memory"] else 1.0 if group.get("clamp", True) else math.inf
        return {
            "epsilon": scheduled_value(group, "epsilon"),
            "rate": group["rate"],
            "cap": group["cap"],
            "bound": bound,
        }

    def _sgd_lr(self, group: dict[str, Any]) -> float:
        return 1.0 if group["memory"] else 0.3

    def _form_defaults(self, group: dict[str, Any]) -> dict[str, Any]:
        return super()._form_defaults(group) | {"rate": math.inf if group["memory"] else 0.1}

    def _check_quantised(self, group: dict[str, Any]) -> None:
        super()._check_quantised(group)
        if not group["memory"] and math.isinf(group["rate"]):
            raise ValueError(
                "rate=inf: an infinite rate is the exact projection of memory=True; use a finite rate"
            )
        if group["memory"] and group["constrain"] == "gradient":
            raise ValueError("constrain='gradient' has no form with memory=True; use constrain='velocity'")
        if group["base"] == "muon" and group["constrain"] == "gradient":
            raise ValueError(
                "constrain='gradient' has no form on base='muon', which mixes the gradients of a matrix after they are "
                "bent; use constrain='velocity'"
            )
        if group["memory"] and not group["clamp"]:
            raise ValueError(
                "clamp=False is the printed form, which has no latent, and memory=True keeps one: use clamp=True with "
                "memory=True, or memory=False"
            )

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
        settings = (hold, end, last)
        chosen = (usual if value is None else value for value, usual in zip(settings, default, strict=True))
        return {"epsilon": interval_epsilon(step / total_steps, *chosen)}


class AskewAdam(AskewSGD):
    """The rule of :class:`AskewSGD` on Adam's direction: AskewSGD with ``base="adam"``. At step k

        d = (m / (1 - β₁ᵏ)) / (√(v / (1 - β₂ᵏ)) + eps)

    A learning rate of about 0.1 of the weights' standard deviation is a good start. With ``constrain="gradient"`` the
    authors' alpha loses its meaning, since Adam rescales the restoring gradient. Other arguments as in AskewSGD.
    """

    _base = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        epsilon: float = 1.0,
        rate: float | None = None,
        cap: float = 0.25,
        constrain: str = "velocity",
        memory: bool = False,
        clamp: bool = True,
        bound: float = 2.0,
        base: str = "adam",
        momentum: float | None = None,
        nesterov: bool | None = None,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        bits: int | str | None = None,
        scale: str = "tensor",
        group_size: int = 128,
        rounding: str = "master",
        momentum_dtype: str = "float32",
        exp_avg_sq_dtype: str = "float32",
        seed: int = 0,
        error_if_nonfinite: bool = False,
        capturable: bool = False,
        fused_amp: bool = False,
        backend: str = "auto",
    ) -> None:
        LevelOptimizer.__init__(self, params, from_arguments(locals()), backend, fused_amp)
