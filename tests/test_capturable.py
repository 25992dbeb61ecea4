"""capturable=True: learning rate, epsilon and kappa as tensors on the device, read there by every replay of a graph."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import quantopt
from optim_cases import MAKERS, every, network, same, train, weights
from quantopt import backends
from quantopt.optim import step as group_step
from quantopt.rules import HYPER


def schedules(opt: Any) -> tuple[Any, Any]:
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12), quantopt.Anneal(opt, 12)


def run(model: torch.nn.Module, opt: Any, steps: int, cosine: Any, anneal: Any, first: int = 0) -> None:
    for i in range(first, first + steps):
        train(model, opt, 1, first=i, anneal=anneal)
        cosine.step()


def set_decay(opt: Any, value: float) -> None:
    for group in opt.param_groups:
        group["weight_decay"] = value


@every
def test_the_same_weights_as_without(name: str) -> None:
    results = []
    for capturable in (False, True):
        model = network()
        opt = MAKERS[name](quantopt.param_groups(model), lr=0.05, weight_decay=0.01, capturable=capturable)
        cosine, anneal = schedules(opt)
        run(model, opt, 12, cosine, anneal)
        results.append(weights(model))
    assert same(*results)


@every
def test_scheduled_numbers_stay_the_same_tensors(name: str) -> None:
    model = network()
    opt = MAKERS[name](quantopt.param_groups(model), lr=0.05, capturable=True)
    cosine, anneal = schedules(opt)
    group = opt.param_groups[0]
    scheduled = {k: group[k] for k in ("lr", "epsilon", "kappa", "reg_strength") if k in group}
    assert all(isinstance(v, Tensor) and v.dtype == torch.float64 for v in scheduled.values())
    run(model, opt, 6, cosine, anneal)
    saved, at = copy.deepcopy(opt.state_dict()), weights(model)
    numbers = {k: float(v) for k, v in scheduled.items()}
    run(model, opt, 6, cosine, anneal, first=6)
    assert any(float(scheduled[k]) != numbers[k] for k in numbers)
    opt.load_state_dict(saved)
    assert all(opt.param_groups[0][k] is v for k, v in scheduled.items())
    assert {k: float(v) for k, v in scheduled.items()} == numbers
    assert not same(weights(model), at)  # weights are the model's, not the state's


def test_save_and_load_go_on_alike() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), memory=True, capturable=True)
    cosine, anneal = schedules(opt)
    run(model, opt, 5, cosine, anneal)
    other = copy.deepcopy(model)
    again = quantopt.AskewSGD(quantopt.param_groups(other), memory=True, capturable=True)
    cosine2, anneal2 = schedules(again)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    cosine2.load_state_dict(copy.deepcopy(cosine.state_dict()))
    anneal2.load_state_dict(anneal.state_dict())
    run(model, opt, 7, cosine, anneal, first=5)
    run(other, again, 7, cosine2, anneal2, first=5)
    assert same(weights(model), weights(other))


def test_loaded_floats_stay_exact() -> None:
    """0.1 is no float32, in a state of floats as in one of tensors."""
    model = network()
    for saved in (False, True):
        source = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.1, epsilon=0.3, capturable=saved)
        opt = quantopt.AskewSGD(quantopt.param_groups(model), capturable=True)
        state = copy.deepcopy(source.state_dict())
        for group in state["param_groups"]:
            group["capturable"] = True
        lr = opt.param_groups[0]["lr"]
        opt.load_state_dict(state)
        assert opt.param_groups[0]["lr"] is lr and lr.item() == 0.1
        assert opt.param_groups[0]["epsilon"].item() == 0.3


def test_a_load_that_asks_for_one_device_is_refused_before() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model))
    opt.param_groups[0]["params"][1] = torch.nn.Parameter(torch.ones(7, 5, 3, 3, device="meta"))
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(capturable=True, lr=0.7)
    with pytest.raises(ValueError, match="one device"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.3 and opt.param_groups[0]["capturable"] is False


@every
def test_a_loaded_state_takes_the_place_of_the_present_one(name: str) -> None:
    """So that a captured graph goes on with it. What was loaded from stays as it was."""
    model = network()
    opt = MAKERS[name](quantopt.param_groups(model), lr=0.05, capturable=True)
    train(model, opt, 3)
    saved, start = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    train(model, opt, 3, first=3)
    after = weights(model)
    tensors = [(p, key, value) for p, own in opt.state.items() for key, value in own.items()]
    hypers = [step.hyper for step in opt._group_steps]
    kept = copy.deepcopy(saved)
    model.load_state_dict(start)
    opt.load_state_dict(saved)
    assert all(opt.state[p][key] is value for p, key, value in tensors)
    train(model, opt, 3, first=3)
    assert same(weights(model), after)
    assert all(step.hyper is hyper for step, hyper in zip(opt._group_steps, hypers, strict=True))
    for i, own in kept["state"].items():
        assert all(torch.equal(saved["state"][i][key], value) for key, value in own.items())


def test_a_load_of_another_dtype_leaves_the_old_tensors_alone() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), capturable=True)
    train(model, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    momentum = saved["state"][0]["momentum_buffer"]
    saved["state"][0]["momentum_buffer"] = torch.ones_like(momentum, dtype=torch.float64)
    p = opt.param_groups[0]["params"][0]
    opt.load_state_dict(saved)
    assert bool((opt.state[p]["momentum_buffer"] == 1).all())


def test_a_load_without_state_begins_anew() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), capturable=True)
    unseen = copy.deepcopy(opt.state_dict())
    train(model, opt, 2)
    before = {p: own["momentum_buffer"] for p, own in opt.state.items()}
    opt.load_state_dict(unseen)
    assert not opt.state
    train(model, opt, 1)
    for p, old in before.items():
        momentum = opt.state[p]["momentum_buffer"]
        assert momentum is not old and torch.equal(momentum, p.grad)


def test_a_tensor_of_the_user_is_used_as_it_is() -> None:
    model = network()
    lr = torch.tensor(0.0)
    opt = quantopt.AskewSGD(model.parameters(), lr=lr, bits=0, capturable=True)
    before = weights(model)
    train(model, opt, 1)
    assert same(weights(model), before)
    lr.fill_(0.1)
    train(model, opt, 1)
    assert not same(weights(model), before)


def test_a_float_that_changes_is_noticed() -> None:
    results = []
    for capturable in (False, True):
        model = network()
        opt = quantopt.AskewSGD(quantopt.param_groups(model), weight_decay=0.1, capturable=capturable)
        train(model, opt, 2)
        for group in opt.param_groups:
            group["weight_decay"] = 0.5
        train(model, opt, 2, first=2)
        results.append(weights(model))
    assert same(*results)


def test_floats_that_a_graph_writes_are_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float that first changes while a graph is captured is written by every replay of it."""
    results = []
    for replayed in (False, True):
        model = network()
        opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05, capturable=True)
        train(model, opt, 1)
        set_decay(opt, 0.1)
        with monkeypatch.context() as patch:
            patch.setattr(group_step, "is_capturing", lambda _, now=replayed: now)
            train(model, opt, 1, first=1)
        for i in (2, 3):
            for step in opt._group_steps if replayed else ():
                step.hyper[HYPER.index("weight_decay")] = 0.7  # as a replay of another graph would
            train(model, opt, 1, first=i)
        results.append(weights(model))
    assert same(*results)


