"""Batch norm and activations folded into packed layers: what is folded, what is not, and equal outputs."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.packing import load, pack, save
from quantopt.packing.folding import NORMS, Folded
from quantopt.train import models
from test_packing import Fake, change_layer, metadata, refuse, rewrite  # type: ignore[import-not-found]


def fill(model: nn.Module) -> nn.Module:
    """Batch norms as after training, a third of the factors negative and one zero; in evaluation."""
    for m in model.modules():
        if isinstance(m, NORMS):
            if m.running_mean is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
            if m.affine:
                m.weight.data.uniform_(-1, 2)
                m.weight.data[0] = 0
                m.bias.data.normal_()
    return model.eval()


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]


def packs(
    model: nn.Module, levels: int = 2, scale: str = "channel", group_size: int = 0, compute: str = "exact"
) -> tuple[nn.Module, nn.Module]:
    """The same packed model without and with folding."""
    opt = Fake(weights(model), levels, scale, group_size)
    return pack(model, opt, compute=compute), pack(model, opt, compute=compute, fold_batchnorm=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() < tolerance * b.norm())


def folded(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, Folded)]


@pytest.mark.parametrize("levels", [2, 3, 16, 17])
@pytest.mark.parametrize(("scale", "group_size"), [("tensor", 0), ("channel", 0), ("group", 32)])
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_outputs_are_the_same(tmp_path: Path, levels: int, scale: str, group_size: int, compute: str) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(5, 12, 3, padding=2, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3, padding=1, groups=4, padding_mode="reflect"),
            nn.BatchNorm2d(8, affine=False),
            nn.Flatten(),
            nn.Linear(8 * 49, 33),
            nn.BatchNorm1d(33),
            nn.GELU(),
            nn.Linear(33, 20),
            nn.SiLU(),
        )

    model = fill(build())
    before = copy.deepcopy(model.state_dict())
    plain, fused = packs(model, levels, scale, group_size, compute)
    x = torch.randn(3, 5, 5, 5)
    assert close(fused(x), plain(x)) and not close(fused(x), 0.99 * plain(x), 1e-3)
    assert folded(fused) == ["1", "2", "4", "7", "8", "10"] and not folded(plain)
    assert [m.activation for m in fused if isinstance(m, BinaryConv2d | BinaryLinear)] == [
        "relu",
        "none",
        "gelu",
        "silu",
    ]
    assert all(bool((m.scale >= 0).all()) for m in fused if isinstance(m, BinaryConv2d | BinaryLinear))
    assert bool((plain[0].bits != fused[0].bits).any()) and "Folded(BatchNorm2d)" in repr(fused)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    save(fused, tmp_path / "m")
    loaded = load(tmp_path / "m", build()).eval()
    assert torch.equal(loaded(x), fused(x)) and folded(loaded) == folded(fused)
    assert loaded.state_dict().keys() == fused.state_dict().keys()


@pytest.mark.parametrize(("name", "norms"), [("mlp", 3), ("cnn", 3), ("vgg11", 8), ("resnet18", 20)])
def test_the_networks_of_the_package(name: str, norms: int) -> None:
    model = fill(models.build(name, (3, 32, 32), 10, [120.0] * 3, [60.0] * 3))
    if name == "resnet18":  # sums of residuals grow; keep them where fp32 is accurate
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data /= 4
    plain, fused = packs(model)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert close(fused(images), plain(images), 1e-4)
    assert not any(isinstance(m, NORMS) for m in fused.modules())
    assert sum(m.kind.startswith("BatchNorm") for m in fused.modules() if isinstance(m, Folded)) == norms
    if name == "resnet18":  # the ReLU after an addition is a function there; that after bn1 is folded
        activations = {n: m.activation for n, m in fused.named_modules() if isinstance(m, BinaryConv2d)}
        assert all((a == "relu") == n.endswith(("conv1", "1")) for n, a in activations.items() if "." in n)


class Branches(nn.Module):
    """Everything that must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)
        self.after_sum = nn.Linear(8, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norms = nn.ModuleList([nn.BatchNorm1d(8) for _ in range(4)])
        self.relu = nn.ReLU()
        self.shared_relu = nn.ReLU()
        self.batch = nn.Linear(8, 8)
        self.batch_norm = nn.BatchNorm1d(8, track_running_stats=False)
        self.tanh = nn.Linear(8, 8)
        self.gelu = nn.GELU("tanh")
        self.tokens = nn.Linear(8, 8)
        self.token_norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(x)
        x = self.norms[0](y) + y  # the layer's output is used again
        x = self.norms[1](self.read(x)) + nn.functional.linear(x, self.read.weight)
        x = self.relu(self.after_sum(x) + x)
        x = self.norms[2](self.a(x)) + self.norms[2](self.b(x))  # one norm of two layers
        x = self.shared_relu(self.a(x)) - self.shared_relu(x)
        x = self.batch_norm(self.batch(x))
        x = self.gelu(self.tanh(x))
        return self.token_norm(self.tokens(x.expand(2, 5, -1, 8).mean(2)))


def test_what_is_not_folded() -> None:
    model = fill(Branches())
    plain, fused = packs(model)
    x = torch.randn(5, 8)
    assert folded(fused) == [] and torch.equal(fused(x), plain(x))


def test_a_block_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    plain, fused = packs(fill(Twice()))
    x = torch.randn(5, 8)
    assert close(fused(x), plain(x)) and len(folded(fused)) == 2


def test_layers_that_share_weights_fold_each_its_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[2].weight = model[0].weight
    plain, fused = packs(fill(model))
    x = torch.randn(5, 8)
    assert close(fused(x), plain(x)) and folded(fused) == ["1", "3"]


class Untraceable(nn.Module):
    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = members[0] if len(members) == 1 else nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        if isinstance(self.members, nn.Sequential):
            return self.members(x)
        for m in self.members:
            x = m(x)
        return x


def test_nothing_is_folded_where_tracing_fails() -> None:
    """Members of a Sequential may be called alone by code that cannot be followed."""

    class Alone(Untraceable):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.members[0](x)

    model = fill(Alone(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())))
    with pytest.warns(UserWarning, match=r"folded nothing: torch.fx cannot trace the model \("):
        plain, fused = packs(model)
    x = torch.randn(5, 8)
    assert folded(fused) == [] and torch.equal(fused(x), plain(x))


