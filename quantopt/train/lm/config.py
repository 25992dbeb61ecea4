"""The options of a language-model run, and its recipes.

The fields of `Config` are the table of options, as in `quantopt.train.config`, whose rows of hyper-parameters they
share. `quantopt/recipes/lm.toml` has the recipes: hyper-parameters over those of an optimizer's recipe, the `base`.
"""

import tomllib
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from quantopt.train import config as training
from quantopt.train import recipes
from quantopt.train.config import HYPERPARAMETERS, Option, check_values, option, resolve_device, table_of
from quantopt.train.errors import InputError, shown

_LM = ("lm",)
_KEYS = ("optimizer", *HYPERPARAMETERS)
DEFAULT_RECIPE = "stam-muon"


def _shared(name: str, **differing: Any) -> Any:
    """A field with the row that `quantopt train` has for the option, but for what is `differing`."""
    row = training.OPTIONS[name]
    commands = (*row.commands, *_LM) if row.commands else ()
    return field(default=row.default, metadata={"option": replace(row, commands=commands, **differing)})


@dataclass(frozen=True)
class Config:
    """What determines a run; `OPTIONS` describes the fields. Hyper-parameters that are None have the recipe's value."""

    data: str = option("", "text file; its bytes are the tokens", metavar="FILE", commands=_LM)
    architecture: str = option(
        "llama",
        "of the transformers library: Llama, or GPT-NeoX with layer norms, biases and GELU",
        choices=("llama", "gpt-neox"),
        commands=_LM,
        otherwise="%(default)s",
    )
    layers: int = option(4, "decoder layers", metavar="N", least=1, commands=_LM, otherwise="%(default)s")
    width: int = option(
        128, "of the hidden states", metavar="D", least=8, commands=_LM, otherwise="%(default)s"
    )
    heads: int = option(4, "of attention", metavar="H", least=1, commands=_LM, otherwise="%(default)s")
    feed_forward: int | None = option(
        None,
        "width between the two products of a layer",
        metavar="F",
        least=1,
        commands=_LM,
        otherwise="8/3 of --width, of gpt-neox 4 times",
    )
    context: int = option(
        128, "bytes of a window", metavar="T", least=2, commands=_LM, otherwise="%(default)s"
    )
    batch_size: int = option(
        16, "windows per step", metavar="B", least=1, commands=_LM, otherwise="%(default)s"
    )
    steps: int = option(1200, "of training", metavar="N", least=1, commands=_LM, otherwise="%(default)s")
    validation: float = option(
        0.1,
        "fraction of the file, its end, that is held out",
        metavar="F",
        most=1,
        commands=_LM,
        otherwise="%(default)s",
    )
    precision: str = option(
        "bfloat16",
        "bfloat16 trains under autocast",
        choices=("float32", "bfloat16"),
        commands=_LM,
        otherwise="%(default)s",
    )
    device: str = _shared("device")
    seed: int = _shared("seed")
    optimizer: str = field(
        default=training.Config.optimizer,
        metadata={"option": replace(training.OPTIONS["optimizer"], commands=())},  # a recipe says it
    )
    bits: int | str | None = _shared("bits")
    activations: int | None = _shared("activations")
    skip: list[str] | None = _shared("skip")  # noqa: RUF009
    scale: str | None = _shared("scale", offered=("tensor", "channel", "group"), otherwise="channel")
    group_size: int | None = option(
        None,
        "weights of a row that share a scale, with --scale group",
        metavar="G",
        least=1,
        commands=_LM,
        otherwise="recipe's; else 128",
    )
    lr: float | None = _shared("lr")
    weight_decay: float | None = _shared("weight_decay")
    momentum: float | None = _shared("momentum")
    warmup: float | None = _shared("warmup")
    float_lr: float | None = _shared("float_lr")
    float_weight_decay: float | None = _shared("float_weight_decay")
    options: dict[str, bool | float | str | list[float]] | None = _shared("options")  # noqa: RUF009
    anneal: dict[str, float | str] | None = _shared("anneal")  # noqa: RUF009
    backend: str = _shared("backend")

    def settings(self) -> dict[str, Any]:
        """What `train.optimizers.build` takes."""
        settings = asdict(self)
        size = settings.pop("group_size")
        options = (self.options or {}) | ({} if size is None else {"group_size": size})
        return settings | {"options": options}

    def check(self) -> None:
        """Raises InputError, naming the option, for a value that the table excludes."""
        check_values(self, OPTIONS)
        if self.group_size is not None and self.scale != "group":
            raise InputError("--group-size", f"needs --scale group, not {self.scale}")
        if self.scale == "none":
            raise InputError(
                "--scale", "'none' is not accepted: levels -1 and 1 need a batch norm behind each layer"
            )


OPTIONS: dict[str, Option] = table_of(Config)
"""The table of `Config`."""


@cache
def _own_recipes() -> dict[str, dict[str, Any]]:
    text = (resources.files("quantopt") / "recipes" / "lm.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def names() -> list[str]:
    """The recipes of language models that come with the package."""
    return sorted(_own_recipes())


def load(name: str) -> dict[str, Any]:
    """The settings of a recipe: of lm.toml by its name, else of a file. Raises InputError naming --recipe."""
    settings = recipes.load(name, _own_recipes())
    if unknown := sorted(settings.keys() - set(_KEYS)):
        raise InputError(
            "--recipe", f"{name}: {shown(unknown[0])} is not for language models; known: {', '.join(_KEYS)}"
        )
    return settings


def configuration(recipe: dict[str, Any], given: dict[str, Any]) -> Config:
    """The defaults, overridden by the optimizer's recipe, a recipe, and the options `given`; checked."""
    settings = {**recipes.load(recipe["optimizer"]), **recipe, **given}
    config = Config(**settings)
    config = replace(config, device=resolve_device(config.device))
    config.check()
    return config
