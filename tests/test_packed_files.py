"""Files of packed models: damage is seen, and what save writes load reads as it was, into any skeleton of the model."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn

from quantopt.files import checksum
from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.nn import conv as conv_module
from quantopt.nn import linear as linear_module
from quantopt.packing import PackedFileError, load, pack, save
from quantopt.packing.contents import DTYPES
from test_packing import Fake, Net, quantised_params


def packed_net(net: nn.Module, *layers: nn.Module) -> nn.Module:
    return pack(net, Fake([layer.weight for layer in layers])).eval()


def round_trip(packed: nn.Module, path: Path, skeleton: nn.Module) -> nn.Module:
    save(packed, path)
    loaded = load(path, skeleton)
    assert same(loaded, packed)
    return loaded


def same(a: nn.Module, b: nn.Module) -> bool:
    """The same names, types and bytes in both state_dicts."""
    sums = [{name: checksum(t) for name, t in m.state_dict().items()} for m in (a, b)]
    return sums[0] == sums[1]


# ---- damage ------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 1), tmp_path / "m"
    packed = packed_net(model, model)
    save(packed, path)
    original, refused = path.read_bytes(), 0
    for bit in range(8 * len(original)):
        data = bytearray(original)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded = load(path, model)
        except PackedFileError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert same(loaded, packed), f"bit {bit % 8} of byte {bit // 8}"
    assert refused > 8 * (len(original) - 24)  # but in the word "checksum" and in spaces around the header


def test_damage_is_named(tmp_path: Path) -> None:
    net = Net()
    path = tmp_path / "m"
    save(packed_net(net, net.head), path)
    data = bytearray(path.read_bytes())
    with safetensors.safe_open(str(path), framework="pt") as file:
        tensor = file.get_tensor("stem.weight")
    start = data.index(tensor.numpy().tobytes())
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackedFileError, match=r"the checksum of tensor stem\.weight does not match"):
        load(path, net)


@pytest.mark.parametrize("key", ["layers", "folded", "aliases", "versions", "checksums"])
def test_edited_metadata(tmp_path: Path, key: str) -> None:
    net = Net()
    path = tmp_path / "m"
    for change in (lambda m: m.pop(key), lambda m: m.update({key: m[key] + " "})):
        save(packed_net(net, net.head), path)
        edit_metadata(path, change)
        with pytest.raises(PackedFileError, match="the checksum of its metadata does not match"):
            load(path, net)


def edit_metadata(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


class Rescale(nn.Module):
    """A norm of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class MyRMSNorm(Rescale):
    pass


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "0.bias",
        "1.weight",
        "1.running_var",
        "2.bias",
        "3.weight",
        "4.weight",
        "4.bias",
        "5.weight",
        "6.weight",
    ],
)
def test_values_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    """Of packed layers, parameters and norms: save refuses them, and load, which reads files of others too."""
    norms = nn.BatchNorm1d(4), nn.LayerNorm(4), MyRMSNorm()
    model = nn.Sequential(nn.Linear(4, 4), *norms, nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), Rescale())
    packed, path = packed_net(model, model[0]), tmp_path / "m"
    save(packed, path)
    packed.state_dict()[name][1] = value
    with pytest.raises(ValueError, match=rf"tensor {name}: not finite, which load refuses"):
        save(packed, tmp_path / "n")
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    tensors[name][1] = value
    del metadata["checksum"], metadata["checksums"]
    safetensors.torch.save_file(tensors, str(path), metadata)
    with pytest.raises(PackedFileError, match=rf"tensor {name}: not finite"):
        load(path, model)


def test_infinite_values_elsewhere_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Rescale())
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    round_trip(packed_net(model, model[0]), tmp_path / "m", model)


# ---- kinds of tensors --------------------------------------------------------------------------------------------


