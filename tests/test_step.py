"""The op quantopt::fused_step on the CPU against the reference: every rule on every base, dtype, layout and
instruction set."""

import dataclasses
import itertools
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import force_isa
from quantopt import _extension
from quantopt.ops.step import fused_step, hyper_tensor
from quantopt.reference.step import fused_step as reference_step
from quantopt.rules import BASES, HYPER, RULES, StepRecord
from step_cases import (
    BF16,
    DYNAMIC,
    F16,
    F32,
    PRINTED,
    QUANTISED,
    Case,
    changing,
    check_frozen,
    frozen_cases,
    make,
    map_lists,
)

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))

SIZES = (0, 1, 7, 15, 16, 17, 129, 1000003)
LATENT = [name for name, rule in RULES.items() if rule.latent]


def copied(record: StepRecord) -> StepRecord:
    return map_lists(record, Tensor.clone)


def run_both(record: StepRecord) -> tuple[StepRecord, StepRecord]:
    """The op's result, and the float64 reference's from the same numbers."""
    ours, exact = copied(record), map_lists(record, Tensor.double, keep=("steps",))
    fused_step(ours, backend="cpu")
    reference_step(exact)
    return ours, exact


def check(case: Case, shapes: Sequence[tuple[int, ...]], atol: float = 1e-5, rtol: float = 5e-5) -> None:
    before = make(case, shapes)
    for p in before.params:
        p.mul_(1.5)  # some lie beyond the outer levels
    ours, exact = run_both(before)
    for i, (a, b) in enumerate(zip(changing(ours), changing(exact), strict=True)):
        off = ((a - b).abs() > atol + rtol * b.abs()).sum()
        # one weight in 2e5 may lie so near a tie that float32 takes the other level
        assert int(off) <= a.numel() // 200_000, f"tensor {i}: {int(off)} of {a.numel()} differ"
    pairs = zip(ours.params, before.params, strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs if a.numel()), "the step changed nothing"


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_base_and_grid(rule: str, levels: int, isa: str) -> None:
    for base, momentum in (*((base, 0.9) for base in BASES), ("sgd", 0.0)):
        check(Case(rule, levels, base, "tensor", momentum=momentum), [(129,), (3, 17), (64,)])
    check(Case(rule, levels, "sgd", "tensor", nesterov=True, maximize=True, decoupled=True), [(3, 17)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_every_size(rule: str, size: int) -> None:
    case = Case(rule, 2, "sgd", "tensor")
    if size:
        check(case, [(size,)])
    else:
        ours, _ = run_both(make(case, [(0,), (3, 0)]))
        assert ours.params[0].numel() == 0


@pytest.mark.parametrize("rule", RULES)
def test_sizes_around_blocks_and_chunks_on_every_isa(rule: str, isa: str) -> None:
    sizes = (1, 7, 15, 16, 17, 31, 127, 128, 129, 511, 513, 16383, 16385, 40000)
    check(Case(rule, 2, "sgd", "tensor"), [(n,) for n in sizes])


@pytest.mark.parametrize("scale", ["channel", "group"])
@pytest.mark.parametrize("rule", QUANTISED)
def test_scales_per_channel_and_group(rule: str, scale: str, isa: str) -> None:
    check(Case(rule, 4, "sgd", scale), [(5, 13, 3), (2, 9), (7, 1), (3, 20000)])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", DYNAMIC)
@pytest.mark.parametrize("latent_bound", ["", "channel"])
def test_dynamic_scales(rule: str, base: str, latent_bound: str, isa: str) -> None:
    if rule == "splitting" and latent_bound:
        pytest.skip("the splitting has no latent bound")
    case = Case(rule, 2, base, "channel", latent_bound=latent_bound, dynamic_scale=True)
    check(case, [(5, 13, 3), (3, 20000), (1000, 7), (2, 16384), (1, 5)])
    check(Case(rule, 2, base, "tensor", dynamic_scale=True), [(33,), (40001,)])


@pytest.mark.parametrize(
    "hyper",
    [dict(kappa=0.0), dict(kappa=math.inf), dict(kappa=1e4), dict(lam=0.5), dict(weight_decay=0.0)],
)
@pytest.mark.parametrize("rule", ["splitting", "alternating"])
def test_relaxation_extremes(rule: str, hyper: dict[str, Any]) -> None:
    check(Case(rule, 2, "sgd", "tensor", **hyper), [(65,), (4, 9)])
    check(Case(rule, 4, "sgd", "tensor", **hyper), [(65,), (4, 9)])


@pytest.mark.parametrize(
    "hyper",
    [
        dict(),
        dict(epsilon=0.0),
        dict(epsilon=1.0),
        dict(rate=0.0),
        dict(cap=0.01),
        dict(lr=1e6),
        dict(decoupled=True),
    ],
)
@pytest.mark.parametrize("rule", PRINTED)
def test_askew_as_printed(rule: str, hyper: dict[str, Any], isa: str) -> None:
    for (base, momentum), levels in itertools.product((("sgd", 0.9), ("sgd", 0.0), ("adam", 0.9)), (2, 3, 4)):
        case = Case(rule, levels, base, "channel", momentum=momentum, bound=math.inf, **hyper)
        check(case, [(5, 13, 3), (129,), (2, 9), (7, 1)], rtol=1e-4)


@pytest.mark.parametrize(
    "hyper",
    [
        dict(epsilon=0.0), dict(epsilon=1.0), dict(rate=0.0), dict(cap=0.5), dict(lr=1e6),
        dict(epsilon=1e-8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["askew", "askew_gradient", "askew_memory"])
def test_constraint_extremes(rule: str, hyper: dict[str, Any], isa: str) -> None:
    check(Case(rule, 2, "sgd", "tensor", **hyper), [(65,), (4, 9)])


def test_memory_with_an_infinite_rate_is_the_exact_projection() -> None:
    case = Case("askew_memory", 2, "sgd", "tensor", rate=math.inf)
    check(case, [(1000,)])
    ours, _ = run_both(make(case, [(1000,)]))
    t = ours.params[0] / ours.scales[0]
    assert float(t.abs().min()) >= math.sqrt(1 - math.sqrt(0.3)) - 1e-6


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", list(frozen_cases()), ids=str)
def test_a_step_with_lr_0_changes_momentum_alone(case: Case, backend: str) -> None:
    """The same momentum as at another lr, but for the form that bends the gradient by rate / lr."""
    shapes = [(5, 13, 3), (129,), (2, 20000)]
    before = make(case, shapes)
    frozen, moved = copied(before), make(dataclasses.replace(case, lr=0.1), shapes)
    for record in (frozen, moved):
        record.grads[0][0, 0, 0] = math.inf
        fused_step(record, backend=backend)
    check_frozen(frozen, before)
    if case.rule != "askew_gradient":
        for name in ("momentum_buffers", "exp_avg_sqs", "steps"):
            for a, b in zip(getattr(frozen, name), getattr(moved, name), strict=True):
                assert torch.equal(a, b)


def test_a_frozen_step_of_a_plan_leaves_the_next_one_as_it_was() -> None:
    """Also where the scales are dynamic, whose new values lie in a buffer during a step."""
    case = Case("alternating", 2, "sgd", "channel", dynamic_scale=True)
    planned, plain = (make(case, [(5, 13, 3), (3, 20000)]) for _ in range(2))
    plan = _extension.StepPlan(planned)
    for lr in (0.1, 0.0, 0.1):
        for record in (planned, plain):
            record.hyper[HYPER.index("lr")] = lr
        assert plan.valid(list(planned.grads))
        plan.step()
        fused_step(plain, backend="cpu")
        assert all(map(torch.equal, changing(planned), changing(plain)))


def test_prox_with_an_infinite_threshold_gives_levels() -> None:
    ours, _ = run_both(make(Case("prox", 2, "sgd", "tensor", threshold=math.inf), [(100,)]))
    torch.testing.assert_close(ours.params[0].abs(), ours.scales[0].expand(100))


@pytest.mark.parametrize(
    ("rule", "bound"), [*((rule, 1.5) for rule in RULES), *((rule, math.inf) for rule in PRINTED)]
)
def test_adversarial_values(rule: str, bound: float, isa: str) -> None:
    """Levels, their neighbours, zeros of both signs, denormals, huge and non-finite gradients."""
    tiny = torch.finfo(torch.float32).smallest_normal
    t_star = math.sqrt(1 - math.sqrt(0.3))
    w = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, t_star, -t_star, 1.0000001, 0.9999999, tiny / 8, -tiny / 8, 3.0, -3.0, 0.5]
    )
    g = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, math.inf, -math.inf, math.nan, tiny / 8])
    w, g = (x.reshape(-1).contiguous() for x in torch.meshgrid(w, g, indexing="ij"))
    for momentum in (0.0, 0.9):
        record = make(Case(rule, 2, "sgd", "tensor", momentum=momentum, bound=bound), [tuple(w.shape)])
        record = record._replace(
            params=[w.clone()],
            grads=[g.clone()],
            momentum_buffers=[torch.zeros_like(w)] if momentum else [],
            latents=[w.clone()] if record.latents else [],
            scales=[torch.ones(1)] if record.scales else [],
        )
        ours, single = copied(record), copied(record)
        fused_step(ours, backend="cpu")
        reference_step(single)
        for a, b in zip(changing(ours), changing(single), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, equal_nan=True)
        if RULES[rule].quantised:
            assert torch.isfinite(ours.params[0][torch.isfinite(g)]).all()
        assert torch.isnan(ours.params[0][torch.isnan(g)]).all(), "a NaN gradient must be seen in the weights"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", RULES)
