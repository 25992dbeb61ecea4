"""Image folders: what is left out is said, what does not fit is refused, links are followed."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_files import RNG, load, png, refused, write_files
from quantopt.train import data

pytestmark = pytest.mark.usefixtures("cache")


def picture(**options: object) -> bytes:
    """A random image of 6x5 colour pixels; `options` as of Pillow's `save`."""
    image = Image.fromarray(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def pets(classes=("cat", "dog")) -> dict[str, bytes]:
    return {
        f"{split}/{name}/{i}.png": picture()
        for split in ("train", "test")
        for name in classes
        for i in range(3)
    }


def frames() -> bytes:
    images = [Image.fromarray(np.full((5, 6, 3), 80 * i, np.uint8)) for i in (1, 2)]
    file = io.BytesIO()
    images[0].save(file, "TIFF", save_all=True, append_images=images[1:])
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(format="JPEG", exif=exif)


RGBA, OTHER_RGBA = (png(RNG.integers(0, 256, (5, 6, 4), dtype=np.uint8)) for _ in range(2))
SAME = picture()


@pytest.mark.parametrize("kind", ["directory", "tar", "zip"])
@pytest.mark.parametrize(
    ("files", "counts", "left_out"),
    [
        ({}, (6, 6), ""),
        ({"train/.ipynb_checkpoints/0.png": picture()}, (6, 6), "left out: 1 hidden folder (train/.ipynb_checkpoints)"),
        (
            {".git/a": b"", ".git/b/c": b"", "__MACOSX/train/cat/0.png": b"", "train/cat/@eaDir/0.png/x": b""}
            | {"lost+found/x": b""},
            (6, 6),
            "left out: 4 hidden folders (.git, __MACOSX, lost+found, ...)",
        ),
        (
            {"train/cat/._0.png": b"", ".DS_Store": b"", "test/Thumbs.db": b""},
            (6, 6),
            "left out: 3 hidden files (.DS_Store, test/Thumbs.db, train/cat/._0.png)",
        ),
        ({"train/cat/part1/3.png": picture(), "train/cat/part2/a/3.png": picture()}, (8, 6), ""),
        ({"train/cat/README": b"cats", "train/cat/labels.csv": b"", "train/cat/.gitkeep": b""}, (6, 6),
         "left out: 1 hidden file (train/cat/.gitkeep), 2 files that are not images (train/cat/README, "
         "train/cat/labels.csv)"),
        ({"README.md": b"pets", "LICENSE": b"", "train/labels.csv": b"x"}, (6, 6),
         "left out: 3 files of no known format (LICENSE, README.md, train/labels.csv)"),
        ({"train/0.png": picture(), "logo.jpg": b"", "val/cat/0.png": picture()}, (6, 6),
         "left out: 3 images outside a folder of a class (logo.jpg, train/0.png, val/cat/0.png)"),
        ({"train/owl/notes.txt": b"none yet"}, (6, 6),
         "left out: 1 file that is not an image (train/owl/notes.txt), 1 folder without images (train/owl)"),
        ({"train/owl/0.png": picture()}, (7, 6), "missing: test images of 1 class (owl)"),
        ({"train/cat/9.tif": frames()}, (7, 6), "left out: all but the first frame of 1 image (train/cat/9.tif)"),
        ({"train/cat/9.jpg": turned()}, (7, 6), "left out: the EXIF rotation of 1 image (train/cat/9.jpg)"),
        ({"train/cat/8.png": RGBA, "test/cat/9.png": OTHER_RGBA}, (7, 7),
         "left out: the alpha channels of 2 images (test/cat/9.png, train/cat/8.png)"),
        ({"train/cat/8.png": SAME, "test/dog/9.png": SAME}, (7, 7),
         "in both splits: 1 test image that is a training image (test/dog/9.png)"),
        ({"train/cat/9.zip": b"PK"}, (6, 6), "left out: 1 archive inside (train/cat/9.zip)"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_said(tmp_path, kind, files, counts, left_out, capsys):
    """Also when the data comes from the cache."""
    files = {f"./{name}": contents for name, contents in sorted((pets() | files).items())}
    source = write_files(tmp_path / "source", kind, files)
    for _ in range(2):
        dataset = load(source)
        assert (len(dataset.train_labels), len(dataset.test_labels)) == counts
        assert sorted(dataset.left_out.split(", ")) == sorted(left_out.split(", "))
        said = capsys.readouterr().err
        assert said == (f"source: {sum(counts)} images read; {dataset.left_out}\n" if left_out else "")
    data.load(source, progress=True)
    assert f"source: {sum(counts)} images read" in capsys.readouterr().err


def test_the_first_frame_and_the_rows_as_stored(tmp_path):
    files = {name: frames() for name in pets()}
    assert (load(write_files(tmp_path / "frames", "zip", files)).train_images == 80).all()
    jpeg = turned()
    dataset = load(
        write_files(tmp_path / "turned", "zip", {name.replace("png", "jpg"): jpeg for name in pets()})
    )
    stored = np.array(Image.open(io.BytesIO(jpeg))).transpose(2, 0, 1)
    assert dataset.shape == (3, 5, 6) and (dataset.train_images[0].numpy() == stored).all()


@pytest.mark.parametrize("kind", ["directory", "tar"])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train/cat/9.jpg": picture(format="JPEG")[:-200]}, "train/cat/9.jpg is not an image"),
        ({"train/cat/9.jpg": b"\xff\xd8\xff broken"}, "train/cat/9.jpg is not an image"),
        ({"train/cat/9.JPEG": b""}, "train/cat/9.JPEG is not an image that can be read: it is empty"),
        ({"train/cat/part/9.webp": b"text"}, "train/cat/part/9.webp is not an image"),
        ({"train/cat/9.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n"}, "train/cat/9.eps is not an image"),
        # an ending that other images have
        ({"train/cat/9.img": b"text", "test/cat/9.img": picture()}, "train/cat/9.img is not an image"),
        ({"test/owl/0.png": picture()}, "the class 'owl' has test images but no training images$"),
        (
            {"train/owl/0.png": picture(), "test/Owl/0.png": picture()},
            "the class 'Owl' has test images but no training images .but 'owl' has",
        ),
        ({"birds/train/owl/0.png": picture()}, "birds/train/owl/0.png.* are not of one pair of train/ and test/"),
        ({"birds/test/owl/0.png": picture()}, "birds/test/owl/0.png.* are not of one pair of train/ and test/"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, kind, files, message):
    assert re.search(message, refused(write_files(tmp_path / "source", kind, pets() | files)))


def test_no_images_for_a_split_says_what_was_left_out(tmp_path):
    files = {name.replace("test", "Test"): contents for name, contents in pets().items()}
    message = refused(write_files(tmp_path / "source", "zip", files))
    assert (
        "has no images in test/CLASS/ (left out: 6 images outside a folder of a class (Test/cat/0.png"
        in message
    )
    files = {name.replace("test", "x").replace("train", "y"): contents for name, contents in pets().items()}
    message = refused(write_files(tmp_path / "other", "zip", files))
    assert "no data found" in message and "left out: 12 images outside a folder of a class" in message


@pytest.mark.parametrize("prefix", ["", "pets/", "test/", "train/test/", "a/train/b/"])
def test_folders_named_like_a_split(tmp_path, prefix):
    """CIFAR-100 has a class "train"; the folders above, and those below a class, may have any name."""
    names = ("train", "test", "cat/train", "cat/test/x")
    files = {
        f"{prefix}{split}/{name}/{split}{i}.png": png(
            np.full((4, 4), 40 * i + 2 * j + (split == "test"), np.uint8)
        )
        for split in ("train", "test")
        for i, name in enumerate(names)
        for j in range(2)
    }
    dataset = load(write_files(tmp_path / "source", "tar", files))
    assert dataset.classes == ("cat", "test", "train") and dataset.left_out == ""
    assert dataset.train_labels.tolist() == [0, 0, 1, 2] == dataset.test_labels.tolist()


# ------------------------------------------------------------------------------------------------ directories


def test_links_in_a_directory_are_followed(tmp_path):
    root = write_files(tmp_path / "root", "directory", pets())
    store = write_files(tmp_path / "store", "directory", pets(("owl",)))
    for split in ("train", "test"):
        os.symlink(store / split / "owl", root / split / "owl")
    os.symlink(store / "train/owl/0.png", root / "train/cat/3.png")
    os.symlink(root, root / "train/cat/all")
    os.symlink("..", root / "test/up")
    dataset = load(root)
    assert dataset.classes == ("cat", "dog", "owl")
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (10, 9)
    assert dataset.left_out == "left out: 2 links to a folder above them (test/up, train/cat/all)"


def test_changes_behind_links_are_seen(tmp_path):
    root = write_files(tmp_path / "root", "directory", pets())
    store = write_files(
        tmp_path / "store", "directory", {"owl/0.png": picture(), "1.png": picture(format="BMP")}
    )
    os.symlink(store / "owl", root / "train/owl")
    os.symlink(store / "1.png", root / "train/cat/3.png")
    seen = {load(root).fingerprint()}
    (store / "owl/1.png").write_bytes(picture())
    seen.add(load(root).fingerprint())
    status = (store / "1.png").stat()
    (store / "1.png").write_bytes(picture(format="BMP"))
    os.utime(store / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (store / "1.png").stat().st_size == status.st_size  # only ctime tells
    seen.add(load(root).fingerprint())
    assert len(seen) == 3


def test_what_is_new_and_left_out_is_said(tmp_path):
    root = write_files(tmp_path / "root", "directory", pets())
    assert load(root).left_out == ""
    (root / ".git").mkdir()
    assert load(root).left_out == "left out: 1 hidden folder (.git)"
    (root / "train/owl").mkdir()
    assert load(root).left_out == "left out: 1 hidden folder (.git), 1 folder without images (train/owl)"


def test_links_that_lead_nowhere_are_refused(tmp_path):
    """As git-annex leaves them for files that were not fetched."""
    root = write_files(tmp_path / "root", "directory", pets())
    os.symlink("../../objects/1", root / "train/cat/3.png")
    assert "train/cat/3.png is a link to ../../objects/1, which does not exist" in refused(root)
    (root / "train/cat/3.png").unlink()
    os.symlink("3.png", root / "train/cat/3.png")
    assert "train/cat/3.png" in refused(root)


def test_pipes_are_not_opened(tmp_path):
    root = write_files(tmp_path / "root", "directory", pets())
    os.mkfifo(root / "train/cat/pipe.png")
    assert load(root).left_out == "left out: 1 special file (train/cat/pipe.png)"


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    root = write_files(tmp_path / "root", "directory", pets())
    scandir = os.scandir

    def deny(folder: Path) -> object:
        if Path(folder).name == "dog":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", deny)
    assert "Permission denied" in refused(root)


def test_names_that_are_no_text(tmp_path, monkeypatch):
    files = pets(("cat", "d\udcff")) | {"\udcff\n": b""}
    root = write_files(tmp_path / "root", "directory", files)
    for _ in range(2):
        dataset = load(root)
        assert dataset.classes == ("cat", "d\udcff") and len(dataset.fingerprint()) == 16
        assert dataset.left_out == r"left out: 1 file of no known format (\udcff\n)"
    monkeypatch.chdir(root)
    assert load(Path(".")).name == "root"


def test_deep_folders(tmp_path):
    files = pets() | {f"train/cat/{'d/' * 1200}0.png": picture()}
    dataset = load(write_files(tmp_path / "source", "tar", files))
    assert len(dataset.train_labels) == 7
