"""The optimizers that ours are compared with, tuned with the same effort (docs/algorithms.md, section 4)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from quantopt.ops.weights import pack_signs
from quantopt.optim.base import LevelOptimizer
from quantopt.optim.options import from_arguments, scheduled_value
from quantopt.optim.sharded import local
from quantopt.optim.stam import geometric, mean_magnitude_moves
from quantopt.reference.baselines import stochastic_sign
from quantopt.reference.levels import spread_over

__all__ = ["BinaryConnect", "BinaryRelax", "ProxQuant"]


class _LatentClipped(LevelOptimizer):
    """The alternating rule with a latent clipped at ``clip`` sigma."""

    def _rule(self, group: dict[str, Any]) -> str:
        return "alternating"

    def _dynamic_scale(self, group: dict[str, Any]) -> bool:
        return mean_magnitude_moves(group)

    def _bounds_latent(self, group: dict[str, Any]) -> bool:
        return not math.isinf(group["clip"])


class BinaryConnect(_LatentClipped):
    """BinaryConnect (Courbariaux, Bengio, David, NeurIPS 2015), with a scale per channel or group.

        u ← clamp(u (1 - η wd) - η d, -clip σ, clip σ)
        p = a sgn(u),  a = mean|u|

    a is that of the new u, per group of ``group_size`` elements of a row with ``scale="group"``, else per channel; a
    1-d parameter is one channel without groups. sigma, the standard deviation of the first weights, has the granularity
    of ``scale``. ``scale="none"`` is the original: a = 1 and sigma = 1. More than two levels: the projection onto the
    frozen grid in place of a sgn(u), and the latent clipped at ``clip`` times its outer level. a and sigma per channel
    of a loaded state, as earlier versions saved them under "group", count for all groups of the channel; the next step
    makes each group's own a. Weight decay, of which the original has none, does not enter the momentum;
    decoupled_weight_decay is refused, as it is so.

    With ``stochastic=True`` the sign is +1 with probability clamp((u/(clip sigma) + 1)/2, 0, 1), drawn from torch's
    generator. A latent that is NaN gives a weight that is NaN, as in the other optimizers.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        nesterov: bool | None = None,
        *,
        clip: float = 1.0,
        stochastic: bool = False,
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

    def _sgd_lr(self, group: dict[str, Any]) -> float:
        return 0.5

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"kappa": math.inf, "bound": group["clip"]}

    def _check_quantised(self, group: dict[str, Any]) -> None:
        super()._check_quantised(group)
        if group["stochastic"] and group["bits"] != 1:
            raise ValueError(f"stochastic=True needs bits=1, not bits={group['bits']!r}")

    def adds_to_step(self, group: dict[str, Any]) -> bool:
        return bool(group["stochastic"])

    @torch.no_grad()
    def _after_step(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        lr, found_inf = scheduled_value(group, "lr"), getattr(self, "found_inf", None)
        stays = lr == 0  # as the fused step leaves the weights; a tensor in capturable groups
        for p in params if stays is not True else ():
            state = self.state[p]
            u, size = state["latent"], group["group_size"]
            if "sigma" in state:  # clamp((u + 1)/2) is written for a latent clipped at 1
                u = u / (group["clip"] * spread_over(state["sigma"], u, size))
            drawn = spread_over(state["scale"], p, size) * stochastic_sign(u)
            for flag in (stays, found_inf):
                if isinstance(flag, Tensor):
                    drawn = torch.where(flag.to(p.device) != 0, p, drawn)
            p.copy_(drawn)
            self._written.drawn[p] = pack_signs(local(p).reshape(-1))


class BinaryRelax(_LatentClipped):
    """BinaryRelax (Yin, Zhang, Lyu, Osher, Qi, Xin, SIAM J. Imaging Sci. 2018), with a clipped latent.

        u ← clamp(u (1 - η wd) - η d, -clip σ, clip σ)
        p = (κ a sgn(u) + u) / (1 + κ)

    kappa rises geometrically from 1 to 100 until 80 % of the training, then p is hard. a, sigma, grids of more than two
    levels and weight decay are as in :class:`BinaryConnect`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        nesterov: bool | None = None,
        *,
        kappa: float = 1.0,
        clip: float = 1.0,
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

    def _sgd_lr(self, group: dict[str, Any]) -> float:
        return 0.3

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"kappa": scheduled_value(group, "kappa"), "bound": group["clip"]}

    def annealed(
        self,
        group: dict[str, Any],
        step: int,
        total_steps: int,
        *,
        start: float = 0.0,
        end: float = 0.8,
        first: float = 1.0,
        last: float = 100.0,
    ) -> dict[str, float]:
        return {"kappa": geometric(step / total_steps, start, end, first, last)}


class ProxQuant(LevelOptimizer):
    """ProxQuant (Bai, Wang, Liberty, ICLR 2019), meant for a full-precision warm start.

        p ← p - η d
        q = project(p)
        p ← q + sgn(p - q) max(|p - q| - η reg k, 0)

    at the k-th step; hard (p = q) from 80 % of the training. ``reg_strength`` is reg * k, which
    :class:`quantopt.Anneal` sets. Weight decay is part of the gradient, and so of the momentum, as in torch.optim.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        nesterov: bool | None = None,
        *,
        reg: float = 1e-4,
        reg_strength: float = 0.0,
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

    def _sgd_lr(self, group: dict[str, Any]) -> float:
        return 0.1

    def _rule(self, group: dict[str, Any]) -> str:
        return "prox"

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        lr, strength = scheduled_value(group, "lr"), scheduled_value(group, "reg_strength")
        if isinstance(strength, Tensor):
            return {"threshold": torch.where(strength.isinf(), math.inf, lr * strength)}
        return {"threshold": math.inf if math.isinf(strength) else lr * strength}

    def annealed(
        self, group: dict[str, Any], step: int, total_steps: int, *, end: float = 0.8
    ) -> dict[str, float]:
        if not 0 < end <= 1:
            raise ValueError(f"{end=}: must be 0 < end <= 1")
        return {"reg_strength": math.inf if step >= end * total_steps else group["reg"] * (step + 1)}
