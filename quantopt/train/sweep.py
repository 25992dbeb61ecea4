"""Recipes x seeds: each run is a process `quantopt train` in OUT/RECIPE-SEED, which can be stopped and continued.

The runs end with the sweep, however it ends: by a signal, or killed. The same command continues them.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantopt.train import checkpoint, environment, loop, recipes, report
from quantopt.train.arguments import given, passed_on
from quantopt.train.config import DEFAULTS
from quantopt.train.data import Dataset
from quantopt.train.directory import REPORT, read_results
from quantopt.train.errors import OUT_OF_TIME, InputError
from quantopt.train.optimizers import FULL_PRECISION

RESULTS = "accuracy.json"


def row(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of `accuracy.json` for the runs of a recipe.

    values: the quantised test accuracy of each run (the float one for sgd), in percent; mean, std: of these. gap: what
    the mean is below the best of sgd on the same network, where the sweep has it. projected: the test accuracy of the
    projected weights, with the batch-norm statistics of training, after the epochs of `Config.projected_at`.
    packed_mean: of the packed network; packed_difference: the largest between the packed and the projected network of a
    run. bytes: of the whole network. speedup: images per second of the packed over those of the float network, mean of
    the runs. limit, validation: as in `config.Config`.
    """
    config = reports[0]["config"]
    key = "accuracy_latent" if config["optimizer"] in FULL_PRECISION else "accuracy_quantized"
    values = [run[key] for run in reports]
    packed = [run["accuracy_packed"] for run in reports]
    is_packed = None not in packed
    speedups = [
        run["images_per_second_packed"] / run["images_per_second_float"] for run in reports if is_packed
    ]
    curves = [run["curves"].get(report.OPTIONAL_CURVE, ()) for run in reports]
    return {
        "model": config["model"],
        "optimizer": config["optimizer"],
        "bits": config["bits"],
        "activations": config["activations"],
        "seeds": len(reports),
        "values": values,
        "mean": statistics.mean(values),
        "std": _deviation(values),
        "gap": None,
        "projected": [
            {"epoch": epoch, "mean": statistics.mean(at), "std": _deviation(at)}
            for epoch, at in enumerate(zip(*curves, strict=False), 1)
            if None not in at
        ],
        "packed_mean": statistics.mean(packed) if is_packed else None,
        "packed_difference": max(abs(p - q) for p, q in zip(packed, values, strict=True))
        if is_packed
        else None,
        "epochs": config["epochs"],
        "limit": config["limit"],
        "validation": config["validation"],
        "device": reports[0]["device"],
        "bytes_float": reports[0]["bytes_float"],
        "bytes_packed": reports[0]["bytes_packed"],
        "speedup": statistics.mean(speedups) if is_packed else None,
    }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows, by the names of their recipes, as text: gap is what the mean is below that of sgd, packed the mean
    accuracy of the packed networks, smaller and faster are float over packed bytes and packed over float speed."""
    width = max(6, *(len(name) for name in rows))
    lines = [
        f"{'recipe':{width}}{'model':>14}{'bits':>8}{'seeds':>7}{'mean':>8}{'std':>7}{'gap':>7}{'packed':>8}"
        f"{'smaller':>9}"
        f"{'faster':>8}"
    ]
    for name, r in rows.items():
        packed, smaller, faster = "-", "-", "-"
        gap = "-" if r["gap"] is None else f"{r['gap']:.2f}"
        if r["packed_mean"] is not None:
            packed = f"{r['packed_mean']:.2f}"
            smaller, faster = f"{r['bytes_float'] / r['bytes_packed']:.1f}x", f"{r['speedup']:.2f}x"
        lines.append(
            f"{name:{width}}{r['model']:>14}{r['bits']!s:>8}{r['seeds']:7}{r['mean']:8.2f}{r['std']:7.2f}{gap:>7}{packed:>8}"
            f"{smaller:>9}{faster:>8}"
        )
    return "\n".join(lines)


def sweep(arguments: argparse.Namespace, device: str, dataset: Dataset) -> int:
    """Runs what is missing until --minutes have passed; writes the table, accuracy.json and curves.png of the recipes
    of which all seeds are finished. Returns the exit status. device: "cpu" or "cuda". dataset: of --data.

    Raises InputError, before anything is run, for results in --out that are not of this command."""
    out = Path(arguments.out)
    stems: dict[str, str] = {}
    for name in arguments.recipes:
        recipes.load(name)
        stem = Path(name).stem
        if stem in stems:
            raise InputError("RECIPES", f"{name} and {stems[stem]} would share the directory {stem}-0")
        stems[stem] = name
    starts = _warm_starts(stems)
    seeds = range(arguments.seeds)

    @cache
    def described(name: str) -> dict[str, Any]:
        options = {"init": "", **given(arguments)}  # which a recipe with a warm start asks for
        config = recipes.configuration(recipes.load(name), options, device, dataset)
        return loop.describe(config, dataset)

    def start(stem: str, seed: int) -> Path | None:
        return out / f"{starts[stem]}-{seed}" if stem in starts else None

    def expected(stem: str, seed: int) -> dict[str, Any]:
        init = start(stem, seed)
        return {**described(stems[stem]), "seed": seed, "init": None if init is None else str(init)}

    waiting = []
    for stem, name in stems.items():
        for seed in seeds:
            directory = out / f"{stem}-{seed}"
            if (directory / REPORT).is_file():
                _results(directory / REPORT, expected(stem, seed))
            else:
                waiting.append(_Run(name, seed, directory, start(stem, seed)))
    all_succeeded = _train(waiting, arguments)
    rows: dict[str, dict[str, Any]] = {}
    unfinished, curves = [], {}
    sources: set[str] = set()
    for stem in stems:
        files = [out / f"{stem}-{seed}" / REPORT for seed in seeds]
        missing = [file.parent.name for file in files if not file.is_file()]
        unfinished += missing
        if missing:
            continue
        reports = [_results(file, expected(stem, seed)) for file, seed in zip(files, seeds, strict=True)]
        sources |= {Path(r["config"]["data"]).name for r in reports}
        rows[stem] = {"recipe": stem, **row(reports)}
        curves[stem] = report.mean_curves([r["curves"] for r in reports])
    full: dict[tuple[str, int], float] = {}
    for r in rows.values():
        if r["optimizer"] in FULL_PRECISION:
            full[r["model"], r["epochs"]] = max(r["mean"], full.get((r["model"], r["epochs"]), 0))
    for r in rows.values():
        if (key := (r["model"], r["epochs"])) in full:
            r["gap"] = full[key] - r["mean"]
    if rows:
        print(table(rows))
        head = environment.header(device, torch.get_num_threads())
        head["data"] = ", ".join(sorted(sources))  # one data set, which may have had several names
        report.write_json(out / RESULTS, {**head, "rows": list(rows.values())})
        report.plot_curves(out / report.CURVES_PNG, curves)
        print(f"\nwritten: {out}/{RESULTS}, {report.CURVES_PNG}")
    if unfinished:
        print(f"unfinished: {', '.join(unfinished)}; the same command continues", file=sys.stderr)
    if not all_succeeded:
        return 1
    return OUT_OF_TIME if unfinished else 0


class _Run(NamedTuple):
    """A run to be trained."""

    recipe: str
    seed: int
    directory: Path
    start: Path | None  # the run whose weights it begins with

    @property
    def is_ready(self) -> bool:
        return self.start is None or (self.start / REPORT).is_file()


def _warm_starts(stems: Mapping[str, str]) -> dict[str, str]:
    """For the directories of recipes with a warm start, those of the recipes that they start from."""
    starts = {stem: recipes.load(name).get("warm_start") for stem, name in stems.items()}
    for stem, other in starts.items():
        if other is None:
            continue
        if other not in stems:
            raise InputError("RECIPES", f"{stem} starts from the runs of {other}: name that recipe too")
        if starts[other] is not None:
            raise InputError(
                "RECIPES", f"{stem} starts from {other}, which starts from {starts[other]} itself"
            )
    return {stem: other for stem, other in starts.items() if other is not None}


def _results(file: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The report in `file`. Raises InputError unless it is of a run of the configuration `expected`."""
    results = read_results(file, "--out")
    if differing := checkpoint.differences(
        DEFAULTS | results["config"], report.plain(expected), "the report", checkpoint.free(expected)
    ):
        raise InputError(
            "--out", f"{file} is of another run: {differing}; remove {file.parent}, or give another directory"
        )
    return results


