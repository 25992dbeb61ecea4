"""What all optimizers of the package share: groups and their checks, state, the step, and views of the weights."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from quantopt import _extension
from quantopt.backends import BACKENDS, choose
from quantopt.levels import SCALES, Quantization, level_count
from quantopt.ops.step import HYPER, fused_step, hyper_tensor
from quantopt.ops.weights import pack_signs
from quantopt.reference import levels as grid
from quantopt.reference.askew import t_star

CLOSED_INTERVAL = 0.995  # |t| from which a weight counts as inside the interval where a rule has no epsilon
_LATENT_RULES = ("askew_memory", "splitting", "alternating")
_COMPANIONS = (
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "latent",
    "master",
)  # state in the parameter's layout

# Group keys that hold a number, and the interval it must lie in (closed, but for infinity where it is open).
_INTERVALS: dict[str, tuple[float, float]] = {
    "lr": (0.0, math.inf),
    "momentum": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "epsilon": (0.0, 1.0),
    "rate": (0.0, math.inf),
    "cap": (0.0, math.inf),
    "bound": (1.0, math.inf),
    "kappa": (0.0, math.inf),
    "lam": (0.0, math.inf),
    "clip": (0.0, math.inf),
    "reg": (0.0, math.inf),
    "reg_strength": (0.0, math.inf),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "scale": (*SCALES, "channel-mean"),
    "rounding": ("master", "nearest", "stochastic"),
    "momentum_dtype": ("float32", "bfloat16"),
    "constrain": ("velocity", "gradient"),
    "form": ("alternating", "splitting"),
}
_MAY_BE_INFINITE = ("rate", "bound", "kappa", "clip", "reg_strength")
_SCHEDULED = (
    "lr",
    "epsilon",
    "kappa",
    "reg_strength",
)  # group keys that schedules drive: tensors if capturable


def number(group: dict[str, Any], key: str) -> Any:
    """A scheduled value of a group: the tensor itself if the group is capturable, else a float."""
    return group[key] if group["capturable"] else float(group[key])


class QuantOptimizer(torch.optim.Optimizer):
    """Base class of the optimizers.

    ``p.data`` is always what the network runs with; latent variables, momentum and scales live in ``state``, which is
    made when a parameter is first seen (first step, or first view of its weights). Groups with ``bits=0`` are trained
    by the plain base rule. The step is one pass of a fused kernel over every dtype and device of a group.

    A step that raises leaves weights and state as they were.
    """

    _step_supports_amp_scaling = True
    _adam = False

    def __init__(self, params: Any, defaults: dict[str, Any], backend: str = "auto") -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: use 'auto' or one of {BACKENDS}")
        self.backend = backend
        shared = {
            "nesterov": False,
            "maximize": False,
            "decoupled_weight_decay": False,
            "bits": 1,
            "scale": "tensor",
            "group_size": 128,
            "rounding": "master",
            "momentum_dtype": "float32",
            "seed": 0,
            "error_if_nonfinite": False,
            "capturable": False,
        }
        self._forget_steps()
        super().__init__(params, {**shared, **defaults})

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_steps()

    def _forget_steps(self) -> None:
        self._steps: list[Any] = []  # a _GroupStep for each group
        self._all_states: list[dict[str, Any]] = []  # the values of `state` that they were made with

    # ---- what a subclass says ------------------------------------------------------------------------------------

    def _rule(self, group: dict[str, Any]) -> str:
        """The rule of the op for a quantised group."""
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The numbers of the rule, beside lr, momentum and weight decay: see :func:`number`."""
        return {}

    def _moving_levels(self, group: dict[str, Any]) -> bool:
        """Whether the scale follows the weights (mean magnitude) instead of being frozen."""
        return False

    def _latent_bound_scale(self, group: dict[str, Any]) -> bool:
        """Whether the latent is bounded by a multiple of a frozen sigma, which is then kept in the state."""
        return False

    def annealed(self, group: dict[str, Any], step: int, total_steps: int) -> dict[str, float]:
        """Values of the group's annealed keys after ``step`` of ``total_steps`` steps; :class:`Anneal` sets them.

        Keyword arguments of the subclasses are the schedule's settings, fractions of the training and values."""
        return {}

    # ---- groups --------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. Raises ValueError naming the key, its value and the remedy; nothing is added then."""
        unknown = set(param_group) - set(self.defaults) - {"params", "param_names", "initial_lr"}
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no group key {sorted(unknown)}; known: {sorted(self.defaults)}"
            )
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _place_numbers(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for key, (low, high) in _INTERVALS.items():
            if key not in group:
                continue
            try:
                value = float(group[key])
            except (TypeError, ValueError):
                raise ValueError(f"{key}={group[key]!r}: must be a number") from None
            if not (low <= value <= high) or (math.isinf(value) and key not in _MAY_BE_INFINITE):
                end = "" if math.isinf(high) else f" and at most {high:g}"
                raise ValueError(f"{key}={group[key]!r}: must be a number of at least {low:g}{end}")
        if group.get("momentum") == 1.0:
            raise ValueError("momentum=1.0: must be below 1")
        if "betas" in group and not (len(group["betas"]) == 2 and all(0 <= b < 1 for b in group["betas"])):
            raise ValueError(f"betas={group['betas']!r}: must be two numbers in [0, 1)")
        if "eps" in group and not 0 <= group["eps"] < math.inf:
            raise ValueError(f"eps={group['eps']!r}: must be a number of at least 0")
        for key, values in _CHOICES.items():
            if key in group and group[key] not in values:
                raise ValueError(f"{key}={group[key]!r}: use one of {values}")
        level_count(group["bits"])
        if not isinstance(group["group_size"], int) or group["group_size"] < 1:
            raise ValueError(f"group_size={group['group_size']!r}: must be a positive int")
        if not isinstance(group["seed"], int) or not 0 <= group["seed"] < 2**62:
            raise ValueError(f"seed={group['seed']!r}: must be an int in [0, 2**62)")
        if group["nesterov"] and self._adam:
            raise ValueError("nesterov=True: Adam has no Nesterov form here")
        if group["nesterov"] and not group["momentum"] > 0:
            raise ValueError("nesterov=True needs momentum > 0")
        if group["capturable"] and group["error_if_nonfinite"]:
            raise ValueError(
                "error_if_nonfinite=True waits for the device, which capturable=True must not; use torch.amp.GradScaler"
            )
        if group["bits"] != 0:
            self._check_quantised(group)

    def _check_quantised(self, group: dict[str, Any]) -> None:
        if group["scale"] == "channel-mean" and not self._moving_levels(group):
            raise ValueError("scale='channel-mean' belongs to STAM's splitting form; use 'channel' here")

    def _name(self, group: dict[str, Any], index: int) -> str:
        names = group.get("param_names")
        return f"parameter {names[index]!r}" if names else f"parameter {index} of its group"

    # ---- state ---------------------------------------------------------------------------------------------------

    def _init_state(self, group: dict[str, Any], p: Tensor, name: str) -> dict[str, Any]:
        """The state of a parameter that is seen for the first time; changes nothing."""
        if p.is_complex() or not p.is_floating_point():
            raise TypeError(f"{name} has dtype {p.dtype}; only real floating-point parameters are trained")
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        momentum_dtype = dtype if dtype == torch.float64 else getattr(torch, group["momentum_dtype"])
        quantised = group["bits"] != 0
        rule = self._rule(group) if quantised else "base"
        stochastic = _rounds_stochastically(group, p.dtype, rule)
        w = p.detach()
        state: dict[str, Any] = {}
        if self._adam or stochastic:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if self._adam:
            state["exp_avg"] = torch.zeros_like(w, dtype=momentum_dtype)
            state["exp_avg_sq"] = torch.zeros_like(w, dtype=dtype)
        elif group["momentum"] != 0:
            state["momentum_buffer"] = torch.zeros_like(w, dtype=momentum_dtype)
        if rule in _LATENT_RULES:
            state["latent"] = w.to(dtype, copy=True)
        elif p.dtype in (torch.bfloat16, torch.float16) and group["rounding"] == "master":
            state["master"] = w.to(dtype, copy=True)
        if quantised:
            exact = _whole(w).to(dtype)  # sharded parameters are gathered once, for their scale
            sigma = grid.frozen_scale(
                exact, group["scale"].replace("channel-mean", "channel"), group["group_size"]
            )
            moving = self._moving_levels(group)
            scale = sigma
            if moving and group["scale"] != "channel-mean":
                scale = grid.mean_magnitude(exact)
            for value in (sigma, scale):
                if not bool(torch.all(value > 0)) or not bool(torch.isfinite(value).all()):
                    raise ValueError(
                        f"{name}: a slice of its weights is all zero or not finite, so its scale (scale="
                        f"{group['scale']!r}) is {float(value.min()):g}; "
                        "initialise it, or put it in a group with bits=0"
                    )
            if _is_sharded(w) and scale.numel() == 1 and moving:
                raise ValueError(f"{name} is sharded, and its scale follows all of it; use a frozen scale")
            state["scale"] = _shard_like(scale.contiguous(), w, name)
            if self._latent_bound_scale(group):
                per_row = "channel" if group["scale"] == "group" else group["scale"]
                if moving and w.dim() < 2:  # one channel, as its level
                    per_row = "tensor"
                sigma = grid.frozen_scale(exact, per_row) * grid.level_factor(level_count(group["bits"]))
                state["sigma"] = _shard_like(sigma.contiguous(), w, name)
        return state

    def _required(self, group: dict[str, Any], p: Tensor) -> list[str]:
        """The keys of the state that the group's options ask for, always in the same order."""
        quantised = group["bits"] != 0
        rule = self._rule(group) if quantised else "base"
        latent = rule in _LATENT_RULES
        low = p.dtype in (torch.bfloat16, torch.float16) and not latent
        asked = {
            "exp_avg": self._adam,
            "exp_avg_sq": self._adam,
            "step": self._adam or _rounds_stochastically(group, p.dtype, rule),
            "momentum_buffer": not self._adam and group.get("momentum", 0) != 0,
            "latent": latent,
            "master": low and group["rounding"] == "master",
            "scale": quantised,
            "sigma": quantised and self._latent_bound_scale(group),
        }
        return [key for key, needed in asked.items() if needed]

    def _ensure_state(self, group: dict[str, Any], with_grad_only: bool = False) -> list[int]:
        """Makes the state of the parameters that take part what the group's options ask for: what is missing is made,
        what is of another dtype converted, what nobody updates any more dropped, the rest kept. Returns their indices.
        All or nothing."""
        made: dict[nn.Parameter, dict[str, Any]] = {}
        taking_part = []
        for i, p in enumerate(group["params"]):
            if p.numel() == 0 or (with_grad_only and p.grad is None):
                continue
            taking_part.append(i)
            if group["rounding"] == "stochastic" and p.dtype == torch.float16:
                raise ValueError(
                    f"{self._name(group, i)} is float16: rounding='stochastic' is for bfloat16; use 'master'"
                )
            own = self.state.get(p, {})
            required = self._required(group, p)
            dtypes = {key: _state_dtype(group, p, key) for key in required}
            if own.keys() - {"signs"} == set(required) and all(own[k].dtype == dtypes[k] for k in required):
                continue
            fresh = own if own.keys() >= set(required) else self._init_state(group, p, self._name(group, i))
            made[p] = {key: (own if key in own else fresh)[key].to(dtypes[key]) for key in required}
            if "signs" in own:
                made[p]["signs"] = own["signs"]
        for p, state in made.items():
            self.state[p] = state
        return taking_part

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim, but float32 state stays float32 whatever the parameter's dtype, and the layout of a state
        follows its parameter. In capturable groups the tensors stay where they are and take up the loaded values, where
        shape and dtype are the same, as a captured graph goes on with them. Raises ValueError if the state does not
        fit the parameters; nothing is changed then.
        """
        groups, steps = self.param_groups, self._steps
        kept = [{key: group[key] for key in _SCHEDULED if key in group} for group in groups]
        present = {
            p: self.state[p]
            for group in groups
            if group["capturable"]
            for p in group["params"]
            if p in self.state
        }
        saved: list[tuple[nn.Parameter, dict[str, Any]]] = []

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:  # after the user's hooks
            self._check_state_dict(given)
            saved.extend(self._flat_states(given))

        def restore(_: torch.optim.Optimizer) -> None:  # before the user's hooks
            for group, own_numbers in zip(self.param_groups, kept, strict=True):
                _place_numbers(group, own_numbers)
            for p, state in saved:
                own = self.state[p]
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        own[key] = _restored(key, value, p, present.get(p, {}).get(key))
            # Each group is another dict since the load. Its step is laid out anew with the numbers that it has.
            loaded = dict(zip(map(id, groups), self.param_groups, strict=True))
            for step in steps:
                step.group, step.lasting = loaded.get(id(step.group)), False
            self._steps = steps

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _flat_states(self, state_dict: dict[str, Any]) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        states = state_dict["state"]
        return [(p, states[i]) for i, p in zip(ids, params, strict=True) if i in states]

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups")
        if not isinstance(groups, list) or not isinstance(state_dict.get("state"), dict):
            raise ValueError(
                "state_dict has no 'param_groups' and 'state': it is not the state of an optimizer"
            )
        have = [len(group["params"]) for group in self.param_groups]
        given = [len(group["params"]) for group in groups]
        if have != given:
            raise ValueError(
                f"state_dict has groups of {given} parameters, this optimizer {have}: another model?"
            )
        for own, group in zip(self.param_groups, groups, strict=True):
            missing = (
                set(self.defaults) - set(group) - {"differentiable"}
            )  # torch adds that to defaults at a load
            if missing:
                raise ValueError(f"state_dict is of another optimizer: its groups lack {sorted(missing)}")
            self._check_group({**own, **group})
            for i, index in enumerate(group["params"]):
                self._check_state(
                    group, own["params"][i], state_dict["state"].get(index, {}), self._name(own, i)
                )

    def _check_state(self, group: dict[str, Any], p: Tensor, state: dict[str, Any], name: str) -> None:
        if not state:
            return  # not seen yet

        def refuse(reason: str) -> None:
            raise ValueError(
                f"state_dict: the state of {name} {reason}: is it of another model or optimizer?"
            )

        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            refuse("is not a dict of tensors")
        missing = set(self._required({**self.defaults, **group}, p)) - {"master"} - state.keys()
        if missing:
            refuse(f"lacks {sorted(missing)}")
        channels = p.shape[0] if p.dim() else 1
        for key, value in state.items():
            if key in _COMPANIONS and (value.shape != p.shape or not value.is_floating_point()):
                refuse(f"has {key} of shape {tuple(value.shape)} and {value.dtype}, not {tuple(p.shape)}")
            elif key in ("scale", "sigma"):
                local = _local(value)
                shape_fits = value.numel() == 1 or (value.dim() in (1, 2) and value.shape[0] == channels)
                if not (
                    shape_fits and value.is_floating_point() and bool(((local >= 0) & local.isfinite()).all())
                ):
                    refuse(f"has a {key} of shape {tuple(value.shape)} that is no scale of the weights")
            elif key == "step" and (value.numel() != 1 or not value.is_floating_point()):
                refuse("has a step that is not one number")
            elif key == "signs" and (value.dtype != torch.uint8 or value.dim() != 1):
                refuse("has signs that are not packed bits")
            elif key == "signs" and not _is_sharded(p) and value.numel() != (p.numel() + 7) // 8:
                refuse(f"has signs of {value.numel()} bytes")

    # ---- the step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient.

        Raises TypeError for sparse or complex gradients, ValueError for a parameter whose scale is zero and, in groups
        with ``error_if_nonfinite``, FloatingPointError for a gradient that is not finite, naming the parameter, before
        anything is changed.
        """
        if closure is not None or self._is_watched():
            return self._watched_step(closure)
        self._update()
        return None

    step.hooked = True  # type: ignore[attr-defined] # torch wraps a step in its hooks and profiler, which we do if needed

    def _is_watched(self) -> bool:
        """Whether a hook, a profiler or a compiler wants to see the step: else it goes straight to the kernels."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
            or torch.compiler.is_compiling()
        )

    @torch.optim.Optimizer.profile_hook_step
    def _watched_step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._update_outside_of_graphs()
        else:
            self._update()
        return loss

    def _update(self) -> None:
        groups = self.param_groups
        for group in groups:
            if group["error_if_nonfinite"]:
                self._check_finite(group)
        steps = self._steps
        intact = len(steps) == len(groups) and (
            _extension.same is None or _extension.same(list(self.state.values()), self._all_states)
        )
        stale = [i for i, group in enumerate(groups) if not (intact and steps[i].ready(self, group))]
        if stale:
            steps = self._renewed(stale if intact else list(range(len(groups))))
        for step in steps:
            step.step(self)

    @torch.no_grad()
    def _renewed(self, stale: list[int]) -> list["_GroupStep"]:
        """The steps of all groups, those of the groups ``stale`` laid out anew."""
        groups = [self.param_groups[i] for i in stale]
        for group in groups:
            self._check_grads(group)
        indices = [self._ensure_state(group, with_grad_only=True) for group in groups]
        count = len(self.param_groups)
        steps = list(self._steps) if len(self._steps) == count else [None] * count
        for i, group, chosen in zip(stale, groups, indices, strict=True):
            before = next((step for step in self._steps if step is not None and step.group is group), None)
            steps[i] = _GroupStep(self, group, chosen, i, before)
        self._steps = steps
        self._all_states = list(self.state.values())
        return self._steps

    # A compiled training step breaks its graph here: the update is one call of a compiled kernel as it is, and numbers
    # that change (lr, epsilon) cause no recompilation.
    _update_outside_of_graphs = torch._disable_dynamo(_update)  # type: ignore[attr-defined]

    def _check_grads(self, group: dict[str, Any]) -> None:
        for i, p in enumerate(group["params"]):
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.layout != torch.strided:
                raise TypeError(
                    f"{self._name(group, i)} has a sparse gradient; only dense gradients are supported"
                )
            if p.grad.is_complex():
                raise TypeError(
                    f"{self._name(group, i)} has a complex gradient; only real gradients are supported"
                )

    def _check_finite(self, group: dict[str, Any]) -> None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # GradScaler has seen it, and the step is skipped
        chosen = [i for i, p in enumerate(group["params"]) if p.grad is not None and p.numel()]
        grads = [_local(group["params"][i].grad) for i in chosen]
        if not grads or any(g.layout != torch.strided for g in grads):
            return
        sizes = torch._foreach_norm(grads, float("inf"))
        if all(bool(torch.isfinite(torch.stack(part)).all()) for part in _by_device(sizes)):
            return
        for i, size in zip(chosen, sizes, strict=True):
            if not bool(torch.isfinite(size)):
                raise FloatingPointError(
                    f"{self._name(group, i)} has a gradient that is not finite; nothing was changed. Lower the "
                    "learning rate, clip the gradients, or use torch.amp.GradScaler"
                )

    def _after_step(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        """What a rule adds to the fused step of a quantised group."""

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """Everything of the step that may change from step to step: floats, and tensors if capturable."""
        rule = self._hyper(group) if group["bits"] != 0 else {}
        return {
            "lr": number(group, "lr"),
            "weight_decay": group["weight_decay"],
            **self._base_hyper(group),
            **rule,
        }

    def _base_hyper(self, group: dict[str, Any]) -> dict[str, float]:
        if self._adam:
            return {"momentum": group["betas"][0], "beta2": group["betas"][1], "adam_eps": group["eps"]}
        return {"momentum": group["momentum"]}

    # ---- views of the weights ------------------------------------------------------------------------------------

    def _operand(self, p: nn.Parameter) -> Tensor:
        """The full-precision tensor behind a quantised weight (of this rank's shard): latent, master, or itself."""
        state = self.state[p]  # of what _ensure_state keeps there, a latent or master is the weight
        return _local(state.get("latent", state.get("master", p.detach())))

    def _outer(self, group: dict[str, Any], p: nn.Parameter) -> tuple[Tensor, int]:
        """(outer levels in the shape of the scale, K)."""
        levels = level_count(group["bits"])
        return _local(self.state[p]["scale"]) * grid.level_factor(levels), levels

    def _quantised_params(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            if group["bits"] != 0:
                self._ensure_state(group)
                yield from ((group, p) for p in group["params"] if p.numel())

    def _projected(self, group: dict[str, Any], p: nn.Parameter) -> Tensor:
        outer, levels = self._outer(group, p)
        w = self._operand(p)
        return grid.project(w, grid.spread_over(outer, w, group["group_size"]), levels)

    @contextlib.contextmanager
    def _swapped(self, weight_of: Callable[[dict[str, Any], nn.Parameter], Tensor]) -> Iterator[None]:
        with torch.no_grad():
            pairs = [
                (_local(p.detach()), weight_of(group, p).to(p.dtype)) for group, p in self._quantised_params()
            ]
            kept = [p.clone() for p, _ in pairs]
            for p, w in pairs:
                p.copy_(w)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), w in zip(pairs, kept, strict=True):
                    p.copy_(w)

    def quantized(self) -> contextlib.AbstractContextManager[None]:
        """Context in which every quantised parameter is its projection onto the levels; what the network ran with
        before is restored on exit, also on an exception. Do not step inside."""
        return self._swapped(self._projected)

    def latent(self) -> contextlib.AbstractContextManager[None]:
        """Context in which every quantised parameter is its latent weight (itself where the rule has none)."""
        return self._swapped(lambda _, p: self._operand(p))

    @torch.no_grad()
    def quantization(self, p: nn.Parameter) -> Quantization | None:
        """Codes and outer levels of the projection of ``p``, or None if ``p`` is not quantised by this optimizer."""
        for group, own in self._quantised_params():
            if own is not p:
                continue
            state, levels = self.state[p], level_count(group["bits"])
            outer = _whole(state["scale"]) * grid.level_factor(levels)
            w = _whole(state.get("latent", state.get("master", p.detach())))
            if not bool(torch.isfinite(w).all()):
                raise ValueError(
                    "a quantised weight is not finite: the training diverged, there is nothing to pack"
                )
            codes = grid.codes(w, grid.spread_over(outer, w, group["group_size"]), levels)
            return Quantization(levels, codes, outer.float(), group["group_size"] if outer.dim() == 2 else 0)
        return None

    @torch.no_grad()
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per group: "bits" and "numel", and for quantised groups (of sharded parameters, this rank's shard)

        - "fraction_feasible": fraction of the weights in their interval, |t| >= t* (0.995 where there is no epsilon)
        - "sign_flips": how many weights of the projection changed sign since the last call (0 at the first)
        - "distance": mean distance of the weights to their nearest level, in half-steps of the grid, 0..1
        - "scale": mean scale
        """
        rows: list[dict[str, Any]] = []
        for group in self.param_groups:
            row: dict[str, Any] = {
                "bits": group["bits"],
                "numel": sum(_local(p).numel() for p in group["params"]),
            }
            rows.append(row)
            if group["bits"] == 0:
                continue
            self._ensure_state(group)
            smallest = t_star(group["epsilon"]) if "epsilon" in group else CLOSED_INTERVAL
            smallest -= 1e-5  # rounding of t
            feasible = distance = scale = 0.0
            flips = 0
            for p in group["params"]:
                if _local(p).numel() == 0:
                    continue
                state = self.state[p]
                outer, levels = self._outer(group, p)
                w = _local(state.get("master", p.detach())).to(outer.dtype)
                _, _, t = grid.cell(w, grid.spread_over(outer, w, group["group_size"]), levels)
                feasible += float((t.abs() >= smallest).sum())
                distance += float((1 - t.abs()).abs().clamp(max=1).sum())
                scale += float(outer.mean()) / grid.level_factor(levels) * w.numel()
                signs = pack_signs(self._operand(p).reshape(-1))
                if "signs" in state:
                    flips += _count_bits(signs ^ state["signs"])
                state["signs"] = signs
            count = max(row["numel"], 1)
            row.update(
                fraction_feasible=feasible / count,
                sign_flips=flips,
                distance=distance / count,
                scale=scale / count,
            )
        return rows


class _GroupStep:
    """The step of one group: its lists for the op, per device and dtype, made once and used again while they hold."""

    # What the lists depend on, beside the tensors.
    STATIC = (
        "bits", "group_size", "nesterov", "maximize", "decoupled_weight_decay", "rounding", "seed", "scale",
        "error_if_nonfinite", "capturable", "momentum_dtype", "memory", "constrain", "form", "clip", "stochastic",
    )  # fmt: skip

    def __init__(
        self,
        opt: QuantOptimizer,
        group: dict[str, Any],
        indices: list[int],
        number: int,
        before: "_GroupStep | None",
    ) -> None:
        self.group = group
        self.number = number  # of the group
        self.numbers: dict[str, float]  # the floats that `hyper` holds; empty where that is not known
        self.hyper: Tensor
        self.replayed: bool  # whether the replay of a graph writes floats into `hyper`
        self.backend = opt.backend
        self.static_keys = tuple(key for key in self.STATIC if key in group)
        self.static = tuple(group[key] for key in self.static_keys)
        self.has_momentum = bool(group.get("momentum"))
        self.quantised = group["bits"] != 0
        self.rule = opt._rule(group) if self.quantised else "base"
        self.all_params = list(group["params"])
        self.indices = indices
        self.params = [group["params"][i] for i in indices]
        self.states = [opt.state[p] for p in self.params]
        device = self.params[0].device if group["capturable"] and self.params else torch.device("cpu")
        if before is not None and before.hyper.device == device:  # a captured graph may read it, and write it
            self.numbers, self.hyper, self.replayed = before.numbers, before.hyper, before.replayed
        else:
            self.numbers = {}
            self.hyper = torch.zeros(len(HYPER), dtype=torch.float64, device=device)
            self.replayed = False
        self.buckets: list[tuple[torch.dtype, torch.device, list[int]]] = []
        for i, p in enumerate(self.params):
            kind = (p.dtype, p.device)
            bucket = next((b for b in self.buckets if b[:2] == kind), None)
            if bucket is None:
                self.buckets.append((*kind, [i]))
            else:
                bucket[2].append(i)
        self.kept: list[tuple[list[dict[str, Any]], tuple[str, ...], list[tuple[Tensor, ...]]]] = []
        self.lasting = True  # whether the next step may be as this one
        self.plans = [self._plan(opt, *bucket) for bucket in self.buckets]
        self.plan_numbers = [plan.number() for plan in self.plans if plan is not None]

    def _options(self, opt: QuantOptimizer, dtype: torch.dtype) -> dict[str, Any]:
        group = self.group
        stochastic = _rounds_stochastically(group, dtype, self.rule)
        return {
            "levels": level_count(group["bits"]),
            "group_size": group["group_size"],
            "moving_levels": self.quantised and opt._moving_levels(group),
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
            "decoupled": group["decoupled_weight_decay"],
            # each group its own stream: the kernels count the tensors of a list from 0
            "seed": (group["seed"] + self.number * 0x9E3779B97F4A7C15) % 2**62 if stochastic else -1,
        }

    def _lists(
        self, opt: QuantOptimizer, companions: dict[str, list[Tensor]], chosen: list[int]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """momentums, seconds, latents, scales, sigmas, steps."""
        states = [self.states[i] for i in chosen]
        return (
            companions["exp_avg"] if opt._adam else companions["momentum_buffer"],
            companions["exp_avg_sq"],
            companions["latent"] or companions["master"],
            [_local(s["scale"]) for s in states if "scale" in s],
            [_local(s["sigma"]) for s in states if "sigma" in s],
            [s["step"] for s in states if "step" in s],
        )

    def _plan(self, opt: QuantOptimizer, dtype: torch.dtype, device: torch.device, chosen: list[int]) -> Any:
        """A compiled plan, if the compiled kernels step the parameters of a bucket as they lie in memory, or None."""
        params, states = [self.params[i] for i in chosen], [self.states[i] for i in chosen]
        keys = tuple(key for key in states[0] if key != "signs")
        self.kept.append((states, keys, [tuple(state[key] for key in keys) for state in states]))
        if choose("fused_step", device, dtype, opt.backend).name != device.type:
            return None
        if any(type(p) is not nn.Parameter and type(p) is not Tensor for p in params):
            return None
        with _dense(params, states) as (weights, grads, companions):
            as_they_lie = all(w.data_ptr() == p.data_ptr() for w, p in zip(weights, params, strict=True))
            own = {id(value) for state in states for value in state.values()}
            as_they_lie &= all(id(t) in own for tensors in companions.values() for t in tensors)
            grads_as_they_lie = all(g is p.grad for g, p in zip(grads, params, strict=True))
        if not as_they_lie:
            return None
        if grads_as_they_lie:
            taking_part = set(map(id, self.params))
            left_out = [p for p in self.all_params if id(p) not in taking_part]
            lists = self._lists(opt, companions, chosen)
            options = self._options(opt, dtype).values()
            plan = torch.classes.quantopt.StepPlan(self.rule, params, left_out, *lists, self.hyper, *options)
            if _extension.plan_ready(plan.number()):
                return plan
        self.lasting = False  # with gradients that lie as the parameters do there is a plan
        return None

    def ready(self, opt: QuantOptimizer, group: dict[str, Any]) -> bool:
        """Whether this is still the step of the group: same options, same tensors, gradients where they were."""
        if group is not self.group or opt.backend != self.backend:
            return False
        if not self.params:
            same = len(group["params"]) == len(self.all_params)
            return same and all(p.grad is None or p.numel() == 0 for p in group["params"])
        if _extension.same is None:  # nor the other functions below
            return False
        return bool(
            self.lasting
            and bool(group.get("momentum")) == self.has_momentum
            and _extension.same(group["params"], self.all_params)
            and _extension.holds([group], self.static_keys, [self.static])
            and all(_extension.holds(*kept) for kept in self.kept)
            and all(map(_extension.plan_ready, self.plan_numbers))
            and (len(self.plan_numbers) == len(self.buckets) or self._grads_as_before())
        )

    def _grads_as_before(self) -> bool:
        """What the plans say themselves: whether the same parameters have gradients, and are of the kinds they were."""
        with_grad = [i for i, p in enumerate(self.all_params) if p.grad is not None and p.numel()]
        return (
            with_grad == self.indices
            and all(p.grad.layout == torch.strided and not p.grad.is_complex() for p in self.params)
            and all(
                self.params[i].dtype == dtype and self.params[i].device == device
                for dtype, device, chosen in self.buckets
                for i in chosen
            )
        )

    def step(self, opt: QuantOptimizer) -> None:
        """The update; nothing is checked here but that a graph may be captured."""
        if not self.params:
            return
        numbers, tensors = opt._numbers(self.group), None
        if self.group["capturable"]:
            numbers, tensors = _split_numbers(numbers)
        else:
            self._refuse_capture()
        if numbers != self.numbers:
            self._write(numbers)
        if tensors:  # on the device: a CUDA graph reads their values when it is replayed
            torch._foreach_copy_([self.hyper[HYPER.index(name)] for name in tensors], list(tensors.values()))
        grad_scale, found_inf = getattr(opt, "grad_scale", None), getattr(opt, "found_inf", None)
        if len(self.plan_numbers) == len(self.buckets) and grad_scale is None and found_inf is None:
            for number in self.plan_numbers:
                _extension.plan_step(number)
        else:
            for plan, (dtype, device, chosen) in zip(self.plans, self.buckets, strict=True):
                flags = _flag(grad_scale, device), _flag(found_inf, device)
                if plan is not None:
                    plan.step(*flags)
                else:
                    self._step_lists(opt, dtype, device, chosen, *flags)
        if self.quantised:
            opt._after_step(self.group, self.params)

    def _write(self, numbers: dict[str, float]) -> None:
        """Floats that have changed, into `hyper`; on a device as the arguments of kernels, as a copy would wait."""
        if self.hyper.device.type == "cpu":
            self.hyper.copy_(hyper_tensor(**numbers))
        else:
            for name, value in numbers.items():
                if self.numbers.get(name) != value:
                    self.hyper[HYPER.index(name)].fill_(value)
        # A capture writes nothing now, and each replay writes again: from then on no step can rely on what is there.
        self.replayed = self.replayed or _is_capturing(self.hyper.device)
        self.numbers = {} if self.replayed else numbers

    def _refuse_capture(self) -> None:
        if any(_is_capturing(device) for _, device, _ in self.buckets):
            raise RuntimeError(
                "a CUDA graph is being captured, and capturable=False: the learning rate and the annealed numbers "
                "would be those of now at every replay; use capturable=True"
            )

    @torch.no_grad()
    def _step_lists(
        self,
        opt: QuantOptimizer,
        dtype: torch.dtype,
        device: torch.device,
        chosen: list[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        params, states = [self.params[i] for i in chosen], [self.states[i] for i in chosen]
        with _dense(params, states) as (weights, grads, companions):
            fused_step(
                self.rule,
                weights,
                grads,
                *self._lists(opt, companions, chosen),
                hyper=self.hyper,
                backend=opt.backend,
                grad_scale=grad_scale,
                found_inf=found_inf,
                **self._options(opt, dtype),
            )
        torch.autograd.graph.increment_version(params)


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of ``device``, which need not be the current one."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _split_numbers(numbers: dict[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
    tensors = {name: value.reshape(()) for name, value in numbers.items() if isinstance(value, Tensor)}
    return {name: value for name, value in numbers.items() if name not in tensors}, tensors


def _place_numbers(group: dict[str, Any], own: dict[str, Any] | None = None) -> None:
    """Makes the scheduled values of a capturable group float64 tensors on the device of its parameters.

    A tensor that is there already is kept. ``own``: the values before a state_dict was loaded, whose tensors take up
    the loaded values, since a captured graph may read them.
    """
    if not group["capturable"] or not group["params"]:
        return
    device = group["params"][0].device
    if any(p.device != device for p in group["params"]):
        raise ValueError(
            "capturable=True: the parameters of a group must be on one device; make a group for each"
        )
    for key in _SCHEDULED:
        value = group.get(key)
        if value is None:
            continue
        before = (own or {}).get(key)
        if isinstance(before, Tensor) and before.device == device:
            group[key] = before.copy_(torch.as_tensor(value))
        elif own is None and isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{key} is a tensor on {value.device}; with capturable=True it must be on {device}, as the parameters"
            )
        elif not isinstance(value, Tensor) or value.device != device:
            group[key] = torch.tensor(float(value), dtype=torch.float64, device=device)


def _flag(value: Tensor | None, device: torch.device) -> Tensor | None:
    """grad_scale or found_inf of torch.amp.GradScaler, which it sets for the time of a step."""
    return None if value is None else value.to(device, torch.float32)


def _by_device(values: Sequence[Tensor]) -> list[list[Tensor]]:
    """The values that can be stacked, together."""
    parts: dict[Any, list[Tensor]] = {}
    for value in values:
        parts.setdefault((value.device, value.dtype), []).append(value)
    return list(parts.values())


def _state_dtype(group: dict[str, Any], p: Tensor, key: str) -> torch.dtype:
    """The dtype of a state of ``p``: float32 whatever the parameter's type, but for what the group says."""
    if key == "step":
        return torch.float32
    if p.dtype == torch.float64:
        return torch.float64
    if key in ("momentum_buffer", "exp_avg"):
        return torch.bfloat16 if group["momentum_dtype"] == "bfloat16" else torch.float32
    return torch.float32


def _rounds_stochastically(group: dict[str, Any], dtype: torch.dtype, rule: str) -> bool:
    """Whether the weights themselves are rounded so: bfloat16 without a latent (a latent or master keeps float32)."""
    return bool(group["rounding"] == "stochastic" and dtype == torch.bfloat16 and rule not in _LATENT_RULES)


def _is_sharded(t: Tensor) -> bool:
    return hasattr(t, "to_local")  # a DTensor; asked so that torch.distributed need not be imported


def _local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def _whole(t: Tensor) -> Tensor:
    """All of a DTensor, gathered; any other tensor as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _shard_like(scale: Tensor, w: Tensor, name: str) -> Tensor:
    """The rows of a scale that belong to this rank's rows of ``w``, as a DTensor that a checkpoint can reshard."""
    if not _is_sharded(w) or scale.numel() == 1:
        return scale
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(w, DTensor)
    if not all(placement.is_replicate() or placement.is_shard(0) for placement in w.placements):
        raise ValueError(
            f"{name} is sharded as {w.placements}: scales per channel and group need Shard(0); use scale='tensor' and "
            "a rule without moving levels"
        )
    return distribute_tensor(scale, w.device_mesh, w.placements)


def _count_bits(x: Tensor) -> int:
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)], device=x.device)
    return int(ones[x.int()].sum())


