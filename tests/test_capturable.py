"""capturable=True: learning rate, epsilon and kappa as tensors on the device, read there by every replay of a graph."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import quantopt
from quantopt import backends
from test_optim import MAKERS, every, network, same, train, weights


def schedules(opt: Any) -> tuple[Any, Any]:
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12), quantopt.Anneal(opt, 12)


def run(model: torch.nn.Module, opt: Any, steps: int, cosine: Any, anneal: Any, first: int = 0) -> None:
    for i in range(first, first + steps):
        train(model, opt, 1, first=i, anneal=anneal)
        cosine.step()


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
    kept = copy.deepcopy(saved)
    model.load_state_dict(start)
    opt.load_state_dict(saved)
    assert all(opt.state[p][key] is value for p, key, value in tensors)
    train(model, opt, 3, first=3)
    assert same(weights(model), after)
    for i, own in kept["state"].items():
        assert all(torch.equal(saved["state"][i][key], value) for key, value in own.items())


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


def test_refusals_name_the_remedy_and_add_nothing() -> None:
    model = network()
    with pytest.raises(ValueError, match="error_if_nonfinite"):
        quantopt.AskewSGD(model.parameters(), capturable=True, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="lr is a tensor on cpu"):
        elsewhere = [torch.nn.Parameter(torch.ones(2, device="meta"))]
        quantopt.AskewSGD(elsewhere, lr=torch.tensor(0.1), capturable=True)
    opt = quantopt.AskewSGD(model.parameters(), capturable=True)
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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("layout", ["dense", "transposed"])
@every
def test_a_replayed_graph_steps_as_eager(name: str, layout: str, backend: str) -> None:
    if name == "binaryconnect-stochastic":
        pytest.skip("draws other random signs in a graph")
    if (backend == "triton" or layout == "transposed") and name not in ("askew", "stam"):
        pytest.skip("each would be compiled anew")
    try:
        backends.choose("fused_step", torch.device("cuda"), torch.float32, backend)
    except backends.BackendError as error:
        pytest.skip(str(error))
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
    opt = quantopt.AskewSGD(quantopt.param_groups(model), capturable=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for group in opt.param_groups:
            group["weight_decay"] = 0.5
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_capture_needs_capturable() -> None:
    model = network().cuda()
    opt = quantopt.AskewSGD(quantopt.param_groups(model))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
