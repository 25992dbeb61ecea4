"""State goes to the parameter of its name, whatever the order, and through what frameworks wrap around a model."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import quantopt
from quantopt.wrappers import plain_names, unwrapped


class Net(nn.Module):
    def __init__(self, order: Iterable[str] = ("q", "k")) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        for name in order:
            setattr(self, name, nn.Linear(6, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.k(self.q(self.first(x)).relu()).relu())


def start(order: Iterable[str] = ("q", "k"), **options: Any) -> tuple[Net, Any]:
    torch.manual_seed(1)
    model = Net(order)
    return model, quantopt.AskewAdam(quantopt.param_groups(model, **options), memory=True)


def train(model: nn.Module, opt: Any, first: int = 0, steps: int = 3) -> None:
    for i in range(first, first + steps):
        opt.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(i))).square().mean().backward()
        opt.step()


def trained() -> tuple[Net, Any]:
    model, opt = start()
    train(model, opt)
    return model, opt


def assert_same_state(opt: Any, other: Any) -> None:
    """The two have the same state for each name."""
    states = [
        {
            name: o.state[p]
            for group in o.param_groups
            for name, p in zip(plain_names(group["param_names"]), group["params"], strict=True)
        }
        for o in (opt, other)
    ]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert state and state.keys() == states[1][name].keys()
        assert all(torch.equal(value, states[1][name][key]) for key, value in state.items())


def test_another_order_is_permuted() -> None:
    model, opt = trained()
    again, other = start("kq")
    again.load_state_dict(model.state_dict())
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    names = [list(group["param_names"]) for group in other.param_groups]
    assert names[0] == ["k.weight", "q.weight"] != opt.param_groups[0]["param_names"]
    other.load_state_dict(saved)
    assert [group["param_names"] for group in other.param_groups] == names
    assert saved["param_groups"] == kept["param_groups"]  # the caller's dict is as it was
    assert_same_state(opt, other)
    train(model, opt, 3)
    train(again, other, 3)
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize(("flatten", "full"), [(False, False), (True, False), (False, True)])
def test_a_distributed_checkpoint_of_another_order(flatten: bool, full: bool) -> None:
    """Its parameters are in our order already, while the names that it has are in that of the file."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, full_state_dict=full)
    model, opt = trained()
    saved = get_optimizer_state_dict(model, opt, options=options)
    again, other = start("kq")
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, other, saved, options=options)
    assert other.param_groups[0]["param_names"] == ["k.weight", "q.weight"]
    assert_same_state(opt, other)


def wrapped_names(opt: Any, wrap: Any) -> dict[str, Any]:
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [wrap(name) for name in group["param_names"]]
    return saved


@pytest.mark.parametrize(
    "wrap",
    [lambda n: f"module.{n}", lambda n: f"_orig_mod.module.{n}", lambda n: n.replace(".", "._orig_mod.")],
)
def test_wrappers_of_the_model_make_no_other_names(wrap: Any) -> None:
    _, opt = trained()
    _, other = start("kq")
    other.load_state_dict(wrapped_names(opt, wrap))
    assert other.param_groups[0]["param_names"] == ["k.weight", "q.weight"]
    assert_same_state(opt, other)


def refused(opt: Any, saved: dict[str, Any], named: str) -> None:
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=named):
        opt.load_state_dict(saved)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()


def test_names_that_differ_are_refused() -> None:
    _, opt = trained()
    _, other = start("qv")
    for loading in (other, trained()[1]):
        source = opt if loading is other else start("qv")[1]
        refused(
            loading,
            source.state_dict(),
            r"group 0 lacks '[kv].weight' and has '[kv].weight', unknown here.*delete",
        )
    refused(
        opt,
        wrapped_names(opt, lambda name: f"encoder.{name}"),
        "lacks 'q.weight', 'k.weight' and has 'encoder",
    )
    by_position = wrapped_names(opt, str)
    for group in by_position["param_groups"]:
        del group["param_names"]
    other.load_state_dict(by_position)  # the way out
    assert other.param_groups[0]["param_names"] == ["q.weight", "v.weight"]


def test_a_name_in_another_group_is_refused() -> None:
    _, opt = trained()
    _, other = start(skip=("first", "last", "k.*"))
    refused(
        other, opt.state_dict(), "'k.weight' is in group 1 of this optimizer, but in group 0 of state_dict"
    )
    refused(
        opt, other.state_dict(), "'k.weight' is in group 1 of state_dict, but in group 0 of this optimizer"
    )


