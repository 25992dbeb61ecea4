"""binary_linear, pack_signs and unpack_signs against the reference in float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import force_isa, supported_isas
from quantopt import _extension
from quantopt.ops.conv2d import run_conv2d
from quantopt.ops.inputs import ACTIVATIONS, COMPUTE
from quantopt.ops.linear import binary_linear, run_linear
from quantopt.ops.tiles import binary_tiles
from quantopt.ops.weights import pack_signs, plane_weights_of, unpack_signs
from quantopt.packed_weight import ConvGeometry, PackedWeight
from quantopt.reference import binary as reference

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))

ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 129)
# In and around every block: bytes, lookups of 4 and 6, words of 16, units of 48, chunks of 256, panels of 256 x 8,
# tiles of 32 and their bands of 128, blocks of 4096.
INPUTS = (
    0,
    1,
    4,
    5,
    6,
    7,
    8,
    9,
    12,
    15,
    16,
    17,
    28,
    31,
    47,
    48,
    49,
    63,
    65,
    127,
    129,
    241,
    255,
    256,
    257,
    304,
    500,
    1029,
)
OUTPUTS = (0, 1, 7, 8, 9, 16, 31, 32, 33, 63, 65, 96, 127, 129, 257)


def signs_by_definition(w: Tensor) -> Tensor:
    return torch.where(w >= 0, 1.0, -1.0).to(torch.float64)


def product(
    x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, group_size: int = 0, compute: str = "exact"
) -> tuple[Tensor, Tensor]:
    """y in float64 from the signs of w, and the sum of the magnitudes that error bounds are relative to."""
    if compute == "bf16":
        x = x.to(torch.bfloat16)
    if (
        compute == "int8" and x.shape[-1]
    ):  # the rounding is defined in fp32: near a tie float64 may fall on the other side
        s = x.float().abs().amax(-1, keepdim=True) / 127
        x = torch.where(s > 0, (x.float() / s).round().clamp(-127, 127), 0.0).double() * s.double()
    x = x.double()
    spread = (
        scale.double().repeat_interleave(group_size, 1)[:, : w.shape[1]]
        if group_size
        else scale.double()[:, None]
    )
    weight = signs_by_definition(w) * spread
    y = x @ weight.T
    size = x.abs() @ weight.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return y, size


def make(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(m, k).to(dtype), torch.randn(n, k), torch.rand(n) + 0.5, torch.randn(n)


def check(y: Tensor, expected: Tensor, size: Tensor, tolerance: float = 1e-6) -> None:
    assert y.shape == expected.shape
    error = (y.double() - expected).abs()
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[y.dtype]
    assert bool((error <= tolerance * size + rounding * expected.abs() + 1e-30).all()), float(
        (error / size).max()
    )


# ---- packing -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.floats(width=32), min_size=11, max_size=11), min_size=1, max_size=4),
    st.integers(0, 11),
)
def test_pack_and_unpack_are_inverse(values: list[list[float]], k: int) -> None:
    w = torch.tensor(values)[:, :k]
    bits = pack_signs(w)
    assert bits.shape == (w.shape[0], (k + 7) // 8) and bits.dtype == torch.uint8
    assert torch.equal(unpack_signs(bits, k, torch.float64), signs_by_definition(w))
    assert torch.equal(pack_signs(unpack_signs(bits, k)), bits)


def test_bit_order_and_signs_of_zero() -> None:
    w = torch.full((2, 10), -1.0)
    w[0, 0], w[0, 9], w[1, 3], w[1, 4] = 1.0, 0.0, -0.0, torch.nan
    assert pack_signs(w).tolist() == [[1, 2], [8, 0]]
    assert pack_signs(torch.ones(3, 2, 9, dtype=torch.bfloat16)).tolist() == [[[255, 1]] * 2] * 3


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 4, 17)])
def test_pack_shapes(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    assert torch.equal(unpack_signs(pack_signs(w), shape[-1], torch.float64), signs_by_definition(w))


# ---- the product -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("tiled", [False, True])
def test_shapes(isa: str, compute: str, tiled: bool) -> None:
    shapes = [(m, n, 81) for m, n in itertools.product(ROWS, OUTPUTS)]
    shapes += [(m, n, k) for m, n, k in itertools.product((1, 3, 8), (1, 33, 130), INPUTS)]
    shapes += [(1, 4130, 50), (5, 4130, 50)]
    for m, n, k in shapes:
        x, w, scale, bias = make(m, n, k)
        bits = pack_signs(w)
        tiles = binary_tiles(bits, k) if tiled else None
        y = binary_linear(x, bits, scale, bias, in_features=k, compute=compute, tiles=tiles)
        check(y, *product(x, w, scale, bias, compute=compute))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", COMPUTE)
def test_types_of_x(isa: str, dtype: torch.dtype, compute: str) -> None:
    x, w, scale, bias = make(9, 70, 200, dtype)
    y = binary_linear(x, pack_signs(w), scale, bias, in_features=200, compute=compute)
    assert y.dtype == dtype
    check(y, *product(x, w, scale, bias, compute=compute))


@pytest.mark.parametrize("compute", COMPUTE)
def test_double_takes_the_reference(compute: str) -> None:
    x, w, scale, _ = make(5, 6, 70, torch.float64)
    y = binary_linear(x, pack_signs(w), scale, in_features=70, compute=compute)
    expected = product(x, w, scale, None, compute=compute)[0]
    if compute == "int8":
        s = x.abs().amax(-1, keepdim=True) / 127
        expected = product((x / s).round() * s, w, scale, None)[0]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compute", COMPUTE)
def test_strides_leading_dimensions_and_unaligned_pointers(isa: str, compute: str) -> None:
    k, n = 131, 45
    _, w, scale, bias = make(1, n, k)
    storage = torch.randn(4 * 6 * 2 * (k + 5) + 3)
    bits = torch.zeros(n * 17 + 1, dtype=torch.uint8)[1:].view(n, 17)  # one byte off
    bits.copy_(pack_signs(w))
    scale = torch.cat([torch.zeros(1), scale])[1:]
    views = [
        storage[1 : 1 + 6 * k].view(6, k),
        storage[: k * 6].view(k, 6).T,
        storage[: 2 * k * 6].view(6, 2 * k)[:, ::2],
        storage[3 : 3 + 24 * (k + 5)].view(4, 6, k + 5)[..., 5:],
        storage[: k * 24].view(4, k, 6).movedim(1, 2),
        storage[:k].expand(3, 2, k),
        storage[:k],
        storage[: 6 * k].view(1, 6, 1, k),
    ]
    for x in views:
        y = binary_linear(x, bits, scale, bias, in_features=k, compute=compute)
        expected, size = product(x.reshape(-1, k), w, scale, bias, compute=compute)
        assert y.shape == (*x.shape[:-1], n)
        check(y.reshape(-1, n), expected, size)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("k", [40, 256, 5000])
def test_same_sign_extremes_are_exact(isa: str, compute: str, k: int) -> None:
    """Sums at their largest: 16-bit sums could overflow. Whole numbers, so the answer is exact in both modes."""
    for sign, weight_sign in itertools.product((127.0, -127.0), (1.0, -1.0)):
        x = torch.full((5, k), sign)
        y = binary_linear(
            x, pack_signs(torch.full((40, k), weight_sign)), torch.ones(1), in_features=k, compute=compute
        )
        assert torch.equal(y, torch.full((5, 40), sign * weight_sign * k))


def test_int8_sums_are_exact(isa: str) -> None:
    x = torch.randint(-127, 128, (6, 3001)).float()
    x[:, 0] = 127.0  # s = 1
    w = torch.randn(50, 3001)
    y = binary_linear(x, pack_signs(w), torch.ones(1), in_features=3001, compute="int8")
    assert torch.equal(y.double(), x.double() @ signs_by_definition(w).T)


def test_int8_rounds_half_to_even(isa: str) -> None:
    x = torch.zeros(1, 9)
    x[0, :9] = torch.tensor([127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, 126.5, 0.49])
    y = binary_linear(
        x.repeat(9, 1), pack_signs(2 * torch.eye(9) - 1), torch.ones(1), in_features=9, compute="int8"
    )
    rounded = torch.tensor([127.0, 0, 2, 2, 4, 0, -2, 126, 0])
    assert torch.equal(y[0], 2 * rounded - rounded.sum())  # row n of W is +1 at n alone


def test_int8_error_bound(isa: str) -> None:
    """|y_int8 - y| <= s/2 sum|W|, as documented; and it is not zero, so the mode is on."""
    x, w, scale, bias = make(16, 40, 700)
    y = binary_linear(x, pack_signs(w), scale, bias, in_features=700, compute="int8")
    exact, _ = product(x, w, scale, bias)
    bound = x.abs().amax(1, keepdim=True) / 127 / 2 * 700 * scale
    error = (y - exact).abs()
    assert bool((error <= bound).all()) and float(error.max()) > 1e-3
    assert float(error.norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("group_size", [7, 32, 64, 128, 1000])
@pytest.mark.parametrize("compute", COMPUTE)
def test_group_scales(isa: str, group_size: int, compute: str) -> None:
    for m, n, k in [(1, 130, 256), (3, 33, 200), (9, 40, 31), (1, 5, 1000)]:
        x, w, _, bias = make(m, n, k)
        scale = torch.rand(n, -(-k // group_size)) + 0.1
        y = binary_linear(
            x, pack_signs(w), scale, bias, in_features=k, compute=compute, group_size=group_size
        )
        check(y, *product(x, w, scale, bias, group_size, compute))


@pytest.mark.parametrize("levels", [3, 4, 8, 16])
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("group_size", [0, 32])
def test_planes(isa: str, levels: int, compute: str, group_size: int) -> None:
    for m, n, k in [(1, 130, 250), (5, 33, 81), (8, 64, 240)]:
        weights = plane_weights_of(levels)
        planes = torch.randn(len(weights), n, k)
        x = torch.randn(m, k)
        scale = torch.rand(n, -(-k // group_size)) + 0.1 if group_size else torch.rand(n) + 0.1
        y = binary_linear(
            x,
            pack_signs(planes),
            scale,
            in_features=k,
            compute=compute,
            plane_weights=weights,
            group_size=group_size,
        )
        parts = [product(x, p, scale, None, group_size, compute) for p in planes]
        expected = sum(weight * part[0] for weight, part in zip(weights, parts, strict=True))
        size = sum(weight * part[1] for weight, part in zip(weights, parts, strict=True))
        check(y, expected, size)


def test_scale_of_the_tensor_zero_scales_and_zero_rows(isa: str) -> None:
    x, w, scale, bias = make(6, 37, 90)
    bits = pack_signs(w)
    y = binary_linear(x, bits, torch.tensor([0.25]), in_features=90)
    check(y, *product(x, w, torch.full((37,), 0.25), None))
    scale[::2] = 0
    x[2] = 0
    for compute in COMPUTE:
        y = binary_linear(x, bits, scale, bias, in_features=90, compute=compute)
        assert torch.equal(y[:, ::2], bias[::2].expand(6, -1))
        assert torch.equal(y[2], bias)


def test_tiny_and_huge_values(isa: str) -> None:
    """No intermediate may overflow or vanish where the result does not."""
    w = torch.randn(20, 64)
    bits = pack_signs(w)
    for size in (1e-44, 1e-30, 1e30, 2e36):
        x = torch.randn(2, 64).clamp(-2, 2) * size
        for compute in COMPUTE:
            y = binary_linear(x, bits, torch.ones(1), in_features=64, compute=compute)
            assert bool(y.isfinite().all())
            if size > 1e-40:
                check(y, *product(x, w, torch.ones(20), None, compute=compute))


def test_rounding_to_bfloat16() -> None:
    """Of all kinds of numbers, as torch rounds them: ties to even, denormals, infinities, NaN."""
    ties = torch.tensor(
        [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-23, 1 - 2.0**-9, 2.0**128 - 2.0**119]
    )
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.3e38, 3.4e38, 1e-40, 2.0**-149])
    wild = torch.randint(-(2**31), 2**31, (1 << 16,)).to(torch.int32).view(torch.float32)
    x = torch.cat([ties, -ties, special, wild])
    rounded = reference.round_to_bfloat16(x)
    torch.testing.assert_close(rounded, x.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    assert rounded[:5].tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7, 1.0, torch.inf]
    normal = x.isfinite() & rounded.isfinite() & (x.abs() >= 2.0**-126)
    assert bool(((rounded - x).abs() <= 2.0**-8 * x.abs())[normal].all())
    assert torch.equal(reference.round_to_bfloat16(ties.double()), rounded[:5].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bf16_is_exact_with_x_rounded(isa: str, dtype: torch.dtype) -> None:
    """To the bit, but on tiles, whose sums have another order."""
    for m, n, k, group_size in ((1, 40, 200, 0), (9, 130, 200, 0), (3, 33, 64, 32), (8, 5, 50, 7)):
        x, w, scale, bias = make(m, n, k, dtype)
        scale = torch.rand(n, -(-k // group_size)) if group_size else scale
        form = {"in_features": k, "group_size": group_size, "activation": "silu"}
        bits = pack_signs(w)
        y = binary_linear(x, bits, scale, bias, compute="bf16", **form)
        rounded = x.to(torch.bfloat16).to(dtype)
        expected = binary_linear(rounded, bits, scale, bias, compute="exact", **form)
        if isa == "amx":
            torch.testing.assert_close(y, expected)
        else:
            assert torch.equal(y, expected)
        exact = binary_linear(x, bits, scale, bias, compute="exact", **form)
        assert y.dtype == dtype and not torch.equal(y, exact)


@pytest.mark.parametrize("k", [1, 15, 64, 65, 200])
def test_rounding_to_int8_is_that_of_the_reference(isa: str, k: int) -> None:
    """Of ties too, of quotients near them, and with scales too small for full precision."""
    w = torch.ones(k + 1, k)
    w[1:].fill_diagonal_(-1)  # row 0 less row 1 + i: twice element i
    for size in (127.0, 3.7, 1e-30, 1e-37, 1e-43):
        x = torch.randint(-254, 255, (3, k)) * (size / 254)
        x[:, 0] = size
        x[2, 1:] = torch.linspace(-size, size, k - 1)
        q, s = reference.quantize_rows(x)
        y = binary_linear(x, pack_signs(w), torch.ones(1), in_features=k, compute="int8").double()
        assert torch.equal(((y[:, :1] - y[:, 1:]) / (2 * s.double().view(-1, 1))).round().float(), q)


def test_infinities_and_nan_propagate(isa: str) -> None:
    for k in (64, 67):
        w = torch.randn(50, k)
        x = torch.randn(6, k)
        x[1, 5] = torch.inf
        x[2, k - 1] = -torch.inf
        x[3, 0] = torch.nan
        x[4, 7], x[4, 60] = torch.inf, torch.inf  # NaN where the signs differ
        y = binary_linear(x, pack_signs(w), torch.ones(1), in_features=k)
        torch.testing.assert_close(
            y, x @ signs_by_definition(w).float().T, rtol=1e-5, atol=1e-4, equal_nan=True
        )
        y = binary_linear(x, pack_signs(w), torch.ones(1), in_features=k, compute="int8")
        assert bool(y[1:5].isnan().all()) and bool(y[[0, 5]].isfinite().all())


@pytest.mark.parametrize("levels", [3, 4, 16])
@pytest.mark.parametrize("group_size", [0, 16, 7])
@pytest.mark.parametrize("compute", ["exact", "bf16"])
def test_infinities_with_several_planes(isa: str, levels: int, group_size: int, compute: str) -> None:
    """As in a product with the levels: inf times a level, NaN only for 0 inf and inf - inf."""
    weights, k, n = plane_weights_of(levels), 67, 50
    bits = pack_signs(torch.randn(len(weights), n, k))
    scale = torch.rand(n, -(-k // group_size)) + 0.1 if group_size else torch.rand(n) + 0.1
    x = torch.randn(9, k).to(torch.bfloat16).float()
    x[1, 5], x[2, k - 1], x[3, 0] = torch.inf, -torch.inf, torch.nan
    x[5, 7], x[5, 60] = torch.inf, torch.inf
    dense = reference.dense_weight(PackedWeight(bits, scale, None, k, weights, group_size), torch.float32)
    y = binary_linear(
        x, bits, scale, in_features=k, plane_weights=weights, group_size=group_size, compute=compute
    )
    torch.testing.assert_close(y, x @ dense.T, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert bool(y[1:3].isinf().any()) and bool(y[3].isnan().all()) and bool(y[[0, 4, 6]].isfinite().all())


@given(st.data())
def test_random_strides_and_offsets(data: st.DataObject) -> None:
    """Every instruction set on the same views of x, one element or byte off as they come."""
    draw = data.draw
    m, n, k = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 70))
    row, column, offset = draw(st.integers(0, 80)), draw(st.integers(0, 3)), draw(st.integers(0, 7))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    storage = torch.randn(offset + m * row + k * column + 1).to(dtype)
    x = storage.as_strided((m, k), (row, column), offset)
    w, scale = torch.randn(n, k), (torch.rand(n + offset) + 0.5)[offset:]
    bits = torch.zeros(n * ((k + 7) // 8) + offset, dtype=torch.uint8)[offset:].view(n, -1)
    bits.copy_(pack_signs(w))
    with pytest.MonkeyPatch.context() as patch:
        for name in supported_isas():
            force_isa(patch, name)
            for compute in COMPUTE:
                y = binary_linear(x, bits, scale, in_features=k, compute=compute)
                check(y, *product(x, w, scale, None, compute=compute))


def test_tiles_serve_only_their_own_bits(isa: str) -> None:
    """With other bits, other spare bits, bits written to since, and as a copy, tiles change nothing."""
    x, w, scale, _ = make(2, 40, 90)
    bits, other = pack_signs(w), pack_signs(torch.randn(40, 90))

    def run(bits: Tensor, tiles: Tensor | None, k: int = 90) -> Tensor:
        return binary_linear(x[:, :k], bits, scale, in_features=k, tiles=tiles)

    tiles = binary_tiles(bits, 90)
    assert tiles is not None
    first = run(bits, tiles)
    for its in (tiles, tiles.clone(), binary_tiles(other, 90), None):
        assert torch.equal(run(bits, its), first)
        assert torch.equal(run(other, its), run(other, None)) and not torch.equal(run(other, its), first)
    assert torch.equal(run(bits, tiles, 89), run(bits, None, 89))
    bits.copy_(other)
    assert torch.equal(run(bits, tiles), run(other, None))


def test_auto_is_exact() -> None:
    x, w, scale, bias = make(5, 40, 90)
    bits = pack_signs(w)
    exact = binary_linear(x, bits, scale, bias, in_features=90, compute="exact")
    assert torch.equal(binary_linear(x, bits, scale, bias, in_features=90), exact)
    for values in (x, x.double()):
        y = binary_linear(values, bits, scale, bias, in_features=90, compute="auto")
        torch.testing.assert_close(y.float(), exact)
    if _extension.error is None:
        y = torch.ops.quantopt.binary_linear(x, bits, scale, bias, 90, [1], 0, "auto")
        assert torch.equal(y, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation: str) -> None:
    w, scale = torch.randn(5, 9), torch.full((1,), 0.3)
    x = torch.randn(3, 9, dtype=torch.double, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return binary_linear(x, pack_signs(w), scale, in_features=9, activation=activation)

    assert torch.autograd.gradgradcheck(run, (x,))


def test_spare_bits_do_not_matter(isa: str) -> None:
    for k in (1, 5, 77, 81, 250):
        x, w, scale, bias = make(3, 40, k)
        bits = pack_signs(w)
        dirty = bits.clone()
        dirty[:, -1] |= (0xFF << (k % 8)) & 0xFF
        assert not torch.equal(bits, dirty) or k % 8 == 0
        for compute in COMPUTE:
            y, z = (binary_linear(x, b, scale, bias, in_features=k, compute=compute) for b in (bits, dirty))
            assert torch.equal(y, z)


@pytest.mark.parametrize("compute", COMPUTE)
def test_threads_rows_and_layout_give_the_same_bits(isa: str, compute: str) -> None:
    threads = torch.get_num_threads()
    try:
        for m, n, k, group_size in [
            (1, 700, 333, 0),
            (2, 2100, 900, 0),
            (3, 300, 1000, 0),
            (70, 260, 500, 0),
            (70, 130, 256, 64),
        ]:
            x, w, scale, bias = make(m, n, k)
            if group_size:
                scale = torch.rand(n, k // group_size)
            bits = pack_signs(w)
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                for tiles in (None, binary_tiles(bits, k)):
                    results.append(
                        binary_linear(
                            x,
                            bits,
                            scale,
                            bias,
                            in_features=k,
                            compute=compute,
                            tiles=tiles,
                            group_size=group_size,
                        )
                    )
            for row in range(0, m, 13):
                alone = x[row].expand(8 if m >= 8 and (isa, compute) == ("amx", "bf16") else 1, -1)
                one = binary_linear(
                    alone, bits, scale, bias, in_features=k, compute=compute, group_size=group_size
                )
                assert torch.equal(one[0], results[0][row])
            assert all(torch.equal(results[0], r) for r in results[1:])
    finally:
        torch.set_num_threads(threads)


def test_instruction_sets_agree_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact sums and the same rounding after them: the same bits everywhere."""
    x, w, scale, bias = make(7, 90, 1000)
    results = []
    for name in supported_isas():
        force_isa(monkeypatch, name)
        results.append(binary_linear(x, pack_signs(w), scale, bias, in_features=1000, compute="int8"))
    assert all(torch.equal(results[0], r) for r in results[1:])


