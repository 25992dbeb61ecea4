"""Progress on stderr: on a terminal a bar of tqdm, in a log a line where the bar would end, and one a minute before."""

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

_EVERY = 60  # seconds between two lines of a log


class Bar(Protocol):
    """What the loops use of tqdm."""

    def update(self, n: int = 1, /) -> bool | None:
        """Adds to what is done; true where it is time to show something."""

    def set_postfix(self, values: Mapping[str, str], /) -> None:
        """What is shown beside."""


class Silent(AbstractContextManager["Silent"]):
    """A bar that shows nothing."""

    def update(self, n: int = 1, /) -> bool | None:
        return None

    def set_postfix(self, values: Mapping[str, str], /) -> None:
        return None

    def __exit__(self, *raised: object) -> None:
        return None


class Log(Silent):
    """A bar of a log. It shows nothing without `set_postfix`, nor at its end after an exception."""

    def __init__(self, what: str, total: int | None, done: int, unit: str) -> None:
        self._head, self._total, self._done, self._unit = f"{what}: " if what else "", total, done, unit
        self._values: Mapping[str, str] = {}
        self._started = self._shown = time.monotonic()

    def update(self, n: int = 1, /) -> bool:
        self._done += n
        return self._is_due()

    def set_postfix(self, values: Mapping[str, str], /) -> None:
        self._values = values
        if self._is_due():
            self._show()

    def __exit__(self, *raised: object) -> None:
        if self._values and raised[0] is None:
            self._show()

    def _is_due(self) -> bool:
        return time.monotonic() >= self._shown + _EVERY

    def _show(self) -> None:
        self._shown = time.monotonic()
        of = "" if self._total is None else f" of {self._total:,}"
        shown = ", ".join(f"{name}={value}" for name, value in self._values.items())
        seconds = self._shown - self._started
        line = f"{self._head}{self._done:,}{of} {self._unit} in {seconds:.1f} s, {shown}"
        print(line, file=sys.stderr, flush=True)


def bar(
    shown: bool,
    what: str,
    *,
    unit: str,
    total: int | None = None,
    done: int = 0,
    leave: bool = True,
    delay: float = 0,
) -> AbstractContextManager[Bar]:
    """A `Bar` of `total` units, of which `done` are done before; shown: whether it shows anything. leave, delay: of
    tqdm. Without tqdm a terminal gets the lines of a log."""
    if not shown or sys.stderr is None:
        return Silent()
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return Log(what, total, done, unit)
        drawn: Any = tqdm(
            desc=what or None,
            total=total,
            initial=done,
            unit=f" {unit}",
            mininterval=0.5,
            leave=leave,
            delay=delay,
        )
        return drawn  # type: ignore[no-any-return]
    return Log(what, total, done, unit)
