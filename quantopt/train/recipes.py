"""Recipes: settings of trainings in TOML files.

`quantopt/recipes/OPTIMIZER.toml` holds what an optimizer needs on any network (docs/algorithms.md, sections 2 to 4).
`quantopt/recipes/networks.toml` holds the recipes NETWORK-OPTIMIZER-BITS by families of networks: what is put before
their names, the settings that all recipes of a family share, and for each recipe the optimizer's recipe that is its
`base` and its other settings. A later setting replaces an earlier one: base, family, recipe. A table such as
`[options]` is replaced as one setting.
A file of the user has the keys of a recipe, and may name an optimizer's recipe as its `base`.

The keys are the fields of `config.Config` that its table gives to recipes.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from quantopt.train import augment
from quantopt.train.config import HYPERPARAMETERS, OPTIONS, Config, default_batch_size
from quantopt.train.data import Dataset
from quantopt.train.errors import InputError, shown
from quantopt.train.optimizers import OPTIMIZERS

_DIRECTORY = resources.files("quantopt") / "recipes"
_LONGEST = 16 << 10  # bytes: the time that tomllib takes grows with the square of a dotted key's length
_KEYS = (*HYPERPARAMETERS, *(name for name, option in OPTIONS.items() if option.recipe == "run"))


@cache
def _networks() -> dict[str, dict[str, Any]]:
    """The recipes of networks.toml by name."""
    found = {}
    for family in tomllib.loads((_DIRECTORY / "networks.toml").read_text(encoding="utf-8"))["families"]:
        networks, own, prefix = family.pop("networks"), family.pop("recipes"), family.pop("prefix", "")
        for network in networks:
            for name, settings in own.items():
                found[f"{prefix}{network}-{name}"] = {"model": network, **family, **settings}
    return found


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted([*OPTIMIZERS, *_networks()])


def load(name: str, own: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The settings of a recipe: of `own` (those of networks.toml) by its name, of an optimizer, else of a file. Raises
    InputError naming --recipe."""
    settings = dict((_networks() if own is None else own).get(name) or _parse(name))
    base = settings.pop("base", None)
    if base is not None:
        if base not in list(OPTIMIZERS):
            raise InputError(
                "--recipe", f"{name}: base = {shown(base)} must be a recipe of the package without a base"
            )
        settings = {**_parse(base), **settings}
    for key, value in settings.items():
        if key not in _KEYS:
            raise InputError("--recipe", f"{name}: unknown key {shown(key)}; known: {', '.join(_KEYS)}")
        if expected := OPTIONS[key].expected(value):
            raise InputError("--recipe", f"{name}: {key} = {shown(value)} must be {expected}")
    if settings.get("optimizer") not in OPTIMIZERS:
        raise InputError("--recipe", f"{name}: optimizer must be one of {', '.join(OPTIMIZERS)}")
    return settings


def _parse(name: str) -> dict[str, Any]:
    file: Any = _DIRECTORY / f"{name}.toml" if name in OPTIMIZERS else Path(name)
    try:
        with file.open("rb") as opened:
            contents = opened.read(_LONGEST + 1)
        text = contents.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "--recipe", f"{name} is neither a recipe of the package nor a readable file ({error})"
        ) from None
    if len(contents) > _LONGEST:
        raise InputError("--recipe", f"{name} is not a recipe: it is longer than {_LONGEST:,} bytes")
    try:
        return tomllib.loads(text)
    except ValueError as error:  # also of numbers with thousands of digits
        raise InputError("--recipe", f"{name} is not TOML: {error}") from None
    except RecursionError:
        raise InputError("--recipe", f"{name} is not a recipe: it is nested too deeply") from None


def configuration(recipe: dict[str, Any], given: dict[str, Any], device: str, dataset: Dataset) -> Config:
    """The defaults, overridden by a recipe, overridden by the options `given`, for a run on `dataset`."""
    settings = {**recipe, **given, "device": device}
    if settings.get("augment", "auto") == "auto":
        settings["augment"] = augment.default_mode(*dataset.shape)
    settings.setdefault("batch_size", default_batch_size(len(dataset.train_labels), settings.get("limit")))
    return Config(**settings)


def complete(config: Config) -> Config:
    """`config` with the values of its optimizer's recipe where it has None; checked before and after."""
    config.check()
    given = asdict(config)
    missing = {key: value for key, value in load(config.optimizer).items() if given.get(key) is None}
    config = replace(config, **missing)
    config.check()
    return config
