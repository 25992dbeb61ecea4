"""CIFAR-10 and CIFAR-100: batches as pickles (`unpickle.py`) or binary records, and the pickle that names classes."""

import hashlib
import pickle
import re
from typing import Any, NamedTuple

import numpy as np

from quantopt.train import unpickle
from quantopt.train.formats.parts import (
    Array,
    Gathered,
    Parts,
    apart,
    base,
    check_folders,
    folder,
    labels_array,
    split,
)
from quantopt.train.sources import DataError

_NUMBERED = re.compile(r"data_batch_(\d{1,4})(\.\w+)?")
_NAME = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?|batches\.meta")
_NAME_BESIDE_BATCHES = re.compile(r".*\.bin|train|test|meta")
_LABEL = re.compile(r"(?:train|test)ing batch (\d{1,4}) of (\d{1,4})")
_BATCHES = 5  # of CIFAR-10, data_batch_1 and so on

_CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100}
_RECORD = {"CIFAR-10": 3073, "CIFAR-100": 3074}  # bytes: a label, or a coarse and a fine one, and the pixels


class _Batch(NamedTuple):
    name: str
    family: str  # "CIFAR-10" or "CIFAR-100"
    form: str  # "pickle" or "binary batch"
    split: str
    title: str  # batch_label of a pickle
    images: Array
    labels: list[int]

    def __str__(self) -> str:
        return f"{self.name} is a {self.form} of {self.family}"


class _Meta(NamedTuple):
    name: str
    family: str
    classes: tuple[str, ...]
    images: int | None  # in each batch


