"""Weights that somebody else writes into the model count, in the step and in every view; nothing else changes."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt
from optim_cases import MAKERS, network, same, train, weights
from quantopt.levels import level_count
from quantopt.optim import state
from quantopt.reference import levels as grid

LATENT = [n for n in MAKERS if "memory" in n or "stam" in n or "relax" in n or "connect" in n]
LIMITED = (
    "askew-memory-limited"  # its weights depend on those before: a write is seen where no latent explains it
)
latent = pytest.mark.parametrize("name", LATENT)
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])

WAYS: dict[str, Callable[[nn.Parameter, Tensor], Any]] = {
    "copy_": lambda p, w: p.copy_(w),
    "detach": lambda p, w: p.detach().copy_(w),
    "data": lambda p, w: setattr(p, "data", w.clone()),
}


def made(
    name: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Any, Any]:
    model = network(dtype)
    opt = MAKERS[name](quantopt.param_groups(model, bits=1), lr=0.05, **options)
    anneal = quantopt.Anneal(opt, 8)
    train(model, opt, steps, anneal=anneal)
    return model, opt, anneal


def first(opt: Any) -> nn.Parameter:
    p: nn.Parameter = opt.param_groups[0]["params"][0]
    return p


def behind(opt: Any, p: nn.Parameter) -> Tensor:
    state = opt.state[p]
    value: Tensor = state.get("latent", state.get("master"))
    return value


@pytest.mark.parametrize("name", [n for n in LATENT if n != LIMITED])
@backends
@pytest.mark.parametrize("way", WAYS)
def test_a_step_goes_on_from_what_was_written(name: str, backend: str, way: str) -> None:
    """The next step is that of an optimizer whose latent is what was written."""
    model, opt, _ = made(name, backend=backend)
    p = first(opt)
    new = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.detach().std()
    other_model, other = copy.deepcopy((model, opt))
    q = first(other)
    other.state[q]["latent"].copy_(new)
    with torch.no_grad():
        WAYS[way](p, new)
        q.data.copy_(new)
        other._written.note(q)
    train(model, opt, 2, first=3)
    train(other_model, other, 2, first=3)
    assert same(weights(model), weights(other_model))
    assert torch.equal(behind(opt, p), behind(other, q))


WHEN: dict[str, Callable[[Any, Any], Any]] = {
    "after a step": lambda model, opt: None,
    "after a step with lr = 0": lambda model, opt: frozen_step(model, opt),
    "after a step without its gradient": lambda model, opt: step_of_others(model, opt),
    "after a load": lambda model, opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())),
    "after a step that was skipped on the device": lambda model, opt: skipped_step(model, opt),
}


def frozen_step(model: nn.Module, opt: Any) -> None:
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(model, opt, 1, first=9)
    for group, lr in zip(opt.param_groups, rates, strict=True):
        group["lr"] = lr


def step_of_others(model: nn.Module, opt: Any) -> None:
    opt.zero_grad()
    model(torch.randn(4, 2, 6, 6).to(first(opt).dtype)).sum().backward()
    first(opt).grad = None
    opt.step()


def skipped_step(model: nn.Module, opt: Any) -> None:
    for group in opt.param_groups:
        group["lr"] *= 2
        for key in ("epsilon", "kappa"):
            if key in group:
                group[key] = 0.5
    opt.found_inf = torch.tensor(1.0)
    train(model, opt, 1, first=9)
    del opt.found_inf


@latent
@backends
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_was_written_changes(name: str, backend: str, when: str, dtype: torch.dtype) -> None:
    """A mask of a tenth of the weights leaves the latents of the others as they are, and the scale."""
    model, opt, _ = made(name, dtype=dtype, backend=backend)
    WHEN[when](model, opt)
    p = first(opt)
    before, scale = behind(opt, p).clone(), opt.state[p]["scale"].clone()
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) > 0.1
    with torch.no_grad():
        p.mul_(mask)
    state.ensure(opt, opt.param_groups[0], stepping=True)
    if name == LIMITED or "load" in when:  # what a latent of other numbers may give is not seen
        assert bool((behind(opt, p)[mask] == before[mask]).all())
    else:
        assert torch.equal(behind(opt, p), torch.where(mask, before, 0.0))
    assert torch.equal(opt.state[p]["scale"], scale)


@pytest.mark.parametrize("scale", ["none", "tensor"])
@backends
def test_drawn_signs_are_no_writes(scale: str, backend: str) -> None:
    """And weights of the same magnitude that somebody else writes are."""
    p = nn.Parameter(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 0.1)
    opt = quantopt.BinaryConnect([p], bits=1, lr=0.05, stochastic=True, scale=scale, backend=backend)
    for i in range(3):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        opt.step()
    before, drawn = behind(opt, p).clone(), p.detach().clone()
    assert not torch.equal(drawn > 0, before > 0)
    with torch.no_grad():
        p.copy_(drawn)
    opt.metrics()
    assert torch.equal(behind(opt, p), before)
    best = torch.randn(p.shape, generator=torch.Generator().manual_seed(9)).sign() * drawn.abs()
    with torch.no_grad():
        p.copy_(best)
    q = opt.quantization(p)
    changed = best != drawn
    assert q is not None and torch.equal((q.codes == 1)[changed], (best > 0)[changed])
    assert torch.equal(behind(opt, p), torch.where(changed, best, before))


@latent
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_converted_and_back_keeps_its_latents(name: str, dtype: torch.dtype) -> None:
    model, opt, _ = made(name)
    before = behind(opt, first(opt)).clone()
    model.to(dtype)
    model.float()
    opt.metrics()
    assert torch.equal(behind(opt, first(opt)), before)


@latent
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
def test_small_writes_count(name: str, dtype: torch.dtype, steps: int) -> None:
    """By the last place or two of the weights' type, where their numbers are known."""
    _, opt, _ = made(name, steps, dtype)
    opt.metrics()
    p = first(opt)
    before, old = behind(opt, p).clone(), p.detach().clone()
    with torch.no_grad():
        p.mul_(1.01)
    opt.metrics()
    changed = behind(opt, p) != before
    if name == LIMITED and steps:
        return  # its weights depend on those before
    assert torch.equal(behind(opt, p)[changed], p.detach()[changed].to(before.dtype))
    moved = (p.detach().float() - old.float()).abs() > 1e-5
    assert float(moved.float().mean()) > 0.5 and bool(changed[moved].all())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_not_written_stays(name: str, dtype: torch.dtype) -> None:
    """Views, moves, writes of the same values and swaps that are undone change no bit of the training."""
    runs = []
    for disturbed in (False, True):
        model, opt, anneal = made(name, dtype=dtype)
        for i in range(3, 8):
            if disturbed:
                before = weights(model)
                with torch.no_grad():
                    for p, w in zip(model.parameters(), before, strict=True):
                        p.copy_(w + 1) if i == 3 else p.add_(0)
                        p.copy_(w)
                        if i == 4:
                            p.data = p.data.clone()
                opt.metrics()
                with opt.quantized(), opt.latent():
                    quantopt.pack(model, opt)
                    opt.metrics()
                model.to(memory_format=torch.channels_last)
                model.to(memory_format=torch.contiguous_format)
            train(model, opt, 1, first=i, anneal=anneal)
        runs.append((weights(model), opt.state_dict()["state"]))
    assert same(runs[0][0], runs[1][0])
    for i, own in runs[0][1].items():
        assert all(torch.equal(own[k], runs[1][1][i][k]) for k in own if k != "signs")


