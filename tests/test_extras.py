"""Without the optional libraries: what works, and the line that names the extra where something does not."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from quantopt import backends, extras
from quantopt.train import progress
from training_data import write_patterns

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

# In a process with torch, numpy and safetensors alone. It prints the lines that commands refused with.
ALONE = r'''
import contextlib, importlib, io, sys, warnings
from pathlib import Path

ABSENT = {
    "PIL", "accelerate", "gguf", "lightning", "matplotlib", "onnx", "onnxscript", "peft", "pytorch_lightning", "scipy",
    "sklearn", "tensorboard", "tqdm", "transformers", "triton",
}
NAMES = ABSENT | {"pillow", "scikit-learn"}  # of distributions
asked = []


class Without:
    """A finder that does not see what is absent."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            asked.append(name)
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda context: ())
        return () if context.name in NAMES else found(context)


sys.meta_path[:] = map(Without, sys.meta_path)
import torch

torch.set_num_threads(1)
asked.clear()  # torch asks for tqdm
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import quantopt
    for name in "nn optim ops packing reference recipes integrations train.toys train.demo train.cli".split():
        importlib.import_module(f"quantopt.{name}")
assert not asked, asked
from quantopt.train import cli, demo, toys


def run(main, *words):
    """(the exit status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


for words in (["--help"], ["--version"], ["env"], ["env", "--all"], ["train", "--help"]):
    status, out, err = run(cli.main, *words)
    assert (status, err) == (0, "") and out, (words, err)
    assert "pillow        not installed" in out or words[-1] != "--all"

# A run without figures, of images that no library decodes, is packed and evaluated.
from quantopt.train import board, data, loop
from quantopt.train.config import Config

config = Config(data="patterns", model="mlp", optimizer="stam", epochs=1, batch_size=32, device="cpu")
err = io.StringIO()
with contextlib.redirect_stderr(err):
    loop.train(config, data.load("patterns"), out=Path("run"))
read, line = err.getvalue().splitlines()
assert "1 file of no known format" in read and line.startswith("epoch 1/1: 160 of 160 images in "), err.getvalue()
for words in ("pack --run run", "eval --model run --arch mlp --data patterns"):
    status, out, err = run(cli.main, *words.split())
    assert status == 0, (words, err)

before = sorted(Path().rglob("*"))
for name in ("gguf", *(f"integrations.{n}" for n in ("generation", "onnx", "peft", "transformers"))):
    try:
        importlib.import_module(f"quantopt.{name}")
    except ImportError as error:
        print(error)
try:
    board.Board("events")
except ValueError as error:
    print(error)
for main, words in (
    (cli.main, "train --data patterns"),
    (cli.main, "train --data patterns --quiet --resume --out run"),
    (cli.main, "sweep stam --data patterns --out sweep"),
    (cli.main, "lm --data patterns/text --out lm"),
    (cli.main, "lm --data patterns/text --out lm --export gguf"),
    (cli.main, "sample --model language"),
    (cli.main, "eval --model language"),
    (cli.main, "eval --model run --arch mlp --data digits"),
    (cli.main, "eval --model run --arch mlp --data folders"),
    (cli.main, "report run"),
    (demo.main, ""),
    (toys.main, ""),
):
    status, out, err = run(main, *words.split())
    assert status == 2 and out == "" and err.count("\n") == 1, (words, status, out, err)
    print(err, end="")
assert sorted(Path().rglob("*")) == before
'''

SAID = """
quantopt.gguf needs gguf: pip install 'torch-quantopt[gguf]'
quantopt.integrations.generation needs transformers: pip install 'torch-quantopt[transformers]'
quantopt.integrations.onnx needs onnx and onnxscript: pip install 'torch-quantopt[onnx]'
quantopt.integrations.peft needs peft: pip install 'torch-quantopt[peft]'
quantopt.integrations.transformers needs transformers: pip install 'torch-quantopt[transformers]'
--tensorboard: needs tensorboard: pip install 'torch-quantopt[tensorboard]'
quantopt train: error: train: needs matplotlib: pip install 'torch-quantopt[train]'
quantopt train: error: train: needs matplotlib: pip install 'torch-quantopt[train]'
quantopt sweep: error: sweep: needs matplotlib: pip install 'torch-quantopt[train]'
quantopt lm: error: lm: needs matplotlib and transformers: pip install 'torch-quantopt[train,transformers]'
quantopt lm: error: --export: quantopt.gguf needs gguf: pip install 'torch-quantopt[gguf]'
quantopt sample: error: lm: needs transformers: pip install 'torch-quantopt[transformers]'
quantopt eval: error: lm: needs transformers: pip install 'torch-quantopt[transformers]'
quantopt eval: error: --data: digits: needs scikit-learn: pip install 'torch-quantopt[train]'
quantopt eval: error: --data: folders: train/a/1.png needs pillow: pip install 'torch-quantopt[train]'
quantopt report: error: report: needs matplotlib: pip install 'torch-quantopt[train]'
quantopt demo: error: demo: needs matplotlib and scikit-learn: pip install 'torch-quantopt[train]'
quantopt toys: error: toys: needs matplotlib and scikit-learn: pip install 'torch-quantopt[train]'
""".strip()


def test_with_the_core_alone(tmp_path: Path) -> None:
    """Everything but what needs an extra works; that stops before it writes, with the line that names the extra."""
    write_patterns(tmp_path / "patterns")
    (tmp_path / "patterns/text").write_text("of no known format " * 200)
    (tmp_path / "folders/train/a").mkdir(parents=True)
    (tmp_path / "folders/train/a/1.png").write_bytes(b"an image")
    (tmp_path / "language").mkdir()
    (tmp_path / "language/report.json").write_text('{"config": {"layers": 1, "data": "patterns/text"}}')
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = re.sub(r" \(No module named '\w+[^)]*'\)$", "", done.stdout.strip(), flags=re.MULTILINE)
    assert lines == SAID


def test_each_library_is_in_its_extra() -> None:
    assert PROJECT["name"] == extras.DISTRIBUTION
    for library, extra in extras.EXTRAS.items():
        packages = PROJECT["optional-dependencies"][extra]
        assert library in [re.match(r"[\w-]+", package)[0] for package in packages]  # type: ignore[index]


def test_one_bound_for_each_library() -> None:
    """Extras that need the library of another name that extra."""
    bounds: dict[str, set[str]] = {}
    for packages in PROJECT["optional-dependencies"].values():
        for package in packages:
            bounds.setdefault(re.split(r"[^\w-]", package)[0], set()).add(package)
    assert all(len(bounds[library]) == 1 for library in extras.EXTRAS)


def test_the_extra_of_whole_gguf_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from quantopt.gguf import models

    monkeypatch.setitem(sys.modules, "transformers", None)
    line = r"quantopt\.gguf\.load needs transformers: pip install 'torch-quantopt\[gguf\]' \("
    with pytest.raises(ImportError, match=line):
        models._on_meta(None, "llama", {}, torch.float32)  # type: ignore[arg-type]


def test_the_extra_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    refusal = backends._refusal("triton", "cuda", torch.float32, "0", 0)
    assert refusal == "it needs triton: pip install 'torch-quantopt[triton]' (it is not installed)"


# ---- progress ------------------------------------------------------------------------------------------------------


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for shown in (True, False):
        with progress.bar(shown, "epoch 1/2", total=4, unit="images") as bar:
            bar.update(4)
            bar.set_postfix({"loss": "0.5"})
        err = capsys.readouterr().err
        assert ("epoch 1/2: 100%" in err and "4/4" in err and "loss=0.5" in err) if shown else err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.bar(True, "epoch 1/2", total=4, unit="images") as bar:
        bar.set_postfix({"loss": "0.5"})
    assert re.fullmatch(r"epoch 1/2: 0 of 4 images in \S+ s, loss=0.5\n", capsys.readouterr().err)


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One at the end, and one where a minute has passed; none after an error, and none that has nothing to show."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar(True, "", total=2000, done=100, unit="steps") as bar:
        for step in range(3):
            now[0] += 31
            assert bar.update(50) is (step == 1)  # the values are asked for only then
            if step == 1:
                bar.set_postfix({"loss": "0.5"})
        assert capsys.readouterr().err == "200 of 2,000 steps in 62.0 s, loss=0.5\n"
        bar.set_postfix({"loss": "0.25", "inside": "90%"})
    assert capsys.readouterr().err == "250 of 2,000 steps in 93.0 s, loss=0.25, inside=90%\n"
    with pytest.raises(KeyError), progress.bar(True, "run", unit="steps") as bar:
        bar.set_postfix({"loss": "0.5"})
        raise KeyError
    with progress.bar(True, "decoding", unit="files") as bar:
        bar.update()
    monkeypatch.setattr(sys, "stderr", None)
    with progress.bar(True, "run", unit="steps") as bar:
        bar.set_postfix({"loss": "0.5"})
    assert capsys.readouterr() == ("", "")
