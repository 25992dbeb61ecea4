"""The command line: what it prints and writes, exit status 2 and the argument's name for every bad input."""

import errno
import importlib.metadata
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import force_isa
from quantopt.backends import OPERATIONS
from quantopt.train import cli, report, screen
from training_data import write_patterns

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


@pytest.fixture(scope="module")
def finished(patterns, tmp_path_factory) -> Path:
    """The directory of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "askew"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(report, "save_figure", lambda figure, path: path.touch())
        assert run("train", "--data", patterns, "--epochs", "3", "--out", out) == 0
    return out


def run(*arguments: object) -> int:
    """The exit status, whether main returns it or argparse raises it."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def refused(capsys, *arguments: object) -> str:
    """Runs a command that must fail with status 2 and one message; returns it."""
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------ what works


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["pack"], ["report"], ["env"]])
def test_help(capsys, command):
    assert run(*command, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: quantopt") and max(len(line) for line in out.splitlines()) < 200
    if command == ["train"]:
        options = "data model optimizer bits scale epochs batch-size lr seed device out resume".split()
        assert all(f"--{option}" in out for option in options)


def test_module_is_the_command_line(tmp_path):
    command = [sys.executable, "-m", "quantopt", "train", "--data", str(tmp_path / "nowhere"), "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.splitlines()[-1].startswith("quantopt train: error: --data: ")
    assert "Traceback" not in done.stderr


def test_train_shows_progress_and_writes_everything(patterns, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert (
        run("train", "--data", patterns, "--model", "mlp", "--epochs", 2, "--out", out, "--optimizer", "stam")
        == 0
    )
    captured = capsys.readouterr()
    lines = captured.err.splitlines()[-2:]  # of a log: no terminal reads them
    for epoch, line in enumerate(lines, 1):
        values = r"loss=[\d.]+, accuracy=[\d.]+%, kappa=\S+, inside=[\d.]+%"
        assert re.fullmatch(rf"epoch {epoch}/2: 128 of 128 images in [\d.]+ s, {values}", line)
    assert "\r" not in captured.err and captured.err.count("epoch") == 2
    assert "stam" in captured.out and str(out) in captured.out
    names = {file.name for file in out.iterdir()}
    assert names == {
        "report.json",
        "checkpoint.pt",
        "model.safetensors",
        "curves.png",
        "weights.png",
        "metrics.csv",
    }
    written = json.loads((out / "report.json").read_text())
    assert written["config"]["model"] == "mlp" and written["config"]["optimizer"] == "stam"
    assert written["config"]["lr"] == 1.0 and written["config"]["batch_size"] == 64
    assert written["versions"]["torch"] == torch.__version__


@pytest.mark.usefixtures("blank_figures")
def test_quiet_train_of_sgd(patterns, tmp_path, capsys):
    assert (
        run(
            "train",
            "--data",
            patterns,
            "--epochs",
            1,
            "--optimizer",
            "sgd",
            "--quiet",
            "--out",
            tmp_path / "r",
        )
        == 0
    )
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "r" / "model.safetensors").exists()
    assert json.loads((tmp_path / "r" / "report.json").read_text())["accuracy_packed"] is None


def test_eval_agrees_with_the_report(patterns, finished, tmp_path, capsys):
    written = json.loads((finished / "report.json").read_text())
    expected = f"accuracy {written['accuracy_packed']:.2f} %"
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((finished / "model.safetensors").read_bytes())
    for arguments in (
        ["--model", finished],
        ["--model", finished / "model.safetensors", "--data", patterns],
        ["--model", alone, "--data", patterns, "--arch", "cnn"],
    ):
        capsys.readouterr()
        assert run("eval", *arguments) == 0
        assert capsys.readouterr().out.startswith(expected)


@pytest.mark.usefixtures("blank_figures")
def test_eval_of_quantised_activations_without_a_report(patterns, tmp_path, capsys):
    options = ["--optimizer", "askew", "--bits", 4, "--activations", 4, "--skip", "none"]
    assert run("train", "--data", patterns, "--epochs", 1, *options, "--out", tmp_path) == 0
    expected = json.loads((tmp_path / "report.json").read_text())["accuracy_packed"]
    (tmp_path / "report.json").unlink()
    evaluate = ["eval", "--model", tmp_path, "--data", patterns, "--arch", "cnn"]
    capsys.readouterr()
    assert run(*evaluate, "--activations", 4, "--skip", "none") == 0
    assert capsys.readouterr().out.startswith(f"accuracy {expected:.2f} %")
    assert "cannot be loaded as cnn" in refused(capsys, *evaluate)


def test_pack_makes_the_file_that_training_made(finished, tmp_path, capsys):
    assert run("pack", "--run", finished, "--out", tmp_path / "again.safetensors") == 0
    assert "epoch 3 of 3" in capsys.readouterr().out
    again, first = load_file(tmp_path / "again.safetensors"), load_file(finished / "model.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    assert run("pack", "--run", finished / "checkpoint.pt") == 0


def test_env(capsys):
    assert run("env", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    operations = {row["operation"].split()[0] for row in facts["backends"]}
    assert operations == set(OPERATIONS)
    assert all(
        row["backend"] in ("reference", "cpu", "cuda", "triton") and row["why"] for row in facts["backends"]
    )
    assert run("env") == 0
    text = capsys.readouterr().out
    words = ("quantopt", "instructions", "CUDA", "GPU", "extras", *OPERATIONS)
    assert all(word in text for word in words)
    if not facts["cuda"]["devices"]:
        assert text.count("\n") <= 24 and max(map(len, text.splitlines())) <= 100
        assert "not here: there is no GPU that torch can use" in text
    assert run("env", "--all") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*words[:4], "safetensors", "the best for cpu tensors", *OPERATIONS))


def test_env_without_the_extension():
    program = "import sys; from quantopt.train.cli import main; sys.exit(main(['env']))"
    environment = {"QUANTOPT_DISABLE_EXTENSION": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "not loaded" in done.stdout and "reference" in done.stdout and "disabled" in done.stdout


def test_env_with_an_unknown_instruction_set(monkeypatch, capsys):
    force_isa(monkeypatch, "mmx")
    assert run("env") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "QUANTOPT_CPU_ISA=mmx is unknown" in text and "unset QUANTOPT_CPU_ISA" in text
    assert "fast:" not in text


def test_env_with_slow_instructions(monkeypatch, capsys):
    force_isa(monkeypatch, "portable")
    assert run("env") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("correct, not fast: on CPU, cpu kernels, portable; QUANTOPT_CPU_ISA asks for it") == 3
    assert text.count("fast: on CPU") == 3


def test_env_names_what_an_extra_lacks(monkeypatch):
    """Of extras that name others too."""
    requires = [
        "torch>=2.11",
        'tqdm>=4; extra == "train"',
        'torch-quantopt[train]; extra == "all"',
        'nowhere-to-be-found; (python_version > "3") and extra == "all"',
    ]
    found = {"torch-quantopt": requires}
    monkeypatch.setattr(screen.importlib.metadata, "requires", found.__getitem__)
    assert screen.extras() == {
        "all": {"installed": ["tqdm"], "missing": ["nowhere-to-be-found"]},
        "train": {"installed": ["tqdm"], "missing": []},
    }


def test_env_knows_the_versions_that_an_extra_takes(monkeypatch):
    """As far as the packaging library is there to compare them."""
    requires = [
        'torch-quantopt[old]; extra == "all"',
        'torch<2,>=1; extra == "old"',
        'numpy>=1; extra == "old"',
    ]
    monkeypatch.setattr(screen.importlib.metadata, "requires", {"torch-quantopt": requires}.__getitem__)
    found = {"installed": ["numpy"], "missing": [f"torch<2,>=1, not {importlib.metadata.version('torch')}"]}
    assert screen.extras() == {"all": found, "old": found}
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert screen.extras()["old"] == {"installed": ["torch", "numpy"], "missing": []}


@pytest.mark.parametrize(
    ("built", "forced", "why"),
    [
        (["portable"], None, "built without AVX2: rebuild on x86-64"),
        (["portable"], "portable", "built without AVX2: rebuild on x86-64"),
        (["portable", "avx2"], None, "the fast ones need a processor with AVX2"),
        (["portable", "avx2"], "portable", "QUANTOPT_CPU_ISA asks for it"),
    ],
)
def test_env_says_why_it_is_slow(built, forced, why):
    facts = {"extension": {"isas": built}, "isa": {"active": "portable", "forced": forced}}
    said = screen.speed({"backend": "cpu", "device": "cpu"}, facts)
    assert said.word == "correct, not fast" and said.why.startswith(why)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "nan"], "argument --lr: must be a positive finite number, not nan"),
        (["--lr", "-1"], "argument --lr"),
        (["--lr", "fast"], "argument --lr: 'fast' is not a number"),
        (["--bits", "5"], "argument --bits: invalid choice"),
        (
            ["--bits", "1", "--scale", "sawb"],
            "--scale: scale='sawb': has no levels for bits=1; use bits of [2, 3, 4, '17-",
        ),
        (["--scale", "group"], "argument --scale: invalid choice"),
        (["--epochs", "0"], "argument --epochs: must be at least 1"),
        (["--batch-size", "1"], "argument --batch-size: must be at least 2"),
        (["--seed", "1.5"], "argument --seed: '1.5' is not a whole number"),
        (["--optimizer", "adam"], "argument --optimizer: invalid choice"),
        (["--model", "alexnet"], "argument --model: invalid choice"),
        (["--model", "vgg11"], "--model: vgg11 needs images of at least 32x32"),
        (["--data", "nowhere"], "--data: nowhere does not exist"),
        (["--backend", "cuda"], "--backend: backend='cuda' cannot run"),
        (["--bats", "1"], "unrecognized arguments: --bats"),
    ],
)
def test_bad_training_arguments(patterns, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "train", "--data", patterns, "--out", "new/run", "--quiet", *arguments)
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(patterns, tmp_path, capsys):
    line = refused(capsys, "train", "--data", patterns, "--device", "cuda", "--out", tmp_path / "run")
    assert "--device: cuda is not available: " in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "pack"])
