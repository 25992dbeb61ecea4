"""The command line: `quantopt train | sweep | eval | pack | env`, also `python -m quantopt`.

Exit status: 0 done, 1 training failed (the loss became infinite), 2 a bad argument or input (named on stderr),
3 the time given was over (the same command continues), 130 interrupted.
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
from quantopt.nn.luq import SAWB_BITS
from quantopt.train import augment, data, environment, models, recipes, report, sweep
from quantopt.train.errors import InputError
from quantopt.train.loop import (
    CHECKPOINT,
    MODEL,
    OUT_OF_TIME,
    PRECISIONS,
    REPORT,
    Config,
    OutOfTime,
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
    """The options that `train`, `sweep` and the demo share."""
    parser.add_argument(
        "--data", default="digits", metavar="DATA", help=f"{_DATA_HELP} (default %(default)s)"
    )
    parser.add_argument(
        "--model", choices=tuple(models.MODELS), help=f"network (recipe's; else {Config.model})"
    )
    parser.add_argument(
        "--epochs", type=_whole(1), metavar="N", help=f"passes over the data (recipe's; else {Config.epochs})"
    )
    parser.add_argument(
        "--batch-size",
        type=_whole(2),
        metavar="B",
        help="images per step (recipe's; else 64 below 10,000 training images, else 128)",
    )
    parser.add_argument(
        "--limit",
        type=_whole(2),
        metavar="N",
        help="train on N images, as many of each class (all); the test images stay",
    )
    parser.add_argument(
        "--validation",
        type=_whole(2),
        metavar="N",
        help="measure on N training images, held out, in place of the test images: for choosing hyper-parameters",
    )
    _add_device(parser)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """--seed."""
    parser.add_argument(
        "--seed", type=_whole(0), default=0, metavar="S", help="of all random numbers (%(default)s)"
    )


def _add_minutes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=_positive,
        metavar="M",
        help="stop at a checkpoint, with status 3, where the next epoch would end later",
    )


_SPEED = {
    "channels_last": "images and weights in channels-last memory",
    "compile": "torch.compile of the network in training",
    "cuda_graph": "capture the training iteration and replay it; the optimizer's step is then not timed",
}


def _add_speed(parser: argparse.ArgumentParser) -> None:
    for name, meaning in _SPEED.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(
            option, action=argparse.BooleanOptionalAction, help=f"{meaning} (recipe's; else not)"
        )


def _add_quantised(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument(
        "--activations",
        type=int,
        choices=(0, SAWB_BITS),
        help=f"bits of the inputs of quantised layers, 0 is float ({source}0)",
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        metavar="LAYER",
        help='layers in full precision: "first", "last", name patterns; "none" quantises all '
        f"({source}first last)",
    )


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
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="train | sweep | eval | pack | env"
    )

    command = commands.add_parser(
        "train",
        help="train a network",
        description="Trains a network and packs it. Writes report.json, checkpoint.pt (after every epoch), curves.png, "
        "weights.png and, except for sgd, model.safetensors (packed).",
    )
    add_common_arguments(command)
    add_seed(command)
    command.add_argument(
        "--recipe",
        metavar="NAME_OR_FILE",
        help="a recipe of the package, e.g. resnet18-askew-1bit, or a TOML file; options given beside it override it",
    )
    command.add_argument(
        "--optimizer",
        choices=tuple(recipes.OPTIMIZERS),
        help="how the quantised weights are trained, in place of a recipe; sgd is full precision (askew)",
    )
    command.add_argument("--bits", choices=_BITS, help="per quantised weight (recipe's; else 1)")
    _add_quantised(command, "recipe's; else ")
    command.add_argument(
        "--scale",
        choices=("none", "tensor", "channel"),
        help="levels in units of 1, or of the initial standard deviation of the tensor or of each output channel "
        "(recipe's; else tensor)",
    )
    command.add_argument(
        "--lr", type=_positive, metavar="LR", help="learning rate of the quantised weights (recipe's)"
    )
    command.add_argument(
        "--augment",
        choices=("auto", *augment.MODES),
        help="auto: crop, flip if in colour, none below 16x16 (recipe's; else auto)",
    )
    command.add_argument(
        "--init",
        metavar="RUN",
        help="start from the weights of this run of the same network, or of its checkpoint.pt",
    )
    command.add_argument(
        "--precision", choices=PRECISIONS, help="bfloat16 trains under autocast (recipe's; else float32)"
    )
    command.add_argument(
        "--test-every",
        type=_whole(0),
        metavar="N",
        help="test accuracy for the curves after every N epochs, 0 for none (recipe's; else 1)",
    )
    _add_speed(command)
    command.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "reference", "cpu", "cuda", "triton"),
        help="of the optimizer's step (default %(default)s, the fastest that works)",
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        help="directory to write to; an earlier run in it is replaced (runs/RECIPE or runs/OPTIMIZER)",
    )
    command.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its checkpoint"
    )
    _add_minutes(command)
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "sweep",
        help="train recipes with several seeds",
        description="Trains each recipe with each seed in OUT/RECIPE-SEED, and writes accuracy.json (mean and standard "
        "deviation over the seeds) and curves.png of the finished recipes. The same command continues what was cut.",
    )
    command.add_argument("recipes", nargs="+", metavar="RECIPE", help="names, or TOML files")
    add_common_arguments(command)
    command.add_argument("--seeds", type=_whole(1), default=3, metavar="N", help="seeds 0..N-1 (%(default)s)")
    command.add_argument(
        "--jobs", type=_whole(1), default=1, metavar="N", help="runs at a time (%(default)s)"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="directory to write to")
    _add_speed(command)
    _add_minutes(command)
    command.set_defaults(run=_sweep)

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
    _add_quantised(command, "the report's; else ")
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


# Options of `train` that a recipe may hold, by the names of Config.
_OVERRIDES = (
    *(
        "optimizer",
        "model",
        "epochs",
        "batch_size",
        "augment",
        "precision",
        "channels_last",
        "compile",
        "cuda_graph",
    ),
    "test_every",
    *("bits", "scale", "skip", "activations", "lr"),
)


def _skipped(patterns: list[str]) -> list[str]:
    return [] if patterns == ["none"] else patterns


def _config(
    arguments: argparse.Namespace, settings: dict[str, Any], device: str, dataset: data.Dataset
) -> Config:
    """The recipe's settings, overridden by the options given, on the defaults."""
    given = {key: getattr(arguments, key) for key in _OVERRIDES if getattr(arguments, key) is not None}
    if given.get("bits", "ternary") != "ternary":
        given["bits"] = int(given["bits"])
    if "skip" in given:
        given["skip"] = _skipped(given["skip"])
    settings = {**settings, **given}
    if settings.get("augment", "auto") == "auto":
        settings["augment"] = augment.default_mode(*dataset.shape)
    settings.setdefault("batch_size", default_batch_size(len(dataset.train_labels), arguments.limit))
    fixed = {"data": arguments.data, "seed": arguments.seed, "device": device, "backend": arguments.backend}
    parts = {"limit": arguments.limit, "validation": arguments.validation}
    return Config(**settings, **fixed, **parts, init=arguments.init)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.recipe is not None and arguments.optimizer is not None:
        raise InputError("--optimizer", "is part of the recipe: give --recipe or --optimizer")
    settings = recipes.load(arguments.recipe or arguments.optimizer or Config.optimizer)
    out = Path(arguments.out or Path("runs") / Path(arguments.recipe or settings["optimizer"]).stem)
    check_out(out)
    device = resolve_device(arguments.device)
    dataset = data.load(arguments.data, progress=not arguments.quiet)
    config = _config(arguments, settings, device, dataset)
    result = train(
        config,
        dataset,
        out=out,
        resume=arguments.resume,
        progress=not arguments.quiet,
        minutes=arguments.minutes,
    )
    write_run(out, result)
    print(report.table({config.optimizer: result.report}))
    speed, share = result.report["images_per_second"], result.report["optimizer_share"]
    step = "" if share is None else f"; optimizer step: {100 * share:.1f} % of the time"
    print(f"\ntraining: {speed:,.0f} images/s{step}; written: {out}/")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    check_out(Path(arguments.out))
    passed_on = ["--data", arguments.data]
    for option in ("model", "epochs", "batch_size", "limit", "validation"):
        if (value := getattr(arguments, option)) is not None:
            passed_on += [f"--{option.replace('_', '-')}", str(value)]
    for option in _SPEED:
        if (value := getattr(arguments, option)) is not None:
            passed_on.append(f"--{'' if value else 'no-'}{option.replace('_', '-')}")
    return sweep.run(arguments, resolve_device(arguments.device), passed_on)


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
            "activations": int(config["activations"]),
            "skip": [str(pattern) for pattern in config["skip"]],
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("--model", f"{path} cannot be read as a run's report: {error}") from None


