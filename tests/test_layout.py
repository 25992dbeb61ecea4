"""When the step of a group is laid out again: what it depends on, and what it does not."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import quantopt
from test_plan import set_grads


@pytest.mark.parametrize("change", ["transposed", "viewed"])
def test_a_parameter_of_another_layout_at_the_same_address(change: str) -> None:
    results = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(8, 8))
        opt = quantopt.AskewSGD(
            [p], bits=1, lr=0.1, momentum=0.0, scale="channel", epsilon=0.5, backend=backend
        )
        for i in range(3):
            set_grads([p], i)
            opt.step()
        at = p.data_ptr()
        p.data = p.data.t() if change == "transposed" else p.data.view(16, 4)
        assert p.data_ptr() == at
        set_grads([p], 9)
        if change == "viewed":  # its 8 scales do not fit 16 rows
            with pytest.raises((ValueError, RuntimeError)):
                opt.step()
            return
        opt.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results, atol=2e-6, rtol=1e-4)


class Twisted(quantopt.AskewSGD):
    """A user's subclass, whose group key chooses the rule."""

    extra_options: ClassVar[dict[str, Any]] = {"twist": "a"}

    def _rule(self, group: dict[str, Any]) -> str:
        return "askew_gradient" if group["twist"] == "b" else "askew"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_option_of_a_subclass_takes_effect(backend: str) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))
    opt = Twisted([p], bits=1, lr=0.1, epsilon=0.01, backend=backend)
    p.grad = torch.full_like(p, 0.1)
    opt.step()
    for value in ("b", "a", "b"):
        opt.param_groups[0]["twist"] = value
        q, fresh = copy.deepcopy((p, opt))
        q = fresh.param_groups[0]["params"][0]
        q.grad = p.grad.clone()
        opt.step()
        fresh.step()
        assert torch.equal(p, q)


@pytest.mark.parametrize("case", ["reference", "layout of a gradient", "layout of a parameter"])
def test_lists_stay_where_no_plan_finds_the_gradients(case: str) -> None:
    p = nn.Parameter(torch.randn(6, 5) if case != "layout of a parameter" else torch.randn(6, 8)[:, :5])
    backend = "reference" if case == "reference" else "auto"
    opt = quantopt.STAM([p], bits=1, lr=0.1, backend=backend)
    steps = set()
    for i in range(4):
        g = torch.randn(6, 5, generator=torch.Generator().manual_seed(i))
        p.grad = g.t().contiguous().t() if case == "layout of a gradient" else g
        before = p.detach().clone()
        opt.step()
        assert not torch.equal(p, before)
        steps.add(id(opt._group_steps[0]))
    assert len(steps) == 1
    plain = nn.Parameter(torch.randn(6, 5))
    opt.param_groups[0]["params"][0] = plain  # noticed
    plain.grad = torch.ones(6, 5)
    opt.step()
    assert id(opt._group_steps[0]) not in steps


def test_keys_of_the_user_do_not_lay_out_the_step_again() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    opt = quantopt.AskewSGD([{"params": [p], "counter": object()}], bits=1, lr=0.1)
    steps = set()
    for i in range(3):
        set_grads([p], i)
        opt.param_groups[0]["counter"] = object()
        opt.step()
        steps.add(id(opt._group_steps[0]))
    assert len(steps) == 1


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_momentum_that_becomes_bfloat16_in_place(backend: str) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    opt = quantopt.AskewSGD([p], bits=1, lr=0.1, backend=backend)
    for i in range(2):
        set_grads([p], i)
        opt.step()
        opt.state[p]["momentum_buffer"].data = opt.state[p]["momentum_buffer"].data.bfloat16()
    set_grads([p], 2)
    opt.step()
    assert opt.state[p]["momentum_buffer"].dtype == torch.float32