def test_unwritable_out(patterns, finished, tmp_path, capsys, command):
    (tmp_path / "file").write_text("mine")
    before = (tmp_path / "file").read_bytes()
    source = ["--data", patterns] if command == "train" else ["--run", finished]
    for out in (tmp_path / "file" / "run", tmp_path / "file" / "run" / "deep", "/proc/quantopt/run"):
        assert "--out: " in refused(capsys, command, *source, "--out", out)
    if command == "train":
        assert "is not writable" in refused(capsys, command, *source, "--out", tmp_path / "file")
    else:
        assert "is a directory" in refused(capsys, command, *source, "--out", tmp_path)
    assert (tmp_path / "file").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_hostile_and_broken_data(tmp_path, capsys):
    for name, path, contents, message in (
        (
            "pickle",
            "data_batch_1",
            pickle.dumps({b"data": print}),
            "data_batch_1 cannot be read: it asks for",
        ),
        ("image", "train/cat/1.jpg", b"\xff\xd8\xff broken", "train/cat/1.jpg is not an image"),
    ):
        file = tmp_path / name / path
        file.parent.mkdir(parents=True)
        file.write_bytes(contents)
        line = refused(capsys, "train", "--data", tmp_path / name, "--out", tmp_path / "run", "--quiet")
        assert "--data: " in line and message in line and not (tmp_path / "run").exists()


