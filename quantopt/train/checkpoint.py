"""The format of a checkpoint, and the checks of its contents before a run takes them up.

A checkpoint is a file of torch.save, an archive whose comment is the SHA-256 of all bytes before it. torch.load reads
it as any other. A file of torch.save without a comment, as version 0.1.0 wrote, is read without that check; one with
another comment, or with bytes after its end, is damaged.
"""

import hashlib
import io
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quantopt.optim.base import LevelOptimizer
from quantopt.optim.state import SIGNS, STATE, facts_of, required
from quantopt.train.errors import InputError, shown

_COMMENT = b"quantopt sha256 "
_COMMENT_BYTES = len(_COMMENT) + 64
_END = b"PK\5\6"  # of the last record of an archive, which ends with the length of the comment behind it
_END_BYTES = 22
_LONGEST_COMMENT = 2**16 - 1

_PARTS = (
    "epoch seconds update_seconds model optimizer scheduler anneal generator rng cuda_rng curves histograms "
    "layer_flips"
)
KEYS = frozenset(["config", *_PARTS.split()])
"""What the checkpoint of `quantopt train` holds."""


# ---------------------------------------------------------------------------------------------------- the file


def encode(state: dict[str, Any]) -> bytes:
    """The contents of a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    # The last two bytes of an archive without a comment are the comment's length, 0.
    body = bytes(data[:-2]) + struct.pack("<H", _COMMENT_BYTES)
    return body + _COMMENT + hashlib.sha256(body).hexdigest().encode()


def decode(data: bytes) -> Any:
    """What is in the contents of a file, tensors on the CPU. Runs no code of it. Raises ValueError if it is bad."""
    if _has_comment(data):
        digest = hashlib.sha256(memoryview(data)[:-_COMMENT_BYTES]).hexdigest()
        if data[-_COMMENT_BYTES:] != _COMMENT + digest.encode():
            raise ValueError("is damaged: its bytes are not those that were written (SHA-256)")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged or hostile file
        raise ValueError(
            "is damaged, or holds more than the tensors, numbers and texts of a checkpoint "
            f"({type(error).__name__}); no code in it was run"
        ) from None


def _has_comment(data: bytes) -> bool:
    """Whether anything follows the last record of the archive, or what is left of a checksum is near the end."""
    tail = data[-_LONGEST_COMMENT - _END_BYTES :]
    end = tail.rfind(_END)
    plain = end < 0 or tail[end + _END_BYTES - 2 :] == b"\0\0"
    return not plain or _COMMENT in tail[-4096:]


# ---------------------------------------------------------------------------------------------------- its contents


@contextmanager
def refusals(argument: str, source: object) -> Iterator[None]:
    """Around checks of a checkpoint: an error becomes an InputError that names the argument and the file."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(argument, f"{source} does not fit: {reason[:300]}") from None


def check_parts(state: Any, *kinds: frozenset[str]) -> None:
    """Raises ValueError unless `state` has the parts of one of the `kinds` of checkpoints (none: `KEYS`) and a
    configuration of plain values."""
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise ValueError("is not a checkpoint of quantopt")
    state.setdefault("layer_flips", None)  # 0.1.0 had none
    keys = kinds[0] if kinds else KEYS
    if state.keys() not in kinds and state.keys() != keys:
        missing, unknown = keys - state.keys(), state.keys() - keys
        parts = [f"lacks {key}" for key in sorted(missing)] + [f"has {shown(key)}" for key in unknown]
        raise ValueError(f"is not a checkpoint of quantopt: it {', '.join(parts[:3])}")
    for key, value in state["config"].items():
        if not isinstance(key, str) or not _is_plain(value, 3):
            raise ValueError(f"has a configuration that cannot be used: {shown(key)} is {shown(value)}")


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, list | dict) and depth:
        values = [*value, *value.values()] if isinstance(value, dict) else value
        return all(_is_plain(element, depth - 1) for element in values)
    return value is None or isinstance(value, bool | int | float | str)


