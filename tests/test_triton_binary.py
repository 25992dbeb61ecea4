"""The products with packed weights in Triton: in its interpreter, compiled for GPUs not at hand, and on a GPU."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreted_kernels import interpreted_kernels
from quantopt.ops import binary as ops
from quantopt.reference import binary as reference

triton = pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    with interpreted_kernels("binary_linear") as (module,):
        yield module


def compare(
    kernels: ModuleType,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    compute: str,
    *,
    levels: int = 2,
    group_size: int = 0,
    activation: str = "none",
    x: Tensor | None = None,
    device: str = "cpu",
) -> None:
    """Against the reference: whole sums to the bit (up to bfloat16, which the interpreter cuts off)."""
    weights = ops.plane_weights_of(levels)
    x = torch.randn(m, k).to(dtype) if x is None else x
    bits = ops.pack_signs(torch.randn(len(weights), n, k))
    if k % 8:
        bits[..., -1] |= (0xFF << (k % 8)) & 0xFF
    scale = torch.rand(n, -(-k // group_size)) + 0.5 if group_size else torch.rand(n) + 0.5
    bias = torch.randn(n)
    on_device = [t.to(device) for t in (x, bits, scale, bias)]
    y = kernels.binary_linear(*on_device, k, weights, group_size, compute, activation).cpu()
    wide = x.double() if compute == "exact" else x.float()
    expected = reference.binary_linear(
        wide, bits, scale, bias, k, weights, group_size, compute, activation
    ).double()
    size = (
        x.double().abs() @ reference.dense_weight(bits, scale, k, weights, group_size, torch.float64).abs().T
    )
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    allowed = 1e-6 * (size + bias.abs()) + rounding * expected.abs() + 1e-6
    error = (y.double() - expected).abs()
    assert y.dtype == dtype
    assert bool((error <= allowed).all()), float((error / allowed).max())
    if compute == "int8" and not group_size and activation == "none" and dtype != torch.bfloat16:
        exact = reference.binary_linear(x, bits, scale, bias, k, weights, 0, compute)
        assert torch.equal(y, exact)


# Around every block: rows of 16, 32, 64, 128, outputs of 64 and 128, steps of 64 and 128.
SIZES = (
    *((m, 65, 130) for m in (0, 1, 16, 17, 33, 64, 65, 129)),
    *((3, n, 129) for n in (0, 1, 63, 64, 66, 130)),
    *((2, 33, k) for k in (1, 7, 8, 31, 63, 64, 127, 128, 257, 1100)),
)


@pytest.mark.parametrize("compute", ops.COMPUTE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(interpreted: ModuleType, dtype: torch.dtype, compute: str) -> None:
    for m, n, k in SIZES:
        compare(interpreted, m, n, k, dtype, compute)


@pytest.mark.parametrize("compute", ops.COMPUTE)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_groups_and_planes(interpreted: ModuleType, group_size: int, compute: str) -> None:
    for levels, (m, k), dtype in zip((2, 3, 16), ((1, 300), (3, 700), (70, 130)), DTYPES, strict=True):
        compare(interpreted, m, 40, k, dtype, compute, group_size=group_size)
        compare(interpreted, m, 40, k, dtype, compute, levels=levels)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations(interpreted: ModuleType, activation: str) -> None:
    for m, k in ((3, 100), (2, 1100)):  # with and without parts of K
        for compute in ops.COMPUTE:
            compare(interpreted, m, 40, k, torch.float32, compute, activation=activation)


def test_strided_rows_and_one_scale(interpreted: ModuleType) -> None:
    wide = torch.randn(4, 300)
    for x in (wide[:, 3:103], wide[::2, :100], wide.t()[:100].t(), wide[:1, ::3]):
        compare(interpreted, *x.shape[:1], 20, x.shape[1], torch.float32, "int8", x=x)
        compare(interpreted, *x.shape[:1], 20, x.shape[1], torch.float32, "exact", x=x)
    bits = ops.pack_signs(torch.randn(20, 100))
    y = interpreted.binary_linear(
        wide[:, :100], bits, torch.tensor([0.5]), None, 100, [1], 0, "exact", "none"
    )
    torch.testing.assert_close(y, 0.5 * wide[:, :100] @ ops.unpack_signs(bits, 100).T)


def test_infinities_nan_and_extremes(interpreted: ModuleType) -> None:
    x = torch.randn(5, 70)
    x[1, 5], x[2, 66], x[3, 0] = torch.inf, -torch.inf, torch.nan
    x[4] = 0
    bits, one = ops.pack_signs(torch.randn(40, 70)), torch.ones(1)
    y = interpreted.binary_linear(x, bits, one, None, 70, [1], 0, "exact", "none")
    torch.testing.assert_close(y, x @ ops.unpack_signs(bits, 70).T, equal_nan=True)
    y = interpreted.binary_linear(x, bits, one, None, 70, [1], 0, "int8", "none")
    assert bool(y[1:4].isnan().all()) and bool(y[0].isfinite().all()) and bool((y[4] == 0).all())
    x = torch.full((1, 4096), 3.0)
    y = interpreted.binary_linear(
        x, torch.full((2, 8, 512), 0xFF, dtype=torch.uint8), one, None, 4096, [8, 4], 0, "int8", "none"
    )
    assert torch.equal(y, torch.full((1, 8), 12 * 4096 * 127 * (torch.tensor(3.0) / 127)))


def test_splitting_of_k() -> None:
    from quantopt.kernels import binary_linear as kernels

    for blocks, steps, processors in itertools.product((1, 7, 64, 5000), (1, 3, 8, 33, 1000), (1, 108, 132)):
        splits = kernels.splits_for(blocks, steps, processors)
        each = -(-steps // splits)
        assert 1 <= splits and (splits - 1) * each < steps  # none is empty
        assert splits == 1 or each >= 3


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    ("rows", "kind", "group_size"), [(1, "*bf16", 0), (1, "*i8", 0), (1, "*fp16", 32), (200, "*i8", 128)]
)
def test_compiles_ahead_of_time(
    architecture: int, rows: int, kind: str, group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To tensor-core instructions, with 16-byte loads of the bits, in a second."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quantopt.kernels import binary_linear as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = kernels.config_for(rows, group_size)
    int8 = kind == "*i8"
    constants: dict[str, Any] = {
        "PLANE_WEIGHTS": (1,),
        "GROUP": group_size,
        "ONE_SCALE": False,
        "INT8": int8,
        "PARTIAL": False,
        "ACTIVATION": "gelu",
        "ROWS": config.rows,
        "OUTPUTS": config.outputs,
        "INPUTS": config.inputs,
        ("scale_ptr" if group_size else "group_scale_ptr"): None,
    }
    if not int8:
        constants["x_scale_ptr"] = None
    names = kernels.linear_kernel.arg_names
    types = {"x_ptr": kind, "bits_ptr": "*u8", "out_ptr": "*fp16"}
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    even = ("outputs", "inputs", "x_stride", "row_bytes", "groups")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and (name.endswith("_ptr") or name in even)
    }
    compiled = triton.compile(
        ASTSource(kernels.linear_kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": False,
        },
    )
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    ptx = compiled.asm["ptx"]
    assert re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)
    assert ".local" not in ptx
    assert compiled.metadata.shared < 100 << 10


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ops.COMPUTE)
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=pytest.mark.brief if d == torch.bfloat16 else ()) for d in DTYPES]
)
def test_on_the_device(dtype: torch.dtype, compute: str) -> None:
    from quantopt.kernels import binary_linear as kernels

    for m, n, k in SIZES:
        compare(kernels, m, n, k, dtype, compute, device="cuda")
    for group_size in (32, 64, 128):
        compare(kernels, 5, 130, 700, dtype, compute, levels=8, group_size=group_size, device="cuda")
    compare(kernels, 5, 130, 9000, dtype, compute, activation="silu", device="cuda")
