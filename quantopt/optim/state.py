"""Every key of the optimizers' state, once: when a parameter has it, its dtype and its layout.

float64 parameters have float64 state. All other state is float32 whatever the parameter's dtype, except the moments,
for which ``momentum_dtype`` and ``exp_avg_sq_dtype`` say it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from quantopt.levels import level_count
from quantopt.optim.sharded import check_flat_shard, gathered, is_sharded, local, shard_like
from quantopt.packed_weight import check_memory
from quantopt.reference import levels as grid
from quantopt.reference.reading import scale_of_levels
from quantopt.rules import RULES, Rule
from quantopt.wrappers import plain_names

if TYPE_CHECKING:
    from quantopt.optim.base import LevelOptimizer

PARAMETER, SCALE, NUMBER = "parameter", "scale", "number"  # layouts


class Facts(NamedTuple):
    """What the state of a parameter depends on."""

    rule: Rule
    base: str
    momentum: bool  # of Muon, or of SGD and not 0
    stochastic: bool  # the weights themselves are rounded stochastically
    master: bool  # 16-bit weights with float32 ones behind them
    bounded: bool  # the latent is clipped at a multiple of a frozen scale
    dtype: torch.dtype  # of the state
    momentum_dtype: torch.dtype
    exp_avg_sq_dtype: torch.dtype


def facts_of(opt: LevelOptimizer, group: dict[str, Any], dtype: torch.dtype) -> Facts:
    """The facts of a parameter of ``dtype`` in ``group``."""
    group = opt.whole(group)
    rule = RULES[opt.rule_of(group)]
    low = dtype in (torch.bfloat16, torch.float16) and not rule.latent
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Facts(
        rule=rule,
        base=group["base"],
        momentum=group["base"] == "muon" or (group["base"] == "sgd" and group["momentum"] != 0),
        stochastic=low and dtype == torch.bfloat16 and group["rounding"] == "stochastic",
        master=low and group["rounding"] == "master",
        bounded=rule.quantised and opt._bounds_latent(group),
        dtype=wide,
        momentum_dtype=wide if wide == torch.float64 else getattr(torch, group["momentum_dtype"]),
        exp_avg_sq_dtype=wide if wide == torch.float64 else getattr(torch, group["exp_avg_sq_dtype"]),
    )


class StateKey(NamedTuple):
    needed: Callable[[Facts], bool]
    layout: str  # PARAMETER: as the parameter; SCALE: [1], [channels] or [channels, groups]; NUMBER: one
    dtype: Callable[[Facts], torch.dtype] = lambda facts: facts.dtype


STATE = {
    "exp_avg": StateKey(lambda f: f.base == "adam", PARAMETER, lambda f: f.momentum_dtype),
    "exp_avg_sq": StateKey(lambda f: f.base == "adam", PARAMETER, lambda f: f.exp_avg_sq_dtype),
    "momentum_buffer": StateKey(lambda f: f.momentum, PARAMETER, lambda f: f.momentum_dtype),
    "latent": StateKey(lambda f: f.rule.latent, PARAMETER),
    "master": StateKey(lambda f: f.master, PARAMETER),
    "scale": StateKey(lambda f: f.rule.quantised, SCALE),
    "sigma": StateKey(lambda f: f.bounded, SCALE),  # unit of the latent's bound
    "step": StateKey(lambda f: f.base == "adam" or f.stochastic, NUMBER, lambda f: torch.float32),
}
SIGNS = "signs"  # packed signs of the projection at the last metrics(): made there, saved, never required


def required(facts: Facts) -> dict[str, torch.dtype]:
    """The keys that a parameter's state has, with their dtypes."""
    return {key: row.dtype(facts) for key, row in STATE.items() if row.needed(facts)}


def with_gradients(group: dict[str, Any]) -> list[int]:
    """Indices of the parameters of a group that a step would change."""
    return [i for i, p in enumerate(group["params"]) if p.grad is not None and p.numel()]


