"""What the tests share: markers, forced instruction sets, reproducible random numbers, a small data set to train on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

import cuda_host
from quantopt import _extension

# Timings differ too much between machines for a deadline; a failure must be the same on the next run.
hypothesis.settings.register_profile("quantopt", deadline=None, derandomize=True)
hypothesis.settings.load_profile("quantopt")

ISAS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "amx")


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


@pytest.fixture(scope="session")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a data set that trains in a moment."""
    from training_data import write_patterns

    return write_patterns(tmp_path_factory.mktemp("data") / "patterns")


@pytest.fixture(scope="session")
def dataset(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same, loaded."""
    from quantopt.train import data

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return data.load(patterns, progress=False)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of data sets, in place of the user's."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "quantopt"


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, here and in processes of the test: small networks train faster, and all with the same bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are empty files: drawing takes most of the time of a short run."""
    from quantopt.train import report

    monkeypatch.setattr(report, "save_figure", lambda figure, path: path.touch())
