"""Files of packed models.

A file is safetensors and holds the state_dict of the packed model: bits, scales and the tensors that are not quantised.
Each tensor is stored once, under its name without the parts that wrappers (torch.compile, ...) add. The metadata:

- "format": "quantopt", "version": "1"
- "layers", "folded": JSON of the parts of the description (quantopt/packing/description.py)
- "aliases": JSON {name: name of the stored tensor it shares memory with}
- "versions": JSON {name of a module: its version in the state_dict}, which modules ask for when they load
- "checksums": JSON {name of a stored tensor: files.checksum of it}
- "checksum": files.checksum of all the metadata above

Files of quantopt 0.1.0 lack the last three: their modules are given no versions, and damage to their tensors is seen
only where it makes values that are refused.
"""

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from quantopt.files import atomic_write, checksum
from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.packing.contents import (
    DTYPES,
    first_on_meta,
    in_place_of_meta,
    key_of,
    kind_fault,
    memory_of,
    modules_of,
    plain_keys,
    shared_fault,
    state_of,
    value_fault,
)
from quantopt.packing.description import describe, packed_layers, replacements
from quantopt.wrappers import plain_names, unwrapped_model

FORMAT, VERSION = "quantopt", "1"


class PackedFileError(ValueError):
    """A packed file that is damaged, not of this format, or does not belong to the model."""


