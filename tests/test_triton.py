"""The Triton kernels: in Triton's interpreter against the reference and the CPU kernels, and compiled for GPUs not at
hand."""

import dataclasses
import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import step_cases
from quantopt import _extension
from step_cases import CASES

pytest.importorskip("triton")

SHAPES = ((5, 13, 3), (129,), (0, 4), (2, 600))  # the interpreter is slow


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """quantopt.kernels.step, loaded a second time with its kernels in Triton's interpreter."""
    source = importlib.util.find_spec("quantopt.kernels.step")
    assert source is not None and source.origin is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("interpreted_step", source.origin)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def comparable(case: step_cases.Case, inputs: step_cases.Inputs) -> list[torch.Tensor]:
    """What the interpreter computes as a GPU does: it truncates to bfloat16, where a GPU rounds to nearest."""
    nearest = case.dtype == torch.bfloat16 and case.seed < 0
    kept = dataclasses.replace(inputs, params=[] if nearest else inputs.params)
    if case.momentum_dtype == torch.bfloat16:
        kept.momentums = []
    return kept.changing()


@pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gives_the_bits_of_the_cpu_kernel(interpreted: ModuleType, case: step_cases.Case) -> None:
    """But for the sums behind moving levels; those are compared with the reference."""
    ours, expected = (step_cases.make(case, SHAPES) for _ in range(2))
    step_cases.run(interpreted.fused_step, case, ours)
    step_cases.check(case, ours, step_cases.make(case, SHAPES))
    if not case.moving_levels:
        step_cases.run(torch.ops.quantopt.fused_step, case, expected)
        pairs = zip(comparable(case, ours), comparable(case, expected), strict=True)
        assert all(torch.equal(got, want) for got, want in pairs)


@pytest.mark.parametrize("row", [1, 128, 129, 4096, 4097, 9000])
@pytest.mark.parametrize("rule", ["splitting", "alternating"])
def test_moving_levels_of_short_and_long_rows(interpreted: ModuleType, rule: str, row: int) -> None:
    case = step_cases.Case(rule, 2, "momentum", "channel", moving_levels=True)
    shapes = [(2, row), (3, row)]
    ours = step_cases.make(case, shapes)
    step_cases.run(interpreted.fused_step, case, ours)
    step_cases.check(case, ours, step_cases.make(case, shapes))


def test_hard_proxquant_keeps_levels_where_the_step_overflows(interpreted: ModuleType) -> None:
    case = step_cases.Case("prox", 2, "plain", "tensor", threshold=math.inf)
    inputs = step_cases.make(case, [(1, 64)])
    inputs.grads[0][0, :2] = torch.tensor([math.inf, -math.inf])
    step_cases.run(interpreted.fused_step, case, inputs)
    assert torch.equal(inputs.params[0].abs(), inputs.scales[0].expand(1, 64))
    assert torch.equal(inputs.params[0][0, :2].sign(), torch.tensor([-1.0, 1.0]))


def test_numbers_from_the_device_and_from_the_host_are_the_same(interpreted: ModuleType) -> None:
    case = step_cases.Case("askew", 2, "momentum", "tensor", epsilon=0.37, lr=0.1, weight_decay=0.03)
    hyper = step_cases.make(case).hyper
    for rule, decoupled in itertools.product(step_cases.RULES, (False, True)):
        host = torch.tensor(interpreted.numbers(rule, hyper, decoupled), dtype=torch.float32)
        written, derived = torch.empty_like(host), torch.empty_like(host)
        interpreted.write_numbers_kernel[(1,)](written, *interpreted.numbers(rule, hyper, decoupled))
        interpreted.derive_numbers_kernel[(1,)](
            derived,
            hyper,
            SPLITTING=rule == "splitting",
            DECAY_BEFORE_STEP=interpreted.decay_before_step(rule, decoupled),
        )
        assert torch.equal(written, host) and torch.equal(derived, host)