@backends
def test_master_weights_follow(backend: str) -> None:
    """The element that was written, and no other, has a new master weight, in every group."""
    _, opt, _ = made("askew", dtype=torch.bfloat16, backend=backend)
    for group in opt.param_groups:
        p = group["params"][0]
        before = behind(opt, p).clone()
        with torch.no_grad():
            p.view(-1)[3] = 0.75
        state.ensure(opt, group)
        after = behind(opt, p).view(-1)
        assert after[3] == 0.75
        after[3] = before.view(-1)[3]
        assert torch.equal(after, before.view(-1))


@latent
def test_every_view_shows_what_was_written(name: str) -> None:
    model, opt, _ = made(name)
    p = first(opt)
    with torch.no_grad():
        p.copy_(-behind(opt, p).abs() - 0.1)
        p[0] = 0.3
    negative = p.detach() < 0
    q = opt.quantization(p)
    assert q is not None and torch.equal(q.codes == 0, negative)
    with opt.quantized():
        assert torch.equal(p.detach() < 0, negative)
    with opt.latent():
        assert torch.equal(p.detach() < 0, negative)
    assert torch.equal(quantopt.pack(model, opt)[2].weight < 0, negative)
    assert torch.equal(opt.quantizations()[p].codes, q.codes)


@latent
@pytest.mark.parametrize("model_first", [True, False])
def test_a_resumed_run_keeps_its_latents(name: str, model_first: bool) -> None:
    """Model and optimizer may be loaded in either order, the anneal being ahead of the weights."""
    model, opt, anneal = made(name, 5)
    resumed, fresh, schedule = made(name, 1)
    for load in (0, 1) if model_first else (1, 0):
        if load == 0:
            resumed.load_state_dict(model.state_dict())
        else:
            fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    schedule.load_state_dict(anneal.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(resumed, fresh, 3, first=5, anneal=schedule)
    train(model, opt, 3, first=5, anneal=anneal)
    assert same(weights(model), weights(resumed))


@latent
def test_a_state_without_its_weights_is_said(name: str) -> None:
    """A warning names the parameter, views show the weights, and a step makes the latents of them. Until then, the
    weights of the state may still be loaded."""
    trained, opt, _ = made(name, 3)
    for late in (False, True):
        model, fresh, _ = made(name, 0)
        torch.manual_seed(5)
        for w in model.parameters():
            nn.init.normal_(w, std=0.1)
        fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
        p, kept = first(fresh), weights(model)
        loaded = behind(fresh, p).clone()
        with pytest.warns(UserWarning, match="weight' does not hold the weights"):
            fresh.metrics()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            q = fresh.quantization(p)
        assert q is not None and torch.equal(q.codes == 1, p >= 0)
        assert torch.equal(behind(fresh, p), loaded) and same(weights(model), kept)
        if late:
            model.load_state_dict(trained.state_dict())
            q, right = fresh.quantization(p), opt.quantization(first(opt))
            assert q is not None and right is not None and torch.equal(q.codes, right.codes)
            train(model, fresh, 1, first=3)
            train(trained, opt, 1, first=3)
            assert same(weights(model), weights(trained))
        else:
            for group in fresh.param_groups:
                group["lr"] = 0.0
            train(model, fresh, 1)
            assert torch.equal(behind(fresh, p), kept[2]) and same(weights(model), kept)


@latent
def test_no_state_is_loaded_inside_a_view(name: str) -> None:
    _, opt, _ = made(name)
    with opt.quantized(), pytest.raises(RuntimeError, match="leave the context first"):
        opt.load_state_dict(opt.state_dict())


@latent
def test_a_state_that_no_step_has_used_belongs_to_its_weights(name: str) -> None:
    """Also weights beyond their outer levels, which only a step brings back."""
    model, opt, _ = made(name, 0)
    opt.metrics()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, other = copy.deepcopy((model, opt))
        other.metrics()
    assert torch.equal(behind(other, first(other)), first(opt).detach())


@latent
def test_a_parameter_that_comes_and_goes_keeps_its_latent(name: str) -> None:
    """As an expert that is not chosen: its weights are those of the numbers of an earlier step."""
    model, opt, anneal = made(name, 3)
    p = first(opt)
    kept = behind(opt, p).clone()
    for i in range(2):
        opt.zero_grad()
        model(torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(i))).sum().backward()
        p.grad = None
        opt.step()
        anneal.step()
        with torch.no_grad():
            p.add_(0)
    opt.metrics()
    assert torch.equal(behind(opt, p), kept)