def test_capture_is_looked_for_on_the_device_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = [torch.device("cuda:0")]

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: current[-1] == torch.device("cuda:1")
    )
    assert group_step.is_capturing(torch.device("cuda:1"))
    assert not group_step.is_capturing(torch.device("cuda:0"))
    assert not group_step.is_capturing(torch.device("cpu"))


def odd_layouts(device: str) -> list[torch.nn.Parameter]:
    """One parameter that is not dense, one whose gradient lies otherwise, one plain."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    params = [
        torch.nn.Parameter(normal(4, 8)[:, :4]),
        torch.nn.Parameter(normal(6, 5)),
        torch.nn.Parameter(normal(7)),
    ]
    params[0].grad = normal(4, 4) * 0.1
    params[1].grad = (normal(5, 6) * 0.1).t()
    params[2].grad = normal(7) * 0.1
    return params


def test_odd_layouts_step_as_plain_ones() -> None:
    odd = odd_layouts("cpu")
    plain = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in odd]
    for p, q in zip(plain, odd, strict=True):
        assert q.grad is not None
        p.grad = q.grad.contiguous()
    for params in (odd, plain):
        opt = quantopt.AskewSGD(params, bits=1, lr=0.05, scale="none", capturable=True)
        for _ in range(3):
            opt.step()
    assert same([p.detach() for p in odd], [p.detach() for p in plain])


def test_refusals_name_the_remedy_and_add_nothing() -> None:
    model = network()
    with pytest.raises(ValueError, match="error_if_nonfinite"):
        quantopt.AskewSGD(model.parameters(), bits=1, capturable=True, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="lr is a tensor on cpu"):
        elsewhere = [torch.nn.Parameter(torch.ones(2, device="meta"))]
        quantopt.AskewSGD(elsewhere, bits=1, lr=torch.tensor(0.1), capturable=True)
    opt = quantopt.AskewSGD(model.parameters(), bits=1, capturable=True)
    mixed = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="meta"))]
    with pytest.raises(ValueError, match="one device"):
        opt.add_param_group({"params": mixed})
    assert len(opt.param_groups) == 1


def gradients(model: torch.nn.Module, i: int) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(i)
    return [torch.randn(p.shape, device="cuda", generator=generator) * 0.1 for p in model.parameters()]


def set_gradients(model: torch.nn.Module, i: int) -> None:
    for p, g in zip(model.parameters(), gradients(model, i), strict=True):
        assert p.grad is not None
        p.grad.copy_(g)


def transposed(model: torch.nn.Module) -> None:
    """Gives the matrices a layout that the kernels take only as a copy, where their scales are per channel."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def needs(backend: str) -> None:
    try:
        backends.choose("fused_step", torch.device("cuda"), torch.float32, backend)
    except backends.BackendError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("layout", ["dense", "transposed"])
