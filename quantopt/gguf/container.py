"""The container: metadata and tensors of a GGUF file, read with every size checked first, and written.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Not read by
gguf.GGUFReader: it believes the lengths that a file states, and a wrong length of an array keeps it in a loop.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
)

from quantopt.files import atomic_write

_VERSIONS = (2, GGUF_VERSION)
_MAX_DIMS = 4  # GGML_MAX_DIMS
_ALIGNMENT_KEY = "general.alignment"
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}

Bytes = npt.NDArray[np.uint8]


class GGUFFileError(ValueError):
    """A GGUF file that is damaged, or holds what quantopt does not read."""


class Field(NamedTuple):
    """A value of the metadata, with its type: what a file says and what it is written as."""

    kind: GGUFValueType
    value: Any  # int, float, bool, str, or a list of one of them
    items: GGUFValueType | None = None  # of an array


class Stored(NamedTuple):
    """A tensor of a file: ``shape`` as in PyTorch, its last dimension contiguous; ``offset`` from the file's start."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, which is the last dimension."""
        return row_bytes(self.kind, self.shape[-1])

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return prod(self.shape[:-1]) * self.row_bytes


class Written(NamedTuple):
    """A tensor to be written: uint8 [..., bytes of a row] of ``kind``."""

    kind: GGMLQuantizationType
    data: Bytes


