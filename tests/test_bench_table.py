"""The tables of bench/gemm_cuda.py and bench/gemm.py, from made-up measurements, and the peers of bench/step.py."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
CONTENDERS = (
    "int8",
    "exact",
    "Triton int8",
    "Triton exact",
    "torch bf16",
    "torch int8",
    "GemLite A16W1",
    "GemLite A8W1",
)


MODULES = tuple(path.stem for path in BENCH.glob("*.py"))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:
        sys.modules.pop(name, None)
    yield importlib.import_module("gemm_cuda")
    for name in MODULES:  # other tests replace parts of their own
        sys.modules.pop(name, None)


def test_ratios_and_targets(bench: Any) -> None:
    seconds = {name: 1e-6 * (i + 1) for i, name in enumerate(CONTENDERS)}
    for m, shape in bench.CASES:
        rows = {(r["case"], r["peer"]): r for r in bench.rows_of(m, shape, seconds, {}, 4e12)}
        case = f"M={m} {shape[0]}x{shape[1]}"
        assert rows[f"{case} int8", "torch bf16"]["ratio"] == pytest.approx(5)
        assert rows[f"{case} exact", "GemLite A16W1"]["ratio"] == pytest.approx(7 / 2)
        assert rows[f"{case} Triton int8", "our CUDA int8"]["ratio"] == pytest.approx(1 / 3)
        assert rows[f"{case} Triton int8", "our CUDA int8"]["ok"] is False
        assert (rows[f"{case} int8", "torch bf16"]["ok"] is True) == (bench.TARGETS[m, shape, "int8"] <= 5)
        assert len(rows) == (9 if m == 1 else 7)
    share = [r for r in bench.rows_of(1, (28672, 8192), seconds, {}, 4e12) if "bytes" in r["case"]]
    assert [r["ratio"] for r in share] == pytest.approx(
        [28672 * 1024 / 1e-6 / 4e12, 28672 * 1024 / 2e-6 / 4e12]
    )


def test_what_failed_or_is_not_there_has_rows(bench: Any) -> None:
    left = {
        "GemLite A16W1": bench.Left("not installed", "pip install gemlite"),
        "GemLite A8W1": bench.Left("not installed", "pip install gemlite"),
        "int8": bench.Left("failed", "RuntimeError: made up"),
    }
    seconds = {name: 1e-6 for name in CONTENDERS if name not in left}
    rows = list(bench.rows_of(1, (28672, 8192), seconds, left, 4e12))
    by = {(r["case"].split(" ", 2)[2], r["peer"]): r for r in rows}
    assert len(rows) == 9
    assert (
        by["exact", "GemLite A16W1"]["status"] == "not installed"
        and by["exact", "GemLite A16W1"]["ok"] is None
    )
    assert by["int8", "torch bf16"]["status"] == "failed" and by["int8", "torch bf16"]["ok"] is False
    assert by["Triton int8", "our CUDA int8"]["status"] == "failed"
    assert by["exact", "torch bf16"]["ratio"] == 1 and by["Triton exact", "our CUDA exact"]["ok"] is True
    text = bench.common.table(rows)
    assert text.count("not installed") == 1 and text.count("failed") == 5


def test_a_failure_ends_the_run_after_its_table(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = bench.common.row("M=1", "torch bf16", 1e-6, 2e-6, 1.5)
    bad = bench.common.missing("M=2", "torch int8", "failed", "RuntimeError: made up")
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda: "Made Up")
    monkeypatch.setattr(bench.backends, "choose", lambda *_: bench.backends.Choice("cuda", "made up"))
    monkeypatch.setattr(bench.common, "header", lambda *_: {"device": "made up", "commit": ""})
    path = tmp_path / "gemm.json"
    arguments = bench.argparse.Namespace(json=str(path), min_time=0.0, only=None, threads=1)
    monkeypatch.setattr(bench, "products", lambda _: iter([bad, good]))
    with pytest.raises(SystemExit, match="M=2, torch int8: RuntimeError: made up"):
        bench.main(arguments)
    written = json.loads(path.read_text())["rows"]
    assert [r["case"] for r in written] == ["M=2", "M=1"]
    assert '"fall short": 0, "failed": 1' in capsys.readouterr().out
    monkeypatch.setattr(bench, "products", lambda _: iter([good]))
    bench.main(arguments)


def test_rows_of_several_thread_counts(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gemm = importlib.import_module("gemm")
    used: list[int] = []

    def part(_: Any) -> list[dict[str, object]]:
        used.append(bench.torch.get_num_threads())
        return [bench.common.row("M=1", "torch bf16", 1e-6, 2e-6, 1.5)]

    monkeypatch.setattr(gemm, "PARTS", {"linear": part})
    path, before = tmp_path / "gemm.json", bench.torch.get_num_threads()
    try:
        for given in (["2"], ["1", "2"]):
            monkeypatch.setattr(sys, "argv", ["gemm.py", "--json", str(path), "--threads", *given])
            gemm.main()
            result = json.loads(path.read_text())
            assert result["threads"] == 2
            assert [row["threads"] for row in result["rows"]] == [*map(int, given), *[2] * (len(given) - 1)]
        assert (result["rows"][-1]["peer"], result["rows"][-1]["ok"]) == ("itself with 1 thread", False)
    finally:
        bench.torch.set_num_threads(before)
    assert used == [2, 1, 2]
    single, several = capsys.readouterr().out.split("ratio", 1)[1].split("ratio")
    assert "M=1, 1 thread " in several and "M=1, 2 threads" in several and "M=1, " not in single


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peer_that_moves_no_weight_is_seen(
    bench: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = importlib.import_module("step")
    params = step.parameters([(33, 65), (7,)], dtype)
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True)
    assert step.fault(sgd, params) is None
    adam = torch.optim.Adam(params, lr=1e-3, fused=True)
    assert step.fault(adam, params) is None
    monkeypatch.setattr(sgd, "step", lambda: None)
    assert "right for" in str(step.fault(sgd, params))
