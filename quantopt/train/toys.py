"""Two problems with known answers: `python -m quantopt.train.toys` solves them and draws toys.png.

They are those of the AskewSGD paper (Leconte, Schechtman, Moulines, AISTATS 2023), in other sizes:

- logistic regression in 10 dimensions whose true weights are w* = c s, s in {-1, +1}^10: an optimizer for weights
  in {-1, +1} should find the signs s, also where c < 1 and the float optimum lies inside the box;
- two moons, classified by a 2-3-1 network without biases: its 9 weights make 512 binary networks, of which the best
  bounds what any training can reach.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantopt
from quantopt.train import report
from quantopt.train.cli import guarded
from quantopt.train.directory import check_out

DIMENSIONS = 10
HIDDEN = 3
WEIGHTS = 2 * HIDDEN + HIDDEN
TOYS_PNG = "toys.png"

Make = Callable[[list[dict[str, Any]]], Any]

# Levels are -1 and +1, gradients are those of averaged losses without batch norm: rates are larger than a network's.
OPTIMIZERS: dict[str, Make] = {
    "askew": lambda groups: quantopt.AskewSGD(groups, lr=0.3, rate=0.1),
    "stam": lambda groups: quantopt.STAM(groups, lr=0.3, form="splitting"),
    "binaryconnect": lambda groups: quantopt.BinaryConnect(groups, lr=0.3),
    "binaryrelax": lambda groups: quantopt.BinaryRelax(groups, lr=0.3),
}


def train(
    make: Make, model: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int, generator: torch.Generator
) -> list[Tensor]:
    """Trains all weights of ``model`` for levels -1 and +1 on logits and labels y in {0, 1}. Returns the flattened
    weights before each step, and at the end the projected ones."""
    parameters = list(model.parameters())
    optimizer = make([{"params": parameters, "bits": 1, "scale": "none"}])
    anneal = quantopt.Anneal(optimizer, total_steps=steps)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    path = []
    for _ in range(steps):
        path.append(nn.utils.parameters_to_vector(parameters).detach().clone())
        chosen = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x[chosen]).squeeze(-1), y[chosen]).backward()
        optimizer.step()
        scheduler.step()
        anneal.step()
    with optimizer.quantized():
        path.append(nn.utils.parameters_to_vector(parameters).detach().clone())
    return path


def logistic(
    make: Make, c: float, seed: int = 0, steps: int = 1000, samples: int = 2000
) -> tuple[Tensor, list[Tensor]]:
    """(s, path): the signs of w* = c s and the weights of a logistic regression of P(y = 1) = sigmoid(w*.x) during
    training, with x a standard Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (DIMENSIONS,), generator=generator) * 2.0 - 1
    x = torch.randn(samples, DIMENSIONS, generator=generator)
    y = torch.bernoulli(torch.sigmoid(x @ (c * signs)), generator=generator)
    model = nn.Linear(DIMENSIONS, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(0.2 * torch.rand(1, DIMENSIONS, generator=generator) - 0.1)
    return signs, train(make, model, x, y, steps, 50, generator)


def moons(samples: int = 1000, noise: float = 0.15) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles, each coordinate of mean 0 and deviation 1: x [samples, 2], y in {0, 1}."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(samples, noise=noise, random_state=0)
    x = torch.tensor(points, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(labels, dtype=torch.float32)


def moons_network() -> nn.Sequential:
    """2-3-1 with ReLU, without biases."""
    return nn.Sequential(nn.Linear(2, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, 1, bias=False))


def binary_networks(x: Tensor, y: Tensor) -> Tensor:
    """Accuracy in percent of all 512 networks with weights in {-1, +1}. Bit i of the index is set where the i-th of
    the weights, in the order of `model.parameters()`, is +1."""
    index = torch.arange(2**WEIGHTS)
    signs = (index[:, None] >> torch.arange(WEIGHTS) & 1) * 2.0 - 1
    first, second = signs[:, : 2 * HIDDEN].view(-1, HIDDEN, 2), signs[:, 2 * HIDDEN :]
    hidden = torch.einsum("nd,khd->knh", x, first).relu()
    logits = torch.einsum("knh,kh->kn", hidden, second)
    return 100 * ((logits > 0) == (y > 0.5)).float().mean(1)


def train_moons(make: Make, x: Tensor, y: Tensor, seed: int = 0, steps: int = 600) -> int:
    """The index in `binary_networks` of the network that training ends in."""
    generator = torch.Generator().manual_seed(seed)
    model = moons_network()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(2 * torch.rand(weight.shape, generator=generator) - 1)
    final = train(make, model, x, y, steps, 100, generator)[-1]
    return int(((final > 0) << torch.arange(WEIGHTS)).sum())


def run(out: Path, seeds: int) -> None:
    """Prints both tables and draws the figure."""
    check_out(out)
    torch.set_num_threads(1)
    print(f"logistic regression, mean wrong signs of {DIMENSIONS} over {seeds} seeds")
    print(f"{'optimizer':14}" + "".join(f"{f'w* = ±{c}':>12}" for c in (1.0, 0.8, 0.3)))
    paths = {}
    for name, make in OPTIMIZERS.items():
        means = []
        for c in (1.0, 0.8, 0.3):
            results = [logistic(make, c, seed) for seed in range(seeds)]
            means.append(sum(int((path[-1] != signs).sum()) for signs, path in results) / seeds)
            signs, path = results[0]
            paths[name] = torch.stack(path) * signs
        print(f"{name:14}" + "".join(f"{mean:12.1f}" for mean in means))
    x, y = moons()
    accuracies = binary_networks(x, y)
    print(f"\ntwo moons, the best of {len(accuracies)} binary networks: {accuracies.max():.1f} %")
    print(f"{'optimizer':14}{'mean %':>10}{'best %':>10}")
    reached = {}
    for name, make in OPTIMIZERS.items():
        reached[name] = accuracies[[train_moons(make, x, y, seed) for seed in range(seeds)]]
        print(f"{name:14}{reached[name].mean():10.1f}{reached[name].max():10.1f}")
    out.mkdir(parents=True, exist_ok=True)
    _draw(out / TOYS_PNG, paths, accuracies, reached)
    print(f"\nwritten: {out / TOYS_PNG}")


def _draw(path: Path, paths: dict[str, Tensor], accuracies: Tensor, reached: dict[str, Tensor]) -> None:
    """Above: the weights of the regression with w* = 0.3 s, times s. Below: where runs end among the 512 networks."""
    figure, panels = report.new_figure(2, len(paths), width=3.2 * len(paths), height=6)
    for panel, (name, weights) in zip(panels, paths.items(), strict=False):
        panel.plot(weights.numpy(), linewidth=0.8)
        panel.set_title(f"{name}, logistic, w* = ±0.3", fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylabel("weight x true sign")
        panel.set_ylim(-1.2, 1.2)
    for panel, (name, found) in zip(panels[len(paths) :], reached.items(), strict=True):
        panel.hist(accuracies.numpy(), bins=40, range=(0, 100), color="#BBBBBB", label="all 512 networks")
        for i, value in enumerate(found.tolist()):
            panel.axvline(value, color="#D55E00", linewidth=1.2, label="trained" if i == 0 else None)
        panel.axvline(
            float(accuracies.max()), color="#000000", linestyle=":", linewidth=1.2, label="the best"
        )
        panel.set_title(f"{name}, two moons", fontsize=10)
        panel.set_xlabel("accuracy, %")
        panel.set_ylabel("networks")
        panel.legend(fontsize=7, frameon=False)
    report.save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the toy problems; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m quantopt.train.toys", description=__doc__)
    parser.add_argument(
        "--out", default="runs/toys", metavar="DIR", help="directory to write to (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, choices=range(1, 101), metavar="N", help="(%(default)s)"
    )
    arguments = parser.parse_args(argv)

    def work() -> int:
        run(Path(arguments.out), arguments.seeds)
        return 0

    return guarded("quantopt toys", work)


if __name__ == "__main__":
    sys.exit(main())
