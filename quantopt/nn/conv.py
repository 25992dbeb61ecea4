"""BinaryConv2d, and BinaryConv1d over it."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quantopt.nn.linear import BinaryModule
from quantopt.nn.traced import leaf
from quantopt.ops.conv2d import run_conv2d
from quantopt.ops.tiles import conv_tiles
from quantopt.ops.weights import pack_signs
from quantopt.packed_weight import ConvGeometry


class BinaryConv2d(BinaryModule):
    """activation(conv2d) with W [out_channels, in_channels/groups, kh, kw] = scale * sum_i w_i (±1 plane i).

    The arguments in_channels to padding_mode are those of nn.Conv2d. levels, scale, group_size, compute and activation
    are those of :class:`BinaryLinear`; an output channel is a row, flattened.

    See :func:`quantopt.binary_conv2d` for what is fast. A new module has all weights -1 until a state_dict is loaded.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        levels: int = 2,
        scale: str = "channel",
        group_size: int = 0,
        compute: str = "auto",
        activation: str = "none",
        device: torch.device | str | None = None,
    ) -> None:
        # nn.Conv2d knows how to check and normalise its arguments.
        plain = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias=False,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        row_length = in_channels // groups * math.prod(plain.kernel_size)
        super().__init__(
            out_channels, row_length, bias, levels, scale, group_size, compute, activation, device
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, int] = plain.kernel_size  # type: ignore[assignment]
        self.stride: tuple[int, int] = plain.stride  # type: ignore[assignment]
        self.padding = plain.padding
        self.dilation: tuple[int, int] = plain.dilation  # type: ignore[assignment]
        self.groups = groups
        self.padding_mode = padding_mode
        # What the product itself pads with zeros; all else (other modes, "same") is padded before.
        self.explicit = padding_mode != "zeros" or isinstance(plain.padding, str)
        self.around: list[int] = list(plain._reversed_padding_repeated_twice)
        self.prepare()

    @property
    def geometry(self) -> ConvGeometry:
        """What the product is given; what is padded explicitly it does not pad."""
        padding: tuple[int, int] = (0, 0) if self.explicit else self.padding  # type: ignore[assignment]
        return ConvGeometry(self.kernel_size, self.stride, padding, self.dilation, self.groups)

    def _derive(self) -> Tensor | None:
        if self.bits.is_meta:
            return None
        channels = self.in_channels // self.groups
        return conv_tiles(self.bits, channels, self.kernel_size, self.groups, self.group_size)

    @property
    def weight(self) -> Tensor:
        """W as fp32 [N, C/groups, kh, kw], built at each access."""
        weight: Tensor = super().weight.unflatten(1, (-1, *self.kernel_size))
        return weight

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, compute: str = "auto") -> Self:
        """Binarises a layer: W = a sgn(weight), a = mean|weight| of each output channel."""
        weight = conv.weight.detach().flatten(1)
        module = cls.like(conv, compute=compute)
        module.set_weights(pack_signs(weight), weight.float().abs().mean(1), conv.bias)
        return module.train(conv.training)

    @classmethod
    def like(
        cls,
        conv: nn.Conv1d | nn.Conv2d,
        *,
        levels: int = 2,
        scale: str = "channel",
        group_size: int = 0,
        compute: str = "auto",
        activation: str = "none",
        bias: bool | None = None,
        device: torch.device | str = "meta",
    ) -> Self:
        """A new module with the geometry of ``conv``, by default without memory (:meth:`set_weights` brings it)."""
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None if bias is None else bias,
            conv.padding_mode,
            levels=levels,
            scale=scale,
            group_size=group_size,
            compute=compute,
            activation=activation,
            device=device,
        )

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return leaf(self, x)  # type: ignore[no-any-return]
        if (
            x.dim() not in (3, 4) or x.shape[-3] != self.in_channels
        ):  # bits do not show one channel more or less
            raise ValueError(f"x must be [B, {self.in_channels}, H, W], batched or not, not {list(x.shape)}")
        if self.explicit and any(self.around):
            x = F.pad(x, self.around, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return run_conv2d(x, self.packed, self.geometry, self.compute, self.activation)

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        ]
        defaults = {
            "padding": (0, 0),
            "dilation": (1, 1),
            "groups": 1,
            "padding_mode": "zeros",
            "group_size": 0,
        }
        parts += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        parts += [
            f"bias={self.bias is not None}, levels={self.levels}, scale={self.scale_kind}, compute={self.compute}"
            f"{self._activation_repr()}"
        ]
        return ", ".join(parts)


class BinaryConv1d(BinaryConv2d):
    """activation(conv1d) with W [out_channels, in_channels/groups, k], x [B, C, L] or [C, L].

    Arguments as in nn.Conv1d and :class:`BinaryConv2d`. It runs as a convolution of images of height 1, and its
    kernel_size, stride, padding and dilation are those of that convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        **options: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            (1, *_single(kernel_size)),
            (1, *_single(stride)),
            padding if isinstance(padding, str) else (0, *_single(padding)),
            (1, *_single(dilation)),
            groups,
            bias,
            padding_mode,
            **options,
        )

    @property
    def weight(self) -> Tensor:
        """W as fp32 [N, C/groups, k], built at each access."""
        return super().weight.squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return leaf(self, x)  # type: ignore[no-any-return]
        if x.dim() not in (2, 3) or x.shape[-2] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, L], batched or not, not {list(x.shape)}")
        return super().forward(x.unsqueeze(-2)).squeeze(-2)


def _single(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
