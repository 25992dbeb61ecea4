"""What a page shows of a run: the contents of report.json and checkpoint.pt, checked, as an older version wrote them
too."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantopt.train import checkpoint
from quantopt.train.directory import CHECKPOINT, REPORT, read_checkpoint
from quantopt.train.errors import InputError, shown
from quantopt.train.lm import loop as language_models
from quantopt.train.measure import plain_histograms
from quantopt.train.optimizers import has_levels
from quantopt.train.series import positions

_KEYS = {
    "before": ("accuracy_latent", "loss"),
    "projected": ("accuracy_quantized", "loss_quantized"),
    "packed": ("accuracy_packed", "loss_packed"),
    "bytes_float": ("bytes_float", "bytes_float"),
    "bytes_packed": ("bytes_packed", "bytes_packed"),
    "speed_float": ("images_per_second_float", "bytes_per_second_float"),
    "speed_packed": ("images_per_second_packed", "bytes_per_second_packed"),
    "seconds": ("seconds", "seconds"),
}
"""Fields of `Run`, with their keys in the report of an image network and of a language model."""

_POSITIVE = ("bytes_float", "bytes_packed", "speed_float", "speed_packed")
_MOST = 1e30  # of a number's magnitude: more than any run measures, and such that sums and axes stay finite
_EVERY = 50  # steps between two points of a language model's curves, where its report does not say


@dataclass(frozen=True)
class Layer:
    """A row of the table of layers; see `train.layer_table`."""

    name: str
    shape: tuple[int, ...]
    bits: int | str
    scale: float
    scale_kind: str
    flips: tuple[int | None, ...]
    error: float
    alone: float


@dataclass(frozen=True)
class Layers:
    """The table of layers, and the quality of the network with no layer and with all of them projected."""

    sample: str
    none: float
    all: float
    rows: tuple[Layer, ...]


@dataclass(frozen=True)
class Histograms:
    """Counts [points, bins] of weight / level from -limit to limit, at indices of the points of the curves; 0 is before
    training."""

    limit: float
    points: tuple[int, ...]
    counts: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Run:
    """A run as its directory has it."""

    directory: Path
    name: str
    series: str
    """Runs of one series differ by their seeds."""
    is_language: bool
    is_finished: bool
    is_quantised: bool
    config: Mapping[str, Any]
    before: float | None  # accuracy (percent) or loss, without projection
    projected: float | None
    packed: float | None
    bytes_float: float | None
    bytes_packed: float | None
    speed_float: float | None  # images or bytes per second
    speed_packed: float | None
    seconds: float | None
    origin: str  # versions and device
    at: list[int]  # epochs or steps of the points of the curves
    curves: dict[str, list[float | None]]
    histograms: Histograms | None
    layers: Layers | None
    missing: tuple[str, ...]

    @property
    def unit(self) -> str:
        return "step" if self.is_language else "epoch"

    @property
    def length(self) -> int:
        """Epochs or steps that were asked for."""
        return int(self.config["steps" if self.is_language else "epochs"])


def find(directory: Path) -> list[Run]:
    """The run in a directory, or those in its subdirectories (of a sweep, a demo, or any), one that has a link beside
    it once. Raises InputError, naming DIR, if there is none or one cannot be read."""
    if not directory.is_dir():
        raise InputError("DIR", f"{directory} is not a directory")
    places = [directory] if _holds_run(directory) else _once(filter(_holds_run, _inside(directory)))
    if not places:
        raise InputError(
            "DIR", f"{directory} holds no run: neither it nor a directory in it has {REPORT} or {CHECKPOINT}"
        )
    return [_read(place) for place in places]


def in_series(found: Sequence[Run]) -> list[Run]:
    """The runs, each a series by itself where the runs of its series differ by more than their seeds."""
    members: dict[str, list[Run]] = {}
    for run in found:
        members.setdefault(run.series, []).append(run)
    alone = {name for name, runs in members.items() if not _differ_by_seed(runs)}
    return [replace(run, series=run.name) if run.series in alone else run for run in found]


def _differ_by_seed(runs: Sequence[Run]) -> bool:
    free = {"seed", "data", "init"}  # the data has a fingerprint
    settings = [{name: value for name, value in run.config.items() if name not in free} for run in runs]
    seeds = [run.config.get("seed") for run in runs]
    return all(own == settings[0] for own in settings) and all(seeds.count(seed) == 1 for seed in seeds)


def _inside(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except OSError as error:
        raise InputError("DIR", f"{directory} cannot be read: {error.strerror or error}") from None


def _once(places: Iterable[Path]) -> list[Path]:
    """Sorted; of a directory and links to it the directory."""
    links_first = sorted(places, key=lambda place: not place.is_symlink())
    return sorted({place.resolve(): place for place in links_first}.values())


def _holds_run(directory: Path) -> bool:
    if (directory / CHECKPOINT).is_file():
        return True
    try:  # the report of a demo, which is none of a run, has no configuration
        return "config" in json.loads((directory / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError("DIR", f"{directory / REPORT} cannot be read as a run's report: {error}") from None


def _read(directory: Path) -> Run:
    file = directory / REPORT
    if not file.is_file():
        state = read_checkpoint(directory / CHECKPOINT, "DIR", checkpoint.KEYS, language_models.KEYS)
        state["histograms"] = plain_histograms(state["histograms"])
        return _parsed(directory, directory / CHECKPOINT, state, is_finished=False)
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("DIR", f"{file} cannot be read as a run's report: {error}") from None
    if isinstance(report, dict) and "histograms" not in report and (directory / CHECKPOINT).is_file():
        try:
            state = read_checkpoint(directory / CHECKPOINT, "DIR", checkpoint.KEYS, language_models.KEYS)
            report["histograms"] = plain_histograms(state["histograms"])
        except (InputError, AttributeError, RuntimeError, TypeError, ValueError, IndexError):
            pass  # the page says that there are none
    return _parsed(directory, file, report, is_finished=True)


def _parsed(directory: Path, file: Path, contents: Mapping[str, Any], *, is_finished: bool) -> Run:
    try:
        return _run(directory, contents, is_finished)
    except KeyError as error:
        raise InputError("DIR", f"{file} cannot be shown: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise InputError("DIR", f"{file} cannot be shown: {error}") from None


def _run(directory: Path, contents: Mapping[str, Any], is_finished: bool) -> Run:
    config = contents["config"]
    is_language = "layers" in config and "model" not in config
    length = config["steps" if is_language else "epochs"]
    checkpoint.check_number(length, "the length in config", 1, 2**63, kind=int)
    curves = {str(name): _curve(name, values) for name, values in contents["curves"].items()}
    counts = {len(values) for values in curves.values()}
    if len(counts) != 1:
        raise ValueError("the curves are not of one length")
    every = contents.get("curve_every", _EVERY) if is_language else 1
    checkpoint.check_number(every, "curve_every", 1, 2**63, kind=int)
    found = contents if is_finished else {}
    numbers = {
        field: _number(found, keys[is_language], is_positive=field in _POSITIVE)
        for field, keys in _KEYS.items()
    }
    is_quantised = has_levels(config["optimizer"], config.get("bits"))
    histograms, layers = _histograms(contents.get("histograms")), _layers(contents.get("layers"))
    name = directory.name or directory.resolve().name or str(directory)
    return Run(
        directory=directory,
        name=name,
        series=_series(name, config),
        is_language=is_language,
        is_finished=is_finished,
        is_quantised=is_quantised,
        config=config,
        **numbers,
        origin=_origin(contents),
        at=positions(counts.pop(), every, length),
        curves=curves,
        histograms=histograms,
        layers=layers,
        missing=tuple(_missing(is_finished, is_quantised, config["optimizer"], histograms, layers)),
    )


def _series(name: str, config: Mapping[str, Any]) -> str:
    found = re.fullmatch(r"(.+)-(\d+)", name)
    return found[1] if found and found[2] == str(config.get("seed")) else name


def _origin(contents: Mapping[str, Any]) -> str:
    versions = contents.get("versions")
    parts = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    device = contents.get("device")
    return ", ".join([*parts, *([device] if isinstance(device, str) else [])])


def _missing(
    is_finished: bool, is_quantised: bool, optimizer: str, histograms: object, layers: Layers | None
) -> Iterator[str]:
    if not is_finished:
        yield f"it is not finished: no {REPORT}. The curves are those of {CHECKPOINT}; the rest is measured at the end"
    if not is_quantised:
        yield f"it is a run of {optimizer}, whose weights have no levels: no table of layers, nothing packed"
    if histograms is None:
        yield f"no histograms of the weights: {REPORT} is of an earlier version"
    if is_quantised and is_finished and layers is None:
        yield f"no table of layers: {REPORT} is of an earlier version"
    if layers is not None and any(None in row.flips for row in layers.rows):
        yield "sign flips of single layers are incomplete: its first part was trained by an earlier version"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: Any, name: str) -> float:
    if not _is_number(value):
        raise ValueError(f"{name} is {shown(value)}, not a number")
    if abs(value) > _MOST:
        raise ValueError(f"{name} is {shown(value)}, more than {_MOST:g} in magnitude")
    return float(value)


def _number(contents: Mapping[str, Any], key: str, *, is_positive: bool) -> float | None:
    value = contents.get(key)
    if value is None:
        return None
    number = _finite(value, key)
    if is_positive and number <= 0:
        raise ValueError(f"{key} is {shown(value)}, not positive")
    return number


def _curve(name: Any, values: Any) -> list[float | None]:
    """The values that can be drawn."""
    if not isinstance(values, list):
        raise ValueError(f"the curve of {shown(name)} is {shown(values)}, not a list")
    return [
        None if value is None or value in ("inf", math.inf) else _finite(value, f"a value of {shown(name)}")
        for value in values
    ]


def _histograms(value: Any) -> Histograms | None:
    if value is None:
        return None
    points, counts = value["points"], value["counts"]
    rows = tuple(tuple(_finite(count, "a count of histograms") for count in row) for row in counts)
    if not rows or len(rows) != len(points) or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError("histograms are not a row of counts for each of their points")
    if min(map(min, rows)) < 0 or any(not isinstance(p, int) or p < 0 for p in points):
        raise ValueError("histograms have negative numbers")
    if list(points) != sorted(set(points)):
        raise ValueError("the points of histograms do not rise")
    limit = _finite(value["limit"], "the limit of histograms")
    if limit <= 0:
        raise ValueError("the limit of histograms is not positive")
    return Histograms(limit, tuple(points), rows)


def _layers(value: Any) -> Layers | None:
    if value is None:
        return None
    return Layers(
        str(value["sample"]),
        _finite(value["none"], "layers.none"),
        _finite(value["all"], "layers.all"),
        tuple(_layer(row) for row in value["rows"]),
    )


def _layer(row: Mapping[str, Any]) -> Layer:
    shape, flips = row["shape"], row["flips"]
    for size in (*shape, *(count for count in flips if count is not None)):
        checkpoint.check_number(size, "a number of a layer", 0, 2**63, kind=int)
    numbers = [_finite(row[key], f"{key} of a layer") for key in ("scale", "error", "alone")]
    return Layer(
        str(row["name"]),
        tuple(shape),
        row["bits"],
        numbers[0],
        str(row["scale_kind"]),
        tuple(flips),
        numbers[1],
        numbers[2],
    )
