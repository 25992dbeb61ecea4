"""Data sets: every format, the cache, hostile files."""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quantopt.train import data, sources, unpickle
from quantopt.train.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


def load(path) -> data.Dataset:
    return data.load(path, progress=False)


RNG = np.random.default_rng(0)


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


def idx(array: np.ndarray) -> bytes:
    return (
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )


def write_mnist(folder: Path, compress: bool = False) -> dict[str, np.ndarray]:
    arrays = {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (7, 5, 4), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(7, dtype=np.uint8) % 3,
        "t10k-images-idx3-ubyte": RNG.integers(0, 256, (3, 5, 4), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.array([2, 0, 1], dtype=np.uint8),
    }
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        contents = idx(array)
        (folder / f"{name}{'.gz' if compress else ''}").write_bytes(
            gzip.compress(contents) if compress else contents
        )
    return arrays


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
        (lambda raw: gzip.compress(raw)[:-9], "train-images-idx3-ubyte is truncated"),
        (lambda raw: b"", "images and one of labels for training"),
    ],
)
def test_damaged_idx(tmp_path, damage, message):
    write_mnist(tmp_path / "mnist")
    file = tmp_path / "mnist" / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=message) as raised:
        load(tmp_path / "mnist")
    assert str(raised.value).startswith("--data: ")


# ------------------------------------------------------------------------------------------------ CIFAR


def cifar_batch(count: int, classes: int, label: str, protocol: int = 2, fine: bool = False) -> bytes:
    key = b"fine_labels" if fine else b"labels"
    contents = {
        b"batch_label": label.encode(),
        key: [i % classes for i in range(count)],
        b"data": RNG.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"filenames": [b"x.png"] * count,
    }
    return pickle.dumps(contents, protocol)


