"""Steps of AskewSGD, AskewAdam and their base rule as arguments of `quantopt::fused_step`, and how they are
compared with the reference: what the tests of the CUDA and the Triton kernels share."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quantopt.reference import step as reference

RULES = ("base", "askew", "askew_gradient", "askew_memory")
SHAPES = ((5, 13, 3), (129,), (0, 4), (64, 32), (1,), (7, 1031))
GROUP_SIZE = 7
BETA2, ADAM_EPS, BOUND = 0.99, 1e-8, 2.0


@dataclasses.dataclass(frozen=True)
class Case:
    rule: str
    levels: int
    direction: str  # "plain", "momentum", "nesterov", "adam"
    scale: str  # "tensor", "channel", "group"
    decoupled: bool = False
    maximize: bool = False
    rate: float = 0.1
    epsilon: float = 0.3
    grad_scale: float | None = None
    found_inf: float | None = None
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.01
    cap: float = 0.25

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)[4:]
            if getattr(self, field.name) != field.default
        ]
        return "-".join([self.rule, str(self.levels), self.direction, self.scale, *changed])


def all_cases() -> Iterator[Case]:
    """Every rule, direction, grid and scale, then the options one by one."""
    for rule, direction in itertools.product(RULES, ("plain", "momentum", "nesterov", "adam")):
        if rule == "base":
            yield Case(rule, 2, direction, "tensor")
            continue
        for grid, scale in ((2, "tensor"), (2, "channel"), (4, "group"), (3, "channel"), (16, "tensor")):
            yield Case(rule, grid, direction, scale)
    for rule in RULES:
        yield Case(rule, 2, "momentum", "tensor", decoupled=True)
        yield Case(rule, 2, "adam", "channel", maximize=True, grad_scale=8.0, found_inf=0.0)
        yield Case(rule, 4, "adam", "channel", found_inf=1.0)
    for epsilon in (0.0, 1.0):
        yield Case("askew", 2, "momentum", "tensor", epsilon=epsilon)
        yield Case("askew_memory", 2, "momentum", "tensor", epsilon=epsilon, rate=float("inf"))
    yield Case("askew_memory", 4, "nesterov", "group", rate=float("inf"))
    yield Case("askew_gradient", 2, "momentum", "tensor", lr=0.0)


@dataclasses.dataclass
class Inputs:
    params: list[Tensor]
    grads: list[Tensor]
    momentums: list[Tensor]
    seconds: list[Tensor]
    latents: list[Tensor]
    scales: list[Tensor]
    steps: list[Tensor]
    hyper: Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def changing(self) -> list[Tensor]:
        return [*self.params, *self.momentums, *self.seconds, *self.latents, *self.steps]


def make(
    case: Case,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    offset: int = 0,
) -> Inputs:
    """Random tensors, the same for the same arguments, ``offset`` elements into their storage."""
    generator = torch.Generator().manual_seed(len(shapes))

    def tensors(make_one: Callable[[tuple[int, ...]], Tensor], wanted: bool = True) -> list[Tensor]:
        out = []
        for shape in shapes if wanted else ():
            values = make_one(shape)
            storage = torch.empty(values.numel() + offset, dtype=values.dtype, device=device)
            out.append(storage[offset:].view(values.shape).copy_(values))
        return out

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    def scale(shape: tuple[int, ...]) -> Tensor:
        groups = -(-shape[1:].numel() // GROUP_SIZE) if isinstance(shape, torch.Size) else 0
        size = {"tensor": (1,), "channel": (shape[0],), "group": (shape[0], groups)}[case.scale]
        return torch.rand(size, generator=generator) + 0.5

    def one(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor([value], device=device)

    numbers = [case.lr, case.momentum, BETA2, ADAM_EPS, case.weight_decay, case.epsilon, case.rate, case.cap]
    return Inputs(
        params=[p.to(dtype) for p in tensors(lambda shape: normal(shape).clamp(-1, 1))],
        grads=[g.to(dtype) for g in tensors(normal)],
        momentums=tensors(normal, case.direction != "plain"),
        seconds=tensors(lambda shape: normal(shape).square(), case.direction == "adam"),
        latents=tensors(normal, case.rule == "askew_memory"),
        scales=[scale(torch.Size(shape)).to(device) for shape in shapes if case.rule != "base"],
        steps=[torch.tensor(3.0, device=device) for _ in shapes if case.direction == "adam"],
        hyper=torch.tensor([*numbers, BOUND, 1.0, 0.0, 0.0], dtype=torch.float64),
        grad_scale=one(case.grad_scale),
        found_inf=one(case.found_inf),
    )


def run(fused_step: Callable[..., Any], case: Case, inputs: Inputs) -> None:
    """Calls the operator, or a function of the same arguments."""
    fused_step(
        case.rule,
        inputs.params,
        inputs.grads,
        inputs.momentums,
        inputs.seconds,
        inputs.latents,
        inputs.scales,
        [],
        inputs.steps,
        inputs.hyper,
        levels=case.levels,
        group_size=GROUP_SIZE,
        nesterov=case.direction == "nesterov",
        maximize=case.maximize,
        decoupled=case.decoupled,
        grad_scale=inputs.grad_scale,
        found_inf=inputs.found_inf,
    )


def check(case: Case, got: Inputs, before: Inputs) -> None:
    """Compares ``got``, the tensors after a step, with the reference in float64 from those ``before`` it."""
    lists = {
        name: [tensor.double() for tensor in getattr(before, name)]
        for name in ("params", "grads", "momentums", "seconds", "latents", "scales")
    }
    expected = dataclasses.replace(before, **lists)
    run(reference.fused_step, case, expected)
    for ours, theirs in zip(got.changing(), expected.changing(), strict=True):
        tolerance = {"rtol": 2e-5, "atol": 2e-5} if ours.dtype == torch.float32 else {}
        torch.testing.assert_close(ours.cpu(), theirs.to(ours.dtype), **tolerance)
