"""conv2d with packed weights in Triton: in its interpreter, compiled for GPUs not at hand, and on a GPU."""

import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compiled_kernels import compile_product
from interpreted_kernels import interpreted_kernels
from quantopt import backends
from quantopt.nn import BinaryConv2d
from quantopt.ops import library
from quantopt.ops.inputs import COMPUTE
from quantopt.ops.weights import pack_signs, plane_weights_of
from quantopt.packed_weight import ConvGeometry, PackedWeight
from quantopt.reference import binary as reference

triton = pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("exact", "int8")  # "bf16" is "exact" of other values: test_x_rounded_to_bfloat16
Pair = tuple[int, int]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    with interpreted_kernels("epilogue", "quantize", "binary_linear", "binary_conv") as (*_, module):
        yield module


def compare(
    kernels: ModuleType,
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: Pair = (3, 3),
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    levels: int = 2,
    dtype: torch.dtype = torch.float32,
    compute: str = "exact",
    activation: str = "none",
    x: Tensor | None = None,
    device: str = "cpu",
) -> None:
    """Against the convolution in float64."""
    weights = plane_weights_of(levels)
    x = torch.randn(shape).to(dtype) if x is None else x
    features = x.shape[1] // groups * kernel[0] * kernel[1]
    bits = pack_signs(torch.randn(len(weights), outputs, features))
    if features % 8:
        bits[..., -1] |= (0xFF << (features % 8)) & 0xFF
    scale, bias = torch.rand(outputs) + 0.5, torch.randn(outputs)
    geometry = ConvGeometry(kernel, stride, padding, dilation, groups)
    weight = PackedWeight(bits, scale, bias, features, weights)
    values, *tensors = (t.to(device) for t in (x, *weight[:3]))
    y = kernels.binary_conv2d(
        values, PackedWeight(*tensors, *weight[3:]), geometry, compute, activation
    ).cpu()
    wide = x.float() if compute == "int8" else x.double()
    expected = reference.binary_conv2d(wide, weight, geometry, compute, activation).double()
    dense = reference.dense_weight(weight, torch.float64).abs()
    size = F.conv2d(x.double().abs(), dense.view(outputs, -1, *kernel), None, *geometry[1:])
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    allowed = 2e-6 * (size + bias.abs().view(-1, 1, 1)) + rounding * expected.abs() + 1e-6
    assert y.dtype == dtype and y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    error = (y.double() - expected).abs()
    assert bool((error <= allowed).all()), float((error / allowed).max())


@pytest.mark.parametrize("compute", MODES)
def test_geometry(interpreted: ModuleType, compute: str) -> None:
    pairs = itertools.cycle([(1, 1), (2, 3), (3, 1)]), itertools.cycle([(2, 1), (0, 0), (1, 3), (0, 2)])
    for kernel, dilation, groups in itertools.product([(3, 3), (1, 1), (2, 3)], [(1, 1), (2, 1)], [1, 3]):
        stride, padding = (next(each) for each in pairs)
        form = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        compare(interpreted, (2, 9, 6, 5), 6, kernel, compute=compute, **form)  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", MODES)
def test_sizes(interpreted: ModuleType, compute: str) -> None:
    """Around every block: pixels of 16, 32, 64, 128, outputs of 16 to 128, steps of 32 to 128 channels, parts of K."""
    dtypes = itertools.cycle(DTYPES)
    for width in (1, 4, 5, 9, 16, 17, 33):  # times 4 pixels
        compare(
            interpreted, (1, 33, 4, width), 65, (2, 1), padding=(1, 0), dtype=next(dtypes), compute=compute
        )
    for outputs in (1, 16, 17, 64, 129):
        compare(
            interpreted, (3, 20, 3, 5), outputs, (1, 2), padding=(0, 1), dtype=next(dtypes), compute=compute
        )
    for channels in (1, 7, 8, 31, 32, 65, 127, 129, 600):
        compare(
            interpreted, (2, channels, 1, 3), 20, (2, 1), padding=(1, 0), dtype=next(dtypes), compute=compute
        )
    for dtype in DTYPES:
        compare(interpreted, (1, 300, 2, 2), 20, (2, 2), dtype=dtype, compute=compute)


