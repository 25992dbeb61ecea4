"""From a trained model to packed layers, to a file, and back.

The file is safetensors: the state_dict of the packed model (bits, scales, and everything that is not quantised as it
is), each tensor stored once. Its metadata:

- "format": "quantopt", "version": "1"
- "layers": JSON {name: {"type": "BinaryLinear" | "BinaryConv2d", "levels", "scale", "group_size", "compute",
  "activation", "bias" (true or false), and "in_features", "out_features" or "in_channels", "out_channels",
  "kernel_size"}}
- "folded": JSON {name of a module that was folded into the layer before it: its type, e.g. "BatchNorm2d"}
- "aliases": JSON {name: name of the stored tensor it shares memory with}
"""

import contextlib
import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from quantopt import folding
from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.ops.inputs import compute_mode
from quantopt.ops.weights import pack_signs, plane_weights_of

FORMAT, VERSION = "quantopt", "1"


class PackedFileError(ValueError):
    """A packed file that is damaged, not of this format, or does not belong to the model."""


class _Quantization(Protocol):
    @property
    def levels(self) -> int: ...
    @property
    def codes(self) -> Tensor: ...
    @property
    def max_level(self) -> Tensor: ...
    @property
    def group_size(self) -> int: ...


class _Optimizer(Protocol):
    def quantization(self, p: Any, /) -> Any: ...