def test_tables_are_made_once_for_the_same_tensors(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = step_cases.Case("askew", 4, "momentum", "channel")
    inputs = step_cases.make(case, [(3, 5)])
    interpreted._PLANS.clear()
    monkeypatch.setattr(interpreted, "_KEPT", 3)
    for _ in range(3):
        step_cases.run(interpreted.fused_step, case, inputs)
    assert len(interpreted._PLANS) == 1
    grads = []
    for k in range(5):  # gradients that move
        grads.append(inputs.grads)
        inputs.grads = [grad.clone() for grad in inputs.grads]
        step_cases.run(interpreted.fused_step, case, inputs)
        assert len(interpreted._PLANS) == min(k + 2, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"params": [torch.zeros(3, dtype=torch.float64)]}, TypeError, "float32"),
        ({"grads": [torch.zeros(4)]}, ValueError, "shape"),
        ({"grads": []}, ValueError, "grads"),
        ({"momentums": [torch.zeros(3), torch.zeros(3)]}, ValueError, "momentums has 2"),
        ({"scales": []}, ValueError, "scales has 0"),
        ({"seconds": [torch.zeros(3)], "momentums": [torch.zeros(3)]}, ValueError, "steps has 0"),
        ({"latents": [torch.zeros(3, dtype=torch.bfloat16)]}, TypeError, "latents"),
    ],
)
def test_refuses_tensors_that_do_not_fit(
    interpreted: ModuleType, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments: dict[str, Any] = {
        "rule": "askew",
        "params": [torch.zeros(3)],
        "grads": [torch.ones(3)],
        "momentums": [],
        "seconds": [],
        "latents": [],
        "scales": [torch.ones(1)],
        "sigmas": [],
        "steps": [],
        "hyper": torch.zeros(12, dtype=torch.float64),
    }
    if "params" in change:
        change["grads"] = change["params"]
    with pytest.raises(error, match=words):
        interpreted.fused_step(**(arguments | change))


# ---- compiled ahead of time


def compiled_for(kernel: Any, architecture: int, constants: dict[str, Any], warps: int = 4) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {"count": "i32", "seed": "i32", "hyper_ptr": "*fp64", "table_ptr": "*i64"}
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name.endswith("_ptr") and name not in constants
    }
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": False, "num_warps": warps},
    )


