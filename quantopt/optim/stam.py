"""STAM: relaxed binary weights by stochastic splitting, in two forms (Bian, Liu, Zhang, arXiv 2204.11065)."""

import math
from typing import Any

from quantopt.optim.base import LevelOptimizer
from quantopt.optim.options import from_arguments, scheduled_value

__all__ = ["STAM"]

# The anneal of kappa: (fraction of the training at which it leaves 0, at which it becomes infinite, its first value,
# its last finite one).
ALTERNATING_ANNEAL = (0.0, 0.8, 0.01, 100.0)
SPLITTING_ANNEAL = (0.7, 0.95, 1e-3, 1.0)


def geometric(progress: float, start: float, end: float, first: float, last: float) -> float:
    """0 before ``start``, ``first`` there, ``last`` at ``end``, geometric between; infinite from ``end`` on."""
    if not (0 <= start < end <= 1 and 0 < first <= last < math.inf):
        raise ValueError(
            f"{start=}, {end=}, {first=}, {last=}: must be 0 <= start < end <= 1 and 0 < first <= last < inf"
        )
    if progress < start:
        return 0.0
    if progress >= end:
        return math.inf
    return float(first * (last / first) ** ((progress - start) / (end - start)))


def mean_magnitude_moves(group: dict[str, Any]) -> bool:
    """Whether the alternating rule sets the scale to mean|u| at each step: of binary levels that are not fixed at 1."""
    return bool(group["bits"] == 1 and group["scale"] != "none")


class STAM(LevelOptimizer):
    """Stochastic splitting with relaxed binary (or multi-level) weights.

    Only the paper's abstract was at hand: both forms are our reconstruction in its family. No reproduction of the
    paper's algorithm and no convergence theorem is claimed. κ is the relaxation weight, annealed by
    :class:`quantopt.Anneal`; an infinite one is hard quantisation.

    ``form="alternating"`` (default; alternating minimisation of h(w) + ρ/2 |w-u|² + λ/2 |w-q|²), state u:

        u ← u (1 - η wd) - η d + η lam (q - u)
        q = a sgn(u),  a = mean|u|,  p = (u + κ q) / (1 + κ)

    a is that of the new u, per group of ``group_size`` consecutive elements of a row with ``scale="group"`` (the last
    group of a row may be shorter), fixed at 1 with "none", else per channel. The pull's q is the level of the old u. A
    1-d parameter is one channel without groups. With ``lam=0`` this is BinaryRelax with a late geometric schedule and
    weight decay. Grids of more than two levels are frozen, at the granularity of ``scale``.

    ``form="splitting"`` (three-operator splitting: box, minibatch loss, squared distance to the levels), state x:

        e = x - y,  r = y - η d - e
        x ← (r + κ project(r)) / (1 + κ) + e,  p = y = clamp(x / (1 + η wd), -hi, hi)

    The y of a step is the p that its gradient belongs to, also where lr has changed since (in the first step x,
    clamped). Without weight decay, and for weights of 16 bits, whose rounding would add up in x, it is computed from x.
    The levels are frozen, or follow mean|r| per channel with ``scale="channel-mean"``, per group with "group-mean" (the
    standard deviation before the first step; a 1-d parameter is one channel without groups).

    State of levels that move: ``scale`` float32 [channels], or [channels, groups]. A loaded state that has one per
    channel where groups are asked for, as earlier versions saved it, counts for all groups of the channel; the next
    step makes each group's own.

    Bytes moved per float32 parameter: 24, 4 more in the splitting with weight decay, and 12 more read for a mean whose
    elements do not fit the cache.

    Args:
        lr: default 1 (alternating), 0.3 (splitting), 1e-3 on Adam and Muon.
        weight_decay: default 3e-3 (alternating), 0 (splitting). It does not enter the momentum.
        decoupled_weight_decay: refused but for groups with ``bits=0``, which have it as torch: weight decay is
            decoupled as it is.
        form: "alternating" or "splitting".
        kappa: relaxation weight >= 0.
        lam: pull of the latent towards its level (alternating).

    Other arguments as in :class:`quantopt.AskewSGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool | None = None,
        *,
        form: str = "alternating",
        kappa: float = 0.0,
        lam: float = 0.0,
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

    def _rule(self, group: dict[str, Any]) -> str:
        return str(group["form"])

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"kappa": scheduled_value(group, "kappa"), "lam": group["lam"], "bound": math.inf}

    def _sgd_lr(self, group: dict[str, Any]) -> float:
        return 0.3 if group["form"] == "splitting" else 1.0

    def _form_defaults(self, group: dict[str, Any]) -> dict[str, Any]:
        weight_decay = 0.0 if group["form"] == "splitting" else 3e-3
        return super()._form_defaults(group) | {"weight_decay": weight_decay}

    def _dynamic_scale(self, group: dict[str, Any]) -> bool:
        if group["form"] == "splitting":
            return str(group["scale"]).endswith("-mean")
        return mean_magnitude_moves(group)

    def _check_quantised(self, group: dict[str, Any]) -> None:
        super()._check_quantised(group)
        scale = str(group["scale"])
        if scale.endswith("-mean") and group["bits"] != 1:
            raise ValueError(
                f"scale={scale!r} is for bits=1, not bits={group['bits']!r}; use scale={scale.removesuffix('-mean')!r}"
            )

    def annealed(
        self,
        group: dict[str, Any],
        step: int,
        total_steps: int,
        *,
        start: float | None = None,
        end: float | None = None,
        first: float | None = None,
        last: float | None = None,
    ) -> dict[str, float]:
        default = SPLITTING_ANNEAL if group["form"] == "splitting" else ALTERNATING_ANNEAL
        settings = (start, end, first, last)
        chosen = (usual if value is None else value for value, usual in zip(settings, default, strict=True))
        return {"kappa": geometric(step / total_steps, *chosen)}