def _train(waiting: list[_Run], arguments: argparse.Namespace) -> bool:
    """Trains each, --jobs at a time, in order but for those that wait for the run they start from; False if a run
    failed. What waits for that run is left out then."""
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    running: list[subprocess.Popen[bytes]] = []
    statuses = {0}
    try:
        while waiting or running:
            while len(running) < arguments.jobs and (run := next((r for r in waiting if r.is_ready), None)):
                left = None if deadline is None else (deadline - time.monotonic()) / 60
                if left is not None and left <= 0:
                    waiting.clear()
                    break
                waiting.remove(run)
                command = [sys.executable, "-m", "quantopt", "train", "--quiet", "--resume"]
                command += ["--recipe", run.recipe, "--seed", str(run.seed), "--out", str(run.directory)]
                command += passed_on(arguments, "sweep")
                if run.start is not None:
                    command += ["--init", str(run.start)]
                if left is not None:
                    command += ["--minutes", f"{left:.4f}"]
                print(f"{run.directory.name} ...", file=sys.stderr, flush=True)
                # Its standard input ends when this process does, in whatever way: the run ends with it.
                process = subprocess.Popen(
                    [*command, "--until-stdin-ends"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
                )
                running.append(process)
            if not running:
                break  # what is left waits for a run that failed
            time.sleep(0.05)
            statuses |= {status for process in running if (status := process.poll()) is not None}
            running = [process for process in running if process.returncode is None]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return statuses <= {0, OUT_OF_TIME}
