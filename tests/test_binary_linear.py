"""binary_linear against the product in float64, on every instruction set."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import force_isa, supported_isas
from linear_cases import INPUTS, OUTPUTS, ROWS, check, make, product, signs_by_definition
from quantopt import _extension
from quantopt.ops.inputs import COMPUTE
from quantopt.ops.linear import binary_linear
from quantopt.ops.tiles import binary_tiles
from quantopt.ops.weights import pack_signs, plane_weights_of
from quantopt.packed_weight import PackedWeight
from quantopt.reference import binary as reference

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


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


@pytest.mark.parametrize("levels", [3, 4, 8, 16, 17])
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
        parts = [product(x, p, scale, None, group_size, compute, exact_scales=levels > 3) for p in planes]
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


@pytest.mark.parametrize("levels", [3, 4, 16, 17])
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
                alone = x[row].expand(48 if m >= 48 and isa == "amx" and compute != "int8" else 1, -1)
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
