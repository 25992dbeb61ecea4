"""Packed copies of trained models."""

import contextlib
import copy
import warnings
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from quantopt.levels import Quantization
from quantopt.ops.inputs import compute_mode
from quantopt.ops.weights import pack_signs, plane_weights_of, planes_of_codes
from quantopt.optim.sharded import gathered, is_sharded
from quantopt.packing import folding
from quantopt.packing.layers import fault_of, skeleton
from quantopt.packing.sharded import has_result, is_sharded_model, together, unsharded
from quantopt.reference.levels import rows as matrix
from quantopt.reference.levels import spread_over
from quantopt.reference.reading import doubt_of, read_levels
from quantopt.selection import is_layer, is_transposed
from quantopt.wrappers import unwrapped, unwrapped_model


class _Optimizer(Protocol):
    def quantization(self, p: Any, /) -> Quantization | None: ...


class _Codes(NamedTuple):
    """A weight as level = scale * (2 code - (levels - 1)), in the shape of its parameter."""

    levels: int
    codes: Tensor  # uint8
    scale: Tensor  # float32 [1], [rows] or [rows, groups]
    group_size: int  # 0 unless the scales are per group


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


def _pack(codes: _Codes) -> "_Packed":
    return _Packed(codes.levels, _bits(codes), codes.scale, codes.group_size, codes.codes[0].numel())


class _Packed(NamedTuple):
    """What a packed layer is made of."""

    levels: int
    bits: Tensor
    scale: Tensor
    group_size: int
    row_length: int


class _Use(NamedTuple):
    """A module that has a parameter, and the name under which it does."""

    module_name: str
    module: nn.Module
    key: str

    @property
    def name(self) -> str:
        return _full(self.module_name, self.key)


# The codes of a parameter, of its transpose (that of a Conv1D, which may be tied to a Linear) under True.
_Forms = dict[bool, _Codes]


