"""Recipes x seeds: rows, figure, cut and continued."""

import json
import shutil
from pathlib import Path

import pytest

from quantopt.train import cli, report, sweep
from quantopt.train.arguments import given, passed_on
from quantopt.train.config import OPTIONS
from quantopt.train.errors import OUT_OF_TIME
from training_data import write_patterns

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


@pytest.fixture
def arguments(patterns, tmp_path):
    common = ["--data", str(patterns), "--device", "cpu", "--model", "mlp", "--epochs", "2"]
    return [*common, "--out", str(tmp_path / "out")]


def test_sweep_cut_and_continued(tmp_path, arguments, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["sweep", "stam", "luq", "--seeds", "2", *arguments]
    assert cli.main([*command, "--minutes", "1e-9"]) == OUT_OF_TIME  # no run is begun
    assert not (out / "accuracy.json").exists()
    train = ["train", "--quiet", "--recipe", "stam", "--resume", *arguments[:-1], str(out / "stam-0")]
    assert cli.main([*train, "--minutes", "1e-6"]) == OUT_OF_TIME
    assert (out / "stam-0" / "checkpoint.pt").exists() and not (out / "stam-0" / "report.json").exists()
    assert "unfinished: stam-0, stam-1, luq-0, luq-1" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # runs that are finished are not started again
        patch.setattr(report, "save_figure", lambda figure, path: path.touch())
        for seed in ("0", "1"):
            luq = ["--recipe", "luq", "--seed", seed, "--quiet", *arguments[:-1], str(out / f"luq-{seed}")]
            assert cli.main(["train", *luq]) == 0
    assert cli.main([*command, "--jobs", "2"]) == 0
    results = json.loads((out / "accuracy.json").read_text())
    assert {"device", "date", "commit", "versions", "threads"} < set(results) and results[
        "data"
    ] == "patterns"
    rows = results["rows"]
    keys = {"model", "optimizer", "bits", "seeds", "mean", "std", "packed_mean", "epochs", "device"}
    assert all(keys <= set(row) for row in rows)
    assert [(row["optimizer"], row["bits"], row["seeds"], row["epochs"]) for row in rows] == [
        ("stam", 1, 2, 2),
        ("luq", 4, 2, 2),
    ]
    reports = [json.loads((out / f"stam-{seed}" / "report.json").read_text()) for seed in (0, 1)]
    a, b = (run["accuracy_quantized"] for run in reports)
    assert rows[0]["mean"] == pytest.approx((a + b) / 2) and rows[0]["std"] == pytest.approx(
        abs(a - b) / 2**0.5
    )
    packed = [run["accuracy_packed"] for run in reports]
    assert rows[0]["packed_mean"] == pytest.approx(sum(packed) / 2) and rows[1]["packed_mean"] is None
    assert rows[0]["packed_difference"] == max(abs(packed[0] - a), abs(packed[1] - b))
    assert rows[0]["speedup"] > 0 and rows[0]["bytes_float"] > rows[0]["bytes_packed"] > 0
    assert (out / "curves.png").stat().st_size > 5000
    monkeypatch.setattr(report, "save_figure", lambda figure, path: path.touch())
    before = (out / "stam-1" / "checkpoint.pt").stat().st_mtime_ns
    assert cli.main(command) == 0  # nothing is left to do
    assert (out / "stam-1" / "checkpoint.pt").stat().st_mtime_ns == before
    reports[0]["config"]["lr"] = 7.0
    (out / "stam-0" / "report.json").write_text(json.dumps(reports[0]))
    capsys.readouterr()
    assert cli.main(command) == 2
    line = capsys.readouterr().err
    assert f"--out: {out / 'stam-0' / 'report.json'} is of another run: lr is 7.0 in the report and " in line


@pytest.mark.usefixtures("blank_figures")
def test_a_sweep_does_not_take_up_results_of_other_settings_or_data(patterns, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--device", "cpu", "--model", "mlp", "--epochs", "1", "--out", str(out)]
    command = ["sweep", "stam", "--seeds", "1", *options]
    run = ["train", "--quiet", "--recipe", "stam", "--data", str(patterns), *options[:-1]]
    assert cli.main([*run, str(out / "stam-0")]) == 0
    other = write_patterns(tmp_path / "other", train=120)
    copy = shutil.copytree(patterns, tmp_path / "copy")
    for more, message in (
        (["--data", str(other)], "fingerprint is "),
        (["--data", str(patterns), "--epochs", "2"], "epochs is 1 in the report and 2 now"),
        (["--data", str(patterns), "--limit", "40"], "limit is None in the report and 40 now"),
        (["--data", str(tmp_path / "nothing")], "--data: "),
    ):
        capsys.readouterr()
        assert cli.main([*command, *more]) == 2
        assert message in capsys.readouterr().err and not (out / "accuracy.json").exists()
    assert cli.main([*command, "--data", str(copy)]) == 0  # the same images
    assert json.loads((out / "accuracy.json").read_text())["data"] == "patterns"
    (out / "stam-0").rename(out / "stam-1")
    assert cli.main([*command, "--data", str(patterns), "--seeds", "2", "--minutes", "1e-9"]) == 2
    assert "seed is 0 in the report and 1 now" in capsys.readouterr().err


def test_every_option_of_a_sweep_reaches_its_runs(patterns):
    options = ["--data", patterns, "--model", "mlp", "--epochs", 2, "--batch-size", 8, "--limit", 40]
    options += ["--validation", 20, "--device", "cpu", "--channels-last", "--no-compile", "--cuda-graph"]
    parser = cli._parser()
    swept = parser.parse_args(["sweep", "stam", "--out", "out", *map(str, options)])
    trained = parser.parse_args(["train", *passed_on(swept, "sweep")])
    expected = given(swept)
    assert set(expected) == {name for name, option in OPTIONS.items() if "sweep" in option.commands}
    assert {name: given(trained)[name] for name in expected} == expected


def test_bad_sweeps(tmp_path, arguments, capsys):
    assert cli.main(["sweep", "nothing", *arguments]) == 2
    assert "--recipe: nothing is neither" in capsys.readouterr().err
    assert cli.main(["sweep", "stam", "stam", *arguments]) == 2
    assert "would share the directory" in capsys.readouterr().err
    assert (
        cli.main(["sweep", "stam", "--seeds", "1", *arguments, "--model", "vgg11"]) == 1
    )  # each run says why


def test_the_table_aligns():
    run = {
        "config": {
            **{"model": "cnn", "optimizer": "sgd", "bits": 0, "activations": 0, "epochs": 3},
            **{"limit": None, "validation": None},
        },
        "curves": {},
        "accuracy_latent": 90.0,
        "accuracy_packed": None,
        "device": "cpu",
        "bytes_float": None,
        "bytes_packed": None,
    }
    row = sweep.row([run])
    assert row["mean"] == 90 and row["std"] == 0
    packed = {"packed_mean": 89.5, "bits": "ternary", "bytes_float": 99, "bytes_packed": 9, "speedup": 12.3}
    lines = sweep.table({"sgd": row, "resnet18-askew-adam-ternary": {**row, **packed}}).splitlines()
    assert "11.0x" in lines[2] and "12.30x" in lines[2]
    assert len({len(line) for line in lines}) == 1


@pytest.fixture
def warm(tmp_path):
    """Recipes in files: one that starts from the runs of another."""
    names = {}
    for name, text in {
        "float": 'base = "sgd"\nepochs = 4\n',
        "warm": 'base = "proxquant"\nwarm_start = "float"\nprojected_at = [0.3]\ntest_every = 2\n',
    }.items():
        names[name] = tmp_path / f"{name}.toml"
        names[name].write_text(f'{text}model = "mlp"\n')
    return {name: str(path) for name, path in names.items()}


def test_warm_start(patterns, tmp_path, warm, monkeypatch, capsys):
    out = tmp_path / "out"
    options = ["--data", str(patterns), "--device", "cpu", "--epochs", "4", "--out", str(out)]
    command = ["sweep", warm["warm"], warm["float"], "--seeds", "2", "--jobs", "3", *options]
    assert cli.main(command) == 0
    reports = {
        f"{name}-{seed}": json.loads((out / f"{name}-{seed}" / "report.json").read_text())
        for name in warm
        for seed in (0, 1)
    }
    for seed in (0, 1):
        run = reports[f"warm-{seed}"]
        assert run["config"]["init"] == str(out / f"float-{seed}") and run["config"]["seed"] == seed
        # It begins where the other ended, not with random weights.
        assert run["curves"]["loss"][0] < reports[f"float-{seed}"]["curves"]["loss"][0] / 2
        projected = run["curves"]["projected_accuracy"]
        assert [value is None for value in projected] == [
            False,
            True,
            True,
            False,
        ]  # 0.3 of 4 epochs, and the end
    rows = {row["recipe"]: row for row in json.loads((out / "accuracy.json").read_text())["rows"]}
    assert rows["float"]["gap"] == 0 and rows["float"]["projected"] == []
    assert rows["warm"]["gap"] == pytest.approx(rows["float"]["mean"] - rows["warm"]["mean"])
    assert rows["warm"]["values"] == [reports[f"warm-{seed}"]["accuracy_quantized"] for seed in (0, 1)]
    at = [reports[f"warm-{seed}"]["curves"]["projected_accuracy"][0] for seed in (0, 1)]
    first, last = rows["warm"]["projected"]
    assert (first["epoch"], last["epoch"]) == (1, 4) and first["mean"] == pytest.approx(sum(at) / 2)
    out.rename(tmp_path / "moved")  # a place that another recipe gave may be another
    monkeypatch.setattr(report, "save_figure", lambda figure, path: path.touch())
    assert cli.main([*command[:-1], str(tmp_path / "moved"), "--minutes", "1e-9"]) == 0


def test_bad_warm_starts(patterns, tmp_path, warm, capsys):
    out = tmp_path / "out"
    options = ["--data", str(patterns), "--device", "cpu", "--epochs", "1", "--out", str(out)]
    assert cli.main(["sweep", warm["warm"], *options]) == 2
    assert "RECIPES: warm starts from the runs of float: name that recipe too" in capsys.readouterr().err
    chained = tmp_path / "chained.toml"
    chained.write_text('base = "askew"\nwarm_start = "warm"\n')
    assert cli.main(["sweep", str(chained), *warm.values(), *options]) == 2
    assert "chained starts from warm, which starts from float itself" in capsys.readouterr().err
    assert cli.main(["train", "--quiet", "--recipe", warm["warm"], *options]) == 2
    assert "--init: is needed: this recipe starts from a run of float" in capsys.readouterr().err
    # Where the other recipe's run fails, the one that waits for it is not begun.
    Path(warm["float"]).write_text('base = "sgd"\nmodel = "vgg11"\n')
    assert cli.main(["sweep", *warm.values(), "--seeds", "1", *options]) == 1
    assert "unfinished: float-0, warm-0" in capsys.readouterr().err and not (out / "warm-0").exists()
