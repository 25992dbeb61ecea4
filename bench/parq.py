"""torchao's PARQ and this package, as their users run them: the same network, data, batches, epochs and layers.

    python bench/parq.py --only accuracy [--data FILE] [--out DIR]     trains; the same command continues what was cut
    python bench/parq.py --only times                                  seconds of a step, an iteration and a forward
    python bench/parq.py --only table                                  prints bench/results/parq.json

PARQ (torchao.prototype.parq) is set up as the README of torchao and the CIFAR-10 script of its authors
(facebookresearch/parq, scripts/qat_resnet_cifar10.sh) do: QuantOptimizer around SGD with momentum, a new set of levels
every 10 steps, ProxPARQ from the first step to three quarters of the training, weight decay 2e-4. Its methods:

    parq            least-squares levels (LSBQuantizer), one set for a tensor, as in that script
    parq-channel    levels of StretchedUnifTorchaoQuantizer for each row: those that torchao_convert takes
    parq-hard       as parq, straight-through (ProxHardQuant)

Ours are the recipes of the package, with one scale for a tensor. Layers, learning-rate schedule (a cosine), settings of
all other parameters and the estimate of the batch norm's statistics at the end are the same for all. Of each method
three learning rates of the quantised weights are tried with one bit and one seed on held-out training images; parq and
parq-channel have two tries more, of the steepness, since our schedules were chosen on this network before. Then three
seeds train with one and with two bits. The table has the test accuracy of the weights on their levels.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from memory import storages, tensors_in
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from tqdm import tqdm

import quantopt
from quantopt.optim.state import SIGNS
from quantopt.train import data, optimizers
from quantopt.train.config import Config
from quantopt.train.data import Dataset
from quantopt.train.environment import header
from quantopt.train.loop import Trainer
from quantopt.train.measure import evaluate, reestimate_batch_norm

RESULTS = Path(__file__).resolve().parent / "results/parq.json"
SEEDS = 3
BITS = (1, 2)
OURS = ("askew", "stam", "binaryconnect")
ANNEALED_METHODS = ("parq", "parq-channel")
PARQ = (*ANNEALED_METHODS, "parq-hard")
RATES = {"ours": (0.1, 0.3, 1.0), "parq": (0.02, 0.06, 0.2), "sgd": (0.02, 0.06, 0.2)}
STEEPNESS = (10.0, 1.0, 50.0)  # of ProxPARQ; the first is torchao's default
SKIP = ("first", "last")
WARMUP = 0.03  # of the steps, as our recipe of STAM has; the script of PARQ's authors has 200 steps
ANNEALED = 0.75  # of the steps, as in that script: 150 of 200 epochs
DECAY = 2e-4
PERIOD = 10  # steps from one set of levels to the next: QuantOptimizer's default
CHECKED = 1000  # test images, at most, that a packed and a projected network classify
STEPS = 20  # before networks are checked and timed


@dataclass(frozen=True)
class Task:
    """A network and its data. images: as `Config.limit`; held: images of `Config.validation`."""

    name: str
    model: str
    epochs: int
    batch_size: int
    held: int
    images: int | None = None
    augment: str = "none"
    precision: str = "float32"


DIGITS = (Task("digits cnn", "cnn", 12, 64, 280), Task("digits mlp", "mlp", 8, 64, 280))


def given(source: str, images: int) -> Task:
    """The task of ``--data``: the cnn on ``images`` of its images."""
    return Task(f"{Path(source).name.split('.')[0]} cnn", "cnn", 6, 64, 2000, images, "crop-flip", "bfloat16")


@dataclass(frozen=True)
class Run:
    """What determines a run, beside the data. held_out: measured on held-out training images, not on test images."""

    task: Task
    method: str
    bits: int
    lr: float
    seed: int
    held_out: bool
    steepness: float = STEEPNESS[0]


# ---- the optimizers ----


def parq_optimizer(
    method: str, bits: int, model: nn.Module, lr: float, total: int, steepness: float, other: dict[str, float]
) -> Any:
    """QuantOptimizer on the weights that this package would quantise. other: settings of all other parameters."""
    from torchao.prototype.parq import LSBQuantizer, ProxHardQuant, ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import StretchedUnifTorchaoQuantizer

    weights = quantopt.param_groups(model, bits=bits, skip=SKIP)[0]["params"]
    chosen = {id(p) for p in weights}
    groups = [
        {"params": weights, "quant_bits": bits, "lr": lr, "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if id(p) not in chosen], **other},
    ]
    of_rows = method == "parq-channel"
    quantizer = StretchedUnifTorchaoQuantizer(bits) if of_rows else LSBQuantizer()
    warmup = round(WARMUP * total)
    annealed = ProxPARQ(warmup, max(warmup + 1, round(ANNEALED * total)), steepness)
    return QuantOptimizer(
        torch.optim.SGD(groups, momentum=0.9),
        quantizer,
        ProxHardQuant() if method == "parq-hard" else annealed,
        warmup_steps=warmup,
        quant_period=PERIOD,
        quant_per_channel=of_rows,
    )


def trainer_of(run: Run, dataset: Dataset, epochs: int | None = None) -> Trainer:
    """A training that has not begun; that of PARQ has its optimizer in place of torch's SGD."""
    task = run.task
    name = "sgd" if run.method in PARQ else run.method
    settings: dict[str, Any] = {} if name == "sgd" else {"bits": run.bits, "scale": "tensor"}
    config = Config(
        model=task.model,
        optimizer=name,
        epochs=epochs or task.epochs,
        batch_size=task.batch_size,
        seed=run.seed,
        lr=run.lr,
        skip=list(SKIP),
        validation=task.held if run.held_out else None,
        limit=task.images,
        augment=task.augment,
        precision=task.precision,
        test_every=0,
        **settings,
    )
    trainer = Trainer(config, dataset)
    if run.method in PARQ:
        total = trainer.config.epochs * trainer.steps_per_epoch
        rates = {"lr": trainer.config.float_lr, "weight_decay": trainer.config.float_weight_decay}
        opt = parq_optimizer(run.method, run.bits, trainer.model, run.lr, total, run.steepness, rates)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            opt.base_optimizer, lambda step: optimizers.schedule(step, total, 0.0)
        )
        trainer.optimizer = optimizers.Optimizer(opt, scheduler, None, None)
    return trainer


