"""The operator of the CUDA step, its source run on the host."""

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

import step_cases
from quantopt import _extension
from quantopt.ops.step import hyper_tensor
from step_cases import CASES, random_launches, same

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


def run_on_host(
    host: Any, case: step_cases.Case, inputs: step_cases.Inputs, *, backwards: bool = False
) -> int:
    """Makes the step and returns the number of kernel launches."""
    before = host.launches()
    host.backwards(backwards)
    host.hyper_on_device(case.hyper_on_device)
    try:
        step_cases.run(host.fused_step, case, inputs)
    finally:
        host.backwards(False)
        host.hyper_on_device(False)
    return int(host.launches() - before)


@needs_extension
@pytest.mark.parametrize("case", CASES, ids=str)
def test_source_gives_the_bits_of_the_cpu_kernel(host: Any, case: step_cases.Case) -> None:
    """From aligned and unaligned memory. The sum behind a moving level has another order on the GPU."""
    expected = step_cases.make(case)
    step_cases.run(torch.ops.quantopt.fused_step, case, expected)
    results = []
    for offset, backwards in ((0, False), (0, True), (1, False)):
        ours = step_cases.make(case, offset=offset)
        run_on_host(host, case, ours, backwards=backwards)
        results.append(ours)
        if not case.moving_levels:
            assert same(ours, expected)
    if case.moving_levels:
        step_cases.check(case, results[0], step_cases.make(case))
        assert all(same(ours, results[0]) for ours in results)


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 15, 16, 17, 4095, 4096, 4097, 12289])
def test_sizes_around_the_chunk(host: Any, numel: int) -> None:
    for case in (
        step_cases.Case("askew", 2, "momentum", "tensor"),
        step_cases.Case("askew", 4, "momentum", "tensor", step_cases.BF16),
    ):
        ours = step_cases.make(case, [(numel,)])
        run_on_host(host, case, ours)
        step_cases.check(case, ours, step_cases.make(case, [(numel,)]))


@pytest.mark.parametrize("dtype", [step_cases.F32, step_cases.BF16])
def test_guard_pages_after_every_tensor(host: Any, dtype: torch.dtype) -> None:
    """A read or write beyond a tensor is a crash."""
    for numel in (1, 3, 4, 15, 16, 17, 4095, 4096, 4097):
        for case in (
            step_cases.Case("askew_memory", 4, "momentum", "channel", dtype),
            step_cases.Case("alternating", 2, "momentum", "channel", dtype, moving_levels=True),
        ):
            host.guard(True)
            try:
                ours = step_cases.make(case, [(1, numel), (3, numel)])
                run_on_host(host, case, ours)
            finally:
                host.guard(False)
            step_cases.check(case, ours, step_cases.make(case, [(1, numel), (3, numel)]))


@pytest.mark.parametrize("row", [1, 31, 32, 511, 512, 513, 4095, 4096, 4097, 8193, 20_481])
@pytest.mark.parametrize("rule", ["splitting", "alternating"])
def test_moving_levels_of_rows_by_warp_by_block_and_longer(host: Any, rule: str, row: int) -> None:
    for dtype in (step_cases.F32, step_cases.BF16):
        case = step_cases.Case(rule, 2, "momentum", "channel", dtype, moving_levels=True)
        shapes = [(3, row), (9, row)]
        ours, unaligned = step_cases.make(case, shapes), step_cases.make(case, shapes, offset=1)
        launches = run_on_host(host, case, ours)
        assert launches == (1 if row <= 4096 else 3)
        step_cases.check(case, ours, step_cases.make(case, shapes))
        run_on_host(host, case, unaligned, backwards=True)
        assert same(unaligned, ours)


def test_one_launch_serves_a_list(host: Any) -> None:
    case = step_cases.Case("askew", 2, "momentum", "tensor")
    for count, launches in ((1, 1), (248, 1), (249, 2), (1000, 5)):
        shapes = [(1 + 5000 * (i % 50 == 7), 1) for i in range(count)]
        ours = step_cases.make(case, shapes)
        assert run_on_host(host, case, ours) == launches
        step_cases.check(case, ours, step_cases.make(case, shapes))


@needs_extension
def test_200_random_launches_give_the_same_bits(host: Any) -> None:
    """A tensor in a list is stepped as the same tensor alone, wherever it lies; and as the CPU kernels do it."""
    for case, shapes, offset in random_launches(200):
        ours, expected = step_cases.make(case, shapes, offset=offset), step_cases.make(case, shapes)
        run_on_host(host, case, ours)
        if case.moving_levels:
            run_on_host(host, case, expected, backwards=True)
        else:
            step_cases.run(torch.ops.quantopt.fused_step, case, expected)
        assert same(ours, expected), (case, shapes, offset)


MAP_NORESERVE = 0x4000  # mmap names it from Python 3.13 on


def untouched(count: int) -> Tensor:
    """float32 zeros, of which only the pages that are written or read exist."""
    try:
        memory = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError:
        pytest.skip("the address space for so large a tensor is not to be had")
    return torch.frombuffer(memory, dtype=torch.float32)


@pytest.mark.parametrize(("numel", "row"), [(2**31 + 64, 64), (2**33 // 27 * 27, 27)])
def test_index_arithmetic_beyond_32_bits(host: Any, numel: int, row: int) -> None:
    """The last two blocks of a tensor whose rows have a scale each: the last element goes to its level."""
    param, grad, scale = (untouched(count) for count in (numel, numel, numel // row))
    grad[-1] = 100.0
    scale[-10_000:], scale[-1] = 0.25, 0.5
    hyper = hyper_tensor(lr=0.1, epsilon=1.0, rate=0.1, cap=0.25)
    matrices = [param.view(-1, row)], [grad.view(-1, row)]
    host.last_blocks(2)
    try:
        host.fused_step("askew", *matrices, [], [], [], [scale], [], [], hyper)
    finally:
        host.last_blocks(-1)
    assert param[-1] == -0.5
