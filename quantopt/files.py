"""Atomic writing of files, and the checksum by which damage is seen."""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    A reader, or a process that is killed at any moment, finds the old contents or the new ones, never a part of them.
    A link to a file is replaced, and its target stays. Raises OSError, before it calls `write`, where `path` is a
    device, a pipe or a socket, or a link to one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # of a directory, the renaming says it
        raise OSError(errno.EINVAL, "it is not a regular file; give the name of one", str(path))
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


def checksum(*parts: str | bytes | Tensor) -> str:
    """SHA-256 of the parts in their order, in hexadecimal; a tensor counts with its dtype and shape.

    It shows damage. It does not show who wrote a file: whoever changes a file on purpose can write a new checksum."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            kind = f"{part.dtype} {list(part.shape)}"
            dense = part.detach().cpu().resolve_conj().resolve_neg().contiguous()
            data = memoryview(dense.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        else:
            kind = type(part).__name__
            data = memoryview(part.encode() if isinstance(part, str) else part)
        digest.update(f"{kind} {data.nbytes} ".encode())  # so that no two lists of parts are the same bytes
        digest.update(data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
