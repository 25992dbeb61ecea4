"""Which layers pack takes, with an optimizer and without, and what it says of the others."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import quantopt
from quantopt.levels import Quantization
from quantopt.nn import BinaryConv1d, BinaryLinear
from quantopt.nn.linear import BinaryModule
from quantopt.packing import load, pack, save, table
from quantopt.reference.levels import COUNTS
from test_packing import Fake, Net, close, net, quantised_params, refuse  # type: ignore[import-not-found]
from test_selection import Conv1D  # type: ignore[import-not-found]

__all__ = ["net"]  # a fixture


class Mine(nn.Linear):
    """Keeps Linear's forward."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_other_kinds_of_layers_are_named_and_get_the_projected_values() -> None:
    model = nn.Sequential(
        Mine(8, 8), nn.ConvTranspose2d(2, 3, 3), nn.Linear(8, 8), Doubled(8, 8), Doubled(8, 8)
    )
    opt = Fake([model[0].weight, model[1].weight, model[3].weight])
    codes = torch.tensor([1, 0, 1], dtype=torch.uint8)
    opt.grids[model[1].bias] = Quantization(2, codes, torch.tensor([0.5]), 0)
    with pytest.warns(UserWarning) as caught:
        packed = pack(model, opt)
    message = str(caught[0].message)
    assert "1.weight: no packed layer takes the place of ConvTranspose2d" in message
    assert "3.weight: Doubled has a forward of its own" in message and "1.bias: not the weight" in message
    assert "4.weight" not in message and "0.weight" not in message
    kinds = [BinaryLinear, nn.ConvTranspose2d, nn.Linear, Doubled, Doubled]
    assert [type(m) for m in packed] == kinds
    x = torch.randn(3, 8)
    del opt.grids[model[1].bias]
    expected = opt.project(model)
    torch.testing.assert_close(packed[0](x), expected[0](x))
    assert packed[1].bias.tolist() == [0.5, -0.5, 0.5]
    for i in (1, 2, 3, 4):
        torch.testing.assert_close(packed[i].weight, expected[i].weight)
    with pytest.raises(ValueError, match=r"can be packed: 1\.weight: no packed layer"):
        pack(model, Fake([model[1].weight]))


