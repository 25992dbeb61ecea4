"""A step with lr = 0: momentum and step numbers go on, and weights, latents, masters and scales keep their bits."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import quantopt
from optim_cases import MAKERS, every, network, same, weights
from quantopt import _extension

pytestmark = pytest.mark.usefixtures("one_thread")

MOMENTUM = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")
BACKENDS = ["reference"] + ["cpu"] * (_extension.error is None)


def train(model: nn.Module, opt: Any, steps: int, first: int = 0, anneal: Any = None) -> None:
    """With random gradients."""
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        torch.manual_seed(1000 + i)  # stochastic signs
        opt.step()
        if anneal is not None:
            anneal.step()
    opt.zero_grad()


def frozen_tensors(model: nn.Module, opt: Any) -> list[Tensor]:
    kept = [state[key] for state in opt.state.values() for key in state if key not in MOMENTUM]
    return [t.detach().clone() for t in (*model.parameters(), *kept)]


def moving_tensors(opt: Any) -> list[Tensor]:
    return [state[key].clone() for state in opt.state.values() for key in MOMENTUM if key in state]


def set_lr(opt: Any, lr: float) -> None:
    for group in opt.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [("float32", "master"), ("float16", "master")]
    + [("bfloat16", rounding) for rounding in ("master", "nearest", "stochastic")],
)
@every
def test_nothing_but_the_momentum_changes(
    name: str, dtype: str, rounding: str, backend: str, capturable: bool
) -> None:
    model = network(getattr(torch, dtype))
    groups = quantopt.param_groups(model, scale="channel")
    options = dict(rounding=rounding, backend=backend, capturable=capturable)
    opt = MAKERS[name](groups, lr=0.05, weight_decay=0.01, **options)
    train(model, opt, 7, anneal=quantopt.Anneal(opt, 8))  # intervals closed, kappa large, the prox hard
    twin, twin_opt = copy.deepcopy((model, opt))
    set_lr(opt, 0.0)
    before, moving = frozen_tensors(model, opt), moving_tensors(opt)
    train(model, opt, 1, 9)
    assert same(frozen_tensors(model, opt), before)
    assert all(not torch.equal(a, b) for a, b in zip(moving_tensors(opt), moving, strict=True))
    if "gradient" not in name:  # whose constraint needs rate / lr
        train(twin, twin_opt, 1, 9)
        assert same(moving_tensors(opt), moving_tensors(twin_opt))


def test_no_sign_is_drawn() -> None:
    p = nn.Parameter(torch.randn(8, 8))
    opt = quantopt.BinaryConnect([p], bits=1, lr=0.1, stochastic=True)
    for lr, draws in ((0.1, True), (0.0, False)):
        set_lr(opt, lr)
        p.grad = torch.ones(8, 8)
        before = torch.get_rng_state()
        opt.step()
        assert torch.equal(torch.get_rng_state(), before) is not draws


def test_weights_without_levels_of_an_infinite_gradient() -> None:
    p = nn.Parameter(torch.randn(5))
    opt = quantopt.AskewSGD([{"params": [p], "bits": 0}], lr=0.0)
    before = p.detach().clone()
    p.grad = torch.full((5,), math.inf)
    opt.step()
    assert torch.equal(p, before)


# ---- torch.distributed.checkpoint, which makes state by a step with lr = 0 and gradients of zero


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@every
def test_resuming_by_torch_changes_no_weight(name: str) -> None:
    def start() -> tuple[nn.Module, Any]:
        model = network()
        return model, MAKERS[name](quantopt.param_groups(model), lr=0.05)

    model, opt = start()
    train(model, opt, 9, anneal=quantopt.Anneal(opt, 10))
    states = copy.deepcopy(get_state_dict(model, opt))
    resumed, resumed_opt = start()
    set_model_state_dict(resumed, states[0])
    set_optimizer_state_dict(resumed, resumed_opt, states[1])
    assert same(weights(resumed), weights(model))
    for m, o in ((model, opt), (resumed, resumed_opt)):
        train(m, o, 3, 9)
    assert same(weights(resumed), weights(model))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("rounding", ["master", "nearest", "stochastic"])
@every
def test_saving_a_fresh_optimizer_changes_no_weight(name: str, rounding: str, capturable: bool) -> None:
    model = network(torch.bfloat16)
    options = dict(rounding=rounding, capturable=capturable)
    opt = MAKERS[name](quantopt.param_groups(model), lr=0.05, weight_decay=0.01, **options)
    before = weights(model)
    assert get_optimizer_state_dict(model, opt)["state"]
    assert same(weights(model), before)
