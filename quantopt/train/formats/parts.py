"""What the readers of all formats share."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantopt.train.left_out import COPY, LeftOut
from quantopt.train.sources import COMPRESSED, DataError

Array = NDArray[Any]

_MAX_PIXELS = 1 << 33  # bytes of decoded images held in memory


class Parts(NamedTuple):
    """(images uint8 [N, C, H, W], labels int64 [N]) for training and testing. classes: None to take the labels.
    test_names: of the files of the test images, if each has one."""

    classes: tuple[str, ...] | None
    train: tuple[Array, Array]
    test: tuple[Array, Array]
    test_names: tuple[str, ...] | None = None


class Gathered:
    """What all readers of a source share: the record of what is left out, and how much was read."""

    def __init__(self, left_out: LeftOut) -> None:
        self.left_out = left_out
        self._pixels = 0
        self._stems: dict[str, tuple[str, str]] = {}

    def count(self, pixels: int) -> None:
        self._pixels += pixels
        if self._pixels > _MAX_PIXELS:
            raise DataError(f"the images need more than {_MAX_PIXELS >> 30} GiB of memory")

    def is_copy(self, name: str, contents: bytes) -> bool:
        """Whether a file was seen that differs from `name` only in the ending of a compressed file. Raises DataError if
        it has other contents."""
        other, digest = self._stems.setdefault(stem(name), (name, hashlib.sha256(contents).hexdigest()))
        if other == name:
            return False
        if hashlib.sha256(contents).hexdigest() != digest:
            raise DataError(f"{other} and {name} differ in contents: remove the one that is not meant")
        self.left_out.add(COPY, name)
        return True


def stem(name: str) -> str:
    """`name` without the ending of a compressed file."""
    for ending in COMPRESSED.values():
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def base(name: str) -> str:
    return stem(name).rsplit("/", 1)[-1].lower()


def folder(name: str) -> str:
    return name.rpartition("/")[0]


def split(name: str) -> str | None:
    """ "train" or "test" by the name of a file, None if it says neither. Raises DataError if it says both."""
    is_test = re.search("test|t10k", base(name)) is not None
    if is_test and "train" in base(name):
        raise DataError(f"{name} is named after training and testing: rename it")
    return "test" if is_test else "train" if "train" in base(name) else None


def check_folders(train: Sequence[str], test: Sequence[str]) -> None:
    """Raises DataError unless all files lie in one folder, or in the folders train and test beside each other."""
    for names in (train, test):
        for name in names:
            if folder(name) != folder(names[0]):
                raise DataError(apart(names[0], name))
    one, other = folder(train[0]), folder(test[0])
    if one != other and (folder(one) != folder(other) or (split(one), split(other)) != ("train", "test")):
        raise DataError(apart(train[0], test[0]))


def apart(one: str, other: str) -> str:
    """The message about two files that lie in different folders."""
    return (
        f"{one} and {other} lie in different folders, as those of two data sets do: give a folder with one data set, "
        "or put its files into one folder"
    )


def labels_array(labels: Sequence[int]) -> Array:
    return np.array(labels, dtype=np.int64)
