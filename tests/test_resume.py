"""Runs that are killed and continued bit for bit, and checkpoints that are damaged, hostile or of another run."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from quantopt.train import cli, optimizers
from quantopt.train.config import Config
from quantopt.train.errors import InputError
from quantopt.train.loop import Trainer, train
from training_data import CONFIG, assert_equal, checkpoint, run

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


class Interruption(Exception):
    pass


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_resume_is_bit_identical(dataset, tmp_path, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, augment="crop-flip", seed=5)
    whole = train(config, dataset, out=tmp_path / "whole", progress=False)

    def interrupt(trainer: Trainer) -> None:
        if trainer.epoch == 3:
            raise Interruption

    with pytest.raises(Interruption):
        train(config, dataset, out=tmp_path / "cut", progress=False, on_epoch=interrupt)
    assert checkpoint(tmp_path / "cut")["epoch"] == 3
    torch.manual_seed(99)
    resumed = train(config, dataset, out=tmp_path / "cut", resume=True, progress=False)
    assert_equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut"))
    assert_equal(whole.model.state_dict(), resumed.model.state_dict())
    assert_equal(whole.report["curves"], resumed.report["curves"])


def test_different_data_order_would_be_noticed(dataset, tmp_path):
    """The comparison of the tests above tells runs apart that differ in the generator's state alone."""
    train(CONFIG, dataset, out=tmp_path / "a", progress=False)

    def spoil(trainer: Trainer) -> None:
        if trainer.epoch == 3:
            trainer.generator.manual_seed(1)

    train(CONFIG, dataset, out=tmp_path / "b", progress=False, on_epoch=spoil)
    with pytest.raises(AssertionError, match="differs"):
        assert_equal(checkpoint(tmp_path / "a")["model"], checkpoint(tmp_path / "b")["model"])


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from quantopt.train import augment, cli, commands
point, arguments = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
calls = 0
def killer(original, at):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
if point == "mid-epoch":  # the second of the five steps of epoch 3
    augment.apply = killer(augment.apply, 12)
elif point == "writing":  # the second checkpoint is written, but not renamed
    Path.replace = killer(Path.replace, 3)
elif point == "finished":  # all epochs done, nothing measured
    commands.write_run = killer(commands.write_run, 1)