class _OptimizerLevels:
    """The codes that an optimizer gives."""

    reads = False

    def __init__(self, model: nn.Module, opt: Any, by_one: bool) -> None:
        """``by_one``: the codes are asked for parameter by parameter, so that no more than one is in memory."""
        self.params = list(model.parameters())
        self.groups: list[dict[str, Any]] = getattr(opt, "param_groups", [])
        quantised = {p for group in self.groups if group["bits"] != 0 for p in group["params"]}
        if not quantised.isdisjoint(self.params):
            _refuse_partial_copy(model, self.groups)
        at_once = hasattr(opt, "quantizations") and not by_one  # in one pass over the groups
        self.quantization = opt.quantizations().get if at_once else opt.quantization

    def of(self, p: nn.Parameter, uses: list[_Use]) -> _Forms:
        quantization = self.quantization(p)
        if quantization is None:
            return {}
        codes = _checked(p, quantization)
        if codes.scale.numel() == 1 and p.dim() == 2:  # scales per row would be per input
            return {False: codes, True: codes._replace(codes=codes.codes.t())}
        return {False: codes}

    def finish(self, found: bool) -> None:
        """Raises ValueError where no parameter of the model is quantised."""
        if found:
            return
        if self.groups and all(group["bits"] == 0 for group in self.groups):
            raise ValueError(
                "opt quantises nothing: all its groups have bits=0; make them with quantopt.param_groups(model)"
            )
        if self.groups and {p for group in self.groups for p in group["params"]}.isdisjoint(self.params):
            raise ValueError(
                "opt holds none of the parameters of the model, which is a copy, an average or a loaded model. Load "
                "its weights into the model that opt trains and pack that; or, if its weights lie on levels, call "
                "pack(model) without opt"
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


class _ReadLevels:
    """The codes that are read off weights that lie on levels."""

    reads = True

    def __init__(self) -> None:
        self.doubts: dict[
            str, list[str]
        ] = {}  # names of weights of which it is not sure that they lie on levels

    def of(self, p: nn.Parameter, uses: list[_Use]) -> _Forms:
        forms: _Forms = {}
        doubted: set[bool] = set()
        whole: Tensor | None = None
        for use in uses:
            transposed = is_transposed(use.module)
            if use.key != "weight" or isinstance(use.module, nn.Embedding) or p.dim() < 2:
                continue
            if transposed in forms or transposed in doubted:
                continue
            whole = gathered(p.detach()) if whole is None else whole
            w = whole.t() if transposed else whole
            reading = read_levels(w)
            if reading is not None:
                forms[transposed] = _Codes(reading.levels, reading.codes, reading.step, reading.group_size)
            elif not fault_of(use.module) and (doubt := doubt_of(w)):
                doubted.add(transposed)
                self.doubts.setdefault(doubt, []).append(use.name)
        return forms

    def finish(self, found: bool) -> None:
        """A warning names the layers of which it is in doubt whether their weights lie on levels. Raises ValueError if
        no weight does."""
        doubtful = "; ".join(f"{', '.join(names)}: {doubt}" for doubt, names in self.doubts.items())
        way = "pass the optimizer that trained the model, pack(model, opt), to pack"
        if not found and doubtful:
            raise ValueError(
                f"no weight of the model is sure to lie on levels. Some may, but are not told from float weights: "
                f"{doubtful}; {way} them"
            )
        if not found:
            raise ValueError(
                f"no weight of the model lies on 2, 3, 4, 8, 16 or 17 levels; {way} it. Without opt, weights are "
                "packed that were stored inside opt.quantized(), if there are enough for each scale to tell them from "
                "float weights"
            )
        if doubtful:
            warnings.warn(
                f"these layers stay as they are, since their weights may lie on levels but are not told from float "
                f"weights: {doubtful}; {way} them",
                stacklevel=4,
            )


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
    model: nn.Module,
    opt: _Optimizer | None = None,
    *,
    compute: str = "auto",
    fold_batchnorm: bool = False,
    all_ranks: bool = False,
) -> nn.Module | Any:  # None on some ranks of a sharded model alone
    """A copy of ``model`` in which every Linear, Conv1d and Conv2d with a quantised weight is packed.

    Args:
        model: any module, itself a Linear included; it is not changed. Of one in the wrappers of
            DistributedDataParallel and torch.compile, the module within is copied.
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
        all_ranks: of a sharded model (FSDP2, tensor parallelism: parameters are DTensors), whether all ranks get the
            packed copy. By default the first rank of their mesh gets it (the one with the coordinates 0: rank 0, or of
            a pipeline the first rank of each stage), and **the others get None**. Of any other model, each process gets
            the copy of its own.

    All ranks of a sharded model call this together. Its parameters are gathered one by one, so no rank has more than
    one of them whole, beside the packed copy; buffers, such as the statistics of batch norms, are those of the rank.
    The copy has no hooks of fully_shard, parallelize_module and torch's other composable functions, and is a model of
    one process. Where one rank cannot make it, all of them raise an error.

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
    if not isinstance(all_ranks, bool):
        raise TypeError(f"all_ranks must be True or False, not {all_ranks!r}")
    model = unwrapped_model(model)
    sharded = is_sharded_model(model)
    kept = not sharded or has_result(model, all_ranks)
    with unsharded(model):
        _refuse_computed(model)
        levels = _ReadLevels() if opt is None else _OptimizerLevels(model, opt, by_one=sharded)
        contents = _contents(model, levels, kept)
        foldable = [use.module for use in contents.layers if isinstance(use.module, nn.Linear | nn.Conv2d)]
        chains = folding.find_chains(model, foldable) if fold_batchnorm and foldable else []
        by_layer = {id(chain.layer): chain for chain in chains}
        with together(model) if sharded else contextlib.nullcontext():
            packed = _copy(model, contents, by_layer, compute) if kept else None
    return packed


class _Contents(NamedTuple):
    """What goes into the packed copy of a model."""

    layers: list[_Use]  # whose weights are packed
    packed: dict[tuple[nn.Parameter, bool], _Packed]  # the weights, and their transposes
    values: dict[int, Any]  # by the ids of other tensors of the model: what takes their place in the copy
    left: dict[str, list[str]]  # why quantised weights are not packed, with their names


def _contents(model: nn.Module, levels: _OptimizerLevels | _ReadLevels, kept: bool) -> _Contents:
    """One parameter after the other is looked at, gathered if it is sharded, and left. ``kept``: whether a copy is made
    of what is found, which goes through all else in any case, as ranks do this together."""
    uses: dict[nn.Parameter, list[_Use]] = {}
    contents = _Contents([], {}, {}, {})
    for module_name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                uses.setdefault(p, []).append(_Use(module_name, module, key))
        for buffer in module._buffers.values():
            if is_sharded(buffer):
                contents.values[id(buffer)] = gathered(buffer.detach()).clone()
    for p, users in uses.items():
        forms = levels.of(p, users)
        whole = not forms  # whether p itself is in the copy
        for use in users if forms else ():
            if levels.reads and isinstance(use.module, nn.Embedding):
                whole = True
            elif fault := _fault(use, forms):
                contents.left.setdefault(fault, []).append(use.name)
                whole = True
            else:
                contents.layers.append(use)
                key = p, is_transposed(use.module)
                if kept and key not in contents.packed:
                    contents.packed[key] = _pack(forms[key[1]])
        if not whole:
            continue
        value = None
        if forms and not levels.reads:
            value = _projected(p, forms[False])
        elif is_sharded(p):
            value = gathered(p.detach()).clone()
        if kept and value is not None:
            contents.values[id(p)] = _like(p, value)
    levels.finish(bool(contents.layers or contents.left))
    reasons = "; ".join(f"{', '.join(named)}: {fault}" for fault, named in contents.left.items())
    if not contents.layers:
        raise ValueError(f"no quantised weight of the model can be packed: {reasons}")
    if contents.left:
        kept_as = "stay as they are" if levels.reads else "keep their type and get their projected values"
        warnings.warn(f"these quantised weights are not packed and {kept_as}: {reasons}", stacklevel=3)
    return contents


def _fault(use: _Use, forms: _Forms) -> str:
    """Why a quantised weight is not packed, "" if it is."""
    fault = fault_of(use.module) if use.key == "weight" else "not the weight of a layer"
    if fault or is_transposed(use.module) in forms:
        return fault
    if is_transposed(use.module):
        return (
            "a Conv1D with a scale for each input (call quantopt.nn.conv1d_to_linear(model) before the optimizer is "
            "made)"
        )
    return "tied to a Conv1D, with a scale for each input"


def _like(p: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A parameter with ``value`` that has what else ``p`` has."""
    if is_sharded(p):
        return nn.Parameter(value, p.requires_grad)
    copied = copy.deepcopy(p)
    copied.data = value
    return copied


