"""The files of a data source (a directory, an archive or one file) as a sequence of named byte streams.

Archives are read member by member as streams: nothing is ever extracted to disk, so the names and devices in a hostile
archive have no effect. What is decompressed is bounded (`MAX_MEMBER`). What is left out here is hidden folders and
files, special files, and links to a folder above them; a `LeftOut` counts them. In a directory links are followed.
"""

import bz2
import functools
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from quantopt.train.left_out import HIDDEN_FILE, HIDDEN_FOLDER, LOOP, SPECIAL, LeftOut

MAX_MEMBER = 1 << 30
"""Bytes that one member of a source may have after decompression."""

ARCHIVES = (
    ".zip",
    ".tar",
    ".tgz",
    ".tbz2",
    ".txz",
    ".tar.gz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
    ".7z",
    ".rar",
)
"""How the names of archives end."""

COMPRESSED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}
"""How compressed files begin, and how their names end."""

_PIECE = 1 << 16  # bytes read at once

_XZ_MEMORY = 1 << 30  # bytes; xz -9 needs 65 MiB

_HIDDEN = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_HIDDEN_FILES = ("Thumbs.db", "desktop.ini")


class DataError(ValueError):
    """A source cannot be used. The message names the member; `data.load` adds the source."""


class Member(NamedTuple):
    """A regular file of a source, with a stream of its contents, or a folder, with None. "/" separates the parts of the
    name, none of which is empty or "."."""

    name: str
    stream: IO[bytes] | None = None

    def read(self) -> bytes:
        """The contents. Raises DataError above `MAX_MEMBER`, and if they cannot be read."""
        contents = io.BytesIO()
        try:
            while self.stream is not None and (piece := self.stream.read(_PIECE)):
                contents.write(piece)
                if contents.tell() > MAX_MEMBER:
                    raise DataError(f"{self.name} is larger than {MAX_MEMBER >> 20} MiB")
        except DataError:
            raise
        except Exception as error:  # the standard library raises nearly anything on damaged files
            raise DataError(f"{self.name} cannot be read: {_reason(error)}") from None
        return contents.getvalue()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def decompressed(name: str, data: bytes) -> bytes:
    """`data`, or what it contains if it begins as a gzip, bzip2 or xz file: all its members, one after the other."""
    if not data.startswith(tuple(COMPRESSED)):
        return data
    return Member(name, _decompressed(io.BytesIO(data))).read()


def fingerprint(path: Path) -> str:
    """A line that changes when the source changes: its files, whatever links lead to them, and what is left out."""
    parts = [str(path.resolve())]

    def describe(name: str, file: Path) -> None:
        status = file.stat()
        # ctime cannot be set back: cp -p and touch keep the other time
        parts.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}")

    if path.is_dir():
        left_out = LeftOut()
        for name, file in _walk(path, left_out):
            parts.append(name) if file is None else describe(name, file)
        parts.append(str(left_out))
    else:
        describe(path.name, path)
    return "\n".join(parts)


def members(path: Path, left_out: LeftOut) -> Iterator[Member]:
    """The folders and regular files of a directory (sorted), of a .tar (plain, gz, bz2, xz) or .zip archive, or `path`
    itself. The kind is recognised by content. A stream is valid until the next member is asked for."""
    if path.is_dir():
        for name, full in _walk(path, left_out):
            if full is None:
                yield Member(name)
            else:
                with full.open("rb") as stream:
                    yield Member(name, stream)
        return
    with path.open("rb") as head:
        magic = head.read(4)
    if magic == b"PK\x03\x04":
        yield from _tidy(_zip_members(path), left_out)
    elif _is_tar(path):
        yield from _tidy(_tar_members(path), left_out)
    elif path.name.lower().endswith(ARCHIVES):
        raise DataError("is not a tar or zip archive, or is damaged")
    else:
        with path.open("rb") as stream:
            yield Member(path.name, stream)


# ------------------------------------------------------------------------------------------------ directories


def _is_hidden(part: str) -> bool:
    return part in _HIDDEN or (part.startswith(".") and part != "..")


def _is_hidden_file(part: str) -> bool:
    return _is_hidden(part) or part in _HIDDEN_FILES


def _walk(root: Path, left_out: LeftOut) -> Iterator[tuple[str, Path | None]]:
    """(name, path) of each file and (name, None) of each folder below `root`, through links too."""

    def identity(folder: Path) -> tuple[int, int]:
        status = folder.stat()
        return status.st_dev, status.st_ino

    pending: list[tuple[Path, str, tuple[tuple[int, int], ...]]] = [(root, "", (identity(root),))]
    while pending:
        folder, prefix, above = pending.pop()
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        below = []
        for entry in entries:
            name, full = prefix + entry.name, Path(entry.path)
            if entry.is_dir():
                if _is_hidden(entry.name):
                    left_out.add(HIDDEN_FOLDER, name)
                elif (here := identity(full)) in above:
                    left_out.add(LOOP, name)
                else:
                    below.append((full, f"{name}/", (*above, here)))
                    yield name, None
            elif _is_hidden_file(entry.name):
                left_out.add(HIDDEN_FILE, name)
            elif entry.is_file():
                yield name, full
            elif entry.is_symlink() and not full.exists():
                raise DataError(f"{name} is a link to {os.readlink(full)}, which does not exist")
            else:
                left_out.add(SPECIAL, name)
        pending.extend(reversed(below))


# ------------------------------------------------------------------------------------------------ archives