@pytest.mark.parametrize("compute", MODES)
def test_planes_groups_activations(interpreted: ModuleType, compute: str) -> None:
    for levels, activation in zip((3, 16, 17), ("relu", "gelu", "silu"), strict=True):
        form = {"levels": levels, "activation": activation, "compute": compute}
        compare(interpreted, (2, 66, 3, 5), 34, (2, 2), groups=2, **form)  # type: ignore[arg-type]
        compare(interpreted, (1, 300, 2, 2), 20, (2, 2), **form)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_rounded_to_bfloat16(interpreted: ModuleType, dtype: torch.dtype) -> None:
    form = {"dtype": dtype, "compute": "bf16", "levels": 3}
    compare(interpreted, (2, 33, 3, 5), 34, (2, 2), padding=(1, 0), activation="gelu", **form)  # type: ignore[arg-type]
    compare(interpreted, (1, 300, 2, 2), 20, (2, 2), **form)  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", MODES)
def test_layouts_and_no_elements(interpreted: ModuleType, compute: str) -> None:
    x = torch.randn(3, 20, 7, 6)
    for view in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3),
        x[:, ::2],
        x[:, :, ::2],
        x[:0],
    ):
        compare(interpreted, (0, 0, 0, 0), 20, (2, 2), x=view, compute=compute)
    bits, bias = torch.zeros(20, 0, dtype=torch.uint8), torch.randn(20)
    weight = PackedWeight(bits, torch.ones(1), bias, 0, [1])
    y = interpreted.binary_conv2d(x[:, :0], weight, ConvGeometry((2, 2)), compute, "none")
    assert torch.equal(y, bias.view(20, 1, 1).expand(3, 20, 6, 5))


def test_whole_sums_are_exact(interpreted: ModuleType) -> None:
    """With s = 1 for both images, and another s for the third, the sums are whole numbers."""
    x = torch.randint(-126, 127, (3, 300, 4, 5)).float()
    x[:2, 7, 3, 4], x[2, 0, 0, 0] = 127, -254
    bits = pack_signs(torch.randn(2, 40, 300 * 9))
    weight = PackedWeight(bits, torch.ones(1), None, 300 * 9, [3, 128])
    signs = reference.expand_planes(weight, torch.float64).view(40, 300, 3, 3)
    y = interpreted.binary_conv2d(x, weight, ConvGeometry((3, 3), padding=(1, 1)), "int8", "none")
    values = torch.cat([x[:2], (x[2:] / 2).round()]).double()
    expected = F.conv2d(values, signs, padding=1) * torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1, 1)
    assert expected.abs().max() < 2**25 and torch.equal(y, expected.float())


def test_images_of_many_blocks_share_one_scale(interpreted: ModuleType) -> None:
    x = torch.randn(3, 40, 33, 17).contiguous(memory_format=torch.channels_last)
    x[1] *= 100
    q, s = interpreted.quantize_images(x)
    expected, scale = reference.quantize_rows(x.flatten(1))
    assert torch.equal(s, scale.flatten()) and torch.equal(q.flatten(1).float(), expected)


