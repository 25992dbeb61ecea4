"""The AMX kernels: their source run on the host with emulated registers, what the compiler made of it, the way to them.

The emulation (csrc/cpu/kernels/amx_registers.h) follows the architecture's description of the instructions, and objects
to what the processor would refuse. What the kernels read and write lies against pages that may not be touched. Where
the processor has AMX, tests/test_binary_*.py run the kernels themselves, and int8 must be the same bits here.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from amx_host import FORMS, check, conv, linear, load, runs_gfni
from conftest import force_isa, supported_isas
from host_library import ROOT
from quantopt import _extension
from quantopt.ops.conv2d import binary_conv2d
from quantopt.ops.inputs import COMPUTE
from quantopt.ops.linear import binary_linear
from quantopt.ops.weights import pack_signs

pytestmark = pytest.mark.skipif(
    "avx512vnni" not in supported_isas() or not runs_gfni(),
    reason="weights are expanded with AVX-512 and GFNI",
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load()


def check_linear(
    library: ctypes.CDLL, m: int, n: int, k: int, form: str, planes: tuple[int, ...] = (1,), **rest: Any
) -> Tensor:
    x, w = torch.randn(m, k), torch.randn(len(planes), n, k)
    scale, bias = torch.rand(n) + 0.5, torch.randn(n)
    y = linear(library, x, w, scale, bias, form, planes, **rest)
    check(y[:, :, None, None], x[:, :, None, None], w[..., None, None], scale, bias, form, planes)
    return y


# ---- products of rows

# Rows in and around registers of 16 and pairs of them; outputs around halves of 16 and tiles of 32; inputs around
# words of 16, steps of 32 and 64, rings of 8 steps and chunks of 256.
SHAPES = [
    *itertools.product((1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65), (1, 33), (70,)),
    *itertools.product((5, 33), (15, 16, 31, 32, 64, 129), (40,)),
    *itertools.product(
        (3, 33), (33,), (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 300, 511, 513, 577)
    ),
]


@pytest.mark.parametrize("form", FORMS)
def test_linear(library: ctypes.CDLL, form: str) -> None:
    for m, n, k in SHAPES:
        check_linear(library, m, n, k, form)


@pytest.mark.parametrize("form", FORMS)
def test_linear_in_parts_is_the_same_bits(library: ctypes.CDLL, form: str) -> None:
    """As threads divide it; and a row's sums depend on K alone, whatever rows and outputs share its registers."""
    x, w, scale, bias = torch.randn(75, 330), torch.randn(1, 161, 330), torch.rand(161), torch.randn(161)
    whole_y = linear(library, x, w, scale, bias, form)
    for cuts in ((32, 0), (0, 2), (64, 5)):
        assert torch.equal(linear(library, x, w, scale, bias, form, cuts=cuts), whole_y)
    some = linear(library, x[-9:], w[:, 128:], scale[128:], bias[128:], form)
    assert torch.equal(some, whole_y[-9:, 128:])


@pytest.mark.parametrize("form", FORMS)
def test_planes(library: ctypes.CDLL, form: str) -> None:
    for planes in ((3,), (1, 1), (1, 2), (1, 2, 4, 8, 1), (64, 63) if form == "int8" else (128, 127)):
        check_linear(library, 20, 40, 300, form, planes)


@pytest.mark.parametrize("form", FORMS)
def test_extremes(library: ctypes.CDLL, form: str) -> None:
    for sign, weight_sign in itertools.product((127.0, -127.0), (1.0, -1.0)):
        x, w = torch.full((9, 5000), sign), torch.full((1, 33, 5000), weight_sign)
        y = linear(library, x, w, torch.ones(33), None, form)
        assert torch.equal(y, torch.full_like(y, sign * weight_sign * 5000))


