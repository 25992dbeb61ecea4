"""Sharded models (FSDP2, tensor parallelism: their parameters are DTensors) while they are packed."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from quantopt.optim.sharded import is_sharded, least_over_ranks, reshard, shards_of

# What fully_shard, parallelize_module and other composable functions of torch put into a module beside its parameters.
_STATE, _APPLIED = "__composable_api_state_key", "_distribute_module_applied"
_HOOKS_OF = tuple(f"torch.distributed.{part}." for part in ("fsdp", "tensor", "_composable"))


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a rank has only a part of some parameter of ``model``, or has all of it for a while."""
    return any(p is not own or is_sharded(p) for p, own in _parameters(model))


def has_result(model: nn.Module, all_ranks: bool) -> bool:
    """Whether this rank gets the packed copy of a sharded model: the first of the meshes of the parameters, which need
    not have rank 0 of the job, as that of a pipeline stage."""
    meshes: Any = {own.device_mesh for _, own in _parameters(model) if is_sharded(own)}  # type: ignore[attr-defined]
    return all_ranks or all(set(mesh.get_coordinate() or ()) == {0} for mesh in meshes)


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Context of what some ranks of a sharded model do by themselves: where one raises an error, all of them do."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    done = least_over_ranks([own for _, own in _parameters(model)], int(error is None))
    if error is not None:
        raise error
    if not done:
        raise ValueError("the packed copy was refused on another rank, which says why")


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of a model, each with the sharded one if it is a gathered copy."""
    params = list(model.parameters())
    return zip(params, shards_of(params), strict=True)


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context in which the modules have the classes, attributes and hooks from before ``fully_shard`` and
    ``parallelize_module``, so that they can be looked at and copied; their parameters stay DTensors."""
    reshard([own for _, own in _parameters(model)])
    saved = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        for module, kind, attributes in saved:
            for key, value in attributes.items():
                if key.startswith(_STATE) or key == _APPLIED:
                    del vars(module)[key]
                elif key.endswith("_hooks") and value:
                    own = {name: hook for name, hook in value.items() if not _is_of_torch(hook)}
                    vars(module)[key] = type(value)(own)
            module.__class__ = _class_before(kind)
        yield
    finally:
        for module, kind, attributes in saved:
            module.__class__ = kind
            vars(module).update(attributes)


def _class_before(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module before ``fully_shard`` made it one that cannot be copied."""
    wrapper = kind.__mro__[1]
    made = "__deepcopy__" in vars(kind) and wrapper.__module__.startswith("torch.distributed.")
    return kind.__mro__[2] if made else kind


def _is_of_torch(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(_HOOKS_OF)
