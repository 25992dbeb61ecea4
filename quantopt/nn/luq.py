"""Quantised activations, and LUQ: training with weights, activations and gradients of 4 bits.

LUQ (Chmiel, Banner, Hoffer, Ben-Yaacov, Soudry, ICLR 2023) is a method of layers, not an optimizer: the float weights
are rounded in each pass, and any optimizer trains them. It is plain PyTorch and runs on any device.

SAWB quantiser of weights and activations (Choi et al., 2019), b = 4, statistics over the whole tensor in each call:

    clip = 12.1 √(mean x²) - 12.2 mean|x|
    s = 2 clip / (Qp - Qn)
    x ↦ s round(clamp(x / s, Qn, Qp))

with Qn, Qp = -8, 7, for activations that are nowhere negative 0, 15; the gradient passes straight through. Where the
formula gives no positive clip (all |x| nearly equal), clip is max|x|.

Gradients, with a = max|g| / 2^7, are rounded at random to 0 or ±a 2^k, k = 0..7, such that the mean is g: below a to 0
or a, above to one of the two neighbouring powers. These are 17 values, one more than 4 bits can encode.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quantopt.reference.levels import sawb_clip
from quantopt.selection import choose, nothing_left

SAWB_BITS = 4
GRADIENT_OCTAVES = 7


def _sawb(x: Tensor, unsigned_if_possible: bool) -> Tensor:
    exact = x.detach().float()
    if exact.numel() == 0:
        return x.detach().clone()
    low, high = exact.new_tensor(-8.0), exact.new_tensor(7.0)
    if unsigned_if_possible:  # on the device: reading the sign on the host would synchronise
        negative = exact.amin() < 0
        low, high = torch.where(negative, low, 0.0), torch.where(negative, high, 15.0)
    step = 2 * sawb_clip(exact, 2**SAWB_BITS) / (high - low)
    step = torch.where(step > 0, step, 1.0)
    return (step * (exact / step).clamp(low, high).round()).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unsigned_if_possible: bool) -> Tensor:
        return _sawb(x, unsigned_if_possible)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0], None


@fx.wrap
def quantize_activation(x: Tensor) -> Tensor:
    """The SAWB quantiser of activations, of any shape and floating dtype; statistics in float32."""
    return _StraightThrough.apply(x, True)  # type: ignore[no-any-return]


def quantize_weight(w: Tensor) -> Tensor:
    """The SAWB quantiser of weights, of any shape and floating dtype; statistics in float32."""
    return _StraightThrough.apply(w, False)  # type: ignore[no-any-return]


def round_gradient(g: Tensor, repeat: int = 1) -> Tensor:
    """Unbiased rounding of ``g`` to 0 and ± a 2^k, the mean of ``repeat`` draws from torch's generator."""
    exact = g.float()
    if exact.numel() == 0:
        return g.clone()
    smallest = exact.abs().amax() / 2**GRADIENT_OCTAVES
    ratio = torch.where(smallest > 0, exact.abs() / smallest, 0.0)
    mantissa, exponent = torch.frexp(ratio)  # exact, where log2 would round at powers of two
    below = ratio < 1
    lower = torch.where(below, 0.0, torch.ldexp(torch.ones_like(ratio), exponent - 1))
    upper = torch.where(below, 1.0, 2 * lower)
    probability = torch.where(below, ratio, 2 * mantissa - 1)
    total = torch.zeros_like(exact)
    for _ in range(repeat):
        total += torch.where(torch.rand_like(probability) < probability, upper, lower)
    rounded: Tensor = exact.sign() * smallest * total / repeat
    return rounded.to(g.dtype)


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, repeat: int) -> Tensor:
        ctx.repeat = repeat
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return round_gradient(gradients[0], ctx.repeat), None


class SAWB(nn.Module):
    """Quantises its input, of any shape, to 4 bits by the SAWB rule, in training and in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return quantize_activation(x)


class LUQLinear(nn.Linear):
    """nn.Linear with weights, inputs and the gradients of its outputs at 4 bits. x [..., in_features].

    Made by :func:`luq`; ``repeat``: draws of which a gradient is the mean.
    """

    repeat: int = 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(quantize_activation(x), quantize_weight(self.weight), self.bias)
        return _RoundGradient.apply(y, self.repeat)  # type: ignore[no-any-return]


class LUQConv2d(nn.Conv2d):
    """nn.Conv2d with weights, inputs and the gradients of its outputs at 4 bits. x [N, C, H, W].

    Made by :func:`luq`; ``repeat``: draws of which a gradient is the mean.
    """

    repeat: int = 1

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(quantize_activation(x), quantize_weight(self.weight), self.bias)
        return _RoundGradient.apply(y, self.repeat)  # type: ignore[no-any-return]


_LUQ: dict[type, type] = {nn.Linear: LUQLinear, nn.Conv2d: LUQConv2d}


def _inner_layers(
    model: nn.Module, skip: Iterable[str], function: str
) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute, layer) of the layers to be converted; all are nn.Linear or nn.Conv2d."""
    choices = choose(model, 1, skip)
    chosen = {id(choice.parameter) for choice in choices if not choice.left_out}
    found = []
    for parent_name, parent in model.named_modules():
        for name, layer in parent.named_children():
            if id(getattr(layer, "weight", None)) not in chosen:
                continue
            if type(layer) not in _LUQ:
                full = f"{parent_name}.{name}".lstrip(".")
                raise ValueError(
                    f"{function}: layer {full} is {type(layer).__name__}; only nn.Linear and nn.Conv2d are converted. "
                    "Name its weight in skip"
                )
            found.append((parent, name, layer))
    if not found:
        raise ValueError(f"{function}: {nothing_left(choices, 'train the model as it is')}")
    return found


def luq(model: nn.Module, skip: Iterable[str] = ("first", "last"), repeat: int = 1) -> nn.Module:
    """Turns the layers of ``model`` into :class:`LUQLinear` and :class:`LUQConv2d`, in place; returns ``model``.

    The parameters and their names do not change. Train them with any float optimizer.

    Args:
        skip: as in :func:`quantopt.param_groups`.
        repeat: draws of which a gradient is the mean, at least 1.

    Raises:
        ValueError: naming the argument; nothing is changed then.
    """
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise ValueError(f"repeat={repeat!r}: must be an int of at least 1")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    for _, _, layer in _inner_layers(model, skip, "luq"):
        layer.__class__ = _LUQ[type(layer)]
        layer.repeat = repeat  # type: ignore[assignment]
    return model


def quantize_activations(model: nn.Module, skip: Iterable[str] = ("first", "last")) -> nn.Module:
    """Puts a :class:`SAWB` before each layer of ``model``, in place; returns ``model``.

    A layer becomes ``Sequential(SAWB(), layer)``, so its parameters' names get a ".1" and :func:`quantopt.pack` packs
    the layer as any other: with 4-bit weights, W4A4. Call it before the optimizer's groups are made. ``skip`` and
    errors as in :func:`luq`.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    for parent, name, layer in _inner_layers(model, skip, "quantize_activations"):
        setattr(parent, name, nn.Sequential(SAWB(), layer))
    return model
