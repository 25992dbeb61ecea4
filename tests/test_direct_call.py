"""The direct call of a small packed layer (csrc/direct_call.cpp): what it gives, and that everything that watches,
wraps or differentiates tensors still reaches the operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quantopt import _extension
from quantopt.nn import BinaryLinear
from quantopt.packed_weight import PackedWeight

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


class Subclass(Tensor):
    pass


class Recorder(TorchDispatchMode):
    """The operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def layer() -> BinaryLinear:
    return BinaryLinear.from_linear(nn.Linear(70, 33), compute="int8")


def direct(
    layer: BinaryLinear, x: object, compute: str | None = "int8", activation: str = "relu", **changed: Any
) -> Any:
    return _extension.binary_linear_direct(x, layer.packed._replace(**changed), compute, activation)


def test_the_bits_of_the_operator(layer: BinaryLinear) -> None:
    x = torch.randn(4, 70)
    operator = torch.ops.quantopt.binary_linear.default
    for changed in ({}, {"bias": None}, {"tiles": None}):
        for compute in ("int8", "auto", "bf16"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                bits, scale, bias, k, weights, group_size, tiles = layer.packed._replace(**changed)
                expected = operator(
                    x.to(dtype), bits, scale, bias, k, weights, group_size, compute, tiles, "relu"
                )
                with torch.no_grad():
                    assert torch.equal(direct(layer, nn.Parameter(x.to(dtype)), compute, **changed), expected)
                assert torch.equal(direct(layer, x.to(dtype), compute, **changed), expected)
    with torch.inference_mode():
        assert direct(layer, x).is_inference()
    assert not direct(layer, x).is_inference()


def test_the_errors_of_the_operator(layer: BinaryLinear) -> None:
    x = torch.randn(4, 70)
    with pytest.raises(ValueError, match="x must have in_features=70"):
        direct(layer, x[:, 1:])
    with pytest.raises(ValueError, match="activation must be"):
        direct(layer, x, activation="tanh")
    assert direct(layer, x) is not None  # no error is left over


def test_other_arguments_are_left_to_torch(layer: BinaryLinear) -> None:
    x = torch.randn(4, 70)
    assert direct(layer, x) is not None
    for value in (
        x.double(),
        x.clone().requires_grad_(),
        x.to("meta"),
        x.as_subclass(Subclass),
        x.to_sparse(),
        None,
        [x],
    ):
        assert direct(layer, value) is None
    wrong: tuple[dict[str, Any], ...] = (
        {"plane_weights": (1,)},
        {"plane_weights": [1.0]},
        {"in_features": 70.0},
        {"in_features": 1 << 64},
        {"compute": None},
        {"scale": layer.scale.double()},
        {"bias": nn.Parameter(layer.bias)},
        {"bits": layer.bits.as_subclass(Subclass)},
    )
    for changed in wrong:
        assert direct(layer, x, **changed) is None
    call = _extension.binary_linear_direct
    assert call(x) is None
    assert call(x, list(layer.packed), "int8", "relu") is None
    assert call(x, tuple(layer.packed)[:-1], "int8", "relu") is None
    assert len(PackedWeight._fields) == 7  # which csrc/direct_call.cpp names


@pytest.mark.parametrize(
    "mode", [TorchDispatchMode, BaseTorchFunctionMode, lambda: torch.device("meta"), FakeTensorMode]
)
def test_modes_are_not_passed_by(layer: BinaryLinear, mode: Callable[[], Any]) -> None:
    x = torch.randn(4, 70)
    with mode():
        assert direct(layer, x) is None
    assert direct(layer, x) is not None


def test_modes_and_tracers_see_the_operator(layer: BinaryLinear) -> None:
    x = torch.randn(4, 70)
    with torch.no_grad():
        with Recorder() as recorder:
            layer(x)
        assert recorder.seen == ["quantopt.binary_linear.default"]
        graph = make_fx(layer)(x).graph
    targets = [str(node.target) for node in graph.nodes]
    assert "quantopt.binary_linear.default" in targets


def test_transforms_see_the_operator(layer: BinaryLinear) -> None:
    """Their wrapped tensors never reach the kernels; neither do plain ones while a transform is active."""
    x, seen = torch.randn(4, 70), []

    def run(v: Tensor) -> Tensor:
        seen.append(direct(layer, v.detach()))
        return layer(v)

    expected = layer(x)
    assert expected.abs().sum() > 0
    weight = layer.weight
    torch.testing.assert_close(torch.func.vmap(run)(x), expected)
    grad = torch.func.grad(lambda v: run(v).sum())(x)
    torch.testing.assert_close(grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.functionalize(run)(x), expected)
    value, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tangent, weight.sum(1).expand_as(expected), rtol=1e-4, atol=1e-4)
    assert seen == [None] * 3


def test_autograd_sees_the_operator(layer: BinaryLinear) -> None:
    x = torch.randn(4, 70, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)
    inner = torch.randn(4, 70)
    weight = layer.packed._replace(bias=layer.bias.clone().requires_grad_())
    assert _extension.binary_linear_direct(inner, weight, "int8", "none") is None


def test_subclasses_that_dispatch_see_the_operator(layer: BinaryLinear) -> None:
    """torch.distributed.tensor, quantised tensors of other packages, ... are such."""
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.randn(4, 70)
    y = layer(TwoTensor(x, 2 * x))
    assert isinstance(y, TwoTensor)
    assert torch.equal(y.a, layer(x)) and torch.equal(y.b, layer(2 * x))
