"""GGUF: blocks against the format's definition, and the container."""

import struct

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from gguf_cases import KINDS, random_layer
from quantopt import gguf
from quantopt.nn import BinaryLinear


def decoded(kind: str, block: bytes) -> list[float]:
    """The weights of one block, as ggml-quants.c computes them, weight by weight."""
    if kind == "Q1_0":
        d, codes = block[:2], [block[2 + j // 8] >> j % 8 & 1 for j in range(128)]
        d = float(np.frombuffer(d, np.float16)[0])
        return [d if code else -d for code in codes]
    d = float(np.frombuffer(block[-2:], np.float16)[0])
    codes = []
    if kind == "TQ2_0":
        for j in (0, 32):
            for shift in range(4):
                codes += [block[j + m] >> 2 * shift & 3 for m in range(32)]
    else:
        for first, count, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
            for n in range(digits):
                for m in range(count):
                    turned = block[first + m] * 3**n % 256  # uint8_t
                    codes.append(turned * 3 >> 8)
    return [(code - 1) * d for code in codes]


def weights(kind: str, blocks: np.ndarray) -> torch.Tensor:
    size = KINDS[kind][2]
    rows = [
        [w for i in range(0, len(row), size) for w in decoded(kind, bytes(row[i : i + size]))]
        for row in blocks
    ]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_the_definition(kind):
    _, block, size = KINDS[kind]
    layer = random_layer(2 * block, 3, kind)
    blocks = gguf.to_blocks(layer, kind)
    assert blocks.dtype == np.uint8 and blocks.shape == (3, 2 * size)
    assert torch.equal(weights(kind, blocks), layer.weight)
    again = gguf.from_blocks(blocks, kind)
    assert again.group_size == block and torch.equal(again.bits, layer.bits)
    assert torch.equal(again.scale, layer.scale)


def test_any_signs_and_scales_of_q1_0_are_read_and_written_again():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (4, 3, 18), dtype=np.uint8)
    d = np.array([0, 6e-8, 6.1e-5, 65504.0] * 3, dtype=np.float16)  # zero, subnormal, normal, the largest
    blocks[..., :2] = d.view(np.uint8).reshape(4, 3, 2)
    blocks = blocks.reshape(4, 54)
    layer = gguf.from_blocks(blocks, "Q1_0")
    assert torch.equal(layer.weight, weights("Q1_0", blocks))
    assert np.array_equal(gguf.to_blocks(layer), blocks)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_blocks_are_those_of_the_gguf_package(kind):
    layer = random_layer(512, 5, kind, seed=1)
    number = GGMLQuantizationType[kind]
    blocks = gguf.to_blocks(layer, kind)
    assert np.array_equal(blocks, quantize(layer.weight.numpy(), number))
    assert np.array_equal(dequantize(blocks, number), layer.weight.numpy())
    assert torch.equal(gguf.from_blocks(blocks, kind).weight, layer.weight)


def test_every_code_of_tq1_0_is_read():
    codes = np.arange(243, dtype=np.uint8)
    data = np.zeros((243, 54), dtype=np.uint8)
    data[:, :48] = ((codes.astype(int) * 256 + 242) // 243)[:, None]
    data[:, 52:] = np.float16(0.5).tobytes()[0], np.float16(0.5).tobytes()[1]
    layer = gguf.from_blocks(data, "TQ1_0")
    assert torch.equal(layer.weight, weights("TQ1_0", data))
    assert len({tuple(row) for row in layer.weight.tolist()}) == 243
    assert np.array_equal(gguf.to_blocks(layer, "TQ1_0"), data)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "tensor"},
        {"scale": "channel"},
        {"scale": "group", "group_size": 256},
        {"scale": "group", "group_size": 32},
        {"scale": "group", "group_size": 1000},
    ],
)
def test_scales_that_blocks_hold(options):
    layer = random_layer(512, 4, **options)
    if options.get("group_size") == 32:
        layer.scale.copy_(layer.scale[:, ::4].repeat_interleave(4, dim=1))
    again = gguf.from_blocks(gguf.to_blocks(layer), "Q1_0")
    assert torch.equal(again.weight, layer.weight)
    x = torch.randn(3, 512)
    torch.testing.assert_close(again(x), layer(x))
    assert again.scale_kind == ("group" if options.get("group_size") in (32, 256) else "channel")


def test_scales_that_are_no_fp16_are_rounded_on_request():
    layer = random_layer(256, 8, scale="channel")
    layer.scale.mul_(1 + 1e-4)
    with pytest.raises(
        ValueError, match=r'up: 16 of the 16 scales of its blocks are no numbers of fp16.*scales="round"'
    ):
        gguf.to_blocks(layer, name="up")
    rounded = gguf.from_blocks(gguf.to_blocks(layer, scales="round"), "Q1_0")
    assert torch.equal(rounded.weight, layer.weight.sign() * layer.scale.half().float()[:, None])
    for bad in (1e5, 1e-9):
        layer.scale[3] = bad
        with pytest.raises(ValueError, match="outside the range of fp16"):
            gguf.to_blocks(layer, scales="round")


