"""Why a run stops, and how it says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from quantopt import extras

_MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}  # by the names of their distributions


class InputError(ValueError):
    """A value that the user gave cannot be used; the command line prints it and exits with status 2.

    `argument` is the option it came from, e.g. "--data"; `str(error)` is "--data: ...".
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument = argument


class TrainingError(RuntimeError):
    """The loss is not finite: training failed, although every argument is valid."""


class OutOfTime(Exception):
    """The time given is over; the checkpoint holds everything."""


def require(argument: str, *libraries: str) -> None:
    """Raises InputError, which names `argument`, those of the optional `libraries` that cannot be imported, and their
    extras."""
    absent = {}
    for library in libraries:
        try:
            import_module(_MODULES.get(library, library))
        except ImportError as error:
            absent[library] = error
    if absent:
        raise InputError(argument, extras.missing(*absent, why=next(iter(absent.values()))))


OUT_OF_TIME = 3
"""Exit status of a run or a sweep that stopped because its time was over; the same command continues it."""


def shown(value: Any) -> str:
    """A value from a file, in a message: on one line, short, whatever it is."""
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, list | tuple) and len(value) <= 8 and not any(map(_nests, value)):
        return f"[{', '.join(map(shown, value))}]"
    return f"a {type(value).__name__}"


def _nests(value: Any) -> bool:
    return isinstance(value, list | tuple)


@contextmanager
def writing(path: Path, argument: str = "--out") -> Iterator[None]:
    """Around the writing of a file: an OSError (a full disk, a directory that is gone) becomes an InputError that names
    the file. What was written before stays."""
    try:
        yield
    except OSError as error:
        raise InputError(argument, f"{path} cannot be written: {error.strerror or error}") from None
