"""The figures of a page: SVG as text, to stand inside HTML. They hold numbers, and no name that a user chose."""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantopt.train.page.runs import Histograms, Layers, Run
from quantopt.train.report import OPTIONAL_CURVE

WIDTH = 300  # units of a viewBox, in which text is 9 high: 12 pixels where a figure is 400 wide
_HEIGHT = 190
_IMAGE_DPI = 288  # of the images in figures: browsers make them smaller
_INK, _LINE = "#010101", "#c9c9c9"  # become the colours of the page
COLORMAP = "viridis"
MOMENTS = ("#999999", "#E69F00", "#0072B2", "#D55E00")  # colours of the moments of a run
LEAST_SHARE = 0.01  # percent of the weights in a bin, the low end of the colours

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantopt",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.formatter.use_mathtext": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "axes.edgecolor": _LINE,
    "grid.color": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def curves(key: str, scale: str, series: Mapping[str, Sequence[Run]], styles: Mapping[str, Any]) -> str:
    """One curve of all runs against the epoch or the step. Of a series of several runs their mean, with a faint line
    for each; single points as dots. "" where no run has a value."""
    lines: list[tuple[list[int], list[float], dict[str, Any]]] = []
    factor = 100 if key == "fraction_feasible" else 1
    for name, runs in series.items():
        color, dashes = styles[name]
        faint = len(runs) > 1
        for run in runs:
            x, y = _points(run.at, run.curves.get(key, ()), scale, factor)
            style = {"linewidth": 0.8, "alpha": 0.35} if faint else {"linewidth": 1.5, "linestyle": dashes}
            lines.append((x, y, {"color": color, **style}))
            if key == "test_accuracy":
                x, y = _points(run.at, run.curves.get(OPTIONAL_CURVE, ()), scale, factor)
                lines.append((x, y, {"color": color, "linestyle": "", "marker": "o", "markersize": 3.5}))
        mean = _mean([run.curves.get(key, []) for run in runs]) if faint else []
        x, y = _points(runs[0].at, mean, scale, factor)
        lines.append((x, y, {"color": color, "linewidth": 1.7, "linestyle": dashes}))
    lines = [line for line in lines if line[0]]
    if not lines:
        return ""

    def draw(panel: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        for x, y, style in lines:
            if len(x) == 1:
                style["marker"] = "o"
            panel.plot(x, y, **style)
        panel.set_yscale(scale, **({"linthresh": 1} if scale == "symlog" else {}))
        panel.grid(alpha=0.6, linewidth=0.6)
        panel.set_xlabel(next(iter(series.values()))[0].unit)
        panel.xaxis.set_major_locator(_whole_numbers())
        values = [value for _, y, _ in lines for value in y]
        if scale == "log":
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            if max(values) / min(values) > 100:
                panel.yaxis.set_major_locator(LogLocator(numticks=6))
        if scale == "symlog":
            panel.set_ylim(bottom=0, top=2 * max(*values, 1))
        if key == "fraction_feasible":
            panel.set_ylim(0, 104)
        panel.yaxis.set_minor_formatter(NullFormatter())

    return _svg(draw)


def _points(
    at: Sequence[int], curve: Sequence[float | None], scale: str, factor: float
) -> tuple[list[int], list[float]]:
    pairs = [
        (x, factor * y)
        for x, y in zip(at, curve, strict=False)
        if y is not None and (scale != "log" or y > 0)
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _mean(found: Sequence[Sequence[float | None]]) -> list[float | None]:
    """At each point that all of the curves have."""
    return [
        None if None in values else sum(v for v in values if v is not None) / len(values)
        for values in zip(*found, strict=False)
    ]


def short(value: float) -> str:
    """A number on an axis: 0.02, 1.5, 20k, 3M."""
    if value < 0:
        return f"−{short(-value)}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}".replace("e-0", "e-")


def weights(histograms: Histograms, at: Sequence[int], unit: str) -> str:
    """The density of the weights over the course of a run: a column for each point, colours for the share of the
    weights in a bin."""

    def draw(panel: Any) -> None:
        import numpy as np
        from matplotlib.colors import LogNorm

        counts = np.array(histograms.counts)
        share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        limit = histograms.limit
        times = [0, *at]
        last = times[min(histograms.points[-1], len(at))]
        half = last / max(len(share) - 1, 1) / 2
        panel.imshow(
            share.T,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap=COLORMAP,
            norm=LogNorm(LEAST_SHARE, 100, clip=True),
            extent=(-half or -0.5, last + half or 0.5, -limit, limit),
        )
        panel.set_xlabel(unit)
        panel.set_ylabel("weight / level")
        panel.xaxis.set_major_locator(_whole_numbers())

    return _svg(draw)


def moments(histograms: Histograms, at: Sequence[int], unit: str) -> tuple[str, list[tuple[str, str]]]:
    """(the histogram of the weights at up to four moments, from before training to the last; what is to be said of each
    line: its colour and its moment)."""
    last = len(histograms.counts) - 1
    chosen = list(dict.fromkeys(round(last * part / 3) for part in range(4)))
    times = [0, *at]
    words = [f"{unit} {times[min(histograms.points[i], len(at))]:,}" for i in chosen]

    def draw(panel: Any) -> None:
        import numpy as np

        for color, i in zip(MOMENTS, chosen, strict=False):
            counts = np.array(histograms.counts[i])
            edges = np.linspace(-histograms.limit, histograms.limit, len(counts) + 1)
            share = 100 * counts / max(counts.sum(), 1)
            panel.stairs(
                np.maximum(share, LEAST_SHARE), edges, baseline=LEAST_SHARE, color=color, linewidth=1.3
            )
        panel.set_yscale("log")
        panel.set_ylim(LEAST_SHARE, 130)
        panel.grid(alpha=0.6, linewidth=0.6)
        panel.set_xlabel("weight / level")
        panel.set_ylabel("% of the weights")

    return _svg(draw), list(zip(MOMENTS, words, strict=False))


def layer_flips(layers: Layers, at: Sequence[int], unit: str) -> str:
    """Sign flips of each layer, a row from the top, over the course of a run, in percent of its weights. "" where they
    are not known."""
    rows = []
    for layer in layers.rows:
        counts = [count for count in layer.flips if count is not None]
        rows.append([100 * count / max(math.prod(layer.shape), 1) for count in counts])
    if not rows or not at or {len(row) for row in rows} != {len(at)}:
        return ""

    def draw(panel: Any) -> None:
        import numpy as np
        from matplotlib.colors import LogNorm

        half = at[-1] / len(at) / 2
        panel.imshow(
            np.maximum(np.array(rows), LEAST_SHARE),
            aspect="auto",
            interpolation="nearest",
            cmap=COLORMAP,
            norm=LogNorm(LEAST_SHARE, 100, clip=True),
            extent=(at[0] - half, at[-1] + half, len(rows) + 0.5, 0.5),
        )
        panel.set_xlabel(unit)
        panel.set_ylabel("layer")
        panel.xaxis.set_major_locator(_whole_numbers())
        panel.yaxis.set_major_locator(_whole_numbers())

    return _svg(draw)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def gradient() -> str:
    """The colours of `weights` from its low end to its high one, as a CSS background."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return f"linear-gradient(to right, {', '.join(to_hex(colormaps[COLORMAP](i / 8)) for i in range(9))})"


def sparkline(values: Sequence[float]) -> str:
    """A small curve without axes, from 0 to the largest of the values."""
    top = max(*values, 1)
    step = 76 / max(len(values) - 1, 1)
    points = " ".join(f"{2 + step * i:.1f},{18 - 16 * value / top:.1f}" for i, value in enumerate(values))
    return (
        '<svg class="spark" viewBox="0 0 80 20" aria-hidden="true">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.3"/></svg>'
    )


def _svg(draw: Any) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    text = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, _HEIGHT / 72), layout="constrained")
        FigureCanvasSVG(figure)
        panel = figure.subplots()
        draw(panel)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        figure.savefig(text, format="svg", metadata={"Date": None}, dpi=_IMAGE_DPI)
    return _inline(text.getvalue())


_FIGURE = re.compile(r'(<svg class="plot"[^>]*>)(.*?)(?=</svg>)', re.DOTALL)
_IDS = re.compile(r'(\bid="|url\(#|href="#)')


def numbered(page: str) -> str:
    """A page of which each figure has its number in its ids, so that no two are equal."""
    number = itertools.count(1)

    def rename(figure: re.Match[str]) -> str:
        return figure[1] + _IDS.sub(rf"\1f{next(number)}-", figure[2])

    return _FIGURE.sub(rename, page)


def _inline(svg: str) -> str:
    """The element alone, as HTML has it: no namespaces and metadata, the colours and the font of the page. Its ids
    await `numbered`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg class="plot" \1 role="img">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = svg.replace(_INK, "var(--ink)").replace(_LINE, "var(--line)").replace("#000000", "var(--ink)")
    return re.sub(r"\n\s*", "\n", svg).strip()
