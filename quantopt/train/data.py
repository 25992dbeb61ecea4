"""Image data sets as tensors: `load("digits")`, or a directory or archive whose format is recognised by content.

| format | recognised by |
|---|---|
| MNIST, Fashion-MNIST (IDX files, plain or .gz) | the IDX header |
| CIFAR-10, CIFAR-100 for Python (pickles of Python 2 or 3) | the pickle header and its keys; see `unpickle.py` |
| CIFAR-10, CIFAR-100 binary batches | records of 3073 or 3074 bytes with valid labels |
| image folders `train/CLASS/*` and `test/CLASS/*` | the folders; files in any format that Pillow reads |

Each may lie in a directory or in a .tar (plain, gz, bz2, xz) or .zip archive, below any other folders.
Decoded data is cached in `$XDG_CACHE_HOME/quantopt` (else `~/.cache/quantopt`).
"""

import hashlib
import io
import json
import os
import pickle
import sys
import warnings
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from quantopt.files import atomic_write
from quantopt.train import sources, unpickle
from quantopt.train.errors import InputError

Array = NDArray[Any]

_CACHE_VERSION = "1"
_MAX_PIXELS = 1 << 33  # bytes of decoded images held in memory
_DIGITS_TEST = 5  # every fifth image of a class is a test image


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, C, H, W] and labels int64 [N] in 0..len(classes)-1, for training and for testing."""

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images, in 0..255.

        Computed from the exact histogram, so they do not depend on the order of a sum. A constant channel has
        deviation 1, so that it can be divided by.
        """
        values = torch.arange(256, dtype=torch.float64)
        means, deviations = [], []
        for channel in range(self.train_images.shape[1]):
            counts = torch.bincount(self.train_images[:, channel].reshape(-1), minlength=256).double()
            mean = (counts @ values / counts.sum()).item()
            variance = (counts @ (values - mean) ** 2 / counts.sum()).item()
            means.append(mean)
            deviations.append(variance**0.5 if variance > 0 else 1.0)
        return means, deviations

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the contents, wherever they were read from."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for tensor in self._tensors().values():
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def limited(self, images: int) -> "Dataset":
        """The data set with only the first `images` // classes training images of each class, or all if a class has
        fewer."""
        return self._split(images)[0]

    def validation(self, images: int) -> "Dataset":
        """The data set with the last `images` // classes training images of each class as its test images, for choosing
        hyper-parameters. The other training images stay."""
        reversed_order = replace(
            self, train_images=self.train_images.flip(0), train_labels=self.train_labels.flip(0)
        )
        chosen, others = reversed_order._split(images)
        return replace(
            others,
            train_images=others.train_images.flip(0),
            train_labels=others.train_labels.flip(0),
            test_images=chosen.train_images,
            test_labels=chosen.train_labels,
        )

    def _split(self, images: int) -> "tuple[Dataset, Dataset]":
        """(with the first `images` // classes training images of each class, with the others)."""
        each = images // len(self.classes)
        first = torch.zeros(len(self.train_labels), dtype=torch.bool)
        for label in range(len(self.classes)):
            first[(self.train_labels == label).nonzero()[:each, 0]] = True
        chosen, others = (
            replace(self, train_images=self.train_images[mask], train_labels=self.train_labels[mask])
            for mask in (first, ~first)
        )
        return chosen, others

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "train_images": self.train_images,
            "train_labels": self.train_labels,
            "test_images": self.test_images,
            "test_labels": self.test_labels,
        }


def load(source: str | Path, *, progress: bool = True) -> Dataset:
    """The data set `source`: "digits", or the path of a directory, an archive or a file.

    Raises InputError, which names --data and the file, for anything that cannot be read. `progress` shows a
    bar on stderr while images are decoded.
    """
    if str(source) == "digits":
        return digits()
    path = Path(source)
    try:
        key = hashlib.sha256(f"{_CACHE_VERSION}\n{sources.fingerprint(path)}".encode()).hexdigest()[:32]
        cached = _cache_directory() / f"{key}.safetensors"
        dataset = _read_cache(cached, path.name)
        if dataset is None:
            dataset = _decode(path, progress)
            _write_cache(cached, dataset)
    except FileNotFoundError as error:
        if Path(error.filename or "") == path:
            raise InputError(
                "--data", f'{path} does not exist (give "digits", a directory or an archive)'
            ) from None
        raise InputError("--data", f"{path} cannot be read: {error}") from None
    except sources.READ_ERRORS as error:
        raise InputError("--data", f"{path} cannot be read: {error}") from None
    return dataset


