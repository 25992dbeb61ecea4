"""Sharded parameters (DTensor of FSDP2 and tensor parallelism), without importing torch.distributed for others."""

from typing import Any

from torch import Tensor


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


def gathered(t: Tensor) -> Tensor:
    """All of a DTensor, gathered from all ranks; any other tensor as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def shard_like(scale: Tensor, w: Tensor, name: str) -> Tensor:
    """The rows of a scale that belong to this rank's rows of ``w``, as a DTensor that a checkpoint can reshard."""
    if not is_sharded(w) or scale.numel() == 1:
        return scale
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(w, DTensor)
    if not all(placement.is_replicate() or placement.is_shard(0) for placement in w.placements):
        raise ValueError(
            f"{name} is sharded as {w.placements}: scales per channel and group need Shard(0); use scale='tensor' and "
            "a rule without a dynamic scale"
        )
    return distribute_tensor(scale, w.device_mesh, w.placements)


__all__ = ["gathered", "is_sharded", "local", "shard_like"]
