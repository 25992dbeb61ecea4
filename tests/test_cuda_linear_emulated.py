"""The CUDA kernels of packed linear layers, their source run on the host: gemv, mma and cuBLAS's products."""

import itertools
from typing import Any

import pytest
import torch

from product_cases import CONVS, DTYPES, SHAPES, ConvCase, LinearCase
from quantopt import backends
from quantopt.ops.inputs import ACTIVATIONS
from quantopt.ops.weights import pack_signs, plane_weights_of, unpack_signs


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
        case = LinearCase(m, n, k, int8=int8)
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
        case = LinearCase(m, 33, 136, int8=int8, dtype=DTYPES[m % 3])
        y = case.run(host)
        case.check(y)
        if int8:
            case.check_bits(y)


INPUTS = (1, 5, 8, 31, 32, 33, 120, 127, 128, 129, 136, 255, 257, 520, 1023, 1025, 4097)


def test_cublas_takes_rows_in_turns(host: Any) -> None:
    """As many as have 32 MiB of sums: 119 here, and 2 more, which cuBLAS gets with 30 rows of no meaning."""
    case = LinearCase(121, 70_400, 8, int8=True, dtype=torch.float32)
    case.check_bits(case.run(host, "cublas"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_rounded_to_bfloat16(host: Any, dtype: torch.dtype) -> None:
    """Multiplied once, into y of its own type: by each kernel, in turns of rows, in groups of channels."""
    cases = [
        (LinearCase(5, 50, 300, dtype=dtype, plane_weights=(1, 2)), "mma"),
        (LinearCase(70, 50, 300, dtype=dtype, plane_weights=(1, 2)), "wgmma"),
        (LinearCase(7, 40, 96, dtype=dtype, group=32), "mma"),
        (LinearCase(121, 70_400, 8, dtype=dtype), "cublas"),
    ]
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
    product = backends.Product(1, 0, "bf16", groups=2, channels=24, outputs=20)
    for limit in backends.LIMITS["binary_conv2d", "cuda"]:
        assert limit.fits(product, dtype)


def test_rows_beyond_a_grid(host: Any) -> None:
    """mma takes 65535 / 3 blocks of 8 tokens at a time: here those, and three more."""
    m = 65535 // 3 * 8
    x = torch.zeros(m + 3, 8)
    x[-5:] = torch.randn(5, 8)
    case = LinearCase(m + 3, 2, 8, x=x.bfloat16(), group=32)
    before = host.launches()
    y = case.run(host)
    assert host.launches() - before == 1 + 2  # the tiles, and each part
    case.check(y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_become_y_row_after_row(host: Any, dtype: torch.dtype) -> None:
    """More rows than blocks of one processor; rows that begin where 16 bytes do, and others."""
    for n, int8 in itertools.product((40, 41, 516, 519), (False, True)):
        case = LinearCase(37, n, 129, int8=int8, dtype=dtype)
        y = case.run(host, "cublas", processors=1)
        case.check(y)
        if int8:
            case.check_bits(y)


@pytest.mark.parametrize("kernel", ["mma", "cublas"])
def test_rows_longer_than_a_block_keeps(host: Any, kernel: str) -> None:
    """8192 numbers stay in the registers of the block that quantises them; the largest may be any."""
    for k, at in ((8192, 8191), (8193, 8192), (10_250, 0), (10_250, 10_249)):
        for dtype in DTYPES:
            x = torch.randn(2, k).to(dtype)
            x[:, at] = 9
            case = LinearCase(2, 9, k, x=x, int8=True, dtype=dtype)
            case.check_bits(case.run(host, kernel))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kernel", ["gemv", "mma", "cublas"])
def test_inputs_and_outputs(host: Any, kernel: str, int8: bool) -> None:
    if kernel == "gemv" and not int8:
        pytest.skip("gemv multiplies whole numbers")
    for n, k in [*((33, k) for k in INPUTS), *((n, 129) for n in (1, 7, 31, 32, 127, 128, 257, 300))]:
        case = LinearCase(1 if kernel == "gemv" else 3, n, k, int8=int8, dtype=DTYPES[(n + k) % 3])
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
            for kernel in ("mma", "cublas", *(("gemv",) if int8 and len(x) == 1 else ())):
                case = LinearCase(len(x), 40, k, x=x, int8=int8)
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
        case = LinearCase(5, 70, k, dtype=dtype, group=group, int8=int8)
        y = case.run(host, "mma", shape, splits)
        case.check(y)


@pytest.mark.parametrize("levels", [3, 4, 8, 16, 17])
@pytest.mark.parametrize("int8", [False, True])
def test_planes(host: Any, levels: int, int8: bool) -> None:
    weights = plane_weights_of(levels)
    for kernel, m, k, group in [
        ("mma", 3, 300, 0),
        ("mma", 20, 1300, 0),
        ("cublas", 3, 300, 0),
        ("mma", 9, 300, 64),
        *([("gemv", 1, 300, 0), ("gemv", 1, 4500, 0)] if int8 else []),
    ]:
        case = LinearCase(m, 40, k, plane_weights=weights, group=group, int8=int8, dtype=torch.float32)
        y = case.run(host, kernel)
        case.check(y)
        if int8 and not group:
            case.check_bits(y)


@pytest.mark.parametrize("kernel", ["gemv", "mma", "cublas"])
def test_extremes_of_one_sign(host: Any, kernel: str) -> None:
    """Sums as large as they can be: no 16- or 8-bit intermediate may overflow."""
    m, k = (1 if kernel == "gemv" else 2), 4096
    for sign in (1, -1):
        case = LinearCase(
            m, 32, k, x=torch.full((m, k), 3.0 * sign), int8=True, plane_weights=(8, 4), bias=False
        )
        for bits in (0x00, 0xFF):
            case.bits.fill_(bits)
            case.check_bits(case.run(host, kernel))


@pytest.mark.parametrize("kernel", ["mma", "cublas"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_propagate(host: Any, kernel: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 67)
    x[1, 5], x[2, 66], x[3, 0] = torch.inf, -torch.inf, torch.nan
    x[4, 7], x[4, 60] = torch.inf, torch.inf  # NaN where the signs differ
    x[5, 3] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # NaN in the lowest bit
    case = LinearCase(6, 50, 67, x=x.to(dtype))
    expected = case.expected()[0]
    torch.testing.assert_close(
        case.run(host, kernel).double(), expected, rtol=1e-2, atol=1e-2, equal_nan=True
    )
    rough = LinearCase(6, 50, 67, x=x.to(dtype), int8=True)
    y = rough.run(host, kernel)
    assert bool(y[1:].isnan().all()) and bool(y[0].isfinite().all())
    row = LinearCase(1, 50, 67, x=x[1:2].to(dtype), int8=True)
    assert bool(row.run(host, "gemv").isnan().all())


def test_tiny_and_huge_values(host: Any) -> None:
    """Nothing overflows or vanishes on the way where the result does not."""
    for size in (1e-44, 1e-38, 1e-30, 1e30, 2e36):
        for kernel, m, int8 in [
            ("mma", 2, False),
            ("cublas", 2, False),
            ("mma", 2, True),
            ("gemv", 1, True),
        ]:
            x = torch.randn(m, 64).clamp(-2, 2) * size
            case = LinearCase(m, 20, 64, x=x, int8=int8, bias=False)
            y = case.run(host, kernel)
            assert bool(y.isfinite().all())
            if size > 1e-36:
                case.check(y)


def test_numbers_in_the_middle_are_rounded_to_even(host: Any) -> None:
    x = torch.cat([torch.tensor([127.0]), torch.arange(-126.5, 127, 0.5)]).repeat(2, 1) * 0.37
    for m, kernel in ((1, "gemv"), (2, "mma"), (2, "cublas")):
        case = LinearCase(m, 64, x.shape[1], x=x[:m], int8=True)
        case.check_bits(case.run(host, kernel))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scale_of_the_tensor_bias_and_activation(host: Any, activation: str) -> None:
    function = {"none": lambda y: y, "relu": torch.relu, "silu": torch.nn.functional.silu}.get(
        activation, torch.nn.functional.gelu
    )
    for kernel, m, int8 in [("mma", 3, False), ("mma", 3, True), ("cublas", 3, True), ("gemv", 1, True)]:
        for bias in (False, True):
            case = LinearCase(
                m, 40, 90, dtype=torch.float32, int8=int8, one_scale=True, bias=bias, activation=activation
            )
            expected = function(case.expected()[0])
            torch.testing.assert_close(case.run(host, kernel).double(), expected, rtol=1e-5, atol=1e-4)


def test_zero_rows_and_zero_scales(host: Any) -> None:
    for m, kernel, int8 in [(3, "mma", False), (3, "mma", True), (3, "cublas", True), (1, "gemv", True)]:
        case = LinearCase(m, 40, 90, dtype=torch.float32, int8=int8)
        case.scale[::2] = 0
        case.x[0] = 0
        y = case.run(host, kernel)
        assert torch.equal(y[0], case.bias) and torch.equal(y[:, ::2], case.bias[::2].expand(m, -1))


def test_planned_division_of_large_products(host: Any) -> None:
    """What plan_mma chooses on few and on many processors."""
    for m, n, k in [(1, 300, 5000), (8, 300, 5000), (16, 260, 9000), (33, 260, 3000), (70, 260, 3000)]:
        for processors in (1, 132):
            case = LinearCase(m, n, k)
            case.check(case.run(host, "mma", processors=processors))
            case = LinearCase(m, n, k, int8=True)
            case.check_bits(case.run(host, "mma", processors=processors))


def test_launches(host: Any) -> None:
    """One for 16-bit x; one that quantises or splits before; from sm_90 on none that adds up parts of K."""

    def launches(case: LinearCase, kernel: str, splits: int, capability: int) -> int:
        before = host.launches()
        case.run(host, kernel, 1, splits, capability=capability)
        return host.launches() - before - 1  # and one that makes the tiles

    half, single = LinearCase(3, 40, 1024), LinearCase(3, 40, 1024, dtype=torch.float32)
    whole, row = LinearCase(3, 40, 1024, int8=True), LinearCase(1, 40, 1024, int8=True)
    assert launches(row, "gemv", 1, 80) == 1
    for case, one, two_on_80, two_on_90 in ((half, 1, 2, 1), (whole, 2, 3, 2), (single, 3, 3, 3)):
        assert launches(case, "mma", 1, 80) == launches(case, "mma", 1, 90) == one
        assert launches(case, "mma", 2, 80) == two_on_80
        assert launches(case, "mma", 2, 90) == two_on_90
        assert launches(case, "mma", 16, 90) == two_on_80  # more than a cluster has


def test_tiles_are_the_same_bits(host: Any) -> None:
    bits = pack_signs(torch.randn(2, 70, 300))
    tiles = host.binary_tiles(bits, 300).view(2, 3, 3, 8, 4, 4)  # plane, tile, block, g, t, word
    signs = torch.zeros(2, 96, 384, dtype=torch.int32)  # 1 = -1
    signs[:, :70, :300] = (unpack_signs(bits, 300) < 0).int()
    rows = signs.view(2, 3, 4, 8, 3, 4, 4, 2, 2, 2)  # plane, tile, word, g, block, c, t, e / 4, e / 2, e
    weights = rows.permute(0, 1, 4, 3, 6, 2, 9, 8, 5, 7)  # ..., word, then its bits
    expected = (weights.flatten(6).long() << torch.arange(32)).sum(-1)
    assert torch.equal(tiles.long() & 0xFFFFFFFF, expected)
