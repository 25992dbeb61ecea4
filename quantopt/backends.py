"""The one place that chooses what runs an operation.

Backends: ``reference`` (pure PyTorch, any device), ``cpu`` and ``cuda`` (the compiled extension), ``triton``.
``auto`` takes the first that works of cpu or cuda, triton, reference, and says nothing; a backend asked for by name
raises :class:`BackendError` with the reason if it cannot run the operation.
"""

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from quantopt import _extension

BACKENDS = ("reference", "cpu", "cuda", "triton")

# (operation, backend): the kernels there are; each covers all rules. The reference covers everything.
_COVERS = {
    ("fused_step", "cpu"),
    ("fused_step", "cuda"),
    ("fused_step", "triton"),
    ("binary_linear", "cpu"),
    ("binary_linear", "cuda"),
    ("binary_linear", "triton"),
    ("binary_linear_odd_groups", "cpu"),
    ("binary_conv2d", "cpu"),
    ("binary_conv2d", "cuda"),
    ("binary_conv2d", "triton"),
}
# binary_linear_odd_groups: with scales that are not shared by 32, 64, 128, ... weights, or more than 8 planes.
OPERATIONS = ("fused_step", "binary_linear", "binary_linear_odd_groups", "binary_conv2d")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the operation; the message says why."""


class Choice(NamedTuple):
    """The backend that runs an operation, and the reason."""

    name: str
    why: str


def choose(operation: str, device: torch.device, dtype: torch.dtype, requested: str = "auto") -> Choice:
    """The backend for ``operation`` (one of :data:`OPERATIONS`) on tensors of ``dtype`` on ``device``.

    Raises ValueError for an unknown ``requested``, BackendError if it cannot run.
    """
    decide = _choose.__wrapped__ if torch.compiler.is_compiling() else _choose  # dynamo traces no cache
    kind = device.type
    # os.environ is slow, and auto does not run Triton's interpreter on the CPU.
    ask = kind != "cpu" or requested != "auto"
    interpret = os.environ.get("TRITON_INTERPRET", "0") if ask else "0"
    capability = _capability(device.index) if kind == "cuda" else 0
    return decide(operation, kind, dtype, requested, interpret, capability)


_CAPABILITIES: dict[int | None, int] = {}  # a plain dict, which dynamo traces


def _capability(index: int | None) -> int:
    """Compute capability of a CUDA device: 80, 90, ...; 0 where there is none to ask."""
    if index not in _CAPABILITIES:
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return 0
        properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
        _CAPABILITIES[index] = 10 * int(properties.major) + int(properties.minor)
    return _CAPABILITIES[index]


@functools.cache
def _choose(
    operation: str, device: str, dtype: torch.dtype, requested: str, interpret: str, capability: int = 0
) -> Choice:
    if requested == "auto":
        refusals = []
        for name in ("cpu", "cuda", "triton"):
            if (name == "cpu") != (device == "cpu"):
                continue  # auto does not run Triton's interpreter
            refusal = _refusal(operation, name, device, dtype, interpret, capability)
            if refusal is None:
                return Choice(name, f"the best for {device} tensors")
            refusals.append(f"{name}: {refusal}")
        return Choice("reference", "; ".join(refusals) or f"no kernels for {device} tensors")
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r}: use 'auto' or one of {BACKENDS}")
    refusal = _refusal(operation, requested, device, dtype, interpret, capability)
    if refusal is not None:
        raise BackendError(f"backend={requested!r} cannot run {operation}: {refusal}")
    return Choice(requested, "asked for by name")


def _refusal(
    operation: str, backend: str, device: str, dtype: torch.dtype, interpret: str, capability: int
) -> str | None:
    """Why ``backend`` cannot run the operation, or None if it can."""
    if backend == "reference":
        return None
    if (operation, backend) not in _COVERS:
        return f"there is no {backend} kernel for {operation}"
    if dtype not in _KERNEL_DTYPES:
        return f"no kernel for {dtype}; the reference runs it"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        if device != "cuda" and interpret != "1":
            return f"Triton runs on CUDA tensors, not {device} (or in its interpreter: TRITON_INTERPRET=1)"
    else:
        if _extension.error is not None:
            return _extension.error
        if device != backend:
            return f"it runs on {backend} tensors, not {device}"
        if backend == "cuda" and not _extension.build_info()["cuda_archs"]:
            return "the extension was built without CUDA; install the CUDA toolkit and rebuild with QUANTOPT_CUDA=1"
        if backend == "cuda" and capability and not _built_for(capability):
            return (
                f"the extension was built for compute capability {_extension.build_info()['cuda_archs']}, the device "
                f"has {capability}; rebuild with QUANTOPT_CUDA_ARCHS"
            )
    return None


def _built_for(capability: int) -> bool:
    """Machine code of the same major version and no newer minor one, or PTX of the newest architecture."""
    named = _extension.build_info()["cuda_archs"]
    if f"{capability}a" in named:
        return True
    archs = [int(arch) for arch in named if arch.isdigit()]
    return any(
        arch <= capability and (arch // 10 == capability // 10 or arch == max(archs)) for arch in archs
    )
