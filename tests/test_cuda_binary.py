"""The CUDA products with packed weights: their source run on the host, what nvcc made of it, results on a GPU."""

import contextlib
import itertools
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.cpp_extension import include_paths, library_paths

from quantopt import _extension, backends
from quantopt.nn import BinaryLinear
from quantopt.ops import binary as ops
from quantopt.reference import binary as reference
from test_cuda_build import cuobjdump, extension_file, needs_cuda_build  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("gemv", "mma", "library", "wgmma")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((8, 32, 1024), (8, 128, 256), (16, 128, 256), (32, 256, 128), (64, 256, 128))  # tokens, rows, depth


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The operators and kernels of csrc/cuda, compiled for the host: torch.ops.quantopt_host."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ and x86-64")
    objects = tmp_path_factory.mktemp("cuda_blocks_on_host")
    folder = ROOT / "tests/cuda_blocks_on_host"
    common = [compiler, "-std=c++20", "-fPIC", "-ffp-contract=off", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    with_torch = ["-O0", "-g0", *(f"-I{path}" for path in include_paths())]
    device = ["-O2", "-w", "-DQUANTOPT_HAVE_SM90A", "-x", "c++"]
    commands = [
        [*common, *with_torch, "-c", str(source), "-o", str(objects / f"{source.stem}.o")]
        for source in (folder / "driver.cpp", ROOT / "csrc/binary_arguments.cpp")
    ]
    commands += [
        [*common, *device, "-c", str(source), "-o", str(objects / f"{source.stem}.o")]
        for source in sorted((ROOT / "csrc/cuda").glob("binary_*.cu"))
    ]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in running] == [0] * len(running)
    library = objects / "binary.so"
    torch_library = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu"]
    subprocess.run(
        [compiler, "-shared", *map(str, objects.glob("*.o")), *torch_library, "-o", str(library)], check=True
    )
    torch.ops.load_library(str(library))
    return torch.ops.quantopt_host


def guarded_copy(t: Tensor) -> Tensor:
    """The same elements and strides, without any around them."""
    if t.numel() == 0:
        return t.clone()
    length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided([length], [1], t.storage_offset()).clone().as_strided(t.shape, t.stride())


