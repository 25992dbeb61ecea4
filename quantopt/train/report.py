"""Reports of runs: JSON, the figures curves.png and weights.png, and the table of the demo."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quantopt.files import atomic_write
from quantopt.train.errors import writing
from quantopt.train.measure import HISTOGRAM_LIMIT

CURVES_PNG = "curves.png"
WEIGHTS_PNG = "weights.png"

# Okabe and Ito's colours and one of Tol's, which remain distinct for the colour-blind, with a dash pattern each.
_STYLES = (
    ("#000000", (0, ())),
    ("#E69F00", (0, (6, 1.5))),
    ("#56B4E9", (0, (4, 1.5))),
    ("#009E73", (0, (1.5, 1))),
    ("#D55E00", (0, ())),
    ("#0072B2", (0, (8, 2))),
    ("#CC79A7", (0, (3, 1, 1, 1))),
    ("#882255", (0, (1, 2.5))),
    ("#999999", (0, (5, 1, 1, 1, 1, 1))),
)
PANELS = (
    ("loss", "training loss", "log"),
    ("accuracy", "training accuracy, %", "linear"),
    ("test_accuracy", "test accuracy at the weights of the epoch, % (dots: projected)", "linear"),
    ("epsilon", "epsilon", "linear"),
    ("fraction_feasible", "weights inside their interval, %", "linear"),
    ("sign_flips", "sign flips in the epoch", "symlog"),
)


OPTIONAL_CURVE = "projected_accuracy"
"""Drawn into the panel of test_accuracy. Runs of 0.1.0 lack it."""


def plain(value: Any) -> Any:
    """`value` as it is read back from a file of :func:`write_json`: "inf" for infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


_NUMBERS = re.compile(r'\[\n([^\[\]{}"]*)\]')  # a list without text: a line end is not inside of text


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Writes strict JSON, atomically, a list of numbers on a line. Infinity becomes "inf"; ValueError for NaN."""
    text = json.dumps(plain(contents), indent=1, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    with writing(path):
        atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))


def mean_curves(runs: Sequence[Mapping[str, Sequence[float | None]]]) -> dict[str, list[float | None]]:
    """The curves of `PANELS` and `OPTIONAL_CURVE`, each the mean of the runs at every epoch; None where a run has no
    value."""
    means: dict[str, list[float | None]] = {}
    optional = [OPTIONAL_CURVE] if all(OPTIONAL_CURVE in run for run in runs) else []
    for key in [*(key for key, _, _ in PANELS), *optional]:
        epochs = zip(*(run[key] for run in runs), strict=True)
        means[key] = [
            None if None in values else sum(v for v in values if v is not None) / len(runs)
            for values in epochs
        ]
    return means


def plot_curves(
    path: Path,
    curves: Mapping[str, Mapping[str, Sequence[float | None]]],
    panels: Sequence[tuple[str, str, str]] = PANELS,
    unit: str = "epoch",
) -> None:
    """A figure with a panel for each (curve, title, scale of its axis), against the epoch or another `unit`.

    curves: for each name of a run, lists with a value per epoch; None where there is none.
    """
    rows = min(2, len(panels))
    columns = -(-len(panels) // rows)
    figure, axes = new_figure(rows, columns, width=5 * columns, height=3.75 * rows)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    for panel, (key, title, scale) in zip(axes, panels, strict=False):
        for (color, dashes), (name, run) in zip(styles(len(curves)), curves.items(), strict=True):
            points = _points(run[key])
            if key == "test_accuracy":
                for epoch, value in _points(run.get(OPTIONAL_CURVE, ())):
                    panel.plot(epoch, value, "o", color=color, markersize=5)
            if points:
                factor = 100 if key == "fraction_feasible" else 1
                epochs, values = [p[0] for p in points], [factor * p[1] for p in points]
                marker = "o" if len(points) == 1 else None
                panel.plot(
                    epochs, values, color=color, linestyle=dashes, linewidth=1.6, marker=marker, label=name
                )
        panel.set_title(title, fontsize=11)
        panel.set_xlabel(unit)
        panel.set_yscale(scale)
        panel.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    save_figure(figure, path)


def _points(curve: Sequence[float | None]) -> list[tuple[int, float]]:
    """(epoch, value) where there is one."""
    return [(epoch, value) for epoch, value in enumerate(curve, 1) if value is not None]


def plot_weights(path: Path, histograms: Mapping[str, Tensor], unit: str = "epoch") -> None:
    """One panel per run: the density of the quantised weights (of all weights for sgd) over the epochs or another
    `unit`.

    histograms: for each name of a run, counts [epochs + 1, bins] over weight / scale in -2.5..2.5, before training and
    after each epoch.
    """
    from matplotlib.colors import LogNorm

    columns = min(3, len(histograms))
    rows = -(-len(histograms) // columns)
    figure, panels = new_figure(rows, columns, width=4 * columns + 1, height=3.2 * rows + 0.4)
    image = None
    for panel, (name, counts) in zip(panels, histograms.items(), strict=False):
        share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
        image = panel.imshow(
            share.T.numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            norm=LogNorm(vmin=0.01, vmax=100),
            extent=(-0.5, len(counts) - 0.5, -HISTOGRAM_LIMIT, HISTOGRAM_LIMIT),
        )
        panel.set_facecolor("#440154")  # the colour of the lowest value: empty bins have no logarithm
        panel.set_title(name, fontsize=11)
        panel.set_xlabel(unit)
        panel.set_ylabel("weight / scale")
    for panel in panels[len(histograms) :]:
        panel.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=panels, label="weights in the bin, %")
    save_figure(figure, path)


def styles(count: int) -> list[tuple[str, Any]]:
    """(colour, dashes) of each of ``count`` lines."""
    return [_STYLES[i % len(_STYLES)] for i in range(count)] if count > 1 else [_STYLES[-1]]


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """(figure, its panels row by row), inches wide and high, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG, atomically."""
    options: dict[str, Any] = {"format": "png", "dpi": 90, "pil_kwargs": {"optimize": True}}
    with writing(path):
        atomic_write(path, lambda file: figure.savefig(file, **options))


_COLUMNS = (
    "optimizer",
    "latent %",
    "projected %",
    "packed %",
    "bytes float",
    "bytes packed",
    "ratio",
    "seconds",
)


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per optimizer: test accuracy of the latent, the projected and the packed network, bytes of the whole
    network before and after packing, seconds of training. "-" where there is nothing to measure."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = [_COLUMNS]
    for name, report in reports.items():
        before, after = report["bytes_float"], report["bytes_packed"]
        rows.append(
            (
                name,
                percent(report["accuracy_latent"]),
                percent(report["accuracy_quantized"]),
                percent(report["accuracy_packed"]),
                "-" if before is None else f"{before:,}",
                "-" if after is None else f"{after:,}",
                "-" if before is None or after is None else f"{before / after:.1f}x",
                f"{report['seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
