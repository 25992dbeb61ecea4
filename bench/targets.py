"""How many times faster than its peer a product with packed weights is to be, by the kind of processor."""

import torch

from quantopt import _extension

COLUMNS = {"amx": 0, "avx512vnni": 1, "avx512": 1}  # of TARGETS, by the instruction set of the kernels

# (case, peer) -> on processors with AMX, on those with AVX-512 and without AMX; layers of SIZE x SIZE. One thread.
SIZE = 4096
TARGETS: dict[tuple[str, str], tuple[float, float]] = {
    ("M=1 int8", "torch int8"): (8, 7),
    ("M=1 int8", "torch bf16"): (20, 20),
    ("M=1 int8", "torch fp32"): (25, 25),
    ("M=2 int8", "torch int8"): (6, 4),
    ("M=4 int8", "torch int8"): (6, 3.5),
    ("M=8 int8", "torch int8"): (5, 2.6),
    ("M=16 int8", "torch int8"): (5, 2.3),
    ("M=32 int8", "torch int8"): (4.5, 2.2),
    ("M=128 int8", "torch int8"): (2.5, 2.1),
    ("M=128 int8", "torch bf16"): (4.5, 4.3),
    ("M=512 int8", "torch int8"): (2, 2),
    ("M=512 int8", "torch bf16"): (3, 4),
    ("M=8 exact, bf16 x", "torch bf16"): (7, 9),
    ("M=32 exact, bf16 x", "torch bf16"): (5, 4),
    ("M=128 exact, bf16 x", "torch bf16"): (2.5, 1.5),
    ("M=512 exact, bf16 x", "torch bf16"): (1.8, 1.4),
    ("M=8 exact", "torch fp32"): (15, 15),
    ("M=32 exact", "torch fp32"): (8, 8),
    ("M=128 exact", "torch fp32"): (4.5, 3.8),
    ("M=512 exact", "torch fp32"): (3.5, 3.5),
    **{
        (f"M={rows}, scales of {group}, {mode}", "torch bf16"): targets
        for group in (64, 128)
        for rows, mode, targets in (
            (1, "int8", (12, 12)),
            (8, "int8", (10, 6)),
            (128, "int8", (4, 2.5)),
            (1, "exact, bf16 x", (8, 8)),
            (128, "exact, bf16 x", (1.6, 1.2)),
        )
    },
    ("weights from memory, int8", "torch int8"): (8, 8),
    ("weights from memory, int8", "torch bf16"): (15, 15),
    ("weights from memory, int8", "torch fp32"): (25, 25),
    ("conv 256x256x3x3 on 8x16x16, int8", "torch bf16"): (2.2, 3.5),
    ("conv 512x512x3x3 on 8x16x16, int8", "torch bf16"): (2, 3),
    ("conv 64x64x3x3 on 8x32x32, int8", "torch bf16"): (1.5, 2),
    ("sweep, the least", "the better of torch int8 and bf16"): (1, 1),
    ("sweep, geometric mean", "the better of torch int8 and bf16"): (2.5, 2.2),
    ("mlp, exact", "torch fp32"): (5, 5),
    ("mlp, int8", "torch fp32"): (5, 5),
    **{
        (f"{network} 32x32, batch {batch}", "torch bf16 channels_last"): target
        for network in ("vgg16", "resnet18")
        for batch, target in ((1, (4, 4)), (64, (2.5, 2.5)))
    },
    ("resnet50 224x224, batch 1", "torch bf16 channels_last"): (2, 2),
    ("vit-s 224x224, batch 1", "torch bf16 channels_last"): (2, 2),
    ("M=1, scales of 128, int8", "llama.cpp Q1_0"): (2, 2),
    ("M=128, scales of 128, int8", "llama.cpp Q1_0"): (20, 6),
}
TWO_THREADS = 1.7  # times the speed of one


def active_isa() -> str:
    """The instruction set of the kernels, "" without the extension."""
    return "" if _extension.error is not None else torch.ops.quantopt.cpu_isa()


def of(case: str, peer: str, size: int = SIZE) -> float | None:
    """The target of this processor; None for other cases, sizes, numbers of threads and processors."""
    found, isa = TARGETS.get((case, peer)), active_isa()
    if found is None or isa not in COLUMNS or size != SIZE or torch.get_num_threads() != 1:
        return None
    return found[COLUMNS[isa]]
