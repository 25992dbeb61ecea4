"""Image data sets as tensors: `load("digits")`, or a directory or archive whose format is recognised by content.

| format | recognised by |
|---|---|
| MNIST, Fashion-MNIST (IDX files) | the IDX header |
| CIFAR-10, CIFAR-100 for Python (pickles of Python 2 or 3) | the pickle header and its keys; see `unpickle.py` |
| CIFAR-10, CIFAR-100 binary batches | records of 3073 or 3074 bytes with valid labels |
| image folders `train/CLASS/` and `test/CLASS/` | the folders; all that Pillow reads but EPS, at any depth below |

Each may lie in a directory or in a .tar (plain, gz, bz2, xz) or .zip archive, below any other folders, and each file
may be compressed by itself (gz, bz2, xz). A source holds one data set, whole: pieces of two, missing or surplus
batches, damaged files, labels out of range, two files of many images (IDX, CIFAR) with the same images, and links in
archives are errors. In a directory links are followed. What is left out is said: hidden folders and files, files of no
known format, images outside the folders of classes. So is the number of single test images that are training images
too, pixel for pixel: real data sets have some.

Images are taken as torchvision's ImageFolder takes them: the first frame, without alpha channel, with rows as stored
(an EXIF rotation is not applied, which is said). Not seen: images that belong to another class or data set of the same
shape, and changed bytes where a format has no checksum (tar, binary batches, IDX).

Decoded data is cached in `$XDG_CACHE_HOME/quantopt` (else `~/.cache/quantopt`).
"""

import hashlib
import json
import os
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantopt.files import atomic_write
from quantopt.train import environment, formats, sources
from quantopt.train.errors import InputError, require
from quantopt.train.formats.folders import describe
from quantopt.train.formats.parts import Array, Parts
from quantopt.train.left_out import SHARED, TEST, TRAINING, LeftOut

_CACHE_VERSION = "3"  # of the readers: another number wherever they read another data set from a source
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
    left_out: str = ""
    """What the source holds and the data set does not, classes without images, and images of both splits, in words."""

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
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogatepass"))
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

    Raises InputError, which names --data, the source and the file in it, for anything that cannot be read or does not
    fit the rest. What is left out is said in a line on stderr, also when the data comes from the cache. `progress`
    shows a bar there while images are decoded, and the number of images if nothing is left out, too.
    """
    if str(source) == "digits":
        return digits()
    path = Path(source)
    left_out = LeftOut()
    try:
        cached = _cache_directory() / f"{_key(path)}.safetensors"
        name = path.name or path.resolve().name
        dataset = _read_cache(cached, name)
        if dataset is None:
            dataset = _dataset(name, formats.read(path, left_out, progress), left_out)
            _write_cache(cached, dataset)
    except FileNotFoundError as error:
        if Path(error.filename or "") == path:
            raise InputError(
                "--data", f'{path} does not exist (give "digits", a directory or an archive)'
            ) from None
        raise InputError("--data", f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise InputError("--data", f"{path} cannot be read: {error}") from None
    except sources.DataError as error:
        said = f" ({left_out})" if str(left_out) else ""
        raise InputError("--data", _printable(f"{path}: {error}{said}")) from None
    if progress or dataset.left_out:
        read = len(dataset.train_labels) + len(dataset.test_labels)
        said = f"; {dataset.left_out}" if dataset.left_out else ""
        print(f"{dataset.name}: {read:,} images read{said}", file=sys.stderr)
    return dataset


def digits() -> Dataset:
    """scikit-learn's digits: 1,797 real 8x8 images in 10 classes, 1,437 to train and 360 to test.

    The split is stratified and always the same. Grey levels 0..16 become 0..255.
    """
    require("--data: digits", "scikit-learn")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    images = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)[:, None]
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[::_DIGITS_TEST]] = True
    classes = tuple(str(digit) for digit in range(10))
    train, test = ((images[mask], labels[mask]) for mask in (~is_test, is_test))
    return _dataset("digits", Parts(classes, train, test), LeftOut())


def _dataset(name: str, parts: Parts, left_out: LeftOut) -> Dataset:
    classes, train, test, test_names = parts
    for split, (images, _) in (("training", train), ("test", test)):
        if len(images) == 0:
            raise sources.DataError(f"has no {split} images")
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{describe(train[0][0])} and {describe(test[0][0])}"
        raise sources.DataError(f"training and test images differ: {shapes}")
    if classes is None:
        highest = max(int(train[1].max()), int(test[1].max()))
        classes = tuple(str(label) for label in range(highest + 1))
    if len(classes) < 2:
        raise sources.DataError("has a single class; at least 2 are needed")
    for kind, labels in ((TRAINING, train[1]), (TEST, test[1])):
        for label in (np.bincount(labels, minlength=len(classes)) == 0).nonzero()[0]:
            left_out.add(kind, classes[label])
    training = {_digest(image) for image in train[0]}
    for i, image in enumerate(test[0]):
        if _digest(image) in training:
            left_out.add(SHARED, test_names[i] if test_names else f"number {i}")
    # np.array: frombuffer's arrays are read-only, torch's tensors are not
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(np.array(array)) for array in (*train, *test)
    )
    said = _printable(str(left_out))
    return Dataset(name, classes, train_images, train_labels, test_images, test_labels, said)


def _digest(image: Array) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _printable(text: str) -> str:
    """`text`, which may hold names of files, in one line: a terminal must not obey it, and JSON must hold it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


# ------------------------------------------------------------------------------------------------ cache


def _cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "quantopt"


def _key(path: Path) -> str:
    """What a cached data set is found by; it changes with the source, the reader and the decoder of images."""
    state = f"{_CACHE_VERSION}\n{environment.version('pillow')}\n{sources.fingerprint(path)}"
    return hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    value = zlib.crc32(text.encode())
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
        if metadata["checksum"] != _checksum(metadata["text"], tensors):
            return None
        text = json.loads(metadata["text"])
        return Dataset(name=name, classes=tuple(text["classes"]), left_out=text["left_out"], **tensors)
    except Exception:  # a file with any fault is rebuilt
        return None


def _write_cache(path: Path, dataset: Dataset) -> None:
    from safetensors.torch import save

    tensors = dataset._tensors()
    text = json.dumps({"classes": dataset.classes, "left_out": dataset.left_out})
    metadata = {"text": text, "checksum": _checksum(text, tensors)}

    def write(file: Path) -> None:
        file.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}, metadata))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, write)
    except OSError as error:
        print(f"warning: decoded data is not cached: {error}", file=sys.stderr)
