"""Which weights are quantised: parameter groups from a model."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quantopt import selection
from quantopt.levels import SCALES, check_scale, level_count
from quantopt.optim.sharded import check_flat_shard

__all__ = ["param_groups"]


class ParamGroups(list[dict[str, Any]]):
    """Groups of parameters, with a ``table`` of every parameter of the model to print. A copy of the list, as
    ``list(groups)`` or a slice, has no table."""

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

    The weights of linear and convolution layers are quantised, with ``bits`` (1, 2, 3, 4, "17-level", "ternary") and
    ``scale`` ("none", "tensor", "channel", "group"; "sawb" with 2 bits or more). There is a group for each number of
    bits, the fewest levels first. The last group has every other parameter that is trained, with ``bits=0``: the plain
    base rule.

    ``print(param_groups(model).table)`` shows each parameter of the model: layer, shape, bits, scale, and why it is
    left out. Never quantised are embeddings and weights tied to one, biases and other 1-d parameters, and the low-rank
    matrices of peft. A parameter with requires_grad=False is in no group: to train it later, use
    ``opt.add_param_group``.

    Args:
        skip: "first", "last", or patterns of parameter names (``"head.*"``) to leave unquantised; () for none. The
            field keeps the first and the last layer in full precision. "first" is the first layer that sees the input,
            as far as definitions tell: within ``model.get_input_embeddings()`` where the model has it, else the first
            that the model defines. It is none where an embedding sees the input: if that layer is a Linear with as many
            inputs as an embedding has that is defined before it. The last line of the table says which it is. Of a
            model with several inputs, name the others. "last" is the layer of the logits:
            ``model.get_output_embeddings()`` where the model has it, else the last that it defines.
        other: further keys of the last group, for example ``{"lr": 0.1, "weight_decay": 5e-4}``: the learning rate
            of quantised weights is in units of their scale and seldom suits batch norms and biases. Not "params",
            "param_names", "bits" and "scale".
        filter_fn: ``filter_fn(module, name)`` gives the bits of each layer that is not left out for another reason, or
            None to leave it out; it takes the place of ``bits``.

    The Conv1D of the transformers library has a weight [in, out]: ``scale`` must be "tensor", "sawb" or "none", since
    scales per row would be per input. So they are with BinaryConnect and the binary forms of STAM and BinaryRelax,
    which have a scale per row in any case, and such a layer is not packed. :func:`quantopt.nn.conv1d_to_linear` is the
    way out.

    The result has the ``table`` as an attribute; a copy of the list (``list(groups)``) does not.

    Raises:
        TypeError: ``model`` is no module, ``skip`` no iterable or ``other`` no mapping.
        ValueError: ``bits``, ``scale`` or an answer of ``filter_fn`` unknown, "sawb" with 1 bit or "ternary", a pattern
            that matches nothing, a Conv1D with scales per channel or group, a model in FullyShardedDataParallel, a key
            of ``other`` that the group has already, or no weight left to quantise.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: use one of {SCALES}")
    if other is not None and not isinstance(other, Mapping):
        raise TypeError(f"other={other!r}: must be a dict of further keys of the group that is not quantised")
    for key in ("params", "param_names", "bits", "scale"):
        if key in (other or {}):
            raise ValueError(
                f"other[{key!r}]: the last group holds all that is not quantised, biases and embeddings included; to "
                "choose which weights are quantised and with which bits, use filter_fn="
            )
    choices = selection.choose(model, bits, skip, filter_fn)
    if bits != 0 or filter_fn is not None:
        for choice in choices:
            wanted = {"bits": bits or 1, "error_if_nonfinite": False}
            check_flat_shard(choice.parameter, wanted, f"parameter {choice.names[0]!r}")
    if not any(choice.parameter.requires_grad for choice in choices):
        raise ValueError(
            "there is nothing to train: "
            + (
                "every parameter of the model is frozen (requires_grad=False); call requires_grad_(True) on those to "
                "train"
                if choices
                else "the model has no parameters"
            )
        )
    quantised = [choice for choice in choices if not choice.left_out]
    if not quantised and (bits != 0 or filter_fn is not None):
        without = "" if filter_fn is None else ", without filter_fn"
        what = f"train all in full precision: pass bits=0{without}"
        raise ValueError(selection.nothing_left(choices, what))
    transposed = [choice for choice in quantised if selection.is_transposed(choice.layer)]
    if transposed and scale in ("channel", "group"):
        raise ValueError(
            f"scale={scale!r}: {transposed[0].names[0]} is the [in, out] weight of a Conv1D, whose scales would be per "
            f"input; use scale='tensor', call quantopt.nn.conv1d_to_linear(model) first, or name it in skip"
        )
    widths = sorted({choice.bits for choice in quantised}, key=level_count)
    for width in widths:
        check_scale(scale, width)
    groups = ParamGroups(
        {**_group([choice for choice in quantised if choice.bits == width]), "bits": width, "scale": scale}
        for width in widths
    )
    plain = [choice for choice in choices if choice.left_out and choice.parameter.requires_grad]
    if plain:
        groups.append({**_group(plain), "bits": 0, **(other or {})})
    groups.table = choices.table(scale)
    return groups


def _group(choices: list[selection.Choice]) -> dict[str, Any]:
    return {"params": [c.parameter for c in choices], "param_names": [c.names[0] for c in choices]}