class Batches:
    kind = "CIFAR batches"

    def __init__(self, gathered: Gathered) -> None:
        self._gathered = gathered
        self._batches: list[_Batch] = []
        self._metas: list[_Meta] = []
        # why a file named like a batch is none, for names that others have too; by whether the name ends in .bin
        self._refused: dict[bool, str] = {}

    def __bool__(self) -> bool:
        return bool(self._batches or self._metas)

    # -------------------------------------------------------------------------------------------- reading

    def takes_pickle(self, name: str, data: bytes) -> bool:
        is_pickle = data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        return is_pickle and not name.lower().endswith((".pt", ".pth"))  # torch's begin so too

    def add_pickle(self, name: str, data: bytes) -> None:
        if self._gathered.is_copy(name, data):
            return
        try:
            contents = unpickle.loads(data)
        except pickle.UnpicklingError as error:
            raise DataError(f"the pickle {name} cannot be read: {error}") from None
        if "fine_label_names" in contents or "label_names" in contents:
            self._metas.append(_meta(name, contents))
        else:
            self._add(_batch(name, contents))

    def takes_binary(self, name: str, data: bytes) -> bool:
        """Whether `data` is a binary batch. Raises DataError if only the name says so."""
        faults = [_binary_fault(data, family) for family in _CLASSES]
        if None in faults:
            return True
        fault = next((fault for fault in faults if fault), None)
        if fault is None:
            fault = "it is neither a pickle nor records of CIFAR-10 (3073 bytes each) or CIFAR-100 (3074)"
        fault = f"{name} is damaged: {fault}" if data else f"{name} is empty"
        if _NAME.fullmatch(base(name)):
            raise DataError(fault)
        if _NAME_BESIDE_BATCHES.fullmatch(base(name)):
            self._refused.setdefault(base(name).endswith(".bin"), fault)
        return False

    def add_binary(self, name: str, data: bytes) -> None:
        if self._gathered.is_copy(name, data):
            return
        family = next(family for family in _CLASSES if _binary_fault(data, family) is None)
        records = _records(data, family)
        labels = records[:, -3073].tolist()
        images = np.ascontiguousarray(records[:, -3072:]).reshape(-1, 3, 32, 32)
        self._add(_Batch(name, family, "binary batch", split(name) or "train", "", images, labels))

    @property
    def refused(self) -> str:
        """Why a file that may be meant as a batch is none, "" if there is no such file."""
        return next(iter(self._refused.values()), "")

    def _add(self, batch: _Batch) -> None:
        self._gathered.count(batch.images.size)
        self._batches.append(batch)

    # -------------------------------------------------------------------------------------------- joining

    def parts(self) -> Parts:
        for of_binaries, fault in self._refused.items():
            if not of_binaries or any(batch.form == "binary batch" for batch in self._batches):
                raise DataError(fault)
        for batch in self._batches:
            first = self._batches[0]
            if (batch.family, batch.form) != (first.family, first.form):
                raise DataError(f"{first}, {batch}: give a folder or an archive with one data set")
        meta = self._one_meta()
        self._check_labels(meta)
        names: dict[str, list[str]] = {}
        splits = []
        for wanted, text in (("train", "training"), ("test", "test")):
            chosen = [batch for batch in self._batches if batch.split == wanted]
            if not chosen:
                raise DataError(f"has no {text} batch")
            names[wanted] = [batch.name for batch in chosen]
            images = np.concatenate([batch.images for batch in chosen])
            labels = labels_array([label for batch in chosen for label in batch.labels])
            splits.append((images, labels))
        check_folders(names["train"], names["test"])
        self._check_same()
        self._check_complete()
        return Parts(None if meta is None else meta.classes, splits[0], splits[1])

    def _one_meta(self) -> _Meta | None:
        if len(self._metas) > 1:
            raise DataError(
                f"{self._metas[0].name} and {self._metas[1].name} both name classes: give one data set"
            )
        if not self._metas:
            return None
        meta = self._metas[0]
        for batch in self._batches:
            if folder(meta.name) not in (folder(batch.name), folder(folder(batch.name))):
                raise DataError(apart(batch.name, meta.name))
            if batch.family != meta.family:
                raise DataError(f"{batch}, {meta.name} names the classes of {meta.family}: give one data set")
            if meta.images is not None and len(batch.labels) != meta.images:
                raise DataError(
                    f"{batch.name} has {len(batch.labels)} images where {meta.name} says {meta.images} for each batch"
                )
        return meta

    def _check_labels(self, meta: _Meta | None) -> None:
        for batch in self._batches:
            classes = _CLASSES[batch.family] if meta is None else len(meta.classes)
            why = (
                f"of {batch.family}; a pickle with label_names says others"
                if meta is None
                else f"by {meta.name}"
            )
            for i, label in enumerate(batch.labels):
                if not 0 <= label < classes:
                    shown = str(label) if abs(label) < 1 << 64 else "an integer of more than 64 bits"
                    raise DataError(
                        f"{batch.name}: image {i} has the label {shown}, and the labels are 0..{classes - 1} ({why})"
                    )

    def _check_same(self) -> None:
        seen: dict[bytes, _Batch] = {}
        for batch in self._batches:
            other = seen.setdefault(hashlib.sha256(batch.images.data).digest(), batch)
            if other is not batch:
                but = "" if other.labels == batch.labels else " with other labels"
                raise DataError(f"{other.name} and {batch.name} hold the same images{but}: remove one")

    def _check_complete(self) -> None:
        """The batches of a split must be all of those that their titles, or else their names, count, and no others."""
        for wanted, text in (("train", "training"), ("test", "test")):
            numbers: dict[int, str] = {}
            others: list[str] = []
            total = 0  # by the titles
            for batch in (batch for batch in self._batches if batch.split == wanted):
                title = _LABEL.search(batch.title)
                name = _NUMBERED.fullmatch(base(batch.name)) if wanted == "train" else None
                if title is not None:
                    total = max(total, int(title[2]))
                number = title or name
                if number is None:
                    others.append(batch.name)
                elif (other := numbers.setdefault(int(number[1]), batch.name)) != batch.name:
                    raise DataError(f"{other} and {batch.name} are both {text} batch {number[1]}: remove one")
            self._check_numbers(text, numbers, others, total)

    def _check_numbers(self, text: str, numbers: dict[int, str], others: list[str], total: int) -> None:
        names = [*numbers.values(), *others]
        if others and len(names) > 1:
            raise DataError(
                f"{others[-1]} is a {text} batch beside {names[0]} and has no number: remove it if it is a copy, or "
                "number the batches (batch_label of a pickle, or names data_batch_1, ... of training batches)"
            )
        if not numbers:
            return
        if total and max(numbers) > total:
            raise DataError(
                f"{numbers[max(numbers)]} is {text} batch {max(numbers)}, and the titles count {total}: remove it"
            )
        for number in range(1, max(total or _BATCHES, *numbers) + 1):
            if number not in numbers:
                raise DataError(
                    f"{text} batch {number} is missing beside {names[0]}: a copy is incomplete (--limit trains on a "
                    "part of a whole data set)"
                )


