"""The fused optimizer step: one pass over a list of tensors, with the backend that runs it."""

import torch
from torch import Tensor

from quantopt import backends
from quantopt.packed_weight import check_memory
from quantopt.reference.step import fused_step as _reference_step
from quantopt.rules import HYPER, StepRecord


def hyper_tensor(**values: float) -> Tensor:
    """The tensor ``hyper`` of a :class:`quantopt.rules.StepRecord`: float64, 0 for what is not named."""
    unknown = set(values) - set(HYPER)
    if unknown:
        raise ValueError(f"hyper_tensor: unknown {sorted(unknown)}; known are {list(HYPER)}")
    return torch.tensor([float(values.get(name, 0.0)) for name in HYPER], dtype=torch.float64)


def fused_step(record: StepRecord, backend: str = "auto") -> None:
    """Steps all parameters of ``record`` in place; the equations are in docs/algorithms.md.

    ``backend``: see :mod:`quantopt.backends`; the reference takes float64 too.

    Raises:
        ValueError, TypeError: where tensors do not fit each other; nothing has been changed then.
    """
    if not record.params:
        return
    momentum = record.momentum_buffers[0].dtype if record.momentum_buffers else record.params[0].dtype
    dtype = momentum if momentum.itemsize == 2 else record.params[0].dtype
    choice = backends.choose("fused_step", record.params[0].device, dtype, backend)
    if choice.name not in ("cpu", "cuda"):
        _check_tensors(record)
    if choice.name == "reference":
        _reference_step(record)
    elif choice.name == "triton":
        from quantopt.kernels import step as triton_step  # imports triton

        triton_step.fused_step(record)
    else:
        torch.ops.quantopt.fused_step(*record)


def _check_tensors(record: StepRecord) -> None:
    """Raises ValueError unless all memory is there, on one side of meta, and grad_scale and found_inf are one number.

    The compiled kernels ask the same in csrc/step_arguments.cpp and csrc/step_ops.cpp, and more."""
    record.check_meta()
    for name, tensor in record.tensors():
        check_memory(f"fused_step: {name}", tensor)
    for name in ("grad_scale", "found_inf"):
        number = getattr(record, name)
        if number is not None and number.numel() != 1:
            raise ValueError(f"fused_step: {name} must be one number, not of shape {list(number.shape)}")
