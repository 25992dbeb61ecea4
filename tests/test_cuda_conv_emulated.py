"""The CUDA kernels of packed convolutions, their source run on the host."""

from typing import Any

import pytest
import torch

from product_cases import CONVS, DTYPES, ConvCase
from quantopt.ops import binary as ops


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
