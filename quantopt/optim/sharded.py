"""Parameters of torch.distributed: DTensor (FSDP2, tensor parallelism) and the flat shards of FSDP1.

torch.distributed is not imported here before it has made a parameter.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(t: Any) -> bool:
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """The shard of this rank; any other tensor as it is."""
    if type(t) is Tensor or not is_sharded(t):
        return t
    # to_local() makes another Parameter of it at each call
    shard: Any = t._local_tensor  # type: ignore[attr-defined]
    if type(shard) is not Tensor and hasattr(shard, "wait"):  # a collective still fills it
        shard = shard.wait()
    assert isinstance(shard, Tensor)
    return shard


def local_gradient(p: Tensor) -> Tensor:
    """The shard of this rank of the gradient of ``p``. A gradient that is laid out otherwise than ``p``, such as the
    partial sums of sequence parallelism, is replaced by one that is laid out as ``p``."""
    grad: Any = p.grad
    if is_sharded(grad) and is_sharded(p) and grad.placements != p.placements:  # type: ignore[attr-defined]
        p.grad = grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local(grad)


def gathered(t: Tensor) -> Tensor:
    """All of a DTensor, gathered from all ranks; any other tensor as it is."""
    if not hasattr(t, "full_tensor"):
        return t
    mesh: Any = t.device_mesh  # type: ignore[attr-defined]
    if t.device.type == mesh.device_type:
        return t.full_tensor()  # type: ignore[no-any-return]
    # CPUOffloadPolicy: the shards are on the CPU, and the ranks communicate between devices
    return t.to(mesh.device_type).full_tensor().to(t.device)  # type: ignore[attr-defined, no-any-return]


def shard_like(scale: Tensor, w: Tensor, name: str) -> Tensor:
    """The rows of a scale that belong to this rank's rows of ``w``, as a DTensor that a checkpoint can reshard."""
    if not is_sharded(w) or scale.numel() == 1:
        return scale
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(w, DTensor)
    check_rows(w, name)
    return distribute_tensor(scale, w.device_mesh, w.placements)