def ensure(
    opt: LevelOptimizer, group: dict[str, Any], indices: list[int] | None = None, *, stepping: bool = False
) -> None:
    """Makes the state of the parameters ``indices`` (all) what the group's options ask for: what is missing is made,
    what is of another dtype converted, what nobody updates any more dropped, and what others have written to the
    parameter taken up. Where ``scale`` or ``group_size`` has changed, a moving scale is made anew of the latent, and a
    frozen one refused. A moving scale of the tensor or per channel, as earlier versions had it under ``scale="group"``,
    counts for all groups of the channel. All or nothing."""
    made: dict[nn.Parameter, dict[str, Any]] = {}
    chosen = [
        i for i in (range(len(group["params"])) if indices is None else indices) if group["params"][i].numel()
    ]
    former = {i: _former_layout(opt, group, i) for i in chosen}  # raises before weights are taken up
    for i in chosen:
        p = group["params"][i]
        name = opt.name_of(group, i)
        check_flat_shard(p, group, name)
        check_memory(name, local(p))
        for key, value in opt.state.get(p, {}).items():
            check_memory(f"{key} of {name}", local(value))
        if p.is_complex() or not p.is_floating_point():
            raise TypeError(f"{name} has dtype {p.dtype}; only real floating-point parameters are trained")
        if group["rounding"] == "stochastic" and p.dtype == torch.float16:
            raise ValueError(f"{name} is float16: rounding='stochastic' is for bfloat16; use 'master'")
        present = opt.state.get(p, {})
        facts = facts_of(opt, group, p.dtype)
        wanted = required(facts)
        if present.keys() & {"latent", "master"} & set(wanted):
            opt._written.take_up(opt, former[i] or group, p, stepping)
        by_row = "sigma" in present and present["sigma"].dim() < present["scale"].dim()  # of 0.1.0
        first = _Initial(opt, group, p.detach(), name, facts)
        as_wanted = present.keys() - {SIGNS} == set(wanted) and not by_row and former[i] is None
        if as_wanted and all(present[k].dtype == d for k, d in wanted.items()):
            continue
        if former[i] is not None:
            present = present | first.laid_out_anew(present)
        made[p] = {
            key: (present[key] if key in present else first.value(key)).to(dtype)
            for key, dtype in wanted.items()
        }
        if "exp_avg" in wanted and "exp_avg" not in present:  # Adam's correction counts from its first step
            made[p]["step"] = first.value("step")
        if by_row and "sigma" in wanted:
            made[p]["sigma"] = made[p]["scale"] * grid.level_factor(level_count(group["bits"]))
        if SIGNS in present:
            made[p][SIGNS] = present[SIGNS]
    for p, state in made.items():
        copied = state.keys() & {"latent", "master"} - opt.state.get(p, {}).keys()
        opt.state[p] = state
        if copied:
            opt._written.made(p)


def _former_layout(opt: LevelOptimizer, group: dict[str, Any], i: int) -> dict[str, Any] | None:
    """``group`` with the group_size that the scale of its parameter ``i`` was made with, where the options now ask for
    another layout of that scale; else None. Raises ValueError where it cannot be laid out anew, as it is frozen."""
    p, name = group["params"][i], opt.name_of(group, i)
    present = opt.state.get(p, {})
    if "scale" not in present or group["bits"] == 0:
        return None
    first = _Initial(opt, group, p.detach(), name, facts_of(opt, group, p.dtype))
    shape, wanted = tuple(present["scale"].shape), first.scale_shape()
    was = next((step.options() for step in opt._group_steps if step.has_state(group, p, present)), {})
    size = group["group_size"]
    resized = wanted[1:] > (1,) and was.get("group_size", size) != size  # to as many groups, maybe
    if not resized and (shape == wanted or math.prod(shape) == math.prod(wanted) == 1):
        return None
    changed = [key for key in ("bits", "scale", "group_size") if was.get(key, group[key]) != group[key]]
    changed = changed or ["group_size" if len(shape) == len(wanted) == 2 else "scale"]
    new = ", ".join(f"{key}={group[key]!r}" for key in changed)
    old = ", ".join(f"{key}={was[key]!r}" for key in changed if key in was) or "other options"
    there = f"{name}: {new} asks for a scale of shape {list(wanted)}, but its scale was made with {old}, "
    there += f"of shape {list(shape)}"
    if not first.dynamic:
        raise ValueError(f"{there}, and is frozen: set {changed[0]} back, or make a new optimizer")
    if not was and len(shape) == 2 and shape[1] != first.groups and opt._written.must_compare(p):
        raise ValueError(f"{there}, and was just loaded: call metrics() before {changed[0]} is changed")
    return group | {"group_size": was.get("group_size", size)}