def with_table(table: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("table", table)
    return model


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    count = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    table = count % 2 == 1 if dtype == torch.bool else count.view(dtype)
    for i, values in enumerate((table, table.view(2, 3), table[0].clone(), table[:0].view(0, 3))):
        model = with_table(values.clone())
        skeleton = with_table(torch.empty_like(values))
        round_trip(packed_net(model, model[0]), tmp_path / str(i), skeleton)


def test_complex_conjugates_are_written_out(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    model = with_table(z)
    model.register_buffer("conjugate", z.conj())  # the same memory
    loaded = round_trip(packed_net(model, model[0]), tmp_path / "m", model)
    assert torch.equal(loaded.conjugate, torch.tensor([1 - 2j, 3 + 4j]))


class Extra(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state(tmp_path: Path) -> None:
    """Tensors are kept; objects, which only pickle could hold, are refused by name."""
    model = nn.Sequential(nn.Linear(4, 4), Extra(torch.arange(3)))
    skeleton = nn.Sequential(nn.Linear(4, 4), Extra(torch.zeros(3, dtype=torch.int64)))
    assert round_trip(packed_net(model, model[0]), tmp_path / "m", skeleton)[1].state.tolist() == [0, 1, 2]
    other = nn.Sequential(nn.Linear(4, 4), Extra({"step": 3}))
    with pytest.raises(ValueError, match=r"1\._extra_state in the state_dict is not a tensor but dict"):
        save(packed_net(other, other[0]), tmp_path / "n")
    with pytest.raises(PackedFileError, match=r"1\._extra_state in the state_dict is not a tensor but dict"):
        load(tmp_path / "m", other)


def freed() -> Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex128), r"tensor table is torch\.complex128"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu), "tensor table is torch.float8"),
        (lambda: torch.eye(3).to_sparse(), "tensor table is no plain dense tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "tensor table is no plain dense"),
        (lambda: torch.zeros(3, device="meta"), "tensor table is on the meta device"),
        (freed, "tensor table has no memory"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*quantiz:Warning")
def test_tensors_that_cannot_be_saved(tmp_path: Path, table: Callable[[], Tensor], message: str) -> None:
    packed = packed_net(model := nn.Sequential(nn.Linear(4, 4)), model[0])
    packed.register_buffer("table", table())
    with pytest.raises(ValueError, match=message):
        save(packed, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_lazy_modules(tmp_path: Path) -> None:
    packed = packed_net(model := nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), model[0])
    with pytest.raises(ValueError, match=r"tensor 1\.weight has no shape yet"):
        save(packed, tmp_path / "m")


def test_a_name_of_the_format(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("__metadata__", torch.zeros(1))
    with pytest.raises(ValueError, match="cannot be called __metadata__"):
        save(packed_net(model, model[0]), tmp_path / "m")


# ---- versions ----------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    _version = 2  # since then the gain is kept as 1 / x

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([4.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.gain

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if (metadata.get("version") or 1) < 2:
            state_dict[prefix + "gain"] = 1 / state_dict[prefix + "gain"]
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)  # type: ignore[no-untyped-call]


def test_modules_are_told_their_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = nn.Sequential(nn.Linear(4, 4), Gain()), tmp_path / "m"
    packed = packed_net(model, model[0])
    assert round_trip(packed, path, model)[1].gain == 4
    edit_metadata(path, lambda m: [m.pop(key) for key in ("versions", "checksum")])
    assert load(path, model)[1].gain == 0.25  # a file of 0.1.0
    monkeypatch.setattr(Gain, "_version", 1)
    save(packed, path)
    monkeypatch.undo()
    assert load(path, model)[1].gain == 0.25
    monkeypatch.setattr(Gain, "_version", "two")
    with pytest.raises(ValueError, match="module 1: its state_dict has the metadata"):
        save(packed, path)


# ---- skeletons ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.fc = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, i: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.fc(self.embedding(i))))
        return y


def in_two(name: str) -> nn.Module:
    """Two layers, two norms and an embedding with a head; the one named is the other, or has its parameter."""
    model = nn.Module()
    model.a, model.b, model.n, model.n2 = (
        nn.Linear(6, 6),
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6),
    )
    model.embedding, model.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.randn(tensor.shape).abs() + i)  # no two are equal
    if name == "b":
        model.b = model.a
    elif name == "n2":
        model.n2 = model.n
    elif name == "head.weight":
        model.head.weight = model.embedding.weight
    elif name == "n2.running_mean":
        model.n2.running_mean = model.n.running_mean
    elif name == "n2.bias":
        model.n2.bias = nn.Parameter(model.n.bias.detach())  # another parameter of the same memory
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("b", r"a\.\w+ and b\.\w+"),
        ("n2", r"n\.weight and n2\.weight"),
        ("head.weight", r"embedding\.weight and head\.weight"),
        ("n2.running_mean", r"n\.running_mean and n2\.running_mean"),
        ("n2.bias", r"n\.bias and n2\.bias"),
    ],
)
def test_what_only_the_model_ties(tmp_path: Path, name: str, tensors: str, device: str) -> None:
    """Two tensors of the file for one of the model: refused, unless they are equal; one of the file for it is fine."""
    model, path = in_two(""), tmp_path / "m"
    apart = packed_net(model, model.a, model.b)
    save(apart, path)
    if device == "cpu":
        tied = in_two(name)
    else:
        if name == "n2.bias":
            pytest.skip("tensors on the meta device have no memory to share")
        with torch.device("meta"):
            tied = in_two(name)
    with pytest.raises(
        PackedFileError, match=rf"tensors {tensors} differ in the file and are one tensor in the model"
    ):
        load(path, tied)
    source = in_two(name)
    saved = packed_net(source, source.a, source.b)
    round_trip(saved, path, tied)
    apart.load_state_dict(saved.state_dict())
    save(apart, path)
    assert same(load(path, tied), saved)