@contextlib.contextmanager
def placing(host: Any, device: str, capability: int, processors: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """What brings a tensor to ``device``: to the host, between guard pages, with such a device emulated there."""
    if device != "cpu":
        yield lambda t: t.to(device)
        return
    host.device(capability, processors)
    host.guard(True)
    try:
        yield guarded_copy
    finally:
        host.guard(False)


class Case:
    """A product with random weights; its exact result, and what the error is relative to."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        int8: bool = False,
        group: int = 0,
        plane_weights: Sequence[int] = (1,),
        x: Tensor | None = None,
        one_scale: bool = False,
        bias: bool = True,
        activation: str = "none",
    ) -> None:
        self.x = torch.randn(m, k).to(dtype) if x is None else x
        self.int8, self.group, self.activation, self.k = int8, group, activation, k
        self.plane_weights = list(plane_weights)
        self.bits = ops.pack_signs(torch.randn(len(self.plane_weights), n, k))
        if k % 8:
            self.bits[..., -1] |= (0xFF << (k % 8)) & 0xFF  # bits beyond K must not matter
        shape = [n, -(-k // group)] if group else [1 if one_scale else n]
        self.scale = torch.rand(shape) + 0.5
        self.bias = torch.randn(n) if bias else None

    def run(
        self,
        host: Any,
        kernel: str = "",
        shape: int = -1,
        splits: int = 1,
        *,
        capability: int = 90,
        processors: int = 4,
        device: str = "cpu",
        compute: str = "",
    ) -> Tensor:
        """y by ``kernel`` ("": the one of the table), mma divided by ``shape`` and ``splits`` (-1: as planned)."""
        tensors = [self.x, self.bits, self.scale, self.bias]
        with placing(host, device, capability, processors) as place:
            x, bits, scale, bias = (None if t is None else place(t) for t in tensors)
            compute = compute or ("int8" if self.int8 else "exact")
            tail = (self.group, compute, host.binary_tiles(bits, self.k), self.activation)
            if not kernel:
                y = host.binary_linear(x, bits, scale, bias, self.k, self.plane_weights, *tail)
            else:
                y = host.binary_linear_by(
                    x, bits, scale, bias, self.k, self.plane_weights, kernel, shape, splits, *tail
                )
        return y.cpu().clone()

    def expected(self) -> tuple[Tensor, Tensor]:
        """y in float64, and the sum of the magnitudes."""
        x = self.x
        if self.int8:
            q, s = reference.quantize_rows(x.float())
            x = q.double() * s.double()
        weight = reference.dense_weight(
            self.bits, self.scale, self.k, self.plane_weights, self.group, torch.float64
        )
        y, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        return y, size

    def check(self, y: Tensor) -> None:
        expected, size = self.expected()
        error = (y.double() - expected).abs()
        rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[y.dtype]
        allowed = 1e-6 * size + rounding * expected.abs() + 1e-30
        assert bool((error <= allowed).all()), float((error / allowed).max())

    def check_bits(self, y: Tensor) -> None:
        """Whole sums: the reference's bits."""
        assert self.int8 and not self.group
        expected = reference.binary_linear(
            self.x, self.bits, self.scale, self.bias, self.k, self.plane_weights, 0, "int8"
        )
        assert torch.equal(y, expected)


# ---- the kernels' source, run on the host


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_every_shape_at_its_edges(host: Any, shape: int, int8: bool) -> None:
    tokens, rows, depth = SHAPES[shape]
    for m, n, k in [
        (tokens, rows, depth),
        (1, 1, 1),
        (tokens - 1, rows - 1, depth - 1),
        (tokens + 1, rows + 1, depth + 8),
        (tokens // 2 + 1, rows - 31, 5 * depth + 128),
        (2 * tokens + 1, 2 * rows + 33, depth - 120),
    ]:
        case = Case(m, n, k, int8=int8)
        for splits in (1, 2, 5):
            y = case.run(host, "mma", shape, splits, capability=80)
            case.check(y)
            if int8:
                case.check_bits(y)
            if (
                splits > 1
            ):  # the blocks of a cluster add up their parts in the order in which a second kernel does
                assert torch.equal(case.run(host, "mma", shape, splits), y)


@pytest.mark.parametrize("int8", [False, True])
def test_every_number_of_rows(host: Any, int8: bool) -> None:
    for m in range(1, 130):
        case = Case(m, 33, 136, int8=int8, dtype=DTYPES[m % 3])
        y = case.run(host)
        case.check(y)
        if int8:
            case.check_bits(y)


# ---- convolutions


class ConvCase:
    """A convolution with random weights, and its exact result."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        outputs: int,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        *,
        dtype: torch.dtype = torch.bfloat16,
        int8: bool = False,
        plane_weights: Sequence[int] = (1,),
        bias: bool = True,
        activation: str = "none",
        channels_last: bool = True,
    ) -> None:
        self.x = torch.randn(shape).to(dtype)
        if channels_last:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.channels, self.taps = shape[1] // groups, kernel[0] * kernel[1]
        self.form = (kernel, stride, padding, dilation, groups, list(plane_weights))
        self.int8, self.activation = int8, activation
        k = self.channels * self.taps
        self.bits = ops.pack_signs(torch.randn(len(plane_weights), outputs, k))
        if k % 8:
            self.bits[..., -1] |= (0xFF << (k % 8)) & 0xFF  # bits beyond K must not matter
        self.scale = torch.rand(outputs) + 0.5
        self.bias = torch.randn(outputs) if bias else None

    def run(
        self,
        host: Any,
        *,
        tiles: bool = True,
        capability: int = 90,
        processors: int = 4,
        device: str = "cpu",
        compute: str = "",
    ) -> Tensor:
        tensors = [self.x, self.bits, self.scale, self.bias]
        with placing(host, device, capability, processors) as place:
            x, bits, scale, bias = (None if t is None else place(t) for t in tensors)
            derived = host.binary_conv_tiles(bits, self.channels, self.taps, self.form[4]) if tiles else None
            compute = compute or ("int8" if self.int8 else "exact")
            y = host.binary_conv2d(x, bits, scale, bias, *self.form, 0, compute, derived, self.activation)
        assert y.is_contiguous(memory_format=torch.channels_last)
        return y.cpu().clone()

    def check(self, y: Tensor) -> None:
        def result(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, weights: Any) -> Tensor:
            return reference.binary_conv2d(x, bits, scale, bias, *self.form[:5], weights, 0, compute)

        compute = "int8" if self.int8 else "exact"
        bias = None if self.bias is None else self.bias.double()
        x = self.x.float().double() if self.int8 else self.x.double()
        if self.int8:
            q, s = reference.quantize_rows(self.x.float().flatten(1))
            x = (q.double() * s.double()).view(self.x.shape)
            compute = "exact"
        expected = result(x, self.bits, self.scale.double(), bias, self.form[5])
        ones = torch.full_like(self.bits, 255)
        size = result(x.abs(), ones, self.scale.double(), None if bias is None else bias.abs(), self.form[5])
        if self.activation == "relu":
            expected = expected.relu()
        rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[y.dtype]
        assert y.dtype == self.x.dtype and y.shape == expected.shape
        error, allowed = (y.double() - expected).abs(), 1e-6 * size + rounding * expected.abs() + 1e-30
        assert bool((error <= allowed).all()), float((error / allowed).max())

    def check_bits(self, y: Tensor) -> None:
        """Whole sums, then one rounding for the scales, the product, the bias and the type each."""
        q, s = reference.quantize_rows(self.x.float().flatten(1))
        one = torch.ones(1, dtype=torch.float64)
        sums = reference.binary_conv2d(q.double().view(self.x.shape), self.bits, one, None, *self.form)
        expected = sums.float() * (self.scale.view(1, -1, 1, 1) * s.view(-1, 1, 1, 1))
        if self.bias is not None:
            expected = expected + self.bias.view(1, -1, 1, 1)
        if self.activation == "relu":
            expected = expected.relu()
        assert torch.equal(y, expected.to(y.dtype))


CONVS: list[tuple[Any, ...]] = [
    ((2, 64, 5, 6), 32),
    ((1, 3, 7, 7), 5, (3, 3), (2, 2)),
    ((1, 130, 4, 3), 33, (3, 2), (1, 2), (2, 0), (2, 1)),
    ((3, 65, 3, 3), 129, (1, 1), (1, 1), (0, 0)),
    ((1, 16, 9, 11), 260, (5, 3), (3, 1), (4, 2), (1, 3)),
    ((2, 48, 4, 5), 40, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    ((1, 128, 2, 2), 8, (7, 7), (1, 1), (3, 3)),
    ((2, 8, 12, 12), 24, (3, 3), (1, 1), (0, 0), (5, 5)),
]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("number", range(len(CONVS)))
def test_convolutions(host: Any, number: int, int8: bool) -> None:
    """Stride, padding, dilation, groups, channels and outputs around every boundary, in parts of K and whole."""
    for i, dtype in enumerate(DTYPES):
        if CONVS[number][6:] and dtype == torch.float32 and not int8:
            continue  # not taken
        case = ConvCase(
            *CONVS[number], dtype=dtype, int8=int8, bias=i != 1, activation=("none", "relu")[i % 2],
            channels_last=i != 2, plane_weights=((1,), (1, 2), (1, 1))[i],
        )  # fmt: skip
        y = case.run(host, processors=1)
        case.check(y)
        if int8:
            case.check_bits(y)
        for capability in (80, 90):
            divided = case.run(host, capability=capability, processors=64, tiles=i != 0)
            case.check(divided)
            if int8:
                assert torch.equal(divided, y)


def test_convolutions_of_many_places(host: Any) -> None:
    for outputs in (100, 300):
        for int8 in (False, True):
            case = ConvCase((2, 24, 9, 8), outputs, int8=int8)
            case.check(case.run(host))


def test_convolutions_without_pixels_and_with_a_nan(host: Any) -> None:
    case = ConvCase((2, 4, 0, 3), 6, padding=(2, 1))
    y = case.run(host)
    assert case.bias is not None and y.shape == (2, 6, 2, 3)
    assert torch.equal(y, case.bias.bfloat16().view(1, 6, 1, 1).expand_as(y))
    case = ConvCase((2, 16, 4, 4), 6, int8=True, dtype=torch.float32)
    case.x[1, 3, 2, 2] = float("nan")
    y = case.run(host)
    assert bool(y[1].isnan().all()) and not bool(y[0].isnan().any())
    case = ConvCase((1, 16, 4, 4), 6, dtype=torch.float32)
    case.x[0, 3, 0, 0] = float("inf")
    y = case.run(host)
    assert bool(y[..., :2, :2].isinf().all()) and bool(y[..., 2:, 2:].isfinite().all())


def test_convolutions_that_are_not_taken(host: Any) -> None:
    case = ConvCase((1, 16, 4, 4), 8, groups=2, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="groups"):
        case.run(host)
    assert not ops.conv_on_cuda(torch.float32, 64, 64, 2, 0, 1, "exact")


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("number", range(len(CONVS)))
def test_convolutions_on_the_device(number: int, int8: bool) -> None:
    for i, dtype in enumerate(DTYPES):
        if CONVS[number][6:] and dtype == torch.float32 and not int8:
            continue
        case = ConvCase(*CONVS[number], dtype=dtype, int8=int8, plane_weights=((1,), (1, 2), (1, 1))[i])
        y = case.run(torch.ops.quantopt, device="cuda")
        case.check(y)
        assert torch.equal(case.run(torch.ops.quantopt, device="cuda", tiles=False), y)
        if int8:
            case.check_bits(y)


@pytest.mark.gpu
@needs_cuda_build
def test_a_captured_convolution() -> None:
    case = ConvCase((4, 64, 8, 8), 128, int8=True, dtype=torch.float16)
    x, bits, scale = case.x.cuda(), case.bits.cuda(), case.scale.cuda()
    tiles = torch.ops.quantopt.binary_conv_tiles(bits, case.channels, case.taps, 1)

    def run() -> Tensor:
        y: Tensor = torch.ops.quantopt.binary_conv2d(x, bits, scale, None, *case.form, 0, "int8", tiles)
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, run())


WGMMA_TOKENS, WGMMA_ROWS = (64, 128), 256


@pytest.mark.parametrize("compute", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", range(len(WGMMA_TOKENS)))
def test_wgmma_at_its_edges(host: Any, shape: int, compute: str) -> None:
    """One block of everything and one more of each, K in parts; few processors, so that blocks take many tiles."""
    tokens, int8 = WGMMA_TOKENS[shape], compute == "int8"
    dtype = torch.float32 if int8 else getattr(torch, compute)
    for m, n, k, splits in [
        (tokens, WGMMA_ROWS, 128, 1),
        (1, 1, 1, 1),
        (tokens - 1, WGMMA_ROWS - 1, 127, 1),
        (tokens + 1, WGMMA_ROWS + 33, 5 * 128 + 72, 1),
        (3, 36, 136, 2),
        (tokens + 9, 130, 3 * 128 + 8, 3),
        (5, 300, 9 * 128, 8),
    ]:
        case = Case(m, n, k, int8=int8, dtype=dtype)
        y = case.run(host, "wgmma", shape, splits, processors=3)
        case.check(y)
        if int8:
            case.check_bits(y)


@pytest.mark.parametrize("int8", [False, True])
def test_wgmma_takes_tile_after_tile(host: Any, int8: bool) -> None:
    """More tiles than processors; the stages of the ring come round at another place in every tile."""
    case = Case(300, 600, 5 * 128, int8=int8)
    for processors in (1, 2, 9):
        y = case.run(host, "wgmma", 1, processors=processors)
        case.check(y)
        if int8:
            case.check_bits(y)


def test_wgmma_planes_types_and_strides(host: Any) -> None:
    for dtype, int8 in itertools.product(DTYPES, (False, True)):
        case = Case(70, 50, 300, dtype=dtype, int8=int8, plane_weights=(1, 2, 4), activation="relu")
        y = case.run(host, "wgmma")
        expected = case.expected()[0].relu()
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-4 * 300)
        wide = torch.randn(70, 200).to(dtype)
        for x in (wide[:, 8:72], wide[::2, :65], wide[3:4, 1:66]):
            case = Case(len(x), 40, x.shape[1], x=x, int8=int8)
            case.check(case.run(host, "wgmma"))


def test_wgmma_refuses_what_it_cannot_do(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not take"):
        Case(70, 50, 128, group=64).run(host, "wgmma")
    with pytest.raises(ValueError, match="does not take"):
        Case(70, 50, 128).run(host, "wgmma", capability=100)
    with pytest.raises(ValueError, match=r"splits in 1\.\.2"):
        Case(70, 50, 200).run(host, "wgmma", 1, 3)
    with pytest.raises(ValueError, match="shape must be less than 2"):
        Case(70, 50, 200).run(host, "wgmma", 2)
    host.device(90, 4)
    assert KERNELS[host.chosen(True, 1000, 4096, False)] == "wgmma"
    monkeypatch.setenv("QUANTOPT_WGMMA", "0")
    assert KERNELS[host.chosen(True, 1000, 4096, False)] == "library"
    with pytest.raises(ValueError, match="does not take"):
        Case(70, 50, 128).run(host, "wgmma")


INPUTS = (1, 5, 8, 31, 32, 33, 120, 127, 128, 129, 136, 255, 257, 520, 1023, 1025, 4097)


def test_library_takes_rows_in_turns(host: Any) -> None:
    """As many as have 32 MiB of sums: 119 here, and 2 more, which the library gets with 30 rows of no meaning."""
    case = Case(121, 70_400, 8, int8=True, dtype=torch.float32)
    case.check_bits(case.run(host, "library"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_rounded_to_bfloat16(host: Any, dtype: torch.dtype) -> None:
    """Multiplied once, into y of its own type: by each kernel, in turns of rows, in groups of channels."""
    cases = [(Case(m, 50, 300, dtype=dtype, plane_weights=(1, 2)), k) for m, k in ((5, "mma"), (70, "wgmma"))]
    cases += [(Case(7, 40, 96, dtype=dtype, group=32), "mma"), (Case(121, 70_400, 8, dtype=dtype), "library")]
    for case, kernel in cases:
        y = case.run(host, kernel, compute="bf16")
        assert y.dtype == dtype
        case.x = case.x.to(torch.bfloat16)
        case.check(y)
    for number in (1, 5):
        conv = ConvCase(*CONVS[number], dtype=dtype)
        y = conv.run(host, compute="bf16")
        conv.x = conv.x.to(torch.bfloat16).to(dtype)
        conv.check(y)
    assert ops.conv_on_cuda(torch.bfloat16, 24, 20, 2, 0, 1, "bf16")


def test_rows_beyond_a_grid(host: Any) -> None:
    """mma takes 65535 / 3 blocks of 8 tokens at a time: here those, and three more."""
    m = 65535 // 3 * 8
    x = torch.zeros(m + 3, 8)
    x[-5:] = torch.randn(5, 8)
    case = Case(m + 3, 2, 8, x=x.bfloat16(), group=32)
    before = host.launches()
    y = case.run(host)
    assert host.launches() - before == 1 + 2  # the tiles, and each part
    case.check(y)


def test_kept_weight(host: Any) -> None:
    """The library's products read it: one launch less, the same bits; for these bits, planes and types alone."""
    host.device(90, 4)
    kept_of = {torch.float32: torch.bfloat16, torch.bfloat16: torch.bfloat16, torch.float16: torch.float16}
    for dtype, int8 in itertools.product(DTYPES, (False, True)):
        case = Case(5, 43, 131, dtype=dtype, int8=int8, plane_weights=(1, 2))
        bits = case.bits
        kept = torch.int8 if int8 else kept_of[dtype]
        tiles = host.binary_tiles_and_weight(bits, 131, [1, 2], kept)

        def run(weights: Sequence[int], tiles: Tensor | None, case: Case = case) -> tuple[Tensor, int]:
            before = host.launches()
            arguments = (case.x, case.bits, case.scale, case.bias, 131, weights, "library", -1, 1, 0)
            y = host.binary_linear_by(*arguments, "int8" if case.int8 else "exact", tiles)
            return y.clone(), host.launches() - before

        assert torch.equal(tiles, host.binary_tiles(bits, 131))
        expected = run([1, 2], None)
        case.check(expected[0])
        y, launches = run([1, 2], tiles)
        assert torch.equal(y, expected[0]) and launches == expected[1] - 1 == 2
        for weights, others in (
            ([2, 2], tiles),
            ([1, 2], tiles.clone()),
            ([1, 2], host.binary_tiles(bits, 131)),
            ([1, 2], host.binary_tiles_and_weight(bits, 131, [1, 2], torch.bfloat16 if int8 else torch.int8)),
        ):
            y, launches = run(weights, others)
            assert torch.equal(y, run(weights, None)[0]) and launches == 3
        bits[0] ^= 255
        y, launches = run([1, 2], tiles)
        assert launches == 3 and not torch.equal(y, expected[0])
        case.check(y)
    bits = ops.pack_signs(torch.randn(2, 5, 40))
    assert host.binary_tiles_and_weight(bits[:, :0], 40, [1, 2], torch.int8).numel() == 0
    for weights, kept, message in [
        ([1, 2], torch.float32, "int8, float16 or bfloat16"),
        ([1], torch.int8, "one for each plane"),
        ([64, 64], torch.int8, "127 together"),
        ([0, 1], torch.int8, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            host.binary_tiles_and_weight(bits, 40, weights, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_become_y_row_after_row(host: Any, dtype: torch.dtype) -> None:
    """More rows than blocks of one processor; rows that begin where 16 bytes do, and others."""
    for n, int8 in itertools.product((40, 41, 516, 519), (False, True)):
        case = Case(37, n, 129, int8=int8, dtype=dtype)
        y = case.run(host, "library", processors=1)
        case.check(y)
        if int8:
            case.check_bits(y)


@pytest.mark.parametrize("kernel", ["mma", "library"])
def test_rows_longer_than_a_block_keeps(host: Any, kernel: str) -> None:
    """8192 numbers stay in the registers of the block that quantises them; the largest may be any."""
    for k, at in ((8192, 8191), (8193, 8192), (10_250, 0), (10_250, 10_249)):
        for dtype in DTYPES:
            x = torch.randn(2, k).to(dtype)
            x[:, at] = 9
            case = Case(2, 9, k, x=x, int8=True, dtype=dtype)
            case.check_bits(case.run(host, kernel))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kernel", ["gemv", "mma", "library"])
def test_inputs_and_outputs(host: Any, kernel: str, int8: bool) -> None:
    if kernel == "gemv" and not int8:
        pytest.skip("gemv multiplies whole numbers")
    for n, k in [*((33, k) for k in INPUTS), *((n, 129) for n in (1, 7, 31, 32, 127, 128, 257, 300))]:
        case = Case(1 if kernel == "gemv" else 3, n, k, int8=int8, dtype=DTYPES[(n + k) % 3])
        y = case.run(host, kernel)
        case.check(y)
        if int8:
            case.check_bits(y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_unaligned_and_strided_rows(host: Any, dtype: torch.dtype, int8: bool) -> None:
    for offset, k in itertools.product((0, 1, 8), (64, 65)):
        wide = torch.randn(6, 200).to(dtype)
        for x in (
            wide[:, offset : offset + k],
            wide[::2, offset : offset + k],
            wide[5:, offset : offset + k],
        ):
            for kernel in ("mma", "library", *(("gemv",) if int8 and len(x) == 1 else ())):
                case = Case(len(x), 40, k, x=x, int8=int8)
                case.check(case.run(host, kernel))


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("int8", [False, True])
def test_groups(host: Any, group: int, int8: bool) -> None:
    for dtype, k, shape, splits in [
        (torch.float32, 1300, -1, 1),
        (torch.bfloat16, 1024, 0, 1),
        (torch.float16, 520, 1, 3),
        (torch.float16, 33, 2, 1),
        (torch.bfloat16, 300, 3, 2),
        (torch.bfloat16, 256, 4, 1),
    ]:
        case = Case(5, 70, k, dtype=dtype, group=group, int8=int8)
        y = case.run(host, "mma", shape, splits)
        case.check(y)


@pytest.mark.parametrize("levels", [3, 4, 8, 16])
@pytest.mark.parametrize("int8", [False, True])
def test_planes(host: Any, levels: int, int8: bool) -> None:
    weights = ops.plane_weights_of(levels)
    for kernel, m, k, group in [
        ("mma", 3, 300, 0),
        ("mma", 20, 1300, 0),
        ("library", 3, 300, 0),
        ("mma", 9, 300, 64),
        *([("gemv", 1, 300, 0), ("gemv", 1, 4500, 0)] if int8 else []),
    ]:
        case = Case(m, 40, k, plane_weights=weights, group=group, int8=int8, dtype=torch.float32)
        y = case.run(host, kernel)
        case.check(y)
        if int8 and not group:
            case.check_bits(y)


@pytest.mark.parametrize("kernel", ["gemv", "mma", "library"])
def test_extremes_of_one_sign(host: Any, kernel: str) -> None:
    """Sums as large as they can be: no 16- or 8-bit intermediate may overflow."""
    m, k = (1 if kernel == "gemv" else 2), 4096
    for sign in (1, -1):
        case = Case(m, 32, k, x=torch.full((m, k), 3.0 * sign), int8=True, plane_weights=(8, 4), bias=False)
        for bits in (0x00, 0xFF):
            case.bits.fill_(bits)
            case.check_bits(case.run(host, kernel))


@pytest.mark.parametrize("kernel", ["mma", "library"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_propagate(host: Any, kernel: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 67)
    x[1, 5], x[2, 66], x[3, 0] = torch.inf, -torch.inf, torch.nan
    x[4, 7], x[4, 60] = torch.inf, torch.inf  # NaN where the signs differ
    x[5, 3] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # NaN in the lowest bit
    case = Case(6, 50, 67, x=x.to(dtype))
    expected = case.expected()[0]
    torch.testing.assert_close(
        case.run(host, kernel).double(), expected, rtol=1e-2, atol=1e-2, equal_nan=True
    )
    rough = Case(6, 50, 67, x=x.to(dtype), int8=True)
    y = rough.run(host, kernel)
    assert bool(y[1:].isnan().all()) and bool(y[0].isfinite().all())
    row = Case(1, 50, 67, x=x[1:2].to(dtype), int8=True)
    assert bool(row.run(host, "gemv").isnan().all())


def test_tiny_and_huge_values(host: Any) -> None:
    """Nothing overflows or vanishes on the way where the result does not."""
    for size in (1e-44, 1e-38, 1e-30, 1e30, 2e36):
        for kernel, m, int8 in [
            ("mma", 2, False),
            ("library", 2, False),
            ("mma", 2, True),
            ("gemv", 1, True),
        ]:
            x = torch.randn(m, 64).clamp(-2, 2) * size
            case = Case(m, 20, 64, x=x, int8=int8, bias=False)
            y = case.run(host, kernel)
            assert bool(y.isfinite().all())
            if size > 1e-36:
                case.check(y)


def test_numbers_in_the_middle_are_rounded_to_even(host: Any) -> None:
    x = torch.cat([torch.tensor([127.0]), torch.arange(-126.5, 127, 0.5)]).repeat(2, 1) * 0.37
    for m, kernel in ((1, "gemv"), (2, "mma"), (2, "library")):
        case = Case(m, 64, x.shape[1], x=x[:m], int8=True)
        case.check_bits(case.run(host, kernel))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_scale_of_the_tensor_bias_and_activation(host: Any, activation: str) -> None:
    function = {"none": lambda y: y, "relu": torch.relu, "silu": torch.nn.functional.silu}.get(
        activation, torch.nn.functional.gelu
    )
    for kernel, m, int8 in [("mma", 3, False), ("mma", 3, True), ("library", 3, True), ("gemv", 1, True)]:
        for bias in (False, True):
            case = Case(
                m, 40, 90, dtype=torch.float32, int8=int8, one_scale=True, bias=bias, activation=activation
            )
            expected = function(case.expected()[0])
            torch.testing.assert_close(case.run(host, kernel).double(), expected, rtol=1e-5, atol=1e-4)


def test_zero_rows_and_zero_scales(host: Any) -> None:
    for m, kernel, int8 in [(3, "mma", False), (3, "mma", True), (3, "library", True), (1, "gemv", True)]:
        case = Case(m, 40, 90, dtype=torch.float32, int8=int8)
        case.scale[::2] = 0
        case.x[0] = 0
        y = case.run(host, kernel)
        assert torch.equal(y[0], case.bias) and torch.equal(y[:, ::2], case.bias[::2].expand(m, -1))


def test_planned_division_of_large_products(host: Any) -> None:
    """What plan_mma chooses on few and on many processors."""
    for m, n, k in [(1, 300, 5000), (8, 300, 5000), (16, 260, 9000), (33, 260, 3000), (70, 260, 3000)]:
        for processors in (1, 132):
            case = Case(m, n, k)
            case.check(case.run(host, "mma", processors=processors))
            case = Case(m, n, k, int8=True)
            case.check_bits(case.run(host, "mma", processors=processors))


def test_launches(host: Any) -> None:
    """One for 16-bit x; one that quantises or splits before; from sm_90 on none that adds up parts of K."""

    def launches(case: Case, kernel: str, splits: int, capability: int) -> int:
        before = host.launches()
        case.run(host, kernel, 1, splits, capability=capability)
        return host.launches() - before - 1  # and one that makes the tiles

    half, single = Case(3, 40, 1024), Case(3, 40, 1024, dtype=torch.float32)
    whole, row = Case(3, 40, 1024, int8=True), Case(1, 40, 1024, int8=True)
    assert launches(row, "gemv", 1, 80) == 1
    for case, one, two_on_80, two_on_90 in ((half, 1, 2, 1), (whole, 2, 3, 2), (single, 3, 3, 3)):
        assert launches(case, "mma", 1, 80) == launches(case, "mma", 1, 90) == one
        assert launches(case, "mma", 2, 80) == two_on_80
        assert launches(case, "mma", 2, 90) == two_on_90
        assert launches(case, "mma", 16, 90) == two_on_80  # more than a cluster has


def test_tiles_are_the_same_bits(host: Any) -> None:
    bits = ops.pack_signs(torch.randn(2, 70, 300))
    tiles = host.binary_tiles(bits, 300).view(2, 3, 3, 8, 4, 4)  # plane, tile, block, g, t, word
    signs = torch.zeros(2, 96, 384, dtype=torch.int32)  # 1 = -1
    signs[:, :70, :300] = (ops.unpack_signs(bits, 300) < 0).int()
    rows = signs.view(2, 3, 4, 8, 3, 4, 4, 2, 2, 2)  # plane, tile, word, g, block, c, t, e / 4, e / 2, e
    weights = rows.permute(0, 1, 4, 3, 6, 2, 9, 8, 5, 7)  # ..., word, then its bits
    expected = (weights.flatten(6).long() << torch.arange(32)).sum(-1)
    assert torch.equal(tiles.long() & 0xFFFFFFFF, expected)


def test_the_table(host: Any) -> None:
    """Every row of it is reached, and what a kernel cannot do goes to the next."""
    for capability, many in ((80, "library"), (90, "wgmma"), (100, "library")):
        host.device(capability, 4)
        assert [KERNELS[host.chosen(True, rows, 4096, False)] for rows in (256, 257)] == ["mma", many]
    host.device(80, 4)
    names = {
        (int8, rows): KERNELS[host.chosen(int8, rows, 4096, False)]
        for int8, rows in itertools.product((False, True), (1, 2, 256, 257, 512, 513))
    }
    assert [names[True, rows] for rows in (1, 2, 256, 257)] == ["gemv", "mma", "mma", "library"]
    assert [names[False, rows] for rows in (1, 512, 513)] == ["mma", "mma", "library"]
    assert KERNELS[host.chosen(True, 1, 100_000, False)] == "mma"  # x does not fit gemv's shared memory
    assert all(KERNELS[host.chosen(int8, 5000, 4096, True)] == "mma" for int8 in (False, True))


def test_operator(host: Any) -> None:
    """Leading dimensions, no rows, no inputs, no tiles; what it refuses."""
    x, bits, scale = torch.randn(2, 3, 40), ops.pack_signs(torch.randn(5, 40)), torch.rand(5)
    expected = reference.binary_linear(x, bits, scale, None, 40, [1])
    torch.testing.assert_close(host.binary_linear(x, bits, scale, None, 40, [1]), expected)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(
        host.binary_linear(turned, bits, scale, None, 40, [1]), expected.transpose(0, 1)
    )
    torch.testing.assert_close(host.binary_linear(x[0, 0], bits, scale, None, 40, [1]), expected[0, 0])
    assert host.binary_linear(x[:0], bits, scale, None, 40, [1]).shape == (0, 3, 5)
    assert host.binary_linear(x, bits[:0], scale[:1], None, 40, [1]).shape == (2, 3, 0)
    bias = torch.randn(5)
    empty = host.binary_linear(x[..., :0], bits[:, :0], scale, bias, 0, [1], 0, "exact", None, "relu")
    assert torch.equal(empty, torch.relu(bias).expand(2, 3, 5))
    for arguments, error, message in [
        (
            (x, bits, scale, None, 40, [1], 0, "exact", torch.zeros(5, dtype=torch.int32)),
            ValueError,
            "tiles do not",
        ),
        ((x, bits, torch.rand(5, 3), None, 40, [1], 16), NotImplementedError, "scales of 32, 64"),
        ((x, bits.expand(9, 5, 5), scale, None, 40, [1] * 9), NotImplementedError, "8 planes"),
        ((x[..., :9], bits, scale, None, 40, [1]), ValueError, "as its last dimension"),
        ((x, bits, scale.to("meta"), None, 40, [1]), ValueError, "must be on cpu"),
    ]:
        with pytest.raises(error, match=message):
            host.binary_linear(*arguments)
    with pytest.raises(ValueError, match="kernel must be"):
        host.binary_linear_by(x, bits, scale, None, 40, [1], "magic")
    with pytest.raises(ValueError, match="does not take"):
        host.binary_linear_by(x, bits, scale, None, 40, [1], "gemv")


# ---- what was built


@needs_cuda_build
@pytest.mark.parametrize(
    "operator",
    [
        "binary_linear",
        "binary_linear_by",
        "binary_tiles",
        "binary_tiles_and_weight",
        "binary_conv2d",
        "binary_conv_tiles",
    ],
)
def test_is_registered(operator: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quantopt::{operator}", "CUDA")


@needs_cuda_build
@pytest.mark.parametrize("arch", _extension.build_info().get("cuda_archs", []))
def test_machine_code(arch: str) -> None:
    """Tensor cores, dp4a and 16-byte copies where they are meant to be, and no register in memory."""
    command = [cuobjdump(), "-sass", "-arch", f"sm_{arch}", str(extension_file())]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {
        name: code
        for name, code in re.findall(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction : |\Z)", sass, re.DOTALL)
        if re.search(r"binary_(mma|gemv|prepare|conv)_cu", name)
    }
    assert len(kernels) == 4 * len(SHAPES) + 3 + 16 + 16  # mma; gemv; what stands around them; convolutions
    for name, code in kernels.items():
        assert not re.search(r"\b(STL|LDL)\b", code), name
        if "gemv_kernel" in name:
            # two instructions per four weights: 128 of each for the 16 KiB of weights of a loop of a warp
            assert code.count("IDP.4A.U8.S8") >= 128, name
            assert len(re.findall(r"LDG\.E\.NA\S*\.128", code)) >= 8, name
        elif "mma_kernel" in name:
            tokens, _, _ = (*SHAPES, (64, 128, 256))[int(re.search(r"ELi(\d)E", name)[1])]  # type: ignore[index]
            multiply = "IMMA.16832.S8.S8" if "Bytes" in name else "HMMA.16816.F32"
            per_column_tile = 8 if "Bytes" in name else 16
            assert code.count(multiply) >= per_column_tile * tokens // 8, name
            assert len(re.findall(r"LDGSTS\S*\.128", code)) >= 4, name
            if "Floats" in name:  # (a & b) | c, for every pair of weights
                assert len(re.findall(r"LOP3\.LUT.*, 0xea,", code)) + len(re.findall(r"0xf8", code)) >= 64, (
                    name
                )


@needs_cuda_build
def test_backend_on_devices_not_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for the device's architecture or an older one of its kind, or PTX; else Triton or the reference."""
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda_archs": ["80", "90"]})
    built = {c: backends._built_for(c) for c in (75, 80, 86, 89, 90, 100, 120)}
    assert built == {75: False, 80: True, 86: True, 89: True, 90: True, 100: True, 120: True}
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda_archs": ["90a"]})
    assert backends._built_for(90) and not backends._built_for(80)
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda_archs": ["90"]})
    assert not backends._built_for(80)

    def choice(capability: int, operation: str = "binary_linear") -> backends.Choice:
        return backends._choose.__wrapped__(operation, "cuda", torch.float16, "auto", "0", capability)

    assert choice(90).name == "cuda"
    assert choice(80).name in ("triton", "reference")
    assert choice(90, "binary_linear_odd_groups").name == "reference"
    with pytest.raises(backends.BackendError, match="the device has 80"):
        backends._choose.__wrapped__("binary_linear", "cuda", torch.float16, "cuda", "0", 80)


def test_groups_that_the_kernels_take() -> None:
    for size in (0, 32, 64, 128, 1024):
        assert ops.operation_of(size, 1) == "binary_linear"
    for size in (1, 16, 48, 96, 100):
        assert ops.operation_of(size, 1) == "binary_linear_odd_groups"
    assert ops.operation_of(0, 9) == "binary_linear_odd_groups"


@needs_cuda_build
def test_shapes_without_a_device() -> None:
    """What torch.compile and torch.export know of the operators, for tensors of a GPU that need not be there."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 300, dtype=torch.float16, device="cuda")
        bits = torch.empty(2, 70, 38, dtype=torch.uint8, device="cuda")
        scale = torch.empty(70, device="cuda")
        tiles = torch.ops.quantopt.binary_tiles(bits, 300)
        assert tiles.shape == (2, 3 * 3 * 128) and tiles.dtype == torch.int32 and tiles.device.type == "cuda"
        for y in (
            torch.ops.quantopt.binary_linear(x, bits, scale, None, 300, [1, 2], 0, "exact", tiles),
            torch.ops.quantopt.binary_linear_triton(x, bits, scale, None, 300, [1, 2], 0, "exact", "none"),
            ops.binary_linear(x, bits, scale, in_features=300, compute="int8"),
        ):
            assert y.shape == (2, 3, 70) and y.dtype == torch.float16 and y.device.type == "cuda"


@needs_cuda_build
@pytest.mark.skipif("90" not in _extension.build_info().get("cuda_archs", []), reason="not built for sm_90")
def test_wgmma_machine_code() -> None:
    """Hopper's products with W from registers, boxes copied by the copy engine, and no register in memory. setup.py
    stops where the compiler had to serialise the products or could not move registers between warpgroups."""
    command = [cuobjdump(), "-sass", "-arch", "sm_90a", str(extension_file())]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction : |\Z)", sass, re.DOTALL)
    kernels = [(name, code) for name, code in functions if "wgmma_kernel" in name]
    assert len(kernels) == 3 * len(WGMMA_TOKENS)
    for name, code in kernels:
        assert not re.search(r"\b(STL|LDL)\b", code), name
        tokens = int(re.search(r"ELi(\d+)E", name)[1])  # type: ignore[index]
        bytes_ = "Bytes" in name
        multiply = (
            rf"{'IGMMA' if bytes_ else 'HGMMA'}\.64x{tokens}x{32 if bytes_ else 16}\S* R\d+, R\d+, gdesc"
        )
        assert len(re.findall(multiply, code)) == (8 if bytes_ else 16), (
            name
        )  # those of a block of K, once each
        # after two of each row half the oldest are waited for; all of them once, after the last
        waits = [int(n, 16) for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", code)]
        assert sorted(waits) == [0, *[1] * (2 if bytes_ else 4)], name
        assert code.count("UTMALDG.2D") >= 1 and code.count("USETMAXREG") == 2, name
        assert "LDG.E.128" in code, name


@needs_cuda_build
def test_build_stops_at_slow_code() -> None:
    """By what ptxas says; whole words of it, as it reports them."""
    text = (ROOT / "setup.py").read_text()
    pattern = re.compile(re.search(r'SLOW_CODE = re.compile\(r"(.*)", re.MULTILINE\)', text)[1], re.MULTILINE)  # type: ignore[index]
    for slow in (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum requirements.",
    ):
        assert pattern.search(f"ptxas info    : 0 bytes gmem\n{slow}\n")[0] == slow  # type: ignore[index]
    assert not pattern.search("ptxas info    : Used 168 registers, used 16 barriers\nCompile time = 75.10 ms")


# ---- with a GPU


def device_cases() -> Iterator[tuple[str, Case]]:
    for int8, dtype in itertools.product((False, True), DTYPES):
        for m in (1, 2, 8, 9, 16, 17, 33, 64, 65, 129):
            yield "", Case(m, 300, 1025 + 7 * (m % 2), dtype=dtype, int8=int8)
        for n, k in ((1, 1), (33, 8), (127, 129), (257, 1300), (300, 5000)):
            yield "", Case(1, n, k, dtype=dtype, int8=int8)
            yield "mma", Case(5, n, k, dtype=dtype, int8=int8)
            yield "library", Case(5, n, k, dtype=dtype, int8=int8)
        for group in (32, 64, 128):
            yield "mma", Case(5, 70, 520, dtype=dtype, int8=int8, group=group)
        yield "mma", Case(9, 70, 520, dtype=dtype, int8=int8, plane_weights=(1, 2, 4))
        yield "library", Case(40, 70, 520, dtype=dtype, int8=int8, plane_weights=(1, 2, 4))
        wide = torch.randn(6, 200).to(dtype)
        yield "", Case(6, 40, 64, x=wide[:, 1:65], int8=int8)
        yield "", Case(3, 40, 64, x=wide[::2, 8:72], int8=int8)


@pytest.mark.gpu
@needs_cuda_build
def test_on_the_device() -> None:
    for kernel, case in device_cases():
        y = case.run(torch.ops.quantopt, kernel, device="cuda")
        case.check(y)
        if case.int8 and not case.group:
            case.check_bits(y)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("int8", [False, True])
def test_every_shape_on_the_device(int8: bool) -> None:
    for shape, (tokens, rows, depth) in enumerate(SHAPES):
        for splits in (1, 3):
            case = Case(tokens + 1, rows + 1, 3 * depth + 8, int8=int8)
            case.check(case.run(torch.ops.quantopt, "mma", shape, splits, device="cuda"))


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("compute", ["int8", "bfloat16", "float16"])
def test_wgmma_on_the_device(compute: str) -> None:
    """All around its tiles, more of them than processors, K in parts; again with the same bits."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is Hopper's")
    int8 = compute == "int8"
    dtype = torch.bfloat16 if int8 else getattr(torch, compute)
    for m, n, k, shape, splits in [
        (1, 1, 1, 0, 1),
        (64, 256, 128, 0, 1),
        (65, 257, 136, 0, 1),
        (127, 255, 1024, 1, 1),
        (129, 300, 1160, 1, 1),
        (129, 300, 1160, 1, 2),
        (100, 520, 2048, 0, 4),
        (100, 520, 2055, 1, 8),
        (600, 9000, 1032, 1, 1),
        (64, 8192, 2048, -1, 1),
        (1000, 2048, 2048, -1, 1),
    ]:
        case = Case(m, n, k, int8=int8, dtype=dtype)
        y = case.run(torch.ops.quantopt, "wgmma", shape, splits, device="cuda")
        case.check(y)
        if int8:
            case.check_bits(y)
        for _ in range(3):
            assert torch.equal(case.run(torch.ops.quantopt, "wgmma", shape, splits, device="cuda"), y)
    planes = Case(70, 50, 300, int8=int8, dtype=dtype, plane_weights=(1, 2, 4))
    planes.check(planes.run(torch.ops.quantopt, "wgmma", device="cuda"))


def device_layer(m: int, int8: bool, size: int = 1024) -> tuple[Tensor, Any]:
    """Rows, and a function of rows that multiplies them."""
    x = torch.randn(m, size, device="cuda").bfloat16()
    bits = ops.pack_signs(torch.randn(size, size)).cuda()
    scale, tiles = torch.rand(size, device="cuda"), torch.ops.quantopt.binary_tiles(bits, size)
    mode = "int8" if int8 else "exact"
    return x, lambda v: ops.binary_linear(v, bits, scale, in_features=size, compute=mode, tiles=tiles)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("m", [1, 8, 64, 600])
def test_runs_streams_and_graphs_give_the_same_bits(m: int, int8: bool) -> None:
    x, multiply = device_layer(m, int8)
    expected = multiply(x)
    torch.cuda.synchronize()
    assert all(torch.equal(multiply(x), expected) for _ in range(20))
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:  # at once: nothing that they write may be shared
            with torch.cuda.stream(stream):
                results.append(multiply(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = multiply(static)
    for value in (x, -x, x):
        static.copy_(value)
        graph.replay()
        assert torch.equal(y, multiply(value))
    assert torch.equal(y, expected)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("int8", [False, True])
def test_compile_and_export(int8: bool) -> None:
    x, multiply = device_layer(8, int8)
    assert torch.equal(torch.compile(multiply, fullgraph=True)(x), multiply(x))
    layer = BinaryLinear.from_linear(torch.nn.Linear(300, 70), compute="int8" if int8 else "exact").cuda()
    x = torch.randn(3, 300, device="cuda")
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.gpu
@needs_cuda_build
def test_modules_take_the_layout_of_their_device() -> None:
    layer = BinaryLinear.from_linear(torch.nn.Linear(300, 70))
    x = torch.randn(3, 300)
    expected = layer(x)
    on_device = layer.cuda()
    assert on_device.tiles is not None and on_device.tiles.dtype == torch.int32
    torch.testing.assert_close(on_device(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.cpu()(x), expected)


@pytest.mark.gpu
@needs_cuda_build
def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = Case(5, 70, 300)
    case.check(case.run(torch.ops.quantopt, device="cuda:1"))
