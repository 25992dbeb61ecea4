"""The base class of the optimizers: what a subclass says, the groups, checkpoints, the step."""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from quantopt.backends import BACKENDS
from quantopt.levels import Quantization
from quantopt.optim import gradients, muon, sharded, state, views
from quantopt.optim.options import (
    ADAM_LR,
    BASE_OPTIONS,
    MUON_LR,
    OPTIONS,
    SCHEDULED,
    SHARED,
    check_group,
    check_second_moments,
    flag,
    keep_position,
    of_base,
    one_device,
    place_scheduled,
    read_at_each_step,
    scheduled_value,
    shared_options,
)
from quantopt.optim.step import GroupStep, same
from quantopt.optim.written import Record
from quantopt.rules import RULES
from quantopt.wrappers import unwrapped


class LevelOptimizer(torch.optim.Optimizer):
    """Base class of the optimizers.

    ``p.data`` is always what the network runs with. Latent weights, momentum and scales live in ``state``, which is
    made when a parameter is first seen (first step, or first view of its weights). Groups with ``bits=0`` are trained
    by the plain base rule. The step is one pass of a fused kernel over every dtype and device of a group.

    ``p.data`` counts: where somebody else has written to a parameter that has state (a loaded checkpoint, averaged
    weights, a mask), its latent or master weights take the new value up at the next step or view; scale and momentum
    stay, and so do the latents of weights that were not touched. After a load a warning tells where the weights are not
    those of the loaded state; views show the weights then, and the next step changes the state. Writes are seen as
    torch counts them, with ``torch.no_grad()`` and ``p.copy_()``, and through ``p.data = x``. Not seen are those that
    torch does not count (``p.data.copy_(x)``, NumPy arrays on the same memory, parameters made in inference mode), nor
    those between replays of a captured graph.

    A group may have keys of its user's, which are saved and otherwise ignored; those of a subclass that influence its
    step are ``extra_options``. A step that is refused leaves weights and state as they were.
    """

    _base = "sgd"  # of groups that have no such key
    extra_options: Mapping[str, Any] = {}  # group keys of a user's subclass, with their defaults

    def __init__(
        self, params: Any, options: dict[str, Any], backend: str = "auto", fused_amp: bool = False
    ) -> None:
        """``options``: group keys of :data:`OPTIONS`; None stands for the default of the group's form."""
        flag("fused_amp", fused_amp)
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: use 'auto' or one of {BACKENDS}")
        self.backend = backend
        self._step_supports_amp_scaling = fused_amp  # torch.amp.GradScaler asks for it
        options = {"bits": None} | shared_options() | options
        self._options: dict[str, Any] = options | dict(self.extra_options)
        self._forget_steps()
        super().__init__(params, self._completed({}))
        check_second_moments(options, [group.get("base", self._base) for group in self.param_groups])

    def __getstate__(self) -> dict[str, Any]:
        pickled: dict[str, Any] = super().__getstate__()
        own = ("backend", "_options", "_step_supports_amp_scaling")
        return pickled | {key: getattr(self, key) for key in own}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        super().__setstate__(pickled)
        of_version_0_1_0 = {"base": self._base} | self.defaults  # which pickled no _options
        self._options = shared_options() | self.__dict__.get("_options", of_version_0_1_0)
        self.__dict__.setdefault("_step_supports_amp_scaling", False)
        self._forget_steps()

    def _forget_steps(self) -> None:
        self._group_steps: list[GroupStep] = []
        self._step_states: list[dict[str, Any]] = []  # the values of `state` that they were made with
        self._written = Record()

    # ---- what a subclass says ------------------------------------------------------------------------------------

    def _rule(self, group: dict[str, Any]) -> str:
        """The rule (of :data:`quantopt.rules.RULES`) of a quantised group."""
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's numbers of :data:`quantopt.rules.HYPER`, beside those of the base and weight_decay."""
        return {}

    def _sgd_lr(self, group: dict[str, Any]) -> float:
        """Default of lr on the base "sgd"."""
        raise NotImplementedError

    def _form_defaults(self, group: dict[str, Any]) -> dict[str, Any]:
        """Defaults of the options that a constructor leaves None, which depend on others of the group."""
        rates = {"sgd": self._sgd_lr(group), "adam": ADAM_LR, "muon": MUON_LR}
        return {"lr": rates.get(group["base"])}

    def _dynamic_scale(self, group: dict[str, Any]) -> bool:
        """Whether the scale follows the weights (mean magnitude) instead of being frozen."""
        return False

    def _bounds_latent(self, group: dict[str, Any]) -> bool:
        """Whether the latent is clipped at a multiple of a frozen scale, which the state then has."""
        return False

    def _check_quantised(self, group: dict[str, Any]) -> None:
        """Raises ValueError for options of a quantised group that do not go together."""
        scale = group["scale"]
        if scale.endswith("-mean") and not self._dynamic_scale(group):
            raise ValueError(
                f"scale={scale!r} belongs to STAM's splitting form; use {scale.removesuffix('-mean')!r} here"
            )

    def adds_to_step(self, group: dict[str, Any]) -> bool:
        """Whether `_after_step` does anything for a quantised group."""
        return False

    def _after_step(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        """What a rule adds to the fused step of a quantised group."""

    def annealed(self, group: dict[str, Any], step: int, total_steps: int) -> dict[str, float]:
        """Values of the group's annealed keys after ``step`` of ``total_steps`` steps; :class:`Anneal` sets them.

        Keyword arguments of the subclasses are the schedule's settings, fractions of the training and values."""
        return {}

    # ---- groups --------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. An option that neither the group nor the constructor sets has the default of the group's form
        (``memory``, ``form``, ``base``). Raises ValueError naming the key, its value and the remedy; nothing is added
        then."""
        completed = self._completed(param_group)
        if completed["bits"] is None:
            raise ValueError(
                "bits=None: a group, or the constructor, must say which weights are quantised. "
                "quantopt.param_groups(model) makes the groups; else pass bits=1, 2, 3, 4, '17-level' or 'ternary', or "
                "0 for full precision"
            )
        whole = self.whole(completed)
        self._check(whole)
        check_second_moments(param_group, [whole["base"]])
        # Not of a loaded group: versions up to 0.1.0 took it.
        if whole["decoupled_weight_decay"] and RULES[self.rule_of(whole)].latent:
            raise ValueError(
                "decoupled_weight_decay=True: weight decay of a latent weight is decoupled as it is; leave it out of "
                "the group and the constructor, and set it in the groups with bits=0 alone"
            )
        super().add_param_group(completed)
        try:
            place_scheduled(self.param_groups[-1])
            in_rows = whole["bits"] != 0 and (
                whole["scale"] not in ("none", "tensor", "sawb") or self._dynamic_scale(whole)
            )
            sharded.check_parameters(self.param_groups[-1], self.name_of, in_rows)
            muon.check_parameters(self.whole(self.param_groups[-1]), self.name_of)
        except ValueError:
            self.param_groups.pop()
            raise

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with every option that it reads, but for the usual values."""
        full = self._options | group
        full |= of_base(self._options, group, full["base"])
        unset = [key for key, value in full.items() if value is None and key in OPTIONS and key not in group]
        if unset and full["base"] in tuple(BASE_OPTIONS):  # the check refuses another base
            defaults = self._form_defaults(full)
            full |= {key: defaults.get(key) for key in unset}
            if "lr" in unset and full["lr"] is None:
                raise ValueError(f"lr=None: base={full['base']!r} has no default of it; pass lr")
        unread = self._unread(full)
        unread |= {key for key, usual in self._usual.items() if full.get(key) == usual}
        return {key: value for key, value in full.items() if key in group or key not in unread}

    def _unread(self, group: dict[str, Any]) -> set[str]:
        """Options of the bases that a group is not on."""
        own = group.get("base", self._base)
        read = next((keys for base, keys in BASE_OPTIONS.items() if base == own), ())
        return {key for keys in BASE_OPTIONS.values() for key in keys} - set(read)

    @property
    def _usual(self) -> dict[str, Any]:
        """What a group has that lacks the key: it need not say what is as in version 0.1.0."""
        return {"base": self._base} | {key: value for key, value in _USUAL.items() if key in self._options}

    def whole(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with all options, also those that it does not read."""
        full = self._options | self._usual | group
        return full | of_base(self._options, group, full["base"])

    def _check(self, group: dict[str, Any]) -> None:
        check_group(group, self._options)
        if group["bits"] != 0:
            self._check_quantised(group)

    def layout_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of a group on which the layout of its step depends."""
        return tuple(key for key in group if key in self._options and not read_at_each_step(key))

    def rule_of(self, group: dict[str, Any]) -> str:
        """The rule of a group, "none" where it is not quantised."""
        return self._rule(group) if group["bits"] != 0 else "none"

    def name_of_param(self, group: dict[str, Any], p: nn.Parameter) -> str:
        """:meth:`name_of` the parameter itself."""
        return self.name_of(group, next(i for i, own in enumerate(group["params"]) if own is p))

    def name_of(self, group: dict[str, Any], index: int) -> str:
        """A parameter of a group, for messages."""
        names = group.get("param_names")
        return f"parameter {names[index]!r}" if names else f"parameter {index} of its group"

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim, but state keeps its dtype whatever the parameter's, and the layout of a state follows its
        parameter. Where the groups of both sides have ``param_names`` (as those of :func:`quantopt.param_groups`), a
        state goes to the parameter of its name in the group at the same position, else by position. Names are compared
        without the parts that DDP, FSDP and torch.compile add, and stay as they are here.

        Options that an older state_dict lacks take their defaults. The position of an
        :class:`quantopt.Anneal` is loaded; where the state_dict has none, it stays, with a warning. In capturable
        groups the tensors stay where they are and take up the loaded values, where shape and dtype are the same, as a
        captured graph goes on with them. Raises ValueError if the state does not fit the parameters, or names differ;
        nothing is changed then.
        """
        optimizer = unwrapped(self)
        if optimizer is not self:  # self is Lightning's wrapper, which would keep the state for itself
            optimizer.load_state_dict(state_dict)
            return
        self._refuse_inside_views("load_state_dict()")
        groups, group_steps = self.param_groups, self._group_steps
        scheduled = [{key: group[key] for key in SCHEDULED if key in group} for group in groups]
        present = {
            p: self.state[p]
            for group in groups
            if group["capturable"]
            for p in group["params"]
            if p in self.state
        }
        loaded: list[tuple[nn.Parameter, dict[str, Any]]] = []
        notes: list[str | None] = []

        # after the user's hooks
        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            given = self._fitting(given)
            loaded.extend(state.flat_states(self, given))
            notes.append(keep_position(groups, given["param_groups"]))
            return given

        def restore(_: torch.optim.Optimizer) -> None:  # before the user's hooks
            for group, own, before in zip(self.param_groups, groups, scheduled, strict=True):
                for key in set(own) & _LATER - set(self._usual):  # which a group without the key has
                    group.setdefault(key, self.whole(group)[key])
                place_scheduled(group, before)
            for p, values in loaded:
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        self.state[p][key] = state.restored(key, value, p, present.get(p, {}).get(key))
            # Each group is another dict since the load. Its step is laid out again, with the `hyper` that it has.
            renewed = dict(zip(map(id, groups), self.param_groups, strict=True))
            for step in group_steps:
                step.group, step.is_current = renewed.get(id(step.group), step.group), False
            self._group_steps = group_steps
            self._written.forget()

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        for note in filter(None, notes):
            warnings.warn(note, stacklevel=2)

    def _fitting(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of a state_dict that goes by position. Raises ValueError if it does not fit."""
        groups = state_dict.get("param_groups")
        if not isinstance(groups, list) or not isinstance(state_dict.get("state"), dict):
            raise ValueError(
                "state_dict has no 'param_groups' and 'state': it is not the state of an optimizer"
            )
        have = [len(group["params"]) for group in self.param_groups]
        given = [len(group["params"]) for group in groups]
        if len(have) == len(given):
            groups = state.in_own_order(self, groups)
        if have != given:
            raise ValueError(
                f"state_dict has groups of {given} parameters, this optimizer {have}: another model?"
            )
        for own, group in zip(self.param_groups, groups, strict=True):
            missing = set(own) & set(self._options) - set(group) - _LATER - self._unread(group)
            if missing:
                raise ValueError(f"state_dict is of another optimizer: its groups lack {sorted(missing)}")
            whole = self.whole(group) | {"params": own["params"]}
            self._check(whole)
            if whole["capturable"] and own["params"]:
                one_device(whole)
            muon.check_parameters(whole, self.name_of)
            state.check_states(self, own, self.whole(group), state_dict["state"])
        return state_dict | {"param_groups": groups}

    # ---- the step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient.

        Raises TypeError for sparse or complex gradients, ValueError for a parameter whose scale is zero and, in groups
        with ``error_if_nonfinite``, FloatingPointError for a gradient that is not finite, naming the parameter, before
        anything is changed. Ranks that share a sharded parameter raise it together, after an all-reduce of one number.
        """
        if closure is not None or self._is_watched():
            return self._watched_step(closure)
        self._update()
        return None

    step.hooked = True  # type: ignore[attr-defined] # torch wraps a step in its hooks and profiler, which we do if needed

    def _refuse_inside_views(self, call: str) -> None:
        if self._written.views:
            raise RuntimeError(
                f"{call} inside quantized() or latent(): the weights are not those of the training there; leave the "
                "context first"
            )

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
        if self._written.views:
            self._refuse_inside_views("step()")
        for group in groups:
            if group["error_if_nonfinite"]:
                gradients.check_finite(self, group)
        counts = bool(self.state) or not self._only_makes_state()
        steps = self._group_steps
        intact = len(steps) == len(groups) and same(list(self.state.values()), self._step_states)
        stale = [
            i
            for i, group in enumerate(groups)
            if not (intact and (steps[i].valid(self, group) or steps[i].took_up(self)))
        ]
        if stale or len(steps) != len(groups):
            steps = self._laid_out(stale if intact else list(range(len(groups))))
        for step in steps:
            step.step(self)
        if counts:
            for group in groups:
                if "anneal_step" in group and not group["capturable"]:
                    group["anneal_step"] += 1

    def _only_makes_state(self) -> bool:
        """Whether the first step of an annealed optimizer is one with lr = 0 and gradients of zero, by which
        torch.distributed.checkpoint makes the state: it changes no weights, and is no step of the training."""
        groups = self.param_groups
        if not any("anneal_step" in group and not group["capturable"] for group in groups):
            return False
        if any(float(group["lr"]) for group in groups):
            return False
        params = [p for group in groups for p in group["params"]]
        zero = not any(bool(sharded.local(p.grad).any()) for p in params if p.grad is not None)
        return bool(sharded.least_over_ranks(params, int(zero)))  # a rank may have the rows without gradient

    @torch.no_grad()
    def _laid_out(self, stale: list[int]) -> list[GroupStep]:
        """The steps of all groups, those of the groups ``stale`` laid out again."""
        groups = [self.param_groups[i] for i in stale]
        for group in groups:
            whole = self.whole(group)
            # Tensors on a device are left out: checks would wait for them.
            check_group({k: v for k, v in whole.items() if not isinstance(v, Tensor)}, self._options)
            if whole["bits"] != 0:
                self._check_quantised(whole)
            gradients.check_kinds(self, group)
            muon.check_parameters(whole, self.name_of)
        indices = [state.with_gradients(group) for group in groups]
        for group, chosen in zip(groups, indices, strict=True):
            state.ensure(self, group, chosen, stepping=True)
        for step in self._group_steps:
            if any(step.group is group for group in groups):
                self._written.retire(step)
        steps: dict[int, GroupStep] = dict(enumerate(self._group_steps))
        for i, group, chosen in zip(stale, groups, indices, strict=True):
            before = next((step for step in self._group_steps if step.group is group), None)
            steps[i] = GroupStep(self, group, chosen, i, before)
        self._group_steps = [steps[i] for i in range(len(self.param_groups))]
        self._step_states = list(self.state.values())
        for i, group in zip(stale, groups, strict=True):
            if not steps[i].valid(self, group):
                raise RuntimeError(
                    "a step cannot be laid out: a parameter or its state changed meanwhile, or the memory of a "
                    "gradient was freed or resized"
                )
        return self._group_steps

    # A compiled training step breaks its graph here: the update is one call of a compiled kernel as it is, and numbers
    # that change (lr, epsilon) cause no recompilation.
    _update_outside_of_graphs = torch._disable_dynamo(_update)  # type: ignore[attr-defined]

    def _hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """The numbers of :data:`quantopt.rules.HYPER` of a step: floats, and tensors if capturable."""
        numbers = {"lr": scheduled_value(group, "lr"), "weight_decay": group["weight_decay"]}
        base = group.get("base", self._base)
        if base == "adam":
            numbers["momentum"], numbers["beta2"] = group.get("betas", self._options["betas"])
            numbers["adam_eps"] = group.get("eps", self._options["eps"])
        elif base in ("sgd", "muon"):
            own = group if "momentum" in group else self.whole(group)
            numbers["momentum"] = own["momentum"]
        if group["bits"] != 0:
            numbers |= self._hyper(group)
        return numbers

    # ---- views of the weights ------------------------------------------------------------------------------------

    def quantized(self) -> contextlib.AbstractContextManager[None]:
        """Context in which every quantised parameter is its projection onto the levels; what the network ran with
        before is restored on exit, also on an exception. Do not step inside. FSDP2 gathers the weights anew inside and
        after it, also those of a module that was unsharded, so all ranks enter and leave it together."""
        return views.swapped(self, lambda group, p: views.projected(self, group, p))

    def latent(self) -> contextlib.AbstractContextManager[None]:
        """Context in which every quantised parameter is its latent weight (itself where the rule has none), as
        :meth:`quantized`."""
        return views.swapped(self, lambda _, p: sharded.local(views.operand(self, p)))

    @torch.no_grad()
    def quantization(self, p: nn.Parameter) -> Quantization | None:
        """Codes and outer levels of the projection of ``p``, or None if ``p`` is not quantised by this optimizer."""
        p = sharded.sharded_parameter(p)
        for group in self.param_groups:
            for i, own in enumerate(group["params"] if group["bits"] != 0 else ()):
                if own is p and p.numel():
                    state.ensure(self, group, [i])
                    return views.quantization(self, group, p)
        return None

    @torch.no_grad()
    def quantizations(self) -> dict[nn.Parameter, Quantization]:
        """:meth:`quantization` of every quantised parameter."""
        return {p: views.quantization(self, group, p) for group, p in views.quantised_params(self)}

    @torch.no_grad()
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per group: "bits" and "numel", and for quantised groups (of sharded parameters, this rank's shard)

        - "fraction_feasible": fraction of the weights in their interval, |t| >= t* (0.995 where there is no epsilon);
          with clamp=False |t| <= 1 + sqrt(e) too
        - "sign_flips": how many weights of the projection changed sign since the last call (0 at the first)
        - "distance": mean distance of the weights to their nearest level, in half-steps of the grid, 0..1
        - "scale": mean scale of the weights
        """
        return [views.metrics(self, group) for group in self.param_groups]


# Options that a state_dict may lack. Those of one base tell whether it is of another optimizer.
_LATER = set(SHARED) - {key for keys in BASE_OPTIONS.values() for key in keys}
_USUAL = {key: option.usual for key, option in OPTIONS.items() if option.usual is not None}
_LATER |= set(_USUAL)
