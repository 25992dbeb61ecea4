"""The AMX kernels: their source run on the host with emulated tiles, what the compiler made of it, the way to them.

The emulation (csrc/cpu/kernels/amx_tile.h) follows the architecture's description of the instructions, and objects to
what the processor would refuse. Where the processor has AMX, tests/test_binary_*.py run the kernels themselves.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import supported_isas
from quantopt import _extension
from quantopt.ops import binary as ops

ROOT = Path(__file__).resolve().parent.parent
Convolve = Callable[..., Tensor]

pytestmark = pytest.mark.skipif(
    "avx512vnni" not in supported_isas(), reason="the weights are expanded with AVX-512"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("amx_on_host") / "amx.so"
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-march=x86-64-v4", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [compiler, *flags, str(ROOT / "tests/amx_on_host/driver.cpp"), "-o", str(path)], check=True
    )
    loaded = ctypes.CDLL(str(path))
    loaded.conv_on_host.restype = loaded.breach_on_host.restype = ctypes.c_char_p
    return loaded


def convolve(
    library: ctypes.CDLL,
    q: Tensor,
    s: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    plane_weights: tuple[int, ...] = (1,),
    cut: tuple[int, int] = (0, 0),
    group: int = 0,
    **geometry: tuple[int, int],
) -> Tensor:
    """y of q [B, C, H, W] (whole numbers) with the signs of w [P, N, C, kh, kw], by the emulated kernel.

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
    tiles = ops.conv_tiles(ops.pack_signs(w.flatten(2)), channels, kernel)
    assert tiles is not None
    x = q.permute(0, 2, 3, 1).to(torch.int8).contiguous()
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
        pointer(y[..., group * outputs :]),
        ctypes.c_int64(cut[0]),
        ctypes.c_int64(cut[1]),
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
    """Rows in and around tiles of 16, pairs of them and blocks of 256; outputs around 16, 32 and 128; inputs around
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


@pytest.mark.parametrize("cut", [(7, 0), (0, 128), (260, 128), (16, 256)])
def test_parts_are_the_same_bits(library: ctypes.CDLL, cut: tuple[int, int]) -> None:
    case = linear_case(300, 261, 130)
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


def test_tiles_are_multiplied_two_by_two(assembly: str) -> None:
    products = set(re.findall(r"tdpbssd\s+(%tmm\d),(%tmm\d),(%tmm\d)", assembly))  # weights, rows, sums
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
    monkeypatch.setenv("QUANTOPT_CPU_ISA", "amx")
    x, bits = torch.randn(8, 16), torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(
        RuntimeError, match=r"QUANTOPT_CPU_ISA=amx (is not supported by this processor|needs)"
    ):
        ops.binary_linear(x, bits, torch.ones(4), in_features=16, compute="int8")
