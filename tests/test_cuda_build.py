"""The CUDA step: its source run on the host, what nvcc made of it, its registration, its results on a GPU."""

import ctypes
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantopt
import step_cases
from quantopt import _extension
from quantopt.ops.step import HYPER, RULES, hyper_tensor

ROOT = Path(__file__).resolve().parent.parent
CASES = list(step_cases.all_cases())

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
needs_cuda_build = pytest.mark.skipif(
    not _extension.build_info().get("cuda_archs"), reason="the extension was built without CUDA"
)


# ---- the kernels' source, compiled for the host


class HostStep(ctypes.Structure):
    """Mirrors HostStep in tests/cuda_on_host/driver.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rule", "levels", "param_dtype", "momentum_dtype")),
        *((name, ctypes.c_int32) for name in ("nesterov", "decoupled", "moving_levels", "hyper_on_device")),
        ("backwards", ctypes.c_int32),
        ("gradient_factor", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("seed", "count")),
        *((name, ctypes.c_void_p) for name in ("hyper", "grad_scale", "found_inf")),
        *((name, ctypes.c_void_p) for name in ("params", "grads", "momentums", "seconds", "latents")),
        *((name, ctypes.c_void_p) for name in ("scales", "sigmas", "steps")),
        *((name, ctypes.c_void_p) for name in ("numels", "rows", "groups", "sigma_rows")),
    ]


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


def run_on_host(
    kernel: ctypes.CDLL, case: step_cases.Case, inputs: step_cases.Inputs, *, backwards: bool = False
) -> int:
    """Makes the step and returns the number of kernel launches."""
    kept: list[Any] = []

    def address(array: Any) -> Any:
        kept.append(array)
        return ctypes.cast(array, ctypes.c_void_p)

    def pointers(tensors: Sequence[Tensor]) -> Any:
        return (
            address((ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))) if tensors else None
        )

    def numbers(values: Sequence[int]) -> Any:
        return address((ctypes.c_int64 * len(values))(*values))

    def pointer(tensor: Tensor | None) -> Any:
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())

    params = inputs.params
    types = [step_cases.F32, step_cases.BF16, step_cases.F16]
    channel = [max(p[:1].numel(), 1) for p in params]
    one = [scale.numel() == 1 for scale in inputs.scales] or [True] * len(params)
    rows = [max(p.numel(), 1) if alone else row for p, row, alone in zip(params, channel, one, strict=True)]
    groups = [step_cases.GROUP_SIZE if case.scale == "group" else row for row in rows]
    sigma_rows = [
        p.numel() if case.sigma == "tensor" else row for p, row in zip(params, channel, strict=True)
    ]
    step = HostStep(
        rule=RULES.index(case.rule),
        levels=case.levels,
        param_dtype=types.index(case.dtype),
        momentum_dtype=types.index(case.momentum_dtype),
        nesterov=case.direction == "nesterov",
        decoupled=case.decoupled,
        moving_levels=case.moving_levels,
        hyper_on_device=case.hyper_on_device,
        backwards=backwards,
        gradient_factor=-1.0 if case.maximize else 1.0,
        seed=case.seed,
        count=len(params),
        **{name: pointer(getattr(inputs, name)) for name in ("hyper", "grad_scale", "found_inf")},
        **{name: pointers(getattr(inputs, name)) for name in ("params", "grads", "momentums", "seconds")},
        **{name: pointers(getattr(inputs, name)) for name in ("latents", "scales", "sigmas", "steps")},
        numels=numbers([p.numel() for p in params]),
        rows=numbers(rows),
        groups=numbers(groups),
        sigma_rows=numbers(sigma_rows),
    )
    launches = kernel.step_on_host(ctypes.byref(step))
    assert launches >= 0
    return int(launches)


def same(ours: step_cases.Inputs, expected: step_cases.Inputs) -> bool:
    pairs = zip(ours.changing(), expected.changing(), strict=True)
    return all(torch.equal(got.cpu(), want) for got, want in pairs)


@needs_extension
@pytest.mark.parametrize("case", CASES, ids=str)
def test_source_gives_the_bits_of_the_cpu_kernel(host_kernel: ctypes.CDLL, case: step_cases.Case) -> None:
    """From aligned and unaligned memory. The sum behind a moving level has another order on the GPU."""
    expected = step_cases.make(case)
    step_cases.run(torch.ops.quantopt.fused_step, case, expected)
    results = []
    for offset, backwards in ((0, False), (0, True), (1, False)):
        ours = step_cases.make(case, offset=offset)
        run_on_host(host_kernel, case, ours, backwards=backwards)
        results.append(ours)
        if not case.moving_levels:
            assert same(ours, expected)
    if case.moving_levels:
        step_cases.check(case, results[0], step_cases.make(case))
        assert all(same(ours, results[0]) for ours in results)


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 15, 16, 17, 4095, 4096, 4097, 12289])
def test_sizes_around_the_chunk(host_kernel: ctypes.CDLL, numel: int) -> None:
    for case in (
        step_cases.Case("askew", 2, "momentum", "tensor"),
        step_cases.Case("askew", 4, "momentum", "tensor", step_cases.BF16),
    ):
        ours = step_cases.make(case, [(numel,)])
        run_on_host(host_kernel, case, ours)
        step_cases.check(case, ours, step_cases.make(case, [(numel,)]))


@pytest.mark.parametrize("row", [1, 31, 32, 511, 512, 513, 4095, 4096, 4097, 8193])
@pytest.mark.parametrize("rule", ["splitting", "alternating"])
def test_moving_levels_of_rows_by_warp_by_block_and_longer(
    host_kernel: ctypes.CDLL, rule: str, row: int
) -> None:
    for dtype in (step_cases.F32, step_cases.BF16):
        case = step_cases.Case(rule, 2, "momentum", "channel", dtype, moving_levels=True)
        shapes = [(3, row), (9, row)]
        ours, unaligned = step_cases.make(case, shapes), step_cases.make(case, shapes, offset=1)
        launches = run_on_host(host_kernel, case, ours)
        assert launches == (1 if row <= 4096 else 3)
        step_cases.check(case, ours, step_cases.make(case, shapes))
        run_on_host(host_kernel, case, unaligned, backwards=True)
        assert same(unaligned, ours)


def test_one_launch_serves_a_list(host_kernel: ctypes.CDLL) -> None:
    case = step_cases.Case("askew", 2, "momentum", "tensor")
    for count, launches in ((1, 1), (248, 1), (249, 2), (1000, 5)):
        shapes = [(1 + 5000 * (i % 50 == 7), 1) for i in range(count)]
        ours = step_cases.make(case, shapes)
        assert run_on_host(host_kernel, case, ours) == launches
        step_cases.check(case, ours, step_cases.make(case, shapes))


def random_launches(count: int) -> Iterator[tuple[step_cases.Case, list[tuple[int, ...]], int]]:
    """Cases, shapes of a list, offsets in memory."""
    choice = random.Random(0)
    cases = [case for case in CASES if case.found_inf is None]
    for _ in range(count):
        shapes: list[tuple[int, ...]] = []
        for _ in range(choice.randint(1, 12)):
            rows = choice.choice([1, 2, 5, 64])
            shapes.append((rows, choice.choice([1, 8, 27, 576, 1000, 4608]) if rows < 64 else 27))
        yield choice.choice(cases), shapes, choice.choice([0, 0, 1, 4])


@needs_extension
def test_200_random_launches_give_the_same_bits(host_kernel: ctypes.CDLL) -> None:
    """A tensor in a list is stepped as the same tensor alone, wherever it lies; and as the CPU kernels do it."""
    for case, shapes, offset in random_launches(200):
        ours, expected = step_cases.make(case, shapes, offset=offset), step_cases.make(case, shapes)
        run_on_host(host_kernel, case, ours)
        if case.moving_levels:
            run_on_host(host_kernel, case, expected, backwards=True)
        else:
            step_cases.run(torch.ops.quantopt.fused_step, case, expected)
        assert same(ours, expected), (case, shapes, offset)


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


ARCHS = _extension.build_info().get("cuda_archs", [])


@needs_cuda_build
def test_no_kernel_spills_a_register() -> None:
    """By the compiler's own report, kept beside the objects of a build in this tree."""
    logs = sorted(
        ROOT.glob(f"build/{sys.implementation.cache_tag}-torch{torch.__version__}-*/cuda/step*.log")
    )
    if not logs:
        pytest.skip("the extension was not built in this tree")
    text = "".join(log.read_text() for log in logs if (ROOT / f"csrc/cuda/{log.stem}.cu").exists())
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\S+)'(.*?)Used \d+ registers", text, re.DOTALL
    )
    assert {arch for _, arch, _ in kernels} == set(ARCHS)
    for name, arch, report in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, (name, arch)


