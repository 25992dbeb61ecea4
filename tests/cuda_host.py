"""The operators and kernels of csrc/cuda, run on the host (tests/cuda_on_host)."""

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from host_library import ROOT, shared_library


def load() -> Any:
    """The operators of quantopt for CPU tensors, with the kernels of CUDA: torch.ops.quantopt_host."""
    if platform.machine() != "x86_64":
        pytest.skip("needs x86-64")
    folder = ROOT / "tests/cuda_on_host"
    with_torch = ["-O0", "-g0", *(f"-I{path}" for path in include_paths())]
    device = ["-O2", "-w", "-DQUANTOPT_HAVE_SM90A", "-x", "c++"]
    hosts = [folder / "driver.cpp", *sorted((ROOT / "csrc").glob("*_arguments.cpp")), ROOT / "csrc/tiles.cpp"]
    kernels = [
        path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if path.stem not in ("device", "step_rule")
    ]
    kernels.append(folder / "step_rules.cpp")
    sources = {
        **dict.fromkeys(hosts, with_torch),
        **dict.fromkeys(kernels, device),
        ROOT / "csrc/cpu/isa.cpp": ["-O0"],
    }
    library = shared_library(
        "cuda_on_host",
        sources,
        flags=[f"-I{folder}", "-fvisibility=hidden"],
        link=[*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"],
    )
    torch.ops.load_library(str(library))
    return torch.ops.quantopt_host


def guarded_copy(t: Tensor) -> Tensor:
    """The same elements and strides, without any around them."""
    if t.numel() == 0:
        return t.clone()
    length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided([length], [1], t.storage_offset()).clone().as_strided(t.shape, t.stride())


@contextlib.contextmanager
def placing(host: Any, device: str, capability: int, processors: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """What brings a tensor to ``device``: to the host, between guard pages, with such a device emulated there."""
    if device != "cpu":
        yield lambda t: t.to(device)
        return
    host.device(capability, processors)
    host.guard(True)
    try:
        yield guarded_copy
    finally:
        host.guard(False)
