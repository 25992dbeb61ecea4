"""LoRA of peft over packed layers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantopt
from quantopt.nn import BinaryLinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from language_models import TOKENS, logits, make  # noqa: E402
from quantopt.integrations.peft import PackedLora, register  # noqa: E402
from quantopt.integrations.transformers import prepare, save_pretrained  # noqa: E402

TARGETS = ["q_proj", "down_proj", "lm_head"]  # the last is not packed


def packed(compute: str = "auto", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = make("LlamaForCausalLM", dtype)
    opt = quantopt.AskewSGD(quantopt.param_groups(model, scale="channel"), lr=0.1)
    return quantopt.pack(model, opt, compute=compute)


def with_adapters(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unsupported layer type")
        return peft.get_peft_model(model, register(config))


def train(model: Any, steps: int = 8) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    opt, losses = torch.optim.AdamW(trained, lr=0.02), []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(float(loss.detach()))
        opt.zero_grad()
        loss.backward()
        assert all(bool(p.grad.abs().max() > 0) for p in trained if p.dim() == 2) or len(losses) == 1
        opt.step()
    return losses


@pytest.mark.parametrize(
    ("compute", "dtype"), [("auto", torch.float32), ("int8", torch.float32), ("auto", torch.bfloat16)]
)
def test_adapters_train_and_are_saved(tmp_path: Path, compute: str, dtype: torch.dtype) -> None:
    base = packed(compute, dtype)
    before, first = {k: v.clone() for k, v in base.state_dict().items()}, logits(base)
    model = with_adapters(base)
    layers = [m for m in model.modules() if isinstance(m, PackedLora)]
    assert len(layers) == 4 and all(isinstance(m.base_layer, BinaryLinear) for m in layers)
    assert torch.equal(logits(model), first)  # B is 0
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    config = register(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(packed(compute, dtype), tmp_path, config=config)
    assert torch.equal(logits(loaded), trained)
    after = model.unload()
    assert torch.equal(logits(after), first)
    assert all(torch.equal(v, before[k]) for k, v in after.state_dict().items())


def test_gradients_are_those_of_the_dense_layer() -> None:
    """Of the adapters and of x, with the dense weight in place of the packed one."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(20, 9), nn.LayerNorm(9))
    net = quantopt.pack(whole, quantopt.AskewSGD(quantopt.param_groups(whole, skip=()), lr=0.1))
    whole[0].weight.data = net[0].weight
    grads = []
    for base in (net, whole):
        torch.manual_seed(1)
        model = peft.get_peft_model(
            base, register(peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
        )
        x = torch.randn(4, 20, requires_grad=True)
        model(x).pow(3).sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(grads[0]) == 3
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_in_the_trainer(tmp_path: Path) -> None:
    """Of a model that from_pretrained made: transformers takes it for quantised, and trains adapters alone."""
    save_pretrained(packed(), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=0.05,
    )
    with pytest.raises(ValueError, match="attach trainable adapters"):
        transformers.Trainer(base, arguments, train_dataset=rows)
    results = []
    for resume in (False, tmp_path / "out" / "checkpoint-2"):
        model = with_adapters(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        results.append(logits(model))
    assert torch.equal(*results) and not torch.equal(results[0], logits(base))


def test_refusals() -> None:
    model = with_adapters(prepare(packed()))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(
            ValueError, match=r"levels for weights.*cannot be merged into it\. Keep the adapter"
        ):
            merge()
    with pytest.raises(ValueError, match="init_lora_weights='pissa' computes with the weight of the layer"):
        with_adapters(packed(), init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"plain LoRA, without variants.*use_dora"):
        with_adapters(packed(), use_dora=True)
    with pytest.raises(ValueError, match='"all-linear" leaves out packed layers'):
        register(peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="bias='all': biases of packed layers are not trained"):
        register(peft.LoraConfig(target_modules=TARGETS, bias="all"))
    with pytest.raises(TypeError, match="must be a LoraConfig of peft, not IA3Config"):
        register(peft.IA3Config())
    with pytest.raises(ValueError, match=r"BinaryLinear.*is not supported"):  # not registered: peft says so
        peft.get_peft_model(packed(), peft.LoraConfig(target_modules=TARGETS))
