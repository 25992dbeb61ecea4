"""Every key of the optimizers' parameter groups, once: its default, what it may be, and when it is read."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantopt.levels import SCALES, check_scale, level_count
from quantopt.optim.muon import ADJUSTMENTS

Check = Callable[[str, Any], None]

# Default learning rates of every rule on Adam and on Muon. The latter is torch's;
# adjust_lr_fn="match_rms_adamw" is made for rates of Adam.
ADAM_LR = 1e-3
MUON_LR = 1e-3

# Where the direction of a group comes from, with the options that are read on this base alone. A group on another base
# need not have such a key, and has it only where the constructor's base reads it: torch's schedulers look for them.
# Muon's direction is given to the kernels.
BASE_OPTIONS = {
    "sgd": ("momentum",),
    "adam": ("betas", "eps"),
    "given": (),
    "muon": ("momentum", "ns_steps", "adjust_lr_fn"),
}
NESTEROV = ("sgd", "muon")  # bases that have a Nesterov form


class Option(NamedTuple):
    """A key of the groups."""

    check: Check  # raises ValueError naming the key, its value and the remedy
    default: Any = None  # of the options that every optimizer has; those of one class are in its constructor
    on: Mapping[str, Any] = {}  # bases with another default; a constructor has None then
    per_step: bool = False  # read at every step; where another key changes, the step is laid out again
    scheduled: bool = False  # driven by schedules: a float64 tensor on the device in capturable groups
    usual: Any = None  # what version 0.1.0 did, which lacked the option: a group without the key does that


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
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or value < least or (end is not None and value >= end):
            raise ValueError(f"{key}={value!r}: must be {text}")

    return check


def flag(key: str, value: Any) -> None:
    if value not in (True, False):
        raise ValueError(f"{key}={value!r}: must be True or False")


def _betas(key: str, value: Any) -> None:
    try:
        good = len(value) == 2 and all(0 <= beta < 1 for beta in value)
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{key}={value!r}: must be two numbers in [0, 1)")


def _bits(key: str, value: Any) -> None:
    level_count(value)


OPTIONS: dict[str, Option] = {
    # the base
    "base": Option(choice(*BASE_OPTIONS), "sgd"),
    "lr": Option(number(), per_step=True, scheduled=True),
    "momentum": Option(number(0.0, 1.0, open_end=True), 0.9, on={"muon": 0.95}, per_step=True),
    "nesterov": Option(flag, False, on={"muon": True}),
    "betas": Option(_betas, (0.9, 0.999), per_step=True),
    "eps": Option(number(), 1e-8, per_step=True),
    "ns_steps": Option(whole(1, 100, "an int of at least 1 and below 100"), 5),
    "adjust_lr_fn": Option(choice(*ADJUSTMENTS), "original"),
    "weight_decay": Option(number(), per_step=True),
    "decoupled_weight_decay": Option(flag, False),
    "maximize": Option(flag, False),
    # the levels
    "bits": Option(_bits),  # has no default: what is quantised is said
    "scale": Option(choice(*SCALES, "channel-mean", "group-mean"), "tensor"),
    "group_size": Option(whole(1, None, "a positive int"), 128),
    # numbers in memory, and what is done with them
    "rounding": Option(choice("master", "nearest", "stochastic"), "master"),
    "momentum_dtype": Option(choice("float32", "bfloat16"), "float32"),
    "exp_avg_sq_dtype": Option(choice("float32", "bfloat16"), "float32", usual="float32"),
    "seed": Option(whole(0, 2**62, "an int in [0, 2**62)"), 0),
    "error_if_nonfinite": Option(flag, False),
    "capturable": Option(flag, False),
    # AskewSGD
    "epsilon": Option(number(0.0, 1.0), per_step=True, scheduled=True),
    "rate": Option(number(infinite=True), per_step=True),
    "cap": Option(number(), per_step=True),
    "constrain": Option(choice("velocity", "gradient")),
    "memory": Option(flag),
    "clamp": Option(flag, usual=True),
    "bound": Option(number(1.0, infinite=True), per_step=True),
    # STAM and the baselines
    "form": Option(choice("alternating", "splitting")),
    "kappa": Option(number(infinite=True), per_step=True, scheduled=True),
    "lam": Option(number(), per_step=True),
    "clip": Option(number(infinite=True)),
    "stochastic": Option(flag),
    "reg": Option(number(), per_step=True),
    "reg_strength": Option(number(infinite=True), per_step=True, scheduled=True),
}
SHARED = tuple(key for key, option in OPTIONS.items() if option.default is not None)
SCHEDULED = tuple(key for key, option in OPTIONS.items() if option.scheduled)
# The position of an Anneal: no options, but keys that a quantised group has once an Anneal drives it.
POSITION: dict[str, Check] = {
    "anneal_step": whole(0, 2**63, "an int of at least 0"),  # updates of the optimizer since the anneal began
    "anneal_total": whole(1, 2**63, "an int of at least 1"),  # how many there will be
}


def shared_options() -> dict[str, Any]:
    """The options of every optimizer, as a constructor that has none of them leaves them."""
    return {key: None if OPTIONS[key].on else OPTIONS[key].default for key in SHARED}


def of_base(options: Mapping[str, Any], group: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """What a group on ``base`` has of the options that depend on the base, where it does not say them itself.

    ``options``: those of the constructor; where they say it, it holds, but nesterov on their base alone."""
    values = {
        key: next((value for name, value in option.on.items() if name == base), option.default)
        for key, option in OPTIONS.items()
        if option.on and key not in group and options[key] is None
    }
    if "nesterov" not in group and base != options["base"] and base not in NESTEROV:
        values["nesterov"] = False
    return values


def from_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a constructor: what ``locals()`` is there, less self, params and backend."""
    return {key: value for key, value in arguments.items() if key in OPTIONS}


