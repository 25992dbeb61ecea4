"""What bench/ takes medians of, which targets it compares with, the rows it derives, and what it says of peers."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import quantopt

BENCH = Path(__file__).resolve().parent.parent / "bench"
MODULES = tuple(path.stem for path in BENCH.glob("*.py"))
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:
        sys.modules.pop(name, None)
    yield importlib.import_module
    for name in MODULES:  # other tests replace parts of their own
        sys.modules.pop(name, None)


# ---- the gate ----


@pytest.mark.parametrize(
    ("fast", "expected", "mode", "share"),
    [
        ((True, False, True, False, True), 2.0, "fast", 0.6),  # of 1, 2, 3
        ((True, False, False, False, True), 3.0, "mixed", 0.4),  # too few: of all
        ((False,) * 5, 3.0, "slow", 0.0),
        ((True,) * 5, 3.0, "fast", 1.0),
        (None, 3.0, None, None),
    ],
)
def test_median_of_the_fast_samples(
    load: Load, fast: tuple[bool, ...] | None, expected: float, mode: str | None, share: float | None
) -> None:
    seconds = (
        (1.0, 9.0, 2.0, 8.0, 3.0) if mode in ("fast", "mixed") and share != 1 else (1.0, 2.0, 3.0, 4.0, 5.0)
    )
    found = load("amx_gate").median(seconds, fast)
    assert (float(found), found.mode, found.fast) == (expected, mode, share)


@pytest.fixture
def clock(load: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/common.py with a clock that goes on by a millisecond at each look."""
    common = load("common")
    looks = iter(range(10**6))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(looks) / 1000)
    return common


def test_a_sample_is_fast_if_the_gate_says_so_before_and_after(clock: ModuleType) -> None:
    answers = iter([True, False] * 500)  # before, after
    found = clock.compare({"f": lambda: None}, min_time=0.05, gate=lambda: next(answers))["f"]
    assert (found.mode, found.fast) == ("slow", 0)
    found = clock.compare({"f": lambda: None}, min_time=0.05, gate=lambda: True)["f"]
    assert (found.mode, found.fast) == ("fast", 1)
    assert clock.compare({"f": lambda: None}, min_time=0.05)["f"].mode is None


def test_more_rounds_while_too_few_samples_are_fast(clock: ModuleType) -> None:
    calls: list[bool] = []

    def gate(slow: int) -> bool:
        calls.append(len(calls) >= slow)  # a slow sample asks once
        return calls[-1]

    enough = clock.compare({"f": lambda: None}, min_time=0.05, gate=lambda: gate(0))["f"]
    rounds = len(calls) // 2
    assert enough.mode == "fast"
    calls.clear()
    late = clock.compare({"f": lambda: None}, min_time=0.05, gate=lambda: gate(rounds + 5))["f"]
    assert (late.mode, late.fast) == ("fast", 3 / (rounds + 5 + 3))
    calls.clear()
    never = clock.compare({"f": lambda: None}, min_time=0.05, gate=lambda: gate(10**6))["f"]
    assert (never.mode, never.fast) == ("slow", 0) and rounds + 5 < len(calls) < 4 * rounds


def test_rows_say_the_mode(load: Load) -> None:
    common, seconds = load("common"), load("amx_gate").Seconds
    fast, mixed, plain = seconds(1.0, 0.9, "fast"), seconds(2.0, 0.1, "mixed"), seconds(3.0)
    both = common.row("a", "b", fast, seconds(2.0, 0.57, "fast"))
    assert (both["mode"], both["fast"], both["ratio"]) == ("fast", [0.9, 0.57], 2)
    differing = common.row("a", "b", fast, mixed)
    assert (differing["mode"], differing["modes"]) == ("mixed", ["fast", "mixed"])
    assert "mode" not in common.row("a", "b", plain, plain)
    text = common.table([both, common.row("c", "d", 1.0, 2.0, 1.5)])
    assert "AMX mode" in text and "fast  57%" in text and text.endswith("pass")
    assert "AMX mode" not in common.table([common.row("c", "d", 1.0, 2.0)])


def test_the_gate_of_this_processor(load: Load) -> None:
    gate = load("amx_gate")
    measure = gate.cycles()
    if measure is None:
        assert gate.gate_of_processor() is None
        pytest.skip("this processor has no AMX")
    # 16 in the fast mode, which it need not be in; tile products take no less than 8.
    assert 4 < min(measure() for _ in range(20)) < 1000
    assert gate.gate_of_processor()() in (True, False)


# ---- targets ----


