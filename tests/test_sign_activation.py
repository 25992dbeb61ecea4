"""SignActivation: the sign forward, the derivative of tanh backward; in training, compiled, exported and packed."""

import pytest
import torch
from torch import nn

import quantopt
from quantopt.nn import SignActivation

sign = SignActivation()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 2, 11)])
def test_sign_and_gradient(dtype, shape):
    x = (2 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    y = sign(x)
    assert y.dtype == dtype and y.shape == shape
    assert torch.equal(y, torch.where(x.detach() >= 0, 1.0, -1.0).to(dtype))
    y.backward(g)
    exact = g.double() * (1 - x.detach().double().tanh() ** 2)
    assert x.grad.dtype == dtype
    # Half a unit of the type's last place, and what float32 leaves of 1 - tanh^2 where that cancels.
    tolerance = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 4)
    torch.testing.assert_close(
        x.grad.double(), exact, rtol=tolerance, atol=2e-7 if dtype != torch.float64 else 1e-15
    )


def test_zeros_and_values_that_are_no_numbers():
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan], requires_grad=True)
    y = sign(x)
    assert y[:6].tolist() == [1, 1, 1, -1, 1, -1] and y[6].isnan()
    y[:6].sum().backward()
    assert x.grad[:4].tolist() == [1, 1, 1, 1] and x.grad[4:6].tolist() == [0, 0]


def test_gradients_of_gradients_are_those_of_tanh():
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(sign(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    t = x.detach().tanh()
    torch.testing.assert_close(second, -2 * t * (1 - t * t))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), SignActivation()],
        *[nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), SignActivation()],
        *[nn.Flatten(), nn.Linear(8 * 36, 5)],
    )


def test_under_autocast():
    x, model = torch.randn(4, 3, 6, 6), network()
    with torch.autocast("cpu", torch.bfloat16):
        inner = model[1](model[0](x))
        assert sign(inner).dtype == inner.dtype
        model(x).float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_compiled_network_takes_the_same_step():
    x = torch.randn(4, 3, 6, 6)
    results = []
    for compiled in (False, True):
        model = network()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    torch._dynamo.reset()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_packing_leaves_it():
    model = network()
    for norm in (
        model[1],
        model[4],
    ):  # the sum of 72 products of signs is often 0, which is not to be next to the mean
        norm.running_mean.uniform_(-0.03, 0.03)
    opt = quantopt.AskewSGD(quantopt.param_groups(model, bits=1, skip=()), lr=0.1)
    packed = quantopt.pack(model.eval(), opt, fold_batchnorm=True)
    assert [i for i, m in enumerate(packed) if type(m) is SignActivation] == [2, 5]
    assert isinstance(packed[3], quantopt.nn.BinaryConv2d) and type(packed[4]).__name__ == "Folded"
    x = torch.randn(6, 3, 6, 6)
    with opt.quantized():
        expected = model(x)
    # A sum next to zero may have another sign after folding; it moves the 5 outputs by 2 weights at most.
    differing = (packed(x) - expected).abs() > 1e-3
    assert differing.float().mean() < 0.2
