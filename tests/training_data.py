"""A small data set that trains in a moment, four classes of 8x8 images as IDX files, and comparisons of runs."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantopt.train import data
from quantopt.train.config import Config
from quantopt.train.loop import Result, train


def write_patterns(folder: Path, train: int = 160, test: int = 60, size: int = 8) -> Path:
    """Writes noisy copies of one random pattern per class; returns `folder`."""
    rng = np.random.default_rng(7)
    patterns = rng.integers(0, 256, (4, size, size))
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = np.clip(patterns[labels] + rng.normal(0, 90, (count, size, size)), 0, 255).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


CONFIG = Config(data="patterns", epochs=4, batch_size=32)


def run(dataset: data.Dataset, **changes: Any) -> Result:
    """Trains by CONFIG with some changes; `out` as in `train`."""
    out = changes.pop("out", None)
    return train(dataclasses.replace(CONFIG, **changes), dataset, out=out, progress=False)


def assert_equal(a: object, b: object, where: str = "checkpoint") -> None:
    """Bitwise equality of nested state."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        same = torch.equal(
            a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
        )
        assert same, f"{where} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "update_seconds"):
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)
