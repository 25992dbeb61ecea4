"""The position of the anneal: who counts, where it is kept, how it is saved and loaded."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import quantopt
from optim_cases import network, same, train, weights

TOTAL = 12


def start(**options: Any) -> tuple[nn.Module, Any]:
    model = network()
    return model, quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05, memory=True, **options)


def reached(opt: Any) -> float:
    return float(opt.param_groups[0]["epsilon"])


def expected(opt: Any, step: int, total: int = TOTAL) -> float:
    return float(opt.annealed(opt.param_groups[0], min(step, total), total)["epsilon"])


def test_updates_count_and_calls_do_not() -> None:
    """Gradient accumulation calls step() more often than the optimizer steps, a callback less often."""
    model, opt = start()
    anneal = quantopt.Anneal(opt, TOTAL)
    for k in range(1, TOTAL + 3):
        train(model, opt, 1)
        assert reached(opt) == expected(opt, k - 1)
        for _ in range(k % 4):
            anneal.step()
            assert reached(opt) == expected(opt, k) and anneal.last_step == k == anneal.last_epoch
        anneal.step()
    assert reached(opt) == 0.0


def test_a_fresh_optimizer_has_no_position_and_float_groups_never() -> None:
    _, opt = start()
    assert all("anneal_step" not in group for group in opt.param_groups)
    quantopt.Anneal(opt, TOTAL)
    assert ["anneal_step" in group for group in opt.param_groups] == [True, False]


def test_a_refused_step_does_not_count() -> None:
    model, opt = start(error_if_nonfinite=True)
    anneal = quantopt.Anneal(opt, TOTAL)
    train(model, opt, 2, anneal=anneal)
    p = opt.param_groups[0]["params"][0]
    p.grad = torch.full_like(p, math.nan)
    with pytest.raises(FloatingPointError):
        opt.step()
    assert anneal.last_step == 2


def test_a_resumed_run_is_the_straight_one() -> None:
    """With the optimizer's state alone, which is what every trainer restores; saved before and after step()."""
    model, opt = start()
    train(model, opt, TOTAL, anneal=quantopt.Anneal(opt, TOTAL))
    straight = weights(model)
    for before_step in (False, True):
        for attached in (False, True):  # whether the Anneal is there when the state is loaded
            model, opt = start()
            anneal = quantopt.Anneal(opt, TOTAL)
            train(model, opt, 6, anneal=anneal)
            train(model, opt, 1, first=6)
            if not before_step:
                anneal.step()
            saved = copy.deepcopy(opt.state_dict())
            again, opt = start()
            again.load_state_dict(model.state_dict())
            if attached:
                anneal = quantopt.Anneal(opt, TOTAL)
                opt.load_state_dict(saved)
            else:
                opt.load_state_dict(saved)
                anneal = quantopt.Anneal(opt, TOTAL)
            assert anneal.last_step == 7 and reached(opt) == expected(opt, 7)
            train(again, opt, 5, first=7, anneal=anneal)
            assert same(weights(again), straight)


def test_an_anneal_may_start_anew() -> None:
    model, opt = start()
    train(model, opt, 8, anneal=quantopt.Anneal(opt, TOTAL))
    assert quantopt.Anneal(opt, TOTAL).last_step == 8
    with pytest.warns(UserWarning, match="at step 8 of an anneal of 12 steps, and goes on at step 8 of 40"):
        quantopt.Anneal(opt, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anneal = quantopt.Anneal(opt, 20, last_step=0)
    assert anneal.state_dict() == {"last_step": 0, "total_steps": 20} and reached(opt) == 1.0
    assert quantopt.Anneal(opt, 20, last_step=15).last_step == 15 and reached(opt) == expected(opt, 15, 20)
    for step in (-1, 1.5, True):
        with pytest.raises(ValueError, match="last_step="):
            quantopt.Anneal(opt, 20, last_step=step)  # type: ignore[arg-type]


def test_the_present_length_counts_when_another_is_loaded() -> None:
    model, opt = start()
    long = quantopt.Anneal(opt, 100)
    train(model, opt, 9, anneal=long)
    _, other = start()
    short = quantopt.Anneal(other, TOTAL)
    with pytest.warns(UserWarning, match="step 9 of an anneal of 100 steps, .* step 9 of the 12"):
        other.load_state_dict(opt.state_dict())
    assert short.state_dict() == {"last_step": 9, "total_steps": TOTAL} and reached(other) == expected(
        other, 9
    )
    short.load_state_dict(long.state_dict())
    assert short.total_steps == 100 == other.param_groups[0]["anneal_total"]
    assert reached(other) == expected(other, 9, 100)


def test_a_state_without_a_position_leaves_the_present_one() -> None:
    model, opt = start()
    train(model, opt, 2)
    without = copy.deepcopy(opt.state_dict())
    anneal = quantopt.Anneal(opt, TOTAL, last_step=8)
    with pytest.warns(UserWarning, match="no position of the anneal.*stays at step 8"):
        opt.load_state_dict(without)
    assert anneal.last_step == 8 and reached(opt) == expected(opt, 8)


@pytest.mark.parametrize(
    "state",
    [
        {}, None, [("last_step", 1)], {"last_step": 1}, {"last_step": 1, "total_steps": 5, "more": 0},
        *({"last_step": step, "total_steps": 5} for step in (-1, 1.7, math.nan, True, "1", None, 10**400)),
        *({"last_step": 1, "total_steps": total} for total in (0, -3, 2.5, math.inf, True, "5", 10**400)),
    ],
)  # fmt: skip
def test_a_bad_state_changes_nothing(state: Any) -> None:
    _, opt = start()
    anneal = quantopt.Anneal(opt, TOTAL, last_step=8)
    before = copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=r"last_step|total_steps"):
        anneal.load_state_dict(state)
    assert opt.state_dict()["param_groups"] == before
    assert anneal.state_dict() == {"last_step": 8, "total_steps": TOTAL}


