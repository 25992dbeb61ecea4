"""Which of a Triton kernel's blocks is the fastest on a device: measured when asked for, kept on disk.

One JSON file per device name, in QUANTOPT_CACHE_DIR, else $XDG_CACHE_HOME/quantopt, else ~/.cache/quantopt. A file
that cannot be read counts as empty, a choice that is not among today's as none: both cost time alone.
"""

import contextlib
import functools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

Choices = dict[str, list[int]]


def path_for(device: str) -> Path:
    """The file of a device, by its name."""
    folder = os.environ.get("QUANTOPT_CACHE_DIR")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "quantopt")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(folder).expanduser() / f"triton-{slug}.json"


@functools.cache
def _read(path: Path) -> Choices:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        key: value
        for key, value in content.items()
        if isinstance(value, list) and all(type(number) is int for number in value)
    }


def load(device: str, key: str) -> list[int] | None:
    """The choice of this key; the file is read once per process, and again after :func:`store`."""
    return _read(path_for(device)).get(key)


def store(device: str, key: str, choice: Sequence[int]) -> None:
    """Adds a choice to what the file holds now, and puts a whole file in its place: a reader never sees a part of one.

    Of two processes that store at once, one may lose its choice. Where nothing can be written, the choice serves this
    process.
    """
    path = path_for(device)
    known = _read(path)
    _read.cache_clear()
    choices = {**known, **_read(path), key: list(choice)}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(choices, file, indent=1, sort_keys=True)
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
    _read(path).update(choices)
