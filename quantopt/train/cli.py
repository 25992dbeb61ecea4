"""The command line: `quantopt train | sweep | lm | sample | eval | pack | report | env`, also `python -m quantopt`, and
`torchrun -m quantopt train`.

Exit status: 0 done, 1 training failed (the loss became infinite), 2 a bad argument or input (named on stderr),
3 the time given was over (the same command continues), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import quantopt
from quantopt.train import commands, models, ranks
from quantopt.train.arguments import add_from_report, add_option, add_options, nonempty
from quantopt.train.config import OPTIONS, Option
from quantopt.train.errors import OUT_OF_TIME, InputError, OutOfTime, TrainingError
from quantopt.train.lm import commands as language_models
from quantopt.train.lm import config as lm

# Options that are not settings of a run.
_MINUTES = Option(
    "stop at a checkpoint, with status 3, where the next epoch would end later",
    name="minutes",
    types=(float,),
    positive=True,
    metavar="M",
)
_SEEDS = Option(
    "seeds 0..N-1", name="seeds", types=(int,), least=1, metavar="N", default=3, otherwise="%(default)s"
)
_JOBS = Option(
    "runs at a time", name="jobs", types=(int,), least=1, metavar="N", default=1, otherwise="%(default)s"
)
_LENGTH = Option(
    "bytes to write", name="length", types=(int,), least=1, metavar="N", default=400, otherwise="%(default)s"
)
_TEMPERATURE = Option(
    "of the softmax that bytes are drawn from, 0 for the most likely byte",
    name="temperature",
    types=(float,),
    most=float("inf"),
    metavar="T",
    default=0.8,
    otherwise="%(default)s",
)
_DATA_OF_RUN = replace(OPTIONS["data"], default=None, otherwise="default: what the run was trained on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantopt",
        description="Trains networks with quantised weights, packs them and runs them packed.",
    )
    parser.add_argument("--version", action="version", version=f"quantopt {quantopt.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="train | sweep | lm | sample | eval | pack | report | env"
    )

    command = subparsers.add_parser(
        "train",
        help="train a network",
        description="Trains a network and packs it. Writes report.json, metrics.csv, checkpoint.pt (after every "
        "epoch), curves.png, weights.png and, except for sgd, model.safetensors (packed).",
    )
    command.add_argument(
        "--recipe",
        type=nonempty,
        metavar="NAME_OR_FILE",
        help="a recipe of the package, e.g. resnet18-askew-1bit, or a TOML file; options given beside it override it",
    )
    add_options(command, "train")
    command.add_argument(
        "--out",
        type=nonempty,
        metavar="DIR",
        help="directory to write to; an earlier run in it is replaced when the first epoch is done (runs/RECIPE or "
        "runs/OPTIMIZER)",
    )
    command.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its checkpoint"
    )
    add_option(command, _MINUTES)
    _add_tensorboard(command)
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    command.add_argument("--until-stdin-ends", action="store_true", help=argparse.SUPPRESS)  # of a sweep
    command.set_defaults(run=commands.train)

    command = subparsers.add_parser(
        "sweep",
        help="train recipes with several seeds",
        description="Trains each recipe with each seed in OUT/RECIPE-SEED, and writes accuracy.json (mean and standard "
        "deviation over the seeds) and curves.png of the finished recipes. The same command continues what was cut.",
    )
    command.add_argument("recipes", type=nonempty, nargs="+", metavar="RECIPE", help="names, or TOML files")
    add_options(command, "sweep")
    add_option(command, _SEEDS)
    add_option(command, _JOBS)
    command.add_argument("--out", type=nonempty, required=True, metavar="DIR", help="directory to write to")
    add_option(command, _MINUTES)
    command.set_defaults(run=commands.sweep)

    command = subparsers.add_parser(
        "lm",
        help="train a language model on a text file",
        description="Trains a small language model on the bytes of a text file, its linear layers with quantised "
        "weights, and packs it. Writes report.json, metrics.csv, checkpoint.pt, curves.png, weights.png and, except in "
        "full precision, model.safetensors (packed). Needs the transformers library.",
    )
    command.add_argument(
        "--recipe",
        type=nonempty,
        metavar="NAME_OR_FILE",
        default=lm.DEFAULT_RECIPE,
        help=f"one of {', '.join(lm.names())}, or a TOML file; options given beside it override it (%(default)s)",
    )
    add_options(command, "lm", lm.OPTIONS)
    command.add_argument(
        "--export",
        choices=("hf", "gguf"),
        action="append",
        default=[],
        help="write the packed network for another program too: OUT/hf for from_pretrained of the transformers "
        "library, OUT/model.gguf for llama.cpp (scales are rounded to fp16); may be given twice",
    )
    command.add_argument("--out", type=nonempty, metavar="DIR", help="directory to write to (runs/lm-RECIPE)")
    command.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its checkpoint"
    )
    add_option(command, _MINUTES)
    _add_tensorboard(command)
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=language_models.train)

    command = subparsers.add_parser(
        "sample",
        help="let a language model write",
        description="Writes on from a prompt with the packed network of a run of quantopt lm, keys and values cached.",
    )
    command.add_argument("--model", type=nonempty, required=True, metavar="DIR", help="directory of the run")
    command.add_argument(
        "--prompt", type=nonempty, default="\n", metavar="TEXT", help="what it goes on from (a line end)"
    )
    for row in (_LENGTH, _TEMPERATURE, OPTIONS["seed"], OPTIONS["device"]):
        add_option(command, row)
    command.set_defaults(run=language_models.sample)

    command = subparsers.add_parser(
        "eval",
        help="run a packed network",
        description="Runs a packed network on the test images and prints its accuracy, or the validation loss of a "
        "language model.",
    )
    command.add_argument(
        "--model",
        type=nonempty,
        required=True,
        metavar="DIR_OR_FILE",
        help="a run's directory, or a packed .safetensors file",
    )
    add_option(command, _DATA_OF_RUN)
    command.add_argument(
        "--arch",
        choices=tuple(models.MODELS),
        help="the network in the file, needed where no report.json of a run lies beside it",
    )
    add_from_report(command, "activations")
    add_from_report(command, "skip")
    add_option(command, OPTIONS["device"])
    command.set_defaults(run=commands.evaluate)

    command = subparsers.add_parser(
        "pack",
        help="pack a run's checkpoint",
        description="Packs the network in a checkpoint (of a finished or unfinished run) into a .safetensors file. The "
        "batch-norm statistics are re-estimated on the training images.",
    )
    command.add_argument(
        "--run",
        type=nonempty,
        required=True,
        metavar="DIR_OR_FILE",
        dest="source",
        help="a run's directory or checkpoint.pt",
    )
    command.add_argument(
        "--out", type=nonempty, metavar="FILE", help="file to write (model.safetensors beside the checkpoint)"
    )
    add_option(command, _DATA_OF_RUN)
    add_option(command, OPTIONS["device"])
    command.set_defaults(run=commands.pack)

    command = subparsers.add_parser(
        "report",
        help="write a page of HTML about runs",
        description="Writes what runs of quantopt train, quantopt lm and quantopt sweep measured as one page of HTML, "
        "which opens offline: curves, histograms of the weights over the training, a table of layers, size and speed.",
    )
    command.add_argument(
        "directories",
        type=nonempty,
        nargs="+",
        metavar="DIR",
        help="a run's directory, or one of several runs, such as a sweep's",
    )
    command.add_argument(
        "--out",
        type=nonempty,
        metavar="FILE",
        help="file to write (DIR/report.html; of several directories report.html in the working directory)",
    )
    command.set_defaults(run=commands.page)

    command = subparsers.add_parser(
        "env",
        help="say what is fast here and what is not",
        description="Prints, for optimizer steps and packed products, what runs them here and whether that is fast, "
        "else why not and what to do; how the extension was built; and which extras are installed.",
    )
    command.add_argument("--all", action="store_true", help="all versions, and the reason for each backend")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=commands.env)
    return parser


def _add_tensorboard(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tensorboard",
        type=nonempty,
        metavar="DIR",
        help="write the curves and the histograms of the weights there too, as event files of TensorBoard, one run "
        "to a directory",
    )


def guarded(program: str, run: Callable[[], int]) -> int:
    """The exit status of `run()`; errors that the user can correct become a line on stderr and a status."""
    try:
        status = run()
        print(end="", flush=True)  # a full disk is noticed here, not at the interpreter's end
        return status
    except ranks.Left as left:
        return left.status
    except OutOfTime as stop:
        print(f"{program}: {stop}; `--resume` continues", file=sys.stderr)
        return OUT_OF_TIME
    except (InputError, TrainingError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        _drop_output()
        return 2
    except torch.OutOfMemoryError as error:
        print(f"{program}: error: --batch-size: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with ranks.quiet():
            print(f"{program}: interrupted; `--resume` continues a training run", file=sys.stderr)
        return 130


def _drop_output() -> None:
    """Where standard output cannot be written, drops what is left of it: the interpreter would try again at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv[1:] if None); returns the exit status (argparse raises SystemExit 2)."""
    with ranks.quiet():  # what all ranks say of the arguments
        arguments = _parser().parse_args(argv)
    return guarded(f"quantopt {arguments.command}", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if ranks.launched() and arguments.command != "train":
        if ranks.rank():
            raise ranks.Left(2)
        raise InputError(
            "torchrun", f"is for `quantopt train`; start `quantopt {arguments.command}` without it"
        )
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
