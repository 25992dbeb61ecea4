"""Views of the weights, metrics, and the anneal that drives them."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import quantopt
from optim_cases import MAKERS, every, network, same, train, weights
from quantopt.reference import levels as grid

# ---- views of the weights --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("bits", [1, 2, 3, 4, "17-level", "ternary"])
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


SAWB = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.1, 12.2), "17-level": (12.1, 12.2)}


@every
@pytest.mark.parametrize("bits", SAWB)
def test_levels_of_sawb(name: str, bits: int | str) -> None:
    """One outer level for each tensor, that of the first weights."""
    if name == "binaryconnect-stochastic":
        pytest.skip("stochastic signs are binary")
    model = network()
    groups = quantopt.param_groups(model, bits=bits, scale="sawb")
    first = [p.detach().double().clone() for p in groups[0]["params"]]
    opt = MAKERS[name](groups, lr=0.01)
    train(model, opt, 2)
    packed = quantopt.pack(model, opt)
    for p, w, q in zip(groups[0]["params"], first, opt.quantizations().values(), strict=True):
        c1, c2 = SAWB[bits]
        clip = c1 * w.square().mean().sqrt() - c2 * w.abs().mean()
        assert q.max_level.shape == (1,) and float(q.max_level) == pytest.approx(float(clip), rel=1e-5)
        with opt.quantized():
            assert float(p.detach().abs().max()) <= float(clip) * (1 + 1e-5)
    x = torch.randn(4, 2, 6, 6)
    with opt.quantized():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)


def test_sawb_where_its_formula_gives_nothing() -> None:
    even, zero = nn.Parameter(0.5 * torch.randn(4, 8).sign()), nn.Parameter(torch.zeros(4, 8))
    even.data[0, 0] = 0.501  # else it would lie on levels
    opt = quantopt.AskewSGD([even], bits=4, scale="sawb")
    (row,) = opt.metrics()
    assert row["scale"] * grid.level_factor(16) == pytest.approx(0.501)
    with pytest.raises(ValueError, match=r"parameter 0 .*all zero .*scale='sawb'"):
        quantopt.AskewSGD([zero], bits=4, scale="sawb").metrics()


def test_weights_on_levels_keep_them_with_sawb() -> None:
    p = nn.Parameter(0.3 * (2 * torch.randint(0, 16, (16, 16)) - 15).float())
    opt = quantopt.AskewSGD([p], bits=4, scale="sawb")
    opt.metrics()
    assert float(opt.state[p]["scale"]) * grid.level_factor(16) == pytest.approx(0.3 * 15, rel=1e-6)


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


# ---- anneal ----------------------------------------------------------------------------------------------------


def annealed(opt: Any, total: int, key: str) -> list[float]:
    anneal = quantopt.Anneal(opt, total)
    values = [opt.param_groups[0][key]]
    for _ in range(total):
        opt.step()
        anneal.step()
        values.append(opt.param_groups[0][key])
    opt.step()
    anneal.step()  # beyond the end: stays
    assert opt.param_groups[0][key] == values[-1]
    return values


def test_schedules_are_those_of_the_document() -> None:
    p = [nn.Parameter(torch.randn(4, 4))]
    e = annealed(quantopt.AskewSGD(p, bits=1), 100, "epsilon")
    assert e[:71] == [1.0] * 71 and e[100] == e[90] == pytest.approx((1 - 0.995**2) ** 2)
    assert math.sqrt(1 - math.sqrt(e[80])) == pytest.approx(0.995 / 2)
    e = annealed(quantopt.AskewSGD(p, bits=1, memory=True), 100, "epsilon")
    assert e[50] == 1.0 and e[51] < 1.0 and e[80] == 0.0 == e[100]
    assert math.sqrt(1 - math.sqrt(e[65])) == pytest.approx(0.5)
    k = annealed(quantopt.STAM(p, bits=1), 100, "kappa")
    assert k[0] == pytest.approx(0.01) and k[40] == pytest.approx(1.0) and k[79] < 100 and math.isinf(k[80])
    k = annealed(quantopt.STAM(p, bits=1, form="splitting"), 100, "kappa")
    assert k[69] == 0.0 and k[70] == pytest.approx(1e-3) and k[94] < 1.0 and math.isinf(k[95])
    k = annealed(quantopt.BinaryRelax(p, bits=1), 100, "kappa")
    assert k[0] == pytest.approx(1.0) and k[40] == pytest.approx(10.0) and math.isinf(k[80])
    r = annealed(quantopt.ProxQuant(p, bits=1, reg=0.01), 100, "reg_strength")
    assert r[0] == pytest.approx(0.01) and r[49] == pytest.approx(0.5) and math.isinf(r[80])


def test_schedules_take_settings() -> None:
    p = [nn.Parameter(torch.randn(4, 4))]
    opt: Any = quantopt.AskewSGD(p, bits=1, memory=True)
    anneal = quantopt.Anneal(opt, 10, hold=0.2, last=0.5)  # the end stays at 0.8
    values = []
    for _ in range(10):
        opt.step()
        anneal.step()
        values.append(opt.param_groups[0]["epsilon"])
    assert values[:2] == [1.0, 1.0] and values[2] < 1 and set(values[7:]) == {(1 - 0.5**2) ** 2}
    opt = quantopt.STAM(p, bits=1)
    quantopt.Anneal(opt, 10, first=1.0)
    assert opt.param_groups[0]["kappa"] == 1.0
    opt = quantopt.ProxQuant(p, bits=1)
    anneal = quantopt.Anneal(opt, 10, end=0.1)
    opt.step()
    anneal.step()
    assert math.isinf(opt.param_groups[0]["reg_strength"])
    for bad in ({"hold": 0.9, "end": 0.9}, {"last": 1.5}):
        with pytest.raises(ValueError, match="must be 0 <= hold < end <= 1"):
            quantopt.Anneal(quantopt.AskewSGD(p, bits=1), 10, **bad)
    with pytest.raises(ValueError, match="must be 0 <= start < end <= 1 and 0 < first <= last < inf"):
        quantopt.Anneal(quantopt.BinaryRelax(p, bits=1), 10, first=0.0)
    with pytest.raises(ValueError, match="must be 0 < end <= 1"):
        quantopt.Anneal(quantopt.ProxQuant(p, bits=1), 10, end=0.0)
    with pytest.raises(ValueError, match=r"hold=0\.5: the schedule of STAM has end, first, last, start"):
        quantopt.Anneal(quantopt.STAM(p, bits=1), 10, hold=0.5)
    with pytest.raises(ValueError, match=r"end=0\.5: the schedule of BinaryConnect has no settings"):
        quantopt.Anneal(quantopt.BinaryConnect(p, bits=1), 10, end=0.5)
    with pytest.raises(ValueError, match="leave out schedule="):
        quantopt.Anneal(quantopt.STAM(p, bits=1), 10, quantopt.STAM(p, bits=1).annealed, end=0.5)


def test_anneal_takes_a_schedule_and_refuses_nonsense() -> None:
    opt = quantopt.AskewSGD([nn.Parameter(torch.randn(4, 4))], bits=1)
    anneal = quantopt.Anneal(
        opt, 100, schedule=lambda group, step, total: {"epsilon": min(1.0, 0.5 ** (step // 10 - 2))}
    )
    values = []
    for _ in range(50):
        values.append(opt.param_groups[0]["epsilon"])
        opt.step()
        anneal.step()
    assert values[29] == 1.0 and values[30] == 0.5 and values[40] == 0.25
    for total in (0, -3, 2.5):
        with pytest.raises(ValueError, match="total_steps"):
            quantopt.Anneal(opt, total)
    with pytest.raises(TypeError, match="optimizer"):
        quantopt.Anneal(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 10)
    with pytest.raises(ValueError, match="state_dict"):
        anneal.load_state_dict({"step": 3})


def test_the_mean_scale_is_over_the_weights() -> None:
    """A short last group counts as many times as it has weights."""
    p = nn.Parameter(torch.cat([torch.full((4, 8), 2.0), torch.full((4, 2), 7.0)], 1))
    opt = quantopt.AskewSGD([{"params": [p], "bits": 1, "scale": "group", "group_size": 8}])
    assert opt.metrics()[0]["scale"] == pytest.approx((8 * 2 + 2 * 7) / 10)
