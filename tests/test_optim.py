"""The optimizers as torch.optim.Optimizers: groups, errors, state, schedules, views of the weights."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantopt
from quantopt.reference import levels as grid

MAKERS: dict[str, Callable[..., Any]] = {
    "askew": quantopt.AskewSGD,
    "askew-gradient": lambda p, **k: quantopt.AskewSGD(p, constrain="gradient", **k),
    "askew-memory": lambda p, **k: quantopt.AskewSGD(p, memory=True, **k),
    "askew-memory-limited": lambda p, **k: quantopt.AskewSGD(p, memory=True, rate=0.1, **k),
    "adam": quantopt.AskewAdam,
    "adam-memory": lambda p, **k: quantopt.AskewAdam(p, memory=True, **k),
    "stam": quantopt.STAM,
    "stam-splitting": lambda p, **k: quantopt.STAM(p, form="splitting", **k),
    "binaryconnect": quantopt.BinaryConnect,
    "binaryconnect-stochastic": lambda p, **k: quantopt.BinaryConnect(p, stochastic=True, **k),
    "binaryrelax": quantopt.BinaryRelax,
    "proxquant": quantopt.ProxQuant,
}
every = pytest.mark.parametrize("name", MAKERS)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3, bias=False), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(28, 9), nn.ReLU(), nn.Linear(9, 3)).to(dtype)


def train(model: nn.Module, opt: Any, steps: int, first: int = 0, anneal: Any = None) -> None:
    dtype = next(model.parameters()).dtype
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(4, 2, 6, 6, generator=generator).to(dtype)
        opt.zero_grad()
        model(x).square().mean().backward()
        torch.manual_seed(1000 + i)  # stochastic signs
        opt.step()
        if anneal is not None:
            anneal.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- what a step is ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("bits", [1, 2, "ternary"])
def test_the_compiled_step_is_the_references(name: str, bits: int | str) -> None:
    if name == "binaryconnect-stochastic" and bits != 1:
        pytest.skip("stochastic signs are binary")
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
    train(a, quantopt.AskewAdam([group], **settings), 5)
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


# ---- layouts and dtypes ------------------------------------------------------------------------------------------


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
        opt = MAKERS[name]([{"params": [p], "scale": scale, "group_size": 5}], lr=0.1, weight_decay=0.01)
        for i in range(2):
            p.grad = g.clone() if layout != "expanded gradient" else g
            torch.manual_seed(i)
            opt.step()
        results[layout] = p.detach().clone()
        assert p.stride() == w.stride()
    random_layout = name == "binaryconnect-stochastic"  # its random numbers follow the memory order
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


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(lr=math.nan), "lr=nan"), (dict(lr=-1.0), "lr=-1.0"), (dict(lr=math.inf), "lr=inf"),
        (dict(momentum=-0.1), "momentum=-0.1"), (dict(momentum=1.0), "momentum"),
        (dict(weight_decay=-1), "weight_decay"),
        (dict(bits=5), "bits=5"), (dict(bits="binary"), "bits='binary'"), (dict(bits=True), "bits=True"),
        (dict(bits=2.0), "bits=2.0"),
        (dict(scale="row"), "scale='row'"),
        (dict(epsilon=1.5), "epsilon=1.5"), (dict(epsilon=math.nan), "epsilon=nan"),
        (dict(rate=-1.0), "rate"), (dict(rate=math.inf), "rate=inf"), (dict(cap=-0.1), "cap"),
        (dict(constrain="both"), "constrain='both'"), (dict(nesterov=True, momentum=0.0), "nesterov"),
        (dict(group_size=0), "group_size"), (dict(seed=-1), "seed"), (dict(rounding="up"), "rounding"),
        (dict(momentum_dtype="float16"), "momentum_dtype"), (dict(backend="tpu"), "backend='tpu'"),
        (dict(memory=True, constrain="gradient"), "constrain"), (dict(scale="channel-mean"), "channel-mean"),
        (dict(bound=0.5), "bound"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        quantopt.AskewSGD([nn.Parameter(torch.randn(4))], **options)


def test_bad_groups_are_refused_and_not_added() -> None:
    opt = quantopt.AskewSGD([nn.Parameter(torch.randn(4))])
    for group, named in [(dict(lr=math.nan), "lr"), (dict(bits=7), "bits=7"), (dict(kapa=1.0), "kapa")]:
        with pytest.raises(ValueError, match=named):
            opt.add_param_group({"params": [nn.Parameter(torch.randn(4))], **group})
        assert len(opt.param_groups) == 1
    for make, options, named in [
        (quantopt.STAM, dict(form="three"), "form='three'"),
        (quantopt.STAM, dict(kappa=-1.0), "kappa"),
        (quantopt.STAM, dict(form="splitting", scale="channel-mean", bits=2), "channel-mean"),
        (quantopt.AskewAdam, dict(betas=(0.9, 1.0)), "betas"),
        (quantopt.BinaryConnect, dict(stochastic=True, bits=2), "stochastic"),
        (quantopt.BinaryConnect, dict(clip=math.nan), "clip"),
    ]:
        with pytest.raises(ValueError, match=named):
            make([nn.Parameter(torch.randn(4, 4))], **options)


@pytest.mark.parametrize("kind", ["sparse", "complex", "zero scale", "nan scale"])
def test_a_refused_step_changes_nothing(kind: str) -> None:
    good, bad = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))
    error: type[Exception] = TypeError
    if kind == "complex":
        bad = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
    elif kind == "zero scale":
        bad, error = nn.Parameter(torch.zeros(5, 3)), ValueError
    elif kind == "nan scale":
        bad, error = nn.Parameter(torch.full((5, 3), math.nan)), ValueError
    opt = quantopt.AskewSGD([{"params": [good, bad], "param_names": ["good", "bad.weight"]}])
    good.grad = torch.randn(5, 3)
    bad.grad = torch.eye(5, 3).to_sparse() if kind == "sparse" else torch.ones_like(bad)
    before = good.detach().clone()
    with pytest.raises(error, match=r"bad\.weight"):
        opt.step()
    assert torch.equal(good, before)


def test_param_groups_choose_weights_by_position_and_name() -> None:
    model = network()
    quantised, rest = quantopt.param_groups(model)
    assert quantised["param_names"] == ["2.weight", "5.weight"] and quantised["bits"] == 1
    assert rest["bits"] == 0 and len(rest["params"]) == 5
    assert len(quantopt.param_groups(model, skip=())[0]["params"]) == 4
    assert quantopt.param_groups(model, skip=("first", "last", "5.*"))[0]["param_names"] == ["2.weight"]
    assert quantopt.param_groups(model, other={"lr": 0.5})[1]["lr"] == 0.5
    for options, named in [
        (dict(bits=5), "bits=5"), (dict(scale="rows"), "scale"), (dict(skip=("nothing*",)), "nothing"),
        (dict(skip=("*",)), "skip"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=named):
            quantopt.param_groups(model, **options)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert quantopt.param_groups(tied, skip=("last",))[0]["param_names"] == ["0.weight"]


def test_unused_frozen_empty_and_late_parameters() -> None:
    used, unused, empty = (
        nn.Parameter(torch.randn(4, 4)),
        nn.Parameter(torch.randn(4, 4)),
        nn.Parameter(torch.zeros(0, 4)),
    )
    opt = quantopt.STAM([used, unused, empty])
    before = unused.detach().clone()
    used.grad, empty.grad = torch.randn(4, 4), torch.zeros(0, 4)
    opt.step()
    assert torch.equal(unused, before) and not opt.state[unused]
    late = nn.Parameter(torch.randn(3, 3))
    opt.add_param_group({"params": [late], "bits": 2})
    late.grad = torch.randn(3, 3)
    used.grad = None  # frozen in mid-run
    kept, moved = used.detach().clone(), late.detach().clone()
    opt.step()
    assert torch.equal(used, kept) and not torch.equal(late, moved)
    assert opt.metrics()[0]["numel"] == 32


# ---- checkpoints -------------------------------------------------------------------------------------------------


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
    other = quantopt.STAM(quantopt.param_groups(low))
    other.load_state_dict(opt.state_dict())
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
    one_group = quantopt.AskewSGD(model.parameters()).state_dict()
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


# ---- with the rest of torch --------------------------------------------------------------------------------------


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


# ---- views of the weights ----------------------------------------------------------------------------------------


@every
def test_quantized_shows_levels_and_restores(name: str) -> None:
    model = network()
    opt = MAKERS[name](quantopt.param_groups(model, bits=1), lr=0.05)
    train(model, opt, 3)
    before = weights(model)
    with opt.quantized():
        for p in opt.param_groups[0]["params"]:
            outer = grid.spread_over(opt.state[p]["scale"], p).expand_as(p)
            torch.testing.assert_close(p.detach().abs(), outer)
    assert same(weights(model), before)
    with pytest.raises(RuntimeError, match="inside"), opt.quantized():
        raise RuntimeError("inside")
    assert same(weights(model), before)
    with opt.latent():
        p = opt.param_groups[0]["params"][0]
        assert torch.equal(p.detach(), opt.state[p].get("latent", before[2]))
    assert same(weights(model), before)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, "ternary"])
@pytest.mark.parametrize("scale", ["none", "tensor", "channel", "group"])
def test_quantization_is_the_projection(bits: int | str, scale: str) -> None:
    model = network()
    groups = quantopt.param_groups(model, bits=bits, scale=scale)
    groups[0]["group_size"] = 7
    opt = quantopt.AskewSGD(groups, lr=0.05)
    train(model, opt, 2)
    assert opt.quantization(opt.param_groups[1]["params"][0]) is None
    for p in opt.param_groups[0]["params"]:
        q = opt.quantization(p)
        assert q is not None and q.codes.shape == p.shape and int(q.codes.max()) < q.levels
        outer = grid.spread_over(q.max_level, p, q.group_size)
        with opt.quantized():
            torch.testing.assert_close(
                outer * (2 * q.codes.float() / (q.levels - 1) - 1), p.detach(), atol=1e-6, rtol=1e-5
            )


def test_metrics() -> None:
    model = network()
    opt = quantopt.AskewSGD(quantopt.param_groups(model), lr=0.05)
    first = opt.metrics()
    assert first[1] == {"bits": 0, "numel": sum(p.numel() for p in opt.param_groups[1]["params"])}
    assert first[0]["sign_flips"] == 0 and first[0]["fraction_feasible"] == 1.0
    p = opt.param_groups[0]["params"][0]
    with torch.no_grad():
        p[0, 0] = -p[0, 0]
    second = opt.metrics()[0]
    assert second["sign_flips"] == p[0, 0].numel()
    opt.param_groups[0]["epsilon"] = 1e-6
    assert opt.metrics()[0]["fraction_feasible"] < 0.5
    with opt.quantized():
        third = opt.metrics()[0]
    assert third["fraction_feasible"] == 1.0 and third["distance"] < 1e-6 and third["sign_flips"] == 0
    mean = [float(opt.state[p]["scale"]) * p.numel() for p in opt.param_groups[0]["params"]]
    assert third["scale"] == pytest.approx(sum(mean) / third["numel"])


# ---- anneal ------------------------------------------------------------------------------------------------------


def annealed(opt: Any, total: int, key: str) -> list[float]:
    anneal = quantopt.Anneal(opt, total)
    values = [opt.param_groups[0][key]]
    for _ in range(total):
        anneal.step()
        values.append(opt.param_groups[0][key])
    anneal.step()  # beyond the end: stays
    assert opt.param_groups[0][key] == values[-1]
    return values


def test_schedules_are_those_of_the_document() -> None:
    p = [nn.Parameter(torch.randn(4, 4))]
    e = annealed(quantopt.AskewSGD(p), 100, "epsilon")
    assert e[:71] == [1.0] * 71 and e[100] == e[90] == pytest.approx((1 - 0.995**2) ** 2)
    assert math.sqrt(1 - math.sqrt(e[80])) == pytest.approx(0.995 / 2)
    e = annealed(quantopt.AskewSGD(p, memory=True), 100, "epsilon")
    assert e[50] == 1.0 and e[51] < 1.0 and e[80] == 0.0 == e[100]
    assert math.sqrt(1 - math.sqrt(e[65])) == pytest.approx(0.5)
    k = annealed(quantopt.STAM(p), 100, "kappa")
    assert k[0] == pytest.approx(0.01) and k[40] == pytest.approx(1.0) and k[79] < 100 and math.isinf(k[80])
    k = annealed(quantopt.STAM(p, form="splitting"), 100, "kappa")
    assert k[69] == 0.0 and k[70] == pytest.approx(1e-3) and k[94] < 1.0 and math.isinf(k[95])
    k = annealed(quantopt.BinaryRelax(p), 100, "kappa")
    assert k[0] == pytest.approx(1.0) and k[40] == pytest.approx(10.0) and math.isinf(k[80])
    r = annealed(quantopt.ProxQuant(p, reg=0.01), 100, "reg_strength")
    assert r[0] == pytest.approx(0.01) and r[49] == pytest.approx(0.5) and math.isinf(r[80])


def test_schedules_take_settings() -> None:
    p = [nn.Parameter(torch.randn(4, 4))]
    opt: Any = quantopt.AskewSGD(p, memory=True)
    anneal = quantopt.Anneal(opt, 10, hold=0.2, last=0.5)  # the end stays at 0.8
    values = []
    for _ in range(10):
        anneal.step()
        values.append(opt.param_groups[0]["epsilon"])
    assert values[:2] == [1.0, 1.0] and values[2] < 1 and set(values[7:]) == {(1 - 0.5**2) ** 2}
    opt = quantopt.STAM(p)
    quantopt.Anneal(opt, 10, first=1.0)
    assert opt.param_groups[0]["kappa"] == 1.0
    opt = quantopt.ProxQuant(p)
    anneal = quantopt.Anneal(opt, 10, end=0.1)
    anneal.step()
    assert math.isinf(opt.param_groups[0]["reg_strength"])
    for bad in ({"hold": 0.9, "end": 0.9}, {"last": 1.5}):
        with pytest.raises(ValueError, match="must be 0 <= hold < end <= 1"):
            quantopt.Anneal(quantopt.AskewSGD(p), 10, **bad)
    with pytest.raises(ValueError, match="must be 0 <= start < end <= 1 and 0 < first <= last < inf"):
        quantopt.Anneal(quantopt.BinaryRelax(p), 10, first=0.0)
    with pytest.raises(ValueError, match="must be 0 < end <= 1"):
        quantopt.Anneal(quantopt.ProxQuant(p), 10, end=0.0)
    with pytest.raises(ValueError, match=r"hold=0\.5: the schedule of STAM has end, first, last, start"):
        quantopt.Anneal(quantopt.STAM(p), 10, hold=0.5)
    with pytest.raises(ValueError, match=r"end=0\.5: the schedule of BinaryConnect has no settings"):
        quantopt.Anneal(quantopt.BinaryConnect(p), 10, end=0.5)
    with pytest.raises(ValueError, match="leave out schedule="):
        quantopt.Anneal(quantopt.STAM(p), 10, quantopt.STAM(p).annealed, end=0.5)


def test_anneal_takes_the_authors_schedule_and_refuses_nonsense() -> None:
    opt = quantopt.AskewSGD([nn.Parameter(torch.randn(4, 4))])
    anneal = quantopt.Anneal(
        opt, 100, schedule=quantopt.optim.authors_epsilon(rate=0.5, hold=2, steps_per_epoch=10)
    )
    values = []
    for _ in range(50):
        values.append(opt.param_groups[0]["epsilon"])
        anneal.step()
    assert values[29] == 1.0 and values[30] == 0.5 and values[40] == 0.25
    for total in (0, -3, 2.5):
        with pytest.raises(ValueError, match="total_steps"):
            quantopt.Anneal(opt, total)
    with pytest.raises(TypeError, match="optimizer"):
        quantopt.Anneal(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 10)
    with pytest.raises(ValueError, match="state_dict"):
        anneal.load_state_dict({"step": 3})


# ---- what is kept between steps ----------------------------------------------------------------------------------


def _replace_storage(model: nn.Module, opt: Any) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def _replace_state(model: nn.Module, opt: Any) -> None:
    for state in opt.state.values():
        state["momentum_buffer"] = state["momentum_buffer"] * 0.5


def _drop_state(model: nn.Module, opt: Any) -> None:
    opt.state.clear()


def _change_options(model: nn.Module, opt: Any) -> None:
    opt.param_groups[0].update(nesterov=True, constrain="gradient", decoupled_weight_decay=True)


def _change_numbers(model: nn.Module, opt: Any) -> None:
    opt.param_groups[0].update(lr=0.01, epsilon=0.2, weight_decay=0.1, momentum=0.5)


def _freeze_one(model: nn.Module, opt: Any) -> None:
    opt.param_groups[0]["params"][0].requires_grad_(False)


def _channels_last(model: nn.Module, opt: Any) -> None:
    model.to(memory_format=torch.channels_last)


def _another_dtype(model: nn.Module, opt: Any) -> None:
    model.double()


def _reload(model: nn.Module, opt: Any) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


@pytest.mark.parametrize(
    "change",
    [
        _replace_storage, _replace_state, _drop_state, _change_options, _change_numbers, _freeze_one, _channels_last,
        _another_dtype, _reload,
    ],
)  # fmt: skip
def test_what_is_kept_between_steps_notices_changes(change: Callable[[nn.Module, Any], None]) -> None:
    """The same run with the reference, which keeps nothing, is the measure."""
    results = []
    for backend in ("auto", "reference"):
        model = network()
        opt = quantopt.AskewSGD(
            quantopt.param_groups(model), lr=0.05, weight_decay=0.01, epsilon=0.5, backend=backend
        )
        train(model, opt, 3)
        change(model, opt)
        train(model, opt, 3, 3)
        for p in model.parameters():
            p.requires_grad_(True)
        train(model, opt, 2, 6)
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_a_step_sees_gradients_that_come_and_go() -> None:
    a, b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    opt = quantopt.AskewSGD([a, b])
    for present in ((a,), (a,), (a, b), (b,), (a, b), ()):
        before = {p: p.detach().clone() for p in (a, b)}
        opt.zero_grad()
        for p in present:
            p.grad = torch.randn(4, 4)
        opt.step()
        for p in (a, b):
            assert torch.equal(p, before[p]) != any(p is q for q in present)


def test_in_place_changes_are_seen_by_autograd() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    opt = quantopt.AskewSGD([p])
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


def test_defaults_are_those_of_the_document() -> None:
    p = [nn.Parameter(torch.randn(4, 4))]

    def keys(opt: Any, *names: str) -> list[Any]:
        return [opt.param_groups[0][name] for name in names]

    assert keys(quantopt.AskewSGD(p), "lr", "momentum", "rate", "cap", "weight_decay") == [
        0.3,
        0.9,
        0.1,
        0.25,
        0.0,
    ]
    assert keys(quantopt.AskewSGD(p, memory=True), "lr", "rate", "bound") == [1.0, math.inf, 2.0]
    assert keys(quantopt.AskewSGD([{"params": p, "memory": True}]), "rate") == [math.inf]
    assert keys(quantopt.STAM(p), "lr", "weight_decay", "form", "lam") == [1.0, 3e-3, "alternating", 0.0]
    assert keys(quantopt.STAM(p, form="splitting"), "lr", "weight_decay") == [0.3, 0.0]
    assert keys(quantopt.BinaryConnect(p), "lr", "clip") == [0.5, 1.0]
    assert keys(quantopt.BinaryRelax(p), "lr", "clip") == [0.3, 1.0]