def test_scales_of_groups(library: ctypes.CDLL) -> None:
    """fp32 scales in every form, and int8 levels, in the order of tiles."""
    m, n, k, group = 35, 40, 300, 64
    x, w, scales = torch.randn(m, k), torch.randn(1, n, k), torch.rand(n, 5) + 0.5
    ones, padded = torch.ones(n), F.pad(scales, (0, 0, 0, 24))
    tiled = padded.view(2, 32, 5).transpose(1, 2).contiguous()
    signs = torch.where(w[0] >= 0, 1.0, -1.0).double()
    dense = signs * scales.double().repeat_interleave(group, 1)[:, :k]
    for form in FORMS:
        y = linear(library, x, w, ones, None, form, group=group, group_scales=tiled)
        values = x.double()
        if form == "int8":
            s = x.abs().amax(1, keepdim=True) / 127
            values = (x / s).round().double() * s
        elif form == "bf16":
            values = x.bfloat16().double()
        size = values.abs() @ dense.abs().T
        assert bool(((y - values @ dense.T).abs() <= 2e-6 * size).all())
    levels = torch.randint(1, 128, (n, 5), dtype=torch.int8)
    tiled = F.pad(levels, (0, 0, 0, 24)).view(2, 32, 5).transpose(1, 2).contiguous()
    s = x.abs().amax(1, keepdim=True) / 127
    sums = (x / s).round().double() @ (signs * levels.double().repeat_interleave(group, 1)[:, :k]).T
    y = linear(library, x, w, ones, None, "int8", group=group, levels=tiled)
    assert torch.equal(y, sums.float() * s)


# ---- convolutions


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 5)])
def test_conv2d(library: ctypes.CDLL, kernel: tuple[int, int], form: str) -> None:
    cases = itertools.product([(1, 1), (2, 3)], [(0, 0), (2, 1)], [(1, 1), (2, 1)], [1, 3, 33, 64])
    for i, (stride, padding, dilation, channels) in enumerate(cases):
        x, w = torch.randn(3, channels, 9, 11), torch.randn(1, 35, channels, *kernel)
        scale, bias = torch.rand(35), torch.randn(35)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        layout = {"together": 1 + i % 3, "side_by_side": i % 5 < 2, "cut": i % 4}
        y = conv(library, x, w, scale, bias, form, **layout, **geometry)  # type: ignore[arg-type]
        check(y, x, w, scale, bias, form, **geometry)


@pytest.mark.parametrize("form", FORMS)
def test_layouts_are_the_same_bits(library: ctypes.CDLL, form: str) -> None:
    """Whatever images alternate and blocks are cut; images that fill registers leave out what is beyond the border."""
    for size, channels in (((2, 3), 40), ((4, 16), 70), ((7, 5), 20), ((1, 17), 64)):
        x, w, scale = torch.randn(5, channels, *size), torch.randn(1, 70, channels, 3, 3), torch.rand(70)
        y = conv(library, x, w, scale, None, form, padding=(1, 1))
        check(y, x, w, scale, None, form, padding=(1, 1))
        for together, cut in ((2, 1), (4, 0), (5, 2)):
            other = conv(library, x, w, scale, None, form, together=together, cut=cut, padding=(1, 1))
            assert torch.equal(other, y)
        beside = conv(library, x, w, scale, None, form, side_by_side=True, padding=(1, 1))
        check(beside, x, w, scale, None, form, padding=(1, 1))


@pytest.mark.parametrize("form", FORMS)
def test_geometries_of_few_pixels(library: ctypes.CDLL, form: str) -> None:
    """One column or row, nothing but border around it, kernel positions that meet nothing, and many of them."""
    far = 2**30
    for size, kernel, geometry in (
        ((6, 1), (3, 3), {"padding": (1, 1)}),
        ((1, 6), (3, 3), {"padding": (1, 1), "stride": (2, 2)}),
        ((1, 1), (3, 3), {"padding": (1, 1)}),
        ((3, 4), (3, 3), {"padding": (far, far), "dilation": (far, far), "stride": (far, far)}),
        ((3, 3), (3, 3), {"padding": (4, 4)}),
        ((3, 5), (3, 3), {"padding": (7, 7), "dilation": (7, 7)}),
        ((9, 8), (6, 7), {"padding": (3, 3), "stride": (3, 2)}),
        ((7, 7), (1, 1), {"stride": (2, 2)}),
        ((5, 40), (1, 3), {"stride": (1, 4)}),
    ):
        x, w, scale = torch.randn(2, 20, *size), torch.randn(1, 33, 20, *kernel), torch.rand(33)
        for together, beside in ((1, False), (2, False), (2, True)):
            y = conv(library, x, w, scale, None, form, together=together, side_by_side=beside, **geometry)
            if geometry.get("dilation") == (far, far):
                centre = w[..., 1:2, 1:2]
                check(y, x, centre, scale, None, form, stride=(9, 9))
            else:
                check(y, x, w, scale, None, form, **geometry)