def test_instruction_sets_and_threads_agree_bit_for_bit(
    rule: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dynamic = RULES[rule].dynamic_scale
    case = Case(rule, 2 if dynamic else 4, base, "channel", dynamic_scale=dynamic)
    results = []
    for name, threads in [("portable", 1), ("avx2", 1), ("avx512", 1), ("", 2), ("", 1)]:
        if name and not torch.ops.quantopt.cpu_isa_supported(name):
            continue
        force_isa(monkeypatch, name)
        record = make(case, [(5, 13, 3), (3, 50021), (3, 30000)])
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                fused_step(record, backend="cpu")
        finally:
            torch.set_num_threads(before)
        results.append(changing(record))
    assert len(results) >= 3
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# ---- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rule", RULES)
def test_parameter_and_momentum_dtypes(
    rule: str, dtype: torch.dtype, momentum_dtype: torch.dtype, isa: str
) -> None:
    """Equal to the float32 reference on the widened numbers, up to one rounding where a sum falls the other way."""
    masters = {False, dtype != F32 and not RULES[rule].latent}
    for master, base in itertools.product(masters, ("sgd", "adam")):
        ours = make(Case(rule, 2, base, "tensor", dtype, momentum_dtype, master), [(1027,), (3, 9)])
        theirs = copied(ours)
        fused_step(ours, backend="cpu")
        reference_step(theirs)
        for a, b in zip(changing(ours), changing(theirs), strict=True):
            assert a.dtype == b.dtype
            step = {F32: 1e-5, BF16: 2**-7, F16: 2**-10}[a.dtype]
            torch.testing.assert_close(a.float(), b.float(), atol=1e-6, rtol=step)
            if a.dtype != F32 and a.numel():
                assert float((a != b).float().mean()) < 0.01


def test_stochastic_rounding_is_that_of_the_reference(isa: str) -> None:
    ours = make(Case("askew", 2, "sgd", "tensor", BF16, BF16, seed=2**40 + 77), [(1,), (129,), (3, 4099)])
    theirs, nearest = copied(ours), copied(ours)._replace(seed=-1)
    fused_step(ours, backend="cpu")
    reference_step(theirs)
    for a, b in zip(ours.params, theirs.params, strict=True):
        assert float((a != b).float().mean()) < 2e-3  # a different last bit before rounding
        torch.testing.assert_close(a.float(), b.float(), atol=0, rtol=2**-7)
    fused_step(nearest, backend="cpu")
    assert float((nearest.params[2] != ours.params[2]).float().mean()) > 0.1


def test_stochastic_rounding_keeps_the_mean_and_repeats() -> None:
    # lr: an eighth of the distance of neighbours below 1, at which rounding to nearest stalls
    case = Case("none", 2, "given", "tensor", BF16, lr=0.001, weight_decay=0.0, seed=5)
    ones = make(case, [(200000,)])
    ones.params[0].fill_(1.0)
    ones.grads[0].fill_(1.0)
    ones.steps[0].fill_(0.0)
    stalled = copied(ones)._replace(seed=-1)
    fused_step(stalled, backend="cpu")
    assert torch.equal(stalled.params[0], ones.params[0])
    first, again = copied(ones), copied(ones)
    fused_step(first, backend="cpu")
    assert float(first.params[0].double().mean()) == pytest.approx(0.999, abs=3e-5)
    fused_step(again, backend="cpu")
    assert torch.equal(again.params[0], first.params[0])
    fused_step(again, backend="cpu")  # the next step
    assert float(again.params[0].double().mean()) == pytest.approx(0.998, abs=5e-5)


# ---- options -------------------------------------------------------------------------------------------------------


def test_grad_scaler_tensors_are_consumed_in_the_step() -> None:
    record = make(Case("askew", 2, "sgd", "tensor"), [(1000,)])
    scaled = copied(record)._replace(
        grads=[g * 1024 for g in record.grads], grad_scale=torch.tensor(1024.0), found_inf=torch.tensor(0.0)
    )
    fused_step(record, backend="cpu")
    fused_step(scaled, backend="cpu")
    assert torch.equal(record.params[0], scaled.params[0])
    assert torch.equal(record.momentum_buffers[0], scaled.momentum_buffers[0])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", RULES)
def test_found_inf_leaves_everything_as_it_was(rule: str, base: str) -> None:
    record = make(Case(rule, 2, base, "tensor"), [(100,), (3, 4)])
    record = record._replace(
        grads=[torch.full_like(g, math.inf) for g in record.grads], found_inf=torch.tensor(1.0)
    )
    before = copied(record)
    fused_step(record, backend="cpu")
    for a, b in zip(changing(record), changing(before), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule: str, base: str) -> None:
    record = make(Case(rule, 2, base, "tensor", grad_scale=2.0, found_inf=0.0), [(33,), (3, 7)])
    torch.library.opcheck(torch.ops.quantopt.fused_step.default, tuple(record))


Change = Callable[[StepRecord], StepRecord]


def put(name: str, value: Tensor, index: int = 1) -> Change:
    def change(record: StepRecord) -> StepRecord:
        tensors = list(getattr(record, name))
        tensors[index] = value
        return record._replace(**{name: tensors})

    return change


def replace(**values: Any) -> Change:
    return lambda record: record._replace(**values)


TWO = [torch.ones(6, 5), torch.ones(7)]
MISFITS: list[tuple[type[Exception], str, Change]] = [
    (ValueError, r"unknown rule 'frobnicate'; use one of none, askew", replace(rule="frobnicate")),
    (ValueError, r"unknown base 'lion'; use one of sgd, adam, given", replace(base="lion")),
    (ValueError, r"grads\[1\].*shape", put("grads", torch.zeros(8))),
    (ValueError, "momentum_buffers.*tensors for 2", lambda r: r._replace(momentum_buffers=r.momentum_buffers[:1])),
    (TypeError, r"grads\[1\].*dtype|grads.*Double", put("grads", torch.zeros(7, dtype=torch.float64))),
    (ValueError, r"scales\[1\].*shape", put("scales", torch.ones(3))),
    (ValueError, r"grads\[0\] has strides", put("grads", torch.zeros(5, 6).t(), 0)),
    (TypeError, r"latent_bounds\[0\] must be float32, one,", replace(latent_bounds=[torch.ones(4), torch.ones(1)])),
    (ValueError, "levels must be", replace(levels=5)),
    (ValueError, "'given'.*pass no momentum_buffers", replace(base="given")),
    (ValueError, "'sgd'.*pass no exp_avg_sqs", replace(exp_avg_sqs=TWO)),
    (ValueError, "exp_avg_sqs has 0 tensors for 2", replace(base="adam", steps=[torch.zeros(())] * 2)),
    (
        ValueError,
        "momentum_buffers has 0 tensors for 2",
        replace(base="adam", momentum_buffers=[], exp_avg_sqs=TWO, steps=[torch.zeros(())] * 2),
    ),
    (ValueError, "steps has 0 tensors for 2", replace(base="adam", exp_avg_sqs=TWO)),
    (
        TypeError,
        r"exp_avg_sqs\[1\] must be float32",
        replace(base="adam", exp_avg_sqs=[TWO[0], TWO[1].double()], steps=[torch.zeros(())] * 2),
    ),
    (ValueError, "latents has 0 tensors for 2", replace(rule="splitting")),
    (ValueError, "stochastic.*seed=-1", replace(seed=3, steps=[torch.zeros(())] * 2)),
    (ValueError, "no dynamic scale; pass dynamic_scale=False", replace(dynamic_scale=True)),
    (ValueError, "found_inf must be one float32", replace(found_inf=torch.zeros(0))),
    (ValueError, "grad_scale must be one float32", replace(grad_scale=torch.ones(1).double())),
    (ValueError, f"float64 tensor of {len(HYPER)} numbers", lambda r: r._replace(hyper=r.hyper[:-1])),
]  # fmt: skip


@pytest.mark.parametrize("misfit", range(len(MISFITS)))
def test_nothing_is_changed_by_arguments_that_do_not_fit(misfit: int) -> None:
    error, text, change = MISFITS[misfit]
    record = change(make(Case("askew", 2, "sgd", "tensor"), [(6, 5), (7,)]))
    before = copied(record)
    with pytest.raises(error, match=text):
        fused_step(record, backend="cpu")
    for a, b in zip(changing(record), changing(before), strict=True):
        assert torch.equal(a, b)


def test_a_dynamic_scale_is_not_per_group() -> None:
    record = make(Case("splitting", 2, "sgd", "group", dynamic_scale=True), [(3, 20)])
    with pytest.raises(ValueError, match=r"scales\[0\] has shape .*one per tensor or channel"):
        fused_step(record, backend="cpu")


def test_an_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    force_isa(monkeypatch, "sse9")
    with pytest.raises(RuntimeError, match="QUANTOPT_CPU_ISA"):
        fused_step(make(Case("askew", 2, "sgd", "tensor"), [(4,)]), backend="cpu")


def test_an_unknown_hyper_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        hyper_tensor(learning_rate=1.0)


def test_indices_beyond_32_bits(tmp_path: Path) -> None:
    """A tensor of over 2^33 elements of which only the last thousand exist (tests/large_index.cpp)."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = Path(__file__).parents[1]
    flags = ["-O1", "-std=c++20", "-Wno-psabi", "-DQUANTOPT_ISA=portable", f"-I{root / 'csrc'}"]
    program = tmp_path / "large_index"
    subprocess.run([compiler, *flags, root / "tests/large_index.cpp", "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True).stdout == "equal\n"


@pytest.mark.parametrize("rule", LATENT)
@pytest.mark.parametrize("offset", [0, 1])
def test_weights_stored_past_the_caches_are_the_same(isa: str, rule: str, offset: int) -> None:
    """From 4M elements on, latent rules do not read the lines of the weights that they write."""
    n = (4 << 20) + 37
    case = Case(rule, 2, "sgd", "tensor", rate=math.inf)
    whole = make(case, [(n,)], offset=offset)
    pieces = [
        map_lists(whole, lambda t, a=a: t[a : a + n // 3].clone(), keep=("scales",))
        for a in range(0, n, n // 3)
    ]  # fmt: skip
    for record in (whole, *pieces):
        fused_step(record)
    for i, t in enumerate(changing(whole)):
        if t.numel() > 1:
            assert torch.equal(t, torch.cat([changing(piece)[i] for piece in pieces]))
