"""Training with everything that a run needs to be stopped, continued, packed and measured."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import quantopt
from quantopt.backends import BackendError
from quantopt.nn.luq import SAWB_BITS
from quantopt.train import augment, models, recipes
from quantopt.train.data import Dataset
from quantopt.train.environment import versions
from quantopt.train.errors import InputError
from quantopt.train.files import atomic_write, remove_temporaries
from quantopt.train.graph import Graphed

CHECKPOINT = "checkpoint.pt"
REPORT = "report.json"
MODEL = "model.safetensors"

CURVES = (
    "loss",
    "accuracy",
    "test_accuracy",
    "epsilon",
    "kappa",
    "reg_strength",
    "fraction_feasible",
    "sign_flips",
)
"""Keys of `report["curves"]`: lists with a value per epoch, None where the optimizer has no such quantity. accuracy: of
the training images as they were seen; test_accuracy: of the network as it runs in training, with its running batch-norm
statistics, after the epoch (None where `Config.test_every` says so)."""

PRECISIONS = ("float32", "bfloat16")
HISTOGRAM_LIMIT = 2.5
HISTOGRAM_BINS = 101

_EVALUATION_BATCH = {
    "cpu": 100,
    "cuda": 1000,
}  # larger ones leave the caches of a CPU, smaller ones leave a GPU idle
_STATISTICS_BATCH = 250
_STATISTICS_IMAGES = 20_000


class TrainingError(RuntimeError):
    """Training cannot go on, through no fault of the arguments' form: the loss is not finite."""


OUT_OF_TIME = 3
"""Exit status of a run or a sweep that stopped because its time was over; the same command continues it."""


class OutOfTime(Exception):
    """The time given is over; the checkpoint holds everything."""