@pytest.mark.parametrize("form", FORMS)
def test_groups_and_planes(library: ctypes.CDLL, form: str) -> None:
    x, planes = torch.randn(2, 120, 5, 6), (1, 2)
    for group, beside in ((0, False), (1, True), (2, False)):
        w, scale = torch.randn(2, 35, 40, 3, 3), torch.rand(35)
        y = conv(library, x, w, scale, None, form, planes, group=group, side_by_side=beside, padding=(1, 1))
        part = x[:, 40 * group : 40 * (group + 1)]
        check(y, part, w, scale, None, form, planes, image=x, padding=(1, 1))


@pytest.mark.parametrize("planes", [(1,), (1, 1), (2, 2)])
def test_levels_of_groups_of_weights(library: ctypes.CDLL, planes: tuple[int, ...]) -> None:
    """Groups along rows of W, [channels, kernel positions], that end within a kernel's positions."""
    for channels, group in ((20, 32), (70, 64)):
        x, w = torch.randn(2, channels, 5, 6), torch.randn(len(planes), 70, channels, 3, 3)
        levels = torch.randint(1, 128, (70, -(-channels * 9 // group)), dtype=torch.int8)
        tiled = F.pad(levels, (0, 0, 0, 26)).view(3, 32, -1).transpose(1, 2).contiguous()
        y = conv(
            library, x, w, torch.ones(1), None, "int8", planes, levels=(group, tiled), cut=1, padding=(1, 1)
        )
        signs = (torch.where(w >= 0, 1.0, -1.0) * planes[0]).sum(0)
        dense = signs.flatten(1) * levels.repeat_interleave(group, 1)[:, : channels * 9]
        s = x.abs().amax((1, 2, 3), keepdim=True) / 127
        sums = F.conv2d((x / s).round().double(), dense.view(70, channels, 3, 3).double(), padding=1)
        assert torch.equal(y, sums.float() * s)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_in_and_out(library: ctypes.CDLL, form: str) -> None:
    """y is rounded from what it is in fp32."""
    x, w, scale, bias = (
        torch.randn(2, 40, 5, 6),
        torch.randn(1, 37, 40, 3, 3),
        torch.rand(37),
        torch.randn(37),
    )
    x = x if form == "exact" else x.bfloat16()
    y = conv(library, x, w, scale, bias, form)
    assert torch.equal(conv(library, x, w, scale, bias, form, y_type=torch.bfloat16), y.bfloat16())
    check(y, x.float(), w, scale, bias, form)
    rows = x.float().flatten(2).transpose(1, 2).reshape(-1, 40)
    y = linear(library, rows, w[..., 0, 0], scale, bias, form)
    assert torch.equal(
        linear(library, rows, w[..., 0, 0], scale, bias, form, y_type=torch.bfloat16), y.bfloat16()
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations(library: ctypes.CDLL, activation: str) -> None:
    x, w, scale, bias = (
        torch.randn(2, 40, 5, 6),
        torch.randn(1, 37, 40, 3, 3),
        torch.rand(37) / 9,
        torch.randn(37),
    )
    for form in ("bf16", "exact"):
        y = conv(library, x, w, scale, bias, form, activation=activation)
        check(y, x, w, scale, bias, form, activation=activation)


@pytest.mark.parametrize("planes", [(1,), (1, 1), (1, 2)])
@pytest.mark.parametrize("form", ["bf16", "exact"])
def test_not_finite(library: ctypes.CDLL, form: str, planes: tuple[int, ...]) -> None:
    """Infinities and NaN as in a dense product with the levels, in the sums that hold them alone."""
    x, w = torch.randn(2, 40, 6, 7), torch.randn(len(planes), 33, 40, 3, 3)
    x[0, 5, 0, 0], x[0, 39, 5, 6], x[0, 3, 3, 3] = torch.inf, -torch.inf, torch.nan
    signs = torch.where(w >= 0, 1.0, -1.0).double() * torch.tensor(planes).view(-1, 1, 1, 1, 1)
    values = (x.bfloat16() if form == "bf16" else x).double()
    expected = F.conv2d(values, signs.sum(0), padding=1)
    for beside in (False, True):
        y = conv(library, x, w, torch.ones(1), None, form, planes, side_by_side=beside, padding=(1, 1))
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert bool(y[0].isnan().any()) and bool(y[0].isinf().any()) and bool(y[1].isfinite().all())


@pytest.mark.parametrize("form", ["bf16", "exact"])
def test_small_and_large_images(library: ctypes.CDLL, form: str) -> None:
    """Denormals, which products of bfloat16 take as zero, and the largest numbers: multiplied by powers of two."""
    for size in (2.0**-120, 2.0**-135, 2.0**100):
        x, w = torch.randn(2, 40, 5, 5), torch.randn(1, 33, 40, 3, 3)
        x[1] *= size
        x[1, 0, 2, 2] = 3 * size
        values = (x.bfloat16() if form == "bf16" else x).double()
        expected = F.conv2d(values, torch.where(w[0] >= 0, 1.0, -1.0).double())
        y = conv(library, x, w, torch.ones(1), None, form)
        error = (y.double() - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
        assert bool((error < (1e-3 if size == 2.0**-135 else 1e-6)).all())


def test_zeros_and_not_finite_in_int8(library: ctypes.CDLL) -> None:
    x, w, bias = torch.randn(3, 40, 4, 5), torch.randn(1, 33, 40, 3, 3), torch.randn(33)
    x[0], x[1, 3, 1, 1] = 0.0, torch.inf
    y = conv(library, x, w, torch.ones(1), bias)
    assert torch.equal(y[0], bias.view(-1, 1, 1).expand_as(y[0]))
    assert bool(y[1].isnan().all()) and bool(y[2].isfinite().all())


def test_what_is_not_for_amx(library: ctypes.CDLL) -> None:
    """Levels that are not exact."""
    for planes, form in (((128, 127, 2), "bf16"), ((127, 1), "int8")):
        w = torch.randn(len(planes), 5, 20)
        with pytest.raises(AssertionError, match="not for AMX"):
            linear(library, torch.randn(8, 20), w, torch.ones(5), None, form, planes)
        with pytest.raises(AssertionError, match="not for AMX"):
            conv(library, torch.randn(1, 20, 3, 3), w[..., None, None], torch.ones(5), None, form, planes)


@pytest.mark.skipif("amx" not in supported_isas(), reason="the processor has no AMX")
def test_the_processor_gives_the_same_bits(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    force_isa(monkeypatch, "amx")
    for form, (shape, stride) in itertools.product(FORMS, (((3, 64, 16, 16), 1), ((2, 70, 9, 7), 2))):
        x = torch.randn(shape).bfloat16().float() if form == "bf16" else torch.randn(shape)
        w, scale, bias = torch.randn(1, 40, shape[1], 3, 3), torch.rand(40), torch.randn(40)
        emulated = conv(library, x, w, scale, bias, form, padding=(1, 1), stride=(stride, stride))
        bits = pack_signs(w[0].flatten(1))
        y = binary_conv2d(x, bits, scale, bias, kernel_size=3, padding=1, stride=stride, compute=form)
        assert torch.equal(y, emulated) if form == "int8" else torch.allclose(y, emulated, atol=1e-4)


@pytest.mark.skipif("amx" not in supported_isas(), reason="the processor has no AMX")
@pytest.mark.parametrize(("kernel", "compute", "planes", "group"), [
    (3, "exact", [1], 0), (3, "exact", [1, 2], 0), (3, "int8", [1, 2], 64), (3, "int8", [1], 64), (1, "int8", [1, 2], 0)
])  # fmt: skip
def test_an_image_does_not_depend_on_others(
    kernel: int, compute: str, planes: list[int], group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides of the thresholds, and where a pixel is tiny beside the rest."""
    force_isa(monkeypatch, "amx")
    for size in (2, 3, 8):
        x = torch.randn(13, 64, size, size)
        x[:, :, 0, 0] *= 2.0**-100
        k = 64 * kernel**2
        bits = pack_signs(torch.randn(len(planes), 64, k))
        scale = torch.rand(64, -(-k // group)) if group else torch.rand(64)

        def run(x: Tensor, bits: Tensor = bits, scale: Tensor = scale) -> Tensor:
            return binary_conv2d(
                x, bits, scale, kernel_size=kernel, padding=kernel // 2, compute=compute, group_size=group,
                plane_weights=planes,
            )  # fmt: skip

        y = run(x)
        for image in range(0, 13, 4):
            assert torch.equal(run(x[image : image + 1])[0], y[image]), (size, image)


def test_the_emulation_objects(library: ctypes.CDLL) -> None:
    assert b"do not fit" in library.breach_on_host(0)
    assert b"not configured" in library.breach_on_host(1)
    assert b"illegal configuration" in library.breach_on_host(2)


# ---- what the compiler made of it


@pytest.fixture(scope="module", params=["amx_linear", "amx_conv"])
def assembly(request: pytest.FixtureRequest) -> str:
    objects = list(ROOT.glob(f"build/cpython*/kernels/{request.param}.amx.o"))
    objdump = shutil.which("objdump")
    if objdump is None or not objects:
        pytest.skip("needs objdump and a build tree in which the compiler knows AMX")
    newest = max(objects, key=lambda path: path.stat().st_mtime)
    command = [objdump, "-d", "--no-show-raw-insn", str(newest)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("product", ["tdpbssd", "tdpbf16ps"])
def test_registers_are_multiplied_two_by_two(assembly: str, product: str) -> None:
    products = set(re.findall(rf"{product}\s+(%tmm\d),(%tmm\d),(%tmm\d)", assembly))  # weights, rows, sums
    assert products == {
        (f"%tmm{6 + half}", f"%tmm{4 + row}", f"%tmm{2 * row + half}") for row in (0, 1) for half in (0, 1)
    }
    for instruction in ("tileloadd", "tilestored", "tilezero", "tilerelease"):
        assert instruction in assembly


def test_the_whole_configuration_is_written(assembly: str) -> None:
    """All 64 bytes must be stored before ldtilecfg: a compiler told of 8 may drop the rest."""
    functions = [f for f in re.split(r"\n(?=[0-9a-f]+ <)", assembly) if "ldtilecfg" in f]
    assert functions
    for function in functions:
        loads = list(re.finditer(r"ldtilecfg\s+(-?0x[0-9a-f]+)?\((%r\w+)\)", function))
        assert len(loads) == function.count("ldtilecfg")
        for match in loads:
            first, base = int(match[1] or "0", 16), match[2]
            written: set[int] = set()
            for line in function[: match.start()].splitlines():
                store = re.search(
                    rf"\s(v?mov\w*|vextract\w+)\s+(?:\$\w+,)?(?:[%$]\w+),(-?0x[0-9a-f]+)?\({base}\)", line
                )
                if store is None:
                    continue
                source = re.search(r"%([xyz]mm|r\w+|e\w+|\w+)", line)
                assert source is not None
                width = {"x": 16, "y": 32, "z": 64}.get(source[1][0] if source[1][1:3] == "mm" else "", 0)
                width = width or {"movb": 1, "movw": 2, "movl": 4, "movq": 8}.get(store[1], 0)
                width = width or (8 if source[1].startswith("r") else 4 if source[1].startswith("e") else 1)
                written |= set(range(int(store[2] or "0", 16), int(store[2] or "0", 16) + width))
            missing = set(range(first, first + 64)) - written
            assert not missing, (match[0], sorted(missing))


# ---- the way to it


@pytest.mark.skipif("amx" in supported_isas(), reason="the processor has AMX")
def test_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if "amx" not in _extension.build_info()["isas"]:
        pytest.skip("the compiler does not know AMX")
    force_isa(monkeypatch, "amx")
    x, bits = torch.randn(8, 16), torch.zeros(4, 2, dtype=torch.uint8)
    for compute in COMPUTE:
        with pytest.raises(
            RuntimeError, match=r"QUANTOPT_CPU_ISA=amx (is not supported by this processor|needs)"
        ):
            binary_linear(x, bits, torch.ones(4), in_features=16, compute=compute)
