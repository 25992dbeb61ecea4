"""Packed layers of one input as one product."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantopt
from quantopt.nn import BinaryLinear
from quantopt.nn.joined import JoinedLinear, join
from quantopt.packing import join_layers

INPUTS = 40


def packed_layer(rows: int, bias: bool = False, scale: str = "channel", **options: Any) -> BinaryLinear:
    layer = BinaryLinear(INPUTS, rows, bias, scale=scale, group_size=16 if scale == "group" else 0, **options)
    bits = torch.randint(0, 256, layer.bits.shape, dtype=torch.uint8)
    return layer.set_weights(bits, torch.rand(layer.scale.shape), torch.randn(rows) if bias else None)


class Attention(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = make(24), make(8), make(9)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scale", ["tensor", "channel", "group"])
@pytest.mark.parametrize("levels", [2, 3, 17])
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("rows", [1, 7])
def test_outputs_are_bit_equal(scale: str, levels: int, compute: str, rows: int) -> None:
    layers = [
        packed_layer(n, bias, scale, levels=levels, compute=compute) for n, bias in ((5, True), (16, False))
    ]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, INPUTS, dtype=dtype)
        expected = [layer(x) for layer in layers]
        for layer, y in zip(join(layers), expected, strict=True):
            assert torch.equal(layer(x), y)


def test_one_product_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention(packed_layer)
    x = torch.randn(3, INPUTS)
    expected = model(x)
    assert join_layers(model) == 1
    weights = model.q_proj.weights
    calls = []
    plain = weights.forward
    monkeypatch.setattr(weights, "forward", lambda x: calls.append(x) or plain(x))
    assert torch.equal(model(x), expected) and len(calls) == 1
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), expected) and len(calls) == 2
    assert model.q_proj._product.last is None  # nothing is held after the last of them
    assert [name for name, _ in model.named_buffers()][:2] == ["q_proj.weights.bits", "q_proj.weights.scale"]


def test_other_and_changed_inputs_are_computed_anew() -> None:
    layers = [packed_layer(4), packed_layer(6)]
    first, second = join(layers)
    x, other = torch.randn(2, INPUTS), torch.randn(2, INPUTS)
    first(x)
    assert torch.equal(second(other), layers[1](other))
    first(x)
    x.mul_(2)
    assert torch.equal(second(x), layers[1](x))
    assert torch.equal(second(x), layers[1](x))  # without a call of the first
    first(x)
    x.mul_(2)
    assert torch.equal(first(x), layers[0](x))
    first(x)
    second(x).mul_(2)  # a result of its own, once it is taken
    assert torch.equal(second(x), layers[1](x))
    assert len(pickle.dumps(second)) < 20_000
    copy.deepcopy(second)
    with torch.no_grad():
        first(x.requires_grad_())
    assert second(x).requires_grad


def test_gradients_copies_devices_and_modes() -> None:
    model = Attention(lambda n: packed_layer(n, bias=True))
    plain = copy.deepcopy(model)
    join_layers(model)
    x = torch.randn(2, INPUTS, requires_grad=True)
    copied = copy.deepcopy(model.bfloat16().float())
    assert copied.q_proj.weights is copied.k_proj._product.layer is not model.q_proj.weights
    for each in (model, copied):
        (gradient,) = torch.autograd.grad(each(x).square().sum(), x)
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        torch.testing.assert_close(gradient, expected)


def test_compiles_to_one_graph() -> None:
    model = Attention(packed_layer)
    x = torch.randn(2, INPUTS)
    expected = model(x)
    join_layers(model)
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected) and torch.equal(compiled(2 * x), model(2 * x))


def test_what_is_left_as_it_is() -> None:
    model = Attention(lambda n: packed_layer(n, levels=2 if n > 8 else 3))
    assert join_layers(model) == 0
    assert not any(isinstance(m, JoinedLinear) for m in model.modules())
    assert join_layers(model, [("q_proj", "v_proj")]) == 1
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        join_layers(3)  # type: ignore[arg-type]


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match="at least two"):
        join([packed_layer(4)])
    with pytest.raises(TypeError, match="BinaryLinear is needed, not Linear"):
        join([packed_layer(4), nn.Linear(INPUTS, 4)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="compute must be the same in all, not exact, int8"):
        join([packed_layer(4, compute="exact"), packed_layer(4, compute="int8")])
    hooked = packed_layer(4)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="has hooks"):
        join([hooked, packed_layer(4)])
    changed = packed_layer(4)
    changed.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="a forward of its own"):
        join([packed_layer(4), changed])


def test_a_joined_model_is_not_saved(tmp_path: Path) -> None:
    model = Attention(packed_layer)
    join_layers(model)
    with pytest.raises(ValueError, match=r"layer q_proj is joined with others, .*: save before"):
        quantopt.save(model, tmp_path / "file")


def test_activation() -> None:
    layers = [packed_layer(n, activation="silu") for n in (3, 4)]
    x = torch.randn(2, INPUTS)
    for layer, plain in zip(join(layers), layers, strict=True):
        assert torch.equal(layer(x), plain(x))
        bare = copy.deepcopy(plain)
        bare.activation = "none"
        torch.testing.assert_close(layer(x), F.silu(bare(x)))
