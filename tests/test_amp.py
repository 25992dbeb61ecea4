"""fused_amp: whether GradScaler leaves unscaling and skipping to the kernels."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import quantopt
from optim_cases import MAKERS, every, network, same, weights

SCALE = 1024.0


def run(name: str, clip: float | None = None, **options: Any) -> list[torch.Tensor]:
    """Weights after six steps; the gradients of the third are infinite."""
    model = network()
    opt = MAKERS[name](quantopt.param_groups(model), lr=0.05, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for i in range(6):
        x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(i))
        opt.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if i == 2:
            before = weights(model)
            next(model.parameters()).grad[0] = math.inf
        if clip is not None:
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        torch.manual_seed(i)  # stochastic signs
        scaler.step(opt)
        scaler.update()
        if i == 2:
            assert same(weights(model), before) and scaler.get_scale() == SCALE / 2
    return weights(model)


@every
def test_the_same_weights_with_and_without(name: str) -> None:
    plain, fused = run(name), run(name, fused_amp=True)
    assert same(plain, fused)  # the scale is a power of two
    assert not same(plain, weights(network()))


def test_clipping_between_unscale_and_step() -> None:
    """The same as without a scale at all: the clip sees the gradients as they are."""
    clipped = run("askew-memory", clip=0.01)
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05, memory=True)
    for i in (0, 1, 3, 4, 5):
        x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(i))
        opt.zero_grad()
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        opt.step()
    for a, b in zip(clipped, weights(model), strict=True):
        torch.testing.assert_close(a, b)
    assert not same(clipped, run("askew-memory"))


@pytest.mark.parametrize("fused", [False, True])
def test_frameworks_ask_the_instance(fused: bool) -> None:
    """A class attribute would hide the answer of the optimizer within Lightning's wrappers."""
    opt = quantopt.STAM(quantopt.param_groups(network()), fused_amp=fused)
    assert not hasattr(quantopt.STAM, "_step_supports_amp_scaling")
    assert opt._step_supports_amp_scaling is fused and "fused_amp" not in opt.param_groups[0]
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other._step_supports_amp_scaling is fused
    old = quantopt.STAM.__new__(quantopt.STAM)
    pickled = opt.__getstate__()
    old.__setstate__({key: pickled[key] for key in ("defaults", "state", "param_groups", "backend")})
    assert old._step_supports_amp_scaling is False
    pickle.dumps(old)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_counts_where_only_the_device_knows(fused: bool) -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), fused_amp=fused)
    anneal = quantopt.Anneal(opt, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(model(torch.randn(4, 2, 6, 6)).square().mean()).backward()
    next(model.parameters()).grad[0] = math.inf
    scaler.step(opt)
    assert anneal.last_step == int(fused)