def test_state_made_before_the_weights_are_loaded() -> None:
    """A warm start after a look at the metrics keeps the signs of the loaded weights; the scale stays."""
    pretrained, model = network(), network()
    nn.init.normal_(pretrained[2].weight)
    opt = quantopt.AskewSGD(quantopt.param_groups(model, bits=1), lr=1e-6, memory=True)
    opt.metrics()
    model.load_state_dict(pretrained.state_dict())
    scale = opt.state[first(opt)]["scale"].clone()
    train(model, opt, 1)
    assert torch.equal(model[2].weight.sign(), pretrained[2].weight.sign())
    assert torch.equal(opt.state[first(opt)]["scale"], scale)


def test_no_step_inside_a_view() -> None:
    model, opt, _ = made("askew")
    before = weights(model)
    with pytest.raises(RuntimeError, match="leave the context first"), opt.quantized():
        train(model, opt, 1)
    assert same(weights(model), before)
    train(model, opt, 1)


def test_a_write_inside_a_view_is_said() -> None:
    model, opt, _ = made("askew-memory")
    before = weights(model)
    with pytest.warns(UserWarning, match=r"'2\.weight' was written to inside"), opt.quantized():
        with torch.no_grad():
            first(opt).zero_()
    assert same(weights(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opt.quantized():  # the same values are no loss
            model.load_state_dict(copy.deepcopy(model.state_dict()))


def test_weights_that_are_not_finite_are_taken_up() -> None:
    _, opt, _ = made("askew-memory")
    with torch.no_grad():
        first(opt)[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        opt.quantization(first(opt))


@latent
@backends
def test_memory_that_is_used_again_is_no_sign_of_the_same_weights(name: str, backend: str) -> None:
    """A tensor that is put in the place of another may get the memory of the one before that."""
    model, opt, _ = made(name, backend=backend)
    p = first(opt)
    addresses = set()
    for i in range(20):
        train(model, opt, 1, first=i)
        addresses.add(p.data_ptr())
        p.data = p.data.clone()
        p.data = torch.full_like(p.data, -0.1)
        addresses.add(p.data_ptr())
        assert torch.equal(opt.quantization(p).codes, torch.zeros_like(p, dtype=torch.uint8))
    assert len(addresses) < 40


@pytest.mark.parametrize("bits", [1, 2, 3, 4, "17-level", "ternary"])
def test_a_latent_between_two_levels_belongs_to_either_side(bits: int | str) -> None:
    """Kernels and the reference may round to different sides: the latents of a loaded state stay."""
    levels = level_count(bits)
    p = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    opt = quantopt.AskewSGD([{"params": [p], "bits": bits}], memory=True, epsilon=0.01, lr=0.0)
    opt.metrics()
    latent = opt.state[p]["latent"]
    hi = opt.state[p]["scale"] * grid.level_factor(levels)
    middles = hi * torch.tensor([(2 * j + 2 - levels) / (levels - 1) for j in range(levels - 1)])
    for middle in middles:
        for side in (-1, 1):
            latent.fill_(float(middle)).add_(torch.linspace(-5e-8, 5e-8, 64) * hi)
            with torch.no_grad():
                p.copy_(middle + side * 0.95 * hi / (levels - 1))
            opt._written.forget()
            before = latent.clone()
            opt.metrics()
            assert torch.equal(opt.state[p]["latent"], before)