@needs_extension
def test_tiles_are_the_same_bits() -> None:
    for k in (150, 256, 261, 700):
        bits = pack_signs(torch.randn(2, 170, k))
        tiles = torch.ops.quantopt.binary_tiles(bits, k)
        if tiles.numel() == 0:
            pytest.skip("this instruction set has no layout of its own")
        count = -(-k // 16)
        padded = torch.zeros(2, 192, 2 * count, dtype=torch.uint8)
        padded[:, :170, : bits.shape[2]] = bits
        words = padded.view(torch.int16).view(2, 6, 32, count).permute(0, 3, 1, 2)  # [plane, word, tile, row]
        bands = [band.reshape(2, -1) for chunk in words.split(16, dim=1) for band in chunk.split(4, dim=2)]
        assert torch.equal(tiles, torch.cat(bands, dim=1))


# ---- the activation --------------------------------------------------------------------------------------------

SMOOTH = {
    "none": lambda y: y,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation(isa: str, activation: str, compute: str, dtype: torch.dtype) -> None:
    """Of the fp32 sums. The derivatives are at most 1.13, so errors of the sums grow by that."""
    for m, n, k, group_size in [(1, 33, 81, 0), (9, 70, 250, 0), (3, 65, 128, 32), (3, 5, 50, 7)]:
        x, w, scale, bias = make(m, n, k, dtype)
        scale = torch.rand(n, -(-k // group_size)) + 0.1 if group_size else scale / k**0.5
        y = binary_linear(
            x,
            pack_signs(w),
            scale,
            bias,
            in_features=k,
            compute=compute,
            group_size=group_size,
            activation=activation,
        )
        expected, size = product(x, w, scale, bias, group_size, compute)
        check(y, SMOOTH[activation](expected), size, 2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_from_tail_to_tail(isa: str, activation: str) -> None:
    """To 1e-6 of max(1, |y|) everywhere, and limits as in float64 where exponentials overflow; NaN propagates."""
    y = torch.cat(
        [torch.linspace(-200, 200, 4001), torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 3e38])]
    )
    out = binary_linear(
        y[:, None], torch.ones(3, 1, dtype=torch.uint8), torch.ones(1), in_features=1, activation=activation
    )
    expected = SMOOTH[activation](y.double())[:, None].expand(-1, 3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_go_through_the_activation(activation: str, compute: str, dtype: torch.dtype) -> None:
    x, w, scale, bias = make(4, 5, 33, dtype)
    scale, bits = scale / 6, pack_signs(w)
    x.requires_grad_()
    bias.requires_grad_()
    form = {"in_features": 33, "compute": compute, "activation": activation}
    y = binary_linear(x[None], bits, scale, bias, **form)
    with torch.no_grad():
        assert torch.equal(y, binary_linear(x[None], bits, scale, bias, **form))
    grad = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    weight = signs_by_definition(w) * scale[:, None]
    sums = product(x.detach(), w, scale, bias.detach(), compute=compute)[0].requires_grad_()
    (grad_sums,) = torch.autograd.grad(SMOOTH[activation](sums), sums, grad[0].double())
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(grad_x.double(), grad_sums @ weight, **tolerance)
    torch.testing.assert_close(grad_bias.double(), grad_sums.sum(0), rtol=1e-5, atol=1e-5)


# ---- the operator ------------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("compute", COMPUTE)
def test_opcheck(compute: str) -> None:
    x, w, scale, bias = make(3, 40, 90)
    bits = pack_signs(w)
    arguments = (x, bits, scale, bias, 90, [1], 0, compute)
    torch.library.opcheck(torch.ops.quantopt.binary_linear.default, arguments)
    tiles = torch.ops.quantopt.binary_tiles(bits, 90)
    torch.library.opcheck(torch.ops.quantopt.binary_linear.default, (*arguments, tiles))
    torch.library.opcheck(
        torch.ops.quantopt.binary_linear.default, (x.bfloat16()[None, :, :], *arguments[1:], None, "silu")
    )
    torch.library.opcheck(torch.ops.quantopt.binary_tiles.default, (bits, 90))


@pytest.mark.parametrize("compute", COMPUTE)
def test_gradients_are_those_of_the_dense_layer(compute: str) -> None:
    x, w, scale, bias = make(4, 5, 33)
    x.requires_grad_()
    bias.requires_grad_()
    y = binary_linear(x[None], pack_signs(w), scale, bias, in_features=33, compute=compute)
    grad = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    weight = signs_by_definition(w) * scale[:, None]
    torch.testing.assert_close(grad_x.double(), grad[0].double() @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_bias, grad[0].sum(0))


def test_reference_when_the_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantopt import backends

    x, w, scale, bias = make(4, 50, 200)
    bits = pack_signs(w)
    with monkeypatch.context() as patch:
        patch.setattr(_extension, "error", "not built")
        backends._choose.cache_clear()
        results = {c: binary_linear(x, bits, scale, bias, in_features=200, compute=c) for c in COMPUTE}
        assert binary_tiles(bits, 200) is None
    backends._choose.cache_clear()
    for compute, y in results.items():
        check(y, *product(x, w, scale, bias, compute=compute))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 9)}, ValueError, "x must have in_features=10"),
        ({"x": torch.zeros(3, 10, dtype=torch.int64)}, TypeError, "x must be a floating tensor"),
        ({"bits": torch.zeros(4, 2)}, TypeError, "bits must be a uint8 tensor"),
        ({"bits": torch.zeros(4, 3, dtype=torch.uint8)}, ValueError, "needs 2 bytes per row, bits have 3"),
        ({"bits": torch.zeros(2, dtype=torch.uint8)}, ValueError, r"bits must be \[N"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must have shape \[1\] or \[4\], not \[3\]"),
        ({"scale": torch.ones(4, 2)}, ValueError, "scales per group need group_size"),
        ({"scale": torch.ones(4, dtype=torch.int32)}, TypeError, "scale must be a floating tensor"),
        ({"group_size": 4}, ValueError, r"scale must have shape \[4, 3\]"),
        ({"group_size": -1}, ValueError, "group_size must be an integer of at least 0"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[4\]"),
        ({"compute": "fp8"}, ValueError, 'compute must be "auto", "exact", "bf16" or "int8"'),
        (
            {"activation": "tanh"},
            ValueError,
            'activation must be "none", "relu", "gelu" or "silu", not \'tanh\'',
        ),
        ({"in_features": -1}, ValueError, "in_features must be an integer"),
        ({"plane_weights": [1, 2]}, ValueError, "plane_weights must be 1 integers"),
        ({"plane_weights": [0]}, ValueError, "plane_weights"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, TypeError, "bias must be a floating tensor"),
        ({"bits": torch.zeros(0, 4, 2, dtype=torch.uint8)}, ValueError, "at least one plane"),
        ({"x": torch.randn(3, 10, device="meta")}, ValueError, "bits is on cpu, x on meta"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.randn(3, 10),
        "bits": torch.zeros(4, 2, dtype=torch.uint8),
        "scale": torch.ones(4),
        "in_features": 10,
        **change,
    }
    with pytest.raises(error, match=message):
        binary_linear(**arguments)  # type: ignore[arg-type]


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.randn(3, 9), torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4), None, 10, [1]),
            "as its last dimension",
        ),
        (
            (torch.randn(3, 10), torch.zeros(4, 1, dtype=torch.uint8), torch.ones(4), None, 10, [1]),
            "bytes per row",
        ),
        (
            (torch.randn(3, 10), torch.zeros(4, 2, dtype=torch.uint8), torch.ones(3), None, 10, [1]),
            "scale must be",
        ),
        (
            (torch.randn(3, 10), torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4), torch.ones(3), 10, [1]),
            "bias",
        ),
        (
            (torch.randn(3, 10), torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4), None, 10, [1, 1]),
            "plane_weights",
        ),
        (
            (torch.randn(3, 10), torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4), None, 10, [1], 4),
            "group_size",
        ),
        (
            (torch.randn(3, 10), torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4), None, 10, [1], 0, "x"),
            "compute",
        ),
        (
            (
                torch.randn(3, 10),
                torch.zeros(4, 2, dtype=torch.uint8),
                torch.ones(4),
                None,
                10,
                [1],
                0,
                "exact",
                None,
                "x",
            ),
            "activation",
        ),
    ],
)
def test_the_operator_itself_checks_sizes(arguments: tuple[object, ...], message: str) -> None:
    """torch.ops.quantopt.binary_linear called directly must not read beyond its tensors."""
    with pytest.raises(ValueError, match=message):
        torch.ops.quantopt.binary_linear(*arguments)