def sharding_of(t: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of a sharded tensor, and its dimensions along which the ranks have different parts: the same on all
    ranks. None where each rank has all of ``t``."""
    if not is_sharded(t):
        return None
    dims = tuple(i for i, placement in enumerate(t.placements) if not placement.is_replicate())
    return (t.device_mesh, dims) if dims else None


def place_in(sharding: tuple[Any, tuple[int, ...]] | None) -> tuple[int, ...]:
    """Which part this rank has of tensors with this sharding: its coordinates along those dimensions of the mesh."""
    if sharding is None:
        return ()
    coordinates = sharding[0].get_coordinate()
    return tuple(coordinates[dim] for dim in sharding[1]) if coordinates else ()


def check_rows(w: Any, name: str) -> None:
    """Raises ValueError for a sharded parameter with rows of which a rank has a part."""
    if not all(placement.is_replicate() or placement.is_shard(0) for placement in w.placements):
        raise ValueError(
            f"{name} is sharded as {w.placements}: scales per channel and group need Shard(0); use scale='tensor' and "
            "a rule without a dynamic scale"
        )


def least_over_ranks(params: Iterable[Tensor], value: int) -> int:
    """The least ``value`` of the ranks that share the sharded ones of ``params``; ``value`` where none is sharded.

    One all-reduce per dimension of each mesh. The widest mesh comes last, so that its ranks learn what the ranks of
    the others have found.
    """
    meshes: dict[Any, None] = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))  # type: ignore[attr-defined]
    for mesh in sorted(meshes, key=lambda mesh: int(mesh.size())):
        if mesh.get_coordinate() is None:  # this rank is not in the mesh
            continue
        least = torch.tensor(value, device=mesh.device_type)
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group)
        value = int(least)
    return value


# ---- FSDP2 -------------------------------------------------------------------------------------------------------


def reshard(params: Iterable[Tensor]) -> None:
    """Frees the copies of ``params`` that FSDP2 has gathered, so that the next forward gathers the shards anew.

    FSDP2 keeps such copies after a forward without a backward (of the root module, and with
    ``reshard_after_forward=False``), after ``unshard()``, and after an exception. The ranks communicate at the next
    forward only, so all of them must have called this.
    """
    wanted = {id(p) for p in params if is_sharded(p)}
    if not wanted:
        return
    with _parts_of_fsdp():
        for state, group in _fsdp_groups():
            if any(id(p.sharded_param) in wanted for p in group.fsdp_params):
                state._state_ctx.post_optim_event = None  # of before; gathers wait for what is written now
                group.wait_for_unshard()  # a gather under way would bring the values of before
                group._to_sharded()  # the public reshard() does nothing after an exception in a forward


def sharded_parameter(t: Tensor) -> Any:
    """The parameter whose gathered copy ``t`` is; any other tensor as it is."""
    return _gathered_copies().get(id(t), t)


def shards_of(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """``params``, with the sharded parameters in the place of the copies that FSDP2 has gathered."""
    copies = _gathered_copies()
    return [copies.get(id(p), p) for p in params]  # type: ignore[misc]


def _gathered_copies() -> dict[int, Tensor]:
    """The ids of the copies that FSDP2 has gathered, with the parameters they are of."""
    copies: dict[int, Tensor] = {}
    with _parts_of_fsdp():
        for _, group in _fsdp_groups():
            for p in group.fsdp_params:
                for name in ("_unsharded_param", "_sharded_post_forward_param"):
                    if getattr(p, name, None) is not None:  # both are made at need
                        copies[id(getattr(p, name))] = p.sharded_param
    return copies


def _fsdp_groups() -> Iterator[tuple[Any, Any]]:
    """The states of all FSDP2 modules of the process, each with a group of parameters that it gathers together."""
    module_class = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if module_class is None:  # nobody has imported it
        return
    modules = list(sys.modules["torch.distributed._composable_state"]._module_state_mapping)
    states = [module._get_fsdp_state() for module in modules if isinstance(module, module_class)]
    for state in {id(state): state for state in states}.values():  # modules may share one
        if hasattr(state, "_fsdp_param_groups"):
            yield from ((state, group) for group in state._fsdp_param_groups)
        elif state._fsdp_param_group is not None:  # a torch with one group per module
            yield state, state._fsdp_param_group


@contextlib.contextmanager
def _parts_of_fsdp() -> Iterator[None]:
    """Context for the inner parts of FSDP2, which has no public way from a parameter to its module."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        raise RuntimeError(
            f"the parameters that fully_shard has gathered cannot be found in torch {torch.__version__} ({error}); "
            "use a version of torch that quantopt is tested with"
        ) from error


# ---- refusals ----------------------------------------------------------------------------------------------------


def check_parameters(
    group: dict[str, Any], name_of: Callable[[dict[str, Any], int], str], scales_in_rows: bool
) -> None:
    """Raises ValueError for parameters that an optimizer cannot train as they are. ``scales_in_rows``: whether their
    scales are per row, or per group of a row."""
    copies = _gathered_copies()
    for i, p in enumerate(group["params"]):
        check_flat_shard(p, group, name_of(group, i))
        if scales_in_rows and is_sharded(p) and p.dim() and p.shape[0] > 1:
            check_rows(p, name_of(group, i))
        if id(p) in copies:
            raise ValueError(
                f"{name_of(group, i)} is a copy that fully_shard has gathered and will free; call reshard() of the "
                "FSDP modules before their parameters are given to an optimizer"
            )


def check_flat_shard(p: Tensor, group: dict[str, Any], name: str) -> None:
    """Raises ValueError for parameters of FSDP1 in groups that must know their rows, or the other ranks."""
    if getattr(p, "_fsdp_flattened", False) and (group["bits"] != 0 or group["error_if_nonfinite"]):
        option = f"bits={group['bits']!r}" if group["bits"] != 0 else "error_if_nonfinite=True"
        raise ValueError(
            f"{name} is a flat shard of FSDP1 (FullyShardedDataParallel), of which neither rows nor ranks are known: "
            f"{option} needs FSDP2 (torch.distributed.fsdp.fully_shard), or DistributedDataParallel for NO_SHARD"
        )


__all__ = [
    "check_flat_shard",
    "check_parameters",
    "gathered",
    "is_sharded",
    "least_over_ranks",
    "local",
    "local_gradient",
    "place_in",
    "reshard",
    "shard_like",
    "sharded_parameter",
    "sharding_of",
    "shards_of",
]
