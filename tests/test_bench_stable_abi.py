"""docs/stable-abi.md has the tables of bench/results/stable-abi.json."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_has_the_tables_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("stable_abi")
    result = json.loads(bench.RESULTS.read_text())
    page = (ROOT / "docs/stable-abi.md").read_text()
    assert bench.table(result["rows"]) in page
    assert bench.facts(result) in page
    for row in result["rows"]:  # the columns that the decision follows from
        ns = row["ns"]
        assert row["ported_ns"] == pytest.approx(ns["operator"] + ns["stable"] - ns["full"])
