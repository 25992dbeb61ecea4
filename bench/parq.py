"""torchao's PARQ and this package, as their users run them: the same network, data, batches, epochs and layers.

    python bench/parq.py --only accuracy [--data FILE] [--out DIR]     trains; the same command continues what was cut
    python bench/parq.py --only times                                  seconds of a step, an iteration and a forward
    python bench/parq.py --only table                                  prints bench/results/parq.json

PARQ (torchao.prototype.parq) is set up as the README of torchao and the CIFAR-10 script of its authors
(facebookresearch/parq, scripts/qat_resnet_cifar10.sh) do: QuantOptimizer around SGD with momentum, a new set of levels
every 10 steps, ProxPARQ from the warm-up to three quarters of the training, weight decay 2e-4. Its methods:

    parq            least-squares levels (LSBQuantizer), one set for a tensor, as in that script
    parq-channel    levels of StretchedUnifTorchaoQuantizer for each row: those that torchao_convert takes
    parq-hard       as parq, straight-through (ProxHardQuant)

Ours are the recipes of the package, with one scale for a tensor. Layers, learning-rate schedule (a warm-up, then a
cosine), settings of all other parameters and the estimate of the batch norm's statistics at the end are the same for
all. Of each method three learning rates of the quantised weights (of float: of all) are tried with one bit and one seed
on held-out training images, and up to two more while the best is an end of them; parq and parq-channel have two tries
more, of the steepness, since our schedules were chosen on this network before. Then three seeds train with one bit, and
on the digits with two bits as well. The table has the test accuracy of the weights on their levels.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
from parq_runs import (
    ANNEALED_METHODS,
    OURS,
    PARQ,
    PERIOD,
    STEEPNESS,
    Run,
    Task,
    trained,
    trainer_of,
    why_not_converted,
)
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import quantopt
from quantopt.train import data
from quantopt.train.data import Dataset
from quantopt.train.environment import header
from quantopt.train.loop import Trainer

RESULTS = Path(__file__).resolve().parent / "results/parq.json"
SEEDS = 3
BITS = (1, 2)
RATES = {"ours": (0.1, 0.3, 1.0), "parq": (0.02, 0.06, 0.2), "sgd": (0.02, 0.06, 0.2)}
FACTOR = 3.0  # to the next rate, while the best is an end of those that were tried
MOST_RATES = 5
STEPS = 20  # before networks are checked and timed


DIGITS = (Task("digits cnn", "cnn", 12, 64, 280), Task("digits mlp", "mlp", 8, 64, 280))


def given(source: str, images: int) -> Task:
    """The task of ``--data``: the cnn on ``images`` of its images."""
    return Task(f"{Path(source).name.split('.')[0]} cnn", "cnn", 6, 64, 2000, images, "crop-flip", "bfloat16")


# ---- the sweep ----


class Sweep:
    """The runs of the tables: those in ``out`` are read, the others trained."""

    def __init__(self, dataset: Dataset, out: Path) -> None:
        self.dataset, self.out = dataset, out
        out.mkdir(parents=True, exist_ok=True)

    def __call__(self, run: Run) -> dict[str, Any]:
        split = "held-out" if run.held_out else "test"
        name = f"{run.task.name}-{run.bits}-{run.method}-{run.lr:g}-{run.steepness:g}-{run.seed}-{split}"
        path = self.out / f"{name.replace(' ', '-')}.json"
        if path.is_file():
            record: dict[str, Any] = json.loads(path.read_text())
            if record["run"] != asdict(run):
                sys.exit(f"{path} is of another run: remove it, or give another --out")
            return record
        record = trained(run, self.dataset)
        path.write_text(json.dumps(record) + "\n")
        print(
            f"{path.stem}: {record['accuracy']:.2f} %, {record['seconds']:.0f} s", file=sys.stderr, flush=True
        )
        return record

    def tried(self, task: Task, method: str) -> dict[Run, dict[str, Any]]:
        """The tries of a method, with one bit."""
        bits = 32 if method == "sgd" else BITS[0]
        tried: dict[Run, dict[str, Any]] = {}
        wanted = list(rates_of(method))
        while wanted and len(tried) < MOST_RATES:
            tried |= {run: self(run) for lr in wanted for run in [Run(task, method, bits, lr, 0, True)]}
            rates = [run.lr for run in tried]
            best = chosen(tried).lr
            wanted = [best / FACTOR] if best == min(rates) else [best * FACTOR] if best == max(rates) else []
        if method in ANNEALED_METHODS:
            rate = chosen(tried).lr
            more = [Run(task, method, bits, rate, 0, True, steepness) for steepness in STEEPNESS[1:]]
            tried |= {run: self(run) for run in more}
        return tried

    def row(self, task: Task, method: str, bits: int) -> dict[str, Any]:
        """The row of a method: its tries, and three seeds at the best of them."""
        tried = self.tried(task, method)
        best = chosen(tried)
        records = [self(Run(task, method, bits, best.lr, s, False, best.steepness)) for s in range(SEEDS)]
        values = [record["accuracy"] for record in records]
        kept = {key: value for key, value in records[0].items() if key not in ("run", "accuracy", "seconds")}
        each = [key for key in ("training_loss", "packed_differs", "converted_differs") if key in kept]
        return {
            "task": task.name,
            "method": method,
            "bits": bits,
            "tries": [
                {"lr": run.lr, "steepness": run.steepness, "accuracy": r["accuracy"], "loss": r["loss"]}
                for run, r in tried.items()
            ],
            "lr": best.lr,
            "steepness": best.steepness if method in ANNEALED_METHODS else None,
            "values": values,
            "mean": statistics.mean(values),
            "std": statistics.stdev(values),
            **kept,
            **{key: [record[key] for record in records] for key in each},
        }


def rates_of(method: str) -> tuple[float, ...]:
    """The learning rates that are tried."""
    return RATES["parq" if method in PARQ else "ours" if method in OURS else "sgd"]


def chosen(tried: dict[Run, dict[str, Any]]) -> Run:
    """The run with the highest accuracy on held-out images; of equal ones the one with the least loss."""
    return max(tried, key=lambda run: (tried[run]["accuracy"], -tried[run]["loss"]))


def accuracies(tasks: Sequence[tuple[Task, Dataset]], out: Path) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    for task, dataset in tasks:
        sweep = Sweep(dataset, out)
        rows.append(sweep.row(task, "sgd", 32))
        for bits in BITS if task in DIGITS else BITS[:1]:
            rows += [sweep.row(task, method, bits) for method in (*OURS, *PARQ)]
    return rows


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text. gap: what the mean is below float; state: bytes that the optimizer keeps for each parameter;
    saved: kB of the file that the library's user ends up with; differ: of the test images that were compared, those
    that the network in it puts into another class than the weights on their levels."""
    floats = {row["task"]: row["mean"] for row in rows if row["method"] == "sgd"}
    lines = [
        f"{'task':22}{'bits':>5} {'method':15}{'rate':>6}{'steep':>6}{'mean':>8}{'std':>6}{'gap':>7}"
        f"{'state B':>9}{'saved kB':>10}{'differ':>8}  after training"
    ]
    for row in rows:
        steep = "" if row["steepness"] is None else f"{row['steepness']:g}"
        saved = row.get("file_converted", row["file"]) / 1e3
        differs = row.get("packed_differs" if row["method"] in OURS else "converted_differs")
        lines.append(
            f"{row['task']:22}{row['bits']:5} {row['method']:15}{row['lr']:6g}{steep:>6}{row['mean']:8.2f}"
            f"{row['std']:6.2f}{floats[row['task']] - row['mean']:7.2f}"
            f"{row['state_bytes'] / row['parameters']:9.2f}{saved:10.1f}{'' if differs is None else sum(differs):>8}  "
            f"{outcome(row)}"
        )
    return "\n".join(lines)