def test_layers_that_cannot_be_packed() -> None:
    class Called(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    class Gated(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.gate = nn.Parameter(torch.ones(8))

    patched = nn.Linear(8, 8)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for layer, reason in (
        (Gated(), "more than weight and bias"),
        (patched, "forward of its own"),
        (Called(8, 8), "__call__ of its own"),
    ):
        with pytest.raises(ValueError, match=reason):
            pack(layer, Fake([layer.weight]))


def test_hooks_of_a_layer_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    model[0].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    )
    opt = Fake([model[0].weight])
    packed = pack(model, opt)
    x = torch.randn(3, 8)
    assert close(packed(x), opt.project(model)(x))
    save(packed, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", model)(x), packed(x))


@pytest.mark.parametrize("levels", [2, 3, 8, 17])
@pytest.mark.parametrize(("scale", "group_size"), [("tensor", 0), ("channel", 0), ("group", 16)])
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=1),
        dict(kernel_size=3, stride=2, padding=1, groups=2, bias=False),
        dict(kernel_size=5, dilation=2, padding="same", padding_mode="circular"),
    ],
)
def test_conv1d(tmp_path: Path, levels: int, scale: str, group_size: int, options: dict[str, Any]) -> None:
    layer = nn.Conv1d(18, 14, **options)
    opt = Fake([layer.weight], levels, scale, group_size)
    packed = pack(layer, opt)
    assert type(packed) is BinaryConv1d
    save(packed, tmp_path / "m")
    loaded = load(tmp_path / "m", nn.Conv1d(18, 14, **options))
    for x in (torch.randn(3, 18, 21), torch.randn(18, 21)):
        y = packed(x)
        assert y.shape == layer(x).shape and close(y, opt.project(layer)(x)) and torch.equal(loaded(x), y)
    assert torch.allclose(packed.weight, opt.project(layer).weight)
    with pytest.raises(ValueError, match=r"x must be \[B, 18, L\]"):
        packed(torch.randn(2, 18, 3, 3))
    refuse(tmp_path / "m", "a BinaryConv1d in the description, Conv2d in the model", nn.Conv2d(18, 14, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention(tmp_path: Path, dtype: torch.dtype, training: bool) -> None:
    """It reads weight and bias of out_proj itself, on its fast path and on the other."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).to(dtype).train(training)
    layer.self_attn.out_proj.bias.data.normal_()
    weights = [layer.self_attn.out_proj.weight, layer.linear1.weight]
    opt = Fake(weights, 8)
    packed, x = pack(layer, opt), torch.randn(2, 5, 16, dtype=dtype)
    assert isinstance(packed.self_attn.out_proj, BinaryLinear)
    expected, tolerance = opt.project(layer), 2e-2 if dtype == torch.bfloat16 else 1e-5
    save(packed, tmp_path / "m")
    for ours in (packed, load(tmp_path / "m", layer), copy.deepcopy(packed).float().to(dtype)):
        attention, exact = ours.self_attn, expected.self_attn
        assert attention.out_proj.weight.dtype == attention.out_proj.bias.dtype == dtype
        for grad in (False, True):  # the fast path is that without gradients
            with torch.set_grad_enabled(grad):
                a, b = attention(x, x, x)[0].detach(), exact(x, x, x)[0].detach()
            assert a.dtype == dtype and float((a - b).norm() / b.norm()) < tolerance
    with torch.no_grad():  # the fast path of the layer around it reads linear1.weight too
        if dtype == torch.float32:
            assert close(packed(x), expected(x))
    assert packed.bfloat16().self_attn.out_proj.scale.dtype == torch.float32


@pytest.mark.parametrize("levels", [2, 3, 16, 17])
def test_a_transposed_layer(tmp_path: Path, levels: int) -> None:
    """The Conv1D of the transformers library: packed where it has one scale."""
    model = nn.Sequential(Conv1D(20, 12), nn.Linear(20, 20))
    opt = Fake([model[0].weight], levels, "tensor")
    packed = pack(model, opt)
    assert isinstance(packed[0], BinaryLinear)
    x = torch.randn(3, 12)
    expected = opt.project(model)
    assert close(packed(x), expected(x)) and close(pack(expected)(x), expected(x))
    save(packed, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", model)(x), packed(x))
    with pytest.raises(ValueError, match=r"a scale for each input .*conv1d_to_linear"):
        pack(model, Fake([model[0].weight], levels, "channel"))


@pytest.mark.parametrize("levels", COUNTS)
@pytest.mark.parametrize(("scale", "group_size"), [("tensor", 0), ("channel", 0), ("group", 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_optimizer(net: Net, levels: int, scale: str, group_size: int, dtype: torch.dtype) -> None:
    """A model of projected weights, read: the same bits, levels and scales."""
    torch.manual_seed(levels)
    net.to(dtype)
    opt = Fake(quantised_params(net), levels, scale, group_size)
    expected, packed = pack(net, opt), pack(opt.project(net))
    for a, b in zip(expected.modules(), packed.modules(), strict=True):
        if isinstance(a, BinaryModule):
            assert isinstance(b, BinaryModule) and a.levels == b.levels
            tolerance = 1e-6 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(b.weight, a.weight, rtol=tolerance, atol=0)
            if scale != "group" and a.row_length > 16:
                assert torch.equal(a.bits, b.bits)
    assert type(packed.stem) is nn.Conv2d and type(packed.head) is nn.Linear


def test_nothing_to_pack(net: Net) -> None:
    with pytest.raises(
        ValueError, match=r"no weight of the model lies on .*pack\(model, opt\).*quantized\(\)"
    ):
        pack(net)
    opt = quantopt.AskewSGD(quantopt.param_groups(net, other={"lr": 0.1}))
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for copied in (averaged, copy.deepcopy(net)):
        with pytest.raises(
            ValueError, match=r"holds none of the parameters of the model.*pack\(model\) without opt"
        ):
            pack(copied, opt)
    with opt.quantized():
        packed = pack(copy.deepcopy(net))  # as the message says
    assert sum(isinstance(m, BinaryModule) for m in packed.modules()) == 3
    averaged.module.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="all its groups have bits=0"):
        pack(net, quantopt.AskewSGD(net.parameters(), bits=0))
    with pytest.raises(ValueError, match="quantises no parameter of the model"):
        pack(net.head, opt)


def test_an_optimizer_in_wrappers_of_frameworks(net: Net) -> None:
    class AcceleratedOptimizer:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    opt = quantopt.AskewSGD(quantopt.param_groups(net))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pack(net, AcceleratedOptimizer(opt))(x), pack(net, opt)(x))  # type: ignore[arg-type]
    rank = type("ZeroRedundancyOptimizer", (), {"quantization": opt.quantization})()
    with pytest.raises(TypeError, match="one rank only"):
        pack(net, rank)


def test_the_table_of_a_packed_model(net: Net) -> None:
    packed = pack(net, Fake(quantised_params(net)[1:], 3, "group", 32))
    rows = {row.name: row for row in table(packed)}
    assert rows["body.3"][1:] == ("BinaryConv2d", (33, 16, 1, 1), "ternary", "group of 32", "")
    assert rows["inner.fc"].shape == (70, 297) and rows["stem.weight"].left_out == "not quantised"
    assert rows["body.1.weight"].left_out == rows["head.bias"].left_out == "1-d"
    assert len(rows) == 2 + len(list(packed.parameters()))
    other = table(nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.Embedding(3, 3), Doubled(2, 2)))
    assert [row.left_out for row in other] == [
        "not the weight of a linear or convolution layer",
        "1-d",
        "embedding",
        "Doubled has a forward of its own",
        "1-d",
    ]


@pytest.mark.parametrize("shape", [(8, 8), (20, 12)])
def test_a_weight_tied_between_a_linear_and_a_transposed_layer(shape: tuple[int, int]) -> None:
    """The bits of one are those of the other's transpose."""
    outputs, inputs = shape
    for tied in (
        nn.Sequential(nn.Linear(inputs, outputs), Conv1D(inputs, outputs)),
        nn.Sequential(Conv1D(outputs, inputs), nn.Linear(outputs, inputs)),
    ):
        tied[1].weight = tied[0].weight
        opt, x = Fake([tied[0].weight], 4, "tensor"), torch.randn(3, inputs)
        expected = opt.project(tied)
        for packed in (pack(tied, opt), pack(expected)):
            assert [type(layer) for layer in packed] == [BinaryLinear, BinaryLinear]
            assert close(packed(x), expected(x))


@pytest.mark.parametrize("read", [False, True])
def test_a_tied_weight_with_a_scale_for_each_row_of_one_layer(read: bool) -> None:
    model = nn.Sequential(nn.Linear(12, 20), Conv1D(12, 20))
    model[1].weight = model[0].weight
    opt, x = Fake([model[0].weight], 2, "channel"), torch.randn(3, 12)
    expected = opt.project(model)
    with pytest.warns(UserWarning, match=r"1\.weight: a Conv1D with a scale for each input"):
        packed = pack(expected) if read else pack(model, opt)
    assert [type(layer) for layer in packed] == [BinaryLinear, Conv1D] and close(packed(x), expected(x))


def test_weights_that_may_lie_on_levels_are_named() -> None:
    """Without the optimizer: too few weights for each scale, zeros, one sign."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 2, groups=16), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 3)
    )
    opt = Fake([layer.weight for layer in model[:3]])
    projected = opt.project(model)
    with pytest.warns(
        UserWarning, match=r"0\.weight, 1\.weight: .*fewer than 8 .*pack\(model, opt\)"
    ) as caught:
        packed = pack(projected)
    assert len(caught) == 1 and "3.weight" not in str(caught[0].message)
    assert [isinstance(layer, BinaryModule) for layer in packed] == [False, False, True, False]
    assert all(isinstance(layer, BinaryModule) for layer in pack(model, opt)[:3])  # as the warning says
    for weight, doubt in (
        (projected[0].weight, "fewer than 8"),
        (torch.zeros(16, 4, 1, 1), "are zero"),
        (torch.ones(16, 4, 1, 1), "one sign"),
    ):
        alone = nn.Conv2d(4, 16, 1)
        alone.weight = nn.Parameter(weight)
        with pytest.raises(ValueError, match=rf"weight: .*{doubt}") as refused:
            pack(alone)
        assert "pack(model, opt)" in str(refused.value) and "quantized()" not in str(refused.value)


def test_a_copy_in_part_is_refused() -> None:
    def make() -> tuple[Any, Any]:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16)) for _ in range(3)))
        return model, quantopt.AskewSGD(quantopt.param_groups(model, skip=("2.*",)))

    model, opt = make()
    part = copy.deepcopy(model)
    part[0] = model[0]
    with pytest.raises(
        ValueError, match=r"not have \(1\.0\.weight\).*group of opt \(1\.0\.weight, 2\.0\.weight\)"
    ):
        pack(part, opt)
    model[1][0].weight = nn.Parameter(model[1][0].weight.detach().clone())
    with pytest.raises(ValueError, match=r"\(1\.0\.weight\).*group of opt \(1\.0\.weight\)"):
        pack(model, opt)
    model, opt = make()
    assert isinstance(pack(model[:1], opt)[0][0], BinaryLinear)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    model[0][0].requires_grad_(False)
    opt = quantopt.AskewSGD(quantopt.param_groups(model, skip=()))
    assert isinstance(pack(model[0], opt)[1], BinaryLinear)  # a part with a frozen layer
    model.append(nn.Linear(8, 8))
    assert type(pack(model, opt)[2]) is nn.Linear  # a new layer, with all that opt quantises


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_hooks_compute_are_refused_with_the_way_out() -> None:
    normed, pruned, spectral = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3))
    nn.utils.weight_norm(normed[1])
    prune.l1_unstructured(pruned[1], "weight", 0.5)
    nn.utils.spectral_norm(spectral[1])
    for model, way, remove in (
        (normed, "remove_weight_norm", lambda layer: nn.utils.remove_weight_norm(layer)),
        (pruned, "prune.remove", lambda layer: prune.remove(layer, "weight")),
        (spectral, "remove_spectral_norm", lambda layer: nn.utils.remove_spectral_norm(layer)),
    ):
        model(torch.randn(2, 8))
        opt = Fake([model[0].weight])
        with pytest.raises(ValueError, match=rf"1\.weight is computed .*{way}\(layer, 'weight'\)"):
            pack(model, opt)
        remove(model[1])
        assert isinstance(pack(model, opt)[0], BinaryLinear)
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].last = model(torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"0\.last is computed .*detach or delete"):
        pack(model, Fake([model[0].weight]))
