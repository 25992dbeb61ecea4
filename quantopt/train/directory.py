"""The result of a run and its directory: the names of the files, how they are read and written, and by whom.

A report, packed model or figure in the directory always belongs to the checkpoint there: each new checkpoint removes
them, and a run writes them at its end, the report last. So a run with a report is finished, and one that was killed
continues from its checkpoint. A run that starts anew leaves an earlier one as it is until its own first checkpoint is
complete; if it is killed before, the earlier run is still there, and `--resume` continues that one (or says in what it
differs). If it is killed in the instant between, the earlier run's checkpoint is there, from which `--resume` makes the
results again.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import quantopt
from quantopt.files import atomic_write, remove_temporaries
from quantopt.train import checkpoint, report
from quantopt.train.config import OPTIONS
from quantopt.train.errors import InputError, shown, writing
from quantopt.train.optimizers import FULL_PRECISION
from quantopt.train.series import METRICS_CSV, positions, write_csv

CHECKPOINT = "checkpoint.pt"
REPORT = "report.json"
MODEL = "model.safetensors"
PAGE = "report.html"
"""What `quantopt report` writes."""
GGUF, HF = "model.gguf", "hf"
"""What `quantopt lm --export` writes: a file, and a directory of the transformers library."""


@dataclass
class Result:
    """A finished run: its report (the contents of report.json), the float and the packed network (None for sgd and
    luq), and histograms [epochs + 1, bins] of the weights before training and after each epoch (measure.histogram)."""

    report: dict[str, Any]
    model: nn.Module
    packed: nn.Module | None
    histograms: Tensor


def check_out(out: Path, argument: str = "--out") -> None:
    """Raises InputError unless files can be written in `out`, or `out` can be made. Leaves nothing behind."""
    existing = out
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".quantopt-") as probe:
            (Path(probe) / "probe").write_bytes(b"")
    except OSError as error:
        raise InputError(argument, f"{out} is not writable: {existing}: {error.strerror or error}") from None


class Hold:
    """A directory that this process has opened, made if need be; its path may come to lead to another one."""

    def __init__(self, out: Path) -> None:
        self._out = out
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)

    def is_there(self) -> bool:
        """Whether the path still leads to the directory."""
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(self._out))
        except OSError:
            return False

    def check(self) -> None:
        """Raises InputError unless the path still leads to the directory."""
        if not self.is_there():
            raise InputError("--out", f"{self._out} was moved, removed or replaced while it was in use")


@contextmanager
def held(out: Path) -> Iterator[Hold]:
    """Holds the directory `out`, which is made if need be, for one run: InputError if another process holds it.

    The hold is a lock of the kernel on the directory (flock), which ends with the process however that ends, and leaves
    no file. Where the file system has no such locks (some network ones) the run goes on without, and says so. A
    directory that was made and stayed empty is removed again.
    """
    while True:
        made = [path for path in (out, *out.parents) if not path.exists()]
        hold = Hold(out)
        try:
            _lock(hold.handle, out)
            if not hold.is_there():  # the process that made it has removed it before it was locked here
                continue
            try:
                yield hold
            finally:
                for path in made if hold.is_there() else ():
                    with contextlib.suppress(OSError):  # not empty
                        path.rmdir()
            return
        finally:
            os.close(hold.handle)


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(handle)
        who = "another process" if holder is None else f"process {holder}"
        raise InputError(
            "--out", f"{out} is in use by {who}: wait for it, or give another directory"
        ) from None
    except OSError as error:
        print(f"warning: {out} is not locked against other runs: {error.strerror}", file=sys.stderr)


def _holder(handle: int) -> int | None:
    """The process that holds the lock on an open file, if the kernel tells (Linux)."""
    found = os.fstat(handle)
    inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return None
    return next((int(lock[4]) for lock in locks if lock[1:2] == ["FLOCK"] and lock[5] == inode), None) or None


def prepare(out: Path, hold: Hold | None = None) -> None:
    """Makes the directory `out` for a run, and removes what a killed one left half written. Raises InputError as
    `write_checkpoint`, or if it cannot be made."""
    if hold is not None:
        hold.check()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_temporaries(out)


def write_checkpoint(out: Path, state: dict[str, Any], hold: Hold | None = None) -> None:
    """Replaces the checkpoint in `out`, and removes the results that were measured at the one before. Raises InputError
    if `hold` is of a directory that is no longer there."""
    path = out / CHECKPOINT

    def write(file: Path) -> None:
        file.write_bytes(checkpoint.encode(state))
        # The new one is complete and not there yet: at no moment does a report lie beside another run's checkpoint.
        for stale in (REPORT, MODEL, GGUF, report.CURVES_PNG, report.WEIGHTS_PNG, METRICS_CSV, PAGE):
            (out / stale).unlink(missing_ok=True)
        shutil.rmtree(out / HF, ignore_errors=True)

    if hold is not None:
        hold.check()
    with writing(path):
        atomic_write(path, write)


def write_run(out: Path, result: Result, hold: Hold | None = None) -> None:
    """Writes a finished run's model.safetensors, plots, metrics.csv and report.json, the report last; `hold` as
    above."""
    if hold is not None:
        hold.check()
    name = result.report["config"]["optimizer"]
    packed = result.packed
    if packed is not None:
        with writing(out / MODEL):
            quantopt.save(packed, out / MODEL)
    report.plot_curves(out / report.CURVES_PNG, {name: result.report["curves"]})
    report.plot_weights(out / report.WEIGHTS_PNG, {name: result.histograms})
    curves = result.report["curves"]
    write_csv(out / METRICS_CSV, "epoch", positions(len(curves["loss"]), 1, len(curves["loss"])), curves)
    report.write_json(out / REPORT, result.report)


def read_checkpoint(path: Path, argument: str, *kinds: frozenset[str]) -> dict[str, Any]:
    """The state in a checkpoint file, tensors on the CPU, with the parts of one of the `kinds` (none: of a network of
    images). Runs no code of the file. InputError if it is bad."""
    if not path.is_file():
        raise InputError(argument, f"{path} does not exist")
    try:
        state = checkpoint.decode(path.read_bytes())
        checkpoint.check_parts(state, *kinds)
    except OSError as error:
        raise InputError(argument, f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(argument, f"{path} {error}") from None
    return state  # type: ignore[no-any-return]


def read_report(path: Path, argument: str) -> dict[str, Any]:
    """A run's report.json, of which the network and its data are checked. InputError naming `argument` if it is bad."""
    with _refusals(path, argument):
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config = contents["config"]
        for name in ("model", "optimizer", "data", "activations", "skip"):
            if expected := OPTIONS[name].expected(config[name]):
                raise ValueError(f"config.{name} is {shown(config[name])} and must be {expected}")
        if not isinstance(config["images"], list) or len(config["images"]) != 3:
            raise ValueError(f"config.images is {shown(config['images'])}, not channels, height and width")
        for size in (*config["images"], config["classes"]):
            checkpoint.check_number(size, "a size in config.images or config.classes", 1, 2**63, kind=int)
    return contents