def _why_unpacked(optimizer: str) -> str:
    if optimizer == "luq":
        return (
            "it is a run of luq, whose weights lie on the grid -8..7, which is not symmetric as that of packed layers "
            "is; --optimizer askew --bits 4 --activations 4 trains a network of 4-bit weights and activations to pack"
        )
    return "it is a run of sgd, in full precision"


def _eval(arguments: argparse.Namespace) -> int:
    source = Path(arguments.model)
    file = source / MODEL if source.is_dir() else source
    described = file.parent / REPORT
    known = _read_report(described) if described.is_file() and arguments.arch is None else None
    if known is not None and known["optimizer"] in recipes.FLOAT and not file.exists():
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
    if known is not None and (shape, classes) != (known["images"], known["classes"]):
        raise InputError(
            "--data",
            f"{dataset.name} has images {shape} in {classes} classes; the network was trained on {known['images']} in "
            f"{known['classes']}",
        )
    activations, skip = arguments.activations, arguments.skip
    if activations is None:
        activations = 0 if known is None else known["activations"]
    skip = _skipped(skip) if skip is not None else ["first", "last"] if known is None else known["skip"]
    packed = None
    reasons = []
    for candidate in [name] if name in models.MODELS else models.MODELS:
        try:
            network = models.build(candidate, shape, classes)
            if activations:
                quantopt.nn.quantize_activations(network, skip=skip)
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
    if config.optimizer in recipes.FLOAT:
        raise InputError("--run", f"{source} cannot be packed: {_why_unpacked(config.optimizer)}")
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
    except OutOfTime as stop:
        print(f"{program}: {stop}; `--resume` continues", file=sys.stderr)
        return OUT_OF_TIME
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
