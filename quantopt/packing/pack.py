"""Packed copies of trained models."""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantopt.levels import Quantization
from quantopt.nn import BinaryConv2d, BinaryLinear
from quantopt.ops.inputs import compute_mode
from quantopt.ops.weights import pack_signs, plane_weights_of
from quantopt.packing import folding


class _Optimizer(Protocol):
    def quantization(self, p: Any, /) -> Quantization | None: ...


def _check_quantization(weight: Tensor, quantization: Quantization) -> None:
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


def _weight_tensors(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """(bits, scale) with level = scale * sum_i weight_i s_i, where s_i = ±1 is the sign in plane i."""
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


def _projected(p: Tensor, quantization: Quantization) -> Tensor:
    """The projected weights, in the shape and dtype of ``p``."""
    levels, max_level = quantization.levels, quantization.max_level.to(torch.float32)
    codes = quantization.codes.flatten(1) if p.dim() > 1 else quantization.codes.reshape(1, -1)
    if quantization.group_size:
        max_level = max_level.repeat_interleave(quantization.group_size, dim=1)[:, : codes.shape[1]]
    elif max_level.numel() > 1:
        max_level = max_level.unsqueeze(-1)
    return (max_level * (2 * codes.to(torch.float32) / (levels - 1) - 1)).view(p.shape).to(p.dtype)


def skeleton(layer: nn.Module, *, bias: bool, **options: Any) -> BinaryLinear | BinaryConv2d:
    """The packed module that takes the place of ``layer``, on the meta device.

    options: levels, scale, group_size, compute and activation of the packed module.
    """
    if type(layer) is nn.Linear:
        return BinaryLinear(layer.in_features, layer.out_features, bias, device="meta", **options)
    assert type(layer) is nn.Conv2d
    return BinaryConv2d.like(layer, bias=bias, **options)


def _quantizations(model: nn.Module, opt: _Optimizer) -> dict[Tensor, Quantization]:
    """The parameters of ``model`` that ``opt`` quantises, each asked for once."""
    return {p: q for p in model.parameters() if (q := opt.quantization(p)) is not None}


def pack(
    model: nn.Module, opt: _Optimizer, *, compute: str = "auto", fold_batchnorm: bool = False
) -> nn.Module:
    """A copy of ``model`` in which every Linear and Conv2d whose weight ``opt`` quantises is packed.

    Args:
        model: any module, itself a Linear included; it is not changed.
        opt: an optimizer of this package; ``opt.quantization(weight)`` gives levels, codes and scales.
        compute: "auto" (which is "exact"), "exact", "bf16" or "int8", for all packed layers.
        fold_batchnorm: fold a BatchNorm1d or BatchNorm2d (its running statistics) that follows a packed layer into the
            layer's scale and bias, and a following ReLU, GELU or SiLU module into its epilogue. A folded module is
            replaced by quantopt.packing.folding.Folded. The model must be in evaluation mode.
            A module is folded only if it follows the layer at each of its calls in forward, with and without the
            optional arguments of forward, and follows nothing else. So a ReLU after an addition, a shared one, and one
            that is called as a function are not folded. torch.fx does not see calls from other methods than forward,
            nor tests by isinstance.
            A BatchNorm1d folded into a Linear takes [batch, features] only: other inputs are then an error. A model
            that torch.fx cannot trace is not folded, with a warning that gives the reason.

    Shared layers and shared weights stay shared. A quantised weight of another kind of layer keeps its dtype and gets
    the projected values. The outputs equal those of the model inside ``opt.quantized()``, up to rounding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not callable(getattr(opt, "quantization", None)):
        raise TypeError(f"opt must be an optimizer of quantopt, not {type(opt).__name__}")
    compute_mode(compute)
    if not isinstance(fold_batchnorm, bool):
        raise TypeError(f"fold_batchnorm must be True or False, not {fold_batchnorm!r}")
    quantizations = _quantizations(model, opt)
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) in (nn.Linear, nn.Conv2d)
        and isinstance(module.weight, nn.Parameter)
        and module.weight in quantizations
    ]
    chains = {id(c.layer): c for c in folding.find_chains(model, layers)} if fold_batchnorm and layers else {}
    tensors: dict[Tensor, tuple[Tensor, Tensor]] = {}
    replaced: dict[int, Any] = {}  # deepcopy's memo: it takes the packed layer wherever the layer occurs
    for module in layers:
        weight: Tensor = module.weight
        quantization = quantizations[weight]
        if weight not in tensors:
            tensors[weight] = _weight_tensors(weight, quantization)
        bits, scale = tensors[weight]
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
        packed = skeleton(
            module,
            bias=bias is not None,
            levels=quantization.levels,
            scale="group" if quantization.group_size else ("tensor" if scale.numel() == 1 else "channel"),
            group_size=quantization.group_size,
            compute=compute,
            activation=folding.activation_of(activation),
        )
        packed.set_weights(bits, scale, bias)
        replaced[id(module)] = packed.train(module.training)
        for folded in (norm, activation):
            if folded is not None:
                replaced[id(folded)] = folding.Folded(folded)
    result: nn.Module = copy.deepcopy(model, replaced)
    copies = dict(result.named_parameters(remove_duplicate=False))
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in copies and p in quantizations:
            copies[name].data = _projected(p, quantizations[p])
    return result