def _batch(name: str, contents: dict[str, Any]) -> _Batch:
    """The batch in a pickle."""
    keys = [key for key in ("labels", "fine_labels") if key in contents]
    images = contents.get("data")
    labels = contents.get(keys[0]) if keys else None
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(images, np.ndarray) or not isinstance(labels, list | tuple):
        raise DataError(f"the pickle {name} has no `data` array with `labels` or `fine_labels`")
    if len(keys) > 1:
        raise DataError(f"the pickle {name} has both `labels` and `fine_labels`")
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or len(labels) != len(images):
        raise DataError(
            f"the pickle {name} is not CIFAR: data is {images.dtype} {list(images.shape)} with {len(labels)} labels"
        )
    if not labels:
        raise DataError(f"the pickle {name} has no images")
    for key in ("coarse_labels", "filenames"):
        values = contents.get(key)
        if isinstance(values, list | tuple) and len(values) != len(images):
            raise DataError(f"the pickle {name} has {len(images)} images and {len(values)} {key}")
    for i, label in enumerate(labels):
        if type(label) is not int:
            shown = repr(label) if isinstance(label, bool | float | str | bytes) else type(label).__name__
            raise DataError(f"the pickle {name} has labels that are not integers: image {i} has {shown[:40]}")
    title = _text(contents.get("batch_label", b""))
    if title is None:
        raise DataError(f"the pickle {name} has a `batch_label` that is not text")
    by_name = split(name)
    by_title = "test" if "test" in title.lower() else "train" if "train" in title.lower() else None
    if None not in (by_name, by_title) and by_name != by_title:
        raise DataError(f"{name} holds {title[:40]!r}, which is not what its name says")
    return _Batch(
        name,
        "CIFAR-10" if keys == ["labels"] else "CIFAR-100",
        "pickle",
        by_title or by_name or "train",
        title,
        np.ascontiguousarray(images).reshape(-1, 3, 32, 32),
        list(labels),
    )


def _binary_fault(data: bytes, family: str) -> str | None:
    """Why `data` is not a binary batch of the family: "" if its size is not, None if it is one."""
    if not data or len(data) % _RECORD[family]:
        return ""
    columns = _records(data, family)[:, :-3072]
    for column, classes in zip(columns.T[::-1], (_CLASSES[family], 20), strict=False):
        if int(column.max()) >= classes:
            i = int((column >= classes).argmax())
            return f"image {i} has the label {column[i]}, and the labels of {family} are 0..{classes - 1}"
    return None


def _records(data: bytes, family: str) -> Array:
    return np.frombuffer(data, np.uint8).reshape(-1, _RECORD[family])


def _meta(name: str, contents: dict[str, Any]) -> _Meta:
    family = "CIFAR-100" if "fine_label_names" in contents else "CIFAR-10"
    names = contents["fine_label_names" if family == "CIFAR-100" else "label_names"]
    texts = [_text(item) for item in names] if isinstance(names, list | tuple) else [None]
    if not texts or None in texts or len(set(texts)) < len(texts):
        raise DataError(f"the pickle {name} does not name each class once")
    images, values = contents.get("num_cases_per_batch"), contents.get("num_vis", 3072)
    if (images is not None and type(images) is not int) or type(values) is not int or values != 3072:
        raise DataError(f"the pickle {name} describes batches that are not CIFAR's")
    return _Meta(name, family, tuple(str(text) for text in texts), images)


def _text(value: Any) -> str | None:
    return value.decode("latin1") if isinstance(value, bytes) else value if isinstance(value, str) else None
