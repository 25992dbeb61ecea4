"""The command line: `quantopt train | eval | pack | env`, also `python -m quantopt`.

Exit status: 0 done, 1 training failed (the loss became infinite), 2 a bad argument or input (named on stderr),
130 interrupted.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import quantopt
from quantopt.train import augment, data, environment, models, report
from quantopt.train.errors import InputError
from quantopt.train.loop import (
    CHECKPOINT,
    MODEL,
    REPORT,
    Config,
    Result,
    Trainer,
    TrainingError,
    default_batch_size,
    evaluate,
    read_checkpoint,
    resolve_device,
    tensor_bytes,
    train,
)
from quantopt.train.recipes import RECIPES

_BITS = ("1", "2", "3", "4", "ternary")
_DATA_HELP = (
    '"digits" (scikit-learn\'s, no download), or a directory or archive (.tar, .tar.gz, .tar.xz, .zip) with IDX '
    "(MNIST) files, CIFAR-10/100 pickles or binary batches, or images in train/CLASS/ and test/CLASS/; the format is "
    "recognised by content"
)


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a positive finite number, not {text}")
    return value


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `train` and the demo share."""
    parser.add_argument(
        "--data", default="digits", metavar="DATA", help=f"{_DATA_HELP} (default %(default)s)"
    )
    parser.add_argument(
        "--model", default="cnn", choices=tuple(models.MODELS), help="network (default %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=_whole(1), default=30, metavar="N", help="passes over the data (%(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=_whole(2),
        metavar="B",
        help="images per step (64 below 10,000 training images, else 128)",
    )
    parser.add_argument(
        "--seed", type=_whole(0), default=0, metavar="S", help="of all random numbers (%(default)s)"
    )
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto is the GPU if torch can use one",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantopt",
        description="Trains networks with quantised weights, packs them and runs them packed.",
    )
    parser.add_argument("--version", action="version", version=f"quantopt {quantopt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | eval | pack | env")

    command = commands.add_parser(
        "train",
        help="train a network",
        description="Trains a network and packs it. Writes report.json, checkpoint.pt (after every epoch), curves.png, "
        "weights.png and, except for sgd, model.safetensors (packed).",
    )
    add_common_arguments(command)
    command.add_argument(
        "--optimizer",
        default="askew",
        choices=tuple(RECIPES),
        help="how the quantised weights are trained; sgd is full precision (default %(default)s)",
    )
    command.add_argument(
        "--bits", default="1", choices=_BITS, help="per quantised weight (default %(default)s)"
    )
    command.add_argument(
        "--scale",
        default="tensor",
        choices=("none", "tensor", "channel"),
        help="levels in units of 1, or of the initial standard deviation of the tensor or of each output channel "
        "(default %(default)s)",
    )
    command.add_argument(
        "--lr", type=_positive, metavar="LR", help="learning rate of the quantised weights (recipe's)"
    )
    command.add_argument(
        "--augment",
        choices=("auto", *augment.MODES),
        default="auto",
        help="auto: crop, flip if in colour, none below 16x16",
    )
    command.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "reference", "cpu", "cuda", "triton"),
        help="of the optimizer's step (default %(default)s, the fastest that works)",
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        help="directory to write to; an earlier run in it is replaced (runs/OPTIMIZER)",
    )
    command.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its checkpoint"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "eval",
        help="run a packed network",
        description="Runs a packed network on the test images and prints its accuracy.",
    )
    command.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_FILE",
        help="a run's directory, or a packed .safetensors file",
    )
    command.add_argument(
        "--data", metavar="DATA", help=f"{_DATA_HELP} (default: what the run was trained on)"
    )
    command.add_argument(
        "--arch",
        choices=tuple(models.MODELS),
        help="the network in the file, needed where no report.json of a run lies beside it",
    )
    _add_device(command)
    command.set_defaults(run=_eval)

    command = commands.add_parser(
        "pack",
        help="pack a run's checkpoint",
        description="Packs the network in a checkpoint (of a finished or unfinished run) into a .safetensors file. The "
        "batch-norm statistics are re-estimated on the training images.",
    )
    command.add_argument(
        "--run",
        required=True,
        metavar="DIR_OR_FILE",
        dest="source",
        help="a run's directory or checkpoint.pt",
    )
    command.add_argument(
        "--out", metavar="FILE", help="file to write (model.safetensors beside the checkpoint)"
    )
    command.add_argument(
        "--data", metavar="DATA", help=f"{_DATA_HELP} (default: what the run was trained on)"
    )
    _add_device(command)
    command.set_defaults(run=_pack)

    command = commands.add_parser(
        "env",
        help="print versions, devices and backends",
        description="Prints versions, the instruction set, the CUDA build and device, and which backend each operation "
        "would use and why.",
    )
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_env)
    return parser