def _restored(key: str, value: Tensor, p: Tensor, present: Tensor | None) -> Tensor:
    """A loaded state on the parameter's device, in its own dtype; a companion takes the parameter's layout.

    ``present``: the tensor to hold it, if it fits."""
    value = value.detach()
    if present is not None and type(present) is type(value):
        if (present.shape, present.dtype, present.device) == (value.shape, value.dtype, p.device):
            return present.copy_(value)
    value = value.to(p.device)
    return torch.empty_like(p, dtype=value.dtype).copy_(value) if key in _COMPANIONS else value.clone()


@contextlib.contextmanager
def _dense(
    params: list[nn.Parameter], states: list[dict[str, Any]]
) -> Iterator[tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]]:
    """Parameters, gradients and companions as the kernels need them: dense, and all of one layout.

    What is not (an expanded gradient, a transposed weight with per-channel scales) is copied, and copied back.
    """
    weights, grads = [], []
    companions: dict[str, list[Tensor]] = {key: [] for key in _COMPANIONS}
    copies: list[tuple[Tensor, Tensor]] = []
    for p, state in zip(params, states, strict=True):
        assert p.grad is not None
        w, g = _local(p.detach()), _local(p.grad)
        if not w.is_contiguous() and not _row_dense(w, state):
            w = w.contiguous()
            copies.append((_local(p.detach()), w))
        if g.stride() != w.stride() or g.dtype != w.dtype:
            g = torch.empty_like(w).copy_(g)
        weights.append(w)
        grads.append(g)
        for key in _COMPANIONS:
            if key not in state:
                continue
            value = _local(state[key])
            if value.stride() != w.stride():
                fresh = torch.empty_like(w, dtype=value.dtype).copy_(value)
                copies.append((value, fresh))
                value = fresh
            companions[key].append(value)
    yield weights, grads, companions
    for target, source in copies:
        target.copy_(source)


def _row_dense(w: Tensor, state: dict[str, Any]) -> bool:
    """Whether the elements that share a scale are consecutive in memory."""
    if w.numel() == 0:
        return True
    if not torch.ops.aten.is_non_overlapping_and_dense(w):
        return False
    scale = state.get("scale")
    if scale is None or scale.numel() == 1:
        return True
    return scale.dim() == 1 and w.stride(0) == w.numel() // w.shape[0]
