"""The products on AMX registers, where the processor has them: random sizes against whole numbers and float64."""

import random

import pytest
import torch
from torch import Tensor

from conftest import force_isa, supported_isas
from linear_cases import check
from quantopt.ops.linear import binary_linear
from quantopt.ops.tiles import binary_tiles
from quantopt.ops.weights import pack_signs
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference

pytestmark = pytest.mark.skipif("amx" not in supported_isas(), reason="needs a processor with AMX")

ROWS = (0, 1, 2, 3, 4, 6, 8, 12, 15, 16, 17, 31, 32, 33, 47)
MANY_ROWS = (48, 49, 63, 64, 65, 100, 129)  # with which all but the smallest layers run on registers
# The last ones are at, and beyond, what fits in a byte, in bfloat16, and in a table of 32 levels.
PLANES = (
    [1],
    [1],
    [1],
    [1, 1],
    [1, 2],
    [1, 2, 4, 8],
    [1, 2, 4, 8, 1],
    [3],
    [64, 63],
    [64, 64],
    [128, 128],
    [128, 127, 2],
    [1] * 6,
)


def draw(seed: int) -> tuple[Tensor, PackedWeight]:
    """x of any number of rows, and weights of any form that has a kernel on registers, and of some that have none."""
    pick = random.Random(seed)
    m, n = pick.choice(ROWS + MANY_ROWS * 2), pick.choice([pick.randint(1, 300), pick.randint(100, 300)])
    k = pick.choice([pick.randint(1, 1200), pick.randint(1, 100), 64 * pick.randint(4, 20)])
    planes, group = pick.choice(PLANES), pick.choice([0, 0, 16, 32, 64, 96, 128])
    torch.manual_seed(seed)
    scale = torch.randn(n, -(-k // group)) if group else torch.rand(pick.choice([1, n])) + 0.5
    bias = torch.randn(n) if pick.random() < 0.5 else None
    weight = PackedWeight(pack_signs(torch.randn(len(planes), n, k)), scale, bias, k, planes, group)
    return torch.randn(m, k) * 10.0 ** pick.randint(-3, 3), weight


def run(x: Tensor, weight: PackedWeight, compute: str, tiles: Tensor | None = None) -> Tensor:
    return binary_linear(
        x, weight.bits, weight.scale, weight.bias, in_features=weight.in_features, compute=compute,
        group_size=weight.group_size, plane_weights=weight.plane_weights, tiles=tiles,
    )  # fmt: skip


def size_of(x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """y in float64, and the sum of the magnitudes that its error is relative to: plane by plane, as lookups sum."""
    w = reference.dense_weight(weight, torch.float64)
    levels = sum(weight.plane_weights) * weight.scale.abs().double()
    if weight.group_size:
        size = x.abs().double() @ levels.repeat_interleave(weight.group_size, 1)[:, : weight.in_features].T
    else:
        size = x.abs().double().sum(1, keepdim=True) * levels
    bias = torch.zeros(weight.outputs) if weight.bias is None else weight.bias
    return x.double() @ w.T + bias.double(), size + bias.abs().double()


@pytest.mark.parametrize("part", range(5))
def test_int8_is_that_of_whole_numbers(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 products; those without kept scales to the bit, and to the bit those of another instruction set."""
    for seed in range(100 * part, 100 * part + 100):
        x, weight = draw(seed)
        force_isa(monkeypatch, "amx")
        y = run(x, weight, "int8")
        force_isa(monkeypatch, "avx512vnni")
        other = run(x, weight, "int8")
        (q, s), levels = reference.quantize_rows(x), reference.level_scales(weight)
        if weight.group_size and levels is None:
            check(y, *size_of(q.double() * s.double(), weight))
            continue
        assert torch.equal(y, other), seed
        if weight.group_size:
            assert levels is not None
            weight = weight._replace(scale=levels[0].float(), bias=None)
            sums = q.double() @ reference.dense_weight(weight, torch.float64).T
            factor = levels[1].T
        else:
            sums = q.double() @ reference.expand_planes(weight, torch.float64).T
            factor = weight.scale
        bias = draw(seed)[1].bias
        expected = sums.float() * (factor * s)
        assert torch.equal(y, expected if bias is None else expected + bias), seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", range(5))
def test_exact(part: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 and of fp32 in three parts; the same bits from one thread and from two."""
    force_isa(monkeypatch, "amx")
    threads = torch.get_num_threads()
    try:
        for seed in range(1000 + 50 * part, 1050 + 50 * part):
            x, weight = draw(seed)
            x = x.to(dtype)
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(run(x, weight, "exact"))
            assert torch.equal(*results)
            check(results[0], *size_of(x, weight))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_magnitude(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denormals, and what lies near the largest number: rows are multiplied by powers of two before and after."""
    force_isa(monkeypatch, "amx")
    torch.manual_seed(0)
    weight = PackedWeight(pack_signs(torch.randn(80, 300)), torch.rand(80) + 0.5, None, 300, [1])
    x = torch.randn(48, 300)
    for size in (1e-44, 1e-41, 1e-38, 1e-36, 1e-30, 1e-19, 1e19, 1e36):
        scaled = (x * size).to(dtype)
        y = run(scaled, weight, "exact")
        expected, sums = size_of(scaled, weight)
        rounding = 0.0 if dtype == torch.float32 else 2**-8
        least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # of denormals
        error = (y.double() - expected).abs()
        assert bool((error <= 1e-6 * sums + rounding * expected.abs() + least).all()), size
    mixed = x * torch.logspace(-44, 36, 48)[:, None]  # a row of each in one block
    check(run(mixed.to(dtype), weight, "exact"), *size_of(mixed.to(dtype), weight), tolerance=1e-5)


@pytest.mark.parametrize("planes", [[1], [1, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nan(dtype: torch.dtype, planes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a dense product, and in their rows alone."""
    force_isa(monkeypatch, "amx")
    torch.manual_seed(0)
    weight = PackedWeight(pack_signs(torch.randn(len(planes), 240, 70)), torch.ones(240), None, 70, planes)
    x = torch.randn(48, 70)
    x[1, 5], x[2, 69], x[3, 0], x[16, 3:5] = torch.inf, -torch.inf, torch.nan, torch.inf
    x[33, 1] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # NaN in the lowest bits alone
    x = x.to(dtype)
    y = run(x, weight, "exact")
    expected = x.double() @ reference.dense_weight(weight, torch.float64).T
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-4, equal_nan=True)
    assert bool(y[[1, 2]].isinf().all()) and bool(y[[3, 33]].isnan().all())


def test_registers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a threshold on exact sums have other bits than by lookups; below it the same."""
    torch.manual_seed(0)
    weight = PackedWeight(pack_signs(torch.randn(512, 1024)), torch.rand(512) + 0.5, None, 1024, [1])
    x = torch.randn(16, 1024)
    for rows, same in ((2, True), (16, False)):
        found = []
        for isa in ("amx", "avx512vnni"):
            force_isa(monkeypatch, isa)
            found.append(run(x[:rows], weight, "exact"))
        assert torch.equal(*found) == same


def test_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are put into registers together (8 MB), in each form of x."""
    force_isa(monkeypatch, "amx")
    torch.manual_seed(0)
    weight = PackedWeight(pack_signs(torch.randn(40, 4096)), torch.rand(40) + 0.5, torch.randn(40), 4096, [1])
    x = torch.randn(2100, 4096)
    for compute, value in (("int8", x), ("exact", x), ("exact", x.bfloat16())):
        y = run(value, weight, compute)
        for first in range(0, 2100, 100):
            assert torch.equal(y[first : first + 100], run(value[first : first + 100], weight, compute)), (
                first
            )


@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_scales_that_change_are_read_again(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of tiles of scales is kept with the tiles until the scales are written to or are others."""
    force_isa(monkeypatch, "amx")
    torch.manual_seed(0)
    bits, x = pack_signs(torch.randn(70, 256)), torch.randn(20, 256)
    scale = torch.rand(70, 4) + 0.5
    tiles = binary_tiles(bits, 256)

    def checked(scale: Tensor) -> Tensor:
        weight = PackedWeight(bits, scale, None, 256, [1], 64)
        y = run(x, weight, compute, tiles)
        assert torch.equal(y, run(x, weight, compute))  # derived for this call alone
        return y

    first = checked(scale)
    other = scale.flip(0)
    assert not torch.equal(checked(other), first)
    both = torch.stack([scale, other])  # slices of one storage
    assert torch.equal(checked(both[0]), first) and torch.equal(checked(both[1]), checked(other))
    assert torch.equal(checked(scale), first)
    scale.mul_(2)
    assert torch.equal(checked(scale), 2 * first)
    with torch.inference_mode():
        uncounted = scale * 2
        assert torch.equal(checked(uncounted), 4 * first)
        uncounted.mul_(2)
        assert torch.equal(checked(uncounted), 8 * first)
    weight = PackedWeight(bits, scale, None, 256, [1], 64)
    for mode in ("int8", "exact", "int8"):
        assert torch.equal(run(x, weight, mode, tiles), run(x, weight, mode))
