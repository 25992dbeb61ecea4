"""Steps of every rule as arguments of `quantopt::fused_step`, and how they are compared: what the tests of the CUDA and
the Triton kernels share."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quantopt.ops.step import RULES, hyper_tensor
from quantopt.reference import step as reference

SHAPES = ((5, 13, 3), (129,), (0, 4), (64, 32), (1,), (7, 1031))
GROUP_SIZE = 7
LATENT = ("askew_memory", "splitting", "alternating")
ADAM = ("base", "askew", "askew_gradient", "askew_memory")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    rule: str
    levels: int
    direction: str  # "plain", "momentum", "nesterov", "adam"
    scale: str  # "tensor", "channel", "group"
    dtype: torch.dtype = F32
    momentum_dtype: torch.dtype = F32
    master: bool = False
    seed: int = -1
    moving_levels: bool = False
    sigma: str = ""  # of the alternating rule: "tensor", "channel" or none
    hyper_on_device: bool = False
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
    kappa: float = 0.4
    lam: float = 0.0
    threshold: float = 0.02

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}".replace("torch.", "")
            for field in dataclasses.fields(self)[4:]
            if getattr(self, field.name) != field.default
        ]
        return "-".join([self.rule, str(self.levels), self.direction, self.scale, *changed])


def all_cases() -> Iterator[Case]:
    """Every rule, direction, grid and scale, then the types, then the options one by one."""
    for rule, direction in itertools.product(RULES, ("plain", "momentum", "nesterov", "adam")):
        if direction == "adam" and rule not in ADAM:
            continue
        if rule == "base":
            yield Case(rule, 2, direction, "tensor")
            continue
        for grid, scale in ((2, "tensor"), (2, "channel"), (4, "group"), (3, "channel"), (16, "tensor")):
            yield Case(rule, grid, direction, scale)
    for rule in RULES:
        direction = "adam" if rule in ADAM else "momentum"
        yield Case(rule, 2, "momentum", "tensor", decoupled=True)
        yield Case(rule, 2, direction, "channel", maximize=True, grad_scale=8.0, found_inf=0.0)
        yield Case(rule, 4, direction, "channel", found_inf=1.0)
        yield Case(rule, 4, direction, "channel", hyper_on_device=True)
    yield from typed_cases()
    for epsilon in (0.0, 1.0):
        yield Case("askew", 2, "momentum", "tensor", epsilon=epsilon)
        yield Case("askew_memory", 2, "momentum", "tensor", epsilon=epsilon, rate=math.inf)
    yield Case("askew_memory", 4, "nesterov", "group", rate=math.inf, hyper_on_device=True)
    yield Case("askew_gradient", 2, "momentum", "tensor", lr=0.0)
    for rule, (grid, scale) in itertools.product(
        ("splitting", "alternating"), ((2, "tensor"), (4, "channel"))
    ):
        yield Case(rule, grid, "momentum", scale, kappa=math.inf)
    for sigma in ("tensor", "channel"):
        yield Case("alternating", 2, "momentum", "tensor", sigma=sigma, lam=0.5)
        yield Case("alternating", 4, "momentum", "channel", sigma=sigma, kappa=math.inf)
    yield Case("prox", 4, "plain", "group", threshold=math.inf)
    yield from moving_cases()


def typed_cases() -> Iterator[Case]:
    for rule, dtype, momentum_dtype in itertools.product(RULES, (F32, BF16, F16), (F32, BF16)):
        for master in (False, True) if rule not in LATENT and dtype != F32 else (False,):
            if (dtype, momentum_dtype, master) == (F32, F32, False):
                continue
            grid, scale = (2, "tensor") if dtype == BF16 else (4, "channel")
            yield Case(rule, grid, "momentum", scale, dtype, momentum_dtype, master)
    for rule, momentum_dtype in itertools.product(RULES, (F32, BF16)):
        if rule in LATENT:
            continue
        direction = "adam" if rule in ADAM else "momentum"
        yield Case(rule, 2, "momentum", "tensor", BF16, momentum_dtype, seed=2**40 + 77)
        yield Case(rule, 4, direction, "channel", BF16, momentum_dtype, seed=5, hyper_on_device=True)
    yield Case("askew_memory", 2, "adam", "tensor", BF16, rate=math.inf)
    yield Case("base", 2, "plain", "tensor", F16)


def moving_cases() -> Iterator[Case]:
    for rule, grid, scale in itertools.product(("splitting", "alternating"), (2, 4), ("tensor", "channel")):
        yield Case(rule, grid, "momentum", scale, moving_levels=True)
    for rule, dtype in itertools.product(("splitting", "alternating"), (BF16, F16)):
        yield Case(rule, 2, "nesterov", "channel", dtype, BF16, moving_levels=True, hyper_on_device=True)
    yield Case("alternating", 2, "plain", "channel", sigma="channel", lam=0.5, moving_levels=True)
    yield Case("alternating", 2, "momentum", "channel", moving_levels=True, found_inf=1.0)


CASES = list(all_cases())


@dataclasses.dataclass
class Inputs:
    params: list[Tensor]
    grads: list[Tensor]
    momentums: list[Tensor]
    seconds: list[Tensor]
    latents: list[Tensor]
    scales: list[Tensor]
    sigmas: list[Tensor]
    steps: list[Tensor]
    hyper: Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def changing(self) -> list[Tensor]:
        return [*self.params, *self.momentums, *self.seconds, *self.latents, *self.scales, *self.steps]


def make(
    case: Case, shapes: Sequence[tuple[int, ...]] = SHAPES, device: str = "cpu", offset: int = 0
) -> Inputs:
    """Random tensors, the same for the same arguments, ``offset`` elements into their storage."""
    generator = torch.Generator().manual_seed(len(shapes))

    def tensors(
        make_one: Callable[[tuple[int, ...]], Tensor], dtype: torch.dtype = F32, wanted: bool = True
    ) -> list[Tensor]:
        out = []
        for shape in shapes if wanted else ():
            values = make_one(shape)
            storage = torch.empty(values.numel() + offset, dtype=dtype, device=device)
            out.append(storage[offset:].view(values.shape).copy_(values))
        return out

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    def scale(shape: tuple[int, ...], kind: str) -> Tensor:
        groups = -(-math.prod(shape[1:]) // GROUP_SIZE)
        size = {"tensor": (1,), "channel": (shape[0],), "group": (shape[0], groups)}[kind]
        if case.moving_levels and len(shape) == 1:
            size = (1,)  # one channel
        return (torch.rand(size, generator=generator) + 0.5).to(device)

    def one(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor([value], device=device)

    hyper = hyper_tensor(
        lr=case.lr, momentum=case.momentum, beta2=0.99, adam_eps=1e-8, weight_decay=case.weight_decay,
        epsilon=case.epsilon, rate=case.rate, cap=case.cap, bound=1.5, kappa=case.kappa, lam=case.lam,
        threshold=case.threshold,
    )  # fmt: skip
    adam = case.direction == "adam"
    return Inputs(
        params=tensors(lambda shape: normal(shape).clamp(-1, 1), case.dtype),
        grads=tensors(normal, case.dtype),
        momentums=tensors(normal, case.momentum_dtype, case.direction != "plain"),
        seconds=tensors(lambda shape: normal(shape).square(), wanted=adam),
        latents=tensors(normal, wanted=case.rule in LATENT or case.master),
        scales=[scale(shape, case.scale) for shape in shapes if case.rule != "base"],
        sigmas=[scale(shape, case.sigma) for shape in shapes if case.sigma],
        steps=[torch.tensor(3.0, device=device) for _ in shapes if adam or case.seed >= 0],
        hyper=hyper.to(device) if case.hyper_on_device else hyper,
        grad_scale=one(case.grad_scale),
        found_inf=one(case.found_inf),
    )


def to_cpu(inputs: Inputs) -> Inputs:
    lists = {
        field.name: [t.cpu() for t in getattr(inputs, field.name)] for field in dataclasses.fields(inputs)[:8]
    }
    return dataclasses.replace(inputs, **lists)


def options(case: Case) -> dict[str, Any]:
    return dict(
        levels=case.levels,
        group_size=GROUP_SIZE,
        moving_levels=case.moving_levels,
        nesterov=case.direction == "nesterov",
        maximize=case.maximize,
        decoupled=case.decoupled,
        seed=case.seed,
    )


def run(fused_step: Callable[..., Any], case: Case, inputs: Inputs) -> None:
    """Calls the operator, or a function of the same arguments."""
    lists = [getattr(inputs, field.name) for field in dataclasses.fields(inputs)[:9]]
    fused_step(case.rule, *lists, **options(case), grad_scale=inputs.grad_scale, found_inf=inputs.found_inf)


def check(case: Case, got: Inputs, before: Inputs) -> None:
    """Compares ``got``, the tensors after a step, with the reference in float64 from those ``before`` it."""
    names = ("params", "grads", "momentums", "seconds", "latents", "scales", "sigmas")
    lists = {name: [tensor.double() for tensor in getattr(before, name)] for name in names}
    expected = dataclasses.replace(before, **lists)
    run(reference.fused_step, dataclasses.replace(case, seed=-1), expected)
    for ours, theirs in zip(got.changing(), expected.changing(), strict=True):
        if ours.dtype == F32:
            torch.testing.assert_close(ours.cpu(), theirs.float(), rtol=5e-5, atol=2e-5)
        else:  # a unit in the last place, by either way of rounding
            unit = {BF16: 2**-7, F16: 2**-10}[ours.dtype]
            torch.testing.assert_close(ours.cpu().double(), theirs, rtol=unit, atol=2e-5)
    if case.found_inf != 1.0 and case.lr != 0.0:
        pairs = zip(got.params, before.params, strict=True)
        changed = [not torch.equal(ours.cpu(), old) for ours, old in pairs if ours.numel()]
        assert all(changed), "the step changed nothing"


def same(ours: Inputs, expected: Inputs) -> bool:
    pairs = zip(ours.changing(), expected.changing(), strict=True)
    return all(torch.equal(got.cpu(), want) for got, want in pairs)


def random_launches(count: int) -> Iterator[tuple[Case, list[tuple[int, ...]], int]]:
    """Cases, shapes of a list, offsets in memory."""
    choice = random.Random(0)
    cases = [case for case in CASES if case.found_inf is None]
    for _ in range(count):
        shapes: list[tuple[int, ...]] = []
        for _ in range(choice.randint(1, 12)):
            rows = choice.choice([1, 2, 5, 64])
            shapes.append((rows, choice.choice([1, 8, 27, 576, 1000, 4608]) if rows < 64 else 27))
        yield choice.choice(cases), shapes, choice.choice([0, 0, 1, 4])