def _copy(model: nn.Module, contents: _Contents, chains: dict[int, folding.Chain], compute: str) -> nn.Module:
    """The packed copy of ``model``."""
    replaced = dict(contents.values)  # deepcopy's memo: it takes the packed layer wherever the layer occurs
    for use in contents.layers:
        module: Any = use.module
        levels, bits, scale, group_size, row_length = contents.packed[module.weight, is_transposed(module)]
        bias = contents.values.get(id(module.bias), module.bias)
        if not isinstance(bias, Tensor):  # False, in some layers
            bias = None
        _, norm, activation = chains.get(id(module), (module, None, None))
        if norm is not None:
            norm_here = copy.deepcopy(norm, dict(contents.values))
            bits, scale, bias = folding.fold(bits, scale, bias, row_length, norm_here)
            if not bool(scale.isfinite().all()):
                name = next(n for n, m in model.named_modules() if m is norm)
                raise ValueError(
                    f"fold_batchnorm=True: the batch norm {name} gives a scale that is not finite; "
                    "see its weight and running_var"
                )
        packed = skeleton(
            module,
            bias=bias is not None,
            levels=levels,
            scale="group" if group_size else ("tensor" if scale.numel() == 1 else "channel"),
            group_size=group_size,
            compute=compute,
            activation=folding.activation_of(activation),
        )
        replaced[id(module)] = packed.set_weights(bits, scale, bias)
        for folded in (norm, activation):
            if folded is not None:
                replaced[id(folded)] = folding.Folded(folded)
    result: nn.Module = copy.deepcopy(model, replaced)
    if callable(getattr(result, "save_pretrained", None)):
        vars(result)["save_pretrained"] = _refuse_to_save
    return result


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of the method of transformers, which would write tensors that from_pretrained does not know: it would
    make layers with random weights."""
    raise ValueError(
        "a packed model is written by quantopt.integrations.transformers.save_pretrained(packed, directory), or by its "
        "own method after quantopt.integrations.transformers.prepare(packed)"
    )
