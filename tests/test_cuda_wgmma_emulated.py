"""The Hopper product with packed weights, its source run on the host."""

import itertools
from typing import Any

import pytest
import torch

from product_cases import DTYPES, KERNELS, WGMMA_ROWS, WGMMA_TOKENS, LinearCase


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
        case = LinearCase(m, n, k, int8=int8, dtype=dtype)
        y = case.run(host, "wgmma", shape, splits, processors=3)
        case.check(y)
        if int8:
            case.check_bits(y)


@pytest.mark.parametrize("int8", [False, True])
def test_wgmma_takes_tile_after_tile(host: Any, int8: bool) -> None:
    """More tiles than processors; the stages of the ring come round at another place in every tile."""
    case = LinearCase(300, 600, 5 * 128, int8=int8)
    for processors in (1, 2, 9):
        y = case.run(host, "wgmma", 1, processors=processors)
        case.check(y)
        if int8:
            case.check_bits(y)


def test_wgmma_planes_types_and_strides(host: Any) -> None:
    for dtype, int8 in itertools.product(DTYPES, (False, True)):
        case = LinearCase(70, 50, 300, dtype=dtype, int8=int8, plane_weights=(1, 2, 4), activation="relu")
        y = case.run(host, "wgmma")
        expected = case.expected()[0].relu()
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-4 * 300)
        wide = torch.randn(70, 200).to(dtype)
        for x in (wide[:, 8:72], wide[::2, :65], wide[3:4, 1:66]):
            case = LinearCase(len(x), 40, x.shape[1], x=x, int8=int8)
            case.check(case.run(host, "wgmma"))


def test_wgmma_refuses_what_it_cannot_do(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not take"):
        LinearCase(70, 50, 128, group=64).run(host, "wgmma")
    with pytest.raises(ValueError, match="does not take"):
        LinearCase(70, 50, 128).run(host, "wgmma", capability=100)
    with pytest.raises(ValueError, match=r"splits in 1\.\.2"):
        LinearCase(70, 50, 200).run(host, "wgmma", 1, 3)
    with pytest.raises(ValueError, match="shape must be less than 2"):
        LinearCase(70, 50, 200).run(host, "wgmma", 2)
    host.device(90, 4)
    assert KERNELS[host.chosen(True, 1000, 4096, False)] == "wgmma"
    monkeypatch.setenv("QUANTOPT_WGMMA", "0")
    assert KERNELS[host.chosen(True, 1000, 4096, False)] == "cublas"
    with pytest.raises(ValueError, match="does not take"):
        LinearCase(70, 50, 128).run(host, "wgmma")
