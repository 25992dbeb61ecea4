"""What the commands of the command line do. Each takes the parsed arguments and returns the exit status."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quantopt
from quantopt.train import board, data, environment, loop, measure, models, ranks, recipes, report, screen
from quantopt.train import sweep as runs
from quantopt.train.arguments import given
from quantopt.train.checkpoint import KEYS
from quantopt.train.config import OPTIONS, Config, resolve_device
from quantopt.train.directory import (
    CHECKPOINT,
    MODEL,
    REPORT,
    Hold,
    check_out,
    held,
    read_checkpoint,
    read_report,
    write_run,
)
from quantopt.train.errors import InputError, require, writing
from quantopt.train.lm import commands as language_models
from quantopt.train.optimizers import FLOAT
from quantopt.train.page import write as write_page


def train(arguments: argparse.Namespace) -> int:
    with ranks.joined(), contextlib.ExitStack() as stack:
        hold = on_epoch = None
        with ranks.together():
            recipe, out = _train_arguments(arguments)
            require("train", "matplotlib")
            if ranks.rank() == 0:
                check_out(out)
                hold = stack.enter_context(held(out))
                on_epoch = stack.enter_context(board.opened(arguments.tensorboard))
        return _train(arguments, recipe, out, hold, on_epoch)


def _train_arguments(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """(the recipe, the directory to write to)."""
    if arguments.recipe is not None and arguments.optimizer is not None:
        raise InputError("--optimizer", "is part of the recipe: give --recipe or --optimizer")
    recipe = recipes.load(arguments.recipe or arguments.optimizer or Config.optimizer)
    out = Path(arguments.out or Path("runs") / Path(arguments.recipe or recipe["optimizer"]).stem)
    if arguments.until_stdin_ends:
        if sys.stdin is None:  # else its number would be given to a file that is opened later
            raise InputError("--until-stdin-ends", "standard input is closed")
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    return recipe, out


def _end_with_stdin() -> None:
    with contextlib.suppress(OSError):  # what cannot be read has ended
        while os.read(0, 1):  # not sys.stdin, whose lock would be held when the interpreter ends
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _train(
    arguments: argparse.Namespace,
    recipe: dict[str, Any],
    out: Path,
    hold: Hold | None,
    on_epoch: Callable[[loop.Trainer], None] | None,
) -> int:
    with ranks.together():
        device = resolve_device(arguments.device)
        ranks.use_device(device)
    dataset = ranks.one_after_another(lambda: data.load(arguments.data, progress=not arguments.quiet))
    with ranks.together():
        config = recipes.configuration(recipe, given(arguments), device, dataset)
    try:
        result = loop.train(
            config,
            dataset,
            out=out,
            resume=arguments.resume,
            progress=not arguments.quiet,
            minutes=arguments.minutes,
            hold=hold,
            on_epoch=on_epoch,
        )
    except InputError as error:
        name = error.argument.removeprefix("--").replace("-", "_")
        if arguments.recipe is None or name not in recipe.keys() - given(arguments).keys():
            raise
        raise InputError("--recipe", f"{arguments.recipe}: {error}") from None  # a setting of the recipe
    write_run(out, result, hold)
    print(report.table({config.optimizer: result.report}))
    speed, share = result.report["images_per_second"], result.report["optimizer_share"]
    step = "" if share is None else f"; optimizer step: {100 * share:.1f} % of the time"
    print(f"\ntraining: {speed:,.0f} images/s{step}; written: {out}/")
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    require("sweep", "matplotlib")
    out = Path(arguments.out)
    check_out(out)
    device = resolve_device(arguments.device)
    with held(out):
        dataset = data.load(arguments.data, progress=False)
        return runs.sweep(arguments, device, dataset)


def _why_unpacked(optimizer: str) -> str:
    if optimizer == "luq":
        return (
            "it is a run of luq, whose weights lie on the grid -8..7, which is not symmetric as that of packed layers "
            "is; --optimizer askew --bits 4 --activations 4 trains a network of 4-bit weights and activations to pack"
        )
    return f"it is a run of {optimizer}, in full precision"


def evaluate(arguments: argparse.Namespace) -> int:
    source = Path(arguments.model)
    file = source / MODEL if source.is_dir() else source
    described = file.parent / REPORT
    if language_models.is_run(file.parent):
        return language_models.evaluate(arguments, file.parent)
    known = None
    if described.is_file() and arguments.arch is None:
        known = read_report(described, "--model")["config"]
    if known is not None and known["optimizer"] in FLOAT and not file.exists():
        raise InputError("--model", f"{source} holds no packed network: {_why_unpacked(known['optimizer'])}")
    if not file.is_file():
        raise InputError("--model", f"{file} does not exist")
    if known is None and arguments.data is None:
        raise InputError(
            "--data", f"is needed: no {REPORT} beside {file} says what the network was trained on"
        )
    device = resolve_device(arguments.device)
    dataset = data.load(arguments.data if known is None or arguments.data is not None else known["data"])
    name = known["model"] if known is not None else arguments.arch or "any of " + ", ".join(models.MODELS)
    shape, classes = dataset.shape, len(dataset.classes)
    if known is not None and (list(shape), classes) != (known["images"], known["classes"]):
        raise InputError(
            "--data",
            f"{dataset.name} has images {shape} in {classes} classes; the network was trained on "
            f"{tuple(known['images'])} in {known['classes']}",
        )
    settings = {"activations": 0, "skip": ["first", "last"], **(known or {}), **given(arguments)}
    packed = None
    reasons = []
    for candidate in [name] if name in models.MODELS else models.MODELS:
        try:
            network = models.build(candidate, shape, classes)
            if settings["activations"]:
                quantopt.nn.quantize_activations(network, skip=settings["skip"])
            packed = quantopt.load(file, network).to(device).eval()
            break
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            reasons.append(str(error))
    if packed is None:
        raise InputError("--model", f"{file} cannot be loaded as {name}: {reasons[0]}")
    images, labels = dataset.test_images.to(device), dataset.test_labels.to(device)
    started = time.perf_counter()
    accuracy = measure.evaluate(packed, images, labels)
    seconds = time.perf_counter() - started
    print(
        f"accuracy {accuracy:.2f} % of {len(labels):,} test images, {len(labels) / seconds:,.0f} images/s, "
        f"{measure.tensor_bytes(packed):,} bytes ({measure.tensor_bytes(network):,} as float)"
    )
    return 0


def pack(arguments: argparse.Namespace) -> int:
    source = Path(arguments.source)
    checkpoint = source / CHECKPOINT if source.is_dir() else source
    out = Path(arguments.out or checkpoint.parent / MODEL)
    device = resolve_device(arguments.device)
    if not checkpoint.is_file():
        raise InputError("--run", f"{checkpoint} does not exist")
    if out.is_dir():
        raise InputError("--out", f"{out} is a directory; give the name of a file")
    if not out.parent.is_dir():
        raise InputError("--out", f"the directory {out.parent} does not exist")
    check_out(out.parent)
    with held(out.parent) as hold:  # a training there would remove the file at its next checkpoint
        return _pack(arguments, source, checkpoint, out, device, hold)


def _pack(
    arguments: argparse.Namespace, source: Path, checkpoint: Path, out: Path, device: str, hold: Hold
) -> int:
    state = read_checkpoint(checkpoint, "--run", KEYS, language_models.KEYS)
    if state.keys() == language_models.KEYS:
        return language_models.pack(arguments, state, checkpoint, out, device, hold)
    config = Config(**{name: value for name, value in state["config"].items() if name in OPTIONS})
    config = dataclasses.replace(config, device=device, data=arguments.data or config.data)
    try:
        config.check()
    except InputError as error:
        raise InputError("--run", f"{checkpoint} has a configuration that cannot be used: {error}") from None
    if config.optimizer in FLOAT:
        raise InputError("--run", f"{source} cannot be packed: {_why_unpacked(config.optimizer)}")
    dataset = data.load(config.data)
    try:
        trainer = loop.Trainer(config, dataset)
    except InputError as error:
        raise InputError("--run", f"{checkpoint} is of another run: {error}") from None
    trainer.load_weights(state, "--run", checkpoint)
    result = trainer.finish()
    packed = result.packed
    if packed is None:
        raise InputError("--run", f"{source} has no quantised weights")
    hold.check()
    with writing(out):
        quantopt.save(packed, out)
    print(report.table({config.optimizer: result.report}))
    print(f"\nepoch {trainer.epoch} of {config.epochs}; written: {out}")
    return 0


def page(arguments: argparse.Namespace) -> int:
    directories = [Path(directory) for directory in arguments.directories]
    out = None if arguments.out is None else Path(arguments.out)
    print(f"written: {write_page(directories, out)}")
    return 0


def env(arguments: argparse.Namespace) -> int:
    facts = environment.describe()
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        print(environment.text(facts) if arguments.all else screen.text(facts))
    return 0
