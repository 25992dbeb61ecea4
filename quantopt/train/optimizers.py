"""The optimizers that a recipe may name, with the schedules that belong to them.

`sgd` and `adamw` are full precision, torch.optim's on every parameter; `luq` trains 4-bit layers by torch.optim.SGD.
The others train the quantised weights with their rule and everything else (skipped layers, biases, batch norm) with the
base rule at `float_lr` and `float_weight_decay`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import quantopt
from quantopt.backends import choose
from quantopt.optim.base import LevelOptimizer
from quantopt.optim.options import SCHEDULED
from quantopt.train import checkpoint
from quantopt.train.errors import shown

# The classes of quantopt.optim go by their names in small letters, but for these.
_SPELLED = {"AskewSGD": "askew", "AskewAdam": "askew-adam"}


def _annealed_key(optimizer: type[LevelOptimizer]) -> str | None:
    """The group key that Anneal drives."""
    arguments = inspect.signature(optimizer).parameters
    return next((key for key in SCHEDULED if key != "lr" and key in arguments), None)


# Each optimizer's class, and the group key that Anneal drives.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "sgd": (torch.optim.SGD, None),
    "adamw": (torch.optim.AdamW, None),
    **{
        _SPELLED.get(name, name.lower()): (value, _annealed_key(value))
        for name, value in vars(quantopt.optim).items()
        if isinstance(value, type) and issubclass(value, LevelOptimizer)
    },
    "luq": (torch.optim.SGD, None),
}
# Arguments of the classes that no recipe sets.
_OF_THE_STEP = ("params", "backend", "capturable", "differentiable", "foreach", "fused", "fused_amp")
FLOAT = {"sgd": 0, "adamw": 0, "luq": 4}
"""Optimizers of torch, which have no levels: the bits of their recipes."""
FULL_PRECISION = tuple(name for name, bits in FLOAT.items() if bits == 0)


def has_levels(name: str, bits: int | str | None) -> bool:
    """Whether an optimizer quantises weights; not so for torch's, and with bits=0."""
    return name not in FLOAT and bits != 0


def schedule(step: int, total: int, warmup: float, milestones: Sequence[float] | None = None) -> float:
    """Factor of the learning rate at `step` of `total`: linear warm-up, then (1 + cos)/2 from 1 to 0; with milestones,
    fractions of `total`, if there are any, a half for each that has been reached."""
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    if milestones:
        return float(0.5 ** sum(step >= round(fraction * total) for fraction in milestones))
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, total - rising))))


@dataclass
class Optimizer:
    """An optimizer with the schedules that belong to it: `update()` the weights, then `advance()` the schedules."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    anneal: Any | None
    relaxation: str | None
    has_own_rate: bool = False
    """Whether the rate of the quantised weights depends on the weights that training started from (scale "none")."""

    def update(self) -> None:
        """One step of the weights from their gradients."""
        self.optimizer.step()

    def advance(self) -> None:
        """Learning rate and relaxation of the next step."""
        self.scheduler.step()
        if self.anneal is not None:
            self.anneal.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "anneal": None if self.anneal is None else self.anneal.state_dict(),
        }

    def seek(self, step: int) -> None:
        """Puts the schedules where `step` calls of `advance` put them."""
        factors = [factor(step) for factor in self.scheduler.lr_lambdas]
        for group, base, factor in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, factors, strict=True
        ):
            if isinstance(group["lr"], torch.Tensor):  # in place: a captured graph reads it
                group["lr"].fill_(float(base * factor))
            else:
                group["lr"] = base * factor
        rates = [group["lr"] for group in self.optimizer.param_groups]
        position = {
            "last_epoch": step,
            "_step_count": step + 1,
            "_last_lr": [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates],
        }
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **position})
        if self.anneal is not None:
            self.anneal.load_state_dict({"last_step": step, "total_steps": self.anneal.total_steps})

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Takes up a `state_dict` that was made after `step` steps.

        The schedules follow from the step and are not read; where the state has them otherwise, or is of another
        optimizer, ValueError is raised, and the schedules are those of the step."""
        saved = state["optimizer"]
        groups = saved.get("param_groups") if isinstance(saved, dict) else None
        if (
            not isinstance(groups, list)
            or not all(isinstance(group, dict) for group in groups)
            or saved.keys() != {"state", "param_groups"}
        ):
            raise ValueError(f"optimizer is {shown(saved)}, not the state and the groups of an optimizer")
        checkpoint.check_optimizer_state(self.optimizer, saved["state"], step)
        if self.has_own_rate:
            rate = groups[0]["initial_lr"]
            self._set_rate(rate.item() if isinstance(rate, torch.Tensor) else rate)
        self.seek(step)
        own = self.state_dict()
        for part in ("scheduler", "anneal"):
            checkpoint.check_same(state[part], own[part], part)
        own_groups = own["optimizer"]["param_groups"]
        checkpoint.check_same(groups, own_groups, "optimizer.param_groups")
        complete = [{**mine, **group} for mine, group in zip(own_groups, groups, strict=True)]
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": complete})
        for group in self.optimizer.param_groups:  # torch leaves a rate that is a tensor where the state was
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = group["lr"].to(group["params"][0].device)

    def _set_rate(self, rate: float) -> None:
        """Sets the learning rate of the quantised weights. Their weight decay follows it inversely, as in `build`."""
        checkpoint.check_number(rate, "optimizer.param_groups[0].initial_lr", 1e-30, 1e30)
        group = self.optimizer.param_groups[0]
        group["weight_decay"] *= float(group["initial_lr"]) / rate
        group["initial_lr"] = self.scheduler.base_lrs[0] = rate


