"""The training loop: `train` runs a `Trainer`, which can be stopped, continued, packed and measured."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import quantopt
from quantopt.backends import BackendError
from quantopt.train import augment, checkpoint, layer_table, models, optimizers, ranks, recipes
from quantopt.train.checkpoint import CURVES
from quantopt.train.config import DEFAULTS, OPTIONS, Config
from quantopt.train.data import Dataset
from quantopt.train.directory import CHECKPOINT, Hold, Result, prepare, read_checkpoint, write_checkpoint
from quantopt.train.environment import versions
from quantopt.train.errors import InputError, OutOfTime, TrainingError
from quantopt.train.graph import Graphed
from quantopt.train.measure import (
    Stopwatch,
    evaluate,
    histogram,
    images_per_second,
    plain_histograms,
    reestimate_batch_norm,
    right,
    tensor_bytes,
)
from quantopt.train.progress import Bar, bar
from quantopt.train.report import plain
from quantopt.train.series import positions


class Trainer:
    """A run: network, optimizer, schedules, random numbers and curves, after `epoch` epochs.

    Everything that influences the next epoch is in `state_dict()`. The global random state of torch is seeded.
    Under torchrun each rank trains on a part of each batch (`ranks`), and all ranks call the same methods.
    Raises InputError if the network does not fit the images or a value is refused.
    """

    def __init__(self, config: Config, dataset: Dataset, initial: dict[str, Any] | None = None) -> None:
        """initial: the state_dict of the model to start from, None for random weights."""
        config = recipes.complete(config)
        self.config = config
        self.dataset = dataset = _chosen(config, dataset)
        self.device = torch.device(config.device)
        self.train_images = dataset.train_images.to(self.device)
        self.train_labels = dataset.train_labels.to(self.device)
        self.test_images = dataset.test_images.to(self.device)
        self.test_labels = dataset.test_labels.to(self.device)
        if len(self.train_labels) < 2:
            raise InputError("--data", "at least two training images are needed")
        self.batch_size = min(config.batch_size, len(self.train_labels))
        _check_ranks(config, self.batch_size)
        self._part = ranks.part(self.batch_size)
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
            with checkpoint.refusals("--init", config.init):
                checkpoint.check_model(initial, self.model.state_dict())
                self.model.load_state_dict(initial)
        self.model.to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            self.optimizer = optimizers.build(
                config.optimizer,
                self.model,
                config.epochs * self.steps_per_epoch,
                asdict(config),
                backend=config.backend,
                capturable=config.cuda_graph,
            )
        except BackendError as error:
            raise InputError("--backend", str(error)) from None
        except (ValueError, TypeError, ArithmeticError) as error:
            raise InputError("--optimizer", str(error)) from None
        self.run_model = torch.compile(self.model) if config.compile else self.model
        self._graphed: Graphed | None = None
        self._stopwatch = Stopwatch(self.device, config.cuda_graph)
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.epoch = 0
        self.seconds = self.update_seconds = 0.0
        self.curves: dict[str, list[Any]] = {name: [] for name in CURVES}
        self.histograms = self._histogram()[None]
        self.layer_flips: layer_table.Flips = {}
        if self.quantised:  # sign flips are counted from here
            self.layer_flips = {name: [] for name in layer_table.metrics(self.optimizer.optimizer)}

    def join_ranks(self) -> None:
        """Trains with the other ranks from now on. All ranks call it, once none of them has refused anything."""
        if ranks.size() > 1:
            self.run_model = ranks.parallel(self.model)

    @property
    def quantised(self) -> bool:
        return optimizers.has_levels(self.config.optimizer, self.config.bits)

    def _iteration(self, chosen: Tensor) -> None:
        """One step of the weights on the images `chosen`, of which this rank takes a part; adds to the sums of the
        epoch."""
        own = chosen[self._part]
        images = augment.apply(
            self.train_images[own], self.config.augment, self.generator, self._part.start, len(chosen)
        )
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = self.train_labels[own]
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.run_model(images)
        loss = F.cross_entropy(logits.float(), labels)
        if len(own) * ranks.size() != len(chosen):  # gradients are averaged over ranks, with unequal parts
            loss = loss * (len(own) * ranks.size() / len(chosen))
        loss.backward()  # type: ignore[no-untyped-call]
        with self._stopwatch:
            self.optimizer.update()
        self._loss += loss.detach()
        self._correct += (logits.detach().argmax(1) == labels).sum()

    def train_epoch(self, bar: Bar) -> None:
        """One pass over the training images in random order; an incomplete last batch is left out."""
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
                seen = (step + 1) * (self._part.stop - self._part.start)
                self._show(bar, float(self._loss) / (step + 1), 100 * int(self._correct) / seen, None)
        seen = self.steps_per_epoch * self.batch_size
        loss_mean = float(ranks.total(self._loss)) / ranks.size() / self.steps_per_epoch
        accuracy = 100 * int(ranks.total(self._correct)) / seen
        with ranks.together():
            if not math.isfinite(loss_mean):
                raise TrainingError(
                    f"the loss became {loss_mean} in epoch {self.epoch + 1}: try a smaller --lr"
                )
            if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
                raise TrainingError(
                    f"the weights became infinite in epoch {self.epoch + 1}: try a smaller --lr"
                )
        self.curves["loss"].append(loss_mean)
        self.curves["accuracy"].append(accuracy)
        self.update_seconds += self._stopwatch.read()
        self.seconds += time.perf_counter() - started
        self.epoch += 1
        self._show(bar, loss_mean, accuracy, self.curves["fraction_feasible"][-1])

    def test(self) -> None:
        """Appends the test accuracies after an epoch to the curves, None in epochs that are not measured."""
        optimizer: Any = self.optimizer.optimizer
        count = len(self.test_labels)
        own = ranks.part(count)
        for curve in ("test_accuracy", "projected_accuracy"):
            accuracy = None
            if self._has_value(curve, self.epoch):
                weights = optimizer.quantized() if curve == "projected_accuracy" else nullcontext()
                with weights, self._autocast():
                    correct = right(self.model, self.test_images[own], self.test_labels[own])
                accuracy = 100 * int(ranks.total(correct)) / count
            self.curves[curve].append(accuracy)

    def _autocast(self) -> torch.autocast:
        # A graph would replay with the casts of weights that autocast had cached at the capture.
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.precision == "bfloat16",
            cache_enabled=not self.config.cuda_graph,
        )

    def _record(self) -> None:
        """Appends the metrics of the quantised weights to the curves, and their histogram."""
        measured = ("loss", "accuracy", "test_accuracy", "projected_accuracy")
        values: dict[str, Any] = {name: None for name in CURVES if name not in measured}
        if self.quantised:
            metrics = layer_table.metrics(self.optimizer.optimizer)
            values |= layer_table.totals(metrics)
            for name, row in metrics.items():
                self.layer_flips[name].append(row["sign_flips"])
        if self.optimizer.relaxation is not None:
            values[self.optimizer.relaxation] = self._relaxation()
        for name, value in values.items():
            self.curves[name].append(value)
        self.histograms = torch.cat([self.histograms, self._histogram()[None]])

    def _relaxation(self) -> float:
        return float(self.optimizer.optimizer.param_groups[0][self.optimizer.relaxation or ""])

    def _show(self, bar: Bar, loss: float, accuracy: float, feasible: float | None) -> None:
        shown = {"loss": f"{loss:.4f}", "accuracy": f"{accuracy:.2f}%"}
        if self.optimizer.relaxation is not None:
            shown[self.optimizer.relaxation] = f"{self._relaxation():.3g}"
        if feasible is not None:
            shown["inside"] = f"{100 * feasible:.1f}%"
        bar.set_postfix(shown)

    @property
    def at(self) -> list[int]:
        """The epochs of the points of the curves."""
        return positions(self.epoch, 1, self.epoch)

    def _histogram(self) -> Tensor:
        return histogram(self.model, self.optimizer.optimizer if self.quantised else None)

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
            "layer_flips": self.layer_flips,
        }

    def load_state_dict(
        self, state: dict[str, Any], argument: str = "--resume", source: object = "the checkpoint"
    ) -> None:
        """Continues from `state`. Raises InputError, naming `argument`, `source` and what differs, if it is not a state
        of this run; the trainer is not to be used then."""
        with checkpoint.refusals(argument, source):
            own = {"generator": self.generator.get_state(), "rng": torch.get_rng_state()}
            for name, value in own.items():
                checkpoint.check_tensor(state[name], value, name)
            torch.Generator(self.device).set_state(state["generator"])  # refuses what no generator has
            torch.Generator().set_state(state["rng"])
            if self.device.type == "cuda":
                checkpoint.check_tensor(state["cuda_rng"], torch.cuda.get_rng_state(self.device), "cuda_rng")
            elif state["cuda_rng"] is not None:
                raise ValueError("cuda_rng is not None in a run on the CPU")
        self.load_weights(state, argument, source)
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def load_weights(self, state: dict[str, Any], argument: str, source: object) -> None:
        """As `load_state_dict`, without the random state, which depends on the kind of device."""
        present, saved = self.describe(), DEFAULTS | state["config"]
        free = (*checkpoint.free(present), *(() if argument == "--resume" else ("device",)))
        if differing := checkpoint.differences(saved, present, "the checkpoint", free):
            raise InputError(argument, f"{source} is of another run: {differing}")
        with checkpoint.refusals(argument, source):
            epoch = state["epoch"]
            checkpoint.check_number(epoch, "epoch", 0, self.config.epochs, kind=int)
            checkpoint.check_seconds(state)
            checkpoint.check_model(state["model"], self.model.state_dict())
            curves = state["curves"]
            if isinstance(curves, dict):  # 0.1.0 had no projected_accuracy
                curves = {"projected_accuracy": [None] * epoch, **curves}
            checkpoint.check_curves(curves, epoch, self._has_value)
            histograms = state["histograms"]
            checkpoint.check_histograms(histograms, self.histograms[:1], epoch + 1)
            flips = layer_table.check_flips(
                state["layer_flips"], list(self.layer_flips), curves["sign_flips"]
            )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state, epoch * self.steps_per_epoch)
        self.epoch, self.seconds, self.update_seconds = epoch, state["seconds"], state["update_seconds"]
        self.curves = {name: list(curves[name]) for name in CURVES}
        self.histograms = histograms
        self.layer_flips = flips

    def _has_value(self, curve: str, epoch: int) -> bool:
        """Whether a curve has a value in an epoch, 1..epochs, and not None."""
        if curve == "test_accuracy":
            every = self.config.test_every
            return bool(every) and (epoch % every == 0 or epoch == self.config.epochs)
        if curve == "projected_accuracy":
            fractions = self.config.projected_at if self.quantised else None
            return bool(fractions) and epoch in {
                round(fraction * self.config.epochs) for fraction in (*(fractions or ()), 1)
            }
        if curve in ("fraction_feasible", "sign_flips"):
            return self.quantised
        return curve in ("loss", "accuracy", self.optimizer.relaxation)

    def describe(self) -> dict[str, Any]:
        """The configuration with everything resolved; `fingerprint` identifies the data by content."""
        return _described(self.config, self.dataset)

    def finish(self) -> Result:
        """Measures the latent, the projected and the packed network on the test images.

        Batch-norm statistics are re-estimated for each; those of the projected network stay in the model.
        """
        test_images, test_labels = self.test_images, self.test_labels
        optimizer: Any = self.optimizer.optimizer
        latent = quantized = packed = bytes_packed = layers = None
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
            layers = layer_table.of_images(
                optimizer,
                self.layer_flips,
                self.model,
                self.train_images,
                self.config.augment,
                test_images,
                test_labels,
            )
        results = {
            "config": self.describe(),
            "versions": versions(),
            "seed": self.config.seed,
            "left_out": self.dataset.left_out,
            "curves": self.curves,
            "histograms": plain_histograms(self.histograms),
            "layers": layers,
            "accuracy_latent": latent,
            "accuracy_quantized": quantized,
            "accuracy_packed": None if packed is None else evaluate(packed, test_images, test_labels),
            "processes": ranks.size(),
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
        return Result(plain(results), self.model, packed, self.histograms)


def _chosen(config: Config, dataset: Dataset) -> Dataset:
    """The images that a run of `config` uses."""
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
    return dataset if config.limit is None else dataset.limited(config.limit)


def _check_ranks(config: Config, batch_size: int) -> None:
    """Raises InputError for what several processes cannot do as one does."""
    if ranks.size() == 1:
        return
    if batch_size < ranks.size():
        raise InputError("--batch-size", f"{batch_size} images are less than {ranks.size()} processes")
    statistics = "takes statistics of all of a batch, of which a process has a part: train it in one process"
    if config.optimizer == "luq":
        raise InputError("--optimizer", f"luq {statistics}")
    if config.activations:
        raise InputError("--activations", f"{config.activations} {statistics}")
    for name in ("compile", "cuda_graph"):
        if getattr(config, name):
            raise InputError(OPTIONS[name].flag, "is for one process: leave it out under torchrun")


def _described(config: Config, dataset: Dataset) -> dict[str, Any]:
    return {
        **asdict(config),
        "fingerprint": dataset.fingerprint(),
        "images": list(dataset.shape),
        "classes": len(dataset.classes),
    }


def describe(config: Config, dataset: Dataset) -> dict[str, Any]:
    """The configuration that the report of a run of `config` on `dataset` has."""
    config = recipes.complete(config)
    return _described(config, _chosen(config, dataset))


def train(
    config: Config,
    dataset: Dataset,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[Trainer], None] | None = None,
    hold: Hold | None = None,
    minutes: float | None = None,
) -> Result:
    """Trains, with a checkpoint in `out` after every epoch, and measures; see `Result`.

    out: a directory, made after the arguments are checked; None writes nothing. The caller keeps others out of it
    (`directory.held`). hold: what that gave; nothing is written to a directory that has taken the place of the one that
    is held. resume: continue from the checkpoint in `out`, if there is one; without, an earlier run in `out` stays
    until the first checkpoint. progress: a bar per epoch on stderr, or a line where that is no terminal. on_epoch:
    called after every epoch. minutes: the run stops after an epoch if the next would end later; at least one epoch is
    trained. Raises InputError on a bad value or checkpoint and on a file that cannot be written, TrainingError if the
    loss is not finite, OutOfTime if the minutes are over.

    Under torchrun all ranks call this, and see `out` where they resume. Rank 0 writes, and returns; the others raise
    `ranks.Left`.
    """
    started = time.monotonic()
    file = Path() if out is None else out / CHECKPOINT
    progress = progress and ranks.rank() == 0
    with ranks.together():
        resuming = resume and out is not None and file.exists()
        initial = None
        if config.init is not None and not resuming:
            source = Path(config.init)
            state = read_checkpoint(source / CHECKPOINT if source.is_dir() else source, "--init")
            initial = state["model"]
        trainer = Trainer(config, dataset, initial)
        if resuming:
            trainer.load_state_dict(read_checkpoint(file, "--resume"), "--resume", file)
        if out is not None and ranks.rank() == 0:
            prepare(out, hold)
    if ranks.size() > 1:
        ranks.check_same(dataset.fingerprint(), "--data", "the fingerprint of the images")
        ranks.check_same(str(trainer.epoch), "--resume", "the number of epochs in the checkpoint in --out")
        trainer.join_ranks()
    longest = 0.0
    while trainer.epoch < config.epochs:
        begun = time.monotonic()
        late = longest and minutes is not None and begun + longest > started + 60 * minutes
        with ranks.together():
            if late and ranks.rank() == 0:
                raise OutOfTime(
                    f"{minutes:g} minutes are over after epoch {trainer.epoch} of {config.epochs}"
                )
        images = trainer.steps_per_epoch * trainer.batch_size
        with bar(
            progress, f"epoch {trainer.epoch + 1}/{config.epochs}", total=images, unit="images"
        ) as shown:
            trainer.train_epoch(shown)
        trainer.test()
        with ranks.together():
            if out is not None and ranks.rank() == 0:
                write_checkpoint(out, trainer.state_dict(), hold)
        if on_epoch is not None:
            on_epoch(trainer)
        longest = max(longest, time.monotonic() - begun)
    if ranks.rank():
        raise ranks.Left(0)
    return trainer.finish()