def test_targets_are_of_the_processor(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, before = load("targets"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        case = "M=8 int8", "torch int8"
        for isa, expected in {"amx": 5, "avx512vnni": 2.6, "avx512": 2.6, "avx2": None, "": None}.items():
            monkeypatch.setattr(targets, "active_isa", lambda isa=isa: isa)
            assert targets.of(*case) == expected
        monkeypatch.setattr(targets, "active_isa", lambda: "amx")
        assert targets.of(*case, size=1024) is None and targets.of("M=9 int8", "torch int8") is None
        torch.set_num_threads(2)
        assert targets.of(*case) is None
    finally:
        torch.set_num_threads(before)


def test_every_target_is_of_a_row(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    gemm, models, targets, common = map(load, ("gemm", "packed_models", "targets", "common"))
    asked: set[tuple[str, str]] = set()

    def of(case: str, peer: str, size: int = 0) -> float:
        asked.add((case, peer))
        return 1.0

    def measured(functions: dict[str, Any], **_: Any) -> dict[str, float]:
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(targets, "of", of)
    monkeypatch.setattr(common, "compare_products", measured)
    for module, name in ((gemm, "check"), (gemm, "check_peers"), (models, "check")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(models, "networks", lambda *_: (nn.Identity(), nn.Identity()))
    monkeypatch.setattr(gemm, "sweep", functools.partial(gemm.sweep, shapes=2))
    monkeypatch.setattr(gemm, "rotated", functools.partial(gemm.rotated, megabytes=1))
    monkeypatch.setattr(gemm.peers.importlib.util, "find_spec", lambda _: None)
    arguments = gemm.argparse.Namespace(size=128, min_time=0.0)
    with torch.inference_mode():
        rows = [row for part in gemm.PARTS.values() for row in part(arguments)]
    assert set(targets.TARGETS) <= asked
    assert {row["peer"] for row in rows if row.get("status") == "not installed"} == {
        "llama.cpp Q1_0",
        "Litespark",
    }
    assert all(row["ok"] for row in rows if row["target"] is not None and row["ratio"] is not None)


# ---- one thread and two ----


def test_own_speed_with_two_threads(load: Load) -> None:
    common, scaling, seconds = load("common"), load("scaling"), load("amx_gate").Seconds

    def rows(threads: int, ours: float, shapes: tuple[float, ...]) -> list[dict[str, Any]]:
        time = seconds(ours, 0.5, "fast")
        sweep = [common.row(f"shape {i}", "torch int8", s, 1.0) for i, s in enumerate(shapes)]
        found = [
            common.row("M=1", "torch int8", time, seconds(3.0, 1.0, "fast"), 8),
            common.row("M=1", "torch bf16", time, seconds(4.0, 1.0, "slow"), 20),
            common.row(f"only with {threads}", "torch bf16", 1.0, 1.0),
            common.missing("M=2", "Litespark", "not installed", "pip install it"),
            {**sweep[0], "case": "the least", "of_sweep": True},
            {"case": "mean", "peer": "torch", "ratio": 1.0, "target": None, "ok": None, "shapes": sweep},
        ]
        return [{**row, "threads": threads} for row in found]

    measured = [*rows(1, 1.8, (1.0, 8.0)), *rows(2, 1.0, (0.5, 2.0)), *rows(4, 0.5, (1.0, 1.0))]
    of = {(row["case"], row["threads"]): row for row in scaling.rows(measured)}
    assert set(of) == {("M=1", 2), ("M=1", 4), ("mean", 2), ("mean", 4)}
    first = of["M=1", 2]
    assert first["ratio"] == pytest.approx(1.8) and first["ok"] is True
    assert (first["peer"], first["target"]) == ("itself with 1 thread", 1.7)
    assert (first["mode"], first["fast"]) == ("fast", [0.5, 0.5])
    assert of["mean", 2]["ratio"] == pytest.approx(8**0.5) and of["mean", 2]["ok"] is True
    assert of["M=1", 4]["ok"] is None and of["mean", 4]["ok"] is None
    assert scaling.rows(rows(1, 1.0, (1.0,))) == scaling.rows(rows(2, 1.0, (1.0,))) == []


# ---- peers and networks ----


def test_a_peer_that_computes_something_else_has_no_ratio(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = load("peers")
    wrong = {"packed": lambda: torch.zeros(3, 128).numpy()}
    monkeypatch.setattr(peers, "_litespark_functions", lambda *_: wrong)
    (row,) = peers.litespark(128, 3, 0.0)
    assert (row["status"], row["ratio"], row["ok"]) == ("failed", None, False)
    assert row["why"] == "packed is wrong: relative error 1"
    assert "failed: packed is wrong" in load("common").table([row])


def test_deepspeed_is_checked(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, step = load("peers_step"), load("step")
    functions: dict[str, Callable[[], object]] = {}

    def add(make: Callable[[list[nn.Parameter]], Any]) -> list[dict[str, Any]]:
        monkeypatch.setattr(peers, "deepspeed_adam", lambda params, lr: make(params))
        params = step.parameters([(65, 33)], torch.float32)
        return peers.add_deepspeed("case", params, 1e-3, step.fault, functions)

    (row,) = add(lambda _: ("not installed", "pip install deepspeed"))
    assert row["status"] == "not installed"

    class Still(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:
            pass

    (row,) = add(lambda params: Still(params, lr=1e-3))
    assert row["status"] == "failed" and "right for" in row["why"] and not functions
    assert add(lambda params: torch.optim.Adam(params, lr=1e-3)) == [] and set(functions) == {
        "DeepSpeedCPUAdam"
    }


def test_steps_that_differ_are_seen(load: Load) -> None:
    check, tensors = load("peers_step").check_same, [torch.randn(2000), torch.randn(2000)]
    check("same", lambda a, b: a.add_(b), lambda a, b: a.add_(b).mul_(1 + 1e-7), tensors)
    with pytest.raises(SystemExit, match="still: its step is right for"):
        check("still", lambda a, b: None, lambda a, b: a.add_(b), tensors)
    with pytest.raises(SystemExit, match="other: its step is right for"):
        check("other", lambda a, b: a.sub_(b), lambda a, b: a.add_(b), tensors)
    with pytest.raises(
        SystemExit, match="no less: its step is right for 100"
    ):  # too little to see in the values
        check("no less", lambda a, b: None, lambda a, b: a.mul_(1 + 1e-6), tensors)


def test_networks_are_those_of_their_papers(load: Load) -> None:
    for name, parameters, quantised in (("resnet50", 25_557_032, 52), ("vit-s", 22_050_664, 48)):
        model = load("networks").NETWORKS[name]()
        assert sum(p.numel() for p in model.parameters()) == parameters
        table = quantopt.param_groups(model, bits=1).table
        assert sum(row.bits != 0 for row in table) == quantised