def check_number(
    value: Any,
    name: str,
    low: float = 0,
    high: float = math.inf,
    *,
    kind: type | tuple[type, ...] = float,
    infinite: bool = False,
) -> None:
    """Raises ValueError unless `value` is a number of `kind`, float or int or both, from `low` to `high`."""
    good = isinstance(value, kind) and isinstance(value, int | float) and not isinstance(value, bool)
    good = good and low <= value <= high
    if not good or (value == math.inf and not infinite):
        text = "a whole number" if kind is int else "a number"
        end = "" if math.isinf(high) else f" and at most {high}"
        raise ValueError(f"{name} is {shown(value)}, not {text} of at least {low}{end}")


def check_seconds(state: Mapping[str, Any]) -> None:
    """Raises ValueError unless the times in `state` are such that a report can divide by them."""
    check_number(state["seconds"], "seconds", 1e-9 if state["epoch"] else 0, 2**40)
    check_number(state["update_seconds"], "update_seconds", 0, 2**40)


def differences(saved: Mapping[str, Any], present: Mapping[str, Any], where: str, free: Sequence[str]) -> str:
    """What differs between a `saved` configuration, which is in `where`, and the `present` one, "" if nothing does.

    `free` may differ: the fingerprint identifies the data."""
    differing = [
        f"{shown(key) if key not in present else key} is {shown(saved.get(key))} in {where} and "
        f"{shown(present.get(key))} now"
        for key in sorted(present.keys() | saved.keys())
        if key not in free and saved.get(key) != present.get(key)
    ]
    more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
    return "; ".join(differing[:6]) + more


def free(present: Mapping[str, Any]) -> tuple[str, ...]:
    """What may differ from the configuration `present` of a run: names of data, whose fingerprint identifies it, and
    the place of a run that another recipe gave."""
    return ("data", "init") if present.get("warm_start") else ("data",)


def check_tensor(value: Any, like: Tensor, name: str) -> None:
    """Raises ValueError unless `value` is a dense tensor on the CPU of the shape and dtype of `like`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {shown(value)}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{name} is a tensor without values in memory ({value.layout}, {value.device})")
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and {value.dtype}, not {tuple(like.shape)} and {like.dtype}"
        )


def check_model(values: Any, like: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless `values` has the names of `like`, each with a tensor as there, and all are finite."""
    if not isinstance(values, dict):
        raise ValueError(f"model is {shown(values)}, not a dictionary of tensors")
    if values.keys() != like.keys():
        differing = sorted(map(str, values.keys() ^ like.keys()))
        raise ValueError(f"model has other tensors than this network: {', '.join(map(shown, differing[:3]))}")
    for key, tensor in like.items():
        check_tensor(values[key], tensor, f"model: {key}")
        if not bool(values[key].isfinite().all()):
            raise ValueError(f"model: {key} has values that are not finite")


CURVES: dict[str, tuple[float, float]] = {
    "loss": (0, math.inf),
    "accuracy": (0, 100),
    "test_accuracy": (0, 100),
    "projected_accuracy": (0, 100),
    "epsilon": (0, 1),
    "kappa": (0, math.inf),
    "reg_strength": (0, math.inf),
    "fraction_feasible": (0, 1),
    "sign_flips": (0, 2**63),
}
"""Keys of `report["curves"]`, with the range of their values: lists with a value per epoch, None where the optimizer
has no such quantity. accuracy: of the training images at the step that used them. test_accuracy: of the network as it
runs in training, with its running batch-norm statistics, after the epoch (None in epochs that `Config.test_every`
leaves out). projected_accuracy: the same of the weights projected to their levels, with the same statistics (None but
in epochs of `Config.projected_at`)."""


def check_curves(
    curves: Any, points: int, has_value: Callable[[str, int], bool], names: Sequence[str] = tuple(CURVES)
) -> None:
    """Raises ValueError unless each of the curves `names` has a value in its range at each of the points 1..`points`
    (epochs, of language models blocks of steps) at which it has one, and else None."""
    if not isinstance(curves, dict) or curves.keys() != set(names):
        raise ValueError(f"curves is not a dictionary of {', '.join(names)}")
    for name in names:
        low, high = CURVES[name]
        curve = curves[name]
        if not isinstance(curve, list) or len(curve) != points:
            raise ValueError(f"the curve of {name} is not one value for each of {points} points")
        for point, value in enumerate(curve, 1):
            where = f"the curve of {name} at point {point}"
            if has_value(name, point):
                infinite = name in ("kappa", "reg_strength")
                kind = int if name == "sign_flips" else float
                check_number(value, where, low, high, kind=kind, infinite=infinite)
            elif value is not None:
                raise ValueError(f"{where} is {shown(value)}, but this run has no such value then")


