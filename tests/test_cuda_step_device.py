"""The CUDA step on a GPU: the bits of the CPU kernels, streams, graphs, plans."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import quantopt
import step_cases
from machine_code import needs_cuda_build
from quantopt import _extension
from quantopt.ops.step import hyper_tensor
from quantopt.rules import HYPER, StepRecord
from step_cases import CASES, changing, map_lists, random_launches, same

pytestmark = [pytest.mark.gpu, needs_cuda_build]


def to_cpu(record: StepRecord) -> StepRecord:
    return map_lists(record, Tensor.cpu)


def on_device_and_cpu(
    case: step_cases.Case, shapes: Sequence[tuple[int, ...]] = step_cases.SHAPES, offset: int = 0
) -> tuple[StepRecord, StepRecord]:
    ours = step_cases.make(case, shapes, device="cuda", offset=offset)
    step_cases.op(ours)
    expected = step_cases.make(case, shapes)
    step_cases.op(expected)
    return ours, expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_device(case: step_cases.Case) -> None:
    """The bits of the CPU kernel, but for the powers of Adam and the sums of dynamic scales."""
    results = []
    for offset in (0, 1):
        ours, expected = on_device_and_cpu(case, offset=offset)
        step_cases.check(case, ours, step_cases.make(case))
        if not case.dynamic_scale and case.base != "adam":
            assert same(ours, expected)
        results.append(ours)
    assert same(results[0], to_cpu(results[1]))


def test_200_random_launches_on_the_device() -> None:
    for case, shapes, offset in random_launches(200):
        ours, expected = on_device_and_cpu(case, shapes, offset)
        if case.dynamic_scale or case.base == "adam":
            alone = step_cases.make(case, shapes, device="cuda")
            step_cases.op(alone)
            assert same(ours, to_cpu(alone)), (case, shapes, offset)
        else:
            assert same(ours, expected), (case, shapes, offset)


@pytest.mark.parametrize("row", [31, 512, 513, 4096, 4097, 100_000])
@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("rule", step_cases.DYNAMIC)
def test_dynamic_scales_on_the_device_repeat(rule: str, base: str, row: int) -> None:
    case = step_cases.Case(rule, 2, base, "channel", dynamic_scale=True)
    shapes = [(3, row), (1000, row)]
    first, _ = on_device_and_cpu(case, shapes)
    second, _ = on_device_and_cpu(case, shapes)
    step_cases.check(case, first, step_cases.make(case, shapes))
    assert same(first, to_cpu(second))


def test_runs_on_the_current_stream() -> None:
    case = step_cases.Case("askew", 2, "sgd", "tensor")
    ours = step_cases.make(case, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for grad in ours.grads:
            torch.cuda._sleep(10_000_000)
            grad.mul_(2).div_(2)
        step_cases.op(ours)
    stream.synchronize()
    step_cases.check(case, ours, step_cases.make(case))


def test_two_streams_do_not_disturb_each_other() -> None:
    """Dynamic scales of long rows, whose sums lie in a workspace."""
    case = step_cases.Case("alternating", 2, "sgd", "channel", dynamic_scale=True)
    shapes = [(4, 200_000), (64, 1000)]
    alone = step_cases.make(case, shapes, device="cuda")
    both = [step_cases.make(case, shapes, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    for _ in range(20):
        step_cases.op(alone)
        for stream, inputs in zip(streams, both, strict=True):
            with torch.cuda.stream(stream):
                step_cases.op(inputs)
    torch.cuda.synchronize()
    assert all(same(inputs, to_cpu(alone)) for inputs in both)


GRAPH_CASES = [
    step_cases.Case("askew", 2, "sgd", "tensor", hyper_on_device=True, found_inf=0.0, grad_scale=8.0),
    step_cases.Case("askew", 4, "adam", "channel", hyper_on_device=True),
    step_cases.Case("askew_memory", 4, "sgd", "group", hyper_on_device=True),
    step_cases.Case("prox", 2, "sgd", "tensor", step_cases.BF16, seed=9, hyper_on_device=True),
    step_cases.Case("alternating", 2, "sgd", "channel", dynamic_scale=True, hyper_on_device=True),
    step_cases.Case("splitting", 2, "adam", "channel", dynamic_scale=True, hyper_on_device=True),
]


@pytest.mark.parametrize("case", GRAPH_CASES, ids=str)
def test_a_captured_step_follows_changing_numbers(case: step_cases.Case) -> None:
    """Replayed with other lr, epsilon, kappa and found_inf it gives the weights of eager steps. The host is not
    involved."""
    shapes = [(5, 13, 3), (64, 32), (7, 5000)]
    captured, eager = (step_cases.make(case, shapes, device="cuda") for _ in range(2))
    kept = [t.clone() for t in changing(captured)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step_cases.op(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_cases.op(captured)
    for tensor, value in zip(changing(captured), kept, strict=True):
        tensor.copy_(value)
    names = ("lr", "epsilon", "kappa")
    for k, numbers in enumerate([(0.1, 0.9, 0.1), (0.05, 0.5, 1.0), (0.02, 0.1, math.inf), (0.0, 0.0, 2.0)]):
        for inputs in (captured, eager):
            for name, value in zip(names, numbers, strict=True):
                inputs.hyper[HYPER.index(name)] = value
            if inputs.found_inf is not None:
                inputs.found_inf.fill_(float(k == 2))
        graph.replay()
        step_cases.op(eager)
        assert same(captured, to_cpu(eager)), k


@pytest.mark.parametrize("case", GRAPH_CASES, ids=str)
def test_nothing_waits_for_the_device(case: step_cases.Case) -> None:
    inputs = step_cases.make(case, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_cases.op(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_numbers_on_another_device_are_refused() -> None:
    case = step_cases.Case("askew", 2, "sgd", "tensor")
    record = step_cases.make(case)
    with pytest.raises(ValueError, match="device of the parameters"):
        step_cases.op(record._replace(hyper=record.hyper.cuda()))


def test_a_checkpoint_goes_to_the_cpu_and_back() -> None:
    """Steps on GPU, CPU, GPU give the bits of three steps on the CPU."""

    def optimizer(device: str) -> tuple[list[torch.nn.Parameter], quantopt.AskewSGD]:
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))
            for shape in ((7, 33), (64, 32), (129,))
        ]
        # no scale of the weights: its sums are taken in another order on each device
        return params, quantopt.AskewSGD(params, bits=1, lr=0.1, scale="none", epsilon=0.4)

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


def test_a_plan_makes_the_step_of_the_op() -> None:
    case = step_cases.Case("alternating", 2, "sgd", "channel", dynamic_scale=True)
    planned, eager = (step_cases.make(case, device="cuda") for _ in range(2))
    params = [torch.nn.Parameter(p) for p in planned.params]
    for p, grad in zip(params, planned.grads, strict=True):
        p.grad = grad
    plan = _extension.StepPlan(planned._replace(params=params, grads=[]))
    for _ in range(3):
        assert plan.valid()
        plan.step(None, None)
        step_cases.op(eager)
    planned = planned._replace(params=[p.detach() for p in params])
    assert same(planned, to_cpu(eager))


def test_a_plan_follows_found_inf_and_grad_scale() -> None:
    """On the device: nothing changes while found_inf is set, and nothing waits."""
    case = step_cases.Case("askew", 2, "sgd", "tensor", grad_scale=8.0, found_inf=1.0)
    planned, eager = (step_cases.make(case, device="cuda") for _ in range(2))
    params = [torch.nn.Parameter(p) for p in planned.params]
    for p, grad in zip(params, planned.grads, strict=True):
        p.grad = grad
    plan = _extension.StepPlan(planned._replace(params=params, grads=[]))
    for found in (1.0, 0.0, 1.0):
        assert planned.found_inf is not None and eager.found_inf is not None
        planned.found_inf.fill_(found)
        eager.found_inf.fill_(found)
        before = [p.detach().clone() for p in params]
        assert plan.valid()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan.step(planned.grad_scale, planned.found_inf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        unchanged = [torch.equal(p, old) for p, old in zip(params, before, strict=True) if p.numel()]
        assert all(unchanged) if found else not any(unchanged)
        step_cases.op(eager)
    planned = planned._replace(params=[p.detach() for p in params])
    assert same(planned, to_cpu(eager))


def test_the_second_gpu_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = step_cases.Case("alternating", 2, "sgd", "channel", dynamic_scale=True)
    ours = step_cases.make(case, device="cuda:1")
    step_cases.op(ours)
    assert torch.cuda.current_device() == 0
    step_cases.check(case, ours, step_cases.make(case))


def test_more_than_2_to_the_31_elements() -> None:
    n, tail = 2**31 + 4099, 1024
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 11 GB of device memory")
    p, g = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    g[-tail:] = torch.linspace(-1, 1, tail)
    step_cases.op(StepRecord("none", "given", [p], [g], [], [], [], [], [], [], hyper_tensor(lr=0.5)))
    assert not bool(p[:-tail].any())
    assert torch.equal(p[-tail:], g[-tail:] * -0.5)