class Optional(nn.Module):
    """One norm that is called with an optional argument alone, one that always is; forward leaves traces behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.second, self.always = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last: Tensor | None = None
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, norm: bool | None = None, skip: Tensor | None = None) -> Tensor:
        self.calls.add_(1)
        self.last = x = self.first(x)
        if norm is not None:
            x = self.norm(x)
        x = self.always(self.second(x))
        return x if skip is None else x + skip


def test_what_follows_with_every_choice_of_arguments_is_folded() -> None:
    model = fill(Optional())
    plain, fused = packs(model)
    assert folded(fused) == ["always"] and model.last is None and model.calls == 0
    x = torch.randn(5, 8)
    for arguments in ((), (True,), (None, x), (True, x)):
        assert close(fused(x, *arguments), plain(x, *arguments))


def test_too_many_optional_arguments() -> None:
    class Five(nn.Sequential):
        def forward(self, x, a=None, b=None, c=None, d=None, e=None):  # type: ignore[no-untyped-def]
            return super().forward(x)

    with pytest.warns(UserWarning, match="more than 4 arguments of its forward are optional: a, b, c, d, e"):
        fused = packs(fill(Five(nn.Linear(8, 8), nn.BatchNorm1d(8))))[1]
    assert folded(fused) == []


def test_a_norm_of_another_dimension() -> None:
    """Of [B, L, C] BatchNorm1d takes L for channels, also where L = C: an error, not another result."""
    plain, fused = packs(fill(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))
    plain(torch.randn(2, 8, 8))
    with pytest.raises(ValueError, match=r"folded into a Linear takes \[batch, features\], not \[2, 8, 8\]"):
        fused(torch.randn(2, 8, 8))
    assert folded(packs(fill(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm2d(8))))[1]) == []


def test_folded_modules_keep_the_arguments_of_what_they_replace() -> None:
    fused = packs(fill(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, eps=1e-3), nn.ReLU(inplace=True))))[1]
    assert (fused[1].num_features, fused[1].eps, fused[2].inplace, fused[1].training) == (
        8,
        1e-3,
        True,
        False,
    )


@pytest.mark.parametrize(("name", "value"), [("running_var", torch.nan), ("weight", torch.inf)])
def test_a_norm_that_is_not_finite_is_refused(name: str, value: float) -> None:
    model = fill(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    getattr(model[1], name).data[3] = value
    with pytest.raises(ValueError, match="the batch norm 1 gives a scale that is not finite"):
        packs(model)


def test_a_model_in_training_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    opt = Fake(weights(model))
    with pytest.raises(ValueError, match=r"the model is in training: call model.eval\(\)"):
        pack(model, opt, fold_batchnorm=True)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.ReLU()
    )  # with no norm: forward may depend on the mode all the same
    with pytest.raises(ValueError, match=r"the model is in training: call model.eval\(\)"):
        pack(model, Fake(weights(model)), fold_batchnorm=True)
    with pytest.raises(TypeError, match="fold_batchnorm must be True or False"):
        pack(model, opt, fold_batchnorm="yes")  # type: ignore[arg-type]


def test_nothing_is_folded_into_layers_that_stay_float() -> None:
    model = fill(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)))
    fused = pack(model, Fake([model[2].weight]), fold_batchnorm=True)
    assert folded(fused) == ["3"] and type(fused[0]) is nn.Linear


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata(folded="[]"), '"folded" is not an object'),
        (metadata(folded='{"9": "ReLU"}'), "folded 9: the model has no such module"),
        (
            metadata(folded='{"2": "BatchNorm1d"}'),
            "folded 2: 'BatchNorm1d' in the description, ReLU in the model",
        ),
        (metadata(folded='{"0": "Linear"}'), "folded 0: 'Linear' in the description, Linear in the model"),
        (metadata(folded='{"1": ["ReLU"]}'), "folded 1:"),
        (metadata(folded='{"2": "ReLU"}'), "tensor 1.bias is missing"),
        (change_layer("0", bias=1), "layer 0: bias=1 is not true or false"),
        (change_layer("0", bias=False), "tensor 0.bias is not the model's"),
    ],
)
def test_hostile_headers(tmp_path: Path, change: object, message: str) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())

    save(packs(fill(build()))[1], tmp_path / "m")
    rewrite(tmp_path / "m", change)
    refuse(tmp_path / "m", message, build())


def test_folded_modules_survive_pickling() -> None:
    fused = packs(fill(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))[1]
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert repr(torch.load(file, weights_only=False)) == repr(fused)


def test_modules_with_hooks_are_kept() -> None:
    model = fill(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    model[1].register_forward_hook(lambda module, inputs, y: 2 * y - 1)
    plain, fused = packs(model)
    x = torch.randn(2, 3, 6, 6)
    assert folded(fused) == [] and close(fused(x), plain(x))
