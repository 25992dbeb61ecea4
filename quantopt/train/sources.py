"""The files of a data source (a directory, an archive or one file) as a sequence of named byte streams.

Archives are read member by member as streams: nothing is ever extracted to disk, so the names, links and
devices in a hostile archive have no effect. What is decompressed is bounded (`MAX_MEMBER`).
"""

import bz2
import gzip
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from quantopt.train.errors import InputError

MAX_MEMBER = 1 << 30
"""Bytes that one member of a source may have after decompression."""

READ_ERRORS = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)
"""What the standard library raises on damaged archives and compressed files."""


class Member(NamedTuple):
    """A regular file of a source: its name with "/" between the parts, and a stream positioned at its start."""

    name: str
    stream: IO[bytes]

    def read(self, argument: str = "--data") -> bytes:
        """The bytes from the current position to the end. Raises InputError above `MAX_MEMBER`."""
        data = self.stream.read(MAX_MEMBER + 1)
        if len(data) > MAX_MEMBER:
            raise InputError(argument, f"{self.name} is larger than {MAX_MEMBER >> 20} MiB")
        return data


def gunzip(name: str, data: bytes, argument: str = "--data") -> bytes:
    """The contents of a gzip file held in memory, at most `MAX_MEMBER` bytes of it."""
    decompressor = zlib.decompressobj(wbits=31)
    contents = decompressor.decompress(data, MAX_MEMBER + 1)
    if len(contents) > MAX_MEMBER:
        raise InputError(argument, f"{name} is larger than {MAX_MEMBER >> 20} MiB when decompressed")
    if not decompressor.eof:
        raise InputError(argument, f"{name} is truncated")
    return contents


def fingerprint(path: Path) -> str:
    """A line that changes when the source changes: names, sizes and modification times of its files."""
    files = list(_walk(path)) if path.is_dir() else [path]
    parts = []
    for file in files:
        status = file.stat()
        parts.append(f"{file}\0{status.st_size}\0{status.st_mtime_ns}")
    return "\n".join([str(path.resolve()), *parts])


def members(path: Path) -> Iterator[Member]:
    """Every regular file of a directory (sorted), of a .tar (plain, gz, bz2, xz) or .zip archive, or `path` itself.

    The kind is recognised by content. A stream is valid until the next member is asked for.
    """
    if path.is_dir():
        for file in _walk(path):
            with file.open("rb") as stream:
                yield Member(file.relative_to(path).as_posix(), stream)
        return
    with path.open("rb") as head:
        magic = head.read(4)
    if magic == b"PK\x03\x04":
        yield from _zip_members(path)
    elif _is_tar(path):
        yield from _tar_members(path)
    else:
        with path.open("rb") as stream:
            yield Member(path.name, stream)


def _walk(path: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        for file in sorted(files):
            full = Path(folder, file)
            if full.is_file():
                yield full


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise InputError("--data", f"{info.filename} in {path} is encrypted")
            with archive.open(info) as stream:
                yield Member(info.filename, stream)


def _decompressed(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:2] == b"\x1f\x8b":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if magic[:3] == b"BZh":
        return bz2.open(path, "rb")
    if magic == b"\xfd7zXZ\x00":
        return lzma.open(path, "rb")
    return path.open("rb")


def _is_tar(path: Path) -> bool:
    try:
        with _decompressed(path) as stream:
            header = stream.read(tarfile.BLOCKSIZE)
        tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except (tarfile.HeaderError, *READ_ERRORS):
        return False
    return True


def _tar_members(path: Path) -> Iterator[Member]:
    # "r|": strictly forward, so that a compressed archive is decompressed once.
    with _decompressed(path) as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as archive:
        for info in archive:
            if not info.isreg() or info.issparse():
                continue
            file = archive.extractfile(info)
            if file is not None:
                yield Member(info.name, file)
