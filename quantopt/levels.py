"""Level sets: what `bits` means, and the quantised form of a weight that packing reads."""

from dataclasses import dataclass

from torch import Tensor

from quantopt.reference.levels import SAWB

LEVEL_COUNT: dict[int | str, int] = {0: 0, 1: 2, 2: 4, 3: 8, 4: 16, "17-level": 17, "ternary": 3}
SCALES = ("none", "tensor", "channel", "group", "sawb")


def level_count(bits: int | str) -> int:
    """K, the number of levels: 2 for 1 bit, 2^bits for 2 to 4, 17 for "17-level" (-8..8), 3 for
    "ternary", 0 (not quantised) for 0.

    Raises ValueError for anything else.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | str) or bits not in LEVEL_COUNT:
        raise ValueError(f"bits={bits!r}: use 0 (not quantised), 1, 2, 3, 4, '17-level' or 'ternary'")
    return LEVEL_COUNT[bits]


def check_scale(scale: str, bits: int | str) -> None:
    """Raises ValueError if ``scale`` has no levels for ``bits``."""
    if scale == "sawb" and level_count(bits) not in (0, *SAWB):
        fitting = [name for name, levels in LEVEL_COUNT.items() if levels in SAWB]
        raise ValueError(
            f"scale='sawb': has no levels for bits={bits!r}; use bits of {fitting}, or scale='tensor'"
        )


@dataclass(frozen=True)
class Quantization:
    """A weight on its grid: level = max_level * (2 * code / (levels - 1) - 1).

    levels: K. codes: uint8, the weight's shape, in 0..K-1. max_level: float32, the largest level, shape [1] (per
    tensor), [rows], or [rows, ceil(elements per row / group_size)]; rows are dim 0. group_size: 0 unless per group.
    """

    levels: int
    codes: Tensor
    max_level: Tensor
    group_size: int

    @property
    def outer(self) -> Tensor:
        """max_level under its name in quantopt 0.1.0."""
        return self.max_level
