"""A small data set that trains in a moment: four classes of 8x8 images, as IDX files."""

import struct
from pathlib import Path

import numpy as np


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
