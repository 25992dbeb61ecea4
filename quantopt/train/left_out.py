"""What a source of data holds and a data set does not, counted and named."""

from typing import NamedTuple

_EXAMPLES = 3  # names shown of each kind
_LONGEST = 80  # characters shown of a name


class Kind(NamedTuple):
    """What is said of one thing and of several; "{}" stands for their number."""

    one: str
    several: str
    verb: str = "left out"


HIDDEN_FOLDER = Kind("{} hidden folder", "{} hidden folders")
HIDDEN_FILE = Kind("{} hidden file", "{} hidden files")
SPECIAL = Kind("{} special file", "{} special files")
LOOP = Kind("{} link to a folder above it", "{} links to a folder above them")
ARCHIVE = Kind("{} archive inside", "{} archives inside")
COPY = Kind("{} copy of the file beside it", "{} copies of the files beside them")
NO_DATA = Kind("{} file of no known format", "{} files of no known format")
NO_IMAGE = Kind("{} file that is not an image", "{} files that are not images")
NO_CLASS = Kind("{} image outside a folder of a class", "{} images outside a folder of a class")
EMPTY = Kind("{} folder without images", "{} folders without images")
FRAMES = Kind("all but the first frame of {} image", "all but the first frame of {} images")
ALPHA = Kind("the alpha channel of {} image", "the alpha channels of {} images")
ROTATION = Kind("the EXIF rotation of {} image", "the EXIF rotations of {} images")
TRAINING = Kind("training images of {} class", "training images of {} classes", "missing")
TEST = Kind("test images of {} class", "test images of {} classes", "missing")


SHARED = Kind(
    "{} test image that is a training image", "{} test images that are training images", "in both splits"
)


class LeftOut:
    """Counts what is left out by kind and keeps the first names. `str()` says it in one line, "" if nothing was."""

    def __init__(self) -> None:
        self._counts: dict[Kind, int] = {}
        self._names: dict[Kind, list[str]] = {}

    def add(self, kind: Kind, name: str) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        names = self._names.setdefault(kind, [])
        if len(names) < _EXAMPLES:
            names.append(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...")

    def __str__(self) -> str:
        said: dict[str, list[str]] = {}
        for kind, count in self._counts.items():
            text = (kind.one if count == 1 else kind.several).format(f"{count:,}")
            names = ", ".join(self._names[kind]) + (", ..." if count > _EXAMPLES else "")
            said.setdefault(kind.verb, []).append(f"{text} ({names})")
        return "; ".join(f"{verb}: {', '.join(texts)}" for verb, texts in sorted(said.items()))
