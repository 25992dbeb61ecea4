"""GGUF: whole models, round trips bit for bit, and damaged files, which raise GGUFFileError and nothing else."""

import random

import numpy as np
import pytest
import torch

gguf_package = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from gguf import GGMLQuantizationType  # noqa: E402

from gguf_cases import TOKENS, logits, model_of, random_layer  # noqa: E402
from quantopt import gguf  # noqa: E402
from quantopt.nn import BinaryConv1d, BinaryLinear  # noqa: E402


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
    with pytest.raises(TypeError, match="unpacked must be a collection of names, not the name"):
        gguf.save(model, path, unpacked=layer)
    model.config.eos_token_id = [3, 5]
    with pytest.raises(ValueError, match=r"eos_token_id is \[3, 5\], and a file without a tokenizer has one"):
        gguf.save(model, path, unpacked=[layer])
    model.config.eos_token_id = 10
    with pytest.raises(ValueError, match='eos_token_id is 10: tokenizer="bytes" has byte 0 there'):
        gguf.save(model, path, unpacked=[layer], tokenizer="bytes")
    model.config.eos_token_id = None
    float_model = type(model)(model.config)
    with pytest.raises(ValueError, match="has no packed layers"):
        gguf.save(float_model, path)
    with pytest.raises(ValueError, match="ternary must be one of"):
        gguf.save(model, path, ternary="Q1_0")
    with pytest.raises(ValueError, match="float_type must be one of"):
        gguf.save(model, path, unpacked=[layer], float_type="Q4_0")
    with pytest.raises(TypeError, match="must be a llama with its head"):
        gguf.save(model.model, path)
    assert not list(tmp_path.iterdir())
    gguf.save(model, path, unpacked=(name for name in [layer]))
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
    for size in [*range(0, header, 17), header, data - 1]:
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
    for i in range(0, header, 7):
        changed = bytearray(whole)
        changed[i] ^= 1 << choose.randrange(8)
        path.write_bytes(changed)
        try:
            file = gguf.File(path)
            if i % 70 == 0:
                gguf.load(path)
            else:
                gguf.configs.settings_of(file)
        except gguf.GGUFFileError:
            refused += 1
    assert refused > header / 7 / 2


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
    """llama.cpp rounds the inputs of packed layers to 8 bits and keys and values to fp16. The first is measured by our
    products with inputs of 8 bits, the second by the same model without packed layers."""
    llama_cpp = pytest.importorskip("llama_cpp")
    settings = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    settings |= {"tie_word_embeddings": False, "attention_bias": arch == "llama"}
    model = model_of(1, arch=arch, kind=kind, settings=settings)
    path = tmp_path / "model.gguf"
    exact = logits(model)[0]

    def distance(other):
        return float((other - exact).norm() / exact.norm())

    def theirs(**options):
        gguf.save(model, path, tokenizer="bytes", **options)
        llm = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
        assert llm.tokenize("é A\n".encode(), add_bos=False) == list("é A\n".encode())
        llm.eval(TOKENS[0].tolist())
        return torch.from_numpy(np.array(llm.scores[: TOKENS.shape[1]]))

    packed = [name for name, module in model.named_modules() if isinstance(module, BinaryLinear)]
    assert distance(theirs(unpacked=packed)) < 2e-3
    rounded = theirs(ternary="TQ2_0" if kind == "Q1_0" else kind)
    for name in packed:
        model.get_submodule(name).compute = "int8"
    assert 1e-4 < distance(rounded) < 2 * distance(logits(model)[0])