def test_resume_with_another_model(patterns, finished, capsys):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    common = ["train", "--data", patterns, "--out", finished, "--epochs", 3, "--resume", "--quiet"]
    assert "checkpoint.pt is of another run: model is 'cnn'" in refused(capsys, *common, "--model", "mlp")
    assert "seed is 0 in the checkpoint and 1 now" in refused(capsys, *common, "--seed", 1)
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_bad_models(patterns, finished, tmp_path, capsys):
    good = (finished / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    given = ["eval", "--model", file, "--data", patterns]
    assert f"--model: {file} does not exist" in refused(capsys, *given)
    file.write_bytes(good)
    assert cli.main([str(word) for word in given]) == 0  # the network is found by trying
    capsys.readouterr()
    assert "--model: " in refused(capsys, *given, "--arch", "mlp")
    for damaged in (good[:-10], good[:20], b"", b"\xff" * 100, pickle.dumps(print)):
        file.write_bytes(damaged)
        assert "--model: " in refused(capsys, *given, "--arch", "cnn")
    file.write_bytes(good)
    (tmp_path / "report.json").write_text('{"config": {"model": 3}}')
    assert "--model: " in refused(capsys, *given)
    assert "--model: " in refused(capsys, "eval", "--model", tmp_path / "nothing")


REPORTS = [
    (lambda r: "", "Expecting value"),
    (lambda r: json.dumps([r]), "list indices"),
    (lambda r: 100_000 * "[", "recursion"),
    (lambda r: json.dumps(r).replace('"classes": 4', '"classes": 4' + 5000 * "0"), "Exceeds the limit"),
    (lambda r: json.dumps({**r, "config": {**r["config"], "classes": 10**400}}), "is a number of 1329 bits"),
    (lambda r: json.dumps({**r, "config": {**r["config"], "classes": True}}), "is True, not a whole number"),
    (lambda r: json.dumps({**r, "config": {**r["config"], "images": [1, 8]}}), "config.images is \\[1, 8\\]"),
    (
        lambda r: json.dumps({**r, "config": {**r["config"], "skip": "first"}}),
        "config.skip is 'first' and must be",
    ),
    (
        lambda r: json.dumps({**r, "config": {**r["config"], "model": {}}}),
        "config.model is a dict and must be",
    ),
]


@pytest.mark.parametrize(("change", "message"), REPORTS)
def test_bad_reports(patterns, finished, tmp_path, capsys, change, message):
    """The report beside a model, and those of the runs of a sweep."""
    written = json.loads((finished / "report.json").read_text())
    (tmp_path / "askew-0").mkdir()
    for folder in (tmp_path, tmp_path / "askew-0"):
        (folder / "report.json").write_text(change(written))
    (tmp_path / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    line = refused(capsys, "eval", "--model", tmp_path)
    assert f"--model: {tmp_path / 'report.json'} cannot be read" in line and re.search(message, line)
    line = refused(capsys, "sweep", "askew", "--seeds", 1, "--data", patterns, "--out", tmp_path)
    assert f"--out: {tmp_path / 'askew-0' / 'report.json'} cannot" in line and re.search(message, line)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("accuracy_quantized", None),
        ("accuracy_packed", "99"),
        ("bytes_packed", 0),
        ("bytes_float", 10**400),
        ("curves", {}),
        ("device", ...),
    ],
)
def test_a_sweep_refuses_results_that_it_cannot_average(patterns, finished, tmp_path, capsys, key, value):
    written = json.loads((finished / "report.json").read_text())
    if value is ...:
        del written[key]
    else:
        written[key] = value
    (tmp_path / "askew-0").mkdir()
    (tmp_path / "askew-0" / "report.json").write_text(json.dumps(written))
    line = refused(capsys, "sweep", "askew", "--seeds", 1, "--data", patterns, "--out", tmp_path)
    assert f"--out: {tmp_path / 'askew-0' / 'report.json'} cannot be read as a run's report" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 7),
        ("lr", 10**400),
        ("lr", math.nan),
        ("skip", 5),
        ("options", {"x": 1}),
        ("data", 3),
        ("epochs", 2),
    ],
)
def test_pack_of_a_configuration_that_cannot_be(finished, tmp_path, capsys, key, value):
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    state["config"][key] = value
    torch.save(state, tmp_path / "checkpoint.pt")
    line = refused(capsys, "pack", "--run", tmp_path)
    assert f"--run: {tmp_path / 'checkpoint.pt'} " in line
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_pack_to_a_full_disk(finished, tmp_path, capsys, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, "pack", "--run", finished, "--out", tmp_path / "again.safetensors")
    assert f"--out: {tmp_path / 'again.safetensors'} cannot be written: No space left on device" in line
    assert list(tmp_path.iterdir()) == []


