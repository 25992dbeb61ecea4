"""Writes tests/data/old: what quantopt 0.1.0 wrote, before its layout changed, which must go on loading.

tests/test_old_files.py reads it. Run again only to add a file of a later version, under another name.
"""

from pathlib import Path

import torch
from torch import nn

import quantopt
from golden import numbers
from quantopt.train.models import Normalize

FOLDER = Path(__file__).parent / "data" / "old"
OPTIMIZERS = {
    "askew-memory-bf16": lambda groups: quantopt.AskewSGD(
        groups, lr=0.125, memory=True, momentum_dtype="bfloat16"
    ),
    "askew-adam": lambda groups: quantopt.AskewAdam(
        groups, lr=0.0625, weight_decay=0.125, constrain="gradient"
    ),
    "stam": lambda groups: quantopt.STAM(groups, lr=0.125),
    "binaryconnect-clipped": lambda groups: quantopt.BinaryConnect(groups, lr=0.125, clip=0.5),
}


def parameters(name: str) -> list[nn.Parameter]:
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    return [nn.Parameter(numbers(shape, i, dtype)) for i, shape in enumerate(((4, 3, 5), (6, 10), (7,)))]


def optimizer(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": params[:2], "param_names": ["a", "b"], "bits": 1, "scale": "channel"},
        {"params": params[2:], "param_names": ["c"], "bits": 0, "lr": 0.25},
    ]
    return OPTIMIZERS[name](groups)


def advance(opt: torch.optim.Optimizer, anneal: quantopt.Anneal, first: int, steps: int) -> None:
    for k in range(first, first + steps):
        for i, p in enumerate([p for group in opt.param_groups for p in group["params"]]):
            p.grad = numbers(tuple(p.shape), 100 * k + i, p.dtype)
        opt.step()
        anneal.step()


def tiny(_: str, __: object, classes: int, mean: list[float], deviation: list[float]) -> nn.Module:
    """In place of the command line's networks, whose checkpoints are large."""
    return nn.Sequential(
        Normalize(mean, deviation), nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, classes),
    )  # fmt: skip


def packed_model() -> nn.Module:
    layers = [
        nn.Conv2d(2, 8, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 12),
        nn.ReLU(),
        nn.Linear(12, 9),
    ]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(numbers(tuple(p.shape), 20 + i))
    return model


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    saved = {}
    for name in OPTIMIZERS:
        params = parameters(name)
        opt = optimizer(name, params)
        anneal = quantopt.Anneal(opt, 8)
        advance(opt, anneal, 1, 5)
        state = opt.state_dict()
        weights = [p.detach().clone() for p in params]
        state = {"optimizer": state, "anneal": anneal.state_dict(), "weights": weights}
        torch.save(state, FOLDER / "now.pt")
        state = torch.load(FOLDER / "now.pt", weights_only=True)  # no memory shared with what goes on
        advance(opt, anneal, 6, 2)
        saved[name] = state | {"expected": [p.detach().clone() for p in params]}
    (FOLDER / "now.pt").unlink()
    torch.save(saved, FOLDER / "optimizers-0.1.0.pt")

    model = packed_model()
    opt = quantopt.STAM(quantopt.param_groups(model, bits=2, scale="channel", skip=("last",)))
    packed = quantopt.pack(model, opt)
    quantopt.save(packed, FOLDER / "packed-0.1.0.safetensors")
    torch.save({name: m.weight.clone() for name, m in packed.named_children() if hasattr(m, "weight")},
               FOLDER / "packed-0.1.0-weights.pt")  # fmt: skip

    from quantopt.train import data, models
    from quantopt.train.config import Config
    from quantopt.train.directory import CHECKPOINT
    from quantopt.train.loop import train

    models.build = tiny
    config = Config(data="digits", model="cnn", optimizer="askew-adam", epochs=2, batch_size=32, limit=100)
    curves = []

    def stop(trainer: object) -> None:
        curves.append(trainer.curves)
        if trainer.epoch == 1:
            (FOLDER / CHECKPOINT).rename(FOLDER / "checkpoint-0.1.0.pt")

    train(config, data.load("digits"), out=FOLDER, progress=False, on_epoch=stop)
    (FOLDER / CHECKPOINT).unlink()
    torch.save(curves[-1], FOLDER / "checkpoint-0.1.0-curves.pt")


if __name__ == "__main__":
    main()