def digits() -> Dataset:
    """scikit-learn's digits: 1,797 real 8x8 images in 10 classes, 1,437 to train and 360 to test.

    The split is stratified and always the same. Grey levels 0..16 become 0..255.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("--data", f"digits needs scikit-learn ({error}): pip install scikit-learn") from None
    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    images = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)[:, None]
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[::_DIGITS_TEST]] = True
    classes = tuple(str(digit) for digit in range(10))
    return _dataset(
        "digits", classes, (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    )


# ------------------------------------------------------------------------------------------------ decoding


@dataclass
class _Found:
    """What was recognised in the members of a source."""

    # split, class, name, pixels [C, H, W]
    images: list[tuple[str, str, str, Array]] = field(default_factory=list)
    # name, pixels [N, H, W] or labels [N]
    idx: list[tuple[str, Array]] = field(default_factory=list)
    # is a test batch, pixels [N, 3, 32, 32], labels [N]
    pickles: list[tuple[bool, Array, Array]] = field(default_factory=list)
    binaries: list[tuple[bool, Array, Array]] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    pixels: int = 0

    def count(self, pixels: int) -> None:
        self.pixels += pixels
        if self.pixels > _MAX_PIXELS:
            raise InputError("--data", f"the images need more than {_MAX_PIXELS >> 30} GiB of memory")


def _decode(path: Path, progress: bool) -> Dataset:
    found = _Found()
    with tqdm(
        desc=f"decoding {path.name}", unit=" files", disable=not progress, leave=False, delay=0.5
    ) as bar:
        for member in sources.members(path):
            _recognise(member, found)
            bar.update()
    kinds = {
        "image folders": found.images,
        "CIFAR pickles": found.pickles,
        "CIFAR binary batches": found.binaries,
        "IDX files": found.idx,
    }
    present = [kind for kind, items in kinds.items() if items]
    if not present:
        raise InputError(
            "--data",
            f"no data found in {path}: expected IDX (MNIST) files, CIFAR pickles or binary batches, or "
            "images in train/CLASS/ and test/CLASS/",
        )
    if len(present) > 1:
        raise InputError("--data", f"{path} holds more than one data set: {' and '.join(present)}")
    if found.images:
        return _from_folders(path.name, found)
    if found.idx:
        return _from_idx(path.name, found)
    return _from_batches(path.name, found.pickles or found.binaries, found.classes)


def _recognise(member: sources.Member, found: _Found) -> None:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if (
        not parts
        or parts[-1].startswith(".")
        or "__MACOSX" in parts
        or parts[-1] in ("Thumbs.db", "desktop.ini")
    ):
        return
    name = "/".join(parts)
    if len(parts) >= 3 and parts[-3] in ("train", "test"):
        pixels = _read_image(name, member.read())
        if found.images:
            _, _, other, expected = found.images[0]
            if pixels.shape != expected.shape:
                raise InputError(
                    "--data",
                    f"images differ in size or colour: {other} is {_describe(expected)}, {name} is {_describe(pixels)}",
                )
        found.count(pixels.size)
        found.images.append((parts[-3], parts[-2], name, pixels))
        return
    data = member.read()
    if data[:2] == b"\x1f\x8b":
        data = sources.gunzip(name, data)
    if data[:2] == b"\0\0" and len(data) > 4 and data[3] in (1, 3) and data[2] >= 8:
        array = _read_idx(name, data)
        found.count(array.size)
        found.idx.append((name, array))
    elif data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        _read_pickle(name, data, found)
    elif data and (len(data) % 3073 == 0 or len(data) % 3074 == 0):
        _read_binary(name, data, found)


def _describe(pixels: Array) -> str:
    channels, height, width = pixels.shape
    return f"{width}x{height} {'grey' if channels == 1 else 'colour'}"


def _read_image(name: str, data: bytes) -> Array:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("--data", f"image folders need Pillow ({error}): pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.mode in ("F", "I") or image.mode.startswith("I;"):
                    raise InputError(
                        "--data", f"{name} has more than 8 bits per pixel, which is not supported"
                    )
                mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
                pixels = np.array(image.convert(mode))
    except InputError:
        raise
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise InputError("--data", f"{name} is not an image that can be read: {error}") from None
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _from_folders(name: str, found: _Found) -> Dataset:
    found.images.sort(key=lambda item: item[:3])
    classes = tuple(sorted({item[1] for item in found.images if item[0] == "train"}))
    extra = {item[1] for item in found.images} - set(classes)
    if classes and extra:
        raise InputError("--data", f"the class {sorted(extra)[0]!r} has test images but no training images")
    splits = []
    for split in ("train", "test"):
        chosen = [item for item in found.images if item[0] == split]
        if not chosen:
            raise InputError("--data", f"{name} has no images in {split}/CLASS/")
        labels = np.array([classes.index(item[1]) for item in chosen], dtype=np.int64)
        splits.append((np.stack([item[3] for item in chosen]), labels))
    return _dataset(name, classes, splits[0], splits[1])


def _read_idx(name: str, data: bytes) -> Array:
    dimensions = data[3]
    if data[2] != 8:
        raise InputError(
            "--data", f"{name} is an IDX file of type 0x{data[2]:02x}; only bytes (0x08) are supported"
        )
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise InputError("--data", f"{name} is damaged: {len(data)} bytes where its header says {expected}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _from_idx(name: str, found: _Found) -> Dataset:
    def is_test(file: str) -> bool:
        base = file.rsplit("/", 1)[-1].lower()
        return "t10k" in base or "test" in base

    splits = []
    for test in (False, True):
        chosen = [(file, array) for file, array in found.idx if is_test(file) == test]
        images = [item for item in chosen if item[1].ndim == 3]
        labels = [item for item in chosen if item[1].ndim == 1]
        if len(images) != 1 or len(labels) != 1:
            raise InputError(
                "--data",
                f"{name} needs one IDX file of images and one of labels for {'testing' if test else 'training'} "
                f"(with t10k or test in the name{'' if test else ' of the others'}); it has {len(images)} and "
                f"{len(labels)}",
            )
        if len(images[0][1]) != len(labels[0][1]):
            raise InputError(
                "--data",
                f"{images[0][0]} has {len(images[0][1])} images, {labels[0][0]} has {len(labels[0][1])} labels",
            )
        splits.append((images[0][1][:, None], labels[0][1].astype(np.int64)))
    return _dataset(name, None, splits[0], splits[1])


def _read_pickle(name: str, data: bytes, found: _Found) -> None:
    try:
        contents = unpickle.loads(data)
    except pickle.UnpicklingError as error:
        raise InputError("--data", f"the pickle {name} cannot be read: {error}") from None
    names = contents.get("fine_label_names", contents.get("label_names"))
    if isinstance(names, list | tuple):
        found.classes = tuple(_text(item) for item in names)
        return
    pixels = contents.get("data")
    labels = contents.get("fine_labels", contents.get("labels"))
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list | tuple):
        raise InputError("--data", f"the pickle {name} has no `data` array with `labels` or `fine_labels`")
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072 or len(labels) != len(pixels):
        raise InputError(
            "--data",
            f"the pickle {name} is not CIFAR: data is {pixels.dtype} {list(pixels.shape)} with {len(labels)} labels",
        )
    if any(type(label) is not int for label in labels):
        raise InputError("--data", f"the pickle {name} has labels that are not integers")
    found.count(pixels.size)
    is_test = "test" in _text(contents.get("batch_label", name)).lower()
    found.pickles.append((is_test, pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)))


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _read_binary(name: str, data: bytes, found: _Found) -> None:
    raw = np.frombuffer(data, np.uint8)
    if len(raw) % 3073 == 0:
        records = raw.reshape(-1, 3073)
        if records[:, 0].max() < 10:
            _add_binary(name, records[:, 1:], records[:, 0], found)
            return
    if len(raw) % 3074 == 0:
        records = raw.reshape(-1, 3074)
        if records[:, 0].max() < 20 and records[:, 1].max() < 100:
            _add_binary(name, records[:, 2:], records[:, 1], found)


def _add_binary(name: str, pixels: Array, labels: Array, found: _Found) -> None:
    found.count(pixels.size)
    is_test = "test" in name.rsplit("/", 1)[-1].lower()
    found.binaries.append((is_test, pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)))


def _from_batches(name: str, batches: list[tuple[bool, Array, Array]], classes: tuple[str, ...]) -> Dataset:
    splits = []
    for test in (False, True):
        chosen = [batch for batch in batches if batch[0] == test]
        if not chosen:
            raise InputError("--data", f"{name} has no {'test' if test else 'training'} batch")
        splits.append((np.concatenate([b[1] for b in chosen]), np.concatenate([b[2] for b in chosen])))
    return _dataset(name, classes or None, splits[0], splits[1])


def _dataset(
    name: str, classes: tuple[str, ...] | None, train: tuple[Array, Array], test: tuple[Array, Array]
) -> Dataset:
    for split, (images, labels) in (("training", train), ("test", test)):
        if len(images) == 0:
            raise InputError("--data", f"{name} has no {split} images")
        if classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise InputError("--data", f"{name} has {split} labels outside 0..{len(classes) - 1}")
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{_describe(train[0][0])} and {_describe(test[0][0])}"
        raise InputError("--data", f"training and test images of {name} differ: {shapes}")
    if classes is None:
        highest = max(int(train[1].max()), int(test[1].max()))
        classes = tuple(str(label) for label in range(highest + 1))
    if len(classes) < 2:
        raise InputError("--data", f"{name} has a single class; at least 2 are needed")
    # np.array: frombuffer's arrays are read-only, torch's tensors are not
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(np.array(a)) for a in (*train, *test)
    )
    return Dataset(name, classes, train_images, train_labels, test_images, test_labels)


# ------------------------------------------------------------------------------------------------ cache


def _cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "quantopt"


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().numpy().data, value)
    return f"{value:08x}"


def _read_cache(path: Path, name: str) -> Dataset | None:
    """The cached data set, or None if there is none or it is damaged."""
    if not path.is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if metadata["checksum"] != _checksum(tensors):
            return None
        return Dataset(name=name, classes=tuple(json.loads(metadata["classes"])), **tensors)
    except Exception:  # a file with any fault is rebuilt
        return None


def _write_cache(path: Path, dataset: Dataset) -> None:
    from safetensors.torch import save

    tensors = dataset._tensors()
    metadata = {"classes": json.dumps(dataset.classes), "checksum": _checksum(tensors)}

    def write(file: Path) -> None:
        file.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}, metadata))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, write)
    except OSError as error:
        print(f"warning: decoded data is not cached: {error}", file=sys.stderr)
