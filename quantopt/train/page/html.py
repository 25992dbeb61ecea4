"""The HTML of a page. Whatever comes from a directory, its name too, passes :func:`text`."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import quantopt
from quantopt.train.lm import loop as language_models
from quantopt.train.page import figures
from quantopt.train.page.runs import Histograms, Layers, Run
from quantopt.train.page.style import CSS
from quantopt.train.report import PANELS, styles

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_RELAXATIONS = (("kappa", "kappa", "log"), ("reg_strength", "reg_strength", "log"))
_ALONE = ("#0072B2", (0, ()))  # colour and dashes of the only series
_MEASURES = {
    False: "Accuracy on the test images, in percent: of the latent weights, of their projection, and packed.",
    True: "Validation loss, in nats per byte: of the weights that training ran with, projected, and packed.",
}
_OPEN_TABLES = 2  # tables of layers that are not folded


class _Cell(NamedTuple):
    """HTML of a cell, and its class."""

    html: str
    kind: str = ""


def text(value: object) -> str:
    """Text as HTML: escaped, on a line, what cannot be printed as its escape sequence."""
    written = str(value)
    printable = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in written
    )
    return html.escape(printable)


def page(runs: Sequence[Run], date: str) -> str:
    """The page of `runs`, whose names differ."""
    names = list(dict.fromkeys(run.series for run in runs))
    title = names[0] if len(names) == 1 else f"{len(runs)} runs"
    if len(names) == 1 and len(runs) > 1:
        title = f"{names[0]}, {len(runs)} runs"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)} – quantopt report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
        f'<h1>{text(title)}</h1>\n<p class="soft">quantopt report, {text(date)}</p>',
    ]
    kinds = [[run for run in runs if run.is_language == kind] for kind in (False, True)]
    for chosen in filter(None, kinds):
        if all(kinds):
            parts.append(f"<h1>{'Language models' if chosen[0].is_language else 'Image networks'}</h1>")
        parts += _kind(chosen)
    parts += _missing(runs)
    origins = dict.fromkeys(run.origin for run in runs if run.origin)
    made = "; ".join(f"made with {text(origin)}" for origin in origins)
    parts.append(
        f"<footer>Page by quantopt {text(quantopt.__version__)}. Runs {made or 'of unknown origin'}.</footer>"
    )
    return figures.numbered("\n".join([*parts, "</main>\n</body>\n</html>\n"]))


def _kind(runs: Sequence[Run]) -> list[str]:
    """Of the image networks, or of the language models."""
    series: dict[str, list[Run]] = {}
    for run in runs:
        series.setdefault(run.series, []).append(run)
    looks = dict(zip(series, styles(len(series)) if len(series) > 1 else [_ALONE], strict=True))
    parts = []
    if len(runs) == 1 and runs[0].packed is not None:
        parts.append(_tiles(runs[0]))
    parts += [f'<h2>Runs</h2>\n<p class="soft">{_MEASURES[runs[0].is_language]}</p>', _table_of_runs(runs)]
    if len(runs) > len(series):
        parts += ["<h3>Over the seeds</h3>", _table_of_series(series)]
    parts += ["<h2>Curves</h2>", *_curves(series, looks)]
    if any(run.histograms for run in runs):
        parts += ["<h2>Weights over the training</h2>", *_weights(series)]
    if any(run.layers for run in runs):
        parts += ["<h2>Layers</h2>", *_layers(runs)]
    if any(run.bytes_packed for run in runs):
        parts += ["<h2>Size and speed</h2>", *_sizes(runs)]
    return parts


# ---- numbers


def _quality(run: Run, value: float | None) -> str:
    """An accuracy or a loss."""
    return "–" if value is None else f"{value:.4f}" if run.is_language else f"{value:.2f}"


def _bytes(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _times(over: float | None, under: float | None) -> str:
    return (
        "–"
        if not over or not under
        else f"{over / under:.2f}x"
        if over < 10 * under
        else f"{over / under:.1f}x"
    )


def _count(value: float, word: str) -> str:
    return f"{value:,.0f} {word}" if value != 1 else f"1 {word}"


# ---- parts


def _tiles(run: Run) -> str:
    unit, before = ("", "in training") if run.is_language else (" %", "latent")
    what = "loss, nats per byte" if run.is_language else "test accuracy"
    tiles = [
        (
            _quality(run, run.packed) + unit,
            f"{what} of the packed network; {before} {_quality(run, run.before)}{unit}",
        ),
        (
            f"{_times(run.bytes_float, run.bytes_packed)} smaller",
            f"{_bytes(run.bytes_float)} bytes float, {_bytes(run.bytes_packed)} packed",
        ),
    ]
    if run.speed_float and run.speed_packed:
        word = "bytes" if run.is_language else "images"
        tiles.append(
            (
                f"{_times(run.speed_packed, run.speed_float)} as fast",
                f"{run.speed_packed:,.0f} {word}/s packed, {run.speed_float:,.0f} float",
            )
        )
    if run.seconds is not None:
        tiles.append((f"{run.seconds:,.1f} s", f"of training, {run.length:,} {run.unit}s"))
    cells = "".join(f"<div><b>{text(value)}</b><small>{text(words)}</small></div>" for value, words in tiles)
    return f'<div class="tiles">{cells}</div>'


def _table(head: Iterable[str | _Cell], rows: Iterable[Sequence[str | _Cell]]) -> str:
    """Cells that are str are escaped."""

    def row(tag: str, cells: Iterable[str | _Cell]) -> str:
        made = []
        for cell in cells:
            inner, kind = (text(cell), "") if isinstance(cell, str) else cell
            made.append(f'<{tag} class="{kind}">{inner}</{tag}>' if kind else f"<{tag}>{inner}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(row("td", cells) for cells in rows)
    table = f"<table>\n<thead>{row('th', head)}</thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _names(words: Iterable[str]) -> list[str | _Cell]:
    return [_Cell(text(word), "text") for word in words]


def _table_of_runs(runs: Sequence[Run]) -> str:
    language = runs[0].is_language
    before, unit = ("in training", "") if language else ("latent", " %")
    head: list[str | _Cell] = [
        *_names(["run", "network", "optimizer"]),
        "bits",
        *_names(["data"]),
        "seed",
        f"{runs[0].unit}s",
        *(f"{word}{unit}" for word in (before, "projected", "packed")),
        "seconds",
    ]
    rows: list[list[str | _Cell]] = []
    for run in runs:
        config = run.config
        network = config.get("architecture" if language else "model", "–")
        if language:
            network = f"{network}, {config.get('layers')} layers of {config.get('width')}"
        done = run.at[-1] if run.at else 0
        rows.append(
            [
                _Cell(text(run.name), "name"),
                *_names([str(network), str(config.get("optimizer"))]),
                str(config.get("bits")) if run.is_quantised else "float",
                *_names([Path(str(config.get("data"))).name]),
                str(config.get("seed")),
                f"{done:,}" if done == run.length else f"{done:,} of {run.length:,}",
                *(_quality(run, value) for value in (run.before, run.projected, run.packed)),
                "–" if run.seconds is None else f"{run.seconds:,.1f}",
            ]
        )
    return _table(head, rows)


def _table_of_series(series: Mapping[str, Sequence[Run]]) -> str:
    """Mean and standard deviation of the last quality that the runs have."""
    first = next(iter(series.values()))[0]
    what = "loss" if first.is_language else "accuracy, %"
    rows: list[list[str | _Cell]] = []
    for name, runs in series.items():
        values = [
            run.before if not run.is_quantised and run.before is not None else run.projected for run in runs
        ]
        found = [value for value in values if value is not None]
        mean, deviation = _spread(found)
        rows.append(
            [
                _Cell(text(name), "name"),
                str(len(found)),
                _quality(first, mean),
                _quality(first, deviation),
                ", ".join(_quality(first, value) for value in values),
            ]
        )
    return _table(["recipe", "runs", f"{what}: mean", "standard deviation", "of each seed"], rows)


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation where there are several."""
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _curves(series: Mapping[str, Sequence[Run]], looks: Mapping[str, Any]) -> list[str]:
    runs = [run for some in series.values() for run in some]
    panels = language_models.PANELS if runs[0].is_language else PANELS
    known = {key for key, _, _ in panels}
    panels = (*panels, *(p for p in (("epsilon", "epsilon", "linear"), *_RELAXATIONS) if p[0] not in known))
    parts = []
    if len(series) > 1:
        parts.append(_legend(series, looks))
    if len(runs) > len(series):
        parts.append('<p class="soft">Faint: each seed. Strong: their mean.</p>')
    drawn = []
    for key, title, scale in panels:
        if svg := figures.curves(key, scale, series, looks):
            drawn.append(_figure(title, svg))
    return [*parts, f'<div class="figures">{"".join(drawn)}</div>']


