"""The activation of binary_linear, and its gradients."""

import pytest
import torch
from torch import Tensor

from linear_cases import SMOOTH, check, make, product, signs_by_definition
from quantopt.ops.inputs import ACTIVATIONS, COMPUTE
from quantopt.ops.linear import binary_linear
from quantopt.ops.weights import pack_signs


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation(isa: str, activation: str, compute: str, dtype: torch.dtype) -> None:
    """Of the fp32 sums. The derivatives are at most 1.13, so errors of the sums grow by that."""
    for m, n, k, group_size in [(1, 33, 81, 0), (9, 70, 250, 0), (3, 65, 128, 32), (3, 5, 50, 7)]:
        x, w, scale, bias = make(m, n, k, dtype)
        scale = torch.rand(n, -(-k // group_size)) + 0.1 if group_size else scale / k**0.5
        y = binary_linear(
            x,
            pack_signs(w),
            scale,
            bias,
            in_features=k,
            compute=compute,
            group_size=group_size,
            activation=activation,
        )
        expected, size = product(x, w, scale, bias, group_size, compute)
        check(y, SMOOTH[activation](expected), size, 2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_from_tail_to_tail(isa: str, activation: str) -> None:
    """To 1e-6 of max(1, |y|) everywhere, and limits as in float64 where exponentials overflow; NaN propagates."""
    y = torch.cat(
        [torch.linspace(-200, 200, 4001), torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 3e38])]
    )
    out = binary_linear(
        y[:, None], torch.ones(3, 1, dtype=torch.uint8), torch.ones(1), in_features=1, activation=activation
    )
    expected = SMOOTH[activation](y.double())[:, None].expand(-1, 3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_go_through_the_activation(activation: str, compute: str, dtype: torch.dtype) -> None:
    x, w, scale, bias = make(4, 5, 33, dtype)
    scale, bits = scale / 6, pack_signs(w)
    x.requires_grad_()
    bias.requires_grad_()
    form = {"in_features": 33, "compute": compute, "activation": activation}
    y = binary_linear(x[None], bits, scale, bias, **form)
    with torch.no_grad():
        assert torch.equal(y, binary_linear(x[None], bits, scale, bias, **form))
    grad = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    weight = signs_by_definition(w) * scale[:, None]
    sums = product(x.detach(), w, scale, bias.detach(), compute=compute)[0].requires_grad_()
    (grad_sums,) = torch.autograd.grad(SMOOTH[activation](sums), sums, grad[0].double())
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(grad_x.double(), grad_sums @ weight, **tolerance)
    torch.testing.assert_close(grad_bias.double(), grad_sums.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation: str) -> None:
    w, scale = torch.randn(5, 9), torch.full((1,), 0.3)
    x = torch.randn(3, 9, dtype=torch.double, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return binary_linear(x, pack_signs(w), scale, in_features=9, activation=activation)

    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("compute", COMPUTE)
def test_gradients_are_those_of_the_dense_layer(compute: str) -> None:
    x, w, scale, bias = make(4, 5, 33)
    x.requires_grad_()
    bias.requires_grad_()
    y = binary_linear(x[None], pack_signs(w), scale, bias, in_features=33, compute=compute)
    grad = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    weight = signs_by_definition(w) * scale[:, None]
    torch.testing.assert_close(grad_x.double(), grad[0].double() @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_bias, grad[0].sum(0))
