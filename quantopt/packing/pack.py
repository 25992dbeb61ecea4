"""Packed copies of trained models."""

import copy
import warnings
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from quantopt.levels import Quantization
from quantopt.ops.inputs import compute_mode
from quantopt.ops.weights import pack_signs, plane_weights_of
from quantopt.packing import folding
from quantopt.packing.layers import fault_of, skeleton
from quantopt.reference.levels import rows as matrix
from quantopt.reference.levels import spread_over
from quantopt.reference.reading import MIN_WEIGHTS, read_levels
from quantopt.selection import is_transposed
from quantopt.wrappers import unwrapped


class _Optimizer(Protocol):
    def quantization(self, p: Any, /) -> Quantization | None: ...


class _Codes(NamedTuple):
    """A weight as level = scale * (2 code - (levels - 1)), in the shape of its parameter."""

    levels: int
    codes: Tensor  # uint8
    scale: Tensor  # float32 [1], [rows] or [rows, groups]
    group_size: int  # 0 unless the scales are per group

    def transposed(self) -> "_Codes":
        """The same of the transposed matrix; it must have one scale."""
        return self._replace(codes=self.codes.t())


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
    levels, codes = weight.levels, weight.codes.flatten(1)
    if levels == 2:
        planes = codes.unsqueeze(0)
    elif levels == 3:  # codes 0, 1, 2 as bits (0, 0), (1, 0), (1, 1)
        planes = torch.stack([codes >= 1, codes >= 2]).to(torch.uint8)
    else:
        planes = torch.stack([codes >> i & 1 for i in range(levels.bit_length() - 1)])
    bits = pack_signs(planes.to(torch.float32) - 0.5)
    return bits[0].clone() if levels == 2 else bits


def _projected(p: Tensor, weight: _Codes) -> Tensor:
    """The projected weights, in the shape and dtype of ``p``."""
    odd = 2 * weight.codes.to(torch.float32) - (weight.levels - 1)
    return (spread_over(weight.scale, odd, weight.group_size) * odd).to(p.dtype)


def _quantised_by(model: nn.Module, opt: Any) -> dict[nn.Parameter, _Codes]:
    """The parameters of ``model`` that ``opt`` quantises. Raises ValueError if there are none."""
    params = list(model.parameters())
    every = opt.quantizations() if hasattr(opt, "quantizations") else {}  # in one pass over the groups
    found = {p: every[p] for p in params if p in every}
    if not found:
        found = {p: q for p in params if (q := opt.quantization(p)) is not None}
    if found:
        return {p: _checked(p, quantization) for p, quantization in found.items()}
    groups = getattr(opt, "param_groups", [])
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


def _on_levels(model: nn.Module) -> dict[nn.Parameter, _Codes]:
    """The weights of ``model`` that lie on levels. Raises ValueError if there are none."""
    found: dict[nn.Parameter, _Codes] = {}
    for module in model.modules():
        p = module._parameters.get("weight")
        if p is None or p in found or isinstance(module, nn.Embedding) or p.dim() < 2:
            continue
        reading = read_levels(p.t() if is_transposed(module) else p)
        if reading is not None:
            found[p] = _Codes(reading.levels, reading.codes, reading.step, reading.group_size)
    if not found:
        raise ValueError(
            f"no weight of the model lies on 2, 3, 4, 8 or 16 levels, with {MIN_WEIGHTS} weights or more for each "
            "scale: pass the optimizer that trains it, pack(model, opt), or save the weights inside opt.quantized()"
        )
    return found


def pack(
    model: nn.Module, opt: _Optimizer | None = None, *, compute: str = "auto", fold_batchnorm: bool = False
) -> nn.Module:
    """A copy of ``model`` in which every Linear, Conv1d and Conv2d with a quantised weight is packed.

    Args:
        model: any module, itself a Linear included; it is not changed.
        opt: the optimizer of this package that trains ``model``, also in the wrappers of accelerate and Lightning.
            None: the levels are read off the weights, for models whose weights were stored inside
            ``opt.quantized()``. What lies on 2, 3, 4, 8 or 16 uniform levels, with one scale for the tensor, a row or
            a group of a row, at least 8 weights for each and weights of both signs, is packed with the fewest levels;
            the rest stays as it is (:func:`quantopt.reference.reading.read_levels`).
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
            ``opt``, no weight lies on levels.
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
    quantised = _on_levels(model) if opt is None else _quantised_by(model, opt)
    layers = _packable(model, quantised, read=opt is None)
    foldable = [layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    chains = (
        {id(c.layer): c for c in folding.find_chains(model, foldable)} if fold_batchnorm and foldable else {}
    )
    tensors: dict[Tensor, Tensor] = {}
    replaced: dict[int, Any] = {}  # deepcopy's memo: it takes the packed layer wherever the layer occurs
    for module in layers:
        weight: Tensor = module.weight
        codes = quantised[module.weight]
        if opt is not None and is_transposed(module):
            codes = codes.transposed()
        if weight not in tensors:
            tensors[weight] = _bits(codes)
        bits, scale = tensors[weight], codes.scale
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
            if name in copies and p in quantised:
                copies[name].data = _projected(p, quantised[p])
    return result


def _packable(model: nn.Module, quantised: dict[nn.Parameter, _Codes], read: bool) -> list[Any]:
    """The layers that are packed. A warning names the quantised weights that none of them has, with the reasons.

    ``read``: the codes of a transposed weight are those of its transpose."""
    layers: list[nn.Module] = []
    faults: dict[nn.Parameter, str] = {}
    names: dict[nn.Parameter, str] = {}
    for module_name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is None or p not in quantised:
                continue
            names.setdefault(p, f"{module_name}.{key}".lstrip("."))
            fault = fault_of(module) if key == "weight" else "not the weight of a layer"
            if not fault and not read and is_transposed(module) and quantised[p].scale.numel() > 1:
                fault = (
                    "a Conv1D with a scale for each input (call quantopt.nn.conv1d_to_linear(model) before the "
                    "optimizer is made)"
                )
            if fault:
                faults.setdefault(p, fault)
            else:
                layers.append(module)
    packed = {layer._parameters["weight"] for layer in layers}
    left: dict[str, list[str]] = {}
    for p, fault in faults.items():
        if p not in packed:
            left.setdefault(fault, []).append(names[p])
    reasons = "; ".join(f"{', '.join(named)}: {fault}" for fault, named in left.items())
    if not layers:
        raise ValueError(f"no quantised weight of the model can be packed: {reasons}")
    if left:
        kept = "stay as they are" if read else "keep their type and get their projected values"
        warnings.warn(f"these quantised weights are not packed and {kept}: {reasons}", stacklevel=3)
    return layers