class _Entry(NamedTuple):
    """A member of an archive: `kind` is "file", "folder", "link" or "special"."""

    name: str
    kind: str
    stream: IO[bytes] | None = None


def _tidy(entries: Iterator[_Entry], left_out: LeftOut) -> Iterator[Member]:
    """The members of an archive without what is hidden. Raises DataError for what the archive cannot be read with."""
    files: set[str] = set()
    hidden: set[str] = set()
    while True:
        try:
            entry = next(entries, None)
        except DataError:
            raise
        except Exception as error:  # tarfile and zipfile raise nearly anything on damaged archives
            raise DataError(f"cannot be read: {_reason(error)}") from None
        if entry is None:
            return
        parts = [part for part in entry.name.split("/") if part not in ("", ".")]
        if not parts:
            continue
        name = "/".join(parts)
        folders = parts if entry.kind == "folder" else parts[:-1]
        if any(_is_hidden(part) for part in folders):
            length = next(i for i, part in enumerate(folders, 1) if _is_hidden(part))
            folder = "/".join(parts[:length])
            if folder not in hidden:
                hidden.add(folder)
                left_out.add(HIDDEN_FOLDER, folder)
        elif entry.kind == "folder":
            yield Member(name)
        elif _is_hidden_file(parts[-1]):
            left_out.add(HIDDEN_FILE, name)
        elif entry.kind == "special":
            left_out.add(SPECIAL, name)
        elif entry.kind == "link":
            raise DataError(
                f"{name} is a link, and links in an archive are not followed: make it with "
                "tar --dereference --hard-dereference, or zip without --symlinks"
            )
        elif name in files:
            raise DataError(f"{name} is in the archive twice")
        else:
            files.add(name)
            yield Member(name, entry.stream)


def _zip_members(path: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        with path.open("rb") as file:
            file.seek(-22 - len(archive.comment), os.SEEK_END)
            ends = file.read(4) == b"PK\x05\x06"
        if not ends or min((info.header_offset for info in infos), default=0) != 0:
            raise DataError("has data before or after the archive")
        for info in infos:
            if info.is_dir():
                yield _Entry(info.filename, "folder")
            elif stat.S_ISLNK(info.external_attr >> 16):
                yield _Entry(info.filename, "link")
            elif info.flag_bits & 1:
                raise DataError(f"{info.filename} is encrypted")
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # 50 bytes of bzip2 become 46 million, all of which zipfile holds in memory
                raise DataError(
                    f"{info.filename} is compressed by another method than deflate: make the zip anew"
                )
            else:
                try:
                    stream = archive.open(info)
                except Exception as error:
                    raise DataError(f"{info.filename} cannot be read: {_reason(error)}") from None
                with stream:
                    yield _Entry(info.filename, "file", stream)


class _Concatenated(io.RawIOBase):
    """The contents of all streams of a bzip2 or xz file.

    The classes of the standard library take a damaged second stream for garbage, and leave it out in silence. Little is
    read at once, because what follows a stream is copied for each.
    """

    def __init__(self, file: IO[bytes], make: Callable[[], Any]) -> None:
        self._file = file
        self._make = make
        self._decompressor = make()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while True:
            data = b""
            if self._decompressor.eof:
                data = self._decompressor.unused_data.lstrip(b"\0")
                while not data:
                    piece = self._file.read(io.DEFAULT_BUFFER_SIZE)
                    if not piece:
                        return 0
                    data = piece.lstrip(b"\0")  # padding
                self._decompressor = self._make()
            elif self._decompressor.needs_input:
                data = self._file.read(io.DEFAULT_BUFFER_SIZE)
                if not data:
                    raise EOFError("it is truncated")
            contents = self._decompressor.decompress(data, len(target))
            if contents:
                target[: len(contents)] = contents
                return len(contents)


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    """A stream of the contents of `file`, which is compressed or not."""
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if magic.startswith(b"BZh"):
        return io.BufferedReader(_Concatenated(file, bz2.BZ2Decompressor))
    if magic == b"\xfd7zXZ\x00":
        make = functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        return io.BufferedReader(_Concatenated(file, make))
    return file


def _is_tar(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            header = _decompressed(file).read(tarfile.BLOCKSIZE)
        tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except OSError as error:
        if error.errno is not None:  # of the system; gzip and bzip2 raise those without a number
            raise
        return False
    except Exception:
        return False
    return True


class _Header(tarfile.TarInfo):
    """A header; what tarfile takes for the end of an archive, but is not, is an error."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is damaged or missing: {_reason(error)}") from None


def _tar_members(path: Path) -> Iterator[_Entry]:
    # "r|": strictly forward, so that a compressed archive is decompressed once.
    with (
        path.open("rb") as file,
        _decompressed(file) as stream,
        tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20, tarinfo=_Header) as archive,
    ):
        for info in archive:
            if info.isdir():
                yield _Entry(info.name, "folder")
            elif info.issym() or info.islnk():
                yield _Entry(info.name, "link")
            elif not info.isreg():
                yield _Entry(info.name, "special")
            elif info.issparse():
                raise DataError(f"{info.name} is a sparse file: make the archive without --sparse")
            else:
                yield _Entry(info.name, "file", archive.extractfile(info))
        rest = cast(Any, archive.fileobj)
        read = 0
        while piece := rest.read(1 << 20):
            read += len(piece)
            if piece.strip(b"\0") or read > MAX_MEMBER:
                raise DataError("has data after the archive: two archives, one after the other?")
