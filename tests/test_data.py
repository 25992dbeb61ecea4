"""Data sets: digits, image folders, IDX files, the cache."""

import gzip
import io
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data_files import RNG, folder_files, idx, load, png, refused, write_files, write_mnist
from quantopt.train import data, formats
from quantopt.train.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


# ------------------------------------------------------------------------------------------------ digits


def test_digits_split_is_stratified_and_always_the_same():
    first, second = data.load("digits"), data.load("digits")
    assert first.shape == (1, 8, 8) and first.classes == tuple("0123456789")
    assert (len(first.train_labels), len(first.test_labels)) == (1437, 360)
    assert first.train_images.dtype == torch.uint8 and first.train_labels.dtype == torch.int64
    assert first.fingerprint() == second.fingerprint() == "3b098431d7f20cb8"
    assert set(first.test_labels.bincount().tolist()) <= {35, 36, 37}
    assert int(first.train_images.max()) == 255 and int(first.train_images.min()) == 0
    train = {bytes(image.numpy().tobytes()) for image in first.train_images}
    test = [image.numpy().tobytes() for image in first.test_images]
    assert not any(image in train for image in test)


def test_parts_are_balanced_and_disjoint():
    whole = data.digits()
    held_out = whole.validation(95)
    part = held_out.limited(203)
    assert torch.bincount(part.train_labels).tolist() == [20] * 10
    assert torch.bincount(held_out.test_labels).tolist() == [9] * 10
    assert len(held_out.train_labels) + len(held_out.test_labels) == len(whole.train_labels)
    images = {tuple(image.flatten().tolist()) for image in part.train_images}
    assert not images & {tuple(image.flatten().tolist()) for image in held_out.test_images}
    assert torch.equal(part.train_labels, part.limited(203).train_labels)
    zeros = whole.train_images[whole.train_labels == 0]
    assert torch.equal(part.train_images[part.train_labels == 0], zeros[:20])  # the first of their class
    assert torch.equal(held_out.test_images[held_out.test_labels == 0], zeros[-9:].flip(0))  # and the last


def test_statistics_are_those_of_the_training_images():
    dataset = data.load("digits")
    mean, deviation = dataset.statistics()
    values = dataset.train_images.double()
    assert mean == pytest.approx([values.mean().item()], rel=1e-12)
    assert deviation == pytest.approx([values.std(correction=0).item()], rel=1e-12)


# ------------------------------------------------------------------------------------------------ IDX


@pytest.mark.parametrize("compress", [False, True])
def test_idx(tmp_path, compress):
    arrays = write_mnist(tmp_path / "any name", compress)
    (tmp_path / "any name" / "README").write_text("nothing to see")
    dataset = load(tmp_path / "any name")
    assert dataset.shape == (1, 5, 4) and dataset.classes == ("0", "1", "2")
    assert np.array_equal(dataset.train_images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(dataset.test_labels.numpy(), arrays["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "train-images-idx3-ubyte is damaged"),
        (lambda raw: raw + b"x", "train-images-idx3-ubyte is damaged"),
        (lambda raw: raw[:2] + b"\x0d" + raw[3:], "type 0x0d"),
        (lambda raw: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], "train-images-idx3-ubyte is damaged"),
        (lambda raw: raw[:4] + struct.pack(">I", 6) + raw[8:-20], "6 images.*7 labels"),
        (lambda raw: gzip.compress(raw)[:-9], "train-images-idx3-ubyte cannot be read"),
        (lambda raw: b"", "train-images-idx3-ubyte is empty"),
        (lambda raw: b"\1" + raw[1:], "train-images-idx3-ubyte is damaged: it has no IDX header"),
        (lambda raw: raw[:3] + b"\2" + raw[4:], "an IDX file of 2 dimensions"),
    ],
)
def test_damaged_idx(tmp_path, damage, message):
    write_mnist(tmp_path / "mnist")
    file = tmp_path / "mnist" / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=message) as raised:
        load(tmp_path / "mnist")
    assert str(raised.value).startswith("--data: ")