def with_scale(value):
    layer = random_layer(128, 2)
    layer.scale[1] = value
    return layer


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (lambda: random_layer(192, 2, scale="channel"), {}, "in_features=192.*multiple of 128.*unpacked"),
        (lambda: random_layer(128, 2, "TQ2_0", scale="channel"), {}, "in_features=128.*multiple of 256"),
        (lambda: BinaryLinear(128, 2, levels=4), {}, "has 4 levels"),
        (lambda: random_layer(256, 2), {"kind": "TQ2_0"}, "has 2 levels, and TQ2_0 holds 3"),
        (lambda: random_layer(128, 2), {"kind": "Q4_0"}, "kind must be one of"),
        (lambda: random_layer(128, 2), {"scales": "nearest"}, "scales must be"),
        (
            lambda: random_layer(128, 2, scale="group", group_size=32),
            {},
            "a scale for each 32 weights, and Q1_0 one for each 128: train it with group_size=128",
        ),
        (lambda: BinaryLinear(128, 2, activation="relu"), {}, "applies relu"),
        (lambda: with_scale(-1.0), {}, "negative or not finite"),
        (lambda: with_scale(float("nan")), {}, "negative or not finite"),
    ],
)
def test_refused_layers(layer, options, message):
    with pytest.raises(ValueError, match=message):
        gguf.to_blocks(layer(), **options)


def test_refused_blocks():
    good = gguf.to_blocks(random_layer(256, 2, "TQ2_0"))
    for change, message in (
        (lambda b: b[:, :-1], "a multiple of 66"),
        (lambda b: b.astype(np.int16), "must be uint8"),
        (lambda b: np.concatenate([b[:, :-2], np.full((2, 2), 255, np.uint8)], 1), "not finite"),
        (lambda b: np.concatenate([np.full((2, 64), 255, np.uint8), b[:, -2:]], 1), "a code is 3"),
    ):
        with pytest.raises(ValueError, match=f"^head: .*{message}"):
            gguf.from_blocks(change(good), "TQ2_0", name="head")
    with pytest.raises(TypeError, match=r"must be a quantopt\.nn\.BinaryLinear, not Linear"):
        gguf.to_blocks(nn.Linear(128, 2))


def test_layers_in_a_file(tmp_path):
    layers = {"encoder.0": random_layer(256, 3, bias=True), "encoder.1": random_layer(512, 5, "TQ2_0")}
    path = tmp_path / "layers.gguf"
    gguf.save_layers(layers, path)
    theirs = {t.name: t for t in GGUFReader(path).tensors}  # the package's own reader finds the same
    assert theirs["encoder.1.weight"].tensor_type == GGMLQuantizationType.TQ2_0
    assert np.array_equal(
        dequantize(theirs["encoder.1.weight"].data, GGMLQuantizationType.TQ2_0),
        layers["encoder.1"].weight.numpy(),
    )
    assert np.array_equal(theirs["encoder.0.bias"].data, layers["encoder.0"].bias.numpy())
    assert theirs["encoder.0.weight"].tensor_type == 41 and list(theirs["encoder.0.weight"].shape) == [256, 3]
    file = gguf.File(path)
    for name, layer in layers.items():
        again = gguf.read_layer(file, name, compute="int8")
        assert again.compute == "int8" and torch.equal(again.weight, layer.weight)
        assert (again.bias is None) == (layer.bias is None)
    assert torch.equal(gguf.read_layer(file, "encoder.0").bias, layers["encoder.0"].bias)
    with pytest.raises(gguf.GGUFFileError, match=r"layers\.gguf: no tensor decoder\.weight"):
        gguf.read_layer(file, "decoder")


def test_a_file_of_the_gguf_package_is_read(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("words", ["a", "ü", "ab c"])
    writer.add_bool("yes", True)
    writer.add_float64("pi", 3.25)
    writer.add_uint64("large", 2**40)
    data = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float16)
    writer.add_tensor("odd", data)
    writer.add_tensor("one", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf.File(path)
    values = {key: field.value for key, field in file.metadata.items()}
    assert values["numbers"] == [1, -2, 3] and values["words"] == ["a", "ü", "ab c"]
    assert values["yes"] is True and values["pi"] == 3.25 and values["large"] == 2**40
    assert np.array_equal(file.read("odd").view(np.float16), data)
    assert file.tensors["odd"].shape == (3, 7)
    assert np.array_equal(file.read("one").view(np.float32), np.arange(5))


def header_of(*, tensors=0, fields=b"", count=0) -> bytes:
    return struct.pack("<IIQQ", 0x46554747, 3, tensors, count) + fields


def text(string: str) -> bytes:
    return struct.pack("<Q", len(string)) + string.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the magic number is 4 bytes long, and 0 are left"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (struct.pack("<IIQQ", 0x46554747, 1, 0, 0), "version 1 is not read"),
        (header_of(count=2**60), "the length of a key"),
        (header_of(tensors=2**60), "the length of the name of a tensor"),
        (header_of(count=1, fields=text("a") + struct.pack("<IIQ", 9, 0, 2**60)), "a is 11529215046068"),
        (
            header_of(count=1, fields=text("a") + struct.pack("<IIQ", 9, 8, 2**40)),
            "more than the file has room",
        ),
        (header_of(count=1, fields=text("a") + struct.pack("<IIQ", 9, 9, 1)), "array of arrays"),
        (header_of(count=1, fields=text("a") + struct.pack("<I", 77)), "type 77"),
        (header_of(count=2, fields=2 * (text("a") + struct.pack("<IB", 0, 1))), "occurs twice"),
        (header_of(tensors=1, fields=text("w") + struct.pack("<I", 2**31)), "dimensions"),
        (
            header_of(tensors=1, fields=text("w") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
            "tensor w of .* would end at .*: it is cut off",
        ),
        (
            header_of(tensors=1, fields=text("w") + struct.pack("<IQIQ", 1, 100, 41, 0)),
            "rows of 128 weights for Q1_0",
        ),
        (header_of(tensors=1, fields=text("w") + struct.pack("<IQIQ", 1, 1, 99, 0)), "has the type 99"),
        (
            header_of(tensors=1, fields=text("w") + struct.pack("<IQIQ", 1, 1, 0, 32)),
            "has the offset 32, not 0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_headers(data, message, tmp_path):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(gguf.GGUFFileError, match=rf"hostile\.gguf: .*{message}"):
        gguf.File(path)
