"""Image folders: train/CLASS/ and test/CLASS/, with images at any depth below."""

import functools
import io
import os.path
import warnings
from typing import Any

import numpy as np

from quantopt import extras
from quantopt.train.formats.parts import Array, Gathered, Parts
from quantopt.train.left_out import ALPHA, EMPTY, FRAMES, NO_CLASS, NO_DATA, NO_IMAGE, ROTATION
from quantopt.train.sources import DataError

_SPLITS = ("train", "test")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # modes with an alpha channel
_ORIENTATION = 0x0112  # a tag of EXIF

_Name = tuple[str, ...]  # the parts of a name


class Images:
    kind = "image folders"

    def __init__(self, gathered: Gathered) -> None:
        self._gathered = gathered
        self._images: list[tuple[_Name, Array]] = []
        self._folders: set[_Name] = set()
        self._unread: dict[str, str] = {}  # by the ending of the name: why the first such file is no image

    def __bool__(self) -> bool:
        return bool(self._images)

    def add_folder(self, name: str) -> None:
        parts = tuple(name.split("/"))
        if _roots(parts):
            self._folders.add(parts)

    def takes(self, name: str) -> bool:
        """Whether a file lies in train/CLASS/ or test/CLASS/."""
        return bool(_roots(tuple(name.split("/"))[:-1]))

    def add(self, name: str, data: bytes) -> None:
        parts = tuple(name.split("/"))
        self._folders.add(parts[:-1])
        pixels = self._read(name, data)
        if pixels is None:
            self._gathered.left_out.add(NO_IMAGE, name)
            return
        if self._images:
            other, expected = self._images[0]
            if pixels.shape != expected.shape:
                raise DataError(
                    f"images differ in size or colour: {'/'.join(other)} is {describe(expected)}, {name} is "
                    f"{describe(pixels)}"
                )
        self._gathered.count(pixels.size)
        self._images.append((parts, pixels))

    def add_elsewhere(self, name: str) -> None:
        """Records a file that no format knows and that does not lie in a folder of a class."""
        is_image = _ending(name) in _endings()
        self._gathered.left_out.add(NO_CLASS if is_image else NO_DATA, name)

    def _read(self, name: str, data: bytes) -> Array | None:
        """The pixels [C, H, W] of an image, None for a file that is not one by its contents and its name."""
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise DataError(f"{name} {extras.missing('pillow', why=error)}") from None
        endings = _endings()
        left_out = self._gathered.left_out
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                try:
                    image = Image.open(io.BytesIO(data), formats=_formats())
                except UnidentifiedImageError:
                    fault = f"{name} is not an image that can be read" + ("" if data else ": it is empty")
                    if _ending(name) in endings:
                        raise DataError(fault) from None
                    self._unread.setdefault(_ending(name), fault)
                    return None
                with image:
                    if image.mode in ("F", "I") or image.mode.startswith("I;"):
                        raise DataError(f"{name} has more than 8 bits per pixel, which is not supported")
                    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
                    pixels = np.array(image.convert(mode))
                    if image.mode in _ALPHA or "transparency" in image.info:
                        left_out.add(ALPHA, name)
                    if getattr(image, "is_animated", False):
                        left_out.add(FRAMES, name)
                    if "exif" in image.info and _is_turned(image):
                        left_out.add(ROTATION, name)
        except DataError:
            raise
        except Exception as error:  # Pillow raises nearly anything on a broken file
            raise DataError(f"{name} is not an image that can be read: {error}") from None
        return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def parts(self) -> Parts:
        for ending in {_ending(parts[-1]) for parts, _ in self._images} - {""}:
            if ending in self._unread:
                raise DataError(self._unread[ending])
        root = self._root()
        depth = len(root)
        chosen: dict[str, list[tuple[str, _Name, Array]]] = {split: [] for split in _SPLITS}
        for parts, pixels in self._images:
            if parts[:depth] != root or parts[depth] not in _SPLITS:
                inside = next(other for other, _ in self._images if root in _roots(other[:-1]))
                raise DataError(
                    f"{'/'.join(inside)} and {'/'.join(parts)} are not of one pair of train/ and test/ "
                    "beside each other: give a folder or an archive with one data set"
                )
            if len(parts) == depth + 2:  # it lay in a folder of a class for another root
                self._gathered.left_out.add(NO_CLASS, "/".join(parts))
            else:
                chosen[parts[depth]].append((parts[depth + 1], parts, pixels))
        classes = tuple(sorted({item[0] for item in chosen["train"]}))
        for split in _SPLITS:
            if not chosen[split]:
                raise DataError(f"has no images in {split}/CLASS/")
        for extra in sorted({item[0] for item in chosen["test"]} - set(classes)):
            alike = [name for name in classes if name.casefold() == extra.casefold()]
            hint = f" (but {alike[0]!r} has: rename one of them)" if alike else ""
            raise DataError(f"the class {extra!r} has test images but no training images{hint}")
        used = {(split, item[0]) for split in _SPLITS for item in chosen[split]}
        folders = {parts[: depth + 2] for parts in self._folders if parts[:depth] == root}
        for folder in sorted(folders):
            if len(folder) == depth + 2 and folder[depth] in _SPLITS and folder[depth:] not in used:
                self._gathered.left_out.add(EMPTY, "/".join(folder))
        splits = []
        for split in _SPLITS:
            items = sorted(chosen[split], key=lambda item: item[:2])
            labels = np.array([classes.index(item[0]) for item in items], dtype=np.int64)
            splits.append((np.stack([item[2] for item in items]), labels))
        names = tuple("/".join(parts) for _, parts, _ in items)  # of the test images, the last split
        return Parts(classes, splits[0], splits[1], names)

    def _root(self) -> _Name:
        """The outermost folder with images in both train/CLASS/ and test/CLASS/, or else in one of them."""
        splits: dict[_Name, set[str]] = {}
        for parts, _ in self._images:
            for root in _roots(parts[:-1]):
                splits.setdefault(root, set()).add(parts[len(root)])
        return min(splits, key=lambda root: (len(splits[root]) < len(_SPLITS), len(root), root))


def _roots(folder: _Name) -> list[_Name]:
    """The folders above `folder` for which it is in train/CLASS/ or test/CLASS/."""
    return [folder[:i] for i, part in enumerate(folder[:-1]) if part in _SPLITS]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@functools.cache
def _formats() -> list[str]:
    """The formats that Pillow reads by itself: for EPS it would run Ghostscript."""
    from PIL import Image

    Image.preinit()
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


@functools.cache
def _endings() -> set[str]:
    """How the names of image files end. Empty without Pillow: no file is taken for an image then."""
    try:
        from PIL import Image
    except ImportError:
        return set()
    readable = [*_formats(), "EPS"]
    return {ending for ending, name in Image.registered_extensions().items() if name in readable}


def _is_turned(image: Any) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # EXIF is not needed, so it may be broken
        return False


def describe(pixels: Array) -> str:
    channels, height, width = pixels.shape
    return f"{width}x{height} {'grey' if channels == 1 else 'colour'}"
