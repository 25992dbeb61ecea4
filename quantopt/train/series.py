"""The curves of a run in metrics.csv, and where their points lie."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantopt.files import atomic_write
from quantopt.train.errors import writing

METRICS_CSV = "metrics.csv"


def positions(count: int, every: int, last: int) -> list[int]:
    """The `count` epochs or steps at which a curve has a point: each multiple of `every`, and the `last`."""
    return [min((i + 1) * every, last) for i in range(count)]


def write_csv(path: Path, unit: str, at: list[int], curves: Mapping[str, list[Any]]) -> None:
    """A row for each point of the curves: `unit` (its epoch or step, of `at`), then a column for each curve, empty
    where it has no value. Atomically."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([unit, *curves])
    rows.writerows(zip(at, *curves.values(), strict=True))
    with writing(path):
        atomic_write(path, lambda file: file.write_text(text.getvalue(), encoding="utf-8"))
