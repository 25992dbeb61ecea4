"""capturable=True: learning rate, epsilon and kappa as tensors on the device, read there by every replay of a graph."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import quantopt
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


@pytest.mark.gpu
@every
def test_a_replayed_graph_steps_as_eager(name: str) -> None:
    if name == "binaryconnect-stochastic":
        pytest.skip("draws other random signs in a graph")

    def gradients(model: torch.nn.Module, i: int) -> list[Tensor]:
        generator = torch.Generator(device="cuda").manual_seed(i)
        return [torch.randn(p.shape, device="cuda", generator=generator) * 0.1 for p in model.parameters()]

    results = []
    for graphed in (False, True):
        model = network().cuda()
        opt = MAKERS[name](quantopt.param_groups(model), lr=0.05, weight_decay=0.01, capturable=True)
        cosine, anneal = schedules(opt)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        graph = None
        for i in range(12):
            for p, g in zip(model.parameters(), gradients(model, i), strict=True):
                assert p.grad is not None
                p.grad.copy_(g)
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
        results.append(weights(model))
    assert same(*results)


@pytest.mark.gpu
def test_capture_needs_capturable() -> None:
    model = network().cuda()
    opt = quantopt.AskewSGD(quantopt.param_groups(model))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
