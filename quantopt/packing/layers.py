"""Which packed module takes the place of which layer."""

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quantopt.levels import LEVEL_COUNT
from quantopt.nn import BinaryConv1d, BinaryConv2d, BinaryLinear
from quantopt.nn.linear import BinaryModule, BinaryOutProjection
from quantopt.selection import OTHER_KIND, Row, Table, is_layer, is_transposed, kind_fault

# A layer is packed if it computes what the first of these does, and its subclasses with the same _OWN do.
_KINDS: tuple[tuple[type[nn.Module], type[BinaryModule]], ...] = (
    (NonDynamicallyQuantizableLinear, BinaryOutProjection),
    (nn.Linear, BinaryLinear),
    (nn.Conv1d, BinaryConv1d),
    (nn.Conv2d, BinaryConv2d),
)
_OWN = ("forward", "_conv_forward", "__call__")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def fault_of(layer: nn.Module) -> str:
    """Why ``layer`` cannot be packed, "" if it can."""
    kind = type(layer)
    if not any(isinstance(layer, base) for base, _ in _KINDS) and kind.__name__ != "Conv1D":
        return f"no packed layer takes the place of {kind.__name__}"
    if _packed_type(layer) is None or "forward" in vars(layer):
        own = "forward" if kind.__call__ is nn.Module.__call__ else "__call__"
        return f"{kind.__name__} has a {own} of its own"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other tensors"
    if set(layer._parameters) - {"weight", "bias"} or layer._buffers or layer._modules:
        return f"{kind.__name__} has more than weight and bias"
    return ""


def _packed_type(layer: nn.Module) -> type[BinaryModule] | None:
    if type(layer).__name__ == "Conv1D" and is_transposed(layer):
        return BinaryLinear if type(layer).__call__ is nn.Module.__call__ else None
    for base, packed in _KINDS:
        if isinstance(layer, base):
            same = all(getattr(type(layer), name, None) is getattr(base, name, None) for name in _OWN)
            return packed if same else None
    return None


def skeleton(layer: nn.Module, *, bias: bool, **options: Any) -> BinaryLinear | BinaryConv2d:
    """The packed module that takes the place of ``layer``, on the meta device, with its hooks and its mode.

    options: levels, scale, group_size, compute and activation of the packed module. Raises TypeError for a layer that
    cannot be packed, with the reason.
    """
    if fault := fault_of(layer):
        raise TypeError(fault)
    kind: Any = _packed_type(layer)
    packed: BinaryLinear | BinaryConv2d
    weight = layer._parameters["weight"]
    assert weight is not None
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        packed = kind.like(layer, bias=bias, **options)
    else:
        outputs, inputs = weight.t().shape if is_transposed(layer) else weight.shape
        packed = kind(inputs, outputs, bias, device="meta", **options)
    if isinstance(packed, BinaryOutProjection):
        packed.dtype = weight.dtype
    for hooks in _HOOKS:
        setattr(packed, hooks, getattr(layer, hooks).copy())
    return packed.train(layer.training)


def table(packed: nn.Module) -> Table:
    """A table, to be printed, of a model that :func:`quantopt.pack` made: the packed layers, and each parameter that is
    not packed, with the reason."""
    bits = {levels: name for name, levels in LEVEL_COUNT.items()}
    rows = []
    for name, module in packed.named_modules():
        if isinstance(module, BinaryModule):
            rows.append(
                Row(
                    name,
                    type(module).__name__,
                    _shape(module),
                    bits[module.levels],
                    f"group of {module.group_size}" if module.group_size else module.scale_kind,
                    "",
                )
            )
        for key, p in module._parameters.items():
            if p is not None:
                fault = kind_fault(module, p)
                if fault in ("", OTHER_KIND) and is_layer(module):
                    fault = fault_of(module) or fault or "not quantised"
                full = f"{name}.{key}".lstrip(".")
                rows.append(Row(full, type(module).__name__, tuple(p.shape), 0, "", fault))
    return Table(rows)


def _shape(module: BinaryModule) -> tuple[int, ...]:
    """The shape of the float weight."""
    if not isinstance(module, BinaryConv2d):
        return (module.bits.shape[-2], module.row_length)
    kernel_size = module.kernel_size[1:] if isinstance(module, BinaryConv1d) else module.kernel_size
    return (module.out_channels, module.in_channels // module.groups, *kernel_size)