def change_layers(name: str, model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Puts into ``model`` the layers that the settings of a run ask for: those of luq, or SAWB quantisers of
    activations."""
    skip = tuple(settings["skip"])
    if name == "luq":
        quantopt.nn.luq(model, skip=skip, repeat=settings["options"].get("repeat", 1))
    elif settings["activations"]:
        quantopt.nn.quantize_activations(model, skip=skip)


def build(
    name: str,
    model: nn.Module,
    total_steps: int,
    settings: Mapping[str, Any],
    *,
    backend: str = "auto",
    capturable: bool = False,
) -> Optimizer:
    """The optimizer `name` of `OPTIMIZERS` for `model`, over `total_steps` steps.

    settings: a value for each of `config.HYPERPARAMETERS`, and of `milestones` and `rescale` where they are not the
    defaults. capturable: for a step captured in a CUDA graph.
    `model` is changed where the settings ask for it: SAWB quantisers for activations = 4, the layers of luq.
    With scale "none" the levels are -1 and 1. Then, unless `rescale` is False, each quantised weight is divided by its
    standard deviation s, which the batch norm behind it undoes; lr is divided by the mean of s^2 (of s on Adam and
    Muon, whose directions do not grow with the gradient) and weight_decay multiplied by it, so that training takes the
    same course.
    Raises ValueError on a bad value, BackendError if the backend cannot run the optimizer.
    """
    make, relaxation = OPTIMIZERS[name]
    lr, weight_decay, momentum = settings["lr"], settings["weight_decay"], settings["momentum"]
    skip = tuple(settings["skip"])
    optimizer: Any
    anneal = None
    rescaled = name not in FLOAT and settings["scale"] == "none" and settings.get("rescale", True)
    options = dict(settings["options"])
    if name == "luq":
        options.pop("repeat", None)
    parameters = inspect.signature(make).parameters
    known = {
        argument.name: argument.default
        for argument in parameters.values()
        if argument.name not in settings and argument.name not in _OF_THE_STEP
    }
    if unknown := sorted(options.keys() - known.keys()):
        raise ValueError(f"options={unknown}: unknown to {name}, which has {', '.join(sorted(known))}")
    if name in FLOAT:  # torch looks at them at the first step
        for key, value in options.items():
            if (kind := _kind_of(known[key])) and not _is_of(kind, value):
                raise ValueError(f"{key}={value!r}: must be {kind}")
    change_layers(name, model, settings)
    if "momentum" in parameters:
        options["momentum"] = momentum
    if name in FLOAT:
        if settings["anneal"]:
            raise ValueError(f"anneal={settings['anneal']!r}: {name} has nothing to anneal")
        if capturable:  # the fused kernel alone reads a rate that is a tensor on the device
            options["fused"] = True
            lr = torch.tensor(lr, device=next(model.parameters()).device)
        optimizer = make(model.parameters(), lr=lr, weight_decay=weight_decay, **options)
    else:
        other = {"lr": settings["float_lr"], "weight_decay": settings["float_weight_decay"]}
        if options.get("base") == "muon":
            other["base"] = "adam"
        # With bits=0 the weights that would be quantised are trained by the base, for example Muon, all the same.
        groups = quantopt.param_groups(
            model, bits=settings["bits"] or 1, scale=settings["scale"], skip=skip, other=other
        )
        groups[0]["bits"] = settings["bits"]
        if rescaled:
            unit = _unit_variance(groups[0]["params"])
            if str(options.get("base", make._base)) in ("adam", "muon"):  # type: ignore[attr-defined]
                unit = math.sqrt(unit)
            lr, weight_decay = lr / unit, weight_decay * unit
        optimizer = make(
            groups, lr=lr, weight_decay=weight_decay, backend=backend, capturable=capturable, **options
        )
        # A backend that cannot run is refused now, not at the first step.
        for group in optimizer.param_groups:
            weight = group["params"][0]
            choose("fused_step", weight.device, weight.dtype, backend)
        own = inspect.signature(quantopt.Anneal.__init__).parameters
        if reserved := sorted((own.keys() - {"schedule", "settings"}) & settings["anneal"].keys()):
            raise ValueError(
                f"anneal={reserved}: the training sets that; a recipe sets what the schedule has"
            )
        if relaxation or settings["anneal"]:
            anneal = quantopt.Anneal(optimizer, total_steps=total_steps, **settings["anneal"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: schedule(step, total_steps, settings["warmup"], settings.get("milestones")),
    )
    return Optimizer(optimizer, scheduler, anneal, relaxation, rescaled)


def _kind_of(default: Any) -> str:
    """What a value must be in place of an argument's default."""
    if isinstance(default, tuple):
        return f"{len(default)} numbers"
    return "True or False" if default is None or isinstance(default, bool) else "a number"


def _is_of(kind: str, value: Any) -> bool:
    if kind == "True or False":
        return isinstance(value, bool)
    if kind == "a number":
        return isinstance(value, int | float)
    return (
        isinstance(value, list)
        and f"{len(value)} numbers" == kind
        and all(_is_of("a number", x) for x in value)
    )


@torch.no_grad()
def _unit_variance(weights: list[torch.Tensor]) -> float:
    """Divides each tensor by its standard deviation; returns the geometric mean of what their variances were."""
    logarithms = []
    for weight in weights:
        deviation = weight.std()
        weight /= deviation
        logarithms.append(2 * math.log(deviation.item()))
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 1.0
