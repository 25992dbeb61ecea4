"""The 4-bit quantisers of LUQ, its layers, and quantised activations before layers that are packed."""

import copy

import pytest
import torch
from torch import nn

import quantopt
from quantopt.nn import SAWB, LUQConv2d, LUQLinear, luq, quantize_activations
from quantopt.nn.luq import quantize_activation, quantize_weight, round_gradient

DTYPES = [torch.float32, torch.bfloat16]


def network() -> nn.Sequential:
    return nn.Sequential(
        *[nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(8, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9), nn.ReLU()],
        *[nn.Flatten(), nn.Linear(9 * 16, 13), nn.ReLU(), nn.Linear(13, 4)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_sawb_against_its_formula(dtype, signed):
    x = torch.randn(3, 7, 11, dtype=torch.float64).to(dtype)
    x = x if signed else x.relu()
    exact = x.double()
    clip = 12.1 * exact.square().mean().sqrt() - 12.2 * exact.abs().mean()
    step = 2 * clip / 15
    low, high = (-8, 7) if signed else (0, 15)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for quantise in (quantize_activation, quantize_weight) if signed else (quantize_activation,):
        y = quantise(x)
        assert y.dtype == dtype
        codes = y.double() / step
        assert (codes - codes.round()).abs().max() <= 15 * tolerance
        assert codes.round().min() >= low and codes.round().max() <= high
        near = (exact >= (low - 0.5) * step) & (exact <= (high + 0.5) * step)
        assert ((y.double() - exact).abs()[near] <= step / 2 + tolerance * exact.abs()[near]).all()
    if signed:
        clipped = torch.cat([x.flatten(), torch.tensor([100.0, -100.0], dtype=dtype)])
        codes = quantize_weight(clipped).double()
        assert codes.max() / codes.min() == pytest.approx(-7 / 8, rel=1e-2)


@pytest.mark.parametrize("x", [torch.zeros(5), torch.ones(5), torch.tensor([2.0, -2.0]), torch.empty(0)])
def test_sawb_where_its_formula_gives_no_clip(x):
    y = quantize_activation(x)
    assert y.isfinite().all() and (y - x).abs().le(x.abs() / 7).all()


@pytest.mark.parametrize("quantise", [quantize_activation, quantize_weight])
def test_straight_through(quantise):
    x = (3 * torch.randn(50)).requires_grad_()  # some are clipped
    g = torch.randn(50)
    quantise(x).backward(g)
    assert torch.equal(x.grad, g)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_gradients_are_levels(dtype):
    g = (torch.randn(3000) * torch.rand(3000) ** 4).to(dtype)
    g[:3] = torch.tensor([4.0, 0.0, -2.0])
    assert g.abs().max() == 4
    smallest = 4 / 2**7
    y = round_gradient(g)
    assert y.dtype == dtype and torch.equal(y[:3], g[:3])  # levels stay where they are
    exponents = (y[y != 0].abs().float() / smallest).log2()
    assert torch.equal(exponents, exponents.round()) and set(exponents.int().tolist()) == set(range(8))
    assert ((y.sign() == g.sign()) | (y == 0)).all()
    small = g.abs() < smallest
    assert set(y[small].abs().float().tolist()) == {0.0, smallest}
    ratio = (y.float() / g.float())[~small]
    assert ((ratio > 0.5 - 1e-6) & (ratio < 2)).all()


@pytest.mark.parametrize("repeat", [1, 4])
def test_rounded_gradients_are_unbiased(repeat):
    g = torch.tensor([-1.0, 0.75, 0.3, -0.02, 0.0051, -0.001, 0.0])
    draws = 20_000
    rounded = torch.stack([round_gradient(g, repeat) for _ in range(draws // 100)])
    wide = round_gradient(g.repeat(draws), repeat).view(draws, -1)
    deviation = wide.std(0)
    assert ((wide.mean(0) - g).abs() <= 5 * deviation / draws**0.5 + 1e-7).all()
    assert deviation[2] > 0 and rounded.std(0)[2] > 0
    once = round_gradient(g.repeat(draws)).view(draws, -1).std(0)
    assert deviation[2] / once[2] == pytest.approx(repeat**-0.5, rel=0.05)


def test_gradients_of_zeros_and_of_nothing():
    assert torch.equal(round_gradient(torch.zeros(4)), torch.zeros(4))
    assert round_gradient(torch.empty(0)).shape == (0,)


def test_luq_converts_the_inner_layers_and_keeps_the_parameters():
    model = network()
    before = dict(model.named_parameters())
    assert luq(model, repeat=2) is model
    assert [type(m) for m in model if isinstance(m, nn.Conv2d | nn.Linear)] == [
        nn.Conv2d,
        LUQConv2d,
        LUQLinear,
        nn.Linear,
    ]
    assert model[2].repeat == 2 and copy.deepcopy(model)[2].repeat == 2
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert isinstance(luq(network(), skip=())[0], LUQConv2d)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_luq_layer_is_the_float_layer_on_quantised_operands(kind):
    if kind == "linear":
        layer, x = nn.Linear(11, 7), torch.randn(5, 11)
    else:
        layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 9, 7)
    plain = copy.deepcopy(layer)
    (converted,) = luq(nn.Sequential(layer), skip=())
    with torch.no_grad():
        plain.weight.copy_(quantize_weight(layer.weight))
    inputs = x.clone().requires_grad_()
    y = converted(inputs)
    quantised = quantize_activation(x).requires_grad_()
    expected = plain(quantised)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    torch.manual_seed(3)
    y.backward(g)
    torch.manual_seed(3)
    expected.backward(round_gradient(g))
    assert torch.equal(inputs.grad, quantised.grad)
    assert torch.equal(converted.weight.grad, plain.weight.grad)
    assert torch.equal(converted.bias.grad, plain.bias.grad)


def test_luq_learns_under_bfloat16_autocast():
    model = luq(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    labels = torch.arange(64) % 4
    images = torch.randn(64, 3, 4, 4) + torch.randn(4, 3, 4, 4)[labels]
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0] and model[2].weight.dtype == torch.float32


@pytest.mark.parametrize("fold", [False, True])
def test_quantised_activations_before_packed_layers(tmp_path, fold):
    model = quantize_activations(network())
    assert isinstance(model[2], nn.Sequential) and isinstance(model[2][0], SAWB)
    assert type(model[0]) is nn.Conv2d
    opt = quantopt.AskewSGD(quantopt.param_groups(model, bits=4), memory=True)
    model(torch.randn(8, 3, 4, 4)).sum().backward()
    opt.step()
    model.eval()
    x = torch.randn(6, 3, 4, 4)
    with torch.no_grad(), opt.quantized():
        expected = model(x)
    packed = quantopt.pack(model, opt, fold_batchnorm=fold)
    assert isinstance(packed[2][1], quantopt.nn.BinaryConv2d) and isinstance(packed[2][0], SAWB)
    assert isinstance(packed[3], nn.BatchNorm2d) != fold
    quantopt.save(packed, tmp_path / "w4a4.safetensors")
    again = quantopt.load(tmp_path / "w4a4.safetensors", quantize_activations(network())).eval()
    with torch.no_grad():
        assert torch.allclose(packed(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(again(x), packed(x))


@pytest.mark.parametrize(
    ("convert", "arguments", "message"),
    [
        (luq, {"repeat": 0}, "repeat=0: must be"),
        (luq, {"skip": ("first", "last", "2.*", "6.*")}, "luq: no weight is left to quantise"),
        (quantize_activations, {"skip": ("nothing.*",)}, "skip='nothing.*' matches no parameter"),
    ],
)
def test_bad_arguments(convert, arguments, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        convert(model, **arguments)
    assert {type(m) for m in model} <= {nn.Conv2d, nn.ReLU, nn.BatchNorm2d, nn.Flatten, nn.Linear}


def test_layers_that_cannot_be_converted_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Conv1d(4, 4, 1)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"layer 1\.0 is Conv1d; only"):
        luq(model)
    assert type(model[0]) is nn.Linear