def outcome(row: dict[str, Any]) -> str:
    """What the user of the library has of the trained network, in words."""
    if row["method"] in OURS:
        return f"quantopt.pack: {row['bits']} bits a weight"
    if row["method"] not in PARQ:
        return "float"
    said = f"float32 weights on {row['levels']} levels: torchao_convert fails"
    if "file_converted" in row:
        said = "torchao_convert: a byte a weight"
    if "file_packed_by_ours" in row:
        said += f"; quantopt.pack makes {row['file_packed_by_ours'] / 1e3:.1f} kB of it"
    return said


# ---- times ----


def warmed(task: Task, dataset: Dataset, method: str, bits: int) -> Trainer:
    """A training after its first steps, whose schedules then stay in their middle part."""
    lr = rates_of(method)[0]
    trainer = trainer_of(Run(task, method, bits, lr, 0, False), dataset, epochs=100_000)
    if method in PARQ:  # past the warm-up, to where it anneals
        opt: Any = trainer.optimizer.optimizer
        opt.warmup_steps = opt.prox_map.anneal_start = 0
    for batch in batches(trainer, STEPS):
        trainer._iteration(batch)
        trainer.optimizer.advance()
    return trainer


def batches(trainer: Trainer, count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield torch.randperm(len(trainer.train_labels), generator=trainer.generator)[: trainer.batch_size]


def steps(trainer: Trainer) -> None:
    """The steps of a period, on the gradients that are there."""
    for _ in range(PERIOD):
        trainer.optimizer.update()
        trainer.optimizer.advance()


def iterations(trainer: Trainer) -> None:
    """The iterations of a period."""
    for batch in batches(trainer, PERIOD):
        trainer._iteration(batch)
        trainer.optimizer.advance()


def training_times(task: Task, dataset: Dataset, bits: int, min_time: float) -> list[dict[str, Any]]:
    """Rows of a step alone and of an iteration; ours against each peer."""
    trainers = {name: warmed(task, dataset, name, bits) for name in ("sgd", *OURS, *PARQ)}
    rows = []
    for what, function in (("step", steps), ("iteration", iterations)):
        calls: dict[str, Callable[[], object]] = {
            name: lambda trainer=trainer, function=function: function(trainer)  # type: ignore[misc]
            for name, trainer in trainers.items()
        }
        seconds = {name: s / PERIOD for name, s in common.compare(calls, min_time=min_time).items()}
        rows += [
            common.row(f"{task.name}, {bits} bit, {what} of {ours}", peer, seconds[ours], seconds[peer])
            for ours in OURS
            for peer in ("sgd", *PARQ)
        ]
    return rows


def forward_times(task: Task, dataset: Dataset, bits: int, min_time: float) -> list[dict[str, Any]]:
    """Rows of a forward of what the users have: our packed network against the float network, and against what
    torchao_convert makes where it makes something. The networks are checked against their projected weights."""
    ours = warmed(task, dataset, "askew", bits)
    opt: Any = ours.optimizer.optimizer
    images = ours.test_images
    packed = quantopt.pack(ours.model.eval(), opt, fold_batchnorm=True)
    float_model = ours.model.eval()
    with torch.no_grad(), opt.quantized():
        check(f"{task.name}, packed", packed(images), float_model(images))
    fused = fuse(float_model)
    with torch.no_grad():
        check(f"{task.name}, fused", fused(images), float_model(images))
    peers: dict[str, nn.Module] = {"float": float_model, "float, batch norms fused": fused}
    theirs = warmed(task, dataset, "parq-channel", bits)
    theirs.optimizer.optimizer.prox_map.anneal_end = 0  # the next steps put the weights on their levels
    steps(theirs)
    theirs.optimizer.update()  # the first of a period: levels of these weights
    with torch.no_grad():
        expected = theirs.model.eval()(images)
        if why_not_converted(theirs.model, theirs.optimizer.optimizer) is None:
            check(f"{task.name}, torchao_convert", theirs.model(images), expected)
            peers["torchao_convert"] = theirs.model
    rows = []
    for count in (1, 64):
        x = images[:count].clone()
        calls: dict[str, Callable[[], object]] = {
            name: lambda model=model, x=x: model(x)  # type: ignore[misc]
            for name, model in {"ours": packed, **peers}.items()
        }
        with torch.no_grad():
            seconds = common.compare_products(calls, min_time=min_time)
        case = f"{task.name}, {bits} bit, forward of {count}"
        rows += [common.row(case, name, seconds["ours"], seconds[name]) for name in peers]
    return rows


def why_not_packed(bits: int) -> str | None:
    """Whether torchao packs weights of so many bits on this processor: None, or why not."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        weight_granularity=PerGroup(32),
        intx_packing_format="opaque_torchao_auto",
    )
    try:
        quantize_(nn.Sequential(nn.Linear(512, 512, bias=False)), config)
    except Exception as error:  # an assertion where the kernels are missing
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def check(name: str, y: Tensor, expected: Tensor) -> None:
    """Stops unless both are equal up to rounding."""
    error = float((y - expected).norm() / expected.norm())
    if not error <= 1e-4:
        raise SystemExit(f"{name}: relative error {error:.2g}: no peer")


def times(tasks: Sequence[tuple[Task, Dataset]], min_time: float) -> list[dict[str, Any]]:
    """All rows; of a step those of one bit alone, whose times are those of two bits."""
    rows = []
    for task, dataset in tasks:
        rows += training_times(task, dataset, 1, min_time)
        for bits in BITS:
            rows += forward_times(task, dataset, bits, min_time)
    return rows


def main() -> int:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", required=True, choices=("accuracy", "times", "table"))
    parser.add_argument(
        "--data", metavar="FILE", help="images beside scikit-learn's digits, as `quantopt train --data`"
    )
    parser.add_argument(
        "--limit", type=int, default=3000, metavar="N", help="of these images (default: 3000)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/parq"), help="directory of the runs (build/parq)"
    )
    parser.set_defaults(json=str(RESULTS), min_time=0.3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = Path(arguments.json)
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if arguments.only != "table":
        if find_spec("torchao") is None:
            sys.exit("bench/parq.py compares with torchao, which is not installed: pip install torchao")
        tasks = [(task, data.load("digits")) for task in DIGITS]
        if arguments.data:
            tasks.append((given(arguments.data, arguments.limit), data.load(arguments.data)))
        rows = (
            accuracies(tasks, arguments.out)
            if arguments.only == "accuracy"
            else times(tasks, arguments.min_time)
        )
        facts: dict[str, Any] = {"torchao": version("torchao"), "tasks": [asdict(task) for task, _ in tasks]}
        if arguments.only == "times":
            facts["why_torchao_does_not_pack"] = {str(bits): why_not_packed(bits) for bits in BITS}
        result[arguments.only] = {**header("cpu", arguments.threads), **facts, "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
    for part, text in (("accuracy", accuracy_table), ("times", common.table)):
        if part in result and arguments.only in (part, "table"):
            of = result[part]
            print(f"{part}: {of['device']}; torchao {of['torchao']}; commit {of['commit']}")
            print(text(of["rows"]))
            for bits, why in of.get("why_torchao_does_not_pack", {}).items():
                if why is not None:
                    print(f"no packed format of torchao for {bits} bit on this processor: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
