"""Training speed on random CIFAR-sized images: images per second, and the share of the optimizer's step.

    python bench/train.py --model resnet18 --device cuda --modes eager compile graph

Each mode trains one warm-up epoch, which compiles and captures, and one that is timed. The step is timed in eager mode
alone; in a graph its share is that time over the shorter iteration. On a GPU the targets are 25,000 images/s with
ResNet-18 and a share below 3 %.
"""

import dataclasses
from typing import Any

import common
import torch
from tqdm import tqdm

from quantopt.train.config import Config, resolve_device
from quantopt.train.data import Dataset
from quantopt.train.loop import Trainer
from quantopt.train.optimizers import OPTIMIZERS

MODES = {
    "eager": {},
    "compile": {"compile": True},
    "graph": {"cuda_graph": True},
    "compile-graph": {"compile": True, "cuda_graph": True},
}
SPEED, SHARE = 25_000, 0.03


def random_dataset(images: int) -> Dataset:
    """Of CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (images,), generator=generator)
    return Dataset("random", tuple("0123456789"), pixels, labels, pixels[:10], labels[:10])


def measure(config: Config, dataset: Dataset) -> tuple[float, float | None]:
    """(seconds of an iteration, seconds of the step in it; None in a graph)."""
    trainer = Trainer(config, dataset)
    with tqdm(disable=True) as bar:
        trainer.train_epoch(bar)
        trainer.seconds = trainer.update_seconds = 0.0
        trainer.train_epoch(bar)
    step = None if config.cuda_graph else trainer.update_seconds / trainer.steps_per_epoch
    return trainer.seconds / trainer.steps_per_epoch, step


def main() -> None:
    parser = common.parser("Training speed and the optimizer's share of an iteration.")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--optimizers", nargs="+", default=["askew", "stam"], choices=tuple(OPTIMIZERS))
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=tuple(MODES))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch (default: 100)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    dataset = random_dataset(arguments.steps * arguments.batch_size)
    speed, share = (SPEED, SHARE) if (device, arguments.model) == ("cuda", "resnet18") else (None, None)
    rows: list[dict[str, Any]] = []
    for optimizer in arguments.optimizers:
        config = Config(
            model=arguments.model,
            optimizer=optimizer,
            epochs=2,
            batch_size=arguments.batch_size,
            device=device,
            precision="bfloat16",
            channels_last=True,
            augment="crop-flip",
        )
        _, step = measure(config, dataset)
        for mode in arguments.modes:
            iteration, own_step = measure(dataclasses.replace(config, **MODES[mode]), dataset)
            row = {
                "case": f"{arguments.model} {optimizer} batch {arguments.batch_size} {mode}",
                "images_per_second": arguments.batch_size / iteration,
                "target_images_per_second": speed,
                "optimizer_share": (own_step or step or 0.0) / iteration,
                "target_optimizer_share": share,
            }
            rows.append(row)
            print(
                f"{row['case']:<45}{row['images_per_second']:>10,.0f} images/s"
                f"{100 * row['optimizer_share']:>8.2f} % optimizer step",
                flush=True,
            )
    result = common.write_json(rows, arguments.json, arguments.threads, device=device)
    print(f"{result['device']}; torch {torch.__version__}; commit {result['commit']}")


if __name__ == "__main__":
    main()
