"""The one place that chooses what runs an operation.

Backends: ``reference`` (pure PyTorch, any device), ``cpu`` and ``cuda`` (the compiled extension), ``triton``.
``auto`` takes the first that works of cpu or cuda, triton, reference, and says nothing; a backend asked for by name
raises :class:`BackendError` with the reason if it cannot run the operation. Which products with packed weights the
kernels of GPUs leave to the reference stands in :data:`LIMITS`.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from quantopt import _extension, extras

BACKENDS = ("reference", "cpu", "cuda", "triton")

OPERATIONS = ("fused_step", "binary_linear", "binary_conv2d")  # cpu, cuda, triton and the reference have each
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the operation; the message says why."""


class Choice(NamedTuple):
    """The backend that runs an operation, and the reason."""

    name: str
    why: str


class Product(NamedTuple):
    """The facts of a product with packed weights by which a backend is chosen."""

    planes: int
    group_size: int
    compute: str = "exact"
    # of a convolution:
    groups: int = 1
    channels: int = 0  # of a group
    outputs: int = 0  # of a group
    output_pixels: int = 0  # of an image
    differentiated: bool = False  # gradients or tangents are asked for

    def sixteen_bit(self, dtype: torch.dtype) -> bool:
        """Whether 16-bit floats are multiplied, for x of ``dtype``."""
        return self.compute == "bf16" or (self.compute == "exact" and dtype != torch.float32)


class Limit(NamedTuple):
    """A condition without which the reference runs a product in place of a backend, and the reason."""

    fits: Callable[[Product, torch.dtype], bool]
    why: str
    can_run: bool = False  # whether the backend could run the others too, but more slowly


MOST_PLANES = 8
MOST_OUTPUT_PIXELS = (
    65535 * 64 // 3
)  # blocks of 64 tokens along y of a grid, three tokens for a pixel of fp32

_PLANES = Limit(lambda p, _: p.planes <= MOST_PLANES, f"its kernels take at most {MOST_PLANES} planes")
_GROUP_SIZES = Limit(
    lambda p, _: p.group_size % 32 == 0 and p.group_size & (p.group_size - 1) == 0,
    "its kernels take scales shared by 32, 64, 128, ... weights",
)
_NO_GROUP_SCALES = Limit(
    lambda p, _: p.group_size == 0, "its convolution takes scales per tensor or output channel alone"
)
_NO_GRADIENTS = Limit(lambda p, _: not p.differentiated, "its convolution has no gradients")
# (operation, backend) -> what the product must be.
LIMITS: dict[tuple[str, str], tuple[Limit, ...]] = {
    ("binary_linear", "cuda"): (_PLANES, _GROUP_SIZES),
    ("binary_linear", "triton"): (_PLANES, _GROUP_SIZES),
    ("binary_conv2d", "cpu"): (_NO_GRADIENTS,),
    ("binary_conv2d", "cuda"): (
        _NO_GRADIENTS,
        _PLANES,
        _NO_GROUP_SCALES,
        Limit(
            lambda p, dtype: (
                p.groups == 1 or p.compute == "int8" or (p.sixteen_bit(dtype) and p.channels % 8 == 0)
            ),
            "groups are read in place: they need int8, or 16-bit x with a multiple of 8 channels",
        ),
        Limit(
            lambda p, _: p.groups == 1 or (p.groups <= 32 and p.channels >= 16 and p.outputs >= 8),
            "each group is a launch that fills channels up to 64 and outputs to 32",
            can_run=True,
        ),
        Limit(
            lambda p, _: p.output_pixels <= MOST_OUTPUT_PIXELS,
            f"a launch takes images of at most {MOST_OUTPUT_PIXELS} output pixels",
        ),
    ),
    ("binary_conv2d", "triton"): (
        _NO_GRADIENTS,
        _PLANES,
        _NO_GROUP_SCALES,
        Limit(
            lambda p, _: p.groups == 1 or 4 * p.channels * p.outputs >= 32 * 16,
            "it multiplies 32 channels by 16 outputs at least: smaller groups leave most of them unused",
            can_run=True,
        ),
    ),
}


def choose(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    requested: str = "auto",
    product: Product | None = None,
) -> Choice:
    """The backend for ``operation`` (one of :data:`OPERATIONS`) on tensors of ``dtype`` on ``device``.

    product: of binary_linear and binary_conv2d; None: any that the backend takes.

    Raises ValueError for an unknown ``requested``, BackendError if it cannot run.
    """
    decide = _choose.__wrapped__ if torch.compiler.is_compiling() else _choose  # dynamo traces no cache
    kind = device.type
    # os.environ is slow, and auto does not run Triton's interpreter on the CPU.
    ask = kind != "cpu" or requested != "auto"
    interpret = os.environ.get("TRITON_INTERPRET", "0") if ask else "0"
    capability = _capability(device.index) if kind == "cuda" else 0
    choice = decide(operation, kind, dtype, requested, interpret, capability)
    if product is not None:
        for limit in LIMITS.get((operation, choice.name), ()):
            if limit.fits(product, dtype):
                continue
            if requested != "auto":
                raise BackendError(f"backend={requested!r} cannot run {operation}: {limit.why}")
            return Choice("reference", f"{choice.name}: {limit.why}")
    return choice


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
            refusal = _refusal(name, device, dtype, interpret, capability)
            if refusal is None:
                return Choice(name, f"the best for {device} tensors")
            refusals.append(f"{name}: {refusal}")
        return Choice("reference", "; ".join(refusals) or f"no kernels for {device} tensors")
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r}: use 'auto' or one of {BACKENDS}")
    refusal = _refusal(requested, device, dtype, interpret, capability)
    if refusal is not None:
        raise BackendError(f"backend={requested!r} cannot run {operation}: {refusal}")
    return Choice(requested, "asked for by name")


def _refusal(backend: str, device: str, dtype: torch.dtype, interpret: str, capability: int) -> str | None:
    """Why ``backend`` cannot run any operation, or None if it can."""
    if backend == "reference":
        return None
    if dtype not in _KERNEL_DTYPES:
        return f"no kernel for {dtype}; the reference runs it"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return f"it {extras.missing('triton', why=ImportError('it is not installed'))}"
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
    """Whether the extension has machine code for ``capability``: of the same major and no newer minor version, or PTX
    of an older architecture."""
    named = _extension.build_info()["cuda_archs"]
    if f"{capability}a" in named:
        return True
    archs = [int(arch) for arch in named if arch.isdigit()]
    return any(
        arch <= capability and (arch // 10 == capability // 10 or arch == max(archs)) for arch in archs
    )
