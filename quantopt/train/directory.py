"""The result of a run and its directory: the names of the files, and how they are read and written."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantopt
from quantopt.train import report
from quantopt.train.errors import InputError

CHECKPOINT = "checkpoint.pt"
REPORT = "report.json"
MODEL = "model.safetensors"


@dataclass
class Result:
    """A finished run: its report (the contents of report.json), the float and the packed network (None for sgd and
    luq), and histograms [epochs + 1, bins] of the weights before training and after each epoch (measure.histogram)."""

    report: dict[str, Any]
    model: nn.Module
    packed: nn.Module | None
    histograms: Tensor


def check_out(out: Path) -> None:
    """Raises InputError unless files can be written in `out`, or `out` can be made. Leaves nothing behind."""
    existing = out
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".quantopt-") as probe:
            (Path(probe) / "probe").write_bytes(b"")
    except OSError as error:
        raise InputError("--out", f"{out} is not writable: {existing}: {error.strerror or error}") from None


def write_run(out: Path, result: Result) -> None:
    """Writes a finished run's model.safetensors, plots and report.json, the report last."""
    name = result.report["config"]["optimizer"]
    packed = result.packed
    if packed is not None:
        quantopt.save(packed, out / MODEL)
    report.plot_curves(out / report.CURVES_PNG, {name: result.report["curves"]})
    report.plot_weights(out / report.WEIGHTS_PNG, {name: result.histograms})
    report.write_json(out / REPORT, result.report)


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
            f"({type(error).__name__}); no code in it was run",
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise InputError(argument, f"{path} is not a checkpoint of quantopt")
    return state


def read_report(path: Path) -> dict[str, Any]:
    """What a report.json says of the network and its data. InputError naming --model if it is bad."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        config: dict[str, Any] = contents["config"]
        channels, height, width = (int(size) for size in config["images"])
        return {
            "model": str(config["model"]),
            "images": (channels, height, width),
            "classes": int(config["classes"]),
            "data": str(config["data"]),
            "optimizer": str(config["optimizer"]),
            "activations": int(config["activations"]),
            "skip": [str(pattern) for pattern in config["skip"]],
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("--model", f"{path} cannot be read as a run's report: {error}") from None
