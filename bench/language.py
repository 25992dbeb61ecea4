"""What trains a 1-bit language model best: every method at every learning rate, the best rate with three seeds.

    python bench/language.py --data FILE [--size small|medium] [--out DIR] [--methods NAME ...] [--minutes M]

The methods are recipes of `quantopt lm` (recipes/lm.toml). Each is trained at every rate of a grid with seed 0,
which is extended while an end of it is best, and at the rate of the least validation loss with the other seeds too. The
rate is chosen on the validation part that the table is of, by a seed of the table, for all methods alike. On Adam it is
the rate of all parameters, on Muon of its matrices: the others keep the recipe's. The size "medium" has fewer methods,
and takes their rates from bench/results/language-small.json. Runs that are in DIR are not trained again: the same
command continues what was cut (status 3). Prints a table, and writes bench/results/language-SIZE.json when all methods
are done.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from quantopt.train import checkpoint
from quantopt.train.directory import REPORT, held
from quantopt.train.environment import header
from quantopt.train.errors import OUT_OF_TIME, OutOfTime, TrainingError
from quantopt.train.lm import config as lm
from quantopt.train.lm import loop, text
from quantopt.train.report import plain, write_json

SIZES: dict[str, dict[str, int]] = {
    "small": {"layers": 4, "width": 128, "heads": 4, "steps": 1200},
    "medium": {"layers": 6, "width": 256, "heads": 8, "steps": 1200},
}
MEDIUM = ("straight-through", "stam-muon", "float", "float-muon")
RATES = (2e-3, 4e-3, 8e-3)  # of all parameters; on Muon of its matrices, the others have the recipe's
SEEDS = 3
RESULTS = Path(__file__).parent / "results"


class Sweep:
    """The runs of a table: those that are finished are read, the others trained while there is time."""

    def __init__(self, size: str, data: str, out: Path, minutes: float | None) -> None:
        self.size, self.out = SIZES[size], out
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.text = text.load(data, lm.Config.context, lm.Config.validation)
        self.data = data
        self.rates: dict[str, float] | None = None
        if size != "small":
            small = json.loads((RESULTS / "language-small.json").read_text())
            self.rates = {row["method"]: row["lr"] for row in small["rows"]}

    def run(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """The report of a run. Raises OutOfTime where it is not finished in time."""
        recipe = lm.load(method)
        rates = {"lr": rate} if recipe["options"].get("base") == "muon" else {"lr": rate, "float_lr": rate}
        settings = {"data": self.data, "seed": seed, "device": "cpu", **self.size, **rates}
        config = lm.configuration(recipe, settings)
        directory = self.out / f"{method}-{rate:g}-{seed}"
        left = None if self.end is None else (self.end - time.monotonic()) / 60
        with held(directory) as hold:
            if (directory / REPORT).is_file():
                report = json.loads((directory / REPORT).read_text())
                expected = plain(loop.describe(config, self.text))
                if differing := checkpoint.differences(report["config"], expected, "the report", ("data",)):
                    sys.exit(f"{directory} is of another run: {differing}")
                return report
            if left is not None and left <= 0:
                raise OutOfTime("the minutes are over")
            print(f"{directory.name} ...", file=sys.stderr, flush=True)
            return loop.train(
                config, self.text, out=directory, resume=True, progress=False, hold=hold, minutes=left
            )

    def tried(self, method: str, rate: float) -> float:
        """The loss at a rate with seed 0, infinite where training fails."""
        try:
            return loss_of(self.run(method, rate, 0))
        except TrainingError as error:
            print(f"{method} at {rate:g}: {error}", file=sys.stderr)
            return math.inf

    def row(self, method: str) -> dict[str, Any]:
        """The row of a method: at every rate with seed 0, at the best of them with all seeds."""
        tried: dict[float, float] = {}
        if self.rates is not None and method not in self.rates:
            raise TrainingError("bench/results/language-small.json has no rate of it")
        wanted = list(RATES) if self.rates is None else [self.rates[method]]
        while wanted:
            tried |= {rate: self.tried(method, rate) for rate in wanted}
            best = min(tried, key=tried.__getitem__)
            wanted = [best / 2] if best == min(tried) else [2 * best] if best == max(tried) else []
            if self.rates is not None:
                break
        reports = [self.run(method, best, seed) for seed in range(SEEDS)]
        losses = [loss_of(report) for report in reports]
        return {
            "method": method,
            "bits": reports[0]["config"]["bits"],
            "rates": {f"{rate:g}": loss for rate, loss in tried.items()},
            "lr": best,
            "losses": losses,
            "mean": statistics.mean(losses),
            "std": statistics.stdev(losses),
            "packed_difference": packed_difference(reports),
            "training": statistics.mean(report["curves"]["loss"][-1] for report in reports),
            "parameters": reports[0]["parameters"],
            "bytes_packed": reports[0]["bytes_packed"],
        }


def loss_of(report: dict[str, Any]) -> float:
    """Validation loss of the projected network, of the float one where there is no projection."""
    loss: float = report["loss"] if report["loss_quantized"] is None else report["loss_quantized"]
    return loss


def packed_difference(reports: list[dict[str, Any]]) -> float | None:
    """The largest difference between the losses of a packed and a projected network."""
    if reports[0]["loss_packed"] is None:
        return None
    return max(abs(report["loss_packed"] - report["loss_quantized"]) for report in reports)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text; against: the mean less those of straight-through and of float."""
    means = {row["method"]: row["mean"] for row in rows}
    lines = [f"{'method':24}{'lr':>8}{'mean':>9}{'std':>8}{'- straight':>12}{'- float':>9}  losses"]
    for row in rows:
        against = [
            f"{row['mean'] - means[name]:+.4f}" if name in means else "-"
            for name in ("straight-through", "float")
        ]
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        figures = f"{row['lr']:8g}{row['mean']:9.4f}{row['std']:8.4f}"
        lines.append(f"{row['method']:24}{figures}{against[0]:>12}{against[1]:>9}  {losses}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="text file")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--methods", nargs="+", choices=lm.names(), metavar="NAME", help="(all of the size)")
    parser.add_argument("--out", type=Path, help="directory of the runs (build/language-SIZE)")
    parser.add_argument("--minutes", type=float, help="stop before a run would end later")
    arguments = parser.parse_args()
    out = arguments.out or Path("build") / f"language-{arguments.size}"
    every = lm.names() if arguments.size == "small" else list(MEDIUM)
    methods = arguments.methods or every
    sweep = Sweep(arguments.size, arguments.data, out, arguments.minutes)
    rows, status = [], 0
    for method in methods:
        try:
            rows.append(sweep.row(method))
        except OutOfTime as stop:
            print(f"{method}: {stop}; the same command continues", file=sys.stderr)
            status = OUT_OF_TIME
        except TrainingError as error:  # of another seed than that of the grid
            print(f"{method}: {error}", file=sys.stderr)
            status = status or 1
    if rows:
        print(table(sorted(rows, key=lambda row: float(row["mean"]))))
    if status == 0 and set(methods) == set(every):
        head = header("cpu", torch.get_num_threads())
        write_json(
            RESULTS / f"language-{arguments.size}.json",
            {**head, "data": Path(arguments.data).name, "rows": rows},
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
