"""A packed weight as one record, and the geometry of a convolution: what every product is given, whole."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class PackedWeight(NamedTuple):
    """W = scale * sum_i plane_weights[i] * (±1 plane i of bits), [N, K], and the bias of its product.

    One plane is a binary weight; b planes weighted 1, 2, 4, ... the uniform grid of 2^b levels. One more plane of
    weight 1 makes it 2^b + 1 levels: two planes weighted 1, 1 are a ternary weight. Bits are row-major, least
    significant first, 1 = +1; bits beyond K are ignored.
    """

    bits: Tensor  # uint8 [N, ceil(K/8)], or [P, N, ceil(K/8)] with P planes
    scale: Tensor  # [1], [N], or [N, ceil(K/group_size)] with group_size
    bias: Tensor | None  # [N]
    in_features: int  # K; of a convolution, the length of a flattened output channel
    plane_weights: list[int]  # [P]
    group_size: int = 0  # consecutive weights of a row that share a scale; 0: scale is per tensor or per row
    tiles: Tensor | None = (
        None  # the bits in the order the kernels of their device read (quantopt/ops/tiles.py)
    )

    @property
    def planes(self) -> int:
        """P, the number of bit planes."""
        return planes_of(self.bits)

    @property
    def outputs(self) -> int:
        """N, the number of rows."""
        return self.bits.shape[-2]

    @property
    def scale_fp32(self) -> Tensor:
        """The scale as the kernels read it."""
        return self.scale if self.scale.dtype == torch.float32 else self.scale.float()

    def check(self) -> None:
        """Raises TypeError or ValueError naming the field that does not fit the others."""
        check_bits(self.bits, self.in_features, (2, 3))
        if not isinstance(self.group_size, int) or not 0 <= self.group_size < 2**31:
            raise ValueError(
                f"group_size must be an integer in 0..2^31-1 (0: no groups), not {self.group_size!r}"
            )
        if not isinstance(self.scale, Tensor) or not self.scale.is_floating_point():
            raise TypeError("scale must be a floating tensor")
        n = self.outputs
        shapes = [[n, -(-self.in_features // self.group_size)]] if self.group_size else [[1], [n]]
        if list(self.scale.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            hint = (
                "; scales per group need group_size" if self.scale.dim() == 2 and not self.group_size else ""
            )
            raise ValueError(f"scale must have shape {wanted}, not {list(self.scale.shape)}{hint}")
        bias = self.bias
        if bias is not None and (not isinstance(bias, Tensor) or not bias.is_floating_point()):
            raise TypeError(f"bias must be a floating tensor or None, not {kind_of(bias)}")
        if bias is not None and list(bias.shape) != [n]:
            raise ValueError(f"bias must have shape [{n}], not {list(bias.shape)}")
        if self.planes == 0:
            raise ValueError("bits must have at least one plane")
        weights = self.plane_weights
        if len(weights) != self.planes or not all(isinstance(w, int) and 1 <= w <= 128 for w in weights):
            raise ValueError(
                f"plane_weights must be {self.planes} integers in 1..128, one per plane, not {weights!r}"
            )

    def check_devices(self, x: Tensor) -> None:
        """Raises ValueError unless bits, scale and bias are on the device of ``x``."""
        for name, tensor in (("bits", self.bits), ("scale", self.scale), ("bias", self.bias)):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")

    def check_memory(self, x: Tensor) -> None:
        """Raises ValueError unless the memory of ``x`` and of all that is multiplied with it is there: what
        csrc/binary_arguments.cpp asks for the compiled kernels."""
        for name, tensor in (("x", x), ("bits", self.bits), ("scale", self.scale), ("bias", self.bias)):
            if tensor is not None:
                check_memory(name, tensor)


class ConvGeometry(NamedTuple):
    """How a kernel moves over an image, as in torch.nn.functional.conv2d; each pair is (vertical, horizontal)."""

    kernel_size: Sequence[int]
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)  # with zeros
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, x: Tensor) -> tuple[int, int]:
        """(H', W') of the convolution of ``x`` [..., H, W]; less than 1 where the kernel is larger than the image."""
        height, width = (
            (
                x.shape[axis - 2]
                + 2 * self.padding[axis]
                - self.dilation[axis] * (self.kernel_size[axis] - 1)
                - 1
            )
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        return height, width


def planes_of(bits: Tensor) -> int:
    """The number of planes of [N, ceil(K/8)] or [P, N, ceil(K/8)]."""
    return bits.shape[0] if bits.dim() == 3 else 1


def kind_of(value: object) -> str:
    """What an error message calls an argument: the dtype of a tensor, else its class."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a plain tensor reaches to its last element: torch lets it be freed or resized.

    Reading a tensor without memory ends the process. True for subclasses and for what a transform of torch wraps."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter) or tensor.numel() == 0:
        return True
    try:
        size = tensor.untyped_storage().nbytes()
    except NotImplementedError:  # wrapped by torch.func
        return True
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return size >= (tensor.storage_offset() + last + 1) * tensor.itemsize


def check_memory(name: str, tensor: Tensor) -> None:
    """Raises ValueError naming the argument unless its memory is there."""
    if not has_memory(tensor):
        raise ValueError(f"{name} has no memory: its storage was freed or resized")


def check_bits(bits: Tensor, in_features: int, dims: Sequence[int]) -> None:
    """Raises TypeError or ValueError unless ``bits`` are packed rows of ``in_features``, in so many dimensions."""
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        raise TypeError(f"bits must be a uint8 tensor as pack_signs returns it, not {kind_of(bits)}")
    if bits.dim() not in dims:
        raise ValueError(f"bits must be [N, ceil(K/8)] or [P, N, ceil(K/8)], not of shape {list(bits.shape)}")
    if not isinstance(in_features, int) or in_features < 0:
        raise ValueError(f"in_features must be an integer of at least 0, not {in_features!r}")
    if bits.shape[-1] != (in_features + 7) // 8:
        raise ValueError(
            f"in_features={in_features} needs {(in_features + 7) // 8} bytes per row, bits have {bits.shape[-1]}"
        )