def save(packed: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a packed model to ``path`` (safetensors), atomically.

    What wraps the model (DistributedDataParallel, torch.compile, ...) is not saved.

    Raises ValueError if nothing in ``packed`` is packed, and ValueError naming what :func:`load` would refuse: entries
    of the state_dict that are no tensors (get_extra_state), tensors of kinds that safetensors does not hold, and values
    that are not finite in the scales and biases of packed layers, in parameters and in the buffers of norms. OSError if
    the file cannot be written.
    """
    packed = unwrapped_model(packed)
    modules = modules_of(packed)
    description = describe(packed)
    layers = packed_layers(modules)
    for name, layer in layers.items():
        bias = layer._buffers["bias"]
        if layer.scale.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
            raise ValueError(f"layer {name}: scale and bias must be float32 to be saved")
    state, versions = state_of(packed)
    if fault := value_fault(layers, modules, state):
        raise ValueError(f"{fault}, which load refuses")
    stored: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        source = stored.setdefault(memory_of(tensor), name)
        if source != name:
            aliases[name] = source
            continue
        tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        **{part: json.dumps(described) for part, described in description.items()},
        "aliases": json.dumps(aliases),
        "versions": json.dumps(versions),
        "checksums": json.dumps({name: checksum(tensor) for name, tensor in tensors.items()}),
    }
    data = serialize(tensors, metadata | {"checksum": _metadata_checksum(metadata)})
    atomic_write(Path(path), lambda file: file.write_bytes(data))


def _metadata_checksum(metadata: Mapping[str, str]) -> str:
    return checksum(*(part for key in sorted(metadata) if key != "checksum" for part in (key, metadata[key])))


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

    def metadata(self, file: Any) -> dict[str, str]:
        """The metadata, of this format and undamaged."""
        metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise self.fail("a safetensors file, but not one that quantopt.save wrote")
        if metadata.get("version") != VERSION:
            raise self.fail(f"its version is {metadata.get('version')!r}, this quantopt reads {VERSION!r}")
        if "checksum" in metadata and metadata["checksum"] != _metadata_checksum(metadata):
            raise self.fail("damaged or edited: the checksum of its metadata does not match")
        if "checksums" in metadata and set(self.json_object(metadata, "checksums")) != set(file.keys()):
            raise self.fail("damaged or edited: it does not hold the tensors that were saved")
        return metadata

    def tensors(self, file: Any, metadata: dict[str, str], names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, undamaged."""
        checksums = self.json_object(metadata, "checksums") if "checksums" in metadata else None
        tensors = {}
        for name in names:
            tensors[name] = file.get_tensor(name).clone()  # a file that is mapped might change later
            if checksums is not None and checksums[name] != checksum(tensors[name]):
                raise self.fail(f"damaged or edited: the checksum of tensor {name} does not match")
        return tensors

    def versions(self, model: nn.Module, metadata: dict[str, str]) -> dict[str, dict[str, int]] | None:
        """What a state_dict of ``model`` carries as _metadata; None from a file without versions."""
        if "versions" not in metadata:
            return None
        versions = self.json_object(metadata, "versions")
        for name, version in versions.items():
            if type(version) is not int:
                raise self.fail(f"module {name}: its version {version!r} is no whole number")
        named = dict(model.named_modules(remove_duplicate=False))
        plain = zip(named, plain_names(named), strict=True)
        return {own: {"version": versions[name]} for own, name in plain if name in versions}

    def layers(
        self, modules: Mapping[str, nn.Module], metadata: dict[str, str]
    ) -> tuple[dict[str, BinaryLinear | BinaryConv2d], dict[int, Any]]:
        """({name: packed layer}, {id of a module: what takes its place}), without memory."""
        description = {part: self.json_object(metadata, part) for part in ("layers", "folded")}
        try:
            return replacements(modules, description)
        except ValueError as error:
            raise self.fail(str(error)) from None

    def kept(
        self, model: nn.Module, modules: Mapping[str, nn.Module], replaced: Mapping[int, nn.Module]
    ) -> dict[str, tuple[str, Tensor]]:
        """{plain name: (key, tensor)} of the state_dict of ``model`` without the modules that are replaced."""
        gone = {name for name, module in modules.items() if id(module) in replaced}
        state = model.state_dict()
        kept: dict[str, tuple[str, Tensor]] = {}
        for key, name in plain_keys(model, state).items():
            parts = name.split(".")
            if any(".".join(parts[:i]) in gone for i in range(len(parts))):
                continue
            if fault := kind_fault(name, state[key]):
                raise self.fail(f"the model does not fit a packed file: {fault}")
            if name in kept:
                raise self.fail(f"the model has two tensors {name} without the parts of wrappers: rename one")
            kept[name] = (key, state[key])
        return kept

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
            shape, dtype = list(header.get_shape()), DTYPES.get(header.get_dtype())
            if shape != list(tensor.shape) or dtype != tensor.dtype:
                raise self.fail(
                    f"tensor {name}: {header.get_dtype()} {shape} in the file, "
                    f"{tensor.dtype} {list(tensor.shape)} needed"
                )


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The packed model saved at ``path``.

    Args:
        path: a file that :func:`save` wrote.
        model: the float model; it gives the architecture, the devices and the mode (training or evaluation), and is not
            changed. What of it is on the meta device is filled on the CPU, so that the float weights need no memory.
            What wraps it (DistributedDataParallel, AveragedModel, torch.compile) is not in the result; names in the
            file and in the model are compared without the parts of wrappers.

    The checksums, the header, the names, types and shapes of all tensors, and the values of packed layers, parameters
    and norms are checked before the packed copy is made. Raises :class:`PackedFileError` (a ValueError) naming the file
    and the tensor, OSError if the file cannot be read. Refused too: two unlike tensors of the file that the model ties
    or shares (not seen where they are different views of one memory); a tensor on the meta device that the file does
    not hold (a buffer with persistent=False, a tensor that is a plain attribute of a module; those within lists are not
    seen).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    model = unwrapped_model(model)
    modules = modules_of(model)
    reader = _Reader(Path(path))
    with open(reader.path, "rb"):
        pass  # a missing or unreadable file is an OSError
    try:
        with safetensors.safe_open(str(reader.path), framework="pt", device="cpu") as file:
            metadata = reader.metadata(file)
            layers, replaced = reader.layers(modules, metadata)
            aliases = reader.json_object(metadata, "aliases")
            kept = reader.kept(model, modules, replaced)
            packed_state = {
                key_of(name, key): tensor
                for name, m in modules.items()
                if id(m) in replaced
                for key, tensor in replaced[id(m)].state_dict().items()
            }
            expected = {name: value for name, (_, value) in kept.items()} | packed_state
            reader.check_layout(file, expected, aliases)
            stored = reader.tensors(file, metadata, set(expected) - set(aliases))
    except safetensors.SafetensorError as error:
        raise reader.fail(f"damaged or not a safetensors file ({error})") from None
    tensors = {name: stored[aliases[name] if name in aliases else name] for name in expected}
    others = {name: module for name, module in modules.items() if id(module) not in replaced}
    if fault := value_fault(layers, others, tensors) or shared_fault(modules, replaced, tensors):
        raise reader.fail(fault)

    for packed, name in {packed: name for name, packed in layers.items()}.items():
        weight: Any = modules[name].weight
        device = "cpu" if weight.is_meta else weight.device
        parts = {key: tensors[key_of(name, key)].to(device) for key in packed.state_dict()}
        packed.set_weights(parts["bits"], parts["scale"], parts.get("bias"))
    result: nn.Module = copy.deepcopy(model, replaced | in_place_of_meta(others, tensors))
    values = OrderedDict((own, tensors[name]) for name, (own, _) in kept.items())
    values._metadata = reader.versions(model, metadata)  # type: ignore[attr-defined]
    try:
        missing, unexpected = result.load_state_dict(values, strict=False)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:  # the model's own code may run
        raise reader.fail(f"the model does not take the tensors: {error}") from None
    left = sorted((set(plain_keys(result, missing).values()) - set(packed_state)) | set(unexpected))
    if left:
        raise reader.fail(f"the model does not take the tensors {left}")
    on_meta = first_on_meta(result)
    if on_meta is not None:
        raise reader.fail(
            f"the model's tensor {on_meta} is on the meta device, and the file does not hold it (persistent=False?): "
            "make it on a device before load"
        )
    return result