# ---- what a run leaves ----


def state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors that the optimizer keeps, by their memory, without what our metrics() adds."""
    kept = [value for state in optimizer.state.values() for key, value in state.items() if key != SIGNS]
    return sum(storages(tensors_in(kept)).values())


def most_levels(weight: Tensor, of_rows: bool) -> int:
    """The most different values, up to rounding, in a row of ``weight``, or in all of it."""
    lines = weight.detach().flatten(1) if of_rows else weight.detach().reshape(1, -1)
    scaled = (lines / lines.abs().amax(1, keepdim=True) * 1e4).round()
    return max(len(line.unique()) for line in scaled)


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the file that torch.save writes of the state."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def packed_bytes(packed: nn.Module) -> int:
    """Bytes of the file that quantopt.save writes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "packed.safetensors"
        quantopt.save(packed, path)
        return path.stat().st_size


def why_not_converted(model: nn.Module, opt: Any) -> str | None:
    """Converts ``model`` in place by torchao_convert. None, or why it does not."""
    try:
        opt.torchao_convert(model, weight_only=True)
    except Exception as error:  # an assertion of whatever depth
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def of_parq(trainer: Trainer, run: Run) -> dict[str, Any]:
    """What the trained network of PARQ has: levels, bytes, and what torchao_convert makes of it."""
    model, opt = trainer.model, trainer.optimizer.optimizer
    weights = next(iter(opt.regularized_param_groups()))["params"]
    levels = max(most_levels(p, run.method == "parq-channel") for p in weights)
    if levels > 2**run.bits:
        raise SystemExit(f"{run}: {levels} levels: not quantised")
    images = trainer.test_images[:CHECKED]
    classes = classes_of(model, images)
    packed = quantopt.pack(model.eval(), fold_batchnorm=True)  # reads the levels off the weights
    record = {
        "levels": levels,
        "file": saved_bytes(model),
        "file_packed_by_ours": packed_bytes(packed),
        "packed_differs": int((classes_of(packed, images) != classes).sum()),
    }
    record["why_not_converted"] = why_not_converted(model, opt)  # last: it puts the latent weights back
    if record["why_not_converted"] is None:
        record["file_converted"] = saved_bytes(model)
        record["converted_differs"] = int((classes_of(model, images) != classes).sum())
    return record