sys.exit(cli.main(arguments))
"""


def arguments(patterns, optimizer: str, out) -> list[str]:
    options = ["--optimizer", optimizer, "--epochs", "4", "--batch-size", "32", "--device", "cpu", "--quiet"]
    return ["train", "--data", str(patterns), *options, "--augment", "crop", "--out", str(out)]


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("point", "optimizer", "epoch"),
    [("mid-epoch", "askew", 2), ("writing", "stam", 1), ("finished", "askew", 4)],
)
def test_killed_run_ends_as_if_it_had_not_been(patterns, tmp_path, capsys, point, optimizer, epoch):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = [sys.executable, "-c", KILLED, point, *arguments(patterns, optimizer, cut)]
    killed = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint(cut)["epoch"] == epoch
    assert not (cut / "report.json").exists()
    assert cli.main([*arguments(patterns, optimizer, cut), "--resume"]) == 0
    assert cli.main(arguments(patterns, optimizer, whole)) == 0
    capsys.readouterr()
    assert_equal(checkpoint(whole), checkpoint(cut))
    packed = [load_file(out / "model.safetensors") for out in (whole, cut)]
    assert_equal(*packed)
    names = {file.name for file in cut.iterdir()}
    assert names == {
        "checkpoint.pt",
        "report.json",
        "model.safetensors",
        "curves.png",
        "weights.png",
        "metrics.csv",
    }
    assert (cut / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_resume_refuses_another_configuration(dataset, tmp_path):
    run(dataset, epochs=1, out=tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    config = dataclasses.replace(CONFIG, epochs=2, lr=0.25)
    with pytest.raises(InputError) as raised:
        train(config, dataset, out=tmp_path / "run", resume=True, progress=False)
    message = str(raised.value)
    assert message.startswith("--resume: ") and "epochs is 1 in the checkpoint and 2 now" in message
    assert "lr is 1.0 in the checkpoint and 0.25 now" in message and "seed" not in message
    other = dataclasses.replace(dataset, train_labels=dataset.train_labels.flip(0))
    with pytest.raises(InputError, match="fingerprint is"):
        train(dataclasses.replace(CONFIG, epochs=1), other, out=tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_a_damaged_checkpoint(dataset, tmp_path):
    run(dataset, epochs=2, out=tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.pt"
    good = file.read_bytes()
    state = torch.load(file, weights_only=True)
    del state["generator"]
    for damage in (
        lambda: file.write_bytes(good[:-1000]),
        lambda: file.write_bytes(b""),
        lambda: torch.save(state, file),
    ):
        damage()
        with pytest.raises(InputError, match="--resume: "):
            train(
                dataclasses.replace(CONFIG, epochs=2),
                dataset,
                out=tmp_path / "run",
                resume=True,
                progress=False,
            )


class Hostile:
    def __reduce__(self):
        return (eval, ("open('hostile-checkpoint-ran', 'w')",))


def test_hostile_checkpoint_runs_nothing(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    torch.save({"config": {}, "model": Hostile()}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint\.pt is damaged, or holds more than"):
        train(CONFIG, dataset, out=tmp_path / "run", resume=True, progress=False)
    assert not (tmp_path / "hostile-checkpoint-ran").exists()


def test_resume_without_a_checkpoint_starts(dataset, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    train(config, dataset, out=tmp_path / "run", resume=True, progress=False)
    assert checkpoint(tmp_path / "run")["epoch"] == 1


def test_new_run_replaces_an_old_one(dataset, tmp_path):
    for stale in ("report.json", "model.safetensors", ".checkpoint.pt.1.tmp"):
        (tmp_path / stale).write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    run(dataset, epochs=1, out=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "notes.txt"}


def test_damaged_checkpoints_are_refused(dataset, tmp_path):
    """Every part that is missing or of the wrong kind is an InputError that names --resume."""
    config = Config(optimizer="stam", model="mlp", epochs=1, batch_size=64)
    train(config, dataset, out=tmp_path, progress=False)
    path = tmp_path / "checkpoint.pt"
    good = torch.load(path, weights_only=True)

    def attempt(change):
        state = torch.load(path, weights_only=True)
        change(state)
        trainer = Trainer(config, dataset)
        with pytest.raises(InputError, match="--resume"):
            trainer.load_state_dict(state)

    assert good["epoch"] == 1
    attempt(lambda s: s.update(optimizer=None))
    attempt(lambda s: s.update(epoch=-5))
    attempt(lambda s: s.update(histograms=torch.zeros(0)))
    attempt(lambda s: s["curves"].update(loss=["a"]))
    attempt(lambda s: s["optimizer"]["state"][0].update(latent=[1]))
    attempt(lambda s: s["optimizer"]["state"][0].update(scale=torch.ones(7)))
    attempt(lambda s: s["optimizer"]["state"][0].pop("latent"))


def test_training_starts_from_another_run(dataset, tmp_path):
    run(dataset, optimizer="sgd", epochs=5, out=tmp_path / "float")
    config = dataclasses.replace(CONFIG, optimizer="proxquant", init=str(tmp_path / "float"), epochs=1)
    state = checkpoint(tmp_path / "float")
    trainer = Trainer(config, dataset, state["model"])
    assert_equal(dict(trainer.model.state_dict()), dict(state["model"]))
    warm = train(config, dataset, out=tmp_path / "warm", progress=False).report["curves"]["loss"][0]
    cold = run(dataset, optimizer="proxquant", epochs=1).report["curves"]["loss"][0]
    assert warm < 0.5 * cold
    (tmp_path / "float" / "checkpoint.pt").unlink()
    train(config, dataset, out=tmp_path / "warm", resume=True, progress=False)
    with pytest.raises(InputError, match=r"--init: .*does not exist"):
        train(config, dataset, progress=False)
    with pytest.raises(
        InputError, match=r"--init: .*warm does not fit: model has other tensors than this network"
    ):
        train(dataclasses.replace(config, model="mlp", init=str(tmp_path / "warm")), dataset, progress=False)