def check_group(group: Mapping[str, Any], known: Iterable[str]) -> None:
    """Checks the options of a group, of which an optimizer has those ``known``. Raises ValueError naming the key, its
    value and the remedy. Keys of the user are not looked at."""
    known = set(known)
    for key, check in POSITION.items():
        if key in group:
            check(key, group[key])
    for key, option in OPTIONS.items():
        if key in group and key not in known:
            raise ValueError(f"{key}={group[key]!r}: this optimizer has no such option; use another name")
        if key in group:
            option.check(key, group[key])
    check_scale(group["scale"], group["bits"])
    if group["nesterov"] and group["base"] not in NESTEROV:
        raise ValueError(
            f"nesterov=True: only the bases {NESTEROV} have a Nesterov form, not {group['base']!r}"
        )
    if group["nesterov"] and group["base"] == "sgd" and not group["momentum"] > 0:
        raise ValueError("nesterov=True needs momentum > 0")
    if group["capturable"] and group["error_if_nonfinite"]:
        raise ValueError(
            "error_if_nonfinite=True waits for the device, which capturable=True must not; use torch.amp.GradScaler"
        )


def check_second_moments(options: Mapping[str, Any], bases: Iterable[Any]) -> None:
    """Raises ValueError where ``options`` narrow the second moments, and no group that they are of, on ``bases``, has
    any. Not of groups that have the option from a constructor, which may be for others."""
    if options.get("exp_avg_sq_dtype") == "bfloat16" and "adam" not in bases:
        raise ValueError(
            "exp_avg_sq_dtype='bfloat16': only groups with base='adam' have second moments; leave it out"
        )


def read_at_each_step(key: str) -> bool:
    return key in OPTIONS and OPTIONS[key].per_step


def keep_position(own: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> str | None:
    """Puts into the groups of a state_dict what ``own`` have of an anneal and they lack. The length of the anneal that
    is attached stays. Returns what its user should know of that."""
    message = None
    for present, group in zip(own, loaded, strict=True):
        if "anneal_step" not in present:
            continue
        step, total = group.get("anneal_step"), group.get("anneal_total")
        group["anneal_step"] = present["anneal_step"] if step is None else step
        group["anneal_total"] = present["anneal_total"]
        if step is None:
            message = (
                "state_dict has no position of the anneal (quantopt 0.1.0 saved it with the Anneal alone), which stays "
                f"at step {present['anneal_step']}: load the state_dict of the Anneal too, or make it with last_step="
            )
        elif total != present["anneal_total"]:
            message = (
                f"state_dict is at step {step} of an anneal of {total} steps, which goes on at step {step} of the "
                f"{present['anneal_total']} of the present Anneal: load its state_dict too to go on with {total}"
            )
    return message


def scheduled_value(group: Mapping[str, Any], key: str) -> Any:
    """A scheduled value of a group: the tensor itself if the group is capturable, else a float."""
    return group[key] if group["capturable"] else float(group[key])


def one_device(group: Mapping[str, Any]) -> torch.device:
    """The device of the parameters of a capturable group. Raises ValueError if there are several."""
    device: torch.device = group["params"][0].device
    if any(p.device != device for p in group["params"]):
        raise ValueError(
            "capturable=True: the parameters of a group must be on one device; make a group for each"
        )
    return device


def place_scheduled(group: dict[str, Any], present: Mapping[str, Any] | None = None) -> None:
    """Makes the scheduled values of a capturable group float64 tensors on the device of its parameters.

    A tensor that is there already stays. ``present``: the values before a state_dict was loaded, whose tensors take up
    the loaded values, since a captured graph may read them.
    """
    if not group["capturable"] or not group["params"]:
        return
    device = one_device(group)
    for key in SCHEDULED:
        value = group.get(key)
        if value is None:
            continue
        before = (present or {}).get(key)
        if isinstance(before, Tensor) and before.device == device:
            group[key] = before.copy_(torch.as_tensor(value, dtype=torch.float64))
        elif present is None and isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{key} is a tensor on {value.device}; with capturable=True it must be on {device}, as the parameters"
            )
        elif not isinstance(value, Tensor) or value.device != device:
            group[key] = torch.tensor(float(value), dtype=torch.float64, device=device)
