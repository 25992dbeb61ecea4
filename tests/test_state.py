"""State: checkpoints, copies, what does not fit."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import quantopt
from optim_cases import BF16_MOMENTS, MAKERS, every, network, same, train, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_save_and_load_in_mid_run(name: str, dtype: torch.dtype) -> None:
    def start() -> tuple[nn.Module, Any, Any]:
        model = network(dtype)
        opt = MAKERS[name](quantopt.param_groups(model), lr=0.05, weight_decay=0.01)
        return model, opt, quantopt.Anneal(opt, 10)

    model, opt, anneal = start()
    train(model, opt, 10, anneal=anneal)
    straight = weights(model)

    model, opt, anneal = start()
    train(model, opt, 5, anneal=anneal)
    opt.metrics()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "anneal": anneal.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, opt, anneal = start()
    train(model, opt, 1)  # state to be overwritten
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    anneal.load_state_dict(saved["anneal"])
    train(model, opt, 5, first=5, anneal=anneal)
    assert same(weights(model), straight)


def test_state_of_another_dtype_keeps_its_float32_latent() -> None:
    model = network()
    opt = quantopt.STAM(quantopt.param_groups(model))
    train(model, opt, 3)
    low = network(torch.bfloat16)
    low.load_state_dict(model.state_dict())
    other = quantopt.STAM(quantopt.param_groups(low))
    other.load_state_dict(opt.state_dict())
    other.metrics()
    for p, q in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(opt.state[p]["latent"], other.state[q]["latent"])
    train(low, other, 1, 3)


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.1)
    train(model, opt, 1)
    before = copy.deepcopy(opt.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong_shape, wrong_lr = copy.deepcopy(before), copy.deepcopy(before)
    wrong_shape["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    wrong_lr["param_groups"][0]["lr"] = math.nan
    one_group = quantopt.AskewSGD(model.parameters(), bits=1).state_dict()
    missing, listed, scale, nan = (copy.deepcopy(before) for _ in range(4))
    del missing["state"][0]["momentum_buffer"]
    listed["state"][0]["momentum_buffer"] = [1.0]
    scale["state"][0]["scale"] = torch.ones(4)
    nan["state"][0]["scale"] = torch.full((1,), math.nan)
    for state, named in [
        (sgd.state_dict(), "groups"), (wrong_shape, "'2.weight' has momentum_buffer"),
        (wrong_lr, "lr"), (one_group, "groups"), ({}, "param_groups"), (missing, "lacks.*momentum_buffer"),
        (listed, "dict of tensors"), (scale, "scale of shape"), (nan, "no scale"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=named):
            opt.load_state_dict(state)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, state_of in before["state"].items():
            assert all(torch.equal(v, after["state"][i][k]) for k, v in state_of.items())


@every
def test_copies_and_pickles_go_on_alike(name: str) -> None:
    model = network()
    opt = MAKERS[name](quantopt.param_groups(model), lr=0.05)
    train(model, opt, 3)
    twin, twin_opt = copy.deepcopy((model, opt))
    third, third_opt = pickle.loads(pickle.dumps((model, opt)))
    for m, o in ((model, opt), (twin, twin_opt), (third, third_opt)):
        train(m, o, 2, 3)
    assert same(weights(model), weights(twin)) and same(weights(model), weights(third))


def test_an_optimizer_pickled_by_the_first_version() -> None:
    for make in (quantopt.AskewSGD, quantopt.AskewAdam):
        model = network()
        opt = make(quantopt.param_groups(model), lr=0.05)
        train(model, opt, 1)
        pickled = {key: value for key, value in opt.__getstate__().items() if key != "_options"}
        old = make.__new__(make)
        old.__setstate__(pickled)
        late = {"params": [nn.Parameter(torch.ones(2))], "param_names": ["late"], "bits": 0, "lr": 0.1}
        old.add_param_group(late)
        twin = copy.deepcopy((model, opt))
        train(model, old, 2, 1)
        train(*twin, 2, 1)
        assert same(weights(model), weights(twin[0]))


def test_adam_counts_from_its_first_step() -> None:
    p = nn.Parameter(torch.randn(8, 8).bfloat16())
    opt = quantopt.AskewSGD([p], bits=1, lr=0.01, rounding="stochastic")
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    assert float(opt.state[p]["step"]) == 3
    opt.param_groups[0].update(base="adam", betas=(0.9, 0.999), eps=1e-8)
    opt.step()
    assert float(opt.state[p]["step"]) == 1 and "exp_avg" in opt.state[p]


def test_state_of_adam_is_not_that_of_sgd() -> None:
    model = network()
    opt = quantopt.AskewAdam(quantopt.param_groups(model))
    train(model, opt, 1)
    with pytest.raises(ValueError, match=r"another optimizer: its groups lack \['momentum'\]"):
        quantopt.AskewSGD(quantopt.param_groups(network()), momentum=0.0).load_state_dict(opt.state_dict())


def test_options_that_a_state_dict_lacks_take_their_defaults() -> None:
    model = network()
    opt = quantopt.STAM(quantopt.param_groups(model), lr=0.1)
    train(model, opt, 1)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        del group["seed"], group["capturable"]
    opt.param_groups[0]["seed"] = 7
    opt.load_state_dict(saved)
    assert [(group["seed"], group["capturable"]) for group in opt.param_groups] == [(0, False)] * 2
    train(model, opt, 1, 1)
    del saved["param_groups"][0]["form"]
    with pytest.raises(ValueError, match=r"lack \['form'\]"):
        opt.load_state_dict(saved)


def bytes_per_element(opt: Any, p: nn.Parameter) -> float:
    """Of the state that has the shape of its parameter."""
    return sum(value.nbytes for value in opt.state[p].values() if value.shape == p.shape) / p.numel()


def test_bytes_of_the_state_of_adam_with_a_latent() -> None:
    """Of bfloat16 parameters: 12 for a float32 latent and moments, 8 with the moments in bfloat16."""
    for options, size in (({}, 12), (dict(momentum_dtype="bfloat16"), 10), (BF16_MOMENTS, 8)):
        model = network(torch.bfloat16)
        opt = quantopt.AskewAdam(quantopt.param_groups(model), memory=True, **options)
        train(model, opt, 1)
        assert {bytes_per_element(opt, p) for p in opt.param_groups[0]["params"]} == {size}


def second_moments(opt: Any) -> list[torch.Tensor]:
    return [opt.state[p]["exp_avg_sq"] for group in opt.param_groups for p in group["params"]]


def test_second_moments_are_converted_when_the_option_changes() -> None:
    """To bfloat16 and back, each time at the next step, and as if they had never been of another dtype."""
    model, twin = network(), network()
    opt, exact = (quantopt.AskewAdam(quantopt.param_groups(m), lr=0.0) for m in (model, twin))
    assert "exp_avg_sq_dtype" not in opt.param_groups[0]  # as of versions that lacked it
    for step, dtype in enumerate(("float32", "bfloat16", "bfloat16", "float32")):
        for group in opt.param_groups:
            group["exp_avg_sq_dtype"] = dtype
        for m, o in ((model, opt), (twin, exact)):
            train(m, o, 1, step)
        for ours, theirs in zip(second_moments(opt), second_moments(exact), strict=True):
            assert ours.dtype == getattr(torch, dtype)
            torch.testing.assert_close(ours.float(), theirs, rtol=2.0**-6 if step else 0, atol=0)
    assert not all(map(torch.equal, second_moments(opt), second_moments(exact)))


@pytest.mark.parametrize("with_key", [False, True])
def test_the_dtype_of_second_moments_is_that_of_the_loaded_groups(with_key: bool) -> None:
    """A state_dict says it; one without the option, as of versions that lacked it, is of float32."""
    model = network()
    saved_by = quantopt.AskewAdam(quantopt.param_groups(model))
    if with_key:
        for group in saved_by.param_groups:
            group["exp_avg_sq_dtype"] = "float32"
    train(model, saved_by, 2)
    low = quantopt.AskewAdam(quantopt.param_groups(network()), exp_avg_sq_dtype="bfloat16")
    low.load_state_dict(saved_by.state_dict())
    assert {v.dtype for v in second_moments(low)} == {torch.float32}
    for group in low.param_groups:
        group["exp_avg_sq_dtype"] = "bfloat16"
    low.metrics()
    quantised = low.param_groups[0]["params"]
    for p, q in zip(quantised, saved_by.param_groups[0]["params"], strict=True):
        assert torch.equal(low.state[p]["exp_avg_sq"], saved_by.state[q]["exp_avg_sq"].bfloat16())
    saved_by.load_state_dict(low.state_dict())  # and back
    for group in saved_by.param_groups:
        group["exp_avg_sq_dtype"] = "float32"
    saved_by.metrics()
    for p, q in zip(quantised, saved_by.param_groups[0]["params"], strict=True):
        assert torch.equal(low.state[p]["exp_avg_sq"].float(), saved_by.state[q]["exp_avg_sq"])


def test_second_moments_of_two_dtypes_in_a_group_draw_other_numbers() -> None:
    params = [nn.Parameter(torch.ones(64, 64, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    opt = quantopt.AskewAdam([{"params": params, "bits": 0}], exp_avg_sq_dtype="bfloat16")
    for p in params:
        p.grad = torch.full_like(p, 1.5)
    opt.step()
    first, second = second_moments(opt)
    assert first.unique().tolist() == second.unique().tolist()  # the two neighbours of 0.001 * 1.5^2
    assert 0.3 < float((first == second).float().mean()) < 0.7
