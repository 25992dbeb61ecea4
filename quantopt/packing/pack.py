"""Packed copies of trained models."""

import copy
import warnings
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from quantopt.levels import Quantization
from quantopt.ops.inputs import compute_mode
from quantopt.ops.weights import pack_signs, plane_weights_of, planes_of_codes
from quantopt.packing import folding
from quantopt.packing.layers import fault_of, skeleton
from quantopt.reference.levels import rows as matrix
from quantopt.reference.levels import spread_over
from quantopt.reference.reading import doubt_of, read_levels
from quantopt.selection import is_layer, is_transposed
from quantopt.wrappers import unwrapped


class _Optimizer(Protocol):
    def quantization(self, p: Any, /) -> Quantization | None: ...


class _Codes(NamedTuple):
    """A weight as level = scale * (2 code - (levels - 1)), in the shape of its parameter."""

    levels: int
    codes: Tensor  # uint8
    scale: Tensor  # float32 [1], [rows] or [rows, groups]
    group_size: int  # 0 unless the scales are per group


# The codes of a parameter and, with True, of its transpose: that of a Conv1D, which may be tied to a Linear.
_Key = tuple[nn.Parameter, bool]


def _checked(weight: Tensor, quantization: Quantization) -> _Codes:
    levels, codes, max_level = quantization.levels, quantization.codes, quantization.max_level
    plane_weights_of(levels)
    if codes.dtype != torch.uint8 or codes.shape != weight.shape:
        raise ValueError(
            f"opt.quantization gives codes {codes.dtype} {list(codes.shape)} for a weight {list(weight.shape)}: "
            "uint8 of the same shape are needed"
        )
    if codes.numel() and int(codes.max()) >= levels:
        raise ValueError(f"opt.quantization gives the code {int(codes.max())} of only {levels} levels")
    rows, length = matrix(codes).shape
    groups = -(-length // quantization.group_size) if quantization.group_size else 0
    if list(max_level.shape) not in ([[rows, groups]] if groups else [[1], [rows]]):
        raise ValueError(
            f"opt.quantization gives max_level {list(max_level.shape)} for codes {list(codes.shape)} "
            f"and group_size={quantization.group_size}"
        )
    if not bool((max_level.isfinite() & (max_level >= 0)).all()):
        raise ValueError("opt.quantization gives a scale that is negative or not finite: nothing to pack")
    scale = max_level.detach().to(torch.float32) / (levels - 1)
    return _Codes(levels, codes, scale, quantization.group_size)


def _bits(weight: _Codes) -> Tensor:
    """The bits of plane i are the signs s_i in level = scale * sum_i weight_i s_i."""
    bits = pack_signs(planes_of_codes(weight.codes.flatten(1), weight.levels).to(torch.float32) - 0.5)
    return bits[0].clone() if weight.levels == 2 else bits


def _projected(p: Tensor, weight: _Codes) -> Tensor:
    """The projected weights, in the shape and dtype of ``p``."""
    odd = 2 * weight.codes.to(torch.float32) - (weight.levels - 1)
    return (spread_over(weight.scale, odd, weight.group_size) * odd).to(p.dtype)


def _key(module: nn.Module, p: nn.Parameter) -> _Key:
    return p, is_transposed(module)


def _quantised_by(model: nn.Module, opt: Any) -> dict[_Key, _Codes]:
    """The parameters of ``model`` that ``opt`` quantises. Raises ValueError if there are none, or if the model has some
    of them and weights besides that ``opt`` does not know."""
    params = list(model.parameters())
    every = opt.quantizations() if hasattr(opt, "quantizations") else {}  # in one pass over the groups
    found = {p: every[p] for p in params if p in every}
    if not found:
        found = {p: q for p in params if (q := opt.quantization(p)) is not None}
    groups = getattr(opt, "param_groups", [])
    if found:
        _refuse_partial_copy(model, groups)
        codes: dict[_Key, _Codes] = {}
        for p, quantization in found.items():
            codes[p, False] = checked = _checked(p, quantization)
            if checked.scale.numel() == 1 and p.dim() == 2:  # scales per row would be per input
                codes[p, True] = checked._replace(codes=checked.codes.t())
        return codes
    if groups and all(group["bits"] == 0 for group in groups):
        raise ValueError(
            "opt quantises nothing: all its groups have bits=0; make them with quantopt.param_groups(model)"
        )
    if groups and {p for group in groups for p in group["params"]}.isdisjoint(params):
        raise ValueError(
            "opt holds none of the parameters of the model, which is a copy, an average or a loaded model. Load its "
            "weights into the model that opt trains and pack that; or, if its weights lie on levels, call pack(model) "
            "without opt"
        )
    raise ValueError(
        "opt quantises no parameter of the model; make its groups with quantopt.param_groups(model)"
    )


def _refuse_partial_copy(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where ``model`` lacks parameters that are quantised, and has weights in their place that are in
    no group. A part of the model that was trained has weights of the groups, or frozen ones."""
    own, known = set(model.parameters()), {p for group in groups for p in group["params"]}
    missing = [
        group["param_names"][i] if "param_names" in group else "x".join(map(str, p.shape))
        for group in groups
        if group["bits"] != 0
        for i, p in enumerate(group["params"])
        if p not in own
    ]
    unknown = [
        _full(name, "weight")
        for name, module in model.named_modules()
        if is_layer(module)
        and (p := module._parameters.get("weight")) is not None
        and p not in known
        and p.requires_grad
    ]
    if missing and unknown:
        raise ValueError(
            f"opt quantises parameters that the model does not have ({_some(missing)}), and the model has weights that "
            f"are in no group of opt ({_some(unknown)}): it is in part a copy of the model that opt trains, or weights "
            "were replaced after opt was made. Pack the model that opt trains"
        )


def _full(module_name: str, key: str) -> str:
    return f"{module_name}.{key}".lstrip(".")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _on_levels(model: nn.Module) -> dict[_Key, _Codes]:
    """The weights of ``model`` that lie on levels. A warning names the layers of which that is in doubt. Raises
    ValueError if no weight lies on levels."""
    found: dict[_Key, _Codes] = {}
    doubts: dict[_Key, tuple[str, str]] = {}
    for name, module in model.named_modules():
        p = module._parameters.get("weight")
        if p is None or isinstance(module, nn.Embedding) or p.dim() < 2:
            continue
        key = _key(module, p)
        if key in found or key in doubts:
            continue
        w = p.t() if key[1] else p
        reading = read_levels(w)
        if reading is not None:
            found[key] = _Codes(reading.levels, reading.codes, reading.step, reading.group_size)
        elif not fault_of(module) and (doubt := doubt_of(w)):
            doubts[key] = (_full(name, "weight"), doubt)
    reasons: dict[str, list[str]] = {}
    for full, doubt in doubts.values():
        reasons.setdefault(doubt, []).append(full)
    doubtful = "; ".join(f"{', '.join(names)}: {doubt}" for doubt, names in reasons.items())
    way = "pass the optimizer that trained the model, pack(model, opt), to pack"
    if not found and doubts:
        raise ValueError(
            f"no weight of the model is sure to lie on levels. Some may, but are not told from float weights: "
            f"{doubtful}; {way} them"
        )
    if not found:
        raise ValueError(
            f"no weight of the model lies on 2, 3, 4, 8, 16 or 17 levels; {way} it. Without opt, weights are packed "
            "that were stored inside opt.quantized(), if there are enough for each scale to tell them from float "
            "weights"
        )
    if doubts:
        warnings.warn(
            f"these layers stay as they are, since their weights may lie on levels but are not told from float "
            f"weights: {doubtful}; {way} them",
            stacklevel=3,
        )
    return found


def _refuse_computed(model: nn.Module) -> None:
    """Raises ValueError for tensors with a graph, which hooks put in the place of parameters: they cannot be copied."""
    for name, module in model.named_modules():
        for key, value in {**module._buffers, **vars(module)}.items():
            if not isinstance(value, Tensor) or value.is_leaf:
                continue
            known = (*module._parameters, *module._buffers)
            layer = name or "the model"
            if f"{key}_g" in known:
                way = f"call torch.nn.utils.remove_weight_norm(layer, {key!r})"
            elif f"{key}_mask" in known:
                way = f"call torch.nn.utils.prune.remove(layer, {key!r})"
            elif f"{key}_orig" in known:
                way = f"call torch.nn.utils.remove_spectral_norm(layer, {key!r})"
            else:
                way = "detach or delete it"
            raise ValueError(
                f"{_full(name, key)} is computed from other tensors and part of a graph, so that {layer} cannot be "
                f"copied: {way} first"
            )


def pack(
    model: nn.Module, opt: _Optimizer | None = None, *, compute: str = "auto", fold_batchnorm: bool = False
) -> nn.Module:
    """A copy of ``model`` in which every Linear, Conv1d and Conv2d with a quantised weight is packed.

    Args:
        model: any module, itself a Linear included; it is not changed.
        opt: the optimizer of this package that trains ``model``, also in the wrappers of accelerate and Lightning.
            None: the levels are read off the weights, for models whose weights were stored inside
            ``opt.quantized()``. What lies on 2, 3, 4, 8, 16 or 17 uniform levels, with one scale for the tensor, a row
            or a group of a row, at least 8 weights for each (and 4, of 17 levels 6, that are not zero, in the mean)
            and weights of both signs, is packed with the fewest levels
            (:func:`quantopt.reference.reading.read_levels`). The rest stays as it is; a warning names the layers that
            fit levels with less evidence than that. A layer with one weight for each scale fits in any case and is not
            named.
        compute: "auto" (which is "exact"), "exact", "bf16" or "int8", for all packed layers.
        fold_batchnorm: fold a BatchNorm1d or BatchNorm2d (its running statistics) that follows a packed layer into the
            layer's scale and bias, and a following ReLU, GELU or SiLU module into its epilogue. A folded module is
            replaced by quantopt.packing.folding.Folded. The model must be in evaluation mode.
            A module is folded only if it follows the layer at each of its calls in forward, with and without the
            optional arguments of forward, and follows nothing else. So a ReLU after an addition, a shared one, and one
            that is called as a function are not folded. torch.fx does not see calls from other methods than forward,
            nor tests by isinstance.
            A BatchNorm1d folded into a Linear takes [batch, features] only: other inputs are then an error. A model
            that torch.fx cannot trace is not folded, with a warning that gives the reason. Nothing is folded into a
            Conv1d.

    Subclasses that keep the forward of their base are packed too, as out_proj of MultiheadAttention, and the Conv1D of
    the transformers library if it has one scale. Shared layers and shared weights stay shared, and hooks of a layer are
    kept. A quantised weight of another kind of layer keeps its dtype and gets the projected values, and a warning names
    it with the reason. :func:`quantopt.packing.table` shows what is packed. The outputs equal those of the model inside
    ``opt.quantized()``, up to rounding.

    Raises:
        TypeError: an argument of another kind.
        ValueError: nothing is packed: ``opt`` quantises no weight of the model, or none that can be packed; without
            ``opt``, no weight lies on levels. Or ``model`` has a part of the weights that ``opt`` quantises, and others
            that ``opt`` does not know, as a copy in part; or a hook computes a weight (weight_norm, prune).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    opt = unwrapped(opt)
    if opt is not None and not callable(getattr(opt, "quantization", None)):
        raise TypeError(f"opt must be an optimizer of quantopt, not {type(opt).__name__}")
    compute_mode(compute)
    if not isinstance(fold_batchnorm, bool):
        raise TypeError(f"fold_batchnorm must be True or False, not {fold_batchnorm!r}")
    for name, p in model.named_parameters():
        if hasattr(p, "to_local"):
            raise ValueError(
                f"{name} is sharded over ranks (DTensor), and a packed model is on one: inside opt.quantized() take "
                "the whole state_dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True), load it into a model that is not sharded, and call pack(model) on that"
            )
    _refuse_computed(model)
    quantised = _on_levels(model) if opt is None else _quantised_by(model, opt)
    layers = _packable(model, quantised, read=opt is None)
    foldable = [layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    chains = (
        {id(c.layer): c for c in folding.find_chains(model, foldable)} if fold_batchnorm and foldable else {}
    )
    tensors: dict[_Key, Tensor] = {}
    replaced: dict[int, Any] = {}  # deepcopy's memo: it takes the packed layer wherever the layer occurs
    for module in layers:
        key = _key(module, module.weight)
        codes = quantised[key]
        if key not in tensors:
            tensors[key] = _bits(codes)
        bits, scale = tensors[key], codes.scale
        bias = module.bias if isinstance(module.bias, Tensor) else None
        _, norm, activation = chains.get(id(module), (module, None, None))
        if norm is not None:
            bits, scale, bias = folding.fold(bits, scale, bias, codes.codes[0].numel(), norm)
            if not bool(scale.isfinite().all()):
                name = next(n for n, m in model.named_modules() if m is norm)
                raise ValueError(
                    f"fold_batchnorm=True: the batch norm {name} gives a scale that is not finite; "
                    "see its weight and running_var"
                )
        packed = skeleton(
            module,
            bias=bias is not None,
            levels=codes.levels,
            scale="group" if codes.group_size else ("tensor" if scale.numel() == 1 else "channel"),
            group_size=codes.group_size,
            compute=compute,
            activation=folding.activation_of(activation),
        )
        replaced[id(module)] = packed.set_weights(bits, scale, bias)
        for folded in (norm, activation):
            if folded is not None:
                replaced[id(folded)] = folding.Folded(folded)
    result: nn.Module = copy.deepcopy(model, replaced)
    if opt is not None:
        copies = dict(result.named_parameters(remove_duplicate=False))
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in copies and (p, False) in quantised:
                copies[name].data = _projected(p, quantised[p, False])
    return result


def _packable(model: nn.Module, quantised: dict[_Key, _Codes], read: bool) -> list[Any]:
    """The layers that are packed. A warning names the others that have a quantised weight, with the reasons.

    ``read``: the codes are those of weights that lie on levels."""
    params = {p for p, _ in quantised}
    layers: list[nn.Module] = []
    left: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is None or p not in params or (read and isinstance(module, nn.Embedding)):
                continue
            fault = fault_of(module) if key == "weight" else "not the weight of a layer"
            if not fault and _key(module, p) not in quantised:
                fault = (
                    "a Conv1D with a scale for each input (call quantopt.nn.conv1d_to_linear(model) before the "
                    "optimizer is made)"
                    if is_transposed(module)
                    else "tied to a Conv1D, with a scale for each input"
                )
            if fault:
                left.setdefault(fault, []).append(_full(module_name, key))
            else:
                layers.append(module)
    reasons = "; ".join(f"{', '.join(named)}: {fault}" for fault, named in left.items())
    if not layers:
        raise ValueError(f"no quantised weight of the model can be packed: {reasons}")
    if left:
        kept = "stay as they are" if read else "keep their type and get their projected values"
        warnings.warn(f"these quantised weights are not packed and {kept}: {reasons}", stacklevel=3)
    return layers