def test_model_of_other_images(finished, tmp_path, capsys):
    other = write_patterns(tmp_path / "larger", size=12)
    line = refused(capsys, "eval", "--model", finished, "--data", other)
    assert "--data: " in line and "(1, 12, 12)" in line and "(1, 8, 8)" in line
    assert "checkpoint.pt is of another run" in refused(capsys, "pack", "--run", finished, "--data", other)


def test_pack_of_something_else(patterns, tmp_path, capsys):
    assert "--run: " in refused(capsys, "pack", "--run", tmp_path)
    file = tmp_path / "checkpoint.pt"
    for contents in ({"config": {"epochs": "many"}}, {"config": {"optimizer": []}}, {"weights": 1}, [1]):
        torch.save(contents, file)
        assert "--run: " in refused(capsys, "pack", "--run", file)
    file.write_bytes(b"nothing")
    assert "--run: " in refused(capsys, "pack", "--run", file)
    assert {f.name for f in tmp_path.iterdir()} == {"checkpoint.pt"}


@pytest.mark.usefixtures("blank_figures")
def test_sgd_runs_have_nothing_to_pack_and_say_what_was_left_out(tmp_path, capsys):
    out = tmp_path / "sgd"
    (hidden := write_patterns(tmp_path / "patterns") / ".notes").write_text("mine")
    options = ["--epochs", 1, "--optimizer", "sgd", "--quiet", "--out", out]
    assert run("train", "--data", hidden.parent, *options) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["left_out"] == "left out: 1 hidden file (.notes)"
    assert "full precision" in refused(capsys, "pack", "--run", out)
    assert "full precision" in refused(capsys, "eval", "--model", out)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train", "--out"),
        ("train", "--recipe"),
        ("train", "--data"),
        ("train", "--init"),
        ("sweep stam", "--out"),
        ("eval", "--model"),
        ("pack", "--run"),
        ("pack --run .", "--out"),
    ],
)
def test_empty_arguments_are_refused(tmp_path, monkeypatch, capsys, command, option):
    monkeypatch.chdir(tmp_path)
    assert f"argument {option}: must not be empty" in refused(capsys, *command.split(), option, "")
    assert list(tmp_path.iterdir()) == []


def test_no_command_and_unknown_command(capsys):
    assert "required" in refused(capsys)
    assert "invalid choice" in refused(capsys, "fly")
