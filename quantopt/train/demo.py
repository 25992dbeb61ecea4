"""`python -m quantopt.train.demo`: trains, packs and measures one network per optimizer, and prints a table."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantopt.train import augment, data, report
from quantopt.train.arguments import add_options, given, nonempty
from quantopt.train.cli import guarded
from quantopt.train.config import Config, default_batch_size, resolve_device
from quantopt.train.directory import check_out, held, write_run
from quantopt.train.environment import versions
from quantopt.train.errors import require
from quantopt.train.loop import Trainer, train
from quantopt.train.measure import weight_bytes
from quantopt.train.progress import Bar, bar

OPTIMIZERS = ("sgd", "binaryconnect", "binaryrelax", "proxquant", "askew", "stam")

# Bytes of training images below which one thread is used: the operations are so short that more threads mostly wait for
# each other, which takes long on a busy machine.
_SMALL = 1 << 20


def run(arguments: argparse.Namespace) -> int:
    """Trains with each of `OPTIMIZERS` in turn; writes report.json, curves.png and weights.png in --out, and a folder
    for each run."""
    require("demo", "matplotlib", *(["scikit-learn"] if arguments.data == "digits" else []))
    out = Path(arguments.out)
    check_out(out)
    with held(out):
        return _run(arguments, out)


def _run(arguments: argparse.Namespace, out: Path) -> int:
    started = time.perf_counter()
    device = resolve_device(arguments.device)
    dataset = data.load(arguments.data)
    if dataset.train_images.numel() < _SMALL:
        torch.set_num_threads(1)
    settings = {
        "batch_size": default_batch_size(len(dataset.train_labels), arguments.limit),
        "augment": augment.default_mode(*dataset.shape),
        **given(arguments),
        "device": device,
    }
    reports: dict[str, dict[str, Any]] = {}
    histograms: dict[str, Tensor] = {}
    smallest = math.inf
    for name in OPTIMIZERS:
        config = Config(**settings, optimizer=name)
        with bar(True, name, total=config.epochs, unit="epochs", leave=False) as shown:

            def advance(trainer: Trainer, shown: Bar = shown) -> None:
                loss, accuracy = trainer.curves["loss"][-1], trainer.curves["accuracy"][-1]
                shown.set_postfix({"loss": f"{loss:.4f}", "accuracy": f"{accuracy:.2f}%"})
                shown.update()

            with held(out / name) as hold:
                result = train(config, dataset, out=out / name, progress=False, on_epoch=advance, hold=hold)
                write_run(out / name, result, hold)
        reports[name] = result.report
        if result.packed is not None:
            before, after = weight_bytes(result.model, result.packed)
            smallest = min(smallest, before / after)
        histograms[name] = result.histograms
    report.plot_curves(out / report.CURVES_PNG, {name: r["curves"] for name, r in reports.items()})
    report.plot_weights(out / report.WEIGHTS_PNG, histograms)
    seconds = time.perf_counter() - started
    report.write_json(
        out / "report.json",
        {
            "data": dataset.name,
            "model": arguments.model,
            "seed": arguments.seed,
            "versions": versions(),
            "seconds": seconds,
            "runs": reports,
        },
    )
    first = next(iter(reports.values()))["config"]
    print(
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images, "
        f"{arguments.model}, {first['epochs']} epochs, batch {first['batch_size']}, seed {arguments.seed}, "
        f"1-bit weights except in the first and last layer\n"
    )
    print(report.table(reports))
    print(
        "\nBytes are those of the whole network; the weights of the quantised layers alone shrink at least "
        f"{smallest:.1f}x."
    )
    print(f"{seconds:.0f} s in all; written: {out}/report.json, {report.CURVES_PNG}, {report.WEIGHTS_PNG}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m quantopt.train.demo", description=__doc__)
    add_options(parser, "demo")
    parser.set_defaults(model=Config.model, epochs=Config.epochs)
    parser.add_argument(
        "--out", type=nonempty, default="runs/demo", metavar="DIR", help="directory to write to (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    return guarded("quantopt demo", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
