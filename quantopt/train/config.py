"""The options of a training: the fields of `Config` are the one table of them.

A field says an option's type, default, accepted values, help text, and where it may be set. `Config.check`, the reader
of recipes (`recipes.py`) and the command line (`arguments.py`) are derived from the table.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from quantopt.levels import check_scale
from quantopt.nn.luq import SAWB_BITS
from quantopt.train import augment, models
from quantopt.train.errors import InputError, shown
from quantopt.train.optimizers import FLOAT, OPTIMIZERS


@dataclass(frozen=True)
class Option:
    """A row of the table.

    types, elements: of the value, and of the elements of a list or the values of a dictionary (an int is also a float).
    choices: the accepted values. least: the smallest accepted integer; remark: why. positive: only finite numbers above
    0 are accepted. most: only finite numbers from 0 to `most` are. Values that none of these bound are checked where
    they are used.
    recipe: "run" if a recipe may set the option, "hyperparameter" if the recipe of every optimizer does.
    commands: those that have an argument for it. offered, argument_default: choices and default of that argument where
    they differ from `choices` and `default`. otherwise: what its help says of the default, if that is not `default`.
    """

    help: str
    metavar: str | None = None
    choices: tuple[Any, ...] | None = None
    least: int | None = None
    remark: str = ""
    positive: bool = False
    most: float | None = None
    recipe: Literal["", "run", "hyperparameter"] = ""
    commands: tuple[str, ...] = ()
    offered: tuple[Any, ...] | None = None
    argument_default: Any = None
    otherwise: str = ""
    name: str = ""
    types: tuple[type, ...] = ()
    elements: tuple[type, ...] = ()
    default: Any = None

    @property
    def flag(self) -> str:
        """How the command line and error messages spell the option."""
        return f"--{self.name.replace('_', '-')}"

    def expected(self, value: Any) -> str | None:
        """What the option must be, where `value` is not accepted; None where it is."""
        if self.types and not any(_is_a(value, kind) for kind in self.types):
            return f"of type {' or '.join(kind.__name__ for kind in self.types)}"
        if isinstance(value, list | dict):
            values = value.values() if isinstance(value, dict) else value
            if not all(any(_is_a(element, kind) for kind in self.elements) for element in values):
                kinds = " or ".join(getattr(kind, "__name__", "") for kind in self.elements)
                return f"a {type(value).__name__} of values of type {kinds}"
        if self.choices is not None and value not in self.choices:
            return f"one of {_listed(self.choices)}"
        if isinstance(value, int) and abs(value) >= 2**63:
            return "below 2^63"
        if self.least is not None and value < self.least:
            return f"at least {self.least}{self.remark}"
        if self.positive and not (math.isfinite(value) and value > 0):
            return "a positive finite number"
        if self.most is not None and not (math.isfinite(value) and 0 <= value <= self.most):
            return "a finite number of at least 0" + (
                "" if math.isinf(self.most) else f", at most {self.most:g}"
            )
        return None


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_is_a(element, get_args(kind)[0]) for element in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def option(default: Any, help: str, **row: Any) -> Any:
    """A field of a class of options, with its row of the table."""
    return field(default=default, metadata={"option": Option(help, default=default, **row)})


_ALL = ("train", "sweep", "demo")
_SPEED: dict[str, Any] = {"recipe": "run", "commands": ("train", "sweep"), "otherwise": "not"}
_TRAIN = ("train",)

DATA_HELP = (
    '"digits" (scikit-learn\'s, no download), or a directory or archive (.tar, .tar.gz, .tar.xz, .zip) with IDX '
    "(MNIST) files, CIFAR-10/100 pickles or binary batches, or images in train/CLASS/ and test/CLASS/; the format is "
    "recognised by content"
)


@dataclass(frozen=True)
class Config:
    """What determines a run; `OPTIONS` describes the fields. None means the value of the optimizer's recipe."""

    data: str = option("digits", DATA_HELP, metavar="DATA", commands=_ALL, otherwise="default %(default)s")
    model: str = option("cnn", "network", choices=tuple(models.MODELS), recipe="run", commands=_ALL)
    epochs: int = option(30, "passes over the data", metavar="N", least=1, recipe="run", commands=_ALL)
    batch_size: int = option(
        64,
        "images per step",
        metavar="B",
        least=2,
        remark=" (batch norm needs two)",
        recipe="run",
        commands=_ALL,
        otherwise="64 below 10,000 training images, else 128",
    )
    limit: int | None = option(
        None,
        "train on N images, as many of each class (all); the test images stay",
        metavar="N",
        least=2,
        commands=_ALL,
    )
    validation: int | None = option(
        None,
        "measure on N training images, held out, in place of the test images: for choosing hyper-parameters",
        metavar="N",
        least=2,
        commands=_ALL,
    )
    device: str = option(
        "cpu",
        "auto is the GPU if torch can use one",
        commands=_ALL,
        offered=("auto", "cpu", "cuda"),
        argument_default="auto",
    )
    seed: int = option(
        0,
        "of all random numbers",
        metavar="S",
        least=0,
        commands=("train", "demo"),
        otherwise="%(default)s",
    )
    optimizer: str = option(
        "askew",
        "how the quantised weights are trained, in place of a recipe; sgd is full precision",
        choices=tuple(OPTIMIZERS),
        recipe="run",
        commands=_TRAIN,
    )
    bits: int | str | None = option(
        None,
        "per quantised weight",
        recipe="hyperparameter",
        commands=_TRAIN,
        offered=(1, 2, 3, 4, "17-level", "ternary"),
        otherwise="1",
    )
    activations: int | None = option(
        None,
        "bits of the inputs of quantised layers, 0 is float",
        choices=(0, SAWB_BITS),
        recipe="hyperparameter",
        commands=_TRAIN,
        otherwise="0",
    )
    skip: list[str] | None = option(  # noqa: RUF009
        None,
        'layers in full precision: "first", "last", name patterns; "none" quantises all',
        metavar="LAYER",
        recipe="hyperparameter",
        commands=_TRAIN,
        otherwise="first last",
    )
    scale: str | None = option(
        None,
        "levels in units of 1, or of the initial standard deviation of the tensor or of each output channel; sawb: the "
        "outer level that SAWB fits to the initial tensor",
        recipe="hyperparameter",
        commands=_TRAIN,
        offered=("none", "tensor", "channel", "sawb"),
        otherwise="tensor",
    )
    lr: float | None = option(
        None,
        "learning rate of the quantised weights",  # for levels one standard deviation from zero
        metavar="LR",
        positive=True,
        recipe="hyperparameter",
        commands=_TRAIN,
    )
    weight_decay: float | None = option(
        None, "of the quantised weights", most=math.inf, recipe="hyperparameter"
    )
    momentum: float | None = option(None, "of all weights; Adam has betas", most=1, recipe="hyperparameter")
    warmup: float | None = option(
        None,
        "fraction of the steps in which the learning rate rises linearly, before it falls by a cosine to 0",
        most=1,
        recipe="hyperparameter",
    )
    milestones: list[float] | None = option(  # noqa: RUF009
        None,
        "fractions of the steps, in (0, 1), after which the learning rate is halved; without any, it falls by a cosine",
        recipe="run",
    )
    rescale: bool = option(
        True,
        "with scale none, divide the weights by their deviation first, and give the rates in units of it",
        recipe="run",
    )
    float_lr: float | None = option(
        None, "learning rate of the other parameters", positive=True, recipe="hyperparameter"
    )
    float_weight_decay: float | None = option(
        None, "of the other parameters", most=math.inf, recipe="hyperparameter"
    )
    options: dict[str, bool | float | str | list[float]] | None = option(  # noqa: RUF009
        None, "further arguments of the optimizer's class", recipe="hyperparameter"
    )
    anneal: dict[str, float | str] | None = option(  # noqa: RUF009
        None, "settings of the optimizer's schedule (quantopt.Anneal)", recipe="hyperparameter"
    )
    augment: str = option(
        "none",
        "auto: crop, flip if in colour, none below 16x16",
        choices=augment.MODES,
        recipe="run",
        commands=_TRAIN,
        offered=("auto", *augment.MODES),
        otherwise="auto",
    )
    init: str | None = option(
        None,
        "start from the weights of this run of the same network, or of its checkpoint.pt",
        metavar="RUN",
        commands=_TRAIN,
    )
    warm_start: str | None = option(
        None,
        "the recipe whose run of the same seed gives `init`; a sweep sets that, and trains the other recipe first",
        recipe="run",
    )
    precision: str = option(
        "float32",
        "bfloat16 trains under autocast",
        choices=("float32", "bfloat16"),
        recipe="run",
        commands=_TRAIN,
    )
    test_every: int = option(
        1,
        "test accuracy for the curves after every N epochs, 0 for none",
        metavar="N",
        least=0,
        recipe="run",
        commands=_TRAIN,
    )
    projected_at: list[float] | None = option(  # noqa: RUF009
        None,
        "fractions of the epochs, in (0, 1), after which the projected network is tested, as at the end",
        recipe="run",
    )
    channels_last: bool = option(False, "images and weights in channels-last memory", **_SPEED)
    compile: bool = option(False, "torch.compile of the network in training", **_SPEED)
    cuda_graph: bool = option(
        False,
        "capture the training iteration and replay it; the optimizer's step is then not timed",
        **_SPEED,
    )
    backend: str = option(
        "auto",
        "of the optimizer's step",
        commands=_TRAIN,
        offered=("auto", "reference", "cpu", "cuda", "triton"),
        otherwise="default %(default)s, the fastest that works",
    )

    def check(self) -> None:
        """Raises InputError, naming the option, for a value that the table excludes or that does not fit another."""
        check_values(self, OPTIONS)
        for name in ("milestones", "projected_at"):
            fractions = getattr(self, name)
            if not all(0 < fraction < 1 for fraction in fractions or ()):
                raise _refused(OPTIONS[name], fractions, "fractions are above 0 and below 1")
        if self.warm_start is not None and self.init is None:
            raise InputError("--init", f"is needed: this recipe starts from a run of {self.warm_start}")
        if self.cuda_graph and self.device != "cuda":
            raise _refused(OPTIONS["cuda_graph"], self.cuda_graph, "needs --device cuda")