@dataclass(frozen=True)
class Config:
    """What determines a run. None means the value of the optimizer's recipe, `recipes.HYPERPARAMETERS` describes them;
    `augment` is one of augment.MODES.

    precision: of the network's passes in training, "bfloat16" is autocast. init: the run, or its checkpoint, whose
    weights training starts from. compile: torch.compile of the network in training. cuda_graph: the iteration is
    captured and replayed (`graph.Graphed`). test_every: the test accuracy of the curves is measured after every so many
    epochs and the last, 0: never. limit: train on that many images (`Dataset.limited`), None: on all. validation:
    measure on that many training images, held out (`Dataset.validation`), None: on the test images.
    """

    data: str = "digits"
    model: str = "cnn"
    optimizer: str = "askew"
    bits: int | str | None = None
    scale: str | None = None
    skip: list[str] | None = None
    activations: int | None = None
    epochs: int = 30
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    warmup: float | None = None
    float_lr: float | None = None
    float_weight_decay: float | None = None
    options: dict[str, Any] | None = None
    anneal: dict[str, float] | None = None
    init: str | None = None
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    test_every: int = 1
    limit: int | None = None
    validation: int | None = None
    seed: int = 0
    device: str = "cpu"
    augment: str = "none"
    backend: str = "auto"

    def resolved(self) -> "Config":
        """The same with nothing left to the recipe; checked."""
        self.check()
        given = asdict(self)
        missing = {
            key: value for key, value in recipes.load(self.optimizer).items() if given.get(key) is None
        }
        config = replace(self, **missing)
        config._check_bits()
        return config

    def _check_bits(self) -> None:
        if self.optimizer in recipes.FLOAT:
            bits = 0 if self.optimizer == "sgd" else 4
            self._require(
                "--bits", self.bits == bits, f"{self.optimizer} has {bits or 'full precision, no'} bits"
            )
        if self.optimizer == "luq":
            self._require("--activations", self.activations == 4, "luq has 4")
        self._require("--activations", self.activations in (0, SAWB_BITS), "0 (float) or 4")

    def check(self) -> None:
        """Raises InputError, naming the option, for a value outside its range."""
        self._require("--model", self.model in models.MODELS, f"choose from {', '.join(models.MODELS)}")
        self._require(
            "--optimizer",
            self.optimizer in recipes.OPTIMIZERS,
            f"choose from {', '.join(recipes.OPTIMIZERS)}",
        )
        self._require("--augment", self.augment in augment.MODES, f"choose from {', '.join(augment.MODES)}")
        self._require("--precision", self.precision in PRECISIONS, f"choose from {', '.join(PRECISIONS)}")
        self._require("--epochs", self.epochs >= 1, "at least 1")
        self._require("--batch-size", self.batch_size >= 2, "at least 2 (batch norm needs two)")
        self._require("--cuda-graph", not self.cuda_graph or self.device == "cuda", "needs --device cuda")
        self._require("--test-every", self.test_every >= 0, "at least 0")
        self._require("--seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        if self.lr is not None:
            self._require("--lr", math.isfinite(self.lr) and self.lr > 0, "a positive number")

    def _require(self, option: str, holds: bool, expected: str) -> None:
        if not holds:
            value = getattr(self, option.lstrip("-").replace("-", "_"))
            raise InputError(option, f"{value!r} is not accepted: {expected}")


def resolve_device(name: str) -> str:
    """ "auto" becomes "cuda" if torch can use a GPU, else "cpu". Raises InputError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        reason = (
            "torch is built without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU was found"
        )
        raise InputError("--device", f"cuda is not available: {reason}")
    return name


def default_batch_size(images: int, limit: int | None = None) -> int:
    """64 for less than 10,000 training images, which would make too few steps otherwise, else 128."""
    return 64 if min(images, limit or images) < 10_000 else 128


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percentage of `images` that `model`, in evaluation mode, classifies as `labels`. Leaves the mode as it was."""
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    size = _EVALUATION_BATCH[images.device.type]
    for batch, expected in zip(images.split(size), labels.split(size), strict=True):
        correct += (model(batch).argmax(1) == expected).sum()
    model.train(training)
    return 100 * int(correct) / len(images)


def reestimate_batch_norm(model: nn.Module, images: Tensor, mode: str = "none") -> None:
    """Replaces the batch-norm statistics by averages over `images` at the present weights (torch's `update_bn`).

    mode: how `images` are augmented, which must be as in training: the network has learned with the statistics of such
    images, and with those of the images as they are it lost 1 to 3 points (docs/experiments.md). Runs over at most
    20,000 images, in an order and with shifts that are random but always the same, in equal batches.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_STATISTICS_IMAGES]
    size = min(_STATISTICS_BATCH, len(order))
    whole = len(order) // size * size
    generator = torch.Generator(images.device).manual_seed(0)

    def batches() -> Iterator[Tensor]:
        for part in order[:whole].to(images.device).split(size):
            yield augment.apply(images[part], mode, generator)

    update_bn(batches(), model)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of what a file of `model` holds: its state_dict, tensors that share memory once."""
    tensors = {(t.data_ptr(), t.shape): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def weight_bytes(model: nn.Module, packed: nn.Module) -> tuple[int, int]:
    """Bytes of the weights of the layers that are packed in `packed`: in `model`, and in `packed` with their scales."""
    before = after = 0
    for name, layer in packed.named_modules():
        if isinstance(layer, quantopt.nn.BinaryLinear | quantopt.nn.BinaryConv2d):
            weight = model.get_submodule(name).get_parameter("weight")
            before += weight.numel() * weight.element_size()
            after += sum(t.numel() * t.element_size() for t in (layer.bits, layer.scale))
    return before, after


@torch.no_grad()
def images_per_second(networks: Sequence[nn.Module], images: Tensor) -> list[float]:
    """Of each of `networks`, in evaluation mode: the median over up to ten batches, for which they take turns."""
    times: list[list[float]] = [[] for _ in networks]
    size = min(_EVALUATION_BATCH[images.device.type], len(images))
    for batch in (images[:size], *images.split(size)[:10]):  # the first is a warm-up
        if len(batch) < size:
            break
        for network, seconds in zip(networks, times, strict=True):
            start = time.perf_counter()
            network(batch)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds.append(time.perf_counter() - start)
    return [size / statistics.median(seconds[1:]) for seconds in times]


@dataclass
class Result:
    """A finished run: its report (what report.json holds), the float and the packed network (None for sgd), and
    weight histograms [epochs + 1, bins] of the quantised weights in units of their scale, before training and after
    each epoch."""

    report: dict[str, Any]
    model: nn.Module
    packed: nn.Module | None
    histograms: Tensor


class _Stopwatch:
    """Sums the time spent in `with` blocks; on a GPU the time between events of its stream, read at the end. Nothing is
    measured inside a CUDA graph."""

    def __init__(self, device: torch.device, graphed: bool) -> None:
        self._cuda = device.type == "cuda"
        self._graphed = graphed
        self._marks: list[tuple[Any, Any]] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        if not self._graphed:
            self._start = self._mark()

    def __exit__(self, *error: object) -> None:
        if not self._graphed:
            self._marks.append((self._start, self._mark()))

    def read(self) -> float:
        """Seconds since the last call."""
        marks, self._marks = self._marks, []
        if self._cuda and marks:
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(end) for start, end in marks) / 1e3)
        return float(sum(end - start for start, end in marks))


