"""The products with packed weights in Triton: in its interpreter, compiled for GPUs not at hand, and on a GPU."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from compiled_kernels import compile_product
from interpreted_kernels import interpreted_kernels
from quantopt.ops.inputs import ACTIVATIONS, COMPUTE
from quantopt.ops.weights import pack_signs, plane_weights_of, unpack_signs
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference

triton = pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("exact", "int8")  # "bf16" is "exact" of other values: test_x_rounded_to_bfloat16


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    with interpreted_kernels("epilogue", "quantize", "binary_linear") as (*_, module):
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
    weights = plane_weights_of(levels)
    x = torch.randn(m, k).to(dtype) if x is None else x
    bits = pack_signs(torch.randn(len(weights), n, k))
    if k % 8:
        bits[..., -1] |= (0xFF << (k % 8)) & 0xFF
    scale = torch.rand(n, -(-k // group_size)) + 0.5 if group_size else torch.rand(n) + 0.5
    bias = torch.randn(n)
    weight = PackedWeight(bits, scale, bias, k, weights, group_size)
    values, *tensors = (t.to(device) for t in (x, *weight[:3]))
    y = kernels.binary_linear(values, PackedWeight(*tensors, *weight[3:]), compute, activation).cpu()
    wide = x.float() if compute == "int8" else x.double()
    expected = reference.binary_linear(wide, weight, compute, activation).double()
    size = x.double().abs() @ reference.dense_weight(weight, torch.float64).abs().T
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    allowed = 1e-6 * (size + bias.abs()) + rounding * expected.abs() + 1e-6
    error = (y.double() - expected).abs()
    assert y.dtype == dtype
    assert bool((error <= allowed).all()), float((error / allowed).max())
    if compute == "int8" and not group_size and activation == "none" and dtype != torch.bfloat16:
        exact = reference.binary_linear(x, weight, compute)
        assert torch.equal(y, exact)


# Around every block: rows of 16, 32, 64, 128, outputs of 64 and 128, steps of 64 and 128.
SIZES = (
    *((m, 65, 130) for m in (0, 1, 16, 17, 33, 64, 65, 129)),
    *((3, n, 129) for n in (0, 1, 63, 64, 66, 130)),
    *((2, 33, k) for k in (1, 7, 8, 31, 63, 64, 127, 128, 257, 1100)),
)


@pytest.mark.parametrize("compute", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(interpreted: ModuleType, dtype: torch.dtype, compute: str) -> None:
    for m, n, k in SIZES:
        compare(interpreted, m, n, k, dtype, compute)


def test_x_rounded_to_bfloat16(interpreted: ModuleType) -> None:
    """The products of 16-bit x, into y of its own type: other blocks, parts of K, groups, and cuBLAS's."""
    for dtype in DTYPES:
        compare(interpreted, 5, 65, 130, dtype, "bf16", activation="silu")
        compare(interpreted, 3, 40, 1100, dtype, "bf16", levels=3)
        compare(interpreted, 2, 40, 300, dtype, "bf16", group_size=64)
        compare(interpreted, interpreted.CUBLAS_ROWS["exact"], 9, 20, dtype, "bf16")


