"""Which weights are quantised: parameter groups from a model."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quantopt.levels import SCALES, level_count
from quantopt.selection import select_weights

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    bits: int | str = 1,
    scale: str = "tensor",
    skip: Iterable[str] = ("first", "last"),
    other: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Two groups for the optimizers of this package, plain dicts of ints, floats and strings.

    The first has the weights of the linear and convolution layers with ``bits`` (1, 2, 3, 4, "ternary") and ``scale``
    ("none", "tensor", "channel", "group"); the second has every other parameter with ``bits=0``, trained by the plain
    base rule. The field keeps the first and the last layer in full precision, and so does ``skip`` by default; they are
    the first and the last in the order in which the model defines them.

    Args:
        skip: "first", "last", or patterns of parameter names (``"head.*"``) to leave unquantised; () for none.
        other: further keys of the second group, for example ``{"lr": 0.1, "weight_decay": 5e-4}``: the learning rate
            of quantised weights is in units of their scale and seldom suits batch norms and biases.

    Raises:
        ValueError: ``bits`` or ``scale`` unknown, a pattern that matches nothing, or no weight left to quantise.
    """
    level_count(bits)
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: use one of {SCALES}")
    chosen = select_weights(model, skip)
    if not chosen and bits != 0:
        raise ValueError(
            f"skip={skip!r} leaves no linear or convolution weight to quantise; pass skip=() to quantise all"
        )
    quantised = [(name, p) for name, p in model.named_parameters() if id(p) in chosen]
    plain = [(name, p) for name, p in model.named_parameters() if id(p) not in chosen]
    groups: list[dict[str, Any]] = [{**_group(quantised), "bits": bits, "scale": scale}]
    if plain:
        groups.append({**_group(plain), "bits": 0, **(other or {})})
    return groups


def _group(named: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    return {"params": [p for _, p in named], "param_names": [name for name, _ in named]}