def row_bytes(kind: GGMLQuantizationType, length: int) -> int:
    """Bytes of a row of ``length`` weights, which is a multiple of the block."""
    weights, size = GGML_QUANT_SIZES[kind]
    return int(length // weights * size)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


class File:
    """A GGUF file: its metadata and the list of its tensors; the tensors are read when asked for.

    Attributes:
        path: of the file.
        metadata: {key: :class:`Field`}.
        tensors: {name: :class:`Stored`}.

    Raises :class:`GGUFFileError` (a ValueError) naming the file and what is wrong with it: every length, type and
    offset is checked against the size of the file before anything of that size is read. OSError if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Field] = {}
        self.tensors: dict[str, Stored] = {}
        with open(self.path, "rb") as file:
            _Header(self, file).read()

    def fail(self, what: str) -> NoReturn:
        """Raises GGUFFileError with the name of the file."""
        raise GGUFFileError(f"{self.path}: {what}")

    def stored(self, name: str) -> Stored:
        """The description of a tensor. Raises GGUFFileError if the file has no such tensor."""
        if name not in self.tensors:
            self.fail(
                f"no tensor {name}; it has {', '.join(list(self.tensors)[:5])}, ... ({len(self.tensors)})"
            )
        return self.tensors[name]

    def read(self, name: str) -> Bytes:
        """The bytes of a tensor: uint8 [..., bytes of a row], its last dimension in blocks."""
        stored = self.stored(name)
        data = np.fromfile(self.path, dtype=np.uint8, count=stored.size, offset=stored.offset)
        if data.size != stored.size:
            self.fail(f"tensor {name}: {data.size} of its {stored.size} bytes are there")
        return data.reshape(*stored.shape[:-1], stored.row_bytes)


class _Header:
    """Reads the part of a file before the tensors' data into a :class:`File`."""

    def __init__(self, target: File, file: BinaryIO) -> None:
        self.target = target
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.file.tell():
            self.target.fail(f"{what} is {count} bytes long, and {self.size - self.file.tell()} are left")
        data = self.file.read(count)
        if len(data) != count:
            self.target.fail(f"{what}: the file became shorter while it was read")
        return data

    def scalar(self, kind: GGUFValueType, what: str) -> Any:
        form = _SCALARS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str) -> int:
        value: int = self.scalar(GGUFValueType.UINT64, what)
        return value

    def string(self, what: str) -> str:
        data = self.take(self.count(f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.target.fail(f"{what} is not UTF-8")

    def value_type(self, what: str) -> GGUFValueType:
        number = self.scalar(GGUFValueType.UINT32, f"the type of {what}")
        try:
            return GGUFValueType(number)
        except ValueError:
            self.target.fail(f"{what} has the type {number}, which GGUF does not know")

    def value(self, kind: GGUFValueType, what: str) -> Any:
        return self.string(what) if kind == GGUFValueType.STRING else self.scalar(kind, what)

    def field(self, what: str) -> Field:
        kind = self.value_type(what)
        if kind != GGUFValueType.ARRAY:
            return Field(kind, self.value(kind, what))
        items = self.value_type(what)
        if items == GGUFValueType.ARRAY:
            self.target.fail(f"{what} is an array of arrays, which is not supported")
        count = self.count(f"the length of {what}")
        if items == GGUFValueType.STRING:
            least = 8 * count  # the lengths of the strings
            if least > self.size - self.file.tell():
                self.target.fail(f"{what} has {count} strings, more than the file has room for")
            return Field(kind, [self.string(what) for _ in range(count)], items)
        form = _SCALARS[items]
        data = self.take(count * struct.calcsize(form), what)
        return Field(kind, [item for (item,) in struct.iter_unpack(form, data)], items)

    def read(self) -> None:
        target = self.target
        if self.take(4, "the magic number") != struct.pack("<I", GGUF_MAGIC):
            target.fail("not a GGUF file: it does not begin with GGUF")
        version = self.scalar(GGUFValueType.UINT32, "the version")
        if version not in _VERSIONS:
            target.fail(
                f"GGUF version {version} is not read, only {_VERSIONS[0]} and {_VERSIONS[1]}, little-endian"
            )
        tensors, fields = self.count("the number of tensors"), self.count("the number of metadata")
        for _ in range(fields):
            key = self.string("a key")
            if key in target.metadata:
                target.fail(f"the key {key} occurs twice")
            target.metadata[key] = self.field(key)
        alignment = self.alignment()
        infos = [self.tensor() for _ in range(tensors)]
        start = _padded(self.file.tell(), alignment)
        expected = 0
        for name, stored in infos:
            if name in target.tensors:
                target.fail(f"two tensors are called {name}")
            if stored.offset != expected:
                target.fail(
                    f"tensor {name} has the offset {stored.offset}, not {expected} as those before it ask"
                )
            target.tensors[name] = stored = stored._replace(offset=start + stored.offset)
            if stored.offset + stored.size > self.size:
                target.fail(
                    f"tensor {name} of {stored.size} bytes would end at {stored.offset + stored.size}, the file ends "
                    f"at {self.size}: it is cut off"
                )
            expected = _padded(expected + stored.size, alignment)

    def alignment(self) -> int:
        field = self.target.metadata.get(_ALIGNMENT_KEY)
        if field is None:
            return int(GGUF_DEFAULT_ALIGNMENT)
        value = field.value
        if field.kind != GGUFValueType.UINT32 or value == 0 or value & (value - 1):
            self.target.fail(f"{_ALIGNMENT_KEY} is {value!r}, not a power of two as UINT32")
        return int(value)

    def tensor(self) -> tuple[str, Stored]:
        """The name and description of the next tensor, its offset from the start of the data."""
        target = self.target
        name = self.string("the name of a tensor")
        what = f"tensor {name}"
        dims = self.scalar(GGUFValueType.UINT32, what)
        if not 1 <= dims <= _MAX_DIMS:
            target.fail(f"{what} has {dims} dimensions, not 1 to {_MAX_DIMS}")
        shape = tuple(self.count(what) for _ in range(dims))[::-1]
        number = self.scalar(GGUFValueType.UINT32, what)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            target.fail(f"{what} has the type {number}, which the gguf package does not know")
        block = GGML_QUANT_SIZES[kind][0]
        if not all(shape) or shape[-1] % block:
            target.fail(f"{what} has the shape {list(shape)}, not rows of {block} weights for {kind.name}")
        return name, Stored(kind, shape, self.count(what))


def write(
    path: str | os.PathLike[str], metadata: Mapping[str, Field], tensors: Iterable[tuple[str, Written]]
) -> None:
    """Writes a GGUF file of version 3 with the default alignment; a reader finds the old file or the new one."""
    items = list(tensors)
    header = bytearray(struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(items), len(metadata)))
    for key, field in metadata.items():
        header += _string(key) + struct.pack("<I", field.kind) + _packed(field)
    offset = 0
    for name, (kind, data) in items:
        weights, size = GGML_QUANT_SIZES[kind]
        shape = (*data.shape[:-1], data.shape[-1] // size * weights)
        header += _string(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, offset)
        offset = _padded(offset + data.nbytes, GGUF_DEFAULT_ALIGNMENT)

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(header)
            for _, (_, data) in items:
                _pad(file)
                np.ascontiguousarray(data).tofile(file)
            _pad(file)

    atomic_write(Path(path), fill)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_padded(file.tell(), GGUF_DEFAULT_ALIGNMENT) - file.tell()))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(field: Field) -> bytes:
    if field.items is None:
        return (
            _string(field.value) if field.kind == GGUFValueType.STRING else _number(field.kind, field.value)
        )
    items = [
        _string(v) if field.items == GGUFValueType.STRING else _number(field.items, v) for v in field.value
    ]
    return struct.pack("<IQ", field.items, len(items)) + b"".join(items)


def _number(kind: GGUFValueType, value: Any) -> bytes:
    return struct.pack(_SCALARS[kind], value)
