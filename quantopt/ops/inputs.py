"""What the products share besides the weights: their modes, the checks of x, and how gradients pass its rounding."""

import torch
from torch import Tensor

from quantopt.packed_weight import kind_of
from quantopt.reference import binary as reference

COMPUTE = ("exact", "bf16", "int8")  # and "auto", see compute_mode
ACTIVATIONS = ("none", "relu", "gelu", "silu")


def compute_mode(compute: str) -> str:
    """The mode that ``compute`` stands for: "auto" is "exact", what loses accuracy is asked for by name."""
    if compute not in (*COMPUTE, "auto"):
        raise ValueError(f'compute must be "auto", "exact", "bf16" or "int8", not {compute!r}')
    return "exact" if compute == "auto" else compute


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "none", "relu", "gelu" or "silu", not {activation!r}')


def check_floating(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, not {kind_of(x)}")
    if type(x) is not Tensor and hasattr(x, "to_local"):
        raise TypeError(
            "x is a DTensor, but packed layers run whole on one rank: leave them out of the plan of parallelize_module "
            "and give them x.full_tensor(), or run a copy of the packed model on each rank"
        )


def needs_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd records a product of x with this bias."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def straight_through(x: Tensor, dims: int, compute: str) -> Tensor:
    """What "int8" or "bf16" rounds x to, the former over its last ``dims`` dimensions, with the gradient of x; fp32 as
    in the kernels."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    values = x.detach()
    if compute == "bf16":
        error = reference.round_to_bfloat16(values) - values
        return x + torch.where(values.isinf(), 0.0, error)
    q, s = reference.quantize_rows(values.flatten(-dims))
    return x + ((q * s).view(x.shape) - values)
