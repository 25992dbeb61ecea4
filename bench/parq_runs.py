"""The runs of bench/parq.py: a network trained by one of our optimizers or by torchao's PARQ, and what it leaves."""

import io
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from memory import storages, tensors_in
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import quantopt
from quantopt.optim.state import SIGNS
from quantopt.train import optimizers
from quantopt.train.config import Config
from quantopt.train.data import Dataset
from quantopt.train.loop import Trainer
from quantopt.train.measure import evaluate, reestimate_batch_norm

OURS = ("askew", "stam", "binaryconnect")
ANNEALED_METHODS = ("parq", "parq-channel")
PARQ = (*ANNEALED_METHODS, "parq-hard")
STEEPNESS = (10.0, 1.0, 50.0)  # of ProxPARQ; the first is torchao's default
SKIP = ("first", "last")
WARMUP = 0.03  # of the steps, of the rate for all, and before PARQ quantises: 200 steps in the script of its authors
ANNEALED = 0.75  # of the steps, as in that script: 150 of 200 epochs
DECAY = 2e-4
PERIOD = 10  # steps from one set of levels to the next: QuantOptimizer's default
CHECKED = 1000  # test images, at most, that a packed and a projected network classify


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
        warmup=WARMUP,
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
            opt.base_optimizer, lambda step: optimizers.schedule(step, total, WARMUP)
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
    record: dict[str, Any] = {"levels": levels, "file": saved_bytes(model)}
    try:
        packed = quantopt.pack(model.eval(), fold_batchnorm=True)  # reads the levels off the weights
    except ValueError as error:  # four levels of least squares are not evenly spaced
        record["why_not_packed_by_ours"] = str(error)
    else:
        record["file_packed_by_ours"] = packed_bytes(packed)
        record["packed_differs"] = int((classes_of(packed, images) != classes).sum())
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
