"""Scales of groups that follow the weights, through the optimizers: STAM, BinaryConnect and BinaryRelax."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quantopt
from optim_cases import same, train, weights
from quantopt.optim.base import LevelOptimizer
from quantopt.reference import levels as grid

FOLLOWING: dict[str, Any] = {
    "stam": quantopt.STAM,
    "stam-adam": lambda p, **k: quantopt.STAM(p, base="adam", **k),
    "stam-given": lambda p, **k: quantopt.STAM(p, base="given", lr=0.01, **k),
    "stam-pulled": lambda p, **k: quantopt.STAM(p, lam=0.3, **k),
    "stam-splitting": lambda p, scale="group-mean", **k: quantopt.STAM(
        p, form="splitting", scale="group-mean" if scale == "group" else scale, **k
    ),
    "binaryconnect": quantopt.BinaryConnect,
    "binaryconnect-stochastic": lambda p, **k: quantopt.BinaryConnect(p, stochastic=True, **k),
    "binaryrelax": quantopt.BinaryRelax,
}
following = pytest.mark.parametrize("name", FOLLOWING)
SHAPES = ((5, 13, 3), (4, 96), (1, 70), (9, 1), (33, 40), (12,))


def means(w: Tensor, size: int) -> Tensor:
    """mean|w| of each group, one by one."""
    rows = w.detach().double().reshape(w.shape[0], -1)
    return torch.stack([part.abs().mean(dim=1) for part in rows.split(size, dim=1)], dim=1)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def step(opt: Any, params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(p.dtype)
    torch.manual_seed(seed)
    opt.step()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 32, 128])
@following
def test_each_group_has_the_mean_of_its_latent(
    name: str, size: int, dtype: torch.dtype, backend: str
) -> None:
    params = parameters(dtype)
    opt = FOLLOWING[name](params, bits=1, scale="group", group_size=size, backend=backend)
    for k in range(3):
        step(opt, params, k)
        for p in params if "splitting" not in name else ():  # its scale is that of r, which no state has
            state = opt.state[p]
            latent, scale = state["latent"], state["scale"]
            assert latent.dtype == scale.dtype == torch.float32
            expected = means(latent, size) if p.dim() > 1 else latent.abs().mean().view(1).double()
            assert scale.shape == expected.shape
            torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=1e-7)
            if "binary" in name:
                assert state["sigma"].shape == scale.shape
                bound = state["sigma"].double()
                reach = grid.spread_over(bound, latent, size)
                assert bool((latent.double().abs() <= reach * (1 + 1e-6)).all())
    for p in params:
        assert p.dim() < 2 or opt.state[p]["scale"].shape == (p.shape[0], -(-p[0].numel() // size))


@given(
    rows=st.integers(1, 4), length=st.integers(1, 200), size=st.integers(1, 250),
    name=st.sampled_from(["stam", "binaryconnect", "stam-splitting"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_group_trains_as_a_row_of_its_own(rows: int, length: int, size: int, name: str) -> None:
    """Its bits do not depend on what is beside it."""
    torch.manual_seed(rows + 5 * length)
    whole = nn.Parameter(torch.randn(rows, length))
    at = slice(0, min(size, length))
    alone = nn.Parameter(whole.detach()[-1:, at].clone())
    opts = [FOLLOWING[name]([p], bits=1, scale="group", group_size=size) for p in (whole, alone)]
    for _ in range(3):
        whole.grad = torch.randn_like(whole)
        alone.grad = whole.grad[-1:, at].clone()
        for opt in opts:
            opt.step()
    assert torch.equal(whole[-1:, at], alone)


@pytest.mark.parametrize("size", [1, 7, 32, 1000])
@following
def test_a_trained_model_is_packed_with_a_scale_per_group(name: str, size: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(28, 40), nn.ReLU(), nn.Linear(40, 3))
    groups = quantopt.param_groups(model, bits=1, scale="group", skip=())
    for group in groups:
        group["group_size"] = size
    opt = FOLLOWING[name](groups)
    train(model, opt, 4)
    packed = quantopt.pack(model, opt)
    x = torch.randn(6, 2, 6, 6)
    with opt.quantized(), torch.no_grad():
        expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
    for layer in (model[0], model[2], model[5], model[7]):
        found = opt.quantization(layer.weight)
        assert found is not None and found.group_size == size
        torch.testing.assert_close(found.max_level, opt.state[layer.weight]["scale"])


@following
def test_a_checkpoint_goes_on_as_the_training_does(name: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 9))

    ours, other = model(), model()
    options = dict(bits=1, scale="group", group_size=7)
    opt, loaded = (FOLLOWING[name](m.parameters(), **options) for m in (ours, other))
    train(ours, opt, 3)
    train(other, loaded, 1)
    other.load_state_dict(ours.state_dict())
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((ours, opt), (other, loaded)):
        train(m, o, 3, first=3)
    assert same(weights(ours), weights(other))


@pytest.mark.parametrize(
    "name", ["stam", "stam-pulled", "binaryconnect", "binaryconnect-stochastic", "binaryrelax"]
)
def test_a_state_of_earlier_versions_has_the_scale_of_the_row_for_its_groups(name: str) -> None:
    """They kept a and sigma per channel under scale="group"."""
    params, others = parameters(), parameters()
    old = FOLLOWING[name](params, bits=1, scale="channel", group_size=7)
    for k in range(3):
        step(old, params, k)
    saved = copy.deepcopy(old.state_dict())
    saved["param_groups"][0]["scale"] = "group"
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    opt = FOLLOWING[name](others, bits=1, scale="group", group_size=7)
    opt.load_state_dict(saved)
    with opt.quantized(), old.quantized():
        assert all(map(torch.equal, params, others))
    for p, q in zip(params, others, strict=True):
        for key in {"scale", "sigma"} & opt.state[q].keys() if p.dim() > 1 else ():
            value, per_row = opt.state[q][key], old.state[p][key]
            assert value.shape == (p.shape[0], -(-p[0].numel() // 7)) and value.is_contiguous()
            assert torch.equal(value, per_row.view(-1, 1).expand_as(value))
    step(opt, others, 4)
    for q in others:
        latent = opt.state[q]["latent"]
        if q.dim() > 1:
            torch.testing.assert_close(opt.state[q]["scale"].double(), means(latent, 7), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", ["lr", "found_inf"])
@following
def test_scales_stay_where_the_weights_stay(name: str, how: str) -> None:
    params = parameters()
    opt = FOLLOWING[name](params, bits=1, scale="group", group_size=7, fused_amp=True)
    step(opt, params, 0)
    before = [
        (p.detach().clone(), opt.state[p]["scale"].clone(), opt.state[p]["latent"].clone()) for p in params
    ]
    if how == "lr":
        opt.param_groups[0]["lr"] = 0.0
    else:
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    step(opt, params, 1)
    for p, values in zip(params, before, strict=True):
        for now, value in zip((p, opt.state[p]["scale"], opt.state[p]["latent"]), values, strict=True):
            assert torch.equal(now, value)


@following
def test_capturable_groups_take_the_same_steps(name: str) -> None:
    results = []
    for capturable in (False, True):
        params = parameters()
        opt = FOLLOWING[name](params, bits=1, scale="group", group_size=7, capturable=capturable)
        for k in range(3):
            step(opt, params, k)
        results.append([p.detach().clone() for p in params] + [opt.state[p]["scale"].clone() for p in params])
    assert all(map(torch.equal, *results))


def test_grids_of_more_levels_stay_frozen_per_group() -> None:
    params = parameters()[:5]
    for optimizer, bits in itertools.product((quantopt.STAM, quantopt.BinaryRelax), (2, "ternary")):
        opt = optimizer(params, bits=bits, scale="group", group_size=7)
        step(opt, params, 0)
        before = [opt.state[p]["scale"].clone() for p in params]
        step(opt, params, 1)
        assert all(torch.equal(opt.state[p]["scale"], scale) for p, scale in zip(params, before, strict=True))


@pytest.mark.parametrize("options", [dict(), dict(form="splitting", bits=2)])
def test_means_of_r_belong_to_the_binary_splitting(options: dict[str, Any]) -> None:
    make = quantopt.STAM if options else quantopt.AskewSGD
    with pytest.raises(ValueError, match=r"'group-mean'.*'group'"):
        make([nn.Parameter(torch.randn(3, 4))], **{"bits": 1, "scale": "group-mean", **options})


def test_a_group_of_zeros_is_refused_by_name() -> None:
    p = nn.Parameter(torch.randn(3, 40))
    p.data[1, 7:14] = 0.0
    opt: LevelOptimizer = quantopt.STAM([("up.weight", p)], bits=1, scale="group", group_size=7)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"'up.weight': a slice of its weights is all zero"):
        opt.step()


@following
def test_metrics_of_a_group_whose_scale_has_become_zero(name: str) -> None:
    p = nn.Parameter(torch.randn(3, 40))
    opt = FOLLOWING[name]([p], bits=1, scale="group", group_size=8)
    opt.metrics()
    for value in (p.data, opt.state[p]["latent"]):
        value[1, 8:16] = 0.0
    opt.state[p]["scale"][1, 1] = 0.0
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[1, 8:16] = False
    hi = grid.spread_over(opt.state[p]["scale"], p, 8)[rest]
    t = p.detach()[rest].abs() / hi
    row = opt.metrics()[0]
    # Of two levels the middle of the only cell is 0 and half is hi.
    assert row["distance"] == pytest.approx(float((1 - t).abs().clamp(max=1).sum()) / p.numel(), rel=1e-5)
    assert row["fraction_feasible"] >= 8 / p.numel()


CHANGES = (
    ("none", "group"), ("tensor", "group"), ("channel", "group"), ("none", "channel"), ("none", "tensor"),
    ("group", "channel"), ("group", "tensor"), ("tensor", "channel"), ("channel", "tensor"),
)  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("change", CHANGES)
@following
def test_the_scale_of_another_granularity_is_taken_up(
    name: str, change: tuple[str, str], backend: str
) -> None:
    """Rows, groups and their size are such that a value of another layout may pass for one of the right one."""
    before, after = change
    if "splitting" in name:  # its other scales are frozen
        if after == "tensor":
            return
        after = f"{after}-mean"
    for shape in ((6, 40), (6, 13, 3), (1, 40)):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(shape))
        opt = FOLLOWING[name]([p], bits=1, scale=before, group_size=7, backend=backend)
        step(opt, [p], 0)
        bound = opt.state[p].get("sigma")
        opt.param_groups[0]["scale"] = after
        shape_of_scale = (shape[0], 6) if "group" in after else (shape[0],)
        for k in (1, 2):
            step(opt, [p], k)
            state = opt.state[p]
            assert state["scale"].shape == shape_of_scale
            if "splitting" not in name:
                mean = means(state["latent"], 7 if after == "group" else 1000).view(shape_of_scale)
                torch.testing.assert_close(state["scale"].double(), mean, rtol=1e-5, atol=1e-7)
            if bound is not None:
                sigma = state["sigma"]
                assert after != "group" or sigma.shape == shape_of_scale
                expected = (bound.mean(1) if bound.dim() == 2 else bound).view(-1, 1)
                sigma = sigma.view(len(sigma), -1)
                torch.testing.assert_close(sigma, expected.expand_as(sigma))
        found = opt.quantization(p)
        assert found.max_level.shape == shape_of_scale
        assert found.group_size == (7 if "group" in after else 0)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        step(opt, [p], 3)


@pytest.mark.parametrize("sizes", [(7, 8), (8, 7), (30, 35), (7, 100), (100, 7)])
@pytest.mark.parametrize("view_first", [False, True])
@following
def test_groups_of_another_size_have_their_own_means(
    name: str, view_first: bool, sizes: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 40))
    opt = FOLLOWING[name]([p], bits=1, scale="group", group_size=sizes[0])
    step(opt, [p], 0)
    bound = opt.state[p].get("sigma")
    weights, latent = p.detach().clone(), opt.state[p]["latent"].clone()
    opt.param_groups[0]["group_size"] = sizes[1]
    if view_first:
        found = opt.quantization(p)
        assert found.group_size == sizes[1]
        torch.testing.assert_close(found.max_level.double(), means(latent, sizes[1]), rtol=1e-5, atol=1e-7)
        assert torch.equal(p, weights) and torch.equal(opt.state[p]["latent"], latent)
    step(opt, [p], 1)
    state = opt.state[p]
    assert state["scale"].shape == (6, -(-40 // sizes[1]))
    if "splitting" not in name:
        torch.testing.assert_close(
            state["scale"].double(), means(state["latent"], sizes[1]), rtol=1e-5, atol=1e-7
        )
    if bound is not None:
        torch.testing.assert_close(state["sigma"], bound.mean(1, keepdim=True).expand_as(state["scale"]))


def test_weights_that_others_wrote_are_taken_up_with_the_groups_of_before() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 40))
    opt = quantopt.STAM([p], bits=1, scale="group", group_size=7, kappa=1.0)
    step(opt, [p], 0)
    latent = opt.state[p]["latent"].clone()
    with torch.no_grad():
        p[2, 3] = 5.0
    latent[2, 3] = 5.0
    opt.param_groups[0]["group_size"] = 8
    opt.metrics()
    assert torch.equal(opt.state[p]["latent"], latent)
    torch.testing.assert_close(opt.state[p]["scale"].double(), means(latent, 8), rtol=1e-5, atol=1e-7)


def test_a_loaded_state_is_looked_at_before_its_groups_are_changed() -> None:
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(6, 40)) for _ in range(2))
    opt, loaded = (quantopt.STAM([w], bits=1, scale="group", group_size=7) for w in (p, q))
    step(opt, [p], 0)
    q.data.copy_(p.data)
    saved = copy.deepcopy(opt.state_dict())
    loaded.load_state_dict(saved)
    loaded.param_groups[0]["group_size"] = 8
    with pytest.raises(ValueError, match=r"group_size=8 .* just loaded: call metrics\(\)"):
        step(loaded, [q], 1)
    loaded.param_groups[0]["group_size"] = 7
    loaded.metrics()
    for o, w in ((opt, p), (loaded, q)):
        o.param_groups[0]["group_size"] = 8
        step(o, [w], 1)
    assert torch.equal(p, q) and torch.equal(opt.state[p]["scale"], loaded.state[q]["scale"])


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"group_size": 8}, "group_size=8.*group_size=7"),
        ({"group_size": 1}, "group_size=1.*group_size=7"),
        ({"scale": "channel"}, "scale='channel'.*scale='group'"),
        ({"scale": "tensor"}, "scale='tensor'.*scale='group'"),
        ({"scale": "none"}, "scale='none'.*scale='group'"),
    ],
)
@pytest.mark.parametrize("name", ["askew", "stam-ternary", "proxquant"])
def test_a_frozen_scale_keeps_its_layout(
    name: str, change: dict[str, Any], named: str, stepped: bool
) -> None:
    """In the step and in views; with the former options it goes on."""
    make: dict[str, Any] = {
        "askew": quantopt.AskewSGD,
        "stam-ternary": lambda p, **k: quantopt.STAM(p, **k | {"bits": "ternary"}),
        "proxquant": quantopt.ProxQuant,
    }
    torch.manual_seed(0)
    params, twins = ([nn.Parameter(w.clone()) for w in torch.randn(2, 6, 40).unbind()] for _ in range(2))
    for w, twin in zip(params, twins, strict=True):
        twin.data.copy_(w.data)
    opts = [
        make[name](zip(("up.weight", "down.weight"), ws, strict=True), bits=1, scale="group", group_size=7)
        for ws in (params, twins)
    ]
    for opt, ws in zip(opts, (params, twins), strict=True):
        opt.metrics()
        if stepped:
            step(opt, ws, 0)
    opt = opts[0]
    opt.param_groups[0].update(change)
    named = (
        f"'up.weight'.*{named if stepped else named.split('.*')[0]}.*frozen: set {next(iter(change))} back"
    )
    for refused in (lambda: step(opt, params, 1), opt.metrics, lambda: opt.quantization(params[0])):
        with pytest.raises(ValueError, match=named):
            refused()
    opt.param_groups[0].update(scale="group", group_size=7)
    for o, ws in zip(opts, (params, twins), strict=True):
        step(o, ws, 1)
    assert all(map(torch.equal, params, twins))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
