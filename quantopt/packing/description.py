"""The description of a packed model: which of its layers are packed and how, without their tensors.

Packed files and the configurations of other libraries hold the same description, which JSON can write:

- "layers": {name: {"type": "BinaryLinear" | "BinaryConv1d" | "BinaryConv2d", "levels", "scale", "group_size",
  "compute", "activation", "bias" (true or false), and "in_features", "out_features" or "in_channels", "out_channels",
  "kernel_size"}}
- "folded": {name of a module that was folded into the layer before it: its type, e.g. "BatchNorm2d"}

Names are those of the model without the parts that wrappers (torch.compile, ...) add.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.nn.joined import JoinedLinear
from quantopt.packing import folding, layers
from quantopt.packing.contents import modules_of
from quantopt.wrappers import unwrapped_model

# Each packed layer: the fields in which it must agree with the one that takes the place of the model's layer.
_FIELDS: dict[str, tuple[str, ...]] = {
    "BinaryLinear": ("in_features", "out_features"),
    "BinaryConv1d": ("in_channels", "out_channels", "kernel_size"),
    "BinaryConv2d": ("in_channels", "out_channels", "kernel_size"),
}
# Arguments of layers.skeleton.
_OPTIONS = ("levels", "scale", "group_size", "compute", "activation", "bias")


def packed_layers(modules: Mapping[str, nn.Module]) -> dict[str, BinaryLinear | BinaryConv2d]:
    """Those of ``modules`` that are packed."""
    return {
        name: module for name, module in modules.items() if isinstance(module, BinaryLinear | BinaryConv2d)
    }


def describe(packed: nn.Module) -> dict[str, dict[str, Any]]:
    """The description of a model that :func:`quantopt.pack` made, from which :func:`skeleton` makes its packed layers.

    Returns {"layers": {name: fields}, "folded": {name: type}}, which JSON can write (quantopt/packing/description.py
    has the fields). Raises TypeError for what is no module, ValueError if nothing in ``packed`` is packed, or if layers
    are joined (:func:`join_layers`).
    """
    modules = modules_of(_model(packed))
    packed_ones = packed_layers(modules)
    if joined := next((name for name, m in modules.items() if isinstance(m, JoinedLinear)), None):
        raise ValueError(
            f"layer {joined} is joined with others, which no file holds: save before join_layers"
        )
    if not packed_ones:
        raise ValueError("the model has no packed layers: call quantopt.pack(model, opt) first")
    return {
        "layers": {name: _entry(layer) for name, layer in packed_ones.items()},
        "folded": {name: m.kind for name, m in modules.items() if isinstance(m, folding.Folded)},
    }


def skeleton(model: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Replaces, in place, the layers of ``model`` that ``description`` names by packed ones, and returns ``model``.

    Args:
        model: the float model, on any devices; its weights are not used, and may be on the meta device. Where it is
            itself the layer that is described, the packed layer is returned.
        description: what :func:`describe` gave of the packed model.

    The packed layers have no values yet: all their weights are -1 with the scale 1, or are on the meta device where the
    float weight is. ``load_state_dict`` of the packed model's state_dict gives them theirs (with ``assign=True`` where
    they are on the meta device). To have them from a file of :func:`quantopt.save`, call :func:`quantopt.load` with the
    float model.

    Raises TypeError for what is no module, ValueError naming the layer of the description that does not fit; nothing
    is replaced then.
    """
    model = _model(model)
    modules = modules_of(model)
    packed, replaced = replacements(modules, description)
    for name, layer in packed.items():
        weight: Any = modules[name].weight
        if not weight.is_meta and layer.bits.is_meta:
            values = (
                torch.zeros_like(layer.bits, device=weight.device),
                torch.ones_like(layer.scale, device=weight.device),
            )
            bias = layer._buffers["bias"]
            layer.set_weights(*values, None if bias is None else torch.zeros_like(bias, device=weight.device))
    for parent in dict.fromkeys(modules.values()):
        for name, child in parent._modules.items():
            parent._modules[name] = replaced.get(id(child), child)
    result: nn.Module = replaced.get(id(model), model)
    return result


