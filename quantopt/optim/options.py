"""Every key of the optimizers' parameter groups, once: its default, what it may be, and when it is read."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantopt.levels import SCALES, level_count
from quantopt.rules import BASES

Check = Callable[[str, Any], None]

ADAM_LR = 1e-3  # default learning rate of every rule on Adam


class Option(NamedTuple):
    """A key of the groups."""

    default: Any  # of optimizers whose constructor does not take the key
    check: Check  # raises ValueError naming the key, its value and the remedy
    per_step: bool = False  # read at every step; where another key changes, the step is laid out again
    scheduled: bool = False  # driven by schedules: a float64 tensor on the device in capturable groups
    required: bool = True  # False: older state_dicts lack the key, and take its default


def number(
    low: float = 0.0, high: float = math.inf, *, open_end: bool = False, infinite: bool = False
) -> Check:
    """A number in [low, high], or in [low, high) with ``open_end``."""

    def check(key: str, value: Any) -> None:
        try:
            x = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{key}={value!r}: must be a number") from None
        if open_end and x == high:
            raise ValueError(f"{key}={value!r}: must be below {high:g}")
        if not (low <= x <= high) or (math.isinf(x) and not infinite):
            end = "" if math.isinf(high) else f" and at most {high:g}"
            raise ValueError(f"{key}={value!r}: must be a number of at least {low:g}{end}")

    return check


def choice(*values: str) -> Check:
    def check(key: str, value: Any) -> None:
        if value not in values:
            raise ValueError(f"{key}={value!r}: use one of {values}")

    return check


def whole(least: int, end: int | None, text: str) -> Check:
    """An int in [least, end)."""

    def check(key: str, value: Any) -> None:
        if not isinstance(value, int) or value < least or (end is not None and value >= end):
            raise ValueError(f"{key}={value!r}: must be {text}")

    return check


def flag(key: str, value: Any) -> None:
    if value not in (True, False):
        raise ValueError(f"{key}={value!r}: must be True or False")


def _betas(key: str, value: Any) -> None:
    if not (len(value) == 2 and all(0 <= beta < 1 for beta in value)):
        raise ValueError(f"{key}={value!r}: must be two numbers in [0, 1)")


def _bits(key: str, value: Any) -> None:
    level_count(value)


OPTIONS: dict[str, Option] = {
    # the base
    "lr": Option(1e-3, number(), per_step=True, scheduled=True),
    "base": Option("sgd", choice(*BASES), required=False),
    "momentum": Option(0.9, number(0.0, 1.0, open_end=True), per_step=True, required=False),
    "nesterov": Option(False, flag),
    "betas": Option((0.9, 0.999), _betas, per_step=True, required=False),
    "eps": Option(1e-8, number(), per_step=True, required=False),
    "weight_decay": Option(0.0, number(), per_step=True),
    "decoupled_weight_decay": Option(False, flag),
    "maximize": Option(False, flag),
    # the levels
    "bits": Option(1, _bits),
    "scale": Option("tensor", choice(*SCALES, "channel-mean")),
    "group_size": Option(128, whole(1, None, "a positive int")),
    # numbers in memory, and what is done with them
    "rounding": Option("master", choice("master", "nearest", "stochastic")),
    "momentum_dtype": Option("float32", choice("float32", "bfloat16")),
    "seed": Option(0, whole(0, 2**62, "an int in [0, 2**62)")),
    "error_if_nonfinite": Option(False, flag),
    "capturable": Option(False, flag),
    # AskewSGD
    "epsilon": Option(1.0, number(0.0, 1.0), per_step=True, scheduled=True),
    "rate": Option(0.1, number(infinite=True), per_step=True),
    "cap": Option(0.25, number(), per_step=True),
    "constrain": Option("velocity", choice("velocity", "gradient")),
    "memory": Option(False, flag),
    "bound": Option(2.0, number(1.0, infinite=True), per_step=True),
    # STAM and the baselines
    "form": Option("alternating", choice("alternating", "splitting")),
    "kappa": Option(0.0, number(infinite=True), per_step=True, scheduled=True),
    "lam": Option(0.0, number(), per_step=True),
    "clip": Option(1.0, number(infinite=True)),
    "stochastic": Option(False, flag),
    "reg": Option(1e-4, number(), per_step=True),
    "reg_strength": Option(0.0, number(infinite=True), per_step=True, scheduled=True),
}
SHARED = (
    "base", "momentum", "nesterov", "betas", "eps", "decoupled_weight_decay", "maximize", "bits", "scale", "group_size",
    "rounding", "momentum_dtype", "seed", "error_if_nonfinite", "capturable",
)  # fmt: skip
SCHEDULED = tuple(key for key, option in OPTIONS.items() if option.scheduled)


def from_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a constructor: what ``locals()`` is there, less self, params and backend."""
    return {key: value for key, value in arguments.items() if key in OPTIONS}


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError naming the key, its value and the remedy. Keys of the user are not looked at."""
    for key, option in OPTIONS.items():
        if key in group:
            if group[key] is None:
                raise ValueError(f"{key}=None: base={group['base']!r} has no default of it; pass a number")
            option.check(key, group[key])
    if group["nesterov"] and group["base"] != "sgd":
        raise ValueError(f"nesterov=True: only base='sgd' has a Nesterov form, not {group['base']!r}")
    if group["nesterov"] and not group["momentum"] > 0:
        raise ValueError("nesterov=True needs momentum > 0")
    if group["capturable"] and group["error_if_nonfinite"]:
        raise ValueError(
            "error_if_nonfinite=True waits for the device, which capturable=True must not; use torch.amp.GradScaler"
        )


def layout_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a group on which the layout of its step depends: all but its parameters and what is read at every
    step. Keys of the user are among them, since a subclass may choose its rule by one."""
    return tuple(key for key in group if key != "params" and not (key in OPTIONS and OPTIONS[key].per_step))


def scheduled_value(group: Mapping[str, Any], key: str) -> Any:
    """A scheduled value of a group: the tensor itself if the group is capturable, else a float."""
    return group[key] if group["capturable"] else float(group[key])


def place_scheduled(group: dict[str, Any], present: Mapping[str, Any] | None = None) -> None:
    """Makes the scheduled values of a capturable group float64 tensors on the device of its parameters.

    A tensor that is there already stays. ``present``: the values before a state_dict was loaded, whose tensors take up
    the loaded values, since a captured graph may read them.
    """
    if not group["capturable"] or not group["params"]:
        return
    device = group["params"][0].device
    if any(p.device != device for p in group["params"]):
        raise ValueError(
            "capturable=True: the parameters of a group must be on one device; make a group for each"
        )
    for key in SCHEDULED:
        value = group.get(key)
        if value is None:
            continue
        before = (present or {}).get(key)
        if isinstance(before, Tensor) and before.device == device:
            group[key] = before.copy_(torch.as_tensor(value))
        elif present is None and isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{key} is a tensor on {value.device}; with capturable=True it must be on {device}, as the parameters"
            )
        elif not isinstance(value, Tensor) or value.device != device:
            group[key] = torch.tensor(float(value), dtype=torch.float64, device=device)