def test_infinities_and_nan(interpreted: ModuleType) -> None:
    x = torch.randn(4, 5, 4, 4)
    x[1, 2, 1, 1], x[2, 0, 3, 3] = torch.inf, torch.nan
    x[3] = 0
    w = torch.randn(6, 5, 3, 3)
    weight = PackedWeight(pack_signs(w.flatten(1)), torch.ones(1), None, 45, [1])
    arguments = (weight, ConvGeometry((3, 3), padding=(1, 1)))
    y = interpreted.binary_conv2d(x, *arguments, "exact", "none")
    expected = F.conv2d(x, torch.where(w >= 0, 1.0, -1.0), padding=1)
    torch.testing.assert_close(y, expected, equal_nan=True)
    y = interpreted.binary_conv2d(x, *arguments, "int8", "none")
    assert bool(y[1:3].isnan().all()) and bool(y[0].isfinite().all()) and bool((y[3] == 0).all())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_operator_and_layer(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen on a GPU, with the operator run by the interpreter."""
    layer = BinaryConv2d(6, 20, 3, stride=2, padding=1, levels=4, compute="int8", activation="relu")
    layer.bits.random_(0, 256)
    layer.prepare()
    x = torch.randn(2, 6, 5, 6)
    expected = layer(x)
    chosen: list[str] = []

    def choose(*_: Any) -> backends.Choice:
        """As on a GPU without the extension."""
        chosen.append("binary_conv2d")
        return backends.Choice("triton", "for the test")

    calls: list[int] = []

    def run(*arguments: Any) -> Tensor:
        calls.append(len(arguments))
        return library._conv2d_in_triton(*arguments)

    monkeypatch.setattr(backends, "_choose", choose)
    monkeypatch.setattr(choose, "__wrapped__", choose, raising=False)  # what is traced
    monkeypatch.setitem(sys.modules, "quantopt.kernels.binary_conv", interpreted)
    package = importlib.import_module("quantopt.kernels")  # whose module another test may have imported
    monkeypatch.setattr(package, "binary_conv", interpreted, raising=False)
    with torch.library._scoped_library("quantopt", "IMPL") as registered:
        registered.impl("binary_conv2d_triton", run, "CPU")
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(layer(x[0]), expected[0])
            torch.compiler.reset()
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            assert torch.equal(compiled(x), layer(x))
        assert len(calls) == 4 and set(chosen) == {"binary_conv2d"}
        geometry = ((3, 3), (2, 2), (1, 1), (1, 1), 1, [1, 2], "int8", "relu")
        torch.library.opcheck(
            torch.ops.quantopt.binary_conv2d_triton.default,
            (x, layer.bits, layer.scale, layer.bias, *geometry),
        )
        count = len(calls)
        grouped = BinaryConv2d(8, 8, 3, groups=8)  # too few channels to multiply
        scales = BinaryConv2d(32, 8, 1, scale="group", group_size=32)
        with torch.no_grad():
            for other, channels in ((grouped, 8), (scales, 32)):
                assert other(torch.randn(1, channels, 4, 4)).shape[1] == 8
        layer(x.requires_grad_()).sum().backward()  # the reference's
        assert len(calls) == count and x.grad is not None


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("rows", "kind"), [(49, "*bf16"), (49, "*i8"), (3136, "*fp16"), (3136, "*i8")])
def test_compiles_ahead_of_time(
    architecture: int, rows: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine code has tensor-core instructions and asynchronous copies of x, and no array in local memory."""
    from quantopt.kernels import binary_conv as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    steps = ("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w")
    compiled = compile_product(
        kernels.conv_kernel,
        kernels.block_for(rows, 256, 256),
        kind,
        architecture,
        {"ACTIVATION": "relu", **dict.fromkeys(steps, 1)},
        even=("all_channels", "channels", "all_outputs", "outputs"),
    )
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    ptx = compiled.asm["ptx"]
    assert re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)
    assert "cp.async" in ptx and ".local" not in ptx
    assert compiled.metadata.shared < 100 << 10


@pytest.mark.gpu
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=pytest.mark.brief if d == torch.bfloat16 else ()) for d in DTYPES]
)
def test_on_the_device(dtype: torch.dtype, compute: str) -> None:
    from quantopt.kernels import binary_conv as kernels

    form = {"dtype": dtype, "compute": compute, "device": "cuda"}
    for shape, outputs in (
        ((1, 64, 7, 7), 65),
        ((2, 256, 14, 14), 256),
        ((3, 33, 28, 9), 20),
        ((1, 512, 7, 7), 512),
    ):
        compare(kernels, shape, outputs, padding=(1, 1), **form)  # type: ignore[arg-type]
    compare(kernels, (2, 66, 9, 8), 34, stride=(2, 2), groups=2, levels=4, **form)  # type: ignore[arg-type]
    compare(kernels, (2, 48, 9, 8), 34, (1, 1), **form)  # type: ignore[arg-type]
