"""pack, save and load: equal outputs, sizes, shared weights, and files that are damaged or hostile."""

import copy
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantopt.levels import Quantization
from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.nn.linear import BinaryModule
from quantopt.packing import PackedFileError, load, pack, save
from quantopt.reference.levels import COUNTS


class Fake:
    """Quantises the given parameters to random codes, as an optimizer would."""

    def __init__(
        self, params: list[nn.Parameter], levels: int = 2, scale: str = "channel", group_size: int = 0
    ) -> None:
        self.grids: dict[nn.Parameter, Quantization] = {}
        for p in params:
            shape = {
                "tensor": [1],
                "channel": [p.shape[0]],
                "group": [p.shape[0], -(-p[0].numel() // (group_size or 1))],
            }
            self.grids[p] = Quantization(
                levels,
                torch.randint(0, levels, p.shape, dtype=torch.uint8),
                torch.rand(shape[scale]) + 0.1,
                group_size,
            )

    def quantization(self, p: nn.Parameter) -> Quantization | None:
        return self.grids.get(p)

    def project(self, model: nn.Module) -> nn.Module:
        """A copy with level = outer (2 code / (K-1) - 1), written out element by element."""
        result = copy.deepcopy(model)
        for old, new in zip(model.parameters(), result.parameters(), strict=True):
            if (q := self.quantization(old)) is not None:
                codes, outer = q.codes.flatten(1).double(), q.max_level.double()
                if q.group_size:
                    outer = torch.stack([outer[:, k // q.group_size] for k in range(codes.shape[1])], 1)
                elif outer.numel() > 1:
                    outer = outer[:, None]
                new.data = (outer * (2 * codes / (q.levels - 1) - 1)).view(new.shape).to(new.dtype)
        return result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 33, 1),
            nn.Flatten(),
        )
        self.inner = nn.ModuleDict({"fc": nn.Linear(33 * 9, 70)})
        self.head = nn.Linear(70, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner["fc"](self.body(self.stem(x))).relu())


def quantised_params(net: Net) -> list[nn.Parameter]:
    return [net.body[0].weight, net.body[3].weight, net.inner["fc"].weight]


@pytest.fixture
def net() -> Net:
    net = Net()
    net(torch.randn(8, 3, 8, 8))  # batch-norm statistics that are not the defaults
    return net.eval()


@pytest.fixture
def saved(net: Net, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(pack(net, Fake(quantised_params(net))), path)
    return path


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 1e-4 * b.norm())


@pytest.mark.parametrize("levels", COUNTS)
@pytest.mark.parametrize(("scale", "group_size"), [("tensor", 0), ("channel", 0), ("group", 32)])
def test_outputs_are_those_of_the_projected_network(
    net: Net, tmp_path: Path, levels: int, scale: str, group_size: int
) -> None:
    before = copy.deepcopy(net.state_dict())
    opt = Fake(quantised_params(net), levels, scale, group_size)
    packed = pack(net, opt)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = opt.project(net)(x)
        assert close(packed(x), expected) and not close(net(x), expected)
    kinds = [type(m) for m in packed.modules() if isinstance(m, BinaryLinear | BinaryConv2d)]
    assert kinds == [BinaryConv2d, BinaryConv2d, BinaryLinear]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())

    save(packed, tmp_path / "m.safetensors")
    fresh = Net()
    loaded = load(tmp_path / "m.safetensors", fresh)
    assert loaded.training and fresh.training
    assert not load(tmp_path / "m.safetensors", Net().eval()).training
    assert torch.equal(loaded.eval()(x), packed(x))
    assert loaded.state_dict().keys() == packed.state_dict().keys()


def test_activation_is_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.Conv2d(1, 1, 1))
    packed = pack(model, Fake([model[0].weight]))
    packed[0].activation = "silu"
    save(packed, tmp_path / "m")
    loaded = load(tmp_path / "m", model)
    x = torch.randn(3, 9)
    assert loaded[0].activation == "silu" and torch.equal(loaded[0](x), packed[0](x))


@pytest.mark.parametrize(("compute", "error"), [("int8", 0.05), ("bf16", 0.01)])
def test_compute_is_kept_and_close(net: Net, tmp_path: Path, compute: str, error: float) -> None:
    packed = pack(net, Fake(quantised_params(net)), compute=compute)
    exact = pack(net, Fake(quantised_params(net)))
    save(packed, tmp_path / "m")
    loaded = load(tmp_path / "m", Net())
    assert {m.compute for m in loaded.modules() if isinstance(m, BinaryLinear | BinaryConv2d)} == {compute}
    exact.load_state_dict(packed.state_dict())
    x = torch.randn(4, 3, 8, 8)
    a, b = loaded.eval()(x), exact(x)
    assert not torch.equal(a, b) and bool((a - b).norm() < error * b.norm())


def test_quantised_layers_are_28_times_smaller(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Conv2d(128, 256, 3, bias=False))
    packed = pack(model, Fake(list(model.parameters())))
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    after = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert before / after >= 28
    save(packed, tmp_path / "m")
    assert before / (tmp_path / "m").stat().st_size >= 28


def test_shared_weights_and_layers(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(24, 50, bias=False)
            self.embedding = nn.Embedding(50, 24)
            self.embedding.weight = self.head.weight
            self.a = nn.Linear(24, 24)
            self.b = nn.Linear(24, 24)
            self.b.weight = self.a.weight
            self.again = self.a
            self.listed = [self.a]

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.listed[0](self.again(self.b(self.a(self.embedding(i))))))

    model = Tied()
    opt = Fake([model.head.weight, model.a.weight])
    with pytest.warns(UserWarning, match="embedding.weight: no packed layer"):
        packed = pack(model, opt)
    i = torch.arange(50)
    assert close(packed(i), opt.project(model)(i))
    assert packed.again is packed.a is packed.listed[0] and packed.b is not packed.a
    assert packed.a.bits.data_ptr() == packed.b.bits.data_ptr()
    assert isinstance(packed.head, BinaryLinear) and isinstance(packed.embedding.weight, nn.Parameter)
    save(packed, tmp_path / "m")
    loaded = load(tmp_path / "m", Tied())
    assert torch.equal(loaded(i), packed(i))
    assert loaded.again is loaded.a is loaded.listed[0] and isinstance(loaded.a, BinaryLinear)


def test_work_is_done_once(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pack asks once for each parameter, and pack and load derive the kernel layout of each layer once."""
    asked: list[nn.Parameter] = []
    derived: list[nn.Module] = []

    class Counting(Fake):
        def quantization(self, p: nn.Parameter) -> Quantization | None:
            asked.append(p)
            return super().quantization(p)

    prepare = BinaryModule.prepare

    def count(module: BinaryModule) -> BinaryModule:
        if not module.bits.is_meta:
            derived.append(module)
        return prepare(module)

    monkeypatch.setattr(BinaryModule, "prepare", count)
    save(pack(net, Counting(quantised_params(net))), tmp_path / "m")
    assert len(set(map(id, asked))) == len(asked) == len(list(net.parameters()))
    assert len(derived) == 3
    derived.clear()
    loaded = load(tmp_path / "m", Net())
    assert len(derived) == 3 == len([m for m in loaded.modules() if hasattr(m, "bits")])


def test_the_model_may_be_a_single_layer(tmp_path: Path) -> None:
    linear = nn.Linear(20, 30)
    packed = pack(linear, Fake([linear.weight]))
    assert isinstance(packed, BinaryLinear) and isinstance(linear, nn.Linear)
    save(packed, tmp_path / "m")
    x = torch.randn(2, 20)
    assert torch.equal(load(tmp_path / "m", nn.Linear(20, 30))(x), packed(x))


def test_a_transformer_layer_runs_packed() -> None:
    """Its fast path reads linear1.weight itself."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    opt = Fake([layer.linear1.weight, layer.linear2.weight])
    packed = pack(layer, opt)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert close(packed(x), opt.project(layer)(x))


def test_training_flag_and_device_follow(net: Net) -> None:
    net.train()
    net.body.eval()
    packed = pack(net, Fake(quantised_params(net)))
    assert packed.training and not packed.body[0].training and packed.inner["fc"].training


def test_pack_errors(net: Net) -> None:
    with pytest.raises(TypeError, match="model must be"):
        pack(net.parameters(), Fake([]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="opt must be an optimizer of quantopt, not SGD"):
        pack(net, torch.optim.SGD(net.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compute must be"):
        pack(net, Fake([]), compute="int4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"codes": torch.zeros(33, 16, 1, 2, dtype=torch.uint8)},
            r"codes torch.uint8 \[33, 16, 1, 2\] for a weight",
        ),
        ({"codes": torch.zeros(33, 16, 1, 1)}, "codes torch.float32"),
        ({"codes": torch.full((33, 16, 1, 1), 2, dtype=torch.uint8)}, "the code 2 of only 2 levels"),
        ({"levels": 5}, "levels must be"),
        ({"max_level": torch.ones(32)}, r"max_level \[32\] for codes \[33, 16, 1, 1\]"),
        ({"max_level": torch.ones(33, 2)}, r"max_level \[33, 2\]"),
        ({"group_size": 8}, r"max_level \[33\] for codes \[33, 16, 1, 1\] and group_size=8"),
        ({"max_level": torch.full((33,), torch.inf)}, "negative or not finite"),
        ({"max_level": -torch.ones(33)}, "negative or not finite"),
    ],
)
def test_a_quantization_that_does_not_fit(net: Net, change: dict[str, Any], message: str) -> None:
    opt = Fake(quantised_params(net))
    weight = net.body[3].weight
    opt.grids[weight] = replace(opt.grids[weight], **change)
    with pytest.raises(ValueError, match=message):
        pack(net, opt)


# ---- files -------------------------------------------------------------------------------------------------------


def test_save_is_atomic(net: Net, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space"):
                save(pack(net, Fake(quantised_params(net))), saved)
        assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_saved_file_has_the_usual_permissions(saved: Path) -> None:
    ordinary = saved.parent / "ordinary"
    ordinary.write_text("")
    assert saved.stat().st_mode == ordinary.stat().st_mode


def test_saving_a_model_that_is_not_packed(net: Net, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no packed layers"):
        save(net, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path: Path, net: Net) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", net)


def refuse(path: Path, message: str, model: nn.Module | None = None) -> None:
    """load fails with the file's name and the message, and the model is what it was."""
    model = Net() if model is None else model
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(PackedFileError, match=message) as caught:
        load(path, model)
    assert str(path) in str(caught.value)
    assert kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_truncated_at_every_kind_of_place(saved: Path) -> None:
    data = saved.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    for size in (0, 1, 7, 8, 9, header, header + 7, header + 8, header + 9, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:size])
        refuse(saved, "damaged or not a safetensors file")
    saved.write_bytes(data + b"\0")
    refuse(saved, "damaged or not a safetensors file")
    saved.write_bytes(struct.pack("<Q", 2**63) + data[8:])
    refuse(saved, "damaged or not a safetensors file")
    saved.write_bytes(b"PK\3\4" + data[4:])
    refuse(saved, "damaged or not a safetensors file")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the JSON header, without the checksums that would show it."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    for key in ("checksum", "checksums"):
        header["__metadata__"].pop(key)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def change_layer(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        layers = json.loads(header["__metadata__"]["layers"])
        layers[name].update(fields)
        header["__metadata__"]["layers"] = json.dumps(layers)

    return change


def metadata(**fields: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(fields)


def tensor(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update({new: header.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("__metadata__"), "not one that quantopt.save wrote"),
        (metadata(format="gguf"), "not one that quantopt.save wrote"),
        (metadata(version="2"), "its version is '2', this quantopt reads '1'"),
        (metadata(layers="{"), '"layers" is missing or not JSON'),
        (metadata(layers="[" * 100000), '"layers" is missing or not JSON'),
        (metadata(layers="[]"), '"layers" is not an object'),
        (metadata(layers="{}"), "no packed layers"),
        (metadata(layers='{"head": []}'), "layer head: not described"),
        (metadata(layers='{"head": {"type": []}}'), "layer head: not described"),
        (metadata(aliases="null"), '"aliases" is not an object'),
        (metadata(aliases='{"x": ["y"]}'), "alias x"),
        (metadata(aliases='{"x": "nowhere"}'), "alias x"),
        (metadata(aliases='{"head.bias": "stem.bias"}'), "alias head.bias"),
        (
            change_layer("inner.fc", in_features=64),
            "layer inner.fc: in_features is 64 in the description, 297 in the model",
        ),
        (change_layer("inner.fc", in_features="297"), "layer inner.fc: in_features is '297'"),
        (change_layer("inner.fc", type="BinaryConv2d"), "layer inner.fc: its description has the fields"),
        (change_layer("inner.fc", secret=1), "layer inner.fc: its description has the fields"),
        (change_layer("inner.fc", levels=5), "layer inner.fc: levels must be"),
        (change_layer("inner.fc", levels=10**30), "layer inner.fc: levels must be"),
        (change_layer("inner.fc", levels=True), "layer inner.fc: levels=True"),
        (change_layer("inner.fc", levels=16), r"tensor inner.fc.bits: U8 \[70, 38\] in the file"),
        (change_layer("inner.fc", group_size=-1, scale="group"), "layer inner.fc: levels=2, group_size=-1"),
        (
            change_layer("inner.fc", group_size=32, scale="group"),
            r"tensor inner.fc.scale: F32 \[70\] in the file",
        ),
        (change_layer("inner.fc", scale=["group"]), "layer inner.fc: scale must be"),
        (change_layer("inner.fc", scale="tensor"), "tensor inner.fc.scale"),
        (change_layer("inner.fc", compute="fp4"), "layer inner.fc: compute must be"),
        (change_layer("inner.fc", activation=["relu"]), "layer inner.fc: activation must be"),
        (
            change_layer("body.0", kernel_size=[5, 5]),
            r"layer body.0: kernel_size is \[5, 5\] in the description",
        ),
        (rename("head.bias", "head.bios"), "tensor head.bias is missing"),
        (rename("body.1.running_mean", "body.0.tiles"), "tensor body.1.running_mean is missing"),
        (tensor("body.1.running_mean", dtype="I32"), "tensor body.1.running_mean: I32"),
        (tensor("inner.fc.scale", dtype="I32"), "tensor inner.fc.scale: I32"),
        (tensor("head.weight", shape=[70, 10]), r"tensor head.weight: F32 \[70, 10\] in the file"),
        (tensor("head.weight", shape=[10, 71]), "damaged"),
        (tensor("head.weight", shape=[2**62, 8]), "damaged"),
        (tensor("head.weight", data_offsets=[0, 2**40]), "damaged"),
        (tensor("head.weight", data_offsets=[4, 0]), "damaged"),
        (tensor("head.weight", data_offsets=[0, 2800]), "damaged"),
        (tensor("head.weight", dtype="F12"), "damaged"),
    ],
)
def test_hostile_headers(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite(saved, change)
    refuse(saved, message)


def test_extra_tensor(net: Net, tmp_path: Path) -> None:
    packed = pack(net, Fake(quantised_params(net)))
    packed.register_buffer("backdoor", torch.zeros(3))
    save(packed, tmp_path / "m")
    refuse(tmp_path / "m", "tensor backdoor is not the model's")


def overwrite(path: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Sets one number of a tensor in the file."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    tensors[name][index] = value
    del metadata["checksum"], metadata["checksums"]  # which would show it
    save_file(tensors, str(path), metadata)


def test_spare_bits_and_scales_are_checked(saved: Path) -> None:
    original = saved.read_bytes()
    for name, index, value, message in [
        ("inner.fc.bits", (3, -1), 0x80, "the spare bits"),  # 297 weights: the last byte has one
        ("body.0.scale", (1,), torch.nan, "not finite"),
        ("body.0.scale", (1,), -0.5, "negative"),
    ]:
        saved.write_bytes(original)
        overwrite(saved, name, index, value)
        refuse(saved, f"tensor {name}: {message}")


@pytest.mark.parametrize(
    ("value", "fault"), [(torch.nan, "not finite"), (torch.inf, "not finite"), (-0.5, "negative")]
)
def test_save_refuses_what_load_would(net: Net, tmp_path: Path, value: float, fault: str) -> None:
    packed = pack(net, Fake(quantised_params(net)))
    packed.body[0].scale[1] = value
    with pytest.raises(ValueError, match=rf"tensor body\.0\.scale: {fault}, which load refuses"):
        save(packed, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_save_refuses_spare_bits(net: Net, tmp_path: Path) -> None:
    packed = pack(net, Fake(quantised_params(net)))
    packed.inner["fc"].bits[..., -1] |= 0x80
    with pytest.raises(ValueError, match=r"tensor inner\.fc\.bits: the spare bits"):
        save(packed, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_files_of_another_model(saved: Path, net: Net) -> None:
    other = Net()
    other.inner["fc"] = nn.Linear(33 * 9, 71)
    other.head = nn.Linear(71, 10)
    refuse(saved, "layer inner.fc: out_features is 70 in the description, 71 in the model", other)
    other = Net()
    other.body[0] = nn.Identity()
    refuse(saved, "layer body.0: a BinaryConv2d in the description, Identity in the model", other)
    refuse(saved, "layer body.0: the model has no such layer", nn.Linear(3, 3))
    refuse(saved, "the model is packed already", pack(net, Fake(quantised_params(net))))
    refuse(saved, "tensor stem.weight: F32", Net().to(torch.float64))


def test_loading_keeps_no_hold_on_the_file(saved: Path) -> None:
    """A file truncated in place after loading must not matter."""
    loaded = load(saved, Net()).eval()
    x = torch.randn(1, 3, 8, 8)
    y = loaded(x)
    os.truncate(saved, 0)
    assert torch.equal(loaded(x), y)
