"""quantopt._C.StepPlan: the bits of the operator, and what makes a plan out of date."""

import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import quantopt
import step_cases
from conftest import force_isa
from quantopt import _extension
from quantopt.rules import BASES, RULES, StepRecord
from step_cases import same

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))

SHAPES = ((5, 13, 3), (129,), (0, 4), (64, 32), (1,))


def plan_of(record: StepRecord, left_out: list[Tensor] | None = None) -> Any:
    return _extension.StepPlan(record._replace(grads=[]), left_out or [])


def with_own_grads(record: StepRecord) -> StepRecord:
    """The parameters as leaves that hold the gradients of the record."""
    params = [nn.Parameter(p) for p in record.params]
    for p, grad in zip(params, record.grads, strict=True):
        p.grad = grad
    return record._replace(params=params)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", [False, True])
def test_three_steps_of_a_plan_are_three_of_the_operator(rule: str, base: str, given: bool) -> None:
    dynamic = RULES[rule].dynamic_scale
    for dtype, momentum_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        case = step_cases.Case(rule, 2, base, "channel", dtype, momentum_dtype, dynamic_scale=dynamic)
        ours, theirs = with_own_grads(step_cases.make(case, SHAPES)), step_cases.make(case, SHAPES)
        grads = list(ours.grads)
        plan = plan_of(ours)
        if given:
            for p in ours.params:
                p.grad = None
        for i in range(3):
            ours.hyper[0] = theirs.hyper[0] = 0.1 / (i + 1)  # lr is read at every step
            assert plan.valid(grads) if given else plan.valid()
            plan.step()
            step_cases.op(theirs)
        assert same(ours, theirs)


def test_grad_scaler_tensors() -> None:
    case = step_cases.Case("askew", 2, "sgd", "tensor", grad_scale=4.0, found_inf=0.0)
    ours, theirs = with_own_grads(step_cases.make(case)), step_cases.make(case)
    plan = plan_of(ours)
    assert plan.valid()
    plan.step(ours.grad_scale, found_inf=ours.found_inf)
    step_cases.op(theirs)
    assert same(ours, theirs)
    assert plan.valid()
    plan.step(found_inf=torch.ones(1))
    assert same(ours, theirs)


def record_of(params: list[nn.Parameter]) -> StepRecord:
    case = step_cases.Case("askew_memory", 2, "adam", "tensor")
    record = step_cases.make(case, [tuple(p.shape) for p in params])
    for p, grad in zip(params, record.grads, strict=True):
        p.grad = grad
    return record._replace(params=params)


