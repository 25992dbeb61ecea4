"""The operator of the CUDA step, its source run on the host."""

import itertools
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quantopt import _extension
from quantopt.ops.step import hyper_tensor
from quantopt.rules import StepRecord
from step_cases import BF16, CASES, DYNAMIC, F32, Case, check, make, op, random_launches, same

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


def run_on_host(host: Any, case: Case, record: StepRecord, *, backwards: bool = False) -> int:
    """Makes the step and returns the number of kernel launches."""
    before = host.launches()
    host.backwards(backwards)
    host.hyper_on_device(case.hyper_on_device)
    try:
        host.fused_step(*record)
    finally:
        host.backwards(False)
        host.hyper_on_device(False)
    return int(host.launches() - before)


@needs_extension
@pytest.mark.parametrize("case", CASES, ids=str)
def test_source_gives_the_bits_of_the_cpu_kernel(host: Any, case: Case) -> None:
    """From aligned and unaligned memory. The sum behind a dynamic scale has another order on the GPU."""
    expected = make(case)
    op(expected)
    results = []
    for offset, backwards in ((0, False), (0, True), (1, False)):
        ours = make(case, offset=offset)
        run_on_host(host, case, ours, backwards=backwards)
        results.append(ours)
        if not case.dynamic_scale:
            assert same(ours, expected)
    if case.dynamic_scale:
        check(case, results[0], make(case))
        assert all(map(torch.equal, results[0].exp_avg_sqs, expected.exp_avg_sqs))
        assert all(same(ours, results[0]) for ours in results)


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 15, 16, 17, 4095, 4096, 4097, 12289])
def test_sizes_around_the_chunk(host: Any, numel: int) -> None:
    for case in (Case("askew", 2, "sgd", "tensor"), Case("askew", 4, "sgd", "tensor", BF16)):
        ours = make(case, [(numel,)])
        run_on_host(host, case, ours)
        check(case, ours, make(case, [(numel,)]))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_guard_pages_after_every_tensor(host: Any, dtype: torch.dtype) -> None:
    """A read or write beyond a tensor is a crash."""
    for numel in (1, 3, 4, 15, 16, 17, 4095, 4096, 4097):
        for case in (
            Case("askew_memory", 4, "sgd", "channel", dtype),
            Case("alternating", 2, "adam", "channel", dtype, dynamic_scale=True),
        ):
            host.guard(True)
            try:
                ours = make(case, [(1, numel), (3, numel)])
                run_on_host(host, case, ours)
            finally:
                host.guard(False)
            check(case, ours, make(case, [(1, numel), (3, numel)]))


def dynamic_rows() -> Iterator[tuple[str, str, torch.dtype, int]]:
    """Lengths of rows around the limits of a warp, a block and a chunk for each rule; each kernel on each base."""
    for rule, dtype in itertools.product(DYNAMIC, (F32, BF16)):
        yield from (
            (rule, "sgd", dtype, row) for row in (1, 31, 32, 511, 512, 513, 4095, 4096, 4097, 8193, 20_481)
        )
        yield from ((rule, base, dtype, row) for base in ("adam", "given") for row in (33, 600, 4100))


@pytest.mark.parametrize(("rule", "base", "dtype", "row"), list(dynamic_rows()), ids=str)
def test_dynamic_scales_of_rows_by_warp_by_block_and_longer(
    host: Any, rule: str, base: str, dtype: torch.dtype, row: int
) -> None:
    case = Case(rule, 2, base, "channel", dtype, dynamic_scale=True)
    shapes = [(3, row), (9, row)]
    ours, unaligned = make(case, shapes), make(case, shapes, offset=1)
    launches = run_on_host(host, case, ours)
    assert launches == (1 if row <= 4096 else 3) + (base == "adam")  # and one that counts the steps
    check(case, ours, make(case, shapes))
    run_on_host(host, case, unaligned, backwards=True)
    assert same(unaligned, ours)


def test_one_launch_serves_a_list(host: Any) -> None:
    case = Case("askew", 2, "sgd", "tensor")
    for count, launches in ((1, 1), (244, 1), (245, 2), (1000, 5)):
        shapes = [(1 + 5000 * (i % 50 == 7), 1) for i in range(count)]
        ours = make(case, shapes)
        assert run_on_host(host, case, ours) == launches
        check(case, ours, make(case, shapes))


@needs_extension
def test_200_random_launches_give_the_same_bits(host: Any) -> None:
    """A tensor in a list is stepped as the same tensor alone, wherever it lies; and as the CPU kernels do it."""
    for case, shapes, offset in random_launches(200):
        ours, expected = make(case, shapes, offset=offset), make(case, shapes)
        run_on_host(host, case, ours)
        if case.dynamic_scale:
            run_on_host(host, case, expected, backwards=True)
        else:
            op(expected)
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
    record = StepRecord(
        "askew", "given", [param.view(-1, row)], [grad.view(-1, row)], [], [], [], [scale], [], [], hyper
    )
    host.last_blocks(2)
    try:
        host.fused_step(*record)
    finally:
        host.last_blocks(-1)
    assert param[-1] == -0.5