@pytest.mark.parametrize("key", ["anneal_step", "anneal_total"])
@pytest.mark.parametrize("value", [-1, 1.5, True, None, 10**400])
def test_a_bad_position_in_a_state_of_the_optimizer_is_refused(key: str, value: Any) -> None:
    _, opt = start()
    anneal = quantopt.Anneal(opt, TOTAL)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=key):
        opt.load_state_dict(saved)
    assert anneal.last_step == 0


def test_settings_are_checked_before_anything_is_changed() -> None:
    _, opt = start()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="hold < end"):
        quantopt.Anneal(opt, TOTAL, hold=0.9)
    assert opt.state_dict() == before


def test_a_late_group_takes_up_the_position() -> None:
    model, opt = start()
    anneal = quantopt.Anneal(opt, TOTAL)
    train(model, opt, 8, anneal=anneal)
    late = nn.Parameter(torch.randn(4, 4))
    opt.add_param_group({"params": [late], "param_names": ["late"], "bits": 1})
    opt.param_groups[1]["bits"] = 1  # quantised late
    train(model, opt, 1, first=8, anneal=anneal)
    for group in opt.param_groups:
        assert group["anneal_step"] == 9 and group["epsilon"] == expected(opt, 9)


def test_capturable_groups_count_calls() -> None:
    """The replay of a graph runs no Python, so the optimizer does not see it."""
    model, opt = start(capturable=True)
    anneal = quantopt.Anneal(opt, TOTAL)
    train(model, opt, 1)
    assert anneal.last_step == 0
    for k in range(1, TOTAL + 1):
        anneal.step()
        assert anneal.last_step == k and reached(opt) == expected(opt, k)


def test_the_making_of_state_does_not_count() -> None:
    """torch.distributed.checkpoint steps a fresh optimizer, with lr = 0 and zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, opt = start()
    anneal = quantopt.Anneal(opt, TOTAL)
    get_optimizer_state_dict(model, opt)
    assert anneal.last_step == 0
    train(model, opt, 7, anneal=anneal)
    for flatten in (False, True):
        options = torch.distributed.checkpoint.state_dict.StateDictOptions(
            flatten_optimizer_state_dict=flatten
        )
        saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
        other, other_opt = start()
        resumed = quantopt.Anneal(other_opt, TOTAL)
        set_optimizer_state_dict(other, other_opt, saved, options=options)
        assert resumed.last_step == 7 and reached(other_opt) == expected(other_opt, 7)
    model, opt = start()
    opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = 0.0  # a warm-up begins so
    anneal = quantopt.Anneal(opt, TOTAL)
    train(model, opt, 1, anneal=anneal)
    assert anneal.last_step == 1


def test_it_is_a_scheduler_that_leaves_the_rate_alone() -> None:
    model, opt = start()
    step = type(opt).step
    anneal = quantopt.Anneal(opt, TOTAL)
    assert isinstance(anneal, torch.optim.lr_scheduler.LRScheduler)
    assert "step" not in vars(opt) and type(opt).step is step and "initial_lr" not in opt.param_groups[0]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, TOTAL)
    both = torch.optim.lr_scheduler.ChainedScheduler([cosine, anneal], optimizer=opt)
    train(model, opt, 6, anneal=both)
    assert anneal.get_last_lr() == cosine.get_last_lr() == both.get_last_lr()
    assert anneal.last_epoch == cosine.last_epoch == 6 and reached(opt) == expected(opt, 6)
    saved = copy.deepcopy(both.state_dict())
    train(model, opt, 3, anneal=both)
    both.load_state_dict(saved)
    assert anneal.last_step == 6 and reached(opt) == expected(opt, 6)


def test_a_discarded_anneal_does_not_come_back() -> None:
    _, opt = start()
    quantopt.Anneal(opt, 5, schedule=lambda *_: {"epsilon": 0.25})
    anneal = quantopt.Anneal(opt, TOTAL, last_step=0)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.param_groups[0]["anneal_total"] == TOTAL == anneal.total_steps and reached(opt) == 1.0


def test_copies_go_on_apart() -> None:
    model, opt = start()
    anneal = quantopt.Anneal(opt, TOTAL)
    train(model, opt, 4, anneal=anneal)
    twin, twin_opt, twin_anneal = copy.deepcopy((model, opt, anneal))
    train(twin, twin_opt, 4, first=4, anneal=twin_anneal)
    assert anneal.last_step == 4 and twin_anneal.last_step == 8
    train(model, opt, 4, first=4, anneal=anneal)
    assert same(weights(model), weights(twin))


def test_a_copy_of_an_anneal_follows_the_loads_of_its_optimizer() -> None:
    """Of a state_dict that was saved between optimizer.step() and step()."""
    model, opt = start()
    anneal = quantopt.Anneal(opt, TOTAL)
    train(model, opt, TOTAL - 2, anneal=anneal)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["anneal_step"] = TOTAL - 1
    _, copied, _ = copy.deepcopy((model, opt, anneal))
    copied.load_state_dict(saved)
    assert copied.param_groups[0]["epsilon"] == expected(copied, TOTAL - 1)


def test_sequential_lr_is_refused_with_the_way_out() -> None:
    _, opt = start()
    rate = torch.optim.lr_scheduler.ConstantLR(opt)
    with pytest.raises(TypeError, match="ChainedScheduler"):
        torch.optim.lr_scheduler.SequentialLR(opt, [rate, quantopt.Anneal(opt, TOTAL)], [3])
