"""Atomic writing of files."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    A reader, or a process that is killed at any moment, finds the old contents or the new ones, never a part of them.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)  # fails rather than follow a link, and takes the usual permissions
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Removes what `atomic_write` left in `directory` when its process was killed."""
    for file in directory.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
