"""BinaryLinear and BinaryConv2d as modules."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import force_isa
from quantopt import _extension
from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.ops.inputs import COMPUTE

needs_extension = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))


def binarised(weight: torch.Tensor) -> torch.Tensor:
    mean = weight.abs().flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))
    return torch.where(weight >= 0, mean, -mean)


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(bias: bool) -> None:
    linear = nn.Linear(70, 33, bias=bias).eval()
    layer = BinaryLinear.from_linear(linear)
    x = torch.randn(4, 5, 70)
    expected = nn.functional.linear(x, binarised(linear.weight), linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight, binarised(linear.weight))
    assert not layer.training and layer.compute == "auto" and not list(layer.parameters())
    rough = BinaryLinear.from_linear(linear, compute="int8")(x)
    assert not torch.equal(rough, expected)
    torch.testing.assert_close(rough, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_from_conv2d(padding: int | str, mode: str) -> None:
    conv = nn.Conv2d(6, 8, (3, 2), padding=padding, padding_mode=mode, groups=2)
    layer = BinaryConv2d.from_conv2d(conv)
    x = torch.randn(2, 6, 7, 8)
    with torch.no_grad():
        conv.weight.copy_(binarised(conv.weight))
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight, conv.weight.detach())


@pytest.mark.parametrize("levels", [2, 3, 16, 17])
def test_state_dict_into_a_fresh_module(levels: int) -> None:
    first = BinaryLinear(40, 50, levels=levels, scale="tensor")
    first.set_weights(
        torch.randint(0, 256, first.bits.shape, dtype=torch.uint8), torch.tensor([0.3]), torch.randn(50)
    )
    assert set(first.state_dict()) == {"bits", "scale", "bias"}
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = BinaryLinear(40, 50, levels=levels)  # one scale per channel, until the state_dict says otherwise
    x = torch.randn(3, 40)
    assert not torch.equal(second(x), first(x))
    second.load_state_dict(torch.load(file))
    assert torch.equal(second(x), first(x))


@pytest.mark.parametrize("make", [lambda: BinaryLinear(40, 50), lambda: BinaryConv2d(8, 50, (1, 5))])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": None}, 'Missing key.*"bits"'),
        ({"scale": None, "bias": None}, 'Missing key.*"scale", "bias"'),
        ({"bits": torch.zeros(50, 4, dtype=torch.uint8)}, "size mismatch for bits"),
        ({"bits": torch.zeros(1, 50, 5, dtype=torch.uint8)}, "size mismatch for bits"),
        ({"scale": torch.ones(49)}, "size mismatch for scale"),
        ({"scale": torch.ones(50, 2)}, "size mismatch for scale"),
        ({"bias": torch.ones(1)}, "size mismatch for bias"),
        ({"bits": torch.ones(50, 5)}, "bits must be torch.uint8, not torch.float32"),
        ({"scale": torch.ones(50, dtype=torch.int64)}, "scale must be floating, not torch.int64"),
    ],
)
def test_a_state_dict_that_does_not_fit(
    make: Callable[[], nn.Module], change: dict[str, torch.Tensor | None], message: str
) -> None:
    layer = make()
    layer.scale.uniform_()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other = {name: torch.ones_like(tensor) for name, tensor in layer.state_dict().items()}
    state = {**(layer.state_dict() if None in change.values() else other), **change}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_activation_of_a_module() -> None:
    plain = BinaryLinear.from_linear(nn.Linear(20, 30))
    layer = BinaryLinear(20, 30, activation="silu")
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(3, 20)
    torch.testing.assert_close(layer(x), nn.functional.silu(plain(x)))
    conv = BinaryConv2d.from_conv2d(nn.Conv2d(3, 5, 3))
    other = BinaryConv2d(3, 5, 3, activation="gelu")
    other.load_state_dict(conv.state_dict())
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(other(x), nn.functional.gelu(conv(x)))


@pytest.mark.parametrize("make", [lambda: BinaryLinear(64, 32), lambda: BinaryConv2d(32, 32, (1, 2))])
def test_other_bits_are_seen(make: Callable[[], BinaryLinear | BinaryConv2d]) -> None:
    """Written in place, by functional_call, by assignment; in a compiled and an exported module too."""
    torch.compiler.reset()
    layer = make().eval()
    x = torch.rand(1, 64) if isinstance(layer, BinaryLinear) else torch.rand(1, 32, 1, 2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(layer, (x,)).module()
    minus = layer(x)
    assert torch.equal(compiled(x), minus) and torch.equal(exported(x), minus)
    plus = torch.full_like(layer.bits, 255)
    torch.testing.assert_close(torch.func.functional_call(layer, {"bits": plus}, (x,)), -minus)
    exported.load_state_dict({**exported.state_dict(), "bits": plus})
    torch.testing.assert_close(exported(x), -minus)
    layer.bits.fill_(255)
    for run in (layer, compiled):
        torch.testing.assert_close(run(x), -minus)
    layer.bits = torch.zeros_like(plus)
    for run in (layer, compiled, layer.prepare()):
        torch.testing.assert_close(run(x), minus)
    with torch.inference_mode():
        layer.bits = plus.clone()
        torch.testing.assert_close(layer(x), -minus)
        layer.prepare().bits.zero_()
        torch.testing.assert_close(layer(x), minus)


@needs_extension
@pytest.mark.parametrize(
    "make",
    [
        lambda: BinaryLinear.from_linear(nn.Linear(70, 40), compute="int8"),
        lambda: BinaryConv2d.from_conv2d(nn.Conv2d(16, 32, 3)),
    ],
)
def test_the_derived_layout_is_used_and_its_changes_are_seen(
    make: Callable[[], BinaryLinear | BinaryConv2d],
) -> None:
    if torch.ops.quantopt.cpu_isa() == "portable":
        pytest.skip("linear products run on the bits")
    layer = make()
    x = torch.randn(2, 70) if isinstance(layer, BinaryLinear) else torch.randn(2, 16, 5, 5)
    expected = layer(x)
    assert layer.tiles is not None
    layer.tiles.data.bitwise_not_()  # not counted: whatever reads the layout gives something else
    assert not torch.allclose(layer(x), expected)
    layer.prepare()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert layer.tiles is not None
    layer.tiles.bitwise_not_()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_a_layer_made_in_inference_mode_lets_gradients_pass() -> None:
    with torch.inference_mode():
        layers = [
            BinaryLinear.from_linear(nn.Linear(40, 33)),
            BinaryConv2d.from_conv2d(nn.Conv2d(16, 33, 3, padding=1)),
        ]
        assert not any(b.is_inference() for layer in layers for b in layer.buffers())
    for layer, shape in zip(layers, ((3, 40), (2, 16, 5, 5)), strict=True):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        weight = layer.weight if isinstance(layer, BinaryLinear) else layer.weight.sum((0, 2, 3))
        if isinstance(layer, BinaryLinear):
            torch.testing.assert_close(x.grad[0], weight.sum(0), rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(x.grad[0, :, 2, 2], weight, rtol=1e-4, atol=1e-4)


@needs_extension
def test_packed_under_another_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    force_isa(monkeypatch, "portable")
    layer = BinaryConv2d.from_conv2d(nn.Conv2d(16, 32, 3))
    x = torch.randn(1, 16, 5, 5)
    slow = layer(x)
    assert layer.tiles is not None
    force_isa(monkeypatch, "")
    torch.testing.assert_close(layer(x), slow, rtol=1e-5, atol=1e-5)


def test_a_channel_too_many_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"x must be \[B, 6, H, W\]"):
        BinaryConv2d(6, 4, 1)(torch.randn(1, 7, 2, 2))  # 6 and 7 bits fill a byte both


def test_moving_to_a_16_bit_type_keeps_the_scale() -> None:
    linear = nn.Linear(64, 32)
    layer = BinaryLinear.from_linear(linear)
    scale, bias = layer.scale.clone(), linear.bias.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.bits.dtype == torch.uint8
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, scale)
    assert layer.bias is not None and torch.equal(layer.bias, bias)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_copies_are_independent() -> None:
    layer = BinaryLinear.from_linear(nn.Linear(20, 40))
    x = torch.randn(2, 20)
    y = layer(x)
    other = copy.deepcopy(layer)
    other.bits.zero_()
    other.prepare()
    assert torch.equal(layer(x), y) and not torch.equal(other(x), y)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)


def test_meta_device_then_real() -> None:
    layer = BinaryLinear(20, 40, device="meta")
    assert layer.bits.is_meta
    source = BinaryLinear.from_linear(nn.Linear(20, 40))
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 20)
    assert torch.equal(layer(x), source(x))


def test_repr() -> None:
    text = repr(BinaryLinear(8, 4, levels=4, scale="group", group_size=32, compute="int8"))
    assert "activation" not in text
    assert "compute=auto, activation=gelu" in repr(BinaryLinear(8, 4, activation="gelu"))
    assert "compute=auto, activation=relu" in repr(BinaryConv2d(3, 4, 3, activation="relu"))
    assert (
        "in_features=8, out_features=4, bias=True, levels=4, scale=group, group_size=32, compute=int8" in text
    )
    assert "kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)" in repr(BinaryConv2d(3, 4, 3, 2, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compute": "fp8"}, "compute must be"),
        ({"activation": "tanh"}, "activation must be"),
        ({"levels": 5}, "levels must be"),
        ({"scale": "row"}, "scale must be"),
        ({"scale": "group"}, "group_size must be positive"),
        ({"group_size": 32}, "group_size must be positive"),
    ],
)
def test_constructor_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryLinear(4, 4, **arguments)  # type: ignore[arg-type]


def test_wrong_input_is_an_error() -> None:
    layer, conv = BinaryLinear(40, 4), BinaryConv2d(3, 4, 3)
    for x in (torch.randn(2, 41), torch.randn(2, 41, dtype=torch.float64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="in_features=40"):
            layer(x)
    for dtype in (torch.int64, torch.uint8, torch.bool):
        with pytest.raises(TypeError, match=f"x must be a floating tensor, not {dtype}"):
            layer(torch.ones(2, 40, dtype=dtype))
        with pytest.raises(TypeError, match=f"x must be a floating tensor, not {dtype}"):
            conv(torch.ones(1, 3, 5, 5, dtype=dtype))


def test_weights_that_do_not_fit_change_nothing() -> None:
    bits, scale = torch.full((4, 5), 255, dtype=torch.uint8), torch.ones(4)
    for layer, bias in (
        (BinaryLinear(40, 4), torch.ones(5)),
        (BinaryLinear(40, 4, bias=False), torch.ones(4)),
    ):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(ValueError, match="bias must be"):
            layer.set_weights(bits, scale, bias)
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def small_network(compute: str) -> nn.Module:
    """Every way through the modules: folded activations, padding that is done before the product, 1x1, planes."""
    conv = BinaryConv2d.from_conv2d(nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), compute)
    conv.activation = "relu"
    grouped = BinaryConv2d(8, 8, 1, groups=2, levels=4, compute=compute)
    grouped.bits.random_(0, 16)
    linear = BinaryLinear.from_linear(nn.Linear(128, 40), compute)
    linear.activation = "gelu"
    return nn.Sequential(conv, grouped.prepare(), nn.Flatten(), linear, nn.BatchNorm1d(40)).eval()


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_and_export_with_any_batch(compute: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = small_network(compute).to(dtype)
    batches = [torch.randn(n, 3, 4, 4).to(dtype) for n in (2, 5, 1)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        dimension = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(
            model, (batches[0],), dynamic_shapes={"input": {0: dimension}}
        ).module()
        for x, y in zip(batches, expected, strict=True):
            assert torch.equal(compiled(x), y) and torch.equal(exported(x), y)
    x = batches[1].clone().requires_grad_()
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["bf16", "int8"])
def test_compile_with_inductor(compute: str) -> None:
    torch.compiler.reset()
    model = small_network(compute)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for n in (2, 5):
            x = torch.randn(n, 3, 4, 4)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    "make",
    [
        lambda c: BinaryLinear(20, 6, compute=c, activation="silu"),
        lambda c: BinaryConv2d(4, 6, 3, compute=c, activation="silu"),
    ],
)
def test_function_transforms(make: Callable[[str], BinaryLinear | BinaryConv2d], compute: str) -> None:
    """grad, jacrev, vmap and jvp are those of backward."""
    module = make(compute)
    module.bits.random_(0, 256)
    module.scale.uniform_(0.05, 0.1)
    module.prepare()
    shape = (20,) if isinstance(module, BinaryLinear) else (4, 5, 5)
    x, v = torch.randn(3, *shape), torch.randn(3, *shape)
    z = x.clone().requires_grad_()
    y = module(z)
    (expected,) = torch.autograd.grad(y.sum(), z, retain_graph=True)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).sum())(x), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda x: module(x).sum()))(x), expected)
    torch.testing.assert_close(torch.func.vmap(module)(x), module(x), rtol=1e-5, atol=1e-5)
    backward = torch.autograd.functional.jacobian(module, x[0])
    torch.testing.assert_close(torch.func.jacrev(module)(x[0]), backward)
    torch.testing.assert_close(torch.func.jacfwd(module)(x[0]), backward)
    outputs, tangents = torch.func.jvp(module, (x,), (v,))
    torch.testing.assert_close(outputs, module(x), rtol=1e-5, atol=1e-5)
    by_image = torch.tensordot(backward, v[0], len(shape))
    assert bool(by_image.abs().max() > 0.01)
    torch.testing.assert_close(tangents[0], by_image)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    "make", [lambda c: BinaryLinear(90, 6, compute=c), lambda c: BinaryConv2d(10, 6, 3, compute=c)]
)
def test_autocast_changes_nothing(make: Callable[[str], BinaryLinear | BinaryConv2d], compute: str) -> None:
    """Neither the kernels nor, with gradients of a convolution and for float64, the reference."""
    module = make(compute)
    module.bits.random_(0, 256)
    module.prepare()
    for dtype in (torch.float32, torch.float64):
        x = (
            torch.randn(2, 10, 4, 4, dtype=dtype)
            if isinstance(module, BinaryConv2d)
            else torch.randn(2, 90, dtype=dtype)
        )
        x.requires_grad_()
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = module(x)
                results.append((y, *torch.autograd.grad(y.sum(), x)))
        for without, cast in zip(*results, strict=True):
            assert cast.dtype == dtype
            torch.testing.assert_close(cast, without)


@pytest.mark.parametrize("make", [lambda: BinaryLinear(64, 64), lambda: BinaryConv2d(64, 64, 3)])
def test_fake_tensors(make: Callable[[], BinaryLinear | BinaryConv2d]) -> None:
    with FakeTensorMode():
        module = make()
        x = torch.randn(2, 64) if isinstance(module, BinaryLinear) else torch.randn(2, 64, 5, 5)
        assert module(x).shape[:2] == (2, 64)


def test_torch_jit_trace_records_the_operator() -> None:
    layer = BinaryLinear.from_linear(nn.Linear(70, 33), compute="int8")
    traced = torch.jit.trace(layer, torch.randn(4, 70))
    x = torch.randn(5, 70)
    assert torch.equal(traced(x), layer(x))