@needs_extension
def test_foreign_tiles_are_refused() -> None:
    x, w, scale, _ = make(1, 40, 90)
    tiles = torch.ops.quantopt.binary_tiles(pack_signs(w), 90)
    if tiles.numel() == 0:
        pytest.skip("this instruction set has no layout of its own")
    with pytest.raises(ValueError, match="tiles do not belong"):
        torch.ops.quantopt.binary_linear(x, pack_signs(w), scale, None, 90, [1], 0, "exact", tiles[:, :1])


@needs_extension
def test_int8_refuses_sums_beyond_32_bits() -> None:
    k = 2**31 // 127 // 15 + 1
    with pytest.raises(ValueError, match="too large for the 32-bit sums"):
        binary_linear(
            torch.zeros(1, k),
            torch.zeros(4, 1, (k + 7) // 8, dtype=torch.uint8),
            torch.ones(1),
            in_features=k,
            compute="int8",
        )


@pytest.mark.parametrize(
    ("w", "error"), [(torch.ones(3, dtype=torch.int8), TypeError), (torch.tensor(1.0), ValueError)]
)
def test_pack_signs_errors(w: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="w must"):
        pack_signs(w)


def test_reference_in_double_is_the_definition() -> None:
    x, w, scale, bias = make(5, 11, 37, torch.float64)
    group = torch.rand(11, 3).double()
    for compute in COMPUTE:
        values = x
        if compute == "bf16":
            values = x.to(torch.bfloat16)
        if compute == "int8":
            q, s = reference.quantize_rows(x)
            assert float(q.abs().max()) == 127 and torch.equal(q, q.round())
            values = q * s
        for group_size, factor in ((0, scale.double()), (16, group)):
            y = reference.binary_linear(
                x, PackedWeight(pack_signs(w), factor, bias.double(), 37, [1], group_size), compute
            )
            torch.testing.assert_close(
                y, product(values, w, factor, bias, group_size)[0], rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize(
    "row", [[127] * 516 + [4], [127] * 517, [127, 127, 127, 126] * 129 + [127]], ids=["2^15", "more", "even"]
)
def test_sums_that_just_leave_16_bits(isa: str, row: list[int]) -> None:
    """Half of sum |q| is 2^15 or a little more, in one chunk after two."""
    x = torch.tensor([row, [-v for v in row], [127] + [0] * 516], dtype=torch.float)
    for sign in (1.0, -1.0):
        bits = pack_signs(torch.full((130, 517), sign))
        y = binary_linear(x, bits, torch.ones(1), in_features=517, compute="int8")
        assert torch.equal(y, (sign * x.sum(1, keepdim=True)).expand(-1, 130))


def test_heavy_planes_are_exact(isa: str) -> None:
    """Levels beyond a byte, with few outputs; sums of a panel beyond 2^24."""
    for planes, k in (([128, 128], 64), ([127] * 5, 512)):
        bits = torch.full((len(planes), 32, k // 8), 255, dtype=torch.uint8)
        x = torch.full((16, k), 127.0)
        y = binary_linear(x, bits, torch.ones(1), in_features=k, compute="int8", plane_weights=planes)
        assert torch.equal(y, torch.full((16, 32), 127.0 * k * sum(planes)))


@needs_extension
def test_tiles_of_another_view_or_length_are_not_used() -> None:
    bits = pack_signs(torch.randn(64, 64))
    tiles = binary_tiles(bits, 64)
    turned = bits.as_strided((64, 8), (1, 64))
    for other, strange in ((turned, tiles), (bits, binary_tiles(bits, 61))):
        x = torch.randn(4, 64)
        y = binary_linear(x, other, torch.ones(1), in_features=64, tiles=strange)
        assert torch.equal(y, binary_linear(x, other, torch.ones(1), in_features=64))


def test_bits_on_another_device_are_an_error() -> None:
    x, bits = torch.ones(2, 64), torch.zeros(32, 8, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="bits is on meta, x on cpu"):
        run_linear(x, PackedWeight(bits, torch.ones(1), None, 64, [1]), "exact", "none")
    with pytest.raises(ValueError, match="bits is on meta, x on cpu"):
        run_conv2d(
            x.view(1, 2, 8, 8),
            PackedWeight(bits[:, :1], torch.ones(1), None, 8, [1]),
            ConvGeometry((2, 2)),
            "exact",
            "none",
        )
