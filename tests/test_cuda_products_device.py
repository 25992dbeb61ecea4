"""The products with packed weights on a GPU."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from machine_code import needs_cuda_build
from product_cases import CONVS, DTYPES, SHAPES, ConvCase, LinearCase
from quantopt.nn import BinaryLinear
from quantopt.ops.linear import binary_linear
from quantopt.ops.weights import pack_signs

pytestmark = [pytest.mark.gpu, needs_cuda_build]


def device_cases() -> Iterator[tuple[str, LinearCase]]:
    for int8, dtype in itertools.product((False, True), DTYPES):
        for m in (1, 2, 8, 9, 16, 17, 33, 64, 65, 129):
            yield "", LinearCase(m, 300, 1025 + 7 * (m % 2), dtype=dtype, int8=int8)
        for n, k in ((1, 1), (33, 8), (127, 129), (257, 1300), (300, 5000)):
            yield "", LinearCase(1, n, k, dtype=dtype, int8=int8)
            yield "mma", LinearCase(5, n, k, dtype=dtype, int8=int8)
            yield "cublas", LinearCase(5, n, k, dtype=dtype, int8=int8)
        for group in (32, 64, 128):
            yield "mma", LinearCase(5, 70, 520, dtype=dtype, int8=int8, group=group)
        yield "mma", LinearCase(9, 70, 520, dtype=dtype, int8=int8, plane_weights=(1, 2, 4))
        yield "cublas", LinearCase(40, 70, 520, dtype=dtype, int8=int8, plane_weights=(1, 2, 4))
        wide = torch.randn(6, 200).to(dtype)
        yield "", LinearCase(6, 40, 64, x=wide[:, 1:65], int8=int8)
        yield "", LinearCase(3, 40, 64, x=wide[::2, 8:72], int8=int8)


def test_on_the_device() -> None:
    for kernel, case in device_cases():
        y = case.run(torch.ops.quantopt, kernel, device="cuda")
        case.check(y)
        if case.int8 and not case.group:
            case.check_bits(y)


@pytest.mark.parametrize("int8", [False, True])
def test_every_shape_on_the_device(int8: bool) -> None:
    for shape, (tokens, rows, depth) in enumerate(SHAPES):
        for splits in (1, 3):
            case = LinearCase(tokens + 1, rows + 1, 3 * depth + 8, int8=int8)
            case.check(case.run(torch.ops.quantopt, "mma", shape, splits, device="cuda"))


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
        case = LinearCase(m, n, k, int8=int8, dtype=dtype)
        y = case.run(torch.ops.quantopt, "wgmma", shape, splits, device="cuda")
        case.check(y)
        if int8:
            case.check_bits(y)
        for _ in range(3):
            assert torch.equal(case.run(torch.ops.quantopt, "wgmma", shape, splits, device="cuda"), y)
    planes = LinearCase(70, 50, 300, int8=int8, dtype=dtype, plane_weights=(1, 2, 4))
    planes.check(planes.run(torch.ops.quantopt, "wgmma", device="cuda"))


def device_layer(m: int, int8: bool, size: int = 1024) -> tuple[Tensor, Any]:
    """Rows, and a function of rows that multiplies them."""
    x = torch.randn(m, size, device="cuda").bfloat16()
    bits = pack_signs(torch.randn(size, size)).cuda()
    scale, tiles = torch.rand(size, device="cuda"), torch.ops.quantopt.binary_tiles(bits, size)
    mode = "int8" if int8 else "exact"
    return x, lambda v: binary_linear(v, bits, scale, in_features=size, compute=mode, tiles=tiles)


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


@pytest.mark.parametrize("int8", [False, True])
def test_compile_and_export(int8: bool) -> None:
    x, multiply = device_layer(8, int8)
    assert torch.equal(torch.compile(multiply, fullgraph=True)(x), multiply(x))
    layer = BinaryLinear.from_linear(torch.nn.Linear(300, 70), compute="int8" if int8 else "exact").cuda()
    x = torch.randn(3, 300, device="cuda")
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_modules_take_the_layout_of_their_device() -> None:
    layer = BinaryLinear.from_linear(torch.nn.Linear(300, 70))
    x = torch.randn(3, 300)
    expected = layer(x)
    on_device = layer.cuda()
    assert on_device.tiles is not None and on_device.tiles.dtype == torch.int32
    torch.testing.assert_close(on_device(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.cpu()(x), expected)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = LinearCase(5, 70, 300)
    case.check(case.run(torch.ops.quantopt, device="cuda:1"))


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
