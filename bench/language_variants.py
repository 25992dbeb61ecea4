"""What changes the best recipe for language models: variants of `stam-muon`, each against it with the same seeds.

    python bench/language_variants.py --data FILE [--out DIR] [--variants NAME ...] [--seeds N]

Variants of the schedule, of the scales, and three things that others report of 1-bit networks:

- rotated: the inputs of each quantised layer are multiplied by a Hadamard matrix (blocks of the largest power of 2 that
  divides their number).
- silent: latents whose sign has not changed for a quarter of the training decay, by 1 - 0.1 lr per step (after OvSW).
- decay: all latents do, by 1 - 0.1 lr.

Every run has the size, the steps and the rates of bench/language.py. Runs that are in DIR are not trained again.
Prints a table, and writes bench/results/language-variants.json when all variants are done.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import quantopt
from quantopt.train.environment import header
from quantopt.train.lm import config as lm
from quantopt.train.lm import loop, text
from quantopt.train.report import write_json

RECIPE = "stam-muon"
RESULTS = Path(__file__).parent / "results" / "language-variants.json"
SILENT = 0.25  # of the training without a change of sign
DECAY = 0.1


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix [size, size], orthonormal; size is a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.mul(matrix, size**-0.5)


def rotate(trainer: loop.Trainer) -> None:
    optimizer: Any = trainer.optimizer.optimizer
    for layer in trainer.model.modules():
        weight = layer._parameters.get("weight")
        if weight is None or optimizer.quantization(weight) is None:
            continue
        inputs = weight.shape[1]
        layer.register_forward_pre_hook(functools.partial(turned, matrix=hadamard(inputs & -inputs)))


def turned(_: nn.Module, args: tuple[Tensor], matrix: Tensor) -> tuple[Tensor]:
    x = args[0]
    return ((x.unflatten(-1, (-1, len(matrix))) @ matrix.to(x.dtype)).flatten(-2),)


def silence(trainer: loop.Trainer) -> None:
    optimizer: Any = trainer.optimizer.optimizer
    quiet = round(SILENT * trainer.config.steps)
    seen: dict[Tensor, tuple[Tensor, Tensor]] = {}  # sign of a latent, steps since it changed

    @torch.no_grad()
    def decay(*_: Any) -> None:
        for group in optimizer.param_groups:
            if group["bits"] == 0:
                continue
            for p in group["params"]:
                latent = optimizer.state[p]["latent"]
                sign = latent >= 0
                before, age = seen.get(p, (sign, torch.zeros_like(sign, dtype=torch.int32)))
                age = torch.where(sign == before, age + 1, 0)
                latent.mul_(torch.where(age > quiet, 1 - DECAY * group["lr"], 1.0))
                seen[p] = sign, age

    optimizer.register_step_post_hook(decay)


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[loop.Trainer], None] | None]] = {
    "as it is": ({}, None),
    "anneal until 60 %": ({"anneal": {"end": 0.6}}, None),
    "anneal until 95 %": ({"anneal": {"end": 0.95}}, None),
    "kappa from 0.001": ({"anneal": {"first": 0.001}}, None),
    "kappa from 0.1": ({"anneal": {"first": 0.1}}, None),
    "groups of 32": ({"scale": "group", "group_size": 32}, None),
    "groups of 128": ({"scale": "group", "group_size": 128}, None),
    "rotated": ({}, rotate),
    "silent": ({}, silence),
    "decay": ({"weight_decay": DECAY}, None),
}


def run(name: str, seed: int, data: str, out: Path) -> dict[str, Any]:
    """The report of a run."""
    settings, change = VARIANTS[name]
    recipe = lm.load(RECIPE)
    given = {"data": data, "seed": seed, "device": "cpu", **settings}
    if "anneal" in given:
        given["anneal"] = lm.configuration(recipe, {}).anneal | given["anneal"]
    config = lm.configuration(recipe, given)
    words = text.load(data, config.context, config.validation)
    file = out / f"{name}-{seed}.json"
    own = {"variant": name} | ({"silent": SILENT, "decay": DECAY} if change is silence else {})
    if file.is_file():
        report: dict[str, Any] = json.loads(file.read_text())
        expected = loop.describe(config, words) | {"data": report["config"]["data"]}
        if report.get("variant") != own or report["config"] != json.loads(json.dumps(expected)):
            sys.exit(f"{file} is of another run: remove it, or choose another --out")
        return report
    trainer = loop.Trainer(config, words)
    if change is not None:
        change(trainer)
    with tqdm(total=config.steps, desc=f"{name}, seed {seed}", mininterval=30) as bar:
        trainer.train_until(config.steps, bar)
    report, packed = trainer.finish()
    assert packed is not None and any(isinstance(m, quantopt.nn.BinaryLinear) for m in packed.modules())
    write_json(file, {**report, "variant": own})
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="text file")
    parser.add_argument(
        "--out", type=Path, default=Path("build/language-variants"), help="of the runs (%(default)s)"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0..N-1 (%(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    losses: dict[str, list[float]] = {name: [] for name in arguments.variants}
    for seed in range(arguments.seeds):
        for name in arguments.variants:
            losses[name].append(run(name, seed, arguments.data, arguments.out)["loss_quantized"])
    means = {name: statistics.mean(values) for name, values in losses.items()}
    base = means.get("as it is")
    print(f"{'variant':20}{'mean':>9}{'less':>9}  losses of the projected network, nats per byte")
    for name, values in losses.items():
        less = "-" if base is None else f"{means[name] - base:+.4f}"
        print(f"{name:20}{means[name]:9.4f}{less:>9}  " + " ".join(f"{x:.4f}" for x in values))
    if set(arguments.variants) == set(VARIANTS) and arguments.seeds >= 3:
        head = header("cpu", torch.get_num_threads())
        rows = [{"variant": name, "losses": losses[name], "mean": means[name]} for name in losses]
        write_json(RESULTS, {**head, "data": Path(arguments.data).name, "recipe": RECIPE, "rows": rows})


if __name__ == "__main__":
    main()