def mnist_files(folder: str = "", classes: int = 3) -> dict[str, bytes]:
    files = {}
    for split, count in (("train", 7), ("t10k", 4)):
        images = RNG.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        files[f"{folder}{split}-images-idx3-ubyte"] = idx(images)
        files[f"{folder}{split}-labels-idx1-ubyte"] = idx(np.arange(count, dtype=np.uint8) % classes)
    return files


def only(word: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: contents for name, contents in files.items() if word in name}


def test_files_beside_their_compressed_copies(tmp_path):
    """As torchvision leaves them in MNIST/raw."""
    files = mnist_files("MNIST/raw/")
    both = files | {f"{name}.gz": gzip.compress(contents) for name, contents in files.items()}
    dataset = load(write_files(tmp_path / "source", "directory", both))
    assert dataset.fingerprint() == load(write_files(tmp_path / "plain", "zip", files)).fingerprint()
    assert dataset.left_out.startswith(
        "left out: 4 copies of the files beside them (MNIST/raw/t10k-images-idx3-"
    )
    name = "MNIST/raw/t10k-labels-idx1-ubyte"
    both[f"{name}.gz"] = gzip.compress(idx(np.zeros(4, np.uint8)))
    message = refused(write_files(tmp_path / "other", "directory", both))
    assert f"{name} and {name}.gz differ in contents" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            mnist_files("MNIST/") | mnist_files("FashionMNIST/"),
            "FashionMNIST/train-images-idx3-ubyte and MNIST/train-images-idx3-ubyte are both images for training",
        ),
        (
            only("train", mnist_files("MNIST/")) | only("t10k", mnist_files("FashionMNIST/")),
            "MNIST/train-images-idx3-ubyte and FashionMNIST/t10k-images-idx3-ubyte lie in different folders",
        ),
        (
            only("images", mnist_files("MNIST/")) | only("labels", mnist_files("FashionMNIST/")),
            "MNIST/train-images-idx3-ubyte and FashionMNIST/train-labels-idx1-ubyte lie in different folders",
        ),
        (
            mnist_files("raw/emnist-letters-") | mnist_files("raw/emnist-digits-"),
            "raw/emnist-digits-train-images-idx3-ubyte and raw/emnist-letters-train-images-idx3-ubyte are both",
        ),
        (
            only("images", mnist_files("emnist-letters-")) | only("labels", mnist_files("emnist-digits-")),
            "emnist-letters-train-images-idx3-ubyte and emnist-digits-train-labels-idx1-ubyte are of different",
        ),
        (
            only("images", mnist_files()) | only("t10k", mnist_files()),
            "of images and one of labels for training .* there is none of labels, but t10k-images-idx3-ubyte, ",
        ),
        (
            mnist_files() | {"t10k-labels-idx1-ubyte": idx(np.zeros(5, np.uint8))},
            "t10k-images-idx3-ubyte has 4 images, t10k-labels-idx1-ubyte has 5 labels",
        ),
        (
            mnist_files("train-test-"),
            "train-test-t10k-images-idx3-ubyte is named after training and testing: rename it",
        ),
        (
            only("labels", mnist_files())
            | {"train-labels-idx1-ubyte": idx(np.zeros(4, np.uint8))}
            | dict.fromkeys(only("images", mnist_files()), idx(np.ones((4, 2, 2), np.uint8))),
            "train-images-idx3-ubyte and t10k-images-idx3-ubyte hold the same images",
        ),
        (mnist_files(classes=1), "has a single class"),
    ],
)  # fmt: skip
def test_idx_files_that_do_not_fit(tmp_path, files, message):
    assert re.search(message, refused(write_files(tmp_path / "source", "directory", files)))


def test_idx_files_in_a_folder_for_each_split(tmp_path):
    files = only("train-", mnist_files("train/")) | only("t10k", mnist_files("test/"))
    assert len(load(write_files(tmp_path / "source", "tar", files)).test_labels) == 4