def test_names_of_the_file_are_checked() -> None:
    _, opt = trained()
    for names in (["q.weight"], "qk", [1, 2], ["q.weight", None]):
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0]["param_names"] = names
        refused(opt, saved, "param_names of group 0 of the state_dict is not a list")
    saved["param_groups"][0]["param_names"] = ["q.weight", "q.weight"]
    refused(opt, saved, "group 0 has a name twice")


def test_names_on_one_side_go_by_position_and_are_not_taken_over() -> None:
    _, opt = trained()
    unnamed = copy.deepcopy(opt.state_dict())
    for group in unnamed["param_groups"]:
        del group["param_names"]
    _, named = start("qv")
    named.load_state_dict(unnamed)
    assert named.param_groups[0]["param_names"] == ["q.weight", "v.weight"]
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in quantopt.param_groups(Net())
    ]
    plain = quantopt.AskewAdam(groups, memory=True)
    plain.load_state_dict(opt.state_dict())
    assert all("param_names" not in group for group in plain.param_groups)
    for own, group in zip(opt.param_groups, plain.param_groups, strict=True):
        for p, q in zip(own["params"], group["params"], strict=True):
            assert torch.equal(opt.state[p]["exp_avg"], plain.state[q]["exp_avg"])


def test_hooks_see_the_state_dict_as_given_and_may_rename() -> None:
    _, opt = trained()
    _, other = start("kq")
    seen: list[Any] = []

    def rename(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(state_dict["param_groups"][0]["param_names"])
        names = [name.removeprefix("old.") for name in seen[-1]]
        groups = [state_dict["param_groups"][0] | {"param_names": names}, state_dict["param_groups"][1]]
        return {**state_dict, "param_groups": groups}

    other.register_load_state_dict_pre_hook(rename)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["param_names"] = ["old.q.weight", "old.k.weight"]
    other.load_state_dict(saved)
    assert seen == [["old.q.weight", "old.k.weight"]]
    assert_same_state(opt, other)


# ---- wrappers --------------------------------------------------------------------------------------------------


def test_plain_names() -> None:
    assert plain_names(["module._orig_mod.a.weight", "module.b"]) == ["a.weight", "b"]
    assert plain_names(["_fsdp_wrapped_module.a._checkpoint_wrapped_module.b"]) == ["a.b"]
    assert plain_names(["module.a", "other.a"]) == ["module.a", "other.a"]  # a submodule of that name
    assert plain_names(["module", "module.a"]) == ["module", "module.a"]
    assert plain_names(["modules.a", "_orig_module.b"]) == ["modules.a", "_orig_module.b"]
    assert plain_names([]) == []
    names = [f"module.{name}" for name, _ in Net().named_parameters()]
    assert plain_names(names) == [name for name, _ in Net().named_parameters()]


class AcceleratedOptimizer:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


class LightningOptimizer(AcceleratedOptimizer):
    """As Lightning's: its class is made at run time, of its own and that of the optimizer within."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class ZeroRedundancyOptimizer(AcceleratedOptimizer):
    pass


def test_wrapped_optimizers() -> None:
    _, opt = start()
    assert unwrapped(opt) is opt and unwrapped(None) is None
    for wrapped in (
        AcceleratedOptimizer(opt),
        LightningOptimizer(opt),
        AcceleratedOptimizer(LightningOptimizer(opt)),
    ):
        assert unwrapped(wrapped) is opt
        anneal = quantopt.Anneal(wrapped, 10, last_step=0)  # type: ignore[arg-type]
        assert anneal.optimizer is opt
    for wrapped in (ZeroRedundancyOptimizer(opt), AcceleratedOptimizer(ZeroRedundancyOptimizer(opt))):
        with pytest.raises(TypeError, match=r"one rank only.*fully_shard"):
            quantopt.Anneal(wrapped, 10)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of a wrapper, pass the optimizer within"):
        quantopt.Anneal(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 10)


def test_a_state_loaded_through_the_wrapper_of_lightning_reaches_the_optimizer() -> None:
    _, opt = trained()
    _, other = start()
    LightningOptimizer(other).load_state_dict(opt.state_dict())
    assert_same_state(opt, other)