class _Initial:
    """The first values of the state of a parameter."""

    def __init__(
        self, opt: LevelOptimizer, group: dict[str, Any], w: Tensor, name: str, facts: Facts
    ) -> None:
        self.group, self.w, self.name, self.facts = group, w, name, facts
        self.dynamic = facts.rule.quantised and opt._dynamic_scale(group)
        # "channel-mean" and "group-mean" say how often there is a scale as "channel" and "group" do
        self.granularity = group["scale"].removesuffix("-mean")
        if self.dynamic and w.dim() < 2:  # one channel
            self.granularity = "tensor"

    @property
    def moves_in_groups(self) -> bool:
        """Whether the scale follows the weights in groups."""
        return self.dynamic and self.granularity == "group"

    @property
    def groups(self) -> int:
        """How many groups a channel has."""
        size: int = self.group["group_size"]
        return -(-math.prod(self.w.shape[1:]) // size)

    def scale_shape(self) -> tuple[int, ...]:
        """The shape of :meth:`scale`."""
        rows = self.w.shape[0] if self.w.dim() else 1
        if self.granularity == "group":
            return rows, self.groups
        per_channel = self.granularity == "channel" or (self.dynamic and self.w.dim() > 1)
        return (rows,) if per_channel else (1,)

    def laid_out_anew(self, present: dict[str, Any]) -> dict[str, Tensor]:
        """The moving scale, and the bound of the latent, of a state that has them in another layout."""
        bounds = {"sigma": present["sigma"]} if "sigma" in present else {}
        if self.moves_in_groups and present["scale"].dim() < 2:
            return {
                key: self.over_groups(value) for key, value in (bounds | {"scale": present["scale"]}).items()
            }
        for key, value in bounds.items():  # of the first weights, which are gone
            if value.dim() == 2:  # gathered: torch 2.15 gives the means of uneven shards to all ranks
                per_channel = gathered(value).mean(dim=1)
                bounds[key] = (
                    self.over_groups(per_channel)
                    if self.moves_in_groups
                    else shard_like(per_channel, self.w, self.name)
                )
        latent = gathered(present.get("latent", self.w)).to(self.facts.dtype)
        scale = self.mean_magnitude(latent)
        self.check_shards(scale)
        return bounds | {"scale": shard_like(scale, self.w, self.name)}

    def over_groups(self, value: Tensor) -> Tensor:
        """One value, or one per channel, for every group of the channels."""
        spread = value.reshape(-1, 1).expand(self.w.shape[0], self.groups).contiguous()
        return spread if is_sharded(spread) else shard_like(spread, self.w, self.name)

    def mean_magnitude(self, w: Tensor) -> Tensor:
        """The scale that follows ``w``."""
        return grid.mean_magnitude(w, self.group["group_size"] if self.moves_in_groups else 0)

    def check_shards(self, scale: Tensor) -> None:
        """Raises ValueError for a moving ``scale`` of rows of which a rank has a part."""
        if is_sharded(self.w) and scale.numel() == 1 and self.dynamic:
            raise ValueError(f"{self.name} is sharded, and its scale follows all of it; use a frozen scale")

    def value(self, key: str) -> Tensor:
        if key in ("latent", "master"):
            return self.w.to(self.facts.dtype, copy=True)
        if key == "scale":
            return shard_like(self.scale(), self.w, self.name)
        if key == "sigma":
            return shard_like(self.latent_bound(), self.w, self.name)
        if STATE[key].layout == NUMBER:
            return torch.zeros((), device=self.w.device)
        return torch.zeros_like(self.w, dtype=STATE[key].dtype(self.facts))

    def scale(self) -> Tensor:
        kind = self.group["scale"]
        exact = gathered(self.w).to(self.facts.dtype)  # sharded parameters are gathered once, for their scale
        frozen = self.sigma(exact)
        scale = frozen
        if self.dynamic and not kind.endswith("-mean"):  # the others follow r, which the first step has
            scale = self.mean_magnitude(exact)
        for value in (frozen, scale):
            if not bool(torch.all(value > 0)) or not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{self.name}: a slice of its weights is all zero or not finite, so its scale (scale={kind!r}) is "
                    f"{float(value.min()):g}; initialise it, or put it in a group with bits=0"
                )
        self.check_shards(scale)
        return scale.contiguous()

    def latent_bound(self) -> Tensor:
        """The frozen scale times max_level: the outer levels, or of levels that move those of the first weights."""
        exact = gathered(self.w).to(self.facts.dtype)
        factor = grid.level_factor(level_count(self.group["bits"]))
        return (self.sigma(exact) * factor).contiguous()

    def sigma(self, w: Tensor) -> Tensor:
        """The frozen scale; of weights that lie on the levels that the group asks for, the one of these levels."""
        kind = self.granularity
        levels, group_size = level_count(self.group["bits"]), self.group["group_size"]
        sawb = kind == "sawb"
        on_levels = scale_of_levels(w, levels, "tensor" if sawb else kind, group_size)
        if on_levels is not None:
            return on_levels
        if sawb:
            return grid.sawb_clip(w, levels).reshape(1) / grid.level_factor(levels)
        return grid.frozen_scale(w, kind, group_size)


