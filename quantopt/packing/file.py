"""Files of packed models.

A file is safetensors and holds the state_dict of the packed model: bits, scales and the tensors that are not quantised.
Each tensor is stored once. The metadata:

- "format": "quantopt", "version": "1"
- "layers": JSON {name: {"type": "BinaryLinear" | "BinaryConv1d" | "BinaryConv2d", "levels", "scale", "group_size",
  "compute", "activation", "bias" (true or false), and "in_features", "out_features" or "in_channels", "out_channels",
  "kernel_size"}}
- "folded": JSON {name of a module that was folded into the layer before it: its type, e.g. "BatchNorm2d"}
- "aliases": JSON {name: name of the stored tensor it shares memory with}
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from quantopt.files import atomic_write
from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.packing import folding
from quantopt.packing.layers import fault_of, skeleton

FORMAT, VERSION = "quantopt", "1"

# Each packed layer: the fields in which it must agree with the one that takes the place of the model's layer.
_LAYER_FIELDS: dict[str, tuple[str, ...]] = {
    "BinaryLinear": ("in_features", "out_features"),
    "BinaryConv1d": ("in_channels", "out_channels", "kernel_size"),
    "BinaryConv2d": ("in_channels", "out_channels", "kernel_size"),
}
# Arguments of layers.skeleton.
_OPTIONS = ("levels", "scale", "group_size", "compute", "activation", "bias")


class PackedFileError(ValueError):
    """A packed file that is damaged, not of this format, or does not belong to the model."""


def _binary_layers(model: nn.Module) -> dict[str, BinaryLinear | BinaryConv2d]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BinaryLinear | BinaryConv2d)
    }


def _describe(module: BinaryLinear | BinaryConv2d) -> dict[str, Any]:
    kind = _type_of(module)
    return {
        "type": kind,
        **{field: getattr(module, field) for field in _LAYER_FIELDS[kind]},
        "levels": module.levels,
        "scale": module.scale_kind,
        "group_size": module.group_size,
        "compute": module.compute,
        "activation": module.activation,
        "bias": module.bias is not None,
    }


def _type_of(module: nn.Module) -> str:
    """The type that a file gives a packed layer."""
    return next(kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _LAYER_FIELDS)


def _fault(row_length: int, bits: Tensor, scale: Tensor) -> tuple[str, str] | None:
    """(name of the tensor, what is wrong with its values), or None if the weights are valid."""
    spare = -row_length % 8
    if spare and bits.numel() and bool((bits[..., -1] >> (8 - spare)).any()):
        return "bits", "the spare bits of its rows are not 0"
    if not bool(scale.isfinite().all()):
        return "scale", "not finite"
    if bool((scale < 0).any()):
        return "scale", "negative"
    return None


def save(packed: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a packed model to ``path`` (safetensors), atomically.

    Raises ValueError if nothing in ``packed`` is packed or :func:`load` would refuse a tensor, OSError if the file
    cannot be written.
    """
    layers = _binary_layers(packed)
    if not layers:
        raise ValueError("the model has no packed layers: call quantopt.pack(model, opt) first")
    for name, layer in layers.items():
        if fault := _fault(layer.row_length, layer.bits, layer.scale):
            raise ValueError(f"tensor {_key(name, fault[0])}: {fault[1]}, which load refuses")
        bias = layer._buffers["bias"]
        if layer.scale.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
            raise ValueError(f"layer {name}: scale and bias must be float32 to be saved")
    stored: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in packed.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} in the state_dict is not a tensor: it cannot be saved in a packed file")
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() > 0 and key in stored:
            aliases[name] = stored[key]
            continue
        stored[key] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layers": json.dumps({name: _describe(layer) for name, layer in layers.items()}),
        "folded": json.dumps(
            {
                name: module.kind
                for name, module in packed.named_modules(remove_duplicate=False)
                if isinstance(module, folding.Folded)
            }
        ),
        "aliases": json.dumps(aliases),
    }
    data = serialize(tensors, metadata)
    atomic_write(Path(path), lambda file: file.write_bytes(data))


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class _Reader:
    """Checks a packed file against a model; every error names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, what: str) -> PackedFileError:
        return PackedFileError(f"{self.path}: {what}")

    def json_object(self, metadata: dict[str, str], key: str) -> dict[str, Any]:
        try:
            value = json.loads(metadata[key])
        except (KeyError, ValueError, RecursionError):
            raise self.fail(f'the metadata "{key}" is missing or not JSON') from None
        if not isinstance(value, dict):
            raise self.fail(f'the metadata "{key}" is not an object')
        return value

    def skeleton(
        self, model: nn.Module, name: str, entry: Any
    ) -> tuple[nn.Module, BinaryLinear | BinaryConv2d]:
        """The layer of ``model`` called ``name``, and the packed module on the meta device that ``entry`` describes."""
        if not isinstance(entry, dict) or entry.get("type") not in list(_LAYER_FIELDS):
            raise self.fail(f"layer {name}: not described as one of {', '.join(_LAYER_FIELDS)}")
        fields = _LAYER_FIELDS[entry["type"]]
        if set(entry) != {"type", *_OPTIONS, *fields}:
            raise self.fail(f"layer {name}: its description has the fields {sorted(entry)}")
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise self.fail(f"layer {name}: the model has no such layer") from None
        if isinstance(layer, BinaryLinear | BinaryConv2d):
            raise self.fail(f"layer {name}: the model is packed already; pass the float model")
        if not isinstance(entry["bias"], bool):
            raise self.fail(f"layer {name}: bias={entry['bias']!r} is not true or false")
        levels, group_size = entry["levels"], entry["group_size"]
        if type(levels) is not int or type(group_size) is not int or not 0 <= group_size < 2**31:
            raise self.fail(f"layer {name}: levels={levels!r}, group_size={group_size!r} are not sizes")
        try:
            packed = None if fault_of(layer) else skeleton(layer, **{key: entry[key] for key in _OPTIONS})
        except (TypeError, ValueError) as error:
            raise self.fail(f"layer {name}: {error}") from None
        if packed is None or _type_of(packed) != entry["type"]:
            raise self.fail(
                f"layer {name}: a {entry['type']} in the file, {type(layer).__name__} in the model"
            )
        for field in fields:
            ours = getattr(packed, field)
            ours = list(ours) if isinstance(ours, tuple) else ours
            if entry[field] != ours or isinstance(entry[field], bool):
                raise self.fail(f"layer {name}: {field} is {entry[field]!r} in the file, {ours} in the model")
        return layer, packed

    def folded(self, model: nn.Module, name: str, kind: Any) -> nn.Module:
        """The module of ``model`` called ``name``, which the file says is folded."""
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise self.fail(f"folded {name}: the model has no such module") from None
        if type(module).__name__ != kind or type(module) is not folding.FOLDABLE.get(kind):
            raise self.fail(f"folded {name}: {kind!r} in the file, {type(module).__name__} in the model")
        return module

    def check_layout(self, file: Any, expected: dict[str, Tensor], aliases: dict[str, Any]) -> None:
        """Names, dtypes and shapes, before any tensor is read."""
        stored = set(file.keys())
        for name, source in aliases.items():
            if not isinstance(source, str) or source not in stored or name in stored:
                raise self.fail(f"alias {name}: {source!r} is not another tensor of the file")
        missing = sorted(set(expected) - stored - set(aliases))
        extra = sorted((stored | set(aliases)) - set(expected))
        if missing:
            raise self.fail(
                f"tensor {missing[0]} is missing ({len(missing)} in all): is this another model's file?"
            )
        if extra:
            raise self.fail(
                f"tensor {extra[0]} is not the model's ({len(extra)} in all): is this another model's file?"
            )
        for name, tensor in expected.items():
            header = file.get_slice(aliases.get(name, name))
            shape, dtype = list(header.get_shape()), _DTYPES.get(header.get_dtype())
            if shape != list(tensor.shape) or dtype != tensor.dtype:
                raise self.fail(
                    f"tensor {name}: {header.get_dtype()} {shape} in the file, "
                    f"{tensor.dtype} {list(tensor.shape)} needed"
                )


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The packed model saved at ``path``.

    Args:
        path: a file that :func:`save` wrote.
        model: the float model; it gives the architecture, the device and the mode (training or evaluation), and is not
            changed.

    The header, the names, types and shapes of all tensors, and the values of bits and scales are checked before the
    packed copy is made. Raises :class:`PackedFileError` (a ValueError) naming the file and the tensor, OSError if the
    file cannot be read.
    """
    file_path = Path(path)
    reader = _Reader(file_path)
    with open(file_path, "rb"):
        pass  # a missing or unreadable file is an OSError
    try:
        with safetensors.safe_open(str(file_path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise reader.fail("a safetensors file, but not one that quantopt.save wrote")
            if metadata.get("version") != VERSION:
                raise reader.fail(
                    f"its version is {metadata.get('version')!r}, this quantopt reads {VERSION!r}"
                )
            replaced: dict[int, Any] = {}
            layers: dict[str, BinaryLinear | BinaryConv2d] = {}
            for name, entry in reader.json_object(metadata, "layers").items():
                layer, packed = reader.skeleton(model, name, entry)
                packed.train(layer.training)
                if id(layer) in replaced and _describe(replaced[id(layer)]) != _describe(packed):
                    raise reader.fail(f"layer {name}: described in two ways")
                layers[name] = replaced.setdefault(id(layer), packed)
            if not layers:
                raise reader.fail("it holds no packed layers")
            for name, kind in reader.json_object(metadata, "folded").items():
                module = reader.folded(model, name, kind)
                replaced.setdefault(id(module), folding.Folded(module))
            aliases = reader.json_object(metadata, "aliases")
            expected = _expected(model, replaced)
            reader.check_layout(file, expected, aliases)
            stored = {name: file.get_tensor(name).clone() for name in set(expected) - set(aliases)}
    except safetensors.SafetensorError as error:
        raise reader.fail(f"damaged or not a safetensors file ({error})") from None
    tensors = {name: stored[aliases.get(name, name)] for name in expected}
    for name, packed in layers.items():
        if fault := _fault(packed.row_length, tensors[_key(name, "bits")], tensors[_key(name, "scale")]):
            raise reader.fail(f"tensor {_key(name, fault[0])}: {fault[1]}")

    result: nn.Module = copy.deepcopy(model, replaced)
    parts = ("bits", "scale", "bias")
    packed_names = {_key(name, part) for name in layers for part in parts}
    others = {name: tensor for name, tensor in tensors.items() if name not in packed_names}
    result.load_state_dict(others, strict=False)  # the packed layers are still on the meta device
    for packed, name in {packed: name for name, packed in layers.items()}.items():
        device = model.get_submodule(name).weight.device
        bits, scale, bias = (tensors.get(_key(name, part)) for part in parts)
        assert bits is not None and scale is not None
        packed.set_weights(bits.to(device), scale.to(device), None if bias is None else bias.to(device))
    return result


def _key(module: str, tensor: str) -> str:
    """The name of a tensor of ``module`` in the state_dict."""
    return f"{module}.{tensor}" if module else tensor


def _expected(model: nn.Module, replaced: dict[int, nn.Module]) -> dict[str, Tensor]:
    """The state_dict of the packed model: names, and tensors that have its types and shapes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = {name: replaced[id(module)] for name, module in modules.items() if id(module) in replaced}

    def is_replaced(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[:i]) in packed for i in range(len(parts)))

    expected = {key: tensor for key, tensor in model.state_dict().items() if not is_replaced(key)}
    for name, module in packed.items():
        expected |= {_key(name, key): tensor for key, tensor in module.state_dict().items()}
    return expected