@needs_cuda_build
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch: str) -> None:
    """Every step kernel reads and writes 16 bytes at a time and keeps nothing in local memory."""
    command = [cuobjdump(), "-sass", "-arch", f"sm_{arch}", str(extension_file())]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction : |\Z)", sass, re.DOTALL)
    found = dict.fromkeys(("step_kernel", "row_kernel", "magnitude_kernel"), 0)
    for name, code in kernels:
        kind = next((kind for kind in found if kind in name), None)
        if kind is None:
            continue
        found[kind] += 1
        latent = any(rule in name for rule in ("Memory", "Splitting", "Alternating"))
        stored = 2 + latent + ("AdamStep" in name)  # the parameter, momentum and others
        assert code.count("LDG.E.128") >= stored, name
        assert code.count("STG.E.128") >= (0 if kind == "magnitude_kernel" else stored), name
        assert not re.search(r"\b(STL|LDL)\b", code), name
    # step: 7 rules without a latent, 5 of which have Adam too, in 4 storages; 6 with one, 2 with Adam, in 2
    assert found == {"step_kernel": 12 * 4 + 8 * 2, "row_kernel": 8, "magnitude_kernel": 4}


# ---- with a GPU


def on_device_and_cpu(
    case: step_cases.Case, shapes: Sequence[tuple[int, ...]] = step_cases.SHAPES, offset: int = 0
) -> tuple[step_cases.Inputs, step_cases.Inputs]:
    ours = step_cases.make(case, shapes, device="cuda", offset=offset)
    step_cases.run(torch.ops.quantopt.fused_step, case, ours)
    expected = step_cases.make(case, shapes)
    step_cases.run(torch.ops.quantopt.fused_step, case, expected)
    return ours, expected


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_device(case: step_cases.Case) -> None:
    """The bits of the CPU kernel, but for the powers of Adam and the sums of moving levels."""
    results = []
    for offset in (0, 1):
        ours, expected = on_device_and_cpu(case, offset=offset)
        step_cases.check(case, ours, step_cases.make(case))
        if not case.moving_levels and case.direction != "adam":
            assert same(ours, expected)
        results.append(ours)
    assert same(results[0], step_cases.to_cpu(results[1]))