@pytest.mark.parametrize("on_meta", [("",), ("fc",), ("norm", "head"), ("fc.bias",)], ids=str)
def test_what_is_on_the_meta_device_is_filled(tmp_path: Path, on_meta: tuple[str, ...]) -> None:
    model, skeleton = Tied(), Tied()
    model(torch.arange(7))
    packed = packed_net(model, model.fc)
    skeleton.embedding.weight.requires_grad = False
    for name in on_meta:
        if name == "fc.bias":
            skeleton.fc.bias = nn.Parameter(torch.empty(6, device="meta"))
        else:
            skeleton.get_submodule(name).to("meta")
    if on_meta == ("",):
        skeleton.head.weight = skeleton.embedding.weight  # moving to meta unties
    with_meta = {name for name, p in skeleton.named_parameters() if p.is_meta}
    loaded = round_trip(packed, tmp_path / "m", skeleton).eval()
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert with_meta == {name for name, p in skeleton.named_parameters() if p.is_meta} != set()
    assert torch.equal(loaded(torch.arange(7)), packed(torch.arange(7)))
    assert not loaded.embedding.weight.requires_grad and isinstance(loaded.norm.weight, nn.Parameter)
    if on_meta == ("",):
        assert loaded.head.weight is loaded.embedding.weight
    with torch.no_grad():  # no two parameters share memory by mistake
        loaded.norm.weight += 1
        assert not torch.equal(loaded.norm.weight, loaded.norm.running_var)


def test_what_the_file_does_not_hold_cannot_stay_on_the_meta_device(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        model.register_buffer("angles", torch.arange(4.0), persistent=False)
        model[0].attribute = torch.ones(1)
        return model

    save(packed_net(model := build(), model[0]), tmp_path / "m")
    with torch.device("meta"):
        skeleton = build()
    with pytest.raises(PackedFileError, match="tensor angles is on the meta device"):
        load(tmp_path / "m", skeleton)
    skeleton.angles = torch.arange(4.0)
    assert torch.equal(load(tmp_path / "m", skeleton)[0].bits, load(tmp_path / "m", model)[0].bits)
    skeleton.other = torch.ones(1, device="meta")
    with pytest.raises(PackedFileError, match="tensor other is on the meta device"):
        load(tmp_path / "m", skeleton)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_layout_is_derived_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    net = Net()
    save(pack(net, Fake(quantised_params(net))), tmp_path / "m")
    derived: list[Tensor] = []
    for module, name in ((linear_module, "binary_tiles"), (conv_module, "conv_tiles")):
        derive = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda bits, *a, derive=derive: derived.append(bits) or derive(bits, *a)
        )
    loaded = load(tmp_path / "m", Net().to(device))
    layers = [m for m in loaded.modules() if isinstance(m, BinaryLinear | BinaryConv2d)]
    assert len(derived) == 3 and {id(bits) for bits in derived} == {id(m.bits) for m in layers}


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compile": torch.compile,  # type: ignore[dict-item]
    "twice": lambda m: nn.DataParallel(torch.compile(m)),  # type: ignore[arg-type]
    "inner": lambda m: nn.Sequential(m[0], torch.compile(m[1])),  # type: ignore[index,arg-type]
    "checkpoint": lambda m: nn.Sequential(m[0], checkpointed(m[1])),  # type: ignore[index]
}


def checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped: nn.Module = checkpoint_wrapper(module)
    return wrapped


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Gain()))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Saved within a wrapper and loaded without, and the other way round."""
    model = block()
    model[1][1].running_mean.fill_(3)
    plain = packed_net(model, model[0], model[1][0])
    save(wrap(plain), tmp_path / "wrapped")
    save(plain, tmp_path / "plain")
    assert same(load(tmp_path / "wrapped", block()), plain)
    with torch.device("meta"):
        on_meta = block()
    for skeleton in (wrap(block()), wrap(on_meta)):
        loaded = load(tmp_path / "plain", skeleton).eval()
        x = torch.randn(3, 4)
        assert torch.equal(loaded[0](x), plain[0](x))
        inner = getattr(loaded[1], "_orig_mod", getattr(loaded[1], "_checkpoint_wrapped_module", loaded[1]))
        assert torch.equal(inner(x), plain[1](x)) and isinstance(inner[0], BinaryLinear)


def test_ddp(tmp_path: Path) -> None:
    """A model that is packed within DistributedDataParallel is saved as the model is."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        wrapped = nn.parallel.DistributedDataParallel(block())
        packed = packed_net(wrapped, wrapped.module[0])
        save(packed, tmp_path / "m")
        assert same(load(tmp_path / "m", block()), getattr(packed, "module", packed))
        assert isinstance(load(tmp_path / "m", wrapped)[0], BinaryLinear)
    finally:
        dist.destroy_process_group()


def test_two_names_that_differ_by_a_wrapper(tmp_path: Path) -> None:
    model = nn.Module()
    model.fc, model._orig_mod = nn.Linear(4, 4), nn.Module()
    model._orig_mod.fc = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"two tensors are called fc\.bits without the parts of wrappers"):
        save(packed_net(model, model.fc, model._orig_mod.fc), tmp_path / "m")
