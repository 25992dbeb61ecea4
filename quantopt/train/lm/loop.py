"""The training loop of a language model: `train` runs a `Trainer`, which can be stopped and continued."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantopt
from quantopt.backends import BackendError
from quantopt.train import checkpoint, layer_table, optimizers
from quantopt.train.directory import (
    CHECKPOINT,
    MODEL,
    REPORT,
    Hold,
    prepare,
    read_checkpoint,
    write_checkpoint,
)
from quantopt.train.environment import header
from quantopt.train.errors import InputError, OutOfTime, TrainingError, writing
from quantopt.train.lm import model as models
from quantopt.train.lm.config import Config
from quantopt.train.lm.text import Text
from quantopt.train.measure import histogram, plain_histograms, tensor_bytes
from quantopt.train.progress import Bar, bar
from quantopt.train.report import CURVES_PNG, WEIGHTS_PNG, plot_curves, plot_weights, write_json
from quantopt.train.series import METRICS_CSV, positions, write_csv

_PARTS = "config step seconds model optimizer scheduler anneal generator rng cuda_rng curves histograms layer_flips"
KEYS = frozenset(_PARTS.split())
"""What a checkpoint holds."""

EVERY = 50  # steps between two points of the curves; of the training loss their mean
CURVES = ("loss", "epsilon", "kappa", "reg_strength", "fraction_feasible", "sign_flips")
"""Of a run, lists with a value for every `EVERY` steps, as those of `quantopt train`; None where there is none."""


_LAYER_WINDOWS = 32  # on which the projection of each layer alone is measured


def describe(config: Config, text: Text) -> dict[str, Any]:
    """The configuration that the report of a run has; `fingerprint` identifies the text by content."""
    return {**asdict(config), "fingerprint": text.fingerprint()}


class Trainer:
    """A run: network, optimizer, schedules, random numbers and the curve of the loss, after `step` steps.

    Everything that influences the next step is in `state_dict()`. The global random state of torch is seeded.
    Raises InputError if a value is refused.
    """

    def __init__(self, config: Config, text: Text) -> None:
        config.check()
        self.config, self.text = config, text
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = models.build(config)
        try:
            self.optimizer = optimizers.build(
                config.optimizer, self.model, config.steps, config.settings(), backend=config.backend
            )
        except BackendError as error:
            raise InputError("--backend", str(error)) from None
        except (ValueError, TypeError, ArithmeticError) as error:
            raise InputError("--recipe", str(error)) from None
        self.step = 0
        self.seconds = 0.0
        self.curves: dict[str, list[Any]] = {name: [] for name in CURVES}
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.histograms = self._histogram()
        self.layer_flips: layer_table.Flips = {}
        if self.quantised:  # sign flips are counted from here
            self.layer_flips = {name: [] for name in layer_table.metrics(self._optimizer)}

    @property
    def _optimizer(self) -> Any:
        return self.optimizer.optimizer

    @property
    def quantised(self) -> bool:
        return optimizers.has_levels(self.config.optimizer, self.config.bits)

    def train_until(self, step: int, bar: Bar) -> None:
        """Steps until `step` of them are done. Raises TrainingError where the loss is not finite."""
        started = time.perf_counter()
        config = self.config
        self.model.train()
        while self.step < step:
            inputs, targets = self.text.windows(config.batch_size, config.context, self.generator)
            self.optimizer.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = models.loss(self.model, inputs.to(self.device), targets.to(self.device))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.update()
            self.step += 1
            self._loss += loss.detach()
            if self.step % EVERY == 0 or self.step == config.steps:
                self._record(bar)  # before the interval or the relaxation moves on
            self.optimizer.advance()
            bar.update()
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise TrainingError(f"the weights became infinite by step {self.step}: try a smaller --lr")
        self.seconds += time.perf_counter() - started

    def _record(self, bar: Bar) -> None:
        """Appends a point to each curve, and a histogram of the weights."""
        loss = float(self._loss) / ((self.step - 1) % EVERY + 1)
        self._loss.zero_()
        if not math.isfinite(loss):
            raise TrainingError(f"the loss became {loss} by step {self.step}: try a smaller --lr")
        values: dict[str, Any] = {"loss": loss}
        shown = {"loss": f"{loss:.4f}"}
        if (name := self.optimizer.relaxation) is not None:
            values[name] = float(self._optimizer.param_groups[0][name])
            shown[name] = f"{values[name]:.3g}"
        if self.quantised:
            metrics = layer_table.metrics(self._optimizer)
            values |= layer_table.totals(metrics)
            for name, row in metrics.items():
                self.layer_flips[name].append(row["sign_flips"])
            shown["inside"] = f"{100 * values['fraction_feasible']:.1f}%"
        for curve in CURVES:
            self.curves[curve].append(values.get(curve))
        self.histograms = torch.cat([self.histograms, self._histogram()])
        bar.set_postfix(shown)

    @property
    def at(self) -> list[int]:
        """The steps of the points of the curves."""
        return positions(len(self.curves["loss"]), EVERY, self.config.steps)

    def _histogram(self) -> Tensor:
        return histogram(self.model, self._optimizer if self.quantised else None)[None]

    def describe(self) -> dict[str, Any]:
        return describe(self.config, self.text)

    def state_dict(self) -> dict[str, Any]:
        """After a multiple of `EVERY` steps. Can be read by torch.load(weights_only=True)."""
        return {
            "config": self.describe(),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            **self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "curves": self.curves,
            "histograms": self.histograms,
            "layer_flips": self.layer_flips,
        }

    def load_state_dict(self, state: Mapping[str, Any], argument: str, source: object) -> None:
        """Continues from `state`. Raises InputError, naming `argument`, `source` and what differs, if it is not a state
        of this run; the trainer is not to be used then."""
        with checkpoint.refusals(argument, source):
            own = {"generator": self.generator.get_state(), "rng": torch.get_rng_state()}
            if self.device.type == "cuda":
                own["cuda_rng"] = torch.cuda.get_rng_state(self.device)
            for name, value in own.items():
                checkpoint.check_tensor(state[name], value, name)
        self.load_weights(state, argument, source)
        with checkpoint.refusals(argument, source):
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def load_weights(self, state: Mapping[str, Any], argument: str, source: object) -> None:
        """As `load_state_dict`, without the random state, which depends on the kind of device."""
        free = ("data",) if argument == "--resume" else ("data", "device")
        if differing := checkpoint.differences(state["config"], self.describe(), "the checkpoint", free):
            raise InputError(argument, f"{source} is of another run: {differing}")
        with checkpoint.refusals(argument, source):
            step = state["step"]
            checkpoint.check_number(step, "step", 0, self.config.steps, kind=int)
            checkpoint.check_number(state["seconds"], "seconds", 0, 2**40)
            points = -(-step // EVERY)
            checkpoint.check_curves(state["curves"], points, self._has_value, CURVES)
            checkpoint.check_histograms(state["histograms"], self.histograms[:1], points + 1)
            total = state["curves"]["sign_flips"]
            flips = layer_table.check_flips(state["layer_flips"], list(self.layer_flips), total)
            checkpoint.check_model(state["model"], self.model.state_dict())
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(dict(state), step)
        self.step, self.seconds = step, state["seconds"]
        self.curves = {name: list(state["curves"][name]) for name in CURVES}
        self.histograms = state["histograms"]
        self.layer_flips = flips

    def _has_value(self, curve: str, point: int) -> bool:
        if curve in ("fraction_feasible", "sign_flips"):
            return self.quantised
        return curve in ("loss", self.optimizer.relaxation)

    def finish(self) -> tuple[dict[str, Any], nn.Module | None]:
        """(the report, the packed network or None): losses of the validation part, in nats per byte."""
        config, text = self.config, self.text
        projected = packed_loss = layers = None
        packed: Any = None
        speeds: list[float | None] = [None, None]
        running = models.validation_loss(self.model, text, config.context)
        if self.quantised:
            with self._optimizer.quantized():
                projected = models.validation_loss(self.model, text, config.context)
            packed = quantopt.pack(self.model.eval(), self._optimizer)
            packed_loss = models.validation_loss(packed, text, config.context)
            layers = self._measure_layers()
            speeds = [*models.bytes_per_second([self.model, packed], text, config.context)]
        for loss in (running, projected, packed_loss):
            if loss is not None and not math.isfinite(loss):
                raise TrainingError(f"the validation loss is {loss}: try a smaller --lr")
        report = {
            "config": self.describe(),
            **header(str(self.device), torch.get_num_threads()),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "loss": running,  # of the weights that training ran with
            "loss_quantized": projected,
            "loss_packed": packed_loss,
            "bytes_float": tensor_bytes(self.model),
            "bytes_packed": None if packed is None else tensor_bytes(packed),
            "bytes_per_second_float": speeds[0],  # that the network reads in evaluation, without autocast
            "bytes_per_second_packed": speeds[1],
            "curve_every": EVERY,
            "curves": self.curves,
            "histograms": plain_histograms(self.histograms),
            "layers": layers,
            "seconds": self.seconds,
        }
        return report, packed

    def _measure_layers(self) -> dict[str, Any]:
        """What the projection of each layer alone costs, on a sample."""
        length = self.config.context
        inputs, _ = self.text.validation_windows(length)
        sample = f"{min(len(inputs), _LAYER_WINDOWS):,} of {len(inputs):,} validation windows"
        return layer_table.measure(
            self._optimizer,
            self.layer_flips,
            "loss",
            sample,
            lambda: models.validation_loss(self.model, self.text, length, _LAYER_WINDOWS),
        )


PANELS = (
    ("loss", "training loss, nats per byte", "linear"),
    ("fraction_feasible", "weights inside their interval, %", "linear"),
    ("sign_flips", f"sign flips in {EVERY} steps", "symlog"),
)
"""Of curves.png, beside what Anneal drives."""


def plot(out: Path, config: Config, report: Mapping[str, Any], histograms: Tensor) -> None:
    """Writes curves.png and weights.png."""
    curves = {name: values for name, values in report["curves"].items() if values[-1] is not None}
    panels = [panel for panel in PANELS if panel[0] in curves]
    panels += [(name, name, "log") for name in curves if name not in dict.fromkeys(p[0] for p in PANELS)]
    unit = f"{EVERY} steps"
    plot_curves(out / CURVES_PNG, {config.optimizer: curves}, panels, unit)
    plot_weights(out / WEIGHTS_PNG, {config.optimizer: histograms}, unit)


def summary(results: Mapping[str, Any]) -> str:
    """The report in two lines."""
    losses = [("loss_quantized", "projected"), ("loss_packed", "packed")]
    shown = [f"{name} {results[key]:.4f}" for key, name in losses if results[key] is not None]
    size = f"{results['bytes_float']:,} bytes"
    if results["bytes_packed"] is not None:
        size += f", packed {results['bytes_packed']:,}"
    lines = f"validation loss, nats per byte: {', '.join(shown or [format(results['loss'], '.4f')])}"
    config = results["config"]
    speed = config["steps"] * config["batch_size"] * config["context"] / max(results["seconds"], 1e-9)
    parameters = f"{results['parameters']:,} parameters, {size}"
    return f"{lines}\n{parameters}; {results['seconds']:.0f} s of training, {speed:,.0f} bytes/s"


def train(
    config: Config,
    text: Text,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    hold: Hold | None = None,
    minutes: float | None = None,
    checkpoint_every: int = 200,
    on_checkpoint: Callable[[Trainer], None] | None = None,
) -> dict[str, Any]:
    """Trains, with a checkpoint in `out` after every `checkpoint_every` steps (a multiple of `EVERY`), and measures.
    Returns the report, which `out` has as report.json, beside model.safetensors (packed), metrics.csv, curves.png and
    weights.png. on_checkpoint: called after these steps, whether there is an `out` or not.

    out, resume, progress, hold, minutes: as `quantopt.train.loop.train`. Raises InputError, TrainingError, OutOfTime.
    """
    started = time.monotonic()
    trainer = Trainer(config, text)
    file = Path() if out is None else out / CHECKPOINT
    if resume and out is not None and file.exists():
        trainer.load_state_dict(read_checkpoint(file, "--resume", KEYS), "--resume", file)
    if out is not None:
        prepare(out, hold)
    longest = 0.0
    with bar(progress, "", total=config.steps, done=trainer.step, unit="steps") as shown:
        while trainer.step < config.steps:
            begun = time.monotonic()
            if longest and minutes is not None and begun + longest > started + 60 * minutes:
                raise OutOfTime(f"{minutes:g} minutes are over after step {trainer.step} of {config.steps}")
            trainer.train_until(min(config.steps, trainer.step + checkpoint_every), shown)
            if out is not None:
                write_checkpoint(out, trainer.state_dict(), hold)
            if on_checkpoint is not None:
                on_checkpoint(trainer)
            longest = max(longest, time.monotonic() - begun)
    report, packed = trainer.finish()
    if out is not None:
        if hold is not None:
            hold.check()
        if packed is not None:
            with writing(out / MODEL):
                quantopt.save(packed, out / MODEL)
        plot(out, config, report, trainer.histograms)
        write_csv(out / METRICS_CSV, "step", trainer.at, trainer.curves)
        write_json(out / REPORT, report)
    return report
