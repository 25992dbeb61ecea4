"""`quantopt report`: what runs measured as one page of HTML, to look at and to pass on.

The page opens offline and has everything in itself: its style, figures as SVG, and the bins of the histograms as images
in `data:` URLs. It needs no JavaScript and has none; a policy in its head lets a browser load nothing.
"""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantopt.files import atomic_write
from quantopt.train.directory import PAGE
from quantopt.train.errors import InputError, require, writing
from quantopt.train.page import html, runs


def write(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of the runs in `directories`: of each the run in it, or those in its subdirectories (a sweep).

    out: the file; None: report.html in the directory, of several directories in the working directory. Returns it.
    Raises InputError if a directory holds no run, one cannot be read or is given twice, or the file cannot be
    written."""
    found = [(place, run) for place in directories for run in runs.find(place)]
    seen: dict[Path, Path] = {}
    for _, run in found:
        resolved = run.directory.resolve()
        if resolved in seen:
            raise InputError(
                "DIR", f"the run in {run.directory} is given twice (as {seen[resolved]}): give it once"
            )
        seen[resolved] = run.directory
    if len({run.name for _, run in found}) < len(found):  # their paths tell them apart
        found = [(place, _with_path(place, run)) for place, run in found]
    if out is None:
        out = directories[0] / PAGE if len(directories) == 1 else Path(PAGE)
    if out.is_dir():
        raise InputError("--out", f"{out} is a directory; give the name of a file")
    require("report", "matplotlib")
    written = html.page(
        runs.in_series([run for _, run in found]),
        datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    )
    with writing(out):
        atomic_write(out, lambda file: file.write_text(written, encoding="utf-8", errors="backslashreplace"))
    return out


def _with_path(place: Path, run: runs.Run) -> runs.Run:
    if place.name == run.name:
        return replace(run, name=str(place), series=str(place))
    return replace(run, name=f"{place}/{run.name}", series=f"{place}/{run.series}")
