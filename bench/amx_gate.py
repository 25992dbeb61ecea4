"""In which mode a processor with AMX is (bench/amx_gate.cpp), and which samples a median is taken of.

In the slow mode the same products take 1.2 to 3.4 times as long, not all by the same factor: medians of samples of both
modes compare nothing.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
FOLDER = Path(__file__).resolve().parent.parent / "build" / "bench"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fopenmp", "-mamx-tile", "-mamx-int8")
FAST_CYCLES = (
    24.0  # of a load and a product: 16 in the fast mode, up to 20 just after other work; slow 60 and more
)
LEAST_FAST = 3  # samples; of fewer in the fast mode no median is taken

Gate = Callable[[], bool]  # whether the processor is in its fast mode now


class Seconds(float):
    """A median. ``fast``: the share of samples in the fast mode, None where there is but one mode."""

    fast: float | None
    mode: str | None

    def __new__(cls, value: float, fast: float | None = None, mode: str | None = None) -> "Seconds":
        result = super().__new__(cls, value)
        result.fast, result.mode = fast, mode
        return result


def median(seconds: Sequence[float], fast: Sequence[bool] | None) -> Seconds:
    """Of the samples in the fast mode, if they are enough, else of all.

    ``mode``: "fast" in the first case, "slow" if none was in the fast mode, else "mixed".
    """
    if fast is None:
        return Seconds(statistics.median(seconds))
    chosen = [s for s, is_fast in zip(seconds, fast, strict=True) if is_fast]
    share = len(chosen) / len(seconds)
    if len(chosen) >= min(LEAST_FAST, len(seconds)):
        return Seconds(statistics.median(chosen), share, "fast")
    return Seconds(statistics.median(seconds), share, "mixed" if chosen else "slow")


def library() -> Path:
    """The compiled gate, in build/bench under a digest of what it depends on."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise SystemExit(f"{SOURCE.name}: the gate of processors with AMX needs a C++ compiler (g++, or CXX)")
    # torch's own OpenMP, where it ships one: the gate then runs on the threads that the products run on.
    bundled = [str(path) for path in Path(torch.__file__).parent.joinpath("lib").glob("libgomp*")]
    command = [compiler, *FLAGS, str(SOURCE), *bundled]
    digest = hashlib.sha256(f"{command}{torch.__version__}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = FOLDER / f"amx_gate-{digest}.so"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            made = f"{folder}/amx_gate.so"
            subprocess.run([*command, "-o", made], check=True)
            for outdated in FOLDER.glob("amx_gate-*.so"):
                outdated.unlink(missing_ok=True)
            os.replace(made, path)
    return path


def has_tiles() -> bool:
    """Whether the processor has AMX tiles of int8."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return {"amx_tile", "amx_int8"} <= set(flags)


@functools.cache
def cycles() -> Callable[[], float] | None:
    """A function that measures the cycles of a load and a product; None without AMX, or where the system refuses it."""
    if not has_tiles():
        return None
    compiled = ctypes.CDLL(str(library()))
    if compiled.amx_gate_permission() != 0:
        return None
    compiled.amx_gate_cycles.restype = ctypes.c_double
    return compiled.amx_gate_cycles  # type: ignore[no-any-return]


def gate_of_processor() -> Gate | None:
    """None where there is but one mode."""
    measure = cycles()
    return None if measure is None else lambda: measure() < FAST_CYCLES