class Trainer:
    """A run: network, optimizer, schedules, random numbers and curves, after `epoch` whole epochs.

    Everything that influences the next epoch is in `state_dict()`. The global random state of torch is seeded.
    Raises InputError if the network does not fit the images or a value is refused.
    """

    def __init__(self, config: Config, dataset: Dataset, initial: dict[str, Any] | None = None) -> None:
        """initial: the model's state to start from, as a checkpoint holds it, None for random weights."""
        config = config.resolved()
        self.config = config
        for name in ("validation", "limit"):
            images = getattr(config, name)
            if images is not None and images < len(dataset.classes):
                raise InputError(
                    f"--{name}", f"{images} is not one image for each of {len(dataset.classes)} classes"
                )
        if config.validation is not None:
            dataset = dataset.validation(config.validation)
            if len(dataset.train_labels) == 0:
                raise InputError("--validation", f"{config.validation} leaves no training images")
        if config.limit is not None:
            dataset = dataset.limited(config.limit)
        self.dataset = dataset
        self.device = torch.device(config.device)
        self.train_images = dataset.train_images.to(self.device)
        self.train_labels = dataset.train_labels.to(self.device)
        self.test_images = dataset.test_images.to(self.device)
        self.test_labels = dataset.test_labels.to(self.device)
        if len(self.train_labels) < 2:
            raise InputError("--data", "at least two training images are needed")
        self.batch_size = min(config.batch_size, len(self.train_labels))
        self.steps_per_epoch = len(self.train_labels) // self.batch_size
        torch.manual_seed(config.seed)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        try:
            self.model = models.build(
                config.model, dataset.shape, len(dataset.classes), *dataset.statistics()
            )
        except ValueError as error:
            raise InputError("--model", str(error)) from None
        if initial is not None:
            try:
                self.model.load_state_dict(initial)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise InputError(
                    "--init", f"its network is not this one: {str(error).splitlines()[-1].strip()}"
                ) from None
        self.model.to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            self.optimizer = recipes.build(
                config.optimizer,
                self.model,
                config.epochs * self.steps_per_epoch,
                asdict(config),
                backend=config.backend,
                capturable=config.cuda_graph,
            )
        except BackendError as error:
            raise InputError("--backend", str(error)) from None
        except ValueError as error:
            raise InputError("--optimizer", str(error)) from None
        self.run_model = torch.compile(self.model) if config.compile else self.model
        self._graphed: Graphed | None = None
        self._stopwatch = _Stopwatch(self.device, config.cuda_graph)
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.epoch = 0
        self.seconds = self.update_seconds = 0.0
        self.curves: dict[str, list[Any]] = {name: [] for name in CURVES}
        self.histograms = self._histogram()[None]
        if self.quantised:
            self._metrics()  # sign flips are counted from here

    @property
    def quantised(self) -> bool:
        """Whether the optimizer has levels; not so for sgd and luq."""
        return self.config.optimizer not in recipes.FLOAT

    def _iteration(self, chosen: Tensor) -> None:
        """One step of the weights on the images `chosen`; adds to the sums of the epoch."""
        images = augment.apply(self.train_images[chosen], self.config.augment, self.generator)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = self.train_labels[chosen]
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.run_model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        with self._stopwatch:
            self.optimizer.update()
        self._loss += loss.detach()
        self._correct += (logits.detach().argmax(1) == labels).sum()

    def train_epoch(self, bar: "tqdm[Any]") -> None:
        """One pass over the training images in random order; images beyond the last whole batch are left out."""
        started = time.perf_counter()
        self.model.train()
        order = torch.randperm(len(self.train_labels), generator=self.generator, device=self.device)
        self._loss.zero_()
        self._correct.zero_()
        for step in range(self.steps_per_epoch):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            if self.config.cuda_graph:
                self._graphed = self._graphed or Graphed(self._iteration, chosen, self.generator)
                self._graphed(chosen)
            else:
                self._iteration(chosen)
            if step == self.steps_per_epoch - 1:
                self._record()  # before the interval or the relaxation moves on
            self.optimizer.advance()
            if bar.update(
                self.batch_size
            ):  # true when the bar is due to be drawn: the sums are read only then
                seen = (step + 1) * self.batch_size
                self._show(bar, float(self._loss) / (step + 1), 100 * int(self._correct) / seen, None)
        seen = self.steps_per_epoch * self.batch_size
        loss_mean = float(self._loss) / self.steps_per_epoch
        accuracy = 100 * int(self._correct) / seen
        if not math.isfinite(loss_mean):
            raise TrainingError(f"the loss became {loss_mean} in epoch {self.epoch + 1}: try a smaller --lr")
        self.curves["loss"].append(loss_mean)
        self.curves["accuracy"].append(accuracy)
        self.update_seconds += self._stopwatch.read()
        self.seconds += time.perf_counter() - started
        self.epoch += 1
        self._show(bar, loss_mean, accuracy, self.curves["fraction_feasible"][-1])

    def test(self) -> None:
        """Appends the test accuracy after an epoch to the curves, if its turn has come."""
        every, accuracy = self.config.test_every, None
        if every and (self.epoch % every == 0 or self.epoch == self.config.epochs):
            with self._autocast():
                accuracy = evaluate(self.model, self.test_images, self.test_labels)
        self.curves["test_accuracy"].append(accuracy)

    def _autocast(self) -> torch.autocast:
        # weights that autocast has cast and kept would be those of the capture in every replay of a graph
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.precision == "bfloat16",
            cache_enabled=not self.config.cuda_graph,
        )

    def _record(self) -> None:
        """Appends to the curves what describes the quantised weights, and their histogram."""
        measured = ("loss", "accuracy", "test_accuracy")
        values: dict[str, Any] = {name: None for name in CURVES if name not in measured}
        if self.quantised:
            metrics = self._metrics()
            weights = sum(group["numel"] for group in metrics)
            values["fraction_feasible"] = sum(g["fraction_feasible"] * g["numel"] for g in metrics) / weights
            values["sign_flips"] = int(sum(group["sign_flips"] for group in metrics))
        if self.optimizer.relaxation is not None:
            values[self.optimizer.relaxation] = self._relaxation()
        for name, value in values.items():
            self.curves[name].append(value)
        self.histograms = torch.cat([self.histograms, self._histogram()[None]])

    def _metrics(self) -> list[dict[str, Any]]:
        """The optimizer's metrics of the quantised groups."""
        optimizer: Any = self.optimizer.optimizer
        return [group for group in optimizer.metrics() if group["bits"] != 0]

    def _relaxation(self) -> float:
        return float(self.optimizer.optimizer.param_groups[0][self.optimizer.relaxation or ""])

    def _show(self, bar: "tqdm[Any]", loss: float, accuracy: float, feasible: float | None) -> None:
        shown = {"loss": f"{loss:.4f}", "accuracy": f"{accuracy:.2f}%"}
        if self.optimizer.relaxation is not None:
            shown[self.optimizer.relaxation] = f"{self._relaxation():.3g}"
        if feasible is not None:
            shown["inside"] = f"{100 * feasible:.1f}%"
        bar.set_postfix(shown)

    @torch.no_grad()
    def _histogram(self) -> Tensor:
        counts = torch.zeros(HISTOGRAM_BINS)
        for weight in self.model.parameters():
            if weight.dim() < 2:
                continue
            if self.quantised:
                grid = self.optimizer.optimizer.quantization(weight)  # type: ignore[attr-defined]
                if grid is None:
                    continue
                scale = (
                    grid.max_level.reshape(-1, *[1] * (weight.dim() - 1))
                    if grid.max_level.dim() == 1
                    else None
                )
                values = weight if scale is None else weight / scale
            else:
                values = weight / weight.std()
            counts += torch.histc(values.float().cpu(), HISTOGRAM_BINS, -HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, text, lists and dictionaries only: can be read by torch.load(weights_only=True)."""
        return {
            "config": self.describe(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "update_seconds": self.update_seconds,
            "model": self.model.state_dict(),
            **self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "curves": self.curves,
            "histograms": self.histograms,
        }

    def load_state_dict(self, state: dict[str, Any], argument: str = "--resume") -> None:
        """Continues from `state`. Raises InputError, naming what differs, if it is of another configuration."""
        self.load_weights(state, argument)
        try:
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(argument, f"the checkpoint does not fit: {error}") from None

    def load_weights(self, state: dict[str, Any], argument: str) -> None:
        """Everything but the random state, which alone depends on the kind of device; errors as `load_state_dict`."""
        own = self.describe()
        theirs = state.get("config")
        if not isinstance(theirs, dict):
            raise InputError(argument, "this is not a checkpoint of quantopt")
        free = ("data", "device") if argument != "--resume" else ("data",)
        differing = [
            f"{key} is {theirs.get(key)!r} in the checkpoint and {own.get(key)!r} now"
            for key in sorted(own.keys() | theirs.keys())
            if key not in free and theirs.get(key) != own.get(key)
        ]
        if differing:
            raise InputError(argument, f"the checkpoint is of another run: {'; '.join(differing)}")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state)
            self.epoch, self.seconds = int(state["epoch"]), float(state["seconds"])
            self.update_seconds = float(state["update_seconds"])
            if not 0 <= self.epoch <= self.config.epochs:
                raise ValueError(f"epoch {self.epoch} is not in 0..{self.config.epochs}")
            self.curves = {name: list(state["curves"][name]) for name in CURVES}
            for name, values in self.curves.items():
                if len(values) != self.epoch or not all(
                    v is None or isinstance(v, int | float) for v in values
                ):
                    raise ValueError(f"the curve of {name} is not one number per epoch")
            histograms = torch.as_tensor(state["histograms"])
            if histograms.shape != (self.epoch + 1, self.histograms.shape[1]):
                raise ValueError(f"histograms have shape {tuple(histograms.shape)}")
            self.histograms = histograms
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(argument, f"the checkpoint does not fit: {error}") from None

    def describe(self) -> dict[str, Any]:
        """The configuration with everything resolved; `fingerprint` identifies the data by content."""
        resolved = asdict(self.config)
        resolved["fingerprint"] = self.dataset.fingerprint()
        resolved["images"] = list(self.dataset.shape)
        resolved["classes"] = len(self.dataset.classes)
        return resolved

    def finish(self) -> Result:
        """Measures the latent, the projected and the packed network on the test images.

        Batch-norm statistics are re-estimated for each; those of the projected network stay in the model.
        """
        test_images, test_labels = self.test_images, self.test_labels
        optimizer: Any = self.optimizer.optimizer
        latent = quantized = packed = bytes_packed = None
        speeds: list[float | None] = [None, None]
        if not self.quantised:
            reestimate_batch_norm(self.model, self.train_images, self.config.augment)
            accuracy = evaluate(self.model, test_images, test_labels)
            latent, quantized = (None, accuracy) if self.config.optimizer == "luq" else (accuracy, None)
        else:
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            with optimizer.latent():
                reestimate_batch_norm(self.model, self.train_images, self.config.augment)
                latent = evaluate(self.model, test_images, test_labels)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
            with optimizer.quantized():
                reestimate_batch_norm(self.model, self.train_images, self.config.augment)
                quantized = evaluate(self.model, test_images, test_labels)
            packed = quantopt.pack(self.model.eval(), optimizer, fold_batchnorm=True)
            bytes_packed = tensor_bytes(packed)
            speeds = [*images_per_second([self.model.eval(), packed.eval()], test_images)]
        report = {
            "config": self.describe(),
            "versions": versions(),
            "seed": self.config.seed,
            "curves": {
                name: ["inf" if value == math.inf else value for value in curve]
                for name, curve in self.curves.items()
            },
            "accuracy_latent": latent,
            "accuracy_quantized": quantized,
            "accuracy_packed": None if packed is None else evaluate(packed, test_images, test_labels),
            "seconds": self.seconds,
            "images_per_second": self.epoch * self.steps_per_epoch * self.batch_size / self.seconds
            if self.seconds
            else None,
            "optimizer_share": self.update_seconds / self.seconds
            if self.seconds and not self.config.cuda_graph
            else None,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "bytes_float": None if packed is None else tensor_bytes(self.model),
            "bytes_packed": bytes_packed,
            "images_per_second_float": speeds[0],
            "images_per_second_packed": speeds[1],
        }
        return Result(report, self.model, packed, self.histograms)


def read_checkpoint(path: Path, argument: str) -> dict[str, Any]:
    """The state in a checkpoint file, tensors on the CPU. Runs no code of the file. InputError if it is bad."""
    if not path.is_file():
        raise InputError(argument, f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged or hostile file
        raise InputError(
            argument,
            f"{path} is damaged, or holds more than the tensors, numbers and texts of a checkpoint "
            f"({type(error).__name__}); nothing of it was run",
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise InputError(argument, f"{path} is not a checkpoint of quantopt")
    return state


def train(
    config: Config,
    dataset: Dataset,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[Trainer], None] | None = None,
    minutes: float | None = None,
) -> Result:
    """Trains, with a checkpoint in `out` after every epoch, and measures; see `Result`.

    out: a directory, made once the arguments have proved good; None writes nothing. resume: continue from `out`'s
    checkpoint, if there is one. progress: a bar per epoch on stderr. on_epoch: called after every epoch. minutes: where
    the next epoch would end later, stop after the checkpoint of the last, at least one. Raises InputError on a bad
    value or checkpoint, TrainingError if the loss is not finite, OutOfTime.
    """
    started = time.monotonic()
    checkpoint = None if out is None else out / CHECKPOINT
    resuming = resume and checkpoint is not None and checkpoint.exists()
    initial = None
    if config.init is not None and not resuming:
        source = Path(config.init)
        state = read_checkpoint(source / CHECKPOINT if source.is_dir() else source, "--init")
        initial = state.get("model", {})
    trainer = Trainer(config, dataset, initial)
    if resuming and checkpoint is not None:
        trainer.load_state_dict(read_checkpoint(checkpoint, "--resume"))
    elif out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for stale in (CHECKPOINT, REPORT, MODEL):
            (out / stale).unlink(missing_ok=True)
    if out is not None:
        remove_temporaries(out)
    longest = 0.0
    while trainer.epoch < config.epochs:
        begun = time.monotonic()
        if longest and minutes is not None and begun + longest > started + 60 * minutes:
            raise OutOfTime(f"{minutes:g} minutes are over after epoch {trainer.epoch} of {config.epochs}")
        with tqdm(
            total=trainer.steps_per_epoch * trainer.batch_size,
            desc=f"epoch {trainer.epoch + 1}/{config.epochs}",
            unit=" images",
            mininterval=0.5,
            disable=not progress,
        ) as bar:
            trainer.train_epoch(bar)
        trainer.test()
        if checkpoint is not None:
            state = trainer.state_dict()
            atomic_write(checkpoint, lambda file, state=state: torch.save(state, file))  # type: ignore[misc]
        if on_epoch is not None:
            on_epoch(trainer)
        longest = max(longest, time.monotonic() - begun)
    return trainer.finish()
