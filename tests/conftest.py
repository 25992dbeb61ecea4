"""What the tests share: the markers, the forced instruction sets, reproducible random numbers."""

import os
from typing import Any

import hypothesis
import pytest
import torch

import cuda_host
from quantopt import _extension

# Timings differ too much between machines for a deadline; a failure must be the same on the next run.
hypothesis.settings.register_profile("quantopt", deadline=None, derandomize=True)
hypothesis.settings.load_profile("quantopt")

ISAS = ("portable", "avx2", "avx512", "avx512vnni", "amx")


def supported_isas() -> list[str]:
    """The instruction sets that were built and that this processor runs."""
    if _extension.error is not None:
        return []
    return [isa for isa in ISAS if torch.ops.quantopt.cpu_isa_supported(isa)]


def pytest_configure() -> None:
    if (
        "PYTEST_XDIST_WORKER" in os.environ
    ):  # the workers share the processors; tests of threads set their number
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def force_isa(patch: pytest.MonkeyPatch, name: str) -> None:
    """Sets QUANTOPT_CPU_ISA, which is read when the extension is loaded, and has it read again."""
    patch.setenv("QUANTOPT_CPU_ISA", name)
    torch.ops.quantopt.read_cpu_isa()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once for each instruction set, forced through QUANTOPT_CPU_ISA."""
    if _extension.error is not None:
        pytest.skip(_extension.error)
    if request.param not in supported_isas():
        pytest.skip(f"{request.param} is not built or not supported by this processor")
    force_isa(monkeypatch, request.param)
    return request.param


@pytest.fixture(scope="session")
def host() -> Any:
    """The operators of quantopt with the kernels of CUDA, emulated on the host."""
    return cuda_host.load()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    if _extension.error is None:
        torch.ops.quantopt.read_cpu_isa()  # a test before may have forced another