def moved(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def set_data(change: Callable[[Tensor], Tensor]) -> Callable[[StepRecord], None]:
    """Another view of the same memory, with a gradient of its layout."""

    def do(record: StepRecord) -> None:
        p = record.params[0]
        p.grad = None
        p.data = change(p.data)
        p.grad = torch.ones_like(p)

    return do


def set_grad(grad: Callable[[Tensor], Tensor | None]) -> Callable[[StepRecord], None]:
    def do(record: StepRecord) -> None:
        p = record.params[0]
        p.grad = grad(p)

    return do


class Wrapper(Tensor):
    """A subclass without memory, as DTensor is."""

    @staticmethod
    def __new__(cls, like: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype)  # type: ignore[no-any-return, attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


CHANGES: dict[str, Callable[[StepRecord], None]] = {
    "transposed": set_data(lambda w: w.t()),
    "viewed in another shape": set_data(lambda w: w.view(16, 4)),
    "viewed with more dimensions": set_data(lambda w: w.view(8, 8, 1)),
    "parameter moved": lambda r: moved(r.params[0]),
    "momentum moved": lambda r: moved(r.momentum_buffers[0]),
    "second moment moved": lambda r: moved(r.exp_avg_sqs[0]),
    "latent moved": lambda r: moved(r.latents[0]),
    "latent transposed": lambda r: setattr(r.latents[0], "data", r.latents[0].data.t()),
    "scale moved": lambda r: moved(r.scales[0]),
    "scale reshaped": lambda r: setattr(r.scales[0], "data", r.scales[0].data.view(1, 1)),
    "empty parameter filled": lambda r: setattr(r.params[1], "data", torch.ones(2, 4)),
    "no gradient": set_grad(lambda p: None),
    "gradient of other strides": set_grad(lambda p: torch.ones(8, 8).t()),
    "expanded gradient": set_grad(lambda p: torch.ones(8, 1).expand(8, 8)),
    "sparse gradient": set_grad(lambda p: torch.ones(8, 8).to_sparse()),
    "negated view as gradient": set_grad(lambda p: torch._neg_view(torch.ones(8, 8))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_the_plan_out_of_date(change: str) -> None:
    record = record_of([nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.empty(0, 4))])
    plan = plan_of(record)
    assert plan.valid()
    plan.step()
    CHANGES[change](record)
    assert not plan.valid()
    with pytest.raises(RuntimeError, match="valid"):
        plan.step()


def test_another_dtype_at_the_same_address_makes_the_plan_out_of_date() -> None:
    case = step_cases.Case("askew", 2, "sgd", "tensor", step_cases.BF16, step_cases.BF16)
    for name in ("params", "momentum_buffers"):
        record = with_own_grads(step_cases.make(case))
        plan = plan_of(record)
        assert plan.valid()
        tensor = getattr(record, name)[0]
        tensor.data = tensor.data.view(torch.float16)
        if name == "params":
            tensor.grad = torch.ones_like(tensor)
        assert not plan.valid()


def test_a_parameter_left_out_that_has_a_gradient_makes_the_plan_out_of_date() -> None:
    record = record_of([nn.Parameter(torch.randn(8, 8))])
    other, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
    plan = plan_of(record, [other, empty])
    empty.grad = torch.ones(0)
    assert plan.valid()
    other.grad = torch.ones(3)
    assert not plan.valid()


def test_given_gradients_are_checked_as_those_of_the_parameters() -> None:
    record = record_of([nn.Parameter(torch.randn(8, 8))])
    plan = plan_of(record)
    good = torch.ones(8, 8)
    assert plan.valid([good])
    for grads in (
        [], [good, good], [None], [good.t().contiguous().t()], [good.double()], [good.view(64)], [good.to_sparse()],
        [Wrapper(good)],
    ):  # fmt: skip
        assert not plan.valid(grads)
    for grads in ([1.0], ["good"]):
        with pytest.raises(TypeError, match="grads must be tensors"):
            plan.valid(grads)


def test_given_gradients_are_kept_until_the_step() -> None:
    ours, theirs = (record_of([nn.Parameter(torch.ones(8, 8))]) for _ in range(2))
    plan = plan_of(ours)
    grad = torch.full((8, 8), 0.25)
    memory = StorageWeakRef(grad.untyped_storage())
    assert plan.valid([grad])
    del grad
    assert not memory.expired()
    plan.step()
    assert memory.expired()
    step_cases.op(theirs._replace(grads=[torch.full((8, 8), 0.25)]))
    assert same(ours, theirs)


def test_each_step_needs_valid() -> None:
    record = record_of([nn.Parameter(torch.randn(8, 8))])
    plan = plan_of(record)
    before = step_cases.map_lists(record, lambda t: t.detach().clone())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"call valid\(\) before each step"):
            plan.step()
        assert same(record, before)
        assert plan.valid()
        plan.step()
        before = step_cases.map_lists(record, lambda t: t.detach().clone())


def test_errors_are_those_of_the_operator() -> None:
    record = record_of([nn.Parameter(torch.randn(8, 8))])
    for changes, error, text in (
        (dict(rule="frobnicate"), ValueError, "unknown rule 'frobnicate'; use one of none, askew"),
        (dict(latents=[]), ValueError, "latents has 0 tensors for 1"),
        (dict(exp_avg_sqs=[torch.ones(8, 8).double()]), TypeError, r"exp_avg_sqs\[0\] must be float32"),
        (dict(params=[]), ValueError, "params is empty"),
        (dict(params=["w"]), TypeError, "params must be tensors, not str"),
        (dict(hyper=None), TypeError, "hyper must be tensors"),
    ):
        with pytest.raises(error, match=text) as raised:
            _extension.StepPlan(record._replace(**changes))
        assert "Exception raised from" not in str(raised.value)


def test_an_error_of_the_step_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of([nn.Parameter(torch.randn(8, 8))])
    plan = plan_of(record)
    assert plan.valid()
    with pytest.raises(ValueError, match="grad_scale must be one float32"):
        plan.step(torch.ones(2))
    assert plan.valid()
    force_isa(monkeypatch, "sse9")
    with pytest.raises(RuntimeError, match="QUANTOPT_CPU_ISA"):
        plan.step()


def test_autograd_sees_the_step() -> None:
    record = record_of([nn.Parameter(torch.randn(8, 8))])
    plan = plan_of(record)
    assert plan.valid()
    version = record.params[0]._version
    plan.step()
    assert record.params[0]._version == version + 1


def test_plans_of_several_threads() -> None:
    """The kernels run without Python's lock; each thread has its plan."""
    case = step_cases.Case("askew", 2, "sgd", "channel")
    records = [with_own_grads(step_cases.make(case)) for _ in range(4)]

    def train(record: StepRecord) -> None:
        plan = plan_of(record)
        for _ in range(20):
            assert plan.valid()
            plan.step()

    threads = [threading.Thread(target=train, args=(record,)) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = with_own_grads(step_cases.make(case))
    train(alone)
    assert all(same(record, alone) for record in records)
    assert all(math.isfinite(float(p.detach().sum())) for p in alone.params)


def test_a_plan_frees_its_tensors() -> None:
    record = record_of([nn.Parameter(torch.randn(8, 8))])
    latent = weakref.ref(record.latents[0])
    plan = plan_of(record)
    del record
    gc.collect()
    assert plan.valid()
    del plan
    gc.collect()
    assert latent() is None


@pytest.mark.parametrize("change", ["storage", "transposed", "viewed", "dtype"])
def test_a_watch_notices_what_moves(change: str) -> None:
    tensors = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3))]
    watch = _extension.TensorWatch(tensors)
    with torch.no_grad():
        tensors[0].mul_(2)
    assert watch.unchanged()
    tensors[0].data = {
        "storage": tensors[0].data.clone(),
        "transposed": tensors[0].data.t(),
        "viewed": tensors[0].data.view(2, 8),
        "dtype": tensors[0].data.view(torch.int32).view(torch.float32).bfloat16(),
    }[change]
    assert not watch.unchanged()


