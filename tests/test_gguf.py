"""GGUF: blocks against the format's definition, round trips bit for bit, whole models, damaged files."""

import random
import struct

import numpy as np
import pytest
import torch
from torch import nn

gguf_package = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter  # noqa: E402
from gguf.quants import dequantize, quantize  # noqa: E402

import quantopt  # noqa: E402
from quantopt import gguf  # noqa: E402
from quantopt.nn import BinaryConv1d, BinaryLinear  # noqa: E402

KINDS = {"Q1_0": (2, 128, 18), "TQ1_0": (3, 256, 54), "TQ2_0": (3, 256, 66)}


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


def random_layer(inputs, outputs, kind="Q1_0", bias=False, seed=0, **options) -> BinaryLinear:
    """A layer whose outer levels are random numbers of fp16, one for each block unless options say another."""
    generator = torch.Generator().manual_seed(seed)
    levels, block, _ = KINDS[kind]
    options = options or {"scale": "group", "group_size": block}
    layer = BinaryLinear(inputs, outputs, bias, levels=levels, **options)
    codes = torch.randint(levels, (outputs, inputs), generator=generator)
    if levels == 2:
        bits = quantopt.pack_signs(codes - 0.5)
    else:
        bits = quantopt.pack_signs(torch.stack([codes > 0, codes > 1]).float() - 0.5)
    outer = (torch.rand(layer.scale.shape, generator=generator) / inputs**0.5 + 1e-3).half().float()
    shift = torch.randn(outputs, generator=generator) if bias else None
    return layer.set_weights(bits, outer / (levels - 1), shift)


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


def model_of(seed: int, **changes) -> nn.Module:
    """A random Llama or Qwen3 with packed layers; the seed decides its shape and its kinds."""
    choose = random.Random(seed)
    arch = choose.choice(["llama", "qwen3"])
    kind = choose.choice(["Q1_0", "Q1_0", "TQ2_0"])
    width = 256 if kind == "TQ2_0" else choose.choice([128, 256])
    heads = choose.choice([2, 4])
    settings = {
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": 256,
        "num_hidden_layers": choose.choice([1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": choose.choice([1, 2]),
        "head_dim": width // heads if arch == "llama" or kind == "TQ2_0" else 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": choose.random() < 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": choose.choice([1e4, 5e5])},
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    if arch == "llama" and choose.random() < 0.5:
        settings |= {"attention_bias": True, "mlp_bias": choose.random() < 0.5}
    settings |= changes.pop("settings", {})
    arch, kind = changes.pop("arch", arch), changes.pop("kind", kind)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(arch, **settings))
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    for i, (name, layer) in enumerate(list(model.named_modules())):
        if isinstance(layer, nn.Linear) and (
            name != "lm_head" or (not model.config.tie_word_embeddings and seed % 2)
        ):
            model.set_submodule(
                name,
                random_layer(layer.in_features, layer.out_features, kind, layer.bias is not None, seed + i),
            )
    return model.eval()


TOKENS = torch.arange(24).reshape(2, 12) * 7 % 256


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("seed", range(10))
def test_models_come_back_bit_for_bit(seed, tmp_path):
    model = model_of(seed)
    ternary = "TQ1_0" if seed % 3 == 0 else "TQ2_0"
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    gguf.save(model, first, tokenizer="bytes", ternary=ternary)
    loaded = gguf.load(first)
    assert type(loaded) is type(model) and not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(loaded), logits(model))
    ours, theirs = model.config.to_dict(), loaded.config.to_dict()
    assert {key: value for key, value in theirs.items() if ours.get(key) != value} == {
        "bos_token_id": 0,
        "dtype": "float32",
    }
    gguf.save(loaded, second, tokenizer=first, ternary=ternary)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_transformers_reads_the_same_model(arch, tmp_path):
    """transformers dequantises TQ2_0 and turns the rows of q and k back by code of its own."""
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 128,
    }  # it does not read qwen3's length
    model = model_of(3, arch=arch, kind="TQ2_0", settings={"hidden_size": 256, **heads})
    gguf.save(model, tmp_path / "model.gguf", tokenizer="bytes")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    for name, module in model.named_modules():
        if isinstance(module, BinaryLinear):
            assert torch.equal(theirs.get_submodule(name).weight, module.weight), name
    torch.testing.assert_close(logits(theirs.eval()), logits(model), rtol=1e-3, atol=1e-4)


