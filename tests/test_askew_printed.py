"""AskewSGD and AskewAdam without the clamp: the options, what is loaded, views of weights beyond the outer levels, and
the paper's schedule."""

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import quantopt
from optim_cases import MAKERS, network, same, train, weights

printed = pytest.mark.parametrize("name", [name for name in MAKERS if "printed" in name])


def one_weight(values: list[float], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Weights with the levels -1 and 1, and zero gradients."""
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    options = {"bits": 1, "scale": "none", "lr": 0.1, "clamp": False} | options
    opt = quantopt.AskewSGD([p], **options)
    p.grad = torch.zeros_like(p)
    return p, opt


def quiet_step(opt: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_the_printed_form_has_no_latent() -> None:
    text = r"clamp=False .*memory=True .*use clamp=True .*or memory=False"
    with pytest.raises(ValueError, match=text):
        one_weight([1.0], memory=True)
    _, opt = one_weight([1.5])
    late = {"params": [nn.Parameter(torch.ones(2))], "memory": True}
    with pytest.raises(ValueError, match=text):
        opt.add_param_group(late)
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match="clamp='no': must be True or False"):
        one_weight([1.0], clamp="no")


@pytest.mark.parametrize("constrain", ["velocity", "gradient"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_group_is_laid_out_again_when_the_clamp_changes(constrain: str, backend: str) -> None:
    p, opt = one_weight([1.5, -1.5, 0.0], epsilon=0.16, constrain=constrain, momentum=0.0, backend=backend)
    opt.step()
    delta = 0.5 - 0.1 * (0.25 - 0.16) / (2 * 0.5)
    torch.testing.assert_close(p.detach(), torch.tensor([1 + delta, -1 - delta, 0.25]))
    opt.param_groups[0]["clamp"] = True
    opt.step()
    assert p[0] == 1 and p[1] == -1
    opt.param_groups[0]["clamp"] = False
    p.grad = torch.tensor([-3.0, 3.0, 0.0])
    opt.step()
    torch.testing.assert_close(p.detach()[:2], torch.tensor([1.3, -1.3]))


@printed
def test_weights_leave_the_levels_and_come_back(name: str) -> None:
    """Within 1 + sqrt(e), up to one step, and to it with gradients of zero."""
    model = network()
    options = {} if "adam" in name else {"momentum": 0.0}  # which takes the restoring gradient up
    opt = MAKERS[name](quantopt.param_groups(model, bits=1, scale="none"), lr=0.05, **options)
    with torch.no_grad():
        for p in opt.param_groups[0]["params"]:
            p.mul_(30).clamp_(-3, 3)
    for group in opt.param_groups:
        group["epsilon"], group["rate"] = 0.25, 0.5
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    farthest = [float(p.detach().abs().max()) for p in opt.param_groups[0]["params"]]
    assert max(farthest) == 3
    for _ in range(60):
        opt.step()
    for p in opt.param_groups[0]["params"]:
        sizes = p.detach().abs()
        assert 1 < float(sizes.max()) <= 1.5 + 1e-3 and float(sizes.min()) >= math.sqrt(0.5) - 1e-3
    assert opt.metrics()[0]["fraction_feasible"] > 0.9


def test_weights_too_far_beyond_are_not_feasible() -> None:
    _, opt = one_weight([1.2, -1.6, 0.2, 0.95], epsilon=0.25)
    assert opt.metrics()[0]["fraction_feasible"] == 0.5
    _, opt = one_weight([1.2, -1.6, 0.2, 0.95], epsilon=0.25, clamp=True)
    assert opt.metrics()[0]["fraction_feasible"] == 0.75


@pytest.mark.parametrize("bits", [1, 2, "ternary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_project_weights_beyond_the_outer_levels(bits: int | str, dtype: torch.dtype) -> None:
    hi = {1: 1.0, 2: 1.5 * 0.9957, "ternary": 1.224}[bits]
    p, opt = one_weight([1.7 * hi, -1.4 * hi, 0.9 * hi, -0.02 * hi], dtype, bits=bits, epsilon=0.9, rate=0.0)
    opt.step()
    before = p.detach().clone()
    near_zero = {1: -hi, 2: -hi / 3, "ternary": 0.0}[bits]
    expected = torch.tensor([hi, -hi, hi, near_zero])
    with opt.quantized():
        torch.testing.assert_close(p.detach(), expected.to(dtype))
    assert torch.equal(p.detach(), before) and before[0] > 1.6 * hi
    found = opt.quantization(p)
    count = found.levels
    torch.testing.assert_close(
        hi * (2 * found.codes.float() / (count - 1) - 1), expected, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_beyond_the_levels_are_not_taken_for_writes(dtype: torch.dtype) -> None:
    p, opt = one_weight([1.7, -1.53, 1.31], dtype, epsilon=0.2, rate=0.003)
    for _ in range(20):
        quiet_step(opt)
        with opt.quantized():
            pass
    master = opt.state[p]["master"]
    twin, exact = one_weight(p.new_tensor([1.7, -1.53, 1.31]).tolist(), epsilon=0.2, rate=0.003)
    for _ in range(20):
        exact.step()
    assert torch.equal(master, twin.detach()) and torch.equal(p.detach(), master.to(dtype))
    saved = copy.deepcopy(opt.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)
        opt.step()
    exact.step()
    assert torch.equal(opt.state[p]["master"], twin.detach())


@pytest.mark.parametrize("clamp", [True, False])
def test_state_without_the_option_is_of_the_clamped_form(clamp: bool) -> None:
    """So are those of version 0.1.0, and those that are saved now: the clamp is not said."""
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05)
    train(model, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    assert not any("clamp" in group for group in saved["param_groups"])
    twin = copy.deepcopy(model)
    twin_opt = quantopt.AskewSGD(quantopt.param_groups(twin), lr=0.05, clamp=clamp)
    twin_opt.load_state_dict(saved)
    train(model, opt, 2, 2)
    train(twin, twin_opt, 2, 2)
    assert same(weights(model), weights(twin))


def test_state_of_the_printed_form_says_so() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05, clamp=False)
    train(model, opt, 2)
    twin = copy.deepcopy(model)
    twin_opt = quantopt.AskewSGD(quantopt.param_groups(twin), lr=0.05)
    twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [group["clamp"] for group in twin_opt.param_groups] == [False] * 2
    train(model, opt, 2, 2)
    train(twin, twin_opt, 2, 2)
    assert same(weights(model), weights(twin))


def test_an_optimizer_that_was_pickled_without_the_option_clamps() -> None:
    p, opt = one_weight([1.0], clamp=True)
    opt.step()
    pickled = pickle.loads(pickle.dumps(opt.__getstate__()))
    del pickled["_options"]["clamp"]
    assert not any("clamp" in group for group in (pickled["defaults"], *pickled["param_groups"]))
    old = quantopt.AskewSGD.__new__(quantopt.AskewSGD)
    old.__setstate__(pickled)
    (p,) = old.param_groups[0]["params"]
    p.grad = torch.full_like(p, -1.0)
    old.step()
    assert p.item() == 1.0


# ---- the paper's schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [quantopt.AskewSGD, quantopt.AskewAdam])
@pytest.mark.parametrize("options", [{}, {"clamp": False}, {"memory": True}], ids=str)
def test_the_schedule_of_the_paper(make: Any, options: dict[str, Any]) -> None:
    """Epochs of one step, as the paper prints them."""
    p = nn.Parameter(torch.randn(4))
    p.grad = torch.zeros_like(p)
    opt = make([p], bits=1, lr=0.01, **options)
    anneal = quantopt.Anneal(opt, 100, schedule="paper")
    found: list[float] = []
    for _ in range(100):
        found.append(float(opt.param_groups[0]["epsilon"]))
        opt.step()
        anneal.step()
    assert found[:51] == [1.0] * 51 and found[51] == pytest.approx(0.88)
    assert found[65] == pytest.approx(0.147, abs=5e-4) and found[90] == pytest.approx(0.006, abs=5e-4)
    assert float(opt.param_groups[0]["epsilon"]) == pytest.approx(0.88**50) and 0 < min(found)


def test_the_schedule_of_the_paper_does_not_depend_on_the_length() -> None:
    for total in (7, 390):
        opt = quantopt.AskewSGD([nn.Parameter(torch.randn(4))], bits=1)
        anneal = quantopt.Anneal(opt, total, schedule="paper", last_step=total)
        assert opt.param_groups[0]["epsilon"] == pytest.approx(0.88**50)
        assert anneal.last_step == total


def test_a_schedule_by_a_name_is_refused_where_it_means_nothing() -> None:
    p = nn.Parameter(torch.randn(4))
    with pytest.raises(ValueError, match=r"schedule='paper': STAM has no epsilon.*leave schedule out"):
        quantopt.Anneal(quantopt.STAM([p], bits=1), 10, schedule="paper")
    opt = quantopt.AskewSGD([p], bits=1)
    with pytest.raises(ValueError, match=r"schedule='linear': use one of \['paper'\]"):
        quantopt.Anneal(opt, 10, schedule="linear")
    with pytest.raises(ValueError, match="leave out schedule="):
        quantopt.Anneal(opt, 10, schedule="paper", hold=0.5)
    assert "anneal_step" not in opt.param_groups[0]