def step_variant(**changes: Any) -> dict[str, Any]:
    from quantopt.kernels import step

    variant: dict[str, Any] = dict(
        RULE="askew", BINARY=True, HAS_MOMENTUM=True, NESTEROV=False, ADAM=False, HAS_LATENT=False, HAS_SIGMA=False,
        STOCHASTIC=False, PARAM_TYPE="float32", MOMENTUM_TYPE="float32", ONE_SCALE=True, SMALL=True, ALIGNED=True,
        BLOCK=step.BLOCK, CHUNK=step.CHUNK,
    )  # fmt: skip
    variant |= changes
    for name in ("PARAM_TYPE", "MOMENTUM_TYPE"):
        variant[name] = step.DTYPES[getattr(torch, variant[name])]
    absent = [] if variant.pop("FLAGS", False) else ["grad_scale_ptr", "found_inf_ptr"]
    absent += [] if variant["STOCHASTIC"] else ["steps_ptr"]
    absent += [] if variant["ADAM"] else ["corrections_ptr"]
    return variant | dict.fromkeys(absent)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(PARAM_TYPE="bfloat16", MOMENTUM_TYPE="bfloat16", STOCHASTIC=True),
        dict(
            RULE="askew_memory",
            BINARY=False,
            ADAM=True,
            HAS_LATENT=True,
            ONE_SCALE=False,
            PARAM_TYPE="float16",
        ),
        dict(RULE="splitting", HAS_LATENT=True),
        dict(FLAGS=True),
    ],
    ids=["askew", "stochastic", "memory-adam-groups", "splitting", "grad-scale-found-inf"],
)
def test_compiles_ahead_of_time(
    architecture: int, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a cubin with exact divisions, no contraction and 16-byte accesses."""
    from quantopt.kernels import step

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compiled_for(step.step_kernel, architecture, step_variant(**changes))
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    ptx = compiled.asm["ptx"]
    assert f".target sm_{architecture}" in ptx
    assert "div.full" not in ptx and "div.approx" not in ptx and "fma.rn.f32" not in ptx
    arrays = 3 + compiled_reads(changes)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= arrays
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) >= arrays - 1


def compiled_reads(changes: dict[str, Any]) -> int:
    """Arrays read beside the parameter or its latent, the gradient and the momentum."""
    return int(changes.get("ADAM", False))


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_of_moving_levels_compile(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantopt.kernels import step

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    float32 = step.DTYPES[torch.float32]
    variant: dict[str, Any] = dict(
        RULE="alternating", BINARY=True, HAS_MOMENTUM=True, NESTEROV=False, HAS_SIGMA=False, PARAM_TYPE=float32,
        MOMENTUM_TYPE=float32, ALIGNED=True, STEP=True, BLOCK=step.ROW_BLOCK, grad_scale_ptr=None, found_inf_ptr=None,
    )  # fmt: skip
    ptx = compiled_for(step.row_kernel, architecture, variant, 16).asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx and "fma.rn.f32" not in ptx
    compiled_for(
        step.finish_kernel, architecture, dict(PART=step.ROW_BLOCK, BLOCK=step.BLOCK, found_inf_ptr=None)
    )
    compiled_for(step.derive_numbers_kernel, architecture, dict(SPLITTING=True, DECAY_BEFORE_STEP=True))
    compiled_for(step.write_numbers_kernel, architecture, {})


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
    """A third of the cases, as every one is compiled anew; aligned and unaligned by turns."""
    from quantopt.kernels import step

    case = CASES[number]
    ours = step_cases.make(case, device="cuda", offset=number % 2)
    step_cases.run(step.fused_step, case, ours)
    step_cases.check(case, ours, step_cases.make(case))


@pytest.mark.gpu
@pytest.mark.brief
@pytest.mark.parametrize(
    "case",
    [
        step_cases.Case("askew", 2, "adam", "tensor", hyper_on_device=True, found_inf=0.0),
        step_cases.Case("alternating", 2, "momentum", "channel", moving_levels=True, hyper_on_device=True),
    ],
    ids=str,
)
def test_a_captured_step_follows_changing_numbers(case: step_cases.Case) -> None:
    from quantopt.kernels import step

    shapes = [(64, 32), (3, 5000)]
    captured, eager = (step_cases.make(case, shapes, device="cuda") for _ in range(2))
    kept = [t.clone() for t in captured.changing()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step_cases.run(step.fused_step, case, captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_cases.run(step.fused_step, case, captured)
    for tensor, value in zip(captured.changing(), kept, strict=True):
        tensor.copy_(value)
    for lr, epsilon in ((0.1, 0.9), (0.05, 0.5)):
        for inputs in (captured, eager):
            inputs.hyper[0], inputs.hyper[5] = lr, epsilon
        graph.replay()
        step_cases.run(step.fused_step, case, eager)
        for got, want in zip(captured.changing(), eager.changing(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.brief
def test_two_streams_do_not_disturb_each_other() -> None:
    """Moving levels of long rows, whose sums lie in a workspace of the plan."""
    from quantopt.kernels import step

    case = step_cases.Case("alternating", 2, "momentum", "channel", moving_levels=True)
    shapes = [(4, 200_000), (64, 1000)]
    alone, *both = (step_cases.make(case, shapes, device="cuda") for _ in range(3))
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    for _ in range(10):
        step_cases.run(step.fused_step, case, alone)
        for stream, inputs in zip(streams, both, strict=True):
            with torch.cuda.stream(stream):
                step_cases.run(step.fused_step, case, inputs)
    torch.cuda.synchronize()
    for inputs in both:
        for got, want in zip(inputs.changing(), alone.changing(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.brief
def test_random_launches_repeat_bit_for_bit() -> None:
    """200 launches over lists of random sizes, of one kind that is compiled once, against tensor by tensor."""
    from quantopt.kernels import step

    case = step_cases.Case("askew", 2, "momentum", "tensor")
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        count = int(torch.randint(1, 6, (), generator=generator))
        shapes = [(int(torch.randint(1, 9000, (), generator=generator)),) for _ in range(count)]
        listed, single = (step_cases.make(case, shapes, device="cuda") for _ in range(2))
        step_cases.run(step.fused_step, case, listed)
        for i in range(count):
            one = dataclasses.replace(
                single,
                params=single.params[i : i + 1],
                grads=single.grads[i : i + 1],
                momentums=single.momentums[i : i + 1],
                scales=single.scales[i : i + 1],
            )
            step_cases.run(step.fused_step, case, one)
        for got, want in zip(listed.changing(), single.changing(), strict=True):
            assert torch.equal(got, want), shapes
