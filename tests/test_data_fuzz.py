"""Damaged sources of every format: an InputError, or a data set whose counts are said; never another exception."""

import gzip
import io
import pickle
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_files import RNG, cifar_batch, folder_files, idx, write_files
from quantopt.train import data
from quantopt.train.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


def images(kind: str, **options: object) -> dict[str, bytes]:
    def picture() -> bytes:
        file = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(file, kind, **options)
        return file.getvalue()

    return {name.replace("img", kind.lower()): picture() for name in folder_files()}


def pickles() -> dict[str, bytes]:
    names = {b"label_names": [b"cat", b"dog"], b"num_cases_per_batch": 1}
    return {
        "train": cifar_batch(1, 2, "training batch 1 of 1"),
        "test": cifar_batch(1, 2, "testing batch 1 of 1", protocol=4),
        "batches.meta": pickle.dumps(names, 2),
    }


def binaries() -> dict[str, bytes]:
    return {
        f"{name}.bin": b"".join(bytes([i]) + RNG.bytes(3072) for i in range(2)) for name in ("train", "test")
    }


def idx_files() -> dict[str, bytes]:
    files = {}
    for split in ("train", "t10k"):
        files[f"{split}-images.gz"] = gzip.compress(idx(RNG.integers(0, 256, (3, 4, 4), dtype=np.uint8)))
        files[f"{split}-labels"] = idx(np.arange(3, dtype=np.uint8))
    return files


SOURCES = {
    "PNG": images("PNG"),
    "JPEG": images("JPEG"),
    "GIF": images("GIF"),
    "TIFF": images("TIFF", compression="tiff_lzw"),
    "BMP": images("BMP"),
    "WEBP": images("WEBP"),
    "pickles": pickles(),
    "binaries": binaries(),
    "idx": idx_files(),
}


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Flips bits, cuts, repeats, removes, overwrites with numbers that are often limits."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 3, 10))):
        if not data:
            break
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice((1, 2, 4, 8, 64, 512, 4096)))
        what = rng.randrange(7)
        if what <= 1:
            data[start] ^= 1 << rng.randrange(8)
        elif what == 2:
            del data[start:]
        elif what == 3:
            del data[start:end]
        elif what == 4:
            data[start:start] = data[start:end]
        elif what == 5:
            data[start:end] = rng.choice((b"\0", b"\xff", b"\x80", b"7")) * (end - start)
        else:
            data[start:end] = rng.randbytes(end - start)
    return bytes(data)


def try_to_load(path, capsys) -> bool:
    capsys.readouterr()
    try:
        dataset = data.load(path)
    except InputError as error:
        assert str(error).startswith(f"--data: {path}") and str(error).isprintable()
        return False
    counts = len(dataset.train_images), len(dataset.test_images)
    assert counts == (len(dataset.train_labels), len(dataset.test_labels)) and min(counts) > 0
    assert int(dataset.train_labels.max()) < len(dataset.classes) and int(dataset.train_labels.min()) >= 0
    assert f"{path.name}: {sum(counts)} images read" in capsys.readouterr().err
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["directory", "tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
@pytest.mark.parametrize("source", SOURCES)
def test_mutations(tmp_path, capsys, kind, source):
    """A file, or the archive, is mutated."""
    rng = random.Random(f"{kind} {source}")
    files = SOURCES[source]
    assert try_to_load(write_files(tmp_path / "whole", kind, files), capsys)
    loaded = 0
    for i in range(12):
        path = tmp_path / str(i)
        if kind == "directory":
            name = rng.choice(sorted(files))
            write_files(path, kind, files | {name: mutate(files[name], rng)})
        else:
            path.write_bytes(mutate((tmp_path / "whole").read_bytes(), rng))
        loaded += try_to_load(path, capsys)
    assert loaded < 12


@pytest.mark.parametrize(
    ("field", "value"), [((124, 136), b"\x80" + b"\0" * 3 + b"\xff" * 8), ((124, 136), b"\xff" * 12)]
)
def test_sizes_that_are_none(tmp_path, field, value):
    """A size of 2**64 - 1, and one below 0."""
    path = write_files(tmp_path / "source", "tar", folder_files())
    raw = bytearray(path.read_bytes())
    raw[slice(*field)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    with pytest.raises(InputError, match="source"):
        data.load(path)


def test_pax_headers_that_are_none(tmp_path):
    for key, value in (
        ("size", "-1"),
        ("size", "99999999999999999999999"),
        ("path", ""),
        ("GNU.sparse.major", "1"),
    ):
        path = tmp_path / f"{key}{value}"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for name, contents in folder_files().items():
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(contents), {key: value, "GNU.sparse.minor": "0"}
                archive.addfile(info, io.BytesIO(contents))
        with pytest.raises(InputError, match="--data"):
            data.load(path)
