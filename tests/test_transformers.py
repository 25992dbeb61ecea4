"""Packed models in save_pretrained and from_pretrained of transformers: the same logits, no layer without values."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import quantopt
from quantopt.nn import BinaryLinear
from quantopt.packing import describe, skeleton

transformers = pytest.importorskip("transformers")
from transformers.quantizers import auto  # noqa: E402

from language_models import SIZES, TOKENS, logits, make  # noqa: E402
from quantopt.integrations.transformers import QuantoptConfig, prepare, save_pretrained  # noqa: E402


def packed_of(model: Any, scale: str = "channel", **options: Any) -> Any:
    """Packed as an untrained optimizer has its levels."""
    groups = quantopt.param_groups(model, scale=scale, **options)
    return quantopt.pack(model, quantopt.AskewSGD(groups, lr=0.1))


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, BinaryLinear) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SIZES)
def test_round_trip(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Twice: what was loaded is saved again. Tied heads stay tied."""
    model = make(kind, dtype)
    packed = packed_of(model, "tensor" if kind == "GPT2LMHead" else "channel")
    tied = model.config.tie_word_embeddings
    save_pretrained(packed, tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b", max_shard_size="6KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    again, report = type(model).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    for other in (loaded, again):
        assert torch.equal(logits(other), logits(packed))
        assert other.dtype == dtype and packed_layers(other) == packed_layers(packed) > 7
        assert describe(other) == describe(packed)
        tiles = [
            [m.tiles is None for m in net.modules() if isinstance(m, BinaryLinear)] for net in (other, packed)
        ]
        assert tiles[0] == tiles[1]  # the layout of the kernels is derived
        head, embedding = other.get_output_embeddings(), other.get_input_embeddings()
        assert (head.weight is embedding.weight) == tied
    wide = type(model).from_pretrained(tmp_path / "a", dtype=torch.float64)
    torch.testing.assert_close(logits(wide).to(dtype), logits(packed), atol=2e-2, rtol=2e-2)


def group_of_16(model: Any) -> Any:
    groups = quantopt.param_groups(model, bits=2, scale="group")
    groups[0]["group_size"] = 16
    return quantopt.pack(model, quantopt.STAM(groups, lr=0.1), compute="int8")


def packed_head(model: Any) -> Any:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = True  # as its configuration still says
    return packed_of(model, skip=())


def linear_for_conv1d(model: Any) -> Any:
    return packed_of(
        quantopt.nn.conv1d_to_linear(model), filter_fn=lambda _, name: 1 if ".mlp." in name else None
    )


def shared(model: Any) -> Any:
    first, second = (layer.mlp for layer in model.model.layers)
    first.up_proj.weight = second.up_proj.weight
    second.down_proj = first.down_proj
    return packed_of(model)


@pytest.mark.parametrize(
    ("kind", "pack"),
    [
        ("LlamaForCausalLM", group_of_16),
        ("Qwen3ForCausalLM", packed_head),
        ("GPT2LMHead", linear_for_conv1d),
        ("LlamaForCausalLM", shared),
    ],
)
def test_kinds_of_packed_layers(tmp_path: Path, kind: str, pack: Callable[[Any], Any]) -> None:
    """Groups of scales; a packed head of a tied model; Linear in place of Conv1D, the square ones left float; shared
    layers and weights."""
    packed = pack(make(kind))
    save_pretrained(packed, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(packed)) and describe(loaded) == describe(packed)
    if pack is packed_head:  # what is packed cannot be tied
        tied = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
        assert torch.equal(logits(tied), logits(packed))
        assert not any(net.config.tie_word_embeddings for net in (packed, loaded, tied))


def test_without_the_head_and_with_another(tmp_path: Path) -> None:
    model = make("BertForMaskedLM")
    packed = packed_of(model)
    save_pretrained(packed, tmp_path / "whole")
    body = transformers.AutoModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False)
    expected = packed.bert(TOKENS).last_hidden_state
    assert torch.equal(body(TOKENS).last_hidden_state, expected)
    body.save_pretrained(tmp_path / "body")
    for source in ("whole", "body"):
        other, report = transformers.AutoModelForTokenClassification.from_pretrained(
            tmp_path / source, output_loading_info=True
        )
        assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
        assert all(key.startswith("cls.") for key in report["unexpected_keys"])
        assert torch.equal(other.bert(TOKENS).last_hidden_state, expected)
    with pytest.raises(
        ValueError, match=r"layer bert\.encoder.* GPT2LMHeadModel does not have: load it as BertForM"
    ):
        config = make("GPT2LMHead").config
        config.quantization_config = packed.config.quantization_config.to_dict()
        config.architectures = ["BertForMaskedLM"]
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "whole", config=config)


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.bits"), rf"tensor {NAME}\.bits of a packed layer was not in the files.*Save the"),
        (lambda t: t.pop(f"{NAME}.scale"), rf"tensor {NAME}\.scale of a packed layer was not in the files"),
        (lambda t: t.update({f"{NAME}.bias": torch.ones(48)}), rf"tensor {NAME}\.bias is none of the packed layer"),
        (lambda t: t.update({f"{NAME}.scale": torch.full((48,), torch.nan)}), rf"tensor {NAME}\.scale: not finite"),
        (lambda t: t.update({f"{NAME}.bits": t[f"{NAME}.bits"].float()}), rf"tensor {NAME}\.bits .* is F32, not U8"),
        (lambda t: t.update({f"{NAME}.scale": torch.ones(1)}), rf"tensor {NAME}\.scale .* not in the shape"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    """No packed layer is random or wrong in silence."""
    save_pretrained(packed_of(make("LlamaForCausalLM")), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_without_the_integration_loading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(packed_of(make("LlamaForCausalLM")), tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "quantopt")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_packs_what_lies_on_levels(tmp_path: Path) -> None:
    """From a float model that was saved inside quantized(), but for what is named."""
    model = make("LlamaForCausalLM")
    opt = quantopt.AskewSGD(quantopt.param_groups(model, scale="channel"), lr=0.1)
    with opt.quantized():
        model.save_pretrained(tmp_path)
        expected = logits(model)
    config = QuantoptConfig(compute="int8", modules_to_not_convert=["o_proj", "model.layers.1"])
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert describe(packed)["layers"].keys() == {
        f"model.layers.0.{part}_proj"
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert {layer["compute"] for layer in packed.config.quantization_config.layers.values()} == {"int8"}
    torch.testing.assert_close(logits(packed), expected, atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="leaves out every layer"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=QuantoptConfig(modules_to_not_convert=["model"])
        )
    packed.save_pretrained(tmp_path / "packed")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(packed))


def test_generates_the_same(tmp_path: Path) -> None:
    packed = prepare(packed_of(make("LlamaForCausalLM")))
    packed.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    words = [
        m.generate(TOKENS, max_new_tokens=5, do_sample=False, eos_token_id=None) for m in (packed, loaded)
    ]
    assert words[0].shape == (2, 17) and torch.equal(*words)


def test_the_configuration(tmp_path: Path) -> None:
    packed = prepare(packed_of(make("LlamaForCausalLM")))
    for module in packed.modules():
        if isinstance(module, BinaryLinear):
            module.compute = "bf16"
    packed.save_pretrained(tmp_path)  # describes the layers as they are now
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "quantopt" and written["modules_to_not_convert"] == ["lm_head"]
    assert {group["compute"] for group in written["layers"]} == {"bf16"}
    assert len(written["layers"]) < sum(len(group["names"]) for group in written["layers"]) == 14
    config = QuantoptConfig.from_dict(written)
    assert {"layers": config.layers, "folded": config.folded} == describe(packed)
    assert QuantoptConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """It is imported only when asked for, and the error names the extra."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"quantopt.integrations.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"needs {library}: pip install 'torch-quantopt\[{library}\]'"):
        importlib.import_module(f"quantopt.integrations.{library}")
    code = "import sys, quantopt; assert not {'transformers', 'peft', 'accelerate'} & set(sys.modules)"
    if library == "peft":
        subprocess.run([sys.executable, "-c", code], check=True)


def test_refusals(tmp_path: Path) -> None:
    model = make("LlamaForCausalLM")
    with pytest.raises(ValueError, match="no packed layers"):
        prepare(model)
    with pytest.raises(TypeError, match="must be a PreTrainedModel"):
        prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="compute must be"):
        QuantoptConfig(compute="int4")
    with pytest.raises(TypeError, match="modules_to_not_convert must be a list"):
        QuantoptConfig(modules_to_not_convert="lm_head")
    with pytest.raises(ValueError, match="version=2 of the quantization config"):
        QuantoptConfig(version=2)
    with pytest.raises(ValueError, match="is there twice"):
        QuantoptConfig(layers=[{"names": ["a", "a"]}])
    with pytest.raises(
        ValueError, match=r"is written by quantopt\.integrations\.transformers\.save_pretrained"
    ):
        packed_of(model).save_pretrained(tmp_path)
    packed = prepare(packed_of(model))
    packed.model.layers[0].mlp.up_proj.scale[0] = -1.0
    with pytest.raises(ValueError, match=r"up_proj\.scale: negative, which from_pretrained refuses"):
        packed.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="describes packed layers, and the model in the directory is not packed"
    ):
        type(model).from_pretrained(tmp_path, quantization_config=packed.config.quantization_config)


def test_skeleton_takes_the_state_dict() -> None:
    """On a device and on meta; what does not fit is refused before anything is replaced."""
    model = make("LlamaForCausalLM")
    packed = packed_of(model)
    description = json.loads(json.dumps(describe(packed)))
    other = skeleton(make("LlamaForCausalLM"), description)
    assert logits(other).isfinite().all()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(logits(other), logits(packed))
    linear = nn.Linear(6, 3)
    alone = skeleton(linear.to("meta"), describe(packed_of(nn.Linear(6, 3), skip=())))
    assert isinstance(alone, BinaryLinear) and alone.bits.is_meta
    alone.load_state_dict(packed_of(nn.Linear(6, 3), skip=()).state_dict(), assign=True)
    assert alone(torch.ones(2, 6)).shape == (2, 3)
    description["layers"][NAME]["out_features"] = 47
    with pytest.raises(
        ValueError, match=rf"layer {NAME}: out_features is 47 in the description, 48 in the model"
    ):
        skeleton(model, description)
    assert packed_layers(model) == 0
    with pytest.raises(ValueError, match='no "layers"'):
        skeleton(model, {})
    with pytest.raises(TypeError, match="model must be"):
        describe({})  # type: ignore[arg-type]
