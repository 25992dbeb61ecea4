"""What the benchmarks share: interleaved medians, the table, the JSON report."""

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from amx_gate import LEAST_FAST, Gate, Seconds, gate_of_processor, median

from quantopt.train.environment import header


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    min_time: float = 0.5,
    repeat: int = 7,
    warmup: int = 2,
    gate: Gate | None = None,
) -> dict[str, Seconds]:
    """Median seconds of one call of each function.

    The functions take turns, so that a change in the machine's speed falls on all of them: at least ``repeat`` rounds,
    and more until ``min_time`` seconds per function have passed. Each turn begins with calls that are not timed, for
    20 ms or at least one: the caches then hold what this function uses, not what the one before it did (a third-level
    cache takes tens of passes to settle). A call of 0.2 s and more needs none. Calls under 3 ms are timed in bunches.

    With a ``gate`` (bench/amx_gate.py) a sample is of the fast mode if the gate says so before and after it, and the
    medians are taken of such samples. While a function has too few, there are more rounds, for at most twice
    ``min_time`` more.
    """
    bunch: dict[str, int] = {}
    warm: dict[str, int] = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        start = time.perf_counter()
        function()
        seconds = max(time.perf_counter() - start, 1e-7)
        bunch[name] = max(1, min(1000, round(3e-3 / seconds)))
        warm[name] = max(1, min(1000, round(2e-2 / seconds))) if seconds < 0.2 else 0
    times: dict[str, list[float]] = {name: [] for name in functions}
    fast: dict[str, list[bool]] = {name: [] for name in functions}
    begin = time.perf_counter()
    rounds = 0

    def wanted() -> bool:
        passed = time.perf_counter() - begin
        if rounds < repeat or (passed < min_time * len(functions) and rounds < 10_000):
            return True
        few = gate is not None and any(sum(modes) < LEAST_FAST for modes in fast.values())
        return few and passed < 3 * min_time * len(functions)

    while wanted():
        for name, function in functions.items():
            for _ in range(warm[name]):
                function()
            count = bunch[name]
            before = gate is None or gate()
            start = time.perf_counter()
            for _ in range(count):
                function()
            times[name].append((time.perf_counter() - start) / count)
            fast[name].append(before and (gate is None or gate()))
        rounds += 1
    return {name: median(times[name], fast[name] if gate else None) for name in functions}


def compare_products(functions: Mapping[str, Callable[[], object]], **options: Any) -> dict[str, Seconds]:
    """:func:`compare` with the gate of this processor, for what may run on AMX tiles."""
    return compare(functions, gate=gate_of_processor(), **options)


def row(
    case: str, peer: str, ours: float, theirs: float, target: float | None = None, **more: Any
) -> dict[str, Any]:
    """One comparison: ``ratio`` = theirs / ours in seconds (how many times faster we are), ``ok`` = ratio >= target.

    Of seconds from a gate the row has the ``modes``, ours and theirs, ``fast``, the shares of samples in the fast mode,
    and the ``mode`` of the comparison, "mixed" unless both are of one.
    """
    ratio = theirs / ours
    gated = [s for s in (ours, theirs) if isinstance(s, Seconds) and s.mode is not None]
    if len(gated) == 2:
        modes = [s.mode for s in gated]
        mode = modes[0] if modes[0] == modes[1] else "mixed"
        more = {"mode": mode, "modes": modes, "fast": [s.fast for s in gated], **more}
    return {
        "case": case,
        "peer": peer,
        "ratio": ratio,
        "target": target,
        "ok": None if target is None else ratio >= target,
        "ours_ms": ours * 1e3,
        "peer_ms": theirs * 1e3,
        **more,
    }


def missing(case: str, peer: str, status: str, why: str, target: float | None = None) -> dict[str, Any]:
    """A comparison that was not made: ``status`` ("failed" or "not installed") stands for the ratio."""
    ok = False if status == "failed" else None
    return {
        "case": case,
        "peer": peer,
        "ratio": None,
        "target": target,
        "ok": ok,
        "status": status,
        "why": why,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text: case, peer, both times, ratio, target, and pass or fall short.

    Where there are modes of the processor, of each row its mode and the smaller share of samples in the fast one.
    """
    gated = any("mode" in r for r in rows)
    header = ["case", "peer", "ours ms", "peer ms", "ratio", "target", *(["AMX mode"] if gated else []), ""]
    several = len({r.get("threads") for r in rows}) > 1
    lines = [
        [
            f"{r['case']}, {r['threads']} thread{'s' * (r['threads'] > 1)}"
            if several and "threads" in r
            else str(r["case"]),
            str(r["peer"]),
            f"{r['ours_ms']:.3f}" if "ours_ms" in r else "",
            f"{r['peer_ms']:.3f}" if "peer_ms" in r else "",
            f"{r['ratio']:.2f}" if r["ratio"] is not None else "",
            "" if r["target"] is None else f"{r['target']:g}",
            *([f"{r['mode']} {min(r['fast']):4.0%}" if "mode" in r else ""] if gated else []),
            f"{r['status']}: {r['why']}"
            if "status" in r
            else {True: "pass", False: "falls short", None: ""}[r["ok"]],
        ]
        for r in rows
    ]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    text = []
    for line in [header, *lines]:
        cells = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line[:-1], widths, strict=False))
        ]
        text.append("  ".join([*cells, line[-1]]).rstrip())
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def write_json(
    rows: Sequence[Mapping[str, Any]], json_path: str | None, threads: int, *, device: str = "cpu"
) -> dict[str, Any]:
    """Device, date, commit, versions, threads (the most) and rows, written to ``json_path`` if there is one."""
    result = {**header(device, threads), "rows": [dict(r) for r in rows]}
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n")
    return result


def results_path(kind: str) -> str:
    """bench/results/<kind>-<name of the GPU>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return str(Path(__file__).resolve().parent / "results" / f"{kind}-{name}.json")


def report(
    rows: Sequence[Mapping[str, Any]], json_path: str | None, threads: int, *, device: str = "cpu"
) -> dict[str, Any]:
    """Prints the table of the rows, and writes them as :func:`write_json` does."""
    result = write_json(rows, json_path, threads, device=device)
    print(f"{result['device']}; torch {torch.__version__}; threads: {threads}; commit {result['commit']}")
    print(table(rows))
    return result


def parser(description: str, *, several: bool = False) -> argparse.ArgumentParser:
    """--json, --threads (with ``several``: a list), --min-time."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--json", metavar="FILE", help="also write the results there")
    if several:
        help_text = "threads for all; of several numbers, each has its rows (default: 1)"
        result.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help=help_text)
    else:
        result.add_argument("--threads", type=int, default=1, help="threads for all (default: 1)")
    result.add_argument(
        "--min-time", type=float, default=0.5, help="seconds per timed function (default: 0.5)"
    )
    return result
