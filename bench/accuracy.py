"""Quantised test accuracy over seeds, on the digits or any data that `quantopt train` reads.

    python bench/accuracy.py [--data digits] [--model cnn] [--optimizer NAME ...] [--seeds 3] [--json FILE]

Rows: mean and standard deviation over the seeds of the test accuracy of the quantised network, in percent (of the full
precision network for sgd), and the mean of the packed one.
"""

import argparse
import statistics
from typing import Any

import torch
from common import write_json

from quantopt.train import data, loop, recipes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="cnn")
    parser.add_argument(
        "--optimizer", nargs="+", choices=list(recipes.RECIPES), default=list(recipes.RECIPES)
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dataset = data.load(arguments.data)
    batch_size = loop.default_batch_size(len(dataset.train_images))
    rows: list[dict[str, Any]] = []
    print(f"{'optimizer':14}{'mean':>8}{'std':>7}{'packed':>8}   per seed")
    for optimizer in arguments.optimizer:
        reports = []
        for seed in range(arguments.seeds):
            config = loop.Config(
                data=arguments.data,
                model=arguments.model,
                optimizer=optimizer,
                epochs=arguments.epochs,
                batch_size=batch_size,
                seed=seed,
            )
            reports.append(loop.train(config, dataset, progress=False).report)
        key = "accuracy_latent" if optimizer == "sgd" else "accuracy_quantized"
        values = [report[key] for report in reports]
        packed = (
            None if optimizer == "sgd" else statistics.mean(report["accuracy_packed"] for report in reports)
        )
        row = {
            "model": arguments.model,
            "optimizer": optimizer,
            "bits": 0 if optimizer == "sgd" else 1,
            "seeds": arguments.seeds,
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "packed_mean": packed,
            "epochs": arguments.epochs,
            "device": "cpu",
        }
        rows.append(row)
        shown = "-" if packed is None else f"{packed:.2f}"
        each = " ".join(f"{value:.2f}" for value in values)
        print(f"{optimizer:14}{row['mean']:8.2f}{row['std']:7.2f}{shown:>8}   {each}", flush=True)
    if arguments.json:
        write_json(rows, arguments.json, arguments.threads)


if __name__ == "__main__":
    main()