def _check_quantization(weight: Tensor, quantization: _Quantization) -> None:
    levels, codes, max_level = quantization.levels, quantization.codes, quantization.max_level
    plane_weights_of(levels)
    if codes.dtype != torch.uint8 or codes.shape != weight.shape:
        raise ValueError(
            f"opt.quantization gives codes {codes.dtype} {list(codes.shape)} for a weight {list(weight.shape)}: "
            "uint8 of the same shape are needed"
        )
    if codes.numel() and int(codes.max()) >= levels:
        raise ValueError(f"opt.quantization gives the code {int(codes.max())} of only {levels} levels")
    rows, length = codes.flatten(1).shape
    groups = -(-length // quantization.group_size) if quantization.group_size else 0
    if list(max_level.shape) not in ([[rows, groups]] if groups else [[1], [rows]]):
        raise ValueError(
            f"opt.quantization gives max_level {list(max_level.shape)} for codes {list(codes.shape)} "
            f"and group_size={quantization.group_size}"
        )
    if not bool((max_level.isfinite() & (max_level >= 0)).all()):
        raise ValueError("opt.quantization gives a scale that is negative or not finite: nothing to pack")


def _weight_tensors(weight: Tensor, quantization: _Quantization) -> tuple[Tensor, Tensor]:
    """(bits, scale): level = max_level / (K-1) * sum_i weight_i s_i, s_i = ±1 of plane i."""
    _check_quantization(weight, quantization)
    levels, codes = quantization.levels, quantization.codes.flatten(1)
    if levels == 2:
        planes = codes.unsqueeze(0)
    elif levels == 3:  # codes 0, 1, 2 as bits (0, 0), (1, 0), (1, 1)
        planes = torch.stack([codes >= 1, codes >= 2]).to(torch.uint8)
    else:
        planes = torch.stack([codes >> i & 1 for i in range(levels.bit_length() - 1)])
    bits = pack_signs(planes.to(torch.float32) - 0.5)
    scale = quantization.max_level.detach().to(torch.float32) / (levels - 1)
    return (bits[0].clone() if levels == 2 else bits), scale


def _projected(p: Tensor, quantization: _Quantization) -> Tensor:
    """The levels as weights of the shape and type of ``p``."""
    levels, max_level = quantization.levels, quantization.max_level.to(torch.float32)
    codes = quantization.codes.flatten(1) if p.dim() > 1 else quantization.codes.reshape(1, -1)
    if quantization.group_size:
        max_level = max_level.repeat_interleave(quantization.group_size, dim=1)[:, : codes.shape[1]]
    elif max_level.numel() > 1:
        max_level = max_level.unsqueeze(-1)
    return (max_level * (2 * codes.to(torch.float32) / (levels - 1) - 1)).view(p.shape).to(p.dtype)


def _skeleton(
    layer: nn.Module, levels: int, scale: str, group_size: int, compute: str, activation: str, bias: bool
) -> BinaryLinear | BinaryConv2d:
    """The packed module that stands for ``layer``, without memory."""
    if type(layer) is nn.Linear:
        return BinaryLinear(
            layer.in_features,
            layer.out_features,
            bias,
            levels=levels,
            scale=scale,
            group_size=group_size,
            compute=compute,
            activation=activation,
            device="meta",
        )
    assert type(layer) is nn.Conv2d
    return BinaryConv2d.like(
        layer,
        levels=levels,
        scale=scale,
        group_size=group_size,
        compute=compute,
        activation=activation,
        bias=bias,
    )


def pack(
    model: nn.Module, opt: _Optimizer, *, compute: str = "auto", fold_batchnorm: bool = False
) -> nn.Module:
    """A copy of ``model`` in which every Linear and Conv2d whose weight ``opt`` quantises is packed.

    Args:
        model: any module, itself a Linear included; it is not changed.
        opt: an optimizer of this package; ``opt.quantization(weight)`` gives levels, codes and scales.
        compute: "auto" (which is "exact"), "exact", "bf16" or "int8", for all packed layers.
        fold_batchnorm: take a BatchNorm1d or BatchNorm2d (its running statistics) that follows a packed layer into its
            scale and bias, and a following ReLU, GELU or SiLU module into its epilogue; quantopt.folding.Folded stands
            where they were. The model must be in evaluation mode. Only modules that follow the layer wherever forward
            calls it, with and without its optional arguments, and nothing else, are folded: not a ReLU after an
            addition, not one that is shared or a function. Other methods that call them, and tests by isinstance,
            cannot be seen.
            BatchNorm1d after a Linear takes [batch, features] alone: other inputs are then an error. A model that
            torch.fx cannot trace is left unfolded, with a warning that gives the reason.

    Layers and weights that are shared stay shared. A quantised weight of any other kind of layer keeps its type, with
    the projected values. The outputs are those of the model inside ``opt.quantized()``, to rounding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not callable(getattr(opt, "quantization", None)):
        raise TypeError(f"opt must be an optimizer of quantopt, not {type(opt).__name__}")
    compute_mode(compute)
    if not isinstance(fold_batchnorm, bool):
        raise TypeError(f"fold_batchnorm must be True or False, not {fold_batchnorm!r}")
    quantizations: dict[int, Any] = {}
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    replaced: dict[
        int, Any
    ] = {}  # id of a layer -> its packed form: deepcopy takes it wherever the layer occurs

    def quantization_of(p: nn.Parameter) -> Any:
        if id(p) not in quantizations:
            quantizations[id(p)] = opt.quantization(p)
        return quantizations[id(p)]

    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) in (nn.Linear, nn.Conv2d)
        and isinstance(module.weight, nn.Parameter)
        and quantization_of(module.weight) is not None
    ]
    chains = {id(c.layer): c for c in folding.find_chains(model, layers)} if fold_batchnorm and layers else {}
    for module in layers:
        weight: Any = module.weight
        quantization = quantization_of(weight)
        if id(weight) not in tensors:
            tensors[id(weight)] = _weight_tensors(weight, quantization)
        bits, scale = tensors[id(weight)]
        bias = module.bias if isinstance(module.bias, Tensor) else None
        _, norm, activation = chains.get(id(module), (module, None, None))
        if norm is not None:
            bits, scale, bias = folding.fold(bits, scale, bias, weight[0].numel(), norm)
            if not bool(scale.isfinite().all()):
                name = next(n for n, m in model.named_modules() if m is norm)
                raise ValueError(
                    f"fold_batchnorm=True: the batch norm {name} gives a scale that is not finite; "
                    "see its weight and running_var"
                )
        kind = "group" if quantization.group_size else ("tensor" if scale.numel() == 1 else "channel")
        packed = _skeleton(
            module,
            quantization.levels,
            kind,
            quantization.group_size,
            compute,
            folding.activation_of(activation),
            bias is not None,
        )
        packed.set_weights(bits, scale, bias)
        replaced[id(module)] = packed.train(module.training)
        for gone in (norm, activation):
            if gone is not None:
                replaced[id(gone)] = folding.Folded(gone)
    result: nn.Module = copy.deepcopy(model, replaced)
    copies = dict(result.named_parameters(remove_duplicate=False))
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in copies and (quantization := quantization_of(p)) is not None:
            copies[name].data = _projected(p, quantization)
    return result


def _binary_layers(model: nn.Module) -> dict[str, BinaryLinear | BinaryConv2d]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BinaryLinear | BinaryConv2d)
    }


def _describe(module: BinaryLinear | BinaryConv2d) -> dict[str, Any]:
    fields = (
        ("in_features", "out_features")
        if isinstance(module, BinaryLinear)
        else ("in_channels", "out_channels", "kernel_size")
    )
    return {
        "type": type(module).__name__,
        **{field: getattr(module, field) for field in fields},
        "levels": module.levels,
        "scale": module.scale_kind,
        "group_size": module.group_size,
        "compute": module.compute,
        "activation": module.activation,
        "bias": module.bias is not None,
    }


def save(packed: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a packed model to ``path`` (safetensors), in one step: a file of that name is whole, old or new.

    Raises ValueError if nothing in ``packed`` is packed or :func:`load` would refuse a scale, OSError if the file
    cannot be written.
    """
    layers = _binary_layers(packed)
    if not layers:
        raise ValueError("the model has no packed layers: call quantopt.pack(model, opt) first")
    for name, layer in layers.items():
        if not bool((layer.scale.isfinite() & (layer.scale >= 0)).all()):
            raise ValueError(f"layer {name}: a scale is negative or not finite, which load refuses")
        spare = -layer.row_length % 8
        if spare and layer.bits.numel() and bool((layer.bits[..., -1] >> (8 - spare)).any()):
            raise ValueError(f"layer {name}: the spare bits of its rows are not 0, which load refuses")
        if layer.scale.dtype != torch.float32 or (
            layer.bias is not None and layer.bias.dtype != torch.float32
        ):
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
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


_LAYER_FIELDS = {
    "BinaryLinear": (nn.Linear, ("in_features", "out_features")),
    "BinaryConv2d": (nn.Conv2d, ("in_channels", "out_channels", "kernel_size")),
}
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
    """Checks a packed file against a model; every complaint names the file."""

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
        """The layer of ``model`` called ``name`` and its packed form as ``entry`` describes it."""
        if not isinstance(entry, dict) or entry.get("type") not in list(_LAYER_FIELDS):
            raise self.fail(f"layer {name}: not described as BinaryLinear or BinaryConv2d")
        kind, fields = _LAYER_FIELDS[entry["type"]]
        if set(entry) != {"type", "levels", "scale", "group_size", "compute", "activation", "bias", *fields}:
            raise self.fail(f"layer {name}: its description has the fields {sorted(entry)}")
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise self.fail(f"layer {name}: the model has no such layer") from None
        if isinstance(layer, BinaryLinear | BinaryConv2d):
            raise self.fail(f"layer {name}: the model is packed already; pass the float model")
        if type(layer) is not kind:
            raise self.fail(
                f"layer {name}: a {entry['type']} in the file, {type(layer).__name__} in the model"
            )
        for field in fields:
            ours = getattr(layer, field)
            ours = list(ours) if isinstance(ours, tuple) else ours
            if entry[field] != ours or isinstance(entry[field], bool):
                raise self.fail(f"layer {name}: {field} is {entry[field]!r} in the file, {ours} in the model")
        if not isinstance(entry["bias"], bool):
            raise self.fail(f"layer {name}: bias={entry['bias']!r} is not true or false")
        levels, group_size = entry["levels"], entry["group_size"]
        if type(levels) is not int or type(group_size) is not int or not 0 <= group_size < 2**31:
            raise self.fail(f"layer {name}: levels={levels!r}, group_size={group_size!r} are not sizes")
        try:
            return layer, _skeleton(
                layer,
                levels,
                entry["scale"],
                group_size,
                entry["compute"],
                entry["activation"],
                entry["bias"],
            )
        except (TypeError, ValueError) as error:
            raise self.fail(f"layer {name}: {error}") from None

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

    def check_weights(
        self, name: str, layer: BinaryLinear | BinaryConv2d, tensors: dict[str, Tensor]
    ) -> None:
        prefix = f"{name}." if name else ""
        spare = -layer.row_length % 8
        bits, scale = tensors[f"{prefix}bits"], tensors[f"{prefix}scale"]
        if spare and bits.numel() and (bits[..., -1] >> (8 - spare)).any():
            raise self.fail(f"tensor {prefix}bits: the spare bits of its rows are not 0")
        if not scale.isfinite().all():
            raise self.fail(f"tensor {prefix}scale: not finite")
        if (scale < 0).any():
            raise self.fail(f"tensor {prefix}scale: negative")


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The packed model saved at ``path``.

    Args:
        path: a file that :func:`save` wrote.
        model: the float model, freshly built; it gives the architecture, device and everything that is not in a file,
            and is not changed.

    The header, the names, types and shapes of all tensors, and the contents of the bits are checked before the packed
    copy is made. Raises :class:`PackedFileError` (a ValueError) naming the file and the tensor, OSError if the file
    cannot be read.
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
        reader.check_weights(name, packed, tensors)

    for name, packed in layers.items():
        prefix = f"{name}." if name else ""
        if not packed.bits.is_meta:
            continue  # a layer with two names
        device = model.get_submodule(name).weight.device
        bits, scale = tensors[f"{prefix}bits"].to(device), tensors[f"{prefix}scale"].to(device)
        bias = tensors.get(f"{prefix}bias")
        packed.set_weights(bits, scale, bias if bias is None else bias.to(device))
        packed.train(model.get_submodule(name).training)
    result: nn.Module = copy.deepcopy(model, replaced)
    result.load_state_dict(tensors)
    for layer in _binary_layers(result).values():  # those that share their bits saw them written again
        layer.prepare()
    return result


def _expected(model: nn.Module, replaced: dict[int, nn.Module]) -> dict[str, Tensor]:
    """The state_dict of the packed model: names, and tensors that have its types and shapes."""
    expected = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        if (packed := replaced.get(id(module))) is None:
            continue
        prefix = f"{name}." if name else ""
        expected = {key: tensor for key, tensor in expected.items() if not key.startswith(prefix)}
        expected |= {prefix + key: tensor for key, tensor in packed.state_dict().items()}
    return expected
