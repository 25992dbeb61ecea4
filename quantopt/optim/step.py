"""The step of one group: the arguments of the fused step, made once and used until something they depend on changes."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantopt import _extension
from quantopt.backends import choose
from quantopt.levels import level_count
from quantopt.ops.step import fused_step, hyper_tensor
from quantopt.optim.muon import Directions
from quantopt.optim.sharded import is_sharded, local, local_gradient, place_in, sharding_of
from quantopt.optim.state import PARAMETER, SIGNS, STATE, facts_of
from quantopt.optim.written import Mark, mark
from quantopt.rules import HYPER, StepRecord

if TYPE_CHECKING:
    from quantopt.optim.base import LevelOptimizer

State = dict[str, Any]


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    if _extension.same is not None:
        return bool(_extension.same(a, b))
    return len(a) == len(b) and all(map(operator.is_, a, b))


def holds(dicts: list[State], keys: tuple[str, ...], values: list[tuple[Any, ...]]) -> bool:
    """Whether ``dicts[i][keys[k]]`` is ``values[i][k]`` for all i and k."""
    if _extension.holds is not None:
        return bool(_extension.holds(dicts, keys, values))
    missing = object()
    return all(
        d.get(key, missing) is value
        for d, row in zip(dicts, values, strict=True)
        for key, value in zip(keys, row, strict=True)
    )


class GroupStep:
    """The step of one group. ``valid()`` looks up the gradients and says whether ``step()`` may run."""

    def __init__(
        self,
        opt: LevelOptimizer,
        group: dict[str, Any],
        indices: list[int],
        group_index: int,
        before: GroupStep | None,
    ) -> None:
        """``indices``: of the parameters that take part. ``before``: the step of this group that it replaces."""
        self.group = group
        self.backend = opt.backend
        self.layout_keys = opt.layout_keys(group)
        self.layout_values = tuple(group[key] for key in self.layout_keys)
        self.group_size = len(group)
        self.has_momentum = bool(group.get("momentum"))
        self.adds_to_step = group["bits"] != 0 and opt.adds_to_step(group)
        self.all_params = list(group["params"])
        self.params = [group["params"][i] for i in indices]
        self.is_current = True  # False: valid() is False from now on
        self.has_stepped = False
        self.used: Tensor | None = None  # the numbers that gave the weights, where `hyper` may be later ones
        self.hyper: Tensor  # float64, in the order of HYPER; in capturable groups on the device
        self.written: dict[str, float]  # the floats that `hyper` holds; empty where that is not known
        self.replayed: bool  # whether the replay of a graph writes floats into `hyper`
        device = self.params[0].device if group["capturable"] and self.params else torch.device("cpu")
        if before is not None and before.hyper.device == device:  # a captured graph may read it, and write it
            self.hyper, self.written, self.replayed = before.hyper, before.written, before.replayed
        else:
            self.hyper = torch.zeros(len(HYPER), dtype=torch.float64, device=device)
            self.written, self.replayed = {}, False

        whole = opt.whole(group)
        draws = whole["rounding"] == "stochastic" or whole["exp_avg_sq_dtype"] == "bfloat16"
        parts: dict[tuple[torch.dtype, torch.device, Any], list[nn.Parameter]] = {}
        for p in self.params:
            parts.setdefault((p.dtype, p.device, sharding_of(p) if draws else None), []).append(p)
        taking_part = set(map(id, self.params))
        self.left_out = [p for p in self.all_params if id(p) not in taking_part]
        self.buckets = [
            Bucket(opt, group, (group_index, i), place_in(sharding), self.hyper, params, self.left_out)
            for i, ((_, _, sharding), params) in enumerate(parts.items())
        ]
        self.counted = any(bucket.counted for bucket in self.buckets)
        self.on_cuda = any(bucket.device.type == "cuda" for bucket in self.buckets)
        # Buckets whose plan looks up the gradients also see whether a parameter that was left out has one now.
        self.looks_at_left_out = not any(bucket.finds_gradients for bucket in self.buckets)

    def valid(self, opt: LevelOptimizer, group: dict[str, Any]) -> bool:
        """Whether the group has the options, tensors and state it had, and the same parameters have gradients."""
        if not (
            self.is_current
            and group is self.group
            and opt.backend == self.backend
            and len(group) == self.group_size
            and bool(group.get("momentum")) == self.has_momentum
            and same(group["params"], self.all_params)
            and holds([group], self.layout_keys, [self.layout_values])
        ):
            return False
        for bucket in self.buckets:
            if not bucket.valid():
                return False
        return not (self.looks_at_left_out and any(p.grad is not None and p.numel() for p in self.left_out))

    @functools.cached_property
    def _places(self) -> dict[nn.Parameter, tuple[Bucket, int]]:
        return {p: (bucket, i) for bucket in self.buckets for i, p in enumerate(bucket.params)}

    def options(self) -> dict[str, Any]:
        """The options of the group that the step was laid out with."""
        return dict(zip(self.layout_keys, self.layout_values, strict=True))

    def has_state(self, group: dict[str, Any], p: nn.Parameter, state: State) -> bool:
        """Whether this is a step of ``group`` in which ``p`` takes part with ``state``."""
        if not self.is_current or self.group is not group or p not in self._places:
            return False
        bucket, i = self._places[p]
        return bucket.states[i] is state

    def wrote(self, p: nn.Parameter) -> bool:
        """Whether this is the last step that ``p`` took part in."""
        return self.is_current and self.has_stepped and p in self._places

    def was_written(self, p: nn.Parameter) -> bool:
        """Whether somebody else has written to ``p`` since."""
        bucket, i = self._places[p]
        return bucket.was_written(i)

    def numbers(self) -> tuple[float, ...] | None:
        """The numbers that gave the weights, in the order of HYPER; None where only steps with lr = 0 were taken."""
        numbers = (self.hyper if self.used is None else self.used).tolist()
        return tuple(numbers) if self.has_stepped and numbers[0] > 0 else None

    def took_up(self, opt: LevelOptimizer) -> bool:
        """Whether writes of others are all that has changed. What they wrote is taken up then."""
        if not (self.is_current and self.has_stepped and self.counted):
            return False
        for bucket in self.buckets:
            for i in bucket.written():
                opt._written.take_up(opt, self.group, bucket.params[i], stepping=True)
            bucket.note_writes()
        return self.valid(opt, self.group)

    def rule_of(self, p: nn.Parameter) -> str:
        return self._places[p][0].record.rule

    def step(self, opt: LevelOptimizer) -> None:
        """The update; nothing is checked here but that a graph may be captured."""
        if not self.buckets:
            return
        values, tensors = opt._hyperparameters(self.group), None
        momentum = values.get("momentum", 0.0)
        if self.group["capturable"]:
            tensors = {name: value.reshape(()) for name, value in values.items() if isinstance(value, Tensor)}
            values = {name: value for name, value in values.items() if name not in tensors}
        elif self.on_cuda:
            self._refuse_capture()
        grad_scale, found_inf = getattr(opt, "grad_scale", None), getattr(opt, "found_inf", None)
        if self.counted and (found_inf is not None or values.get("lr") == 0):  # the weights stay, or may stay
            if self.used is None:
                self.used = self.hyper.clone() if self.has_stepped else torch.zeros_like(self.hyper)
        elif self.used is not None:
            self.used = None
        if values != self.written:
            self._write(values)
        if tensors:  # on the device: a CUDA graph reads their values when it is replayed
            torch._foreach_copy_([self.hyper[HYPER.index(name)] for name in tensors], list(tensors.values()))
        for bucket in self.buckets:
            bucket.step(grad_scale, found_inf, opt.backend, momentum)
        self.has_stepped = True
        if self.used is not None:
            self._keep_numbers(found_inf)
        if self.adds_to_step:
            opt._after_step(self.group, self.params)
            for bucket in self.buckets:
                bucket.note_writes()

    def _keep_numbers(self, found_inf: Tensor | None) -> None:
        """The numbers of a step that has changed the weights, into `used`; without waiting for a device."""
        device = self.hyper.device if found_inf is None else found_inf.device
        assert self.used is not None
        used, hyper = self.used.to(device), self.hyper.to(device)
        stayed = hyper[0] == 0
        if found_inf is not None:
            stayed = stayed | (found_inf.reshape(()) != 0)
        self.used = used.copy_(torch.where(stayed, used, hyper))

    def _write(self, values: dict[str, float]) -> None:
        """Floats that have changed, into `hyper`; on a device as the arguments of kernels, as a copy would wait."""
        if self.hyper.device.type == "cpu":
            self.hyper.copy_(hyper_tensor(**values))
        else:
            for name, value in values.items():
                if self.written.get(name) != value:
                    self.hyper[HYPER.index(name)].fill_(value)
        # A capture writes nothing now, and each replay writes again: from then on no step can rely on what is there.
        self.replayed = self.replayed or is_capturing(self.hyper.device)
        self.written = {} if self.replayed else values

    def _refuse_capture(self) -> None:
        if any(is_capturing(bucket.device) for bucket in self.buckets):
            raise RuntimeError(
                "a CUDA graph is being captured, and capturable=False: the learning rate and the annealed numbers "
                "would be those of now at every replay; use capturable=True"
            )


class Bucket:
    """The parameters of one dtype and device of a group: one call of the fused step. Where random numbers are drawn,
    all of them are also sharded alike.

    Where compiled kernels run, a plan holds the checked arguments. It looks up the gradients itself
    (``finds_gradients``), unless they belong to DTensors or have another layout than their parameters. On muon the
    kernels take directions in place of the gradients.
    """

    def __init__(
        self,
        opt: LevelOptimizer,
        group: dict[str, Any],
        place: tuple[int, int],
        part: tuple[int, ...],
        hyper: Tensor,
        params: list[nn.Parameter],
        left_out: list[nn.Parameter],
    ) -> None:
        """``place``: index of the group, and of the bucket in it. ``part``: which part of the parameters this rank has,
        () if all."""
        self.params = params
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.states = [opt.state[p] for p in params]
        self.state_keys = tuple(key for key in self.states[0] if key != SIGNS)
        self.state_values = [tuple(state[key] for key in self.state_keys) for state in self.states]
        self.sharded = any(map(is_sharded, params))
        self.shards: list[Tensor] = [local(p) for p in params] if self.sharded else list(params)
        self.copied: list[tuple[Tensor, Tensor]] = []  # (tensor, copy in a layout that kernels take)
        self.grads: list[Tensor] = []
        self.directions: Directions | None = None  # of muon
        self.record = self._record(opt, group, place, part, hyper)
        self.weights = list(self.record.params)
        self.looked_at = [
            (p, shard, shard.shape, shard.stride(), w, w.stride())
            for p, shard, w in zip(params, self.shards, self.weights, strict=True)
        ]
        self.plan: Any = None
        self.finds_gradients = False
        # Whether weights and state lie in memory as they did, and nobody has written to them.
        self.watch: Any = None
        # Where p is a function of other tensors, a value that somebody else has written to it is taken up by those.
        self.counted = bool(self.record.latents)
        counted: list[Tensor] = []
        if self.counted:
            counted = [*params, *self.shards] if self.sharded else list(params)
        self.marks = list(map(mark, params)) if self.counted else []  # a `watch` has later versions
        if choose("fused_step", self.device, self.dtype, opt.backend).name == self.device.type:
            self.plan = _extension.StepPlan(self.record, [] if self.sharded else left_out, counted)
            self.watch = self.plan.watched
            plain = all(type(p) in (nn.Parameter, Tensor) for p in params) and not self.copied
            self.finds_gradients = plain and self.directions is None and self.plan.valid()
        elif _extension.TensorWatch is not None and all(
            type(t) in (nn.Parameter, Tensor) for t in self.shards
        ):
            tensors = [local(value) for values in self.state_values for value in values]
            self.watch = _extension.TensorWatch([*self.shards, *tensors], counted)

    def _record(
        self,
        opt: LevelOptimizer,
        group: dict[str, Any],
        place: tuple[int, int],
        part: tuple[int, ...],
        hyper: Tensor,
    ) -> StepRecord:
        facts = facts_of(opt, group, self.dtype)
        weights = [self._as_dense(w, state) for w, state in zip(self.shards, self.states, strict=True)]
        tensors: dict[str, list[Tensor]] = {}
        for w, state in zip(weights, self.states, strict=True):
            for key in self.state_keys:
                value = local(state[key])
                if STATE[key].layout == PARAMETER and value.stride() != w.stride():
                    value = self._copy(value, torch.empty_like(w, dtype=value.dtype))
                tensors.setdefault(key, []).append(value)
        base, maximize, nesterov = facts.base, group["maximize"], group["nesterov"]
        if base == "muon":
            self.directions = Directions(opt.whole(group), weights, tensors.pop("momentum_buffer"))
            base, maximize, nesterov = "given", False, False
        exp_avg_sqs = tensors.get("exp_avg_sq", [])
        narrow = bool(exp_avg_sqs) and facts.exp_avg_sq_dtype == torch.bfloat16
        # each group has a random stream, as the kernels count the tensors of a list from 0
        seed = (group["seed"] + place[0] * 0x9E3779B97F4A7C15) % 2**62
        # and each part of sharded parameters, as they count its elements from 0
        for number in (place[1], *part) if part else ():
            seed = (seed * 0x5851F42D4C957F2D + number + 1) % 2**62
        return StepRecord(
            rule=facts.rule.name,
            base=base,
            params=weights,
            grads=(),
            momentum_buffers=tensors.get("exp_avg", tensors.get("momentum_buffer", [])),
            exp_avg_sqs=exp_avg_sqs,
            latents=tensors.get("latent", tensors.get("master", [])),
            scales=tensors.get("scale", []),
            latent_bounds=tensors.get("sigma", []),
            steps=tensors.get("step", []),
            hyper=hyper,
            levels=level_count(group["bits"]),
            group_size=group["group_size"],
            dynamic_scale=facts.rule.quantised and opt._dynamic_scale(group),
            nesterov=nesterov,
            maximize=maximize,
            decoupled=group["decoupled_weight_decay"],
            seed=seed if facts.stochastic else -1,
            # of which a group may have buckets of several dtypes
            state_seed=(seed + place[1] * 0xBF58476D1CE4E5B9) % 2**62 if narrow else -1,
        )

    def _as_dense(self, w: Tensor, state: State) -> Tensor:
        """A weight as the kernels take it: dense, with the elements that share a scale consecutive in memory."""
        if w.is_contiguous() or w.numel() == 0:  # a rank may have no rows
            return w
        scale = state.get("scale")
        dense = torch.ops.aten.is_non_overlapping_and_dense(w) and (
            scale is None
            or scale.numel() == 1
            or (scale.dim() == 1 and w.stride(0) == w.numel() // w.shape[0])
        )
        return w if dense else self._copy(w, torch.empty_like(w, memory_format=torch.contiguous_format))

    def _copy(self, tensor: Tensor, copy: Tensor) -> Tensor:
        self.copied.append((tensor, copy))
        return copy

    def valid(self) -> bool:
        """Whether the tensors are those the record was made of; looks up the gradients."""
        if not holds(self.states, self.state_keys, self.state_values):
            return False
        if self.finds_gradients:
            return bool(self.plan.valid())
        if self.watch is not None:
            if self.plan is None and not self.watch.unchanged():
                return False
        elif self.counted and list(map(mark, self.params)) != self.marks:
            return False
        grads = None
        if _extension.find_gradients is not None:
            grads = _extension.find_gradients(self.params, self.shards, self.weights)
        if grads is not None:
            self.grads = grads
        else:  # some must be copied, or something has changed
            with torch.no_grad():
                if not self._find_gradients():
                    return False
        taken = self.grads if self.directions is None else self.directions.tensors
        return self.plan is None or bool(self.plan.valid(taken))

    def _find_gradients(self) -> bool:
        """Puts the gradients, in their weights' dtype and layout, into ``grads``. False where a parameter has none or
        has changed."""
        self.grads = []
        dtype, device, strided = self.dtype, self.device, torch.strided
        for p, shard, shape, stride, w, w_stride in self.looked_at:
            g: Any = p.grad
            if g is None or p.dtype is not dtype or p.device != device:
                return False
            if self.sharded:
                if local(p) is not shard:
                    return False
                g = local_gradient(p)
            if shard.shape != shape or shard.stride() != stride or g.layout is not strided:
                return False
            if g.dtype is not dtype or g.stride() != w_stride or g.is_neg() or type(g) is not Tensor:
                if g.is_complex():
                    return False
                g = torch.empty_like(w).copy_(g)
            self.grads.append(g)
        return True

    def step(
        self, grad_scale: Tensor | None, found_inf: Tensor | None, backend: str, momentum: float
    ) -> None:
        """The update with the gradients that valid() found. ``momentum``: of muon, which the kernels do not know."""
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.device, torch.float32)
        if found_inf is not None:
            found_inf = found_inf.to(self.device, torch.float32)
        if self.finds_gradients:
            self.plan.step(grad_scale, found_inf)
            return
        with torch.no_grad():
            for tensor, copy in self.copied:
                copy.copy_(tensor)
            if self.directions is not None:
                self.grads = self.directions.update(self.grads, momentum, grad_scale, found_inf)
                grad_scale = None  # they are divided by it
            if self.plan is not None:
                self.plan.step(grad_scale, found_inf)
            else:
                record = self.record._replace(grads=self.grads, grad_scale=grad_scale, found_inf=found_inf)
                fused_step(record, backend)
            for tensor, copy in self.copied:
                tensor.copy_(copy)
        self.grads = []
        torch.autograd.graph.increment_version(self.params)
        self.note_writes()

    def note_writes(self) -> None:
        """The parameters hold what the optimizer wrote."""
        if self.watch is not None:
            self.watch.note_writes()
        elif self.counted:
            self.marks = list(map(mark, self.params))

    def was_written(self, i: int) -> bool:
        """Whether somebody else has written to a parameter since the last step, or put another tensor in its place."""
        return self.counted and mark(self.params[i]) != self._mark(i)

    def written(self) -> list[int]:
        """The parameters for which :meth:`was_written` is true."""
        if not self.counted:
            return []
        return [i for i in range(len(self.params)) if self.was_written(i)]

    def _mark(self, i: int) -> Mark:
        """The mark of a parameter after the last step."""
        if self.watch is None:
            return self.marks[i]
        places = (i, i + len(self.params)) if self.sharded else (i,)
        return self.marks[i]._replace(versions=tuple(map(self.watch.version, places)))


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of ``device``, which need not be the current one."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
