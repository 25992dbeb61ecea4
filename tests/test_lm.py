"""`quantopt lm`: the text, the network, training, checkpoints, the command line."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantopt
from quantopt.train.cli import main
from quantopt.train.directory import CHECKPOINT, MODEL, REPORT
from quantopt.train.errors import InputError, OutOfTime, TrainingError
from quantopt.train.lm import commands, loop, model, text
from quantopt.train.lm import config as lm
from quantopt.train.report import CURVES_PNG, WEIGHTS_PNG
from quantopt.train.series import METRICS_CSV

pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "context": 16}
TINY: dict[str, Any] = {
    **SMALL,
    "batch_size": 2,
    "device": "cpu",
    "precision": "float32",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A text that repeats: what follows is known from what was."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"abcdefgh" * 100)
    return path


def configured(file: Path, recipe: str = "stam", **settings: Any) -> lm.Config:
    return lm.configuration(lm.load(recipe), {"data": str(file), "steps": 100, **TINY, **settings})


def loaded(config: lm.Config) -> text.Text:
    return text.load(config.data, config.context, config.validation)


def test_text(file: Path) -> None:
    found = text.load(str(file), context=16, validation=0.25)
    assert len(found.train) == 600 and len(found.validation) == 200
    assert bytes(found.train.tolist() + found.validation.tolist()) == file.read_bytes()
    inputs, targets = found.windows(5, 16, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (5, 16) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again, _ = found.windows(5, 16, torch.Generator().manual_seed(0))
    assert torch.equal(inputs, again)
    inputs, targets = found.validation_windows(16)
    assert inputs.shape == (12, 16)  # 199 pairs: 7 are left over
    assert torch.equal(targets.flatten()[:-1], inputs.flatten()[1:])
    assert found.fingerprint() != text.load(str(file), 16, 0.5).fingerprint()


def test_windows_reach_both_ends() -> None:
    found = text.Text(torch.arange(18, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8))
    inputs, targets = found.windows(100, 16, torch.Generator().manual_seed(0))
    assert set(inputs[:, 0].tolist()) == {0, 1} and int(targets.max()) == 17


def test_bad_text(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x" * 100)
    with pytest.raises(
        InputError, match=r"--data: .* has 100 bytes, of which 10 are for validation.*--context 16"
    ):
        text.load(str(short), 16, 0.1)
    with pytest.raises(InputError, match="cannot be read"):
        text.load(str(tmp_path / "none"), 16, 0.1)
    with pytest.raises(InputError, match="cannot be read"):
        text.load(str(tmp_path), 16, 0.1)


def test_network() -> None:
    network = model.build(lm.Config(device="cpu"))
    assert sum(p.numel() for p in network.parameters()) == 857_216
    assert network.lm_head.weight is not network.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"--width: 12 is not a multiple of 2 x --heads 4"):
        model.build(lm.Config(width=12))
    with pytest.raises(InputError, match=r"--width: 24 is not a multiple of 8 x --heads 4"):
        model.build(lm.Config(width=24, architecture="gpt-neox"))
    assert (
        model.build(lm.Config(device="cpu", layers=1, feed_forward=8))
        .model.layers[0]
        .mlp.up_proj.out_features
        == 8
    )


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'torch-quantopt\[transformers\]'"):
        model.build(lm.Config(device="cpu", **SMALL))


def test_loss_is_of_the_next_byte(file: Path) -> None:
    """Of a network that knows the text, against torch's cross entropy of each window by itself."""
    found = text.load(str(file), 16, 0.1)
    torch.manual_seed(0)
    network = model.build(lm.Config(device="cpu", **SMALL))
    inputs, targets = found.validation_windows(16)
    expected = [
        torch.nn.functional.cross_entropy(network(input_ids=x[None].long()).logits[0], y.long())
        for x, y in zip(inputs, targets, strict=True)
    ]
    assert model.validation_loss(network, found, 16) == pytest.approx(
        torch.stack(expected).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("recipe", lm.names())
def test_every_recipe_learns(file: Path, recipe: str) -> None:
    """The text repeats every 8 bytes: log 8 = 2.08 without knowing the order, 0 with it."""
    config = configured(file, recipe)
    report = loop.train(config, loaded(config), progress=False)
    assert report["loss"] < 1.5
    if recipe.startswith("float"):
        assert report["loss_quantized"] is report["loss_packed"] is None
        return
    assert report["loss_quantized"] < 1.5
    assert report["loss_packed"] == pytest.approx(report["loss_quantized"], rel=1e-4)
    assert report["bytes_packed"] < report["bytes_float"]


@pytest.mark.parametrize("recipe", ["stam", "float", "stam-muon", "luq", "stochastic"])
def test_resumed_run_equals_the_uninterrupted_one(file: Path, tmp_path: Path, recipe: str) -> None:
    if recipe == "stochastic":  # signs are drawn from torch's generator, as the gradients of luq
        path = tmp_path / "stochastic.toml"
        path.write_text('base = "binaryconnect"\noptions = { base = "adam", stochastic = true }\nlr = 0.01\n')
        recipe = str(path)
    config = configured(file, recipe)
    whole = loop.train(config, loaded(config), out=tmp_path / "whole", progress=False)
    out = tmp_path / "cut"
    with pytest.raises(OutOfTime):
        loop.train(config, loaded(config), out=out, progress=False, minutes=1e-9, checkpoint_every=50)
    assert not (out / REPORT).exists()
    report = loop.train(config, loaded(config), out=out, resume=True, progress=False)
    same = ("config", "loss", "loss_quantized", "loss_packed", "curves")
    assert {key: report[key] for key in same} == {key: whole[key] for key in same}


def test_checkpoint_of_another_run(file: Path, tmp_path: Path) -> None:
    config = configured(file, steps=50)
    loop.train(config, loaded(config), out=tmp_path / "run", progress=False)
    other = replace(config, width=32)
    with pytest.raises(InputError, match=r"--resume: .* width is 16 in the checkpoint and 32 now"):
        loop.train(other, loaded(other), out=tmp_path / "run", resume=True, progress=False)
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(InputError, match="--resume"):
        loop.train(config, loaded(config), out=tmp_path / "run", resume=True, progress=False)


def test_training_that_fails(file: Path) -> None:
    config = configured(file, "float", lr=1e30, steps=50)
    with pytest.raises(TrainingError, match="try a smaller --lr"):
        loop.train(config, loaded(config), progress=False)


def test_validation_that_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "validation_loss", lambda *_: float("nan"))
    config = configured(file, steps=1)
    with pytest.raises(TrainingError, match="the validation loss is nan: try a smaller --lr"):
        loop.train(config, loaded(config), progress=False)


