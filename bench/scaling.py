"""Our own time with one thread against that with several, from rows of both."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import common
import targets
from amx_gate import Seconds

PEER = "itself with 1 thread"
Row = Mapping[str, Any]


def rows(measured: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each case that was measured with one thread and with more; of a sweep, the geometric mean."""
    single = {case: row for case, row in _by_case(measured) if row["threads"] == 1}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for case, row in _by_case(measured):
        threads = row["threads"]
        if threads == 1 or case not in single or (case, threads) in found:
            continue
        target = targets.TWO_THREADS if threads == 2 else None
        found[case, threads] = {**_row(case, row, single[case], target), "threads": threads}
    return list(found.values())


def _by_case(measured: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Rows that have a time of ours or, as a sweep, rows of such."""
    for row in measured:
        if "shapes" in row or ("ours_ms" in row and not row.get("of_sweep")):
            yield row["case"], row


def _row(case: str, several: Row, single: Row, target: float | None) -> dict[str, Any]:
    if "shapes" not in several:
        return common.row(case, PEER, _ours(several), _ours(single), target)
    of_single = {row["case"]: row["ours_ms"] for row in single["shapes"]}
    ratio = statistics.geometric_mean(of_single[row["case"]] / row["ours_ms"] for row in several["shapes"])
    ok = None if target is None else ratio >= target
    return {"case": case, "peer": PEER, "ratio": ratio, "target": target, "ok": ok}


def _ours(row: Row) -> Seconds:
    return Seconds(row["ours_ms"] / 1e3, row.get("fast", (None,))[0], row.get("modes", (None,))[0])
