"""The CUDA step: its source run on the host, what nvcc made of it, its registration, its results on a GPU."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import askew_cases
from quantopt import _extension

ROOT = Path(__file__).resolve().parent.parent
CASES = list(askew_cases.all_cases())

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
needs_cuda_build = pytest.mark.skipif(
    not _extension.build_info().get("cuda_archs"), reason="the extension was built without CUDA"
)


# ---- the kernel's source, compiled for the host


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("cuda_on_host") / "step.so"
    folder = ROOT / "tests/cuda_on_host"
    flags = [
        "-O1",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        f"-I{folder}",
        f"-I{ROOT / 'csrc'}",
    ]
    subprocess.run([compiler, *flags, str(folder / "driver.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.step_on_host.restype = ctypes.c_int64
    loaded.last_element_of_huge_tensor.restype = ctypes.c_float
    return loaded


def run_on_host(kernel: ctypes.CDLL, case: askew_cases.Case, inputs: askew_cases.Inputs) -> int:
    """Makes the step and returns the number of kernel launches."""

    def pointers(tensors: Sequence[Tensor]) -> Any:
        return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)) if tensors else None

    def numbers(values: Sequence[int]) -> Any:
        return (ctypes.c_int64 * len(values))(*values)

    def pointer(tensor: Tensor | None) -> Any:
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())

    params = inputs.params
    rows = [p.numel() if case.scale == "tensor" else p[:1].numel() for p in params]
    groups = [askew_cases.GROUP_SIZE if case.scale == "group" else row for row in rows]
    launches = kernel.step_on_host(
        askew_cases.RULES.index(case.rule),
        pointer(inputs.hyper),
        case.levels,
        case.direction == "nesterov",
        case.decoupled,
        ctypes.c_float(-1.0 if case.maximize else 1.0),
        ctypes.c_int64(len(params)),
        *(pointers(list_) for list_ in (params, inputs.grads, inputs.momentums, inputs.seconds)),
        *(pointers(list_) for list_ in (inputs.latents, inputs.scales, inputs.steps)),
        *(numbers(list_) for list_ in ([p.numel() for p in params], rows, groups)),
        pointer(inputs.grad_scale),
        pointer(inputs.found_inf),
    )
    assert launches >= 0
    return int(launches)


@needs_extension
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_source_gives_the_bits_of_the_cpu_kernel(
    host_kernel: ctypes.CDLL, case: askew_cases.Case, offset: int
) -> None:
    ours, expected = askew_cases.make(case, offset=offset), askew_cases.make(case, offset=offset)
    run_on_host(host_kernel, case, ours)
    askew_cases.run(torch.ops.quantopt.fused_step, case, expected)
    for got, want in zip(ours.changing(), expected.changing(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 15, 16, 17, 4095, 4096, 4097, 12289])
def test_sizes_around_the_chunk(host_kernel: ctypes.CDLL, numel: int) -> None:
    case = askew_cases.Case("askew", 2, "momentum", "tensor")
    ours = askew_cases.make(case, [(numel,)])
    run_on_host(host_kernel, case, ours)
    askew_cases.check(case, ours, askew_cases.make(case, [(numel,)]))


def test_one_launch_serves_a_list(host_kernel: ctypes.CDLL) -> None:
    case = askew_cases.Case("askew", 2, "momentum", "tensor")
    for count, launches in ((1, 1), (32, 1), (33, 2), (100, 4)):
        shapes = [(1 + 5000 * (i % 3), 1) for i in range(count)]
        ours = askew_cases.make(case, shapes)
        assert run_on_host(host_kernel, case, ours) == launches
        askew_cases.check(case, ours, askew_cases.make(case, shapes))


@pytest.mark.parametrize(("numel", "row"), [(2**31 + 64, 64), (2**33 // 27 * 27, 27)])
def test_index_arithmetic_beyond_32_bits(host_kernel: ctypes.CDLL, numel: int, row: int) -> None:
    result = host_kernel.last_element_of_huge_tensor(ctypes.c_int64(numel), ctypes.c_int64(row))
    if result == -1.0:
        pytest.skip("the address space for so large a tensor is not to be had")
    assert result == -0.5


# ---- what was built


@needs_extension
def test_cpu_kernel_is_registered() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("quantopt::fused_step", "CPU")


@needs_extension
def test_cuda_kernel_is_registered_in_a_cuda_build() -> None:
    built = bool(_extension.build_info()["cuda_archs"])
    assert torch._C._dispatch_has_kernel_for_dispatch_key("quantopt::fused_step", "CUDA") == built


def extension_file() -> Path:
    import quantopt._C

    return Path(quantopt._C.__file__)


@needs_extension
def test_links_no_cuda_runtime_and_no_second_openmp() -> None:
    """The CUDA runtime is linked statically and hidden: torch's own is not disturbed, its version free."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.run(
        [readelf, "-d", extension_file()], capture_output=True, text=True, check=True
    ).stdout
    for word in ("cudart", "gomp", "RPATH", "RUNPATH"):
        assert word not in dynamic
    symbols = subprocess.run(
        [readelf, "-W", "--dyn-syms", extension_file()], capture_output=True, text=True, check=True
    )
    assert not re.search(r"GLOBAL +DEFAULT +\d+ cuda", symbols.stdout)


def cuobjdump() -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    if not Path(tool).exists():
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton's wheel")
    return tool


@needs_cuda_build
@pytest.mark.parametrize("arch", _extension.build_info().get("cuda_archs", []))
def test_machine_code(arch: str) -> None:
    """Every step kernel reads and writes 16 bytes at a time and spills no register."""
    command = [cuobjdump(), "-sass", "-arch", f"sm_{arch}", str(extension_file())]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {
        name: code
        for name, code in re.findall(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction : |\Z)", sass, re.DOTALL)
        if "step_kernel" in name
    }
    assert len(kernels) == 27  # 9 rules with 3 directions
    for name, code in kernels.items():
        stored = 1 + ("MakeMomentum" in name) + 2 * ("MakeAdam" in name) + ("AskewMemory" in name)
        # in vectors twice: with one scale for the tensor, and with several
        assert code.count("STG.E.128") >= 2 * stored, name
        assert code.count("LDG.E.128") >= 2 * stored, name
        # ptxas reports no spills; around the slow path of a division or a power one register may be kept
        assert len(re.findall(r"\bSTL\b", code)) <= ("MakeAdam" in name), name


# ---- with a GPU


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_on_the_device(case: askew_cases.Case, offset: int) -> None:
    ours = askew_cases.make(case, device="cuda", offset=offset)
    askew_cases.run(torch.ops.quantopt.fused_step, case, ours)
    askew_cases.check(case, ours, askew_cases.make(case))


@pytest.mark.gpu
@needs_cuda_build
def test_runs_on_the_current_stream() -> None:
    case = askew_cases.Case("askew", 2, "momentum", "tensor")
    ours = askew_cases.make(case, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for grad in ours.grads:
            torch.cuda._sleep(10_000_000)
            grad.mul_(2).div_(2)
        askew_cases.run(torch.ops.quantopt.fused_step, case, ours)
    stream.synchronize()
    askew_cases.check(case, ours, askew_cases.make(case))


@pytest.mark.gpu
@needs_cuda_build
def test_refuses_what_it_has_not_with_the_reason() -> None:
    case = askew_cases.Case("askew", 2, "momentum", "tensor")
    inputs = askew_cases.make(case, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(NotImplementedError, match="float32 parameters"):
        askew_cases.run(torch.ops.quantopt.fused_step, case, inputs)