def test_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    size = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = ["lm", "--data", str(file), "--steps=50", "--out", str(out), "--quiet", *size]
    assert main([*command, "--recipe", "stam", "--lr", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "validation loss, nats per byte: projected" in printed and "packed" in printed
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [CHECKPOINT, MODEL, REPORT, CURVES_PNG, WEIGHTS_PNG, METRICS_CSV]
    )
    report = json.loads((out / REPORT).read_text())
    assert report["config"]["lr"] == 0.01 and report["config"]["optimizer"] == "stam"
    assert {len(curve) for curve in report["curves"].values()} == {1}
    assert report["curves"]["kappa"] != [None] and report["curves"]["epsilon"] == [None]

    assert main(["eval", "--model", str(out), "--device", "cpu"]) == 0
    assert f"loss {report['loss_packed']:.4f} nats per byte" in capsys.readouterr().out
    again = tmp_path / "again.safetensors"
    assert main(["pack", "--run", str(out), "--out", str(again), "--device", "cpu"]) == 0
    first, second = (load_file(path) for path in (out / MODEL, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    capsys.readouterr()
    assert main(["sample", "--model", str(out), "--prompt", "ab", "--length", "40", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("ab")
    (out / REPORT).unlink()
    assert main(["sample", "--model", str(out), "--device", "cpu"]) == 2
    assert "is no finished run of quantopt lm" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["stam", "float"])
@pytest.mark.parametrize("architecture", ["llama", "gpt-neox"])
def test_sample_equals_reading_all_at_each_byte(
    file: Path, tmp_path: Path, recipe: str, architecture: str
) -> None:
    """Greedily, beyond the context too: there the last half of it is read again."""
    config = configured(file, recipe, architecture=architecture, steps=50, width=32)
    loop.train(config, loaded(config), out=tmp_path / "run", progress=False)
    _, network = commands.load(tmp_path / "run", "cpu")
    assert any(isinstance(layer, quantopt.nn.BinaryLinear) for layer in network.modules()) == (
        recipe == "stam"
    )
    written = model.sample(network, b"abc", 40, temperature=0)
    expected, read = list(b"abc"), 0
    with torch.no_grad():
        for _ in range(40):
            logits = network(input_ids=torch.tensor([expected[read:]])).logits[0, -1]
            expected.append(int(logits.argmax()))
            if len(expected) - read > config.context:
                read = len(expected) - config.context // 2
    assert written == bytes(expected[3:])
    drawn = [model.sample(network, b"abc", 8, temperature=2.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


EXPORTED = ["--width=128", "--feed-forward=128", "--layers=1", "--heads=2", "--context=16", "--batch-size=2"]


def test_export(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "run"
    command = ["lm", "--recipe=stam", "--data", str(file), "--steps=50", "--device=cpu", "--quiet"]
    command += ["--out", str(out), *EXPORTED, "--export", "hf", "--export", "gguf"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    losses = [float(line.rpartition(" ")[2]) for line in printed.splitlines() if "exported as" in line]
    report = json.loads((out / REPORT).read_text())
    assert losses == [pytest.approx(report["loss_packed"], abs=1e-3)] * 2
    assert main(command) == 0  # a new run replaces what was exported
    assert (out / "hf" / "config.json").is_file() and (out / "model.gguf").is_file()
    assert main([word for word in command if word not in ("--export", "hf", "gguf")]) == 0
    assert not (out / "hf").exists() and not (out / "model.gguf").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe=float", "--export=hf"], "--export: exports packed networks, and adamw trains none"),
        (["--export=gguf", "--architecture=gpt-neox"], "--architecture: gpt-neox"),
        (["--export=gguf", "--bits=2"], "--bits: 2: a GGUF file holds 1 bit or ternary"),
        (["--export=gguf", "--width=64"], "--width: 64: a GGUF file holds rows of a multiple of 128"),
        (["--export=gguf", "--width=128"], "--feed-forward: 344"),
        (["--export=gguf", "--bits=ternary", "--width=128"], "--width: 128: .* multiple of 256"),
        (["--export=gguf", "--scale=group", "--group-size=32", "--feed-forward=256"], "--group-size: 32"),
        (
            ["--export=gguf", "--bits=ternary", "--scale=group", "--width=256", "--feed-forward=512"],
            "--group-size: 128: a GGUF file has a scale for 256",
        ),
        (["--export=hf", "--activations=4"], "--activations: 4: exported networks have float activations"),
    ],
)
def test_what_cannot_be_exported(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "run"
    assert main(["lm", "--data", str(file), "--out", str(out), *words]) == 2
    assert re.search(message, capsys.readouterr().err) and not out.exists()


def test_sample_of_a_long_prompt(file: Path) -> None:
    torch.manual_seed(0)
    network = model.build(lm.Config(device="cpu", **SMALL)).eval()
    assert len(model.sample(network, b"x" * 100, 20)) == 20


def test_group_scales(file: Path) -> None:
    config = configured(file, "stam", scale="group", group_size=8, steps=50)
    report = loop.train(config, loaded(config), progress=False)
    assert report["loss_packed"] == pytest.approx(report["loss_quantized"], rel=1e-4)
    with pytest.raises(InputError, match="--group-size: needs --scale group, not channel"):
        configured(file, "stam", group_size=8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "none-such"], "none-such is neither a recipe"),
        (["--width", "10"], "--width"),
        (["--context", "1000"], "--data"),
        (["--lr", "0"], "--lr"),
        (["--scale", "none"], "--scale"),
        (["--bits", "2", "--recipe", "float"], "--bits"),
    ],
)
def test_bad_arguments(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    command = ["lm", "--data", str(file), "--context", "16", "--out", str(tmp_path / "run"), *words]
    try:
        status = main(command)
    except SystemExit as stop:  # of argparse
        status = int(str(stop.code))
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_recipe_with_a_key_of_images(file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('base = "stam"\nepochs = 3\n')
    with pytest.raises(InputError, match="'epochs' is not for language models"):
        lm.load(str(recipe))


@pytest.mark.parametrize("recipe", ["luq", "stam"])
def test_activations_are_those_of_training(file: Path, tmp_path: Path, recipe: str) -> None:
    config = configured(file, recipe, activations=4, steps=50)
    report = loop.train(config, loaded(config), out=tmp_path / "run", progress=False)
    _, network = commands.load(tmp_path / "run", "cpu")
    expected = report["loss" if recipe == "luq" else "loss_packed"]
    assert model.validation_loss(network, loaded(config), config.context) == pytest.approx(expected, rel=1e-5)


def test_a_byte_costs_one_pass(file: Path, tmp_path: Path) -> None:
    config = configured(file, "stam", steps=1)
    loop.train(config, loaded(config), out=tmp_path / "run", progress=False)
    _, network = commands.load(tmp_path / "run", "cpu")
    lengths: list[int] = []
    network.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    network.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert lengths == [3, 1, 1, 1]


def test_text_that_has_changed(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(file, "stam", steps=1)
    loop.train(config, loaded(config), out=tmp_path / "run", progress=False)
    file.write_bytes(b"hgfedcba" * 100)
    assert main(["eval", "--model", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert "--data" in capsys.readouterr().err
    assert main(["eval", "--model", str(tmp_path / "run"), "--device", "cpu", "--data", str(file)]) == 0
