"""The table of bench/memory.py: what docs/memory.md shows is what was measured, and what it is now."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def memory() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("memory")
    sys.path.remove(str(ROOT / "bench"))
    sys.modules.pop("memory")


def test_the_page_has_the_table_of_the_results(memory: Any) -> None:
    rows = json.loads(memory.RESULTS.read_text())["rows"]
    assert memory.table(rows) in (ROOT / "docs/memory.md").read_text()
    named = {(r["optimizer"], r["dtype"]) for r in rows}
    assert {(name, str(dtype).removeprefix("torch.")) for name, dtype, _ in memory.OURS} <= named


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("AskewAdam(memory=True), bfloat16 moments", "bfloat16"),
        ('AskewSGD(base="muon")', "bfloat16"),
        ("BinaryConnect", "float32"),
    ],
)
def test_optimizers_keep_what_the_results_say(memory: Any, name: str, dtype: str) -> None:
    make, of_dtype = next((m, d) for n, d, m in memory.OURS if n == name and str(d).endswith(dtype))
    rows = json.loads(memory.RESULTS.read_text())["rows"]
    expected = next(r for r in rows if (r["optimizer"], r["dtype"]) == (name, dtype))
    assert memory.labelled(name, of_dtype) | memory.measured(make, of_dtype) == expected


def test_a_peer_that_does_not_work_says_why(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("has no kernels\nhere")

    monkeypatch.setattr(memory, "PEERS", [("A", "torch", broken), ("B", "no_such_module", broken)])
    rows = memory.peer_rows()
    assert [r["why"] for r in rows[:2]] == [
        "RuntimeError: has no kernels",
        "no_such_module is not installed",
    ]
    assert "| A | | | | | RuntimeError: has no kernels |" in memory.table(rows)