def _legend(series: Mapping[str, Sequence[Run]], looks: Mapping[str, Any]) -> str:
    entries = []
    for name, runs in series.items():
        color, (_, dashes) = looks[name]
        color = "var(--ink)" if color == "#000000" else color
        pattern = " ".join(f"{2 * d:g}" for d in dashes)
        line = (
            f'<svg viewBox="0 0 30 8" aria-hidden="true"><line x1="0" y1="4" x2="30" y2="4" stroke="{color}" '
            f'stroke-width="3" stroke-dasharray="{pattern or "none"}"/></svg>'
        )
        seeds = f" <small>({len(runs)} seeds)</small>" if len(runs) > 1 else ""
        entries.append(f"<li>{line}{text(name)}{seeds}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _figure(caption: str, svg: str, note: str | _Cell = "") -> str:
    svg = svg.replace('role="img"', f'role="img" aria-label="{text(caption)}"', 1)
    inner = text(note) if isinstance(note, str) else note.html
    small = f"<small>{inner}</small>" if inner else ""
    return f"<figure><figcaption>{text(caption)}{small}</figcaption>{svg}</figure>\n"


def _weights(series: Mapping[str, Sequence[Run]]) -> list[str]:
    low = f"{figures.LEAST_SHARE:g} %"
    parts = [
        '<p class="soft">All quantised weights in units of their outer level (of a run without levels, all weights in '
        f"units of their standard deviation). Share of the weights in a bin: {low} or less "
        f'<span class="shares" style="background: {figures.gradient()}"></span> 100 %, logarithmic.</p>'
    ]
    drawn = []
    for name, runs in series.items():
        shown = next((run for run in runs if run.histograms is not None), None)
        if shown is not None and shown.histograms is not None:
            note = f"seed {shown.config.get('seed')}" if len(runs) > 1 else ""
            drawn.append(_figure(name, figures.weights(shown.histograms, shown.at, shown.unit), note))
            if len(series) == 1:
                drawn += _details_of(shown, shown.histograms)
    return [*parts, f'<div class="figures">{"".join(drawn)}</div>']


def _details_of(run: Run, histograms: Histograms) -> list[str]:
    """More of the weights, where a single series has the room."""
    svg, lines = figures.moments(histograms, run.at, run.unit)
    marks = "".join(
        f'<span class="mark" style="background: {color}"></span>{text(words)} &ensp;'
        for color, words in lines
    )
    drawn = [_figure("histogram", svg, _Cell(marks))]
    if run.layers is not None and (svg := figures.layer_flips(run.layers, run.at, run.unit)):
        drawn.append(_figure("sign flips of each layer", svg, "% of its weights, colours as above"))
    return drawn


def _layers(runs: Sequence[Run]) -> list[str]:
    language = runs[0].is_language
    what = "loss (nats per byte)" if language else "accuracy (%)"
    parts = [
        f'<p class="soft">Alone: {what} with this layer projected to its levels and all others latent; change: against '
        "no layer projected. Error: |w − q| / |w| of the latent weights w and their projection q. Scale: mean over the "
        f"layer. Sign flips: of the latent weights, from one {runs[0].unit if not language else 'point of the curves'} "
        "to the next.</p>"
    ]
    found = [(run, run.layers) for run in runs if run.layers is not None]
    for number, (run, layers) in enumerate(found):
        table = _table_of_layers(run, layers)
        if len(found) == 1:
            parts.append(table)
        else:
            open_ = " open" if number < _OPEN_TABLES else ""
            parts.append(f"<details{open_}><summary>{text(run.name)}</summary>{table}</details>")
    return parts


def _table_of_layers(run: Run, layers: Layers) -> str:
    head: list[str | _Cell] = [
        *_names(["layer", "shape"]),
        "bits",
        "scale",
        *_names(["per"]),
        "sign flips",
        "error of the projection",
        "alone",
        "change",
    ]
    rows: list[list[str | _Cell]] = []
    for layer in layers.rows:
        counts = [count for count in layer.flips if count is not None]
        complete = len(counts) == len(layer.flips)
        flips = f"{sum(counts):,}" if complete else "–"
        line = figures.sparkline(counts) if complete and len(counts) > 1 else ""
        change = layer.alone - layers.none
        rows.append(
            [
                _Cell(text(layer.name.removesuffix(".weight")), "name"),
                *_names(["×".join(map(str, layer.shape))]),
                str(layer.bits),
                f"{layer.scale:.4g}",
                *_names([layer.scale_kind]),
                _Cell(text(flips) + line),
                f"{layer.error:.3f}",
                _quality(run, layer.alone),
                f"{change:+.4f}" if run.is_language else f"{change:+.2f}",
            ]
        )
    none, every = _quality(run, layers.none), _quality(run, layers.all)
    summary = f"No layer projected: {none}. All: {every}. Measured on {layers.sample}."
    return f'<p class="soft">{text(summary)}</p>{_table(head, rows)}'


def _sizes(runs: Sequence[Run]) -> list[str]:
    word = "bytes" if runs[0].is_language else "images"
    packed = [run for run in runs if run.bytes_packed]
    widest = max(size or 0 for run in packed for size in (run.bytes_float, run.bytes_packed))
    fastest = max(speed or 0 for run in packed for speed in (run.speed_float, run.speed_packed))

    def bar(value: float | None, most: float, form: str) -> _Cell:
        if value is None:  # those that are there are positive
            return _Cell("–")
        return _Cell(f'{form}<span class="bar" style="width: {max(100 * value / most, 1):.1f}%"></span>')

    rows: list[list[str | _Cell]] = []
    for run in packed:
        rows.append(
            [
                _Cell(text(run.name), "name"),
                bar(run.bytes_float, widest, _bytes(run.bytes_float)),
                bar(run.bytes_packed, widest, _bytes(run.bytes_packed)),
                _times(run.bytes_float, run.bytes_packed),
                bar(run.speed_float, fastest, _bytes(run.speed_float)),
                bar(run.speed_packed, fastest, _bytes(run.speed_packed)),
                _times(run.speed_packed, run.speed_float),
                _quality(run, run.packed),
            ]
        )
    head: list[str | _Cell] = [
        *_names(["run"]),
        "bytes, float",
        "bytes, packed",
        "smaller",
        f"{word}/s, float",
        f"{word}/s, packed",
        "faster",
        "packed loss" if runs[0].is_language else "packed accuracy, %",
    ]
    note = "Bytes of the whole network. Speed: both networks in float32, taking turns, where the run was trained."
    return [f'<p class="soft">{note}</p>', _table(head, rows)]


def _missing(runs: Sequence[Run]) -> list[str]:
    entries = [f"<li>{text(run.name)}: {text(note)}.</li>" for run in runs for note in run.missing]
    return [f"<h2>What is not here</h2>\n<ul>{''.join(entries)}</ul>"] if entries else []