def of_ours(trainer: Trainer) -> dict[str, Any]:
    """What our packed network has. To be called inside ``quantized()``."""
    packed = quantopt.pack(trainer.model.eval(), trainer.optimizer.optimizer, fold_batchnorm=True)
    images = trainer.test_images[:CHECKED]
    differs = classes_of(packed, images) != classes_of(trainer.model, images)
    return {"file": packed_bytes(packed), "packed_differs": int(differs.sum())}


@torch.no_grad()
def classes_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the network says of images, in evaluation mode."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(100)])


@torch.no_grad()
def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Cross-entropy in evaluation mode."""
    model.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in parts) / len(labels)


def trained(run: Run, dataset: Dataset) -> dict[str, Any]:
    """Trains a run; its record."""
    started = time.perf_counter()
    trainer = trainer_of(run, dataset)
    with tqdm(disable=True) as bar:
        while trainer.epoch < trainer.config.epochs:
            trainer.train_epoch(bar)
    opt: Any = trainer.optimizer.optimizer
    images, labels = trainer.test_images, trainer.test_labels
    with opt.quantized() if run.method in OURS else nullcontext():
        reestimate_batch_norm(trainer.model, trainer.train_images, run.task.augment)
        accuracy = evaluate(trainer.model, images, labels)
        record: dict[str, Any] = {"run": asdict(run), "accuracy": accuracy}
        if run.held_out:
            record["loss"] = loss_of(trainer.model, images, labels)
        elif run.method in OURS:
            record |= of_ours(trainer)
    if not run.held_out:
        record["training_loss"] = trainer.curves["loss"][-1]
        record["state_bytes"] = state_bytes(opt)
        record["parameters"] = sum(p.numel() for p in trainer.model.parameters())
        if run.method in PARQ:
            record |= of_parq(trainer, run)
        elif run.method not in OURS:
            record["file"] = saved_bytes(trainer.model)
    return {**record, "seconds": time.perf_counter() - started}


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
        tried = {run: self(run) for lr in rates_of(method) for run in [Run(task, method, bits, lr, 0, True)]}
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
        for bits in BITS:
            rows += [sweep.row(task, method, bits) for method in (*OURS, *PARQ)]
    return rows


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text. gap: what the mean is below float; state: bytes that the optimizer keeps for each parameter;
    saved: kB of the file that the library's user ends up with."""
    floats = {row["task"]: row["mean"] for row in rows if row["method"] == "sgd"}
    lines = [
        f"{'task':22}{'bits':>5} {'method':15}{'rate':>6}{'steep':>6}{'mean':>8}{'std':>6}{'gap':>7}"
        f"{'state B':>9}{'saved kB':>10}  after training"
    ]
    for row in rows:
        steep = "" if row["steepness"] is None else f"{row['steepness']:g}"
        saved = row.get("file_converted", row["file"]) / 1e3
        lines.append(
            f"{row['task']:22}{row['bits']:5} {row['method']:15}{row['lr']:6g}{steep:>6}{row['mean']:8.2f}"
            f"{row['std']:6.2f}{floats[row['task']] - row['mean']:7.2f}"
            f"{row['state_bytes'] / row['parameters']:9.2f}{saved:10.1f}  {outcome(row)}"
        )
    return "\n".join(lines)


def outcome(row: dict[str, Any]) -> str:
    """What the user of the library has of the trained network, in words."""
    if row["method"] in OURS:
        return f"quantopt.pack: {row['bits']} bits a weight"
    if row["method"] not in PARQ:
        return "float"
    if "file_converted" in row:
        return "torchao_convert: a byte a weight"
    return f"float32 weights on {row['levels']} levels: torchao_convert fails"


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
        tasks = [(task, data.load("digits")) for task in DIGITS]
        if arguments.data:
            tasks.append((given(arguments.data, arguments.limit), data.load(arguments.data)))
        rows = (
            accuracies(tasks, arguments.out)
            if arguments.only == "accuracy"
            else times(tasks, arguments.min_time)
        )
        result[arguments.only] = {**header("cpu", arguments.threads), "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
    for part, text in (("accuracy", accuracy_table), ("times", common.table)):
        if part in result and arguments.only in (part, "table"):
            print(f"{part}: {result[part]['device']}; commit {result[part]['commit']}")
            print(text(result[part]["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
