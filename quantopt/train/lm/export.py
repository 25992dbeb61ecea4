"""Packed language models for other programs: transformers' from_pretrained, and llama.cpp."""

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from quantopt.levels import level_count
from quantopt.optim.options import OPTIONS
from quantopt.train.directory import GGUF, HF
from quantopt.train.errors import InputError, writing
from quantopt.train.lm import model
from quantopt.train.lm.config import Config
from quantopt.train.lm.text import Text
from quantopt.train.optimizers import has_levels

_NEEDS = {"hf": "quantopt.integrations.transformers", "gguf": "quantopt.gguf"}


def check(kind: str, config: Config) -> None:
    """Raises InputError, naming --export or the option to change, where the network of `config` cannot be exported."""
    if not has_levels(config.optimizer, config.bits):
        raise InputError("--export", f"exports packed networks, and {config.optimizer} trains none")
    if config.activations:
        raise InputError("--activations", f"{config.activations}: exported networks have float activations")
    try:
        library: Any = import_module(_NEEDS[kind])
    except ImportError as error:
        raise InputError("--export", str(error)) from None
    if kind != "gguf":
        return
    if config.architecture != "llama":
        raise InputError("--architecture", f"{config.architecture}: a GGUF file is written of llama alone")
    levels = level_count(config.bits or 1)
    if levels not in library.BLOCKS:
        raise InputError("--bits", f"{config.bits}: a GGUF file holds 1 bit or ternary")
    block = library.BLOCKS[levels]
    feed_forward = config.feed_forward or model.feed_forward_width(config.architecture, config.width)
    for flag, width in (("--width", config.width), ("--feed-forward", feed_forward)):
        if width % block:
            raise InputError(flag, f"{width}: a GGUF file holds rows of a multiple of {block} weights")
    size = config.settings()["options"].get("group_size", OPTIONS["group_size"].default)
    if config.scale == "group" and size % block:
        raise InputError("--group-size", f"{size}: a GGUF file has a scale for {block} weights")


def write(kind: str, packed: nn.Module, out: Path, found: Text) -> float:
    """Writes `packed`, whose configuration `check` accepted, into `out`. Returns the validation loss of what is read
    back."""
    network: Any = packed
    context = network.config.max_position_embeddings
    library: Any = import_module(_NEEDS[kind])
    if kind == "hf":
        directory = out / HF
        with writing(directory):
            library.save_pretrained(network, directory)
        return model.validation_loss(type(network).from_pretrained(directory), found, context)
    file = out / GGUF
    with writing(file):
        library.save(network, file, tokenizer="bytes", scales="round")
    return model.validation_loss(library.load(file), found, context)
