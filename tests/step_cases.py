"""Records of steps with every rule on every base, and how results are compared: shared by the tests of the CUDA and the
Triton kernels."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quantopt.ops.step import hyper_tensor
from quantopt.reference import levels as grid
from quantopt.reference import stam
from quantopt.reference import step as reference
from quantopt.rules import BASES, HYPER, RULES, StepRecord

SHAPES = ((5, 13, 3), (129,), (0, 4), (64, 32), (1,), (7, 1031))
GROUP_SIZE = 7
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
QUANTISED = [name for name, rule in RULES.items() if rule.quantised]
PRINTED = ("askew", "askew_gradient")  # with an infinite bound
DYNAMIC = [name for name, rule in RULES.items() if rule.dynamic_scale]


@dataclasses.dataclass(frozen=True)
class Case:
    rule: str
    levels: int
    base: str  # of BASES; "sgd" has momentum buffers unless momentum is 0
    scale: str  # "tensor", "channel", "group"
    dtype: torch.dtype = F32
    momentum_dtype: torch.dtype = F32
    master: bool = False
    seed: int = -1
    dynamic_scale: bool = False
    latent_bound: str = ""  # of the alternating rule: "tensor", "channel", "group" or none
    group_size: int = GROUP_SIZE
    hyper_on_device: bool = False
    nesterov: bool = False
    decoupled: bool = False
    maximize: bool = False
    grad_scale: float | None = None
    found_inf: float | None = None
    exp_avg_sq_dtype: torch.dtype = F32
    # the fields of HYPER
    lr: float = 0.1
    momentum: float = 0.9
    beta2: float = 0.99
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    epsilon: float = 0.3
    rate: float = 0.1
    cap: float = 0.25
    bound: float = 1.5
    kappa: float = 0.4
    lam: float = 0.0
    threshold: float = 0.02

    @property
    def has_momentum(self) -> bool:
        return self.base == "adam" or (self.base == "sgd" and self.momentum != 0)

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}".replace("torch.", "")
            for field in dataclasses.fields(self)[4:]
            if getattr(self, field.name) != field.default
        ]
        return "-".join([self.rule, str(self.levels), self.base, self.scale, *changed])


def all_cases() -> Iterator[Case]:
    """Every rule, base, grid and kind of scale, then the dtypes, then the options one by one."""
    for rule, base in itertools.product(RULES, BASES):
        grids = ((2, "tensor"), (2, "channel"), (4, "group"), (3, "channel"), (16, "tensor"), (17, "channel"))
        for levels, scale in grids if RULES[rule].quantised else grids[:1]:
            yield Case(rule, levels, base, scale)
            if base == "sgd":
                yield Case(rule, levels, base, scale, nesterov=True)
                yield Case(rule, levels, base, scale, momentum=0.0)
    for rule in RULES:
        yield Case(rule, 2, "sgd", "tensor", decoupled=True)
        yield Case(rule, 2, "adam", "channel", maximize=True, grad_scale=8.0, found_inf=0.0)
        yield Case(rule, 4, "adam", "channel", found_inf=1.0)
        yield Case(
            rule, 2, "adam", "channel", adam_eps=0.5
        )  # of the size of the square roots that it is added to
        yield Case(rule, 4, "adam", "channel", hyper_on_device=True)
    yield from typed_cases()
    for epsilon in (0.0, 1.0):
        yield Case("askew", 2, "sgd", "tensor", epsilon=epsilon)
        yield Case("askew_memory", 2, "sgd", "tensor", epsilon=epsilon, rate=math.inf)
    yield Case("askew_memory", 4, "sgd", "group", nesterov=True, rate=math.inf, hyper_on_device=True)
    yield from printed_cases()
    for rule, (levels, scale) in itertools.product(
        ("splitting", "alternating"), ((2, "tensor"), (4, "channel"))
    ):
        yield Case(rule, levels, "sgd", scale, kappa=math.inf)
    for latent_bound in ("tensor", "channel"):
        yield Case("alternating", 2, "sgd", "tensor", latent_bound=latent_bound, lam=0.5)
        yield Case("alternating", 4, "sgd", "channel", latent_bound=latent_bound, kappa=math.inf)
    for levels, latent_bound, dtype in ((4, "group", F32), (3, "group", BF16), (8, "channel", F32)):
        yield Case("alternating", levels, "sgd", "group", dtype, latent_bound=latent_bound, bound=0.5)
    for levels, base in ((2, "sgd"), (4, "adam")):
        yield Case("splitting", levels, base, "channel", weight_decay=0.0)
    yield Case("prox", 4, "given", "group", threshold=math.inf)
    yield from dynamic_cases()
    yield from narrow_cases()
    yield from frozen_cases()


def printed_cases() -> Iterator[Case]:
    """AskewSGD as printed, whose weights may lie beyond the outer levels."""
    grids = ((2, "tensor"), (3, "channel"), (4, "group"), (16, "tensor"))
    for rule, base, (levels, scale) in itertools.product(PRINTED, BASES, grids):
        yield Case(rule, levels, base, scale, bound=math.inf)
    for rule in PRINTED:
        yield Case(rule, 2, "sgd", "tensor", bound=math.inf, decoupled=True, nesterov=True)
        yield Case(rule, 4, "adam", "channel", bound=math.inf, hyper_on_device=True)
        yield Case(rule, 2, "given", "channel", bound=math.inf, epsilon=0.0, lr=0.01)
        yield Case(rule, 2, "sgd", "tensor", bound=math.inf, epsilon=1.0)
        yield Case(rule, 4, "sgd", "channel", BF16, F32, master=True, bound=math.inf)
        yield Case(rule, 2, "sgd", "tensor", BF16, BF16, bound=math.inf)
        yield Case(rule, 2, "sgd", "tensor", BF16, bound=math.inf, seed=5)
        yield Case(rule, 4, "adam", "tensor", F16, BF16, bound=math.inf)
        yield Case(rule, 2, "adam", "tensor", bound=math.inf, lr=0.0)


def typed_cases() -> Iterator[Case]:
    for rule, dtype, momentum_dtype in itertools.product(RULES, (F32, BF16, F16), (F32, BF16)):
        for master in (False, True) if not RULES[rule].latent and dtype != F32 else (False,):
            if (dtype, momentum_dtype, master) == (F32, F32, False):
                continue
            levels, scale = (2, "tensor") if dtype == BF16 else (4, "channel")
            yield Case(rule, levels, "sgd", scale, dtype, momentum_dtype, master)
    for rule, momentum_dtype in itertools.product(RULES, (F32, BF16)):
        if RULES[rule].latent:
            continue
        yield Case(rule, 2, "sgd", "tensor", BF16, momentum_dtype, seed=2**40 + 77)
        yield Case(rule, 4, "adam", "channel", BF16, momentum_dtype, seed=5, hyper_on_device=True, lr=0.2)
    yield Case("askew_memory", 2, "adam", "tensor", BF16, rate=math.inf)
    yield Case("splitting", 4, "adam", "channel", BF16, BF16)
    yield Case("none", 2, "given", "tensor", F16)
    yield Case("alternating", 2, "given", "channel", BF16)


def dynamic_cases() -> Iterator[Case]:
    for rule, base in itertools.product(DYNAMIC, BASES):
        for levels, scale in itertools.product((2, 4), ("tensor", "channel", "group")):
            yield Case(rule, levels, base, scale, dynamic_scale=True)
    for rule, dtype, base, scale in itertools.product(
        DYNAMIC, (BF16, F16), ("sgd", "adam"), ("channel", "group")
    ):
        nesterov, momentum_dtype = base == "sgd", BF16 if scale == "channel" else F32
        yield Case(
            rule, 2, base, scale, dtype, momentum_dtype, dynamic_scale=True, nesterov=nesterov, hyper_on_device=True
        )  # fmt: skip
    for rule, size in itertools.product(DYNAMIC, (1, 8, 32, 300)):
        yield Case(rule, 2, "sgd", "group", momentum_dtype=BF16, dynamic_scale=True, group_size=size)
    yield Case("alternating", 2, "given", "channel", latent_bound="channel", lam=0.5, dynamic_scale=True)
    for latent_bound in ("tensor", "channel", "group"):
        yield Case(
            "alternating",
            2,
            "sgd",
            "group",
            latent_bound=latent_bound,
            lam=0.5,
            dynamic_scale=True,
            bound=0.5,
        )
    for scale in ("channel", "group"):
        yield Case("alternating", 2, "sgd", scale, dynamic_scale=True, found_inf=1.0)


def narrow_cases() -> Iterator[Case]:
    """exp_avg_sq in bfloat16."""
    low: dict[str, Any] = dict(exp_avg_sq_dtype=BF16)
    for rule, dtype in zip(RULES, itertools.cycle((F32, BF16)), strict=False):
        yield Case(rule, 2, "adam", "channel", dtype, dtype, **low)
    yield Case("askew_memory", 4, "adam", "group", BF16, BF16, rate=math.inf, **low)
    yield Case("none", 2, "adam", "tensor", BF16, F32, seed=5, hyper_on_device=True, lr=0.2, **low)
    yield Case("askew", 2, "adam", "tensor", BF16, BF16, seed=2**40 + 77, **low)
    yield Case("prox", 2, "adam", "tensor", BF16, master=True, **low)
    yield Case("none", 2, "adam", "tensor", F16, BF16, grad_scale=8.0, found_inf=0.0, **low)
    yield Case("askew", 2, "adam", "channel", BF16, found_inf=1.0, **low)
    yield Case("askew_memory", 2, "adam", "tensor", BF16, lr=0.0, **low)
    for rule, (dtype, size) in itertools.product(DYNAMIC, ((F32, 7), (BF16, 40), (BF16, 600))):
        yield Case(rule, 2, "adam", "group", dtype, dtype, dynamic_scale=True, group_size=size, **low)
    for rule, dtype in itertools.product(DYNAMIC, (F32, BF16)):
        yield Case(rule, 2, "adam", "channel", dtype, F32, dynamic_scale=True, hyper_on_device=True, **low)


def frozen_cases() -> Iterator[Case]:
    """lr = 0, where everything else would move the weights."""
    hard = dict(lr=0.0, kappa=math.inf, threshold=math.inf)
    for rule, base in itertools.product(RULES, BASES):
        yield Case(rule, 2, base, "tensor", **hard)
        yield Case(rule, 4, base, "group", hyper_on_device=True, **hard)
    for rule, dtype in itertools.product(RULES, (BF16, F16)):
        yield Case(rule, 2, "sgd", "channel", dtype, BF16, hyper_on_device=dtype == F16, **hard)
        if not RULES[rule].latent:
            yield Case(rule, 4, "sgd", "channel", dtype, master=True, hyper_on_device=dtype == BF16, **hard)
    for rule in RULES:
        if not RULES[rule].latent:
            yield Case(rule, 2, "adam", "tensor", BF16, seed=5, **hard)
            yield Case(rule, 2, "sgd", "tensor", BF16, BF16, seed=5, hyper_on_device=True, **hard)
    for rule, dtype in itertools.product(DYNAMIC, (F32, BF16)):
        for scale in ("channel", "group"):
            yield Case(rule, 2, "sgd", scale, dtype, dynamic_scale=True, **hard)
        yield Case(rule, 2, "adam", "channel", dtype, dynamic_scale=True, hyper_on_device=True, **hard)


CASES = list(all_cases())


def make(
    case: Case, shapes: Sequence[tuple[int, ...]] = SHAPES, device: str = "cpu", offset: int = 0
) -> StepRecord:
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
        groups = -(-math.prod(shape[1:]) // case.group_size)
        size = {"tensor": (1,), "channel": (shape[0],), "group": (shape[0], groups)}[kind]
        if case.dynamic_scale and len(shape) == 1:
            size = (1,)  # one channel
        return (torch.rand(size, generator=generator) + 0.5).to(device)

    def one(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor([value], device=device)

    def weights(shape: tuple[int, ...]) -> Tensor:
        w = normal(shape)
        if case.rule not in PRINTED or not math.isinf(case.bound):
            return w.clamp(-1, 1)
        w.view(-1)[::5] *= 0.0  # in the middle of a cell, where K is even
        return w

    rule, adam = RULES[case.rule], case.base == "adam"
    hyper = hyper_tensor(**{name: getattr(case, name) for name in HYPER})
    return StepRecord(
        rule=case.rule,
        base=case.base,
        params=tensors(weights, case.dtype),
        grads=tensors(normal, case.dtype),
        momentum_buffers=tensors(normal, case.momentum_dtype, case.has_momentum),
        exp_avg_sqs=tensors(lambda shape: normal(shape).square(), case.exp_avg_sq_dtype, adam),
        latents=tensors(normal, wanted=rule.latent or case.master),
        scales=[scale(shape, case.scale) for shape in shapes if rule.quantised],
        latent_bounds=[scale(shape, case.latent_bound) for shape in shapes if case.latent_bound],
        steps=[torch.tensor(3.0, device=device) for _ in shapes if adam or case.seed >= 0],
        hyper=hyper.to(device) if case.hyper_on_device else hyper,
        levels=case.levels,
        group_size=case.group_size,
        dynamic_scale=case.dynamic_scale,
        nesterov=case.nesterov,
        maximize=case.maximize,
        decoupled=case.decoupled,
        seed=case.seed,
        state_seed=-1 if case.exp_avg_sq_dtype == F32 else 2**41 + 5,
        grad_scale=one(case.grad_scale),
        found_inf=one(case.found_inf),
    )


def changing(record: StepRecord) -> list[Tensor]:
    """The tensors that a step writes."""
    return [
        *record.params, *record.momentum_buffers, *record.exp_avg_sqs, *record.latents, *record.scales, *record.steps
    ]  # fmt: skip


def map_lists(
    record: StepRecord, function: Callable[[Tensor], Tensor], keep: tuple[str, ...] = ()
) -> StepRecord:
    """The record with the function applied to the tensors of each list, but those named in ``keep``."""
    lists = {
        name: [function(tensor) for tensor in value]
        for name, value in record._asdict().items()
        if isinstance(value, list) and name not in keep
    }
    return record._replace(**lists)


def op(record: StepRecord) -> None:
    """The operator of the compiled kernels."""
    torch.ops.quantopt.fused_step(*record)


def check(case: Case, got: StepRecord, before: StepRecord) -> None:
    """Compares ``got``, the record after a step, with the float64 reference from ``before``, the record before it."""
    if case.lr == 0.0:
        check_frozen(got, before)
    expected = in_float64(before)
    reference.fused_step(expected)
    for ours, theirs in zip(changing(got), changing(expected), strict=True):
        if ours.dtype == F32:
            torch.testing.assert_close(ours.cpu(), theirs.float(), rtol=5e-5, atol=2e-5)
        else:  # a unit in the last place, by either way of rounding
            unit = {BF16: 2**-7, F16: 2**-10}[ours.dtype]
            torch.testing.assert_close(ours.cpu().double(), theirs, rtol=unit, atol=2e-5)
    if case.found_inf != 1.0 and case.lr != 0.0:
        pairs = zip(got.params, before.params, strict=True)
        changed = [not torch.equal(ours.cpu(), old) for ours, old in pairs if ours.numel()]
        assert all(changed), "the step changed nothing"


def check_frozen(got: StepRecord, before: StepRecord) -> None:
    """At lr = 0 weights, latents and scales keep their bits, and the momentum does not."""
    for name in ("params", "latents", "scales"):
        for ours, old in zip(getattr(got, name), getattr(before, name), strict=True):
            assert torch.equal(bits_of(ours), bits_of(old)), name
    for ours, old in zip(got.momentum_buffers, before.momentum_buffers, strict=True):
        assert ours.numel() == 0 or not torch.equal(ours.cpu(), old)


def bits_of(t: Tensor) -> Tensor:
    return t.cpu().view({2: torch.int16, 4: torch.int32}[t.itemsize])


def in_float64(record: StepRecord) -> StepRecord:
    """For the float64 reference. It reads the point of the splitting; of 16 bits it follows from the state."""
    exact = map_lists(record, Tensor.double, keep=("steps",))._replace(seed=-1, state_seed=-1)
    h = dict(zip(HYPER, record.hyper.tolist(), strict=True))
    if record.rule == "splitting" and record.params[0].dtype != F32 and h["lr"] != 0.0:
        for p, x, scale in zip(exact.params, exact.latents, exact.scales, strict=True):
            hi = grid.level_factor(record.levels) * grid.spread_over(scale, x, record.group_size)
            p.copy_(stam.box(x, hi, lr=h["lr"], weight_decay=h["weight_decay"]))
    return exact


def same(ours: StepRecord, expected: StepRecord) -> bool:
    pairs = zip(changing(ours), changing(expected), strict=True)
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