# ---- state_dicts -------------------------------------------------------------------------------------------------


def in_own_order(opt: LevelOptimizer, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the groups of a state_dict, whose parameters are in the order of the optimizer's.

    They are matched by name, within the group at the same position, where both sides have names; else by position, as
    also where they go by their full names, since torch.distributed.checkpoint has matched those. The copies have the
    optimizer's own names. Raises ValueError where names differ."""
    ours = _names_of(opt.param_groups, "this optimizer")
    by_position = [all(isinstance(i, str) for i in group["params"]) for group in given]
    theirs = _names_of(
        [
            {**group, "param_names": None} if skip else group
            for group, skip in zip(given, by_position, strict=True)
        ],
        "the state_dict",
    )
    copies = []
    for i, (own, group) in enumerate(zip(opt.param_groups, given, strict=True)):
        copy = {key: value for key, value in group.items() if key != "param_names"}
        if "param_names" in own:
            copy["param_names"] = own["param_names"]
        wanted, present = ours[i], theirs[i]
        if wanted is not None and present is not None and wanted != present:
            _check_names(i, ours, theirs)
            of_name = dict(zip(present, group["params"], strict=True))
            copy["params"] = [of_name[name] for name in wanted]
        copies.append(copy)
    return copies


def _names_of(groups: list[dict[str, Any]], whose: str) -> list[list[str] | None]:
    """The names of each group, without the parts that wrappers add; None for a group that has none."""
    found = [group.get("param_names") for group in groups]
    for i, (names, group) in enumerate(zip(found, groups, strict=True)):
        if names is not None and (
            not isinstance(names, list | tuple)
            or len(names) != len(group["params"])
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(
                f"param_names of group {i} of {whose} is not a list of one name for each of its "
                f"{len(group['params'])} parameters"
            )
    plain = iter(plain_names(name for names in found for name in names or ()))
    return [None if names is None else list(islice(plain, len(names))) for names in found]


def _check_names(i: int, ours: list[list[str] | None], theirs: list[list[str] | None]) -> None:
    """Raises ValueError unless group ``i`` has the same names on both sides, in any order."""
    own, given = ours[i] or [], theirs[i] or []
    if len(set(own)) < len(own) or len(set(given)) < len(given):
        raise ValueError(
            f"state_dict: group {i} has a name twice and another order than this optimizer: which parameter is meant "
            "cannot be told; give every parameter a name of its own"
        )
    missing = [name for name in own if name not in given]
    extra = [name for name in given if name not in own]
    if not missing and not extra:
        return
    for names, side, there in ((missing, theirs, "state_dict"), (extra, ours, "this optimizer")):
        for j, others in enumerate(side):
            moved = [name for name in names if name in (others or ())]
            if moved:
                here = "this optimizer" if side is theirs else "state_dict"
                raise ValueError(
                    f"state_dict: {_few(moved)} is in group {j} of {there}, but in group {i} of {here}: make the "
                    "groups as they were when the state was saved"
                )
    differ = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(extra)}, unknown here"] * bool(extra)
    raise ValueError(
        f"state_dict: group {i} {' and '.join(differ)}: is it of another model? If parameters were renamed, rename "
        "them in the 'param_names' of its groups, or delete those to go by position"
    )


def _few(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def flat_states(opt: LevelOptimizer, state_dict: dict[str, Any]) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """The states of a state_dict with the parameters they are for."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in opt.param_groups for p in group["params"]]
    states = state_dict["state"]
    return [(p, states[i]) for i, p in zip(ids, params, strict=True) if i in states]


def check_states(
    opt: LevelOptimizer, own: dict[str, Any], given: dict[str, Any], states: dict[int, Any]
) -> None:
    """Raises ValueError if the states of the group ``given`` of a state_dict do not fit the parameters of ``own``."""
    for i, index in enumerate(given["params"]):
        p = own["params"][i]
        try:
            _check_state(opt, given, p, states.get(index, {}))
        except ValueError as error:
            name = opt.name_of(own, i)
            raise ValueError(
                f"state_dict: the state of {name} {error}: is it of another model or optimizer?"
            ) from None


def _check_state(opt: LevelOptimizer, group: dict[str, Any], p: Tensor, state: Any) -> None:
    if state == {}:
        return  # not seen yet
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("is not a dict of tensors")
    missing = set(required(facts_of(opt, group, p.dtype))) - {"master"} - state.keys()
    if missing:
        raise ValueError(f"lacks {sorted(missing)}")
    channels = p.shape[0] if p.dim() else 1
    for key, value in state.items():
        layout = STATE[key].layout if key in STATE else None
        if layout == PARAMETER and (value.shape != p.shape or not value.is_floating_point()):
            raise ValueError(
                f"has {key} of shape {tuple(value.shape)} and {value.dtype}, not {tuple(p.shape)}"
            )
        if layout == SCALE:
            shard = local(value.detach())
            fits = value.numel() == 1 or (value.dim() in (1, 2) and value.shape[0] == channels)
            if not (fits and value.is_floating_point() and bool(((shard >= 0) & shard.isfinite()).all())):
                raise ValueError(f"has a {key} of shape {tuple(value.shape)} that is no scale of the weights")
        if layout in (PARAMETER, SCALE) and value.numel() > 1 and is_sharded(value) != is_sharded(p):
            raise ValueError(
                f"has {key} {'sharded' if is_sharded(value) else 'whole'}, unlike the parameter; load it by "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which shards and gathers"
            )
        if layout == NUMBER and (value.numel() != 1 or not value.is_floating_point()):
            raise ValueError(f"has a {key} that is not one number")
        if key == SIGNS:
            if value.dtype != torch.uint8 or value.dim() != 1:
                raise ValueError("has signs that are not packed bits")
            if not is_sharded(p) and value.numel() != (p.numel() + 7) // 8:
                raise ValueError(f"has signs of {value.numel()} bytes")


def restored(key: str, value: Tensor, p: Tensor, present: Tensor | None) -> Tensor:
    """A loaded state on the parameter's device, in its own dtype and the layout of its key.

    ``present``: the tensor that takes it up, if it fits."""
    value = value.detach()
    if present is not None and type(present) is type(value):
        if (present.shape, present.dtype, present.device) == (value.shape, value.dtype, p.device):
            return present.copy_(value)
    value = value.to(p.device)
    if key in STATE and STATE[key].layout == PARAMETER:
        return torch.empty_like(p, dtype=value.dtype).copy_(value)
    return value.clone()
