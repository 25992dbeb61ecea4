"""`quantopt report`: what the page shows, old, unfinished and damaged runs, and how a browser draws it."""

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantopt.files import atomic_write
from quantopt.train import layer_table, loop, page
from quantopt.train.cli import main
from quantopt.train.directory import Result, write_run
from quantopt.train.errors import InputError
from training_data import CONFIG

pytestmark = pytest.mark.usefixtures("cache", "one_thread")

HOSTILE = '<img src=x onerror=alert(1)>&"$x_1$ \u202e'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, dataset: Any) -> tuple[Path, Result]:
    """The directory of a finished run, and what it measured."""
    out = tmp_path_factory.mktemp("images") / HOSTILE
    config = replace(CONFIG, optimizer="askew", epochs=4)
    result = loop.train(config, dataset, out=out, progress=False)
    write_run(out, result)
    return out, result


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of `quantopt lm`."""
    pytest.importorskip("transformers")
    from quantopt.train.lm import config as lm
    from quantopt.train.lm import loop as language_models
    from quantopt.train.lm import text

    folder = tmp_path_factory.mktemp("language")
    (folder / "text.txt").write_bytes(b"abcdefgh" * 100)
    size = {"layers": 2, "width": 32, "heads": 2, "context": 16, "batch_size": 2, "steps": 120}
    given = {**size, "data": str(folder / "text.txt"), "device": "cpu", "precision": "float32"}
    config = lm.configuration(lm.load("stam"), given)
    seen: list[Any] = []
    language_models.train(
        config,
        text.load(config.data, 16, 0.1),
        out=folder / "lm",
        progress=False,
        on_checkpoint=lambda trainer: seen.append((trainer.at, len(trainer.histograms))),
    )
    assert seen == [([50, 100, 120], 4)]
    return folder / "lm"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, images: tuple[Path, Result]) -> Path:
    """A directory of runs as a sweep has it: two recipes with two seeds, and one in full precision."""
    out = tmp_path_factory.mktemp("sweep")
    report = json.loads((images[0] / "report.json").read_text())
    for name in ("askew-0", "askew-1", "stam-0", "stam-1"):
        other = {**report, "config": {**report["config"], "seed": int(name[-1])}}
        other["accuracy_quantized"] = 80 + int(name[-1])
        write(out / name, other)
    report["config"] |= {"optimizer": "sgd", "bits": 0}
    write(out / "sgd-0", report | dict.fromkeys(("layers", "bytes_packed", "accuracy_packed")))
    return out


def write(directory: Path, report: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return directory


def written_now(directory: Path) -> str:
    return page.write([directory]).read_text(encoding="utf-8")


made = functools.cache(written_now)  # of the runs that stay as they are


# ------------------------------------------------------------------------------------------------ what it shows


def test_the_page_of_a_run(images: tuple[Path, Result], capsys: pytest.CaptureFixture[str]) -> None:
    out, result = images
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"written: {out / 'report.html'}\n"
    written = (out / "report.html").read_text(encoding="utf-8")
    assert "<img" not in written and html.escape(HOSTILE[:-2]) in written and "\\u202e" in written
    assert not re.search(r"<script|https?:|@import|<link", written)
    assert all(
        name.startswith(("#", "data:image/png;base64"))
        for name in re.findall(r'(?:href|src)="([^"]*)', written)
    )
    assert "url(" not in written.replace("url(#", "")
    ids = re.findall(r' id="([^"]*)"', written)
    assert len(ids) == len(set(ids)) > 50
    report = result.report
    assert f"{report['accuracy_packed']:.2f} %" in written and f"{report['bytes_packed']:,}" in written
    for row in report["layers"]["rows"]:
        assert row["name"].removesuffix(".weight") in written and f"{sum(row['flips']):,}" in written
    assert written.count("<figure>") == 9 and "What is not here" not in written


def test_the_page_of_a_language_model(language: Path) -> None:
    written = made(language)
    report = json.loads((language / "report.json").read_text())
    assert "nats per byte" in written and f"{report['loss_packed']:.4f}" in written
    assert len(report["layers"]["rows"]) == 14 == written.count('class="spark"')
    assert (language / "metrics.csv").read_text().splitlines()[0].startswith("step,loss,")
    assert [line.split(",")[0] for line in (language / "metrics.csv").read_text().splitlines()[1:]] == [
        "50",
        "100",
        "120",
    ]


def test_the_page_of_a_sweep(sweep: Path) -> None:
    written = made(sweep)
    assert written.count('<ul class="legend">') == 1 and written.count("(2 seeds)") == 2
    assert "80.50" in written and "0.71" in written  # mean and standard deviation over the seeds
    assert "sgd-0: it is a run of sgd, whose weights have no levels" in written


def test_several_directories(
    sweep: Path, images: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = write(tmp_path / "more" / "askew-0", json.loads((sweep / "askew-0" / "report.json").read_text()))
    assert page.write([sweep, again]) == Path("report.html")
    written = Path("report.html").read_text(encoding="utf-8")
    assert text(f"{sweep}/askew-0") in written and text(again) in written
    assert "(2 seeds)" in written  # of runs of equal settings alone
    report = json.loads((again / "report.json").read_text())
    report["config"]["seed"], report["config"]["epochs"] = 2, 5
    other = write(tmp_path / "more" / "askew-2", report)
    written = page.write([sweep / "askew-0", other]).read_text(encoding="utf-8")
    assert "seeds)" not in written and ">askew-2</li>" in written
    for twice in (sweep / "askew-0" / "..", sweep / "askew-1"):
        with pytest.raises(
            InputError, match=r"DIR: the run in .*askew-[01] is given twice \(as .*: give it once"
        ):
            page.write([sweep, twice])


def test_runs_of_equal_contents(images: tuple[Path, Result], tmp_path: Path) -> None:
    """Their figures are equal, and all ids of the page differ. A link to a run is not another run."""
    report = json.loads((images[0] / "report.json").read_text()) | {"bytes_float": None}
    for name in ("url(#one", "two"):
        write(tmp_path / name, report)
    (tmp_path / "latest").symlink_to("two")
    written = written_now(tmp_path)
    ids = re.findall(r'\bid="([^"]*)"', written)
    assert len(ids) == len(set(ids)) > 50
    named = re.findall(r'(?<=href="#)[^"]+|(?<=clip-path="url\(#)[^)]+', written)
    assert named and set(named) <= set(ids)
    assert 'aria-label="url(#one"' in written and "latest" not in written


def text(value: object) -> str:
    return html.escape(str(value))


# ------------------------------------------------------------------------------------------------ what is missing


def test_a_report_of_an_earlier_version(images: tuple[Path, Result], tmp_path: Path) -> None:
    report = json.loads((images[0] / "report.json").read_text())
    del report["histograms"], report["layers"]
    old = write(tmp_path / "old", report)
    written = written_now(old)
    assert "no histograms of the weights" in written and "no table of layers" in written
    shutil.copy(images[0] / "checkpoint.pt", old)  # which has the histograms
    written = written_now(old)
    assert "no histograms of the weights" not in written and "no table of layers" in written
    assert written.count("<figure>") == 8


def test_a_run_that_is_not_finished(images: tuple[Path, Result], tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    shutil.copy(images[0] / "checkpoint.pt", tmp_path / "cut")
    written = made(tmp_path / "cut")
    assert "it is not finished: no report.json" in written and written.count("<figure>") == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[", "cannot be read as a run's report"),
        ('{"config": 3}', "cannot be shown"),
        ({"curves": {"loss": [1], "accuracy": [1, 2]}}, "the curves are not of one length"),
        ({"curves": {"loss": ["<b>"]}}, "a value of 'loss' is '<b>', not a number"),
        ({"histograms": {"limit": 2.5, "points": [0], "counts": [[-1]]}}, "negative numbers"),
        ({"layers": {"sample": "", "none": 1, "all": 1, "rows": [{}]}}, "it lacks 'shape'"),
        ({"accuracy_packed": True}, "accuracy_packed is True, not a number"),
        (
            {"images_per_second_float": 0, "images_per_second_packed": 0},
            "images_per_second_float is 0, not positive",
        ),
        ({"bytes_float": 0}, "bytes_float is 0, not positive"),
        (
            {"curves": {"sign_flips": [1e308]}},
            "a value of 'sign_flips' is 1e+308, more than 1e+30 in magnitude",
        ),
        ({"curves": {"sign_flips": [10**400]}}, "cannot be shown"),
        (
            {"histograms": {"limit": 1e308, "points": [0], "counts": [[1]]}},
            "the limit of histograms is 1e+308, more",
        ),
        (
            {"histograms": {"limit": 2.5, "points": [0], "counts": [[1e308]]}},
            "a count of histograms is 1e+308, more",
        ),
    ],
)
def test_a_report_that_cannot_be_shown(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    report = json.loads((sweep / "askew-0" / "report.json").read_text())
    run = write(tmp_path / "run", change if isinstance(change, str) else report | change)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"quantopt report: error: DIR: {run / 'report.json'} ") and message in error
    assert error.count("\n") == 1 and not (run / "report.html").exists()


def test_directories_without_runs(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"DIR: .* holds no run: neither it nor a directory in it has report.json"
    ):
        page.write([tmp_path])
    with pytest.raises(InputError, match=r"DIR: .*nothing is not a directory"):
        page.write([tmp_path / "nothing"])


@pytest.mark.parametrize("is_link", [False, True])
def test_a_pipe_is_not_replaced(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_link: bool
) -> None:
    """Nor is a device; a link to a file is, and its target stays."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    out = tmp_path / ("link" if is_link else "pipe")
    assert main(["report", str(sweep / "stam-0"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"error: --out: {out} cannot be written: it is not a regular file; give" in error
    assert (
        (tmp_path / "pipe").is_fifo() and out.is_symlink() == is_link and len(list(tmp_path.iterdir())) == 2
    )
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("file")
    atomic_write(tmp_path / "link", lambda file: file.write_text("new"))
    assert ((tmp_path / "link").read_text(), (tmp_path / "file").read_text()) == ("new", "mine")


def test_without_matplotlib(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(sweep / "askew-0")]) == 2
    error = capsys.readouterr().err
    assert (
        "error: report: needs matplotlib: pip install 'torch-quantopt[train]' (" in error
        and error.count("\n") == 1
    )


# ------------------------------------------------------------------------------------------------ what is measured


def test_the_table_of_layers(dataset: Any) -> None:
    trainer = loop.Trainer(replace(CONFIG, optimizer="stam", skip=[], epochs=1), dataset)
    optimizer: Any = trainer.optimizer.optimizer
    before = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    report = trainer.finish().report["layers"]
    assert len(report["rows"]) > 2 and report["quality"] == "accuracy"
    weights = dict(trainer.model.named_parameters())
    seen = []

    def evaluate() -> float:
        """Number of weights that are on their levels."""
        count = 0
        for name in names:
            levels = quantised[name].abs()
            count += int(torch.isclose(weights[name].abs(), levels).all())
        seen.append({name: bool(torch.equal(weights[name], before[name])) for name in names})
        return float(count)

    names = [row["name"] for row in report["rows"]]
    with optimizer.quantized():
        quantised = {name: weights[name].detach().clone() for name in names}
    table = layer_table.measure(optimizer, {name: [] for name in names}, "accuracy", "", evaluate)
    assert [row["alone"] for row in table["rows"]] == [1.0] * len(names)
    assert (table["none"], table["all"]) == (0.0, len(names))
    for i, name in enumerate(names):
        assert seen[i] == {other: other != name for other in names}  # the others are as they were
        row = table["rows"][i]
        w, q = before[name].double(), quantised[name].double()
        assert row["error"] == pytest.approx(float((w - q).norm() / w.norm()), rel=1e-5)
        assert row["scale"] == pytest.approx(float(q.abs().mean()), rel=1e-5) and row["shape"] == list(
            w.shape
        )
    assert all(torch.equal(weights[name], before[name]) for name in names)


def test_sign_flips_of_layers_add_up(images: tuple[Path, Result]) -> None:
    report = images[1].report
    rows = [row["flips"] for row in report["layers"]["rows"]]
    assert [sum(flips) for flips in zip(*rows, strict=True)] == report["curves"]["sign_flips"]
    assert report["histograms"]["points"] == [0, 1, 2, 3, 4]
    assert {sum(row) for row in report["histograms"]["counts"][1:]} == {
        sum(torch.Size(row["shape"]).numel() for row in report["layers"]["rows"])
    }


def test_tensorboard(patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is continued has each point once, with the values of its report."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, events = tmp_path / "run", tmp_path / "events"
    command = [
        "train",
        "--data",
        str(patterns),
        "--model",
        "mlp",
        "--epochs",
        "3",
        "--optimizer",
        "stam",
        "--quiet",
    ]
    command += ["--out", str(out), "--tensorboard", str(events)]
    assert main([*command, "--minutes", "1e-9"]) == 3  # after the first epoch
    assert main([*command, "--resume"]) == 0
    assert len(list(events.iterdir())) == 2
    found = EventAccumulator(str(events), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    report = json.loads((out / "report.json").read_text())
    for name, values in report["curves"].items():
        if values == [None] * 3:
            assert name not in found.Tags()["scalars"]
            continue
        points = found.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx([float(value) for value in values])
    histograms = found.Histograms("weights / level")
    assert [point.step for point in histograms] == [0, 1, 2, 3]
    for point, counts in zip(histograms, report["histograms"]["counts"], strict=True):
        assert [count for count in point.histogram_value.bucket if count] == [
            count for count in counts if count
        ]


def test_without_tensorboard(
    patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    command = [
        "train",
        "--data",
        str(patterns),
        "--out",
        str(tmp_path / "run"),
        "--tensorboard",
        str(tmp_path / "t"),
    ]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--tensorboard: needs tensorboard: pip install " in error and "[tensorboard]" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists() and not (tmp_path / "t").exists()


# ------------------------------------------------------------------------------------------------ as a browser draws it

MEASURE = """
const found = [];
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, root = page.documentElement;
  const row = {name: frame.title, width: root.clientWidth, scroll: root.scrollWidth, figures: [], small: [], cut: []};
  for (const figure of page.querySelectorAll("figure")) {
    const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
    const lines = [...svg.querySelectorAll("[clip-path] > path, path[clip-path], image, g[clip-path]")];
    const inked = lines.map(line => line.getBoundingClientRect());
    row.figures.push([box.width, box.height, Math.max(0, ...inked.map(b => Math.max(b.width, b.height)))]);
    for (const label of svg.querySelectorAll("text")) {
      const b = label.getBoundingClientRect();
      if (b.left < box.left - 2 || b.right > box.right + 2 || b.top < box.top - 2 || b.bottom > box.bottom + 2)
        row.cut.push(label.textContent);
    }
  }
  for (const element of page.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const matrix = element.ownerSVGElement ? element.getScreenCTM() : {a: 1, b: 0};
    const scale = Math.hypot(matrix.a, matrix.b);
    const size = scale * parseFloat(frame.contentWindow.getComputedStyle(element).fontSize);
    if (size < 10) row.small.push([size, element.textContent.slice(0, 40)]);
  }
  found.push(row);
}
console.error("the console is read");
document.body.textContent = "measured " + JSON.stringify(found) + " end";
"""
SPOILED = (
    '<div style="width: 900px; font-size: 9px">small</div><figure><svg viewBox="0 0 300 190" width="300">'
    '<text x="290" y="20" style="font-size: 20px">cut off</text></svg></figure>'
)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser(images: tuple[Path, Result], language: Path, sweep: Path, tmp_path: Path) -> None:
    pages = {
        "run": made(images[0]),
        "language model": made(language),
        "sweep": made(sweep),
        "spoiled": SPOILED,
    }
    frames = "".join(
        f'<iframe title="{name}" style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(contents)}">'
        "</iframe>"
        for name, contents in pages.items()
        for width in (400, 1400)
    )
    script = f"<script>addEventListener('load', () => {{ {MEASURE} }})</script>"
    file = tmp_path / "frames.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8">{script}{frames}', encoding="utf-8")
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    switches += "disable-component-update disable-sync hide-scrollbars dump-dom enable-logging=stderr "
    switches += f"user-data-dir={tmp_path / 'profile'}"
    command = [str(BROWSER), *(f"--{switch}" for switch in switches.split()), file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = re.findall(r"CONSOLE.*", done.stderr)
    assert len(said) == 1 and "the console is read" in said[0], said
    measured = re.search(r"measured (\[.*\]) end", done.stdout, re.DOTALL)
    assert measured is not None, done.stdout[-2000:]
    rows = json.loads(html.unescape(measured[1]))
    assert [(row["name"], row["width"]) for row in rows] == [(name, w) for name in pages for w in (400, 1400)]
    for row in rows[-2:]:  # what is to be found is found
        assert row["small"] and row["cut"] and row["figures"] == [[300, 190, 0]]
    assert rows[-2]["scroll"] > 400
    for row in rows[:-2]:
        assert row["scroll"] == row["width"], row
        assert row["small"] == [] and row["cut"] == [], row
        assert len(row["figures"]) > 6, row
        for width, height, inked in row["figures"]:
            assert 300 < width < 700 and height > 150 and inked > 50, row
