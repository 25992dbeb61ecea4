"""Recipes x seeds: each run is a `quantopt train` of its own in OUT/RECIPE-SEED, cut and continued at will."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantopt.train import recipes, report
from quantopt.train.errors import InputError
from quantopt.train.loop import OUT_OF_TIME, REPORT

RESULTS = "accuracy.json"


def row(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation, over the runs of a recipe, of the quantised test accuracy (of the float one for sgd)
    and the mean of the packed one, in percent."""
    config = reports[0]["config"]
    key = "accuracy_latent" if config["optimizer"] == "sgd" else "accuracy_quantized"
    values = [run[key] for run in reports]
    packed = [run["accuracy_packed"] for run in reports]
    return {
        "model": config["model"],
        "optimizer": config["optimizer"],
        "bits": config["bits"],
        "activations": config["activations"],
        "seeds": len(reports),
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "packed_mean": None if None in packed else statistics.mean(packed),
        "epochs": config["epochs"],
        "device": reports[0]["device"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'model':10}{'optimizer':15}{'bits':>8}{'activations':>13}{'seeds':>7}{'mean':>8}{'std':>7}{'packed':>8}"
    ]
    for r in rows:
        packed = "-" if r["packed_mean"] is None else f"{r['packed_mean']:.2f}"
        lines.append(
            f"{r['model']:10}{r['optimizer']:15}{r['bits']!s:>8}{r['activations'] or '-':>13}{r['seeds']:7}"
            f"{r['mean']:8.2f}{r['std']:7.2f}{packed:>8}"
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace, passed_on: Sequence[str]) -> int:
    """Runs what is missing until --minutes have passed; writes the table, accuracy.json and curves.png of the recipes
    of which all seeds are finished. passed_on: options of `quantopt train` for every run."""
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    out = Path(arguments.out)
    stems: dict[str, str] = {}
    for name in arguments.recipes:
        recipes.load(name)
        stem = Path(name).stem
        if stem in stems:
            raise InputError("RECIPES", f"{name} and {stems[stem]} would share the directory {stem}-0")
        stems[stem] = name
    waiting = [
        (name, seed, out / f"{stem}-{seed}")
        for stem, name in stems.items()
        for seed in range(arguments.seeds)
        if not (out / f"{stem}-{seed}" / REPORT).is_file()
    ]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                left = None if deadline is None else (deadline - time.monotonic()) / 60
                if left is not None and left <= 0:
                    waiting.clear()
                    break
                name, seed, directory = waiting.pop(0)
                command = [sys.executable, "-m", "quantopt", "train", "--quiet", "--resume", "--recipe", name]
                command += ["--seed", str(seed), "--out", str(directory), *passed_on]
                if left is not None:
                    command += ["--minutes", f"{left:.4f}"]
                print(f"{directory.name} ...", file=sys.stderr, flush=True)
                running.append((directory.name, subprocess.Popen(command, stdout=subprocess.DEVNULL)))
            time.sleep(0.05)
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                running.remove(entry)
                if entry[1].returncode not in (0, OUT_OF_TIME):
                    failed.append(entry[0])
    finally:
        for _, process in running:
            process.terminate()
            process.wait()
    rows, unfinished = [], []
    curves, versions = {}, {}
    for stem in stems:
        files = [out / f"{stem}-{seed}" / REPORT for seed in range(arguments.seeds)]
        missing = [file.parent.name for file in files if not file.is_file()]
        unfinished += missing
        if missing:
            continue
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        configs = [{**r["config"], "seed": None, "data": None} for r in reports]
        if any(config != configs[0] for config in configs):
            raise InputError(
                "--out",
                f"the runs of {stem} differ in more than their seed: remove those of earlier settings",
            )
        rows.append(row(reports))
        curves[stem] = report.mean_curves([r["curves"] for r in reports])
        versions = reports[0]["versions"]
    if rows:
        print(table(rows))
        report.write_json(out / RESULTS, {"versions": versions, "rows": rows})
        report.plot_curves(out / report.CURVES_PNG, curves, report.SWEEP_PANELS)
        print(f"\nwritten: {out}/{RESULTS}, {report.CURVES_PNG}")
    if unfinished:
        print(f"unfinished: {', '.join(unfinished)}; the same command continues", file=sys.stderr)
    return 1 if failed else OUT_OF_TIME if unfinished else 0