@pytest.mark.parametrize("compute", MODES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_groups_and_planes(interpreted: ModuleType, group_size: int, compute: str) -> None:
    for levels, (m, k), dtype in zip((3, 16, 17), ((1, 300), (3, 700), (70, 130)), DTYPES, strict=True):
        compare(interpreted, m, 40, k, dtype, compute, group_size=group_size)
        compare(interpreted, m, 40, k, dtype, compute, levels=levels)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(interpreted: ModuleType, activation: str) -> None:
    for m, k in ((3, 100), (2, 1100)):  # with and without parts of K
        for compute in MODES:
            compare(interpreted, m, 40, k, torch.float32, compute, activation=activation)


def test_strided_rows_and_one_scale(interpreted: ModuleType) -> None:
    wide = torch.randn(4, 300)
    for x in (wide[:, 3:103], wide[::2, :100], wide.t()[:100].t(), wide[:1, ::3]):
        compare(interpreted, *x.shape[:1], 20, x.shape[1], torch.float32, "int8", x=x)
        compare(interpreted, *x.shape[:1], 20, x.shape[1], torch.float32, "exact", x=x)
    bits = pack_signs(torch.randn(20, 100))
    y = interpreted.binary_linear(
        wide[:, :100], PackedWeight(bits, torch.tensor([0.5]), None, 100, [1], 0), "exact", "none"
    )
    torch.testing.assert_close(y, 0.5 * wide[:, :100] @ unpack_signs(bits, 100).T)


def test_infinities_nan_and_extremes(interpreted: ModuleType) -> None:
    x = torch.randn(5, 70)
    x[1, 5], x[2, 66], x[3, 0] = torch.inf, -torch.inf, torch.nan
    x[4] = 0
    bits, one = pack_signs(torch.randn(40, 70)), torch.ones(1)
    y = interpreted.binary_linear(x, PackedWeight(bits, one, None, 70, [1], 0), "exact", "none")
    torch.testing.assert_close(y, x @ unpack_signs(bits, 70).T, equal_nan=True)
    y = interpreted.binary_linear(x, PackedWeight(bits, one, None, 70, [1], 0), "int8", "none")
    assert bool(y[1:4].isnan().all()) and bool(y[0].isfinite().all()) and bool((y[4] == 0).all())
    x = torch.full((1, 4096), 3.0)
    y = interpreted.binary_linear(
        x,
        PackedWeight(torch.full((2, 8, 512), 0xFF, dtype=torch.uint8), one, None, 4096, [8, 4], 0),
        "int8",
        "none",
    )
    assert torch.equal(y, torch.full((1, 8), 12 * 4096 * 127 * (torch.tensor(3.0) / 127)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
def test_expanding(interpreted: ModuleType, dtype: torch.dtype) -> None:
    for n, k, weights in (
        (1, 1, [1]),
        (8, 16, [1]),
        (9, 17, [1, 1]),
        (40, 300, [1, 2, 4]),
        (3, 4200, [64, 63]),
    ):
        bits = pack_signs(torch.randn(len(weights), n, k))
        bits[..., -1] |= (0xFF << (k % 8 or 8)) & 0xFF  # bits beyond K must not matter
        weight = PackedWeight(bits, torch.ones(1), None, k, weights)
        w = interpreted.expand(weight, dtype)
        assert w.dtype == dtype and w.shape == (-(-n // 8) * 8, -(-k // 16) * 16)
        expected = torch.zeros(w.shape, dtype=torch.float32)
        expected[:n, :k] = reference.dense_weight(weight, torch.float32)
        assert torch.equal(w.float(), expected)


@pytest.mark.parametrize("compute", MODES)
def test_many_rows_by_cublas(interpreted: ModuleType, compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one turn and in turns of 32 rows, the last of fewer than _int_mm takes."""
    monkeypatch.setattr(interpreted, "CUBLAS_ROWS", {"int8": 33, "exact": 33})
    products: list[torch.dtype] = []
    product = interpreted.cublas_product
    monkeypatch.setattr(interpreted, "cublas_product", lambda x, w: products.append(x.dtype) or product(x, w))
    for sums, turns in ((1 << 20, 1), (0, 3)):
        monkeypatch.setattr(interpreted, "CUBLAS_SUMS", sums)
        for n, k, levels, dtype in ((40, 48, 2, torch.float16), (43, 131, 8, torch.bfloat16)):
            products.clear()
            compare(interpreted, 70, n, k, dtype, compute, levels=levels, activation="silu")
            assert len(products) == turns
    products.clear()
    compare(interpreted, 33, 40, 64, torch.float16, compute, group_size=32)  # what it does not take
    compare(interpreted, 32, 40, 64, torch.float16, compute)
    assert not products


def test_sums_that_32_bits_do_not_hold(interpreted: ModuleType) -> None:
    bits = torch.zeros(8, 2, 2065, dtype=torch.uint8)
    x, one = torch.zeros(1, 16520), torch.ones(1)
    with pytest.raises(ValueError, match=r"in_features=16520 is too large .* use compute=\"exact\""):
        interpreted.binary_linear(x, PackedWeight(bits, one, None, 16520, [128] * 8, 0), "int8", "none")


def test_a_step_of_k_never_holds_two_groups() -> None:
    from quantopt.kernels import binary_linear as kernels

    for rows, group in itertools.product((1, 16, 17, 64, 1000), (0, 32, 64, 128, 256)):
        config = kernels.config_for(rows, group)
        assert group % config.inputs == 0 and config.inputs % 32 == 0


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
    from quantopt.kernels import binary_linear as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_product(
        kernels.linear_kernel,
        kernels.config_for(rows, group_size),
        kind,
        architecture,
        {
            "GROUP": group_size,
            "ACTIVATION": "gelu",
            ("scale_ptr" if group_size else "group_scale_ptr"): None,
        },
        even=("outputs", "inputs", "x_stride", "row_bytes", "groups"),
    )
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    ptx = compiled.asm["ptx"]
    assert re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)
    assert ".local" not in ptx
    assert compiled.metadata.shared < 100 << 10


@pytest.mark.gpu
@pytest.mark.parametrize("compute", COMPUTE)
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
