"""Toys with known answers: `python -m quantopt.train.toys` solves them, prints tables and writes toys.json and figures.

The logistic regression and the two moons of the AskewSGD paper, at its settings (`quantopt.train.toy_problems`), and
the rate at which both forms of STAM become stationary (`quantopt.train.stationarity`). All of it takes less than three
minutes on one core.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantopt.train import environment, report, stationarity, toy_problems
from quantopt.train.cli import guarded
from quantopt.train.directory import check_out
from quantopt.train.errors import require, writing
from quantopt.train.toy_problems import Trained

TOYS_JSON = "toys.json"
LOGISTIC_PNG, MOONS_PNG, STATIONARITY_PNG = "logistic.png", "moons.png", "stationarity.png"


def run(out: Path, settings: toy_problems.Settings, stationary: stationarity.Settings) -> None:
    """Solves all of them, prints their tables, and writes toys.json and the figures to ``out``."""
    require("toys", "matplotlib", "scikit-learn")
    check_out(out)
    torch.set_num_threads(1)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    regressions, trained = toy_problems.solve_regressions(settings)
    print(logistic_text(regressions))
    _draw_losses(out / LOGISTIC_PNG, trained)
    moons, trained = toy_problems.solve_moons(settings)
    print(moons_text(moons))
    _draw_losses(out / MOONS_PNG, trained)
    stam = stationarity.measure(stationary)
    print(stationarity_text(stam))
    _draw_mappings(out / STATIONARITY_PNG, stam)
    head = environment.header("cpu", torch.get_num_threads())
    report.write_json(
        out / TOYS_JSON, {**head, "logistic": regressions, "moons": moons, "stationarity": stam}
    )
    print(
        f"\nwritten: {', '.join(str(out / n) for n in (TOYS_JSON, LOGISTIC_PNG, MOONS_PNG, STATIONARITY_PNG))}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean_and_std(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{row[f'{name} mean']:.3f} ± {row[f'{name} std']:.3f}" for name in names]


def logistic_text(result: Mapping[str, Any]) -> str:
    """The tables of the regression."""
    parts = [
        f"logistic regression, {result['seeds']} seeds; training loss of the float optimum "
        f"{result['loss_float_optimum']:.5f}"
    ]
    head = (
        "method",
        "seeds with all signs right",
        "loss at the vertices",
        "above float there, largest, %",
        "the same, mean of the last half of the epochs, %",
        "loss of the network's weights",
    )
    for title, rows in result["rows"].items():
        lines = [
            (
                row["method"],
                str(row["seeds_all_right"]),
                f"{row['loss_vertices']:.5f}",
                f"{row['largest_excess_percent']:.2f}",
                f"{row['late_excess_percent']:.2f}",
                f"{row['loss_network']:.5f}",
            )
            for row in rows
        ]
        parts.append(f"{title}\n\n{_table(head, lines)}")
    return "\n\n".join(parts)


def moons_text(result: Mapping[str, Any]) -> str:
    """The tables of the two moons."""
    paper = {name: method.paper for name, method in toy_problems.METHODS.items()}
    constant, cosine = result["rows"]["constant"], result["rows"]["cosine"]
    rows = [
        (
            row["method"],
            *(
                f"{r['mean']:.3f} ± {r['std']:.3f} ({r['above_best']:+.3f}, {r['runs_within_0.02']})"
                for r in (row, other)
            ),
            paper.get(row["method"]) or "-",
        )
        for row, other in zip(constant, cosine, strict=True)
    ]
    rows.append(("best of the 512 networks", *[f"{result['best_of_512']:.3f}"] * 2, "2.1"))
    readings = [
        (f"{r['noise']}", "yes" if r["standardised"] else "no", f"{r['float']:.3f}", f"{r['best']:.3f}")
        for r in result["readings"]
    ]
    others = ("binaryconnect", "askew printed, velocity")
    draws = [
        (
            str(row["draw"]),
            "yes" if row["standardised"] else "no",
            f"{row['best_of_512']:.3f}",
            f"{row['test_of_best_in_training']:.3f}",
            *_mean_and_std(row, others),
        )
        for row in result["other_points"]
    ]
    orders = ("velocity", "gradient")
    caps = [(f"{row['cap']}", *_mean_and_std(row, orders)) for row in result["caps"]]
    return "\n\n".join(
        (
            f"\ntwo moons, noise {result['noise']}, {result['runs']} runs, test loss x1e3: mean ± std (above the best "
            "of 512, runs within 0.02 of it)",
            _table(("method", "rate 1", "rate 1 falling to 0 by a cosine", "paper"), rows),
            f"the best network on the training points has {result['test_of_best_in_training']:.3f} on the test points",
            "noise and normalisation, which the paper does not give (its float 2.045, best 2.1)",
            _table(("noise", "standardised", "float", "best of 512"), readings),
            "other points, rate 1",
            _table(("draw", "standardised", "best of 512", "best in training", *others), draws),
            "bound of the restoring step, which the paper does not give, rate 1, askew printed",
            _table(("bound in units of t", *orders), caps),
        )
    )


def stationarity_text(result: Mapping[str, Any]) -> str:
    """The table of the mappings."""
    horizons = result["horizons"]
    rows = [
        (
            row["row"],
            f"{row['least'][0]:.2e}",
            f"{row['least'][-1]:.2e}",
            *(f"{row[f'{kind}_slope']:.3f} ± {row[f'{kind}_slope_error']:.3f}" for kind in ("least", "mean")),
        )
        for row in result["rows"]
    ]
    head = (
        "mapping",
        f"least, T = {horizons[0]}",
        f"least, T = {horizons[-1]}",
        "slope",
        "slope of the mean",
    )
    return f"\nSTAM, squared gradient mapping among T iterations, {result['seeds']} seeds\n\n{_table(head, rows)}"


def _draw_losses(path: Path, trained: Mapping[str, Mapping[str, Trained]]) -> None:
    """Training loss against the epoch, mean over the runs: above of the weights that the network runs with, below of
    the nearest binary ones."""
    figure, panels = report.new_figure(2, len(trained), width=5.5 * len(trained), height=7.5)
    parts: tuple[tuple[str, Callable[[Trained], torch.Tensor]], ...] = (
        ("training loss of the network's weights", lambda run: run.curve),
        ("training loss of the nearest binary weights", lambda run: run.projected),
    )
    panel = iter(panels)
    for label, of in parts:
        for title, runs in trained.items():
            axes = next(panel)
            for (color, dashes), (name, training) in zip(report.styles(len(runs)), runs.items(), strict=True):
                axes.plot(
                    of(training).mean(1).numpy(), color=color, linestyle=dashes, linewidth=1.4, label=name
                )
            axes.set_title(title, fontsize=11)
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    report.save_figure(figure, path)


def _draw_mappings(path: Path, result: Mapping[str, Any]) -> None:
    """The least squared mapping against T, with a line of slope -1/2."""
    figure, (panel,) = report.new_figure(1, 1, width=8, height=5)
    horizons = result["horizons"]
    for (color, dashes), row in zip(report.styles(len(result["rows"])), result["rows"], strict=True):
        label = f"{row['row']}, {row['least_slope']:.2f} ± {row['least_slope_error']:.2f}"
        panel.loglog(
            horizons, row["least"], color=color, linestyle=dashes, marker="o", markersize=3, label=label
        )
    first = result["rows"][0]["least"][0]
    panel.loglog(
        horizons,
        [2 * first * (horizons[0] / t) ** 0.5 for t in horizons],
        color="#BBBBBB",
        label="slope -1/2",
    )
    panel.set_xlabel("iterations T")
    panel.set_ylabel("least squared mapping, mean over the seeds")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, frameon=False)
    report.save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the toy problems; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m quantopt.train.toys", description=__doc__)
    parser.add_argument(
        "--out", default="runs/toys", metavar="DIR", help="directory to write to (%(default)s)"
    )
    arguments = parser.parse_args(argv)

    def work() -> int:
        run(Path(arguments.out), toy_problems.Settings(), stationarity.Settings())
        return 0

    return guarded("quantopt toys", work)


if __name__ == "__main__":
    sys.exit(main())
