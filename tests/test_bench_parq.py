"""What bench/parq.py tries, keeps and says, without torchao."""

import dataclasses
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def parq(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("parq")


def with_best(rate: float, seen: list[Any]) -> Any:
    """A stand-in for the training, best at a rate and at the largest steepness."""

    def trained(run: Any, _: Any) -> dict[str, Any]:
        seen.append(run)
        accuracy = 90 - abs(math.log(run.lr / rate)) + run.steepness / 1e3
        return {"run": dataclasses.asdict(run), "accuracy": accuracy, "loss": 1.0, "seconds": 0.0}

    return trained


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (0.3, [0.1, 0.3, 1.0]),
        (1.0, [0.1, 0.3, 1.0, 3.0]),
        (1e-9, [0.1 / 9, 0.1 / 3, 0.1, 0.3, 1.0]),
    ],
)
def test_rates_go_on_while_an_end_is_best(
    parq: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, best: float, expected: list[float]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(parq, "trained", with_best(best, seen))
    sweep = parq.Sweep(None, tmp_path)
    tried = sweep.tried(parq.DIGITS[0], "askew")
    assert sorted(run.lr for run in tried) == pytest.approx(expected)
    assert parq.chosen(tried).lr == pytest.approx(min(expected, key=lambda lr: abs(math.log(lr / best))))
    assert all(run.held_out and run.seed == 0 for run in seen)
    assert sweep.tried(parq.DIGITS[0], "askew") == tried and len(seen) == len(expected)  # read, not trained


def test_the_steepness_is_tried_at_the_best_rate(
    parq: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parq, "trained", with_best(0.06, []))
    tried = parq.Sweep(None, tmp_path).tried(parq.DIGITS[0], "parq")
    assert {run.steepness for run in tried if run.lr == 0.06} == set(parq.STEEPNESS)
    assert parq.chosen(tried).steepness == max(parq.STEEPNESS)


def test_runs_of_another_kind_are_refused(parq: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parq, "trained", with_best(0.3, []))
    parq.Sweep(None, tmp_path).tried(parq.DIGITS[0], "askew")
    longer = dataclasses.replace(parq.DIGITS[0], epochs=99)
    with pytest.raises(SystemExit, match="of another run"):
        parq.Sweep(None, tmp_path).tried(longer, "askew")


def test_what_a_run_leaves_is_counted(parq: Any) -> None:
    runs = importlib.import_module("parq_runs")
    rows = torch.tensor([[1.0, -1.0, 1.0 + 1e-7], [2.0, -2.0, 2.0]])
    assert runs.most_levels(rows, of_rows=True) == 2
    assert runs.most_levels(rows, of_rows=False) == 4
    p = torch.zeros(4)
    state = {"latent": torch.zeros(4), "step": 3, "signs": torch.zeros(9, dtype=torch.uint8)}
    assert runs.state_bytes(SimpleNamespace(state={p: state})) == 16  # metrics() made the signs


def test_the_table_says_what_is_behind_float(parq: Any) -> None:
    if not parq.RESULTS.is_file():
        pytest.skip("no results yet")
    rows = json.loads(parq.RESULTS.read_text())["accuracy"]["rows"]
    lines = parq.accuracy_table(rows).splitlines()
    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, lines[1:], strict=True):
        float_mean = next(r["mean"] for r in rows if (r["task"], r["method"]) == (row["task"], "sgd"))
        assert f"{float_mean - row['mean']:7.2f}" in line
        assert (row["method"] in parq.PARQ) == ("torchao_convert" in line)
