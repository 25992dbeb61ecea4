"""How each optimizer of the command line is set up: the defaults of docs/algorithms.md, sections 2 to 4.

`sgd` is full precision: plain torch.optim.SGD on every parameter. The others train the quantised weights with
their own rule and everything else (first and last layer, biases, batch norm) with SGD at `FLOAT_LR`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import quantopt
from quantopt.backends import choose

# Of the parameters that are not quantised. Chosen on validation splits of the digits and of 8,000 CIFAR-10 images with
# the cnn, for sgd and the quantised recipes alike: at a rate of 0.1 the cnn does not train reliably on CIFAR-10.
FLOAT_LR = 0.02
FLOAT_WEIGHT_DECAY = 5e-3
MOMENTUM = 0.9


@dataclass(frozen=True)
class Recipe:
    """An optimizer and its schedule.

    make: the optimizer's class; lr, weight_decay: of the quantised weights, for levels one standard deviation
    from zero; options: further arguments of the class; warmup: fraction of the steps in which the learning
    rate rises linearly before it falls by a cosine to 0; relaxation: the group key that Anneal drives.
    """

    make: Callable[..., Any]
    lr: float
    weight_decay: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    relaxation: str | None = None


RECIPES: dict[str, Recipe] = {
    "sgd": Recipe(torch.optim.SGD, lr=FLOAT_LR, weight_decay=FLOAT_WEIGHT_DECAY),
    "binaryconnect": Recipe(quantopt.BinaryConnect, lr=0.5),
    "binaryrelax": Recipe(quantopt.BinaryRelax, lr=0.3, relaxation="kappa"),
    "proxquant": Recipe(quantopt.ProxQuant, lr=0.1, relaxation="reg_strength"),
    "askew": Recipe(quantopt.AskewSGD, lr=1.0, options={"memory": True}, relaxation="epsilon"),
    "stam": Recipe(quantopt.STAM, lr=1.0, weight_decay=3e-3, warmup=0.03, relaxation="kappa"),
}


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate at `step` of `total`: linear warm-up, then (1 + cos)/2 from 1 to 0."""
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, total - rising))))


@dataclass
class Optimizer:
    """An optimizer with the schedules that belong to it: `update()` the weights, then `advance()` the schedules."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    anneal: Any | None
    relaxation: str | None

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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.anneal is not None:
            self.anneal.load_state_dict(state["anneal"])


def build(
    name: str,
    model: nn.Module,
    total_steps: int,
    *,
    lr: float | None = None,
    bits: int | str = 1,
    scale: str = "tensor",
    backend: str = "auto",
) -> Optimizer:
    """The optimizer `name` of `RECIPES` for `model`, over `total_steps` steps.

    lr: of the quantised weights (of all weights for sgd), the recipe's if None. bits, scale: as in
    `quantopt.param_groups`; ignored by sgd. With scale "none" the levels are -1 and 1: the quantised weights are
    first divided by their standard deviation, which the batch norm behind them undoes, and lr by its square and
    weight_decay multiplied by it, so that training takes the same course. Raises ValueError on a bad value,
    BackendError if the backend cannot run the optimizer.
    """
    recipe = RECIPES[name]
    lr = recipe.lr if lr is None else lr
    optimizer: Any
    anneal = None
    if name == "sgd":
        optimizer = recipe.make(
            model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=recipe.weight_decay
        )
    else:
        groups = quantopt.param_groups(
            model, bits=bits, scale=scale, other={"lr": FLOAT_LR, "weight_decay": FLOAT_WEIGHT_DECAY}
        )
        weight_decay = recipe.weight_decay
        if scale == "none":
            variance = _unit_variance(groups[0]["params"])
            lr, weight_decay = lr / variance, weight_decay * variance
        options = dict(recipe.options, momentum=MOMENTUM, weight_decay=weight_decay, backend=backend)
        optimizer = recipe.make(groups, lr=lr, **options)
        # A backend that cannot run is refused now, not at the first step.
        for group in optimizer.param_groups:
            weight = group["params"][0]
            choose("fused_step", weight.device, weight.dtype, backend)
        anneal = quantopt.Anneal(optimizer, total_steps=total_steps) if recipe.relaxation else None
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, total_steps, recipe.warmup)
    )
    return Optimizer(optimizer, scheduler, anneal, recipe.relaxation)


@torch.no_grad()
def _unit_variance(weights: list[torch.Tensor]) -> float:
    """Divides each tensor by its standard deviation; returns the geometric mean of what their variances were."""
    logarithms = []
    for weight in weights:
        deviation = weight.std()
        weight /= deviation
        logarithms.append(2 * math.log(deviation.item()))
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 1.0
