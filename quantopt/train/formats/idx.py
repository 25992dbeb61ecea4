"""MNIST and its relatives: IDX files, one of images and one of labels for training and for testing."""

import re

import numpy as np

from quantopt.train.formats.parts import Array, Gathered, Parts, base, check_folders, split
from quantopt.train.sources import DataError

_TYPES = (0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E)
_NAME = re.compile(r"idx\d-ubyte$")
_WORDS = re.compile(r"images?|labels?|idx\d|ubyte|train(ing)?|test(ing)?|t10k|[-_. ]")


class Files:
    kind = "IDX files"

    def __init__(self, gathered: Gathered) -> None:
        self._gathered = gathered
        self._files: list[tuple[str, Array]] = []

    def __bool__(self) -> bool:
        return bool(self._files)

    def takes(self, name: str, data: bytes) -> bool:
        """Whether `data` is an IDX file. Raises DataError if only the name says so."""
        if data[:2] == b"\0\0" and len(data) > 4 and data[2] in _TYPES and 1 <= data[3] <= 8:
            return True
        if _NAME.search(base(name)):
            raise DataError(f"{name} is {'damaged: it has no IDX header' if data else 'empty'}")
        return False

    def add(self, name: str, data: bytes) -> None:
        dimensions = data[3]
        if data[2] != 8:
            raise DataError(f"{name} is an IDX file of type 0x{data[2]:02x}; only bytes (0x08) are supported")
        if dimensions not in (1, 3):
            raise DataError(
                f"{name} is an IDX file of {dimensions} dimensions; images have 3 and labels have 1"
            )
        header = 4 + 4 * dimensions
        shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
        expected = header + int(np.prod(shape, dtype=object))
        if len(data) != expected:
            raise DataError(f"{name} is damaged: {len(data)} bytes where its header says {expected}")
        if self._gathered.is_copy(name, data):
            return
        array = np.frombuffer(data, np.uint8, offset=header).reshape(shape)
        self._gathered.count(array.size)
        self._files.append((name, array))

    def parts(self) -> Parts:
        splits, names = [], []
        for wanted, text in (("train", "training"), ("test", "testing")):
            chosen = [item for item in self._files if (split(item[0]) or "train") == wanted]
            image_names, images = self._one(chosen, 3, text)
            label_names, labels = self._one(chosen, 1, text)
            if len(images) != len(labels):
                raise DataError(
                    f"{image_names} has {len(images)} images, {label_names} has {len(labels)} labels"
                )
            names.append([image_names, label_names])
            splits.append((images[:, None], labels.astype(np.int64)))
        check_folders(*names)
        _check_series([name for pair in names for name in pair])
        if np.array_equal(splits[0][0], splits[1][0]) and len(splits[0][0]) > 0:
            raise DataError(f"{names[0][0]} and {names[1][0]} hold the same images")
        _check_labels([(pair[1], labels) for pair, (_, labels) in zip(names, splits, strict=True)])
        return Parts(None, splits[0], splits[1])

    def _one(self, chosen: list[tuple[str, Array]], dimensions: int, text: str) -> tuple[str, Array]:
        what = "images" if dimensions == 3 else "labels"
        found = [item for item in chosen if item[1].ndim == dimensions]
        if len(found) > 1:
            raise DataError(
                f"{found[0][0]} and {found[1][0]} are both {what} for {text}: give a folder with one data set"
            )
        if not found:
            named = "with" if text == "testing" else "without"
            raise DataError(
                f"needs one IDX file of images and one of labels for {text} ({named} t10k or test in the name); there "
                f"is none of {what}, but {', '.join(name for name, _ in self._files[:4])}"
            )
        return found[0]


def _check_labels(files: list[tuple[str, Array]]) -> None:
    """Raises DataError if most of the classes 0..highest label have no image: the highest label is then no class."""
    used = np.unique(np.concatenate([labels for _, labels in files]))
    if len(used) and 2 * len(used) < used[-1] + 1:
        name, labels = next(item for item in files if used[-1] in item[1])
        raise DataError(
            f"{name}: image {int(labels.argmax())} has the label {used[-1]}, and only {len(used)} of the labels "
            f"0..{used[-1]} have images: correct it, or number the classes from 0 without gaps"
        )


def _check_series(names: list[str]) -> None:
    """Raises DataError if, say, the images are those of emnist-letters and the labels those of emnist-digits."""
    series: dict[str, str] = {}
    for name in names:
        series.setdefault(_WORDS.sub("", base(name)), name)
    if len(series) > 1 and all(re.search("image|label", base(name)) for name in names):
        one, other = list(series.values())[:2]
        raise DataError(f"{one} and {other} are of different data sets by their names: give one")