def check_out(out: Path) -> None:
    """Raises InputError unless files can be written in `out` or, where it does not exist, it can be made. Leaves
    nothing behind."""
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


def _train(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out or Path("runs") / arguments.optimizer)
    check_out(out)
    device = resolve_device(arguments.device)
    dataset = data.load(arguments.data, progress=not arguments.quiet)
    mode = augment.default_mode(*dataset.shape) if arguments.augment == "auto" else arguments.augment
    config = Config(
        data=arguments.data,
        model=arguments.model,
        optimizer=arguments.optimizer,
        bits=arguments.bits if arguments.bits == "ternary" else int(arguments.bits),
        scale=arguments.scale,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size or default_batch_size(len(dataset.train_labels)),
        lr=arguments.lr,
        seed=arguments.seed,
        device=device,
        augment=mode,
        backend=arguments.backend,
    )
    result = train(config, dataset, out=out, resume=arguments.resume, progress=not arguments.quiet)
    write_run(out, result)
    print(report.table({arguments.optimizer: result.report}))
    print(f"\nwritten: {out}/")
    return 0


def _read_report(path: Path) -> dict[str, Any]:
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
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("--model", f"{path} cannot be read as a run's report: {error}") from None


def _eval(arguments: argparse.Namespace) -> int:
    source = Path(arguments.model)
    file = source / MODEL if source.is_dir() else source
    described = file.parent / REPORT
    known = _read_report(described) if described.is_file() and arguments.arch is None else None
    if known is not None and known["optimizer"] == "sgd" and not file.exists():
        raise InputError(
            "--model", f"{source} is a run of sgd, in full precision: there is no packed network in it"
        )
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
    if known is not None and (shape, classes) != (known["images"], known["classes"]):
        raise InputError(
            "--data",
            f"{dataset.name} has images {shape} in {classes} classes; the network was trained on {known['images']} in "
            f"{known['classes']}",
        )
    packed = None
    reasons = []
    for candidate in [name] if name in models.MODELS else models.MODELS:
        try:
            network = models.build(candidate, shape, classes)
            packed = quantopt.load(file, network).to(device).eval()
            break
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            reasons.append(str(error))
    if packed is None:
        raise InputError("--model", f"{file} cannot be loaded as {name}: {reasons[0]}")
    images, labels = dataset.test_images.to(device), dataset.test_labels.to(device)
    started = time.perf_counter()
    accuracy = evaluate(packed, images, labels)
    seconds = time.perf_counter() - started
    print(
        f"accuracy {accuracy:.2f} % of {len(labels):,} test images, {len(labels) / seconds:,.0f} images/s, "
        f"{tensor_bytes(packed):,} bytes ({tensor_bytes(network):,} as float)"
    )
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    source = Path(arguments.source)
    checkpoint = source / CHECKPOINT if source.is_dir() else source
    out = Path(arguments.out or checkpoint.parent / MODEL)
    device = resolve_device(arguments.device)
    state = read_checkpoint(checkpoint, "--run")
    if out.is_dir():
        raise InputError("--out", f"{out} is a directory; give the name of a file")
    if not out.parent.is_dir():
        raise InputError("--out", f"the directory {out.parent} does not exist")
    check_out(out.parent)
    names = {field.name for field in dataclasses.fields(Config)}
    try:
        config = Config(**{name: value for name, value in state["config"].items() if name in names})
        config = dataclasses.replace(config, device=device, data=arguments.data or config.data)
        config.check()
    except (TypeError, ValueError) as error:
        raise InputError("--run", f"{checkpoint} has a configuration that cannot be used: {error}") from None
    if config.optimizer == "sgd":
        raise InputError("--run", f"{source} is a run of sgd, in full precision: there is nothing to pack")
    trainer = Trainer(config, data.load(config.data))
    trainer.load_weights(state, "--run")
    result = trainer.finish()
    packed = result.packed
    if packed is None:
        raise InputError("--run", f"{source} has no quantised weights")
    quantopt.save(packed, out)
    print(report.table({config.optimizer: result.report}))
    print(f"\nepoch {trainer.epoch} of {config.epochs}; written: {out}")
    return 0


def _env(arguments: argparse.Namespace) -> int:
    facts = environment.describe()
    print(json.dumps(facts, indent=1) if arguments.json else environment.text(facts))
    return 0


def guarded(program: str, run: Callable[[], int]) -> int:
    """Runs `run` and turns errors that are the user's to mend into a line on stderr and an exit status."""
    try:
        return run()
    except (InputError, TrainingError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"{program}: error: --batch-size: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; `--resume` continues a training run", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv[1:] if None); returns the exit status (argparse raises SystemExit 2)."""
    arguments = _parser().parse_args(argv)
    return guarded(f"quantopt {arguments.command}", lambda: int(arguments.run(arguments)))


if __name__ == "__main__":
    sys.exit(main())
