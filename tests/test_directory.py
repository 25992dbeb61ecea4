"""The directory of a run: held by one process, written whole or not at all, replaced when there is something new."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

from quantopt.train import cli, demo, report
from quantopt.train.directory import held
from quantopt.train.errors import InputError
from quantopt.train.loop import Trainer
from training_data import assert_equal, checkpoint

pytestmark = pytest.mark.usefixtures("cache", "one_thread", "blank_figures")

RESULTS = {"report.json", "model.safetensors", "curves.png", "weights.png", "metrics.csv"}


def arguments(patterns, out, *more) -> list[str]:
    options = [
        "--model",
        "mlp",
        "--epochs",
        2,
        "--batch-size",
        32,
        "--device",
        "cpu",
        "--quiet",
        "--out",
        out,
    ]
    return ["train", "--data", str(patterns), *map(str, options), *map(str, more)]


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def error_of(capsys, command) -> str:
    """Runs a command that must fail with status 2 and one line; returns it."""
    capsys.readouterr()
    assert cli.main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ------------------------------------------------------------------------------------------------ one run at a time


def test_a_directory_is_held_by_one_process(patterns, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    with held(out):
        line = error_of(capsys, arguments(patterns, out))
        assert f"--out: {out} is in use by process {os.getpid()}: " in line and not list(out.iterdir())
    assert not out.parent.exists()  # it was made and nothing was written
    holder = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match=f"in use by process {process.pid}"), held(tmp_path):
            pass
        process.kill()
    with held(tmp_path):  # the kernel has ended the hold
        pass
    assert list(tmp_path.iterdir()) == []


def test_sweeps_and_demos_hold_theirs(patterns, tmp_path, capsys):
    common = ["--data", str(patterns), "--epochs", "1", "--out", str(tmp_path)]
    with held(tmp_path):
        assert "is in use" in error_of(capsys, ["sweep", "stam", *common])
        assert demo.main(common) == 2
        assert "is in use" in capsys.readouterr().err


def test_without_locks_a_run_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with held(tmp_path):
        pass
    assert "is not locked against other runs: No locks available" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_runs_of_a_sweep_end_with_it(patterns, tmp_path, number):
    options = [
        "--data",
        str(patterns),
        "--device",
        "cpu",
        "--model",
        "mlp",
        "--epochs",
        "100000",
        "--seeds",
        "1",
    ]
    command = [sys.executable, "-m", "quantopt", "sweep", "stam", *options, "--out", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as sweep:
        wait_for((tmp_path / "stam-0" / "checkpoint.pt").exists)
        with pytest.raises(InputError, match="in use"), held(tmp_path / "stam-0"):
            pass
        sweep.send_signal(number)

    def ended() -> bool:
        try:
            with held(tmp_path / "stam-0"):
                return True
        except InputError:
            return False

    wait_for(ended)
    before = checkpoint(tmp_path / "stam-0")["epoch"]
    assert 1 <= before == checkpoint(tmp_path / "stam-0")["epoch"] < 100000


def wait_for(condition) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("not within two minutes")


# ------------------------------------------------------------------------------------------------ a full disk


@pytest.mark.parametrize(
    "name",
    ["checkpoint.pt", "model.safetensors", "curves.png", "weights.png", "metrics.csv", "report.json"],
)
def test_a_file_that_cannot_be_written_is_named(patterns, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(report, "save_figure", save_blank)
    flush = os.fsync

    def full(handle: int) -> None:
        if f".{name}." in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = error_of(capsys, arguments(patterns, tmp_path / "run"))
    assert f"--out: {tmp_path / 'run' / name} cannot be written: No space left on device" in line
    if name == "checkpoint.pt":
        assert not (tmp_path / "run").exists()
        return
    assert not (tmp_path / "run" / "report.json").exists() and not list((tmp_path / "run").glob(".*"))
    assert cli.main(arguments(patterns, tmp_path / "run", "--resume")) == 0
    assert set(contents(tmp_path / "run")) == RESULTS | {"checkpoint.pt"}


def save_blank(figure, path: Path) -> None:
    from quantopt.files import atomic_write
    from quantopt.train.errors import writing

    with writing(path):
        atomic_write(path, lambda file: file.write_bytes(b""))


def test_a_directory_that_vanishes(patterns, tmp_path, monkeypatch, capsys):
    test = Trainer.test

    def vanish(trainer: Trainer) -> None:
        test(trainer)
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(Trainer, "test", vanish)
    line = error_of(capsys, arguments(patterns, tmp_path / "run"))
    assert f"--out: {tmp_path / 'run'} was moved, removed or replaced" in line


def test_a_directory_that_is_replaced_is_left_alone(patterns, tmp_path, monkeypatch, capsys):
    test, out = Trainer.test, tmp_path / "run"

    def replace(trainer: Trainer) -> None:
        test(trainer)
        if trainer.epoch == 2:
            out.rename(tmp_path / "aside")
            out.mkdir()

    monkeypatch.setattr(Trainer, "test", replace)
    line = error_of(capsys, arguments(patterns, out))
    assert f"--out: {out} was moved, removed or replaced" in line
    assert not list(out.iterdir()) and checkpoint(tmp_path / "aside")["epoch"] == 1


def test_the_lock_is_on_the_directory_at_the_path(tmp_path, monkeypatch):
    """Another process makes the directory, and removes it again after it is opened here and before it is locked."""
    out, flock, calls = tmp_path / "run", fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            out.rmdir()
        flock(handle, operation)

    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", late)
        with held(out) as hold:
            assert len(calls) == 2 and hold.is_there()
            with pytest.raises(InputError, match="in use"), held(out):
                pass
            out.rmdir()
            out.mkdir()
            assert not hold.is_there()
    assert out.exists()  # it is another's


def test_pack_holds_the_directory_that_it_writes_to(patterns, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(arguments(patterns, out)) == 0
    before = contents(out)
    elsewhere = ["pack", "--run", str(out), "--out", str(tmp_path / "again.safetensors")]
    with held(out):
        line = error_of(capsys, ["pack", "--run", str(out)])
        assert f"--out: {out} is in use by process {os.getpid()}" in line and contents(out) == before
        assert cli.main(elsewhere) == 0
    with held(tmp_path):
        assert f"--out: {tmp_path} is in use" in error_of(capsys, elsewhere)
    assert cli.main(["pack", "--run", str(out)]) == 0


def test_a_run_whose_standard_input_cannot_be_read_ends(patterns, tmp_path):
    command = [sys.executable, "-m", "quantopt", *arguments(patterns, tmp_path / "run", "--until-stdin-ends")]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.splitlines() == ["quantopt train: error: --until-stdin-ends: standard input is closed"]
    unreadable = ["sh", "-c", 'exec "$@" 0>/dev/null', "sh", *command, "--epochs", "100000"]
    done = subprocess.run(unreadable, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stderr == ""


def test_a_full_standard_output():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "quantopt", "env"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


# ------------------------------------------------------------------------------------------------ replacing a run


class Interruption(Exception):
    pass


def test_a_run_is_replaced_at_the_first_checkpoint(patterns, tmp_path, monkeypatch, capsys):
    assert cli.main(arguments(patterns, tmp_path)) == 0
    before, state = contents(tmp_path), checkpoint(tmp_path)
    assert set(before) == RESULTS | {"checkpoint.pt"}
    other = arguments(patterns, tmp_path, "--optimizer", "stam")
    train_epoch, replace, calls = Trainer.train_epoch, Path.replace, []

    def stop_in(epoch):
        def call(trainer, bar):
            if trainer.epoch == epoch:
                raise Interruption
            train_epoch(trainer, bar)

        return call

    def stop_at_replacing(file, target):
        if target.name == "checkpoint.pt":
            calls.append(sorted(contents(tmp_path)))
            raise Interruption
        return replace(file, target)

    with monkeypatch.context() as patch:  # ended in its first epoch: the earlier run is as it was
        patch.setattr(Trainer, "train_epoch", stop_in(0))
        with pytest.raises(Interruption):
            cli.main(other)
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:  # between two checkpoints: no report that is of neither
        patch.setattr(Path, "replace", stop_at_replacing)
        with pytest.raises(Interruption):
            cli.main(other)
    assert set(contents(tmp_path)) == {"checkpoint.pt"} and len(calls[0]) == 2
    assert_equal(checkpoint(tmp_path), state)
    assert "optimizer is 'askew' in the checkpoint and 'stam' now" in error_of(capsys, [*other, "--resume"])
    assert cli.main([*arguments(patterns, tmp_path), "--resume"]) == 0
    again = contents(tmp_path)
    assert_equal(*(safetensors.torch.load(files["model.safetensors"]) for files in (before, again)))
    curves = [json.loads(files["report.json"])["curves"] for files in (before, again)]
    assert curves[0] == curves[1]
    with (
        monkeypatch.context() as patch
    ):  # in the second epoch: the earlier run is gone, this one can be continued
        patch.setattr(Trainer, "train_epoch", stop_in(1))
        with pytest.raises(Interruption):
            cli.main(other)
    assert set(contents(tmp_path)) == {"checkpoint.pt"}
    assert checkpoint(tmp_path)["config"]["optimizer"] == "stam"
    assert cli.main([*other, "--resume"]) == 0
