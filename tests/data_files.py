"""Small data sets as files, for the tests of `quantopt.train.data`."""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantopt.train import data
from quantopt.train.errors import InputError

RNG = np.random.default_rng(0)


def load(path: Path) -> data.Dataset:
    return data.load(path, progress=False)


def refused(path: Path) -> str:
    """Loads what must be refused; returns the message, which names the source."""
    with pytest.raises(InputError) as raised:
        load(path)
    assert str(raised.value).startswith(f"--data: {path}")
    return str(raised.value)


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


def cifar_batch(count: int, classes: int, label: str, protocol: int = 2, fine: bool = False) -> bytes:
    key = b"fine_labels" if fine else b"labels"
    contents = {
        b"batch_label": label.encode(),
        key: [i % classes for i in range(count)],
        b"data": RNG.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"filenames": [b"x.png"] * count,
    }
    return pickle.dumps(contents, protocol)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder_files() -> dict[str, bytes]:
    files = {}
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                files[f"pets/{split}/{name}/{i}.img"] = png(
                    np.full((6, 5, 3), 100 * label + 10 * count + i, np.uint8)
                )
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
