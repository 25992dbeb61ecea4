"""Activations of one bit."""

from typing import Any

import torch
from torch import Tensor, fx, nn


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # A NaN stays one, so that training notices it.
        return torch.where(x >= 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        exact = x.to(torch.promote_types(x.dtype, torch.float32)).tanh()
        derivative: Tensor = (1 - exact) * (1 + exact)
        slope: Tensor = gradients[0] * derivative
        return slope.to(x.dtype)


@fx.wrap
def sign_activation(x: Tensor) -> Tensor:
    """:class:`SignActivation` as a function."""
    return _Sign.apply(x)  # type: ignore[no-any-return]


class SignActivation(nn.Module):
    """Activations of one bit: the sign forward, the derivative of tanh backward (Leconte, Schechtman, Moulines,
    AISTATS 2023, for networks of binary weights and activations).

        y = sgn(x),  sgn(0) = +1
        gradient for x = gradient for y * (1 - tanh² x)

    The scale of x matters to the gradient alone: put a batch norm in front. x: any shape, a floating dtype, which y
    has too; the derivative is computed in float32 for 16 bits. A NaN stays NaN. :func:`quantopt.pack` leaves it as it
    is.
    """

    def forward(self, x: Tensor) -> Tensor:
        return sign_activation(x)