def check_values(config: Any, table: Mapping[str, Option]) -> None:
    """Raises InputError, naming the option, for a value of `config` that its row of the table excludes, or that its
    optimizer does not have."""
    for name, row in table.items():
        value = getattr(config, name)
        if value is None and row.default is None:
            continue
        if expected := row.expected(value):
            raise _refused(row, value, f"must be {expected}")
    bits = FLOAT.get(config.optimizer)
    if bits is not None and config.bits not in (None, bits):
        raise _refused(
            table["bits"], config.bits, f"{config.optimizer} has {bits or 'full precision, no'} bits"
        )
    if bits is None and config.scale is not None and config.bits is not None:
        try:
            check_scale(config.scale, config.bits)
        except ValueError as error:
            raise InputError(table["scale"].flag, str(error)) from None
    if config.optimizer == "luq" and config.activations not in (None, SAWB_BITS):
        raise _refused(table["activations"], config.activations, f"luq has {SAWB_BITS}")


def _refused(row: Option, value: Any, expected: str) -> InputError:
    return InputError(row.flag, f"{shown(value)} is not accepted: {expected}")


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))


def table_of(options: type) -> dict[str, Option]:
    """Name -> row of every option, in the order of the fields of `options`, a dataclass of :func:`option`."""
    hints = get_type_hints(options)
    rows = {}
    for f in fields(options):
        hint = hints[f.name]
        parts = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(get_origin(part) or part for part in parts if part is not types.NoneType)
        elements = [get_args(part)[-1] for part in parts if get_args(part)]
        rows[f.name] = replace(
            f.metadata["option"],
            name=f.name,
            types=kinds,
            elements=get_args(elements[0]) or (elements[0],) if elements else (),
        )
    return rows


OPTIONS = table_of(Config)
"""The table of `Config`."""

DEFAULTS = {name: row.default for name, row in OPTIONS.items()}
"""What a configuration has that an earlier version saved, where it lacks an option."""

HYPERPARAMETERS = tuple(name for name, option in OPTIONS.items() if option.recipe == "hyperparameter")
"""What the recipe of every optimizer sets."""


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
    """64 for less than 10,000 training images, with which 128 makes too few steps; else 128."""
    return 64 if min(images, limit or images) < 10_000 else 128
