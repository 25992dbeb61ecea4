"""The Triton kernels: in Triton's interpreter against the reference, and compiled for GPUs not at hand."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import step_cases

pytest.importorskip("triton")

CASES = [
    case
    for case in step_cases.all_cases()
    if case.rule in ("base", "askew", "askew_gradient", "askew_memory")
    and not (case.master or case.seed >= 0 or case.hyper_on_device or case.dtype != torch.float32)
    and case.momentum_dtype == torch.float32
]


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """quantopt.kernels.askew_step, loaded a second time with its kernel in Triton's interpreter."""
    source = importlib.util.find_spec("quantopt.kernels.askew_step")
    assert source is not None and source.origin is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("interpreted_askew_step", source.origin)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(interpreted: ModuleType, case: step_cases.Case) -> None:
    ours = step_cases.make(case)
    step_cases.run(interpreted.fused_step, case, ours)
    step_cases.check(case, ours, step_cases.make(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_keep_a_float32_latent(interpreted: ModuleType, dtype: torch.dtype) -> None:
    case = step_cases.Case("askew_memory", 2, "momentum", "tensor", dtype, rate=float("inf"))
    ours = step_cases.make(case)
    step_cases.run(interpreted.fused_step, case, ours)
    assert all(param.dtype == dtype for param in ours.params)
    step_cases.check(case, ours, step_cases.make(case))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "splitting"}, "rules base, askew"),
        ({"moving_levels": True}, "moving levels"),
        ({"seed": 3}, "stochastic rounding"),
        ({"latents": [torch.zeros(3)]}, "master weights"),
        ({"params": [torch.zeros(3, dtype=torch.float64)]}, "float32"),
    ],
)
def test_refuses_with_the_reason(interpreted: ModuleType, change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
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
    with pytest.raises(NotImplementedError, match=words):
        interpreted.fused_step(**(arguments | change))


ONE_SCALE = {"RULE": "askew", "BINARY": True, "ONE_SCALE": True, "MOMENTUM": True, "ADAM": False}
PER_GROUP = {"RULE": "askew_memory", "BINARY": False, "ONE_SCALE": False, "MOMENTUM": True, "ADAM": True}


@pytest.mark.parametrize(
    ("architecture", "variant"),
    list(itertools.product((80, 90, 100), (ONE_SCALE, PER_GROUP))),
    ids=["80-one", "80-groups", "90-one", "90-groups", "100-one", "100-groups"],
)
def test_compiles_ahead_of_time(
    architecture: int, variant: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a cubin with exact divisions, no contraction and 16-byte accesses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quantopt.kernels import askew_step

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {**variant, "NESTEROV": False, "LIMITED": True, "BLOCK": askew_step.BLOCK}
    absent = ["grad_scale_ptr", "found_inf_ptr"]
    if not variant["ADAM"]:
        absent += ["second_ptr", "corrections_ptr"]
    if variant["RULE"] != "askew_memory":
        absent += ["latent_ptr"]
    constants |= dict.fromkeys(absent, None)
    names = askew_step.askew_step_kernel.arg_names
    types = {"numel": "i64", "row": "i64", "group": "i64", "scales_per_row": "i64"}
    signature = {
        name: "constexpr"
        if name in constants
        else "*fp32"
        if name.endswith("_ptr")
        else types.get(name, "fp32")
        for name in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if (name.endswith("_ptr") and name not in constants) or name == "numel"
    }
    compiled = triton.compile(
        ASTSource(askew_step.askew_step_kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": False},
    )
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    ptx = compiled.asm["ptx"]
    assert f".target sm_{architecture}" in ptx
    assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx
    assert "fma.rn.f32" not in ptx
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_device(case: step_cases.Case) -> None:
    from quantopt.kernels import askew_step

    ours = step_cases.make(case, device="cuda")
    step_cases.run(askew_step.fused_step, case, ours)
    step_cases.check(case, ours, step_cases.make(case))
