"""What frameworks wrap around models and optimizers: names without the wrappers' parts, and what is wrapped."""

from collections.abc import Iterable
from typing import Any

# Parts that torch.compile, FSDP1 and activation checkpointing add to the names of parameters, at any depth.
_NAME_PARTS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Added by DataParallel, DistributedDataParallel and AveragedModel, in front of all names.
_PARALLEL = "module"


def plain_names(names: Iterable[str]) -> list[str]:
    """The names of a model's parameters, in the same order, without the parts that wrappers of the model add.

    A leading "module." goes only if every name has it, since a model may have a submodule of that name."""
    parts = [[part for part in name.split(".") if part not in _NAME_PARTS] for name in names]
    while parts and all(len(name) > 1 and name[0] == _PARALLEL for name in parts):
        parts = [name[1:] for name in parts]
    return [".".join(name) for name in parts]


def unwrapped_model(model: Any) -> Any:
    """The model within the wrappers that put "module." or "_orig_mod." in front of all its names."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "OptimizedModule" in kinds:
        return unwrapped_model(model._orig_mod)
    if kinds & {"DataParallel", "DistributedDataParallel", "AveragedModel", "DeepSpeedEngine"}:
        return unwrapped_model(model.module)
    return model


# Classes whose `optimizer` is the one within. Those of Lightning are bases of classes made for each optimizer.
_WRAPPERS = frozenset(("AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"))


def unwrapped(optimizer: Any) -> Any:
    """The optimizer within the wrappers of accelerate and Lightning; any other object as it is.

    Raises TypeError for torch's ZeroRedundancyOptimizer, whose ranks each hold a part of the parameters."""
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if "ZeroRedundancyOptimizer" in kinds:
        raise TypeError(
            "ZeroRedundancyOptimizer holds the parameters of one rank only; use FSDP2 (torch.distributed.fsdp."
            "fully_shard), or pass its .optim on each rank if that is what you want"
        )
    return unwrapped(optimizer.optimizer) if kinds & _WRAPPERS else optimizer