@pytest.mark.gpu
@needs_cuda_build
def test_200_random_launches_on_the_device() -> None:
    for case, shapes, offset in random_launches(200):
        ours, expected = on_device_and_cpu(case, shapes, offset)
        if case.moving_levels or case.direction == "adam":
            alone = step_cases.make(case, shapes, device="cuda")
            step_cases.run(torch.ops.quantopt.fused_step, case, alone)
            assert same(ours, step_cases.to_cpu(alone)), (case, shapes, offset)
        else:
            assert same(ours, expected), (case, shapes, offset)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("row", [31, 512, 513, 4096, 4097, 100_000])
@pytest.mark.parametrize("rule", ["splitting", "alternating"])
def test_moving_levels_on_the_device_repeat(rule: str, row: int) -> None:
    case = step_cases.Case(rule, 2, "momentum", "channel", moving_levels=True)
    shapes = [(3, row), (1000, row)]
    first, _ = on_device_and_cpu(case, shapes)
    second, _ = on_device_and_cpu(case, shapes)
    step_cases.check(case, first, step_cases.make(case, shapes))
    assert same(first, step_cases.to_cpu(second))


@pytest.mark.gpu
@needs_cuda_build
def test_runs_on_the_current_stream() -> None:
    case = step_cases.Case("askew", 2, "momentum", "tensor")
    ours = step_cases.make(case, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for grad in ours.grads:
            torch.cuda._sleep(10_000_000)
            grad.mul_(2).div_(2)
        step_cases.run(torch.ops.quantopt.fused_step, case, ours)
    stream.synchronize()
    step_cases.check(case, ours, step_cases.make(case))


@pytest.mark.gpu
@needs_cuda_build
def test_two_streams_do_not_disturb_each_other() -> None:
    """Moving levels of long rows, whose sums lie in a workspace."""
    case = step_cases.Case("alternating", 2, "momentum", "channel", moving_levels=True)
    shapes = [(4, 200_000), (64, 1000)]
    alone = step_cases.make(case, shapes, device="cuda")
    both = [step_cases.make(case, shapes, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    for _ in range(20):
        step_cases.run(torch.ops.quantopt.fused_step, case, alone)
        for stream, inputs in zip(streams, both, strict=True):
            with torch.cuda.stream(stream):
                step_cases.run(torch.ops.quantopt.fused_step, case, inputs)
    torch.cuda.synchronize()
    assert all(same(inputs, step_cases.to_cpu(alone)) for inputs in both)


GRAPH_CASES = [
    step_cases.Case("askew", 2, "momentum", "tensor", hyper_on_device=True, found_inf=0.0, grad_scale=8.0),
    step_cases.Case("askew", 4, "adam", "channel", hyper_on_device=True),
    step_cases.Case("askew_memory", 4, "momentum", "group", hyper_on_device=True),
    step_cases.Case("prox", 2, "momentum", "tensor", step_cases.BF16, seed=9, hyper_on_device=True),
    step_cases.Case("alternating", 2, "momentum", "channel", moving_levels=True, hyper_on_device=True),
]


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("case", GRAPH_CASES, ids=str)
def test_a_captured_step_follows_changing_numbers(case: step_cases.Case) -> None:
    """Replayed with other lr, epsilon, kappa and found_inf it gives the weights of eager steps, without a word to
    the host."""
    shapes = [(5, 13, 3), (64, 32), (7, 5000)]
    captured, eager = (step_cases.make(case, shapes, device="cuda") for _ in range(2))
    kept = [t.clone() for t in captured.changing()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step_cases.run(torch.ops.quantopt.fused_step, case, captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_cases.run(torch.ops.quantopt.fused_step, case, captured)
    for tensor, value in zip(captured.changing(), kept, strict=True):
        tensor.copy_(value)
    names = ("lr", "epsilon", "kappa")
    for k, numbers in enumerate([(0.1, 0.9, 0.1), (0.05, 0.5, 1.0), (0.02, 0.1, math.inf), (0.0, 0.0, 2.0)]):
        for inputs in (captured, eager):
            for name, value in zip(names, numbers, strict=True):
                inputs.hyper[HYPER.index(name)] = value
            if inputs.found_inf is not None:
                inputs.found_inf.fill_(float(k == 2))
        graph.replay()
        step_cases.run(torch.ops.quantopt.fused_step, case, eager)
        assert same(captured, step_cases.to_cpu(eager)), k


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("case", GRAPH_CASES, ids=str)
def test_nothing_waits_for_the_device(case: step_cases.Case) -> None:
    inputs = step_cases.make(case, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_cases.run(torch.ops.quantopt.fused_step, case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda_build
def test_numbers_on_another_device_are_refused() -> None:
    case = step_cases.Case("askew", 2, "momentum", "tensor")
    inputs = step_cases.make(case)
    inputs.hyper = inputs.hyper.cuda()
    with pytest.raises(ValueError, match="device of the parameters"):
        step_cases.run(torch.ops.quantopt.fused_step, case, inputs)


@pytest.mark.gpu
@needs_cuda_build
def test_a_checkpoint_goes_to_the_cpu_and_back() -> None:
    """Steps on GPU, CPU, GPU give the bits of three steps on the CPU."""

    def optimizer(device: str) -> tuple[list[torch.nn.Parameter], quantopt.AskewSGD]:
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))
            for shape in ((7, 33), (64, 32), (129,))
        ]
        # no scale of the weights: its sums are taken in another order on each device
        return params, quantopt.AskewSGD(params, lr=0.1, scale="none", epsilon=0.4)

    def step(params: list[torch.nn.Parameter], opt: quantopt.AskewSGD, k: int) -> None:
        generator = torch.Generator().manual_seed(k)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        opt.step()

    expected, opt = optimizer("cpu")
    for k in range(3):
        step(expected, opt, k)
    params, opt = optimizer("cuda")
    step(params, opt, 0)
    for k, device in ((1, "cpu"), (2, "cuda")):
        moved, other = optimizer(device)
        for p, old in zip(moved, params, strict=True):
            p.data.copy_(old.data)
        other.load_state_dict(opt.state_dict())
        params, opt = moved, other
        step(params, opt, k)
    for got, want in zip(params, expected, strict=True):
        assert torch.equal(got.detach().cpu(), want.detach())


@pytest.mark.gpu
@needs_cuda_build
def test_a_plan_makes_the_step_of_the_op() -> None:
    case = step_cases.Case("alternating", 2, "momentum", "channel", moving_levels=True)
    planned, eager = (step_cases.make(case, device="cuda") for _ in range(2))
    params = [torch.nn.Parameter(p) for p in planned.params]
    for p, grad in zip(params, planned.grads, strict=True):
        p.grad = grad
    lists = [planned.momentums, [], planned.latents, planned.scales, [], []]
    options = step_cases.options(case).values()
    plan = torch.classes.quantopt.StepPlan(case.rule, params, [], *lists, planned.hyper, *options)
    for _ in range(3):
        assert _extension.plan_ready(plan.number())
        plan.step(None, None)
        step_cases.run(torch.ops.quantopt.fused_step, case, eager)
    planned.params = [p.detach() for p in params]
    assert same(planned, step_cases.to_cpu(eager))


@pytest.mark.gpu
@needs_cuda_build
def test_a_plan_follows_found_inf_and_grad_scale() -> None:
    """On the device: nothing changes while found_inf is set, and nothing waits."""
    case = step_cases.Case("askew", 2, "momentum", "tensor", grad_scale=8.0, found_inf=1.0)
    planned, eager = (step_cases.make(case, device="cuda") for _ in range(2))
    params = [torch.nn.Parameter(p) for p in planned.params]
    for p, grad in zip(params, planned.grads, strict=True):
        p.grad = grad
    lists = [planned.momentums, [], [], planned.scales, [], []]
    options = step_cases.options(case).values()
    plan = torch.classes.quantopt.StepPlan(case.rule, params, [], *lists, planned.hyper, *options)
    for found in (1.0, 0.0, 1.0):
        assert planned.found_inf is not None and eager.found_inf is not None
        planned.found_inf.fill_(found)
        eager.found_inf.fill_(found)
        before = [p.detach().clone() for p in params]
        assert _extension.plan_ready(plan.number())
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan.step(planned.grad_scale, planned.found_inf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        unchanged = [torch.equal(p, old) for p, old in zip(params, before, strict=True) if p.numel()]
        assert all(unchanged) if found else not any(unchanged)
        step_cases.run(torch.ops.quantopt.fused_step, case, eager)
    planned.params = [p.detach() for p in params]
    assert same(planned, step_cases.to_cpu(eager))


@pytest.mark.gpu
@needs_cuda_build
def test_the_second_gpu_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = step_cases.Case("alternating", 2, "momentum", "channel", moving_levels=True)
    ours = step_cases.make(case, device="cuda:1")
    step_cases.run(torch.ops.quantopt.fused_step, case, ours)
    assert torch.cuda.current_device() == 0
    step_cases.check(case, ours, step_cases.make(case))


@pytest.mark.gpu
@needs_cuda_build
def test_more_than_2_to_the_31_elements() -> None:
    n, tail = 2**31 + 4099, 1024
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 11 GB of device memory")
    p, g = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    g[-tail:] = torch.linspace(-1, 1, tail)
    torch.ops.quantopt.fused_step("base", [p], [g], [], [], [], [], [], [], hyper_tensor(lr=0.5))
    assert not bool(p[:-tail].any())
    assert torch.equal(p[-tail:], g[-tail:] * -0.5)
