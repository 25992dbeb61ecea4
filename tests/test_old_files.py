"""Files of quantopt 0.1.0 (tests/data/old, written by tests/old_files.py) load and go on as they did.

Adam goes on up to roundings: it divided three times where one division gives the direction now."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quantopt
from old_files import FOLDER, OPTIMIZERS, advance, optimizer, packed_model, parameters, tiny


def read(name: str) -> Any:
    return torch.load(FOLDER / name, weights_only=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state(name: str) -> None:
    saved = read("optimizers-0.1.0.pt")[name]
    params = parameters(name)
    opt = optimizer(name, params)
    anneal = quantopt.Anneal(opt, 8)
    with torch.no_grad():
        for p, weight in zip(params, saved["weights"], strict=True):
            p.copy_(weight)
    with pytest.warns(UserWarning, match="no position of the anneal.*load the state_dict of the Anneal too"):
        opt.load_state_dict(saved["optimizer"])
    anneal.load_state_dict(saved["anneal"])
    advance(opt, anneal, 6, 2)
    for p, expected in zip(params, saved["expected"], strict=True):
        ulps = 8 if "adam" in name else 0
        torch.testing.assert_close(p, expected, rtol=ulps * torch.finfo(p.dtype).eps, atol=0)
    for group in opt.param_groups:
        assert set(opt.defaults) - {"differentiable"} <= set(group)


def test_packed_file() -> None:
    model = quantopt.load(FOLDER / "packed-0.1.0.safetensors", packed_model())
    weights = read("packed-0.1.0-weights.pt")
    assert {type(m).__name__ for m in model} >= {"BinaryConv2d", "BinaryLinear"}
    for name, module in model.named_children():
        if name in weights:
            assert torch.equal(module.weight, weights[name])


@pytest.mark.filterwarnings("error")
def test_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantopt.train import data, models
    from quantopt.train.config import Config
    from quantopt.train.directory import CHECKPOINT
    from quantopt.train.loop import train

    monkeypatch.setattr(models, "build", tiny)
    shutil.copy(FOLDER / "checkpoint-0.1.0.pt", tmp_path / CHECKPOINT)
    config = Config(data="digits", model="cnn", optimizer="askew-adam", epochs=2, batch_size=32, limit=100)
    curves: list[Any] = []
    train(
        config, data.load("digits"), out=tmp_path, resume=True, progress=False,
        on_epoch=lambda trainer: curves.append(trainer.curves),
    )  # fmt: skip
    expected = read("checkpoint-0.1.0-curves.pt")
    assert len(curves) == 1  # the first epoch was not trained again
    for name, values in expected.items():
        if name not in ("epsilon", "kappa", "reg_strength"):  # None where an optimizer has no such number
            assert curves[-1][name] == pytest.approx(values, rel=1e-3)
        else:
            assert curves[-1][name] == values
