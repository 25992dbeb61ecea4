"""Which weights are quantised: parameter groups from a model."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quantopt import selection
from quantopt.levels import SCALES, level_count

__all__ = ["param_groups"]


class ParamGroups(list[dict[str, Any]]):
    """Groups of parameters, with a ``table`` of every parameter of the model to print."""

    table: selection.Table


def param_groups(
    model: nn.Module,
    bits: int | str = 1,
    scale: str = "tensor",
    skip: Iterable[str] = ("first", "last"),
    other: Mapping[str, Any] | None = None,
    *,
    filter_fn: selection.FilterFn | None = None,
) -> ParamGroups:
    """Groups for the optimizers of this package: a list of plain dicts of ints, floats and strings.

    The weights of linear and convolution layers are quantised, with ``bits`` (1, 2, 3, 4, "ternary") and ``scale``
    ("none", "tensor", "channel", "group"). There is a group for each number of bits, the fewest levels first. The last
    group has every other parameter that is trained, with ``bits=0``: the plain base rule.

    ``print(param_groups(model).table)`` shows each parameter of the model: layer, shape, bits, scale, and why it is
    left out. Never quantised are embeddings and weights tied to one, biases and other 1-d parameters, and the low-rank
    matrices of peft. A parameter with requires_grad=False is in no group: to train it later, use
    ``opt.add_param_group``.

    Args:
        skip: "first", "last", or patterns of parameter names (``"head.*"``) to leave unquantised; () for none. The
            field keeps the first and the last layer in full precision. "first" is the first layer that sees the input:
            the first that the model defines, and none where an embedding sees it (``model.get_input_embeddings()``, or
            an embedding defined before the first layer, unless that is a Conv2d). "last" is the layer of the logits:
            ``model.get_output_embeddings()`` where the model has it, else the last that it defines.
        other: further keys of the last group, for example ``{"lr": 0.1, "weight_decay": 5e-4}``: the learning rate
            of quantised weights is in units of their scale and seldom suits batch norms and biases.
        filter_fn: ``filter_fn(module, name)`` gives the bits of each layer that is not left out for another reason, or
            None to leave it out; it takes the place of ``bits``.

    The Conv1D of the transformers library has a weight [in, out]: ``scale`` must be "tensor" or "none", since scales
    per row would be per input. So they are with BinaryConnect and the binary forms of STAM and BinaryRelax, which have
    a scale per row in any case, and such a layer is not packed. :func:`quantopt.nn.conv1d_to_linear` is the way out.

    Raises:
        ValueError: ``bits``, ``scale`` or an answer of ``filter_fn`` unknown, a pattern that matches nothing, a Conv1D
            with scales per channel or group, or no weight left to quantise.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: use one of {SCALES}")
    choices = selection.choose(model, bits, skip, filter_fn)
    quantised = [choice for choice in choices if not choice.left_out]
    if not quantised and (bits != 0 or filter_fn is not None):
        what = "train all in full precision: pass bits=0"
        raise ValueError(selection.nothing_left(choices, what))
    transposed = [
        choice for choice in quantised if choice.bits != 0 and selection.is_transposed(choice.layer)
    ]
    if transposed and scale in ("channel", "group"):
        raise ValueError(
            f"scale={scale!r}: {transposed[0].names[0]} is the [in, out] weight of a Conv1D, whose scales would be per "
            f"input; use scale='tensor', call quantopt.nn.conv1d_to_linear(model) first, or name it in skip"
        )
    widths = sorted({choice.bits for choice in quantised}, key=level_count)
    groups = ParamGroups(
        {**_group([choice for choice in quantised if choice.bits == width]), "bits": width, "scale": scale}
        for width in widths
    )
    plain = [choice for choice in choices if choice.left_out and choice.parameter.requires_grad]
    if plain:
        groups.append({**_group(plain), "bits": 0, **(other or {})})
    if not groups:
        raise ValueError("every parameter of the model has requires_grad=False: there is nothing to train")
    groups.table = selection.Table(choice.row(scale) for choice in choices)
    return groups


def _group(choices: list[selection.Choice]) -> dict[str, Any]:
    return {"params": [c.parameter for c in choices], "param_names": [c.names[0] for c in choices]}
