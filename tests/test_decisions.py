"""What docs/algorithms.md says beside the equations: bounds of latents, points of gradients, weight decay, vectors."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt
from optim_cases import MAKERS, every, network, train
from quantopt import _extension
from quantopt.ops.step import fused_step
from quantopt.reference import levels as grid
from step_cases import BF16, Case, make

BACKENDS = ["reference"] + ["cpu"] * (_extension.error is None)
backends = pytest.mark.parametrize("backend", BACKENDS)
clipped = pytest.mark.parametrize("make_optimizer", [quantopt.BinaryConnect, quantopt.BinaryRelax])


def spread(shape: tuple[int, ...]) -> nn.Parameter:
    """Weights whose magnitude differs from group to group of a row."""
    return nn.Parameter(torch.randn(shape) * torch.logspace(-2, 1, math.prod(shape[1:])).view(1, *shape[1:]))


# ---- the latents of BinaryConnect and BinaryRelax


@backends
@clipped
@pytest.mark.parametrize("bits", [2, 3, 4, "17-level", "ternary"])
@pytest.mark.parametrize("scale", ["tensor", "channel", "group"])
def test_every_level_is_within_reach(make_optimizer: Any, bits: int | str, scale: str, backend: str) -> None:
    p = spread((3, 5, 10))
    options = dict(bits=bits, scale=scale, group_size=7)
    opt = make_optimizer([{"params": [p], **options}], lr=1e4, momentum=0.0, backend=backend)
    p.grad = torch.randn_like(p).sign()
    opt.step()
    state = opt.state[p]
    hi = grid.spread_over(state["scale"], p, 7) * grid.level_factor(quantopt.levels.level_count(bits))
    torch.testing.assert_close(state["latent"], -p.grad * hi)
    torch.testing.assert_close(p.detach(), -p.grad * hi)
    assert state["sigma"].shape == state["scale"].shape


@clipped
def test_binary_groups_have_a_level_and_a_bound_of_their_own(make_optimizer: Any) -> None:
    p = spread((3, 5, 10))
    opt = make_optimizer([{"params": [p], "bits": 1, "scale": "group", "group_size": 7}], lr=10.0)
    parts = p.detach().reshape(3, -1).split(7, dim=1)  # the last of a row has one weight
    sigma = torch.stack([x.std(dim=1) if x.shape[1] > 1 else x.abs().mean(dim=1) for x in parts], dim=1)
    p.grad = torch.randn_like(p)
    opt.step()
    assert torch.equal(opt.state[p]["sigma"], sigma)
    latent = opt.state[p]["latent"].reshape(3, -1)
    means = torch.stack([x.abs().mean(dim=1) for x in latent.split(7, dim=1)], dim=1)
    torch.testing.assert_close(opt.state[p]["scale"], means)
    assert bool((latent.abs() <= sigma.repeat_interleave(7, dim=1)[:, :50]).all())


@backends
def test_a_bound_per_row_of_an_older_state_becomes_that_of_its_groups(backend: str) -> None:
    p = spread((3, 5, 10))
    groups = [{"params": [p], "bits": 2, "scale": "group", "group_size": 7}]
    opt = quantopt.BinaryRelax(groups, lr=0.1, backend=backend)
    p.grad = torch.randn_like(p)
    opt.step()
    twin = copy.deepcopy(opt)
    (q,) = twin.param_groups[0]["params"]
    old = copy.deepcopy(opt.state_dict())
    old["state"][0]["sigma"] = p.detach().reshape(3, -1).std(dim=1)
    opt.load_state_dict(old)
    for o, w in ((opt, p), (twin, q)):
        w.grad = torch.ones_like(w)
        o.step()
    assert torch.equal(opt.state[p]["sigma"], twin.state[q]["sigma"]) and torch.equal(p, q)


@backends
def test_a_nan_goes_into_the_stochastic_weight(backend: str) -> None:
    p = nn.Parameter(torch.randn(4, 6))
    opt = quantopt.BinaryConnect([p], bits=1, scale="none", stochastic=True, lr=0.1, backend=backend)
    p.grad = torch.randn(4, 6)
    p.grad[1, 2] = math.nan
    opt.step()
    assert p.isnan().sum() == 1 and p[1, 2].isnan()
    assert bool((p[~p.isnan()].abs() == 1).all())

    careful = nn.Parameter(torch.randn(4, 6))
    opt = quantopt.BinaryConnect([careful], bits=1, stochastic=True, error_if_nonfinite=True, backend=backend)
    before, careful.grad = careful.detach().clone(), p.grad
    with pytest.raises(FloatingPointError, match="parameter 0"):
        opt.step()
    assert torch.equal(careful, before) and not opt.state


# ---- the splitting: the point of the gradient


def prox_of_levels(r: Tensor, hi: Tensor, kappa: float) -> Tensor:
    return (r + kappa * hi * grid.sign(r)) / (1 + kappa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_splitting_steps_from_the_weights_that_the_network_ran_with(dtype: torch.dtype) -> None:
    """x <- x + prox(2y - x - gamma d) - y with y = p, as gamma changes from step to step."""
    decay, kappa = 0.3, 0.2
    p = nn.Parameter(torch.randn(50, dtype=dtype))
    opt = quantopt.STAM([p], bits=1, form="splitting", momentum=0.0, weight_decay=decay, kappa=kappa)
    hi, x = p.detach().std().double(), p.detach().clone().double()
    for k in range(20):
        gamma = 0.5 / (1 + k % 4)
        opt.param_groups[0]["lr"] = gamma
        y, d = p.detach().double().clamp(-hi, hi), torch.randn(50, dtype=torch.float64)
        p.grad = d.to(dtype)
        opt.step()
        x = x + prox_of_levels(2 * y - x - gamma * d, hi, kappa) - y
        expected = (x / (1 + gamma * decay)).clamp(-hi, hi)
        torch.testing.assert_close(p.detach().double(), expected, atol=1e-5, rtol=0)


@backends
def test_the_rounding_of_16_bits_does_not_add_up_in_the_splitting(backend: str) -> None:
    record = make(Case("splitting", 2, "given", "tensor", BF16, kappa=math.inf, weight_decay=0.001), [(64,)])
    record.scales[0].fill_(0.3349)  # rounded down to bfloat16
    record.latents[0].clamp_(-0.3, 0.3)
    record.grads[0].zero_()
    signs = record.latents[0].sign()
    for _ in range(1000):
        fused_step(record, backend=backend)
    assert torch.equal(record.params[0].float().sign(), signs)
    torch.testing.assert_close(record.params[0].float().abs(), torch.full((64,), 0.3349), atol=0, rtol=2**-8)


# ---- weight decay


@pytest.mark.parametrize("bits", [0, 1])
@every
def test_where_weight_decay_enters_the_momentum(name: str, bits: int) -> None:
    buffers = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4, 6))
        opt = MAKERS[name]([{"params": [p], "bits": bits}], lr=0.1, weight_decay=decay)
        p.grad = torch.randn(4, 6)
        opt.step()
        buffers.append(opt.state[p].get("momentum_buffer", opt.state[p].get("exp_avg", torch.zeros(0))))
    decayed = (bits == 0 or name.startswith("proxquant")) and "muon" not in name
    assert torch.equal(*buffers) is (not decayed or not buffers[0].numel())


LATENT = [name for name in MAKERS if name.startswith(("stam", "binary")) or "memory" in name]


@pytest.mark.parametrize("name", LATENT)
def test_decoupled_weight_decay_is_refused_where_it_has_no_effect(name: str) -> None:
    groups = quantopt.param_groups(network(), other={"decoupled_weight_decay": True})
    opt = MAKERS[name](copy.deepcopy(groups), lr=0.1)  # without levels it has
    with pytest.raises(ValueError, match=r"decoupled_weight_decay=True.*bits=0 alone"):
        MAKERS[name](copy.deepcopy(groups), lr=0.1, decoupled_weight_decay=True)
    late = {"params": [nn.Parameter(torch.randn(3, 3))], "param_names": ["late"], "bits": 1}
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        opt.add_param_group(late | {"decoupled_weight_decay": True})
    assert len(opt.param_groups) == 2
    opt.add_param_group(late)


def test_a_state_dict_with_decoupled_weight_decay_of_a_latent_goes_on() -> None:
    """quantopt 0.1.0 took it, without an effect."""
    model = network()
    opt = quantopt.STAM(quantopt.param_groups(model), lr=0.1)
    train(model, opt, 2)
    twin, twin_opt = copy.deepcopy((model, opt))
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["decoupled_weight_decay"] = True
    opt.load_state_dict(saved)
    train(model, opt, 2, 2)
    train(twin, twin_opt, 2, 2)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# ---- 1-d parameters


@pytest.mark.parametrize("scale", ["channel", "group"])
def test_each_weight_of_a_vector_is_a_channel_of_frozen_levels(scale: str) -> None:
    p = nn.Parameter(torch.tensor([0.5, -2.0, 1.0]))
    opt = quantopt.AskewSGD([{"params": [p], "bits": 1, "scale": scale}])
    with opt.quantized():
        assert torch.equal(p, torch.tensor([0.5, -2.0, 1.0]))


@backends
@pytest.mark.parametrize(
    "options", [dict(form="splitting", scale="channel-mean"), dict(scale="channel"), dict(scale="group")]
)
def test_a_vector_is_one_channel_of_levels_that_move(options: dict[str, str], backend: str) -> None:
    p = nn.Parameter(torch.randn(40))
    opt = quantopt.STAM([p], bits=1, lr=0.1, momentum=0.0, weight_decay=0.0, backend=backend, **options)
    first = opt.quantization(p)
    assert first is not None
    splitting = "form" in options
    expected = p.detach().std() if splitting else p.detach().abs().mean()
    torch.testing.assert_close(first.max_level, expected.view(1))
    p.grad = torch.randn(40)
    hi = first.max_level
    x, y = p.detach().clone(), p.detach().clamp(-hi, hi) if splitting else p.detach()
    opt.step()
    moved = y - 0.1 * p.grad - (x - y) if splitting else x - 0.1 * p.grad
    torch.testing.assert_close(opt.state[p]["scale"], moved.abs().mean().view(1))
