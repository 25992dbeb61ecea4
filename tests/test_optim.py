"""The optimizers as torch.optim.Optimizers: what a step is, layouts and dtypes, the rest of torch."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt
from optim_cases import MAKERS, every, network, same, train, weights
from quantopt.reference import levels as grid

# ---- what a step is --------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("bits", [1, 2, "17-level", "ternary"])
def test_the_compiled_step_is_the_references(name: str, bits: int | str) -> None:
    if name == "binaryconnect-stochastic" and bits != 1:
        pytest.skip("stochastic signs are binary")
    if "muon" in name:
        pytest.skip(
            "bfloat16 products make differences of rounding grow; tests/test_muon.py compares without feedback"
        )
    results = []
    for backend in ("cpu", "reference"):
        model = network()
        opt = MAKERS[name](
            quantopt.param_groups(model, bits=bits), backend=backend, lr=0.05, weight_decay=0.01
        )
        train(model, opt, 12, anneal=quantopt.Anneal(opt, 12))
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(nesterov=True), dict(momentum=0.0), dict(maximize=True)])
def test_groups_with_zero_bits_are_torch_sgd(options: dict[str, Any]) -> None:
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.01) | options
    a, b = network(), network()
    train(a, quantopt.AskewSGD([{"params": a.parameters(), "bits": 0}], **settings), 5)
    train(b, torch.optim.SGD(b.parameters(), **settings), 5)
    for x, y in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_groups_with_zero_bits_are_torch_adam(decoupled: bool) -> None:
    settings = dict(lr=0.01, weight_decay=0.1)
    a, b = network(), network()
    group = {"params": list(a.parameters()), "bits": 0, "decoupled_weight_decay": decoupled}
    train(a, quantopt.AskewAdam([group], bits=1, **settings), 5)
    train(b, torch.optim.Adam(b.parameters(), decoupled_weight_decay=decoupled, **settings), 5)
    for x, y in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_open_intervals_are_clamped_sgd() -> None:
    a, b = network(), network()
    opt = quantopt.AskewSGD(quantopt.param_groups(a), lr=0.05, momentum=0.0, weight_decay=0.01)
    other = torch.optim.SGD(b.parameters(), lr=0.05, weight_decay=0.01)
    quantised = {id(p) for p in opt.param_groups[0]["params"]}
    bounds = {i: p.detach().std() for i, p in enumerate(a.parameters()) if id(p) in quantised}
    assert len(bounds) == 2
    for i in range(4):
        train(a, opt, 1, i)
        train(b, other, 1, i)
        with torch.no_grad():
            for k, p in enumerate(b.parameters()):
                if k in bounds:
                    p.clamp_(-bounds[k], bounds[k])
    for x, y in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["stam", "stam-splitting", "askew-memory", "binaryrelax", "proxquant"])
def test_after_the_anneal_weights_are_levels(name: str) -> None:
    model = network()
    opt = MAKERS[name](quantopt.param_groups(model), lr=0.02, weight_decay=0.0)
    train(model, opt, 20, anneal=quantopt.Anneal(opt, 20))
    p = opt.param_groups[0]["params"][0]
    if name == "stam-splitting":
        train(model, opt, 1, 21)  # the step after kappa became infinite
    outer = grid.spread_over(opt.state[p]["scale"], p)
    torch.testing.assert_close(p.detach().abs(), outer.expand_as(p), atol=1e-3, rtol=0)


def test_scales_are_those_of_the_weights_when_first_seen_and_stay() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model, scale="channel"), lr=0.01)
    p = opt.param_groups[0]["params"][0]
    expected = p.detach().reshape(p.shape[0], -1).std(dim=1)
    train(model, opt, 4)
    assert torch.equal(opt.state[p]["scale"], expected)


@pytest.mark.parametrize("name", ["binaryconnect", "stam", "binaryrelax"])
def test_binary_levels_are_the_mean_magnitude_per_channel(name: str) -> None:
    model = network()
    opt = MAKERS[name](quantopt.param_groups(model), lr=0.05)
    for group in opt.param_groups:
        if "kappa" in group:
            group["kappa"] = math.inf
    train(model, opt, 3)
    for p in opt.param_groups[0]["params"]:
        latent = opt.state[p]["latent"]
        a = latent.reshape(p.shape[0], -1).abs().mean(dim=1)
        expected = grid.sign(latent) * a.reshape(-1, *[1] * (p.dim() - 1))
        torch.testing.assert_close(p.detach(), expected)


def test_binaryconnect_as_in_the_original_and_its_clip() -> None:
    model = network()
    opt = quantopt.BinaryConnect(quantopt.param_groups(model, scale="none"), lr=100.0)
    train(model, opt, 3)
    for p in opt.param_groups[0]["params"]:
        assert torch.equal(p.detach().abs(), torch.ones_like(p))
        assert float(opt.state[p]["latent"].abs().max()) <= 1.0


# ---- layouts and dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["tensor", "channel", "group"])
@every
def test_memory_layouts_do_not_change_the_result(name: str, scale: str) -> None:
    plain = torch.randn(6, 4, 3, 3) * 0.3
    gradient = torch.randn(6, 4, 3, 3)
    layouts = {
        "contiguous": (plain.clone(), gradient),
        "channels_last": (plain.clone(memory_format=torch.channels_last), gradient),
        "channels_last both": tuple(t.clone(memory_format=torch.channels_last) for t in (plain, gradient)),
        "transposed": (plain.transpose(0, 1).contiguous().transpose(0, 1), gradient),
        "slice": (torch.zeros(6, 8, 3, 3)[:, ::2].copy_(plain), gradient),
        "expanded gradient": (plain.clone(), torch.ones(1, 1, 1, 1).expand(6, 4, 3, 3)),
    }
    results = {}
    for layout, (w, g) in layouts.items():
        p = nn.Parameter(w)
        opt = MAKERS[name](
            [{"params": [p], "scale": scale, "group_size": 5}], bits=1, lr=0.1, weight_decay=0.01
        )
        for i in range(2):
            p.grad = g.clone() if layout != "expanded gradient" else g
            torch.manual_seed(i)
            opt.step()
        results[layout] = p.detach().clone()
        assert p.stride() == w.stride()
    # random numbers follow the memory order
    random_layout = name in ("binaryconnect-stochastic", "adam-bf16-moments")
    for layout in ("channels_last", "channels_last both", "transposed", "slice"):
        if not random_layout:
            torch.testing.assert_close(results[layout], results["contiguous"], atol=1e-6, rtol=1e-5)
    assert not torch.equal(results["expanded gradient"], plain)


@every
def test_low_precision_weights_follow_their_float32_master(name: str) -> None:
    exact, low = network(), network(torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), low.parameters(), strict=True):
            p.copy_(q)
    a = MAKERS[name](quantopt.param_groups(exact), lr=1e-3, weight_decay=0.01)
    b = MAKERS[name](quantopt.param_groups(low), lr=1e-3, weight_decay=0.01)
    for i in range(20):
        gradients = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).bfloat16()
            for p in low.parameters()
        ]
        for p, q, g in zip(exact.parameters(), low.parameters(), gradients, strict=True):
            p.grad, q.grad = g.float(), g.clone()
        for opt in (a, b):
            torch.manual_seed(i)
            opt.step()
    for p, q in zip(exact.parameters(), low.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        torch.testing.assert_close(q.detach().float(), p.detach(), atol=1e-6, rtol=2**-7)
    states = [s for s in b.state.values() if s]
    assert all(s.get("latent", s.get("master")).dtype == torch.float32 for s in states)


def test_stochastic_rounding_moves_where_rounding_to_nearest_stalls() -> None:
    moved = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        opt = quantopt.AskewSGD(
            [{"params": [p], "bits": 0}], lr=1e-3, momentum=0.0, rounding=rounding, seed=3
        )
        for _ in range(100):
            p.grad = torch.ones_like(p)
            opt.step()
        moved[rounding] = 1 - float(p.detach().float().mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(0.1, rel=0.02)


def test_momentum_may_be_bfloat16() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), momentum_dtype="bfloat16")
    train(model, opt, 2)
    assert {s["momentum_buffer"].dtype for s in opt.state.values()} == {torch.bfloat16}


# ---- with the rest of torch ------------------------------------------------------------------------------------


def test_learning_rate_schedulers_and_the_anneal_compose() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model, other={"lr": 0.05}), lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    anneal = quantopt.Anneal(opt, 10)
    for i in range(10):
        train(model, opt, 1, i)
        cosine.step()
        anneal.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert opt.param_groups[0]["epsilon"] == pytest.approx((1 - 0.995**2) ** 2)
    assert opt.param_groups[1]["epsilon"] == 1.0  # not quantised: not annealed
    train(model, opt, 1, 11)


def test_tensor_learning_rate() -> None:
    a, b = network(), network()
    train(a, quantopt.AskewSGD(quantopt.param_groups(a), lr=torch.tensor(0.05)), 3)
    train(b, quantopt.AskewSGD(quantopt.param_groups(b), lr=0.05), 3)
    for x, y in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-6)


@every
def test_grad_scaler_unscales_once_and_skips_overflows(name: str) -> None:
    models = []
    for scaled in (False, True):
        model = network()
        opt = MAKERS[name](quantopt.param_groups(model), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for i in range(4):
            opt.zero_grad()
            x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(i))
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            if scaled and i == 2:  # an overflow: nothing may change but the scale
                kept, gradient = weights(model), next(model.parameters()).grad
                assert gradient is not None
                good = gradient.clone()
                gradient[0] = math.inf
                before = scaler.get_scale()
                scaler.step(opt)
                scaler.update()
                assert same(weights(model), kept) and scaler.get_scale() < before
                opt.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                assert not torch.equal(good, gradient)
            torch.manual_seed(i)
            scaler.step(opt)
            scaler.update()
        models.append(weights(model))
    for x, y in zip(*models, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def test_step_hooks_and_the_profiler_see_the_step() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model))
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    handle = opt.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, opt, 2)
    handle.remove()
    train(model, opt, 1)
    assert seen == ["before", "after", "before", "after", "before"]
    other = quantopt.STAM(quantopt.param_groups(model))
    with torch.profiler.profile() as profile:
        train(model, other, 1)
    assert any("STAM.step" in event.key for event in profile.key_averages())


def test_closure_and_zero_grad() -> None:
    model = network()
    opt = quantopt.STAM(quantopt.param_groups(model), lr=0.1)
    x = torch.randn(4, 2, 6, 6)

    def closure() -> Tensor:
        opt.zero_grad(set_to_none=False)
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = float(opt.step(closure).detach())
    for _ in range(5):
        last = float(opt.step(closure).detach())
    assert last < first
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()


def test_in_place_changes_are_seen_by_autograd() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    opt = quantopt.AskewSGD([p], bits=1)
    for _ in range(3):
        p.grad = torch.randn(4, 4)
        version = p._version
        opt.step()
        assert p._version > version


def test_error_if_nonfinite_names_the_parameter_and_changes_nothing() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), error_if_nonfinite=True)
    train(model, opt, 2)
    before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
    opt.param_groups[0]["params"][1].grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"5\.weight"):
        opt.step()
    assert same(weights(model), before)
    for i, values in opt.state_dict()["state"].items():
        assert all(torch.equal(v, state[i][k]) for k, v in values.items())


def test_steps_inside_backward() -> None:
    """One optimizer per parameter, stepped by a post-accumulate hook, is the same as one step at the end."""
    a, b = network(), network()
    opts = {}
    for p in b.parameters():
        bits = 1 if p.dim() > 1 else 0
        opts[p] = quantopt.AskewSGD([{"params": [p], "bits": bits}], lr=0.05, weight_decay=0.01)

        def hook(q: Tensor) -> None:
            opts[q].step()
            q.grad = None

        p.register_post_accumulate_grad_hook(hook)
    groups = [
        {"params": [p for p in a.parameters() if (p.dim() > 1) == bool(bits)], "bits": bits}
        for bits in (1, 0)
    ]
    opt = quantopt.AskewSGD(groups, lr=0.05, weight_decay=0.01)
    for _ in range(3):
        x = torch.randn(4, 2, 6, 6)
        opt.zero_grad()
        a(x).square().mean().backward()
        opt.step()
        b(x).square().mean().backward()
    assert same(weights(a), weights(b))


def test_gradients_that_are_views_into_a_bucket() -> None:
    a, b = network(), network()
    bucket = torch.zeros(sum(p.numel() for p in b.parameters()) + 1)
    at = 1  # not aligned to a vector
    for p in b.parameters():
        p.grad = bucket[at : at + p.numel()].view_as(p)
        at += p.numel()
    opt_a = quantopt.STAM(quantopt.param_groups(a), lr=0.05)
    opt_b = quantopt.STAM(quantopt.param_groups(b), lr=0.05)
    for i in range(3):
        for model, opt in ((a, opt_a), (b, opt_b)):
            opt.zero_grad(set_to_none=False)
            model(
                torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(i))
            ).square().mean().backward()
            opt.step()
    assert same(weights(a), weights(b))


def test_a_compiled_training_step_calls_the_optimizer() -> None:
    a, b = network(), network()
    results = []
    for model, compiled in ((a, False), (b, True)):
        opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=torch.tensor(0.05))

        def step(x: Tensor, model: nn.Module = model, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            return loss.detach()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for i in range(4):
            opt.param_groups[0]["epsilon"] = 1.0 - 0.2 * i
            opt.param_groups[0]["lr"].fill_(0.05 / (i + 1))
            run(torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(i)))
        results.append(weights(model))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_a_group_may_become_quantised_after_a_warm_start() -> None:
    model = network()
    opt = quantopt.ProxQuant(quantopt.param_groups(model), lr=0.05)
    opt.param_groups[0]["bits"] = 0
    train(model, opt, 2)
    momentum = opt.state[opt.param_groups[0]["params"][0]]["momentum_buffer"].clone()
    opt.param_groups[0].update(bits=1, reg_strength=math.inf)
    train(model, opt, 1, 2)
    for p in opt.param_groups[0]["params"]:
        torch.testing.assert_close(p.detach().abs(), opt.state[p]["scale"].expand_as(p))
    assert not torch.equal(opt.state[opt.param_groups[0]["params"][0]]["momentum_buffer"], momentum)


@pytest.mark.parametrize("make", [quantopt.BinaryConnect, quantopt.BinaryRelax])
def test_latent_bounds_leave_every_level_within_reach(make: Any) -> None:
    p = nn.Parameter(torch.randn(64, 64) * 0.1)
    opt = make([{"params": [p], "bits": 4}], lr=0.5)
    for _ in range(50):
        p.grad = torch.randn(64, 64) * 0.1
        opt.step()
    quantization = opt.quantization(p)
    assert quantization is not None and quantization.codes.unique().numel() == 16


def test_diverged_weights_are_not_packed() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model))
    train(model, opt, 1)
    with torch.no_grad():
        opt.param_groups[0]["params"][0][0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        quantopt.pack(model, opt)
