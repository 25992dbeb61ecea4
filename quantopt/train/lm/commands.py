"""What the command line does with language models: `lm`, `sample`, and `eval` and `pack` of their runs."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import quantopt
from quantopt.train import board, optimizers
from quantopt.train.arguments import given
from quantopt.train.config import resolve_device
from quantopt.train.directory import (
    CHECKPOINT,
    MODEL,
    REPORT,
    Hold,
    check_out,
    held,
    read_checkpoint,
)
from quantopt.train.errors import InputError, require, writing
from quantopt.train.lm import config as lm
from quantopt.train.lm import export, loop, model, text
from quantopt.train.lm.loop import KEYS as KEYS
from quantopt.train.measure import tensor_bytes


def train(arguments: argparse.Namespace) -> int:
    settings = given(arguments, lm.OPTIONS)
    config = lm.configuration(lm.load(arguments.recipe), settings)
    out = Path(arguments.out or Path("runs") / f"lm-{Path(arguments.recipe).stem}")
    for kind in arguments.export:
        export.check(kind, config)
    require("lm", "matplotlib", "transformers")
    check_out(out)
    with held(out) as hold, board.opened(arguments.tensorboard) as on_checkpoint:
        found = text.load(config.data, config.context, config.validation)
        results = loop.train(
            config,
            found,
            out=out,
            resume=arguments.resume,
            progress=not arguments.quiet,
            minutes=arguments.minutes,
            hold=hold,
            on_checkpoint=on_checkpoint,
        )
        print(loop.summary(results))
        for kind in dict.fromkeys(arguments.export):
            hold.check()
            loss = export.write(kind, load(out, "cpu")[1], out, found)
            print(f"validation loss of what was exported as {kind}: {loss:.4f}")
    print(f"written: {out}/")
    return 0


def _report(directory: Path) -> dict[str, Any] | None:
    """The report in a directory, if it is of a language model."""
    try:
        report: dict[str, Any] = json.loads((directory / REPORT).read_text(encoding="utf-8"))
        return report if "layers" in report["config"] and "model" not in report["config"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def is_run(directory: Path) -> bool:
    """Whether the report in a directory is of a language model."""
    return _report(directory) is not None


def _configured(saved: Any, argument: str, source: Path, **differing: Any) -> lm.Config:
    """The configuration that a report or a checkpoint has."""
    try:
        config = lm.Config(**{name: saved[name] for name in lm.OPTIONS if name in saved})
        config = replace(config, **differing)
        config.check()
    except (InputError, TypeError, AttributeError) as error:
        raise InputError(argument, f"{source} has a configuration that cannot be used: {error}") from None
    return config


def load(run: Path, device: str) -> tuple[lm.Config, nn.Module]:
    """The configuration of a finished run and its network, packed (full precision: as the checkpoint has it), on
    `device` in evaluation mode. Raises InputError, naming --model, if it cannot be loaded."""
    report = _report(run)
    if report is None:
        raise InputError("--model", f"{run} is no finished run of quantopt lm")
    config = _configured(report["config"], "--model", run / REPORT, device="cpu")
    network = model.build(config)
    optimizers.change_layers(config.optimizer, network, config.settings())
    if report.get("bytes_packed") is None:
        state = read_checkpoint(run / CHECKPOINT, "--model", KEYS)
        try:
            network.load_state_dict(state["model"])
        except (RuntimeError, TypeError) as error:
            raise InputError("--model", f"{run / CHECKPOINT} does not fit: {error}") from None
    else:
        try:
            network = quantopt.load(run / MODEL, network)
        except (ValueError, OSError) as error:
            raise InputError("--model", f"{run / MODEL} cannot be loaded: {error}") from None
    return config, network.to(device).eval()


def evaluate(arguments: argparse.Namespace, run: Path) -> int:
    device = resolve_device(arguments.device)
    config, network = load(run, device)
    found = text.load(arguments.data or config.data, config.context, config.validation)
    trained = (_report(run) or {})["config"].get("fingerprint")
    if arguments.data is None and found.fingerprint() != trained:
        raise InputError(
            "--data", f"{config.data} is not what the network was trained on: name another file to use it"
        )
    started = time.perf_counter()
    loss = model.validation_loss(network, found, config.context)
    seconds = time.perf_counter() - started
    count = found.validation_windows(config.context)[0].numel()
    print(
        f"loss {loss:.4f} nats per byte over {count:,} bytes, {count / seconds:,.0f} bytes/s, "
        f"{tensor_bytes(network):,} bytes"
    )
    return 0


def sample(arguments: argparse.Namespace) -> int:
    _, network = load(Path(arguments.model), resolve_device(arguments.device))
    prompt = arguments.prompt.encode(errors="surrogateescape")
    written = model.sample(
        network, prompt, arguments.length, temperature=arguments.temperature, seed=arguments.seed
    )
    print((prompt + written).decode(errors="replace"))
    return 0


def pack(
    arguments: argparse.Namespace, state: dict[str, Any], checkpoint: Path, out: Path, device: str, hold: Hold
) -> int:
    differing = {"device": device} | ({} if arguments.data is None else {"data": arguments.data})
    config = _configured(state["config"], "--run", checkpoint, **differing)
    trainer = loop.Trainer(config, text.load(config.data, config.context, config.validation))
    trainer.load_weights(state, "--run", checkpoint)
    report, packed = trainer.finish()
    if packed is None:
        raise InputError("--run", f"{checkpoint} is of a run in full precision: nothing to pack")
    hold.check()
    with writing(out):
        quantopt.save(packed, out)
    print(loop.summary(report))
    print(f"step {trainer.step} of {config.steps}; written: {out}")
    return 0
