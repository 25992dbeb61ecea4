"""The AMX kernels: their source run on the host with emulated registers, what the compiler made of it, the way to them.

The emulation (csrc/cpu/kernels/amx_registers.h) follows the architecture's description of the instructions, and objects
to what the processor would refuse. Where the processor has AMX, tests/test_binary_*.py run the kernels themselves.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import force_isa, supported_isas
from host_library import ROOT, shared_library
from quantopt import _extension
from quantopt.ops.inputs import ACTIVATIONS, COMPUTE
from quantopt.ops.linear import binary_linear
from quantopt.ops.tiles import conv_tiles
from quantopt.ops.weights import pack_signs
from quantopt.reference import binary as reference

Convolve = Callable[..., Tensor]

pytestmark = pytest.mark.skipif(
    "avx512vnni" not in supported_isas(), reason="the weights are expanded with AVX-512"
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    flags = ["-O2", "-march=x86-64-v4", "-Wno-psabi"]
    path = shared_library("amx_on_host", {ROOT / "tests/amx_on_host/driver.cpp": flags})
    loaded = ctypes.CDLL(str(path))
    loaded.conv_on_host.restype = loaded.breach_on_host.restype = ctypes.c_char_p
    return loaded


def convolve(
    library: ctypes.CDLL,
    q: Tensor,
    s: Tensor | None,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    plane_weights: tuple[int, ...] = (1,),
    cut: int = 0,
    group: int = 0,
    activation: str = "none",
    **geometry: tuple[int, int],
) -> Tensor:
    """y of q [B, C, H, W] with the signs of w [P, N, C, kh, kw], by the emulated kernel: of int8 (q whole numbers)
    with scales s, of bfloat16 (which q is rounded to) without.

    If q has more channels than w, they are those of group ``group``, and the outputs too.
    """
    planes, outputs, channels, *kernel = w.shape
    stride, padding, dilation = (
        geometry.get(name, (default, default))
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    size = [
        (q.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    tiles = conv_tiles(pack_signs(w.flatten(2)), channels, kernel)
    assert tiles is not None
    x = q.permute(0, 2, 3, 1).to(torch.bfloat16 if s is None else torch.int8).contiguous()
    groups = q.shape[1] // channels
    y = torch.full((q.shape[0], *size, groups * outputs), torch.nan)
    numbers = [q.shape[0], *q.shape[2:], channels, x.shape[3], *size, outputs, y.shape[3]]
    numbers += [*kernel, *stride, *padding, *dilation]

    def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())

    fault = library.conv_on_host(
        (ctypes.c_int64 * len(numbers))(*numbers),
        ctypes.c_int64(planes),
        pointer(tiles),
        (ctypes.c_int32 * planes)(*plane_weights),
        pointer(scale),
        ctypes.c_int64(0 if scale.numel() == 1 else 1),
        pointer(bias),
        pointer(x[..., group * channels :]),
        pointer(s),
        ACTIVATIONS.index(activation),
        pointer(y[..., group * outputs :]),
        ctypes.c_int64(cut),
    )
    assert fault is None, fault
    return y[..., group * outputs : (group + 1) * outputs].permute(0, 3, 1, 2)


def expected(
    q: Tensor,
    s: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    plane_weights: tuple[int, ...] = (1,),
    **geometry: tuple[int, int],
) -> Tensor:
    """The same from whole sums, exact in float64, and the roundings of the kernels after them: the same bits."""
    signs = torch.where(w >= 0, 1.0, -1.0).double() * torch.tensor(plane_weights).view(-1, 1, 1, 1, 1)
    sums = F.conv2d(q.double(), signs.sum(0), **geometry).float()  # type: ignore[arg-type]
    y = sums * (scale.view(-1, 1, 1) * s.view(-1, 1, 1, 1))
    return y if bias is None else y + bias.view(-1, 1, 1)


def linear_case(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q = torch.randint(-127, 128, (m, k, 1, 1)).double()
    return q, torch.rand(m), torch.randn(1, n, k, 1, 1), torch.rand(n) + 0.5, torch.randn(n)


def test_linear(library: ctypes.CDLL) -> None:
    """Rows in and around registers of 16, pairs of them and blocks of 256; outputs around 16, 32 and 128; inputs around
    words of 16, steps of 64, chunks of 256 and panels of 512."""
    shapes = list(itertools.product((8, 15, 16, 17, 31, 32, 33, 47, 64, 129), (1, 17, 32, 33), (70,)))
    shapes += list(itertools.product((9, 33), (15, 16, 31, 127, 128, 129, 161), (64,)))
    shapes += list(
        itertools.product(
            (8, 33), (33,), (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 511, 512, 513, 1029)
        )
    )
    shapes += [(255, 5, 20), (256, 5, 20), (257, 5, 20), (300, 33, 70), (530, 3, 600)]
    for m, n, k in shapes:
        case = linear_case(m, n, k)
        assert torch.equal(convolve(library, *case), expected(*case)), (m, n, k)


@pytest.mark.parametrize("cut", range(10))
def test_parts_are_the_same_bits(library: ctypes.CDLL, cut: int) -> None:
    """As two threads divide the 9 parts: 3 bands of outputs of 3 blocks of rows, the last of 1 to 10 rows."""
    case = linear_case(513 + cut, 261, 130)
    assert torch.equal(convolve(library, *case, cut=cut), expected(*case))


def test_extremes_planes_and_scales(library: ctypes.CDLL) -> None:
    for sign, weight_sign in itertools.product((127.0, -127.0), (1.0, -1.0)):
        q, s, w, _, _ = linear_case(9, 33, 5000)
        q, w = torch.full_like(q, sign), torch.full_like(w, weight_sign)
        y = convolve(library, q, torch.ones(9), w, torch.ones(1))
        assert torch.equal(y, torch.full_like(y, sign * weight_sign * 5000))
    q, s, _, scale, bias = linear_case(20, 40, 300)
    s[3], s[4], scale[::2] = torch.nan, 0.0, 0.0
    for plane_weights in ((1, 1), (1, 2), (1, 2, 4, 8), (127,), (64, 63)):
        w = torch.randn(len(plane_weights), 40, 300, 1, 1)
        y = convolve(library, q, s, w, scale, bias, plane_weights)
        assert torch.equal(y.nan_to_num(7), expected(q, s, w, scale, bias, plane_weights).nan_to_num(7))
        assert bool(y[3].isnan().all())
        y = convolve(library, q, s, w, scale[1:2], None, plane_weights)
        assert torch.equal(y[5:], expected(q, s, w, scale[1:2], None, plane_weights)[5:])


def test_conv2d(library: ctypes.CDLL) -> None:
    shapes = itertools.product(
        [(3, 3), (1, 1), (2, 5)],
        [(1, 1), (2, 3)],
        [(0, 0), (2, 1)],
        [(1, 1), (2, 1)],
        [1, 3, 16, 40, 64, 128],
    )
    for kernel, stride, padding, dilation, channels in shapes:
        q = torch.randint(-127, 128, (2, channels, 9, 11)).double()
        w, s, scale, bias = (
            torch.randn(1, 35, channels, *kernel),
            torch.rand(2),
            torch.rand(35),
            torch.randn(35),
        )
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        assert torch.equal(
            convolve(library, q, s, w, scale, bias, **geometry),
            expected(q, s, w, scale, bias, **geometry),
        ), (kernel, geometry, channels)


def test_groups(library: ctypes.CDLL) -> None:
    q = torch.randint(-127, 128, (2, 120, 5, 6)).double()
    for group in range(3):
        w, s, scale = torch.randn(1, 35, 40, 3, 3), torch.rand(2), torch.rand(35)
        y = convolve(library, q, s, w, scale, group=group, padding=(1, 1))
        part = q[:, 40 * group : 40 * (group + 1)]
        assert torch.equal(y, expected(part, s, w, scale, None, padding=(1, 1)))


# ---- bfloat16


def multiplied(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    plane_weights: tuple[int, ...] = (1,),
    activation: str = "none",
    **geometry: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """y in float64 of x [B, C, H, W] rounded to bfloat16, and the sum of the magnitudes that errors are relative to."""
    signs = torch.where(w >= 0, 1.0, -1.0).double() * torch.tensor(plane_weights).view(-1, 1, 1, 1, 1)
    levels = signs.sum(0) * scale.double().view(-1, 1, 1, 1)
    offset = None if bias is None else bias.double()
    values = x.to(torch.bfloat16).double()
    y = reference.activate(F.conv2d(values, levels, offset, **geometry), activation)  # type: ignore[arg-type]
    size = F.conv2d(values.abs(), levels.abs(), None if offset is None else offset.abs(), **geometry)  # type: ignore[arg-type]
    return y, size


def check_halves(library: ctypes.CDLL, x: Tensor, w: Tensor, *rest: Any, **form: Any) -> Tensor:
    """The emulated kernel's y, which fp32 sums of the products of bfloat16 must be; in one call and in four."""
    y = convolve(library, x, None, w, *rest, **form)
    expected, size = multiplied(x, w, *rest, **form)
    error = (y.double() - expected).abs()
    assert bool((error <= 2e-6 * size).all()), (tuple(x.shape), tuple(w.shape), float((error / size).max()))
    return y