@every
def test_a_replayed_graph_steps_as_eager(name: str, layout: str, backend: str) -> None:
    if name == "binaryconnect-stochastic":
        pytest.skip("draws other random signs in a graph")
    if (backend == "triton" or layout == "transposed") and name not in ("askew", "stam"):
        pytest.skip("each would be compiled again")
    needs(backend)
    results = []
    for graphed in (False, True):
        model = network().cuda()
        scale = "tensor"
        if layout == "transposed":
            transposed(model)
            scale = "channel"
        opt = MAKERS[name](
            quantopt.param_groups(model),
            lr=0.05,
            weight_decay=0.01,
            capturable=True,
            scale=scale,
            backend=backend,
        )
        cosine, anneal = schedules(opt)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        graph = None
        for i in range(12):
            set_gradients(model, i)
            if graphed and i == 3:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    opt.step()
            if graph is not None:
                graph.replay()
            else:
                opt.step()
            cosine.step()
            anneal.step()
            if i == 7:  # the graph goes on with what is loaded
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        results.append(weights(model))
    assert same(*results)


@pytest.mark.gpu
def test_an_infinite_gradient_skips_the_step_on_the_device() -> None:
    """found_inf of a GradScaler, through the plan, without a word to the host but the scaler's own."""
    model = network().cuda()
    opt = quantopt.AskewAdam(quantopt.param_groups(model), lr=0.05)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    set_gradients(model, 0)
    opt.step()
    before, state = weights(model), copy.deepcopy(opt.state_dict())
    opt.grad_scale = torch.full((1,), 8.0, device="cuda")
    opt.found_inf = torch.ones(1, device="cuda")
    set_gradients(model, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(weights(model), before)
    for i, own in state["state"].items():
        assert all(torch.equal(opt.state_dict()["state"][i][key], value) for key, value in own.items())
    opt.found_inf.zero_()
    opt.step()
    assert not same(weights(model), before)


@pytest.mark.gpu
def test_a_changed_float_does_not_wait_for_the_device() -> None:
    model = network().cuda()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), weight_decay=0.1, capturable=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    set_decay(opt, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(opt._group_steps[0].hyper[HYPER.index("weight_decay")]) == 0.5


@pytest.mark.gpu
def test_a_float_first_changed_in_a_capture() -> None:
    """Replays step with the float of the capture, steps between them with the present one."""
    results = []
    for graphed in (False, True):
        model = network().cuda()
        opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05, capturable=True)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        set_gradients(model, 0)
        opt.step()
        graph = torch.cuda.CUDAGraph()
        if graphed:
            set_decay(opt, 0.3)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                opt.step()
        for decay in (0.1, 0.3, 0.1):
            if graphed and decay == 0.3:
                graph.replay()
            else:
                set_decay(opt, decay)
                opt.step()
        results.append(weights(model))
    assert same(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_odd_layouts_in_a_replayed_graph(backend: str) -> None:
    needs(backend)
    results = []
    for graphed in (False, True):
        params = odd_layouts("cuda")
        opt = quantopt.AskewSGD(params, bits=1, lr=0.05, scale="none", capturable=True, backend=backend)
        opt.step()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                opt.step()
        for _ in range(3):
            opt.param_groups[0]["lr"].mul_(0.5)
            if graphed:
                graph.replay()
            else:
                opt.step()
        results.append([p.detach().clone() for p in params])
    assert same(*results)


@pytest.mark.gpu
def test_a_graph_goes_on_after_a_load() -> None:
    model = network().cuda()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05, capturable=True)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.01 * (i + 1))
    opt.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        opt.step()
    saved, at = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in model.parameters()]
    results = []
    for _ in range(2):
        graph.replay()
        results.append([p.detach().clone() for p in model.parameters()])
        opt.load_state_dict(copy.deepcopy(saved))
        for p, value in zip(model.parameters(), at, strict=True):
            p.data.copy_(value)
    opt.step()
    results.append([p.detach() for p in model.parameters()])
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.gpu
def test_capture_needs_capturable() -> None:
    model = network().cuda()
    opt = quantopt.AskewSGD(quantopt.param_groups(model))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