def test_a_class_without_images_is_said(tmp_path):
    """The labels of EMNIST's letters begin with 1."""
    files = mnist_files() | {"t10k-labels-idx1-ubyte": idx(np.array([1, 2, 4, 4], np.uint8))}
    files["train-labels-idx1-ubyte"] = idx(np.array([1, 2, 3, 3, 3, 2, 1], np.uint8))
    dataset = load(write_files(tmp_path / "source", "directory", files))
    assert dataset.classes == ("0", "1", "2", "3", "4")
    assert dataset.left_out == (
        "missing: training images of 2 classes (0, 4), test images of 2 classes (0, 3)"
    )


def test_files_of_torch_are_no_batches(tmp_path):
    """As older versions of torchvision leave them in MNIST/processed."""
    files = mnist_files("raw/") | {"processed/training.pt": pickle.dumps(1, 2)}
    dataset = load(write_files(tmp_path / "source", "directory", files))
    assert dataset.left_out == "left out: 1 file of no known format (processed/training.pt)"


def idx_files(train: list[int], test: list[int]) -> dict[str, bytes]:
    files = {}
    for split, labels in (("train", train), ("t10k", test)):
        files[f"{split}-images-idx3-ubyte"] = idx(RNG.integers(0, 256, (len(labels), 5, 4), dtype=np.uint8))
        files[f"{split}-labels-idx1-ubyte"] = idx(np.array(labels, np.uint8))
    return files


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_a_wild_label_is_no_class(tmp_path, split):
    digits = list(range(10))
    wild = [*digits[:4], 200, *digits[5:]]
    files = idx_files(*((wild, digits) if split == "train" else (digits, wild)))
    expected = "image 4 has the label 200, and only 11 of the labels 0..200 have images"
    assert f"{split}-labels-idx1-ubyte: {expected}" in refused(write_files(tmp_path / "s", "zip", files))


@pytest.mark.parametrize(("first", "end"), [(0, 47), (0, 62), (1, 27)])  # balanced, byclass, letters
def test_the_labels_of_emnist(tmp_path, first, end):
    labels = list(range(first, end))
    dataset = load(write_files(tmp_path / "s", "zip", idx_files(labels, labels)))
    assert len(dataset.classes) == end and dataset.train_labels.tolist() == labels


def test_images_of_both_splits_are_counted(tmp_path, capsys):
    files = idx_files([0, 1, 0], [1, 0])
    names = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
    train, test = (np.frombuffer(files[name], np.uint8).copy() for name in names)
    test[-20:] = train[16:36]  # the last test image is the first training image
    files[names[1]] = test.tobytes()
    dataset = load(write_files(tmp_path / "s", "zip", files))
    assert dataset.left_out == "in both splits: 1 test image that is a training image (number 1)"
    assert dataset.left_out in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ image folders