class Wrapped:
    """What find_gradients asks of a DTensor."""

    def __init__(self, shard: torch.Tensor, grad: "Wrapped | None" = None) -> None:
        self._local_tensor, self.grad, self.placements = shard, grad, ("Shard(0)",)


def test_gradients_are_found_where_kernels_can_read_them() -> None:
    p = nn.Parameter(torch.randn(4, 5))
    find = _extension.find_gradients
    assert find([p], [p], [p]) is None
    for good in (torch.randn(4, 5), torch.randn(8, 5)[2:6]):
        p.grad = good
        assert find([p], [p], [p])[0] is p.grad
    for bad in (torch.randn(5, 4).t(), torch.randn(1, 1).expand(4, 5), torch._neg_view(torch.randn(4, 5))):
        p.grad = bad
        assert find([p], [p], [p]) is None
    p.grad = torch.randn(4, 5)
    assert find([p], [p], [p.detach().bfloat16()]) is None
    assert find([p, p], [p], [p]) is None
    with pytest.raises(TypeError, match="find_gradients"):
        find((p,), [p], [p])

    shard, grad = torch.randn(2, 5), torch.randn(2, 5)
    sharded = Wrapped(shard, Wrapped(grad))
    assert find([sharded], [shard], [shard])[0] is grad
    assert find([sharded], [shard.clone()], [shard]) is None  # another shard than that of the lists
    sharded.grad.placements = ("Partial",)
    assert find([sharded], [shard], [shard]) is None  # a sum that its ranks have yet to form
    assert find([Wrapped(shard)], [shard], [shard]) is None
    assert find([object()], [shard], [shard]) is None


def test_a_gradient_without_memory_is_refused() -> None:
    """The plan would read what is not there."""
    p = torch.nn.Parameter(torch.ones(4, 4))
    opt = quantopt.AskewSGD([{"params": [p], "bits": 1}])
    for freed in (False, True):
        p.grad = torch.ones(4, 4)
        if freed:
            p.grad.untyped_storage().resize_(0)
            with pytest.raises(ValueError, match="gradient of parameter 0 of its group has no memory"):
                opt.step()
        else:
            opt.step()