def halves_case(m: int, n: int, k: int, planes: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(m, k, 1, 1), torch.randn(planes, n, k, 1, 1), torch.rand(n) + 0.5, torch.randn(n)


# Rows around registers of 16, pairs of them and blocks of 128; outputs around halves of 16, tiles of 32 and bands of
# 128; inputs around pairs, words of 16, steps of 32, panels of 256 and chunks of 256.
HALVES = [
    *itertools.product((8, 15, 16, 17, 31, 32, 33, 64, 129), (1, 17, 33), (70,)),
    *itertools.product((9, 33), (15, 16, 31, 32, 127, 128, 129, 161), (40,)),
    *itertools.product((8, 33), (33,), (1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 255, 256, 257, 300, 511, 513)),
    *((127, 5, 20), (128, 5, 20), (130, 3, 600)),
]


def test_bfloat16_linear(library: ctypes.CDLL) -> None:
    for m, n, k in HALVES:
        check_halves(library, *halves_case(m, n, k))


@pytest.mark.parametrize("cut", range(10))
def test_bfloat16_in_parts_is_the_same_bits(library: ctypes.CDLL, cut: int) -> None:
    """As two threads divide it; and a row's sums depend on K alone, whatever rows and outputs share its registers."""
    x, w, scale, bias = halves_case(257 + cut, 261, 330)
    whole = check_halves(library, x, w, scale, bias)
    assert torch.equal(convolve(library, x, None, w, scale, bias, cut=cut), whole)
    some = convolve(library, x[-9:], None, w[:, 128:], scale[128:], bias[128:])
    assert torch.equal(some, whole[-9:, 128:])


def test_bfloat16_is_rounded_to_levels_planes_and_extremes(library: ctypes.CDLL) -> None:
    for sign, weight_sign in itertools.product((255.0, -255.0), (1.0, -1.0)):
        x, w, *_ = halves_case(9, 33, 4000)
        x, w = torch.full_like(x, sign), torch.full_like(w, weight_sign)
        y = convolve(library, x, None, w, torch.ones(1))
        assert torch.equal(y, torch.full_like(y, sign * weight_sign * 4000))
    for plane_weights in (
        (3,),
        (1, 1),
        (1, 2),
        (1, 2, 4, 8),
        (128, 127),
        (64, 32, 128, 16, 8, 4, 3, 1),
        (128, 128),
    ):
        x, w, scale, bias = halves_case(20, 40, 300, len(plane_weights))
        scale[::2] = 0.0
        y = check_halves(library, x, w, scale, bias, plane_weights)
        assert torch.equal(y[:, ::2, 0, 0], bias[::2].expand(20, -1))
        check_halves(library, x, w, scale[1:2], None, plane_weights)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_bfloat16_activations(library: ctypes.CDLL, activation: str) -> None:
    x, w, scale, bias = halves_case(17, 37, 80)
    check_halves(library, x, w, scale / 9, bias, activation=activation)


@pytest.mark.parametrize("plane_weights", [(1,), (1, 1), (1, 2)])
def test_bfloat16_not_finite(library: ctypes.CDLL, plane_weights: tuple[int, ...]) -> None:
    """Infinities and NaN as in a dense product with the levels, in the rows that hold them alone."""
    x, w, *_ = halves_case(18, 40, 70, len(plane_weights))
    x[1, 5], x[2, 69], x[3, 0], x[16, 3:5] = torch.inf, -torch.inf, torch.nan, torch.inf
    x[5, 7] = 3.4e38  # an infinity, rounded to bfloat16
    y = convolve(library, x, None, w, torch.ones(1), None, plane_weights)
    expected = multiplied(x, w, torch.ones(1), None, plane_weights)[0]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert bool(y[[1, 2, 5]].isinf().any(1).all()) and bool(y[3].isnan().all()) and bool(y[16].isnan().any())
    finite = [m for m in range(18) if m not in (1, 2, 3, 5, 16)]
    assert bool(y[finite].isfinite().all())


def test_bfloat16_denormals_are_zero(library: ctypes.CDLL) -> None:
    """Those of x, and those that sums come to; next to them the smallest normal numbers are not."""
    x, w = torch.zeros(8, 40, 1, 1), torch.ones(1, 5, 40, 1, 1)
    x[0, 0], x[1, 0], x[2, 0] = 2.0**-127, 2.0**-126, -(2.0**-126)
    x[3, 0], x[3, 2] = 1.5 * 2.0**-126, -(2.0**-126)
    y = convolve(library, x, None, w, torch.ones(1))
    assert torch.equal(y[:4, 0, 0, 0], torch.tensor([0.0, 2.0**-126, -(2.0**-126), 0.0]))


def test_bfloat16_conv2d(library: ctypes.CDLL) -> None:
    shapes = itertools.product(
        [(3, 3), (1, 1), (2, 5)], [(1, 1), (2, 3)], [(0, 0), (2, 1)], [(1, 1), (2, 1)], [1, 3, 16, 40, 64]
    )
    for kernel, stride, padding, dilation, channels in shapes:
        x, w = torch.randn(2, channels, 9, 11), torch.randn(1, 35, channels, *kernel)
        scale, bias = torch.rand(35), torch.randn(35)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        check_halves(library, x, w, scale, bias, **geometry)


def test_bfloat16_conv2d_in_groups_and_parts(library: ctypes.CDLL) -> None:
    x = torch.randn(5, 120, 5, 6)
    for group in range(3):
        w, scale = torch.randn(2, 35, 40, 3, 3), torch.rand(35)
        form = {"plane_weights": (1, 2), "padding": (1, 1)}
        y = convolve(library, x, None, w, scale, group=group, **form)
        assert torch.equal(y, convolve(library, x, None, w, scale, group=group, cut=1, **form))
        part = x[:, 40 * group : 40 * (group + 1)]
        expected, size = multiplied(part, w, scale, **form)
        assert bool(((y.double() - expected).abs() <= 2e-6 * size).all())


def test_what_is_not_for_amx(library: ctypes.CDLL) -> None:
    """Levels that are not exact."""
    for plane_weights, s in (((128, 127, 2), None), ((127, 1), torch.ones(8))):
        x, w, *_ = halves_case(8, 5, 20, len(plane_weights))
        with pytest.raises(AssertionError, match="not for AMX"):
            convolve(library, x, s, w, torch.ones(1), None, plane_weights)


def test_the_emulation_objects(library: ctypes.CDLL) -> None:
    assert b"do not fit" in library.breach_on_host(0)
    assert b"not configured" in library.breach_on_host(1)
    assert b"illegal configuration" in library.breach_on_host(2)


# ---- what the compiler made of it


@pytest.fixture(scope="module")
def assembly() -> str:
    objects = list(ROOT.glob("build/cpython*/kernels/binary_amx.amx.o"))
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