@pytest.mark.parametrize("kind", ["directory", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_image_folders(tmp_path, kind):
    files = dict(reversed(folder_files().items())) | {
        "pets/train/cat/.DS_Store": b"x",
        "pets/LICENSE": b"free",
    }
    dataset = load(write_files(tmp_path / "source", kind, files))
    assert dataset.classes == ("cat", "dog") and dataset.shape == (3, 6, 5)
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images[:, 0, 0, 0].tolist() == [30, 31, 32, 130, 131, 132]
    assert dataset.test_images[:, 2, 5, 4].tolist() == [20, 21, 120, 121]


def test_channel_order_and_palettes(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 200, 50
    files = folder_files() | {"pets/test/cat/0.img": b""}
    files = {name: png(pixels) for name in files}
    palette = io.BytesIO()
    Image.fromarray(pixels).convert("P").save(palette, "GIF")
    rgba = np.concatenate([pixels, np.full((4, 4, 1), 9, np.uint8)], axis=2)
    files["pets/train/cat/0.img"], files["pets/train/cat/1.img"] = palette.getvalue(), png(rgba)
    dataset = load(write_files(tmp_path / "source", "zip", files))
    assert dataset.shape == (3, 4, 4)
    assert (dataset.train_images[1:, 0] == 200).all() and (dataset.train_images[1:, 2] == 50).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pets/train/dog/1.img": b"\x89PNG\r\n\x1a\nbroken"}, "pets/train/dog/1.img is not an image"),
        ({"pets/train/dog/1.img": b""}, "pets/train/dog/1.img is not an image"),
        (
            {"pets/train/dog/1.img": png(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8))[:60]},
            "pets/train/dog/1.img",
        ),
        ({"pets/train/dog/1.img": png(np.zeros((6, 4, 3), np.uint8))}, "5x6 colour.*dog/1.img is 4x6 colour"),
        ({"pets/train/dog/1.img": png(np.zeros((6, 5), np.uint8))}, "5x6 colour.*dog/1.img is 5x6 grey"),
        ({"pets/train/dog/1.img": png(np.zeros((6, 5), np.uint16))}, "dog/1.img has more than 8 bits"),
        (
            {"pets/test/cow/1.img": png(np.zeros((6, 5, 3), np.uint8))},
            "'cow' has test images but no training",
        ),
        ({"t10k-labels": idx(np.zeros(3, np.uint8))}, "more than one data set"),
    ],
)
@pytest.mark.parametrize("kind", ["directory", "tar.gz"])
def test_bad_image_folders(tmp_path, cache, kind, changed, message):
    source = write_files(tmp_path / "source", kind, folder_files() | changed)
    with pytest.raises(InputError, match=message):
        load(source)
    assert not cache.exists() or not any(cache.iterdir())


def test_missing_parts(tmp_path):
    only = {name: contents for name, contents in folder_files().items() if "/train/" in name}
    with pytest.raises(InputError, match="no images in test/CLASS/"):
        load(write_files(tmp_path / "a", "zip", only))
    single = {name: contents for name, contents in folder_files().items() if "/cat/" in name}
    with pytest.raises(InputError, match="a single class"):
        load(write_files(tmp_path / "b", "zip", single))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no data found"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match=r"nowhere does not exist.*digits"):
        load(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ cache


def count_decoding(monkeypatch) -> list[str]:
    decoded = []
    original = formats.read

    def read(path, left_out, progress):
        decoded.append(path.name)
        return original(path, left_out, progress)

    monkeypatch.setattr(formats, "read", read)
    return decoded


def test_cache_is_used_until_the_source_changes(tmp_path, cache, monkeypatch):
    decoded = count_decoding(monkeypatch)
    source = write_files(tmp_path / "source", "directory", folder_files())
    first = load(source)
    second = load(source)
    assert len(decoded) == 1 and len(list(cache.iterdir())) == 1
    assert first.fingerprint() == second.fingerprint() and second.classes == first.classes
    (source / "pets/train/cat/3.img").write_bytes(png(np.zeros((6, 5, 3), np.uint8)))
    assert len(load(source).train_images) == 7 and len(decoded) == 2


def test_cache_is_not_used_by_another_reader(tmp_path, monkeypatch):
    decoded = count_decoding(monkeypatch)
    source = write_files(tmp_path / "source", "zip", folder_files())
    load(source)
    monkeypatch.setattr(data, "_CACHE_VERSION", "another")
    load(source)
    assert len(decoded) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.replace(b"cat", b"cut"),
        lambda raw: raw[:50],
        lambda raw: raw[:-3] + b"abc",
        lambda raw: b"",
    ],
)
def test_damaged_cache_is_rebuilt(tmp_path, cache, monkeypatch, damage):
    decoded = count_decoding(monkeypatch)
    source = write_files(tmp_path / "source", "zip", folder_files())
    expected = load(source).fingerprint()
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert load(source).fingerprint() == expected and len(decoded) == 2
    assert load(source).fingerprint() == expected and len(decoded) == 2


def test_unwritable_cache_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(write_files(tmp_path / "source", "zip", folder_files())).train_images) == 6
    assert "not cached" in capsys.readouterr().err
