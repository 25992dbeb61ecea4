"""The op quantopt::fused_step on the CPU against the reference, for every rule, dtype, layout and instruction set."""

import itertools
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import force_isa
from quantopt import _extension
from quantopt.ops.step import HYPER, RULES, fused_step, hyper_tensor
from quantopt.reference import rounding
from quantopt.reference.step import fused_step as reference_step

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))

SIZES = (0, 1, 7, 15, 16, 17, 129, 1000003)
LATENT = ("askew_memory", "splitting", "alternating")
ADAM = ("base", "askew", "askew_gradient", "askew_memory")
HYPERS = dict(
    lr=0.1, momentum=0.9, beta2=0.99, adam_eps=1e-8, weight_decay=0.03, epsilon=0.3, rate=0.1, cap=0.25, bound=1.5,
    kappa=0.4, lam=0.0, threshold=0.02,
)  # fmt: skip


def arguments(
    rule: str,
    shapes: list[tuple[int, ...]],
    direction: str = "momentum",
    *,
    dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype = torch.float32,
    master: bool = False,
    scale: str = "tensor",
    group_size: int = 5,
    sigma: bool = False,
    steps: bool = False,
    **hyper: float,
) -> list[Any]:
    """Random lists for the op: weights around the levels, all state filled."""
    generator = torch.Generator().manual_seed(1)

    def random(shape: tuple[int, ...], to: torch.dtype, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * factor).to(to)

    params = [random(s, dtype, 0.7) for s in shapes]
    grads = [random(s, dtype, 0.5) for s in shapes]
    momentums = [random(s, momentum_dtype, 0.5) for s in shapes] if direction != "plain" else []
    seconds = [random(s, torch.float32).square() for s in shapes] if direction == "adam" else []
    latents = [random(s, torch.float32, 0.9) for s in shapes] if rule in LATENT or master else []

    def scale_shape(s: tuple[int, ...]) -> tuple[int, ...]:
        row = math.prod(s[1:])
        return {"tensor": (1,), "channel": (s[0],), "group": (s[0], -(-row // group_size))}[scale]

    scales = [] if rule == "base" else [torch.rand(scale_shape(s), generator=generator) + 0.5 for s in shapes]
    sigmas = [torch.rand(s[0], generator=generator) + 0.5 for s in shapes] if sigma else []
    counters = [torch.full((), 3.0) for _ in shapes] if direction == "adam" or steps else []
    return [
        rule,
        params,
        grads,
        momentums,
        seconds,
        latents,
        scales,
        sigmas,
        counters,
        hyper_tensor(**(HYPERS | hyper)),
    ]


def copied(args: list[Any], dtype: torch.dtype | None = None) -> list[Any]:
    def copy(t: Tensor) -> Tensor:
        return t.to(dtype, copy=True) if dtype and t.is_floating_point() and t.dim() else t.clone()

    return [args[0], *([copy(t) for t in group] for group in args[1:9]), args[9].clone()]


def lists(args: list[Any]) -> list[Tensor]:
    return list(itertools.chain(*args[1:9]))


def run_both(args: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
    """The op's result, and the float64 reference's from the same numbers."""
    ours, exact = copied(args), copied(args, torch.float64)
    fused_step(*ours, backend="cpu", **options)
    reference_step(*exact, **options)
    return ours, exact


def check(args: list[Any], atol: float = 1e-5, rtol: float = 5e-5, **options: Any) -> None:
    ours, exact = run_both(args, **options)
    for i, (a, b) in enumerate(zip(lists(ours), lists(exact), strict=True)):
        off = ((a - b).abs() > atol + rtol * b.abs()).sum()
        # one weight in 2e5 may lie so near a tie that float32 takes the other level
        assert int(off) <= a.numel() // 200_000, f"tensor {i}: {int(off)} of {a.numel()} differ"
    changed = [not torch.equal(a, b) for a, b in zip(ours[1], args[1], strict=True) if a.numel()]
    assert all(changed), "the step changed nothing"


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_grid(rule: str, levels: int, isa: str) -> None:
    for direction in ("plain", "momentum", *(["adam"] if rule in ADAM else [])):
        check(arguments(rule, [(129,), (3, 17), (64,)], direction), levels=levels)
    check(arguments(rule, [(3, 17)]), levels=levels, nesterov=True, maximize=True, decoupled=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_every_size(rule: str, size: int) -> None:
    if size:
        check(arguments(rule, [(size,)]))
    else:
        ours, _ = run_both(arguments(rule, [(0,), (3, 0)]))
        assert ours[1][0].numel() == 0


@pytest.mark.parametrize("rule", RULES)
def test_sizes_around_blocks_and_chunks_on_every_isa(rule: str, isa: str) -> None:
    check(
        arguments(rule, [(n,) for n in (1, 7, 15, 16, 17, 31, 127, 128, 129, 511, 513, 16383, 16385, 40000)])
    )


@pytest.mark.parametrize("scale", ["channel", "group"])
@pytest.mark.parametrize("rule", [r for r in RULES if r != "base"])
def test_scales_per_channel_and_group(rule: str, scale: str, isa: str) -> None:
    check(arguments(rule, [(5, 13, 3), (2, 9), (7, 1), (3, 20000)], scale=scale), levels=4, group_size=5)


@pytest.mark.parametrize("rule", ["splitting", "alternating"])
@pytest.mark.parametrize("sigma", [False, True])
def test_moving_levels(rule: str, sigma: bool, isa: str) -> None:
    if rule == "splitting" and sigma:
        pytest.skip("the splitting has no latent bound")
    shapes = [(5, 13, 3), (3, 20000), (1000, 7), (2, 16384), (1, 5)]
    check(arguments(rule, shapes, scale="channel", sigma=sigma), moving_levels=True)
    check(arguments(rule, [(33,), (40001,)], scale="tensor"), moving_levels=True)


@pytest.mark.parametrize(
    "hyper", [dict(kappa=0.0), dict(kappa=math.inf), dict(kappa=1e4), dict(lam=0.5), dict(lr=0.0)]
)
@pytest.mark.parametrize("rule", ["splitting", "alternating"])
def test_relaxation_extremes(rule: str, hyper: dict[str, float]) -> None:
    check(arguments(rule, [(65,), (4, 9)], **hyper), levels=2)
    check(arguments(rule, [(65,), (4, 9)], **hyper), levels=4)


@pytest.mark.parametrize(
    "hyper",
    [
        dict(epsilon=0.0), dict(epsilon=1.0), dict(rate=0.0), dict(cap=0.5), dict(lr=0.0), dict(lr=1e6),
        dict(epsilon=1e-8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["askew", "askew_gradient", "askew_memory"])
def test_constraint_extremes(rule: str, hyper: dict[str, float], isa: str) -> None:
    check(arguments(rule, [(65,), (4, 9)], **hyper))


def test_memory_with_an_infinite_rate_is_the_exact_projection() -> None:
    args = arguments("askew_memory", [(1000,)], rate=math.inf)
    check(args)
    ours, _ = run_both(args)
    t = ours[1][0] / ours[6][0]
    assert float(t.abs().min()) >= math.sqrt(1 - math.sqrt(0.3)) - 1e-6


def test_prox_with_an_infinite_threshold_gives_levels() -> None:
    ours, _ = run_both(arguments("prox", [(100,)], threshold=math.inf))
    torch.testing.assert_close(ours[1][0].abs(), ours[6][0].expand(100))


@pytest.mark.parametrize("rule", RULES)
def test_adversarial_values(rule: str, isa: str) -> None:
    """Levels, their neighbours, zeros of both signs, denormals, huge and non-finite gradients."""
    tiny = torch.finfo(torch.float32).smallest_normal
    t_star = math.sqrt(1 - math.sqrt(0.3))
    w = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, t_star, -t_star, 1.0000001, 0.9999999, tiny / 8, -tiny / 8, 3.0, -3.0, 0.5]
    )
    g = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, math.inf, -math.inf, math.nan, tiny / 8])
    w, g = (x.reshape(-1).contiguous() for x in torch.meshgrid(w, g, indexing="ij"))
    for direction in ("plain", "momentum"):
        args = arguments(rule, [tuple(w.shape)], direction, weight_decay=0.01)
        args[1], args[2] = [w.clone()], [g.clone()]
        args[3] = [torch.zeros_like(w)] if direction == "momentum" else []
        args[5] = [w.clone()] if rule in LATENT else []
        if args[6]:
            args[6] = [torch.ones(1)]
        ours, single = copied(args), copied(args)
        fused_step(*ours, backend="cpu")
        reference_step(*single)
        for a, b in zip(lists(ours), lists(single), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, equal_nan=True)
        finite_gradient = torch.isfinite(g)
        if rule != "base":
            assert torch.isfinite(ours[1][0][finite_gradient]).all()
        assert torch.isnan(ours[1][0][torch.isnan(g)]).all(), "a NaN gradient must be seen in the weights"


@pytest.mark.parametrize("rule", RULES)
def test_instruction_sets_and_threads_agree_bit_for_bit(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(5, 13, 3), (50021,), (3, 30000)]
    moving = rule in ("splitting", "alternating")
    results = []
    for name, threads in [("portable", 1), ("avx2", 1), ("avx512", 1), (None, 2), (None, 1)]:
        if name and not torch.ops.quantopt.cpu_isa_supported(name):
            continue
        if name:
            force_isa(monkeypatch, name)
        else:
            force_isa(monkeypatch, "")
        args = arguments(rule, shapes, scale="tensor" if rule == "base" else "channel")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                fused_step(*args, backend="cpu", levels=2 if moving else 4, moving_levels=moving)
        finally:
            torch.set_num_threads(before)
        results.append(lists(args))
    assert len(results) >= 3
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# ---- types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_parameter_and_momentum_types(
    rule: str, dtype: torch.dtype, momentum_dtype: torch.dtype, isa: str
) -> None:
    """Equal to the float32 reference on the widened numbers, up to one rounding where a sum falls the other way."""
    for master in {False, dtype != torch.float32 and rule not in LATENT}:
        shapes = [(1027,), (3, 9)]
        args = arguments(rule, shapes, dtype=dtype, momentum_dtype=momentum_dtype, master=master)
        ours, theirs = copied(args), copied(args)
        fused_step(*ours, backend="cpu")
        reference_step(*theirs)
        for a, b in zip(lists(ours), lists(theirs), strict=True):
            assert a.dtype == b.dtype
            step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[a.dtype]
            torch.testing.assert_close(a.float(), b.float(), atol=1e-6, rtol=step)
            if a.dtype != torch.float32 and a.numel():
                assert float((a != b).float().mean()) < 0.01


def test_stochastic_rounding_is_that_of_the_reference(isa: str) -> None:
    shapes = [(1,), (129,), (3, 4099)]
    args = arguments("askew", shapes, dtype=torch.bfloat16, momentum_dtype=torch.bfloat16, steps=True)
    ours, theirs = copied(args), copied(args)
    fused_step(*ours, backend="cpu", seed=2**40 + 77)
    reference_step(*theirs, seed=2**40 + 77)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert float((a != b).float().mean()) < 2e-3  # a different last bit before rounding
        torch.testing.assert_close(a.float(), b.float(), atol=0, rtol=2**-7)
    nearest = copied(args)
    fused_step(*nearest, backend="cpu")
    assert float((nearest[1][2] != ours[1][2]).float().mean()) > 0.1


def test_stochastic_rounding_keeps_the_mean_and_repeats() -> None:
    n = 200000
    values = [torch.full((n,), 1.0, dtype=torch.bfloat16)]
    grads = [torch.full((n,), 1.0, dtype=torch.bfloat16)]
    step = [torch.zeros(())]
    hyper = hyper_tensor(
        lr=0.001
    )  # an eighth of the distance of neighbours below 1: rounding to nearest stalls
    stalled = [v.clone() for v in values]
    fused_step("base", stalled, grads, [], [], [], [], [], [], hyper, backend="cpu")
    assert torch.equal(stalled[0], values[0])
    first = [v.clone() for v in values]
    fused_step("base", first, grads, [], [], [], [], [], step, hyper, backend="cpu", seed=5)
    assert float(first[0].double().mean()) == pytest.approx(0.999, abs=3e-5)
    again = [v.clone() for v in values]
    fused_step("base", again, grads, [], [], [], [], [], [torch.zeros(())], hyper, backend="cpu", seed=5)
    assert torch.equal(again[0], first[0])
    fused_step("base", again, grads, [], [], [], [], [], step, hyper, backend="cpu", seed=5)  # the next step
    assert float(again[0].double().mean()) == pytest.approx(0.998, abs=5e-5)


def test_philox_known_answers() -> None:
    """Random123's published vectors for philox4x32-10."""
    zeros = rounding.philox(torch.zeros(1, dtype=torch.int64), 0, 0, 0)
    assert zeros.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    ones = rounding.philox(torch.tensor([-1]), 0xFFFFFFFF, 0xFFFFFFFF, 2**64 - 1)
    assert ones.tolist() == [[0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]]


# ---- options -----------------------------------------------------------------------------------------------------


def test_grad_scaler_tensors_are_consumed_in_the_step() -> None:
    args = arguments("askew", [(1000,)])
    scaled = copied(args)
    scaled[2] = [g * 1024 for g in scaled[2]]
    fused_step(*args, backend="cpu")
    fused_step(*scaled, backend="cpu", grad_scale=torch.tensor(1024.0), found_inf=torch.tensor(0.0))
    assert torch.equal(args[1][0], scaled[1][0]) and torch.equal(args[3][0], scaled[3][0])


@pytest.mark.parametrize("rule", RULES)
def test_found_inf_leaves_everything_as_it_was(rule: str) -> None:
    args = arguments(rule, [(100,), (3, 4)], direction="adam" if rule in ADAM else "momentum")
    before = copied(args)
    args[2] = [torch.full_like(g, math.inf) for g in args[2]]
    before[2] = args[2]
    fused_step(*args, backend="cpu", found_inf=torch.tensor(1.0))
    for a, b in zip(lists(args), lists(before), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule: str) -> None:
    args = arguments(rule, [(33,), (3, 7)], direction="adam" if rule in ADAM else "momentum")
    options = dict(levels=2, nesterov=False, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0))
    torch.library.opcheck(torch.ops.quantopt.fused_step.default, tuple(args), options)


def test_nothing_is_changed_by_arguments_that_do_not_fit() -> None:
    def attempt(error: type[Exception], text: str, change: Any, **options: Any) -> None:
        args = arguments("askew", [(6, 5), (7,)])
        change(args)
        before = copied(args)
        with pytest.raises(error, match=text):
            fused_step(*args, backend="cpu", **options)
        for a, b in zip(lists(args), lists(before), strict=True):
            assert torch.equal(a, b)

    def put(group: int, value: Any) -> Any:
        return lambda args: args[group].__setitem__(1, value)

    attempt(ValueError, "grads.*shape", put(2, torch.zeros(8)))
    attempt(ValueError, "momentums.*tensors for 2", lambda a: a[3].pop())
    attempt(TypeError, "grads.*dtype|grads.*Double", put(2, torch.zeros(7, dtype=torch.float64)))
    attempt(ValueError, "scales.*shape", put(6, torch.ones(3)))
    attempt(ValueError, "strides", lambda a: a[2].__setitem__(0, torch.zeros(5, 6).t()))
    attempt(ValueError, "levels must be", lambda a: None, levels=5)
    attempt(
        ValueError,
        "no Adam form",
        lambda a: a.__setitem__(0, "prox") or a.__setitem__(4, [torch.ones(6, 5), torch.ones(7)]),
    )
    attempt(ValueError, "stochastic", lambda a: a.__setitem__(8, [torch.zeros(()), torch.zeros(())]), seed=3)
    attempt(ValueError, "moving levels", lambda a: None, moving_levels=True)


def test_an_unknown_rule_or_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("askew", [(4,)])
    with pytest.raises(ValueError, match="unknown rule"):
        fused_step("frobnicate", *args[1:], backend="cpu")
    force_isa(monkeypatch, "sse9")
    with pytest.raises(RuntimeError, match="QUANTOPT_CPU_ISA"):
        fused_step(*args, backend="cpu")


def test_hyper_is_the_layout_of_the_kernels() -> None:
    with pytest.raises(ValueError, match="unknown"):
        hyper_tensor(learning_rate=1.0)
    args = arguments("base", [(4,)])
    args[9] = args[9][: len(HYPER) - 1]
    with pytest.raises(ValueError, match=f"float64 tensor of {len(HYPER)} numbers"):
        fused_step(*args, backend="cpu")


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
    whole = [torch.randn(n + offset)[offset:] * 0.5 for _ in range(4)]
    hyper = hyper_tensor(**HYPERS | {"rate": math.inf})
    scale = torch.full((1,), 0.7)

    def step(part: list[Tensor]) -> None:
        p, g, m, latent = part
        fused_step(rule, [p], [g], [m], [], [latent], [scale], [], [], hyper)

    pieces = [[t.clone()[a : a + n // 3] for t in whole] for a in range(0, n, n // 3)]
    step(whole)
    for piece in pieces:
        step(piece)
    for i, t in enumerate(whole):
        assert torch.equal(t, torch.cat([piece[i] for piece in pieces]))
