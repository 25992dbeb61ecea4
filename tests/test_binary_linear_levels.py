"""Scales of groups in compute="int8": whole-number levels on the CPU, on every instruction set."""

import itertools

import pytest
import torch
from torch import Tensor

from conftest import force_isa, supported_isas
from linear_cases import check, product
from quantopt.ops.linear import binary_linear
from quantopt.ops.weights import pack_signs
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference

SHAPES = [(33, 300), (130, 1040), (1, 16), (257, 531)]


def make(planes: int, n: int, k: int, group_size: int) -> PackedWeight:
    scale = torch.randn(n, -(-k // group_size))  # of both signs
    return PackedWeight(
        pack_signs(torch.randn(planes, n, k)), scale, torch.randn(n), k, [1] * planes, group_size
    )


def by_whole_numbers(x: Tensor, weight: PackedWeight) -> Tensor:
    """y from exact sums of whole numbers, by the roundings that follow them."""
    levels = reference.level_scales(weight)
    assert levels is not None
    (u, r), (q, s) = levels, reference.quantize_rows(x)
    spread = u.double().repeat_interleave(weight.group_size, 1)[:, : weight.in_features]
    sums = q.double() @ (reference.expand_planes(weight, torch.float64) * spread).T
    return sums.float() * (r.T * s) + weight.bias


def run(x: Tensor, weight: PackedWeight, **options: str) -> Tensor:
    return binary_linear(
        x, weight.bits, weight.scale, weight.bias, in_features=weight.in_features, compute="int8",
        group_size=weight.group_size, plane_weights=weight.plane_weights, **options,
    )  # fmt: skip


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group_size", [7, 16, 32, 48, 64, 128, 512])
def test_levels_to_the_bit(isa: str, planes: int, group_size: int) -> None:
    """For any number of rows and threads: exact sums."""
    threads = torch.get_num_threads()
    try:
        for n, k in SHAPES:
            weight = make(planes, n, k, group_size)
            x = torch.randn(129, k)
            expected = by_whole_numbers(x, weight)
            for m, count in itertools.product([*range(1, 41), 129], (1, 2)):
                torch.set_num_threads(count)
                assert torch.equal(run(x[:m], weight), expected[:m]), (n, k, m, count)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("planes", [1, 2])
def test_largest_sums(isa: str, planes: int) -> None:
    """Everything 127 and of one sign: partial sums at the end of their 16 and 32 bits."""
    k = (2**31 - 1) // (127 * 127 * planes)
    for rows, group_size in ((1, 256), (9, 64)):
        bits = torch.full((planes, 1, -(-k // 8)), 255, dtype=torch.uint8)
        scale = torch.ones(1, -(-k // group_size))
        weight = PackedWeight(bits, scale, torch.zeros(1), k, [1] * planes, group_size)
        x = torch.full((rows, k), 127.0)
        for sign in (1.0, -1.0):
            y = run(sign * x, weight)
            assert torch.equal(y, by_whole_numbers(sign * x, weight))
            torch.testing.assert_close(y, sign * torch.full((rows, 1), 127.0 * k * planes))


def test_rows_too_long_for_32_bits_keep_their_scales(isa: str) -> None:
    k, group_size = (2**31 - 1) // 127**2 + 1, 64
    x, w, scale = torch.randn(2, k), torch.randn(3, k), torch.rand(3, -(-k // group_size)) + 0.1
    weight = PackedWeight(pack_signs(w), scale, None, k, [1], group_size)
    assert reference.level_scales(weight) is None
    y = run(x, weight)
    check(y, *product(x, w, scale, None, group_size, "int8", exact_scales=True))
    assert not torch.allclose(y.double(), product(x, w, scale, None, group_size, "int8")[0], rtol=1e-4)


@pytest.mark.parametrize("plane_weights", [[1, 2], [1, 1, 1]])
def test_other_planes_keep_their_scales(isa: str, plane_weights: list[int]) -> None:
    n, k, group_size = 40, 200, 32
    weight = make(len(plane_weights), n, k, group_size)._replace(plane_weights=plane_weights)
    assert reference.level_scales(weight) is None
    x = torch.randn(5, k)
    torch.testing.assert_close(
        run(x, weight), reference.binary_linear(x, weight, "int8"), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("plane_weights", [[3], [5, 5]])
def test_weights_of_planes(isa: str, plane_weights: list[int]) -> None:
    weight = make(len(plane_weights), 45, 200, 32)._replace(plane_weights=plane_weights)
    for m in (1, 4, 16, 33):
        x = torch.randn(m, 200)
        assert torch.equal(run(x, weight), by_whole_numbers(x, weight))


def test_error_bound(isa: str) -> None:
    """That of rounding x, and a 254th of the row's largest scale for each |x|: as documented. Scales are rounded."""
    n, k, group_size = 70, 512, 64
    w, scale, x = torch.randn(n, k), torch.rand(n, k // group_size) + 0.1, torch.randn(20, k)
    weight = PackedWeight(pack_signs(w), scale, None, k, [1], group_size)
    y = run(x, weight).double()
    q, s = reference.quantize_rows(x)
    rounded = (q * s).double()
    half = scale.amax(1).double() / 254
    error = (y - reference.binary_linear(x, weight, "int8").double()).abs()
    assert bool((error <= 1.001 * rounded.abs().sum(1, keepdim=True) * half).all())
    exact = reference.binary_linear(x.double(), weight)
    bound = (
        x.abs().amax(1, keepdim=True).double()
        / 254
        * reference.dense_weight(weight, torch.float64).abs().sum(1)
    )
    assert bool(((y - exact).abs() <= bound + 1.001 * rounded.abs().sum(1, keepdim=True) * half).all())
    assert float(error.max()) > 1e-3


def test_scales_that_are_not_finite_and_rows_of_zeros(isa: str) -> None:
    weight = make(1, 40, 128, 32)
    weight.scale[1] = 0
    weight.scale[2, 3], weight.scale[3, 0] = torch.inf, torch.nan
    for m in (1, 9):
        x = torch.randn(m, 128)
        y = run(x, weight)
        assert bool(y[:, 2:4].isnan().all()) and bool(y[:, [0, *range(4, 40)]].isfinite().all())
        assert torch.equal(y[:, 1], weight.bias[1].expand(m))


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = make(1, 190, 1000, 48), torch.randn(70, 1000).to(torch.bfloat16)
    results = []
    for name in supported_isas():
        force_isa(monkeypatch, name)
        results.append(run(x, weight, activation="gelu"))
    assert len(results) > 1 and all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("group_size", [7, 64])
@pytest.mark.parametrize("weights", [[32], [16, 16], [33], [128]])
def test_heavy_planes(isa: str, weights: list[int], group_size: int) -> None:
    """Levels up to a weight of 32, so that sums are whole numbers in fp32 too; scales above that."""
    x = torch.randint(120, 128, (9, 256)).float()
    x[:, 0] = 127  # so that nothing is rounded
    bits = torch.full((len(weights), 3, 32), 255, dtype=torch.uint8)
    scale = torch.rand(3, -(-256 // group_size)) + 0.5
    weight = PackedWeight(bits, scale, torch.zeros(3), 256, weights, group_size)
    y = run(x, weight)
    levels = reference.level_scales(weight)
    assert (levels is not None) == (sum(weights) <= 32)
    if levels is not None:
        assert torch.equal(y, by_whole_numbers(x, weight))
    else:
        torch.testing.assert_close(y, reference.binary_linear(x, weight, "int8"))


def test_no_inputs(isa: str) -> None:
    weight = PackedWeight(torch.zeros(3, 0, dtype=torch.uint8), torch.zeros(3, 0), torch.ones(3), 0, [1], 16)
    assert torch.equal(run(torch.randn(2, 0), weight), torch.ones(2, 3))