def replacements(
    modules: Mapping[str, nn.Module], description: Mapping[str, Any]
) -> tuple[dict[str, BinaryLinear | BinaryConv2d], dict[int, Any]]:
    """({name: packed layer on the meta device}, {id of a module: what takes its place}) of ``description``.

    ``modules`` are those of the float model by plain names. Raises ValueError naming the layer that does not fit.
    """
    packed: dict[str, BinaryLinear | BinaryConv2d] = {}
    replaced: dict[int, Any] = {}
    for part in ("layers", "folded"):
        if not isinstance(description, Mapping) or not isinstance(description.get(part), Mapping):
            raise ValueError(
                f'the description has no "{part}" of a name each: make it with packing.describe(packed)'
            )
    for name, entry in description["layers"].items():
        layer, new = _replacement(modules, name, entry)
        if id(layer) in replaced and _entry(replaced[id(layer)]) != _entry(new):
            raise ValueError(f"layer {name}: described in two ways")
        packed[name] = replaced.setdefault(id(layer), new)
    if not packed:
        raise ValueError("it describes no packed layers")
    for name, kind in description["folded"].items():
        module = modules.get(name)
        if module is None:
            raise ValueError(f"folded {name}: the model has no such module")
        if type(module).__name__ != kind or type(module) is not folding.FOLDABLE.get(kind):
            raise ValueError(
                f"folded {name}: {kind!r} in the description, {type(module).__name__} in the model"
            )
        replaced.setdefault(id(module), folding.Folded(module))
    return packed, replaced


def _model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    plain: nn.Module = unwrapped_model(model)
    return plain


def _type_of(layer: nn.Module) -> str:
    return next(kind.__name__ for kind in type(layer).__mro__ if kind.__name__ in _FIELDS)


def _field(layer: nn.Module, name: str) -> Any:
    value = getattr(layer, name)
    return list(value) if isinstance(value, tuple) else value


def _entry(layer: BinaryLinear | BinaryConv2d) -> dict[str, Any]:
    kind = _type_of(layer)
    return {
        "type": kind,
        **{field: _field(layer, field) for field in _FIELDS[kind]},
        "levels": layer.levels,
        "scale": layer.scale_kind,
        "group_size": layer.group_size,
        "compute": layer.compute,
        "activation": layer.activation,
        "bias": layer._buffers["bias"] is not None,
    }


def _replacement(
    modules: Mapping[str, nn.Module], name: str, entry: Any
) -> tuple[nn.Module, BinaryLinear | BinaryConv2d]:
    """The layer called ``name``, and the packed module on the meta device that ``entry`` describes."""
    if not isinstance(entry, Mapping) or entry.get("type") not in list(_FIELDS):
        raise ValueError(f"layer {name}: not described as one of {', '.join(_FIELDS)}")
    fields = _FIELDS[entry["type"]]
    if set(entry) != {"type", *_OPTIONS, *fields}:
        raise ValueError(f"layer {name}: its description has the fields {sorted(entry)}")
    layer = modules.get(name)
    if layer is None:
        raise ValueError(f"layer {name}: the model has no such layer")
    if isinstance(layer, BinaryLinear | BinaryConv2d):
        raise ValueError(f"layer {name}: the model is packed already; pass the float model")
    if not isinstance(entry["bias"], bool):
        raise ValueError(f"layer {name}: bias={entry['bias']!r} is not true or false")
    levels, group_size = entry["levels"], entry["group_size"]
    if type(levels) is not int or type(group_size) is not int or not 0 <= group_size < 2**31:
        raise ValueError(f"layer {name}: levels={levels!r}, group_size={group_size!r} are not sizes")
    options = {key: entry[key] for key in _OPTIONS}
    try:
        packed = None if layers.fault_of(layer) else layers.skeleton(layer, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"layer {name}: {error}") from None
    if packed is None or _type_of(packed) != entry["type"]:
        raise ValueError(
            f"layer {name}: a {entry['type']} in the description, {type(layer).__name__} in the model"
        )
    for field in fields:
        ours = _field(packed, field)
        if entry[field] != ours or isinstance(entry[field], bool):
            raise ValueError(
                f"layer {name}: {field} is {entry[field]!r} in the description, {ours} in the model"
            )
    return layer, packed
