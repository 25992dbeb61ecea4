"""The CUDA kernels of packed convolutions, their source run on the host."""

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from product_cases import CONVS, DTYPES, ConvCase
from quantopt import backends
from quantopt.ops import library
from quantopt.ops.weights import pack_signs


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


def test_convolutions_of_many_pixels(host: Any) -> None:
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


def test_what_is_refused_is_what_the_backends_leave_to_the_reference(host: Any) -> None:
    """By groups, channels, scales, planes, types and modes; what is only not worth a launch is run."""
    host.device(90, 4)
    refusals = 0
    for groups, channels, group_size, planes in itertools.product((1, 2, 40), (4, 8, 16), (0, 32), (1, 9)):
        for dtype, compute in itertools.product((torch.float32, torch.float16), ("exact", "int8", "bf16")):
            x = torch.randn(1, groups * channels, 2, 2).to(dtype)
            bits = pack_signs(torch.randn(planes, groups, channels))
            scale = torch.rand(groups, -(-channels // group_size)) if group_size else torch.rand(groups)
            form = ([1, 1], [1, 1], [0, 0], [1, 1], groups, [1] * planes, group_size, compute)
            product = backends.Product(planes, group_size, compute, groups, channels, 1, 4)
            limits = [
                limit for limit in backends.LIMITS["binary_conv2d", "cuda"] if not limit.fits(product, dtype)
            ]
            if all(limit.can_run for limit in limits):
                assert host.binary_conv2d(x, bits, scale, None, *form).shape == (1, groups, 2, 2)
                continue
            refusals += 1
            with pytest.raises(NotImplementedError, match="quantopt: the CUDA"):
                host.binary_conv2d(x, bits, scale, None, *form)
    assert refusals > 100


def test_shapes_of_tiles(host: Any) -> None:
    """What torch.compile is told of them."""
    for groups, channels, taps, planes in itertools.product((1, 3), (5, 64, 65, 130), (1, 9), (1, 2)):
        bits = pack_signs(torch.randn(planes, 33 * groups, channels * taps))
        with FakeTensorMode():
            fake = torch.empty(bits.shape, dtype=torch.uint8, device="cuda")
            shapes = (
                library._empty_conv_tiles(fake, channels, taps, groups).shape,
                library._empty_tiles(fake, channels * taps).shape,
            )
        assert host.binary_conv_tiles(bits, channels, taps, groups).shape == shapes[0]
        assert host.binary_tiles(bits, channels * taps).shape == shapes[1]