# As Python 2's cPickle writes {'batch_label': 'testing batch', 'labels': [1], 'data': np.full((1, 3072), 65, 'uint8')}
PYTHON2 = (
    b"\x80\x02}q\x01(U\x0bbatch_labelU\x0dtesting batchU\x06labels]K\x01aU\x04data"
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x01M\x00\x0c\x86"
    b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"T\x00\x0c\x00\x00" + b"A" * 3072 + b"tbu."
)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_pickles(tmp_path, protocol):
    batches = [cifar_batch(4, 2, f"training batch {i} of 2", protocol) for i in (1, 2)]
    for i, batch in enumerate(batches):
        (tmp_path / f"data_batch_{i}").write_bytes(batch)
    (tmp_path / "some test").write_bytes(PYTHON2)
    names = {b"label_names": [b"cat", b"dog"], b"num_vis": 3072}
    (tmp_path / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    dataset = load(tmp_path)
    assert dataset.classes == ("cat", "dog") and dataset.shape == (3, 32, 32)
    expected = np.concatenate([pickle.loads(batch)[b"data"] for batch in batches]).reshape(8, 3, 32, 32)
    assert np.array_equal(dataset.train_images.numpy(), expected)
    assert dataset.train_labels.tolist() == [0, 1] * 4
    assert dataset.test_labels.tolist() == [1] and (dataset.test_images == 65).all()


def test_cifar100_pickles_in_an_archive(tmp_path):
    with tarfile.open(tmp_path / "noname", "w:gz") as archive:
        for name, label in (("train", "training batch 1 of 1"), ("test", "testing batch 1 of 1")):
            add_to_tar(archive, f"cifar-100-python/{name}", cifar_batch(5, 5, label, fine=True))
    dataset = load(tmp_path / "noname")
    assert len(dataset.classes) == 5 and len(dataset.train_images) == len(dataset.test_images) == 5


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary(tmp_path, classes):
    prefix = 1 if classes == 10 else 2
    records = RNG.integers(0, 256, (6, prefix + 3072), dtype=np.uint8)
    records[:, :prefix] = 0
    records[:, prefix - 1] = np.array([0, 1, 2, 3, 4, classes - 1])
    (tmp_path / "a_train.bin").write_bytes(records[:4].tobytes())
    (tmp_path / "a_test.bin").write_bytes(records[4:].tobytes())
    dataset = load(tmp_path)
    assert len(dataset.classes) == classes
    assert np.array_equal(dataset.train_images.numpy().reshape(4, -1), records[:4, prefix:])
    assert dataset.test_labels.tolist() == [4, classes - 1]


class Hostile:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_hostile_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    import os

    for function, arguments in ((os.mkdir, (str(marker),)), (eval, (f"open({str(marker)!r}, 'w')",))):
        folder = tmp_path / function.__name__
        folder.mkdir()
        hostile = pickle.dumps({b"data": Hostile(function, *arguments)})
        (folder / "data_batch_1").write_bytes(hostile)
        with pytest.raises(InputError, match=r"data_batch_1 cannot be read: it asks for .*refused"):
            load(folder)
        assert not marker.exists()
        pickle.loads(hostile)  # shows that the pickle would do its work
        assert marker.exists()
        marker.rmdir() if marker.is_dir() else marker.unlink()


@pytest.mark.parametrize(
    "contents",
    [
        b"\x80\x02.",
        b"\x80\x02}",
        b"\x80\x02K\x01.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02cnumpy\nndarray\n}q\x00b.",  # changes a class
        b"\x80\x02cnumpy\ndtype\n}q\x00b.",  # changes a function
        b"\x80\x02cnumpy\nndarray\nK\x01\x85R.",
        b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",  # object arrays
        PYTHON2.replace(b"\x00\x0c\x86", b"\xff\xff\x86"),  # more elements than bytes
        PYTHON2[:-100],
        b"\x80\x05" + b"(" * 10 + b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # a huge length
    ],
)
def test_malformed_pickles_are_refused(contents):
    with pytest.raises(pickle.UnpicklingError):
        unpickle.loads(contents)


def test_pickles_of_something_else(tmp_path):
    for contents, message in (
        ({b"weights": 1}, "no `data` array"),
        ({b"data": np.zeros((2, 10), np.uint8), b"labels": [0, 1]}, "is not CIFAR"),
        ({b"data": np.zeros((2, 3072), np.float64), b"labels": [0, 1]}, "is not CIFAR"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "is not CIFAR"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": 3}, "no `data` array"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, None]}, "not integers"),
    ):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(contents, 2))
        with pytest.raises(InputError, match=message):
            load(tmp_path)


# ------------------------------------------------------------------------------------------------ image folders


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder_files() -> dict[str, bytes]:
    files = {}
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                files[f"pets/{split}/{name}/{i}.img"] = png(np.full((6, 5, 3), 100 * label + i, np.uint8))
    return files


def add_to_tar(archive: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    archive.addfile(info, io.BytesIO(contents))


def write_files(path: Path, kind: str, files: dict[str, bytes]) -> Path:
    if kind == "directory":
        for name, contents in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(contents)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, contents in files.items():
                archive.writestr(name, contents)
    else:
        with tarfile.open(path, f"w:{kind.partition('.')[2]}") as archive:
            for name, contents in files.items():
                add_to_tar(archive, name, contents)
    return path


@pytest.mark.parametrize("kind", ["directory", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_image_folders(tmp_path, kind):
    files = dict(reversed(folder_files().items())) | {
        "pets/train/cat/.DS_Store": b"x",
        "pets/LICENSE": b"free",
    }
    dataset = load(write_files(tmp_path / "source", kind, files))
    assert dataset.classes == ("cat", "dog") and dataset.shape == (3, 6, 5)
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert dataset.test_images[:, 2, 5, 4].tolist() == [0, 1, 100, 101]


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
    with pytest.raises(InputError, match="no data found in"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match=r"nowhere does not exist.*digits"):
        load(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ archives


def test_names_in_an_archive_reach_no_file(tmp_path):
    """Traversal, absolute names, links and devices: nothing is written, and links are not followed."""
    (tmp_path / "inside").mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(np.full((6, 5, 3), 77, np.uint8)))
    path = tmp_path / "inside" / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        for name, contents in folder_files().items():
            add_to_tar(archive, name, contents)
        add_to_tar(archive, "../../train/cat/escaped.png", png(np.full((6, 5, 3), 9, np.uint8)))
        add_to_tar(archive, f"{tmp_path}/train/cat/absolute.png", png(np.full((6, 5, 3), 9, np.uint8)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("pets/train/cat/link.png")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    dataset = load(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(dataset.train_images) == 8 and not (dataset.train_images == 77).any()
    with zipfile.ZipFile(tmp_path / "inside" / "hostile.zip", "w") as archive:
        for name, contents in folder_files().items():
            archive.writestr(f"../../{name}", contents)
    assert len(load(tmp_path / "inside" / "hostile.zip").train_images) == 6
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "inside" / "hostile.zip"])


def test_bombs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_MEMBER", 1 << 16)
    bomb = gzip.compress(bytes(1 << 20))
    for kind, name, contents in (
        ("directory", "train-images.gz", bomb),
        ("zip", "pets/train/cat/0.img", bytes(1 << 20)),
        ("tar.xz", "pets/train/cat/0.img", bytes(1 << 20)),
    ):
        with pytest.raises(InputError, match=f"{name} is larger"):
            load(write_files(tmp_path / kind, kind, {name: contents}))


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_truncated_archives(tmp_path, kind):
    noise = {
        f"pets/train/cat/{i}.img": png(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for i in range(6)
    }
    source = write_files(tmp_path / "source", kind, noise)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(InputError, match=r"--data: .*source"):
        load(source)


def test_encrypted_zip(tmp_path):
    source = write_files(tmp_path / "source", "zip", folder_files())
    raw = bytearray(source.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = raw.find(signature)
        while start >= 0:
            raw[start + offset] |= 1
            start = raw.find(signature, start + 4)
    source.write_bytes(raw)
    with pytest.raises(InputError, match="is encrypted"):
        load(source)


# ------------------------------------------------------------------------------------------------ cache


def count_decoding(monkeypatch) -> list[str]:
    decoded = []
    original = data._decode

    def decode(path, progress):
        decoded.append(path.name)
        return original(path, progress)

    monkeypatch.setattr(data, "_decode", decode)
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


@pytest.mark.parametrize("damage", [lambda raw: raw[:50], lambda raw: raw[:-3] + b"abc", lambda raw: b""])
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
