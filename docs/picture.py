"""Draws docs/picture.png: weights that close on their levels, and what packing them gives.

    python docs/picture.py [FILE]

Three optimizers train the network of the README's example, 512 wide, on scikit-learn's digits (about half a minute on
one core). The speeds are those of bench/results/llm-1.7b.json, which are not measured again here.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import quantopt

DOCS = Path(__file__).parent
STEPS, WIDTH = 400, 512
EDGES = np.linspace(-2.2, 2.2, 111)
SPEED = "llm-1.7b.json"
OURS, PEER, GREY = "#3f51b5", "#9fa8da", "#9e9e9e"


# The rates were chosen by no search.
OPTIMIZERS = {
    "AskewSGD with latent": functools.partial(quantopt.AskewSGD, lr=0.1, memory=True),
    "STAM": functools.partial(quantopt.STAM, lr=1.0),
    "BinaryConnect": functools.partial(quantopt.BinaryConnect, lr=0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (64, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def trained(name: str) -> tuple[np.ndarray, float, int, int]:
    """(counts of weight / level [bins, steps], test accuracy of the packed network, bytes in float32, bytes packed)."""
    model = network()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(labels)
    train, test = torch.randperm(len(x)).split([1437, 360])
    opt: Any = OPTIMIZERS[name](quantopt.param_groups(model, bits=1, scale="channel", other={"lr": 0.02}))
    anneal = quantopt.Anneal(opt, total_steps=STEPS)
    weight = model[3].weight
    columns = []
    for _ in range(STEPS):
        with torch.no_grad():
            now = weight.clone()
            with opt.quantized():
                level = weight.abs().mean(dim=1, keepdim=True)
        columns.append(np.histogram((now / level).numpy(), EDGES)[0])
        batch = train[torch.randint(len(train), (64,))]
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        opt.step()
        anneal.step()
    with opt.quantized():
        torch.optim.swa_utils.update_bn(x[train].split(479), model)
    packed = quantopt.pack(model.eval(), opt)
    with torch.inference_mode():
        accuracy = (packed(x[test]).argmax(dim=1) == y[test]).float().mean().item()
    layer = packed[3]
    return np.stack(columns, axis=1), accuracy, weight.nbytes, layer.bits.nbytes + layer.scale.nbytes


def main(target: str) -> None:
    torch.set_num_threads(1)
    plt.rcParams.update(
        {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure = plt.figure(figsize=(10.4, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.1, 1])
    panels = left.subplots(1, 3, sharey=True)
    left.suptitle("Weights of one layer during training, in units of their level", fontsize=10.5)
    sizes = (0, 0)
    for axis, name in zip(panels, OPTIMIZERS, strict=True):
        counts, accuracy, *sizes = trained(name)
        print(f"{name}: {accuracy:.2%} of the test digits, packed")
        shown = np.where(counts > 0, np.log10(np.maximum(counts, 1)), np.nan)
        axis.imshow(
            shown,
            origin="lower",
            aspect="auto",
            extent=(0, STEPS, EDGES[0], EDGES[-1]),
            cmap="YlGnBu",
            vmin=-0.7,
        )
        axis.set_title(f"{name}\n{100 * accuracy:.1f} % packed")
        axis.set_xlabel("step")
        axis.set_yticks([-2, -1, 0, 1, 2])
        axis.set_xticks([0, STEPS // 2, STEPS])
    panels[0].set_ylabel("weight / level")

    top, bottom = right.subplots(2, 1, height_ratios=[2, 4])
    bars(top, ["float32", "packed"], [size / 1024 for size in sizes], [GREY, OURS], "{:,.0f} KiB")
    top.set_title("That layer, 512 x 512, in memory", loc="left")
    rows = json.loads((DOCS.parent / "bench" / "results" / SPEED).read_text())["rows"]
    speed = {row["name"]: row["tokens_per_second"] for row in rows if row["kind"] == "decode"}
    names = ["torch bf16", "llama.cpp Q1_0", "exact", "int8"]
    labels = [name if " " in name else f"packed, {name}" for name in names]
    bars(bottom, labels, [speed[name] for name in names], [GREY, PEER, OURS, OURS], "{:.1f}")
    bottom.set_title("Language model of 1.7B shapes,\ntokens per second on one core", loc="left")
    figure.savefig(target, dpi=120)


def bars(axis: Any, names: list[str], values: list[float], colors: list[str], text: str) -> None:
    drawn = axis.barh(names, values, color=colors, height=0.7)
    axis.bar_label(drawn, [text.format(value) for value in values], padding=3)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28 * max(values))
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(DOCS / "picture.png"))