def test_yarn_and_float_types(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
    model = model_of(5, arch="qwen3", settings={"rope_parameters": rope, "num_hidden_layers": 1})
    path = tmp_path / "model.gguf"
    for kind, tolerance in (("F32", 0), ("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 2e-2)):
        gguf.save(model, path, float_type=kind)
        file = gguf.File(path)
        assert file.tensors["token_embd.weight"].kind.name == kind
        assert file.tensors["output_norm.weight"].kind.name == "F32"
        loaded = gguf.load(path)
        assert loaded.config.rope_parameters == rope and loaded.config.eos_token_id == 0
        torch.testing.assert_close(
            loaded.model.embed_tokens.weight,
            model.model.embed_tokens.weight,
            rtol=tolerance,
            atol=tolerance / 10,
        )
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    half = gguf.load(path, dtype=torch.bfloat16)
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    gguf.save(half, path)
    assert gguf.File(path).tensors["token_embd.weight"].kind.name == "BF16"


@pytest.mark.parametrize("kind", ["Q1_0", "TQ2_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_embeddings(kind, tied, tmp_path):
    """Files with the embedding in blocks, and the head in the same blocks or in others."""
    model = model_of(1, kind=kind, settings={"hidden_size": 256, "tie_word_embeddings": False})
    table = random_layer(256, 256, kind, seed=77)
    model.model.embed_tokens.weight.data = table.weight
    model.set_submodule("lm_head", table if tied else random_layer(256, 256, kind, seed=78))
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    gguf.save(model, first)
    file = gguf.File(first)
    assert file.tensors["token_embd.weight"].kind.name == kind
    assert ("output.weight" in file.tensors) is not tied
    loaded = gguf.load(first)
    assert isinstance(loaded.lm_head, BinaryLinear) and torch.equal(logits(loaded), logits(model))
    gguf.save(loaded, second)
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_saved_says_so_and_writes_nothing(tmp_path):
    path = tmp_path / "model.gguf"
    changes = {
        "hidden_act": ("gelu", "hidden_act is 'gelu'"),
        "layer_types": (["sliding_attention"], "layer_types"),
        "attention_bias": (True, "attention_bias is True: qwen3"),
        "rope_parameters": ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, "rope_type='llama3'"),
        "model_type": ("gpt2", "model_type must be one of llama, qwen3, not 'gpt2'"),
    }
    for name, (value, message) in changes.items():
        model = model_of(0, arch="qwen3", settings={"num_hidden_layers": 1})
        object.__setattr__(model.config, name, value)
        with pytest.raises(ValueError, match=message):
            gguf.save(model, path)
    model = model_of(0, arch="llama", kind="Q1_0")
    layer = "model.layers.0.mlp.up_proj"
    model.get_submodule(layer).scale.mul_(1.0001)
    with pytest.raises(ValueError, match=rf'{layer}: .*scales="round"'):
        gguf.save(model, path)
    with pytest.raises(ValueError, match="unpacked names 'up', which is no packed layer"):
        gguf.save(model, path, unpacked=["up"])
    with pytest.raises(ValueError, match="ternary must be one of"):
        gguf.save(model, path, ternary="Q1_0")
    with pytest.raises(ValueError, match="float_type must be one of"):
        gguf.save(model, path, unpacked=[layer], float_type="Q4_0")
    with pytest.raises(TypeError, match="must be a llama with its head"):
        gguf.save(model.model, path)
    assert not list(tmp_path.iterdir())
    gguf.save(model, path, unpacked=[layer])
    loaded = gguf.load(path)
    assert torch.equal(loaded.get_submodule(layer).weight, model.get_submodule(layer).weight)
    model.set_submodule(layer, BinaryConv1d(128, 256, 1))
    with pytest.raises(ValueError, match="is a BinaryConv1d"):
        gguf.save(model, path)


def test_tokenizers(tmp_path):
    model = model_of(0, settings={"vocab_size": 250})
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="256 tokens, the model 250"):
        gguf.save(model, path, tokenizer="bytes")
    gguf.save(model_of(0), path, tokenizer="bytes")
    with pytest.raises(ValueError, match="has 256 tokens, the model 250"):
        gguf.save(model, tmp_path / "other.gguf", tokenizer=path)
    tokens = gguf.File(path).metadata["tokenizer.ggml.tokens"].value
    assert len(set(tokens)) == 256 and tokens[65] == "A" and tokens[32] == "Ġ" and tokens[10] == "Ċ"


# What a damaged file may do: raise GGUFFileError, nothing else.


def small_file(path) -> bytes:
    gguf.save(
        model_of(
            0, arch="llama", kind="Q1_0", settings={"num_hidden_layers": 1, "tie_word_embeddings": True}
        ),
        path,
    )
    return path.read_bytes()


def test_truncated_files(tmp_path):
    path = tmp_path / "model.gguf"
    whole = small_file(path)
    header = min(stored.offset for stored in gguf.File(path).tensors.values())
    data = max(stored.offset + stored.size for stored in gguf.File(path).tensors.values())
    for size in [*range(0, header, 7), header, data - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(gguf.GGUFFileError, match=r"model\.gguf: "):
            gguf.File(path)
    with pytest.raises(OSError):
        gguf.load(tmp_path / "missing.gguf")


def test_mutated_headers(tmp_path):
    path = tmp_path / "model.gguf"
    whole = small_file(path)
    header = min(stored.offset for stored in gguf.File(path).tensors.values())
    choose = random.Random(0)
    refused = 0
    for i in range(0, header, 3):
        changed = bytearray(whole)
        changed[i] ^= 1 << choose.randrange(8)
        path.write_bytes(changed)
        try:
            file = gguf.File(path)
            if i % 30 == 0:
                gguf.load(path)
            else:
                gguf.configs.settings_of(file)
        except gguf.GGUFFileError:
            refused += 1
    assert refused > header / 3 / 2


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
)
def test_hostile_headers(data, message, tmp_path):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(gguf.GGUFFileError, match=rf"hostile\.gguf: .*{message}"):
        gguf.File(path)


def rewritten(path, *, fields=(), tensors=(), without=()):
    """The file again with other metadata and tensors."""
    file = gguf.File(path)
    metadata = {key: field for key, field in file.metadata.items() if key not in without} | dict(fields)
    written = {n: (s.kind, file.read(n)) for n, s in file.tensors.items() if n not in without} | dict(tensors)
    gguf.container.write(path, metadata, [(name, gguf.container.Written(*w)) for name, w in written.items()])


U32, F32, TEXT = (gguf_package.GGUFValueType[name] for name in ("UINT32", "FLOAT32", "STRING"))
ZEROS = (GGMLQuantizationType.F32, np.zeros((128,), np.float32).view(np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {"general.architecture": gguf.Field(TEXT, "gpt2")}}, "architecture is 'gpt2'"),
        ({"fields": {"llama.block_count": gguf.Field(U32, 2**30)}}, "block_count is 1073741824, the tensors"),
        ({"fields": {"llama.attention.head_count": gguf.Field(U32, 0)}}, "head_count is 0, not a positive"),
        ({"fields": {"llama.feed_forward_length": gguf.Field(U32, 2**31 - 1)}}, "has the shape"),
        (
            {"fields": {"llama.attention.head_count": gguf.Field(U32, 2**31 - 2)}},
            "transformers makes no llama|do not fit",
        ),
        ({"fields": {"llama.rope.freq_base": gguf.Field(F32, float("nan"))}}, "not a positive number"),
        ({"fields": {"llama.expert_count": gguf.Field(U32, 8)}}, "llama.expert_count is not supported"),
        ({"fields": {"llama.rope.scaling.type": gguf.Field(TEXT, "longrope")}}, "none, linear and yarn"),
        ({"fields": {"llama.vocab_size": gguf.Field(U32, 100)}}, "token_embd.weight has the shape"),
        ({"fields": {"tokenizer.ggml.eos_token_id": gguf.Field(U32, 256)}}, "no token of 256"),
        ({"fields": {"split.count": gguf.Field(U32, 2)}}, "split model"),
        ({"without": ["llama.context_length"]}, "llama.context_length is missing"),
        ({"without": ["blk.0.attn_q.weight"]}, "blk.0.attn_q.weight for .* is missing"),
        ({"tensors": {"rope_freqs.weight": ZEROS}}, "rope_freqs.weight is not of a llama .*rope factors"),
        ({"tensors": {"blk.0.attn_norm.weight": (ZEROS[0], ZEROS[1][:-4])}}, r"shape \[127\]"),
        ({"tensors": {"blk.0.attn_norm.weight": (ZEROS[0], ZEROS[1] | 255)}}, "not finite"),
        ({"tensors": {"blk.0.attn_q.weight": (41, np.full((128, 18), 255, np.uint8))}}, "not finite"),
    ],
)
def test_files_that_fit_no_model(change, message, tmp_path):
    path = tmp_path / "model.gguf"
    settings = {
        "num_hidden_layers": 1,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    settings |= {"head_dim": 32, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}
    gguf.save(model_of(0, arch="llama", kind="Q1_0", settings=settings), path)
    rewritten(path, **change)
    with pytest.raises(gguf.GGUFFileError, match=rf"model\.gguf: .*({message})"):
        gguf.load(path)


@pytest.mark.parametrize(
    ("arch", "kind"), [("llama", "Q1_0"), ("llama", "TQ2_0"), ("qwen3", "Q1_0"), ("qwen3", "TQ1_0")]
)
def test_llama_cpp_computes_the_same(arch, kind, tmp_path):
    """llama.cpp rounds the inputs of packed layers to 8 bits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    settings = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = model_of(1, arch=arch, kind=kind, settings=settings | {"tie_word_embeddings": False})
    path = tmp_path / "model.gguf"
    gguf.save(model, path, tokenizer="bytes", ternary=kind if kind != "Q1_0" else "TQ2_0")
    llm = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    tokens = TOKENS[0].tolist()
    llm.eval(tokens)
    theirs = torch.from_numpy(np.array(llm.scores[: len(tokens)]))
    ours = logits(model)[0]
    assert float((theirs - ours).norm() / ours.norm()) < 0.03
    assert llm.tokenize("é A\n".encode(), add_bos=False) == list("é A\n".encode())
