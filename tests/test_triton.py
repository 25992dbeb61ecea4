"""The Triton step: in Triton's interpreter against the reference and the CPU kernels, and compiled ahead of time."""

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import step_cases
from interpreted_kernels import interpreted_kernels
from quantopt import _extension
from quantopt.rules import BASES, HYPER, RULES, StepRecord

pytest.importorskip("triton")

CASES = list(step_cases.all_cases())
SHAPES = ((129,), (0, 4), (2, 3, 200))  # few, as the interpreter is slow


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """Modules of quantopt.kernels, loaded a second time with their kernels in Triton's interpreter."""
    names = ("rules", "step_tables", "step")
    with interpreted_kernels(*names) as loaded:
        yield dict(zip(names, loaded, strict=True))


@pytest.fixture(scope="module")
def interpreted(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["step"]


def comparable(case: step_cases.Case, record: StepRecord) -> list[torch.Tensor]:
    """What the interpreter computes as a GPU does: it truncates to bfloat16, where a GPU rounds to nearest."""
    if case.dtype == torch.bfloat16 and case.seed < 0:
        record = record._replace(params=[])
    if case.momentum_dtype == torch.bfloat16:
        record = record._replace(momentum_buffers=[])
    return step_cases.changing(record)


@pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gives_the_bits_of_the_cpu_kernel(interpreted: ModuleType, case: step_cases.Case) -> None:
    """But for the sums behind dynamic scales; those are compared with the reference."""
    ours, expected = (step_cases.make(case, SHAPES) for _ in range(2))
    interpreted.fused_step(ours)
    step_cases.check(case, ours, step_cases.make(case, SHAPES))
    step_cases.op(expected)
    assert all(map(torch.equal, ours.exp_avg_sqs, expected.exp_avg_sqs))
    if not case.dynamic_scale:
        pairs = zip(comparable(case, ours), comparable(case, expected), strict=True)
        assert all(torch.equal(got, want) for got, want in pairs)


@pytest.mark.parametrize("row", [1, 128, 129, 4096, 4097, 9000])
@pytest.mark.parametrize(("rule", "base"), [("splitting", "adam"), ("alternating", "sgd")])
def test_dynamic_scales_of_short_and_long_rows(
    interpreted: ModuleType, rule: str, base: str, row: int
) -> None:
    case = step_cases.Case(rule, 2, base, "channel", dynamic_scale=True)
    shapes = [(2, row), (1, row)]
    ours = step_cases.make(case, shapes)
    interpreted.fused_step(ours)
    step_cases.check(case, ours, step_cases.make(case, shapes))


@pytest.mark.parametrize("size", [1, 16, 128, 1000, 5000])
@pytest.mark.parametrize(("rule", "base"), [("splitting", "adam"), ("alternating", "sgd")])
def test_dynamic_scales_of_groups(interpreted: ModuleType, rule: str, base: str, size: int) -> None:
    bound = "group" if rule == "alternating" else ""
    case = step_cases.Case(
        rule, 2, base, "group", dynamic_scale=True, group_size=size, latent_bound=bound, bound=1.0
    )
    shapes = [(3, 9000)] if size > 4096 else [(2, 160), (3, 7, 5), (1, 33)]
    ours = step_cases.make(case, shapes)
    interpreted.fused_step(ours)
    step_cases.check(case, ours, step_cases.make(case, shapes))


def test_groups_of_one_channel(interpreted: ModuleType) -> None:
    case = step_cases.Case("alternating", 4, "sgd", "group", latent_bound="group", bound=0.5)
    ours = step_cases.make(case, [(1, 200)])
    interpreted.fused_step(ours)
    step_cases.check(case, ours, step_cases.make(case, [(1, 200)]))


def test_hard_proxquant_keeps_levels_where_the_step_overflows(interpreted: ModuleType) -> None:
    case = step_cases.Case("prox", 2, "given", "tensor", threshold=math.inf)
    record = step_cases.make(case, [(1, 64)])
    record.grads[0][0, :2] = torch.tensor([math.inf, -math.inf])
    interpreted.fused_step(record)
    assert torch.equal(record.params[0].abs(), record.scales[0].expand(1, 64))
    assert torch.equal(record.params[0][0, :2].sign(), torch.tensor([-1.0, 1.0]))


def expected_numbers(rule: str, hyper: torch.Tensor, before: bool) -> dict[str, float]:
    """As csrc/core derives them, in double precision."""
    h = dict(zip(HYPER, hyper.tolist(), strict=True))
    decay = h["lr"] * h["weight_decay"]
    return h | {
        "one_minus_beta1": 1 - h["momentum"],
        "one_minus_beta2": 1 - h["beta2"],
        "decay": 0.0 if before else h["weight_decay"],
        "shrink": (1 / (1 + decay) if rule == "splitting" else 1 - decay) if before else 1.0,
        "keep": 1 / (1 + h["kappa"]),
        "t_star": math.sqrt(1 - math.sqrt(h["epsilon"])),
        "t_end": 1 + math.sqrt(h["epsilon"]),
    }


@pytest.mark.parametrize("on_device", [False, True])
def test_numbers_are_derived_in_double_precision(modules: dict[str, ModuleType], on_device: bool) -> None:
    """From the tensor, or from arguments that the host read there."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def double(value: float) -> Any:  # as a launch on a GPU passes it; the interpreter would make it float32
        return tl.tensor(TensorHandle(np.array([value]), tl.float64), tl.float64)

    rules = modules["rules"]
    case = step_cases.Case("askew", 2, "sgd", "tensor", epsilon=0.37, lr=0.1, weight_decay=0.03)
    hyper = step_cases.make(case).hyper
    for rule, before in itertools.product(RULES, (False, True)):
        got = torch.empty(len(rules.Numbers._fields))
        values = hyper.tolist() if not on_device else [0.0] * len(HYPER)
        rules.derive_numbers_kernel[(1,)](
            got,
            hyper if on_device else None,
            **{name: double(value) for name, value in zip(HYPER, values, strict=True)},
            RULE=rule,
            DECAY_BEFORE_STEP=before,
        )
        expected = expected_numbers(rule, hyper, before)
        assert tuple(expected) == rules.Numbers._fields
        assert torch.equal(got, torch.tensor(list(expected.values())))


def test_tables_are_made_once_for_the_same_tensors(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, fused_step = modules["step_tables"], modules["step"].fused_step
    record = step_cases.make(step_cases.Case("askew", 4, "sgd", "channel"), [(3, 5)])
    tables._PLANS.clear()
    monkeypatch.setattr(tables, "_LIMIT", 3)
    for _ in range(3):
        fused_step(record)
    (plan,) = tables._PLANS.values()
    fused_step(record._replace(grads=list(record.grads), params=tuple(record.params)))
    assert list(tables._PLANS.values()) == [plan]
    grads = []
    for k in range(5):  # gradients that move
        grads.append(record.grads)
        record = record._replace(grads=[grad.clone() for grad in record.grads])
        fused_step(record)
        assert len(tables._PLANS) == min(k + 2, 3)


def test_another_tensor_at_the_same_address_is_checked(interpreted: ModuleType) -> None:
    record = step_cases.make(step_cases.Case("askew_memory", 2, "sgd", "tensor"), [(4, 4)])
    storage = record.latents[0].view(-1)
    interpreted.fused_step(record)
    record.latents[0] = storage.view(4, 4)  # the first has died
    interpreted.fused_step(record)
    record.latents[0] = storage.view(2, 8)
    with pytest.raises(ValueError, match=r"latents\[0\] has another shape"):
        interpreted.fused_step(record)


def test_another_layout_of_the_same_parameter_is_checked(interpreted: ModuleType) -> None:
    record = step_cases.make(step_cases.Case("none", 2, "sgd", "tensor"), [(4, 4)])
    interpreted.fused_step(record)
    param = record.params[0]
    param.data = param.data.t()
    with pytest.raises(ValueError, match="layout"):
        interpreted.fused_step(record)
    param.data = param.data.t()
    grads = [record.grads[0].t()]
    with pytest.raises(ValueError, match=r"grads\[0\] has another shape or layout"):
        interpreted.fused_step(record._replace(grads=grads))
    interpreted.fused_step(record)


def three(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(3, dtype=dtype)]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rule": "base"}, ValueError, "unknown rule"),
        ({"base": "lion"}, ValueError, "unknown base"),
        ({"levels": 5}, ValueError, "levels must be"),
        ({"dynamic_scale": True}, ValueError, "no dynamic scale"),
        ({"params": three(torch.float64), "grads": three(torch.float64)}, TypeError, "float32"),
        ({"grads": [torch.zeros(4)]}, ValueError, "shape"),
        ({"grads": []}, ValueError, "grads has 0"),
        ({"momentum_buffers": three() + three()}, ValueError, "momentum_buffers has 2"),
        ({"base": "given", "momentum_buffers": three()}, ValueError, "'given' has no momentum_buffers"),
        ({"exp_avg_sqs": three()}, ValueError, "'sgd' has no exp_avg_sqs"),
        ({"base": "adam", "momentum_buffers": three(), "steps": three()}, ValueError, "exp_avg_sqs has 0"),
        ({"base": "adam", "exp_avg_sqs": three(), "steps": three()}, ValueError, "momentum_buffers has 0"),
        ({"base": "adam", "momentum_buffers": three(), "exp_avg_sqs": three()}, ValueError, "steps has 0"),
        ({"rule": "askew_memory"}, ValueError, "latents has 0"),
        ({"latents": three(torch.bfloat16)}, TypeError, "latents"),
        ({"scales": []}, ValueError, "scales has 0"),
        ({"scales": [torch.ones(1, dtype=torch.float64)]}, TypeError, "scales"),
        ({"latent_bounds": three() + three()}, ValueError, "latent_bounds has 2"),
        ({"latent_bounds": [torch.ones(2)]}, ValueError, r"latent_bounds\[0\] has shape \[2\]"),
        ({"seed": 1, "steps": three()}, ValueError, "stochastic rounding"),
        ({"hyper": torch.zeros(3, dtype=torch.float64)}, ValueError, "hyper must be"),
    ],
)
def test_refuses_tensors_that_do_not_fit(
    interpreted: ModuleType, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    record = StepRecord(
        rule="askew",
        base="sgd",
        params=three(),
        grads=three(),
        momentum_buffers=[],
        exp_avg_sqs=[],
        latents=[],
        scales=[torch.ones(1)],
        latent_bounds=[],
        steps=[],
        hyper=torch.zeros(len(HYPER), dtype=torch.float64),
    )._replace(**change)
    with pytest.raises(error, match=words):
        interpreted.fused_step(record)
    assert all(torch.equal(step, torch.zeros(3)) for step in record.steps)  # not counted up


# ---- compiled ahead of time


def compiled_for(kernel: Any, architecture: int, constants: dict[str, Any], warps: int = 4) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"count": "i32", "seed": "i32", "state_seed": "i64", "hyper_ptr": "*fp64", "table_ptr": "*i64"}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        signature[name] = parameter.annotation_type or types.get(name, "*fp32" if pointer else "fp32")
        if pointer:
            aligned[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": False, "num_warps": warps},
    )


def step_variant(rule: str, base: str, **changes: Any) -> dict[str, Any]:
    from quantopt.kernels import step

    variant: dict[str, Any] = dict(
        RULE=rule, BASE=base, BINARY=True, QUANTISED=RULES[rule].quantised, DYNAMIC_SCALE=False,
        HAS_MOMENTUM=base != "given", NESTEROV=False, HAS_LATENT=RULES[rule].latent, HAS_LATENT_BOUND=False,
        STOCHASTIC=False, PARAM_TYPE="float32", MOMENTUM_TYPE="float32", EXP_AVG_SQ_TYPE="float32", ONE_SCALE=True,
        SMALL=True, ALIGNED=True, STEP=True, BLOCK=step.BLOCK, CHUNK=step.CHUNK,
    )  # fmt: skip
    variant |= changes
    for name in ("PARAM_TYPE", "MOMENTUM_TYPE", "EXP_AVG_SQ_TYPE"):
        variant[name] = step.DTYPES[getattr(torch, variant[name])]
    absent = [] if variant.pop("FLAGS", False) else ["grad_scale_ptr", "found_inf_ptr"]
    draws = variant["STOCHASTIC"] or changes.get("EXP_AVG_SQ_TYPE") == "bfloat16"
    absent += [] if draws else ["steps_ptr"]
    absent += [] if base == "adam" else ["corrections_ptr"]
    return variant | dict.fromkeys(absent)


def check_ptx(ptx: str, variant: dict[str, Any]) -> None:
    """Exact divisions, no contraction, 16-byte accesses of each array."""
    assert "div.full" not in ptx and "div.approx" not in ptx and "fma.rn.f32" not in ptx
    state = variant["HAS_MOMENTUM"] + (variant["BASE"] == "adam")
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 2 + state
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) >= 1 + state + variant["HAS_LATENT"]


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", RULES)
def test_compiles_ahead_of_time(rule: str, base: str, architecture: int) -> None:
    from quantopt.kernels import step

    variant = step_variant(rule, base)
    compiled = compiled_for(step.step_kernel, architecture, variant)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert f".target sm_{architecture}" in compiled.asm["ptx"]
    check_ptx(compiled.asm["ptx"], variant)


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(
    "variant",
    [
        dict(rule="askew", base="sgd", PARAM_TYPE="bfloat16", MOMENTUM_TYPE="bfloat16", STOCHASTIC=True),
        dict(rule="askew_memory", base="adam", BINARY=False, ONE_SCALE=False, PARAM_TYPE="float16"),
        dict(rule="askew_memory", base="adam", MOMENTUM_TYPE="bfloat16", EXP_AVG_SQ_TYPE="bfloat16"),
        dict(rule="askew", base="sgd", FLAGS=True, NESTEROV=True),
        dict(rule="alternating", base="sgd", DYNAMIC_SCALE=True, HAS_LATENT_BOUND=True),
        dict(rule="prox", base="sgd", HAS_LATENT=True, PARAM_TYPE="float16", ONE_SCALE=False, SMALL=False),
    ],
    ids=["stochastic", "groups", "moments", "grad-scale-found-inf", "dynamic-scale-of-long-rows", "master"],
)
def test_variants_compile_ahead_of_time(variant: dict[str, Any]) -> None:
    from quantopt.kernels import step

    variant = step_variant(**variant)
    check_ptx(compiled_for(step.step_kernel, 90, variant).asm["ptx"], variant)


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(
    ("architecture", "rule", "base"),
    [
        (architecture, *pair)
        for architecture, pair in zip(
            itertools.cycle((80, 90, 100)), itertools.product(step_cases.DYNAMIC, BASES), strict=False
        )
    ],
)
def test_rows_of_dynamic_scales_compile_ahead_of_time(architecture: int, rule: str, base: str) -> None:
    from quantopt.kernels import step

    for groups, block, second in ((1, step.ROW_BLOCK, "float32"), (32, 32, "bfloat16")):
        narrow = second if base == "adam" else "float32"
        variant = step_variant(rule, base, GROUPS=groups, BLOCK=block, EXP_AVG_SQ_TYPE=narrow)
        ptx = compiled_for(step.group_kernel, architecture, variant, groups * block // 256).asm["ptx"]
        check_ptx(ptx, variant)


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_small_kernels_compile_ahead_of_time(architecture: int) -> None:
    from quantopt.kernels import rules, step

    blocks = dict(PART=step.ROW_BLOCK, BLOCK=step.BLOCK, found_inf_ptr=None)
    compiled_for(step.scale_epilogue_kernel, architecture, blocks)
    for absent in ({}, {"hyper_ptr": None}):
        constants = {"RULE": "splitting", "DECAY_BEFORE_STEP": True} | absent
        ptx = compiled_for(rules.derive_numbers_kernel, architecture, constants).asm["ptx"]
        assert "div.rn.f64" in ptx and "sqrt.rn.f64" in ptx


# ---- with a GPU


def every_third() -> list[Any]:
    """Of these `brief`, which bench/run_gpu.sh runs: the first case of each rule."""
    rules: set[str] = set()
    chosen = []
    for number in range(0, len(CASES), 3):
        marks = () if CASES[number].rule in rules else (pytest.mark.brief,)
        rules.add(CASES[number].rule)
        chosen.append(pytest.param(number, marks=marks, id=str(CASES[number])))
    return chosen


@pytest.mark.gpu
@pytest.mark.parametrize("number", every_third())
def test_on_the_device(number: int) -> None:
    """A third of the cases, as each takes its own compilation; aligned and unaligned by turns."""
    from quantopt.kernels import step

    case = CASES[number]
    ours = step_cases.make(case, device="cuda", offset=number % 2)
    step.fused_step(ours)
    step_cases.check(case, ours, step_cases.make(case))


@pytest.mark.gpu
@pytest.mark.brief
@pytest.mark.parametrize(
    "case",
    [
        step_cases.Case("askew", 2, "adam", "tensor", hyper_on_device=True, found_inf=0.0),
        step_cases.Case("alternating", 2, "adam", "channel", dynamic_scale=True, hyper_on_device=True),
    ],
    ids=str,
)
def test_a_captured_step_follows_changing_numbers(case: step_cases.Case) -> None:
    from quantopt.kernels import step

    shapes = [(64, 32), (3, 5000)]
    captured, eager = (step_cases.make(case, shapes, device="cuda") for _ in range(2))
    kept = [t.clone() for t in step_cases.changing(captured)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.fused_step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.fused_step(captured)
    for tensor, value in zip(step_cases.changing(captured), kept, strict=True):
        tensor.copy_(value)
    for lr, epsilon in ((0.1, 0.9), (0.05, 0.5)):
        for inputs in (captured, eager):
            inputs.hyper[HYPER.index("lr")], inputs.hyper[HYPER.index("epsilon")] = lr, epsilon
        graph.replay()
        step.fused_step(eager)
        for got, want in zip(step_cases.changing(captured), step_cases.changing(eager), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.brief
def test_two_streams_do_not_disturb_each_other() -> None:
    """Dynamic scales of long rows, whose sums lie in a workspace of the plan."""
    from quantopt.kernels import step

    case = step_cases.Case("alternating", 2, "sgd", "channel", dynamic_scale=True)
    shapes = [(4, 200_000), (64, 1000)]
    alone, *both = (step_cases.make(case, shapes, device="cuda") for _ in range(3))
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    for _ in range(10):
        step.fused_step(alone)
        for stream, inputs in zip(streams, both, strict=True):
            with torch.cuda.stream(stream):
                step.fused_step(inputs)
    torch.cuda.synchronize()
    for inputs in both:
        for got, want in zip(step_cases.changing(inputs), step_cases.changing(alone), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.brief
def test_random_launches_repeat_bit_for_bit() -> None:
    """200 launches over lists of random sizes, of one kind that is compiled once, against tensor by tensor."""
    from quantopt.kernels import step

    case = step_cases.Case("askew", 2, "sgd", "tensor")
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        count = int(torch.randint(1, 6, (), generator=generator))
        shapes = [(int(torch.randint(1, 9000, (), generator=generator)),) for _ in range(count)]
        listed, single = (step_cases.make(case, shapes, device="cuda") for _ in range(2))
        step.fused_step(listed)
        for i in range(count):
            one = single._replace(
                params=single.params[i : i + 1],
                grads=single.grads[i : i + 1],
                momentum_buffers=single.momentum_buffers[i : i + 1],
                scales=single.scales[i : i + 1],
            )
            step.fused_step(one)
        for got, want in zip(step_cases.changing(listed), step_cases.changing(single), strict=True):
            assert torch.equal(got, want), shapes