def read_results(path: Path, argument: str) -> dict[str, Any]:
    """As `read_report`; what a run measured is checked too."""
    contents = read_report(path, argument)
    with _refusals(path, argument):
        config, curves = contents["config"], contents["curves"]
        for name in ("bits", "epochs", "limit", "validation"):
            if config[name] is not None and (expected := OPTIONS[name].expected(config[name])):
                raise ValueError(f"config.{name} is {shown(config[name])} and must be {expected}")
        names = ["accuracy_latent" if config["optimizer"] in FULL_PRECISION else "accuracy_quantized"]
        if contents["accuracy_packed"] is not None:
            names += ["accuracy_packed", "bytes_float", "bytes_packed"]
            names += ["images_per_second_float", "images_per_second_packed"]
        for name in names:
            low, high = (0, 100) if name.startswith("accuracy") else (1e-9, 2**63)
            checkpoint.check_number(contents[name], name, low, high, kind=(int, float))
        for name in ("device", "bytes_float", "bytes_packed"):
            contents[name]
        optional = [report.OPTIONAL_CURVE] if report.OPTIONAL_CURVE in curves else []
        for name in [*(panel[0] for panel in report.PANELS), *optional]:
            if not isinstance(curves[name], list) or len(curves[name]) != config["epochs"]:
                raise ValueError(
                    f"the curve of {name} is not one value for each of {config['epochs']} epochs"
                )
            for value in curves[name]:
                if value is not None:
                    checkpoint.check_number(
                        value, f"a value of the curve of {name}", high=2**63, kind=(int, float)
                    )
    return contents


@contextmanager
def _refusals(path: Path, argument: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise InputError(argument, f"{path} cannot be read as a run's report: it lacks {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(argument, f"{path} cannot be read as a run's report: {error}") from None