def check_histograms(histograms: Any, one: Tensor, count: int) -> None:
    """Raises ValueError unless `histograms` are `count` rows of counts as `one`, [1, bins]."""
    check_tensor(histograms, one.expand(count, -1), "histograms")
    if not bool(((histograms >= 0) & histograms.isfinite()).all()):
        raise ValueError("histograms are not counts")


def check_optimizer_state(optimizer: torch.optim.Optimizer, saved: Any, steps: int) -> None:
    """Raises ValueError unless `saved`, part of a state_dict, has what `optimizer` keeps after `steps` steps of all its
    parameters. Shapes in the state of an optimizer of quantopt are left to its load_state_dict."""
    if not isinstance(saved, dict):
        raise ValueError(f"optimizer.state is {shown(saved)}, not a dictionary")
    places = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    if unknown := saved.keys() - set(range(len(places))):
        raise ValueError(f"optimizer.state has {shown(next(iter(unknown)))}, which is no parameter")
    for index, (group, p) in enumerate(places):
        state = saved.get(index, {})
        where = f"optimizer.state of parameter {index}"
        if not isinstance(state, dict):
            raise ValueError(f"{where} is {shown(state)}, not a dictionary")
        if isinstance(optimizer, LevelOptimizer):
            needed = set(required(facts_of(optimizer, group, p.dtype)))
            needed |= {SIGNS} & optimizer.state.get(p, {}).keys()  # sign flips are counted
            known = STATE.keys() | {SIGNS}
        else:
            needed = known = _state_of_torch(group)
        if steps and p.numel() and (missing := needed - state.keys()):
            raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
        for key, value in state.items():
            if key not in known:
                raise ValueError(f"{where} has {shown(key)}, which this optimizer does not keep")
            like = value if isinstance(optimizer, LevelOptimizer) or key == "step" else p
            check_tensor(value, like, f"{where}: {key}")
            if key == "step" and (value.numel() != 1 or value.item() != steps):
                raise ValueError(f"{where}: step is not {steps}")


def _state_of_torch(group: Mapping[str, Any]) -> set[str]:
    """What torch.optim.SGD or AdamW keeps of a parameter."""
    if "betas" in group:
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if group["momentum"] else set()


def check_same(saved: Any, own: Any, name: str) -> None:
    """Raises ValueError unless `saved` is what this run has: numbers to 9 digits, as other machines compute them.

    Keys that a dictionary lacks are those that an earlier version did not have."""
    if isinstance(own, dict) and isinstance(saved, dict):
        for key, value in saved.items():
            if key not in own:
                raise ValueError(f"{name} has {shown(key)}, which this run does not have")
            check_same(value, own[key], f"{name}.{key}")
    elif isinstance(own, list | tuple) and isinstance(saved, list | tuple) and len(saved) == len(own):
        for i, (value, expected) in enumerate(zip(saved, own, strict=True)):
            check_same(value, expected, f"{name}[{i}]")
    elif not _is_same(saved, own):
        raise ValueError(f"{name} is {shown(saved)} and not {shown(own)}, as it is at that epoch")


def _is_same(saved: Any, own: Any) -> bool:
    if isinstance(own, bool | str | None) or isinstance(saved, bool | str | None):
        return type(saved) is type(own) and bool(saved == own)
    numbers = []
    for value in (saved, own):
        if isinstance(value, Tensor) and value.numel() == 1 and value.dtype.is_floating_point:
            value = value.item()  # a rate of a captured step
        if not isinstance(value, int | float) or (abs(value) > 2**63 and not math.isinf(value)):
            return False
        numbers.append(float(value))
    return math.isclose(*numbers, rel_tol=1e-9)
