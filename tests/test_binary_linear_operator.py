"""The operator binary_linear: its checks, its tiles, what torch.compile knows of it."""

import pytest
import torch
from torch import Tensor

from linear_cases import check, make, product
from quantopt import _extension, backends
from quantopt.ops.conv2d import run_conv2d
from quantopt.ops.inputs import COMPUTE
from quantopt.ops.linear import binary_linear, run_linear
from quantopt.ops.tiles import binary_tiles
from quantopt.ops.weights import pack_signs
from quantopt.packed_weight import ConvGeometry, PackedWeight

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


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


@needs_extension
def test_tiles_are_the_same_bits() -> None:
    for k in (150, 256, 261, 700):
        bits = pack_signs(torch.randn(2, 170, k))
        tiles = torch.ops.quantopt.binary_tiles(bits, k)
        if tiles.numel() == 0:
            pytest.skip("this instruction set has no tiles")
        count = -(-k // 16)
        padded = torch.zeros(2, 192, 2 * count, dtype=torch.uint8)
        padded[:, :170, : bits.shape[2]] = bits
        words = padded.view(torch.int16).view(2, 6, 32, count).permute(0, 3, 1, 2)  # [plane, word, tile, row]
        chunks = [chunk.transpose(1, 2).reshape(2, -1) for chunk in words.split(16, dim=1)]
        assert torch.equal(tiles, torch.cat(chunks, dim=1))


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


def test_reference_when_the_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:

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
        ({"group_size": -1}, ValueError, "group_size must be an integer in"),
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
        pytest.skip("this instruction set has no tiles")
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
